//! 3–6: one leader reads, decides, applies and announces; the other instances stand by.
//!
//! Leadership is a session-level advisory lock in Postgres. The leader pings its session every second; the server cuts
//! a session that is silent for [`LEASE`], so that a standby takes over. Later writes of the old leader fail at the
//! checkpoint's compare-and-set.

use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use contract::{
    position::LogPosition,
    rpc::Halted,
    streams::{LEAD_COMMANDS, LEAD_EVENTS},
};
use service_kit::{
    clock,
    health::Readiness,
    nats::{self, error_chain},
    postgres::{Pool, Session},
    publisher::Publisher,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    announcer::Announcer,
    term::{TermContext, TermEnd, end_after, end_after_announcing},
};
use crate::{
    recovery::{
        diagnose::{diagnose, lost_events, rewind_announcements},
        state::RecoveryState,
        watch::watch_checkpoint,
    },
    store::{
        self,
        checkpoint::{self, Checkpoint},
    },
};

/// How long a leader that hangs keeps its lock. A shorter lease mistakes a slow network for a dead leader; a longer one
/// delays updates after a crash.
const LEASE: Duration = Duration::from_secs(3);
const RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// How often a standby tries to acquire the lock.
const STANDBY_INTERVAL: Duration = Duration::from_millis(400);
/// How long a leader waits before it reads again a state in which something is lost.
const CONFIRM_AFTER: Duration = Duration::from_secs(1);
/// How often a halted leader checks whether an operator has recovered.
const HALTED_INTERVAL: Duration = Duration::from_secs(5);
/// The key of the advisory lock.
const LOCK: i64 = 0x4c45_4144; // "LEAD"

pub(crate) struct Leader {
    pub(crate) readiness: Readiness,
    pub(crate) context: TermContext,
}

impl Leader {
    /// Leads whenever it can, until shutdown.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            let lease = tokio::select! {
                lease = self.acquire_lease() => lease,
                () = shutdown.cancelled() => return Ok(()),
            };
            tracing::info!("leading");
            self.context.metrics.set_leader(true);
            let end = tokio::select! {
                end = self.run_term(&shutdown) => end?,
                lost = lease.keep() => TermEnd::Retry(format!("the lease was lost: {lost}")),
            };
            self.context.metrics.set_leader(false);
            let pause = match end {
                TermEnd::Shutdown => return Ok(()),
                TermEnd::Retry(why) => {
                    tracing::warn!("the term ended, starting another: {why}");
                    self.report_halted(None);
                    STANDBY_INTERVAL
                }
                TermEnd::Halt(halted) => {
                    let reason = halted.reason.as_ref();
                    tracing::error!(reason, "halted: {}; `leadctl recover` shows how to continue", halted.text);
                    self.report_halted(Some(&halted));
                    HALTED_INTERVAL
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Waits until no other instance leads.
    async fn acquire_lease(&self) -> Lease {
        let mut standing_by = false;
        loop {
            let attempt = Lease::try_acquire(&self.context.pool);
            match self.context.liveness.step("leader", attempt).await {
                Ok(Some(lease)) => return lease,
                Ok(None) if standing_by => {}
                Ok(None) => {
                    standing_by = true;
                    tracing::info!("standing by");
                    // Only the leader reports that it is halted.
                    self.report_halted(None);
                }
                Err(e) => tracing::warn!("cannot acquire the leader's lock, retrying: {}", error_chain(&e)),
            }
            tokio::time::sleep(STANDBY_INTERVAL).await;
        }
    }

    fn report_halted(&self, halted: Option<&Halted>) {
        self.context.metrics.set_halted(halted.map(|halted| halted.reason.as_ref()));
        match halted {
            Some(halted) => self.readiness.not_ready("log", halted.text.clone()),
            None => self.readiness.ready("log"),
        }
    }

    /// Leads from the checkpoint on until something ends the term.
    async fn run_term(&self, shutdown: &CancellationToken) -> anyhow::Result<TermEnd> {
        let (pool, js) = (&self.context.pool, &self.context.js);
        let Some(log) = shutdown.run_until_cancelled(self.streams()).await.transpose()? else {
            return Ok(TermEnd::Shutdown);
        };
        let mut observed = RecoveryState::observe(pool, js).await;
        if let Ok(state) = &observed
            && (diagnose(state).is_some() || lost_events(state).is_some())
        {
            // A server that was the leader of a stream before may have answered.
            tokio::time::sleep(CONFIRM_AFTER).await;
            observed = RecoveryState::observe(pool, js).await;
        }
        let mut state = match observed {
            Ok(state) => state,
            Err(e) => {
                return match e.downcast() {
                    Ok(e) => end_after(e, "read the checkpoint"),
                    Err(e) => Ok(TermEnd::Retry(format!("cannot read the state of log and events: {e:#}"))),
                };
            }
        };
        if let Some(halted) = diagnose(&state)
            && halted.reason == Halted::DATABASE_RESTORED
        {
            // The rows of this database must not be announced before an operator decides.
            return Ok(TermEnd::Halt(halted));
        }
        if let Some(lost) = lost_events(&state) {
            let delivered = state.checkpoint.delivered;
            tracing::error!(%delivered, "{LEAD_EVENTS} lost events, {lost}: announcing again from the delivered watermark");
            return self.put_checkpoint(&state, rewind_announcements(&state), "announcing again").await;
        }
        let recorded = async {
            let mut connection = store::acquire(pool).await?;
            checkpoint::set_events(&mut connection, &state.checkpoint, &state.events_identity).await
        };
        if let Err(e) = recorded.await {
            return end_after(e, "record the identity of the events");
        }
        state.checkpoint.events_created_at = Some(state.events_identity.clone());
        // The ledger's backlog is announced first, whatever the state of the log.
        let announcer = match self.catch_up(state.checkpoint.clone(), state.events_last, shutdown).await? {
            Ok(announcer) => announcer,
            Err(end) => return Ok(end),
        };
        let state = RecoveryState { checkpoint: announcer.checkpoint.clone(), ..state };
        if state.checkpoint.stream_created_at != state.log_identity {
            return self.begin_epoch(&state).await;
        }
        if let Some(halted) = diagnose(&state) {
            return Ok(TermEnd::Halt(halted));
        }
        self.report_halted(None);
        self.context.serve(log, announcer, shutdown).await
    }

    /// Waits until both streams exist; returns the log. A service that starts creates a missing stream.
    async fn streams(&self) -> anyhow::Result<Stream> {
        let js = &self.context.js;
        nats::stream(js, LEAD_EVENTS).await?;
        nats::stream(js, LEAD_COMMANDS).await
    }

    /// Announces the updates that are applied and not announced. The inner error ends the term.
    async fn catch_up(
        &self,
        checkpoint: Checkpoint,
        events_last: u64,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Result<Announcer, TermEnd>> {
        let TermContext { pool, js, metrics, traces, .. } = &self.context;
        let mut announcer = Announcer {
            pool: pool.clone(),
            events: Publisher::observed(js.clone(), metrics.publishing.clone()),
            announced: watch::Sender::new(checkpoint.announced),
            last_stored: watch::Sender::new(events_last),
            checkpoint: checkpoint.clone(),
            traces: traces.clone(),
        };
        let watch = watch_checkpoint(pool.clone(), js.clone(), checkpoint, announcer.last_stored.subscribe());
        let caught_up = tokio::select! {
            caught_up = announcer.catch_up() => caught_up,
            why = watch => return Ok(Err(TermEnd::Retry(why))),
            () = shutdown.cancelled() => return Ok(Err(TermEnd::Shutdown)),
        };
        match caught_up {
            Ok(()) => Ok(Ok(announcer)),
            Err(e) => end_after_announcing(e).map(Err),
        }
    }

    async fn begin_epoch(&self, state: &RecoveryState) -> anyhow::Result<TermEnd> {
        let begin = LogPosition::message(state.checkpoint.applied.epoch + 1, 0);
        tracing::error!(
            old_log = state.checkpoint.stream_created_at,
            new_log = state.log_identity,
            applied = %state.checkpoint.applied,
            epoch = begin.epoch,
            "{LEAD_COMMANDS} is another log: commands of the old one after the checkpoint, if any, are lost; starting a new \
             epoch"
        );
        // All events of the old epoch are announced by now, so the watermark moves to the new one.
        let to = Checkpoint {
            stream_created_at: state.log_identity.clone(),
            applied: begin,
            last_logged_at: None,
            ends_message: true,
            announced: begin,
            ..state.checkpoint.clone()
        };
        self.put_checkpoint(state, to, "a new epoch").await
    }

    /// Moves the checkpoint. The term ends even if another instance moved it first.
    async fn put_checkpoint(&self, state: &RecoveryState, to: Checkpoint, why: &str) -> anyhow::Result<TermEnd> {
        let replaced = async {
            let mut connection = store::acquire(&self.context.pool).await?;
            checkpoint::replace(&mut connection, &state.checkpoint, &to, clock::now()).await
        };
        match replaced.await {
            Ok(_) => Ok(TermEnd::Retry(why.into())),
            Err(e) => end_after(e, "move the checkpoint"),
        }
    }
}

struct Lease {
    session: Session,
}

impl Lease {
    /// None if another instance has it.
    async fn try_acquire(pool: &Pool) -> sqlx::Result<Option<Self>> {
        let silence = format!("{}ms", LEASE.as_millis());
        let mut session = pool.connect_apart("lead-state leader", &[("idle_session_timeout", &silence)]).await?;
        let locked = sqlx::query_scalar!(r#"SELECT pg_try_advisory_lock($1) AS "locked!""#, LOCK)
            .fetch_one(&mut session)
            .await?;
        Ok(locked.then_some(Self { session }))
    }

    /// Renews the lease until a renewal fails. Returns the reason.
    async fn keep(mut self) -> String {
        loop {
            tokio::select! {
                () = tokio::time::sleep(RENEW_INTERVAL) => {}
                reason = self.session.lost() => return reason,
            }
            match tokio::time::timeout(LEASE, self.session.ping()).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return error_chain(&e),
                Err(_) => return "Postgres did not answer".into(),
            }
        }
    }
}
