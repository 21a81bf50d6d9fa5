//! 4 Decide: a batch of log entries, decided one after another on the state that the cache and Postgres provided. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use contract::{
    ObjectId, Timestamp,
    command::{CallEnded, CallStarted, UpdateCommand},
    event::{CompletionEvent, OutcomeKind},
    position::LogPosition,
    process::{DuringCall, Rules},
    subject::DeadLetterReason,
};

use super::{
    address::Address,
    creation::created_event,
    decide::{Call, Change, Lead, Limits, MAX_CALLS, Refusal, decide, in_call, room_to_queue},
    entry::{CallChange, CallEntry, CreatedEntry, DeadLetter, Entry, EraseEntry, UpdateEntry},
    erasure::erasure_event,
    outcome::{call_event, completion_event},
};
pub use super::{
    address::{LeadKeys, UpdateKey},
    erasure::Erasure,
};

/// The state that the decisions of a batch depend on.
#[derive(Debug, Clone, Default)]
pub struct BatchState {
    pub leads: HashMap<ObjectId, Arc<Lead>>,
    /// Lead ids by process and external id.
    pub references: HashMap<(ObjectId, String), ObjectId>,
    /// Calls by lead.
    pub calls: HashMap<ObjectId, Vec<Call>>,
    /// Rules by process.
    pub rules: HashMap<ObjectId, Arc<Rules>>,
    /// Updates and call events that are in the ledger or queued already. An entry with one of these keys is a
    /// duplicate.
    pub recorded: HashSet<UpdateKey>,
    /// Queued updates by lead, in log order. A lead with queued updates has a call in `calls`, which may have expired.
    pub queued: HashMap<ObjectId, Vec<Arc<QueuedUpdate>>>,
}

/// An update that waits until no call with its lead is in progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedUpdate {
    /// The lead that the command's address resolved to.
    pub lead_id: ObjectId,
    pub update: UpdateEntry,
}

/// A row of the ledger: an update, a call event, a creation or an erasure, and its outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerRow {
    /// Its log entry.
    pub position: LogPosition,
    pub logged_at: Timestamp,
    /// The command's text.
    pub text: Box<str>,
    /// The disposition that was stored; for a failed update, the one that the command names.
    pub disposition: Option<String>,
    pub api_key_id: Option<ObjectId>,
    pub traceparent: Option<String>,
    /// The entry at which the row was decided: its own, or the one that ended the call behind which it was queued.
    pub decided_at: LogPosition,
    pub event: CompletionEvent,
}

impl LedgerRow {
    pub fn key(&self) -> UpdateKey {
        (self.event.project_id, self.event.update_id)
    }
}

/// All changes that a batch makes.
#[derive(Debug, Default)]
pub struct Plan {
    /// The changed leads as they are after the batch, by id.
    pub leads: Vec<Arc<Lead>>,
    /// All calls of each lead whose calls changed, by lead id.
    pub calls: Vec<(ObjectId, Vec<Call>)>,
    /// All queued updates of each lead whose queue changed, by lead id.
    pub queued: Vec<(ObjectId, Vec<Arc<QueuedUpdate>>)>,
    /// The updates in `queued` that this batch added.
    pub newly_queued: Vec<Arc<QueuedUpdate>>,
    /// Updates that were queued before this batch and are decided by it.
    pub released: Vec<UpdateKey>,
    /// The leads that the batch erases; `leads` has what remains of them.
    pub erasures: Vec<Erasure>,
    /// One row per decided update, call event, creation or erasure that was not recorded before, in the order of the
    /// decisions.
    pub rows: Vec<LedgerRow>,
    /// Valid entries that cannot be carried out and have no ledger row.
    pub dead_letters: Vec<DeadLetter>,
}

impl Plan {
    /// Whether the plan writes only leads and ledger rows.
    pub fn is_plain(&self) -> bool {
        self.calls.is_empty() && self.newly_queued.is_empty() && self.released.is_empty() && self.erasures.is_empty()
    }
}

/// Decides a batch. `applied_at` is the time that the outcomes carry; decisions depend only on the log's time.
pub fn decide_batch(state: BatchState, entries: Vec<Entry>, applied_at: Timestamp, limits: Limits) -> Plan {
    let mut decider = BatchDecider {
        state,
        applied_at,
        limits,
        plan: Plan::default(),
        changed_leads: BTreeSet::new(),
        changed_calls: BTreeSet::new(),
        changed_queues: BTreeSet::new(),
        newly_queued: BTreeMap::new(),
    };
    for entry in entries {
        decider.apply_entry(entry);
    }
    decider.into_plan()
}

struct BatchDecider {
    /// The state after the entries decided so far.
    state: BatchState,
    applied_at: Timestamp,
    limits: Limits,
    plan: Plan,
    changed_leads: BTreeSet<ObjectId>,
    changed_calls: BTreeSet<ObjectId>,
    changed_queues: BTreeSet<ObjectId>,
    newly_queued: BTreeMap<UpdateKey, Arc<QueuedUpdate>>,
}

/// The position and time of the log entry that is being decided.
#[derive(Clone, Copy)]
struct Moment {
    position: LogPosition,
    logged_at: Timestamp,
}

impl BatchDecider {
    fn apply_entry(&mut self, entry: Entry) {
        match entry {
            Entry::Update(update) => self.apply_update(update),
            Entry::Call(call) => self.apply_call(*call),
            Entry::Erase(erase) => self.apply_erasure(*erase),
            Entry::Created(created) => self.apply_creation(*created),
        }
    }

    /// Whether the entry was recorded before; marks it as recorded.
    fn is_duplicate(&mut self, key: UpdateKey, position: LogPosition) -> bool {
        let is_duplicate = !self.state.recorded.insert(key);
        if is_duplicate {
            tracing::info!(update_id = %key.1, sequence = position.sequence, "skipping a duplicate");
        }
        is_duplicate
    }

    fn apply_update(&mut self, update: UpdateEntry) {
        let at = Moment { position: update.position, logged_at: update.logged_at };
        if self.is_duplicate(update.key(), at.position) {
            return;
        }
        match self.state.find_lead(update.project_id, update.address()) {
            Ok(lead_id) => {
                self.release_queued(lead_id, at);
                self.decide_or_queue(lead_id, update);
            }
            Err(Refusal::LeadErased) => {
                self.record_outcome(update.without_content(), at.position, None, Err(Refusal::LeadErased));
            }
            Err(refusal) => self.record_outcome(update, at.position, None, Err(refusal)),
        }
    }

    fn apply_call(&mut self, call: CallEntry) {
        let at = Moment { position: call.position, logged_at: call.logged_at };
        let kind = call.kind();
        if kind.is_some() && self.is_duplicate(call.key(), at.position) {
            return;
        }
        let found = self.state.find_lead(call.project_id, call.address());
        if let Ok(lead_id) = found {
            self.change_calls(lead_id, &call.change, at);
        }
        match (kind, found) {
            (Some(kind), Err(Refusal::LeadErased)) => {
                self.record_call(call.without_content(), kind, Err(Refusal::LeadErased), None);
            }
            (Some(kind), found) => {
                let moved = found.as_ref().ok().and_then(|lead_id| self.move_lead(*lead_id, &call.change, at));
                self.record_call(call, kind, found, moved);
            }
            // The call was in progress when its lead was erased.
            (None, Err(Refusal::LeadErased)) => {}
            (None, Err(refusal)) => {
                let (reason, error) = (DeadLetterReason::UnknownLead, refusal.to_string());
                self.plan.dead_letters.push(DeadLetter { position: call.position, reason, error });
            }
            (None, Ok(_)) => {}
        }
    }

    fn change_calls(&mut self, lead_id: ObjectId, change: &CallChange, at: Moment) {
        match change {
            CallChange::Started(call) => {
                // Updates queued behind an expired call do not wait for the next one.
                self.release_queued(lead_id, at);
                self.state.start_call(lead_id, call, at.logged_at);
                self.changed_calls.insert(lead_id);
            }
            CallChange::Ended(call) => {
                let calls = self.state.calls.entry(lead_id).or_default();
                calls.retain(|running| call.call_id.as_ref().is_some_and(|ended| *ended != running.call_id));
                self.changed_calls.insert(lead_id);
                self.release_queued(lead_id, at);
            }
            CallChange::Expired(_) => self.release_queued(lead_id, at),
        }
    }

    /// Decides an update, or queues it until the end of a call in progress.
    fn decide_or_queue(&mut self, lead_id: ObjectId, update: UpdateEntry) {
        let (lead, outcome) = self.state.decide(lead_id, &update.command, update.logged_at, self.limits);
        let queues =
            || self.state.rules.get(&lead.process_id).is_some_and(|rules| rules.during_call == DuringCall::Queue);
        if outcome != Err(Refusal::CallInProgress) || !queues() {
            let decided_at = update.position;
            return self.record_outcome(update, decided_at, Some(lead), outcome);
        }
        let queue = self.state.queued.entry(lead_id).or_default();
        let bytes = queue.iter().map(|queued| queued.update.text.len());
        if let Err(refusal) = room_to_queue(&lead, bytes, update.text.len()) {
            let decided_at = update.position;
            return self.record_outcome(update, decided_at, Some(lead), Err(refusal));
        }
        let queued = Arc::new(QueuedUpdate { lead_id, update });
        queue.push(queued.clone());
        self.changed_queues.insert(lead_id);
        self.newly_queued.insert(queued.update.key(), queued);
    }

    /// Decides a lead's queued updates in log order, unless a call with the lead is in progress at this entry.
    fn release_queued(&mut self, lead_id: ObjectId, at: Moment) {
        if self.state.queued.get(&lead_id).is_none_or(Vec::is_empty) || self.state.in_call(lead_id, at.logged_at) {
            return;
        }
        self.changed_queues.insert(lead_id);
        for queued in self.state.queued.remove(&lead_id).unwrap_or_default() {
            let key = queued.update.key();
            if self.newly_queued.remove(&key).is_none() {
                self.plan.released.push(key);
            }
            let (lead, outcome) = self.state.decide(lead_id, &queued.update.command, at.logged_at, self.limits);
            self.record_outcome(Arc::unwrap_or_clone(queued).update, at.position, Some(lead), outcome);
        }
    }

    fn record_outcome(
        &mut self,
        update: UpdateEntry,
        decided_at: LogPosition,
        lead: Option<Arc<Lead>>,
        outcome: Result<Change, Refusal>,
    ) {
        let event = completion_event(&update, lead.as_deref(), &outcome, self.applied_at);
        if let Ok(change) = outcome {
            self.changed_leads.insert(change.lead.lead_id);
            self.state.leads.insert(change.lead.lead_id, Arc::new(change.lead));
        }
        self.plan.rows.push(LedgerRow {
            position: update.position,
            logged_at: update.logged_at,
            text: update.text,
            disposition: if event.success { event.disposition.clone() } else { update.command.disposition },
            api_key_id: update.command.api_key_id,
            traceparent: update.traceparent,
            decided_at,
            event,
        });
    }

    /// Decides the transition that the end of a call requests, by the rules for updates.
    fn move_lead(&self, lead_id: ObjectId, change: &CallChange, at: Moment) -> Option<Result<Change, Refusal>> {
        let CallChange::Ended(CallEnded { to_state: Some(target), result, .. }) = change else { return None };
        let command = UpdateCommand {
            target_state: Some(target.clone()),
            disposition: result.as_ref().and_then(|result| result.disposition.clone()),
            ..UpdateCommand::default()
        };
        Some(self.state.decide(lead_id, &command, at.logged_at, self.limits).1)
    }

    fn record_call(
        &mut self,
        call: CallEntry,
        kind: OutcomeKind,
        found: Result<ObjectId, Refusal>,
        moved: Option<Result<Change, Refusal>>,
    ) {
        let lead = found.as_ref().map(|lead_id| self.state.leads.get(lead_id).map(|lead| &**lead));
        let event = call_event(&call, kind, lead, moved.as_ref(), self.applied_at);
        if let Some(Ok(change)) = moved {
            self.changed_leads.insert(change.lead.lead_id);
            self.state.leads.insert(change.lead.lead_id, Arc::new(change.lead));
        }
        self.plan.rows.push(LedgerRow {
            position: call.position,
            logged_at: call.logged_at,
            disposition: event.disposition.clone(),
            api_key_id: call.api_key_id(),
            decided_at: call.position,
            text: call.text,
            traceparent: call.traceparent,
            event,
        });
    }

    /// Records that a lead was created. The lead is not changed: it may have been updated since.
    fn apply_creation(&mut self, entry: CreatedEntry) {
        if self.is_duplicate(entry.key(), entry.position) {
            return;
        }
        let found = self.state.find_lead(entry.project_id, Address::of_lead(entry.created.lead_id));
        let entry = if found == Err(Refusal::LeadErased) { entry.without_content() } else { entry };
        let lead = found.as_ref().map(|lead_id| self.state.leads.get(lead_id).map(|lead| &**lead));
        let event = created_event(&entry, lead, self.applied_at);
        self.plan.rows.push(LedgerRow {
            position: entry.position,
            logged_at: entry.logged_at,
            text: entry.text,
            disposition: None,
            api_key_id: None,
            traceparent: entry.traceparent,
            decided_at: entry.position,
            event,
        });
    }

    /// Erases a lead, even during a call: a call that never ends must not keep the data. The lead's calls end, and the
    /// updates that are queued behind them fail.
    fn apply_erasure(&mut self, erase: EraseEntry) {
        let at = Moment { position: erase.position, logged_at: erase.logged_at };
        if self.is_duplicate(erase.key(), at.position) {
            return;
        }
        let found = self.state.lead_to_erase(erase.project_id, erase.lead_id);
        if let Ok(lead_id) = found {
            self.release_queued(lead_id, at);
            self.erase(lead_id, at);
            self.refuse_queued(lead_id, at);
        }
        let lead = found.as_ref().ok().and_then(|lead_id| self.state.leads.get(lead_id));
        let event = erasure_event(&erase, lead.map(|lead| &**lead), found.as_ref().err(), self.applied_at);
        self.plan.rows.push(LedgerRow {
            position: erase.position,
            logged_at: erase.logged_at,
            text: erase.text,
            disposition: None,
            api_key_id: erase.api_key_id,
            traceparent: erase.traceparent,
            decided_at: erase.position,
            event,
        });
    }

    fn erase(&mut self, lead_id: ObjectId, at: Moment) {
        let Some(lead) = self.state.leads.get(&lead_id).cloned() else { return };
        // An entry later in this batch must not find the lead by the external id that it had.
        self.state.references.retain(|_, found| *found != lead_id);
        match self.plan.erasures.iter_mut().find(|erasure| erasure.lead_id == lead_id) {
            Some(erasure) => erasure.position = at.position,
            None => self.plan.erasures.push(Erasure {
                lead_id,
                project_id: lead.project_id,
                process_id: lead.process_id,
                reference_id: lead.reference_id.clone(),
                position: at.position,
            }),
        }
        self.state.leads.insert(lead_id, Arc::new(lead.erased()));
        self.changed_leads.insert(lead_id);
        if self.state.calls.remove(&lead_id).is_some() {
            self.changed_calls.insert(lead_id);
        }
    }

    /// Refuses the queued updates of an erased lead.
    fn refuse_queued(&mut self, lead_id: ObjectId, at: Moment) {
        let Some(queue) = self.state.queued.remove(&lead_id).filter(|queue| !queue.is_empty()) else { return };
        self.changed_queues.insert(lead_id);
        for queued in queue {
            let key = queued.update.key();
            if self.newly_queued.remove(&key).is_none() {
                self.plan.released.push(key);
            }
            let update = Arc::unwrap_or_clone(queued).update.without_content();
            let lead = self.state.leads.get(&lead_id).cloned();
            self.record_outcome(update, at.position, lead, Err(Refusal::LeadErased));
        }
    }

    fn into_plan(self) -> Plan {
        let Self { mut state, mut plan, changed_leads, changed_calls, changed_queues, newly_queued, .. } = self;
        plan.leads = changed_leads.iter().filter_map(|lead_id| state.leads.remove(lead_id)).collect();
        let calls = |lead_id| (lead_id, state.calls.remove(&lead_id).unwrap_or_default());
        plan.calls = changed_calls.into_iter().map(calls).collect();
        let queue = |lead_id| (lead_id, state.queued.remove(&lead_id).unwrap_or_default());
        plan.queued = changed_queues.into_iter().map(queue).collect();
        plan.newly_queued = newly_queued.into_values().collect();
        plan
    }
}

impl BatchState {
    /// The lead of an erasure, which may be erased already.
    fn lead_to_erase(&self, project_id: ObjectId, lead_id: ObjectId) -> Result<ObjectId, Refusal> {
        match self.find_lead(project_id, Address::of_lead(lead_id)) {
            Err(Refusal::LeadErased) => Ok(lead_id),
            found => found,
        }
    }

    fn find_lead(&self, project_id: ObjectId, address: Address<'_>) -> Result<ObjectId, Refusal> {
        let Address { lead_id, process_id, reference_id } = address;
        let found = match (lead_id, process_id, reference_id) {
            (None, _, None) => return Err(Refusal::AddressMissing),
            (None, None, Some(_)) => return Err(Refusal::ProcessMissing),
            (None, Some(process_id), Some(reference_id)) => {
                // The key owns its text, so this allocates; only commands without a leadId get here.
                self.references.get(&(process_id, reference_id.to_owned())).copied()
            }
            (Some(lead_id), ..) => Some(lead_id),
        };
        // A lead of another project does not exist for this caller.
        let lead = found
            .and_then(|lead_id| self.leads.get(&lead_id))
            .filter(|lead| lead.project_id == project_id)
            .ok_or(Refusal::LeadNotFound)?;
        if lead.is_erased {
            return Err(Refusal::LeadErased);
        }
        let same_reference = reference_id.is_none_or(|reference| lead.reference_id.as_deref() == Some(reference));
        let same_process = process_id.is_none_or(|process| lead.process_id == process);
        if same_reference && same_process { Ok(lead.lead_id) } else { Err(Refusal::AddressMismatch) }
    }

    fn calls(&self, lead_id: ObjectId) -> &[Call] {
        self.calls.get(&lead_id).map_or(&[][..], Vec::as_slice)
    }

    fn in_call(&self, lead_id: ObjectId, now: Timestamp) -> bool {
        in_call(self.calls(lead_id), now)
    }

    /// Decides an update of a lead in `leads`; also returns that lead.
    fn decide(
        &self,
        lead_id: ObjectId,
        command: &UpdateCommand,
        now: Timestamp,
        limits: Limits,
    ) -> (Arc<Lead>, Result<Change, Refusal>) {
        let lead = &self.leads[&lead_id];
        let rules = self.rules.get(&lead.process_id).cloned().unwrap_or_default();
        (lead.clone(), decide(lead, self.calls(lead_id), command, &rules, now, limits))
    }

    fn start_call(&mut self, lead_id: ObjectId, call: &CallStarted, logged_at: Timestamp) {
        let rules = self.leads.get(&lead_id).and_then(|lead| self.rules.get(&lead.process_id));
        let timeout = call.timeout_seconds.unwrap_or_else(|| rules.map_or(0, |rules| rules.call_timeout_seconds));
        let call = Call {
            call_id: call.call_id.clone().unwrap_or_default(),
            started_at: logged_at,
            expires_at: logged_at.plus(Duration::from_secs(timeout.into())),
        };
        let calls = self.calls.entry(lead_id).or_default();
        // An expired call affects no later entry.
        calls.retain(|running| running.call_id != call.call_id && logged_at < running.expires_at);
        calls.push(call);
        if calls.len() > MAX_CALLS
            && let Some(first) = (0..calls.len()).min_by_key(|place| calls[*place].expires_at)
        {
            calls.remove(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use contract::{
        JsonObject,
        command::{CallExpired, LeadContact, LeadCreated, MAX_TEXT_CHARS},
    };

    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([2; 12]);
    const PROCESS: ObjectId = ObjectId::from_bytes([3; 12]);
    const LEAD: ObjectId = ObjectId::from_bytes([1; 12]);

    fn object(text: &str) -> JsonObject {
        JsonObject::from_text(text.into()).unwrap()
    }

    fn state() -> BatchState {
        let lead = Lead {
            lead_id: LEAD,
            project_id: PROJECT,
            process_id: PROCESS,
            reference_id: Some("R".into()),
            name: None,
            state: "new".into(),
            disposition: None,
            metadata: JsonObject::empty(),
            version: 1,
            is_erased: false,
        };
        let rules: Rules =
            serde_json::from_str(r#"{"states":[{"name":"new"},{"name":"interested"}],"callTimeoutSeconds":10}"#)
                .unwrap();
        BatchState {
            leads: [(LEAD, Arc::new(lead))].into(),
            references: [((PROCESS, "R".to_owned()), LEAD)].into(),
            rules: [(PROCESS, Arc::new(rules))].into(),
            ..BatchState::default()
        }
    }

    fn queueing() -> BatchState {
        let mut state = state();
        let rules = Rules { during_call: DuringCall::Queue, ..state.rules[&PROCESS].as_ref().clone() };
        state.rules.insert(PROCESS, Arc::new(rules));
        state
    }

    fn at(sequence: u64) -> LogPosition {
        LogPosition::message(3, sequence)
    }

    /// Every entry is logged at second `sequence`.
    fn time(sequence: u64) -> Timestamp {
        Timestamp::from_millis(sequence as i64 * 1000)
    }

    fn call(sequence: u64, change: CallChange) -> Entry {
        Entry::Call(Box::new(CallEntry {
            position: at(sequence),
            logged_at: time(sequence),
            project_id: PROJECT,
            update_id: ObjectId::from_log(sequence, 0, time(sequence)),
            change,
            text: "{}".into(),
            traceparent: None,
        }))
    }

    fn start(sequence: u64, call_id: Option<&str>) -> Entry {
        let started = CallStarted { lead_id: Some(LEAD), call_id: call_id.map(Into::into), ..Default::default() };
        call(sequence, CallChange::Started(started))
    }

    fn end(sequence: u64, call_id: Option<&str>) -> Entry {
        let ended = CallEnded {
            reference_id: Some("R".into()),
            process_id: Some(PROCESS),
            call_id: call_id.map(Into::into),
            ..Default::default()
        };
        call(sequence, CallChange::Ended(ended))
    }

    fn expired(sequence: u64) -> Entry {
        call(sequence, CallChange::Expired(CallExpired { lead_id: LEAD }))
    }

    fn erase_of(project_id: ObjectId, sequence: u64) -> Entry {
        Entry::Erase(Box::new(EraseEntry {
            position: at(sequence),
            logged_at: time(sequence),
            project_id,
            update_id: ObjectId::from_log(sequence, 0, time(sequence)),
            lead_id: LEAD,
            api_key_id: None,
            text: "{}".into(),
            traceparent: None,
        }))
    }

    fn update_of(project_id: ObjectId, sequence: u64, id: u8, command: UpdateCommand) -> Entry {
        Entry::Update(UpdateEntry {
            position: at(sequence),
            logged_at: time(sequence),
            project_id,
            update_id: ObjectId::from_bytes([id; 12]),
            command: Box::new(command),
            text: "{}".into(),
            traceparent: None,
        })
    }

    fn update(sequence: u64, id: u8, command: UpdateCommand) -> Entry {
        update_of(PROJECT, sequence, id, command)
    }

    fn merge(text: &str) -> UpdateCommand {
        UpdateCommand { lead_id: Some(LEAD), metadata: Some(object(text)), ..Default::default() }
    }

    fn run_on(state: BatchState, entries: Vec<Entry>) -> Plan {
        decide_batch(state, entries, Timestamp::from_millis(9_000_000), Limits { metadata_bytes: 1000 })
    }

    fn run(entries: Vec<Entry>) -> Plan {
        run_on(state(), entries)
    }

    fn updates(plan: &Plan) -> impl Iterator<Item = &LedgerRow> {
        plan.rows.iter().filter(|row| row.event.kind.is_update())
    }

    fn codes(plan: &Plan) -> Vec<&str> {
        updates(plan).map(|row| row.event.error_code.as_deref().unwrap_or("ok")).collect()
    }

    /// The sequences of an update and of its decision.
    fn places(plan: &Plan) -> Vec<(u64, u64)> {
        updates(plan).map(|row| (row.position.sequence, row.decided_at.sequence)).collect()
    }

    #[test]
    fn updates_of_one_lead_build_on_each_other() {
        let plan = run(vec![
            update(1, 1, merge(r#"{"a":1}"#)),
            update(2, 2, UpdateCommand { target_state: Some("gone".into()), ..merge(r#"{"x":1}"#) }),
            update(3, 3, merge(r#"{"b":2}"#)),
        ]);

        assert_eq!(codes(&plan), ["ok", "unknown_state", "ok"]);
        let data: Vec<_> = plan.rows.iter().map(|row| row.event.data.as_ref().map(JsonObject::get)).collect();
        assert_eq!(data, [Some(r#"{"a":1}"#), None, Some(r#"{"a":1,"b":2}"#)]);
        assert_eq!(plan.leads.len(), 1);
        assert_eq!((plan.leads[0].metadata.get(), plan.leads[0].version), (r#"{"a":1,"b":2}"#, 3));
    }

    #[test]
    fn a_duplicate_within_a_batch_is_skipped() {
        let plan = run(vec![update(1, 1, merge(r#"{"a":1}"#)), update(2, 1, merge(r#"{"a":2}"#))]);

        assert_eq!(codes(&plan), ["ok"]);
        assert_eq!(plan.leads[0].metadata.get(), r#"{"a":1}"#);
    }

    #[test]
    fn a_recorded_update_is_skipped() {
        let recorded = [(PROJECT, ObjectId::from_bytes([1; 12]))].into();

        let plan = run_on(BatchState { recorded, ..state() }, vec![update(1, 1, merge("{}"))]);

        assert!(plan.rows.is_empty() && plan.leads.is_empty());
    }

    #[test]
    fn a_lead_has_a_limited_number_of_calls() {
        let started = |n: u64| CallStarted {
            lead_id: Some(LEAD),
            call_id: Some(n.to_string()),
            timeout_seconds: Some(9999),
            ..Default::default()
        };
        let starts = (1..=MAX_CALLS as u64 + 2).map(|n| call(n, CallChange::Started(started(n))));

        let plan = run(starts.collect());

        let [(LEAD, calls)] = plan.calls.as_slice() else { panic!("{:?}", plan.calls) };
        assert_eq!(calls.len(), MAX_CALLS);
        assert_eq!(calls[0].call_id, "3", "the calls that expire first are removed");
    }

    #[test]
    fn updates_fail_between_the_start_and_the_end_or_expiry_of_a_call() {
        let plan = run(vec![
            start(1, Some("a")),
            start(2, Some("b")),
            update(2, 1, merge("{}")),
            end(3, Some("a")),
            update(4, 2, merge("{}")),
            end(5, None),
            update(6, 3, merge("{}")),
            start(7, None),
            update(16, 4, merge("{}")),
            update(17, 5, merge("{}")),
        ]);

        assert_eq!(codes(&plan), ["call_in_progress", "call_in_progress", "ok", "call_in_progress", "ok"]);
        assert_eq!(plan.calls.len(), 1);
        assert_eq!(plan.calls[0].1.len(), 1, "the expired call stays until housekeeping deletes it");
    }

    /// Two calls begin, one of them ends, and two updates are queued.
    fn queued_batch() -> (BatchState, Plan) {
        let mut state = queueing();
        let plan = run_on(
            state.clone(),
            vec![
                start(1, Some("a")),
                start(2, Some("b")),
                update(3, 1, merge(r#"{"a":1}"#)),
                end(4, Some("a")),
                expired(5),
                update(6, 2, merge(r#"{"a":2}"#)),
            ],
        );
        state.calls.extend(plan.calls.clone());
        state.queued.extend(plan.queued.clone());
        (state, plan)
    }

    #[test]
    fn updates_are_queued_while_any_call_is_in_progress() {
        let (_, plan) = queued_batch();

        assert!(updates(&plan).next().is_none() && plan.leads.is_empty() && plan.released.is_empty());
        let queued: Vec<_> = plan.newly_queued.iter().map(|queued| queued.update.position.sequence).collect();
        assert_eq!(queued, [3, 6]);
        assert_eq!(plan.queued[0].1, plan.newly_queued);
    }

    #[test]
    fn the_first_entry_after_an_expiry_is_decided_after_the_queued_updates() {
        let (state, _) = queued_batch();

        let plan = run_on(state, vec![update(12, 3, merge(r#"{"b":3}"#)), end(13, None)]);

        assert_eq!(places(&plan), [(3, 12), (6, 12), (12, 12)]);
        assert_eq!(plan.leads[0].metadata.get(), r#"{"a":2,"b":3}"#);
        assert_eq!((plan.released.len(), plan.newly_queued.len(), plan.queued[0].1.len()), (2, 0, 0));
    }

    #[test]
    fn a_logged_expiry_releases_queued_updates_before_the_next_call() {
        let (state, _) = queued_batch();

        let plan = run_on(state, vec![expired(11), expired(12), start(12, None), update(13, 3, merge("{}"))]);

        assert_eq!(places(&plan), [(3, 12), (6, 12)]);
        assert_eq!(plan.newly_queued.len(), 1);
    }

    #[test]
    fn an_update_queued_and_released_in_one_batch_is_written_to_the_ledger_only() {
        let plan = run_on(queueing(), vec![start(13, None), update(14, 4, merge("{}")), end(15, None)]);

        assert_eq!((updates(&plan).count(), plan.newly_queued.len(), plan.released.len()), (1, 0, 0));
    }

    #[test]
    fn leads_are_found_by_id_or_reference_within_their_project() {
        let by_reference = UpdateCommand {
            reference_id: Some("R".into()),
            process_id: Some(PROCESS),
            name: Some("x".into()),
            ..Default::default()
        };
        for (code, command) in [
            ("ok", by_reference.clone()),
            ("ok", UpdateCommand { lead_id: Some(LEAD), ..by_reference.clone() }),
            ("address_mismatch", UpdateCommand { reference_id: Some("other".into()), ..merge("{}") }),
            ("address_mismatch", UpdateCommand { process_id: Some(LEAD), ..merge("{}") }),
            ("process_missing", UpdateCommand { process_id: None, ..by_reference.clone() }),
            ("address_missing", UpdateCommand { reference_id: None, ..by_reference.clone() }),
            ("lead_not_found", UpdateCommand { reference_id: Some("none".into()), ..by_reference }),
        ] {
            assert_eq!(codes(&run(vec![update(1, 1, command.clone())])), [code], "{command:?}");
        }
    }

    #[test]
    fn the_failure_for_a_lead_of_another_project_reveals_nothing_about_it() {
        let plan = run(vec![update_of(PROCESS, 8, 8, merge("{}"))]);

        let event = &plan.rows[0].event;
        assert_eq!(event.error_code.as_deref(), Some("lead_not_found"));
        assert_eq!((event.process_id, event.lead_id, &event.reference_id), (None, Some(LEAD), &None));
    }

    #[test]
    fn a_call_event_has_a_ledger_row_after_the_updates_that_it_releases() {
        let plan = run_on(queueing(), vec![start(1, Some("a")), update(2, 1, merge("{}")), end(3, None)]);

        let rows: Vec<_> = plan.rows.iter().map(|row| (row.event.kind, row.position, row.decided_at)).collect();
        assert_eq!(
            rows,
            [
                (OutcomeKind::CallStarted, at(1), at(1)),
                (OutcomeKind::Update, at(2), at(3)),
                (OutcomeKind::CallEnded, at(3), at(3)),
            ]
        );
        let event = &plan.rows[2].event;
        assert_eq!((event.success, event.lead_id, event.process_id), (true, Some(LEAD), Some(PROCESS)));
        assert_eq!((event.reference_id.as_deref(), event.version, &event.data), (Some("R"), None, &None));
    }

    #[test]
    fn a_duplicate_of_a_call_event_is_skipped() {
        let duplicate = |sequence| match start(1, Some("a")) {
            Entry::Call(call) => {
                Entry::Call(Box::new(CallEntry { position: at(sequence), logged_at: time(sequence), ..*call }))
            }
            _ => unreachable!(),
        };

        let plan = run(vec![start(1, Some("a")), end(2, None), duplicate(3), update(4, 1, merge("{}"))]);

        assert_eq!((plan.rows.len(), codes(&plan)), (3, vec!["ok"]));
    }

    #[test]
    fn a_call_event_of_an_unknown_lead_fails() {
        let started = CallStarted { lead_id: Some(PROJECT), ..Default::default() };

        let plan = run(vec![call(4, CallChange::Started(started))]);

        let event = &plan.rows[0].event;
        assert_eq!((event.success, event.error_code.as_deref()), (false, Some("lead_not_found")));
        assert_eq!((event.lead_id, event.process_id), (Some(PROJECT), None));
        assert!(plan.calls.is_empty() && plan.dead_letters.is_empty());
    }

    /// An update with content in addition to ids.
    fn named(id: u8) -> UpdateCommand {
        UpdateCommand {
            reference_id: Some("R".into()),
            name: Some("Ada".into()),
            user_id: Some("u-1".into()),
            api_key_id: Some(ObjectId::from_bytes([id; 12])),
            ..merge(r#"{"a":1}"#)
        }
    }

    #[test]
    fn updates_before_an_erasure_are_applied_and_those_after_it_fail_without_their_content() {
        let by_reference = UpdateCommand { lead_id: None, process_id: Some(PROCESS), ..named(3) };
        let entries = vec![update(1, 1, named(1)), erase_of(PROJECT, 2), update(3, 2, named(2)), start(4, Some("a"))];

        let plan = run([entries, vec![update(5, 3, by_reference)]].concat());

        assert_eq!(codes(&plan), ["ok", "lead_erased", "lead_not_found"]);
        let lead = &plan.leads[0];
        assert_eq!((&lead.reference_id, &lead.name, lead.metadata.get(), lead.is_erased), (&None, &None, "{}", true));
        assert_eq!((lead.state.as_str(), lead.version), ("new", 2), "the ledger can be compared with it");
        let erasure = Erasure {
            lead_id: LEAD,
            project_id: PROJECT,
            process_id: PROCESS,
            reference_id: Some("R".into()),
            position: at(2),
        };
        assert_eq!(plan.erasures, [erasure]);
        let refused = &plan.rows[2];
        assert_eq!(&*refused.text, format!(r#"{{"leadId":"{LEAD}","apiKeyId":"{}"}}"#, "02".repeat(12)));
        assert_eq!((&refused.event.reference_id, &refused.event.user_id), (&None, &None));
        let call = &plan.rows[3];
        assert_eq!((call.event.error_code.as_deref(), &call.event.call_id), (Some("lead_erased"), &None));
        assert!(!plan.is_plain() && plan.calls.is_empty());
    }

    #[test]
    fn an_erasure_ends_calls_and_refuses_the_updates_that_are_queued_behind_them() {
        let (state, _) = queued_batch();

        let plan = run_on(state, vec![erase_of(PROJECT, 7), expired(20), end(21, None)]);

        assert_eq!(codes(&plan), ["lead_erased", "lead_erased"]);
        assert_eq!(places(&plan), [(3, 7), (6, 7)]);
        assert_eq!((plan.released.len(), plan.queued[0].1.len(), plan.calls[0].1.len()), (2, 0, 0));
        let kinds: Vec<_> = plan.rows.iter().map(|row| (row.event.kind, row.event.success)).collect();
        assert_eq!(kinds[2..], [(OutcomeKind::Erase, true), (OutcomeKind::CallEnded, false)]);
        assert!(plan.dead_letters.is_empty(), "the expiry of a call that was erased is expected");
    }

    #[test]
    fn a_lead_is_erased_again_and_one_of_another_project_is_not() {
        let plan = run(vec![erase_of(PROCESS, 1), erase_of(PROJECT, 2), erase_of(PROJECT, 3)]);

        let outcomes: Vec<_> = plan.rows.iter().map(|row| row.event.error_code.as_deref()).collect();
        assert_eq!(outcomes, [Some("lead_not_found"), None, None]);
        assert_eq!(plan.erasures.len(), 1);
        assert_eq!((plan.erasures[0].position, plan.erasures[0].reference_id.as_deref()), (at(3), Some("R")));
    }

    fn created_in(project_id: ObjectId, sequence: u64, id: u8) -> Entry {
        let created = LeadCreated {
            update_id: ObjectId::from_bytes([id; 12]),
            lead_id: LEAD,
            state: "new".into(),
            contact: LeadContact { name: Some("Ada".into()), ..LeadContact::default() },
            metadata: object(r#"{"a":1}"#),
        };
        let text = serde_json::to_string(&created).unwrap().into();
        let (position, logged_at) = (at(sequence), time(sequence));
        Entry::Created(Box::new(CreatedEntry { position, logged_at, project_id, created, text, traceparent: None }))
    }

    #[test]
    fn a_creation_is_recorded_as_it_was_and_changes_nothing() {
        let moved = UpdateCommand { target_state: Some("interested".into()), ..merge(r#"{"b":2}"#) };

        let plan =
            run(vec![update(1, 1, moved), created_in(PROJECT, 2, 9), created_in(PROJECT, 3, 9), erase_of(PROJECT, 4)]);

        let event = &plan.rows[1].event;
        assert_eq!((event.kind, event.success, event.process_id), (OutcomeKind::LeadCreated, true, Some(PROCESS)));
        assert_eq!(
            (event.from_state.as_deref(), event.to_state.as_deref(), event.version),
            (None, Some("new"), Some(1))
        );
        assert_eq!(event.data.as_ref().map(JsonObject::get), Some(r#"{"a":1}"#));
        assert_eq!(event.contact.as_ref().and_then(|contact| contact.name.as_deref()), Some("Ada"));
        assert_eq!((plan.rows.len(), plan.leads[0].version), (3, 2), "a duplicate has no row, and the update stays");
    }

    #[test]
    fn a_creation_of_a_lead_that_is_gone_fails_without_its_content() {
        let plan = run(vec![created_in(PROCESS, 1, 7), erase_of(PROJECT, 2), created_in(PROJECT, 3, 8)]);

        let codes: Vec<_> = plan.rows.iter().map(|row| row.event.error_code.as_deref()).collect();
        assert_eq!(codes, [Some("lead_not_found"), None, Some("lead_erased")]);
        let erased = &plan.rows[2];
        assert_eq!((&erased.event.data, &erased.event.contact, &erased.event.to_state), (&None, &None, &None));
        let text = format!(
            r#"{{"updateId":"{}","leadId":"{LEAD}","state":"new","contact":{{}},"metadata":{{}}}}"#,
            "08".repeat(12)
        );
        assert_eq!(&*erased.text, text);
    }

    #[test]
    fn an_expiry_of_an_unknown_lead_is_a_dead_letter() {
        let plan = run(vec![call(4, CallChange::Expired(CallExpired { lead_id: PROJECT }))]);

        assert!(plan.rows.is_empty());
        assert_eq!(plan.dead_letters.len(), 1);
        assert_eq!(
            (plan.dead_letters[0].position, plan.dead_letters[0].reason),
            (at(4), DeadLetterReason::UnknownLead)
        );
    }

    #[test]
    fn keys_of_a_batch_are_collected_once_and_overlong_references_are_left_out() {
        let by_reference = |reference_id: String| UpdateCommand {
            reference_id: Some(reference_id),
            process_id: Some(PROCESS),
            ..Default::default()
        };
        let keys = LeadKeys::of(&[
            update(1, 1, merge("{}")),
            update(2, 1, by_reference("R".into())),
            update(3, 4, by_reference("x".repeat(MAX_TEXT_CHARS + 1))),
        ]);

        assert_eq!(keys.leads, [LEAD].into());
        assert_eq!(keys.references, [(PROCESS, "R".to_owned())].into());
        assert_eq!(keys.updates.len(), 2);
    }
}
