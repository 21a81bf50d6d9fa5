//! Whether a dead letter may be sent again, and as what.

use bytes::Bytes;
use contract::{
    ObjectId, Timestamp,
    replay::Replay,
    subject::{CommandKind, CommandSubject},
};
use lead_state::core::entry::{LogMessage, parse};

use super::letters::Letter;

/// What an operator mended.
#[derive(Debug, Default)]
pub(crate) struct Mended {
    pub(crate) body: Option<Bytes>,
    pub(crate) project: Option<ObjectId>,
}

/// Why a letter is not sent again.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It is in the log already.
    #[error("it was sent again before, as entry {0} of the log; --again sends it once more")]
    Sent(u64),
    /// Nobody knows whether it is in the log.
    #[error("it was to be sent again at {0}, and nobody noted whether it was; --again sends it (once more)")]
    InDoubt(String),
    /// It lacks its end.
    #[error("its body was cut, {0} bytes did not fit; --body brings a whole one")]
    Cut(u64),
    /// It was never a command.
    #[error("it is an event; `leadctl recover reannounce` announces events again")]
    Event,
    /// Nobody could take it there.
    #[error("its subject names no project and kind of command; --project says which project it is for")]
    Subject,
    /// As it is, nothing is gained.
    #[error("it would be a dead letter again: {0}; --body brings a mended one")]
    DeadAgain(String),
}

/// What was noted about earlier replays that speaks against another one.
pub(crate) fn earlier(letter: &Letter) -> Option<Refusal> {
    let note = letter.replay?;
    match note.replay {
        Replay::Sent { sequence } => Some(Refusal::Sent(sequence)),
        Replay::Begun => Some(Refusal::InDoubt(note.at.to_iso())),
        Replay::NotSent => None,
    }
}

/// The subject and body to send: those of the letter where nothing is mended.
pub(crate) fn command(letter: &Letter, payload: Bytes, mended: Mended) -> Result<(String, Bytes), Refusal> {
    let subject = subject(&letter.subject, mended.project)?.to_string();
    let payload = match (mended.body, letter.truncated_from) {
        (Some(body), _) => body,
        (None, Some(bytes)) => return Err(Refusal::Cut(bytes)),
        (None, None) => payload,
    };
    // Read as lead-state will read it; its place and time do not matter for that.
    let message = LogMessage { sequence: 0, logged_at: Timestamp::from_millis(0), subject, headers: None, payload };
    match parse(&message, 0) {
        Ok(_) => Ok((message.subject, message.payload)),
        Err(dead) => Err(Refusal::DeadAgain(dead.error)),
    }
}

/// Where to send it: where it came from, or the same in another project. What names no kind of command is an update.
fn subject(origin: &str, project: Option<ObjectId>) -> Result<CommandSubject, Refusal> {
    if origin.starts_with("leads.evt.") {
        return Err(Refusal::Event);
    }
    let Some(project_id) = project else {
        return CommandSubject::parse(origin).map_err(|_| Refusal::Subject);
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
            buried_at: Timestamp::from_millis(0),
            truncated_from: None,
            replay_of: None,
            replay: None,
        }
    }

    fn to(project: &str) -> Mended {
        Mended { body: None, project: project.parse().ok() }
    }

    #[test]
    fn it_goes_where_it_came_from_or_to_the_project_that_is_named() {
        let sent =
            |origin: &str, mended| command(&letter(origin), "{\"leadId\":\"abababababababababababab\"}".into(), mended);
        let subject = |origin: &str, mended| sent(origin, mended).map(|(subject, _)| subject);
        let own = format!("leads.cmd.{PROJECT}.call.ended");
        assert_eq!(subject(&own, Mended::default()), Ok(own.clone()));
        assert_eq!(subject(&own, to(OTHER)), Ok(format!("leads.cmd.{OTHER}.call.ended")));
        for odd in ["leads.cmd.~odd~.update", "leads.cmd.~odd~.explode", "leads.cmd.update", ""] {
            assert_eq!(subject(odd, Mended::default()), Err(Refusal::Subject), "{odd}");
            assert_eq!(subject(odd, to(OTHER)), Ok(format!("leads.cmd.{OTHER}.update")), "{odd}");
        }
        let event = format!("leads.evt.{PROJECT}._.update.failed");
        assert_eq!(subject(&event, Mended::default()), Err(Refusal::Event));
        assert_eq!(subject(&event, to(OTHER)), Err(Refusal::Event));
    }

    #[test]
    fn what_was_cut_or_cannot_be_read_needs_another_body() {
        let own = format!("leads.cmd.{PROJECT}.update");
        let mended = || Mended { body: Some("{\"name\":\"n\"}".into()), project: None };
        let cut = Letter { truncated_from: Some(99), ..letter(&own) };
        assert_eq!(command(&cut, "{}".into(), Mended::default()), Err(Refusal::Cut(99)));
        assert_eq!(command(&cut, "{}".into(), mended()), Ok((own.clone(), "{\"name\":\"n\"}".into())));
        let refused = command(&letter(&own), "{".into(), Mended::default());
        assert!(matches!(refused, Err(Refusal::DeadAgain(_))), "{refused:?}");
        let refused = command(&letter(&own), "{}".into(), Mended { body: Some("[]".into()), project: None });
        assert!(matches!(refused, Err(Refusal::DeadAgain(_))), "{refused:?}");
    }

    #[test]
    fn what_was_sent_or_may_have_been_is_not_sent_by_mistake() {
        let noted = |replay| {
            let note = Note { sequence: 1, at: Timestamp::from_millis(0), replay };
            earlier(&Letter { replay: Some(note), ..letter("x") })
        };
        assert_eq!(noted(Replay::Sent { sequence: 4711 }), Some(Refusal::Sent(4711)));
        assert!(matches!(noted(Replay::Begun), Some(Refusal::InDoubt(_))));
        assert_eq!(noted(Replay::NotSent), None);
        assert_eq!(earlier(&letter("x")), None);
    }
}
