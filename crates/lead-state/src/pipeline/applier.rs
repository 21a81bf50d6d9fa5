//! 5 Apply: batches of what is there, one transaction each; the next one is decided meanwhile.

use std::{
    pin::pin,
    time::{Instant, SystemTime},
};

use service_kit::{
    nats::{error_chain, retry_backoff},
    postgres::PinnedConnection,
    publish::PublishError,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    announcer::Batch,
    planner::{Decided, NoPlan, Planner},
    prefetch::Ahead,
    reader::Read,
};
use crate::{
    core::entry::LogMessage,
    metrics::Metrics,
    store::{
        StoreError,
        batch::{self, WriteError},
        checkpoint::Checkpoint,
        ledger::Announcement,
    },
};

/// Why applying stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    /// Somebody else moved the checkpoint: this is not the leader any more, or does not know where it stands. The
    /// term must end.
    #[error("the checkpoint was moved by another reader")]
    Fenced,
    /// The database holds or says what it must not: somebody must look.
    #[error(transparent)]
    Stop(StoreError),
}

/// Applies what comes out of the log until shutdown, and hands every batch to the announcer.
pub(crate) struct Applier {
    pub(crate) planner: Planner,
    pub(crate) writer: Writer,
    pub(crate) announcer: mpsc::Sender<Batch>,
    pub(crate) metrics: Metrics,
}

/// Writes what is decided.
pub(crate) struct Writer {
    pub(crate) session: PinnedConnection,
    /// How far everything is written.
    pub(crate) checkpoint: Checkpoint,
    /// How far the announcer is, to be noted on the way.
    pub(crate) announced: watch::Receiver<(i32, u64)>,
}

/// What kept a batch from being applied this time.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot publish a dead letter: {0}")]
    DeadLetter(PublishError),
    /// Too much to hold in memory at once.
    #[error("the batch is too large")]
    TooLarge,
    /// A process was configured anew since its rules were read. Nothing was written.
    #[error("it was decided by rules that are not valid any more")]
    OtherRules,
}

impl From<NoPlan> for Failure {
    fn from(error: NoPlan) -> Self {
        match error {
            NoPlan::Store(e) => Self::Write(e.into()),
            NoPlan::DeadLetter(e) => Self::DeadLetter(e),
            NoPlan::TooLarge => Self::TooLarge,
        }
    }
}

/// A batch on its way.
struct Trial {
    read: Vec<Read>,
    read_at: SystemTime,
    decided: Result<Decided, NoPlan>,
}

impl Trial {
    async fn begin(planner: &mut Planner, mut batch: Ahead) -> Self {
        let (read, read_at) = (std::mem::take(&mut batch.read), batch.read_at);
        let decided = planner.plan(&messages(&read), None, Some(batch), read_at).await;
        Self { read, read_at, decided }
    }
}

fn messages(read: &[Read]) -> Vec<&LogMessage> {
    read.iter().map(|read| &read.message).collect()
}

impl Writer {
    /// Writes a batch in one transaction, and only behind the one before it.
    async fn write(&mut self, decided: &Decided) -> Result<(), WriteError> {
        let &Decided { last_seq, logged_at, applied_at, ref revisions, ref plan, .. } = decided;
        let announced = *self.announced.borrow();
        let batch = batch::Batch { from: &self.checkpoint, last_seq, logged_at, revisions, announced, plan };
        batch::write(&mut self.session, &batch, applied_at).await?;
        self.checkpoint.last_seq = last_seq;
        Ok(())
    }
}

impl Applier {
    pub(crate) async fn run(
        mut self,
        mut batches: mpsc::Receiver<Ahead>,
        shutdown: CancellationToken,
    ) -> Result<(), ApplyError> {
        let mut next = None;
        loop {
            let batch = match next.take() {
                Some(batch) => batch,
                None => {
                    let batch = tokio::select! {
                        batch = batches.recv() => batch,
                        () = shutdown.cancelled() => None,
                    };
                    let Some(batch) = batch else { return Ok(()) };
                    Trial::begin(&mut self.planner, batch).await
                }
            };
            let failed = match batch.decided {
                Ok(decided) => {
                    let begun = Instant::now();
                    let goes_ahead = decided.is_plain() && self.planner.may_go_ahead() && !shutdown.is_cancelled();
                    let written = {
                        let mut write = pin!(self.writer.write(&decided));
                        loop {
                            tokio::select! {
                                // First, so that it is on its way to Postgres before the next one is decided.
                                biased;
                                written = &mut write => break written,
                                Some(batch) = batches.recv(), if goes_ahead && next.is_none() => {
                                    next = Some(Trial::begin(&mut self.planner, batch).await);
                                }
                            }
                        }
                    };
                    self.metrics.batch(decided.messages, decided.took + begun.elapsed());
                    self.conclude(decided, written).await
                }
                Err(e) => Err(e.into()),
            };
            let Err(failure) = failed else { continue };
            self.apply_again(&messages(&batch.read), batch.read_at, Some(failure)).await?;
            if let Some(batch) = next.take() {
                // It was decided on what became of nothing.
                self.apply_again(&messages(&batch.read), batch.read_at, None).await?;
            }
        }
    }

    /// Applies messages after a first failure, as one transaction where that is possible.
    async fn apply_again(
        &mut self,
        messages: &[&LogMessage],
        read_at: SystemTime,
        mut failure: Option<Failure>,
    ) -> Result<(), ApplyError> {
        // Parts still to be applied, the next one last.
        let mut parts = vec![messages];
        while let Some(part) = parts.pop() {
            let mut delays = retry_backoff();
            let mut refused = None;
            loop {
                let attempt = match failure.take() {
                    Some(failure) => Err(failure),
                    None => self.attempt(part, refused.as_ref(), read_at).await,
                };
                if attempt.is_err() {
                    self.planner.forget();
                }
                match attempt {
                    Ok(()) => break,
                    Err(Failure::Write(WriteError::Fenced)) => return Err(ApplyError::Fenced),
                    // Only the leader writes the ledger: who looked knows them all.
                    Err(Failure::Write(WriteError::Known)) if !self.planner.look => self.planner.look = true,
                    Err(Failure::Write(WriteError::Known)) => {
                        let fault = "an update is there that was not found".into();
                        return Err(ApplyError::Stop(StoreError::Corrupt { table: "lead_updates", fault }));
                    }
                    Err(Failure::TooLarge | Failure::Write(WriteError::Store(StoreError::Data(_))))
                        if part.len() > 1 =>
                    {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                        break;
                    }
                    // One message that the database cannot take must not hold up all that come after it.
                    Err(Failure::Write(WriteError::Store(StoreError::Data(e)))) if refused.is_none() => {
                        tracing::error!("the database refuses a command: {}", error_chain(&e));
                        refused = Some(format!("the database refused it: {e}"));
                    }
                    Err(Failure::Write(WriteError::Store(StoreError::Unavailable(e)))) => {
                        tracing::warn!("cannot apply a batch, trying again: {}", error_chain(&e));
                        tokio::time::sleep(delays.next().unwrap_or_default()).await;
                    }
                    Err(Failure::DeadLetter(e)) => {
                        tracing::warn!("cannot publish a dead letter, trying again: {e}");
                        tokio::time::sleep(delays.next().unwrap_or_default()).await;
                    }
                    Err(Failure::Write(WriteError::Store(e))) => return Err(ApplyError::Stop(e)),
                    // A single message is never too large to try. New rules are known by now.
                    Err(Failure::TooLarge | Failure::OtherRules) => {}
                }
            }
        }
        Ok(())
    }

    /// Applies messages in one transaction. With `refused`, the only message becomes a dead letter for that reason.
    async fn attempt(
        &mut self,
        messages: &[&LogMessage],
        refused: Option<&String>,
        read_at: SystemTime,
    ) -> Result<(), Failure> {
        let decided = self.planner.plan(messages, refused, None, read_at).await?;
        let begun = Instant::now();
        let written = self.writer.write(&decided).await;
        self.metrics.batch(decided.messages, decided.took + begun.elapsed());
        self.conclude(decided, written).await
    }

    /// Notes what became of a batch, and has it announced if it was written.
    async fn conclude(&mut self, mut decided: Decided, written: Result<(), WriteError>) -> Result<(), Failure> {
        if let Err(e) = &written {
            decided.spans.iter_mut().for_each(|span| span.fail("not_committed", e));
        }
        decided.spans.clear();
        if let Err(WriteError::Fenced) = written
            && self.planner.renew_rules(&decided).await.map_err(WriteError::Store)?
        {
            return Err(Failure::OtherRules);
        }
        written?;
        self.planner.written(&decided);
        let Decided { plan, last_seq, messages, dead_letters, .. } = decided;
        self.metrics.applied(&plan.rows);
        for dead in &dead_letters {
            self.metrics.dead_letter(dead.reason);
        }
        tracing::debug!(
            messages,
            updates = plan.rows.len(),
            leads = plan.leads.len(),
            dead_letters = dead_letters.len(),
            last_seq,
            "applied"
        );
        let announcements = plan
            .rows
            .into_iter()
            .map(|row| Announcement { seq: row.decided_seq, traceparent: row.traceparent, event: row.event })
            .collect();
        // If the announcer is gone, so is this term; the ledger still has the events.
        let _ = self.announcer.send(Batch { announcements, up_to: last_seq }).await;
        Ok(())
    }
}
