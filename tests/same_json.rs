//! The same JSON has the same effect over HTTP, in bulk, by import and over NATS: the same leads, warnings and error
//! codes.

use contract::{ObjectId, streams::LEAD_COMMANDS};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Stack, UPDATE, process_id, send};

/// Forty bodies of one line each. LEAD and REFERENCE stand for the ids of the lead, OURS and PROCESS for its project
/// and process.
const BODIES: [&str; 40] = [
    r#"{"leadId":"LEAD","metadata":{"a":1}}"#,
    r#"{"leadId":"LEAD","metadata":{"a":2},"name":""}"#,
    r#"{"leadId":"LEAD","name":"Ada","make":"Kia"}"#,
    r#"{"leadId":"LEAD","name":"Ada","expectedVersion":"1"}"#,
    r#"{"leadId":"LEAD","expectedVersion":1,"expectedState":"nowhere","dryRun":true}"#,
    r#"{"leadId":"LEAD","updateId":"7","apiKeyId":"7"}"#,
    r#"{"lead_id":"LEAD","target_state":"interested"}"#,
    r#"{"leadId":"LEAD","name":"x\ud83d"}"#,
    r#"{"leadId":"LEAD","emoji":"\ud83d\ude00"}"#,
    r#"{"leadId":"LEAD","nul":"\u0000"}"#,
    "\u{feff}{\"leadId\":\"LEAD\",\"marked\":true}",
    r#"  {"leadId":"LEAD","spaced":[ 1, 2 ]}  "#,
    r#"{"leadId":"LEAD","n":123456789012345678901234567890.50}"#,
    r#"{"leadId":"LEAD","n":1e999}"#,
    r#"{"leadId":"LEAD","b":1,"b":2}"#,
    r#"{"leadId":"LEAD","metadata":{"c":null},"color":"red","size":7}"#,
    r#"{"leadId":"LEAD","metadata":null,"c":null}"#,
    r#"{"leadId":"LEAD","metadata":[]}"#,
    r#"{"leadId":"LEAD","metadata":{}}"#,
    r#"{"leadId":"LEAD"}"#,
    r#"{"leadId":"LEAD","disposition":"hot","userId":"u"}"#,
    r#"{"leadId":"LEAD","disposition":"hot","d":1}"#,
    r#"{"leadId":"LEAD","targetState":"interested","disposition":"hot","userId":"u"}"#,
    r#"{"leadId":"LEAD","targetState":"nowhere"}"#,
    r#"{"leadId":"LEAD","targetState":7}"#,
    r#"{"leadId":"LEAD","targetState":"","name":"","userId":"","disposition":"","e":1}"#,
    r#"{"leadId":"LEAD","name":["Ada"]}"#,
    r#"{"leadId":"LEAD","name":"LONG"}"#,
    r#"{"leadId":"LEAD","projectId":"OURS","f":1}"#,
    r#"{"leadId":"LEAD","projectId":"65e4b2d9f1a2000000000001","f":2}"#,
    r#"{"leadId":"LEAD","projectId":"mine","f":3}"#,
    r#"{"leadId":"65e4b2d9f1a2000000000001","f":4}"#,
    r#"{"leadId":"short","f":5}"#,
    r#"{"referenceId":"REFERENCE","projectId":"OURS","processId":"PROCESS","g":1}"#,
    r#"{"leadId":"","referenceId":"REFERENCE","projectId":"OURS","processId":"PROCESS","g":2}"#,
    r#"{"referenceId":"REFERENCE","projectId":"OURS","g":3}"#,
    r#"{"referenceId":"","leadId":null,"g":4}"#,
    "{\"leadId\":",
    "null",
    r#""text""#,
];

/// The lead and the bodies for one of the four ways to send updates.
struct Way {
    lead: String,
    bodies: Vec<String>,
}

impl Way {
    async fn new(stack: &Stack, process: ObjectId, reference: &str) -> Self {
        let lead = stack.api.initiate(process, Some(reference)).await;
        let body = |body: &&str| {
            let body = body.replace("LEAD", &lead).replace("REFERENCE", reference).replace("LONG", &"x".repeat(1025));
            body.replace("OURS", &stack.api.project_id.to_string()).replace("PROCESS", &process.to_string())
        };
        Self { bodies: BODIES.iter().map(body).collect(), lead }
    }

    /// Waits until all updates of this stack are applied, and returns the resulting lead.
    async fn lead(&self, stack: &Stack) -> Value {
        stack.wait_until_applied().await;
        let lead = stack.api.lead(&self.lead).await;
        let member = |name: &str| (name.to_owned(), lead[name].clone());
        ["name", "currentState", "disposition", "metadata", "version"].into_iter().map(member).collect()
    }
}

/// The error code of a rejected update, or the warnings of an accepted one.
fn judged(answer: &Value) -> Value {
    match answer["code"].as_str() {
        Some(code) => json!(code),
        None => answer.get("warnings").cloned().unwrap_or_else(|| json!([])),
    }
}

async fn over_http(stack: &Stack, way: &Way) -> Vec<Value> {
    let mut answers = Vec::new();
    for body in &way.bodies {
        answers.push(judged(&send(stack.api.request(Method::POST, UPDATE).body(body.clone())).await.1));
    }
    answers
}

async fn in_bulk(stack: &Stack, way: &Way) -> Vec<Value> {
    let request = stack.api.request(Method::POST, &format!("{UPDATE}/bulk")).body(way.bodies.join("\n"));
    let text = request.send().await.expect("an answer").text().await.expect("a body");
    text.lines().map(|line| judged(&serde_json::from_str(line).expect("JSON"))).collect()
}

/// The error codes of rejected rows. An import shows no warnings.
async fn by_import(stack: &Stack, way: &Way) -> Vec<Value> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("updates.ndjson");
    std::fs::write(&file, way.bodies.join("\n")).expect("a file");
    let output = stack.leadctl_command(&["import"]).arg(&file).output().await.expect("leadctl");
    let outcomes = std::fs::read_to_string(dir.path().join("updates.ndjson.outcomes.ndjson"));
    let outcomes = outcomes.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    let judged = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("JSON");
        let is_refused = ["invalid", "rejected"].contains(&row["status"].as_str().expect("a status"));
        if is_refused { row["code"].clone() } else { Value::Null }
    };
    outcomes.lines().map(judged).collect()
}

async fn over_nats(stack: &Stack, way: &Way) -> Vec<Value> {
    let log = stack.js().get_stream(LEAD_COMMANDS).await.expect("the log");
    let mut answers = Vec::new();
    for body in &way.bodies {
        let answer = stack.produce(stack.api.project_id, "update", &[], body).await;
        let Some(sequence) = answer["seq"].as_u64().filter(|sequence| *sequence > 0) else {
            let description = answer["error"]["description"].as_str().expect("an error");
            answers.push(json!(description.split(':').next()));
            continue;
        };
        let command = log.get_raw_message(sequence).await.expect("the command").payload;
        answers.push(judged(&serde_json::from_slice(&command).expect("JSON")));
    }
    answers
}

#[tokio::test]
async fn the_same_json_gives_the_same_leads_warnings_and_codes_on_every_way_in() {
    let stack = Stack::start().await;
    let process = process_id(&stack.process_calling(&[]).await);
    let (http, bulk, import, nats) = (
        Way::new(&stack, process, "R-1").await,
        Way::new(&stack, process, "R-2").await,
        Way::new(&stack, process, "R-3").await,
        Way::new(&stack, process, "R-4").await,
    );

    let answers = over_http(&stack, &http).await;

    let refused = answers.iter().filter(|answer| answer.is_string()).count();
    let warned = answers.iter().filter(|answer| answer.as_array().is_some_and(|warnings| !warnings.is_empty())).count();
    assert!(refused >= 15 && warned >= 5, "{refused} are refused, {warned} have warnings");
    let lead = http.lead(&stack).await;
    let by_body = |answers: Vec<Value>| BODIES.into_iter().zip(answers).collect::<Vec<_>>();
    assert_eq!(by_body(in_bulk(&stack, &bulk).await), by_body(answers.clone()));
    assert_eq!(bulk.lead(&stack).await, lead);
    assert_eq!(by_body(over_nats(&stack, &nats).await), by_body(answers.clone()));
    assert_eq!(nats.lead(&stack).await, lead);
    let codes = answers.into_iter().map(|answer| if answer.is_string() { answer } else { Value::Null }).collect();
    assert_eq!(by_body(by_import(&stack, &import).await), by_body(codes));
    assert_eq!(import.lead(&stack).await, lead);
}

const CALL_BODIES: [&str; 14] = [
    r#"{"leadId":"LEAD","callId":"c-1","timeoutSeconds":600}"#,
    r#"{"referenceId":"REFERENCE","processId":"PROCESS","callId":"c-2"}"#,
    r#"{"referenceId":"REFERENCE","projectId":"OURS","processId":"PROCESS","callId":null}"#,
    r#"{"leadId":"LEAD","callId":""}"#,
    r#"{"leadId":"LEAD","callId":"LONG"}"#,
    r#"{"leadId":"LEAD","callId":7}"#,
    r#"{"leadId":"LEAD","call_id":"c-1"}"#,
    r#"{"leadId":"LEAD","timeoutSeconds":-1}"#,
    r#"{"leadId":"LEAD","updateId":"LEAD"}"#,
    r#"{"leadId":"LEAD","projectId":"65e4b2d9f1a2000000000001"}"#,
    r#"{"referenceId":"REFERENCE"}"#,
    r#"{"callId":"c-1"}"#,
    "[]",
    "{",
];

#[tokio::test]
async fn the_same_call_event_is_judged_alike_on_every_way_in() {
    let stack = Stack::start().await;
    let process = process_id(&stack.process_calling(&[]).await);
    let lead = stack.api.initiate(process, Some("R-1")).await;
    let bodies = CALL_BODIES.map(|body| {
        let body = body.replace("LEAD", &lead).replace("REFERENCE", "R-1").replace("LONG", &"x".repeat(1025));
        body.replace("OURS", &stack.api.project_id.to_string()).replace("PROCESS", &process.to_string())
    });
    for (path, kind) in [("/api/v1/calls/started", "call.started"), ("/api/v1/calls/ended", "call.ended")] {
        let (mut http, mut bulk, mut nats) = (Vec::new(), Vec::new(), Vec::new());
        for body in &bodies {
            let code = |answer: &Value| answer["code"].as_str().unwrap_or("accepted").to_owned();
            http.push(code(&send(stack.api.request(Method::POST, path).body(body.clone())).await.1));
            // Each line is a separate request, because a broken line ends the body.
            let request = stack.api.request(Method::POST, &format!("{path}/bulk"));
            let lines = request.header("content-type", "application/x-ndjson").body(format!("{body}\n"));
            bulk.push(code(&send(lines).await.1));
            let answer = stack.produce(stack.api.project_id, kind, &[], body).await;
            let refused = answer["error"]["description"].as_str().and_then(|text| text.split(':').next());
            nats.push(refused.unwrap_or("accepted").to_owned());
        }
        assert_eq!(http.iter().filter(|code| *code == "accepted").count(), if kind == "call.ended" { 2 } else { 3 });
        // In bulk, an array is a list of lines.
        let array = bodies.iter().position(|body| body == "[]").expect("an array");
        (http[array], bulk[array], nats[array]) = Default::default();
        assert_eq!((&bulk, &nats), (&http, &http));
    }
}
