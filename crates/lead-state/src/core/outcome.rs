//! 4 Decide: the completion events of decided updates and call events. Pure.

use contract::{
    ObjectId, Timestamp,
    command::MAX_TEXT_CHARS,
    event::{CompletionEvent, OutcomeKind},
    text::bounded_error,
    warning::Warning,
};

use super::{
    decide::{Change, Lead, Refusal},
    entry::{CallEntry, UpdateEntry},
};

/// The fields that events of all kinds have: the ids, and the reason of a refusal.
pub(super) fn event_of(
    kind: OutcomeKind,
    project_id: ObjectId,
    update_id: ObjectId,
    refusal: Option<&Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
    CompletionEvent {
        success: refusal.is_none(),
        error: refusal.map(|refusal| bounded_error(refusal.to_string())),
        error_code: refusal.map(|refusal| refusal.code().to_owned()),
        ..CompletionEvent::new(kind, project_id, update_id, applied_at)
    }
}

pub(super) fn completion_event(
    update: &UpdateEntry,
    lead: Option<&Lead>,
    outcome: &Result<Change, Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
    let UpdateEntry { project_id, update_id, ref command, .. } = *update;
    let change = outcome.as_ref().ok();
    CompletionEvent {
        process_id: lead.map(|lead| lead.process_id),
        lead_id: lead.map(|lead| lead.lead_id).or(command.lead_id),
        reference_id: match lead {
            Some(lead) => lead.reference_id.clone(),
            None => command.reference_id.as_deref().map(truncated),
        },
        from_state: lead.map(|lead| lead.state.clone()),
        to_state: change.map(|change| change.lead.state.clone()),
        version: change.map(|change| change.lead.version),
        disposition: change.and_then(|change| change.disposition.clone()),
        user_id: command.user_id.as_deref().map(truncated),
        warnings: change.map(|change| change.warnings.clone()).unwrap_or_default(),
        data: change.map(|change| change.lead.metadata.clone()),
        ..event_of(OutcomeKind::Update, project_id, update_id, outcome.as_ref().err(), applied_at)
    }
}

/// The event of a call's start or end. `lead` is the lead before, and `moved` the decision about the state that the end
/// requests. The call has ended in any case, so a refused transition is only a warning.
pub(super) fn call_event(
    call: &CallEntry,
    kind: OutcomeKind,
    lead: Result<Option<&Lead>, &Refusal>,
    moved: Option<&Result<Change, Refusal>>,
    applied_at: Timestamp,
) -> CompletionEvent {
    let address = call.address();
    let (lead, refusal) = (lead.ok().flatten(), lead.err());
    let change = moved.and_then(|moved| moved.as_ref().ok());
    let refused = moved.and_then(|moved| moved.as_ref().err());
    let activity = call.result().filter(|_| refusal.is_none());
    let state = lead.filter(|_| moved.is_some() || activity.is_some()).map(|lead| lead.state.clone());
    CompletionEvent {
        process_id: lead.map(|lead| lead.process_id),
        lead_id: lead.map(|lead| lead.lead_id).or(address.lead_id),
        reference_id: match lead {
            Some(lead) => lead.reference_id.clone(),
            None => address.reference_id.map(truncated),
        },
        to_state: change.map(|change| change.lead.state.clone()).or_else(|| state.clone()),
        from_state: state,
        version: change.map(|change| change.lead.version),
        disposition: change.and_then(|change| change.disposition.clone()),
        call_id: call.call_id().map(truncated),
        activity: activity.cloned(),
        warnings: match refused {
            Some(refusal) => vec![Warning::STATE_NOT_REACHED.with(&[&bounded_error(refusal.to_string())])],
            None => change.map(|change| change.warnings.clone()).unwrap_or_default(),
        },
        ..event_of(kind, call.project_id, call.update_id, refusal, applied_at)
    }
}

/// Bounds a text of a command, which may be longer if the command is refused.
fn truncated(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).collect()
}
