//! `leadctl`, the operator's command: the whole system on one machine (`up`, with a demo), migrations, projects,
//! processes, API keys, updates and callbacks.

mod admin;
mod audit;
mod callback;
mod cli;
mod dead_letters;
mod deliveries;
mod demo;
mod doctor;
mod events;
mod exit;
mod files;
mod gateway_client;
mod import;
mod key;
mod lead;
mod migrate;
mod output;
mod pages;
mod printable;
mod process;
mod progress;
mod project;
mod reading;
mod receiver;
mod recover;
mod secrets;
mod send;
mod servers;
mod story;
mod up;
mod update;
mod watch;

pub use crate::{
    cli::{Cli, run},
    exit::code,
};
