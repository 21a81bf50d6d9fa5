//! A private Postgres and a private nats-server as child processes: for `leadctl up`, for tests and for benches.
//!
//! Each server lives in one directory: data, log and password, so that a start on the same directory continues
//! where the last one ended, under the same URL. Without a directory it is a throw-away that leaves nothing behind.
//!
//! No server outlives its owner, however the owner ends: see [`process`]. A directory has one owner at a time, and
//! what an owner left running in it after all is stopped before the next start.
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
mod home;
mod nats;
pub mod port;
mod postgres;
pub mod process;
mod programs;
mod tls;
mod user;

pub use crate::{
    error::Error,
    nats::{Authorization, LocalNats, NatsOptions},
    postgres::{LocalPostgres, PostgresOptions},
    programs::{Install, NATS_SERVER_VARIABLE, ensure_installed},
    tls::Tls,
    user::User,
};

/// Where progress goes, one line at a time.
pub type Say<'a> = &'a (dyn Fn(&str) + Sync);

/// Tells nobody.
pub fn quiet(_line: &str) {}
