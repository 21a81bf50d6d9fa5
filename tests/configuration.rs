//! Processes are created, changed and previewed over HTTP and with leadctl. Also covers rotation of secrets, test
//! pings, concurrent editors, and keys without the scope.

use contract::{
    ObjectId,
    key::Scope,
    rpc::{CallbackState, CreateKey, ListCallbacks},
};
use reqwest::Method;
use secrets::api_key;
use serde_json::{Value, json};
use test_support::{Reply, Request, eventually};

use crate::support::{
    Api, LeadctlRun, Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, create_key, process_id,
    signature_count, verifies, verify,
};

const PROCESSES: &str = "/api/v1/processes";

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

async fn put(api: &Api, path: &str, if_match: Option<&str>, body: &Value) -> (u16, Value) {
    let headers: Vec<_> = if_match.map(|tag| ("if-match", tag)).into_iter().collect();
    api.ask(Method::PUT, path, &headers, body).await
}

/// A process and its callback `crm`, both created over HTTP, and a lead of it.
struct Configured {
    stack: Stack,
    process_id: ObjectId,
    callback: String,
    callback_id: String,
    secret: String,
    lead_id: String,
}

impl Configured {
    async fn start() -> Self {
        let stack = Stack::start().await;
        let api = &stack.api;
        let spec = json!({"name": "sales", "states": [{"name": "new", "kind": "initial"}, {"name": "lost"}]});
        let process_id = text(&assert_ok(api.post(PROCESSES, &spec).await)["data"]["processId"]);
        let callback =
            json!({"name": "crm", "url": stack.receiver.url("/crm"), "auth": {"type": "bearer", "token": "t0ken"}});
        let callbacks = format!("{PROCESSES}/{process_id}/callbacks");
        let created = assert_ok(api.post(&callbacks, &callback).await);
        assert_eq!(texts(&created["changes"]), ["callback crm added"]);
        let callback_id = text(&created["data"]["callbackId"]);
        let process_id = process_id.parse().expect("an id");
        let lead_id = api.initiate(process_id, None).await;
        let callback = format!("{callbacks}/{callback_id}");
        let secret = text(&created["data"]["secrets"][0]);
        Self { stack, process_id, callback, callback_id, secret, lead_id }
    }

    /// Sends an update, and returns its webhook.
    async fn webhook(&self) -> Request {
        let number = self.stack.receiver.requests_to("/crm").len();
        let update_id = self.stack.api.update(json!({"leadId": self.lead_id, "metadata": {"n": number}})).await;
        let request = self.stack.receiver.wait_for_requests("/crm", number + 1, TEST_TIMEOUT).await.swap_remove(number);
        assert_eq!(request.json()["updateId"], json!(update_id));
        request
    }

    /// Rotates the secret. Returns the new secret and the number of retiring secrets.
    async fn rotate(&self, overlap_seconds: u32) -> (String, Option<usize>) {
        let path = format!("{}/rotate-secret", self.callback);
        let rotated = assert_ok(self.stack.api.post(&path, &json!({"overlapSeconds": overlap_seconds})).await);
        let retiring = rotated["data"]["retiringSecrets"].as_array().map(Vec::len);
        (text(&rotated["data"]["secrets"][0]), retiring)
    }

    /// Sends a test ping, and returns its result.
    async fn test(&self) -> Value {
        assert_ok(self.stack.api.post(&format!("{}/test", self.callback), &json!({})).await)["data"].take()
    }
}

#[tokio::test]
async fn a_process_created_over_http_is_in_force_and_shown_without_secrets() {
    let configured = Configured::start().await;
    let Configured { stack, process_id, callback, callback_id, secret, .. } = &configured;

    let request = configured.webhook().await;

    verify(&request, secret);
    assert_eq!((request.header("authorization"), signature_count(&request)), (Some("Bearer t0ken"), 1));
    let process = format!("{PROCESSES}/{process_id}");
    for path in [PROCESSES, &process, &format!("{process}/callbacks"), callback] {
        let shown = assert_ok(stack.api.get(path).await).to_string();
        assert!(shown.contains(callback_id), "{path}: {shown}");
        assert!(!shown.contains("t0ken") && !shown.contains("whsec") && !shown.contains("sealed"), "{path}: {shown}");
    }
    let same_name = json!({"name": "sales", "states": [{"name": "new"}]});
    assert_refused(stack.api.post(PROCESSES, &same_name).await, 409, "process_exists");
}

#[tokio::test]
async fn a_removed_callback_does_not_exist() {
    let configured = Configured::start().await;
    let (api, callback) = (&configured.stack.api, &configured.callback);

    let removed = assert_ok(api.ask(Method::DELETE, callback, &[], &json!({})).await);

    assert_eq!((texts(&removed["changes"]), &removed["data"]), (vec!["callback crm removed"], &Value::Null));
    assert_refused(api.get(callback).await, 404, "callback_not_found");
    assert_refused(api.post(&format!("{callback}/test"), &json!({})).await, 404, "callback_not_found");
}

#[tokio::test]
async fn rotated_secrets_sign_together_until_the_overlap_ends() {
    let configured = Configured::start().await;
    let (api, first) = (&configured.stack.api, &configured.secret);
    let too_long = json!({"overlapSeconds": 604_801});
    let path = format!("{}/rotate-secret", configured.callback);
    assert_refused(api.post(&path, &too_long).await, 400, "invalid_field");

    let (second, retiring) = configured.rotate(600).await;
    assert_eq!(retiring, Some(1));
    let during = eventually(TEST_TIMEOUT, "the rotation is in force", async || {
        let request = configured.webhook().await;
        if signature_count(&request) == 2 { Ok(request) } else { Err("one signature".to_owned()) }
    })
    .await;
    assert!(verifies(&during, first) && verifies(&during, &second));

    // The second rotation also ends the overlap of the first.
    let (third, retiring) = configured.rotate(3).await;
    assert_eq!(retiring, Some(2));
    let before = api.get(&configured.callback).await;
    let after = eventually(TEST_TIMEOUT, "the overlap is over", async || {
        let request = configured.webhook().await;
        match signature_count(&request) {
            1 if verifies(&request, &third) => Ok(request),
            count => Err(format!("{count} signatures")),
        }
    })
    .await;
    assert!(!verifies(&after, first) && !verifies(&after, &second));
    assert_eq!(api.get(&configured.callback).await, before, "the end of an overlap changes no configuration");
}

#[tokio::test]
async fn a_test_request_reports_the_answer_and_records_nothing() {
    let configured = Configured::start().await;
    let Configured { stack, process_id, callback_id, secret, .. } = &configured;
    stack.receiver.on("/crm", [Reply::status(202).body("heard"), Reply::status(410).body("no t0ken")]);

    let accepted = configured.test().await;
    let refused = configured.test().await;

    let expected = json!({"delivered": true, "statusCode": 202, "response": "heard", "error": null});
    assert_includes(&accepted, expected);
    let request = &stack.receiver.requests_to("/crm")[0];
    verify(request, secret);
    assert_includes(
        &request.json(),
        json!({"action_type": "test", "callbackId": callback_id, "processId": process_id}),
    );
    assert_eq!(request.header("authorization"), Some("Bearer t0ken"));
    assert_eq!(accepted["webhookId"], json!(request.header("webhook-id")));
    assert_includes(&refused, json!({"delivered": false, "statusCode": 410, "response": "no ***"}));
    // A 410 in reply to a test ping does not disable the callback.
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.deliveries").await, 0);
    let query = ListCallbacks { project_id: stack.api.project_id, details: false };
    let listed = stack.call(&query).await.remove(0);
    assert_eq!((listed.state, listed.failing_since), (CallbackState::Healthy, None));
}

#[tokio::test]
async fn a_disabled_callback_is_enabled_over_http() {
    let configured = Configured::start().await;
    let Configured { stack, process_id, callback, callback_id, lead_id, .. } = &configured;
    let enable = format!("{callback}/enable");
    let was_disabled = |was: bool| json!({"success": true, "data": {"wasDisabled": was}});
    assert_eq!(assert_ok(stack.api.post(&enable, &json!({})).await), was_disabled(false));

    stack.receiver.on("/crm", [410]);
    configured.webhook().await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_health WHERE enabled_at IS NULL", 1).await;
    assert_eq!(assert_ok(stack.api.ask(Method::POST, &enable, &[], &Value::Null).await), was_disabled(true));

    configured.webhook().await;
    let of_other_process = enable.replace(&process_id.to_string(), "_");
    for path in [of_other_process, enable.replace(callback_id, lead_id)] {
        assert_refused(stack.api.post(&path, &json!({})).await, 404, "callback_not_found");
    }
}

#[tokio::test]
async fn the_health_of_a_callback_is_read_over_http() {
    let Configured { mut stack, callback, lead_id, .. } = Configured::start().await;
    let read = async |stack: &Stack| assert_ok(stack.api.get(&callback).await);
    let healthy = eventually(TEST_TIMEOUT, "the callback has a health", async || {
        let read = read(&stack).await;
        if read["data"]["health"].is_null() { Err(read) } else { Ok(read) }
    })
    .await;
    let unused = json!({"state": "healthy", "failingSince": null, "disabledSince": null, "reason": null, "pending": 0,
        "oldestPendingAt": null, "lastError": null});
    assert_eq!((&healthy["data"]["health"], &healthy["warnings"]), (&unused, &Value::Null));

    stack.receiver.on("/crm", [503]);
    let update = json!({"leadId": lead_id, "metadata": {"n": 1}});
    stack.api.update(update.clone()).await;
    let failing = eventually(TEST_TIMEOUT, "the callback is failing", async || {
        let read = read(&stack).await;
        let health = read["data"]["health"].clone();
        if health["state"] == "failing" && health["pending"] == 1 { Ok(health) } else { Err(read) }
    })
    .await;
    assert!(text(&failing["lastError"]).contains("503"), "{failing}");
    assert!(failing["failingSince"].is_string() && failing["oldestPendingAt"].is_string(), "{failing}");
    stack.receiver.on("/crm", [410]);
    stack.api.update(update).await;
    let disabled = eventually(TEST_TIMEOUT, "the callback is disabled", async || {
        let read = read(&stack).await;
        let health = &read["data"]["health"];
        // The notifier holds deliveries before it has recorded the disabling and its time.
        let is_recorded = health["state"] == "disabled" && health["disabledSince"].is_string();
        if is_recorded { Ok(read["data"].clone()) } else { Err(read) }
    })
    .await;
    assert!(disabled["health"]["reason"].is_string(), "{disabled}");
    let (list, _) = callback.rsplit_once('/').expect("a path");
    let listed = assert_ok(stack.api.get(list).await);
    assert_eq!((&listed["data"][0]["health"]["state"], &listed["warnings"]), (&json!("disabled"), &Value::Null));
    let unchanged = assert_ok(put(&stack.api, &callback, None, &disabled).await);
    assert_eq!(unchanged["changed"], false, "{unchanged}");

    stack.notifier.terminate().await;
    for path in [callback.as_str(), list] {
        let mut unknown = assert_ok(stack.api.get(path).await);
        assert!(text(&unknown["warnings"][0]).starts_with("health is missing: "), "{unknown}");
        let data = if unknown["data"].is_array() { unknown["data"][0].take() } else { unknown["data"].take() };
        assert_includes(&data, json!({"name": "crm", "health": null}));
    }
}

/// A stack with a process applied by an operator. Also returns the path of the process, its entity tag, and the
/// response of GET.
async fn with_process() -> (Stack, ObjectId, String, String, Value) {
    let stack = Stack::start().await;
    let applied = stack
        .process(json!([{"name": "crm", "url": stack.receiver.url("/crm"), "maxPerSecond": 9,
            "auth": {"type": "header", "name": "X-Key", "value": "v4lue"}}]))
        .await;
    let path = format!("{PROCESSES}/{}", process_id(&applied));
    let answer = stack.api.request(Method::GET, &path).send().await.expect("an answer");
    let etag = answer.headers()["etag"].to_str().expect("a text").to_owned();
    let process: Value = serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
    (stack, process_id(&applied), path, etag, process["data"].clone())
}

#[tokio::test]
async fn a_process_put_back_as_it_was_read_changes_nothing() {
    let (stack, _, path, etag, process) = with_process().await;
    assert_eq!(etag, format!("\"{}\"", process["version"]));

    let same = assert_ok(put(&stack.api, &path, Some(&etag), &process).await);

    assert_eq!((&same["changed"], &same["changes"], &same["data"]), (&json!(false), &json!([]), &process));
}

#[tokio::test]
async fn of_two_editors_the_second_is_refused_and_changes_nothing() {
    let (stack, _, path, etag, process) = with_process().await;
    let api = &stack.api;
    let mut changed = process.clone();
    changed["callTimeoutSeconds"] = json!(60);
    changed["callbacks"][0]["name"] = json!("renamed");

    let answer = assert_ok(put(api, &path, Some(&etag), &changed).await);

    let changes = ["callTimeoutSeconds 7200 → 60", "callback renamed: name crm → renamed"];
    assert_eq!(texts(&answer["changes"]), changes);
    assert_eq!(answer["data"]["callbacks"][0]["callbackId"], process["callbacks"][0]["callbackId"]);
    assert_refused(put(api, &path, Some(&etag), &process).await, 412, "version_mismatch");
    let (_, now) = api.get(&path).await;
    assert_includes(&now["data"], json!({"callTimeoutSeconds": 60, "version": answer["data"]["version"]}));
    let headers = [("if-match", etag.as_str())];
    let callback = format!("{path}/callbacks/{}", text(&process["callbacks"][0]["callbackId"]));
    let new = json!({"name": "new", "url": stack.receiver.url("/crm")});
    for (method, path, body) in [
        (Method::PUT, &callback, &new),
        (Method::DELETE, &callback, &json!({})),
        (Method::POST, &format!("{path}/callbacks"), &new),
        (Method::POST, &format!("{callback}/rotate-secret"), &json!({})),
    ] {
        assert_refused(api.ask(method, path, &headers, body).await, 412, "version_mismatch");
    }
    assert_eq!(api.get(&path).await.1, now);
}

#[tokio::test]
async fn a_put_without_callbacks_keeps_them_and_their_secrets() {
    let (stack, process_id, path, _, process) = with_process().await;

    let renamed = json!({"name": "selling", "states": process["states"]});
    let renamed = assert_ok(put(&stack.api, &path, Some("*"), &renamed).await);

    assert_includes(&renamed["data"], json!({"name": "selling", "callbacks": process["callbacks"]}));
    let lead_id = stack.api.initiate(process_id, None).await;
    stack.api.update(json!({"leadId": lead_id, "targetState": "interested"})).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    assert_eq!((request.header("x-key"), signature_count(request)), (Some("v4lue"), 1));
}

#[tokio::test]
async fn an_invalid_process_is_refused_with_the_reason_and_without_its_secrets() {
    let (stack, process_id, path, _, process) = with_process().await;
    let lead_id = stack.api.initiate(process_id, None).await;
    stack.api.update_and_wait(json!({"leadId": lead_id, "targetState": "interested"})).await;
    let url = stack.receiver.url("/crm");
    let with = |callback: Value| json!({"name": "sales", "states": process["states"], "callbacks": [callback]});

    for (body, status, code, why) in [
        (json!({"name": "sales", "states": [{"name": "new"}]}), 409, "state_in_use", "interested"),
        (json!({"name": "sales", "states": [], "callbacks": []}), 400, "invalid_process", "at least one state"),
        (json!({"name": "_", "states": process["states"]}), 400, "invalid_process", "has no states"),
        (
            with(json!({"name": "a", "url": "http://10.1.2.3/x"})),
            400,
            "url_refused",
            "10.1.2.3 is not allowed: a private network",
        ),
        (with(json!({"name": "a", "url": "http://u:p@127.0.0.1/x"})), 400, "invalid_process", "use auth instead"),
        (with(json!({"name": "a", "url": "http://127.0.0.1:0/x"})), 400, "invalid_process", "port 0"),
        (
            json!({"name": "x".repeat(256), "states": process["states"]}),
            400,
            "invalid_process",
            "name must have 1 to 255 characters",
        ),
        (with(json!({"name": "a", "url": "gopher://x"})), 400, "invalid_process", "not an http or https URL"),
        (
            with(json!({"name": "a", "url": url, "auth": {"type": "bearer"}})),
            400,
            "invalid_process",
            "its secret is missing",
        ),
        (with(json!({"name": "a", "url": url, "secret": "s3cret"})), 400, "invalid_process", "unknown field `secret`"),
    ] {
        let refused = assert_refused(put(&stack.api, &path, None, &body).await, status, code);
        let error = text(&refused["error"]);
        assert!(error.contains(why) && !error.contains("s3cret"), "{body}: {refused}");
    }
    assert_eq!(stack.api.get(&path).await.1["data"], process);
    let unknown = json!({"name": "sales", "states": process["states"]});
    let unknown = put(&stack.api, "/api/v1/processes/ffffffffffffffffffffffff", None, &unknown).await;
    assert_refused(unknown, 404, "process_not_found");
}

#[tokio::test]
async fn the_fallback_process_exists_before_it_has_callbacks() {
    let (stack, ..) = with_process().await;
    let api = &stack.api;
    let empty = assert_ok(api.get("/api/v1/processes/_").await);
    assert_includes(&empty["data"], json!({"version": 0, "callbacks": []}));

    let fallback = json!({"name": "unknown", "url": stack.receiver.url("/unknown")});
    let path = "/api/v1/processes/_/callbacks";
    assert_ok(api.ask(Method::POST, path, &[("if-match", "\"0\"")], &fallback).await);

    eventually(TEST_TIMEOUT, "the fallback callback is in force", async || {
        api.update(json!({"leadId": "0123456789abcdef01234567", "name": "x"})).await;
        stack.receiver.requests_to("/unknown").len() > 1
    })
    .await;
    let first = assert_ok(api.get("/api/v1/processes?limit=1").await);
    assert_eq!(first["data"][0]["name"], "_");
    let rest = assert_ok(api.get(&format!("/api/v1/processes?limit=1&cursor={}", text(&first["next"]))).await);
    assert_eq!((&rest["data"][0]["name"], &rest["next"]), (&json!("sales"), &Value::Null), "{rest}");
}

/// A client with a new key of these scopes.
async fn with_scopes(stack: &Stack, scopes: &[Scope]) -> Api {
    let key = api_key::generate(rand::random());
    let create = create_key(stack.api.project_id, "scoped", &key);
    stack.call(&CreateKey { scopes: scopes.iter().copied().collect(), ..create }).await;
    let api = Api { key, ..stack.api.clone() };
    eventually(TEST_TIMEOUT, "the gateway accepts the key", async || api.get(PROCESSES).await.0 != 401).await;
    api
}

#[tokio::test]
async fn reading_and_changing_the_configuration_need_their_scopes() {
    let (stack, _, path, _, process) = with_process().await;
    let reader = with_scopes(&stack, &[Scope::ConfigRead]).await;
    let usual = with_scopes(&stack, &Scope::DEFAULT).await;

    assert_ok(reader.get(&path).await);
    assert_refused(put(&reader, &path, None, &process).await, 403, "missing_scope");
    assert_refused(usual.get(&path).await, 403, "missing_scope");
    assert_refused(put(&usual, &path, None, &process).await, 403, "missing_scope");
}

/// Runs `leadctl process apply` on a specification.
async fn apply(stack: &Stack, spec: &Value, args: &[&str]) -> LeadctlRun {
    let file = tempfile::NamedTempFile::new().expect("a file");
    // The file begins with a byte order mark, as some editors write it.
    std::fs::write(file.path(), format!("\u{feff}{spec}")).expect("a file");
    let path = file.path().to_str().expect("a path");
    stack.leadctl(&[&["process", "apply", path], args].concat()).await.assert_ok()
}

#[tokio::test]
async fn leadctl_previews_the_changes_of_a_process_and_applies_them() {
    let (stack, _, _, _, process) = with_process().await;
    let listed = stack.leadctl_of_project(&["process", "list"]).await;
    listed.assert_prints(&["sales", "new, interested, followup_2, lost"]);
    let shown = stack.leadctl_of_project(&["process", "get", "sales"]).await.assert_prints(&["lost (terminal)", "crm"]);
    assert!(!shown.stdout.contains("v4lue"), "{shown:?}");
    let mut spec = stack.leadctl_of_project(&["process", "get", "sales", "--spec"]).await.json();
    apply(&stack, &spec, &["--dry-run"]).await.assert_prints(&["unchanged"]);
    spec["callTimeoutSeconds"] = json!(60);
    spec["callbacks"].as_array_mut().expect("a list").push(json!({"name": "inside", "url": "http://10.1.2.3/x"}));

    for _ in 0..2 {
        let preview = apply(&stack, &spec, &["--dry-run"]).await;
        assert!(!preview.text().contains("whsec"), "{preview:?}");
        preview.assert_prints(&[
            "would be changed",
            "callTimeoutSeconds 7200 → 60",
            "callback inside added",
            "10.1.2.3 is not allowed",
        ]);
    }

    apply(&stack, &spec, &[]).await.assert_prints(&["signing secret: whsec_"]);
    apply(&stack, &spec, &[]).await.assert_prints(&["unchanged"]);
    // The process keeps the authentication that the file omits.
    let crm = text(&process["callbacks"][0]["callbackId"]);
    stack.leadctl_of_project(&["callback", "test", &crm]).await.assert_ok();
    assert_eq!(stack.receiver.requests_to("/crm")[0].header("x-key"), Some("v4lue"));
}

#[tokio::test]
async fn leadctl_adds_tests_rotates_and_removes_a_callback() {
    let (stack, ..) = with_process().await;
    let url = stack.receiver.url("/added");
    let add = ["callback", "add", "--process", "sales", "--name", "added", "--url", &url, "--json"];

    let added = stack.leadctl_of_project(&add).await.assert_ok().json();

    assert_eq!(added["changes"], json!(["callback added added"]));
    let callback_id = text(&added["newSecrets"][0]);
    let run = async |args: &[&str]| stack.leadctl_of_project(&[&["callback"], args].concat()).await;
    run(&["test", &callback_id]).await.assert_ok().assert_prints(&["200 after"]);
    assert_eq!(stack.receiver.requests_to("/added")[0].json()["action_type"], "test");
    let rotated = run(&["rotate-secret", &callback_id, "--overlap", "1h"]).await;
    rotated.assert_ok().assert_prints(&["whsec_", "stay valid until"]);
    run(&["test", &callback_id]).await.assert_ok();
    assert_eq!(signature_count(&stack.receiver.requests_to("/added")[1]), 2);
    run(&["list"]).await.assert_ok().assert_prints(&["added", "healthy"]);
    run(&["remove", &callback_id]).await.assert_ok().assert_prints(&["callback added removed"]);
    run(&["test", &callback_id]).await.assert_fails("Callback not found");
}
