//! 5 Apply: batches of what is there, one transaction each.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Instant, SystemTime},
};

use async_nats::{HeaderMap, jetstream, jetstream::message::OutboundMessage};
use contract::headers;
use service_kit::{
    clock,
    nats::{chain, patient},
    postgres::Session,
    publish::{PublishError, publish_all},
    traces::{Span, Step, Traces},
};
use sqlx::PgPool;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    announce::Batch,
    cache::Shared,
    decide::{Limits, weight_of_held},
    entry::{Body, DeadLetter, Entry, LogMessage},
    fold::{LedgerRow, Names, World, fold},
    metrics::Metrics,
    prefetch::{Ahead, learn, understand},
    store::{
        StoreError,
        batch::{self, KnownRules, WriteError},
        checkpoint::Checkpoint,
        held,
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
    pub(crate) pool: PgPool,
    /// Where batches are written.
    pub(crate) session: Session,
    pub(crate) js: jetstream::Context,
    pub(crate) limits: Limits,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) announcer: mpsc::Sender<Batch>,
    /// How far the announcer is, to be noted on the way.
    pub(crate) announced: watch::Receiver<(i32, u64)>,
    /// Whether to look for updates that are in the ledger already before a batch is decided: while there are some.
    pub(crate) look: bool,
    /// How many updates are held. While there are some, each batch is compared with them.
    pub(crate) holding: u64,
    /// What is known of leads, what the batches made of them included.
    pub(crate) cache: Arc<Shared>,
    pub(crate) rules: KnownRules,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
}

/// What kept a batch from being applied this time.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot publish a dead letter: {0}")]
    DeadLetter(#[from] PublishError),
    /// Too much to hold in memory at once.
    #[error("the batch is too large")]
    TooLarge,
    /// A process was configured anew since its rules were read. Nothing was written.
    #[error("it was decided by rules that are not valid any more")]
    OtherRules,
}

impl Applier {
    pub(crate) async fn run(
        mut self,
        mut batches: mpsc::Receiver<Ahead>,
        shutdown: CancellationToken,
    ) -> Result<(), ApplyError> {
        loop {
            let batch = tokio::select! {
                batch = batches.recv() => batch,
                () = shutdown.cancelled() => None,
            };
            let Some(mut batch) = batch else { return Ok(()) };
            let read = std::mem::take(&mut batch.read);
            let messages: Vec<_> = read.iter().map(|read| &read.message).collect();
            self.apply(&messages, batch).await?;
        }
    }

    /// Applies messages, as one transaction where that is possible.
    async fn apply(&mut self, messages: &[&LogMessage], ahead: Ahead) -> Result<(), ApplyError> {
        let read_at = ahead.read_at;
        let mut ahead = Some(ahead);
        // Parts still to be applied, the next one last.
        let mut parts = vec![messages];
        while let Some(part) = parts.pop() {
            let mut delays = patient();
            let mut refused = None;
            loop {
                let begun = Instant::now();
                let attempt = self.attempt(part, refused.as_ref(), ahead.take(), read_at).await;
                self.metrics.batch(part.len(), begun.elapsed());
                match attempt {
                    Ok(()) => break,
                    Err(Failure::Write(WriteError::Fenced)) => return Err(ApplyError::Fenced),
                    // Only the leader writes the ledger: who looked knows them all.
                    Err(Failure::Write(WriteError::Known)) if !self.look => self.look = true,
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
                        tracing::error!("the database refuses a command: {}", chain(&e));
                        refused = Some(format!("the database refused it: {e}"));
                    }
                    Err(Failure::Write(WriteError::Store(StoreError::Unavailable(e)))) => {
                        tracing::warn!("cannot apply a batch, trying again: {}", chain(&e));
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

    /// Applies messages in one transaction. With `refused`, the only message becomes a dead letter for that reason. `ahead`
    /// is what was read of them already.
    async fn attempt(
        &mut self,
        messages: &[&LogMessage],
        refused: Option<&String>,
        ahead: Option<Ahead>,
        read_at: SystemTime,
    ) -> Result<(), Failure> {
        let Some((last_seq, logged_at)) = messages.last().map(|message| (message.sequence, message.logged_at)) else {
            return Ok(());
        };
        let (entries, mut dead_letters, known) = match (refused, ahead) {
            (Some(error), _) => {
                let refused = messages.iter().map(|message| DeadLetter::unapplicable(message.sequence, error.clone()));
                (Vec::new(), refused.collect(), None)
            }
            (None, Some(ahead)) => (ahead.entries, ahead.dead_letters, ahead.unknown.zip(Some(ahead.written))),
            (None, None) => {
                let (entries, dead_letters) = understand(messages.iter().copied());
                (entries, dead_letters, None)
            }
        };

        let alone = messages.len() == 1;
        let names = Names::of(&entries);
        let known = known.and_then(|(read, written)| {
            let mut cache = self.cache.lock();
            cache.remembers(written).then(|| cache.world(&names, read))
        });
        let mut world = match known {
            Some(world) => world,
            None => self.learn(&names, if alone { usize::MAX } else { batch::BYTES }).await?,
        };
        let processes: BTreeSet<_> = world.leads.values().map(|lead| lead.process_id).collect();
        world.rules = self.rules.of(&self.pool, &processes).await.map_err(WriteError::Store)?;
        if self.look {
            world.known = batch::read_known(&self.pool, &names).await.map_err(WriteError::Store)?;
        }
        if !alone && weight(&world, &entries) > batch::BYTES {
            return Err(Failure::TooLarge);
        }
        let look = !world.known.is_empty();
        if self.holding > 0 {
            world.known.extend(held::known(&self.pool, &names).await.map_err(WriteError::Store)?);
        }
        world.epoch = self.checkpoint.epoch;
        let now = clock::now();
        let mut plan = fold(world, entries, now, self.limits);

        dead_letters.extend(plan.dead_letters.iter().cloned());
        // Before the checkpoint passes them. After a crash in between they are published again, under the same id.
        self.bury(messages, &dead_letters).await?;
        let announced = *self.announced.borrow();
        let mut spans = self.begin(&mut plan.rows, read_at, messages.len());
        let revisions = self.rules.revisions(&processes);
        let from = &self.checkpoint;
        let batch = batch::Batch { from, last_seq, logged_at, revisions: &revisions, announced, plan: &plan };
        let written = batch::write(&mut self.session, &batch, now).await;
        if let Err(e) = &written {
            spans.iter_mut().for_each(|span| span.fail("not_committed", e));
        }
        drop(spans);
        if let Err(WriteError::Fenced) = written
            && self.rules.renew(&self.pool, &processes).await.map_err(WriteError::Store)?
        {
            return Err(Failure::OtherRules);
        }
        written?;
        self.checkpoint.last_seq = last_seq;
        self.look = look;
        self.holding = (self.holding + plan.newly_held.len() as u64).saturating_sub(plan.released.len() as u64);
        self.cache.lock().wrote(&plan);
        self.metrics.applied(&plan.rows);
        for dead in &dead_letters {
            self.metrics.dead_letter(dead.reason);
        }

        tracing::debug!(
            messages = messages.len(),
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

    /// All that is known of what a batch names once what is not known was read, now.
    async fn learn(&mut self, names: &Names, budget: usize) -> Result<World, Failure> {
        // Nothing is forgotten meanwhile: only a batch that is written makes that happen.
        let (unknown, _) = self.cache.lock().unknown(names);
        let read = learn(&mut self.session, &unknown, budget).await.map_err(WriteError::Store)?;
        Ok(self.cache.lock().world(names, read.ok_or(Failure::TooLarge)?))
    }

    /// Begins the spans of updates; what is announced of these goes on from there.
    fn begin(&self, rows: &mut [LedgerRow], read_at: SystemTime, messages: usize) -> Vec<Span> {
        let begin = |row: &mut LedgerRow| {
            let mut span = self.traces.begin_at(Step::Apply, row.traceparent.as_deref(), read_at);
            row.traceparent = Some(span.traceparent()?);
            span.update(row.event.update_id);
            let outcome = if row.event.success { "applied" } else { "refused" };
            span.note(|| {
                [
                    ("leadrelay.log.sequence", (row.log_seq as i64).into()),
                    ("leadrelay.outcome", outcome.into()),
                    ("messaging.batch.message_count", (messages as i64).into()),
                ]
            });
            if let Some(code) = &row.event.error_code {
                span.note(|| [("leadrelay.error_code", code.clone().into())]);
            }
            Some(span)
        };
        rows.iter_mut().filter_map(begin).collect()
    }

    async fn bury(&self, messages: &[&LogMessage], dead_letters: &[DeadLetter]) -> Result<(), PublishError> {
        let mut buried = Vec::new();
        for dead in dead_letters {
            tracing::warn!(sequence = dead.sequence, reason = dead.reason.as_str(), "dead letter: {dead}");
            if let Some(message) = messages.iter().find(|message| message.sequence == dead.sequence) {
                buried.push((dead, *message));
            }
        }
        let outbound = |limit| -> Vec<_> {
            buried.iter().map(|(dead, message)| dead_letter(dead, message, &self.checkpoint, limit)).collect()
        };
        match publish_all(&self.js, outbound(usize::MAX)).await {
            Err(PublishError::TooLarge) => {
                // With the headers that say why, it is larger than NATS takes: the end of its body goes.
                let limit = self.js.client().server_info().max_payload.saturating_sub(HEADER_ROOM);
                publish_all(&self.js, outbound(limit)).await
            }
            published => published,
        }
    }
}

/// Room for the headers of a dead letter when its body is cut.
const HEADER_ROOM: usize = 16 << 10;

/// The message that carries a dead letter: as it came, with what is wrong and where it came from.
fn dead_letter(dead: &DeadLetter, message: &LogMessage, checkpoint: &Checkpoint, limit: usize) -> OutboundMessage {
    let mut map = HeaderMap::new();
    map.insert(headers::MESSAGE_ID, format!("dead-{}-{}", checkpoint.epoch, message.sequence));
    // A header is one line.
    map.insert(headers::DEAD_LETTER_ERROR, dead.error.replace(|c: char| c.is_control(), " "));
    map.insert(headers::POSITION, checkpoint.position(checkpoint.epoch, message.sequence).to_string());
    map.insert(headers::ORIGIN_SUBJECT, message.subject.as_str());
    map.insert(headers::ORIGIN_SEQUENCE, message.sequence.to_string());
    map.insert(headers::ORIGIN_TIME, message.logged_at.to_iso());
    if let Some(letter) = message.headers.as_ref().and_then(|map| map.get(headers::REPLAY_OF)) {
        map.insert(headers::REPLAY_OF, letter.clone());
    }
    let mut payload = message.payload.clone();
    if payload.len() > limit {
        map.insert(headers::TRUNCATED_FROM, payload.len().to_string());
        payload.truncate(limit);
    }
    OutboundMessage { subject: dead.reason.subject().into(), headers: Some(map), payload }
}

/// About how many bytes of metadata the outcomes of these entries, and of what they may release, carry.
fn weight(world: &World, entries: &[Entry]) -> usize {
    let updates = entries.iter().filter_map(|entry| match &entry.body {
        Body::Update { command, text, .. } => Some((command, text)),
        _ => None,
    });
    // Any entry of a lead may release what is held of it.
    let held = world.held.iter().filter_map(|(lead_id, held)| {
        let bytes = held.iter().map(|held| held.update.text.get().len()).sum();
        Some(weight_of_held(world.leads.get(lead_id)?, held.len(), bytes))
    });
    let updates = updates.map(|(command, text)| {
        let by_reference = || {
            let key = (command.process_id?, command.reference_id.clone()?);
            world.references.get(&key).copied()
        };
        let lead = command.lead_id.or_else(by_reference).and_then(|lead| world.leads.get(&lead));
        text.get().len() + lead.map_or(0, |lead| lead.metadata.get().len())
    });
    updates.chain(held).sum()
}

#[cfg(test)]
mod tests {
    use async_nats::HeaderName;
    use contract::{Timestamp, subject::DeadLetterReason};

    use super::*;

    #[test]
    fn a_dead_letter_says_what_and_whence_and_fits() {
        let message = LogMessage {
            sequence: 9,
            logged_at: Timestamp::from_millis(1_768_193_759_048),
            subject: "leads.cmd.x.update".into(),
            headers: Some(HeaderMap::from_iter([(HeaderName::from_static(headers::REPLAY_OF), "7".into())])),
            payload: "0123456789".into(),
        };
        let dead = DeadLetter { sequence: 9, reason: DeadLetterReason::InvalidSubject, error: "a\r\nb".into() };
        let checkpoint = Checkpoint {
            stream: "LEAD_COMMANDS".into(),
            stream_created_at: "1".into(),
            generation: 0,
            epoch: 2,
            last_seq: 8,
            last_logged_at: None,
            published_epoch: 2,
            published_seq: 8,
            told: (0, 0),
            events_created_at: None,
        };
        let outbound = dead_letter(&dead, &message, &checkpoint, 4);
        assert_eq!(outbound.subject.as_str(), "leads.dead.invalid_subject");
        assert_eq!(outbound.payload, "0123");
        let map = outbound.headers.unwrap();
        let header = |name| map.get(name).unwrap().as_str();
        assert_eq!(header(headers::MESSAGE_ID), "dead-2-9");
        assert_eq!(header(headers::DEAD_LETTER_ERROR), "a  b");
        assert_eq!(header(headers::ORIGIN_SUBJECT), "leads.cmd.x.update");
        assert_eq!(header(headers::ORIGIN_SEQUENCE), "9");
        assert_eq!(header(headers::POSITION), "0.2.9");
        assert_eq!(header(headers::ORIGIN_TIME), "2026-01-12T04:55:59.048Z");
        assert_eq!(header(headers::REPLAY_OF), "7");
        assert_eq!(header(headers::TRUNCATED_FROM), "10");
        assert_eq!(dead_letter(&dead, &message, &checkpoint, 10).payload, "0123456789");
    }
}
