//! The subject grammar: every subject that Leadrelay publishes or reads, in one table, with its builder and parser.
//!
//! | subject | message | stream |
//! |---|---|---|
//! | `leads.cmd.{projectId}.update` | [`UpdateCommand`](crate::command::UpdateCommand) | `LEAD_COMMANDS` |
//! | `leads.cmd.{projectId}.call.started` | [`CallStarted`](crate::command::CallStarted) | `LEAD_COMMANDS` |
//! | `leads.cmd.{projectId}.call.ended` | [`CallEnded`](crate::command::CallEnded) | `LEAD_COMMANDS` |
//! | `leads.cmd.{projectId}.call.expired` | [`CallExpired`](crate::command::CallExpired), only from lead-state | `LEAD_COMMANDS` |
//! | `leads.cmd.{projectId}.lead.created` | [`LeadCreated`](crate::command::LeadCreated), only from lead-state | `LEAD_COMMANDS` |
//! | `leads.cmd.{projectId}.erase` | [`EraseLead`](crate::command::EraseLead), only from the gateway | `LEAD_COMMANDS` |
//! | `leads.cmd.pack` | [`CommandPack`](crate::pack::CommandPack): many commands, only from the gateway | `LEAD_COMMANDS` |
//! | `leads.work` | [`WorkReport`](crate::work::WorkReport): the work of a batch | none |
//! | `leads.intake.{projectId}.{update\|call.started\|call.ended}` | a producer's message for the gateway, see [`command`](crate::command) | none |
//! | `leads.applied` | [`LogPosition`](crate::position::LogPosition): the position up to which the log is applied and announced | none |
//! | `leads.evt.{projectId}.{processId}.{update\|call.started\|call.ended\|erase\|lead.created}.{succeeded\|failed}` | [`CompletionEvent`](crate::event::CompletionEvent) | `LEAD_EVENTS` |
//! | `webhooks.evt.{projectId}.{processId}.{exhausted\|callback.disabled}` | [`WebhookEvent`](crate::event::WebhookEvent) | `WEBHOOK_EVENTS` |
//! | `leads.dead.{reason}` | the message, unchanged | `LEAD_DEAD_LETTERS` |
//! | `leads.dead.replayed.{sequence}` | a note that this dead letter was sent again, see [`replay`](crate::replay) | `LEAD_DEAD_LETTERS` |
//! | `leads.rpc.…`, `webhooks.rpc.…` | queries, see [`rpc`](crate::rpc) | none |
//! | `_INBOX_{program}.…` | replies to this program | none |
//!
//! Ids are 24 lower-case hex digits; `_` stands for an unknown process. The project is in the subject, not only in the
//! body, so that NATS permissions can restrict a producer to it. In a producer's own NATS account,
//! `leads.intake.{projectId}.…` of the services' account is `leads.cmd.{projectId}.…`.

use std::fmt;

use crate::{ObjectId, event::OutcomeKind, named::named};

/// All commands and call events of all projects.
pub const ALL_COMMANDS: &str = "leads.cmd.>";
/// Messages with many commands each. No project: only the gateway may publish them.
pub const PACKS: &str = "leads.cmd.pack";
/// Reports of the work of lead-state's batches.
pub const WORK: &str = "leads.work";
/// Reports of the position up to which the log is applied and announced.
pub const APPLIED: &str = "leads.applied";
/// The beginning of the subjects of the command log.
const COMMANDS: &str = "leads.cmd.";
/// The beginning of the subjects of producers' messages.
const INTAKE: &str = "leads.intake.";
/// All completion events.
pub const ALL_EVENTS: &str = "leads.evt.>";
/// All events about deliveries.
pub const ALL_WEBHOOK_EVENTS: &str = "webhooks.evt.>";
/// All dead letters.
pub const ALL_DEAD_LETTERS: &str = "leads.dead.>";
/// The process in a subject or bucket key if it is unknown.
pub const NO_PROCESS: &str = "_";
/// The beginning of the subjects of notes about dead letters.
const REPLAYED: &str = "leads.dead.replayed.";

/// A subject of the command log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandSubject {
    /// The producer's project.
    pub project_id: ObjectId,
    /// The kind of message.
    pub kind: CommandKind,
}

named! {
    /// The kind of a message in the command log.
    CommandKind, InvalidCommandKind,
    /// Change a lead.
    Update = "update",
    /// A call with a lead began.
    CallStarted = "call.started",
    /// A call with a lead ended.
    CallEnded = "call.ended",
    /// The last call with a lead may have expired.
    CallExpired = "call.expired",
    /// Erase a lead.
    Erase = "erase",
    /// A lead was created.
    LeadCreated = "lead.created",
}

impl From<OutcomeKind> for CommandKind {
    fn from(kind: OutcomeKind) -> Self {
        match kind {
            OutcomeKind::Update => Self::Update,
            OutcomeKind::CallStarted => Self::CallStarted,
            OutcomeKind::CallEnded => Self::CallEnded,
            OutcomeKind::Erase => Self::Erase,
            OutcomeKind::LeadCreated => Self::LeadCreated,
        }
    }
}

/// The subject is not one of the command log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the subject must be one of leads.cmd.{{projectId}}.update, leads.cmd.{{projectId}}.call.started, \
     leads.cmd.{{projectId}}.call.ended, leads.cmd.{{projectId}}.call.expired, leads.cmd.{{projectId}}.erase, \
     leads.cmd.{{projectId}}.lead.created with a projectId of 24 hex digits"
)]
pub struct InvalidCommandSubject;

impl CommandSubject {
    /// Reads a subject of the command log.
    pub fn parse(subject: &str) -> Result<Self, InvalidCommandSubject> {
        Self::parse_after(COMMANDS, subject)
    }

    /// Reads the subject of a producer's message. Only lead-state reports that a call has expired or a lead was
    /// created, and erasing a lead needs an API key with the scope for it.
    pub fn parse_intake(subject: &str) -> Result<Self, InvalidCommandSubject> {
        let parsed = Self::parse_after(INTAKE, subject)?;
        match parsed.kind {
            CommandKind::CallExpired | CommandKind::Erase | CommandKind::LeadCreated => Err(InvalidCommandSubject),
            CommandKind::Update | CommandKind::CallStarted | CommandKind::CallEnded => Ok(parsed),
        }
    }

    /// The subject on which the gateway takes such a message from a producer.
    pub fn intake(self) -> String {
        self.to_string().replacen(COMMANDS, INTAKE, 1)
    }

    fn parse_after(prefix: &str, subject: &str) -> Result<Self, InvalidCommandSubject> {
        let rest = subject.strip_prefix(prefix).ok_or(InvalidCommandSubject)?;
        let (project, kind) = rest.split_once('.').ok_or(InvalidCommandSubject)?;
        let kind = kind.parse().map_err(|_| InvalidCommandSubject)?;
        Ok(Self { project_id: project.parse().map_err(|_| InvalidCommandSubject)?, kind })
    }
}

impl fmt::Display for CommandSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{COMMANDS}{}.{}", self.project_id, self.kind)
    }
}

/// All messages of a project's producers for the gateway.
pub fn intake_of(project_id: ObjectId) -> String {
    format!("{INTAKE}{project_id}.>")
}

/// `{projectId}.{processId|_}`: part of event subjects, and the key of a process in the bucket `processes`.
pub fn process_key(project_id: ObjectId, process_id: Option<ObjectId>) -> String {
    match process_id {
        Some(process_id) => format!("{project_id}.{process_id}"),
        None => format!("{project_id}.{NO_PROCESS}"),
    }
}

/// The prefix of a program's reply inboxes. Each program has its own, so NATS permissions can separate them.
pub fn inbox_prefix(program: &str) -> String {
    format!("_INBOX_{program}")
}

/// The subject of a completion event.
pub fn event(project_id: ObjectId, process_id: Option<ObjectId>, kind: OutcomeKind, success: bool) -> String {
    let outcome = if success { "succeeded" } else { "failed" };
    format!("leads.evt.{}.{kind}.{outcome}", process_key(project_id, process_id))
}

/// The project of a completion event's subject.
pub fn event_project(subject: &str) -> Option<ObjectId> {
    subject.strip_prefix("leads.evt.")?.split('.').next()?.parse().ok()
}

/// All completion events of a project.
pub fn events_of(project_id: ObjectId) -> String {
    format!("leads.evt.{project_id}.>")
}

/// The subject of the event that a delivery is exhausted.
pub fn delivery_exhausted(project_id: ObjectId, process_id: Option<ObjectId>) -> String {
    format!("webhooks.evt.{}.exhausted", process_key(project_id, process_id))
}

/// The subject of the event that a callback was disabled.
pub fn callback_disabled(project_id: ObjectId, process_id: Option<ObjectId>) -> String {
    format!("webhooks.evt.{}.callback.disabled", process_key(project_id, process_id))
}

/// The subject of notes about the replay of this dead letter. It has more tokens than a dead letter's.
pub fn replayed(letter: u64) -> String {
    format!("{REPLAYED}{letter}")
}

/// The dead letter of a note; none if the subject is not a note's.
pub fn replayed_letter(subject: &str) -> Option<u64> {
    subject.strip_prefix(REPLAYED)?.parse().ok()
}

named! {
    /// Why a message of the command log is a dead letter: the last token of its subject.
    DeadLetterReason, InvalidReason,
    /// Its subject is not in the grammar.
    InvalidSubject = "invalid_subject",
    /// Its body is not acceptable JSON (see [`json::check`](crate::json::check)).
    InvalidJson = "invalid_json",
    /// Its body is JSON, but not the message of its subject.
    InvalidCommand = "invalid_command",
    /// The expiry of a call with a lead that does not exist.
    UnknownLead = "unknown_lead",
    /// The database rejects it.
    Unapplicable = "unapplicable",
}

impl DeadLetterReason {
    /// The subject of dead letters with this reason.
    pub fn subject(self) -> String {
        format!("leads.dead.{}", self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn subjects_are_built_and_parsed() {
        let project_id = ObjectId::from_bytes([0xab; 12]);
        let process_id = ObjectId::from_bytes([0xcd; 12]);
        let subjects = [
            CommandSubject { project_id, kind: CommandKind::Update }.to_string(),
            CommandSubject { project_id, kind: CommandKind::CallStarted }.to_string(),
            CommandSubject { project_id, kind: CommandKind::CallEnded }.to_string(),
            event(project_id, Some(process_id), OutcomeKind::Update, true),
            event(project_id, None, OutcomeKind::CallEnded, false),
            intake_of(project_id),
            events_of(project_id),
            delivery_exhausted(project_id, Some(process_id)),
            callback_disabled(project_id, Some(process_id)),
            DeadLetterReason::InvalidJson.subject(),
            replayed(17),
        ];
        insta::assert_snapshot!(subjects.join("\n"), @r"
        leads.cmd.abababababababababababab.update
        leads.cmd.abababababababababababab.call.started
        leads.cmd.abababababababababababab.call.ended
        leads.evt.abababababababababababab.cdcdcdcdcdcdcdcdcdcdcdcd.update.succeeded
        leads.evt.abababababababababababab._.call.ended.failed
        leads.intake.abababababababababababab.>
        leads.evt.abababababababababababab.>
        webhooks.evt.abababababababababababab.cdcdcdcdcdcdcdcdcdcdcdcd.exhausted
        webhooks.evt.abababababababababababab.cdcdcdcdcdcdcdcdcdcdcdcd.callback.disabled
        leads.dead.invalid_json
        leads.dead.replayed.17
        ");
    }

    #[test]
    fn the_project_of_an_event_is_parsed() {
        let project_id = ObjectId::from_bytes([0xab; 12]);
        assert_eq!(event_project(&event(project_id, None, OutcomeKind::Update, true)), Some(project_id));
        for subject in
            ["leads.evt", "leads.evt.", "leads.evt._._.update.failed", "leads.cmd.abababababababababababab.update"]
        {
            assert_eq!(event_project(subject), None, "{subject}");
        }
    }

    #[test]
    fn other_subjects_are_rejected() {
        for subject in [
            "leads.cmd",
            "leads.cmd.",
            PACKS,
            "leads.cmd.abababababababababababab",
            "leads.cmd.abababababababababababab.update.",
            "leads.cmd.abababababababababababab.delete",
            "leads.cmd.abababababababababababab.call",
            "leads.cmd.ababababababababababab.update",
            "leads.cmd._.update",
            "leads.evt.abababababababababababab.update",
        ] {
            assert_eq!(CommandSubject::parse(subject), Err(InvalidCommandSubject), "{subject}");
        }
        for kind in ["call.expired", "erase", "lead.created", "delete"] {
            let subject = format!("leads.intake.abababababababababababab.{kind}");
            assert_eq!(CommandSubject::parse_intake(&subject), Err(InvalidCommandSubject), "{subject}");
        }
    }

    #[test]
    fn notes_are_not_letters() {
        for reason in DeadLetterReason::ALL {
            assert_eq!(replayed_letter(&reason.subject()), None);
        }
        assert_eq!(replayed_letter(&replayed(17)), Some(17));
    }

    proptest! {
        #[test]
        fn command_subjects_round_trip(bytes: [u8; 12], kind in 0..3) {
            let kind = [CommandKind::Update, CommandKind::CallStarted, CommandKind::CallEnded][kind as usize];
            let subject = CommandSubject { project_id: ObjectId::from_bytes(bytes), kind };
            prop_assert_eq!(CommandSubject::parse(&subject.to_string()), Ok(subject));
            prop_assert_eq!(CommandSubject::parse_intake(&subject.intake()), Ok(subject));
        }

        #[test]
        fn arbitrary_subjects_never_panic(subject in ".*") {
            let _ = CommandSubject::parse(&subject);
        }
    }
}
