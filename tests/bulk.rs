//! Bulk requests: many leads, or many updates, in one body.

use std::{collections::HashSet, time::Duration};

use contract::ObjectId;
use serde_json::{Value, json};
use test_support::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    guard::memory,
    stack::{Api, SOON, Stack},
};

const UPDATES: &str = "/api/v1/leads/update/bulk";

/// A bulk update's request.
fn request(api: &Api, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
    api.http.post(format!("{}{UPDATES}", api.url)).bearer_auth(&api.key).body(body)
}

/// The answer's lines.
async fn lines(request: reqwest::RequestBuilder) -> Vec<Value> {
    let answer = request.send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let text = answer.text().await.expect("a body");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn ids(answers: &[Value]) -> Vec<String> {
    answers.iter().map(|answer| answer["updateId"].as_str().expect("an id").to_owned()).collect()
}

fn ndjson(bodies: &[Value]) -> String {
    bodies.iter().map(|body| format!("{body}\n")).collect()
}

async fn process(stack: &Stack) -> ObjectId {
    stack.process(json!([])).await.process.process_id.expect("an id")
}

#[tokio::test]
async fn good_lines_are_accepted_in_order_though_others_fail() {
    let stack = Stack::start().await;
    let process_id = process(&stack).await;
    let lead_id = stack.api.initiate(process_id, Some("R")).await;
    let good = json!({"leadId": lead_id, "n": 1});
    let by_reference = json!({"referenceId": "R", "projectId": stack.api.project_id, "processId": process_id, "n": 2, "metadata": null});
    let too_long = json!({"leadId": lead_id, "long": "x".repeat(300 << 10)});
    let all = [
        good.to_string(),
        "{\"leadId\":".to_owned(),
        by_reference.to_string(),
        json!({"leadId": lead_id}).to_string(),
        too_long.to_string(),
        json!({"leadId": lead_id, "n": 3, "dryRun": true}).to_string(),
        json!({"leadId": lead_id, "name": "Eve", "disposition": "hot"}).to_string(),
    ];
    let codes = |answers: &[Value]| -> Vec<String> {
        answers.iter().map(|answer| answer["code"].as_str().unwrap_or("accepted").to_owned()).collect()
    };
    let expected =
        ["accepted", "invalid_json", "accepted", "nothing_to_change", "line_too_large", "invalid_field", "accepted"];
    let answers = lines(request(&stack.api, all.join("\n\n")).header("content-type", "application/x-ndjson")).await;
    assert_eq!(codes(&answers), expected, "{answers:?}");
    assert_eq!(
        answers.iter().map(|answer| answer["line"].as_u64()).collect::<Vec<_>>(),
        (1..=7).map(Some).collect::<Vec<_>>()
    );
    assert_eq!(answers[6]["warnings"], json!(["disposition is ignored without targetState"]));

    // An array of them, as far as it is one.
    let array = all.iter().filter(|line| !line.ends_with(':')).cloned().collect::<Vec<_>>().join(",\n");
    let answers = lines(request(&stack.api, format!("[{array}]"))).await;
    assert_eq!(codes(&answers), expected.iter().filter(|code| **code != "invalid_json").copied().collect::<Vec<_>>());
    let answers = lines(request(&stack.api, format!("[{good},{good}"))).await;
    assert_eq!(codes(&answers), ["accepted", "invalid_json"], "what may be cut off is not accepted");
    assert_eq!(lines(request(&stack.api, "[]")).await, [] as [Value; 0]);
    assert_eq!(lines(request(&stack.api, "")).await, [] as [Value; 0]);

    // At the door.
    for (name, value, status, code) in [
        ("content-type", "text/csv", 415, "unsupported_media_type"),
        ("if-match", "\"1\"", 400, "invalid_field"),
        ("idempotency-key", "a\"b", 400, "invalid_field"),
    ] {
        let answer = request(&stack.api, "").header(name, value).send().await.expect("an answer");
        assert_eq!(answer.status(), status);
        let refused: Value = serde_json::from_str(&answer.text().await.expect("a body")).expect("JSON");
        assert_eq!(refused["code"], code, "{refused}");
    }
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates WHERE success", 7, SOON).await;
    let (_, lead) = stack.api.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await;
    assert_eq!((&lead["data"]["name"], &lead["data"]["metadata"]["n"]), (&json!("Eve"), &json!(1)), "{lead}");
}

#[tokio::test]
async fn ten_thousand_updates_are_applied_in_their_order_and_sent_again_are_the_same() {
    const COUNT: usize = 10_000;
    let stack = Stack::start().await;
    let process_id = process(&stack).await;
    let mut leads = Vec::new();
    for _ in 0..10 {
        leads.push(stack.api.initiate(process_id, None).await);
    }
    // Each expects what the one before it in the body leaves behind.
    let bodies: Vec<_> = (0..COUNT)
        .map(
            |n| json!({"leadId": leads[n % leads.len()], "metadata": {"n": n}, "expectedVersion": n / leads.len() + 1}),
        )
        .collect();
    let begun = std::time::Instant::now();
    let keyed = |bodies: &[Value]| request(&stack.api, ndjson(bodies)).header("idempotency-key", "import");
    let answers = lines(keyed(&bodies)).await;
    println!("{COUNT} updates were logged in {:?}", begun.elapsed());
    let accepted = ids(&answers);
    assert_eq!(accepted.iter().collect::<HashSet<_>>().len(), COUNT);

    // Again, with one too many; and again with another third line.
    let too_many = [bodies.as_slice(), &[bodies[0].clone()]].concat();
    let answers = lines(keyed(&too_many)).await;
    assert_eq!(ids(&answers[..COUNT]), accepted);
    assert_eq!(answers[COUNT..].iter().map(|answer| &answer["code"]).collect::<Vec<_>>(), ["too_many_lines"]);
    let mut changed = bodies[..4].to_vec();
    changed[2]["name"] = json!("Eve");
    let again = ids(&lines(keyed(&changed)).await);
    assert_eq!((&again[..2], &again[3]), (&accepted[..2], &accepted[3]));
    assert_ne!(again[2], accepted[2]);
    let single = stack.api.http.post(format!("{}/api/v1/leads/update", stack.api.url)).bearer_auth(&stack.api.key);
    let single =
        single.header("idempotency-key", "import").body(bodies[0].to_string()).send().await.expect("an answer");
    assert_eq!(single.status(), 422);

    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates", COUNT as i64 + 1, SOON * 4).await;
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates WHERE success").await, COUNT as i64);
    assert_eq!(stack.count("SELECT min(version) FROM lead_state.leads").await, COUNT as i64 / 10 + 1);
}

#[tokio::test]
async fn lines_are_answered_as_they_come_and_a_client_that_hangs_up_stops_it() {
    let stack = Stack::start().await;
    let process_id = process(&stack).await;
    let lead_id = stack.api.initiate(process_id, None).await;
    let line = |n: usize| format!("{}\n", json!({"leadId": lead_id, "metadata": {"n": n}}));
    let mut connection = TcpStream::connect(stack.api.url.strip_prefix("http://").expect("http")).await.expect("TCP");
    let head = format!(
        "POST {UPDATES} HTTP/1.1\r\nhost: door\r\nauthorization: Bearer {}\r\ntransfer-encoding: chunked\r\n\r\n",
        stack.api.key
    );
    connection.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    for n in 1..=3 {
        let line = line(n);
        connection.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await.expect("sent");
        while !answer.contains(&format!("{{\"line\":{n},\"success\":true,")) {
            let mut piece = vec![0; 4096];
            let read = timeout(SOON, connection.read(&mut piece)).await.expect("in time").expect("an answer");
            assert!(read > 0, "{answer}");
            answer += std::str::from_utf8(&piece[..read]).expect("text");
        }
    }
    drop(connection);
    // The places for bulk requests are free again, all of them.
    eventually(SOON, "the place is given back", async || {
        let all = futures::future::join_all((0..16).map(|_| request(&stack.api, line(9)).send())).await;
        all.into_iter().all(|answer| answer.is_ok_and(|answer| answer.status() == 200))
    })
    .await;
}

#[tokio::test]
async fn updates_in_bulk_are_counted_and_slowed_down_not_refused() {
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "20")]).await;
    let process_id = process(&stack).await;
    let lead_id = stack.api.initiate(process_id, None).await;
    let bodies: Vec<_> = (0..30).map(|n| json!({"leadId": lead_id, "metadata": {"n": n}})).collect();
    let begun = std::time::Instant::now();
    let answers = lines(request(&stack.api, ndjson(&bodies))).await;
    assert_eq!(ids(&answers).len(), 30);
    // Ten more than may be at once, at four a second.
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn when_the_log_is_full_lines_are_told_and_no_later_one_is_accepted() {
    let mut stack = Stack::start_with(&[("STREAM_MAX_BYTES", "1048576")]).await;
    let process_id = process(&stack).await;
    let lead_id = stack.api.initiate(process_id, None).await;
    // The last ones are small: they would still fit.
    let padding = |n| "x".repeat(if n < 2500 { 1000 } else { 0 });
    let bodies: Vec<_> =
        (0..3000).map(|n| json!({"leadId": lead_id, "metadata": {"n": n, "padding": padding(n)}})).collect();
    // Nobody makes room.
    stack.lead_state.terminate().await;
    let answers = lines(request(&stack.api, ndjson(&bodies))).await;
    assert_eq!(answers.len(), 3000);
    let refused = answers.iter().position(|answer| answer["success"] == false).expect("a full log");
    assert_eq!(answers[refused]["code"], "log_full", "{}", answers[refused]);
    let chunk_end = (refused / 500 + 1) * 500;
    assert!(answers[chunk_end..].iter().all(|answer| answer["code"] == "log_full"));
    let accepted = answers.iter().filter(|answer| answer["success"] == true).count();
    let js = service_kit::nats::jetstream(&stack.client);
    let log = js.get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
    assert_eq!(log.cached_info().state.last_sequence, accepted as u64);
}

#[tokio::test]
async fn a_body_of_any_size_costs_bounded_memory() {
    const LINES: usize = 400;
    let mut stack = Stack::start().await;
    let process_id = process(&stack).await;
    let lead_id = stack.api.initiate(process_id, None).await;
    // Nobody need read all of it.
    stack.lead_state.terminate().await;
    let line = json!({"leadId": lead_id, "metadata": {"padding": "x".repeat(100 << 10)}}).to_string() + "\n";
    let before = memory(stack.gateway.pid(), "VmRSS");
    let body = line.repeat(LINES);
    let size = body.len() >> 20;
    assert_eq!(ids(&lines(request(&stack.api, body)).await).len(), LINES);
    let peak = memory(stack.gateway.pid(), "VmHWM");
    println!("a body of {size} MiB: {} MiB before, {} MiB at most", before / 1024, peak / 1024);
    assert!(peak < before + 16 * 1024, "{before} KiB became {peak} KiB");
}

#[tokio::test]
async fn leads_are_initiated_and_looked_up_in_bulk() {
    const PATH: &str = "/api/v1/leads/bulk/initiate";
    let stack = Stack::start().await;
    let process_id = process(&stack).await;
    let lead = |n: usize| {
        json!({"projectId": stack.api.project_id, "processId": process_id, "name": format!("Ada {n}"),
               "phone": format!("+4915112{n:06}"), "referenceId": format!("R-{n}"), "metadata": {"n": n}})
    };
    let mut leads: Vec<_> = (0..998).map(lead).collect();
    leads.insert(3, json!({"projectId": stack.api.project_id, "processId": process_id, "referenceId": "nameless"}));
    leads.push(lead(7));
    let (status, answer) = stack.api.post(PATH, &json!({"leads": leads})).await;
    assert_eq!(status, 200, "{answer}");
    let made = answer["success"].as_array().expect("a list");
    let names: Vec<_> = made.iter().map(|lead| lead["name"].as_str().expect("a name").to_owned()).collect();
    assert_eq!(names, (0..998).map(|n| format!("Ada {n}")).collect::<Vec<_>>());
    assert_eq!(made[0]["currentState"], "new");
    assert_eq!(
        answer["errors"],
        json!([
            {"data": leads[3], "referenceId": "nameless", "error": "name or firstName is required in lead object",
             "code": "missing_field"},
            {"data": leads[999], "referenceId": "R-7", "code": "reference_exists",
             "error": "Lead with referenceId \"R-7\" already exists for this project and process"},
        ])
    );
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.leads").await, 998);

    let lead_ids = [&made[1]["_id"], &json!("00000000000000000000dead"), &json!(7), &made[0]["_id"]];
    let (status, answer) = stack.api.post(PATH, &json!({"leadIds": lead_ids, "leads": []})).await;
    assert_eq!((status, &answer["success"]), (200, &json!([made[1], made[0]])), "{answer}");
    let errors = answer["errors"].as_array().expect("a list");
    assert_eq!(errors.iter().map(|error| &error["code"]).collect::<Vec<_>>(), ["lead_not_found", "invalid_field"]);
    assert_eq!(answer["warnings"], json!(["ignored because leadIds is given: leads"]));
    let stranger = Api::create(stack.api.url.clone(), &stack.client, "stranger").await;
    let (_, answer) = stranger.post(PATH, &json!({"leadIds": [made[0]["_id"]]})).await;
    assert_eq!(answer["errors"][0]["code"], "lead_not_found", "{answer}");
}
