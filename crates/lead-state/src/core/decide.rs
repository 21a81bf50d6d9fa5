//! 4 Decide: what an update does to a lead. Pure: no I/O, no clock, no randomness.

use contract::{
    JsonObject, ObjectId, Timestamp,
    command::{MAX_TEXT_CHARS, UpdateCommand},
    process::{Rules, StateKind},
};

use super::merge::merge;

/// Most bytes of a lead's metadata, as text.
pub const MAX_METADATA_BYTES: usize = 1 << 20;
/// Most updates of a lead that are held during a call. They are decided in one transaction when it ends.
pub const MAX_HELD: usize = 256;
/// Most bytes that the outcomes of what is held of a lead may come to, unless a single one has more: they are in memory
/// together.
const HELD_BYTES: usize = 8 << 20;

/// A lead, as far as deciding and applying need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lead {
    /// The lead.
    pub lead_id: ObjectId,
    /// Its project.
    pub project_id: ObjectId,
    /// Its process.
    pub process_id: ObjectId,
    /// Its external id.
    pub reference_id: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its state.
    pub state: String,
    /// The disposition stored with the state that last took one.
    pub disposition: Option<String>,
    /// What else is known of it.
    pub metadata: JsonObject,
    /// Grows by one with every applied update.
    pub version: i64,
}

/// A call with a lead that nobody ended yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The call; empty where the producer gave no id.
    pub call_id: String,
    /// When it began.
    pub started_at: Timestamp,
    /// From when on it counts as ended.
    pub expires_at: Timestamp,
}

/// What the decision depends on beside the lead, its process and the command.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most bytes of merged metadata: [`MAX_METADATA_BYTES`], or less where NATS takes no event of that size.
    pub metadata_bytes: usize,
}

/// Room in an event for all that is not metadata: ids, texts of at most 1024 characters, headers.
const EVENT_ROOM: usize = 64 << 10;

impl Limits {
    /// What fits where NATS takes messages of at most `max_payload` bytes.
    pub fn for_max_payload(max_payload: usize) -> Self {
        Self { metadata_bytes: max_payload.saturating_sub(EVENT_ROOM).min(MAX_METADATA_BYTES) }
    }
}

/// A lead changed as asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The lead after it.
    pub lead: Lead,
    /// What was asked for and ignored.
    pub warnings: Vec<String>,
}

/// Why an update changes nothing. The texts are for the client, in the webhook's `error`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Neither id is given.
    #[error("Either leadId or referenceId is required")]
    AddressMissing,
    /// A reference without its process.
    #[error("processId is required when using referenceId")]
    ProcessMissing,
    /// No such lead in the project.
    #[error("Lead not found")]
    LeadNotFound,
    /// Both ids are given, of different leads.
    #[error("leadId and referenceId name different leads")]
    AddressMismatch,
    /// The seed's failure, word for word.
    #[error("Lead update is not allowed while a call is in progress for this lead")]
    CallInProgress,
    /// No more of the lead's updates can wait for the end of its call.
    #[error("{held} updates of this lead wait for the end of its call; there is no room for more")]
    HeldFull {
        /// How many there are.
        held: usize,
    },
    /// The command asks for nothing.
    #[error("Nothing to change: give metadata, name or targetState")]
    NothingToChange,
    /// The lead changed since the client looked at it.
    #[error("Lead is at version {version}, not at the expected version {expected}")]
    VersionMismatch {
        /// The version that the update was meant for.
        expected: u32,
        /// The lead's version.
        version: i64,
    },
    /// The lead moved since the client looked at it.
    #[error("Lead is in the state {state:?}, not in the expected state {expected:?}")]
    StateMismatch {
        /// The state that the update was meant for.
        expected: String,
        /// The lead's state.
        state: String,
    },
    /// A text is too long.
    #[error("{field} is longer than {MAX_TEXT_CHARS} characters")]
    TextTooLong {
        /// Which one.
        field: &'static str,
    },
    /// The process has no such state.
    #[error("targetState {target:?} is not a state of the lead's process")]
    UnknownState {
        /// The state asked for.
        target: String,
    },
    /// The process lists transitions, and not this one.
    #[error("Transition from {from:?} to {target:?} is not allowed")]
    TransitionNotAllowed {
        /// The lead's state.
        from: String,
        /// The state asked for.
        target: String,
    },
    /// The lead is in a terminal state.
    #[error("Lead is in the terminal state {from:?} and cannot be moved to {target:?}")]
    TerminalState {
        /// The lead's state.
        from: String,
        /// The state asked for.
        target: String,
    },
    /// The lead would grow too large.
    #[error("Merged metadata would be {bytes} bytes, more than the {limit} allowed")]
    MetadataTooLarge {
        /// What it would be.
        bytes: usize,
        /// What it may be.
        limit: usize,
    },
}

impl Refusal {
    /// The stable code, for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::AddressMissing => "address_missing",
            Self::ProcessMissing => "process_missing",
            Self::LeadNotFound => "lead_not_found",
            Self::AddressMismatch => "address_mismatch",
            Self::CallInProgress => "call_in_progress",
            Self::HeldFull { .. } => "held_full",
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

/// Decides an update of a lead that was found. All or nothing: a refusal leaves the lead as it was.
///
/// `now` is when the log stored the command, not when it is read: a replay decides the same.
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

    let taker = match &command.target_state {
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
    let disposition = match (&command.disposition, taker) {
        (Some(disposition), Some(state)) if state.takes_disposition() => Some(disposition),
        (Some(_), Some(state)) => {
            warnings.push(format!("disposition was ignored: the state {:?} takes none", state.name));
            None
        }
        (Some(_), None) => {
            warnings.push("disposition was ignored: it is stored with a targetState only".into());
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
    Ok(Change { lead, warnings })
}

/// Whether one of a lead's calls is in progress.
pub fn in_call(calls: &[Call], now: Timestamp) -> bool {
    calls.iter().any(|call| now < call.expires_at)
}

/// Whether an update of this many bytes can be held beside what is held of its lead already.
pub fn room_to_hold(lead: &Lead, held: impl Iterator<Item = usize>, bytes: usize) -> Result<(), Refusal> {
    let (mut count, mut all) = (0, bytes);
    for bytes in held {
        (count, all) = (count + 1, all + bytes);
    }
    if count == 0 || (count < MAX_HELD && weight_of_held(lead, count + 1, all) <= HELD_BYTES) {
        Ok(())
    } else {
        Err(Refusal::HeldFull { held: count })
    }
}

/// Most bytes that the outcomes of what is held come to: each has the lead's metadata, which grows by what is merged into it.
pub fn weight_of_held(lead: &Lead, count: usize, bytes: usize) -> usize {
    count * (lead.metadata.get().len() + bytes)
}

/// Whether the lead is still what the client made its update for.
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

    fn outcome(lead: &Lead, command: &UpdateCommand) -> Result<Change, Refusal> {
        decide(lead, &[], command, &rules(), NOW, LIMITS)
    }

    #[test]
    fn everything_at_once() {
        let command = UpdateCommand {
            metadata: Some(object(r#"{"b":2}"#)),
            name: Some("Grace".into()),
            disposition: Some("hot".into()),
            ..to("interested")
        };
        let change = outcome(&lead("new"), &command).unwrap();
        let expected = Lead {
            name: Some("Grace".into()),
            disposition: Some("hot".into()),
            metadata: object(r#"{"a":1,"b":2}"#),
            version: 5,
            ..lead("interested")
        };
        assert_eq!(change, Change { lead: expected, warnings: vec![] });
    }

    #[test]
    fn a_call_refuses_until_it_expires() {
        let call = Call { call_id: String::new(), started_at: NOW, expires_at: NOW };
        assert!(decide(&lead("new"), std::slice::from_ref(&call), &to("lost"), &rules(), NOW, LIMITS).is_ok());
        let call = Call { expires_at: Timestamp::from_millis(NOW.millis() + 1), ..call };
        let refusal = decide(&lead("new"), &[call], &to("lost"), &rules(), NOW, LIMITS).unwrap_err();
        assert_eq!(refusal.to_string(), "Lead update is not allowed while a call is in progress for this lead");
    }

    #[test]
    fn what_is_held_of_a_lead_is_bounded_in_number_and_in_what_it_comes_to() {
        let lead = lead("new");
        let held = |count: usize, bytes: usize| std::iter::repeat_n(bytes, count);
        assert_eq!(room_to_hold(&lead, held(MAX_HELD - 1, 10), 10), Ok(()));
        assert_eq!(room_to_hold(&lead, held(MAX_HELD, 10), 10), Err(Refusal::HeldFull { held: MAX_HELD }));
        assert_eq!(room_to_hold(&lead, held(0, 0), HELD_BYTES), Ok(()), "a single one always fits");
        assert_eq!(room_to_hold(&lead, held(1, 1 << 20), 1 << 20), Ok(()));
        // Each of the three would carry the metadata of all.
        assert_eq!(room_to_hold(&lead, held(2, 1 << 20), 1 << 20), Err(Refusal::HeldFull { held: 2 }));
    }

    #[test]
    fn transitions() {
        assert_eq!(outcome(&lead("new"), &to("gone")).unwrap_err().code(), "unknown_state");
        assert_eq!(outcome(&lead("followup_2"), &to("lost")).unwrap_err().code(), "transition_not_allowed");
        assert_eq!(outcome(&lead("interested"), &to("new")).unwrap_err().code(), "transition_not_allowed");
        assert_eq!(outcome(&lead("lost"), &to("new")).unwrap_err().code(), "terminal_state");
        assert_eq!(outcome(&lead("lost"), &to("lost")).unwrap().lead.state, "lost");
        assert_eq!(outcome(&lead("new"), &to("new")).unwrap().lead.state, "new");

        let leaving = Rules { allow_leaving_terminal: true, ..rules() };
        assert_eq!(decide(&lead("lost"), &[], &to("new"), &leaving, NOW, LIMITS).unwrap().lead.state, "new");
        let free = Rules { transitions: None, ..rules() };
        assert_eq!(decide(&lead("interested"), &[], &to("new"), &free, NOW, LIMITS).unwrap().lead.state, "new");
    }

    #[test]
    fn an_update_of_a_lead_that_changed_meanwhile_is_refused_with_what_it_is_now() {
        let expecting = |version, state: Option<&str>| UpdateCommand {
            expected_version: version,
            expected_state: state.map(Into::into),
            ..to("lost")
        };
        assert!(outcome(&lead("new"), &expecting(Some(4), Some("new"))).is_ok());
        let refused = |version, state| outcome(&lead("new"), &expecting(version, state)).unwrap_err();
        let [version, state, first] = [(Some(5), None), (None, Some("lost")), (Some(3), Some("lost"))]
            .map(|(version, state)| refused(version, state));
        assert_eq!(
            (version.code(), version.to_string().as_str()),
            ("version_mismatch", "Lead is at version 4, not at the expected version 5")
        );
        assert_eq!(
            (state.code(), state.to_string().as_str()),
            ("state_mismatch", "Lead is in the state \"new\", not in the expected state \"lost\"")
        );
        assert_eq!(first.code(), "version_mismatch");
    }

    #[test]
    fn every_code_is_documented() {
        let text = String::new;
        let refusals = [
            Refusal::AddressMissing,
            Refusal::ProcessMissing,
            Refusal::LeadNotFound,
            Refusal::AddressMismatch,
            Refusal::CallInProgress,
            Refusal::HeldFull { held: 1 },
            Refusal::NothingToChange,
            Refusal::VersionMismatch { expected: 1, version: 2 },
            Refusal::StateMismatch { expected: text(), state: text() },
            Refusal::TextTooLong { field: "name" },
            Refusal::UnknownState { target: text() },
            Refusal::TransitionNotAllowed { from: text(), target: text() },
            Refusal::TerminalState { from: text(), target: text() },
            Refusal::MetadataTooLarge { bytes: 2, limit: 1 },
        ];
        let table = include_str!("../../../../docs/ERRORS.md");
        for refusal in refusals {
            let row = format!("| failed update | | `{}` |", refusal.code());
            assert!(table.contains(&row), "docs/ERRORS.md lacks {row}");
        }
    }

    #[test]
    fn a_disposition_where_none_is_taken_is_ignored_with_a_warning() {
        for (command, warning) in [
            (to("followup_2"), "disposition was ignored: the state \"followup_2\" takes none"),
            (
                UpdateCommand { name: Some("x".into()), ..Default::default() },
                "disposition was ignored: it is stored with a targetState only",
            ),
        ] {
            let change = outcome(&lead("new"), &UpdateCommand { disposition: Some("hot".into()), ..command }).unwrap();
            assert_eq!(change.lead.disposition.as_deref(), Some("old"));
            assert_eq!(change.warnings, [warning]);
        }
    }

    #[test]
    fn nothing_and_too_much() {
        assert_eq!(outcome(&lead("new"), &UpdateCommand::default()), Err(Refusal::NothingToChange));
        let long = UpdateCommand { name: Some("é".repeat(1025)), ..Default::default() };
        assert_eq!(outcome(&lead("new"), &long), Err(Refusal::TextTooLong { field: "name" }));
        let large = UpdateCommand { metadata: Some(object(&format!(r#"{{"b":"{}"}}"#, "x".repeat(60)))), ..to("lost") };
        assert_eq!(outcome(&lead("new"), &large), Err(Refusal::MetadataTooLarge { bytes: 74, limit: 64 }));
    }

    proptest! {
        /// A refusal has no lead to write; a change never leaves the process's states and always moves the version.
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
            let changed = expected_version.is_some_and(|version| i64::from(version) != lead.version)
                || expected_state.is_some_and(|state| state != lead.state);
            match decide(&lead, &[call], &command, &rules(), NOW, LIMITS) {
                Ok(change) => {
                    prop_assert!(expires <= NOW.millis() && !changed);
                    prop_assert_eq!(change.lead.version, lead.version + 1);
                    prop_assert_eq!(&change.lead.state, target.unwrap_or(from));
                    prop_assert!(rules().state(&change.lead.state).is_some());
                    prop_assert_eq!(change.lead.name, name.or(lead.name));
                    prop_assert_eq!(change.lead.metadata, lead.metadata);
                }
                Err(refusal) => {
                    prop_assert_eq!(refusal == Refusal::CallInProgress, expires > NOW.millis());
                    // What comes from a wrong premise is told as that, unless there was nothing to do in any case.
                    let told = refusal.code().ends_with("_mismatch");
                    let told_otherwise = [Refusal::CallInProgress, Refusal::NothingToChange].contains(&refusal);
                    prop_assert_eq!(told, changed && !told_otherwise);
                }
            }
        }
    }
}
