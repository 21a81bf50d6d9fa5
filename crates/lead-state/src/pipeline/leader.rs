//! 3–6: one leader reads, decides, applies and announces; the others stand by.
//!
//! Leadership is a session-level advisory lock in Postgres. The leader's session must say something every second: one
//! that hangs is cut by the server, so that a standby takes over within [`LEASE`]. What a leader that was cut still
//! has in hand fails at the checkpoint's compare-and-set.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use async_nats::jetstream;
use contract::{
    rpc::Halted,
    streams::{LEAD_COMMANDS, LEAD_EVENTS},
};
use service_kit::{
    clock,
    config::DatabaseConfig,
    health::Readiness,
    nats::{self, error_chain},
    postgres::PinnedConnection,
    publisher::Publisher,
    retention::Retention,
    traces::Traces,
};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    announcer::{self, Announcer},
    applier::{Applier, ApplyError, Writer},
    call_expiry,
    planner::Planner,
    prefetch::prefetch,
    reader,
};
use crate::{
    cache,
    config::{projection::Projector, secrets::Sealer},
    core::decide::Limits,
    housekeeping::Housekeeper,
    metrics::Metrics,
    recovery::{self, Scene, diagnose, lost_events, taken_back},
    store::{
        self, StoreError,
        batch::KnownRules,
        checkpoint::{self, Checkpoint},
        held,
    },
};

/// How long a leader that hangs keeps its lock. Shorter makes a slow network look like death, longer lets updates wait.
const LEASE: Duration = Duration::from_secs(3);
/// How often the leader says that it lives.
const RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// How often a standby asks whether the leader is gone.
const STANDBY_INTERVAL: Duration = Duration::from_millis(400);
/// How often a leader that must not go on looks whether an operator has mended things.
const HALTED_INTERVAL: Duration = Duration::from_secs(5);
/// The key of the advisory lock.
const LOCK: i64 = 0x4c45_4144; // "LEAD"

/// What a leader works with.
pub(crate) struct Leader {
    pub(crate) database: DatabaseConfig,
    pub(crate) pool: PgPool,
    pub(crate) js: jetstream::Context,
    pub(crate) projector: Arc<Projector>,
    pub(crate) sealer: Arc<Sealer>,
    pub(crate) readiness: Readiness,
    pub(crate) log_retention: Duration,
    pub(crate) ledger_retention: Retention,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
}

/// How a term ends that the database broke off. One that is away may be back for the next term; with one that is wrong,
/// trying again would be for ever.
fn broken_off(what: &str, error: StoreError) -> anyhow::Result<TermEnd> {
    match error {
        StoreError::Unavailable(e) => Ok(TermEnd::Again(format!("cannot {what}: {}", error_chain(&e)))),
        e => Err(e).with_context(|| format!("cannot {what}")),
    }
}

/// Why a term ended.
enum TermEnd {
    /// Told to.
    Shutdown,
    /// This process is not the leader any more, or does not know where it stands: try for another term.
    Again(String),
    /// The log and the checkpoint contradict each other: an operator must look. Try again later.
    Halt(Halted),
}

impl Leader {
    /// Leads whenever it can, until shutdown.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            let lease = tokio::select! {
                lease = self.lease() => lease?,
                () = shutdown.cancelled() => return Ok(()),
            };
            tracing::info!("leading");
            self.metrics.leads(true);
            let end = tokio::select! {
                end = self.term(&shutdown) => end?,
                lost = lease.keep() => TermEnd::Again(format!("the lease was lost: {lost}")),
            };
            self.metrics.leads(false);
            let pause = match end {
                TermEnd::Shutdown => return Ok(()),
                TermEnd::Again(why) => {
                    tracing::warn!("the term ended, trying for another: {why}");
                    self.show(None);
                    STANDBY_INTERVAL
                }
                TermEnd::Halt(halted) => {
                    tracing::error!(
                        reason = halted.reason.as_ref(),
                        "halted: {}; `leadctl recover` says how to go on",
                        halted.text
                    );
                    self.show(Some(&halted));
                    HALTED_INTERVAL
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Waits until nobody else leads. Whether the one who does is halted is for that one to show.
    async fn lease(&self) -> anyhow::Result<Lease> {
        let options = store::connect_options(&self.database)?
            .application_name("lead-state leader")
            .options([("idle_session_timeout", format!("{}ms", LEASE.as_millis()))]);
        let mut told = false;
        loop {
            match Lease::try_acquire(&options).await {
                Ok(Some(lease)) => return Ok(lease),
                Ok(None) if told => {}
                Ok(None) => {
                    told = true;
                    tracing::info!("standing by");
                    self.show(None);
                }
                Err(e) => tracing::warn!("cannot ask for the lead, trying again: {}", error_chain(&e)),
            }
            tokio::time::sleep(STANDBY_INTERVAL).await;
        }
    }

    /// Shows why this instance does not go on with the log, or that nothing keeps it from that.
    fn show(&self, halted: Option<&Halted>) {
        self.metrics.halted(halted.map(|halted| halted.reason.as_ref()));
        match halted {
            Some(halted) => self.readiness.not_ready("log", halted.text.clone()),
            None => self.readiness.ready("log"),
        }
    }

    /// One term: everything from the checkpoint on, until something ends it.
    async fn term(&self, shutdown: &CancellationToken) -> anyhow::Result<TermEnd> {
        // All that is looked at below: whoever deleted a stream must make it again first.
        nats::stream(&self.js, LEAD_EVENTS).await?;
        let log = nats::stream(&self.js, LEAD_COMMANDS).await?;
        let scene = match Scene::look(&self.pool, &self.js).await {
            Ok(scene) => scene,
            Err(e) => {
                return match e.downcast() {
                    Ok(e) => broken_off("see where the log stands", e),
                    Err(e) => Ok(TermEnd::Again(format!("cannot see where the log stands: {e:#}"))),
                };
            }
        };
        if let Some(halted) = diagnose(&scene)
            && halted.reason == "database_restored"
        {
            // What this database holds must not be announced before somebody looked.
            return Ok(TermEnd::Halt(halted));
        }
        if let Some(lost) = lost_events(&scene) {
            tracing::error!(
                told_epoch = scene.checkpoint.told.0,
                told_seq = scene.checkpoint.told.1,
                "{LEAD_EVENTS} is not what it was, {lost}: announcing again what may not have been told"
            );
            return self.put(&scene, taken_back(&scene), "announcing again").await;
        }
        if let Err(e) = checkpoint::set_events(&self.pool, &scene.checkpoint, &scene.events_identity).await {
            return broken_off("note where the events are", e);
        }

        // First what is applied and not announced, whatever the log looks like now.
        let mut announcer = Announcer {
            pool: self.pool.clone(),
            events: Publisher::observed(self.js.clone(), self.metrics.publishing.clone()),
            checkpoint: scene.checkpoint.clone(),
            announced: watch::Sender::new(scene.checkpoint.published()),
            traces: self.traces.clone(),
        };
        let caught_up = tokio::select! {
            caught_up = announcer.catch_up() => caught_up,
            why = recovery::watch(self.pool.clone(), self.js.clone(), scene.checkpoint.clone()) => {
                return Ok(TermEnd::Again(why));
            }
            () = shutdown.cancelled() => return Ok(TermEnd::Shutdown),
        };
        if let Err(e) = caught_up {
            return broken_off("announce from the ledger", e);
        }
        let checkpoint = announcer.checkpoint.clone();

        if checkpoint.stream_created_at != scene.log_identity {
            let scene = Scene { checkpoint, ..scene };
            tracing::error!(
                old_log = scene.checkpoint.stream_created_at,
                new_log = scene.log_identity,
                applied_up_to = scene.checkpoint.last_seq,
                epoch = scene.checkpoint.epoch + 1,
                "{LEAD_COMMANDS} is not the log that it was: commands of the old one behind the checkpoint, if there were \
                 any, are lost; starting a new epoch"
            );
            // Nothing of the old one is announced again: its events are where they were.
            let epoch = scene.checkpoint.epoch + 1;
            let to = Checkpoint {
                stream_created_at: scene.log_identity.clone(),
                epoch,
                last_seq: 0,
                last_logged_at: None,
                published_epoch: epoch,
                published_seq: 0,
                ..scene.checkpoint.clone()
            };
            return self.put(&scene, to, "a new epoch").await;
        }
        if let Some(halted) = diagnose(&scene) {
            return Ok(TermEnd::Halt(halted));
        }
        self.show(None);
        self.serve(log, checkpoint, announcer, shutdown).await
    }

    /// Reads, applies and announces side by side until one of them ends.
    async fn serve(
        &self,
        log: jetstream::stream::Stream,
        checkpoint: Checkpoint,
        announcer: Announcer,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<TermEnd> {
        let max_payload = self.js.client().server_info().max_payload;
        let limits = Limits::for_max_payload(max_payload);
        if limits.metadata_bytes < crate::core::decide::MAX_METADATA_BYTES {
            tracing::warn!(
                max_payload,
                metadata_bytes = limits.metadata_bytes,
                "NATS takes only small messages: leads may hold less metadata"
            );
        }
        let holding = match held::count(&self.pool).await {
            Ok(holding) => holding,
            Err(e) => return broken_off("count what is held", e),
        };
        let (read, log_entries) = reader::channel();
        // One batch ahead.
        let (ahead, to_apply) = mpsc::channel(1);
        let cache = Arc::<cache::Shared>::default();
        let (applied, to_announce) = announcer::channel();
        let after = (checkpoint.last_seq, checkpoint.last_logged_at);
        let planner = Planner {
            pool: self.pool.clone(),
            js: self.js.clone(),
            limits,
            checkpoint: checkpoint.clone(),
            look: false,
            holding,
            cache: cache.clone(),
            rules: KnownRules::default(),
            traces: self.traces.clone(),
        };
        let writer = Writer {
            session: PinnedConnection::new(self.pool.clone()),
            checkpoint: checkpoint.clone(),
            announced: announcer.announced.subscribe(),
        };
        let applier = Applier { planner, writer, announcer: applied, metrics: self.metrics.clone() };
        let housekeeper = Housekeeper {
            pool: self.pool.clone(),
            log: log.clone(),
            projector: self.projector.clone(),
            sealer: self.sealer.clone(),
            log_retention: self.log_retention,
            ledger_retention: self.ledger_retention,
        };

        // The tasks end with this set, wherever they are: the term's lease may be gone.
        let mut tasks: JoinSet<anyhow::Result<TermEnd>> = JoinSet::new();
        let stop = shutdown.clone();
        tasks.spawn(async move {
            match applier.run(to_apply, stop).await {
                // Told to stop: the announcer ends when it has announced what was applied.
                Ok(()) => Ok(TermEnd::Shutdown),
                Err(ApplyError::Fenced) => Ok(TermEnd::Again("another reader moved the checkpoint".into())),
                Err(ApplyError::Stop(e)) => Err(e).context("cannot apply"),
            }
        });
        tasks.spawn(async move {
            announcer.run(to_announce).await.context("cannot announce")?;
            Ok(TermEnd::Shutdown)
        });
        let mut background: JoinSet<anyhow::Result<TermEnd>> = JoinSet::new();
        let (js, identity) = (self.js.clone(), checkpoint.stream_created_at.clone());
        background.spawn(async move {
            Ok(match reader::read(js, log, identity, after, read).await {
                Ok(()) => TermEnd::Again("the reader ended".into()),
                Err(e) => TermEnd::Again(format!("{e:#}")),
            })
        });
        let expiry = call_expiry::tell(self.pool.clone(), self.js.clone());
        background.spawn(async move {
            expiry.await;
            Ok(TermEnd::Again("telling of expired calls ended".into()))
        });
        let prefetch = prefetch(self.pool.clone(), log_entries, cache, ahead);
        background.spawn(async move {
            prefetch.await;
            // Whoever ended at either side of it says why.
            std::future::pending().await
        });
        let watch = recovery::watch(self.pool.clone(), self.js.clone(), checkpoint.clone());
        background.spawn(async move { Ok(TermEnd::Again(watch.await)) });
        background.spawn(async move { housekeeper.run().await.map(|()| TermEnd::Again("housekeeping ended".into())) });

        loop {
            let ended = tokio::select! {
                Some(ended) = tasks.join_next() => ended,
                Some(ended) = background.join_next() => match ended {
                    // The reader ends when the applier stopped taking.
                    Ok(Ok(_)) if shutdown.is_cancelled() => continue,
                    ended => ended,
                },
                else => return Ok(TermEnd::Shutdown),
            };
            match ended.context("a task of the leader died")?? {
                TermEnd::Shutdown if tasks.is_empty() => return Ok(TermEnd::Shutdown),
                TermEnd::Shutdown => {}
                end => return Ok(end),
            }
        }
    }

    /// Puts the checkpoint elsewhere; the term starts over either way.
    async fn put(&self, scene: &Scene, to: Checkpoint, why: &str) -> anyhow::Result<TermEnd> {
        match checkpoint::put(&self.pool, &scene.checkpoint, &to, clock::now()).await {
            Ok(_) => Ok(TermEnd::Again(why.into())),
            Err(e) => broken_off("put the checkpoint elsewhere", e),
        }
    }
}

/// The lock that makes a leader.
struct Lease {
    connection: PgConnection,
}

impl Lease {
    /// Asks for the lead; none if somebody else has it.
    async fn try_acquire(options: &sqlx::postgres::PgConnectOptions) -> Result<Option<Self>, sqlx::Error> {
        let mut connection = PgConnection::connect_with(options).await?;
        let locked = sqlx::query_scalar!(r#"SELECT pg_try_advisory_lock($1) AS "locked!""#, LOCK)
            .fetch_one(&mut connection)
            .await?;
        if locked {
            return Ok(Some(Self { connection }));
        }
        connection.close().await?;
        Ok(None)
    }

    /// Says that this leader lives, for as long as it may; returns why it may not any more.
    async fn keep(mut self) -> String {
        loop {
            tokio::time::sleep(RENEW_INTERVAL).await;
            match tokio::time::timeout(LEASE, self.connection.ping()).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return error_chain(&e),
                Err(_) => return "the database did not answer".into(),
            }
        }
    }
}
