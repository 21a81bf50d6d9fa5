//! Compatibility with the vendor's lead API: a client that uses only features of the vendor's reference works at our
//! base URL. The tests check the documented fields, statuses and errors. They do not check features that Leadrelay
//! adds.

use std::collections::BTreeSet;

use contract::Timestamp;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{CALL_IN_PROGRESS, Stack, TEST_TIMEOUT, assert_ok, process_id};

const REFERENCE: &str = "AB123456789";
const UNKNOWN_ID: &str = "65e4b2d9f1a2b3c4d5e6f708";
const INCOMPLETE: &str = "projectId and processId are required when using referenceId";
const OTHER_PROJECT: &str = "projectId does not match authenticated project";
const DUPLICATE: &str = "already exists for this project and process";
const REPEATING_DIGITS: &str = "Phone number contains repeating digits pattern";

/// A client of the vendor's API: a base URL and a token.
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
        let answer = assert_ok(self.post("/leads/update", &body).await);
        assert_eq!((&answer["success"], &answer["message"]), (&json!(true), &json!("Lead update initiated")));
    }
}

/// The fields of a lead in the answer to `initiate`.
const LEAD: &str = "_id name phone email projectId processId referenceId currentState metadata createdAt updatedAt";

fn is_id(value: &Value) -> bool {
    value.as_str().is_some_and(|id| id.len() == 24 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Asserts that a lead has all documented fields, with their types.
fn assert_lead(lead: &Value) {
    for field in LEAD.split(' ') {
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

/// Asserts that a response is an error in the form of the reference.
fn assert_error((status, answer): (u16, Value), expected: u16, text: &str) {
    let error = answer["error"].as_str().unwrap_or_else(|| panic!("no error: {answer}"));
    assert_eq!(status, expected, "{answer}");
    assert_eq!(answer["success"], json!(false), "{answer}");
    assert!(error.contains(text), "{text:?} is not in {error:?}");
}

/// A system with the vendor's rate limit, and a client with one lead.
struct Vendor {
    stack: Stack,
    client: Client,
    project: String,
    process: String,
    /// The response to `initiate` for the lead.
    lead: Value,
}

impl Vendor {
    async fn start() -> Self {
        // The limit of the reference is a hundred requests in five seconds, except for updates.
        let stack = Stack::start_with(&[("GATEWAY_OTHER_RATE", "100")]).await;
        let process = process_id(&stack.process_calling(&["crm"]).await).to_string();
        let client = Client {
            base_url: format!("{}/api/v1", stack.api.url),
            token: stack.api.key.clone(),
            http: test_support::http_client(),
        };
        let project = stack.api.project_id.to_string();
        let mut vendor = Self { stack, client, project, process, lead: Value::Null };
        let lead = vendor.of_process(json!({
            "groupId": "spring", "phone": "+14155550123", "email": "Ada@Example.com", "firstName": "Ada",
            "lastName": "Lovelace", "referenceId": REFERENCE, "metadata": {"make": "Kia", "year": 2024},
        }));
        vendor.lead = vendor.client.initiate(&lead).await;
        vendor
    }

    /// Adds the project and process to the fields of a lead.
    fn of_process(&self, mut lead: Value) -> Value {
        lead["projectId"] = json!(self.project);
        lead["processId"] = json!(self.process);
        lead
    }

    fn lead_id(&self) -> &str {
        self.lead["_id"].as_str().expect("an id")
    }

    fn by_reference(&self) -> String {
        format!("/leads/get?referenceId={REFERENCE}&projectId={}&processId={}&masked=true", self.project, self.process)
    }
}

#[tokio::test]
async fn initiate_lead_works_as_documented() {
    let vendor = Vendor::start().await;
    let (client, made) = (&vendor.client, &vendor.lead);

    assert_lead(made);
    assert_eq!((&made["name"], &made["email"]), (&json!("Ada Lovelace"), &json!("ada@example.com")));
    assert_eq!((&made["phone"], &made["referenceId"]), (&json!("+14155550123"), &json!(REFERENCE)));
    assert_eq!(made["metadata"], json!({"make": "Kia", "year": 2024}));
    assert_lead(&client.initiate(&vendor.of_process(json!({"name": "Grace", "email": "grace@example.com"}))).await);
    let (status, known) = client.post("/leads/initiate", &json!({"leadId": vendor.lead_id()})).await;
    assert_eq!((status, &known), (200, made));

    let with = |field: &str, value: Value| {
        let mut lead = vendor.of_process(json!({"name": "Ada", "phone": "+14155550199"}));
        lead[field] = value;
        json!({"lead": lead})
    };
    for (body, status, error) in [
        (json!({}), 400, "Either leadId or lead object is required"),
        (with("projectId", Value::Null), 400, "projectId is required in lead object"),
        (with("projectId", json!(UNKNOWN_ID)), 403, OTHER_PROJECT),
        (with("phone", json!("+1111111111")), 400, REPEATING_DIGITS),
        (with("referenceId", json!(REFERENCE)), 400, DUPLICATE),
        (with("phone", Value::Null), 400, ""),
        (with("name", Value::Null), 400, ""),
        (json!({"leadId": UNKNOWN_ID}), 404, ""),
    ] {
        assert_error(client.post("/leads/initiate", &body).await, status, error);
    }
}

#[tokio::test]
async fn bulk_initiate_leads_works_as_documented() {
    let vendor = Vendor::start().await;
    let (client, lead_id) = (&vendor.client, vendor.lead_id());
    let bulk = async |body: Value| client.post("/leads/bulk/initiate", &body).await;

    let new = vendor.of_process(json!({"firstName": "John", "email": "john@example.com", "referenceId": "J-1"}));
    let duplicate = vendor.of_process(json!({"name": "Ada", "phone": "+14155550123", "referenceId": REFERENCE}));
    let invalid = vendor.of_process(json!({"name": "Jane", "phone": "0000000000"}));
    let (status, answer) = bulk(json!({"leads": [new, duplicate, invalid], "init": true})).await;

    assert_eq!(status, 200, "{answer}");
    let (success, errors) =
        (answer["success"].as_array().expect("a list"), answer["errors"].as_array().expect("a list"));
    assert_eq!((success.len(), errors.len()), (1, 2), "{answer}");
    assert_lead(&success[0]);
    assert_eq!((&success[0]["name"], &success[0]["referenceId"]), (&json!("John"), &json!("J-1")));
    assert_eq!((&errors[0]["data"], &errors[0]["referenceId"]), (&duplicate, &json!(REFERENCE)));
    assert!(errors[0]["error"].as_str().is_some_and(|error| error.contains(DUPLICATE)), "{answer}");
    assert_eq!((&errors[1]["data"], &errors[1]["error"]), (&invalid, &json!(REPEATING_DIGITS)));
    let (status, answer) = bulk(json!({"leadIds": [lead_id, UNKNOWN_ID]})).await;
    assert_eq!((status, &answer["success"][0]["_id"]), (200, &json!(lead_id)));
    assert_eq!(answer["errors"][0]["data"], UNKNOWN_ID);
    assert_error(bulk(json!({})).await, 400, "Either leadIds or leads array is required");
    assert_error(bulk(json!({"leads": {}})).await, 400, "Input must be an array");
    let too_many = json!({"leadIds": vec![lead_id; 1001]});
    assert_error(bulk(too_many).await, 400, "Maximum of 1000 leads allowed per request");
}

#[tokio::test]
async fn get_lead_works_as_documented() {
    let vendor = Vendor::start().await;
    let (client, made) = (&vendor.client, &vendor.lead);

    let (status, found) = client.get(&format!("/leads/get?leadId={}", vendor.lead_id())).await;
    let (masked_status, masked) = client.get(&vendor.by_reference()).await;

    assert_eq!((status, &found["success"]), (200, &json!(true)), "{found}");
    assert_lead(&found["data"]);
    assert!(LEAD.split(' ').all(|field| found["data"][field] == made[field]), "{found} and {made}");
    assert_eq!((&found["data"]["lastDisposition"], &found["data"]["activities"]), (&Value::Null, &json!([])));
    assert_eq!((masked_status, &masked["data"]["_id"]), (200, &made["_id"]), "{masked}");
    let phone = masked["data"]["phone"].as_str().expect("a phone");
    assert!(phone.ends_with("0123") && !phone.contains("415555"), "{phone}");
    assert_error(client.get("/leads/get").await, 400, "Either leadId or referenceId is required");
    assert_error(client.get(&format!("/leads/get?referenceId={REFERENCE}")).await, 400, INCOMPLETE);
    assert_error(client.get(&format!("/leads/get?leadId={UNKNOWN_ID}")).await, 404, "not found");
    assert_error(client.get(&vendor.by_reference().replace(REFERENCE, "unknown")).await, 404, "not found");
}

/// Asserts that a webhook has the documented fields.
fn assert_webhook(body: &Value, lead_id: &str) {
    let fields: BTreeSet<&str> = body.as_object().expect("an object").keys().map(String::as_str).collect();
    let documented =
        ["action_type", "updateId", "success", "error", "leadId", "referenceId", "timestamp", "data"].into();
    assert_eq!(fields, documented);
    assert_eq!((&body["action_type"], &body["leadId"]), (&json!("update"), &json!(lead_id)));
    assert!(is_id(&body["updateId"]) && body["timestamp"].as_u64().is_some_and(|at| at > 1_768_000_000_000));
    assert_eq!(body["referenceId"], REFERENCE);
    match body["success"].as_bool().expect("a bool") {
        true => assert!(body["error"].is_null() && body["data"]["make"] == "Toyota", "{body}"),
        false => assert!(body["error"].is_string() && body["data"].is_null(), "{body}"),
    }
}

#[tokio::test]
async fn update_lead_and_its_webhooks_work_as_documented() {
    let vendor = Vendor::start().await;
    let (client, lead_id) = (&vendor.client, vendor.lead_id());

    // The response confirms only that the update was accepted. The webhook has the outcome.
    let whole = json!({
        "leadId": lead_id, "metadata": {"make": "Toyota", "model": "Camry"}, "name": "Ada King",
        "targetState": "interested", "disposition": "wants a test drive", "userId": "agent-7",
    });
    client.update(whole).await;
    client.update(vendor.of_process(json!({"referenceId": REFERENCE, "colour": "red"}))).await;
    client.update(json!({"leadId": lead_id, "targetState": "nowhere"})).await;

    let webhooks = vendor.stack.receiver.wait_for_requests("/crm", 3, TEST_TIMEOUT).await;
    webhooks.iter().for_each(|webhook| assert_webhook(&webhook.json(), lead_id));
    let metadata = json!({"make": "Toyota", "year": 2024, "model": "Camry", "colour": "red"});
    assert!(webhooks.iter().any(|webhook| webhook.json()["data"] == metadata), "{webhooks:?}");
    let (_, found) = client.get(&format!("/leads/get?leadId={lead_id}")).await;
    let lead = &found["data"];
    assert_eq!((&lead["name"], &lead["metadata"]), (&json!("Ada King"), &metadata));
    assert_eq!((&lead["currentState"], &lead["lastDisposition"]), (&json!("interested"), &json!("wants a test drive")));
    assert_eq!(lead["activities"].as_array().map(Vec::len), Some(3), "{lead}");

    // During a call an update fails with the documented error.
    vendor.stack.publish_call("started", &json!({"leadId": lead_id, "callId": "c-1"})).await;
    client.update(json!({"leadId": lead_id, "metadata": {"make": "Kia"}})).await;
    let webhooks = vendor.stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
    let refused = webhooks.iter().map(|webhook| webhook.json()).find(|webhook| webhook["error"] == CALL_IN_PROGRESS);
    assert_webhook(&refused.expect("a webhook"), lead_id);
}

#[tokio::test]
async fn customer_stats_work_as_documented() {
    let vendor = Vendor::start().await;
    let client = &vendor.client;
    let now = Timestamp::from(std::time::SystemTime::now()).millis();

    let ended = json!({"leadId": vendor.lead_id(), "result": {"connected": true}});
    let (status, _) = client.post("/calls/ended", &ended).await;
    let body = json!({
        "start": now - 86_400_000, "end": now + 86_400_000, "processId": vendor.process, "groupId": "spring",
        "timezoneOffsetMinutes": 330, "includeUniqueLeads": true,
    });
    let data = eventually(TEST_TIMEOUT, "the call is counted", async || {
        let (status, answer) = client.post("/analytics/customer/stats", &body).await;
        assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
        if answer["data"]["connected"] == 1 { Ok(answer["data"].clone()) } else { Err(answer.to_string()) }
    })
    .await;

    assert_eq!(status, 200);
    for field in ["attempts", "connected", "incoming", "meaningfullyHandled"] {
        assert!(data[field].is_u64() && data["unique"][field].is_u64(), "{field}: {data}");
    }
    assert!(data["interested"]["total"].is_u64() && data["interested"]["data"].is_array(), "{data}");
    assert_error(client.post("/analytics/customer/stats", &json!({})).await, 400, "start");
}

#[tokio::test]
async fn update_lead_refuses_as_documented() {
    let vendor = Vendor::start().await;
    let lead_id = vendor.lead_id();

    for (body, status, error) in [
        (json!({"name": "x"}), 400, "Either leadId or referenceId is required"),
        (json!({"referenceId": REFERENCE, "name": "x"}), 400, INCOMPLETE),
        (
            json!({"referenceId": REFERENCE, "projectId": UNKNOWN_ID, "processId": vendor.process, "name": "x"}),
            403,
            OTHER_PROJECT,
        ),
        (json!({"leadId": "nonsense", "name": "x"}), 400, "leadId"),
        (json!({"leadId": lead_id, "metadata": []}), 400, "metadata"),
    ] {
        assert_error(vendor.client.post("/leads/update", &body).await, status, error);
    }
}

#[tokio::test]
async fn invalid_tokens_and_too_many_requests_are_refused_as_documented() {
    let vendor = Vendor::start().await;
    let path = format!("/leads/get?leadId={}", vendor.lead_id());
    let Client { base_url, http, .. } = &vendor.client;
    let stranger = Client { token: "invalid".to_owned(), base_url: base_url.clone(), http: http.clone() };

    let (status, answer) = stranger.get(&path).await;
    let answers = futures::future::join_all((0..120).map(|_| vendor.client.get(&path))).await;

    assert!([401, 403].contains(&status) && answer["error"].is_string(), "{answer}");
    let limited = answers.into_iter().find(|(status, _)| *status != 200).expect("a limit");
    assert_error(limited, 429, "");
}
