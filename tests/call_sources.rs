//! Voice platforms report calls by their own webhooks: authenticated by a source's secret, mapped to call events, once
//! each.

use contract::ObjectId;
use hmac::{Hmac, KeyInit, Mac};
use reqwest::{Method, header::CONTENT_TYPE};
use serde_json::{Value, json};
use sha2::Sha256;
use test_support::eventually;

use crate::support::{Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, process_id, send};

const SECRET: &str = "the-secret-that-the-platform-has";
const SAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/samples/calls");

/// A process with a lead, and a source for each platform.
struct Sources {
    stack: Stack,
    process_id: ObjectId,
    lead: String,
}

impl Sources {
    async fn start() -> Self {
        let stack = Stack::start().await;
        let callbacks =
            json!([{"name": "calls", "url": stack.receiver.url("/calls"), "events": ["activity.completed"]}]);
        let process_id = process_id(&stack.process(callbacks).await);
        let lead = stack.api.initiate(process_id, Some("R")).await;
        stack.backdate_processes().await;
        Self { stack, process_id, lead }
    }

    /// Creates a source, and returns its path and id.
    async fn create(&self, platform: &str) -> (String, String) {
        let path = format!("/api/v1/processes/{}/sources", self.process_id);
        let body = json!({"name": platform, "platform": platform, "secrets": [SECRET]});
        let created = assert_ok(self.stack.api.post(&path, &body).await);
        assert!(!created.to_string().contains(SECRET), "{created}");
        let source = &created["data"];
        let text = |name: &str| source[name].as_str().expect(name).to_owned();
        (text("ingestPath"), text("sourceId"))
    }

    fn sample(&self, name: &str) -> String {
        let text = std::fs::read_to_string(format!("{SAMPLES}/{name}.json")).expect("a sample");
        text.replace("LEAD", &self.lead).replace("\"PROCESS\"", &format!("\"{}\"", self.process_id))
    }

    /// Posts a webhook as its platform does, authenticated with this secret.
    async fn post(&self, path: &str, body: &str, secret: &str) -> (u16, Value) {
        let signed = |parts: &[&str]| {
            let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a key");
            parts.iter().for_each(|part| mac.update(part.as_bytes()));
            mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let now = service_kit::clock::now().millis().to_string();
        let (name, value) = match path.split('/').nth(5) {
            Some("vapi") => ("X-Vapi-Secret", secret.to_owned()),
            Some("retell") => ("X-Retell-Signature", format!("v={now},d={}", signed(&[body, &now]))),
            _ => ("X-Webhook-Signature", signed(&[body])),
        };
        let request = self.stack.api.http.request(Method::POST, format!("{}{path}", self.stack.api.url));
        send(request.header(CONTENT_TYPE, "application/json").header(name, value).body(body.to_owned())).await
    }

    /// Posts a webhook until the gateway and the webhook-notifier know the source.
    async fn post_when_known(&self, path: &str, body: &str) -> Value {
        eventually(TEST_TIMEOUT, "the source is known", async || {
            let (status, answer) = self.post(path, body, SECRET).await;
            if status == 404 { Err(answer.to_string()) } else { Ok(assert_ok((status, answer))) }
        })
        .await
    }
}

#[tokio::test]
async fn the_webhooks_of_each_platform_become_call_events_and_activities() {
    let sources = Sources::start().await;
    let (lead, process_id) = (&sources.lead, sources.process_id);
    let of_lead = json!({"type": "call", "leadId": lead, "processId": process_id, "referenceId": "R"});
    let mut activities = 0;
    for (platform, samples) in [
        (
            "vapi",
            vec![
                ("vapi-ringing", json!({"event": "status-update: ringing"})),
                ("vapi-started", json!({"kind": "call.started"})),
                ("vapi-ended", json!({"kind": "call.ended"})),
                (
                    "vapi-report",
                    json!({"callId": "vapi-call-1", "result": {
                        "status": "customer-ended-call", "connected": true, "disposition": "wants a test drive",
                        "summary": "Likes the Camry.", "durationSeconds": 94,
                        "analysis": {"successEvaluation": "true", "structuredData": {"score": 0.9}},
                        "recordingUrl": "https://storage.vapi.ai/vapi-call-1.wav",
                        "metadata": {"cost": 0.0925, "call": {"orgId": "org-1", "metadata": {"campaign": "spring"}}},
                    }}),
                ),
                (
                    "vapi-unanswered",
                    json!({"callId": "vapi-call-2", "result": {
                        "status": "customer-did-not-answer", "connected": false,
                    }}),
                ),
            ],
        ),
        (
            "retell",
            vec![
                ("retell-transcript", json!({"event": "transcript_updated"})),
                ("retell-started", json!({"kind": "call.started"})),
                ("retell-ended", json!({"kind": "call.ended"})),
                (
                    "retell-analyzed",
                    json!({"callId": "Jabr9TXYYJHfvl6Syypi88rdAHYHmcq6", "result": {
                        "status": "user_hangup", "connected": true, "disposition": "call back",
                        "summary": "Asked to be called back.", "durationSeconds": 16,
                        "analysis": {"user_sentiment": "Neutral", "custom_analysis_data": {"budget": 31500.50}},
                        "metadata": {"transcript": "Agent: Hi.\nUser: Not now.", "metadata": {"referenceId": "R"}},
                    }}),
                ),
                (
                    "retell-unanswered",
                    json!({"callId": "retell-call-2", "result": {
                        "status": "dial_no_answer", "connected": false,
                    }}),
                ),
            ],
        ),
        (
            "bland",
            vec![
                ("bland-stream", json!({"event": "latency"})),
                (
                    "bland-completed",
                    json!({"callId": "c8b2a1e4-0000-4000-8000-000000000001", "result": {
                        "status": "completed", "connected": true, "disposition": "INTERESTED",
                        "summary": "Wants an offer for a Camry.", "analysis": {"wants_offer": true}, "durationSeconds": 104,
                        "recordingUrl": "https://server.aws.dc8.bland.ai/recordings/c8b2a1e4.mp3",
                        "metadata": {"to": "+12223334444", "answered_by": "human"},
                    }}),
                ),
                (
                    "bland-voicemail",
                    json!({"callId": "c8b2a1e4-0000-4000-8000-000000000002", "result": {
                        "status": "completed", "connected": false, "durationSeconds": 12,
                    }}),
                ),
            ],
        ),
    ] {
        let (path, _) = sources.create(platform).await;
        for (name, expected) in samples {
            let body = sources.sample(name);

            let answer = sources.post_when_known(&path, &body).await;

            if expected["event"].is_string() {
                assert_includes(&answer, json!({"message": "Event ignored", "event": expected["event"]}));
                continue;
            }
            let id = answer["updateId"].as_str().expect("an id");
            let outcome = sources.stack.api.outcome(id).await;
            assert_eq!(outcome["status"], "succeeded", "{name}: {outcome}");
            if expected["kind"].is_string() {
                assert_eq!(outcome["outcome"]["action_type"], expected["kind"], "{name}");
                continue;
            }
            activities += 1;
            let activity = assert_ok(sources.stack.api.get(&format!("/api/v1/activities/{id}")).await);
            assert_includes(&activity["data"], of_lead.clone());
            assert_includes(&activity["data"], expected);
            // The platform repeats the report with another content.
            let again = sources.post(&path, &body.replacen("customer-ended-call", "other", 1), SECRET).await;
            assert_eq!(assert_ok(again)["updateId"], id, "{name}");
        }
    }
    assert_eq!(activities, 6);
    sources.stack.receiver.wait_for_requests("/calls", activities, TEST_TIMEOUT).await;
    sources.stack.wait_for_clean_audit().await;
    assert_eq!(sources.stack.receiver.requests_to("/calls").len(), activities);
}

#[tokio::test]
async fn a_report_that_its_source_did_not_send_is_refused() {
    let sources = Sources::start().await;
    for (platform, sample) in [("vapi", "vapi-started"), ("retell", "retell-started"), ("bland", "bland-completed")] {
        let (path, source_id) = sources.create(platform).await;
        let body = sources.sample(sample);
        let accepted = sources.post_when_known(&path, &body).await;
        sources.stack.api.outcome(accepted["updateId"].as_str().expect("an id")).await;
        let history = format!("/api/v1/leads/{}/updates", sources.lead);
        let recorded = async || assert_ok(sources.stack.api.get(&history).await)["data"].as_array().map(Vec::len);
        let before = recorded().await;

        let wrong = sources.post(&path, &body, "a-secret-of-another-one").await;
        let unsigned = sources.stack.api.http.post(format!("{}{path}", sources.stack.api.url)).body(body.clone());
        let unsigned = send(unsigned).await;
        let unknown = sources.post(&path.replace(&source_id, &"0".repeat(24)), &body, SECRET).await;
        let other = if platform == "vapi" { "bland" } else { "vapi" };
        let other = sources.post(&path.replacen(platform, other, 1), &body, SECRET).await;

        let refused = assert_refused(wrong, 401, "invalid_signature");
        assert!(!refused.to_string().contains(SECRET), "{refused}");
        assert_refused(unsigned, 401, "invalid_signature");
        assert_refused(unknown, 404, "source_not_found");
        assert_refused(other, 400, "invalid_field");
        sources.stack.wait_until_applied().await;
        assert_eq!(recorded().await, before, "{platform}");
    }
}

#[tokio::test]
async fn a_source_is_configured_over_http_and_by_leadctl() {
    let sources = Sources::start().await;
    let stack = &sources.stack;
    let (path, source_id) = sources.create("vapi").await;
    let body = sources.sample("vapi-started");
    sources.post_when_known(&path, &body).await;
    let sources_path = format!("/api/v1/processes/{}/sources", sources.process_id);
    let source_path = format!("{sources_path}/{source_id}");

    // A change without `sources` keeps them, and the response of a read can be sent back.
    let process_path = format!("/api/v1/processes/{}", sources.process_id);
    let mut process = assert_ok(stack.api.get(&process_path).await)["data"].take();
    assert_eq!(process["sources"][0]["ingestPath"], json!(path));
    let unchanged = stack.api.ask(Method::PUT, &process_path, &[], &process).await;
    assert_eq!(assert_ok(unchanged)["changed"], false);
    process.as_object_mut().expect("an object").remove("sources");
    assert_eq!(assert_ok(stack.api.ask(Method::PUT, &process_path, &[], &process).await)["changed"], false);
    let listed = assert_ok(stack.api.get(&sources_path).await);
    assert_eq!(listed["data"], json!([assert_ok(stack.api.get(&source_path).await)["data"]]));

    let new = "the-secret-that-replaces-it";
    stack.leadctl_of_project(&["source", "set-secrets", &source_id, "--secret", new]).await.assert_ok();
    eventually(TEST_TIMEOUT, "only the new secret is accepted", async || {
        let old = sources.post(&path, &body, SECRET).await;
        let new = sources.post(&path, &body, new).await;
        if (old.0, new.0) == (401, 200) { Ok(()) } else { Err(format!("{old:?} {new:?}")) }
    })
    .await;
    let shown = stack.leadctl_of_project(&["source", "list"]).await.assert_ok().assert_prints(&[&path]);
    assert!(!shown.text().contains(new), "{shown:?}");

    let off = json!({"name": "vapi", "platform": "vapi", "enabled": false});
    assert_eq!(assert_ok(stack.api.ask(Method::PUT, &source_path, &[], &off).await)["data"]["enabled"], false);
    eventually(TEST_TIMEOUT, "it is switched off", async || {
        let (status, answer) = sources.post(&path, &body, new).await;
        if status == 404 { Ok(()) } else { Err(answer.to_string()) }
    })
    .await;
    let removed = assert_ok(stack.api.ask(Method::DELETE, &source_path, &[], &json!({})).await);
    assert_eq!((&removed["data"], &removed["changed"]), (&Value::Null, &json!(true)));
    assert_refused(stack.api.get(&source_path).await, 404, "source_not_found");
}
