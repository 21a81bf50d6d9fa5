//! The main job, an update from the request to the webhooks, and checks of a webhook.

use std::collections::{BTreeMap, HashMap};

use base64::{Engine, prelude::BASE64_STANDARD};
use contract::{ObjectId, process::Process, rpc::ProcessChangeResult};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use test_support::{Request, eventually};

use super::{Api, Stack, TEST_TIMEOUT, assert_includes, process_id};

/// The error that the API guarantees word for word.
pub(crate) const CALL_IN_PROGRESS: &str = "Lead update is not allowed while a call is in progress for this lead";

/// Asserts that a webhook has exactly the eight documented fields, with their types.
pub(crate) fn assert_webhook_fields(body: &Value) {
    let fields: Vec<_> = body.as_object().expect("an object").keys().map(String::as_str).collect();
    let mut expected = ["action_type", "updateId", "success", "error", "leadId", "referenceId", "timestamp", "data"];
    expected.sort_unstable();
    assert_eq!(fields, expected);
    assert_eq!(body["action_type"], "update");
    assert!(body["updateId"].as_str().expect("a string").parse::<ObjectId>().is_ok());
    assert!(body["success"].is_boolean());
    let millis = body["timestamp"].as_i64().expect("a number");
    assert!((1_700_000_000_000..10_000_000_000_000).contains(&millis), "{millis} is not in milliseconds");
}

/// A separate project, with a process, callbacks and a lead.
pub(crate) struct Tenant {
    pub(crate) api: Api,
    pub(crate) applied: ProcessChangeResult,
    pub(crate) lead_id: String,
}

impl Tenant {
    pub(crate) async fn new(stack: &Stack, name: &str, callbacks: Value) -> Self {
        let api = Api::create(stack.api.url.clone(), &stack.client, name).await;
        let applied = Self::apply(stack, &api, callbacks).await;
        let lead_id = api.initiate(process_id(&applied), None).await;
        Self { api, applied, lead_id }
    }

    /// Configures the process with these callbacks.
    pub(crate) async fn apply(stack: &Stack, api: &Api, callbacks: Value) -> ProcessChangeResult {
        let states = json!([{"name": "new"}]);
        let spec = json!({"projectId": api.project_id, "name": "sales", "states": states, "callbacks": callbacks});
        stack.apply(spec).await
    }
}

/// The signing secret that was generated for a callback.
pub(crate) fn secret(process: &Process, name: &str) -> String {
    let callback = process.callbacks.iter().find(|callback| callback.name == name).expect(name);
    callback.secrets[0].expose().to_owned()
}

/// The main job from end to end: an update changes the lead and is delivered, signed, to both callbacks.
pub(crate) async fn assert_main_job(stack: &Stack) {
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm"), "auth": {"type": "bearer", "token": "t0ken"}},
            {"name": "analytics", "url": stack.receiver.url("/analytics"),
             "auth": {"type": "header", "name": "X-Api-Key", "value": "k3y"}},
        ]))
        .await;
    let process_id = process_id(&applied);
    let lead_id = stack.api.initiate(process_id, Some("AB123456789")).await;
    let metadata = json!({"source": "import", "make": "Toyota", "model": "Camry"});

    let update = json!({
        "referenceId": "AB123456789", "projectId": stack.api.project_id, "processId": process_id,
        "make": "Toyota", "model": "Camry", "targetState": "interested", "disposition": "hot", "userId": "u-7",
    });
    let update_id = stack.api.update(update).await;

    let timeline = stack.api.outcome(&update_id).await;
    let expected = json!({"status": "succeeded", "fromState": "new", "toState": "interested", "userId": "u-7"});
    assert_includes(&timeline, expected);
    for (name, auth, value) in [("crm", "authorization", "Bearer t0ken"), ("analytics", "x-api-key", "k3y")] {
        let request = &stack.receiver.wait_for_requests(&format!("/{name}"), 1, TEST_TIMEOUT).await[0];
        verify(request, &secret(&applied.process, name));
        assert_eq!(request.header(auth), Some(value));
        let body = request.json();
        assert_webhook_fields(&body);
        let expected = json!({
            "action_type": "update", "updateId": update_id, "success": true, "error": null, "leadId": lead_id,
            "referenceId": "AB123456789", "timestamp": body["timestamp"], "data": metadata,
        });
        assert_eq!(body, expected);
        // The fields have the documented order, and the metadata keeps the lead's order of keys.
        let text = std::str::from_utf8(&request.body).expect("UTF-8");
        assert!(text.starts_with(r#"{"action_type":"update","updateId":""#), "{text}");
        assert!(text.ends_with(r#""data":{"source":"import","make":"Toyota","model":"Camry"}}"#), "{text}");
        assert_eq!(request.method, "POST");
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert_eq!(request.header("webhook-id"), Some(update_id.as_str()));
        assert!(request.header("user-agent").is_some_and(|agent| agent.starts_with("Leadrelay/")));
        assert!(request.header("traceparent").is_some_and(contract::trace::is_traceparent));
    }
    let lead = stack.api.lead(&lead_id).await;
    assert_includes(&lead, json!({"currentState": "interested", "lastDisposition": "hot"}));
    assert_eq!(lead["metadata"], metadata);
    assert_eq!(lead["activities"].as_array().map(Vec::len), Some(1));

    // The timeline of the update shows each attempt.
    let timeline = eventually(TEST_TIMEOUT, "both deliveries are in the timeline", async || {
        let timeline = stack.api.outcome(&update_id).await;
        let delivered = |delivery: &&Value| delivery["status"] == "delivered";
        let count = timeline["deliveries"].as_array().map_or(0, |all| all.iter().filter(delivered).count());
        if count == 2 { Ok(timeline) } else { Err(timeline.to_string()) }
    })
    .await;
    for delivery in timeline["deliveries"].as_array().expect("a list") {
        assert_eq!(delivery["attempts"][0]["statusCode"], 200);
    }
}

/// Asserts that a request carries a Standard Webhooks signature by this secret.
#[track_caller]
pub(crate) fn verify(request: &Request, secret: &str) {
    assert!(verifies(request, secret), "signature");
}

/// Whether a request has a Standard Webhooks signature by this secret, computed without the notifier's code.
pub(crate) fn verifies(request: &Request, secret: &str) -> bool {
    let key = BASE64_STANDARD.decode(secret.strip_prefix("whsec_").expect("whsec_")).expect("base64");
    let header = |name| request.header(name).unwrap_or_else(|| panic!("no {name}"));
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&key).expect("a key");
    mac.update(format!("{}.{}.", header("webhook-id"), header("webhook-timestamp")).as_bytes());
    mac.update(&request.body);
    let expected = format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()));
    header("webhook-signature").split(' ').any(|signature| signature == expected)
}

/// The number of signatures that a request carries.
pub(crate) fn signature_count(request: &Request) -> usize {
    request.header("webhook-signature").expect("a signature").split(' ').count()
}

/// Bodies by `updateId`, in the order in which they arrived.
pub(crate) fn by_update(requests: &[Request]) -> HashMap<String, Vec<Value>> {
    let mut bodies: HashMap<String, Vec<Value>> = HashMap::new();
    for request in requests {
        let body = request.json();
        bodies.entry(body["updateId"].as_str().expect("updateId").to_owned()).or_default().push(body);
    }
    bodies
}

/// The numbers in the metadata of each lead's updates, in the order of their delivery.
pub(crate) fn numbers(requests: &[Request]) -> BTreeMap<String, Vec<u64>> {
    let mut numbers = BTreeMap::<_, Vec<_>>::new();
    for request in requests {
        let body = request.json();
        let lead = body["leadId"].as_str().expect("a lead").to_owned();
        numbers.entry(lead).or_default().push(body["data"]["n"].as_u64().expect("a number"));
    }
    numbers
}

/// A size in KiB from a process's `/proc/PID/status`: `VmRSS` or `VmHWM`. `None` if the process has ended.
pub(crate) fn memory_kib(pid: u32, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
