//! Random histories: what the services make of a log is what the reference model says, message by message and lead by lead.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use contract::{JsonObject, ObjectId, Timestamp, process::Rules, rpc};
use lead_state::core::{
    batch::{BatchState, LeadKeys, UpdateKey, decide_batch},
    decide::{Lead, Limits},
    entry::{LogMessage, parse},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use sqlx::{PgPool, Row};

use crate::{
    model::{self, Model},
    stack::{Api, SOON, Stack, call},
};

/// Whose updates are made up: a process with its leads, and one lead that nobody has.
#[derive(Debug, Clone)]
pub(crate) struct Leads {
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: ObjectId,
    /// Ids and references.
    pub(crate) leads: Vec<(String, String)>,
}

/// Two processes with other rules each: one merges shallowly and is strict, the other deeply, lets leads come back, and holds
/// updates during calls.
pub(crate) fn processes(callbacks: &Value) -> [Value; 2] {
    [
        json!({
            "name": "sales", "callbacks": callbacks, "callTimeoutSeconds": 2,
            "states": [
                {"name": "new", "kind": "initial"}, {"name": "interested"}, {"name": "followup_2"},
                {"name": "lost", "kind": "terminal"},
            ],
        }),
        json!({
            "name": "support", "callbacks": callbacks, "callTimeoutSeconds": 1, "metadataMerge": "deep",
            "allowLeavingTerminal": true, "duringCall": "queue",
            "states": [
                {"name": "new", "kind": "initial"}, {"name": "interested"},
                {"name": "followup_2", "takesDisposition": true}, {"name": "lost", "kind": "terminal"},
            ],
            "transitions": {
                "new": ["interested", "followup_2"], "interested": ["lost", "followup_2"], "followup_2": ["new"],
                "lost": ["new"],
            },
        }),
    ]
}

/// The body of an update of one of these leads: mostly one that succeeds.
pub(crate) fn update(leads: &Leads, random: &mut StdRng) -> Value {
    let mut body = address(leads, random);
    if random.random_bool(0.8) {
        let value = match random.random_range(0..4) {
            0 => Value::Null,
            1 => json!({"x": random.random_range(0..3), "y": null}),
            2 => json!([1, "ä", {"deep": true}]),
            _ => json!(random.random_range(0..1000)),
        };
        body["metadata"] = json!({ format!("k{}", random.random_range(0..6)): value });
    }
    if random.random_bool(0.2) {
        body["name"] = json!(format!("Ada {}", random.random_range(0..100)));
    }
    if random.random_bool(0.3) {
        let states = ["new", "interested", "interested", "followup_2", "followup_2", "lost", "nowhere"];
        body["targetState"] = json!(states.choose(random));
    }
    if random.random_bool(0.2) {
        body["disposition"] = json!(["hot", "cold"].choose(random));
    }
    if random.random_bool(0.3) {
        body["userId"] = json!(format!("u-{}", random.random_range(0..5)));
    }
    if random.random_bool(0.1) {
        body["expectedState"] = json!(["new", "interested"].choose(random));
    }
    if random.random_bool(0.1) {
        body["expectedVersion"] = json!(random.random_range(1..4));
    }
    body
}

fn address(leads: &Leads, random: &mut StdRng) -> Value {
    let (lead_id, reference_id) = leads.leads.choose(random).expect("a lead");
    match random.random_range(0..20) {
        0 => json!({"leadId": "00000000000000000000dead"}),
        1 => json!({"processId": leads.process_id, "referenceId": "nobody"}),
        2..=7 => json!({"processId": leads.process_id, "referenceId": reference_id}),
        _ => json!({"leadId": lead_id}),
    }
}

/// A message that an internal producer may put into the log: mostly updates, some call events, some that nobody can read.
pub(crate) fn message(leads: &Leads, at: Timestamp, random: &mut StdRng) -> (String, Bytes) {
    let project_id = leads.project_id;
    let subject = |kind: &str| format!("leads.cmd.{project_id}.{kind}");
    match random.random_range(0..100) {
        0..80 => {
            let mut body = update(leads, random);
            if random.random_bool(0.9) {
                body["updateId"] = json!(ObjectId::new(at, random.random()));
            }
            (subject("update"), body.to_string().into())
        }
        80..85 => {
            let mut body = address(leads, random);
            body["callId"] = json!(["c-1", "c-2"].choose(random));
            if random.random_bool(0.3) {
                body["timeoutSeconds"] = json!(random.random_range(0..3));
            }
            (subject("call.started"), body.to_string().into())
        }
        // A start is as likely as an end: histories with queues, and with calls that nobody ends.
        85..87 => (
            subject("call.expired"),
            json!({"leadId": leads.leads.choose(random).expect("a lead").0}).to_string().into(),
        ),
        87..93 => {
            let mut body = address(leads, random);
            if random.random_bool(0.5) {
                body["callId"] = json!("c-1");
            }
            (subject("call.ended"), body.to_string().into())
        }
        93 => (subject("update"), Bytes::from_static(b"\xff not json")),
        94 => (subject("update"), json!({"leadId": 5}).to_string().into()),
        95 if random.random_bool(0.5) => {
            (subject("update"), json!({"leadId": leads.leads[0].0, "expectedVersion": -1}).to_string().into())
        }
        95 => (subject("update"), json!({"metadata": "text", "leadId": leads.leads[0].0}).to_string().into()),
        96 => (subject("update"), json!({"leadId": leads.leads[0].0}).to_string().into()),
        97 => (subject("update"), json!([update(leads, random)]).to_string().into()),
        98 => (subject("deleted"), Bytes::from_static(b"{}")),
        _ => ("leads.cmd.somebody.update".into(), update(leads, random).to_string().into()),
    }
}

/// What the database holds differs from what the model says: a line each.
pub(crate) async fn differences(pool: &PgPool, model: &Model) -> Vec<String> {
    let mut found = Vec::new();
    let rows = sqlx::query(
        "SELECT encode(lead_id, 'hex') AS id, name, state, disposition, metadata, version FROM lead_state.leads",
    )
    .fetch_all(pool)
    .await
    .expect("the leads");
    assert_eq!(rows.len(), model.leads.len(), "leads");
    for row in rows {
        let id: String = row.get("id");
        let lead = &model.leads[&id];
        let stored = model::Lead {
            name: row.get("name"),
            state: row.get("state"),
            disposition: row.get("disposition"),
            metadata: row.get("metadata"),
            version: row.get("version"),
            ..lead.clone()
        };
        if stored != *lead {
            found.push(format!("lead {id} is\n{stored:?}\nbut should be\n{lead:?}"));
        }
    }
    let rows = sqlx::query(
        "SELECT encode(project_id, 'hex') AS project, encode(update_id, 'hex') AS id, error, data, log_sequence
         FROM lead_state.lead_updates",
    )
    .fetch_all(pool)
    .await
    .expect("the ledger");
    let mut missing: HashMap<_, _> = model.outcomes.iter().collect();
    for row in rows {
        let key: (String, String) = (row.get("project"), row.get("id"));
        let stored = model::Outcome {
            error: row.get("error"),
            data: row.get("data"),
            log_seq: row.get::<i64, _>("log_sequence").cast_unsigned(),
        };
        match missing.remove(&key) {
            Some(outcome) if *outcome == stored => {}
            outcome => found.push(format!("update {} came out as\n{stored:?}\nbut should be\n{outcome:?}", key.1)),
        }
    }
    found
        .extend(missing.into_iter().map(|((_, id), outcome)| format!("update {id} is not in the ledger: {outcome:?}")));
    found
}

/// The model of a lead that was just initiated.
pub(crate) fn new_lead(leads: &Leads, reference_id: &str) -> model::Lead {
    model::Lead {
        project_id: leads.project_id.to_string(),
        process_id: leads.process_id.to_string(),
        reference_id: Some(reference_id.into()),
        name: Some("Ada".into()),
        state: "new".into(),
        disposition: None,
        metadata: json!({"source": "import"}),
        version: 1,
    }
}

/// Decides messages in batches, on a state that is kept as the database keeps it.
fn decide_all(
    state: &mut BatchState,
    messages: &[LogMessage],
    random: &mut StdRng,
) -> (Vec<u64>, Vec<(String, Option<String>)>) {
    let mut dead = Vec::new();
    let mut outcomes = Vec::new();
    let mut rest = messages;
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(random.random_range(1..=rest.len()));
        rest = later;
        let (entries, unreadable): (Vec<_>, Vec<_>) =
            batch.iter().map(|message| parse(message, 1)).partition(Result::is_ok);
        let entries: Vec<_> = entries.into_iter().flatten().collect();
        dead.extend(unreadable.into_iter().filter_map(Result::err).map(|dead| dead.position.sequence));
        let read = read_state(state, &LeadKeys::of(&entries));
        let plan = decide_batch(read, entries, Timestamp::from_millis(0), Limits { metadata_bytes: 1 << 20 });
        dead.extend(plan.dead_letters.iter().map(|dead| dead.position.sequence));
        state.leads.extend(plan.leads.into_iter().map(|lead| (lead.lead_id, lead)));
        state.calls.extend(plan.calls);
        for queue in state.queued.values_mut() {
            queue.retain(|queued| !plan.released.contains(&queued.update.key()));
        }
        for queued in plan.newly_queued {
            state.queued.entry(queued.lead_id).or_default().push(queued);
        }
        for queue in state.queued.values_mut() {
            queue.sort_by_key(|queued| queued.update.position);
        }
        // What the cache keeps is what the database has.
        for (lead_id, queue) in plan.queued {
            assert_eq!(state.queued.get(&lead_id).cloned().unwrap_or_default(), queue);
        }
        for (lead_id, queue) in &state.queued {
            assert!(
                queue.is_empty() || !state.calls[lead_id].is_empty(),
                "{lead_id} has queued updates without a call"
            );
        }
        assert!(plan.rows.is_sorted_by_key(|row| (row.decided_at, row.update.position)), "decided in log order");
        for row in plan.rows {
            state.recorded.insert(row.update.key());
            outcomes.push((row.event.update_id.to_string(), row.event.error));
        }
    }
    (dead, outcomes)
}

/// The part of the state that the database answers with for these keys.
fn read_state(state: &BatchState, keys: &LeadKeys) -> BatchState {
    let referenced: Vec<_> = keys.references.iter().filter_map(|key| state.references.get(key)).collect();
    let is_read = |id: &ObjectId| keys.leads.contains(id) || referenced.contains(&id);
    let queued: Vec<UpdateKey> = state.queued.values().flatten().map(|queued| queued.update.key()).collect();
    let is_recorded = |key: &&UpdateKey| state.recorded.contains(*key) || queued.contains(key);
    BatchState {
        leads: state.leads.iter().filter(|(id, _)| is_read(id)).map(|(id, lead)| (*id, lead.clone())).collect(),
        references: state.references.clone(),
        calls: state.calls.iter().filter(|(id, _)| is_read(id)).map(|(id, calls)| (*id, calls.clone())).collect(),
        rules: state.rules.clone(),
        recorded: keys.updates.iter().filter(is_recorded).copied().collect(),
        queued: state.queued.iter().filter(|(id, _)| is_read(id)).map(|(id, queue)| (*id, queue.clone())).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Decisions on whole batches are those of the model on one message after the other, however the log is cut.
    #[test]
    fn batches_decide_as_the_model_does(seed: u64, length in 1_usize..120) {
        let mut random = StdRng::seed_from_u64(seed);
        let project_id = ObjectId::from_bytes([2; 12]);
        let mut model = Model::default();
        let mut state = BatchState::default();
        let mut all = Vec::new();
        for (number, spec) in processes(&json!([])).into_iter().enumerate() {
            let process_id = ObjectId::from_bytes([number as u8 + 3; 12]);
            let mut leads = Leads { project_id, process_id, leads: Vec::new() };
            let rules: Rules = serde_json::from_value(spec.clone()).expect("rules");
            state.rules.insert(process_id, Arc::new(rules));
            model.processes.insert(process_id.to_string(), spec);
            for number in 0..2_u8 {
                let lead_id = ObjectId::from_bytes([process_id.as_bytes()[0] * 16 + number; 12]);
                let reference = format!("R-{number}");
                let lead = new_lead(&leads, &reference);
                state.references.insert((process_id, reference.clone()), lead_id);
                let known = Lead {
                    lead_id, project_id, process_id,
                    reference_id: Some(reference.clone()),
                    name: lead.name.clone(),
                    state: lead.state.clone(),
                    disposition: None,
                    metadata: JsonObject::from_text(lead.metadata.to_string()).expect("metadata"),
                    version: 1,
                };
                state.leads.insert(lead_id, Arc::new(known));
                model.leads.insert(lead_id.to_string(), lead);
                leads.leads.push((lead_id.to_string(), reference));
            }
            all.push(leads);
        }
        let mut messages: Vec<LogMessage> = Vec::new();
        for number in 0..length {
            let logged_at = Timestamp::from_millis(1_768_193_759_000 + number as i64 * 400);
            let sequence = number as u64 + 1;
            let again = messages.choose(&mut random).filter(|_| number % 9 == 8);
            let (subject, payload) = match again {
                Some(earlier) => (earlier.subject.clone(), earlier.payload.clone()),
                None => {
                    let leads = all.choose(&mut random).expect("leads").clone();
                    message(&leads, logged_at, &mut random)
                }
            };
            model.feed(sequence, logged_at, &subject, &payload);
            messages.push(LogMessage { sequence, logged_at, subject, headers: None, payload });
        }
        let (dead, outcomes) = decide_all(&mut state, &messages, &mut random);
        prop_assert_eq!(dead.into_iter().collect::<std::collections::HashSet<_>>(), model.dead_letters);
        prop_assert_eq!(outcomes.len(), model.outcomes.len());
        for (update_id, error) in outcomes {
            let key = (project_id.to_string(), update_id);
            prop_assert_eq!(&error, &model.outcomes[&key].error, "{:?}", key);
        }
        let mut held: Vec<_> = state.queued.values().flatten().map(|held| held.update.update_id.to_string()).collect();
        let mut expected: Vec<_> = model.held.values().flatten().map(|held| held.key.1.clone()).collect();
        held.sort();
        expected.sort();
        prop_assert_eq!(held, expected);
        for (lead_id, lead) in &state.leads {
            let expected = &model.leads[&lead_id.to_string()];
            let metadata: Value = serde_json::from_str(lead.metadata.get()).expect("metadata");
            prop_assert_eq!(&metadata, &expected.metadata);
            prop_assert_eq!(
                (&lead.name, &lead.state, &lead.disposition, lead.version),
                (&expected.name, &expected.state, &expected.disposition, expected.version)
            );
        }
    }
}

#[tokio::test]
async fn a_random_history_leaves_the_database_as_the_model_says() {
    let stack = Stack::start().await;
    let mut random = StdRng::seed_from_u64(7);
    let mut model = Model::default();
    let mut all = Vec::new();
    for spec in processes(&json!([])) {
        all.push(prepare(&stack.api, &stack.client, spec, 4, &mut model).await);
    }
    let js = service_kit::nats::jetstream(&stack.client);
    let mut acks = Vec::new();
    let mut sent: Vec<(String, Bytes)> = Vec::new();
    for number in 0..3000 {
        let again = sent.choose(&mut random).filter(|_| number % 20 == 19).cloned();
        let leads = all.choose(&mut random).expect("leads");
        let (subject, payload) = again.unwrap_or_else(|| message(leads, service_kit::clock::now(), &mut random));
        acks.push(js.publish(subject.clone(), payload.clone()).await.expect("a publish"));
        sent.push((subject, payload));
    }
    for ack in acks {
        ack.await.expect("an ack");
    }
    stack.wait_until_applied().await;
    // The last calls expire, and what they held is decided.
    stack.wait_for_count("SELECT count(*) FROM lead_state.queued_updates", 0, SOON).await;
    let last = stack.wait_until_applied().await;
    let decided_later = "SELECT count(*) FROM lead_state.lead_updates WHERE decided_sequence IS NOT NULL";
    assert!(stack.count(decided_later).await > 10, "the history is too tame");
    feed_log(&stack.client, &mut model, 1, last).await;
    let differences = differences(&stack.pool, &model).await;
    assert!(differences.is_empty(), "{} differences, the first: {}", differences.len(), differences[0]);
    let dead = stack.dead_letters().await;
    assert_eq!(dead, model.dead_letters.len() as u64, "dead letters");
    assert!(model.repeated > 0 && dead > 0, "the history is too tame");
}

/// Makes a process with leads, and tells the model of them.
pub(crate) async fn prepare(
    api: &Api,
    client: &async_nats::Client,
    spec: Value,
    count: usize,
    model: &mut Model,
) -> Leads {
    let mut of_project = spec.clone();
    of_project["projectId"] = json!(api.project_id);
    let applied: rpc::ProcessChangeResult = call(client, rpc::PROCESS_APPLY, &of_project).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Leads { project_id: api.project_id, process_id, leads: Vec::new() };
    for number in 0..count {
        let reference = format!("R-{number}");
        let lead_id = api.initiate(process_id, Some(&reference)).await;
        model.leads.insert(lead_id.clone(), new_lead(&leads, &reference));
        leads.leads.push((lead_id, reference));
    }
    model.processes.insert(process_id.to_string(), spec);
    leads
}

/// Reads the log from `first` to `last` into the model.
async fn feed_log(client: &async_nats::Client, model: &mut Model, first: u64, last: u64) {
    use async_nats::jetstream::consumer::{DeliverPolicy, pull};
    use futures::StreamExt;
    let js = service_kit::nats::jetstream(client);
    let stream = js.get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
    let config = pull::OrderedConfig {
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: first },
        ..Default::default()
    };
    let mut messages = stream.create_consumer(config).await.expect("a consumer").messages().await.expect("messages");
    let mut next = first;
    while next <= last {
        let message = tokio::time::timeout(SOON, messages.next()).await.expect("in time").expect("more").expect("one");
        let info = message.info().expect("its place");
        assert_eq!(info.stream_sequence, next, "the log has a gap");
        next += 1;
        model.feed(info.stream_sequence, info.published.into(), &message.subject, &message.payload);
    }
}
