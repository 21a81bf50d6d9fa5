//! A client of the vendor's lead API, which knows nothing but what the vendor's reference documents, at our base URL.
//!
//! What it checks is what such a client may rely on: fields it sends and reads, statuses, and the errors that the reference
//! quotes. What Leadrelay adds is not looked at.

use std::collections::BTreeSet;

use contract::Timestamp;
use serde_json::{Value, json};

use crate::stack::{CALL_IN_PROGRESS, SOON, Stack};

/// The client: a base URL and a token.
struct Client {
    base_url: String,
    token: String,
    http: reqwest::Client,
}

impl Client {
    async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let answer = request.bearer_auth(&self.token).send().await.expect("an answer");
        let status = answer.status().as_u16();
        assert!(answer.headers()["content-type"].to_str().is_ok_and(|text| text.starts_with("application/json")));
        (status, serde_json::from_str(&answer.text().await.expect("a body")).expect("JSON"))
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.http.post(format!("{}{path}", self.base_url));
        self.send(request.header("Content-Type", "application/json").body(body.to_string())).await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.send(self.http.get(format!("{}{path}", self.base_url))).await
    }

    async fn initiate(&self, lead: &Value) -> Value {
        let (status, answer) = self.post("/leads/initiate", &json!({"lead": lead, "init": true})).await;
        assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
        answer
    }

    async fn update(&self, body: Value) {
        let (status, answer) = self.post("/leads/update", &body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!((&answer["success"], &answer["message"]), (&json!(true), &json!("Lead update initiated")));
    }
}

/// The fields of a lead as `initiate` answers with it.
const LEAD: [&str; 11] = [
    "_id",
    "name",
    "phone",
    "email",
    "projectId",
    "processId",
    "referenceId",
    "currentState",
    "metadata",
    "createdAt",
    "updatedAt",
];

fn is_id(value: &Value) -> bool {
    value.as_str().is_some_and(|id| id.len() == 24 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Whether all of a lead is there, of the documented types.
fn assert_lead(lead: &Value) {
    for field in LEAD {
        assert!(lead.get(field).is_some(), "no {field}: {lead}");
    }
    assert!(["_id", "projectId", "processId"].iter().all(|field| is_id(&lead[field])), "{lead}");
    assert!(lead["name"].is_string() && lead["currentState"].is_string() && lead["metadata"].is_object(), "{lead}");
    for field in ["createdAt", "updatedAt"] {
        assert!(
            lead[field].as_str().is_some_and(|at| at.parse::<Timestamp>().is_ok()),
            "{field} is not ISO 8601: {lead}"
        );
    }
}

/// An error as the reference shows them.
fn assert_error((status, answer): (u16, Value), expected: u16, text: &str) {
    let error = answer["error"].as_str().unwrap_or_else(|| panic!("no error: {answer}"));
    assert_eq!(status, expected, "{answer}");
    assert_eq!(answer["success"], json!(false), "{answer}");
    assert!(error.contains(text), "{text:?} is not in {error:?}");
}

#[tokio::test]
async fn a_client_of_the_vendors_api_works_by_base_url_alone() {
    // The vendor's rate limit: a hundred requests in five seconds. Updates are documented without one.
    let stack = Stack::start_with(&[("GATEWAY_OTHER_RATE", "100")]).await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process = applied.process.process_id.expect("an id").to_string();
    let project = stack.api.project_id.to_string();
    let client = Client {
        base_url: format!("{}/api/v1", stack.api.url),
        token: stack.api.key.clone(),
        http: test_support::http_client(),
    };
    let place = |mut lead: Value| {
        lead["projectId"] = json!(project);
        lead["processId"] = json!(process);
        lead
    };

    // Initiate Lead.
    let made = client
        .initiate(&place(json!({
            "groupId": "spring", "phone": "+14155550123", "email": "Ada@Example.com", "firstName": "Ada",
            "lastName": "Lovelace", "referenceId": "AB123456789", "metadata": {"make": "Kia", "year": 2024},
        })))
        .await;
    assert_lead(&made);
    assert_eq!((&made["name"], &made["email"]), (&json!("Ada Lovelace"), &json!("ada@example.com")));
    assert_eq!((&made["phone"], &made["referenceId"]), (&json!("+14155550123"), &json!("AB123456789")));
    assert_eq!(made["metadata"], json!({"make": "Kia", "year": 2024}));
    let lead_id = made["_id"].as_str().expect("an id").to_owned();
    assert_lead(&client.initiate(&place(json!({"name": "Grace", "email": "grace@example.com"}))).await);
    let (status, known) = client.post("/leads/initiate", &json!({"leadId": lead_id})).await;
    assert_eq!((status, &known), (200, &made));
    let initiate = async |body: Value| client.post("/leads/initiate", &body).await;
    let lead = |more: &[(&str, Value)]| {
        let mut lead = place(json!({"name": "Ada", "phone": "+14155550199"}));
        more.iter().for_each(|(name, value)| lead[*name] = value.clone());
        json!({"lead": lead})
    };
    assert_error(initiate(json!({})).await, 400, "Either leadId or lead object is required");
    let error = "projectId is required in lead object";
    assert_error(initiate(lead(&[("projectId", Value::Null)])).await, 400, error);
    let other = json!("65e4b2d9f1a2b3c4d5e6f708");
    let mismatch = "projectId does not match authenticated project";
    assert_error(initiate(lead(&[("projectId", other.clone())])).await, 403, mismatch);
    let pattern = "Phone number contains repeating digits pattern";
    assert_error(initiate(lead(&[("phone", json!("+1111111111"))])).await, 400, pattern);
    let twice = "already exists for this project and process";
    assert_error(initiate(lead(&[("referenceId", json!("AB123456789"))])).await, 400, twice);
    assert_error(initiate(lead(&[("phone", Value::Null)])).await, 400, "");
    assert_error(initiate(lead(&[("name", Value::Null)])).await, 400, "");
    assert_error(initiate(json!({"leadId": other})).await, 404, "");

    // Bulk Initiate Leads.
    let new = place(json!({"firstName": "John", "email": "john@example.com", "referenceId": "J-1"}));
    let again = place(json!({"name": "Ada", "phone": "+14155550123", "referenceId": "AB123456789"}));
    let bad = place(json!({"name": "Jane", "phone": "0000000000"}));
    let bulk = async |body: Value| client.post("/leads/bulk/initiate", &body).await;
    let (status, answer) = bulk(json!({"leads": [new, again, bad], "init": true})).await;
    assert_eq!(status, 200, "{answer}");
    let (success, errors) =
        (answer["success"].as_array().expect("a list"), answer["errors"].as_array().expect("a list"));
    assert_eq!((success.len(), errors.len()), (1, 2), "{answer}");
    assert_lead(&success[0]);
    assert_eq!((&success[0]["name"], &success[0]["referenceId"]), (&json!("John"), &json!("J-1")));
    assert_eq!((&errors[0]["data"], &errors[0]["referenceId"]), (&again, &json!("AB123456789")));
    assert!(errors[0]["error"].as_str().is_some_and(|error| error.contains(twice)), "{answer}");
    assert_eq!((&errors[1]["data"], &errors[1]["error"]), (&bad, &json!(pattern)));
    let (status, answer) = bulk(json!({"leadIds": [lead_id, other]})).await;
    assert_eq!((status, &answer["success"][0]["_id"], &answer["errors"][0]["data"]), (200, &json!(lead_id), &other));
    assert_error(bulk(json!({})).await, 400, "Either leadIds or leads array is required");
    assert_error(bulk(json!({"leads": {}})).await, 400, "Input must be an array");
    let many = vec![&lead_id; 1001];
    assert_error(bulk(json!({"leadIds": many})).await, 400, "Maximum of 1000 leads allowed per request");

    // Get Lead.
    let (status, found) = client.get(&format!("/leads/get?leadId={lead_id}")).await;
    assert_eq!((status, &found["success"]), (200, &json!(true)), "{found}");
    assert_lead(&found["data"]);
    assert!(LEAD.iter().all(|field| found["data"][field] == made[field]), "{found} and {made}");
    assert_eq!((&found["data"]["lastDisposition"], &found["data"]["activities"]), (&Value::Null, &json!([])));
    let by_reference =
        format!("/leads/get?referenceId=AB123456789&projectId={project}&processId={process}&masked=true");
    let (status, masked) = client.get(&by_reference).await;
    assert_eq!((status, &masked["data"]["_id"]), (200, &json!(lead_id)), "{masked}");
    let phone = masked["data"]["phone"].as_str().expect("a phone");
    assert!(phone.ends_with("0123") && !phone.contains("415555"), "{phone}");
    assert_error(client.get("/leads/get").await, 400, "Either leadId or referenceId is required");
    let incomplete = "projectId and processId are required when using referenceId";
    assert_error(client.get("/leads/get?referenceId=AB123456789").await, 400, incomplete);
    assert_error(client.get("/leads/get?leadId=65e4b2d9f1a2b3c4d5e6f708").await, 404, "not found");
    let strange = by_reference.replace("AB123456789", "nobody");
    assert_error(client.get(&strange).await, 404, "not found");

    // Update Lead: the answer says only that it was accepted, the webhook what became of it.
    client
        .update(json!({
            "leadId": lead_id, "metadata": {"make": "Toyota", "model": "Camry"}, "name": "Ada King",
            "targetState": "interested", "disposition": "wants a test drive", "userId": "agent-7",
        }))
        .await;
    client
        .update(json!({"referenceId": "AB123456789", "projectId": project, "processId": process, "colour": "red"}))
        .await;
    client.update(json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    let webhooks = stack.receiver.wait_for_requests("/crm", 3, SOON).await;
    for webhook in &webhooks {
        let body = webhook.json();
        let fields: BTreeSet<&str> = body.as_object().expect("an object").keys().map(String::as_str).collect();
        let documented =
            ["action_type", "updateId", "success", "error", "leadId", "referenceId", "timestamp", "data"].into();
        assert_eq!(fields, documented);
        assert_eq!((&body["action_type"], &body["leadId"]), (&json!("update"), &json!(lead_id)));
        assert!(is_id(&body["updateId"]) && body["timestamp"].as_u64().is_some_and(|at| at > 1_768_000_000_000));
        assert_eq!(body["referenceId"], "AB123456789");
        match body["success"].as_bool().expect("a bool") {
            true => assert!(body["error"].is_null() && body["data"]["make"] == "Toyota", "{body}"),
            false => assert!(body["error"].is_string() && body["data"].is_null(), "{body}"),
        }
    }
    let whole = json!({"make": "Toyota", "year": 2024, "model": "Camry", "colour": "red"});
    assert!(webhooks.iter().any(|webhook| webhook.json()["data"] == whole), "{webhooks:?}");
    let (_, found) = client.get(&format!("/leads/get?leadId={lead_id}")).await;
    let lead = &found["data"];
    assert_eq!((&lead["name"], &lead["metadata"]), (&json!("Ada King"), &whole));
    assert_eq!((&lead["currentState"], &lead["lastDisposition"]), (&json!("interested"), &json!("wants a test drive")));
    assert_eq!(lead["activities"].as_array().map(Vec::len), Some(3), "{lead}");

    // A call is in progress: the failure that the reference shows.
    let call = json!({"leadId": lead_id, "callId": "c-1"}).to_string();
    stack.publish(format!("leads.cmd.{project}.call.started"), call).await;
    client.update(json!({"leadId": lead_id, "metadata": {"make": "Kia"}})).await;
    let webhooks = stack.receiver.wait_for_requests("/crm", 4, SOON).await;
    let refused =
        webhooks.iter().find(|webhook| webhook.json()["error"] == CALL_IN_PROGRESS).expect("a webhook").json();
    assert_eq!((&refused["success"], &refused["data"]), (&json!(false), &Value::Null));

    let update = async |body: Value| client.post("/leads/update", &body).await;
    assert_error(update(json!({"name": "x"})).await, 400, "Either leadId or referenceId is required");
    assert_error(update(json!({"referenceId": "AB123456789", "name": "x"})).await, 400, incomplete);
    let reference = json!({"referenceId": "AB123456789", "projectId": other, "processId": process, "name": "x"});
    assert_error(update(reference).await, 403, mismatch);
    assert_error(update(json!({"leadId": "nonsense", "name": "x"})).await, 400, "leadId");
    assert_error(update(json!({"leadId": lead_id, "metadata": []})).await, 400, "metadata");

    // A token that is none, and more requests than the reference allows.
    let stranger =
        Client { token: "nobody's".to_owned(), base_url: client.base_url.clone(), http: client.http.clone() };
    let (status, answer) = stranger.get(&format!("/leads/get?leadId={lead_id}")).await;
    assert!([401, 403].contains(&status) && answer["error"].is_string(), "{answer}");
    let path = format!("/leads/get?leadId={lead_id}");
    let answers = futures::future::join_all((0..120).map(|_| client.get(&path))).await;
    let limited = answers.into_iter().find(|(status, _)| *status != 200).expect("a limit");
    assert_error(limited, 429, "");
}
