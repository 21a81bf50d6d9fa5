//! Leadrelay as a whole: its real binaries as processes, on real NATS and Postgres, each test with its own.

mod bad_input;
mod continuity;
mod deliveries;
mod main_job;
mod producers;
mod stack;
