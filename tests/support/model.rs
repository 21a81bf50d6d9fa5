//! The reference model applies the domain rules to a log in the simplest way: on JSON values, one message after the
//! other, without batches and without a database. It shares only the format of ids with lead-state.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use contract::{ObjectId, Timestamp, pack, subject::PACKS};
use serde_json::{Map, Value};

/// A sequence of the log, and the index in its pack.
pub(crate) type Place = (u64, u32);

/// A lead.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lead {
    pub(crate) project_id: String,
    pub(crate) process_id: String,
    pub(crate) reference_id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) state: String,
    pub(crate) disposition: Option<String>,
    pub(crate) metadata: Value,
    pub(crate) version: i64,
}

/// The outcome of an update or a call event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) error: Option<String>,
    /// The lead's metadata after the update. `None` for a failure and for a call event.
    pub(crate) data: Option<Value>,
    pub(crate) place: Place,
}

/// A queued update.
#[derive(Debug, Clone)]
pub(crate) struct QueuedUpdate {
    /// Its project and id.
    pub(crate) key: (String, String),
    command: Command,
    place: Place,
}

/// The state after the messages that the model was fed.
#[derive(Debug, Default)]
pub(crate) struct Model {
    /// Process specifications, as they were applied, by process id.
    pub(crate) processes: HashMap<String, Value>,
    pub(crate) leads: HashMap<String, Lead>,
    /// Outcomes by project and update.
    pub(crate) outcomes: HashMap<(String, String), Outcome>,
    pub(crate) dead_letters: HashSet<Place>,
    /// The number of repeated updates.
    pub(crate) repeated: u64,
    /// The time at which each call expires, in milliseconds, by lead and call.
    calls: HashMap<String, HashMap<String, i64>>,
    /// Queued updates by lead, in log order.
    pub(crate) queued: HashMap<String, Vec<QueuedUpdate>>,
    pub(crate) erased: HashSet<String>,
    /// The updates and call events that were erased with their leads.
    erased_updates: HashSet<(String, String)>,
    /// The updates and call events of each lead.
    of_leads: HashMap<String, Vec<(String, String)>>,
}

impl Model {
    /// Applies the next message of the log.
    pub(crate) fn feed(&mut self, sequence: u64, logged_at: Timestamp, subject: &str, payload: &[u8]) {
        if subject != PACKS {
            return self.feed_entry((sequence, 0), logged_at, subject, payload);
        }
        let commands = pack::read(&Bytes::copy_from_slice(payload)).expect("a pack");
        for (index, command) in (0..).zip(commands) {
            self.feed_entry((sequence, index), logged_at, &command.subject, &command.payload);
        }
    }

    fn feed_entry(&mut self, place: Place, logged_at: Timestamp, subject: &str, payload: &[u8]) {
        if self.apply(place, logged_at, subject, payload).is_none() {
            self.dead_letters.insert(place);
        }
    }

    /// Returns `None` if the message is a dead letter.
    fn apply(&mut self, place: Place, logged_at: Timestamp, subject: &str, payload: &[u8]) -> Option<()> {
        let (project, kind) = subject.strip_prefix("leads.cmd.")?.split_once('.')?;
        if !is_id(project)
            || !["update", "call.started", "call.ended", "call.expired", "erase", "lead.created"].contains(&kind)
        {
            return None;
        }
        let message = serde_json::from_slice::<Value>(payload).ok()?;
        let message = message.as_object()?;
        let lead_id = id(message, "leadId")?;
        let process_id = id(message, "processId")?;
        let reference_id = text(message, "referenceId")?;
        let lead = self.find(project, lead_id.as_deref(), process_id.as_deref(), reference_id.as_deref());
        match kind {
            "erase" => {
                let (lead_id, update_id) = (lead_id?, id(message, "updateId")?);
                id(message, "apiKeyId")?;
                let Some(key) = self.new_key(project, update_id, place, logged_at) else { return Some(()) };
                let is_erased = self.erased.contains(&lead_id);
                let error = lead.err().filter(|_| !is_erased);
                if error.is_none() {
                    self.release(&lead_id, logged_at);
                    self.erase(&lead_id);
                }
                self.outcomes.insert(key, Outcome { error, data: None, place });
            }
            "lead.created" => {
                let (lead_id, update_id) = (lead_id?, id(message, "updateId")??);
                text(message, "state")??;
                let metadata = message.get("metadata")?.as_object()?.clone();
                let Some(key) = self.new_key(project, Some(update_id), place, logged_at) else { return Some(()) };
                if lead.is_ok() {
                    self.of_leads.entry(lead_id).or_default().push(key.clone());
                }
                self.record_outcome(key, place, lead.map(|_| Value::Object(metadata)));
            }
            "update" => {
                let update_id = id(message, "updateId")?;
                id(message, "apiKeyId")?;
                let command = Command {
                    name: text(message, "name")?,
                    target_state: text(message, "targetState")?,
                    disposition: text(message, "disposition")?,
                    user_id: text(message, "userId")?,
                    expected_version: match message.get("expectedVersion") {
                        None | Some(Value::Null) => None,
                        Some(version) => Some(u32::try_from(version.as_u64()?).ok()?.into()),
                    },
                    expected_state: text(message, "expectedState")?,
                    metadata: match message.get("metadata") {
                        None | Some(Value::Null) => None,
                        Some(metadata) => Some(metadata.as_object()?.clone()),
                    },
                };
                let Some(key) = self.new_key(project, update_id, place, logged_at) else { return Some(()) };
                match lead {
                    Err(error) => self.record_outcome(key, place, Err(error)),
                    Ok(lead_id) => {
                        self.of_leads.entry(lead_id.clone()).or_default().push(key.clone());
                        self.release(&lead_id, logged_at);
                        if !self.in_call(&lead_id, logged_at) {
                            let changed = self.update(&lead_id, command);
                            self.record_outcome(key, place, changed);
                        } else if self.rules(&lead_id)["duringCall"] != "queue" {
                            let error = "Lead update is not allowed while a call is in progress for this lead";
                            self.record_outcome(key, place, Err(error.into()));
                        } else {
                            let queued = self.queued.entry(lead_id).or_default();
                            if queued.len() < 256 {
                                queued.push(QueuedUpdate { key, command, place });
                            } else {
                                let error =
                                    "256 updates of this lead are queued until its call ends, and the queue is full";
                                self.record_outcome(key, place, Err(error.into()));
                            }
                        }
                    }
                }
            }
            "call.started" => {
                let call_id = text(message, "callId")?.unwrap_or_default();
                let timeout = match message.get("timeoutSeconds") {
                    None | Some(Value::Null) => None,
                    Some(seconds) => Some(u32::try_from(seconds.as_u64()?).ok()?),
                };
                let update_id = id(message, "updateId")?;
                id(message, "apiKeyId")?;
                let Some(key) = self.new_key(project, update_id, place, logged_at) else { return Some(()) };
                self.record_call(key, place, &lead);
                let Ok(lead_id) = lead else { return Some(()) };
                self.release(&lead_id, logged_at);
                let configured = || self.rules(&lead_id)["callTimeoutSeconds"].as_u64().unwrap_or(2 * 60 * 60);
                let seconds = timeout.map_or_else(configured, u64::from);
                let end = logged_at.millis() + seconds as i64 * 1000;
                self.calls.entry(lead_id).or_default().insert(call_id, end);
            }
            "call.ended" => {
                let call_id = text(message, "callId")?;
                let update_id = id(message, "updateId")?;
                id(message, "apiKeyId")?;
                let to_state = text(message, "toState")?;
                let result = match message.get("result") {
                    None | Some(Value::Null) => Map::new(),
                    Some(result) => result.as_object()?.clone(),
                };
                text(&result, "status")?;
                let disposition = text(&result, "disposition")?;
                let Some(key) = self.new_key(project, update_id, place, logged_at) else { return Some(()) };
                self.record_call(key, place, &lead);
                let Ok(lead_id) = lead else { return Some(()) };
                let calls = self.calls.entry(lead_id.clone()).or_default();
                match call_id {
                    Some(call_id) => drop(calls.remove(&call_id)),
                    None => calls.clear(),
                }
                self.release(&lead_id, logged_at);
                // The call has ended, even if the lead cannot move.
                if to_state.is_some() && !self.in_call(&lead_id, logged_at) {
                    let command = Command { target_state: to_state, disposition, ..Command::default() };
                    drop(self.update(&lead_id, command));
                }
            }
            _ => match lead {
                // The lead's call was in progress when the lead was erased.
                Err(_) if self.erased.contains(&lead_id?) => {}
                lead => self.release(&lead.ok()?, logged_at),
            },
        }
        Some(())
    }

    /// The key of an update or a call event, or `None` if it was already decided or queued.
    fn new_key(
        &mut self,
        project: &str,
        id: Option<String>,
        (sequence, index): Place,
        logged_at: Timestamp,
    ) -> Option<(String, String)> {
        let id = id.unwrap_or_else(|| ObjectId::from_log(sequence, index, logged_at).to_string());
        let key = (project.to_lowercase(), id);
        if self.outcomes.contains_key(&key) || self.queued.values().flatten().any(|queued| queued.key == key) {
            self.repeated += 1;
            return None;
        }
        Some(key)
    }

    fn find(
        &self,
        project: &str,
        lead_id: Option<&str>,
        process_id: Option<&str>,
        reference_id: Option<&str>,
    ) -> Result<String, String> {
        let found = match (lead_id, process_id, reference_id) {
            (Some(lead_id), ..) => self.leads.get_key_value(lead_id),
            (None, _, None) => return Err("Either leadId or referenceId is required".into()),
            (None, None, Some(_)) => return Err("processId is required when using referenceId".into()),
            (None, Some(process), Some(reference)) => self
                .leads
                .iter()
                .find(|(_, lead)| lead.process_id == process && lead.reference_id.as_deref() == Some(reference)),
        };
        let (found_id, lead) =
            found.filter(|(_, lead)| lead.project_id == project.to_lowercase()).ok_or("Lead not found")?;
        if self.erased.contains(found_id) {
            return Err("Lead was erased".into());
        }
        let other_reference = reference_id.is_some() && reference_id != lead.reference_id.as_deref();
        let other_process = process_id.is_some_and(|process| process != lead.process_id);
        if other_reference || other_process {
            return Err("leadId and referenceId name different leads".into());
        }
        Ok(found_id.clone())
    }

    fn rules(&self, lead_id: &str) -> &Value {
        &self.processes[&self.leads[lead_id].process_id]
    }

    fn in_call(&self, lead_id: &str, now: Timestamp) -> bool {
        self.calls.get(lead_id).is_some_and(|calls| calls.values().any(|end| now.millis() < *end))
    }

    /// Decides queued updates when no call is left.
    fn release(&mut self, lead_id: &str, now: Timestamp) {
        if !self.in_call(lead_id, now) {
            for QueuedUpdate { key, command, place } in self.queued.remove(lead_id).unwrap_or_default() {
                let changed = self.update(lead_id, command);
                self.record_outcome(key, place, changed);
            }
        }
    }

    /// The outcome that the ledger contains. It differs from the decided one once the lead is erased.
    pub(crate) fn stored_outcome(&self, key: &(String, String)) -> Option<Outcome> {
        let outcome = self.outcomes.get(key)?.clone();
        if !self.erased_updates.contains(key) {
            return Some(outcome);
        }
        let error = outcome.error.map(|_| "erased with the lead".into());
        Some(Outcome { error, data: None, ..outcome })
    }

    fn record_outcome(&mut self, key: (String, String), place: Place, changed: Result<Value, String>) {
        let (error, data) = match changed {
            Ok(metadata) => (None, Some(metadata)),
            Err(error) => (Some(error), None),
        };
        self.outcomes.insert(key, Outcome { error, data, place });
    }

    /// Erases the data of a lead and its updates. Queued updates fail.
    fn erase(&mut self, lead_id: &str) {
        self.erased_updates.extend(self.of_leads.remove(lead_id).unwrap_or_default());
        for QueuedUpdate { key, place, .. } in self.queued.remove(lead_id).unwrap_or_default() {
            self.record_outcome(key, place, Err("Lead was erased".into()));
        }
        self.calls.remove(lead_id);
        let lead = self.leads.get_mut(lead_id).expect("a lead");
        (lead.reference_id, lead.name, lead.disposition) = (None, None, None);
        lead.metadata = Value::Object(Map::new());
        self.erased.insert(lead_id.to_owned());
    }

    fn record_call(&mut self, key: (String, String), place: Place, lead: &Result<String, String>) {
        if let Ok(lead_id) = lead {
            self.of_leads.entry(lead_id.clone()).or_default().push(key.clone());
        }
        self.outcomes.insert(key, Outcome { error: lead.clone().err(), data: None, place });
    }

    /// The metadata after the update, or the error.
    fn update(&mut self, lead_id: &str, command: Command) -> Result<Value, String> {
        if command.name.is_none() && command.target_state.is_none() && command.metadata.is_none() {
            return Err("Nothing to change: give metadata, name or targetState".into());
        }
        let texts = [
            ("name", &command.name),
            ("targetState", &command.target_state),
            ("disposition", &command.disposition),
            ("userId", &command.user_id),
            ("expectedState", &command.expected_state),
        ];
        for (field, text) in texts {
            if text.as_ref().is_some_and(|text| text.chars().count() > 1024) {
                return Err(format!("{field} is longer than 1024 characters"));
            }
        }
        let rules = self.rules(lead_id).clone();
        let mut lead = self.leads[lead_id].clone();
        if let Some(expected) = command.expected_version.filter(|expected| lead.version != *expected) {
            return Err(format!("Lead is at version {}, not at the expected version {expected}", lead.version));
        }
        if let Some(expected) = command.expected_state.filter(|expected| lead.state != *expected) {
            return Err(format!("Lead is in the state {:?}, not in the expected state {expected:?}", lead.state));
        }
        if let Some(target) = command.target_state {
            let state = |name: &str| {
                rules["states"].as_array().and_then(|states| states.iter().find(|state| state["name"] == name))
            };
            let Some(to) = state(&target) else {
                return Err(format!("targetState {target:?} is not a state of the lead's process"));
            };
            if lead.state != target {
                let terminal = state(&lead.state).is_some_and(|state| state["kind"] == "terminal");
                if terminal && rules["allowLeavingTerminal"] != true {
                    let from = &lead.state;
                    return Err(format!("Lead is in the terminal state {from:?} and cannot be moved to {target:?}"));
                }
                if let Some(transitions) = rules["transitions"].as_object() {
                    let allowed = transitions.get(&lead.state).and_then(Value::as_array);
                    if !allowed.is_some_and(|allowed| allowed.contains(&Value::from(target.as_str()))) {
                        return Err(format!("Transition from {:?} to {target:?} is not allowed", lead.state));
                    }
                }
            }
            if let Some(disposition) = command.disposition {
                let takes = to["takesDisposition"].as_bool();
                if takes.unwrap_or(target == "interested" || target == "lost") {
                    lead.disposition = Some(disposition);
                }
            }
            lead.state = target;
        }
        if let Some(name) = command.name {
            lead.name = Some(name);
        }
        if let Some(metadata) = command.metadata {
            if rules["metadataMerge"] == "deep" {
                patch(&mut lead.metadata, Value::Object(metadata));
            } else if let Some(members) = lead.metadata.as_object_mut() {
                members.extend(metadata);
            }
        }
        lead.version += 1;
        let metadata = lead.metadata.clone();
        self.leads.insert(lead_id.into(), lead);
        Ok(metadata)
    }
}

#[derive(Debug, Clone, Default)]
struct Command {
    name: Option<String>,
    target_state: Option<String>,
    disposition: Option<String>,
    user_id: Option<String>,
    expected_version: Option<i64>,
    expected_state: Option<String>,
    metadata: Option<Map<String, Value>>,
}

/// JSON Merge Patch, as RFC 7396 writes it in pseudo code.
fn patch(target: &mut Value, with: Value) {
    let Value::Object(with) = with else {
        *target = with;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (name, value) in with {
        if value.is_null() {
            target.as_object_mut().expect("an object").remove(&name);
        } else {
            patch(&mut target[name], value);
        }
    }
}

fn is_id(text: &str) -> bool {
    text.len() == 24 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A member that must be an id if it exists. `None` if it is anything else.
fn id(message: &Map<String, Value>, name: &str) -> Option<Option<String>> {
    match text(message, name)? {
        Some(id) if is_id(&id) => Some(Some(id.to_lowercase())),
        Some(_) => None,
        None => Some(None),
    }
}

/// A member that must be a text if it exists. `None` if it is anything else.
fn text(message: &Map<String, Value>, name: &str) -> Option<Option<String>> {
    match message.get(name) {
        None | Some(Value::Null) => Some(None),
        Some(Value::String(text)) => Some(Some(text.clone())),
        Some(_) => None,
    }
}
