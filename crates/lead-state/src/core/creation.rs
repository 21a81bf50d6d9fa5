//! 4 Decide: the creation of a lead (docs/adr/0056-log-created-leads-from-an-outbox.md). Pure.

use contract::{
    JsonObject, Timestamp,
    command::{LeadContact, LeadCreated},
    event::{CompletionEvent, OutcomeKind},
    text::bounded_error,
};

use super::{
    decide::{Lead, Refusal},
    entry::CreatedEntry,
    erasure,
};

impl CreatedEntry {
    /// The creation of a lead that is erased: without what the lead was.
    pub(super) fn without_content(self) -> Self {
        let (contact, metadata) = (LeadContact::default(), JsonObject::empty());
        let created = LeadCreated { contact, metadata, ..self.created };
        Self { text: erasure::text(&created), created, ..self }
    }
}

/// The event of a creation. It has what the lead was created with: the lead may have changed since.
pub(super) fn created_event(
    entry: &CreatedEntry,
    lead: Result<Option<&Lead>, &Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
    let LeadCreated { update_id, lead_id, state, contact, metadata } = &entry.created;
    let (lead, refusal) = (lead.ok().flatten(), lead.err());
    let success = refusal.is_none();
    CompletionEvent {
        kind: OutcomeKind::LeadCreated,
        update_id: *update_id,
        project_id: entry.project_id,
        process_id: lead.map(|lead| lead.process_id),
        lead_id: Some(*lead_id),
        reference_id: lead.and_then(|lead| lead.reference_id.clone()),
        success,
        error: refusal.map(|refusal| bounded_error(refusal.to_string())),
        error_code: refusal.map(|refusal| refusal.code().to_owned()),
        from_state: None,
        to_state: success.then(|| state.clone()),
        version: success.then_some(1),
        disposition: None,
        call_id: None,
        activity: None,
        contact: success.then(|| contact.clone()),
        user_id: None,
        warnings: Vec::new(),
        timestamp: applied_at,
        data: success.then(|| metadata.clone()),
    }
}
