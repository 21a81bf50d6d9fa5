//! Leadrelay as a whole: its real binaries as processes, on real NATS and Postgres, each test with its own.

mod audit;
mod bad_input;
mod continuity;
mod deliveries;
mod door;
mod history;
mod main_job;
mod model;
mod producers;
mod stack;
