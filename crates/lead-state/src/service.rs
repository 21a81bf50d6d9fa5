//! The configuration of the service, and its tasks from start to end.

use std::{sync::Arc, time::Duration};

use contract::streams::StreamLimits;
use futures::future::BoxFuture;
use service_kit::{
    config::{DatabaseConfig, HealthConfig, NatsConfig, SecretsConfig},
    health::{self, Liveness, Readiness},
    http,
    lifecycle::{DRAIN_DEADLINE, Tasks},
    nats,
    postgres::{Pool, PostgresMetrics, Supervision},
    retention::Retention,
    traces::Traces,
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    config::{projection::Projector, sealer::Sealer},
    lag, metrics,
    pipeline::{leader::Leader, term::TermContext},
    store,
};

/// The default of `LOG_RETENTION`. A longer time keeps more commands in NATS that are also in the ledger, and takes
/// disk space.
const LOG_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);

/// The configuration of lead-state.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    #[command(flatten)]
    pub nats: NatsConfig,
    #[command(flatten)]
    pub database: DatabaseConfig,
    #[command(flatten)]
    pub secrets: SecretsConfig,
    #[command(flatten)]
    pub health: HealthConfig,
    /// Size limit of the command log and, again, of the event stream, when they are created. The gateway answers 503
    /// while the log is full.
    #[arg(long, env = "STREAM_MAX_BYTES", default_value_t = 1 << 30, value_parser = clap::value_parser!(i64).range(1 << 20..))]
    pub stream_max_bytes: i64,
    /// Replicas of the streams when they are created: 1 on a single NATS server, 3 on a cluster.
    #[arg(long, env = "STREAM_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5))]
    pub stream_replicas: u8,
    /// How long applied commands stay in the log. They are purged earlier when it is more than half full.
    #[arg(long, env = "LOG_RETENTION", default_value_t = LOG_RETENTION.into(), value_name = "DURATION")]
    pub log_retention: humantime::Duration,
    /// How long months of the ledger stay, at least 62days and not shorter than LOG_RETENTION, or off. A month is
    /// dropped only when all of its updates are announced and delivered.
    #[arg(long, env = "LEDGER_RETENTION", default_value_t, value_name = "DURATION")]
    pub ledger_retention: Retention,
    /// How long statistics of updates stay, or off. At least as long as the ledger, whose retention is the default.
    #[arg(long, env = "STATISTICS_RETENTION", value_name = "DURATION")]
    pub statistics_retention: Option<Retention>,
    /// Do not migrate the schema at start: the service waits until `leadctl migrate` has done it.
    #[arg(long, env = "NO_MIGRATE")]
    pub no_migrate: bool,
}

/// Brings the schema up to this version. Migrates forward only. Safe while services of the previous version are
/// running.
pub fn migrate(database: &DatabaseConfig) -> BoxFuture<'_, anyhow::Result<()>> {
    Box::pin(async { Ok(store::schema().migrate(&store::pool(database)?).await?) })
}

/// This version's migrations that the database does not have.
pub fn lacking_migrations(pool: &Pool) -> BoxFuture<'_, anyhow::Result<Vec<i64>>> {
    Box::pin(async { Ok(store::schema().missing_migrations(pool).await?) })
}

/// Runs the service until shutdown.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(run_until(shutdown, config))
}

async fn run_until(shutdown: CancellationToken, config: Config) -> anyhow::Result<()> {
    let keys = config.secrets.keys()?;
    let traces = Traces::from_env("lead-state")?;
    if config.ledger_retention.duration().is_some_and(|kept| kept < *config.log_retention) {
        anyhow::bail!(
            "LEDGER_RETENTION is shorter than LOG_RETENTION: the ledger must keep every command that is in the log"
        );
    }
    let readiness = Readiness::default();
    readiness.not_ready("start", "starting");
    let mut tasks = Tasks::new(shutdown.clone());
    let listener = http::bind(config.health.health_listen).await?;
    let mut registry = service_kit::metrics::registry("lead_state");
    let metrics = metrics::Metrics::new(&mut registry);
    let pool = store::pool(&config.database)?;
    let liveness = Liveness::default();
    let supervision = Supervision {
        pool: pool.clone(),
        readiness: readiness.clone(),
        liveness: liveness.clone(),
        metrics: PostgresMetrics::new(&mut registry),
    };
    let served = health::serve(listener, readiness.clone(), liveness.clone(), registry, shutdown.clone());
    tasks.spawn_background("health", served);
    tasks.spawn_background("postgres", supervision.run());
    let start = async {
        if config.no_migrate {
            store::schema().wait_until_migrated(&pool, &readiness).await?;
        } else {
            store::schema().migrate_when_available(&pool, &readiness).await?;
        }
        let client = nats::connect(&config.nats, "lead-state", &readiness).await?;
        let js = nats::jetstream(&client);
        let limits = StreamLimits { max_bytes: config.stream_max_bytes, replicas: config.stream_replicas.into() };
        nats::create_streams(&js, limits).await?;
        anyhow::Ok((client, js))
    };
    let (client, js) = tokio::select! {
        started = start => started?,
        () = shutdown.cancelled() => return Ok(()),
    };

    let projector = Arc::new(Projector { pool: pool.clone(), js: js.clone() });
    let sealer = Arc::new(Sealer { pool: pool.clone(), projector: projector.clone(), keys });
    let leader = Leader {
        readiness: readiness.clone(),
        context: TermContext {
            pool: pool.clone(),
            liveness,
            js: js.clone(),
            projector: projector.clone(),
            sealer: sealer.clone(),
            log_retention: config.log_retention.into(),
            ledger_retention: config.ledger_retention,
            statistics_retention: config.statistics_retention.unwrap_or(config.ledger_retention),
            metrics: metrics.clone(),
            traces: traces.clone(),
        },
    };
    let lag = lag::LastLag::default();
    tasks.spawn("lag", lag::watch(pool.clone(), js.clone(), metrics, lag.clone(), shutdown.clone()));
    tasks.spawn("leader", leader.run(shutdown.clone()));

    let (ledger_retention, stream_replicas) = (config.ledger_retention, config.stream_replicas);
    let api = Api { pool, js, projector, sealer, ledger_retention, stream_replicas, lag };
    let _service = api.serve(&client, &mut tasks, &shutdown).await?;
    readiness.ready("start");
    let ended = tasks.run(DRAIN_DEADLINE).await;
    nats::flush(&client).await;
    traces.end().await;
    ended
}
