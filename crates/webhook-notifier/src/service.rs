//! Starts and stops the webhook-notifier: what it waits for, and the tasks that it runs.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::service::Service;
use contract::streams::{LEAD_EVENTS, PROCESSES};
use secrets::SealingKeys;
use service_kit::{health::Readiness, http, lifecycle, lifecycle::Tasks, nats, rpc, traces::Traces};
use sqlx::PgPool;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    admission::limiter::Slots,
    api, backlog,
    callback_health::Health,
    callbacks::Callbacks,
    deliver::Deliverer,
    dispatch,
    dispatch::consumer::{Dispatcher, Lane},
    dispatch::ordering::Turns,
    housekeeping,
    http::client::Poster,
    http::guard::Guard,
    metrics::Metrics,
    outbox, recorder,
    retry::Retrier,
    store,
};

/// How long the last acks may take to leave.
const FLUSH: Duration = Duration::from_secs(2);

/// Runs a webhook-notifier until shutdown. Several share the work.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let keys = config.secrets.keys()?;
    let traces = Traces::from_env("webhook-notifier")?;
    let readiness = Readiness::default();
    readiness.not_ready(dispatch::consumer::READY, "not pulling yet");
    let mut tasks = Tasks::new(shutdown.clone());
    let health = http::bind(config.health.health_listen).await?;
    let mut registry = service_kit::metrics::registry("webhook_notifier");
    let metrics = Metrics::new(&mut registry);
    tasks.spawn_background("health", service_kit::health::serve(health, readiness.clone(), registry, shutdown.clone()));
    // The micro service answers as long as it is held.
    let (client, _service) = tokio::select! {
        started = start(&config, keys, &mut tasks, &readiness, (metrics, traces.clone()), &shutdown) => started?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let ended = tasks.run(lifecycle::DRAIN_DEADLINE).await;
    // Acks are only handed to the client: without this the last ones might not leave.
    let (flushed, ()) = tokio::join!(tokio::time::timeout(FLUSH, client.flush()), traces.end());
    if !matches!(flushed, Ok(Ok(()))) {
        tracing::warn!("the last acks may not have left: what they were for is looked at again");
    }
    ended
}

/// Brings the `webhooks` schema up to date.
pub async fn migrate(pool: &PgPool) -> anyhow::Result<()> {
    store::schema().migrate(pool).await
}

/// This version's migrations that the database does not have.
pub async fn lacking_migrations(pool: &PgPool) -> anyhow::Result<Vec<i64>> {
    store::schema().missing_migrations(pool).await.context("cannot read the migrations of webhooks")
}

/// Waits for everything that is needed, and starts the tasks.
async fn start(
    config: &Config,
    keys: SealingKeys,
    tasks: &mut Tasks,
    readiness: &Readiness,
    (metrics, traces): (Metrics, Traces),
    shutdown: &CancellationToken,
) -> anyhow::Result<(async_nats::Client, Service)> {
    let guard = Guard { allow_networks: config.allow_networks.clone(), allow_http: config.allow_http };
    let poster = Poster::new(guard.clone())?;
    let client = nats::connect(&config.nats, "webhook-notifier", readiness).await?;
    let pool = store::connect(&config.database, readiness).await?;
    if config.no_migrate {
        store::schema().wait_until_migrated(&pool, readiness).await;
    } else {
        migrate(&pool).await?;
    }
    // Before anything is recorded: what went to the default partition would have to be moved.
    housekeeping::make_partitions(&pool).await;
    let js = nats::jetstream(&client);
    nats::stream(&js, LEAD_EVENTS).await?;
    let health = Health::new(config.disable_after);
    health.sync(&pool).await.context("cannot read how callbacks fare")?;
    let callbacks = Arc::new(Callbacks::new(nats::bucket(&js, PROCESSES).await?, health, keys, guard));
    let to_announce = Arc::new(Notify::new());
    let (recorder, recording) =
        recorder::recorder(pool.clone(), readiness.clone(), to_announce.clone(), metrics.clone());
    let slots = Slots::new(config.max_in_flight);
    let turns = Arc::new(Turns::default());
    let deliverer = Arc::new(Deliverer {
        callbacks: callbacks.clone(),
        slots: slots.clone(),
        poster,
        schedule: config.retry_schedule.clone(),
        recorder,
        metrics: metrics.clone(),
        turns: turns.clone(),
        traces,
    });
    let service = rpc::service(&client, "webhook-notifier", "Tells callback URLs what became of updates").await?;
    api::callbacks::serve(tasks, &service, &pool, &callbacks, &slots, shutdown).await?;
    api::recovery::serve(tasks, &service, &client, &pool, (&callbacks, &turns), shutdown).await?;
    api::ping::serve(tasks, &service, &deliverer, shutdown).await?;

    let token = || shutdown.clone();
    let (view, follow_js, follow_readiness, follow_token) =
        (callbacks.view.clone(), js.clone(), readiness.clone(), token());
    tasks.spawn("processes", async move { view.follow(&follow_js, PROCESSES, follow_readiness, follow_token).await });
    let (locked, locked_readiness, locked_token) = (callbacks.clone(), readiness.clone(), token());
    tasks.spawn("secrets", async move { locked.follow_locked(&locked_readiness, locked_token).await });
    tasks.spawn("backlog", backlog::watch(pool.clone(), js.clone(), metrics.backlog.clone(), token()));
    let (health_pool, health_readiness, health_token) = (pool.clone(), readiness.clone(), token());
    tasks.spawn("callbacks", async move {
        callbacks.health.follow(&health_pool, &slots, &metrics, &health_readiness, health_token).await
    });
    tasks.spawn("partitions", housekeeping::partitions(pool.clone(), config.delivery_retention, token()));
    tasks.spawn("retention", housekeeping::retention(js.clone(), config.event_retention.into(), token()));
    tasks.spawn("announce", outbox::run(js.clone(), pool.clone(), to_announce, token()));
    // Ends when the two below, who report to it, have ended.
    tasks.spawn("record", recording.run());
    let retrier = Retrier { pool: pool.clone(), deliverer: deliverer.clone(), readiness: readiness.clone() };
    tasks.spawn("retry", retrier.run(token()));
    tasks.spawn("turns", turns.run(js.clone(), pool.clone(), deliverer.slots.clone(), token()));
    let lining_up = Dispatcher::new(Lane::InOrder, js.clone(), pool.clone(), deliverer.clone(), readiness.clone());
    tasks.spawn("line up", lining_up.run(token()));
    tasks.spawn("dispatch", Dispatcher::new(Lane::All, js, pool, deliverer, readiness.clone()).run(token()));
    Ok((client, service))
}
