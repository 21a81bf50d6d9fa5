//! Bulk requests: many leads, or many updates, in one body.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use contract::streams::LEAD_COMMANDS;
use reqwest::{Body, Method, RequestBuilder};
use serde_json::{Value, json};
use test_support::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    Api, LEDGER_ROWS, Stack, TEST_TIMEOUT, UPDATE, assert_includes, assert_ok, assert_refused, ids, memory_kib,
    process_id, send,
};

const UPDATES: &str = "/api/v1/leads/update/bulk";
const INITIATE: &str = "/api/v1/leads/bulk/initiate";

/// A request of updates in bulk.
fn request(api: &Api, body: impl Into<Body>) -> RequestBuilder {
    api.request(Method::POST, UPDATES).body(body)
}

/// Sends a request and returns the lines of the response.
async fn lines(request: RequestBuilder) -> Vec<Value> {
    let answer = request.send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let text = answer.text().await.expect("a body");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The code of each line, or "accepted".
fn codes(answers: &[Value]) -> Vec<&str> {
    answers.iter().map(|answer| answer["code"].as_str().unwrap_or("accepted")).collect()
}

fn ndjson(bodies: &[Value]) -> String {
    bodies.iter().map(|body| format!("{body}\n")).collect()
}

#[tokio::test]
async fn each_line_is_accepted_or_refused_for_itself_in_order() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&[]).await);
    let lead_id = stack.api.initiate(process_id, Some("R")).await;
    let by_reference = json!({"referenceId": "R", "projectId": stack.api.project_id, "processId": process_id, "n": 2,
        "metadata": null});
    let bodies = [
        (json!({"leadId": lead_id, "n": 1}).to_string(), "accepted"),
        ("{\"leadId\":".to_owned(), "invalid_json"),
        (by_reference.to_string(), "accepted"),
        (json!({"leadId": lead_id}).to_string(), "nothing_to_change"),
        (json!({"leadId": lead_id, "long": "x".repeat(300 << 10)}).to_string(), "body_too_large"),
        (json!({"leadId": lead_id, "n": 3, "$dryRun": true}).to_string(), "invalid_field"),
        (json!({"leadId": lead_id, "name": "Eve", "disposition": "hot"}).to_string(), "accepted"),
    ];
    let (texts, expected): (Vec<_>, Vec<_>) = bodies.into_iter().unzip();

    let of_lines = request(&stack.api, texts.join("\n\n")).header("content-type", "application/x-ndjson");
    let of_lines = lines(of_lines).await;
    // The same updates as a JSON array, without the element that is not valid JSON.
    let array = texts.iter().filter(|text| !text.ends_with(':')).cloned().collect::<Vec<_>>().join(",\n");
    let of_array = lines(request(&stack.api, format!("[{array}]"))).await;

    assert_eq!(codes(&of_lines), expected, "{of_lines:?}");
    assert!(of_lines.iter().zip(1..).all(|(answer, number)| answer["line"] == json!(number)), "{of_lines:?}");
    assert_eq!(of_lines[6]["warnings"], json!(["disposition is ignored without targetState"]));
    assert_eq!(codes(&of_array), expected.iter().filter(|code| **code != "invalid_json").copied().collect::<Vec<_>>());
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates WHERE success", 6).await;
    assert_includes(&stack.api.lead(&lead_id).await, json!({"name": "Eve", "metadata": {"n": 2}}));
}

#[tokio::test]
async fn an_array_that_is_cut_off_is_accepted_as_far_as_it_is_complete() {
    let stack = Stack::start().await;
    let update = json!({"leadId": stack.lead(&[]).await, "n": 1});

    let answers = lines(request(&stack.api, format!("[{update},{update}"))).await;

    assert_eq!(codes(&answers), ["accepted", "invalid_json"], "the last element may be incomplete");
    for empty in ["[]", ""] {
        assert_eq!(lines(request(&stack.api, empty)).await, [] as [Value; 0]);
    }
}

#[tokio::test]
async fn a_bulk_request_with_wrong_headers_is_refused_as_a_whole() {
    let stack = Stack::start().await;
    for (name, value, status, code) in [
        ("content-type", "text/csv", 415, "unsupported_media_type"),
        ("if-match", "\"1\"", 400, "invalid_field"),
        ("idempotency-key", "a\"b", 400, "invalid_field"),
    ] {
        assert_refused(send(request(&stack.api, "").header(name, value)).await, status, code);
    }
}

#[tokio::test]
async fn ten_thousand_updates_are_applied_in_order_and_repeated_under_one_key_are_the_same() {
    const COUNT: usize = 10_000;
    let stack = Stack::start().await;
    let leads = stack.leads(&[], 10).await;
    // Each update expects the version that the previous update of its lead produces.
    let update = |n: usize| {
        let lead = &leads[n % leads.len()];
        json!({"leadId": lead, "metadata": {"n": n}, "$expectedVersion": n / leads.len() + 1})
    };
    let bodies: Vec<_> = (0..COUNT).map(update).collect();
    let keyed = |bodies: &[Value]| request(&stack.api, ndjson(bodies)).header("idempotency-key", "import");

    let begun = Instant::now();
    let accepted = ids(&lines(keyed(&bodies)).await, "updateId");
    println!("{COUNT} updates were logged in {:?}", begun.elapsed());

    assert_eq!(accepted.iter().collect::<HashSet<_>>().len(), COUNT);
    // Sends the request again, once with one line too many, and once with a changed third line.
    let too_many = lines(keyed(&[bodies.as_slice(), &bodies[..1]].concat())).await;
    assert_eq!(ids(&too_many[..COUNT], "updateId"), accepted);
    assert_eq!(codes(&too_many[COUNT..]), ["too_many_lines"]);
    let mut changed = bodies[..4].to_vec();
    changed[2]["name"] = json!("Eve");
    let changed = ids(&lines(keyed(&changed)).await, "updateId");
    assert_eq!((&changed[..2], &changed[3]), (&accepted[..2], &accepted[3]));
    assert_ne!(changed[2], accepted[2]);
    let single = stack.api.request(Method::POST, UPDATE).header("idempotency-key", "import");
    assert_refused(send(single.body(bodies[0].to_string())).await, 422, "idempotency_key_reused");
    stack.wait_for_count_within(TEST_TIMEOUT * 4, LEDGER_ROWS, COUNT as i64 + 1).await;
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates WHERE success").await, COUNT as i64);
    assert_eq!(stack.count("SELECT min(version) FROM lead_state.leads").await, COUNT as i64 / 10 + 1);
}

#[tokio::test]
async fn lines_are_answered_while_the_request_is_still_sent() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let line = |n: usize| format!("{}\n", json!({"leadId": lead_id, "metadata": {"n": n}}));
    let mut connection = TcpStream::connect(stack.api.url.strip_prefix("http://").expect("http")).await.expect("TCP");
    let head = format!(
        "POST {UPDATES} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {}\r\ntransfer-encoding: chunked\r\n\r\n",
        stack.api.key
    );
    connection.write_all(head.as_bytes()).await.expect("sent");

    let mut answer = String::new();
    for n in 1..=3 {
        let line = line(n);
        connection.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await.expect("sent");
        while !answer.contains(&format!("{{\"line\":{n},\"success\":true,")) {
            let mut bytes = vec![0; 4096];
            let read = timeout(TEST_TIMEOUT, connection.read(&mut bytes)).await.expect("in time").expect("an answer");
            assert!(read > 0, "{answer}");
            answer += std::str::from_utf8(&bytes[..read]).expect("text");
        }
    }

    // When the client hangs up, its permit is returned, so all permits are free.
    drop(connection);
    eventually(TEST_TIMEOUT, "all permits are free", async || {
        let all = futures::future::join_all((0..16).map(|_| request(&stack.api, line(9)).send())).await;
        all.into_iter().all(|answer| answer.is_ok_and(|answer| answer.status() == 200))
    })
    .await;
}

#[tokio::test]
async fn the_rate_limit_slows_lines_down_and_refuses_none() {
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "20")]).await;
    let lead_id = stack.lead(&[]).await;
    let bodies: Vec<_> = (0..30).map(|n| json!({"leadId": lead_id, "metadata": {"n": n}})).collect();

    let begun = Instant::now();
    let answers = lines(request(&stack.api, ndjson(&bodies))).await;

    assert_eq!(ids(&answers, "updateId").len(), 30);
    // Ten lines exceed the burst; they wait for a rate of four per second.
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_full_log_refuses_a_line_and_all_later_ones() {
    let mut stack = Stack::start_with(&[("STREAM_MAX_BYTES", "1048576")]).await;
    let lead_id = stack.lead(&[]).await;
    // The later lines are small, so each of them alone would still fit.
    let padding = |n| "x".repeat(if n < 80 { 900 } else { 0 });
    let bodies: Vec<_> =
        (0..3000).map(|n| json!({"leadId": lead_id, "metadata": {"n": n, "padding": padding(n)}})).collect();
    // Without lead-state the log is not purged.
    stack.lead_state.terminate().await;
    // Fills the log first, so that it is full before the request exceeds the project's share of the log.
    while stack.stream_state(LEAD_COMMANDS).await.bytes < 985_000 {
        stack.publish_update(&json!({"leadId": lead_id, "metadata": {"padding": "x".repeat(4000)}})).await;
    }
    let before = stack.log_entries().await.len();

    let answers = lines(request(&stack.api, ndjson(&bodies))).await;

    assert_eq!(answers.len(), 3000);
    let refused = answers.iter().position(|answer| answer["success"] == false).expect("a full log");
    assert_eq!(answers[refused]["code"], "log_full", "{}", answers[refused]);
    let chunk_end = (refused / 500 + 1) * 500;
    assert!(answers[chunk_end..].iter().all(|answer| answer["code"] == "log_full"));
    let accepted = answers.iter().filter(|answer| answer["success"] == true).count();
    assert_eq!(stack.log_entries().await.len(), before + accepted);
}

#[tokio::test]
async fn a_body_of_any_size_costs_bounded_memory() {
    const LINES: usize = 400;
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    // Stops lead-state, because applying the updates would only cost time.
    stack.lead_state.terminate().await;
    let line = json!({"leadId": lead_id, "metadata": {"padding": "x".repeat(100 << 10)}}).to_string() + "\n";
    let memory = |field| memory_kib(stack.gateway.pid(), field).expect("the gateway's memory");
    let before = memory("VmRSS");

    let body = line.repeat(LINES);
    let size = body.len() >> 20;
    let answers = lines(request(&stack.api, body)).await;

    assert_eq!(ids(&answers, "updateId").len(), LINES);
    let peak = memory("VmHWM");
    println!("a body of {size} MiB: {} MiB before, {} MiB at most", before / 1024, peak / 1024);
    assert!(peak < before + 16 * 1024, "{before} KiB became {peak} KiB");
}

#[tokio::test]
async fn a_thousand_leads_are_initiated_each_for_itself() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&[]).await);
    let lead = |n: usize| {
        json!({"projectId": stack.api.project_id, "processId": process_id, "name": format!("Ada {n}"),
               "phone": format!("+4915112{n:06}"), "referenceId": format!("R-{n}"), "metadata": {"n": n}})
    };
    let mut leads: Vec<_> = (0..998).map(lead).collect();
    leads.insert(3, json!({"projectId": stack.api.project_id, "processId": process_id, "referenceId": "nameless"}));
    leads.push(lead(7));

    let answer = assert_ok(stack.api.post(INITIATE, &json!({"leads": leads})).await);

    let names = ids(answer["success"].as_array().expect("a list"), "name");
    assert_eq!(names, (0..998).map(|n| format!("Ada {n}")).collect::<Vec<_>>());
    assert_eq!(answer["success"][0]["currentState"], "new");
    let errors = json!([
        {"data": leads[3], "referenceId": "nameless", "error": "name or firstName is required in lead object",
         "code": "missing_field"},
        {"data": leads[999], "referenceId": "R-7", "code": "reference_exists",
         "error": "Lead with referenceId \"R-7\" already exists for this project and process"},
    ]);
    assert_eq!(answer["errors"], errors);
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.leads").await, 998);
}

#[tokio::test]
async fn leads_are_looked_up_by_id_each_for_itself() {
    let stack = Stack::start().await;
    let leads = stack.leads(&[], 2).await;

    let requested = json!([leads[1], "00000000000000000000dead", 7, leads[0]]);
    let answer = assert_ok(stack.api.post(INITIATE, &json!({"leadIds": requested, "leads": []})).await);

    assert_eq!(ids(answer["success"].as_array().expect("a list"), "_id"), [leads[1].clone(), leads[0].clone()]);
    let errors = answer["errors"].as_array().expect("a list");
    assert_eq!(codes(errors), ["lead_not_found", "invalid_field"]);
    assert_eq!(answer["warnings"], json!(["ignored because leadIds is given: leads"]));
    let stranger = Api::create(stack.api.url.clone(), &stack.client, "stranger").await;
    let (_, answer) = stranger.post(INITIATE, &json!({"leadIds": [leads[0]]})).await;
    assert_eq!(answer["errors"][0]["code"], "lead_not_found", "{answer}");
}
