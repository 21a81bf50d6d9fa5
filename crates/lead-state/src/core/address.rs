//! 4 Decide: how the entries of a batch name updates and leads. Pure.

use std::collections::BTreeSet;

use contract::{
    ObjectId,
    call_result::CallResult,
    command::{MAX_TEXT_CHARS, UpdateCommand},
    event::OutcomeKind,
};

use super::entry::{CallChange, CallEntry, CreatedEntry, Entry, EraseEntry, UpdateEntry};

/// A project and the id of one of its updates.
pub type UpdateKey = (ObjectId, ObjectId);

/// The keys that a batch's entries name. Their rows are read before the batch is decided.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LeadKeys {
    pub leads: BTreeSet<ObjectId>,
    /// Process and external id.
    pub references: BTreeSet<(ObjectId, String)>,
    pub updates: BTreeSet<UpdateKey>,
}

impl LeadKeys {
    pub fn of(entries: &[Entry]) -> Self {
        let mut keys = Self::default();
        for entry in entries {
            match entry {
                Entry::Update(update) => {
                    keys.updates.insert(update.key());
                }
                Entry::Call(call) if call.kind().is_some() => {
                    keys.updates.insert(call.key());
                }
                Entry::Erase(erase) => {
                    keys.updates.insert(erase.key());
                }
                Entry::Created(created) => {
                    keys.updates.insert(created.key());
                }
                Entry::Call(_) => {}
            }
            match entry.address() {
                Address { lead_id: Some(lead_id), .. } => {
                    keys.leads.insert(lead_id);
                }
                // No lead has a longer reference, so there is nothing to read.
                Address { process_id: Some(process_id), reference_id: Some(reference_id), .. }
                    if reference_id.chars().count() <= MAX_TEXT_CHARS =>
                {
                    keys.references.insert((process_id, reference_id.to_owned()));
                }
                _ => {}
            }
        }
        keys
    }
}

/// How an entry names its lead.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address<'a> {
    pub(super) lead_id: Option<ObjectId>,
    pub(super) process_id: Option<ObjectId>,
    pub(super) reference_id: Option<&'a str>,
}

impl Address<'_> {
    pub(super) fn of_lead(lead_id: ObjectId) -> Self {
        Self { lead_id: Some(lead_id), process_id: None, reference_id: None }
    }
}

impl Entry {
    pub(super) fn address(&self) -> Address<'_> {
        match self {
            Self::Update(update) => update.address(),
            Self::Call(call) => call.address(),
            Self::Erase(erase) => Address::of_lead(erase.lead_id),
            Self::Created(entry) => Address::of_lead(entry.created.lead_id),
        }
    }
}

impl UpdateEntry {
    pub fn key(&self) -> UpdateKey {
        (self.project_id, self.update_id)
    }

    pub(super) fn address(&self) -> Address<'_> {
        let UpdateCommand { lead_id, process_id, ref reference_id, .. } = *self.command;
        Address { lead_id, process_id, reference_id: reference_id.as_deref() }
    }
}

impl EraseEntry {
    pub fn key(&self) -> UpdateKey {
        (self.project_id, self.update_id)
    }
}

impl CreatedEntry {
    pub fn key(&self) -> UpdateKey {
        (self.project_id, self.created.update_id)
    }
}

impl CallEntry {
    pub fn key(&self) -> UpdateKey {
        (self.project_id, self.update_id)
    }

    /// The kind of the outcome; none for an expiry, which has no outcome of its own.
    pub fn kind(&self) -> Option<OutcomeKind> {
        match self.change {
            CallChange::Started(_) => Some(OutcomeKind::CallStarted),
            CallChange::Ended(_) => Some(OutcomeKind::CallEnded),
            CallChange::Expired(_) => None,
        }
    }

    pub(super) fn api_key_id(&self) -> Option<ObjectId> {
        match &self.change {
            CallChange::Started(call) => call.api_key_id,
            CallChange::Ended(call) => call.api_key_id,
            CallChange::Expired(_) => None,
        }
    }

    pub(super) fn result(&self) -> Option<&CallResult> {
        match &self.change {
            CallChange::Ended(call) => call.result.as_ref(),
            CallChange::Started(_) | CallChange::Expired(_) => None,
        }
    }

    pub(super) fn call_id(&self) -> Option<&str> {
        match &self.change {
            CallChange::Started(call) => call.call_id.as_deref(),
            CallChange::Ended(call) => call.call_id.as_deref(),
            CallChange::Expired(_) => None,
        }
    }

    pub(super) fn address(&self) -> Address<'_> {
        let (lead_id, process_id, reference_id) = match &self.change {
            CallChange::Started(call) => (call.lead_id, call.process_id, call.reference_id.as_deref()),
            CallChange::Ended(call) => (call.lead_id, call.process_id, call.reference_id.as_deref()),
            CallChange::Expired(call) => (Some(call.lead_id), None, None),
        };
        Address { lead_id, process_id, reference_id }
    }
}
