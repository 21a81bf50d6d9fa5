//! A private Postgres and a private nats-server as child processes, for tests, benches and `leadctl up`; and, with the
//! feature `up`, `leadctl up` itself: both servers, the three services and a demo.
//!
//! Each server has one directory for data, log and password. A second start on the same directory continues with the
//! same data under the same URL. Without a directory the server is temporary and leaves no files behind.
//!
//! No server outlives its owner, however the owner ends: see [`process`]. A directory has one owner at a time; a server
//! that a previous owner left running is stopped before the next start.
//!
//! ```no_run
//! # async fn example() -> Result<(), dev_stack::Error> {
//! use dev_stack::{Install, LocalNats, LocalPostgres, NatsOptions, PostgresOptions};
//!
//! let say = |line: &str| eprintln!("{line}");
//! dev_stack::ensure_installed(Install::Allowed, &say).await?;
//! let postgres = LocalPostgres::start(PostgresOptions::durable("data/postgres"), &say).await?;
//! let nats = LocalNats::start(NatsOptions::durable("data/nats"), &say).await?;
//! println!("{}\n{}", postgres.url(), nats.url());
//! # Ok(())
//! # }
//! ```

mod error;
mod nats;
mod nats_cluster;
pub mod port;
mod postgres;
pub mod process;
mod programs;
mod server_dir;
mod tls;
#[cfg(feature = "up")]
pub mod up;
mod user;

pub use crate::{
    error::Error,
    nats::{Authorization, ClusterMember, LocalNats, NatsOptions},
    postgres::{LocalPostgres, PostgresOptions},
    programs::{Install, NATS_SERVER_VARIABLE, ensure_installed},
    tls::Tls,
    user::User,
};

/// Receives progress messages, one line each.
pub type Say<'a> = &'a (dyn Fn(&str) + Sync);

/// Ignores progress.
pub fn quiet(_line: &str) {}
