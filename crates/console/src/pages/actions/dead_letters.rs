//! Replays a dead letter, perhaps with a corrected body, as a request to the gateway. Notes before and after the
//! request prevent a second replay.

use contract::{
    ObjectId,
    key::Scope,
    replay::Replay,
    rpc::GetUpdate,
    subject::{CommandKind, CommandSubject},
};
use http_api::UpdateAccepted;
use maud::html;
use service_kit::replay_note::write_replay_note;

use super::{Confirmation, OUTCOME_WAIT};
use crate::{
    dead_letters::{self, Letter},
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::layout::Section,
    visit::{Action, Visit},
};

/// The endpoint to which a dead letter's command is sent.
pub(in crate::pages) struct Endpoint {
    project_id: ObjectId,
    scope: Scope,
    path: &'static str,
}

/// The endpoint for a letter's command. None if clients do not send such commands, or its subject names no project.
pub(in crate::pages) fn endpoint(letter: &Letter) -> Option<Endpoint> {
    let CommandSubject { project_id, kind } = CommandSubject::parse(&letter.subject).ok()?;
    let (scope, path) = match kind {
        CommandKind::Update => (Scope::LeadsWrite, "/api/v1/leads/update"),
        CommandKind::CallStarted => (Scope::CallsWrite, "/api/v1/calls/started"),
        CommandKind::CallEnded => (Scope::CallsWrite, "/api/v1/calls/ended"),
        _ => return None,
    };
    Some(Endpoint { project_id, scope, path })
}

/// The letter of the path, its body and its endpoint, if it was not replayed.
async fn replayable(visit: &Visit) -> Result<(Letter, String, Endpoint), Fault> {
    visit.all_projects()?;
    let (letter, message) = dead_letters::get(&visit.app.broker()?.js, visit.id("number")?).await?;
    match letter.replay {
        Some((_, Replay::Sent { sequence })) => {
            return Err(Fault::Invalid(format!("The letter was replayed as entry {sequence} of the log.")));
        }
        Some((_, Replay::Begun)) => {
            return Err(Fault::Invalid("The letter may have been replayed: look at its project's updates.".into()));
        }
        None | Some((_, Replay::NotSent)) => {}
    }
    let endpoint = endpoint(&letter)
        .ok_or_else(|| Fault::Invalid("No endpoint takes this command. `leadctl dead-letters replay` does.".into()))?;
    // A form would replace the bytes that are not UTF-8.
    let body = String::from_utf8(message.payload.to_vec()).map_err(|_| {
        let command = format!("leadctl dead-letters replay {}", letter.number);
        Fault::Invalid(format!("The body is not UTF-8, and a form would change it. `{command}` sends it as it is."))
    })?;
    Ok((letter, body, endpoint))
}

/// `GET /system/dead-letters/{number}/replay`.
pub(crate) async fn confirm(visit: Visit) -> Result<Page, Fault> {
    let (letter, body, Endpoint { project_id, scope, path }) = replayable(&visit).await?;
    let page = Confirmation {
        path: format!("/system/dead-letters/{}/replay", letter.number),
        consequence: html! {
            p {
                "The body is sent to the gateway as " code { "POST " (path) } " in the project " span.id { (project_id) }
                ", with the API key of this session. The command failed with: " (letter.error)
            }
            @if let Some(bytes) = letter.truncated_from { p { "It was " (bytes) " bytes long; the rest was not kept." } }
        },
        fields: html! {
            label for="body" { "Body" }
            textarea #body name="body" rows="12" required spellcheck="false" autocomplete="off" { (body) }
        },
        button: "Replay".into(),
    };
    Ok(page.page(&visit, &format!("Replay dead letter {}", letter.number), Section::None, project_id, scope))
}

/// `POST /system/dead-letters/{number}/replay`.
pub(crate) async fn replay(visit: Visit) -> Result<Page, Fault> {
    let (letter, _, Endpoint { project_id, scope, path }) = replayable(&visit).await?;
    visit.session.credential(project_id, scope)?;
    let (js, number) = (&visit.app.broker()?.js, letter.number);
    let body: String = visit.field("body")?;
    let not_noted = |text: &'static str| {
        move |e| {
            tracing::warn!(number, "a note about a replay was not written: {e}");
            Fault::Unavailable(text.into())
        }
    };
    let last = letter.replay.map_or(0, |(note, _)| note);
    let begun = write_replay_note(js, number, last, Replay::Begun).await;
    let begun = begun.map_err(not_noted("The letter was not replayed: perhaps another replay is running."))?;
    let request = GatewayRequest::new(reqwest::Method::POST, path)
        .json(body)
        .header("idempotency-key", format!("replay-{number}-{begun}"))
        .header("prefer", OUTCOME_WAIT);
    let action = Action {
        name: "replay dead letter",
        project_id,
        scope,
        object: format!("dead letter {number}"),
        before: letter.error.clone(),
    };
    let sent = visit.act(&action, request, |reply: &UpdateAccepted| format!("update {}", reply.update_id)).await;
    let accepted = match sent {
        Ok(accepted) => accepted,
        // The gateway may have logged the command. The first note says so, and stays.
        Err(fault @ Fault::Unavailable(_)) => return Err(fault),
        Err(fault) => {
            let noted = write_replay_note(js, number, begun, Replay::NotSent).await;
            noted.map_err(not_noted("The letter was not replayed, but its note says that it may have been."))?;
            return Err(fault);
        }
    };
    let update_id = accepted.update_id;
    // The log entry is unknown until the update is decided, and if lead-state does not answer. The first note then
    // stays: the command may have been sent.
    let update = visit.request(&GetUpdate { project_id, update_id }).await;
    if let Some(sequence) = update.ok().and_then(|update| update.log_sequence) {
        let noted = write_replay_note(js, number, begun, Replay::Sent { sequence }).await;
        noted.map_err(not_noted("The letter was replayed, but its note says only that it may have been."))?;
    }
    Ok(Page::Redirect(format!("/p/{project_id}/updates/{update_id}")))
}
