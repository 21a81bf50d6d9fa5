//! Tenancy: requests to every endpoint and every query with the key or id of another project find nothing of the first
//! project. If an endpoint or a subject is missing here, the test fails.

use contract::{
    ObjectId, Timestamp,
    key::{ApiKey, Scope},
    rpc::{self, CreateKey, ListKeys, Query, RevokeKey, RpcError},
};
use reqwest::Method;
use secrets::api_key;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{Api, Stack, TEST_TIMEOUT, assert_includes, assert_ok, create_key, process_id, send};

/// Subjects of queries for operators, which contain no project. NATS permissions reject them from tenants.
const OPERATORS: [&str; 9] = [
    // The reply is the same for every project.
    rpc::CheckUrls::SUBJECT,
    rpc::CreateProject::SUBJECT,
    rpc::RevokeKey::SUBJECT,
    rpc::EnableCallback::SUBJECT,
    rpc::PauseCallback::SUBJECT,
    rpc::RotateSecrets::SUBJECT,
    rpc::GetRecovery::SUBJECT,
    rpc::GetLag::SUBJECT,
    rpc::Recover::SUBJECT,
];

/// Words that occur in the first project's data and nowhere else.
const SECRETS: [&str; 4] = ["top-secret", "Ada of the first", "4915100000001", "first-reference"];

/// A project with a process, a lead and an update.
struct Tenant {
    api: Api,
    process_id: ObjectId,
    lead_id: String,
    update_id: String,
    /// The end of a call, with a result.
    activity_id: String,
    callback_id: ObjectId,
    source_id: ObjectId,
    /// The key of `api`.
    key_id: ObjectId,
}

impl Tenant {
    /// The first project, whose callbacks are at `/first` and `/first-fallback`.
    async fn first(stack: &Stack) -> Self {
        let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/first")}])).await;
        let callback_id = applied.process.callbacks[0].callback_id;
        let api = stack.api.clone();
        let callbacks = json!([{"name": "crm", "url": stack.receiver.url("/first-fallback")}]);
        stack.fallback_of(api.project_id, callbacks).await;
        let process_id = process_id(&applied);
        let lead = assert_ok(
            api.post(
                "/api/v1/leads/initiate",
                &json!({"lead": {
                    "projectId": api.project_id, "processId": process_id, "name": SECRETS[1], "phone": SECRETS[2],
                    "referenceId": SECRETS[3], "metadata": {"secret": SECRETS[0]},
                }}),
            )
            .await,
        );
        let lead_id = lead["_id"].as_str().expect("an id").to_owned();
        let update_id = api.update(json!({"leadId": lead_id, "targetState": "interested"})).await;
        assert_eq!(api.outcome(&update_id).await["status"], "succeeded");
        stack.receiver.wait_for_requests("/first", 1, TEST_TIMEOUT).await;
        let ended = json!({"leadId": lead_id, "result": {"summary": SECRETS[0]}});
        let (_, ended) = api.ask(Method::POST, "/api/v1/calls/ended", &[("prefer", "wait=30")], &ended).await;
        let activity_id = ended["updateId"].as_str().expect("an id").to_owned();
        let own = api.get(&format!("/api/v1/activities/{activity_id}")).await;
        assert_eq!((own.0, &own.1["data"]["result"]["summary"]), (200, &json!(SECRETS[0])));
        let source = json!({"name": "dialer", "platform": "bland", "secrets": ["top-secret-of-the-dialer"]});
        let source = assert_ok(api.post(&format!("/api/v1/processes/{process_id}/sources"), &source).await);
        let source_id = source["data"]["sourceId"].as_str().expect("an id").parse().expect("an id");
        let key_id = stack.call(&ListKeys::of_project(api.project_id)).await.items[0].key_id;
        Self { api, process_id, lead_id, update_id, activity_id, callback_id, source_id, key_id }
    }

    /// The lead as its own project sees it.
    async fn lead(&self) -> Value {
        assert_ok(self.api.get(&format!("/api/v1/leads/get?leadId={}", self.lead_id)).await)
    }
}

/// Creates a key of a project.
async fn new_key(
    stack: &Stack,
    project_id: ObjectId,
    scopes: &[Scope],
    expires_at: Option<Timestamp>,
) -> (String, ApiKey) {
    let secret = api_key::generate(rand::random());
    let create = create_key(project_id, "tenancy", &secret);
    let key = stack.call(&CreateKey { scopes: scopes.iter().copied().collect(), expires_at, ..create }).await;
    (secret, key)
}

#[track_caller]
fn assert_reveals_nothing(what: &str, answer: &Value) {
    let text = answer.to_string();
    assert!(SECRETS.iter().all(|secret| !text.contains(secret)), "{what} reveals data of the first project: {text}");
}

/// Requests that try to access the first project's data at an endpoint, each with the expected status for a key of
/// another project.
fn reaching(endpoint: &gateway::Endpoint, first: &Tenant, second: ObjectId) -> Vec<(String, Option<Value>, u16)> {
    let Tenant { process_id, lead_id, update_id, callback_id, source_id, .. } = first;
    let process_path = format!("/api/v1/processes/{process_id}");
    let callback_path = format!("{process_path}/callbacks/{callback_id}");
    // The id of the first project's callback, under a process of the second project.
    let fallback_path = format!("/api/v1/processes/_/callbacks/{callback_id}");
    let callback = json!({"name": "mine", "url": "http://127.0.0.1:1/mine"});
    let source_path = format!("{process_path}/sources/{source_id}");
    let fallback_source = format!("/api/v1/processes/_/sources/{source_id}");
    let source = json!({"name": "mine", "platform": "vapi", "secrets": ["a-secret-of-the-second"]});
    let project_id = first.api.project_id;
    let reference = SECRETS[3];
    let body = |body: Value, status| (endpoint.path.to_owned(), Some(body), status);
    let query = |query: String, status| (format!("{}?{query}", endpoint.path), None, status);
    match (endpoint.method, endpoint.path) {
        // 200 means that the update is accepted. The outcomes are checked later.
        ("POST", "/api/v1/leads/update") => vec![
            body(json!({"leadId": lead_id, "name": "mine"}), 200),
            body(json!({"leadId": lead_id, "projectId": second, "targetState": "lost"}), 200),
            body(json!({"leadId": lead_id, "projectId": project_id, "name": "mine"}), 403),
            body(
                json!({"referenceId": reference, "projectId": project_id, "processId": process_id, "name": "mine"}),
                403,
            ),
            body(json!({"referenceId": reference, "projectId": second, "processId": process_id, "name": "mine"}), 200),
        ],
        // Each body has one line, so that the response is one JSON value.
        ("POST", "/api/v1/leads/update/bulk") => vec![
            body(json!([{"leadId": lead_id, "name": "mine"}]), 200),
            body(json!([{"leadId": lead_id, "projectId": project_id, "name": "mine"}]), 200),
        ],
        ("POST", "/api/v1/calls/started" | "/api/v1/calls/ended") => vec![
            body(json!({"leadId": lead_id, "callId": "mine"}), 200),
            body(json!({"leadId": lead_id, "projectId": project_id}), 403),
            body(json!({"referenceId": reference, "processId": process_id}), 200),
        ],
        ("POST", "/api/v1/calls/started/bulk" | "/api/v1/calls/ended/bulk") => vec![
            body(json!([{"leadId": lead_id}]), 200),
            body(json!([{"leadId": lead_id, "projectId": project_id}]), 200),
        ],
        ("GET", "/api/v1/calls") => vec![query(String::new(), 200), query(format!("leadId={lead_id}"), 200)],
        ("GET", "/api/v1/stats") => vec![query("by=process".into(), 200), query("by=callback".into(), 200)],
        ("POST", "/api/v1/analytics/customer/stats") => {
            let end = service_kit::clock::now().millis() + 60_000;
            let day = json!({"start": end - 86_400_000, "end": end, "includeUniqueLeads": true});
            let of_process = json!({"start": end - 86_400_000, "end": end, "processId": process_id});
            vec![body(day, 200), body(of_process, 200)]
        }
        ("POST", "/api/v1/leads/bulk/initiate") => {
            let lead = json!({"projectId": project_id, "processId": process_id, "name": "x", "email": "x@example.com"});
            vec![body(json!({"leadIds": [lead_id]}), 200), body(json!({"leads": [lead]}), 200)]
        }
        ("POST", "/api/v1/leads/initiate") => {
            let lead = |project: ObjectId| json!({"projectId": project, "processId": process_id, "name": "x", "email": "x@example.com"});
            vec![
                body(json!({"leadId": lead_id}), 404),
                body(json!({"lead": lead(project_id)}), 403),
                body(json!({"lead": lead(second)}), 404),
            ]
        }
        ("GET", "/api/v1/leads/get") => vec![
            query(format!("leadId={lead_id}"), 404),
            query(format!("leadId={lead_id}&projectId={project_id}"), 403),
            query(format!("referenceId={reference}&projectId={project_id}&processId={process_id}"), 403),
            query(format!("referenceId={reference}&projectId={second}&processId={process_id}"), 404),
        ],
        ("GET", "/api/v1/leads") => {
            vec![query(String::new(), 200), query(format!("processId={process_id}&state=interested"), 200)]
        }
        // 200 means that the event is accepted.
        ("DELETE", "/api/v1/leads/{leadId}") => vec![(format!("/api/v1/leads/{lead_id}"), None, 200)],
        ("GET", "/api/v1/leads/{leadId}/updates") => vec![(format!("/api/v1/leads/{lead_id}/updates"), None, 404)],
        ("GET", "/api/v1/deliveries") => vec![
            query(String::new(), 200),
            query("status=delivered".into(), 200),
            query(format!("updateId={update_id}"), 200),
            query(format!("leadId={lead_id}&callbackId={callback_id}"), 200),
        ],
        ("GET", "/api/v1/deliveries/{deliveryId}") => {
            vec![(format!("/api/v1/deliveries/{update_id}-{callback_id}"), None, 404)]
        }
        ("POST", "/api/v1/deliveries/{deliveryId}/redeliver") => {
            vec![(format!("/api/v1/deliveries/{update_id}-{callback_id}/redeliver"), Some(json!({})), 404)]
        }
        ("POST", "/api/v1/deliveries/recover") => ["delivered", "exhausted"]
            .map(|status| {
                body(json!({"since": "2000-01-01T00:00:00Z", "status": status, "callbackId": callback_id}), 200)
            })
            .into(),
        // The response of a valid request never ends. event_stream.rs checks that it has only the events of one
        // project.
        ("GET", "/api/v1/events") => vec![query("lastEventId=nonsense".into(), 400)],
        ("GET", "/api/v1/processes") => vec![query(String::new(), 200)],
        ("POST", "/api/v1/processes") => vec![
            body(json!({"projectId": project_id, "name": "mine", "states": [{"name": "new"}]}), 403),
            body(json!({"processId": process_id, "name": "mine", "states": [{"name": "new"}]}), 400),
            body(
                json!({"name": "mine", "states": [{"name": "new"}], "callbacks": [
                {"callbackId": callback_id, "name": "mine", "url": "http://127.0.0.1:1/mine"}]}),
                404,
            ),
        ],
        ("GET", "/api/v1/processes/{processId}") => vec![(process_path, None, 404)],
        ("PUT", "/api/v1/processes/{processId}") => {
            vec![(process_path, Some(json!({"name": "mine", "states": [{"name": "new"}]})), 404)]
        }
        ("GET", "/api/v1/processes/{processId}/callbacks") => vec![(process_path + "/callbacks", None, 404)],
        ("POST", "/api/v1/processes/{processId}/callbacks") => {
            vec![(process_path + "/callbacks", Some(callback), 404)]
        }
        ("GET" | "DELETE", "/api/v1/processes/{processId}/callbacks/{callbackId}") => {
            vec![(callback_path, None, 404), (fallback_path, None, 404)]
        }
        ("PUT", "/api/v1/processes/{processId}/callbacks/{callbackId}") => {
            vec![(callback_path, Some(callback.clone()), 404), (fallback_path, Some(callback), 404)]
        }
        ("POST", "/api/v1/processes/{processId}/callbacks/{callbackId}/rotate-secret") => vec![
            (callback_path + "/rotate-secret", Some(json!({"overlapSeconds": 0})), 404),
            (fallback_path + "/rotate-secret", Some(json!({})), 404),
        ],
        ("GET", "/api/v1/processes/{processId}/callbacks/{callbackId}/failures") => {
            vec![(callback_path + "/failures", None, 404), (fallback_path + "/failures", None, 404)]
        }
        ("POST", "/api/v1/processes/{processId}/callbacks/{callbackId}/test") => {
            vec![(callback_path + "/test", Some(json!({})), 404), (fallback_path + "/test", Some(json!({})), 404)]
        }
        (
            "POST",
            path @ ("/api/v1/processes/{processId}/callbacks/{callbackId}/enable"
            | "/api/v1/processes/{processId}/callbacks/{callbackId}/pause"
            | "/api/v1/processes/{processId}/callbacks/{callbackId}/resume"),
        ) => {
            let action = &path[path.rfind('/').expect("a slash")..];
            vec![(callback_path + action, Some(json!({})), 404), (fallback_path + action, Some(json!({})), 404)]
        }
        ("POST", "/api/v1/processes/{processId}/callbacks/{callbackId}/backfill") => {
            let body = json!({"since": "2000-01-01T00:00:00Z"});
            vec![(callback_path + "/backfill", Some(body.clone()), 404), (fallback_path + "/backfill", Some(body), 404)]
        }
        ("GET", "/api/v1/processes/{processId}/sources") => vec![(process_path + "/sources", None, 404)],
        ("POST", "/api/v1/processes/{processId}/sources") => vec![(process_path + "/sources", Some(source), 404)],
        ("GET" | "DELETE", "/api/v1/processes/{processId}/sources/{sourceId}") => {
            vec![(source_path, None, 404), (fallback_source, None, 404)]
        }
        ("PUT", "/api/v1/processes/{processId}/sources/{sourceId}") => {
            vec![(source_path, Some(source.clone()), 404), (fallback_source, Some(source), 404)]
        }
        ("GET", "/api/v1/keys") => vec![query(String::new(), 200)],
        ("POST", "/api/v1/keys/{keyId}/revoke") => {
            vec![(format!("/api/v1/keys/{}/revoke", first.key_id), Some(json!({})), 404)]
        }
        ("GET", "/api/v1/activities/{activityId}") => {
            vec![(format!("/api/v1/activities/{}", first.activity_id), None, 404)]
        }
        // The second project's own failed updates contain the ids that they named.
        ("GET", "/api/v1/updates") => {
            vec![query(format!("processId={process_id}"), 200), query("status=succeeded".into(), 200)]
        }
        ("GET", "/api/v1/updates/{updateId}") => vec![(format!("/api/v1/updates/{update_id}"), None, 404)],
        other => panic!("{other:?} is not checked: add how another project would reach for data there"),
    }
}

async fn ask_as(api: &Api, key: Option<&str>, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
    let mut request = api.http.request(method.parse().expect("a method"), format!("{}{path}", api.url));
    if let Some(body) = body {
        request = request.body(body.to_string());
    }
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    send(request).await
}

/// Keys of the first project that must be rejected.
struct RefusedKeys {
    revoked: String,
    expired: String,
    /// For each scope, a key that has all other scopes.
    all_but: Vec<(Scope, String)>,
}

impl RefusedKeys {
    /// Creates the keys, and waits until the gateway has received them.
    async fn create(stack: &Stack, first: &Tenant) -> Self {
        let project_id = first.api.project_id;
        let soon = Timestamp::from_millis(service_kit::clock::now().millis() + 1);
        let (revoked, key) = new_key(stack, project_id, &Scope::ALL, None).await;
        let (expired, _) = new_key(stack, project_id, &Scope::ALL, Some(soon)).await;
        let mut all_but = Vec::new();
        for scope in Scope::ALL {
            let others = Scope::ALL.into_iter().filter(|other| *other != scope).collect::<Vec<_>>();
            all_but.push((scope, new_key(stack, project_id, &others, None).await.0));
        }
        stack.call(&RevokeKey { key_id: key.key_id, project_id: None }).await;
        let keys = Self { revoked, expired, all_but };
        eventually(TEST_TIMEOUT, "the gateway has all keys", async || {
            let get = format!("/api/v1/leads/get?leadId={}", first.lead_id);
            let mut known = true;
            for (scope, key) in &keys.all_but {
                let (status, _) = ask_as(&first.api, Some(key), "GET", &get, None).await;
                known &= status == if *scope == Scope::LeadsRead { 403 } else { 200 };
            }
            let (_, of_revoked) = ask_as(&first.api, Some(&keys.revoked), "GET", &get, None).await;
            known && of_revoked["error"].to_string().contains("revoked")
        })
        .await;
        keys
    }
}

#[tokio::test]
async fn every_endpoint_refuses_missing_invalid_and_insufficient_keys() {
    let stack = Stack::start().await;
    let first = Tenant::first(&stack).await;
    let second = Api::create(stack.api.url.clone(), &stack.client, "second").await;
    let keys = RefusedKeys::create(&stack, &first).await;

    for endpoint in gateway::ENDPOINTS {
        let (_, other_scopes) = keys.all_but.iter().find(|(scope, _)| *scope == endpoint.scope).expect("a key");
        for (path, body, _) in reaching(endpoint, &first, second.project_id) {
            let what = format!("{} {path} {body:?}", endpoint.method);
            for (key, status, code) in [
                (None, 401, "missing_api_key"),
                (Some("lr_unknown"), 401, "invalid_api_key"),
                (Some(keys.revoked.as_str()), 401, "invalid_api_key"),
                (Some(keys.expired.as_str()), 401, "invalid_api_key"),
                (Some(other_scopes.as_str()), 403, "missing_scope"),
            ] {
                let (got, answer) = ask_as(&first.api, key, endpoint.method, &path, body.as_ref()).await;
                assert_eq!((got, &answer["code"]), (status, &json!(code)), "{what}: {answer}");
                assert_reveals_nothing(&what, &answer);
            }
        }
    }
}

#[tokio::test]
async fn no_endpoint_shows_or_changes_the_data_of_another_project() {
    let stack = Stack::start().await;
    let first = Tenant::first(&stack).await;
    let second = Api::create(stack.api.url.clone(), &stack.client, "second").await;
    let fallback = json!([{"name": "crm", "url": stack.receiver.url("/second-fallback")}]);
    stack.fallback_of(second.project_id, fallback).await;
    let before = first.lead().await;
    let configured = first.api.get("/api/v1/processes").await;
    let delivered = stack.receiver.requests_to("/first").len();

    let mut accepted = Vec::new();
    for endpoint in gateway::ENDPOINTS {
        for (path, body, expected) in reaching(endpoint, &first, second.project_id) {
            let what = format!("{} {path} {body:?}", endpoint.method);
            let (status, mut answer) = ask_as(&second, Some(&second.key), endpoint.method, &path, body.as_ref()).await;
            assert_eq!(status, expected, "{what}: {answer}");
            assert_reveals_nothing(&what, &answer);
            if endpoint.path == "/api/v1/leads/bulk/initiate" {
                assert_eq!(answer["success"], json!([]), "{what}: {answer}");
                let errors = answer["errors"].as_array_mut().expect("errors");
                assert_eq!(errors.len(), 1, "{what}");
                // This field repeats the request.
                errors[0]["data"].take();
            }
            if endpoint.path == "/api/v1/analytics/customer/stats" {
                assert_eq!(answer["data"]["attempts"], 0, "{what}: {answer}");
            }
            assert!(!answer.to_string().contains(&first.lead_id), "{what}: {answer}");
            accepted.extend(answer["updateId"].as_str().map(str::to_owned));
        }
    }

    assert_eq!(accepted.len(), 11);
    assert_failed_like_an_unknown_lead(&stack, &first, &second, &accepted).await;
    // Events are delivered in order. Once this one is delivered, any other event to the first project would have
    // arrived.
    let last = first.api.update(json!({"leadId": first.lead_id, "metadata": {"last": true}})).await;
    first.api.outcome(&last).await;
    let at_first = stack.receiver.wait_for_requests("/first", delivered + 1, TEST_TIMEOUT).await;
    assert_eq!(at_first.len(), delivered + 1);
    assert_eq!(at_first[delivered].json()["updateId"], json!(last));
    assert!(stack.receiver.requests_to("/first-fallback").is_empty());
    let mut after = first.lead().await;
    assert_eq!(after["data"]["metadata"]["last"], true);
    for changed in ["metadata", "updatedAt", "activities"] {
        after["data"][changed] = before["data"][changed].clone();
    }
    assert_eq!(after, before, "the lead was changed");
    assert_eq!(first.api.get("/api/v1/processes").await, configured, "the configuration was changed");
    let own = second.get("/api/v1/processes").await.1;
    assert_eq!(own["data"].as_array().map(Vec::len), Some(1), "a process was created: {own}");
}

/// Asserts that accepted updates and call events of the first project's lead fail with the error of a lead that does
/// not exist, and that only the second project receives the outcomes.
async fn assert_failed_like_an_unknown_lead(stack: &Stack, first: &Tenant, second: &Api, accepted: &[String]) {
    let unknown = second.update_and_wait(json!({"leadId": "ffffffffffffffffffffffff", "name": "mine"})).await;
    let mut updates = 0;
    for update_id in accepted {
        let mut timeline = second.outcome(update_id).await;
        assert_includes(&timeline, json!({"status": "failed", "errorCode": unknown["errorCode"]}));
        let outcome = json!({"error": unknown["outcome"]["error"], "data": null});
        assert_includes(&timeline["outcome"], outcome);
        updates += usize::from(timeline["outcome"]["action_type"] == "update");
        assert_eq!(first.api.get(&format!("/api/v1/updates/{update_id}")).await.0, 404);
        // The command, and a reference in the outcome, come from the second project.
        timeline["command"].take();
        timeline["outcome"]["referenceId"].take();
        assert_reveals_nothing("the timeline", &timeline);
    }
    for request in stack.receiver.wait_for_requests("/second-fallback", updates + 1, TEST_TIMEOUT).await {
        assert_eq!(request.json()["data"], Value::Null);
    }
}

/// The subjects that the contract defines.
fn subjects() -> Vec<&'static str> {
    rpc::SUBJECTS.to_vec()
}

#[tokio::test]
async fn no_query_returns_the_data_of_another_project() {
    let stack = Stack::start().await;
    let first = Tenant::first(&stack).await;
    let second = Api::create(stack.api.url.clone(), &stack.client, "second").await;
    let (project_id, before) = (second.project_id, first.lead().await);
    let Tenant { process_id, lead_id, update_id, callback_id, source_id, .. } = &first;
    let ask = async |subject: &str, query: Value| -> Result<Value, RpcError> {
        service_kit::rpc::exchange(&stack.client, subject, &query, rpc::DEFAULT_TIMEOUT).await.map_err(RpcError::from)
    };
    let all = subjects();
    assert!(all.len() >= 10 && all.iter().all(|subject| subject.contains(".rpc.")), "{all:?}");
    for subject in all.into_iter().filter(|subject| !OPERATORS.contains(subject)) {
        let queries = match subject {
            rpc::GetLead::SUBJECT => vec![
                json!({"projectId": project_id, "leadId": lead_id}),
                json!({"projectId": project_id, "processId": process_id, "referenceId": SECRETS[3]}),
            ],
            rpc::InitiateLead::SUBJECT => {
                vec![json!({"projectId": project_id, "processId": process_id, "name": "x", "metadata": {}})]
            }
            rpc::ListLeads::SUBJECT => vec![
                json!({"projectId": project_id, "processId": process_id, "limit": 10}),
                json!({"projectId": project_id, "search": lead_id, "limit": 10}),
                json!({"projectId": project_id, "search": SECRETS[3], "limit": 10}),
            ],
            rpc::GetLeadHistory::SUBJECT => vec![json!({"projectId": project_id, "leadId": lead_id, "limit": 10})],
            rpc::ListCalls::SUBJECT => {
                vec![
                    json!({"projectId": project_id, "limit": 10}),
                    json!({"projectId": project_id, "leadId": lead_id, "limit": 10}),
                ]
            }
            rpc::ListUpdates::SUBJECT => vec![
                json!({"projectId": project_id, "limit": 10}),
                json!({"projectId": project_id, "leadId": lead_id, "limit": 10}),
            ],
            rpc::FindUpdates::SUBJECT => vec![
                json!({"projectId": project_id, "limit": 10}),
                json!({"projectId": project_id, "success": true, "limit": 10}),
            ],
            rpc::CountUpdates::SUBJECT | rpc::CountDeliveries::SUBJECT => {
                let now = service_kit::clock::now();
                let range = rpc::StatisticsRange::new(None, None, None, now).expect("a range");
                vec![json!({"projectId": project_id, "range": range, "by": "process"})]
            }
            rpc::CountActivities::SUBJECT => {
                let to = service_kit::clock::now().millis() + 60_000;
                vec![
                    json!({"projectId": project_id, "from": to - 86_400_000, "to": to, "includeLeads": true}),
                    json!({"projectId": project_id, "from": to - 86_400_000, "to": to, "processId": process_id}),
                ]
            }
            rpc::DryRunUpdate::SUBJECT => vec![
                json!({"projectId": project_id, "command": {"leadId": lead_id, "name": "mine"}}),
                json!({"projectId": project_id, "command": {"processId": process_id, "referenceId": SECRETS[3], "name": "mine"}}),
            ],
            rpc::GetOutcomes::SUBJECT | rpc::GetEvents::SUBJECT => {
                vec![json!({"projectId": project_id, "updateIds": [update_id]})]
            }
            rpc::BackfillCallback::SUBJECT => vec![json!({
                "projectId": project_id, "processId": process_id, "callbackId": callback_id, "since": 0, "perSecond": 1,
            })],
            rpc::ListDeliveries::SUBJECT => {
                [json!({"updateId": update_id}), json!({"leadId": lead_id}), json!({"status": "exhausted"})]
                    .map(|mut filter| {
                        filter["projectId"] = json!(project_id);
                        filter["limit"] = json!(10);
                        filter
                    })
                    .into()
            }
            rpc::GetDelivery::SUBJECT | rpc::Redeliver::SUBJECT => {
                vec![json!({"projectId": project_id, "updateId": update_id, "callbackId": callback_id})]
            }
            rpc::RecoverDeliveries::SUBJECT => ["delivered", "exhausted"]
                .map(|status| json!({"projectId": project_id, "since": 0, "status": status, "perSecond": 1}))
                .into(),
            rpc::GetUpdate::SUBJECT | rpc::ListUpdateDeliveries::SUBJECT => {
                vec![json!({"projectId": project_id, "updateId": update_id})]
            }
            rpc::ListProcesses::SUBJECT => vec![json!({"projectId": project_id, "limit": 10})],
            rpc::GetProcess::SUBJECT => vec![json!({"projectId": project_id, "process": {"id": process_id}})],
            rpc::ChangeProcess::SUBJECT => {
                let spec = json!({"projectId": first.api.project_id, "name": "sales", "states": [{"name": "mine"}]});
                let own = json!({"projectId": project_id, "name": "sales", "states": [{"name": "mine"}]});
                let callback = json!({"name": "mine", "url": "http://127.0.0.1:1"});
                let source = json!({"name": "mine", "platform": "vapi", "secrets": ["a-secret-of-the-second"]});
                [
                    json!({"put": {"spec": spec}}),
                    json!({"put": {"spec": own}}),
                    json!({"addCallback": {"callback": callback}}),
                    json!({"putCallback": {"callbackId": callback_id, "callback": callback}}),
                    json!({"removeCallback": {"callbackId": callback_id}}),
                    json!({"rotateSecret": {"callbackId": callback_id, "overlapSeconds": 0}}),
                    json!({"addSource": {"source": source}}),
                    json!({"putSource": {"sourceId": source_id, "source": source}}),
                    json!({"removeSource": {"sourceId": source_id}}),
                ]
                .map(|change| json!({"projectId": project_id, "process": {"id": process_id}, "change": change}))
                .into()
            }
            rpc::GroupFailures::SUBJECT => {
                vec![json!({"projectId": project_id, "callbackId": callback_id, "since": 0})]
            }
            rpc::TestCallback::SUBJECT => {
                vec![json!({"projectId": project_id, "processId": process_id, "callbackId": callback_id})]
            }
            rpc::VerifyReport::SUBJECT => {
                vec![
                    json!({"projectId": project_id, "processId": process_id, "sourceId": source_id, "signature": "ab"}),
                ]
            }
            // A process with the same name in another project is a separate process.
            rpc::ApplyProcess::SUBJECT => {
                vec![json!({"projectId": project_id, "name": "sales", "states": [{"name": "new", "kind": "initial"}]})]
            }
            // The hash of a key of the first project cannot be used for another project.
            rpc::CreateKey::SUBJECT => vec![json!({
                "projectId": project_id, "name": "x", "sha256": api_key::hash(&first.api.key), "scopes": ["leads:read"], "expiresAt": null,
            })],
            rpc::ListKeys::SUBJECT => vec![
                json!({"projectId": project_id, "limit": 10}),
                json!({"projectId": project_id, "limit": 10, "keyId": first.key_id}),
            ],
            rpc::ListCallbacks::SUBJECT => vec![json!({"projectId": project_id, "details": true})],
            new => panic!("{new} is not checked: add how another project would reach for data there"),
        };
        for query in queries {
            let answer = ask(subject, query.clone()).await;
            let what = format!("{subject} {query}: {answer:?}");
            match (subject, &answer) {
                (
                    rpc::GetLead::SUBJECT
                    | rpc::InitiateLead::SUBJECT
                    | rpc::GetLeadHistory::SUBJECT
                    | rpc::GetUpdate::SUBJECT
                    | rpc::GetDelivery::SUBJECT
                    | rpc::Redeliver::SUBJECT
                    | rpc::GetProcess::SUBJECT
                    | rpc::TestCallback::SUBJECT
                    | rpc::BackfillCallback::SUBJECT
                    | rpc::VerifyReport::SUBJECT,
                    Err(e),
                ) => assert_eq!(e.status, 404, "{what}"),
                (rpc::ChangeProcess::SUBJECT, Err(e)) => assert!(matches!(e.status, 400 | 404), "{what}"),
                (rpc::DryRunUpdate::SUBJECT, Ok(event)) => {
                    assert_eq!(
                        (&event["errorCode"], &event["data"]),
                        (&json!("lead_not_found"), &Value::Null),
                        "{what}"
                    );
                    continue;
                }
                (rpc::GetOutcomes::SUBJECT | rpc::GetEvents::SUBJECT, Ok(found)) => {
                    assert_eq!(found, &json!([]), "{what}")
                }
                (rpc::RecoverDeliveries::SUBJECT, Ok(done)) => assert_eq!(done["deliveries"], 0, "{what}"),
                (
                    rpc::ListLeads::SUBJECT
                    | rpc::ListCalls::SUBJECT
                    | rpc::ListUpdates::SUBJECT
                    | rpc::FindUpdates::SUBJECT
                    | rpc::ListDeliveries::SUBJECT,
                    Ok(page),
                ) => {
                    assert_eq!(page, &json!({"items": [], "next": null}), "{what}")
                }
                // The second project now has its own process of that name.
                (rpc::ListProcesses::SUBJECT, Ok(page)) => {
                    let mut own = page["items"].as_array().expect("items").iter();
                    assert!(own.all(|process| process["projectId"] == json!(project_id)), "{what}");
                    assert!(!page.to_string().contains(&process_id.to_string()), "{what}");
                }
                (rpc::CountUpdates::SUBJECT | rpc::CountDeliveries::SUBJECT, Ok(counts)) => {
                    assert!(!counts.to_string().contains(&process_id.to_string()), "{what}");
                }
                (rpc::GroupFailures::SUBJECT, Ok(failures)) => {
                    assert_eq!(failures["groups"], json!([]), "{what}")
                }
                (rpc::CountActivities::SUBJECT, Ok(counts)) => assert_eq!(counts["calls"]["attempts"], 0, "{what}"),
                (rpc::ListCallbacks::SUBJECT, Ok(callbacks)) => assert_eq!(callbacks, &json!([]), "{what}"),
                (rpc::ListUpdateDeliveries::SUBJECT, Ok(deliveries)) => {
                    assert_eq!(deliveries, &json!({"deliveries": []}), "{what}")
                }
                (rpc::ApplyProcess::SUBJECT, Ok(applied)) => {
                    assert_ne!(applied["process"]["processId"], json!(process_id), "{what}");
                    assert_eq!(applied["process"]["callbacks"], json!([]), "{what}");
                }
                (rpc::CreateKey::SUBJECT, Err(_)) => {}
                (rpc::ListKeys::SUBJECT, Ok(keys)) => {
                    let keys: Vec<ApiKey> = serde_json::from_value(keys["items"].clone()).expect("keys");
                    assert_eq!(keys.is_empty(), query.get("keyId").is_some(), "{what}");
                    assert!(keys.iter().all(|key| key.project_id == project_id), "{what}");
                }
                _ => panic!("{what}"),
            }
            assert_reveals_nothing(&what, &answer.unwrap_or_default());
        }
    }
    assert_eq!(first.lead().await, before);
    let keys = stack.call(&ListKeys::of_project(first.api.project_id)).await.items;
    assert!(keys.iter().all(|key| key.project_id == first.api.project_id && key.scopes == Scope::ALL.into()));
}
