//! 4 Decide: the erasure of a lead (docs/adr/0053-erase-leads-through-the-command-log.md). Pure.

use contract::{
    JsonObject, ObjectId, Timestamp,
    command::{CallEnded, CallStarted, UpdateCommand},
    event::{CompletionEvent, OutcomeKind},
    position::LogPosition,
};
use serde::Serialize;

use super::{
    decide::{Lead, Refusal},
    entry::{CallChange, CallEntry, EraseEntry, UpdateEntry},
    outcome::event_of,
};

/// A lead that a batch erases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    pub lead_id: ObjectId,
    pub project_id: ObjectId,
    pub process_id: ObjectId,
    /// The external id that the lead had. Updates that named it before the lead existed are erased as well.
    pub reference_id: Option<String>,
    /// The log entry of the erasure.
    pub position: LogPosition,
}

impl Lead {
    /// The data that remains of the lead.
    pub(super) fn erased(&self) -> Self {
        Self {
            reference_id: None,
            name: None,
            state: self.state.clone(),
            disposition: None,
            metadata: JsonObject::empty(),
            is_erased: true,
            ..*self
        }
    }
}

impl UpdateEntry {
    /// The entry without the data that the client wants to store, for an update that an erased lead refuses.
    pub(super) fn without_content(self) -> Self {
        let UpdateCommand { update_id, lead_id, api_key_id, .. } = *self.command;
        let command = UpdateCommand { update_id, lead_id, api_key_id, ..UpdateCommand::default() };
        Self { text: text(&command), command: Box::new(command), ..self }
    }
}

impl CallEntry {
    /// Like [`UpdateEntry::without_content`].
    pub(super) fn without_content(self) -> Self {
        let (change, text) = match self.change {
            CallChange::Started(CallStarted { update_id, lead_id, api_key_id, .. }) => {
                let call = CallStarted { update_id, lead_id, api_key_id, ..CallStarted::default() };
                let text = text(&call);
                (CallChange::Started(call), text)
            }
            CallChange::Ended(CallEnded { update_id, lead_id, api_key_id, .. }) => {
                let call = CallEnded { update_id, lead_id, api_key_id, ..CallEnded::default() };
                let text = text(&call);
                (CallChange::Ended(call), text)
            }
            change @ CallChange::Expired(_) => (change, self.text),
        };
        Self { change, text, ..self }
    }
}

/// The text of a command without content.
pub(super) fn text(command: &impl Serialize) -> Box<str> {
    // Such a command always serializes.
    serde_json::to_string(command).unwrap_or_else(|_| "{}".into()).into()
}

pub(super) fn erasure_event(
    erase: &EraseEntry,
    lead: Option<&Lead>,
    refusal: Option<&Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
    CompletionEvent {
        process_id: lead.map(|lead| lead.process_id),
        lead_id: Some(erase.lead_id),
        ..event_of(OutcomeKind::Erase, erase.project_id, erase.update_id, refusal, applied_at)
    }
}
