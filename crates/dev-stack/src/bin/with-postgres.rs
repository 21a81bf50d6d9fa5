//! `with-postgres SCHEMA=MIGRATIONS... -- COMMAND ARGUMENTS...`
//!
//! Starts a throw-away Postgres, runs each directory of migrations into its schema, in the order given, then runs the
//! command with `DATABASE_URL` set, and exits as it did. `cargo sqlx prepare` and the like run under it.

use anyhow::{Context, Result, ensure};
use dev_stack::{Install, LocalPostgres, PostgresOptions};
use sqlx::{Connection, PgConnection, migrate::Migrator};
use std::{
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{ExitCode, ExitStatus},
};

const USAGE: &str = "usage: with-postgres SCHEMA=MIGRATIONS... -- COMMAND ARGUMENTS...";

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let split = arguments.iter().position(|argument| argument == "--").context(USAGE)?;
    let (migrations, command) = (&arguments[..split], &arguments[split + 1..]);
    ensure!(!command.is_empty(), USAGE);

    let say = |line: &str| eprintln!("{line}");
    dev_stack::ensure_installed(Install::Allowed, &say).await?;
    let mut postgres = LocalPostgres::start(PostgresOptions::throwaway(), &say).await?;
    let mut connection = PgConnection::connect(&postgres.url()).await.context("connecting to the new Postgres")?;
    for migration in migrations {
        let (schema, dir) = migration.split_once('=').with_context(|| format!("{migration}: {USAGE}"))?;
        let mut migrator = Migrator::new(Path::new(dir)).await.with_context(|| format!("reading {dir}"))?;
        migrator.create_schema(schema.to_owned());
        migrator.dangerous_set_table_name(format!("{schema}._sqlx_migrations"));
        migrator.run(&mut connection).await.with_context(|| format!("migrating {schema}"))?;
    }
    connection.close().await.ok();

    let mut command_line = tokio::process::Command::new(&command[0]);
    let status = command_line.args(&command[1..]).env("DATABASE_URL", postgres.url()).status().await;
    // Not merely dropped: whoever looks next finds it gone.
    postgres.kill9().await?;
    Ok(code(status.with_context(|| format!("running {}", command[0]))?))
}

/// As a shell tells it: a death by signal is 128 and the signal.
fn code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
