//! `leadctl`, the operator's command: projects, processes, API keys, updates and callbacks; imports, audits, diagnosis
//! and recovery. `leadctl up` is in the crate `dev-stack`.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod audit;
mod cli;
mod clients;
mod commands;
mod dead_letters;
mod doctor;
mod exit_status;
mod import;
mod output;

pub use crate::cli::{Cli, main};
