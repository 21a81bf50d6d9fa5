//! 1 Accept: the gateway's lifecycle: start, connection to NATS, shutdown.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use contract::{
    streams::{API_KEYS, LEAD_COMMANDS, PROCESSES},
    subject,
};
use futures::{StreamExt, future::BoxFuture};
use service_kit::{
    health::{self, Liveness, Readiness},
    http::{self, Limits},
    kv::BucketCache,
    lifecycle::{DRAIN_DEADLINE, Tasks},
    metrics, nats,
    publisher::Publisher,
    traces::Traces,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    app::{App, Broker},
    config::Config,
    intake,
    key_uses::WRITE_INTERVAL,
    metrics::Metrics,
    outage::LEADER_PATIENCE,
    rate_limit::EVICTION_INTERVAL,
    routes::{self, ENDPOINTS, INGEST},
    tls::Certificate,
};

/// How long requests in progress may take to finish once the gateway stops. Equals the longest wait for the log's
/// leader. Together with the wait for the last acks it is shorter than [`DRAIN_DEADLINE`], so that a slow client does
/// not make the shutdown fail.
const REQUEST_DRAIN: Duration = LEADER_PATIENCE;

/// How long responses ask clients to close their connections before idle connections are closed. Longer catches clients
/// that send less often; the time is taken from [`DRAIN_DEADLINE`].
const CLOSE_NOTICE: Duration = Duration::from_secs(2);

/// Runs the gateway on the configured address until shutdown.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(async move {
        let listener = http::bind(config.listen).await?;
        run_on(listener, config, shutdown).await
    })
}

/// Runs the gateway on a socket that already listens; `config.listen` is ignored.
pub fn run_on(
    listener: TcpListener,
    config: Config,
    shutdown: CancellationToken,
) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(run_until(shutdown, listener, config))
}

async fn run_until(shutdown: CancellationToken, listener: TcpListener, config: Config) -> anyhow::Result<()> {
    let health_listener = http::bind(config.health.health_listen).await?;
    tracing::info!(address = %listener.local_addr()?, "HTTP API");
    let certificate = match (&config.tls_cert, &config.tls_key) {
        (Some(chain), Some(key)) => Some(Certificate::load(chain.clone(), key.clone()).await?),
        _ => None,
    };
    let readiness = Readiness::default();
    // All before the health endpoints are served, so that the gateway does not look ready between two steps.
    for resource in [LEAD_COMMANDS, API_KEYS, intake::RESOURCE] {
        readiness.not_ready(resource, "not found yet");
    }
    let mut registry = metrics::registry("gateway");
    let traces = Traces::from_env("gateway")?;
    let paths = ENDPOINTS.iter().map(|endpoint| endpoint.path).chain([INGEST]);
    let app = Arc::new(App::new(&config, BucketCache::default(), Metrics::new(&mut registry, paths), traces.clone()));
    let mut tasks = Tasks::new(shutdown.clone());
    // There are no liveness checks: every wait of the gateway belongs to a request with a deadline.
    let health = health::serve(health_listener, readiness.clone(), Liveness::default(), registry, shutdown.clone());
    tasks.spawn_background("health", health);
    tasks.spawn("api keys", follow_keys(app.clone(), config.clone(), readiness.clone(), shutdown.clone()));
    tasks.spawn("intake", intake::run(app.clone(), config.nats.clone(), readiness, shutdown.clone()));
    tasks.spawn("key uses", write_key_uses(app.clone(), shutdown.clone()));
    tasks.spawn("rate limits", evict_idle(app.clone(), shutdown.clone()));
    let mut tls = None;
    if let Some(certificate) = certificate {
        tls = Some(certificate.server_config()?);
        tasks.spawn("tls certificate", certificate.follow(shutdown.clone()));
    }
    tasks.spawn("http", async move {
        let limits = Limits {
            connections: config.max_connections as usize,
            connections_per_address: config.max_connections_per_address as usize,
            header_timeout: config.header_timeout.into(),
            write_timeout: config.write_timeout.into(),
            close_notice: CLOSE_NOTICE,
        };
        let deadline = async {
            shutdown.cancelled().await;
            app.outcome_waiters.close();
            app.event_subscribers.stop();
            app.command_log.outage.close();
            app.idempotency.outage.close();
            tokio::time::sleep(CLOSE_NOTICE + REQUEST_DRAIN).await;
        };
        tokio::select! {
            served = http::serve_tls(listener, routes::router(app.clone()), limits, tls, shutdown.clone()) => served?,
            () = deadline => tracing::warn!("requests that did not finish within {REQUEST_DRAIN:?} are cut"),
        }
        app.command_log.drained().await;
        Ok(())
    });
    let ended = tasks.run(DRAIN_DEADLINE).await;
    traces.end().await;
    ended
}

/// Connects, then watches the API keys, the sources of call reports, and the work of projects. Requests before that get
/// 503.
async fn follow_keys(
    app: Arc<App>,
    config: Config,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let connect = async {
        let client = nats::connect(&config.nats, "gateway", &readiness).await?;
        let js = nats::jetstream(&client);
        let commands = Publisher::observed(js.clone(), app.metrics.publishing.clone());
        let broker = app.broker.get_or_init(|| Broker { client, js, commands });
        let log = nats::stream(&broker.js, LEAD_COMMANDS).await?;
        app.command_log.admission.set_log_bytes(log.cached_info().config.max_bytes);
        readiness.ready(LEAD_COMMANDS);
        anyhow::Ok(broker)
    };
    let broker = tokio::select! {
        broker = connect => broker?,
        () = shutdown.cancelled() => return Ok(()),
    };
    // Not a part of the gateway's readiness: without the sources, only reports of voice platforms are refused.
    let sources = app.sources.follow(&broker.js, PROCESSES, Readiness::default(), shutdown.clone());
    tokio::select! {
        followed = app.keys.follow(&broker.js, API_KEYS, readiness, shutdown) => followed,
        followed = sources => followed,
        ended = follow_work(&app, broker) => ended,
    }
}

/// Charges projects for the work that lead-state reports, until shutdown.
async fn follow_work(app: &App, broker: &Broker) -> anyhow::Result<()> {
    let mut reports = broker.client.subscribe(subject::WORK).await.context("cannot subscribe to reports of work")?;
    while let Some(report) = reports.next().await {
        match serde_json::from_slice(&report.payload) {
            Ok(report) => app.command_log.budget.correct(&report, Instant::now()),
            Err(e) => tracing::warn!("a report of work cannot be read: {e}"),
        }
    }
    anyhow::bail!("the subscription to reports of work ended")
}

/// Writes the last uses of API keys from time to time until shutdown, and then once more.
async fn write_key_uses(app: Arc<App>, shutdown: CancellationToken) -> anyhow::Result<()> {
    loop {
        let is_running = shutdown.run_until_cancelled(tokio::time::sleep(WRITE_INTERVAL)).await.is_some();
        if let Some(broker) = app.broker.get() {
            app.key_uses.write(&broker.js).await;
        }
        if !is_running {
            return Ok(());
        }
    }
}

/// Removes full buckets of the rate limits, and idle accounts of the budgets, until shutdown.
async fn evict_idle(app: Arc<App>, shutdown: CancellationToken) -> anyhow::Result<()> {
    while shutdown.run_until_cancelled(tokio::time::sleep(EVICTION_INTERVAL)).await.is_some() {
        app.rates.evict_idle();
        app.command_log.budget.evict_idle(Instant::now());
        app.read_budget.evict_idle(Instant::now());
    }
    Ok(())
}
