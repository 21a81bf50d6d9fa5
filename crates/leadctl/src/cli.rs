//! The command line.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::{
    audit,
    commands::{
        call, callback, console, deliveries, events, key, lead, listen, migrate, process, project, recover, secrets,
        source, stats, update,
    },
    dead_letters, doctor, exit_status, import,
    output::{self, timeline},
};

/// Runs Leadrelay on one machine, and administers it anywhere.
#[derive(Debug, Parser)]
#[command(
    name = "leadctl",
    version,
    after_help = format!(
        "Examples:\n  \
        leadctl up --demo                       the whole system on this machine, with a demo\n  \
        leadctl project create --name Sales     first step; then process apply, key create\n  \
        leadctl update get 6b0426971c73026dafa27e40\n\n{}",
        exit_status::TABLE
    )
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(dev_stack::up::Up),
    Migrate(migrate::Migrate),
    /// Projects: each has its own leads, processes and keys.
    #[command(subcommand)]
    Project(project::Project),
    /// Processes: states, transitions, callbacks and policies.
    #[command(subcommand)]
    Process(process::Process),
    /// API keys of the HTTP API.
    #[command(subcommand)]
    Key(key::Key),
    /// Leads and their history.
    #[command(subcommand)]
    Lead(lead::Lead),
    /// Lead updates, over the HTTP API.
    #[command(subcommand)]
    Update(update::Update),
    /// Calls with leads.
    #[command(subcommand)]
    Call(call::Call),
    Import(import::Import),
    /// Keys that seal callbacks' and sources' secrets.
    #[command(subcommand)]
    Secrets(secrets::Secrets),
    /// Callbacks: URLs that get the outcomes of updates.
    #[command(subcommand)]
    Callback(callback::Callback),
    /// Sources: voice platforms that report calls.
    #[command(subcommand)]
    Source(source::Source),
    /// The operator console: sign in to it.
    #[command(subcommand)]
    Console(console::Console),
    /// Deliveries of outcomes to callbacks: list, show and redeliver them.
    #[command(subcommand)]
    Deliveries(deliveries::Deliveries),
    /// Completion events: outcomes of updates as they are announced.
    #[command(subcommand)]
    Events(events::Events),
    Stats(stats::Stats),
    Listen(listen::Listen),
    Audit(audit::Audit),
    Doctor(doctor::Doctor),
    Recover(recover::Recover),
    /// Messages that could not be applied: show and replay them.
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLetters),
    /// Print a completion script for a shell.
    #[command(after_help = "Examples:\n  source <(leadctl completions bash)\n  \
                            leadctl completions zsh > ~/.zfunc/_leadctl\n  \
                            leadctl completions fish > ~/.config/fish/completions/leadctl.fish")]
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// Runs the command of this process's arguments.
#[tokio::main]
pub async fn main() -> ExitCode {
    let result = match service_kit::config::parse() {
        Ok(cli) => run(cli).await,
        Err(e) => Err(e),
    };
    result.unwrap_or_else(|e| {
        output::note(format_args!("{e:#}"));
        exit_status::error_code(&e).into()
    })
}

/// Runs the command; returns the exit code if there was no error.
async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Up(up) => up.run(timeline::render).await?,
        Command::Migrate(migrate) => migrate.run().await?,
        Command::Project(project) => project.run().await?,
        Command::Process(process) => process.run().await?,
        Command::Key(key) => key.run().await?,
        Command::Secrets(secrets) => secrets.run().await?,
        Command::Lead(lead) => return lead.run().await,
        Command::Update(update) => return update.run().await,
        Command::Call(call) => return call.run().await,
        Command::Import(import) => return import.run().await,
        Command::Callback(callback) => callback.run().await?,
        Command::Source(source) => source.run().await?,
        Command::Console(console) => console.run().await?,
        Command::Deliveries(deliveries) => deliveries.run().await?,
        Command::Events(events) => events.run().await?,
        Command::Listen(listen) => listen.run().await?,
        Command::Stats(stats) => stats.run().await?,
        Command::Audit(audit) => return audit.run().await,
        Command::Doctor(doctor) => return doctor.run().await,
        Command::Recover(recover) => recover.run().await?,
        Command::DeadLetters(dead_letters) => dead_letters.run().await?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "leadctl", &mut script);
            output::say(String::from_utf8_lossy(&script).trim_end());
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_commands_help_has_an_example() {
        fn walk(command: &clap::Command, path: &str, without: &mut Vec<String>) {
            let path = format!("{path} {}", command.get_name());
            // A group of commands has no example of its own.
            if !command.has_subcommands() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                if !help.contains(path.trim_start()) {
                    without.push(path.trim_start().to_owned());
                }
            }
            command.get_subcommands().for_each(|command| walk(command, &path, without));
        }
        let mut without = Vec::new();
        walk(&Cli::command(), "", &mut without);
        assert!(without.is_empty(), "no example in the --help of {without:?}");
    }

    #[test]
    fn completion_scripts_contain_commands_and_options() {
        for shell in <Shell as clap::ValueEnum>::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "leadctl", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(["import", "dead-letters", "expected-version"].iter().all(|word| script.contains(word)), "{shell}");
        }
    }
}
