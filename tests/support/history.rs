//! Random histories of a log: processes, leads and the messages that producers send.

use std::collections::HashMap;

use bytes::Bytes;
use contract::{ObjectId, Timestamp, process::ProcessSpec};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use sqlx::{PgPool, Row};

use super::{
    Api, call,
    model::{self, Model},
    process_id,
};

/// A process with its leads, for which messages are generated.
#[derive(Debug, Clone)]
pub(crate) struct Leads {
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: ObjectId,
    /// Ids and references.
    pub(crate) leads: Vec<(String, String)>,
}

/// Two processes with different rules: one is strict and merges shallowly; the other merges deeply, lets leads leave
/// the terminal state, and queues updates during calls.
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

/// The body of an update of one of these leads, which mostly succeeds.
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

pub(crate) fn address(leads: &Leads, random: &mut StdRng) -> Value {
    let (lead_id, reference_id) = leads.leads.choose(random).expect("a lead");
    match random.random_range(0..20) {
        0 => json!({"leadId": "00000000000000000000dead"}),
        1 => json!({"processId": leads.process_id, "referenceId": "unknown"}),
        2..=7 => json!({"processId": leads.process_id, "referenceId": reference_id}),
        _ => json!({"leadId": lead_id}),
    }
}

/// A message that an internal producer may publish: most are updates, some are call events, and some cannot be parsed.
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
            if random.random_bool(0.5) {
                body["updateId"] = json!(ObjectId::new(at, random.random()));
            }
            if random.random_bool(0.3) {
                body["timeoutSeconds"] = json!(random.random_range(0..3));
            }
            (subject("call.started"), body.to_string().into())
        }
        // Starts are almost as likely as ends, so that some updates are queued and some calls expire.
        85..87 => (
            subject("call.expired"),
            json!({"leadId": leads.leads.choose(random).expect("a lead").0}).to_string().into(),
        ),
        87..93 => {
            let mut body = address(leads, random);
            if random.random_bool(0.5) {
                body["callId"] = json!("c-1");
            }
            if random.random_bool(0.5) {
                body["updateId"] = json!(ObjectId::new(at, random.random()));
            }
            if random.random_bool(0.5) {
                let states = ["new", "interested", "followup_2", "lost", "nowhere"];
                body["toState"] = json!(states.choose(random));
            }
            if random.random_bool(0.5) {
                let disposition = ["hot", "cold"].choose(random);
                body["result"] = json!({"status": "completed", "disposition": disposition});
            }
            if random.random_bool(0.05) {
                body["result"] = json!({"status": 7});
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
        98 if random.random_bool(0.5) => {
            let lead_id = &leads.leads.choose(random).expect("a lead").0;
            let body = json!({
                "updateId": ObjectId::new(at, random.random()), "leadId": lead_id, "state": "new",
                "contact": {"name": "Ada"}, "metadata": {"k0": random.random_range(0..1000)},
            });
            (subject("lead.created"), body.to_string().into())
        }
        98 => (subject("deleted"), Bytes::from_static(b"{}")),
        _ => ("leads.cmd.no-project.update".into(), update(leads, random).to_string().into()),
    }
}

/// Like [`message`], but one message in a thousand erases a lead.
pub(crate) fn message_or_erasure(leads: &Leads, at: Timestamp, random: &mut StdRng) -> (String, Bytes) {
    if random.random_range(0..1000) > 0 {
        return message(leads, at, random);
    }
    let mut body = json!({"leadId": leads.leads.choose(random).expect("a lead").0});
    if random.random_bool(0.5) {
        body["updateId"] = json!(ObjectId::new(at, random.random()));
    }
    (format!("leads.cmd.{}.erase", leads.project_id), body.to_string().into())
}

/// The differences between the database and the model, one text each.
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
            found.push(format!("lead {id} is\n{stored:?}\ninstead of\n{lead:?}"));
        }
    }
    let rows = sqlx::query(
        "SELECT encode(project_id, 'hex') AS project, encode(update_id, 'hex') AS id, error, data, log_sequence, log_index
         FROM lead_state.lead_updates",
    )
    .fetch_all(pool)
    .await
    .expect("the ledger");
    let stored_outcome = |key: &(String, String)| Some((key.clone(), model.stored_outcome(key)?));
    let mut missing: HashMap<_, _> = model.outcomes.keys().filter_map(stored_outcome).collect();
    for row in rows {
        let key: (String, String) = (row.get("project"), row.get("id"));
        let stored = model::Outcome {
            error: row.get("error"),
            data: row.get("data"),
            place: (row.get::<i64, _>("log_sequence").cast_unsigned(), row.get::<i32, _>("log_index").cast_unsigned()),
        };
        match missing.remove(&key) {
            Some(outcome) if outcome == stored => {}
            outcome => found.push(format!("update {} came out as\n{stored:?}\ninstead of\n{outcome:?}", key.1)),
        }
    }
    found
        .extend(missing.into_iter().map(|((_, id), outcome)| format!("update {id} is not in the ledger: {outcome:?}")));
    found
}

/// The model of a new lead.
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

/// Applies a process and initiates leads of it, in the system and in the model.
pub(crate) async fn prepare(
    api: &Api,
    client: &async_nats::Client,
    spec: Value,
    count: usize,
    model: &mut Model,
) -> Leads {
    let mut of_project = spec.clone();
    of_project["projectId"] = json!(api.project_id);
    let applied = call(client, &serde_json::from_value::<ProcessSpec>(of_project).expect("a process")).await;
    let process_id = process_id(&applied);
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
