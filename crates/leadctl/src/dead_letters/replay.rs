//! Decides whether a dead letter may be replayed, and with which subject and body.

use bytes::Bytes;
use contract::{
    ObjectId, Timestamp,
    replay::Replay,
    subject::{CommandKind, CommandSubject},
};
use lead_state::core::entry::{LogMessage, parse};

use super::letters::Letter;

/// Corrections by the operator.
#[derive(Debug, Default)]
pub(crate) struct Correction {
    pub(crate) body: Option<Bytes>,
    pub(crate) project: Option<ObjectId>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Objection {
    #[error("it was already replayed, as entry {0} of the log; use --again to replay it once more")]
    Sent(u64),
    #[error("a replay was started at {0}, and its result is unknown; use --again to replay it, maybe a second time")]
    InDoubt(String),
    #[error("its body of {0} bytes was truncated; use --body with a complete one")]
    Cut(u64),
    #[error("it is an event, not a command; use leadctl recover reannounce")]
    Event,
    #[error("its subject is not a command subject; use --project to name its project")]
    Subject,
    #[error("it would become a dead letter again: {0}; use --body with a corrected one")]
    DeadAgain(String),
}

/// The objection to another replay, from the notes about earlier ones.
pub(crate) fn objection(letter: &Letter) -> Option<Objection> {
    let note = letter.replay?;
    match note.replay {
        Replay::Sent { sequence } => Some(Objection::Sent(sequence)),
        Replay::Begun => Some(Objection::InDoubt(note.at.to_iso())),
        Replay::NotSent => None,
    }
}

/// The subject and body to send: those of the letter, with the operator's corrections.
pub(crate) fn command(letter: &Letter, payload: Bytes, correction: Correction) -> Result<(String, Bytes), Objection> {
    let subject = subject(&letter.subject, correction.project)?.to_string();
    let payload = match (correction.body, letter.truncated_from) {
        (Some(body), _) => body,
        (None, Some(bytes)) => return Err(Objection::Cut(bytes)),
        (None, None) => payload,
    };
    // Parsed as lead-state will parse it; position and time do not matter for that.
    let message = LogMessage::alone(0, Timestamp::from_millis(0), subject, None, payload);
    match parse(&message, 0) {
        Ok(_) => Ok((message.subject, message.payload)),
        Err(dead) => Err(Objection::DeadAgain(dead.error)),
    }
}

/// The letter's subject, or the same kind of command in another project. A letter without a kind becomes an update.
fn subject(origin: &str, project: Option<ObjectId>) -> Result<CommandSubject, Objection> {
    if origin.starts_with("leads.evt.") {
        return Err(Objection::Event);
    }
    let Some(project_id) = project else {
        return CommandSubject::parse(origin).map_err(|_| Objection::Subject);
    };
    let kind = origin.splitn(4, '.').nth(3).unwrap_or_default();
    let subject = CommandSubject::parse(&format!("leads.cmd.{project_id}.{kind}"));
    Ok(subject.unwrap_or(CommandSubject { project_id, kind: CommandKind::Update }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dead_letters::letters::Note;

    const PROJECT: &str = "abababababababababababab";
    const OTHER: &str = "cdcdcdcdcdcdcdcdcdcdcdcd";

    fn letter(subject: &str) -> Letter {
        Letter {
            number: 17,
            reason: "invalid_json".into(),
            error: "e".into(),
            subject: subject.into(),
            dead_since: Timestamp::from_millis(0),
            truncated_from: None,
            replay_of: None,
            replay: None,
        }
    }

    fn to(project: &str) -> Correction {
        Correction { body: None, project: project.parse().ok() }
    }

    #[test]
    fn a_letter_is_replayed_on_its_subject_or_in_the_given_project() {
        let sent = |origin: &str, corrected| {
            command(&letter(origin), "{\"leadId\":\"abababababababababababab\"}".into(), corrected)
        };
        let subject = |origin: &str, corrected| sent(origin, corrected).map(|(subject, _)| subject);
        let own = format!("leads.cmd.{PROJECT}.call.ended");
        assert_eq!(subject(&own, Correction::default()), Ok(own.clone()));
        assert_eq!(subject(&own, to(OTHER)), Ok(format!("leads.cmd.{OTHER}.call.ended")));
        for odd in ["leads.cmd.~odd~.update", "leads.cmd.~odd~.explode", "leads.cmd.update", ""] {
            assert_eq!(subject(odd, Correction::default()), Err(Objection::Subject), "{odd}");
            assert_eq!(subject(odd, to(OTHER)), Ok(format!("leads.cmd.{OTHER}.update")), "{odd}");
        }
        let event = format!("leads.evt.{PROJECT}._.update.failed");
        assert_eq!(subject(&event, Correction::default()), Err(Objection::Event));
        assert_eq!(subject(&event, to(OTHER)), Err(Objection::Event));
    }

    #[test]
    fn a_truncated_or_invalid_letter_needs_a_corrected_body() {
        let own = format!("leads.cmd.{PROJECT}.update");
        let corrected = || Correction { body: Some("{\"name\":\"n\"}".into()), project: None };
        let cut = Letter { truncated_from: Some(99), ..letter(&own) };
        assert_eq!(command(&cut, "{}".into(), Correction::default()), Err(Objection::Cut(99)));
        assert_eq!(command(&cut, "{}".into(), corrected()), Ok((own.clone(), "{\"name\":\"n\"}".into())));
        let refused = command(&letter(&own), "{".into(), Correction::default());
        assert!(matches!(refused, Err(Objection::DeadAgain(_))), "{refused:?}");
        let refused = command(&letter(&own), "{}".into(), Correction { body: Some("[]".into()), project: None });
        assert!(matches!(refused, Err(Objection::DeadAgain(_))), "{refused:?}");
    }

    #[test]
    fn a_letter_that_was_or_may_have_been_replayed_is_not_replayed_again() {
        let noted = |replay| {
            let note = Note { sequence: 1, at: Timestamp::from_millis(0), replay };
            objection(&Letter { replay: Some(note), ..letter("x") })
        };
        assert_eq!(noted(Replay::Sent { sequence: 4711 }), Some(Objection::Sent(4711)));
        assert!(matches!(noted(Replay::Begun), Some(Objection::InDoubt(_))));
        assert_eq!(noted(Replay::NotSent), None);
        assert_eq!(objection(&letter("x")), None);
    }
}
