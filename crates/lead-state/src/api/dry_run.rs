//! The dry run of an update: decided like the next entry of the log, without any effect.

use std::collections::BTreeSet;

use contract::{
    Timestamp,
    command::CallEnded,
    event::CompletionEvent,
    position::LogPosition,
    rpc::{DryRunUpdate, ErrorCode, RpcError},
    warning::Warning,
};
use service_kit::clock;

use super::Api;
use crate::{
    core::{
        batch::{BatchState, LeadKeys, Plan, decide_batch},
        decide::Limits,
        entry::{CallChange, CallEntry, Entry, UpdateEntry},
    },
    store::{self, batch_state, rules::RulesCache},
};

impl Api {
    pub(super) async fn dry_run_update(self, query: DryRunUpdate) -> Result<CompletionEvent, RpcError> {
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
        let mut connection = store::acquire(&self.pool).await?;
        let mut state = batch_state::read(&mut connection, &keys, usize::MAX).await?.unwrap_or_default();
        drop(connection);
        let processes: BTreeSet<_> = state.leads.values().map(|lead| lead.process_id).collect();
        state.rules = RulesCache::default().load(&self.pool, &processes).await?;
        preview(state, entries, now, self.limits())
            .ok_or_else(|| RpcError::new(ErrorCode::Internal, "the update was not decided"))
    }
}

/// The event of the last entry, an update. An update that would be queued is decided as if the call ended now.
fn preview(state: BatchState, mut entries: Vec<Entry>, now: Timestamp, limits: Limits) -> Option<CompletionEvent> {
    let plan = decide_batch(state.clone(), entries.clone(), now, limits);
    let outcome = |plan: Plan| plan.rows.into_iter().map(|row| row.event).rfind(|event| event.kind.is_update());
    let Some(queued) = plan.newly_queued.first() else { return outcome(plan) };
    let lead_id = Some(queued.lead_id);
    let calls = state.calls.get(&queued.lead_id);
    let until = calls.into_iter().flatten().map(|call| call.expires_at).max().unwrap_or(now);
    let UpdateEntry { project_id, position, .. } = queued.update;
    let change = CallChange::Ended(CallEnded { lead_id, ..CallEnded::default() });
    let (update_id, text) = (clock::new_id(), "{}".into());
    let end = CallEntry { position, logged_at: now, project_id, update_id, change, text, traceparent: None };
    entries.push(Entry::Call(Box::new(end)));
    let mut event = outcome(decide_batch(state, entries, now, limits))?;
    event.warnings.push(Warning::WOULD_BE_QUEUED.with(&[&until.to_iso()]));
    Some(event)
}
