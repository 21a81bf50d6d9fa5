//! 4 Decide: a batch of log entries, decided one after another on what was read of the database. Pure.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use contract::{
    JsonObject, ObjectId, Timestamp,
    command::{CallEnded, CallStarted, MAX_TEXT_CHARS, UpdateCommand},
    event::CompletionEvent,
    process::Rules,
    subject::DeadLetterReason,
};

use crate::{
    decide::{Call, Change, Lead, Limits, Refusal, decide},
    entry::{Body, DeadLetter, Entry},
};

/// What the database holds of all that a batch names.
#[derive(Debug, Default)]
pub struct World {
    /// Leads by id.
    pub leads: HashMap<ObjectId, Lead>,
    /// Leads by process and external id.
    pub references: HashMap<(ObjectId, String), ObjectId>,
    /// Calls by lead.
    pub calls: HashMap<ObjectId, Vec<Call>>,
    /// Rules by process.
    pub rules: HashMap<ObjectId, Arc<Rules>>,
    /// Updates of the batch that are in the ledger already, by project.
    pub known: HashSet<(ObjectId, ObjectId)>,
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
    /// The command's place in the log.
    pub log_seq: u64,
    /// When the log stored it.
    pub logged_at: Timestamp,
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
    pub leads: Vec<Lead>,
    /// The leads whose calls changed, with all their calls, by id.
    pub calls: Vec<(ObjectId, Vec<Call>)>,
    /// One row per update that was not in the ledger, in log order.
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
pub fn fold(mut world: World, entries: Vec<Entry>, applied_at: Timestamp, limits: Limits) -> Plan {
    let mut plan = Plan::default();
    let mut changed = BTreeSet::new();
    let mut calls_changed = BTreeSet::new();
    for entry in entries {
        let Entry { sequence, logged_at, project_id, body } = entry;
        match body {
            Body::Update { update_id, command, text, traceparent } => {
                if !world.known.insert((project_id, update_id)) {
                    tracing::info!(%update_id, sequence, "an update met again is not applied again");
                    continue;
                }
                let (found, outcome) = world.update(project_id, &command, logged_at, limits);
                let event = completion(project_id, update_id, &command, found.as_ref(), &outcome, applied_at);
                if let Ok(change) = outcome {
                    changed.insert(change.lead.lead_id);
                    world.leads.insert(change.lead.lead_id, change.lead);
                }
                plan.rows.push(LedgerRow {
                    log_seq: sequence,
                    logged_at,
                    command: text,
                    api_key_id: command.api_key_id,
                    disposition: command.disposition,
                    traceparent,
                    event,
                });
            }
            Body::CallStarted(call) => {
                match world.find(project_id, call.lead_id, call.process_id, call.reference_id.as_deref()) {
                    Ok(lead_id) => {
                        world.start_call(lead_id, call, logged_at);
                        calls_changed.insert(lead_id);
                    }
                    Err(e) => plan.dead_letters.push(unknown_lead(sequence, &e)),
                }
            }
            Body::CallEnded(call) => {
                match world.find(project_id, call.lead_id, call.process_id, call.reference_id.as_deref()) {
                    Ok(lead_id) => {
                        let calls = world.calls.entry(lead_id).or_default();
                        calls.retain(|running| call.call_id.as_ref().is_some_and(|ended| *ended != running.call_id));
                        calls_changed.insert(lead_id);
                    }
                    Err(e) => plan.dead_letters.push(unknown_lead(sequence, &e)),
                }
            }
        }
    }
    plan.leads = changed.iter().filter_map(|lead_id| world.leads.remove(lead_id)).collect();
    plan.calls =
        calls_changed.into_iter().map(|lead_id| (lead_id, world.calls.remove(&lead_id).unwrap_or_default())).collect();
    plan
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

    /// Decides an update; also returns the lead it was for, where that was found.
    fn update(
        &self,
        project_id: ObjectId,
        command: &UpdateCommand,
        now: Timestamp,
        limits: Limits,
    ) -> (Option<Lead>, Result<Change, Refusal>) {
        let reference_id = command.reference_id.as_deref();
        let lead = match self.find(project_id, command.lead_id, command.process_id, reference_id) {
            Ok(lead_id) => &self.leads[&lead_id],
            Err(refusal) => return (None, Err(refusal)),
        };
        let calls = self.calls.get(&lead.lead_id).map_or(&[][..], Vec::as_slice);
        let rules = self.rules.get(&lead.process_id).cloned().unwrap_or_default();
        (Some(lead.clone()), decide(lead, calls, command, &rules, now, limits))
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
    project_id: ObjectId,
    update_id: ObjectId,
    command: &UpdateCommand,
    found: Option<&Lead>,
    outcome: &Result<Change, Refusal>,
    applied_at: Timestamp,
) -> CompletionEvent {
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
            leads: [(LEAD, lead)].into(),
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
