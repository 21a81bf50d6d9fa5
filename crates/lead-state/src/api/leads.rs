//! Leads: read, listed and initiated; calls with them.

use std::time::Duration;

use contract::{
    JsonObject, ObjectId,
    command::{LeadContact, LeadCreated, MAX_TEXT_CHARS},
    event_kind::EventKind,
    process::Process,
    rpc::{
        Call, ErrorCode, GetLead, GetLeadHistory, HistoryEntry, InitiateLead, Lead, ListCalls, ListLeads,
        MAX_SEARCH_CHARS, Page, RpcError, clamp,
    },
};
use service_kit::{clock, rpc::internal};

use super::{Api, cursors, lead_not_found};
use crate::{
    core::{decide::Limits, lead_search::LeadSearch, process_change::process_not_found},
    pipeline::created_leads::log_created,
    store::{
        self, calls,
        created_leads::CreatedLead,
        lead_search,
        leads::{self, LeadAddress, LeadFilter},
        processes, updates,
    },
};

/// How many leads are searched for a page with a filter. More finds rare leads with fewer queries, each of which takes
/// longer.
const SEARCHED_LEADS: u32 = 10_000;
/// How long a query waits until the creation of its lead is logged. A longer time delays responses while the log is
/// unavailable. With a shorter one, the leader logs more creations, possibly after updates of their leads.
const LOG_TIMEOUT: Duration = Duration::from_secs(2);

impl Api {
    pub(super) async fn get_lead(self, query: GetLead) -> Result<Lead, RpcError> {
        let address = match (query.lead_id, query.process_id, query.reference_id) {
            (Some(lead_id), ..) => LeadAddress::Id(lead_id),
            (None, Some(process_id), Some(reference_id)) => LeadAddress::Reference(process_id, reference_id),
            _ => return Err(RpcError::new(ErrorCode::AddressMissing, "Either leadId or referenceId is required")),
        };
        leads::find(&self.pool, query.project_id, &address).await?.ok_or_else(lead_not_found)
    }

    pub(super) async fn initiate_lead(self, lead: InitiateLead) -> Result<Lead, RpcError> {
        let now = clock::now();
        validate(&lead, self.limits())?;
        let process = processes::find_by_id(&self.pool, lead.project_id, lead.process_id).await?;
        let Process { rules, callbacks, .. } = process.ok_or_else(process_not_found)?;
        let state = rules
            .initial_state()
            .ok_or_else(|| RpcError::new(ErrorCode::ProcessHasNoStates, "The process has no states"))?;
        let lead_id = clock::new_id();
        let is_logged = callbacks.iter().any(|callback| callback.names(EventKind::LeadCreated));
        let created = is_logged.then(|| creation(lead_id, &lead, &state.name)).transpose()?;
        let mut connection = store::acquire(&self.pool).await?;
        if !leads::insert(&mut connection, lead_id, &lead, &state.name, created.as_ref(), now).await? {
            let reference = lead.reference_id.as_deref().unwrap_or_default();
            let message = format!("Lead with referenceId {reference:?} already exists for this project and process");
            return Err(RpcError::new(ErrorCode::ReferenceExists, message));
        }
        // The connection is not needed while the query waits for the log.
        drop(connection);
        if let Some(created) = &created {
            self.log_created(created).await;
        }
        Ok(Lead {
            lead_id,
            project_id: lead.project_id,
            process_id: lead.process_id,
            reference_id: lead.reference_id,
            name: lead.name,
            phone: lead.phone,
            email: lead.email,
            state: state.name.clone(),
            disposition: None,
            metadata: lead.metadata,
            version: 1,
            created_at: now,
            updated_at: now,
            activities: vec![],
        })
    }

    /// Logs a creation. If that fails, the leader logs it later.
    async fn log_created(&self, created: &CreatedLead) {
        let update_id = created.update_id;
        match tokio::time::timeout(LOG_TIMEOUT, log_created(&self.js, created)).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!(%update_id, "cannot log the creation of a lead; the leader will log it: {e}"),
            Err(_) => tracing::warn!(%update_id, "the log is slow; the leader logs the creation of a lead"),
        }
    }

    pub(super) async fn list_leads(self, query: ListLeads) -> Result<Page<Lead>, RpcError> {
        let ListLeads { project_id, process_id, state, updated_since, search, cursor, limit } = query;
        let limit = clamp(limit);
        let before = cursor.as_ref().map(cursors::parse_lead).transpose()?;
        let filter = LeadFilter { process_id, state: state.as_deref(), updated_since };
        if let Some(search) = search {
            return self.search_leads(project_id, &search, filter, before, limit).await;
        }
        // Filters have no index, because an index on a column that changes would slow down every update.
        let down_to = match filter.includes_all() {
            true => None,
            false => leads::nth_below(&self.pool, project_id, before, SEARCHED_LEADS).await?,
        };
        let leads = leads::list(&self.pool, project_id, filter, before, down_to, limit).await?;
        Ok(Page::cut(leads, limit, |lead| cursors::lead(lead.lead_id), down_to.map(cursors::lead)))
    }

    async fn search_leads(
        &self,
        project_id: ObjectId,
        search: &str,
        filter: LeadFilter<'_>,
        before: Option<ObjectId>,
        limit: u32,
    ) -> Result<Page<Lead>, RpcError> {
        let refused = |fault: String| RpcError::new(ErrorCode::InvalidField, format!("The text to search for {fault}"));
        if search.chars().nth(MAX_SEARCH_CHARS).is_some() {
            return Err(refused(format!("has more than {MAX_SEARCH_CHARS} characters")));
        }
        let search = LeadSearch::parse(search).ok_or_else(|| refused("is empty".into()))?;
        let found = lead_search::matching(&self.pool, project_id, &search, SEARCHED_LEADS as usize).await?;
        let Some(mut found) = found else {
            let message = format!("More than {SEARCHED_LEADS} leads match; search for a longer text");
            return Err(RpcError::new(ErrorCode::SearchTooBroad, message));
        };
        found.retain(|lead_id| before.is_none_or(|before| *lead_id < before));
        let leads = lead_search::list(&self.pool, project_id, &found, filter, limit).await?;
        Ok(Page::cut(leads, limit, |lead| cursors::lead(lead.lead_id), None))
    }

    pub(super) async fn get_lead_history(self, query: GetLeadHistory) -> Result<Page<HistoryEntry>, RpcError> {
        let GetLeadHistory { project_id, lead_id, cursor, limit } = query;
        let limit = clamp(limit);
        let before = cursor.as_ref().map(cursors::parse_history).transpose()?;
        if !leads::exists(&self.pool, project_id, lead_id).await? {
            return Err(lead_not_found());
        }
        let updates = updates::history_of_lead(&self.pool, project_id, lead_id, before, limit).await?;
        Ok(Page::cut(updates, limit, |update| cursors::history(update.position()), None))
    }

    pub(super) async fn list_calls(self, query: ListCalls) -> Result<Page<Call>, RpcError> {
        let ListCalls { project_id, lead_id, cursor, limit } = query;
        let limit = clamp(limit);
        let after = cursor.as_ref().map(cursors::parse_call).transpose()?;
        let calls = calls::list(&self.pool, project_id, lead_id, after.as_ref(), clock::now(), limit).await?;
        Ok(Page::cut(calls, limit, cursors::call, None))
    }

    pub(super) fn limits(&self) -> Limits {
        Limits::for_max_payload(self.js.client().server_info().max_payload)
    }
}

/// The creation of a lead, to be logged.
fn creation(lead_id: ObjectId, lead: &InitiateLead, state: &str) -> Result<CreatedLead, RpcError> {
    let update_id = clock::new_id();
    let InitiateLead { name, phone, email, metadata, project_id, .. } = lead;
    let contact = LeadContact { name: name.clone(), phone: phone.clone(), email: email.clone() };
    let created = LeadCreated { update_id, lead_id, state: state.into(), contact, metadata: metadata.clone() };
    let command = serde_json::to_string(&created).map_err(|e| internal("cannot write the creation of a lead", &e))?;
    Ok(CreatedLead { project_id: *project_id, update_id, command })
}

fn validate(lead: &InitiateLead, limits: Limits) -> Result<(), RpcError> {
    let texts = [
        ("name", &lead.name),
        ("referenceId", &lead.reference_id),
        ("phone", &lead.phone),
        ("email", &lead.email),
        ("groupId", &lead.group_id),
    ];
    for (field, text) in texts {
        let Some(text) = text else { continue };
        if text.chars().count() > MAX_TEXT_CHARS || text.contains('\0') {
            let message = format!("{field} must have at most {MAX_TEXT_CHARS} characters and no NUL");
            return Err(RpcError::new(ErrorCode::TextTooLong, message));
        }
    }
    let bytes = JsonObject::get(&lead.metadata).len();
    if bytes > limits.metadata_bytes {
        let message = format!("metadata is {bytes} bytes, more than the {} allowed", limits.metadata_bytes);
        return Err(RpcError::new(ErrorCode::MetadataTooLarge, message));
    }
    Ok(())
}
