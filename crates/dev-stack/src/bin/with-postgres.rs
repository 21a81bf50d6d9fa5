//! `with-postgres SCHEMA=MIGRATIONS... -- COMMAND ARGUMENTS...`
//!
//! Starts a temporary Postgres, applies each directory of migrations to its schema in the given order, runs the command
//! with `DATABASE_URL` set, and exits with its exit code. Used to run `cargo sqlx prepare` and `cargo check`.

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
    // Stopped here, because dropping it stops it only in the background.
    postgres.kill9().await?;
    Ok(code(status.with_context(|| format!("running {}", command[0]))?))
}

/// As in a shell: 128 plus the signal's number for a process killed by a signal.
fn code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
