//! `owner [DIR]`: runs a Postgres and a nats-server, in DIR or in temporary directories, and prints their pids and
//! directories. The tests kill it.

use dev_stack::{Error, LocalNats, LocalPostgres, NatsOptions, PostgresOptions};
use std::path::PathBuf;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from);
    let at = |name: &str| dir.as_ref().map(|dir| dir.join(name));
    let say = |line: &str| eprintln!("{line}");
    let postgres = PostgresOptions { dir: at("postgres"), ..PostgresOptions::throwaway() };
    let postgres = LocalPostgres::start(postgres, &say).await?;
    let nats = LocalNats::start(NatsOptions { dir: at("nats"), ..NatsOptions::throwaway() }, &say).await?;
    println!("{} {}", postgres.pid(), postgres.dir().display());
    println!("{} {}", nats.pid(), nats.dir().display());
    std::future::pending().await
}
