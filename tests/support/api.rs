//! A project's client of the gateway.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use contract::{
    ObjectId,
    key::Scope,
    rpc::{CreateKey, CreateProject},
};
use reqwest::{Method, RequestBuilder};
use secrets::api_key;
use serde_json::{Value, json};
use service_kit::nats::error_chain;
use test_support::eventually;

use super::{TEST_TIMEOUT, call};

pub(crate) const UPDATE: &str = "/api/v1/leads/update";

/// A client of the gateway with a key of one project.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) project_id: ObjectId,
    pub(crate) http: reqwest::Client,
    /// The number of `not_confirmed` responses: the update may or may not be in the log.
    pub(crate) unconfirmed: Arc<AtomicUsize>,
}

impl Api {
    /// A new project with a key of all scopes, known to the gateway.
    pub(crate) async fn create(url: String, client: &async_nats::Client, name: &str) -> Self {
        let project = call(client, &CreateProject { name: name.into() }).await;
        Self::of_project(url, client, project.project_id).await
    }

    /// A key of all scopes for this project, known to the gateway.
    pub(crate) async fn of_project(url: String, client: &async_nats::Client, project_id: ObjectId) -> Self {
        let key = api_key::generate(rand::random());
        call(client, &create_key(project_id, "test", &key)).await;
        let api = Self { url, key, project_id, http: test_support::http_client(), unconfirmed: Arc::default() };
        eventually(TEST_TIMEOUT, "the gateway accepts the key", async || {
            let (status, body) = api.get("/api/v1/leads/get").await;
            if status == 401 { Err(body.to_string()) } else { Ok(()) }
        })
        .await;
        api
    }

    /// A request with this project's key.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.ask(Method::POST, path, &[("content-type", "application/json")], body).await
    }

    /// A request of any method, with headers.
    pub(crate) async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
        let request = self.request(method, path).body(body.to_string());
        send(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await
    }

    /// Initiates a lead, and returns its id.
    pub(crate) async fn initiate(&self, process_id: ObjectId, reference_id: Option<&str>) -> String {
        let lead = json!({
            "projectId": self.project_id, "processId": process_id, "phone": "+4915112345678", "name": "Ada",
            "referenceId": reference_id, "metadata": {"source": "import"},
        });
        let body = assert_ok(self.post("/api/v1/leads/initiate", &json!({"lead": lead, "init": true})).await);
        body["_id"].as_str().expect("an id").to_owned()
    }

    /// Posts an update that must be accepted, and returns its id.
    pub(crate) async fn update(&self, body: Value) -> String {
        let (status, answer) = self.post(UPDATE, &body).await;
        assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
        answer["updateId"].as_str().expect("an id").to_owned()
    }

    /// Posts an update, waits for its outcome, and returns its timeline.
    pub(crate) async fn update_and_wait(&self, body: Value) -> Value {
        self.outcome(&self.update(body).await).await
    }

    /// The lead, read with the project's own key.
    pub(crate) async fn lead(&self, lead_id: &str) -> Value {
        assert_ok(self.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await)["data"].take()
    }

    /// Posts an update until it is accepted, even if the gateway is unavailable in the meantime. Returns its id.
    pub(crate) async fn update_until_accepted(&self, body: &Value) -> String {
        let deadline = Instant::now() + TEST_TIMEOUT * 2;
        loop {
            let fault = match self.try_update(body).await {
                Ok(update_id) => return update_id,
                Err(fault) => fault,
            };
            if fault.contains("not_confirmed") {
                self.unconfirmed.fetch_add(1, Ordering::Relaxed);
            }
            eprintln!("not accepted, sent again: {fault}");
            assert!(Instant::now() < deadline, "the update is not accepted: {fault}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_update(&self, body: &Value) -> Result<String, String> {
        let request = self.request(Method::POST, UPDATE);
        let answer = request.body(body.to_string()).send().await.map_err(|e| error_chain(&e))?;
        let bytes = answer.bytes().await.map_err(|e| error_chain(&e))?;
        let body: Value = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        body["updateId"].as_str().filter(|_| body["success"] == true).map(str::to_owned).ok_or(body.to_string())
    }

    /// Waits until an update has its outcome and returns its timeline.
    pub(crate) async fn outcome(&self, update_id: &str) -> Value {
        eventually(TEST_TIMEOUT, "the update has its outcome", async || {
            let (status, body) = self.get(&format!("/api/v1/updates/{update_id}")).await;
            let done = status == 200 && body["data"]["status"] != "pending";
            if done { Ok(body["data"].clone()) } else { Err(format!("{status} {body}")) }
        })
        .await
    }
}

/// The query that creates a key of all scopes with this text.
pub(crate) fn create_key(project_id: ObjectId, name: &str, key: &str) -> CreateKey {
    CreateKey { project_id, name: name.into(), sha256: api_key::hash(key), scopes: Scope::ALL.into(), expires_at: None }
}

/// Sends a request. Returns the status and the body, which is a JSON string if the response is not JSON.
pub(crate) async fn send(request: RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.expect("an answer");
    let status = answer.status().as_u16();
    let text = answer.text().await.expect("a body");
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// Asserts that a response has the status 200, and returns its body.
#[track_caller]
pub(crate) fn assert_ok((status, body): (u16, Value)) -> Value {
    assert_eq!(status, 200, "{body}");
    body
}

/// Asserts that a request was rejected with this status and code, and returns the body.
#[track_caller]
pub(crate) fn assert_refused((status, body): (u16, Value), expected: u16, code: &str) -> Value {
    assert_eq!((status, &body["code"]), (expected, &json!(code)), "{body}");
    body
}

/// Asserts that `actual` has these members, at any depth. It may have others.
#[track_caller]
pub(crate) fn assert_includes(actual: &Value, expected: Value) {
    let mut merged = actual.clone();
    overlay(&mut merged, &expected);
    assert_eq!(*actual, merged, "expected {expected}");
}

fn overlay(target: &mut Value, with: &Value) {
    match (target, with) {
        (Value::Object(target), Value::Object(with)) => {
            // A member that is null may also be missing.
            let with = with.iter().filter(|(name, value)| !value.is_null() || target.contains_key(*name));
            for (name, value) in with.collect::<Vec<_>>() {
                overlay(target.entry(name).or_insert(Value::Null), value);
            }
        }
        (target, with) => target.clone_from(with),
    }
}

/// All items of a list, read in pages of `limit`, and the number of pages.
pub(crate) async fn all_pages(api: &Api, path: &str, limit: usize) -> (Vec<Value>, usize) {
    let (mut items, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = assert_ok(api.get(&format!("{path}limit={limit}&cursor={cursor}")).await);
        let data = page["data"].as_array().expect("a list");
        assert!(data.len() <= limit, "{page}");
        items.extend(data.iter().cloned());
        pages += 1;
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => return (items, pages),
        }
    }
}

/// The field `name` of each item, as text.
pub(crate) fn ids(items: &[Value], name: &str) -> Vec<String> {
    items.iter().map(|item| item[name].as_str().expect(name).to_owned()).collect()
}
