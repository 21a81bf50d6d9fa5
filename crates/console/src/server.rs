//! The console's lifecycle: start, connection to NATS, shutdown.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use contract::streams::API_KEYS;
use futures::future::BoxFuture;
use secrets::{TokenKey, new_sealing_key};
use service_kit::{
    health::{self, Liveness, Readiness},
    http::{self, Limits},
    kv::BucketCache,
    lifecycle::{DRAIN_DEADLINE, Tasks},
    metrics, nats,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    app::{App, Broker},
    config::{Config, PublicUrl},
    gateway::Gateway,
    router,
    visit_rate::VisitRate,
};

/// Most connections. People need a few; a higher limit would let a flood of connections take memory.
const MAX_CONNECTIONS: usize = 512;
/// How long requests in progress may take to finish once the console stops.
const REQUEST_DRAIN: Duration = Duration::from_secs(12);

/// Runs the console on the configured address until shutdown.
///
/// # Errors
/// The configuration is invalid, or a task failed.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(async move {
        let listener = http::bind(config.listen).await?;
        run_on(listener, config, shutdown).await
    })
}

/// Runs the console on a socket that already listens; `config.listen` is ignored.
///
/// # Errors
/// The configuration is invalid, or a task failed.
pub fn run_on(
    listener: TcpListener,
    config: Config,
    shutdown: CancellationToken,
) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(run_until(shutdown, listener, config))
}

async fn run_until(shutdown: CancellationToken, listener: TcpListener, config: Config) -> anyhow::Result<()> {
    let health_listener = http::bind(config.health.health_listen).await?;
    let address = listener.local_addr().context("cannot read the console's address")?;
    let public = PublicUrl::new(address, config.url.as_deref())?;
    tracing::info!(%address, url = public.origin, "console");
    let key = match &config.key {
        Some(key) => key.expose().to_owned(),
        None => new_sealing_key(rand::random()),
    };
    let session_key =
        TokenKey::parse(&key).context("CONSOLE_KEY is not a key; generate one with `openssl rand -base64 32`")?;
    let readiness = Readiness::default();
    // Before the health endpoints are served, so that the console does not look ready between two steps.
    readiness.not_ready(API_KEYS, "not found yet");
    let registry = metrics::registry("console");
    let app = Arc::new(App {
        keys: BucketCache::default(),
        broker: OnceLock::new(),
        session_key,
        public,
        gateway: Gateway::new(&config.gateway_url)?,
        live: Arc::default(),
        visit_rate: VisitRate::default(),
        shutdown: shutdown.clone(),
    });
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn_background(
        "health",
        health::serve(health_listener, readiness.clone(), Liveness::default(), registry, shutdown.clone()),
    );
    tasks.spawn("api keys", follow_keys(app.clone(), config, readiness, shutdown.clone()));
    tasks.spawn("http", async move {
        let limits = Limits { connections: MAX_CONNECTIONS, ..Limits::default() };
        let deadline = async {
            shutdown.cancelled().await;
            tokio::time::sleep(REQUEST_DRAIN).await;
        };
        tokio::select! {
            served = http::serve(listener, router::router(app), limits, shutdown.clone()) => served?,
            () = deadline => tracing::warn!("requests that did not finish within {REQUEST_DRAIN:?} are cut"),
        }
        Ok(())
    });
    tasks.run(DRAIN_DEADLINE).await
}

/// Connects, then watches the API keys: a session with a revoked key ends. Until the keys are read, pages say that the
/// console is starting.
async fn follow_keys(
    app: Arc<App>,
    config: Config,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let connect = async {
        let client = nats::connect(&config.nats, "console", &readiness).await?;
        let js = nats::jetstream(&client);
        anyhow::Ok(app.broker.get_or_init(|| Broker::new(client, js)))
    };
    let broker = tokio::select! {
        broker = connect => broker?,
        () = shutdown.cancelled() => return Ok(()),
    };
    app.keys.follow(&broker.js, API_KEYS, readiness, shutdown).await
}
