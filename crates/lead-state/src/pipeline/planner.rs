//! 4 Decide: the plan of a batch, with all that it needs: what is known, what must be read, what must be asked.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use async_nats::{HeaderMap, jetstream, jetstream::message::OutboundMessage};
use contract::{ObjectId, Timestamp, headers};
use service_kit::{
    clock,
    publish::{PublishError, publish_all},
    traces::{Span, Step, Traces},
};
use sqlx::PgPool;

use super::prefetch::{Ahead, understand};
use crate::{
    cache::Shared,
    core::{
        batch::{LedgerRow, Names, Plan, World, fold},
        decide::{Limits, weight_of_held},
        entry::{Body, DeadLetter, Entry, LogMessage},
    },
    store::{
        StoreError,
        batch::{self, KnownRules},
        checkpoint::Checkpoint,
        held,
    },
};

/// Why a batch has no plan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoPlan {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot publish a dead letter: {0}")]
    DeadLetter(#[from] PublishError),
    /// Too much to hold in memory at once.
    #[error("the batch is too large")]
    TooLarge,
}

/// Decides batches, each on what those before it made, whether or not they are written yet.
pub(crate) struct Planner {
    pub(crate) pool: PgPool,
    pub(crate) js: jetstream::Context,
    pub(crate) limits: Limits,
    /// Whose log it is.
    pub(crate) checkpoint: Checkpoint,
    /// Whether to look for updates that are in the ledger already before a batch is decided: while there are some.
    pub(crate) look: bool,
    /// How many updates are held. While there are some, each batch is compared with them.
    pub(crate) holding: u64,
    pub(crate) cache: Arc<Shared>,
    pub(crate) rules: KnownRules,
    pub(crate) traces: Traces,
}

/// A batch that is decided.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) plan: Plan,
    /// The log entry that it ends with.
    pub(crate) last_seq: u64,
    /// When the log stored that.
    pub(crate) logged_at: Timestamp,
    /// What its updates carry as the time of their outcome.
    pub(crate) applied_at: Timestamp,
    /// Of how many messages.
    pub(crate) messages: usize,
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// The processes by whose rules it was decided, and the revisions of these.
    pub(crate) revisions: Vec<(ObjectId, i64)>,
    /// Until it is written.
    pub(crate) spans: Vec<Span>,
    /// How long deciding it took.
    pub(crate) took: Duration,
    /// Whether there were updates that the ledger knows.
    known: bool,
}

impl Decided {
    /// Whether it writes nothing but leads and the ledger.
    pub(crate) fn is_plain(&self) -> bool {
        self.plan.calls.is_empty() && self.plan.newly_held.is_empty() && self.plan.released.is_empty()
    }
}

impl Planner {
    /// Decides messages. With `refused`, the only one becomes a dead letter for that reason. `ahead` is what was read of them
    /// already. What comes of it counts as made: the next batch builds on it, unless it is [forgotten](Self::forget).
    pub(crate) async fn plan(
        &mut self,
        messages: &[&LogMessage],
        refused: Option<&String>,
        ahead: Option<Ahead>,
        read_at: SystemTime,
    ) -> Result<Decided, NoPlan> {
        let begun = Instant::now();
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
        world.rules = self.rules.of(&self.pool, &processes).await?;
        if self.look {
            world.known = batch::read_known(&self.pool, &names).await?;
        }
        if !alone && weight(&world, &entries) > batch::BYTES {
            return Err(NoPlan::TooLarge);
        }
        let known = !world.known.is_empty();
        if self.holding > 0 {
            world.known.extend(held::known(&self.pool, &names).await?);
        }
        world.epoch = self.checkpoint.epoch;
        let applied_at = clock::now();
        let mut plan = fold(world, entries, applied_at, self.limits);

        dead_letters.extend(plan.dead_letters.iter().cloned());
        // Before the checkpoint passes them. After a crash in between they are published again, under the same id.
        self.bury(messages, &dead_letters).await?;
        self.cache.lock().decided(&plan);
        let spans = self.begin(&mut plan.rows, read_at, messages.len());
        let revisions = self.rules.revisions(&processes);
        let last = messages.last();
        Ok(Decided {
            plan,
            last_seq: last.map_or(self.checkpoint.last_seq, |message| message.sequence),
            logged_at: last.map_or(applied_at, |message| message.logged_at),
            applied_at,
            messages: messages.len(),
            dead_letters,
            revisions,
            spans,
            took: begun.elapsed(),
            known,
        })
    }

    /// Whether a batch can be decided before the one before it is written: nothing is asked of the database that this one
    /// changes.
    pub(crate) fn may_go_ahead(&self) -> bool {
        !self.look && self.holding == 0
    }

    /// The oldest batch that was decided is written.
    pub(crate) fn written(&mut self, decided: &Decided) {
        let (newly, released) = (decided.plan.newly_held.len() as u64, decided.plan.released.len() as u64);
        self.holding = (self.holding + newly).saturating_sub(released);
        self.look = decided.known;
        self.cache.lock().written();
    }

    /// What was decided and not written is void.
    pub(crate) fn forget(&mut self) {
        self.cache.lock().forget();
    }

    /// Reads the rules anew that a batch was decided by; whether they are others.
    pub(crate) async fn renew_rules(&mut self, decided: &Decided) -> Result<bool, StoreError> {
        let processes = decided.revisions.iter().map(|(process, _)| *process).collect();
        self.rules.renew(&self.pool, &processes).await
    }

    /// All that is known of what a batch names once what is not known was read, now.
    async fn learn(&self, names: &Names, budget: usize) -> Result<World, NoPlan> {
        // Nothing is forgotten meanwhile: only a batch that is written makes that happen.
        let (unknown, _) = self.cache.lock().unknown(names);
        let mut connection = self.pool.acquire().await.map_err(StoreError::from)?;
        let read = batch::read(&mut connection, &unknown, budget).await?.ok_or(NoPlan::TooLarge)?;
        Ok(self.cache.lock().world(names, read))
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
        assert_eq!(header(headers::POSITION), "0.2.9.0");
        assert_eq!(header(headers::ORIGIN_TIME), "2026-01-12T04:55:59.048Z");
        assert_eq!(header(headers::REPLAY_OF), "7");
        assert_eq!(header(headers::TRUNCATED_FROM), "10");
        assert_eq!(dead_letter(&dead, &message, &checkpoint, 10).payload, "0123456789");
    }
}
