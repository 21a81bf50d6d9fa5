//! 3–6: one leader reads, decides, applies and announces; the others stand by.
//!
//! Leadership is a session-level advisory lock in Postgres. The leader's session must say something every second: one
//! that hangs is cut by the server, so that a standby takes over within [`LEASE`]. What a leader that was cut still
//! has in hand fails at the checkpoint's compare-and-set.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use async_nats::jetstream;
use contract::streams::{self, LEAD_COMMANDS};
use service_kit::{
    batch::Publisher,
    clock,
    config::DatabaseConfig,
    health::Readiness,
    nats::{self, chain},
};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    announce::{self, Announcer},
    apply::{Applier, ApplyError},
    decide::Limits,
    housekeeping::Housekeeper,
    metrics::Metrics,
    projection::Projector,
    reader,
    secrets::Sealer,
    store::{
        self,
        batch::RulesCache,
        checkpoint::{self, Checkpoint},
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
    pub(crate) metrics: Metrics,
}

/// Why a term ended.
enum TermEnd {
    /// Told to.
    Shutdown,
    /// This process is not the leader any more, or does not know where it stands: try for another term.
    Again(String),
    /// The log and the checkpoint contradict each other: an operator must look. Try again later.
    Halt(String),
}

impl Leader {
    /// Leads whenever it can, until shutdown.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            let lease = tokio::select! {
                lease = Lease::acquire(&self.database) => lease?,
                () = shutdown.cancelled() => return Ok(()),
            };
            tracing::info!("leading");
            let end = tokio::select! {
                end = self.term(&shutdown) => end?,
                lost = lease.keep() => TermEnd::Again(format!("the lease was lost: {lost}")),
            };
            let pause = match end {
                TermEnd::Shutdown => return Ok(()),
                TermEnd::Again(why) => {
                    tracing::warn!("the term ended, trying for another: {why}");
                    STANDBY_INTERVAL
                }
                TermEnd::Halt(why) => {
                    tracing::error!("halted: {why}");
                    self.readiness.not_ready("log", why);
                    HALTED_INTERVAL
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// One term: everything from the checkpoint on, until something ends it.
    async fn term(&self, shutdown: &CancellationToken) -> anyhow::Result<TermEnd> {
        let log = nats::stream(&self.js, LEAD_COMMANDS).await?;
        let info = match log.get_info().await {
            Ok(info) => info,
            Err(e) => return Ok(TermEnd::Again(format!("cannot read the state of {LEAD_COMMANDS}: {e}"))),
        };
        let identity = streams::identity(&info);
        let checkpoint = match checkpoint::load(&self.pool, LEAD_COMMANDS, &identity, clock::now()).await {
            Ok(checkpoint) => checkpoint,
            Err(e) => return Ok(TermEnd::Again(format!("cannot read the checkpoint: {}", chain(&e)))),
        };

        // First what is applied and not announced, whatever the log looks like now.
        let mut announcer = Announcer { pool: self.pool.clone(), events: Publisher::new(self.js.clone()), checkpoint };
        let caught_up = tokio::select! {
            caught_up = announcer.catch_up() => caught_up,
            () = shutdown.cancelled() => return Ok(TermEnd::Shutdown),
        };
        if let Err(e) = caught_up {
            return Ok(TermEnd::Again(format!("cannot announce from the ledger: {}", chain(&e))));
        }
        let checkpoint = announcer.checkpoint.clone();

        if checkpoint.stream_created_at != identity {
            return Ok(match self.start_epoch(&checkpoint, &identity).await {
                Ok(()) => TermEnd::Again("a new epoch".into()),
                Err(e) => TermEnd::Again(format!("cannot start a new epoch: {}", chain(&e))),
            });
        }
        if let Err(why) = check_log(&checkpoint, info.state.first_sequence, info.state.last_sequence) {
            return Ok(TermEnd::Halt(why));
        }
        self.readiness.ready("log");
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
        if limits.metadata_bytes < crate::decide::MAX_METADATA_BYTES {
            tracing::warn!(
                max_payload,
                metadata_bytes = limits.metadata_bytes,
                "NATS takes only small messages: leads may hold less metadata"
            );
        }
        let (read, to_apply) = reader::channel();
        let (applied, to_announce) = announce::channel();
        let after = checkpoint.last_seq;
        let applier = Applier {
            pool: self.pool.clone(),
            js: self.js.clone(),
            limits,
            checkpoint: checkpoint.clone(),
            announcer: applied,
            rules: RulesCache::default(),
            metrics: self.metrics.clone(),
        };
        let housekeeper = Housekeeper {
            pool: self.pool.clone(),
            log: log.clone(),
            projector: self.projector.clone(),
            sealer: self.sealer.clone(),
            log_retention: self.log_retention,
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
        let js = self.js.clone();
        background.spawn(async move {
            Ok(match reader::read(js, log, checkpoint.stream_created_at, after, read).await {
                Ok(()) => TermEnd::Again("the reader ended".into()),
                Err(e) => TermEnd::Again(format!("{e:#}")),
            })
        });
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

    /// Starts over at a new log. What the old one held and was not applied is lost; nothing here can bring it back.
    async fn start_epoch(&self, checkpoint: &Checkpoint, identity: &str) -> Result<(), store::StoreError> {
        tracing::error!(
            old_log = checkpoint.stream_created_at,
            new_log = identity,
            applied_up_to = checkpoint.last_seq,
            epoch = checkpoint.epoch + 1,
            "{LEAD_COMMANDS} is not the log that it was: commands of the old one behind the checkpoint, if there were \
             any, are lost; starting a new epoch"
        );
        checkpoint::start_epoch(&self.pool, checkpoint, identity, clock::now()).await.map(|_| ())
    }
}

/// Whether a log of the right identity still holds what the checkpoint expects of it.
fn check_log(checkpoint: &Checkpoint, first: u64, last: u64) -> Result<(), String> {
    let applied = checkpoint.last_seq;
    if last < applied {
        return Err(format!(
            "{LEAD_COMMANDS} ends at {last}, but {applied} was applied: the log lost its end, and new commands would be \
             taken for old ones"
        ));
    }
    if first > applied + 1 {
        return Err(format!(
            "{LEAD_COMMANDS} begins at {first}, but only {applied} was applied: the commands between are not in the log \
             any more (was the database restored to an older state?)"
        ));
    }
    Ok(())
}

/// The lock that makes a leader.
struct Lease {
    connection: PgConnection,
}

impl Lease {
    /// Waits until nobody else leads.
    async fn acquire(config: &DatabaseConfig) -> anyhow::Result<Self> {
        let options = store::connect_options(config)?
            .application_name("lead-state leader")
            .options([("idle_session_timeout", format!("{}ms", LEASE.as_millis()))]);
        let mut told = false;
        loop {
            match Self::try_acquire(&options).await {
                Ok(Some(lease)) => return Ok(lease),
                Ok(None) if told => {}
                Ok(None) => {
                    told = true;
                    tracing::info!("standing by");
                }
                Err(e) => tracing::warn!("cannot ask for the lead, trying again: {}", chain(&e)),
            }
            tokio::time::sleep(STANDBY_INTERVAL).await;
        }
    }

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
                Ok(Err(e)) => return chain(&e),
                Err(_) => return "the database did not answer".into(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_lost_something_halts_the_leader() {
        let at = |last_seq| Checkpoint {
            stream: LEAD_COMMANDS.into(),
            stream_created_at: "1".into(),
            epoch: 1,
            last_seq,
            published_seq: 0,
        };
        // A new stream is at first 1 or 0, last 0.
        assert_eq!(check_log(&at(0), 0, 0), Ok(()));
        assert_eq!(check_log(&at(0), 1, 0), Ok(()));
        assert_eq!(check_log(&at(7), 1, 7), Ok(()));
        // Purged up to the checkpoint.
        assert_eq!(check_log(&at(7), 8, 7), Ok(()));
        assert!(check_log(&at(7), 1, 6).unwrap_err().contains("lost its end"));
        assert!(check_log(&at(7), 9, 20).unwrap_err().contains("not in the log any more"));
    }
}
