//! Leadrelay as a whole: its real binaries as processes, on real NATS and Postgres, each test with its own.

mod accounts;
mod again;
mod audit;
mod backlog;
mod bad_input;
mod bulk;
mod continuity;
mod dead_letters;
mod deliveries;
mod door;
mod fairness;
mod faults;
mod guard;
mod history;
mod lifecycle;
mod main_job;
mod model;
mod observability;
mod producers;
mod recover;
mod requests;
mod secrets;
mod stack;
mod story;
mod tenancy;
mod tls;
