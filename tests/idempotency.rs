//! `Idempotency-Key`: a repeated request is the same update, even if the client hung up, the gateway died, or another
//! gateway answers.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use contract::{
    ObjectId,
    event::OutcomeKind,
    idempotency::{IdempotencyRecord, idempotency_key},
    streams::IDEMPOTENCY,
};
use futures::{StreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::support::{Api, LEDGER_ROWS, Stack, TEST_TIMEOUT, UPDATE, assert_refused};

/// A response: its status, whether it is marked as a replay, and its body.
type Answer = (u16, bool, Value);

/// Posts an update with an idempotency key.
async fn post(api: &Api, key: &str, body: &str) -> Answer {
    let request = api.request(Method::POST, UPDATE).header("idempotency-key", key);
    let answer = request.body(body.to_owned()).send().await.expect("an answer");
    let replayed = answer.headers().get("idempotent-replayed").is_some_and(|value| value == "true");
    let status = answer.status().as_u16();
    (status, replayed, serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON"))
}

/// Posts an update that must be rejected.
async fn assert_key_refused(api: &Api, key: &str, body: &str, status: u16, code: &str) {
    let (got, _, answer) = post(api, key, body).await;
    assert_refused((got, answer), status, code);
}

/// The id of an accepted update.
#[track_caller]
fn update_id((status, _, body): &Answer) -> String {
    assert_eq!(*status, 200, "{body}");
    body["updateId"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn replays_of_one_idempotency_key_create_one_update() {
    let stack = Stack::start().await;
    let body = json!({"leadId": stack.lead(&[]).await, "name": "Ada"}).to_string();
    let (_gateway, other) = stack.second_gateway(&[]).await;

    // Sends sixteen requests at once, to two gateways.
    let at_once = stream::iter([&stack.api, &other].into_iter().cycle().take(16));
    let answers: Vec<Answer> = at_once.map(|api| post(api, "order-7", &body)).buffer_unordered(16).collect().await;
    let quoted = post(&other, "\"order-7\"", &body).await;

    let ids: HashSet<String> = answers.iter().chain([&quoted]).map(update_id).collect();
    assert_eq!(ids.len(), 1, "{answers:?}");
    assert_eq!(answers.iter().filter(|(_, replayed, _)| !replayed).count(), 1, "{answers:?}");
    assert!(quoted.1, "the quoted spelling is the same key");
    assert_eq!(stack.api.outcome(ids.iter().next().expect("an id")).await["status"], "succeeded");
    assert_eq!(stack.count(LEDGER_ROWS).await, 1);
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 2);
}

#[tokio::test]
async fn a_key_is_refused_for_another_body_and_free_in_another_project() {
    let stack = Stack::start().await;
    let body = json!({"leadId": stack.lead(&[]).await, "name": "Ada"}).to_string();
    let first = post(&stack.api, "order-7", &body).await;

    let stranger = Api::create(stack.api.url.clone(), &stack.client, "stranger").await;
    let of_stranger = post(&stranger, "order-7", &body).await;

    assert_ne!(update_id(&of_stranger), update_id(&first));
    assert!(!of_stranger.1);
    let other_body = body.replace("Ada", "Eve");
    assert_key_refused(&stack.api, "order-7", &other_body, 422, "idempotency_key_reused").await;
    for invalid in ["", "\"", "a\"b", &"x".repeat(256)] {
        assert_key_refused(&stack.api, invalid, &body, 400, "invalid_field").await;
    }
}

#[tokio::test]
async fn a_replay_completes_a_request_whose_gateway_died_before_logging_it() {
    let stack = Stack::start().await;
    let body = json!({"leadId": stack.lead(&[]).await, "name": "Ada"}).to_string();
    let first = ObjectId::from_bytes([7; 12]);
    let record = serde_json::to_vec(&IdempotencyRecord::new(OutcomeKind::Update, body.as_bytes(), None, None, first))
        .expect("a record");
    let records = stack.js().get_key_value(IDEMPOTENCY).await.expect("the bucket");
    records.create(idempotency_key(stack.api.project_id, "k"), record.into()).await.expect("a record");

    for _ in 0..2 {
        let answer = post(&stack.api, "k", &body).await;
        assert_eq!((update_id(&answer), answer.1), (first.to_string(), true));
    }

    assert_eq!(stack.api.outcome(&first.to_string()).await["status"], "succeeded");
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 2);
}

#[tokio::test]
async fn only_requests_with_a_new_key_are_refused_when_keys_cannot_be_recorded() {
    let stack = Stack::start_with(&[("STREAM_MAX_BYTES", "1048576")]).await;
    let lead_id = stack.lead(&[]).await;
    let body = json!({"leadId": lead_id, "name": "Ada"}).to_string();
    let js = stack.js();
    let records = js.get_key_value(IDEMPOTENCY).await.expect("the bucket");
    let stream = js.get_stream(format!("KV_{IDEMPOTENCY}")).await.expect("the bucket's stream");
    let config = &stream.cached_info().config;
    assert_eq!((config.max_bytes, config.max_age), (262_144, Duration::from_hours(24)));
    // nats-server before 2.10.5 accepts one more message when a stream is almost full, and drops the oldest for it
    // (nats-server issue 4771). These records are the oldest.
    for number in 0..64 {
        records.put(format!("oldest.{number}"), "x".into()).await.expect("room");
    }
    let known = update_id(&post(&stack.api, "known", &body).await);

    // New keys of a project beyond its share are rejected. A second gateway checks this, because it has not measured
    // the bucket yet.
    for number in 0..170 {
        let key = format!("{}.filler{number}", stack.api.project_id);
        records.put(key, vec![b'x'; 1000].into()).await.expect("room");
    }
    let (_gateway, fresh) = stack.second_gateway(&[]).await;
    assert_key_refused(&fresh, "new", &body, 429, "idempotency_share").await;
    assert_eq!(update_id(&post(&fresh, "known", &body).await), known);
    let stranger = Api::create(fresh.url.clone(), &stack.client, "stranger").await;
    update_id(&post(&stranger, "new", &body).await);

    let mut size = 100_000;
    for number in 0.. {
        if records.put(format!("filler.{number}"), vec![b'x'; size].into()).await.is_err() {
            size /= 2;
        }
        if size < 32 {
            break;
        }
    }
    assert_key_refused(&stack.api, "new", &body, 503, "idempotency_full").await;
    assert_eq!(update_id(&post(&stack.api, "known", &body).await), known);
    stack.api.update(json!({"leadId": lead_id, "name": "Eve"})).await;

    // The same without the bucket.
    js.delete_stream(format!("KV_{IDEMPOTENCY}")).await.expect("deleted");
    assert_key_refused(&stack.api, "new", &body, 503, "idempotency_unavailable").await;
    stack.api.update(json!({"leadId": lead_id, "name": "Eve"})).await;
    stack.wait_for_count(LEDGER_ROWS, 4).await;
}

/// How a client hangs up.
#[derive(Clone, Copy, Debug)]
enum HangUp {
    /// An orderly end of the connection (FIN).
    Close,
    /// A reset (RST): bytes in flight in either direction are discarded.
    Reset,
}

/// Sends bytes and hangs up after a delay, or when a response has arrived, without reading it.
async fn send_and_hang_up(address: &str, request: &[u8], delay: Option<Duration>, how: HangUp) {
    let mut connection = TcpStream::connect(address).await.expect("a connection");
    connection.set_nodelay(true).expect("nodelay");
    connection.write_all(request).await.expect("sent");
    match delay {
        Some(delay) => sleep(delay).await,
        None => timeout(TEST_TIMEOUT, connection.readable()).await.expect("an answer").expect("an answer"),
    }
    if let HangUp::Reset = how {
        connection.set_zero_linger().expect("linger");
    }
}

/// The bytes of a request with the idempotency key `cut-N`.
fn raw_request(api: &Api, lead_id: &str, n: usize) -> Vec<u8> {
    let (body, key) = (numbered_body(lead_id, n), &api.key);
    format!(
        "POST {UPDATE} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {key}\r\nidempotency-key: \"cut-{n}\"\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn numbered_body(lead_id: &str, n: usize) -> String {
    json!({"leadId": lead_id, "metadata": {format!("m{n}"): n}}).to_string()
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_a_whole_update_or_none() {
    const PARALLEL: usize = 16;
    let stack = Stack::start().await;
    let lead_id = &stack.lead(&[]).await;
    let (api, address) = (&stack.api, stack.api.url.strip_prefix("http://").expect("http"));
    // Requests are cut after every third byte, and often after the last byte, when the update may or may not be
    // accepted.
    let length = raw_request(api, lead_id, 1000).len();
    let cuts = (0..length).step_by(3).chain(std::iter::repeat_n(length, 150));
    let cases: Vec<(usize, usize, HangUp)> = cuts
        .flat_map(|cut| [(cut, HangUp::Close), (cut, HangUp::Reset)])
        .enumerate()
        .map(|(n, (cut, how))| (n + 1000, cut, how))
        .collect();

    stream::iter(&cases)
        .for_each_concurrent(PARALLEL, |&(n, cut, how)| {
            // After the last byte, the delay is between zero and about the time of a response.
            let delay = match n % 10 {
                9 if cut == length => None,
                part if cut == length => Some(Duration::from_millis(2 * part as u64)),
                _ => Some(Duration::ZERO),
            };
            async move { send_and_hang_up(address, &raw_request(api, lead_id, n)[..cut], delay, how).await }
        })
        .await;
    let accepted_unread = stack.log_entries().await.len();
    assert!((1..cases.len()).contains(&accepted_unread), "{accepted_unread} accepted, the others cut off before");
    // Each client sends its request again.
    let answers: Vec<(usize, Answer)> = stream::iter(&cases)
        .map(|&(n, ..)| async move { (n, post(api, &format!("cut-{n}"), &numbered_body(lead_id, n)).await) })
        .buffer_unordered(PARALLEL)
        .collect()
        .await;

    let ids: HashMap<String, usize> = answers.iter().map(|(n, answer)| (update_id(answer), *n)).collect();
    assert_eq!(ids.len(), cases.len(), "an update each");
    let replayed = answers.iter().filter(|(_, (_, replayed, _))| *replayed).count();
    assert!(replayed >= accepted_unread, "{replayed} of at least {accepted_unread} were recorded");
    stack.wait_for_count(LEDGER_ROWS, cases.len() as i64).await;
    let rows: Vec<(Vec<u8>, bool)> = sqlx::query_as("SELECT update_id, success FROM lead_state.lead_updates")
        .fetch_all(&stack.pool)
        .await
        .expect("rows");
    for (id, success) in rows {
        let id = ObjectId::from_bytes(id.try_into().expect("12 bytes")).to_string();
        assert!(success && ids.contains_key(&id), "{id} belongs to no client");
    }
    println!("{} requests cut, {accepted_unread} of them accepted unread, {replayed} replayed", cases.len());
}
