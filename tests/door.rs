//! The gateway's door: requests that are sent again, clients that hang up, floods and hostile clients.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use contract::{
    ObjectId,
    idempotency::{IdempotencyRecord, idempotency_key},
    streams::{IDEMPOTENCY, LEAD_COMMANDS},
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use test_support::free_port;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::stack::{Api, SOON, Stack, service};

const UPDATE: &str = "/api/v1/leads/update";

/// An answer: its status, whether it says that it is a repetition, and its body.
type Answer = (u16, bool, Value);

/// Posts an update under an idempotency key.
async fn update_once(api: &Api, key: &str, body: &str) -> Answer {
    let request = api.http.post(format!("{}{UPDATE}", api.url)).bearer_auth(&api.key);
    let answer = request.header("idempotency-key", key).body(body.to_owned()).send().await.expect("an answer");
    let replayed = answer.headers().get("idempotent-replayed").is_some_and(|value| value == "true");
    let status = answer.status().as_u16();
    (status, replayed, serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON"))
}

/// The update that an answer tells of.
#[track_caller]
fn update_id((status, _, body): &Answer) -> String {
    assert_eq!(*status, 200, "{body}");
    body["updateId"].as_str().expect("an id").to_owned()
}

/// A second gateway beside the stack's, and the same project's way into it.
async fn second_gateway(stack: &Stack, extra: &[(&str, &str)]) -> (test_support::Service, Api) {
    let listen = format!("127.0.0.1:{}", free_port());
    let extra = [extra, &[("GATEWAY_LISTEN", listen.as_str())]].concat();
    let (mut gateway, ready) = service("gateway", &stack.nats, &stack.postgres, &extra);
    gateway.wait_for_http(&ready, SOON).await;
    (gateway, Api { url: format!("http://{listen}"), ..stack.api.clone() })
}

async fn lead(stack: &Stack) -> String {
    let applied = stack.process(json!([])).await;
    stack.api.initiate(applied.process.process_id.expect("an id"), None).await
}

#[tokio::test]
async fn a_request_sent_again_is_the_same_update() {
    let stack = Stack::start().await;
    let lead_id = lead(&stack).await;
    let (_gateway, other) = second_gateway(&stack, &[]).await;
    let body = json!({"leadId": lead_id, "name": "Ada"}).to_string();

    // At once, at two gateways: one update, and all but one answer say that they repeat it.
    let at_once = stream::iter([&stack.api, &other].into_iter().cycle().take(16));
    let answers: Vec<Answer> =
        at_once.map(|api| update_once(api, "order-7", &body)).buffer_unordered(16).collect().await;
    let ids: HashSet<String> = answers.iter().map(update_id).collect();
    assert_eq!(ids.len(), 1, "{answers:?}");
    assert_eq!(answers.iter().filter(|(_, replayed, _)| !replayed).count(), 1, "{answers:?}");
    // The quoted spelling is the same key.
    let again = update_once(&other, "\"order-7\"", &body).await;
    assert_eq!((ids.contains(&update_id(&again)), again.1), (true, true));

    let (status, _, refused) = update_once(&stack.api, "order-7", &body.replace("Ada", "Eve")).await;
    assert_eq!((status, &refused["code"]), (422, &json!("idempotency_key_reused")), "{refused}");
    // Another project may choose the same key.
    let stranger = Api::create(stack.api.url.clone(), &stack.client, "stranger").await;
    let of_stranger = update_once(&stranger, "order-7", &body).await;
    assert_eq!((ids.contains(&update_id(&of_stranger)), of_stranger.1), (false, false));
    for odd in ["", "\"", "a\"b", &"x".repeat(256)] {
        let (status, _, refused) = update_once(&stack.api, odd, &body).await;
        assert_eq!((status, &refused["code"]), (400, &json!("invalid_field")), "{odd}: {refused}");
    }

    assert_eq!(stack.api.outcome(ids.iter().next().expect("an id")).await["status"], "succeeded");
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates", 2, SOON).await;
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 2);
}

/// The gateway died after it wrote the record and before it logged the command.
#[tokio::test]
async fn a_request_that_was_cut_in_two_is_completed_by_its_repetition() {
    let stack = Stack::start().await;
    let lead_id = lead(&stack).await;
    let body = json!({"leadId": lead_id, "name": "Ada"}).to_string();
    let first = ObjectId::from_bytes([7; 12]);
    let record = serde_json::to_vec(&IdempotencyRecord::new(body.as_bytes(), first)).expect("a record");
    let records = service_kit::nats::jetstream(&stack.client).get_key_value(IDEMPOTENCY).await.expect("the bucket");
    records.create(idempotency_key(stack.api.project_id, "k"), record.into()).await.expect("a record");

    for _ in 0..2 {
        let answer = update_once(&stack.api, "k", &body).await;
        assert_eq!((update_id(&answer), answer.1), (first.to_string(), true));
    }
    assert_eq!(stack.api.outcome(&first.to_string()).await["status"], "succeeded");
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 2);
}

#[tokio::test]
async fn when_keys_cannot_be_remembered_only_requests_with_a_new_one_are_refused() {
    let stack = Stack::start_with(&[("STREAM_MAX_BYTES", "1048576")]).await;
    let lead_id = lead(&stack).await;
    let body = json!({"leadId": lead_id, "name": "Ada"}).to_string();
    let js = service_kit::nats::jetstream(&stack.client);
    let records = js.get_key_value(IDEMPOTENCY).await.expect("the bucket");
    let stream = js.get_stream(format!("KV_{IDEMPOTENCY}")).await.expect("the bucket's stream");
    let config = &stream.cached_info().config;
    assert_eq!((config.max_bytes, config.max_age), (262_144, Duration::from_hours(24)));
    // Servers before 2.10.5 let a last one in when they are all but full, and drop the oldest for it
    // (nats-server's issue 4771): these.
    for number in 0..64 {
        records.put(format!("oldest.{number}"), "x".into()).await.expect("room");
    }
    let known = update_id(&update_once(&stack.api, "known", &body).await);
    let mut size = 100_000;
    for number in 0.. {
        if records.put(format!("filler.{number}"), vec![b'x'; size].into()).await.is_err() {
            size /= 2;
        }
        if size < 32 {
            break;
        }
    }
    let (status, _, refused) = update_once(&stack.api, "new", &body).await;
    assert_eq!((status, &refused["code"]), (503, &json!("idempotency_full")), "{refused}");
    assert_eq!(update_id(&update_once(&stack.api, "known", &body).await), known);
    stack.api.update(json!({"leadId": lead_id, "name": "Eve"})).await;

    // A bucket that is not there, as before lead-state was ever of this version.
    js.delete_stream(format!("KV_{IDEMPOTENCY}")).await.expect("deleted");
    let (status, _, refused) = update_once(&stack.api, "new", &body).await;
    assert_eq!((status, &refused["code"]), (503, &json!("idempotency_unavailable")), "{refused}");
    stack.api.update(json!({"leadId": lead_id, "name": "Eve"})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates", 3, SOON).await;
}

/// How a client hangs up.
#[derive(Clone, Copy, Debug)]
enum Goodbye {
    /// An orderly end of the connection (FIN).
    Close,
    /// A reset: what is under way in either direction is thrown away (RST).
    Reset,
}

/// Sends the first bytes of a request and, after a while, hangs up without a look at the answer.
async fn hang_up(address: &str, request: &[u8], patience: Duration, goodbye: Goodbye) {
    let mut connection = TcpStream::connect(address).await.expect("a connection");
    connection.set_nodelay(true).expect("nodelay");
    connection.write_all(request).await.expect("sent");
    tokio::time::sleep(patience).await;
    if let Goodbye::Reset = goodbye {
        connection.set_zero_linger().expect("linger");
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_a_whole_update_or_none() {
    const PARALLEL: usize = 16;
    let stack = Stack::start().await;
    let lead_id = lead(&stack).await;
    let address = stack.api.url.strip_prefix("http://").expect("http").to_owned();
    let body = |n: usize| json!({"leadId": lead_id, "metadata": {format!("m{n}"): n}}).to_string();
    let request = |n: usize| {
        let (body, secret) = (body(n), &stack.api.key);
        format!(
            "POST {UPDATE} HTTP/1.1\r\nhost: door\r\nauthorization: Bearer {secret}\r\nidempotency-key: \"cut-{n}\"\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    };
    // Every third byte; and the last one again and again, for that is where an update may or may not come to be.
    let length = request(1000).len();
    let cuts = (0..length).step_by(3).chain(std::iter::repeat_n(usize::MAX, 150));
    let cases: Vec<(usize, usize, Goodbye)> = cuts
        .flat_map(|cut| [(cut, Goodbye::Close), (cut, Goodbye::Reset)])
        .enumerate()
        .map(|(n, (cut, goodbye))| (n + 1000, cut, goodbye))
        .collect();
    stream::iter(&cases)
        .for_each_concurrent(PARALLEL, |(n, cut, goodbye)| {
            let (address, request) = (&address, request(*n));
            // After the last byte, everything between at once and about when the answer comes.
            let patience = Duration::from_millis(if *cut == usize::MAX { *n as u64 % 12 } else { 0 });
            async move { hang_up(address, &request[..request.len().min(*cut)], patience, *goodbye).await }
        })
        .await;
    let js = service_kit::nats::jetstream(&stack.client);
    let log = js.get_stream(LEAD_COMMANDS).await.expect("the log");
    let accepted_unheard = log.cached_info().state.last_sequence as usize;
    assert!((1..cases.len()).contains(&accepted_unheard), "{accepted_unheard} accepted, the others cut off before");

    // Each sends its request again, and hears of one update, which is there once.
    let (api, body) = (&stack.api, &body);
    let answers: Vec<(usize, Answer)> = stream::iter(&cases)
        .map(|(n, ..)| async move { (*n, update_once(api, &format!("cut-{n}"), &body(*n)).await) })
        .buffer_unordered(PARALLEL)
        .collect()
        .await;
    let ids: HashMap<String, usize> = answers.iter().map(|(n, answer)| (update_id(answer), *n)).collect();
    assert_eq!(ids.len(), cases.len(), "an update each");
    let replayed = answers.iter().filter(|(_, (_, replayed, _))| *replayed).count();
    assert!(replayed >= accepted_unheard, "{replayed} of at least {accepted_unheard} were known");
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates", cases.len() as i64, SOON).await;
    let rows: Vec<(Vec<u8>, bool)> = sqlx::query_as("SELECT update_id, success FROM lead_state.lead_updates")
        .fetch_all(&stack.pool)
        .await
        .expect("rows");
    for (id, success) in rows {
        let id = ObjectId::from_bytes(id.try_into().expect("12 bytes")).to_string();
        assert!(success && ids.contains_key(&id), "{id} is nobody's");
    }
    println!("{} requests cut, {accepted_unheard} of them accepted unheard, {replayed} keys known", cases.len());
}
