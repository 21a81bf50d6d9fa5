//! 3 Read in order, 6 Announce: whether log, checkpoint and events share one past, and what mends it when they do not.
//!
//! Postgres or NATS may be set back to an older state, or lose something, each without the other. What
//! [`diagnose`] finds is certain; the rest follows from it. Every way out goes through [`Checkpoint`]'s compare-and-set, and
//! begins a new generation or epoch, so that a leader of before can neither write nor note anything.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::{
    self,
    stream::{RawMessageErrorKind, Stream},
};
use contract::{
    Timestamp, headers,
    position::{EventPosition, LogPosition},
    rpc::{GetRecovery, Halted, Recover, RecoveryKind, RecoveryStatus, RpcError},
    streams::{self, LEAD_COMMANDS, LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use service_kit::{clock, nats::error_chain};
use sqlx::PgPool;

use crate::store::{
    checkpoint::{self, Checkpoint},
    ledger,
};

/// How often a leader looks whether somebody put the checkpoint elsewhere.
const LOOK: Duration = Duration::from_secs(1);
/// After how many looks it notes how far the webhook-notifier is. Rarer makes more be told twice when the events are lost.
const NOTE_TOLD: u32 = 10;

/// Why a leader halts.
pub(crate) const HALT_REASONS: [&str; 4] = ["database_restored", "log_lost_end", "log_begins_late", "log_replaced"];

/// What is there, seen in this order: the last event, then the checkpoint, then the log. So an event is never younger than
/// the checkpoint, nor the checkpoint younger than the log, while all is well.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    /// The identity of the stream of events.
    pub(crate) events_identity: String,
    /// The position that the last event carries; none when the stream holds none.
    pub(crate) last_event: Option<EventPosition>,
    pub(crate) checkpoint: Checkpoint,
    /// The last row of the ledger that counts as announced.
    pub(crate) last_announced: Option<(i32, u64)>,
    /// The identity of the log.
    pub(crate) log_identity: String,
    /// The first sequence that the log holds, or would.
    pub(crate) first: u64,
    /// The last sequence of the log.
    pub(crate) last: u64,
    /// When the log stored the entry at the checkpoint; none when it does not hold it any more.
    pub(crate) entry_at: Option<Timestamp>,
}

impl Scene {
    /// Looks at everything.
    pub(crate) async fn look(pool: &PgPool, js: &jetstream::Context) -> anyhow::Result<Self> {
        let events = js.get_stream(LEAD_EVENTS).await.context("cannot find the stream of events")?;
        let info = events.cached_info();
        let events_identity = streams::identity(info);
        let last_event = match info.state.messages {
            0 => None,
            _ => position_of(&events, info.state.last_sequence).await?,
        };
        // Only to have one; what counts is read of the database below.
        let log = js.get_stream(LEAD_COMMANDS).await.context("cannot find the log")?;
        let checkpoint =
            checkpoint::load(pool, LEAD_COMMANDS, &streams::identity(log.cached_info()), clock::now()).await?;
        let last_announced = ledger::last_up_to(pool, checkpoint.published()).await?;
        let info = log.get_info().await.context("cannot read the state of the log")?;
        let entry_at = match checkpoint.last_seq {
            0 => None,
            seq => logged_at(&log, seq).await?,
        };
        Ok(Self {
            events_identity,
            last_event,
            checkpoint,
            last_announced,
            log_identity: streams::identity(&info),
            first: info.state.first_sequence,
            last: info.state.last_sequence,
            entry_at,
        })
    }
}

/// The position that an event carries.
async fn position_of(events: &Stream, sequence: u64) -> anyhow::Result<Option<EventPosition>> {
    match events.get_raw_message(sequence).await {
        Ok(message) => Ok(message.headers.get(headers::POSITION).and_then(|value| value.as_str().parse().ok())),
        Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e).context("cannot read an event"),
    }
}

/// When the log stored an entry.
pub(crate) async fn logged_at(log: &Stream, sequence: u64) -> anyhow::Result<Option<Timestamp>> {
    match log.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.time.into())),
        Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e).context("cannot read an entry of the log"),
    }
}

/// Whether a leader must not go on, and why.
pub(crate) fn diagnose(scene: &Scene) -> Option<Halted> {
    let Scene { checkpoint, last_event, log_identity, first, last, entry_at, .. } = scene;
    let (applied, epoch) = (checkpoint.last_seq, checkpoint.epoch);
    let halted = |reason: &'static str, text, remedy| Some(Halted { reason: reason.into(), text, remedy });
    let same_log = checkpoint.stream_created_at == *log_identity;
    let at = checkpoint.position(epoch, applied);
    if let Some(event) = last_event.filter(|event| *event > at && event.generation >= at.generation) {
        let whole = same_log && *first <= applied + 1 && event.log.epoch == epoch && *last >= event.log.sequence;
        let text = format!(
            "entry {} of epoch {} was announced, but the checkpoint is at entry {applied} of epoch {epoch}: Postgres was \
             restored to an older state",
            event.log.sequence, event.log.epoch
        );
        let remedy = if whole { RecoveryKind::Replay } else { RecoveryKind::NewEpoch };
        return halted("database_restored", text, remedy);
    }
    if !same_log {
        // A new epoch begins by itself.
        return None;
    }
    if *last < applied {
        let text = format!(
            "{LEAD_COMMANDS} ends at {last}, but {applied} was applied: the log lost its end, and new commands would be \
             taken for old ones"
        );
        return halted("log_lost_end", text, RecoveryKind::NewEpoch);
    }
    if *first > applied + 1 {
        let text = format!(
            "{LEAD_COMMANDS} begins at {first}, but only {applied} was applied: the commands between are not in the log \
             any more"
        );
        return halted("log_begins_late", text, RecoveryKind::NewEpoch);
    }
    if let (Some(was), Some(is)) = (checkpoint.last_logged_at, entry_at)
        && was != *is
    {
        let text = format!(
            "entry {applied} of {LEAD_COMMANDS} was stored at {}, but the one that was applied at {}: the log was set back \
             and went on from there",
            is.to_iso(),
            was.to_iso()
        );
        return halted("log_replaced", text, RecoveryKind::NewEpoch);
    }
    None
}

/// Whether events were lost that may not have been told: then the announcements are taken back to what was.
pub(crate) fn lost_events(scene: &Scene) -> Option<&'static str> {
    let Scene { checkpoint, events_identity, last_event, last_announced, .. } = scene;
    if checkpoint.told >= checkpoint.published() {
        return None;
    }
    if checkpoint.events_created_at.as_ref().is_some_and(|known| known != events_identity) {
        return Some("the stream was made anew");
    }
    let (Some((epoch, sequence)), Some(_)) = (*last_announced, &checkpoint.events_created_at) else { return None };
    match last_event {
        // Purged, most likely: what is announced again was told then, and nothing is lost by that.
        None => Some("the stream is empty"),
        Some(event) if *event < checkpoint.position(epoch, sequence) && event.generation == checkpoint.generation => {
            Some("the stream lost its end")
        }
        Some(_) => None,
    }
}

/// The checkpoint with its announcements taken back to what the webhook-notifier acked.
pub(crate) fn taken_back(scene: &Scene) -> Checkpoint {
    let known = scene.last_event.map_or(0, |event| event.generation);
    let checkpoint = &scene.checkpoint;
    let (published_epoch, published_seq) = checkpoint.told.min(checkpoint.published());
    Checkpoint {
        generation: checkpoint.generation.max(known) + 1,
        published_epoch,
        published_seq,
        events_created_at: Some(scene.events_identity.clone()),
        ..checkpoint.clone()
    }
}

/// The checkpoint at the beginning of a new epoch on the log as it is.
pub(crate) fn new_epoch(scene: &Scene) -> Checkpoint {
    let known = scene.last_event.map_or(0, |event| event.log.epoch);
    Checkpoint {
        stream_created_at: scene.log_identity.clone(),
        epoch: scene.checkpoint.epoch.max(known) + 1,
        last_seq: scene.first.saturating_sub(1),
        last_logged_at: None,
        ..taken_back(scene)
    }
}

/// Notes how far the webhook-notifier is, and returns when somebody put the checkpoint elsewhere.
pub(crate) async fn watch(pool: PgPool, js: jetstream::Context, term: Checkpoint) -> String {
    let mut looks = 0_u32;
    loop {
        tokio::time::sleep(LOOK).await;
        match checkpoint::get(&pool, LEAD_COMMANDS).await {
            Ok(Some(now)) if (now.generation, now.epoch) != (term.generation, term.epoch) => {
                return "the checkpoint was put elsewhere".into();
            }
            Ok(Some(now)) if looks.is_multiple_of(NOTE_TOLD) => {
                if let Err(e) = note_told(&pool, &js, &now).await {
                    tracing::debug!("cannot note how far the webhook-notifier is: {e:#}");
                }
            }
            Ok(_) => {}
            Err(e) => tracing::debug!("cannot look at the checkpoint: {}", error_chain(&e)),
        }
        looks = looks.wrapping_add(1);
    }
}

/// Notes how far the webhook-notifier acked; `now` was read before.
async fn note_told(pool: &PgPool, js: &jetstream::Context, now: &Checkpoint) -> anyhow::Result<()> {
    let events = js.get_stream(LEAD_EVENTS).await?;
    let Ok(consumer) = events.consumer_info(NOTIFIER_CONSUMER).await else { return Ok(()) };
    let acked = consumer.ack_floor.stream_sequence;
    if acked == 0 {
        return Ok(());
    }
    let told = if acked >= events.cached_info().state.last_sequence && consumer.num_pending == 0 {
        // All there is; and all that counted as announced was there.
        Some(now.published())
    } else {
        let position = position_of(&events, acked).await?;
        // Not what it carries itself: several may, when a call ended that held updates.
        let before = |at: EventPosition| (at.log.epoch, at.log.sequence.saturating_sub(1));
        position.filter(|at| at.generation == now.generation).map(before)
    };
    if let Some(told) = told {
        checkpoint::set_told(pool, now, told).await?;
    }
    Ok(())
}

/// Answers how things stand, and mends them when told to.
#[derive(Debug, Clone)]
pub(crate) struct Recoveries {
    pub(crate) pool: PgPool,
    pub(crate) js: jetstream::Context,
}

impl Recoveries {
    async fn look(&self) -> Result<Scene, RpcError> {
        Scene::look(&self.pool, &self.js)
            .await
            .map_err(|e| RpcError::new(503, "unavailable", format!("cannot see how things stand: {e:#}")))
    }

    pub(crate) async fn get(self, _: GetRecovery) -> Result<RecoveryStatus, RpcError> {
        Ok(told(&self.look().await?))
    }

    pub(crate) async fn recover(self, recover: Recover) -> Result<RecoveryStatus, RpcError> {
        let scene = self.look().await?;
        let from = &scene.checkpoint;
        if (recover.generation, recover.applied) != (from.generation, LogPosition::message(from.epoch, from.last_seq)) {
            return Err(moved());
        }
        let halted = diagnose(&scene);
        let to = match (recover.kind, &halted) {
            (RecoveryKind::Reannounce, None) => self.reannounced(&scene, recover.since).await?,
            (RecoveryKind::Replay, Some(halted)) if halted.remedy == RecoveryKind::Replay => taken_back(&scene),
            (RecoveryKind::NewEpoch, Some(_)) => new_epoch(&scene),
            (kind, halted) => {
                let why = match halted {
                    Some(halted) => format!("{kind} does not mend this: {}", halted.text),
                    None => format!("nothing is wrong that {kind} would mend"),
                };
                return Err(RpcError::new(409, "not_applicable", why));
            }
        };
        if !checkpoint::put(&self.pool, from, &to, clock::now()).await? {
            return Err(moved());
        }
        tracing::warn!(
            kind = %recover.kind,
            was = halted.as_ref().map_or("running", |halted| halted.reason.as_ref()),
            from_epoch = from.epoch,
            from_seq = from.last_seq,
            epoch = to.epoch,
            generation = to.generation,
            last_seq = to.last_seq,
            published_epoch = to.published_epoch,
            published_seq = to.published_seq,
            "recovering, as an operator said"
        );
        Ok(told(&self.look().await?))
    }

    /// The checkpoint with its announcements taken back to what was applied since then.
    async fn reannounced(&self, scene: &Scene, since: Option<Timestamp>) -> Result<Checkpoint, RpcError> {
        let since = since.ok_or_else(|| RpcError::new(400, "missing_field", "since is required"))?;
        let first = ledger::first_since(&self.pool, since).await?;
        let nothing = || RpcError::new(409, "not_applicable", format!("nothing was applied since {}", since.to_iso()));
        let (epoch, seq) = first.ok_or_else(nothing)?;
        let before = (epoch, seq - 1);
        let mut to = taken_back(scene);
        (to.published_epoch, to.published_seq) = before.min(scene.checkpoint.published());
        to.told = to.told.min(before);
        Ok(to)
    }
}

fn moved() -> RpcError {
    RpcError::new(409, "moved_on", "the checkpoint has moved since; look again")
}

fn told(scene: &Scene) -> RecoveryStatus {
    let checkpoint = &scene.checkpoint;
    RecoveryStatus {
        generation: checkpoint.generation,
        applied: LogPosition::message(checkpoint.epoch, checkpoint.last_seq),
        announced: LogPosition::message(checkpoint.published_epoch, checkpoint.published_seq),
        delivered: LogPosition::message(checkpoint.told.0, checkpoint.told.1),
        log_first: scene.first,
        log_last: scene.last,
        halted: diagnose(scene),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> Scene {
        let at = Timestamp::from_millis(1_000);
        Scene {
            events_identity: "e".into(),
            last_event: Some(EventPosition { generation: 2, log: LogPosition::message(3, 7) }),
            checkpoint: Checkpoint {
                stream: LEAD_COMMANDS.into(),
                stream_created_at: "l".into(),
                generation: 2,
                epoch: 3,
                last_seq: 7,
                last_logged_at: Some(at),
                published_epoch: 3,
                published_seq: 7,
                told: (3, 5),
                events_created_at: Some("e".into()),
            },
            last_announced: Some((3, 7)),
            log_identity: "l".into(),
            first: 1,
            last: 7,
            entry_at: Some(at),
        }
    }

    fn reason(change: impl FnOnce(&mut Scene)) -> Option<(String, RecoveryKind)> {
        let mut scene = scene();
        change(&mut scene);
        diagnose(&scene).map(|halted| (halted.reason.into_owned(), halted.remedy))
    }

    #[test]
    fn what_is_well_goes_on() {
        assert_eq!(reason(|_| {}), None);
        // Purged up to the checkpoint.
        assert_eq!(reason(|s| (s.first, s.entry_at) = (8, None)), None);
        // A new log: a new epoch begins by itself.
        assert_eq!(reason(|s| (s.log_identity, s.last) = ("x".into(), 0)), None);
        // Recovered a moment ago: the events are still those of before.
        assert_eq!(reason(|s| (s.checkpoint.generation, s.checkpoint.last_seq, s.entry_at) = (3, 4, None)), None);
        // A stream that never held anything is at first 0 or 1, last 0.
        for first in [0, 1] {
            let fresh = |s: &mut Scene| {
                (s.first, s.last, s.checkpoint.last_seq, s.last_event, s.entry_at) = (first, 0, 0, None, None);
            };
            assert_eq!(reason(fresh), None);
        }
    }

    #[test]
    fn a_log_that_lost_something_halts_the_leader() {
        let new_epoch = |reason: &str| Some((reason.to_owned(), RecoveryKind::NewEpoch));
        assert_eq!(reason(|s| s.last = 6), new_epoch("log_lost_end"));
        assert_eq!(reason(|s| (s.first, s.last) = (9, 20)), new_epoch("log_begins_late"));
        assert_eq!(reason(|s| s.entry_at = Some(Timestamp::from_millis(2_000))), new_epoch("log_replaced"));
    }

    #[test]
    fn a_database_that_forgot_halts_the_leader() {
        let restored = |remedy| Some(("database_restored".to_owned(), remedy));
        let older = |s: &mut Scene| (s.checkpoint.last_seq, s.entry_at) = (4, None);
        assert_eq!(reason(older), restored(RecoveryKind::Replay));
        // The log does not hold what is missing, or is another.
        let lost = |s: &mut Scene| (s.checkpoint.last_seq, s.first) = (4, 6);
        assert_eq!(reason(lost), restored(RecoveryKind::NewEpoch));
        assert_eq!(reason(|s| (s.checkpoint.last_seq, s.last) = (4, 6)), restored(RecoveryKind::NewEpoch));
        assert_eq!(reason(|s| s.checkpoint.epoch = 2), restored(RecoveryKind::NewEpoch));
        // To before an earlier recovery.
        assert_eq!(reason(|s| s.checkpoint.generation = 1), restored(RecoveryKind::Replay));
    }

    #[test]
    fn lost_events_are_announced_again_from_what_was_told() {
        let lost = |change: &dyn Fn(&mut Scene)| {
            let mut scene = scene();
            change(&mut scene);
            lost_events(&scene)
        };
        assert_eq!(lost(&|_| {}), None);
        assert_eq!(lost(&|s| s.events_identity = "x".into()), Some("the stream was made anew"));
        assert_eq!(lost(&|s| s.last_event = None), Some("the stream is empty"));
        let at = |sequence| Some(EventPosition { generation: 2, log: LogPosition::message(3, sequence) });
        assert_eq!(lost(&|s| s.last_event = at(6)), Some("the stream lost its end"));
        // Entries without an event.
        assert_eq!(lost(&|s| (s.last_event, s.last_announced) = (at(6), Some((3, 6)))), None);
        // Everything was told.
        assert_eq!(lost(&|s| (s.events_identity, s.checkpoint.told) = ("x".into(), (3, 7))), None);
        let back = taken_back(&scene());
        assert_eq!((back.generation, back.published(), back.last_seq), (3, (3, 5), 7));
    }

    #[test]
    fn a_new_epoch_begins_where_the_log_does() {
        let mut scene = scene();
        (scene.first, scene.last, scene.log_identity) = (9, 20, "x".into());
        let next = new_epoch(&scene);
        assert_eq!((next.epoch, next.last_seq, next.generation, next.published()), (4, 8, 3, (3, 5)));
        assert_eq!((next.stream_created_at.as_str(), next.last_logged_at), ("x", None));
    }
}
