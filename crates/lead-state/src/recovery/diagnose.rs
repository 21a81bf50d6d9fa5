//! 3 Read in order, 6 Announce: diagnoses a [`RecoveryState`], and computes the checkpoints that repair it. Pure.

use contract::{
    position::{EventPosition, LogPosition},
    rpc::{Halted, RecoveryKind},
    streams::LEAD_COMMANDS,
};

use super::state::RecoveryState;
use crate::store::checkpoint::Checkpoint;

/// Why the leader must halt until an operator decides; None if it may continue.
pub(crate) fn diagnose(state: &RecoveryState) -> Option<Halted> {
    let RecoveryState { checkpoint, last_event, log_identity, log_first, log_last, applied_entry_at, .. } = state;
    let LogPosition { epoch, sequence: applied, .. } = checkpoint.applied;
    let next = checkpoint.next_sequence();
    let halted = |reason: &'static str, text, remedy| Some(Halted { reason: reason.into(), text, remedy });
    let same_log = checkpoint.stream_created_at == *log_identity;
    let at = EventPosition { generation: checkpoint.generation, log: checkpoint.applied };
    if let Some(event) = last_event.filter(|event| *event > at && event.generation >= at.generation) {
        let log_is_whole =
            same_log && *log_first <= next && event.log.epoch == epoch && *log_last >= event.log.sequence;
        let text = format!(
            "entry {} of epoch {} was announced, but the checkpoint is at entry {applied} of epoch {epoch}: Postgres was \
             restored to an older state",
            event.log.sequence, event.log.epoch
        );
        let remedy = if log_is_whole { RecoveryKind::Replay } else { RecoveryKind::NewEpoch };
        return halted(Halted::DATABASE_RESTORED, text, remedy);
    }
    if !same_log {
        // The leader begins a new epoch by itself.
        return None;
    }
    if *log_last < applied {
        let text = format!(
            "{LEAD_COMMANDS} ends at {log_last}, but {applied} was applied: the log lost its end, and new commands would \
             be taken for applied ones"
        );
        return halted(Halted::LOG_LOST_END, text, RecoveryKind::NewEpoch);
    }
    if *log_first > next {
        let text = format!(
            "{LEAD_COMMANDS} begins at {log_first}, but only {applied} was applied: the commands in between are no longer \
             in the log"
        );
        return halted(Halted::LOG_BEGINS_LATE, text, RecoveryKind::NewEpoch);
    }
    if let (Some(expected), Some(found)) = (checkpoint.last_logged_at, applied_entry_at)
        && expected != *found
    {
        let text = format!(
            "entry {applied} of {LEAD_COMMANDS} was stored at {}, but the applied one at {}: the log was restored to an \
             older state and has grown since",
            found.to_iso(),
            expected.to_iso()
        );
        return halted(Halted::LOG_REPLACED, text, RecoveryKind::NewEpoch);
    }
    None
}

/// Why undelivered events may be lost, so that the announcements must be rewound; None if no such event is lost.
pub(crate) fn lost_events(state: &RecoveryState) -> Option<&'static str> {
    let RecoveryState { checkpoint, events_identity, last_event_after, last_announced, .. } = state;
    if checkpoint.delivered >= checkpoint.announced {
        return None;
    }
    let announced = (*last_announced)?;
    match &checkpoint.events_created_at {
        None => return Some("a leader saw that the stream lost its end or was created again"),
        Some(known) if known != events_identity => return Some("the stream was deleted and created again"),
        Some(_) => {}
    }
    match last_event_after {
        // The events were probably purged. If they had been delivered, they are delivered once more.
        None => Some("the stream is empty"),
        // An event of an earlier generation shows that all events of this one are lost.
        Some(event) if event.generation <= checkpoint.generation && event.log < announced => {
            Some("the stream lost its end")
        }
        Some(_) => None,
    }
}

/// The checkpoint in a new generation, with the announcements rewound to the delivered watermark.
pub(crate) fn rewind_announcements(state: &RecoveryState) -> Checkpoint {
    let checkpoint = &state.checkpoint;
    let last_generation = state.last_event.map_or(0, |event| event.generation);
    Checkpoint {
        generation: checkpoint.generation.max(last_generation) + 1,
        announced: checkpoint.delivered.min(checkpoint.announced),
        events_created_at: Some(state.events_identity.clone()),
        ..checkpoint.clone()
    }
}

/// The checkpoint before the first entry of the current log, in a new epoch.
pub(crate) fn new_epoch(state: &RecoveryState) -> Checkpoint {
    let last_epoch = state.last_event.map_or(0, |event| event.log.epoch);
    let epoch = state.checkpoint.applied.epoch.max(last_epoch) + 1;
    Checkpoint {
        stream_created_at: state.log_identity.clone(),
        applied: LogPosition::message(epoch, state.log_first.saturating_sub(1)),
        last_logged_at: None,
        ends_message: true,
        ..rewind_announcements(state)
    }
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    fn at(sequence: u64) -> LogPosition {
        LogPosition::message(3, sequence)
    }

    fn state() -> RecoveryState {
        let logged_at = Timestamp::from_millis(1_000);
        RecoveryState {
            events_identity: "e".into(),
            events_last: 7,
            last_event: Some(EventPosition { generation: 2, log: at(7) }),
            checkpoint: Checkpoint {
                stream: LEAD_COMMANDS.into(),
                stream_created_at: "l".into(),
                generation: 2,
                applied: at(7),
                last_logged_at: Some(logged_at),
                ends_message: true,
                announced: at(7),
                delivered: at(5),
                events_created_at: Some("e".into()),
            },
            last_event_after: Some(EventPosition { generation: 2, log: at(7) }),
            last_announced: Some(at(7)),
            log_identity: "l".into(),
            log_first: 1,
            log_last: 7,
            applied_entry_at: Some(logged_at),
        }
    }

    fn reason(change: impl FnOnce(&mut RecoveryState)) -> Option<(String, RecoveryKind)> {
        let mut state = state();
        change(&mut state);
        diagnose(&state).map(|halted| (halted.reason.into_owned(), halted.remedy))
    }

    /// Moves the checkpoint, to an entry that the log does not hold any more.
    fn apply_up_to(state: &mut RecoveryState, sequence: u64) {
        (state.checkpoint.applied.sequence, state.applied_entry_at) = (sequence, None);
    }

    #[test]
    fn a_consistent_history_does_not_halt_the_leader() {
        assert_eq!(reason(|_| {}), None);
        // Purged up to the checkpoint.
        assert_eq!(reason(|s| (s.log_first, s.applied_entry_at) = (8, None)), None);
        // Recovered just now: the last event is of the generation before.
        assert_eq!(
            reason(|s| {
                s.checkpoint.generation = 3;
                apply_up_to(s, 4);
            }),
            None
        );
    }

    #[test]
    fn a_new_log_does_not_halt_the_leader() {
        assert_eq!(reason(|s| (s.log_identity, s.log_last) = ("x".into(), 0)), None);
        // A stream that never had a message begins at 0 or 1.
        for first in [0, 1] {
            let fresh = |s: &mut RecoveryState| {
                (s.log_first, s.log_last, s.last_event) = (first, 0, None);
                apply_up_to(s, 0);
            };
            assert_eq!(reason(fresh), None);
        }
    }

    #[test]
    fn a_log_that_lost_entries_halts_the_leader() {
        let new_epoch = |reason: &str| Some((reason.to_owned(), RecoveryKind::NewEpoch));
        assert_eq!(reason(|s| s.log_last = 6), new_epoch("log_lost_end"));
        assert_eq!(reason(|s| (s.log_first, s.log_last) = (9, 20)), new_epoch("log_begins_late"));
        // The rest of a pack is missing.
        let without_rest =
            |s: &mut RecoveryState| (s.checkpoint.ends_message, s.log_first, s.log_last) = (false, 8, 20);
        assert_eq!(reason(without_rest), new_epoch("log_begins_late"));
        assert_eq!(reason(|s| s.applied_entry_at = Some(Timestamp::from_millis(2_000))), new_epoch("log_replaced"));
    }

    #[test]
    fn a_restored_database_halts_the_leader() {
        let restored = |remedy| Some(("database_restored".to_owned(), remedy));
        assert_eq!(reason(|s| apply_up_to(s, 4)), restored(RecoveryKind::Replay));
        // The database is from before an earlier recovery.
        assert_eq!(reason(|s| s.checkpoint.generation = 1), restored(RecoveryKind::Replay));
        // The log does not hold the missing entries, or is another one.
        let begins_late = |s: &mut RecoveryState| {
            s.log_first = 6;
            apply_up_to(s, 4);
        };
        let ends_early = |s: &mut RecoveryState| {
            s.log_last = 6;
            apply_up_to(s, 4);
        };
        assert_eq!(reason(begins_late), restored(RecoveryKind::NewEpoch));
        assert_eq!(reason(ends_early), restored(RecoveryKind::NewEpoch));
        assert_eq!(reason(|s| s.checkpoint.applied.epoch = 2), restored(RecoveryKind::NewEpoch));
    }

    #[test]
    fn lost_events_are_detected_unless_everything_was_delivered() {
        let lost = |change: &dyn Fn(&mut RecoveryState)| {
            let mut state = state();
            change(&mut state);
            lost_events(&state)
        };
        let last = |sequence| Some(EventPosition { generation: 2, log: at(sequence) });
        assert_eq!(lost(&|_| {}), None);
        assert_eq!(lost(&|s| s.events_identity = "x".into()), Some("the stream was deleted and created again"));
        assert_eq!(
            lost(&|s| s.checkpoint.events_created_at = None),
            Some("a leader saw that the stream lost its end or was created again")
        );
        assert_eq!(
            lost(&|s| (s.checkpoint.events_created_at, s.last_announced) = (None, None)),
            None,
            "nothing was announced"
        );
        assert_eq!(lost(&|s| s.last_event_after = None), Some("the stream is empty"));
        assert_eq!(lost(&|s| s.last_event_after = last(6)), Some("the stream lost its end"));
        // Restored to a time before an earlier recovery.
        let earlier = Some(EventPosition { generation: 1, log: at(6) });
        assert_eq!(lost(&|s| s.last_event_after = earlier), Some("the stream lost its end"));
        // A former leader announced the last event after the events were read.
        assert_eq!(lost(&|s| s.last_event = last(6)), None);
        // Entry 7 has no ledger row.
        assert_eq!(lost(&|s| (s.last_event_after, s.last_announced) = (last(6), Some(at(6)))), None);
        assert_eq!(lost(&|s| (s.events_identity, s.checkpoint.delivered) = ("x".into(), at(7))), None);
    }

    #[test]
    fn announcements_are_rewound_to_the_delivered_watermark() {
        let rewound = rewind_announcements(&state());
        assert_eq!((rewound.generation, rewound.announced, rewound.applied), (3, at(5), at(7)));
    }

    #[test]
    fn a_new_epoch_begins_before_the_first_entry_of_the_log() {
        let mut state = state();
        (state.log_first, state.log_last, state.log_identity) = (9, 20, "x".into());

        let next = new_epoch(&state);

        assert_eq!((next.generation, next.applied, next.announced), (3, LogPosition::message(4, 8), at(5)));
        assert_eq!((next.stream_created_at.as_str(), next.last_logged_at), ("x", None));
    }
}
