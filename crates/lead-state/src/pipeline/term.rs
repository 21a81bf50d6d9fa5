//! 3–6: the tasks of a leader's term.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use async_nats::jetstream::{self, stream::Stream};
use contract::rpc::Halted;
use service_kit::{
    health::Liveness,
    nats::error_chain,
    postgres::{PinnedConnection, Pool},
    retention::Retention,
    traces::Traces,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    announcer::{self, AnnounceError, Announcer},
    applier::{Applier, Preparer, Writer},
    call_expiry::log_expired_calls,
    created_leads::log_created_leads,
    dead_letters::DeadLetterPublisher,
    erasure::erase_contents,
    planner::Planner,
    prefetch::prefetch,
    progress,
    reader::{self, ReadPosition},
    retry::ApplyError,
};
use crate::{
    cache::SharedCache,
    config::{projection::Projector, sealer::Sealer},
    core::decide::{Limits, MAX_METADATA_BYTES},
    housekeeping::Housekeeper,
    metrics::Metrics,
    recovery::watch::watch_checkpoint,
    store::{StoreError, checkpoint::Checkpoint, queued_updates, rules::RulesCache},
};

/// Why a term ended.
pub(crate) enum TermEnd {
    Shutdown,
    /// This instance is no longer the leader, or cannot continue from its state: try to start another term.
    Retry(String),
    /// The log and the checkpoint contradict each other: an operator must decide. Check again later.
    Halt(Halted),
}

pub(crate) struct TermContext {
    pub(crate) pool: Pool,
    pub(crate) liveness: Liveness,
    pub(crate) js: jetstream::Context,
    pub(crate) projector: Arc<Projector>,
    pub(crate) sealer: Arc<Sealer>,
    pub(crate) log_retention: Duration,
    pub(crate) ledger_retention: Retention,
    pub(crate) statistics_retention: Retention,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
}

type Tasks = JoinSet<anyhow::Result<TermEnd>>;

/// Maps a store error to the end of the term: retry if Postgres is unavailable, otherwise exit with the error.
pub(crate) fn end_after(error: StoreError, action: &str) -> anyhow::Result<TermEnd> {
    match error {
        StoreError::Unavailable(e) => Ok(TermEnd::Retry(format!("cannot {action}: {}", error_chain(&e)))),
        e => Err(e).with_context(|| format!("cannot {action}")),
    }
}

pub(crate) fn end_after_announcing(error: AnnounceError) -> anyhow::Result<TermEnd> {
    match error {
        AnnounceError::Store(e) => end_after(e, "announce"),
        e @ AnnounceError::EventsLost => Ok(TermEnd::Retry(e.to_string())),
    }
}

impl TermContext {
    /// Reads, applies and announces until shutdown, or until one of the tasks ends.
    pub(crate) async fn serve(
        &self,
        log: Stream,
        announcer: Announcer,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<TermEnd> {
        let queued = match queued_updates::count(&self.pool).await {
            Ok(queued) => queued,
            Err(e) => return end_after(e, "count the queued updates"),
        };
        let checkpoint = announcer.checkpoint.clone();
        // The prefetcher is one batch ahead.
        let (prefetched, to_apply) = mpsc::channel(1);
        let cache = Arc::<SharedCache>::default();
        let (applied, to_announce) = announcer::channel();
        let report = progress::report(self.js.client(), announcer.announced.subscribe());
        let last_stored = announcer.last_stored.subscribe();
        let watch = watch_checkpoint(self.pool.clone(), self.js.clone(), checkpoint.clone(), last_stored);
        let applier = Applier {
            preparer: Preparer {
                planner: Planner {
                    pool: self.pool.clone(),
                    limits: self.limits(),
                    check_duplicates: false,
                    queued,
                    cache: cache.clone(),
                    rules: RulesCache::default(),
                },
                dead_letters: DeadLetterPublisher { js: self.js.clone(), generation: checkpoint.generation },
                traces: self.traces.clone(),
            },
            writer: Writer {
                connection: PinnedConnection::new(self.pool.clone()),
                liveness: self.liveness.clone(),
                checkpoint: checkpoint.clone(),
                announced: announcer.announced.subscribe(),
            },
            announcer: applied,
            client: self.js.client(),
            metrics: self.metrics.clone(),
        };

        // When the lease is lost, the term is dropped, and dropping these sets aborts the tasks.
        let mut tasks = Tasks::new();
        let stop = shutdown.clone();
        tasks.spawn(async move {
            match applier.run(to_apply, stop).await {
                // The announcer ends after it has announced the applied batches.
                Ok(()) => Ok(TermEnd::Shutdown),
                Err(ApplyError::Write(StoreError::Fenced)) => {
                    Ok(TermEnd::Retry("another reader moved the checkpoint".into()))
                }
                Err(e) => Err(e).context("cannot apply"),
            }
        });
        tasks.spawn(async move {
            match announcer.run(to_announce).await {
                Ok(()) => Ok(TermEnd::Shutdown),
                Err(e) => end_after_announcing(e),
            }
        });
        let mut background = Tasks::new();
        let (read, log_entries) = reader::channel();
        let prefetch = prefetch(self.pool.clone(), checkpoint.applied.epoch, log_entries, cache, prefetched);
        background.spawn(async move {
            prefetch.await;
            // The reader or the applier has ended, and reports why.
            std::future::pending().await
        });
        background.spawn(async move {
            report.await;
            // The announcer has ended, and reports why.
            std::future::pending().await
        });
        background.spawn(async move { Ok(TermEnd::Retry(watch.await)) });
        self.spawn_background(&mut background, log, checkpoint, read);
        wait(tasks, background, shutdown).await
    }

    fn limits(&self) -> Limits {
        let max_payload = self.js.client().server_info().max_payload;
        let limits = Limits::for_max_payload(max_payload);
        let metadata_bytes = limits.metadata_bytes;
        if metadata_bytes < MAX_METADATA_BYTES {
            tracing::warn!(
                max_payload,
                metadata_bytes,
                "NATS accepts small messages only, which limits leads' metadata"
            );
        }
        limits
    }

    fn spawn_background(
        &self,
        background: &mut Tasks,
        log: Stream,
        checkpoint: Checkpoint,
        read: mpsc::Sender<reader::ReadMessage>,
    ) {
        let housekeeper = Housekeeper {
            pool: self.pool.clone(),
            log: log.clone(),
            projector: self.projector.clone(),
            sealer: self.sealer.clone(),
            log_retention: self.log_retention,
            ledger_retention: self.ledger_retention,
            statistics_retention: self.statistics_retention,
        };
        background.spawn(async move { housekeeper.run().await.map(|()| TermEnd::Retry("housekeeping ended".into())) });
        let expiry = log_expired_calls(self.pool.clone(), self.js.clone());
        background.spawn(async move {
            expiry.await;
            Ok(TermEnd::Retry("logging expired calls ended".into()))
        });
        let creations = log_created_leads(self.pool.clone(), self.js.clone());
        background.spawn(async move {
            creations.await;
            Ok(TermEnd::Retry("logging created leads ended".into()))
        });
        let erasure = erase_contents(self.pool.clone());
        background.spawn(async move {
            erasure.await;
            Ok(TermEnd::Retry("erasing ended".into()))
        });
        let last = ReadPosition::at(&checkpoint);
        let reader = reader::read(self.js.clone(), log, checkpoint.stream_created_at.clone(), last, read);
        background.spawn(async move {
            Ok(TermEnd::Retry(match reader.await {
                Ok(()) => "the reader ended".into(),
                Err(e) => format!("{e:#}"),
            }))
        });
    }
}

/// Waits until both `tasks` end at shutdown, or any task ends otherwise.
async fn wait(mut tasks: Tasks, mut background: Tasks, shutdown: &CancellationToken) -> anyhow::Result<TermEnd> {
    loop {
        let ended = tokio::select! {
            Some(ended) = tasks.join_next() => ended,
            Some(ended) = background.join_next() => match ended {
                // The reader ends when the applier stops.
                Ok(Ok(_)) if shutdown.is_cancelled() => continue,
                ended => ended,
            },
            else => return Ok(TermEnd::Shutdown),
        };
        match ended.context("a task of the leader panicked")?? {
            TermEnd::Shutdown if tasks.is_empty() => return Ok(TermEnd::Shutdown),
            TermEnd::Shutdown => {}
            end => return Ok(end),
        }
    }
}
