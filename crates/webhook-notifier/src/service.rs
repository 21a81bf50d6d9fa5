//! Starts and stops the webhook-notifier: waits for its dependencies, then runs its tasks.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context;
use async_nats::service::Service;
use contract::streams::{LEAD_EVENTS, PROCESSES};
use futures::future::BoxFuture;
use secrets::SealingKeys;
use service_kit::{
    config::DatabaseConfig,
    health::{Liveness, Readiness},
    http, lifecycle,
    lifecycle::Tasks,
    nats,
    nats::error_chain,
    postgres::{Pool, PostgresMetrics, Supervision, schema::retry_until_ready},
    rpc,
    traces::Traces,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::ConcurrencyLimiter,
    api::{callbacks::CallbackApi, deliveries::DeliveryApi, ping::serve_pings, sources::serve_sources},
    backlog,
    callback_health::CallbackHealth,
    callbacks::Callbacks,
    config::Config,
    deliver::Deliverer,
    dispatch::{
        consumer::EventConsumer,
        erasures::Erasures,
        event::{ConsumerRole, EventDispatcher},
        memory::EventMemory,
        ordering::LeadOrdering,
        parked::ParkedEvents,
    },
    housekeeping,
    http::{
        client::CallbackClient,
        dns::Dns,
        guard::Guard,
        own_addresses::{OwnAddresses, OwnServers},
    },
    metrics::Metrics,
    operational::OperationalEvents,
    outbox,
    recorder::{RecordingTask, recorder},
    retry::Retrier,
    store::{self, error::StoreError},
};

/// Runs a webhook-notifier until shutdown. Replicas share the work.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(run_until(shutdown, config))
}

async fn run_until(shutdown: CancellationToken, config: Config) -> anyhow::Result<()> {
    let keys = config.secrets.keys()?;
    let traces = Traces::from_env("webhook-notifier")?;
    let readiness = Readiness::default();
    readiness.not_ready(ConsumerRole::Deliver.readiness(), "not pulling yet");
    let mut tasks = Tasks::new(shutdown.clone());
    let health = http::bind(config.health.health_listen).await?;
    let health_address = health.local_addr()?;
    let mut registry = service_kit::metrics::registry("webhook_notifier");
    let metrics = Metrics::new(&mut registry);
    let pool = store::pool(&config.database)?;
    let liveness = Liveness::default();
    let supervision = Supervision {
        pool: pool.clone(),
        readiness: readiness.clone(),
        liveness: liveness.clone(),
        metrics: PostgresMetrics::new(&mut registry),
    };
    let served = service_kit::health::serve(health, readiness.clone(), liveness.clone(), registry, shutdown.clone());
    tasks.spawn_background("health", served);
    tasks.spawn_background("postgres", supervision.run());
    let start = Start {
        config: &config,
        pool,
        keys,
        readiness,
        liveness,
        metrics,
        traces: traces.clone(),
        health_address,
        shutdown: shutdown.clone(),
    };
    // The micro service answers until it is dropped.
    let (client, _service) = tokio::select! {
        started = start.start(&mut tasks) => started?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let ended = tasks.run(lifecycle::DRAIN_DEADLINE).await;
    tokio::join!(nats::flush(&client), traces.end());
    ended
}

/// Brings the schema `webhooks` up to date.
pub fn migrate(database: &DatabaseConfig) -> BoxFuture<'_, anyhow::Result<()>> {
    Box::pin(async { Ok(store::schema().migrate(&store::pool(database)?).await?) })
}

/// The migrations of this version that the database lacks.
pub fn lacking_migrations(pool: &Pool) -> BoxFuture<'_, anyhow::Result<Vec<i64>>> {
    Box::pin(async {
        store::schema().missing_migrations(pool).await.context("cannot read the migrations of the schema webhooks")
    })
}

struct Start<'a> {
    config: &'a Config,
    pool: Pool,
    keys: SealingKeys,
    readiness: Readiness,
    liveness: Liveness,
    metrics: Metrics,
    traces: Traces,
    health_address: SocketAddr,
    shutdown: CancellationToken,
}

impl Start<'_> {
    /// Waits for the dependencies and starts the tasks.
    async fn start(self, tasks: &mut Tasks) -> anyhow::Result<(async_nats::Client, Service)> {
        let Self { config, pool, keys, readiness, liveness, metrics, traces, health_address, shutdown } = self;
        let own_addresses = OwnAddresses::default();
        let mut own_servers = OwnServers::new(config, health_address, own_addresses.clone())?;
        let guard = Guard {
            allow_networks: config.allow_networks.clone(),
            deny_networks: config.deny_networks.clone(),
            own_addresses,
            allow_http: config.allow_http,
            allow_ports: config.allow_ports.clone(),
        };
        let dns = Arc::new(Dns::new(config.dns_servers.clone())?);
        let http_client = CallbackClient::new(guard.clone(), dns.clone(), config.max_in_flight)?;
        let client = nats::connect(&config.nats, "webhook-notifier", &readiness).await?;
        if config.no_migrate {
            store::schema().wait_until_migrated(&pool, &readiness).await?;
        } else {
            store::schema().migrate_when_available(&pool, &readiness).await?;
        }
        // Before anything is recorded: rows in the default partition would have to be moved.
        housekeeping::create_partitions(&pool).await;
        let js = nats::jetstream(&client);
        nats::stream(&js, LEAD_EVENTS).await?;
        own_servers.refresh(&dns, &client.server_info().connect_urls).await;
        tasks.spawn("own addresses", own_servers.run(dns.clone(), client.clone(), shutdown.clone()));
        let health = CallbackHealth::new(config.disable_after);
        let synced = retry_until_ready("callbacks", &readiness, async || match health.sync(&pool).await {
            Err(e @ StoreError::Unavailable(_)) => Err(error_chain(&e)),
            synced => Ok(synced),
        });
        synced.await.context("cannot read the disabled callbacks")?;
        let processes = nats::bucket(&js, PROCESSES).await?;
        let callbacks = Arc::new(Callbacks::new(processes, health, keys, guard, dns));
        let outbox = Arc::new(Notify::new());
        let (recorder, recording) =
            recorder(pool.clone(), readiness.clone(), liveness, outbox.clone(), metrics.clone());
        let deliverer = Arc::new(Deliverer {
            callbacks,
            limiter: ConcurrencyLimiter::new(config.max_in_flight),
            client: http_client,
            schedule: config.retry_schedule.clone(),
            recorder,
            metrics,
            lead_queue: Arc::default(),
            traces,
        });
        let running = Running { config, client, js, pool, readiness, deliverer, shutdown };
        let service = running.serve(tasks).await?;
        running.spawn_deliveries(tasks, recording);
        running.spawn_upkeep(tasks, outbox);
        Ok((running.client, service))
    }
}

/// State that the tasks share.
struct Running<'a> {
    config: &'a Config,
    client: async_nats::Client,
    js: async_nats::jetstream::Context,
    pool: Pool,
    readiness: Readiness,
    deliverer: Arc<Deliverer>,
    shutdown: CancellationToken,
}

impl Running<'_> {
    /// Answers queries.
    async fn serve(&self, tasks: &mut Tasks) -> anyhow::Result<Service> {
        let description = "Delivers the outcomes of lead updates to callback URLs";
        let service = rpc::service(&self.client, "webhook-notifier", description, []).await?;
        let (pool, callbacks) = (self.pool.clone(), self.deliverer.callbacks.clone());
        let (client, lead_queue) = (self.client.clone(), self.deliverer.lead_queue.clone());
        let deliveries = DeliveryApi { client, pool, callbacks, lead_queue };
        deliveries.serve(tasks, &service, &self.shutdown).await?;
        let (pool, callbacks) = (self.pool.clone(), self.deliverer.callbacks.clone());
        let callbacks = CallbackApi { pool, callbacks, limiter: self.deliverer.limiter.clone() };
        callbacks.serve(tasks, &service, &self.shutdown).await?;
        serve_pings(tasks, &service, &self.deliverer, &self.shutdown).await?;
        serve_sources(tasks, &service, &self.deliverer.callbacks, &self.shutdown).await?;
        Ok(service)
    }

    /// Delivers and retries.
    fn spawn_deliveries(&self, tasks: &mut Tasks, recording: RecordingTask) {
        let (pool, readiness, deliverer) = (self.pool.clone(), self.readiness.clone(), self.deliverer.clone());
        let retrier = Retrier { pool, deliverer, readiness };
        tasks.spawn("retry", retrier.run(self.shutdown.clone()));
        let ordering = LeadOrdering {
            queue: self.deliverer.lead_queue.clone(),
            js: self.js.clone(),
            pool: self.pool.clone(),
            callbacks: self.deliverer.callbacks.clone(),
            limiter: self.deliverer.limiter.clone(),
        };
        tasks.spawn("ordering", ordering.run(self.shutdown.clone()));
        for (name, role) in [("record ordered", ConsumerRole::RecordOrdered), ("deliver", ConsumerRole::Deliver)] {
            let (js, pool, deliverer) = (self.js.clone(), self.pool.clone(), self.deliverer.clone());
            let dispatcher = EventDispatcher { role, js, pool, deliverer, memory: EventMemory::default() };
            tasks.spawn(name, EventConsumer::new(dispatcher, self.readiness.clone()).run(self.shutdown.clone()));
        }
        let dispatcher = EventDispatcher {
            role: ConsumerRole::Deliver,
            js: self.js.clone(),
            pool: self.pool.clone(),
            deliverer: self.deliverer.clone(),
            memory: EventMemory::default(),
        };
        let (callbacks, pool) = (self.deliverer.callbacks.clone(), self.pool.clone());
        tasks.spawn("parked events", ParkedEvents { dispatcher, callbacks, pool }.run(self.shutdown.clone()));
        // Ends after the tasks above, which send it records.
        tasks.spawn("record", recording.run());
    }

    /// Follows the configuration, publishes events and cleans up.
    fn spawn_upkeep(&self, tasks: &mut Tasks, outbox: Arc<Notify>) {
        let Self { js, pool, shutdown, config, .. } = self;
        let callbacks = &self.deliverer.callbacks;
        let (view, cache_js, readiness, token) =
            (callbacks.view.clone(), js.clone(), self.readiness.clone(), shutdown.clone());
        tasks.spawn("processes", async move { view.follow(&cache_js, PROCESSES, readiness, token).await });
        let (locked, readiness, token) = (callbacks.clone(), self.readiness.clone(), shutdown.clone());
        tasks.spawn("secrets", async move { locked.watch_locked(&readiness, token).await });
        let (deliverer, health_pool) = (self.deliverer.clone(), pool.clone());
        let (readiness, token) = (self.readiness.clone(), shutdown.clone());
        tasks.spawn("callbacks", async move {
            let Deliverer { callbacks, limiter, metrics, .. } = &*deliverer;
            callbacks.health.run(&health_pool, limiter, metrics, &readiness, token).await
        });
        let backlog = self.deliverer.metrics.backlog.clone();
        tasks.spawn("backlog", backlog::watch(pool.clone(), js.clone(), callbacks.clone(), backlog, shutdown.clone()));
        let (client, erasure_outbox) = (self.client.clone(), outbox.clone());
        let erasures = Erasures { client, js: js.clone(), pool: pool.clone(), outbox: erasure_outbox };
        tasks.spawn("erasures", erasures.run(shutdown.clone()));
        tasks.spawn("outbox", outbox::run(js.clone(), pool.clone(), outbox.clone(), shutdown.clone()));
        let operational = OperationalEvents {
            pool: pool.clone(),
            callbacks: callbacks.clone(),
            failing_after: config.failing_after.into(),
            exhausted_interval: config.exhausted_interval.into(),
        };
        tasks.spawn("operational events", operational.run(shutdown.clone()));
        let statistics = config.statistics_retention.unwrap_or(config.delivery_retention);
        let partitions = housekeeping::partitions(
            pool.clone(),
            config.delivery_retention,
            statistics,
            callbacks.clone(),
            outbox,
            shutdown.clone(),
        );
        tasks.spawn("partitions", partitions);
        let retention = housekeeping::retention(js.clone(), config.event_retention.into(), shutdown.clone());
        tasks.spawn("retention", retention);
    }
}
