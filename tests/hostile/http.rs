//! Attacks with well-framed HTTP requests.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, time::sleep};

use super::{
    Attack, Attacker,
    connections::{connect, read_answer},
};
use crate::support::{UPDATE, assert_ok, process_id};

pub(super) const ATTACKS: &[Attack] = &[
    Attack { name: "updates beyond the rate", refusals: &["429 rate_limited"], run: |a| Box::pin(flood_updates(a)) },
    Attack { name: "reads beyond the rate", refusals: &["429 rate_limited"], run: |a| Box::pin(flood_reads(a)) },
    Attack {
        name: "the data of another project",
        refusals: &["403 project_mismatch", "404 lead_not_found", "404 process_not_found"],
        run: |a| Box::pin(reach_for_others(a)),
    },
    Attack { name: "guessed keys", refusals: &["401 invalid_api_key"], run: |a| Box::pin(guess_keys(a)) },
    Attack {
        name: "erasures of its own and of others' leads",
        refusals: &["429 rate_limited"],
        run: |a| Box::pin(erase_leads(a)),
    },
    Attack {
        name: "bodies that are too large or too deep",
        refusals: &["413 body_too_large", "400 invalid_json"],
        run: |a| Box::pin(oversized_bodies(a)),
    },
    Attack {
        name: "bulk requests that never end",
        refusals: &["429 too_many_bulk_requests"],
        run: |a| Box::pin(endless_bulk_requests(a)),
    },
    Attack { name: "event streams", refusals: &["429 too_many_listeners"], run: |a| Box::pin(event_streams(a)) },
    Attack { name: "waits for updates that are queued", refusals: &[], run: |a| Box::pin(wait_for_queued_updates(a)) },
    Attack { name: "a new idempotency key for each update", refusals: &[], run: |a| Box::pin(idempotency_keys(a)) },
    Attack { name: "updates of a lead of 900 KB", refusals: &["429 work_limited"], run: |a| Box::pin(large_lead(a)) },
    Attack {
        name: "reads of a lead of 900 KB",
        refusals: &["429 work_limited"],
        run: |a| Box::pin(read_large_lead(a)),
    },
    Attack { name: "searches with many matches", refusals: &["429 rate_limited"], run: |a| Box::pin(searches(a)) },
    Attack { name: "lists and counts of a month", refusals: &["429 rate_limited"], run: |a| Box::pin(long_reads(a)) },
    Attack {
        name: "a callback that is paused, resumed and backfilled",
        refusals: &["429 rate_limited"],
        run: |a| Box::pin(pauses_and_backfills(a)),
    },
    Attack {
        name: "forged reports of calls",
        refusals: &["401 invalid_signature"],
        run: |a| Box::pin(forged_reports(a)),
    },
];

/// An update of the attacker's lead.
fn update(a: &Attacker<'_>, change: Value) -> RequestBuilder {
    let mut body = change;
    body["leadId"] = json!(a.tenant.lead_id);
    post(a, UPDATE, &body)
}

fn post(a: &Attacker<'_>, path: &str, body: &Value) -> RequestBuilder {
    a.tenant.api.request(Method::POST, path).header("content-type", "application/json").body(body.to_string())
}

async fn flood_updates(a: &Attacker<'_>) {
    a.repeat(64, Duration::from_millis(50), |n| update(a, json!({"metadata": {"n": n}}))).await;
}

async fn flood_reads(a: &Attacker<'_>) {
    a.repeat(64, Duration::from_millis(50), |_| a.tenant.api.request(Method::GET, "/api/v1/leads")).await;
}

async fn reach_for_others(a: &Attacker<'_>) {
    let (lead, project) = (&a.healthy.lead_id, a.healthy.api.project_id);
    let process = process_id(&a.healthy.applied);
    a.repeat(1, Duration::from_millis(100), |n| match n % 3 {
        0 => a.tenant.api.request(Method::GET, &format!("/api/v1/leads/get?leadId={lead}")),
        1 => a.tenant.api.request(Method::GET, &format!("/api/v1/processes/{process}")),
        _ => post(a, UPDATE, &json!({"leadId": lead, "projectId": project, "name": "mine"})),
    })
    .await;
}

async fn erase_leads(a: &Attacker<'_>) {
    let leads = [&a.tenant.lead_id, &a.healthy.lead_id];
    a.repeat(32, Duration::from_millis(50), |n| {
        a.tenant.api.request(Method::DELETE, &format!("/api/v1/leads/{}", leads[n % 2]))
    })
    .await;
}

async fn guess_keys(a: &Attacker<'_>) {
    a.repeat(4, Duration::from_millis(10), |n| a.tenant.api.http.post(a.url(UPDATE)).bearer_auth(format!("lr_{n}")))
        .await;
}

async fn oversized_bodies(a: &Attacker<'_>) {
    a.repeat(2, Duration::from_millis(100), |n| match n % 2 {
        0 => update(a, json!({"metadata": {"text": "x".repeat(300_000)}})),
        _ => a.tenant.api.request(Method::POST, UPDATE).body("[".repeat(200_000)),
    })
    .await;
}

/// Keeps requests open that send a line each second.
async fn endless_bulk_requests(a: &Attacker<'_>) {
    let line = format!("{}\n", json!({"leadId": a.tenant.lead_id, "name": "x"}));
    let head = a.head("POST /api/v1/leads/update/bulk")
        + "content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";
    let request = async || loop {
        let mut connection = connect(a).await;
        let _ = connection.write_all(head.as_bytes()).await;
        let (mut reader, mut writer) = connection.split();
        let sending = async {
            while writer.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = sending => {}
            answer = read_answer(&mut reader) => a.answers.add(answer),
        }
        sleep(Duration::from_millis(200)).await;
    };
    join_all((0..40).map(|_| request())).await;
}

async fn event_streams(a: &Attacker<'_>) {
    a.repeat(64, Duration::from_millis(500), |_| a.tenant.api.request(Method::GET, "/api/v1/events")).await;
}

/// Sends updates that wait for the end of a call, which never ends.
async fn wait_for_queued_updates(a: &Attacker<'_>) {
    let spec = json!({
        "projectId": a.tenant.api.project_id, "name": "sales", "states": [{"name": "new"}], "duringCall": "queue",
    });
    a.stack.apply(spec).await;
    let call = json!({"leadId": a.tenant.lead_id, "callId": "endless", "timeoutSeconds": 600});
    let subject = format!("leads.cmd.{}.call.started", a.tenant.api.project_id);
    a.stack.publish(subject, call.to_string()).await;
    let request = |n: usize| update(a, json!({"metadata": {"n": n}})).header("prefer", "wait=30");
    a.repeat(100, Duration::from_millis(500), request).await;
}

async fn idempotency_keys(a: &Attacker<'_>) {
    let keyed = |n: usize| update(a, json!({"metadata": {"n": n}})).header("idempotency-key", format!("{n:0>200}"));
    a.repeat(4, Duration::from_millis(20), keyed).await;
}

/// Sends small updates, each of which reads, writes and delivers a large lead.
async fn large_lead(a: &Attacker<'_>) {
    a.callbacks(json!([{"name": "crm", "url": a.endpoint.url("/crm")}])).await;
    enlarge(a).await;
    a.repeat(2, Duration::from_millis(40), |n| update(a, json!({"metadata": {"n": n}}))).await;
}

async fn read_large_lead(a: &Attacker<'_>) {
    enlarge(a).await;
    let path = format!("/api/v1/leads/get?leadId={}", a.tenant.lead_id);
    a.repeat(4, Duration::from_millis(50), |_| a.tenant.api.request(Method::GET, &path)).await;
}

/// Gives the attacker's lead 900 KB of metadata.
async fn enlarge(a: &Attacker<'_>) {
    for part in 0..4 {
        a.answers
            .add(super::answer(update(a, json!({"metadata": {format!("part{part}"): "x".repeat(225_000)}}))).await);
    }
}

async fn searches(a: &Attacker<'_>) {
    let (project_id, process_id) = (a.tenant.api.project_id, process_id(&a.tenant.applied));
    let lead = |n: usize| json!({"projectId": project_id, "processId": process_id, "phone": "+4915112345678", "name": "Ada", "referenceId": n.to_string()});
    let leads: Vec<_> = (0..200).map(lead).collect();
    let body = json!({"leads": leads});
    assert_ok(a.tenant.api.post("/api/v1/leads/bulk/initiate", &body).await);
    let search = |_| a.tenant.api.request(Method::GET, "/api/v1/leads?q=ada&limit=100");
    a.repeat(64, Duration::from_millis(50), search).await;
}

/// Sends the reads that scan the most rows.
async fn long_reads(a: &Attacker<'_>) {
    let end = service_kit::clock::now().millis();
    let begin = end - 31 * 24 * 60 * 60 * 1000;
    let calls = json!({"start": begin, "end": end, "includeUniqueLeads": true});
    let iso = |millis| contract::Timestamp::from_millis(millis).to_iso();
    let range = format!("from={}&to={}", iso(begin), iso(end));
    a.repeat(64, Duration::from_millis(50), |n| match n % 4 {
        0 => a.tenant.api.request(Method::GET, &format!("/api/v1/updates?limit=200&userId=none&{range}")),
        1 => a.tenant.api.request(Method::GET, &format!("/api/v1/deliveries?limit=200&error=none&{range}")),
        2 => a.tenant.api.request(Method::GET, &format!("/api/v1/stats?by=code&{range}")),
        _ => post(a, "/api/v1/analytics/customer/stats", &calls),
    })
    .await;
}

async fn pauses_and_backfills(a: &Attacker<'_>) {
    a.callbacks(json!([{"name": "crm", "url": a.endpoint.url("/crm")}])).await;
    let callbacks = format!("/api/v1/processes/{}/callbacks", process_id(&a.tenant.applied));
    let listed = assert_ok(a.tenant.api.get(&callbacks).await);
    let callback = format!("{callbacks}/{}", listed["data"][0]["callbackId"].as_str().expect("a callback"));
    let since = json!({"since": service_kit::clock::now().to_iso()});
    a.repeat(32, Duration::from_millis(50), |n| match n % 4 {
        0 => post(a, &format!("{callback}/pause"), &json!({})),
        1 => post(a, &format!("{callback}/resume"), &json!({})),
        2 => post(a, &format!("{callback}/backfill"), &since),
        _ => update(a, json!({"metadata": {"n": n}})),
    })
    .await;
}

/// Sends long reports, which webhook-notifier has to verify because only it can open the source's secret.
async fn forged_reports(a: &Attacker<'_>) {
    let path = format!("/api/v1/processes/{}/sources", process_id(&a.tenant.applied));
    let source = json!({"name": "calls", "platform": "retell", "secrets": ["the-secret-of-the-platform"]});
    let created = assert_ok(a.tenant.api.post(&path, &source).await);
    let path = created["data"]["ingestPath"].as_str().expect("a path");
    // The report is serialized once, because the attacker shares a process with the healthy tenant, whose latency is
    // measured.
    let report = Bytes::from(json!({"event": "call_ended", "transcript": "x".repeat(400_000)}).to_string());
    a.repeat(8, Duration::from_millis(50), |_| {
        let time = service_kit::clock::now().millis();
        let signature = format!("v={time},d={}", "0".repeat(64));
        let request = a.tenant.api.request(Method::POST, path).header("content-type", "application/json");
        request.header("x-retell-signature", signature).body(report.clone())
    })
    .await;
}
