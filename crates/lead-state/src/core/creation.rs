//! 4 Decide: the creation of a lead (docs/adr/0056-log-created-leads-from-an-outbox.md). Pure.

use contract::{
    JsonObject, Timestamp,
    command::{LeadContact, LeadCreated},
    event::{CompletionEvent, OutcomeKind},
};

use super::{
    decide::{Lead, Refusal},
    entry::CreatedEntry,
    erasure,
    outcome::event_of,
};

impl CreatedEntry {
    /// The creation without its content, for a lead that is erased.
    pub(super) fn without_content(self) -> Self {
        let (contact, metadata) = (LeadContact::default(), JsonObject::empty());
        let created = LeadCreated { contact, metadata, ..self.created };
        Self { text: erasure::text(&created), created, ..self }
    }
}

/// The event of a creation. It has the data with which the lead was created, because the lead may have changed since.
pub(super) fn created_event(
    entry: &CreatedEntry,
    lead: Result<Option<&Lead>, &Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
    let LeadCreated { update_id, lead_id, state, contact, metadata } = &entry.created;
    let (lead, refusal) = (lead.ok().flatten(), lead.err());
    let success = refusal.is_none();
    CompletionEvent {
        process_id: lead.map(|lead| lead.process_id),
        lead_id: Some(*lead_id),
        reference_id: lead.and_then(|lead| lead.reference_id.clone()),
        to_state: success.then(|| state.clone()),
        version: success.then_some(1),
        contact: success.then(|| contact.clone()),
        data: success.then(|| metadata.clone()),
        ..event_of(OutcomeKind::LeadCreated, entry.project_id, *update_id, refusal, applied_at)
    }
}
