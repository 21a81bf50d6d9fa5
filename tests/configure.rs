//! Processes configured over HTTP and with leadctl: from nothing to a webhook; secrets that rotate; pings; who may, and what
//! two editors do to each other.

use contract::{
    key::{ApiKey, Scope},
    rpc::{self, CreateKey},
};

use reqwest::Method;
use secrets::api_key;
use serde_json::{Value, json};
use test_support::{Reply, Request, binary, eventually};
use tokio::process::Command;

use crate::stack::{Api, SOON, Stack, verifies, verify};

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

/// The one signature header of a request, in parts.
fn signatures(request: &Request) -> usize {
    request.header("webhook-signature").expect("a signature").split(' ').count()
}

#[tokio::test]
async fn a_process_is_configured_from_nothing_and_its_secret_rotates() {
    let stack = Stack::start().await;
    let api = &stack.api;
    assert_eq!(api.get("/api/v1/processes").await, (200, json!({"success": true, "data": [], "next": null})));

    let (status, made) = api
        .post(
            "/api/v1/processes",
            &json!({"name": "sales", "states": [{"name": "new", "kind": "initial"}, {"name": "lost", "kind": "terminal"}],
                    "transitions": {"new": ["lost"]}, "metadataMerge": "deep", "callTimeoutSeconds": 60}),
        )
        .await;
    assert_eq!(
        (status, &made["changed"], &made["data"]["metadataMerge"]),
        (200, &json!(true), &json!("deep")),
        "{made}"
    );
    let process_id = text(&made["data"]["processId"]);
    let process = format!("/api/v1/processes/{process_id}");
    let (status, again) = api.post("/api/v1/processes", &json!({"name": "sales", "states": [{"name": "new"}]})).await;
    assert_eq!((status, &again["code"]), (409, &json!("process_exists")), "{again}");

    let callbacks = format!("{process}/callbacks");
    let (status, made) = api
        .post(
            &callbacks,
            &json!({"name": "crm", "url": stack.receiver.url("/crm"), "auth": {"type": "bearer", "token": "t0ken"}}),
        )
        .await;
    assert_eq!((status, texts(&made["changes"])), (200, vec!["callback crm added"]), "{made}");
    let first = text(&made["data"]["secrets"][0]);
    let callback_id = text(&made["data"]["callbackId"]);
    let callback = format!("{callbacks}/{callback_id}");

    // What was made is in force, and its secret is not told again.
    let lead_id = api.initiate(process_id.parse().expect("an id"), None).await;
    let update = async |number: usize| {
        let update_id = api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
        let requests = stack.receiver.wait_for_requests("/crm", number, SOON).await;
        assert_eq!(requests[number - 1].json()["updateId"], json!(update_id));
        requests[number - 1].clone()
    };
    let request = update(1).await;
    verify(&request, &first);
    assert_eq!((request.header("authorization"), signatures(&request)), (Some("Bearer t0ken"), 1));
    for path in ["/api/v1/processes", &process, &callbacks, &callback] {
        let (status, shown) = api.get(path).await;
        let shown = shown.to_string();
        assert!(status == 200 && shown.contains(&callback_id), "{path}: {shown}");
        assert!(!shown.contains("t0ken") && !shown.contains("whsec") && !shown.contains("sealed"), "{path}: {shown}");
    }

    // Both secrets sign until the overlap is over, then by itself only the new one does.
    let rotate = format!("{callback}/rotate-secret");
    let (status, refused) = api.post(&rotate, &json!({"overlapSeconds": 604_801})).await;
    assert_eq!((status, &refused["code"]), (400, &json!("invalid_field")), "{refused}");
    let (status, rotated) = api.post(&rotate, &json!({"overlapSeconds": 600})).await;
    let second = text(&rotated["data"]["secrets"][0]);
    assert_eq!((status, rotated["data"]["retiringSecrets"].as_array().map(Vec::len)), (200, Some(1)), "{rotated}");
    let during = eventually(SOON, "the rotation is in force", async || {
        let number = stack.receiver.requests_to("/crm").len() + 1;
        let request = update(number).await;
        if signatures(&request) == 2 { Ok(request) } else { Err("one signature".to_owned()) }
    })
    .await;
    assert!(verifies(&during, &first) && verifies(&during, &second));
    let (status, rotated) = api.post(&rotate, &json!({"overlapSeconds": 3})).await;
    let third = text(&rotated["data"]["secrets"][0]);
    assert_eq!((status, rotated["data"]["retiringSecrets"].as_array().map(Vec::len)), (200, Some(2)), "{rotated}");
    let before = api.get(&callback).await;
    let after = eventually(SOON, "the overlap is over", async || {
        let number = stack.receiver.requests_to("/crm").len() + 1;
        let request = update(number).await;
        match signatures(&request) {
            1 if verifies(&request, &third) => Ok(request),
            count => Err(format!("{count} signatures")),
        }
    })
    .await;
    assert!(!verifies(&after, &first) && !verifies(&after, &second));
    assert_eq!(api.get(&callback).await, before, "nobody changed anything for that");

    // A ping says what it is, goes the way of every webhook, and leaves nothing behind.
    let count = stack.count("SELECT count(*) FROM webhooks.deliveries").await;
    stack.receiver.on("/crm", [Reply::status(202).body("heard")]);
    let (status, tested) = api.post(&format!("{callback}/test"), &json!({})).await;
    let told = &tested["data"];
    assert_eq!((status, &told["delivered"], &told["statusCode"]), (200, &json!(true), &json!(202)), "{tested}");
    assert_eq!((&told["response"], &told["error"]), (&json!("heard"), &Value::Null), "{tested}");
    let ping = stack.receiver.requests_to("/crm").pop().expect("a ping");
    verify(&ping, &third);
    let body = ping.json();
    assert_eq!((&body["action_type"], &body["callbackId"]), (&json!("test"), &json!(callback_id)));
    assert_eq!(body["processId"], json!(process_id));
    assert_eq!(ping.header("authorization"), Some("Bearer t0ken"));
    assert_eq!(told["webhookId"], json!(ping.header("webhook-id")));
    stack.receiver.on("/crm", [Reply::status(410).body("no t0ken")]);
    let (status, tested) = api.post(&format!("{callback}/test"), &json!({})).await;
    let told = &tested["data"];
    assert_eq!((status, &told["delivered"], &told["statusCode"]), (200, &json!(false), &json!(410)), "{tested}");
    assert_eq!(told["response"], "no ***");
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.deliveries").await, count);
    let listed: rpc::CallbackStatus =
        stack.call::<Vec<_>>(rpc::CALLBACK_LIST, &rpc::ListCallbacks { project_id: api.project_id }).await.remove(0);
    assert_eq!(
        (listed.state, listed.failing_since),
        (rpc::CallbackState::Healthy, None),
        "410 disables, a ping does not"
    );

    // Gone is gone.
    let (status, gone) = api.ask(Method::DELETE, &callback, &[], &json!({})).await;
    assert_eq!((status, texts(&gone["changes"]), &gone["data"]), (200, vec!["callback crm removed"], &Value::Null));
    assert_eq!(api.get(&callback).await.1["code"], "callback_not_found");
    assert_eq!(api.post(&format!("{callback}/test"), &json!({})).await.1["code"], "callback_not_found");
}

#[tokio::test]
async fn a_callback_that_its_failures_disabled_is_enabled_over_http() {
    let stack = Stack::start().await;
    let api = &stack.api;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let enable =
        format!("/api/v1/processes/{process_id}/callbacks/{}/enable", applied.process.callbacks[0].callback_id);
    let (status, idle) = api.post(&enable, &json!({})).await;
    assert_eq!((status, idle), (200, json!({"success": true, "data": {"wasDisabled": false}})));

    stack.receiver.on("/crm", [410]);
    let lead_id = api.initiate(process_id, None).await;
    api.update(json!({"leadId": lead_id, "metadata": {"n": 1}})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_health WHERE enabled_at IS NULL", 1, SOON).await;
    let (status, enabled) = api.ask(Method::POST, &enable, &[], &Value::Null).await;
    assert_eq!((status, &enabled["data"]["wasDisabled"]), (200, &json!(true)), "{enabled}");
    let told = api.update(json!({"leadId": lead_id, "metadata": {"n": 2}})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    assert_eq!(requests[1].json()["updateId"], json!(told));

    // A callback of another process, and one of none.
    let elsewhere = enable.replace(&process_id.to_string(), "_");
    for path in [elsewhere, enable.replace(&applied.process.callbacks[0].callback_id.to_string(), &lead_id)] {
        let (status, refused) = api.post(&path, &json!({})).await;
        assert_eq!((status, &refused["code"]), (404, &json!("callback_not_found")), "{path}: {refused}");
    }
}

#[tokio::test]
async fn what_is_got_can_be_put_back_and_nobody_overwrites_another() {
    let stack = Stack::start().await;
    let api = &stack.api;
    let url = stack.receiver.url("/crm");
    let applied = stack
        .process(json!([{"name": "crm", "url": url, "auth": {"type": "header", "name": "X-Key", "value": "v4lue"}, "maxPerSecond": 9}]))
        .await;
    let process_id = applied.process.process_id.expect("an id");
    let path = format!("/api/v1/processes/{process_id}");
    let answer = api.http.get(format!("{}{path}", api.url)).bearer_auth(&api.key).send().await.expect("an answer");
    let etag = answer.headers()["etag"].to_str().expect("a text").to_owned();
    let process: Value = serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
    let process = process["data"].clone();
    assert_eq!(etag, format!("\"{}\"", process["version"]));

    let (status, same) = put(api, &path, Some(&etag), &process).await;
    assert_eq!((status, &same["changed"], &same["changes"]), (200, &json!(false), &json!([])), "{same}");
    assert_eq!(same["data"], process);

    // One editor is first; the other is told, and has changed nothing.
    let mut mine = process.clone();
    mine["callTimeoutSeconds"] = json!(60);
    mine["callbacks"][0]["name"] = json!("renamed");
    let (status, answer) = put(api, &path, Some(&etag), &mine).await;
    assert_eq!(
        (status, texts(&answer["changes"])),
        (200, vec!["callTimeoutSeconds 7200 → 60", "callback renamed: name crm → renamed"]),
        "{answer}"
    );
    assert_eq!(answer["data"]["callbacks"][0]["callbackId"], process["callbacks"][0]["callbackId"]);
    let (status, late) = put(api, &path, Some(&etag), &process).await;
    assert_eq!((status, &late["code"]), (412, &json!("version_mismatch")), "{late}");
    let (_, now) = api.get(&path).await;
    assert_eq!((&now["data"]["callTimeoutSeconds"], &now["data"]["version"]), (&json!(60), &answer["data"]["version"]));
    let headers = [("if-match", etag.as_str())];
    let callback = format!("{path}/callbacks/{}", text(&process["callbacks"][0]["callbackId"]));
    let rotate = format!("{callback}/rotate-secret");
    let new = json!({"name": "new", "url": url});
    for (method, path, body) in [
        (Method::PUT, &callback, &new),
        (Method::DELETE, &callback, &json!({})),
        (Method::POST, &format!("{path}/callbacks"), &new),
        (Method::POST, &rotate, &json!({})),
    ] {
        assert_eq!(api.ask(method, path, &headers, body).await.0, 412, "{path}");
    }
    assert_eq!(api.get(&path).await.1, now);

    // A process may be renamed, its callbacks may stay, and what authenticates is still there.
    let rest = json!({"name": "selling", "states": process["states"]});
    let (status, renamed) = put(api, &path, Some("*"), &rest).await;
    assert_eq!(status, 200, "{renamed}");
    assert_eq!(
        (&renamed["data"]["name"], &renamed["data"]["callbacks"]),
        (&json!("selling"), &now["data"]["callbacks"])
    );
    let lead_id = api.initiate(process_id, None).await;
    api.update(json!({"leadId": lead_id, "targetState": "interested"})).await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    assert_eq!(request.header("x-key"), Some("v4lue"));
    verify(request, applied.process.callbacks[0].secrets[0].expose());

    // What is refused, with why.
    let with = |callback: Value| json!({"name": "selling", "states": process["states"], "callbacks": [callback]});
    for (body, code, why) in [
        (json!({"name": "selling", "states": [{"name": "new"}]}), "state_in_use", "interested"),
        (json!({"name": "selling", "states": [], "callbacks": []}), "invalid_process", "at least one state"),
        (json!({"name": "_", "states": process["states"]}), "invalid_process", "has no states"),
        (
            with(json!({"name": "a", "url": "http://10.1.2.3/x"})),
            "url_refused",
            "10.1.2.3 is not allowed: a private network",
        ),
        (with(json!({"name": "a", "url": "http://u:p@127.0.0.1/x"})), "url_refused", "give auth instead"),
        (with(json!({"name": "a", "url": "gopher://x"})), "invalid_process", "not an http or https URL"),
        (
            with(json!({"name": "a", "url": url, "auth": {"type": "bearer"}})),
            "invalid_process",
            "its secret is missing",
        ),
        (with(json!({"name": "a", "url": url, "secret": "s3cret"})), "invalid_process", "unknown field `secret`"),
    ] {
        let (status, refused) = put(api, &path, None, &body).await;
        assert!(matches!(status, 400 | 409), "{body}: {refused}");
        assert_eq!(refused["code"], code, "{body}: {refused}");
        assert!(
            text(&refused["error"]).contains(why) && !text(&refused["error"]).contains("s3cret"),
            "{body}: {refused}"
        );
    }
    assert_eq!(api.get(&path).await.1["data"]["callbacks"], now["data"]["callbacks"]);
    let nowhere = put(api, "/api/v1/processes/ffffffffffffffffffffffff", None, &rest).await;
    assert_eq!((nowhere.0, &nowhere.1["code"]), (404, &json!("process_not_found")));

    // The fallback callbacks are there before there are any.
    let (status, none) = api.get("/api/v1/processes/_").await;
    assert_eq!((status, &none["data"]["version"], &none["data"]["callbacks"]), (200, &json!(0), &json!([])), "{none}");
    let fallback = json!({"name": "unknown", "url": stack.receiver.url("/unknown")});
    let (status, made) =
        api.ask(Method::POST, "/api/v1/processes/_/callbacks", &[("if-match", "\"0\"")], &fallback).await;
    assert_eq!(status, 200, "{made}");
    eventually(SOON, "the fallback callback is told", async || {
        api.update(json!({"leadId": "0123456789abcdef01234567", "name": "x"})).await;
        stack.receiver.requests_to("/unknown").len() > 1
    })
    .await;
    let (status, first) = api.get("/api/v1/processes?limit=1").await;
    assert_eq!((status, &first["data"][0]["name"]), (200, &json!("_")), "{first}");
    let (_, rest) = api.get(&format!("/api/v1/processes?limit=1&cursor={}", text(&first["next"]))).await;
    assert_eq!((&rest["data"][0]["name"], &rest["next"]), (&json!("selling"), &Value::Null), "{rest}");
}

#[tokio::test]
async fn a_key_that_may_read_the_configuration_may_not_change_it() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let path = format!("/api/v1/processes/{}", applied.process.process_id.expect("an id"));
    let key = async |scopes: &[Scope]| {
        let key = api_key::generate(rand::random());
        let create = CreateKey {
            project_id: stack.api.project_id,
            name: "scoped".into(),
            sha256: api_key::hash(&key),
            scopes: scopes.iter().copied().collect(),
            expires_at: None,
        };
        let _: ApiKey = stack.call(rpc::KEY_CREATE, &create).await;
        let api = Api { key, ..stack.api.clone() };
        eventually(SOON, "the gateway knows the key", async || {
            api.get("/").await.0 == 404 && api.get(&path).await.0 != 401
        })
        .await;
        api
    };
    let reader = key(&[Scope::ConfigRead]).await;
    let usual = key(&Scope::DEFAULT).await;
    let body = json!({"name": "sales", "states": [{"name": "new"}]});
    assert_eq!(reader.get(&path).await.0, 200);
    assert_eq!(put(&reader, &path, None, &body).await.1["code"], "missing_scope");
    assert_eq!(usual.get(&path).await.1["code"], "missing_scope");
    assert_eq!(put(&usual, &path, None, &body).await.1["code"], "missing_scope");
}

/// What leadctl says and whether it succeeds.
async fn leadctl(stack: &Stack, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(binary("leadctl")).args(arguments).env("NATS_URL", stack.nats.url()).output().await;
    let output = output.expect("leadctl");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("UTF-8")).concat();
    (output.status.success(), said)
}

#[tokio::test]
async fn leadctl_shows_what_would_change_and_changes_it() {
    let stack = Stack::start().await;
    let applied = stack
        .process(
            json!([{"name": "crm", "url": stack.receiver.url("/crm"), "auth": {"type": "bearer", "token": "t0ken"}}]),
        )
        .await;
    let project = stack.api.project_id.to_string();
    let run = async |arguments: &[&str]| leadctl(&stack, arguments).await;
    let of_project = async |arguments: &[&str]| run(&[arguments, &["--project", &project]].concat()).await;

    let (_, listed) = of_project(&["process", "list"]).await;
    assert!(listed.contains("sales") && listed.contains("new, interested, followup_2, lost"), "{listed}");
    let (_, shown) = of_project(&["process", "get", "sales"]).await;
    assert!(shown.contains("lost (terminal)") && shown.contains("crm") && !shown.contains("t0ken"), "{shown}");
    let (_, spec) = of_project(&["process", "get", "sales", "--spec"]).await;
    let mut spec: Value = serde_json::from_str(&spec).expect("JSON");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("sales.json");
    let apply = async |spec: &Value, more: &[&str]| {
        std::fs::write(&file, spec.to_string()).expect("a file");
        run(&[&["process", "apply", file.to_str().expect("a path")], more].concat()).await
    };
    assert!(apply(&spec, &["--dry-run"]).await.1.contains("unchanged"));
    spec["callTimeoutSeconds"] = json!(60);
    spec["callbacks"].as_array_mut().expect("a list").push(json!({"name": "inside", "url": "http://10.1.2.3/x"}));
    let (ok, would) = apply(&spec, &["--dry-run"]).await;
    assert!(ok && would.contains("would be changed") && would.contains("callTimeoutSeconds 7200 → 60"), "{would}");
    assert!(would.contains("callback inside added") && would.contains("10.1.2.3 is not allowed"), "{would}");
    assert!(!would.contains("whsec"), "{would}");
    assert!(apply(&spec, &["--dry-run"]).await.1.contains("would be changed"), "nothing was changed");
    let (ok, did) = apply(&spec, &[]).await;
    assert!(ok && did.contains("signing secret: whsec_"), "{did}");
    assert!(apply(&spec, &[]).await.1.contains("unchanged"));

    let url = stack.receiver.url("/added");
    let (ok, added) =
        of_project(&["callback", "add", "--process", "sales", "--name", "added", "--url", &url, "--json"]).await;
    let added: Value = serde_json::from_str(&added).unwrap_or_else(|e| panic!("{e}: {added}"));
    let callback_id = text(&added["newSecrets"][0]);
    assert!(ok && added["changes"] == json!(["callback added added"]), "{added}");
    let (ok, tested) = of_project(&["callback", "test", &callback_id]).await;
    assert!(ok && tested.contains("200 after"), "{tested}");
    assert_eq!(stack.receiver.requests_to("/added")[0].json()["action_type"], "test");
    let (ok, rotated) = of_project(&["callback", "rotate-secret", &callback_id, "--overlap", "1h"]).await;
    assert!(ok && rotated.contains("whsec_") && rotated.contains("stay valid until"), "{rotated}");
    assert!(of_project(&["callback", "test", &callback_id]).await.0);
    assert_eq!(signatures(&stack.receiver.requests_to("/added")[1]), 2);
    let (ok, listed) = of_project(&["callback", "list"]).await;
    assert!(ok && listed.contains("added") && listed.contains("healthy"), "{listed}");
    let (ok, removed) = of_project(&["callback", "remove", &callback_id]).await;
    assert!(ok && removed.contains("callback added removed"), "{removed}");
    let (ok, nowhere) = of_project(&["callback", "test", &callback_id]).await;
    assert!(!ok && nowhere.contains("Callback not found"), "{nowhere}");
    // The token that the file left out is still sent.
    let crm = applied.process.callbacks[0].callback_id.to_string();
    assert!(of_project(&["callback", "test", &crm]).await.0);
    assert_eq!(stack.receiver.requests_to("/crm")[0].header("authorization"), Some("Bearer t0ken"));
}
