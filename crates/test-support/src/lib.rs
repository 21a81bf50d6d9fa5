//! Building blocks for tests against real servers and real services, each test with its own.
//!
//! Everything here panics where a test would unwrap, with what was expected, what happened instead, and the end of the
//! failed process's log. Everything started ends when the value that holds it is dropped, and with the test process.
//!
//! ```no_run
//! # async fn example() {
//! use std::{process::Command, time::Duration};
//! use test_support::{Receiver, Service, binary, free_port, nats, postgres};
//!
//! let (postgres, nats, receiver) = (postgres().await, nats().await, Receiver::start().await);
//! receiver.on("/hook", [503, 200]);
//! let health = format!("127.0.0.1:{}", free_port());
//! let mut command = Command::new(binary("webhook-notifier"));
//! command.env("DATABASE_URL", postgres.url()).env("NATS_URL", nats.url()).env("HEALTH_LISTEN", &health);
//! let mut notifier = Service::spawn("webhook-notifier", command);
//! notifier.wait_for_http(&format!("http://{health}/readyz"), Duration::from_secs(10)).await;
//! # }
//! ```

mod binaries;
mod eventually;
mod proxy;
mod receiver;
mod service;

pub use crate::{
    binaries::{binary, build},
    eventually::{Outcome, eventually},
    proxy::{Proxy, Wire},
    receiver::{Receiver, Reply, Request},
    service::Service,
};
pub use dev_stack::{Authorization, LocalNats, LocalPostgres, NatsOptions, PostgresOptions, Tls, process::Signal};

use dev_stack::Install;
use std::{sync::Once, time::Duration};
use tokio::sync::OnceCell;

/// A fresh Postgres with an empty database, ready in a fraction of a second: most of it is copied from a template in
/// the target directory. Commits survive a kill, but not a power cut.
pub async fn postgres() -> LocalPostgres {
    postgres_with(PostgresOptions::throwaway()).await
}

/// A fresh Postgres with these options.
pub async fn postgres_with(options: PostgresOptions) -> LocalPostgres {
    installed().await;
    let options = PostgresOptions { template: Some(binaries::profile_dir().join("postgres-template")), ..options };
    LocalPostgres::start(options, &say).await.unwrap_or_else(|error| panic!("{error}"))
}

/// A fresh nats-server with JetStream and no streams.
pub async fn nats() -> LocalNats {
    nats_with(NatsOptions::throwaway()).await
}

/// A fresh nats-server with these options.
pub async fn nats_with(options: NatsOptions) -> LocalNats {
    installed().await;
    LocalNats::start(options, &say).await.unwrap_or_else(|error| panic!("{error}"))
}

/// Three fresh nats-servers as one cluster, with JetStream and no streams.
pub async fn nats_cluster() -> Vec<LocalNats> {
    installed().await;
    let started = LocalNats::start_cluster(3, NatsOptions::throwaway(), &say).await;
    started.unwrap_or_else(|error| panic!("{error}"))
}

/// A free port of 127.0.0.1, which no other test gets, in this process or another.
pub fn free_port() -> u16 {
    dev_stack::port::free().expect("a free port")
}

/// An HTTP client that follows no redirects, with a timeout of 30 s.
pub fn http_client() -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // It fails if the test has installed one already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(Duration::from_secs(30))
        .no_proxy()
        .build()
        .expect("an HTTP client")
}

async fn installed() {
    static INSTALLED: OnceCell<()> = OnceCell::const_new();
    let install = async || match dev_stack::ensure_installed(Install::Allowed, &say).await {
        Ok(()) => (),
        Err(error) => panic!("{error}"),
    };
    INSTALLED.get_or_init(install).await;
}

fn say(line: &str) {
    eprintln!("{line}");
}
