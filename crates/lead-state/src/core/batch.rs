//! 4 Decide: a batch of log entries, decided one after another on what was read of the database. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use contract::{
    JsonObject, ObjectId, Timestamp,
    command::{CallEnded, CallExpired, CallStarted, MAX_TEXT_CHARS, UpdateCommand},
    event::CompletionEvent,
    process::{DuringCall, Rules},
    subject::DeadLetterReason,
};

use super::{
    decide::{Call, Change, Lead, Limits, Refusal, decide, in_call, room_to_hold},
    entry::{Body, DeadLetter, Entry},
};

/// What the database holds of all that a batch names.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Leads by id.
    pub leads: HashMap<ObjectId, Arc<Lead>>,
    /// Leads by process and external id.
    pub references: HashMap<(ObjectId, String), ObjectId>,
    /// Calls by lead.
    pub calls: HashMap<ObjectId, Vec<Call>>,
    /// Rules by process.
    pub rules: HashMap<ObjectId, Arc<Rules>>,
    /// Updates of the batch that are in the ledger already, by project.
    pub known: HashSet<(ObjectId, ObjectId)>,
    /// What is held by lead, in the order of the log. A lead of which something is held has a call in `calls`, which may have
    /// expired.
    pub held: HashMap<ObjectId, Vec<Arc<Held>>>,
    /// Which of the logs there have been this is.
    pub epoch: i32,
}

/// An update as it stands in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// Its project.
    pub project_id: ObjectId,
    /// Its id.
    pub update_id: ObjectId,
    /// Which of the logs there have been it is in.
    pub epoch: i32,
    /// Its place there.
    pub log_seq: u64,
    /// When the log stored it.
    pub logged_at: Timestamp,
    /// The command.
    pub command: Box<UpdateCommand>,
    /// Its text.
    pub text: JsonObject,
    /// The trace it belongs to.
    pub traceparent: Option<String>,
}

/// An update that waits until no call with its lead is in progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The lead that it was found to be for.
    pub lead_id: ObjectId,
    /// The update.
    pub update: Update,
}

/// What a batch names: what must be read to decide it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Leads named by id.
    pub leads: BTreeSet<ObjectId>,
    /// Leads named by process and external id.
    pub references: BTreeSet<(ObjectId, String)>,
    /// Updates, by project.
    pub updates: BTreeSet<(ObjectId, ObjectId)>,
}

/// A row of the ledger: a command and its outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerRow {
    /// Which of the logs there have been the command is in.
    pub epoch: i32,
    /// Its place there.
    pub log_seq: u64,
    /// When the log stored it.
    pub logged_at: Timestamp,
    /// The entry of the current log at which it was decided: its own, or the one that ended the call that held it.
    pub decided_seq: u64,
    /// The command's text.
    pub command: JsonObject,
    /// The API key it came under.
    pub api_key_id: Option<ObjectId>,
    /// The disposition it gave.
    pub disposition: Option<String>,
    /// The trace it belongs to.
    pub traceparent: Option<String>,
    /// The outcome, as it is announced.
    pub event: CompletionEvent,
}

/// All that a batch changes.
#[derive(Debug, Default)]
pub struct Plan {
    /// The leads that changed, as they are after the batch, by id.
    pub leads: Vec<Arc<Lead>>,
    /// The leads whose calls changed, with all their calls, by id.
    pub calls: Vec<(ObjectId, Vec<Call>)>,
    /// The leads of which other updates are held than before, with all that are held of them, by id.
    pub held: Vec<(ObjectId, Vec<Arc<Held>>)>,
    /// Of these, what was not held before.
    pub newly_held: Vec<Arc<Held>>,
    /// What was held before and is decided, by project and update.
    pub released: Vec<(ObjectId, ObjectId)>,
    /// One row per update that is decided and was not in the ledger, in the order of the decisions.
    pub rows: Vec<LedgerRow>,
    /// What was understood but cannot be carried out and has no ledger row.
    pub dead_letters: Vec<DeadLetter>,
}

impl Names {
    /// Collects what entries name.
    pub fn of(entries: &[Entry]) -> Self {
        let mut names = Self::default();
        for entry in entries {
            match &entry.body {
                Body::Update { update_id, command, .. } => {
                    names.updates.insert((entry.project_id, *update_id));
                    names.lead(command.lead_id, command.process_id, command.reference_id.as_deref());
                }
                Body::CallStarted(CallStarted { lead_id, process_id, reference_id, .. })
                | Body::CallEnded(CallEnded { lead_id, process_id, reference_id, .. }) => {
                    names.lead(*lead_id, *process_id, reference_id.as_deref());
                }
                Body::CallExpired(CallExpired { lead_id }) => names.lead(Some(*lead_id), None, None),
            }
        }
        names
    }

    fn lead(&mut self, lead_id: Option<ObjectId>, process_id: Option<ObjectId>, reference_id: Option<&str>) {
        match (lead_id, process_id, reference_id) {
            (Some(lead_id), ..) => {
                self.leads.insert(lead_id);
            }
            // A longer one is in no lead; it is not looked for.
            (None, Some(process_id), Some(reference_id)) if reference_id.chars().count() <= MAX_TEXT_CHARS => {
                self.references.insert((process_id, reference_id.to_owned()));
            }
            _ => {}
        }
    }
}

/// Decides a batch. `applied_at` is the time that the outcomes carry; decisions go by the log's time.
pub fn fold(world: World, entries: Vec<Entry>, applied_at: Timestamp, limits: Limits) -> Plan {
    let mut folding = Folding {
        world,
        applied_at,
        limits,
        plan: Plan::default(),
        changed: BTreeSet::new(),
        calls_changed: BTreeSet::new(),
        held_changed: BTreeSet::new(),
        newly_held: BTreeMap::new(),
    };
    for entry in entries {
        folding.enter(entry);
    }
    folding.plan()
}

/// A batch that is being decided.
struct Folding {
    /// As it is after the entries so far.
    world: World,
    applied_at: Timestamp,
    limits: Limits,
    plan: Plan,
    changed: BTreeSet<ObjectId>,
    calls_changed: BTreeSet<ObjectId>,
    held_changed: BTreeSet<ObjectId>,
    /// What this batch holds, by project and update.
    newly_held: BTreeMap<(ObjectId, ObjectId), Arc<Held>>,
}

impl Folding {
    fn enter(&mut self, Entry { sequence, logged_at, project_id, body }: Entry) {
        match body {
            Body::Update { update_id, command, text, traceparent } => {
                if !self.world.known.insert((project_id, update_id)) {
                    tracing::info!(%update_id, sequence, "an update met again is not applied again");
                    return;
                }
                let epoch = self.world.epoch;
                let found =
                    self.world.find(project_id, command.lead_id, command.process_id, command.reference_id.as_deref());
                let update =
                    Update { project_id, update_id, epoch, log_seq: sequence, logged_at, command, text, traceparent };
                match found {
                    Ok(lead_id) => {
                        self.release(lead_id, sequence, logged_at);
                        self.update(lead_id, update);
                    }
                    Err(refusal) => self.conclude(update, sequence, None, Err(refusal)),
                }
            }
            Body::CallStarted(call) => {
                let found = self.world.find(project_id, call.lead_id, call.process_id, call.reference_id.as_deref());
                if let Some(lead_id) = self.lead_of_call(sequence, found) {
                    // What an expired call held is not held by the next one.
                    self.release(lead_id, sequence, logged_at);
                    self.world.start_call(lead_id, call, logged_at);
                    self.calls_changed.insert(lead_id);
                }
            }
            Body::CallEnded(call) => {
                let found = self.world.find(project_id, call.lead_id, call.process_id, call.reference_id.as_deref());
                if let Some(lead_id) = self.lead_of_call(sequence, found) {
                    let calls = self.world.calls.entry(lead_id).or_default();
                    calls.retain(|running| call.call_id.as_ref().is_some_and(|ended| *ended != running.call_id));
                    self.calls_changed.insert(lead_id);
                    self.release(lead_id, sequence, logged_at);
                }
            }
            Body::CallExpired(CallExpired { lead_id }) => {
                let found = self.world.find(project_id, Some(lead_id), None, None);
                if let Some(lead_id) = self.lead_of_call(sequence, found) {
                    self.release(lead_id, sequence, logged_at);
                }
            }
        }
    }

    /// The lead of a call event; one for nobody is a dead letter.
    fn lead_of_call(&mut self, sequence: u64, found: Result<ObjectId, Refusal>) -> Option<ObjectId> {
        found.map_err(|refusal| self.plan.dead_letters.push(unknown_lead(sequence, &refusal))).ok()
    }

    /// Decides an update, or holds it until the end of the call that it meets.
    fn update(&mut self, lead_id: ObjectId, update: Update) {
        let (lead, outcome) = self.world.decide(lead_id, &update.command, update.logged_at, self.limits);
        let queues = || self.world.rules(lead.process_id).is_some_and(|rules| rules.during_call == DuringCall::Queue);
        if outcome != Err(Refusal::CallInProgress) || !queues() {
            let decided_seq = update.log_seq;
            return self.conclude(update, decided_seq, Some(lead), outcome);
        }
        let held = self.world.held.entry(lead_id).or_default();
        let texts = held.iter().map(|held| held.update.text.get().len());
        if let Err(refusal) = room_to_hold(&lead, texts, update.text.get().len()) {
            let decided_seq = update.log_seq;
            return self.conclude(update, decided_seq, Some(lead), Err(refusal));
        }
        let new = Arc::new(Held { lead_id, update });
        held.push(new.clone());
        self.held_changed.insert(lead_id);
        self.newly_held.insert((new.update.project_id, new.update.update_id), new);
    }

    /// Decides what is held of a lead, in the order of the log, if no call holds it any more at this entry.
    fn release(&mut self, lead_id: ObjectId, sequence: u64, now: Timestamp) {
        if self.world.held.get(&lead_id).is_none_or(Vec::is_empty) || self.world.in_call(lead_id, now) {
            return;
        }
        self.held_changed.insert(lead_id);
        for held in self.world.held.remove(&lead_id).unwrap_or_default() {
            let key = (held.update.project_id, held.update.update_id);
            if self.newly_held.remove(&key).is_none() {
                self.plan.released.push(key);
            }
            let (lead, outcome) = self.world.decide(lead_id, &held.update.command, now, self.limits);
            self.conclude(Arc::unwrap_or_clone(held).update, sequence, Some(lead), outcome);
        }
    }

    /// Notes what became of an update of this lead.
    fn conclude(
        &mut self,
        update: Update,
        decided_seq: u64,
        found: Option<Arc<Lead>>,
        outcome: Result<Change, Refusal>,
    ) {
        let event = completion(&update, found.as_deref(), &outcome, self.applied_at);
        if let Ok(change) = outcome {
            self.changed.insert(change.lead.lead_id);
            self.world.leads.insert(change.lead.lead_id, Arc::new(change.lead));
        }
        let Update { epoch, log_seq, logged_at, command, text, traceparent, .. } = update;
        self.plan.rows.push(LedgerRow {
            epoch,
            log_seq,
            logged_at,
            decided_seq,
            command: text,
            api_key_id: command.api_key_id,
            disposition: command.disposition,
            traceparent,
            event,
        });
    }

    fn plan(self) -> Plan {
        let Self { mut world, mut plan, changed, calls_changed, held_changed, newly_held, .. } = self;
        plan.leads = changed.iter().filter_map(|lead_id| world.leads.remove(lead_id)).collect();
        let calls = |lead_id| (lead_id, world.calls.remove(&lead_id).unwrap_or_default());
        plan.calls = calls_changed.into_iter().map(calls).collect();
        let held = |lead_id| (lead_id, world.held.remove(&lead_id).unwrap_or_default());
        plan.held = held_changed.into_iter().map(held).collect();
        plan.newly_held = newly_held.into_values().collect();
        plan
    }
}

impl World {
    /// The lead that a message of this project addresses.
    fn find(
        &self,
        project_id: ObjectId,
        lead_id: Option<ObjectId>,
        process_id: Option<ObjectId>,
        reference_id: Option<&str>,
    ) -> Result<ObjectId, Refusal> {
        let found = match (lead_id, process_id, reference_id) {
            (None, _, None) => return Err(Refusal::AddressMissing),
            (None, None, Some(_)) => return Err(Refusal::ProcessMissing),
            (None, Some(process_id), Some(reference_id)) => {
                // Looked up by a tuple of owned values; made only for commands without a leadId.
                self.references.get(&(process_id, reference_id.to_owned())).copied()
            }
            (Some(lead_id), ..) => Some(lead_id),
        };
        // A lead of another project does not exist for this caller.
        let lead = found
            .and_then(|lead_id| self.leads.get(&lead_id))
            .filter(|lead| lead.project_id == project_id)
            .ok_or(Refusal::LeadNotFound)?;
        let same_reference = reference_id.is_none_or(|reference| lead.reference_id.as_deref() == Some(reference));
        let same_process = process_id.is_none_or(|process| lead.process_id == process);
        if same_reference && same_process { Ok(lead.lead_id) } else { Err(Refusal::AddressMismatch) }
    }

    fn rules(&self, process_id: ObjectId) -> Option<&Rules> {
        self.rules.get(&process_id).map(Arc::as_ref)
    }

    fn in_call(&self, lead_id: ObjectId, now: Timestamp) -> bool {
        in_call(self.calls.get(&lead_id).map_or(&[][..], Vec::as_slice), now)
    }

    /// Decides an update of a lead that was found; also returns the lead.
    fn decide(
        &self,
        lead_id: ObjectId,
        command: &UpdateCommand,
        now: Timestamp,
        limits: Limits,
    ) -> (Arc<Lead>, Result<Change, Refusal>) {
        let lead = &self.leads[&lead_id];
        let calls = self.calls.get(&lead_id).map_or(&[][..], Vec::as_slice);
        let rules = self.rules.get(&lead.process_id).cloned().unwrap_or_default();
        (lead.clone(), decide(lead, calls, command, &rules, now, limits))
    }

    fn start_call(&mut self, lead_id: ObjectId, call: CallStarted, logged_at: Timestamp) {
        let rules = self.leads.get(&lead_id).and_then(|lead| self.rules.get(&lead.process_id));
        let timeout = call.timeout_seconds.unwrap_or_else(|| rules.map_or(0, |rules| rules.call_timeout_seconds));
        let call = Call {
            call_id: call.call_id.unwrap_or_default(),
            started_at: logged_at,
            expires_at: logged_at.plus(Duration::from_secs(timeout.into())),
        };
        let calls = self.calls.entry(lead_id).or_default();
        // What expired is no longer needed to decide anything that comes later in the log.
        calls.retain(|running| running.call_id != call.call_id && logged_at < running.expires_at);
        calls.push(call);
    }
}

fn unknown_lead(sequence: u64, refusal: &Refusal) -> DeadLetter {
    DeadLetter { sequence, reason: DeadLetterReason::UnknownLead, error: refusal.to_string() }
}

fn completion(
    update: &Update,
    found: Option<&Lead>,
    outcome: &Result<Change, Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
    let Update { project_id, update_id, ref command, .. } = *update;
    let change = outcome.as_ref().ok();
    let refusal = outcome.as_ref().err();
    CompletionEvent {
        update_id,
        project_id,
        process_id: found.map(|lead| lead.process_id),
        lead_id: found.map(|lead| lead.lead_id).or(command.lead_id),
        reference_id: match found {
            Some(lead) => lead.reference_id.clone(),
            None => command.reference_id.as_ref().map(|text| text.chars().take(MAX_TEXT_CHARS).collect()),
        },
        success: change.is_some(),
        error: refusal.map(ToString::to_string),
        error_code: refusal.map(|refusal| refusal.code().to_owned()),
        from_state: found.map(|lead| lead.state.clone()),
        to_state: change.map(|change| change.lead.state.clone()),
        version: change.map(|change| change.lead.version),
        user_id: command.user_id.as_ref().map(|text| text.chars().take(MAX_TEXT_CHARS).collect()),
        warnings: change.map(|change| change.warnings.clone()).unwrap_or_default(),
        timestamp: applied_at,
        data: change.map(|change| change.lead.metadata.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([2; 12]);
    const PROCESS: ObjectId = ObjectId::from_bytes([3; 12]);
    const LEAD: ObjectId = ObjectId::from_bytes([1; 12]);
    const AT: Timestamp = Timestamp::from_millis(9_000_000);

    fn object(text: &str) -> JsonObject {
        JsonObject::from_text(text.into()).unwrap()
    }

    fn world() -> World {
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
        };
        let rules: Rules =
            serde_json::from_str(r#"{"states":[{"name":"new"},{"name":"interested"}],"callTimeoutSeconds":10}"#)
                .unwrap();
        World {
            leads: [(LEAD, Arc::new(lead))].into(),
            references: [((PROCESS, "R".to_owned()), LEAD)].into(),
            rules: [(PROCESS, Arc::new(rules))].into(),
            ..World::default()
        }
    }

    /// An entry at second `sequence` of the log.
    fn entry(sequence: u64, body: Body) -> Entry {
        Entry { sequence, logged_at: Timestamp::from_millis(sequence as i64 * 1000), project_id: PROJECT, body }
    }

    fn update(sequence: u64, id: u8, command: UpdateCommand) -> Entry {
        let body = Body::Update {
            update_id: ObjectId::from_bytes([id; 12]),
            command: Box::new(command),
            text: JsonObject::empty(),
            traceparent: None,
        };
        entry(sequence, body)
    }

    fn merge(text: &str) -> UpdateCommand {
        UpdateCommand { lead_id: Some(LEAD), metadata: Some(object(text)), ..Default::default() }
    }

    fn run(entries: Vec<Entry>) -> Plan {
        fold(world(), entries, AT, Limits { metadata_bytes: 1000 })
    }

    fn codes(plan: &Plan) -> Vec<&str> {
        plan.rows.iter().map(|row| row.event.error_code.as_deref().unwrap_or("ok")).collect()
    }

    #[test]
    fn updates_of_one_lead_build_on_each_other() {
        let plan = run(vec![
            update(1, 1, merge(r#"{"a":1}"#)),
            update(2, 2, UpdateCommand { target_state: Some("gone".into()), ..merge(r#"{"x":1}"#) }),
            update(3, 3, merge(r#"{"b":2}"#)),
        ]);
        assert_eq!(codes(&plan), ["ok", "unknown_state", "ok"]);
        let data: Vec<_> = plan.rows.iter().map(|row| row.event.data.as_ref().map(|d| d.get().to_owned())).collect();
        assert_eq!(data, [Some(r#"{"a":1}"#.into()), None, Some(r#"{"a":1,"b":2}"#.into())]);
        assert_eq!(plan.leads.len(), 1);
        assert_eq!((plan.leads[0].metadata.get(), plan.leads[0].version), (r#"{"a":1,"b":2}"#, 3));
    }

    #[test]
    fn an_update_met_twice_counts_once() {
        let plan = run(vec![update(1, 1, merge(r#"{"a":1}"#)), update(2, 1, merge(r#"{"a":2}"#))]);
        assert_eq!(codes(&plan), ["ok"]);
        assert_eq!(plan.leads[0].metadata.get(), r#"{"a":1}"#);

        let mut world = world();
        world.known.insert((PROJECT, ObjectId::from_bytes([1; 12])));
        let plan = fold(world, vec![update(1, 1, merge("{}"))], AT, Limits { metadata_bytes: 1000 });
        assert!(plan.rows.is_empty() && plan.leads.is_empty());
    }

    #[test]
    fn calls_refuse_between_their_start_and_their_end_or_expiry() {
        let start = |sequence, call: Option<&str>| {
            let call = CallStarted { lead_id: Some(LEAD), call_id: call.map(Into::into), ..Default::default() };
            entry(sequence, Body::CallStarted(call))
        };
        let end = |sequence, call: Option<&str>| {
            let call = CallEnded {
                reference_id: Some("R".into()),
                process_id: Some(PROCESS),
                call_id: call.map(Into::into),
                ..Default::default()
            };
            entry(sequence, Body::CallEnded(call))
        };
        let plan = run(vec![
            start(1, Some("a")),
            start(1, Some("b")),
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
        assert_eq!(plan.calls[0].1.len(), 1, "the expired call stays until somebody sweeps it");
    }

    #[test]
    fn what_a_call_holds_is_decided_where_it_ends_and_before_what_comes_later() {
        let mut world = world();
        let mut rules = world.rules[&PROCESS].as_ref().clone();
        rules.during_call = DuringCall::Queue;
        world.rules.insert(PROCESS, Arc::new(rules));
        world.epoch = 3;
        let start = |sequence, call: Option<&str>| {
            let call = CallStarted { lead_id: Some(LEAD), call_id: call.map(Into::into), ..Default::default() };
            entry(sequence, Body::CallStarted(call))
        };
        let end = |sequence, call: Option<&str>| {
            let call = CallEnded { lead_id: Some(LEAD), call_id: call.map(Into::into), ..Default::default() };
            entry(sequence, Body::CallEnded(call))
        };
        let expired = |sequence| entry(sequence, Body::CallExpired(CallExpired { lead_id: LEAD }));
        let limits = Limits { metadata_bytes: 1000 };

        // The first batch ends while one of two calls is in progress.
        let first = vec![
            start(1, Some("a")),
            start(2, Some("b")),
            update(3, 1, merge(r#"{"a":1}"#)),
            end(4, Some("a")),
            expired(5),
            update(6, 2, merge(r#"{"a":2}"#)),
        ];
        let plan = fold(world.clone(), first, AT, limits);
        assert!(plan.rows.is_empty() && plan.leads.is_empty() && plan.released.is_empty());
        assert_eq!(plan.newly_held.iter().map(|held| held.update.log_seq).collect::<Vec<_>>(), [3, 6]);
        assert_eq!(plan.held[0].1, plan.newly_held);

        // In the second it ends by its time: the entry behind that is decided after what was held.
        world.calls.extend(plan.calls);
        world.held.extend(plan.held);
        let plan = fold(world.clone(), vec![update(12, 3, merge(r#"{"b":3}"#)), end(13, None)], AT, limits);
        let places: Vec<_> = plan.rows.iter().map(|row| (row.epoch, row.log_seq, row.decided_seq)).collect();
        assert_eq!(places, [(3, 3, 12), (3, 6, 12), (3, 12, 12)]);
        assert_eq!(plan.leads[0].metadata.get(), r#"{"a":2,"b":3}"#);
        assert_eq!((plan.released.len(), plan.newly_held.len(), plan.held[0].1.len()), (2, 0, 0));

        // Or the log says so, and a call that begins in the same moment holds nothing of before.
        let plan = fold(
            world.clone(),
            vec![expired(11), expired(12), start(12, None), update(13, 3, merge("{}"))],
            AT,
            limits,
        );
        assert_eq!(plan.rows.iter().map(|row| row.decided_seq).collect::<Vec<_>>(), [12, 12]);
        assert_eq!(plan.newly_held.len(), 1);

        // What is held and let go in one batch is never written as held.
        let batch = vec![start(13, None), update(14, 4, merge("{}")), end(15, None)];
        let plan = fold(World { held: HashMap::new(), calls: HashMap::new(), ..world }, batch, AT, limits);
        assert_eq!((plan.rows.len(), plan.newly_held.len(), plan.released.len()), (1, 0, 0));
    }

    #[test]
    fn addresses() {
        let by_reference = UpdateCommand {
            reference_id: Some("R".into()),
            process_id: Some(PROCESS),
            name: Some("x".into()),
            ..Default::default()
        };
        let plan = run(vec![
            update(1, 1, by_reference.clone()),
            update(2, 2, UpdateCommand { lead_id: Some(LEAD), ..by_reference.clone() }),
            update(3, 3, UpdateCommand { reference_id: Some("other".into()), ..merge("{}") }),
            update(4, 4, UpdateCommand { process_id: Some(LEAD), ..merge("{}") }),
            update(5, 5, UpdateCommand { process_id: None, ..by_reference.clone() }),
            update(6, 6, UpdateCommand { reference_id: None, ..by_reference.clone() }),
            update(7, 7, UpdateCommand { reference_id: Some("none".into()), ..by_reference.clone() }),
            Entry { project_id: PROCESS, ..update(8, 8, merge("{}")) },
        ]);
        assert_eq!(
            codes(&plan),
            [
                "ok",
                "ok",
                "address_mismatch",
                "address_mismatch",
                "process_missing",
                "address_missing",
                "lead_not_found",
                "lead_not_found"
            ]
        );
        let strangers = &plan.rows[7].event;
        assert_eq!((strangers.process_id, strangers.lead_id, &strangers.reference_id), (None, Some(LEAD), &None));
    }

    #[test]
    fn a_call_event_for_nobody_is_a_dead_letter() {
        let call = CallStarted { lead_id: Some(PROJECT), ..Default::default() };
        let plan = run(vec![entry(4, Body::CallStarted(call))]);
        assert_eq!(plan.dead_letters.len(), 1);
        assert_eq!((plan.dead_letters[0].sequence, plan.dead_letters[0].reason), (4, DeadLetterReason::UnknownLead));
    }

    #[test]
    fn what_a_batch_names_is_what_is_read() {
        let long = "x".repeat(MAX_TEXT_CHARS + 1);
        let names = Names::of(&[
            update(1, 1, merge("{}")),
            update(
                2,
                1,
                UpdateCommand { reference_id: Some("R".into()), process_id: Some(PROCESS), ..Default::default() },
            ),
            update(3, 4, UpdateCommand { reference_id: Some(long), process_id: Some(PROCESS), ..Default::default() }),
        ]);
        assert_eq!(names.leads, [LEAD].into());
        assert_eq!(names.references, [(PROCESS, "R".to_owned())].into());
        assert_eq!(names.updates.len(), 2);
    }
}
