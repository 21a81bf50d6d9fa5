//! 4 Decide: the effect of an update on a lead. Pure: no I/O, no clock, no randomness.

use contract::{
    JsonObject, ObjectId, Timestamp,
    command::{MAX_TEXT_CHARS, UpdateCommand},
    process::{Rules, StateKind},
    warning::Warning,
};

use super::merge::merge;

/// Limit of a lead's metadata, in bytes of text.
pub const MAX_METADATA_BYTES: usize = 1 << 20;
/// Limit of a lead's queued updates. All of them are decided in one transaction when the call ends.
pub const MAX_QUEUED: usize = 256;
/// The most calls with a lead at once. All of them are read and written with every change of one. A further call
/// replaces the one that expires first.
pub const MAX_CALLS: usize = 64;
/// Limit of the bytes of the outcomes of a lead's queued updates, which are in memory together. One update alone may
/// exceed it.
const QUEUED_BYTES: usize = 8 << 20;

/// The part of a lead that decisions depend on or change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lead {
    pub lead_id: ObjectId,
    pub project_id: ObjectId,
    pub process_id: ObjectId,
    pub reference_id: Option<String>,
    pub name: Option<String>,
    pub state: String,
    /// The disposition from the last state that takes one.
    pub disposition: Option<String>,
    pub metadata: JsonObject,
    /// Incremented by every applied update, and by every call event that sets the state.
    pub version: i64,
    /// Whether the lead was erased. An erased lead refuses every update and call event.
    pub is_erased: bool,
}

/// A call that was started and not ended. It may have expired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Empty where the producer gave no id.
    pub call_id: String,
    pub started_at: Timestamp,
    pub expires_at: Timestamp,
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Limit of the merged metadata: [`MAX_METADATA_BYTES`], or less where NATS refuses events of that size.
    pub metadata_bytes: usize,
}

/// Reserved in an event for everything but metadata: ids, texts of at most 1024 characters, headers.
const EVENT_ROOM: usize = 64 << 10;

impl Limits {
    pub fn for_max_payload(max_payload: usize) -> Self {
        Self { metadata_bytes: max_payload.saturating_sub(EVENT_ROOM).min(MAX_METADATA_BYTES) }
    }
}

/// The effect of a successful update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub lead: Lead,
    /// The disposition that the update stores; none if the command has none, or the state takes none.
    pub disposition: Option<String>,
    /// Warnings about fields that were ignored.
    pub warnings: Vec<String>,
}

/// Why an update fails. The texts are for the client, in the webhook's `error`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("Either leadId or referenceId is required")]
    AddressMissing,
    #[error("processId is required when using referenceId")]
    ProcessMissing,
    #[error("Lead not found")]
    LeadNotFound,
    #[error("Lead was erased")]
    LeadErased,
    #[error("leadId and referenceId name different leads")]
    AddressMismatch,
    /// Clients compare this text.
    #[error("Lead update is not allowed while a call is in progress for this lead")]
    CallInProgress,
    #[error("{queued} updates of this lead are queued until its call ends, and the queue is full")]
    QueueFull { queued: usize },
    #[error("Nothing to change: give metadata, name or targetState")]
    NothingToChange,
    #[error("Lead is at version {version}, not at the expected version {expected}")]
    VersionMismatch { expected: u32, version: i64 },
    #[error("Lead is in the state {state:?}, not in the expected state {expected:?}")]
    StateMismatch { expected: String, state: String },
    #[error("{field} is longer than {MAX_TEXT_CHARS} characters")]
    TextTooLong { field: &'static str },
    #[error("targetState {target:?} is not a state of the lead's process")]
    UnknownState { target: String },
    #[error("Transition from {from:?} to {target:?} is not allowed")]
    TransitionNotAllowed { from: String, target: String },
    #[error("Lead is in the terminal state {from:?} and cannot be moved to {target:?}")]
    TerminalState { from: String, target: String },
    #[error("Merged metadata would be {bytes} bytes, more than the {limit} allowed")]
    MetadataTooLarge { bytes: usize, limit: usize },
}

impl Refusal {
    /// The stable code for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::AddressMissing => "address_missing",
            Self::ProcessMissing => "process_missing",
            Self::LeadNotFound => "lead_not_found",
            Self::LeadErased => "lead_erased",
            Self::AddressMismatch => "address_mismatch",
            Self::CallInProgress => "call_in_progress",
            Self::QueueFull { .. } => "queue_full",
            Self::NothingToChange => "nothing_to_change",
            Self::VersionMismatch { .. } => "version_mismatch",
            Self::StateMismatch { .. } => "state_mismatch",
            Self::TextTooLong { .. } => "text_too_long",
            Self::UnknownState { .. } => "unknown_state",
            Self::TransitionNotAllowed { .. } => "transition_not_allowed",
            Self::TerminalState { .. } => "terminal_state",
            Self::MetadataTooLarge { .. } => "metadata_too_large",
        }
    }
}

/// Decides an update of a lead. All or nothing: a refusal leaves the lead unchanged.
///
/// `now` is when the log stored the command, so a replay decides the same.
pub fn decide(
    lead: &Lead,
    calls: &[Call],
    command: &UpdateCommand,
    rules: &Rules,
    now: Timestamp,
    limits: Limits,
) -> Result<Change, Refusal> {
    if in_call(calls, now) {
        return Err(Refusal::CallInProgress);
    }
    if command.metadata.is_none() && command.name.is_none() && command.target_state.is_none() {
        return Err(Refusal::NothingToChange);
    }
    let texts = [
        ("name", &command.name),
        ("targetState", &command.target_state),
        ("disposition", &command.disposition),
        ("userId", &command.user_id),
        ("expectedState", &command.expected_state),
    ];
    for (field, text) in texts {
        if text.as_ref().is_some_and(|text| text.chars().count() > MAX_TEXT_CHARS) {
            return Err(Refusal::TextTooLong { field });
        }
    }
    check_expectations(lead, command)?;

    let target_state = match &command.target_state {
        Some(target) => {
            let state = rules.state(target).ok_or_else(|| Refusal::UnknownState { target: target.clone() })?;
            check_transition(&lead.state, target, rules)?;
            Some(state)
        }
        None => None,
    };
    let metadata = match &command.metadata {
        Some(patch) => merge(&lead.metadata, patch, rules.metadata_merge),
        None => lead.metadata.clone(),
    };
    let bytes = metadata.get().len();
    if bytes > limits.metadata_bytes {
        return Err(Refusal::MetadataTooLarge { bytes, limit: limits.metadata_bytes });
    }
    let mut warnings = Vec::new();
    let disposition = match (&command.disposition, target_state) {
        (Some(disposition), Some(state)) if state.takes_disposition() => Some(disposition),
        (Some(_), Some(state)) => {
            warnings.push(Warning::STATE_TAKES_NO_DISPOSITION.with(&[&format_args!("{:?}", state.name)]));
            None
        }
        (Some(_), None) => {
            warnings.push(Warning::DISPOSITION_NOT_STORED.with(&[]));
            None
        }
        (None, _) => None,
    };
    let lead = Lead {
        reference_id: lead.reference_id.clone(),
        name: command.name.as_ref().or(lead.name.as_ref()).cloned(),
        state: command.target_state.as_ref().unwrap_or(&lead.state).clone(),
        disposition: disposition.or(lead.disposition.as_ref()).cloned(),
        metadata,
        version: lead.version + 1,
        ..*lead
    };
    Ok(Change { lead, disposition: disposition.cloned(), warnings })
}

/// Whether a call is in progress.
pub fn in_call(calls: &[Call], now: Timestamp) -> bool {
    calls.iter().any(|call| now < call.expires_at)
}

/// Checks that an update of this many bytes fits into the lead's queue, whose updates have `queued` bytes each.
pub fn room_to_queue(lead: &Lead, queued: impl Iterator<Item = usize>, bytes: usize) -> Result<(), Refusal> {
    let (mut count, mut all) = (0, bytes);
    for bytes in queued {
        (count, all) = (count + 1, all + bytes);
    }
    if count == 0 || (count < MAX_QUEUED && queue_outcome_bytes(lead, count + 1, all) <= QUEUED_BYTES) {
        Ok(())
    } else {
        Err(Refusal::QueueFull { queued: count })
    }
}

/// Upper bound of the bytes of the outcomes of `count` queued updates: each carries the lead's metadata, into which
/// `bytes` in all are merged.
pub fn queue_outcome_bytes(lead: &Lead, count: usize, bytes: usize) -> usize {
    count * (lead.metadata.get().len() + bytes)
}

fn check_expectations(lead: &Lead, command: &UpdateCommand) -> Result<(), Refusal> {
    if let Some(expected) = command.expected_version.filter(|expected| i64::from(*expected) != lead.version) {
        return Err(Refusal::VersionMismatch { expected, version: lead.version });
    }
    match &command.expected_state {
        Some(expected) if *expected != lead.state => {
            Err(Refusal::StateMismatch { expected: expected.clone(), state: lead.state.clone() })
        }
        _ => Ok(()),
    }
}

fn check_transition(from: &str, target: &str, rules: &Rules) -> Result<(), Refusal> {
    if from == target {
        return Ok(());
    }
    let terminal = rules.state(from).is_some_and(|state| state.kind == StateKind::Terminal);
    if terminal && !rules.allow_leaving_terminal {
        return Err(Refusal::TerminalState { from: from.into(), target: target.into() });
    }
    let listed = rules
        .transitions
        .as_ref()
        .is_none_or(|transitions| transitions.get(from).is_some_and(|targets| targets.contains(target)));
    if listed { Ok(()) } else { Err(Refusal::TransitionNotAllowed { from: from.into(), target: target.into() }) }
}

#[cfg(test)]
mod tests {
    use contract::process::{MetadataMerge, State};
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000);
    const LIMITS: Limits = Limits { metadata_bytes: 64 };

    /// The refusal after this one. Every variant has an arm, so a new variant cannot be forgotten.
    fn following(refusal: &Refusal) -> Option<Refusal> {
        let text = String::new;
        Some(match refusal {
            Refusal::AddressMissing => Refusal::ProcessMissing,
            Refusal::ProcessMissing => Refusal::LeadNotFound,
            Refusal::LeadNotFound => Refusal::LeadErased,
            Refusal::LeadErased => Refusal::AddressMismatch,
            Refusal::AddressMismatch => Refusal::CallInProgress,
            Refusal::CallInProgress => Refusal::QueueFull { queued: 256 },
            Refusal::QueueFull { .. } => Refusal::NothingToChange,
            Refusal::NothingToChange => Refusal::VersionMismatch { expected: 1, version: 2 },
            Refusal::VersionMismatch { .. } => Refusal::StateMismatch { expected: text(), state: text() },
            Refusal::StateMismatch { .. } => Refusal::TextTooLong { field: "name" },
            Refusal::TextTooLong { .. } => Refusal::UnknownState { target: text() },
            Refusal::UnknownState { .. } => Refusal::TransitionNotAllowed { from: text(), target: text() },
            Refusal::TransitionNotAllowed { .. } => Refusal::TerminalState { from: text(), target: text() },
            Refusal::TerminalState { .. } => Refusal::MetadataTooLarge { bytes: 65, limit: 64 },
            Refusal::MetadataTooLarge { .. } => return None,
        })
    }

    #[test]
    fn each_refusal_has_a_row_in_the_table_of_errors_and_no_row_is_left_over() {
        let rows = include_str!("../../../../docs/ERRORS.md").lines();
        let mut documented: Vec<_> =
            rows.filter_map(|line| line.strip_prefix("| failed update | | `")?.split('`').next()).collect();
        let refusals = std::iter::successors(Some(Refusal::AddressMissing), following);
        let mut codes: Vec<_> = refusals.map(|refusal| refusal.code()).collect();
        documented.sort_unstable();
        codes.sort_unstable();
        assert_eq!(documented, codes);
    }

    fn object(text: &str) -> JsonObject {
        JsonObject::from_text(text.into()).unwrap()
    }

    fn lead(state: &str) -> Lead {
        Lead {
            lead_id: ObjectId::from_bytes([1; 12]),
            project_id: ObjectId::from_bytes([2; 12]),
            process_id: ObjectId::from_bytes([3; 12]),
            reference_id: None,
            name: Some("Ada".into()),
            state: state.into(),
            disposition: Some("old".into()),
            metadata: object(r#"{"a":1}"#),
            version: 4,
            is_erased: false,
        }
    }

    fn rules() -> Rules {
        let state = |name: &str, kind| State { name: name.into(), kind, takes_disposition: None };
        Rules {
            states: vec![
                state("new", StateKind::Initial),
                state("followup_2", StateKind::Active),
                state("interested", StateKind::Active),
                state("lost", StateKind::Terminal),
            ],
            transitions: Some(
                [
                    ("new", vec!["followup_2", "interested", "lost"]),
                    ("followup_2", vec!["interested"]),
                    ("lost", vec!["new"]),
                ]
                .into_iter()
                .map(|(from, to)| (from.to_owned(), to.into_iter().map(str::to_owned).collect()))
                .collect(),
            ),
            metadata_merge: MetadataMerge::Shallow,
            ..Rules::default()
        }
    }

    fn to(target: &str) -> UpdateCommand {
        UpdateCommand { target_state: Some(target.into()), ..Default::default() }
    }

    fn decide_idle(lead: &Lead, command: &UpdateCommand) -> Result<Change, Refusal> {
        decide(lead, &[], command, &rules(), NOW, LIMITS)
    }

    #[test]
    fn one_update_changes_metadata_name_state_and_disposition() {
        let command = UpdateCommand {
            metadata: Some(object(r#"{"b":2}"#)),
            name: Some("Grace".into()),
            disposition: Some("hot".into()),
            ..to("interested")
        };

        let change = decide_idle(&lead("new"), &command).unwrap();

        let expected = Lead {
            name: Some("Grace".into()),
            disposition: Some("hot".into()),
            metadata: object(r#"{"a":1,"b":2}"#),
            version: 5,
            ..lead("interested")
        };
        assert_eq!(change, Change { lead: expected, disposition: Some("hot".into()), warnings: vec![] });
    }

    #[test]
    fn updates_fail_during_a_call_until_it_expires() {
        let call = Call { call_id: String::new(), started_at: NOW, expires_at: NOW };
        assert!(decide(&lead("new"), std::slice::from_ref(&call), &to("lost"), &rules(), NOW, LIMITS).is_ok());
        let call = Call { expires_at: Timestamp::from_millis(NOW.millis() + 1), ..call };
        let refusal = decide(&lead("new"), &[call], &to("lost"), &rules(), NOW, LIMITS).unwrap_err();
        assert_eq!(refusal.to_string(), "Lead update is not allowed while a call is in progress for this lead");
    }

    #[test]
    fn a_leads_queue_is_bounded_in_updates_and_in_bytes_of_outcomes() {
        let lead = lead("new");
        let queued = |count: usize, bytes: usize| std::iter::repeat_n(bytes, count);
        assert_eq!(room_to_queue(&lead, queued(MAX_QUEUED - 1, 10), 10), Ok(()));
        assert_eq!(room_to_queue(&lead, queued(MAX_QUEUED, 10), 10), Err(Refusal::QueueFull { queued: MAX_QUEUED }));
        assert_eq!(room_to_queue(&lead, queued(0, 0), QUEUED_BYTES), Ok(()), "one update always fits");
        assert_eq!(room_to_queue(&lead, queued(1, 1 << 20), 1 << 20), Ok(()));
        // Each of the three outcomes carries the metadata of all three.
        assert_eq!(room_to_queue(&lead, queued(2, 1 << 20), 1 << 20), Err(Refusal::QueueFull { queued: 2 }));
    }

    #[test]
    fn transitions_outside_the_rules_fail() {
        assert_eq!(decide_idle(&lead("new"), &to("gone")).unwrap_err().code(), "unknown_state");
        assert_eq!(decide_idle(&lead("followup_2"), &to("lost")).unwrap_err().code(), "transition_not_allowed");
        assert_eq!(decide_idle(&lead("interested"), &to("new")).unwrap_err().code(), "transition_not_allowed");
        assert_eq!(decide_idle(&lead("lost"), &to("new")).unwrap_err().code(), "terminal_state");
    }

    #[test]
    fn the_same_state_is_always_allowed() {
        assert_eq!(decide_idle(&lead("lost"), &to("lost")).unwrap().lead.state, "lost");
        assert_eq!(decide_idle(&lead("new"), &to("new")).unwrap().lead.state, "new");
    }

    #[test]
    fn a_process_may_allow_leaving_terminal_states_and_any_transition() {
        let leaving = Rules { allow_leaving_terminal: true, ..rules() };
        assert_eq!(decide(&lead("lost"), &[], &to("new"), &leaving, NOW, LIMITS).unwrap().lead.state, "new");
        let free = Rules { transitions: None, ..rules() };
        assert_eq!(decide(&lead("interested"), &[], &to("new"), &free, NOW, LIMITS).unwrap().lead.state, "new");
    }

    #[test]
    fn an_update_with_a_wrong_expectation_fails_with_the_actual_value() {
        let expecting = |version, state: Option<&str>| UpdateCommand {
            expected_version: version,
            expected_state: state.map(Into::into),
            ..to("lost")
        };
        assert!(decide_idle(&lead("new"), &expecting(Some(4), Some("new"))).is_ok());
        let refused = |version, state| {
            let refusal = decide_idle(&lead("new"), &expecting(version, state)).unwrap_err();
            (refusal.code(), refusal.to_string())
        };
        let version_5 = ("version_mismatch", "Lead is at version 4, not at the expected version 5".to_owned());
        assert_eq!(refused(Some(5), None), version_5);
        assert_eq!(refused(Some(5), Some("lost")), version_5);
        let state_lost = "Lead is in the state \"new\", not in the expected state \"lost\"".to_owned();
        assert_eq!(refused(None, Some("lost")), ("state_mismatch", state_lost));
    }

    #[test]
    fn a_disposition_is_ignored_with_a_warning_where_the_state_takes_none() {
        for (command, warning) in [
            (to("followup_2"), "disposition was ignored: the state \"followup_2\" takes none"),
            (
                UpdateCommand { name: Some("x".into()), ..Default::default() },
                "disposition was ignored: it is stored with a targetState only",
            ),
        ] {
            let change =
                decide_idle(&lead("new"), &UpdateCommand { disposition: Some("hot".into()), ..command }).unwrap();
            assert_eq!(change.lead.disposition.as_deref(), Some("old"));
            assert_eq!(change.warnings, [warning]);
        }
    }

    #[test]
    fn an_update_without_changes_fails() {
        assert_eq!(decide_idle(&lead("new"), &UpdateCommand::default()), Err(Refusal::NothingToChange));
    }

    #[test]
    fn texts_and_metadata_are_limited() {
        let long = UpdateCommand { name: Some("é".repeat(1025)), ..Default::default() };
        assert_eq!(decide_idle(&lead("new"), &long), Err(Refusal::TextTooLong { field: "name" }));
        let large = UpdateCommand { metadata: Some(object(&format!(r#"{{"b":"{}"}}"#, "x".repeat(60)))), ..to("lost") };
        assert_eq!(decide_idle(&lead("new"), &large), Err(Refusal::MetadataTooLarge { bytes: 74, limit: 64 }));
    }

    proptest! {
        /// A change never leaves the process's states and always increments the version.
        #[test]
        fn a_change_stays_within_the_rules(
            from in prop::sample::select(vec!["new", "followup_2", "interested", "lost"]),
            target in prop::option::of(prop::sample::select(vec!["new", "followup_2", "interested", "lost", "gone"])),
            name in prop::option::of("[a-z]{0,4}"),
            expires in 0..2_000_000_i64,
            expected_version in prop::option::weighted(0.3, 3..6_u32),
            expected_state in prop::option::weighted(0.3, prop::sample::select(vec!["new", "lost", "gone"])),
        ) {
            let lead = lead(from);
            let call = Call { call_id: "c".into(), started_at: NOW, expires_at: Timestamp::from_millis(expires) };
            let command = UpdateCommand {
                name: name.clone(),
                target_state: target.map(Into::into),
                expected_version,
                expected_state: expected_state.map(Into::into),
                ..Default::default()
            };
            let mismatch = expected_version.is_some_and(|version| i64::from(version) != lead.version)
                || expected_state.is_some_and(|state| state != lead.state);
            match decide(&lead, &[call], &command, &rules(), NOW, LIMITS) {
                Ok(change) => {
                    prop_assert!(expires <= NOW.millis() && !mismatch);
                    prop_assert_eq!(change.lead.version, lead.version + 1);
                    prop_assert_eq!(&change.lead.state, target.unwrap_or(from));
                    prop_assert!(rules().state(&change.lead.state).is_some());
                    prop_assert_eq!(change.lead.name, name.or(lead.name));
                    prop_assert_eq!(change.lead.metadata, lead.metadata);
                }
                Err(refusal) => {
                    prop_assert_eq!(refusal == Refusal::CallInProgress, expires > NOW.millis());
                    // Expectations are checked before states, but after these two.
                    let earlier = [Refusal::CallInProgress, Refusal::NothingToChange].contains(&refusal);
                    prop_assert_eq!(refusal.code().ends_with("_mismatch"), mismatch && !earlier);
                }
            }
        }
    }
}
