//! Callbacks authenticate to their endpoints with several headers, or with access tokens of an OAuth 2.0 server. A PUT
//! of the configuration as it was read keeps the secrets, and no response shows them. A failing token endpoint affects
//! only its own callback.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use reqwest::Method;
use serde_json::{Value, json};
use test_support::{Reply, Request, eventually};

use crate::support::{Stack, TEST_TIMEOUT, assert_ok, assert_refused, process_id};

const CLIENT_SECRET: &str = "client-secret-of-the-test:77";
const HEADER_VALUE: &str = "header-value-of-the-test-77";

/// A response of a token endpoint.
fn grant(token: &str, expires_in: u64) -> Reply {
    let body = json!({"access_token": token, "token_type": "Bearer", "expires_in": expires_in});
    Reply::status(200).header("content-type", "application/json").body(body.to_string())
}

fn oauth2(stack: &Stack, token_path: &str) -> Value {
    json!({"type": "oauth2", "tokenUrl": stack.receiver.url(token_path), "clientId": "relay",
           "clientSecret": CLIENT_SECRET})
}

/// A process with these callbacks, and a lead of it.
async fn lead(stack: &Stack, callbacks: Value) -> String {
    let applied = stack.process(callbacks).await;
    stack.api.initiate(process_id(&applied), None).await
}

async fn update(stack: &Stack, lead_id: &str, number: usize) -> String {
    stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await
}

fn authorizations(requests: &[Request]) -> Vec<&str> {
    requests.iter().map(|request| request.header("authorization").unwrap_or_default()).collect()
}

/// Waits for this many attempts of an update's delivery, and returns their errors.
async fn errors(stack: &Stack, update_id: &str, attempts: usize) -> Vec<String> {
    eventually(TEST_TIMEOUT, "the attempts are recorded", async || {
        let timeline = stack.api.outcome(update_id).await;
        let made = timeline["deliveries"][0]["attempts"].as_array().cloned().unwrap_or_default();
        let errors = made.iter().map(|attempt| attempt["error"].as_str().unwrap_or_default().to_owned());
        let errors: Vec<_> = errors.collect();
        if errors.len() >= attempts { Ok(errors) } else { Err(timeline.to_string()) }
    })
    .await
}

#[tokio::test]
async fn several_headers_are_sent_kept_by_a_put_of_what_is_read_and_never_shown() {
    let stack = Stack::start().await;
    let callbacks = json!([{"name": "crm", "url": stack.receiver.url("/crm"),
        "auth": {"type": "bearer", "token": "t0ken"},
        "headers": [{"name": "X-Key", "value": HEADER_VALUE}, {"name": "X-Subscription", "value": "s0me"}]}]);
    let applied = stack.process(callbacks).await;
    let process = format!("/api/v1/processes/{}", process_id(&applied));
    let callback = format!("{process}/callbacks/{}", applied.process.callbacks[0].callback_id);

    for path in [&process, &callback] {
        let read = assert_ok(stack.api.get(path).await)["data"].take();
        let shown = read.to_string();
        assert!(shown.contains("X-Subscription"), "{shown}");
        assert!(![HEADER_VALUE, "s0me", "t0ken", "sealed"].iter().any(|secret| shown.contains(secret)), "{shown}");
        let put = assert_ok(stack.api.ask(Method::PUT, path, &[], &read).await);
        assert_eq!(put["changed"], json!(false), "{put}");
    }
    let spec = stack.leadctl_of_project(&["process", "get", "sales", "--spec"]).await.assert_ok();
    assert!(!spec.stdout.contains(HEADER_VALUE), "{spec:?}");
    assert_ok(stack.api.post(&format!("{callback}/test"), &json!({})).await);
    let request = &stack.receiver.requests_to("/crm")[0];
    let sent = ["authorization", "x-key", "x-subscription"].map(|name| request.header(name));
    assert_eq!(sent, [Some("Bearer t0ken"), Some(HEADER_VALUE), Some("s0me")]);

    // The values are not kept for a URL of another origin.
    let mut moved = assert_ok(stack.api.get(&callback).await)["data"].take();
    moved["auth"] = json!({"type": "bearer", "token": "t0ken"});
    moved["url"] = json!("http://127.0.0.1:1/elsewhere");
    assert_refused(stack.api.ask(Method::PUT, &callback, &[], &moved).await, 400, "invalid_process");
    let reserved = json!({"name": "x", "url": stack.receiver.url("/x"), "headers": [{"name": "Host", "value": "a"}]});
    assert_refused(stack.api.post(&format!("{process}/callbacks"), &reserved).await, 400, "invalid_process");
}

#[tokio::test]
async fn a_token_is_requested_once_and_renewed_before_it_expires() {
    let stack = Stack::start().await;
    stack.receiver.on("/token", [grant("first", 12), grant("second", 3600)]);
    let mut auth = oauth2(&stack, "/token");
    auth["scope"] = json!("leads:write");
    let callbacks = json!([{"name": "crm", "url": stack.receiver.url("/crm"), "auth": auth}]);
    let lead_id = lead(&stack, callbacks).await;

    for number in 0..5 {
        update(&stack, &lead_id, number).await;
    }
    let requests = stack.receiver.wait_for_requests("/crm", 5, TEST_TIMEOUT).await;
    assert!(authorizations(&requests).iter().all(|value| *value == "Bearer first"), "{requests:?}");
    let tokens = stack.receiver.requests_to("/token");
    assert_eq!(tokens.len(), 1, "one token for all deliveries");
    let credentials = BASE64_STANDARD.encode(format!("relay:{}", CLIENT_SECRET.replace(':', "%3A")));
    assert_eq!(tokens[0].header("authorization"), Some(format!("Basic {credentials}").as_str()));
    assert_eq!(tokens[0].body, "grant_type=client_credentials&scope=leads%3Awrite");

    // The token is replaced from 9 s on, before it expires at 12 s.
    let mut number = 5;
    eventually(TEST_TIMEOUT, "the token is renewed", async || {
        number += 1;
        update(&stack, &lead_id, number).await;
        let requests = stack.receiver.wait_for_requests("/crm", number, TEST_TIMEOUT).await;
        authorizations(&requests).contains(&"Bearer second")
    })
    .await;
    let tokens = stack.receiver.requests_to("/token");
    let between = tokens[1].received_at.duration_since(tokens[0].received_at);
    assert!(tokens.len() == 2 && between < Duration::from_secs(11), "{} requests, {between:?}", tokens.len());
}

#[tokio::test]
async fn a_401_of_the_endpoint_forces_one_new_token() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms,100ms,100ms")]).await;
    stack.receiver.on("/token", ["first", "second", "third"].map(|token| grant(token, 3600)));
    stack.receiver.on("/crm", [401, 200, 401]);
    let callbacks = json!([{"name": "crm", "url": stack.receiver.url("/crm"), "auth": oauth2(&stack, "/token")}]);
    let lead_id = lead(&stack, callbacks).await;

    update(&stack, &lead_id, 0).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    assert_eq!(authorizations(&requests), ["Bearer first", "Bearer second"]);

    // If the endpoint rejects every token, no third token is requested soon.
    let update_id = update(&stack, &lead_id, 1).await;
    let errors = errors(&stack, &update_id, 4).await;
    assert!(errors.iter().all(|error| error == "the endpoint answered 401 Unauthorized"), "{errors:?}");
    assert_eq!(stack.receiver.requests_to("/token").len(), 2);
}

#[tokio::test]
async fn a_token_endpoint_that_fails_is_a_failed_attempt_and_harms_its_own_callback_only() {
    let extra = [("RETRY_SCHEDULE", "0s,100ms,1h"), ("RUST_LOG", "debug")];
    let stack = Stack::start_with(&extra).await;
    let echo = json!({"error": "invalid_client", "error_description": format!("no {CLIENT_SECRET}")});
    stack.receiver.on("/refusing", [Reply::status(401).body(echo.to_string())]);
    stack.receiver.on("/hanging", [Reply::hang()]);
    stack.receiver.on("/dripping", [grant("x", 60).drip(Duration::from_millis(200))]);
    let callback = |name: &str| {
        json!({"name": name, "url": stack.receiver.url(&format!("/{name}-crm")), "timeoutSeconds": 1,
               "auth": oauth2(&stack, &format!("/{name}"))})
    };
    let broken = ["refusing", "hanging", "dripping"];
    let callbacks: Vec<_> = broken.iter().map(|name| callback(name)).collect();
    let mut leads = Vec::new();
    for callback in callbacks {
        let name = callback["name"].clone();
        let spec = json!({"projectId": stack.api.project_id, "name": name, "states": [{"name": "new"}],
            "callbacks": [callback]});
        leads.push(stack.api.initiate(process_id(&stack.apply(spec).await), None).await);
    }
    let internal = json!({"name": "internal", "url": stack.receiver.url("/internal"),
        "auth": {"type": "oauth2", "tokenUrl": "http://10.1.2.3/token", "clientId": "c", "clientSecret": "s"}});
    let healthy = json!({"name": "healthy", "url": stack.receiver.url("/healthy")});
    let healthy_process = stack.process(json!([healthy])).await;
    let healthy_lead = stack.api.initiate(process_id(&healthy_process), None).await;

    let mut updates = Vec::new();
    for lead_id in &leads {
        updates.push(update(&stack, lead_id, 0).await);
        for number in 1..40 {
            update(&stack, lead_id, number).await;
        }
    }
    for number in 0..40 {
        update(&stack, &healthy_lead, number).await;
    }
    stack.receiver.wait_for_requests("/healthy", 40, TEST_TIMEOUT).await;

    for (update_id, expected) in updates.iter().zip([
        "no token: the token endpoint answered 401 Unauthorized: invalid_client (no ***)",
        "no token: the token endpoint did not answer in time",
        "no token: the token endpoint did not answer in time",
    ]) {
        let errors = errors(&stack, update_id, 1).await;
        assert!(errors.iter().all(|error| error == expected), "{errors:?}");
    }
    for name in broken {
        assert_eq!(stack.receiver.requests_to(&format!("/{name}-crm")).len(), 0, "no request without a token");
    }
    // The URL of a token endpoint is checked like that of a callback.
    let process = format!("/api/v1/processes/{}/callbacks", process_id(&healthy_process));
    let refused = stack.api.post(&process, &internal).await;
    assert!(refused.1.to_string().contains("auth.tokenUrl: the address 10.1.2.3 is not allowed"), "{refused:?}");
    assert_refused(refused, 400, "url_refused");
    assert!(!stack.notifier.log().contains("client-secret-of"), "the secret is in the log");
}

#[tokio::test]
async fn a_client_secret_and_its_tokens_are_shown_nowhere_and_kept() {
    let stack = Stack::start_with(&[("RUST_LOG", "debug"), ("RETRY_SCHEDULE", "0s,1h")]).await;
    stack.receiver.on("/token", [grant("t0ken-of-the-server", 3600)]);
    stack.receiver.on("/echo", [Reply::status(500).body("got t0ken-of-the-server")]);
    let mut auth = oauth2(&stack, "/token");
    auth["clientAuthentication"] = json!("client_secret_post");
    let applied = stack.process(json!([{"name": "echo", "url": stack.receiver.url("/echo"), "auth": auth}])).await;
    let callback =
        format!("/api/v1/processes/{}/callbacks/{}", process_id(&applied), applied.process.callbacks[0].callback_id);
    let lead_id = stack.api.initiate(process_id(&applied), None).await;

    let update_id = update(&stack, &lead_id, 0).await;
    errors(&stack, &update_id, 1).await;
    let read = assert_ok(stack.api.get(&callback).await)["data"].take();
    let put = assert_ok(stack.api.ask(Method::PUT, &callback, &[], &read).await);
    let spec = stack.leadctl_of_project(&["process", "get", "sales", "--spec"]).await.assert_ok();
    let timeline = stack.api.outcome(&update_id).await.to_string();

    assert_eq!(put["changed"], json!(false), "{put}");
    let token_request = &stack.receiver.requests_to("/token")[0];
    let expected = "grant_type=client_credentials&client_id=relay&client_secret=client-secret-of-the-test%3A77";
    assert_eq!((token_request.header("authorization"), &token_request.body[..]), (None, expected.as_bytes()));
    assert!(timeline.contains("got ***"), "{timeline}");
    let logs = [&stack.gateway, &stack.lead_state, &stack.notifier].map(|service| service.log()).join("\n");
    let stored = sqlx::query_scalar::<_, String>("SELECT config::text FROM lead_state.processes WHERE name = 'sales'");
    let stored = stored.fetch_one(&stack.pool).await.expect("the process");
    assert!(stored.contains("sealed:v1:"), "{stored}");
    for text in [read.to_string(), spec.stdout, timeline, logs, stored] {
        assert!(!text.contains("client-secret-of") && !text.contains("t0ken-of"), "a secret is shown");
    }
    // With the old secret, an access token would be sent to the new URL.
    let mut moved = read;
    moved["url"] = json!("http://127.0.0.1:1/elsewhere");
    assert_refused(stack.api.ask(Method::PUT, &callback, &[], &moved).await, 400, "invalid_process");
}
