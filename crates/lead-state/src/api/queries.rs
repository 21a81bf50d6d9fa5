//! Queries about leads and updates, and the initiation of leads; answered by every instance.

use std::time::Duration;

use async_nats::jetstream;
use contract::{
    JsonObject, Timestamp,
    command::{CallEnded, MAX_TEXT_CHARS},
    event::CompletionEvent,
    position::LogPosition,
    rpc::{DryRunUpdate, GetLead, GetUpdate, InitiateLead, Lead, RpcError, Update},
    streams::LEAD_COMMANDS,
};
use service_kit::{clock, retention::Retention, rpc::internal};
use sqlx::PgPool;

use crate::{
    core::{
        batch::{BatchState, LeadKeys, decide_batch},
        decide::Limits,
        entry::{CallChange, CallEntry, Entry, UpdateEntry},
    },
    store::{
        StoreError,
        batch::{self, KnownRules},
        checkpoint, held,
        leads::{self, Address},
        ledger,
    },
};

/// How long the question after an update waits for the reader to pass what was in the log when it was asked. Less than
/// callers wait before they ask another instance.
const CATCH_UP: Duration = Duration::from_millis(700);
/// How often it looks.
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(10);
/// How far the clocks of whoever made an update's id and of the log may be apart.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

impl From<StoreError> for RpcError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Unavailable(_) => {
                tracing::warn!("{error}");
                Self::new(503, "unavailable", "the database is not available; try again")
            }
            _ => internal("a query failed", &error),
        }
    }
}

/// Answers queries.
#[derive(Debug, Clone)]
pub(crate) struct Queries {
    pub(crate) pool: PgPool,
    pub(crate) js: jetstream::Context,
    /// How long what became of updates is kept.
    pub(crate) ledger_retention: Retention,
}

impl Queries {
    pub(crate) async fn get_lead(self, query: GetLead) -> Result<Lead, RpcError> {
        let address = match (query.lead_id, query.process_id, query.reference_id) {
            (Some(lead_id), ..) => Address::Id(lead_id),
            (None, Some(process_id), Some(reference_id)) => Address::Reference(process_id, reference_id),
            _ => return Err(RpcError::new(400, "address_missing", "Either leadId or referenceId is required")),
        };
        leads::find(&self.pool, query.project_id, &address)
            .await?
            .ok_or_else(|| RpcError::new(404, "lead_not_found", "Lead not found"))
    }

    pub(crate) async fn initiate_lead(self, lead: InitiateLead) -> Result<Lead, RpcError> {
        let now = clock::now();
        let limits = self.limits();
        check(&lead, limits)?;
        let rules = leads::rules(&self.pool, lead.project_id, lead.process_id)
            .await?
            .ok_or_else(|| RpcError::new(404, "process_not_found", "Process not found"))?;
        let state = rules
            .initial_state()
            .ok_or_else(|| RpcError::new(400, "process_has_no_states", "The process has no states"))?;
        let lead_id = clock::new_id();
        if !leads::insert(&self.pool, lead_id, &lead, &state.name, now).await? {
            let reference = lead.reference_id.as_deref().unwrap_or_default();
            let message = format!("Lead with referenceId {reference:?} already exists for this project and process");
            return Err(RpcError::new(400, "reference_exists", message));
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

    /// Decides an update as it would be decided were it next in the log, and changes nothing.
    pub(crate) async fn try_update(self, query: DryRunUpdate) -> Result<CompletionEvent, RpcError> {
        let now = clock::now();
        let entries = vec![Entry::Update(UpdateEntry {
            position: LogPosition::default(),
            logged_at: now,
            project_id: query.project_id,
            update_id: clock::new_id(),
            command: Box::new(query.command),
            text: "{}".into(),
            traceparent: None,
        })];
        let keys = LeadKeys::of(&entries);
        let mut connection = self.pool.acquire().await.map_err(StoreError::from)?;
        let mut state = batch::read(&mut connection, &keys, usize::MAX).await?.unwrap_or_default();
        drop(connection);
        let processes = state.leads.values().map(|lead| lead.process_id).collect();
        state.rules = KnownRules::default().of(&self.pool, &processes).await?;
        try_on(state, entries, now, self.limits())
            .ok_or_else(|| RpcError::new(500, "internal", "the update was not decided"))
    }

    fn limits(&self) -> Limits {
        Limits::for_max_payload(self.js.client().server_info().max_payload)
    }

    pub(crate) async fn get_update(self, query: GetUpdate) -> Result<Update, RpcError> {
        if let Some(update) = ledger::find(&self.pool, query.project_id, query.update_id).await? {
            return Ok(update);
        }
        if let Some(update) = self.held_or_just_decided(&query).await? {
            return Ok(update);
        }
        // Neither: either it is in the log and not applied yet, or there is none. The reader soon knows.
        let not_found = || {
            let kept_since = self.ledger_retention.cutoff(clock::now());
            let text = match kept_since.filter(|since| query.update_id.timestamp() < *since) {
                Some(since) => format!(
                    "Update not found; what became of updates from before {} need not be kept any more",
                    &since.to_iso()[..10]
                ),
                None => "Update not found".into(),
            };
            RpcError::new(404, "update_not_found", text)
        };
        let unavailable =
            |e: &dyn std::fmt::Display| RpcError::new(503, "unavailable", format!("the log is not available: {e}"));
        let log = self.js.get_stream(LEAD_COMMANDS).await.map_err(|e| unavailable(&e))?;
        let last_seq = log.cached_info().state.last_sequence;
        let deadline = tokio::time::Instant::now() + CATCH_UP;
        let applied = loop {
            let checkpoint = checkpoint::get(&self.pool, LEAD_COMMANDS).await?;
            let applied = checkpoint.map_or(0, |checkpoint| checkpoint.applied.sequence);
            if applied >= last_seq {
                return self.held_or_just_decided(&query).await?.ok_or_else(not_found);
            }
            if tokio::time::Instant::now() >= deadline {
                break applied;
            }
            tokio::time::sleep(CATCH_UP_INTERVAL).await;
        };
        // There is a backlog. An id made since what is read now was logged may be of an update that waits in it.
        let reading = log.get_raw_message(applied + 1).await.map_err(|e| unavailable(&e))?;
        let logged_at = Timestamp::from(reading.time);
        if query.update_id.timestamp() < logged_at.minus(CLOCK_SKEW) {
            return Err(not_found());
        }
        Ok(Update::pending(query.update_id))
    }

    /// In this order: what is not held any more is in the ledger.
    async fn held_or_just_decided(&self, query: &GetUpdate) -> Result<Option<Update>, StoreError> {
        match held::find(&self.pool, query.project_id, query.update_id).await? {
            None => ledger::find(&self.pool, query.project_id, query.update_id).await,
            held => Ok(held),
        }
    }
}

/// What would become of the last of these entries, an update; of one that would be held, what would if the call ended now.
fn try_on(state: BatchState, mut entries: Vec<Entry>, now: Timestamp, limits: Limits) -> Option<CompletionEvent> {
    let plan = decide_batch(state.clone(), entries.clone(), now, limits);
    let Some(queued) = plan.newly_queued.first() else { return plan.rows.into_iter().next_back().map(|row| row.event) };
    let lead_id = Some(queued.lead_id);
    let calls = state.calls.get(&queued.lead_id);
    let until = calls.into_iter().flatten().map(|call| call.expires_at).max().unwrap_or(now);
    let UpdateEntry { project_id, position, .. } = queued.update;
    let change = CallChange::Ended(CallEnded { lead_id, ..CallEnded::default() });
    entries.push(Entry::Call(CallEntry { position, logged_at: now, project_id, change }));
    let mut event = decide_batch(state, entries, now, limits).rows.into_iter().next_back()?.event;
    event.warnings.push(format!(
        "a call is in progress: the update would be held until it ends, at the latest until {}",
        until.to_iso()
    ));
    Some(event)
}

fn check(lead: &InitiateLead, limits: Limits) -> Result<(), RpcError> {
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
            return Err(RpcError::new(400, "text_too_long", message));
        }
    }
    let bytes = JsonObject::get(&lead.metadata).len();
    if bytes > limits.metadata_bytes {
        let message = format!("metadata is {bytes} bytes, more than the {} allowed", limits.metadata_bytes);
        return Err(RpcError::new(400, "metadata_too_large", message));
    }
    Ok(())
}
