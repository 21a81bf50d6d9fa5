//! The gateway's door: requests that are sent again, clients that hang up, floods and hostile clients.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use contract::{
    ObjectId, Timestamp,
    idempotency::{IdempotencyRecord, idempotency_key},
    key::{ApiKey, Scope},
    rpc::{self, CreateKey, RevokeKey},
    streams::{IDEMPOTENCY, LEAD_COMMANDS},
};

use futures::{StreamExt, stream};
use rustls::pki_types::CertificateDer;
use secrets::api_key;
use serde_json::{Value, json};
use test_support::free_port;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, sleep, timeout},
};

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
    let record = serde_json::to_vec(&IdempotencyRecord::new(body.as_bytes(), None, first)).expect("a record");
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
async fn hang_up(address: &str, request: &[u8], patience: Option<Duration>, goodbye: Goodbye) {
    let mut connection = TcpStream::connect(address).await.expect("a connection");
    connection.set_nodelay(true).expect("nodelay");
    connection.write_all(request).await.expect("sent");
    match patience {
        Some(patience) => sleep(patience).await,
        // The answer is there, and not read.
        None => timeout(SOON, connection.readable()).await.expect("an answer").expect("an answer"),
    }
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
            let patience = match n % 10 {
                9 if *cut == usize::MAX => None,
                part if *cut == usize::MAX => Some(Duration::from_millis(2 * part as u64)),
                _ => Some(Duration::ZERO),
            };
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

#[tokio::test]
async fn one_key_that_floods_is_slowed_down_and_no_other() {
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "20"), ("GATEWAY_OTHER_RATE", "1000")]).await;
    let lead_id = lead(&stack).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let body = json!({"leadId": lead_id, "name": "Ada"});
    let mut statuses = Vec::new();
    for _ in 0..40 {
        let request = stack.api.http.post(format!("{}{UPDATE}", stack.api.url)).bearer_auth(&stack.api.key);
        let answer = request.body(body.to_string()).send().await.expect("an answer");
        statuses.push(answer.status().as_u16());
        let header = |name| answer.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
        assert_eq!(header("ratelimit-policy").as_deref(), Some("\"updates\";q=20;w=5"));
        if answer.status() == 429 {
            assert_eq!(header("retry-after").as_deref(), Some("1"));
            assert_eq!(header("ratelimit").as_deref(), Some("\"updates\";r=0;t=1"));
        }
    }
    assert_eq!(statuses[..20], [200; 20]);
    let limited = statuses.iter().filter(|status| **status == 429).count();
    assert!(limited > 0 && statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    // Neither another key nor the other endpoints pay for it, and what comes again after a while is served.
    assert_eq!(other.post(UPDATE, &body).await.0, 200);
    assert_eq!(stack.api.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await.0, 200);
    stack.api.update_stubbornly(&body).await;
    let metrics = stack.api.http.get(stack.gateway_ready.replace("readyz", "metrics")).send().await.expect("metrics");
    let metrics = metrics.text().await.expect("text");
    let counted = "leadrelay_gateway_requests_refused_total{code=\"rate_limited\"} ";
    let counted: usize =
        metrics.split_once(counted).expect("counted").1.lines().next().expect("a line").parse().expect("a number");
    assert!(counted >= limited, "{metrics}");
}

/// Connects from one of the loopback addresses: `127.0.0.{host}`.
async fn connect_from(host: u8, address: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, host], 0).into()).expect("a loopback address");
    socket.connect(address.parse().expect("an address")).await.expect("a connection")
}

/// Sends a byte every 50 ms until the server ends the connection; what it had answered, and how long it took.
async fn drip(mut connection: TcpStream, first: &[u8]) -> (String, Duration) {
    connection.write_all(first).await.expect("sent");
    let begun = Instant::now();
    let (mut reader, mut writer) = connection.split();
    let mut answer = Vec::new();
    let dripping = async {
        while writer.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = dripping => unreachable!(),
        _ = timeout(SOON, reader.read_to_end(&mut answer)) => {}
    }
    (String::from_utf8_lossy(&answer).into_owned(), begun.elapsed())
}

#[tokio::test]
async fn hostile_clients_are_cut_and_a_healthy_one_is_served_beside_them() {
    const EACH: usize = 24;
    let stack = Stack::start_with(&[
        ("GATEWAY_HEADER_TIMEOUT", "3s"),
        ("GATEWAY_WRITE_TIMEOUT", "2s"),
        ("GATEWAY_MAX_CONNECTIONS_PER_ADDRESS", "32"),
    ])
    .await;
    let lead_id = lead(&stack).await;
    let blob = "x".repeat(200_000);
    stack.api.outcome(&stack.api.update(json!({"leadId": lead_id, "metadata": {"blob": blob}})).await).await;
    let (address, key) = (stack.api.url.strip_prefix("http://").expect("http"), &stack.api.key);
    let head = |line: &str| format!("{line} HTTP/1.1\r\nhost: door\r\nauthorization: Bearer {key}\r\n");
    let get = head(&format!("GET /api/v1/leads/get?leadId={lead_id}")) + "\r\n";

    // A head that never ends; a connection that has nothing more to ask; one that never says anything.
    let heads = futures::future::join_all(
        (0..EACH).map(|_| async { drip(connect_from(2, address).await, b"GET / HTTP/1.1\r\nx-drip: ").await }),
    );
    let idle = async {
        let mut connection = connect_from(3, address).await;
        connection.write_all(get.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        timeout(SOON, connection.read_to_end(&mut answer)).await.expect("an idle connection is cut").expect("read");
        let silent = connect_from(3, address).await.read(&mut [0]).await;
        (answer.len(), silent.is_ok())
    };
    // A body that never ends.
    let body = head(&format!("POST {UPDATE}")) + "content-length: 100000\r\n\r\n";
    let bodies = futures::future::join_all(
        (0..EACH).map(|_| async { drip(connect_from(4, address).await, body.as_bytes()).await }),
    );
    // Answers that nobody takes: 200 kB each, more than the kernel holds.
    let deaf = futures::future::join_all((0..4).map(|_| async {
        let mut connection = connect_from(5, address).await;
        connection.write_all(get.repeat(100).as_bytes()).await.expect("sent");
        sleep(Duration::from_secs(8)).await;
        // By now it was cut: what the kernel held is all that comes.
        let mut answers = Vec::new();
        let _ = timeout(SOON, connection.read_to_end(&mut answers)).await.expect("the end");
        answers.len() / blob.len()
    }));
    // More connections than one address may have.
    let crowd = async {
        let held = futures::future::join_all((0..32).map(|_| connect_from(6, address))).await;
        for _ in 0..EACH {
            let end = timeout(Duration::from_secs(2), connect_from(6, address).await.read(&mut [0])).await;
            assert!(matches!(end.expect("closed at once"), Ok(0) | Err(_)), "one too many is let in");
        }
        drop(held);
        test_support::eventually(SOON, "the address is served again", async || {
            let mut connection = connect_from(6, address).await;
            let _ = connection.write_all(get.as_bytes()).await;
            timeout(Duration::from_secs(2), connection.read(&mut [0])).await.is_ok_and(|read| matches!(read, Ok(1)))
        })
        .await;
    };
    let hostile = async { tokio::join!(heads, idle, bodies, deaf, crowd) };
    let mut times = Vec::new();
    let healthy = async {
        loop {
            let begun = Instant::now();
            stack.api.update(json!({"leadId": lead_id, "name": format!("n{}", times.len())})).await;
            times.push(begun.elapsed());
            sleep(Duration::from_millis(20)).await;
        }
    };
    let (heads, (idle, silent), bodies, deaf, ()) = tokio::select! {
        hostile = hostile => hostile,
        () = healthy => unreachable!(),
    };

    for (answer, took) in heads {
        assert!(took < Duration::from_secs(6), "a head that never ends was cut after {took:?}: {answer}");
    }
    assert!(idle > blob.len() && silent);
    for (answer, took) in bodies {
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_timeout"), "{answer:?} after {took:?}");
        assert!((8..16).contains(&took.as_secs()), "a body that never ends was cut after {took:?}");
    }
    assert!(deaf.iter().all(|answers| *answers < 100), "nobody was cut: {deaf:?}");
    times.sort();
    let (median, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{} healthy updates beside hostile clients: median {median:?}, slowest {slowest:?}", times.len());
    assert!(times.len() > 50 && slowest < Duration::from_secs(2), "{} served, the slowest in {slowest:?}", times.len());
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused() {
    let stack = Stack::start().await;
    let address = stack.api.url.strip_prefix("http://").expect("http");
    for fields in
        ["x: y\r\n".repeat(101), format!("x: {}\r\n", "y".repeat(32_000)), format!("x: {}\r\n", "y".repeat(200_000))]
    {
        let mut connection = TcpStream::connect(address).await.expect("a connection");
        let _ = connection.write_all(format!("GET / HTTP/1.1\r\n{fields}\r\n").as_bytes()).await;
        let mut answer = vec![0; 12];
        // What is still unread when the server closes may take the answer with it.
        let read = timeout(SOON, connection.read_exact(&mut answer)).await.expect("an end");
        let answer = String::from_utf8_lossy(&answer);
        assert!(read.is_err() || answer == "HTTP/1.1 431", "{answer} to a head of {} bytes", fields.len());
    }
}

/// How long a key may still be good after it was revoked or has expired.
const EFFECTIVE_WITHIN: Duration = Duration::from_secs(1);

/// Waits until a gateway refuses a key.
async fn refused(api: &Api) -> Value {
    loop {
        let (status, answer) = api.get("/api/v1/leads/get?leadId=ffffffffffffffffffffffff").await;
        match status {
            401 => return answer,
            404 => sleep(Duration::from_millis(5)).await,
            _ => panic!("{status} {answer}"),
        }
    }
}

#[tokio::test]
async fn a_key_is_refused_everywhere_within_a_second_of_its_end() {
    let stack = Stack::start().await;
    let (_gateway, other) = second_gateway(&stack, &[]).await;
    let both = |key: &str| [&stack.api, &other].map(|api| Api { key: key.to_owned(), ..api.clone() });
    let create = async |expires_at: Option<Timestamp>| {
        let secret = api_key::generate(rand::random());
        let create = CreateKey {
            project_id: stack.api.project_id,
            name: "brief".into(),
            sha256: api_key::hash(&secret),
            scopes: Scope::ALL.into(),
            expires_at,
        };
        let key: ApiKey = stack.call(rpc::KEY_CREATE, &create).await;
        for api in both(&secret) {
            test_support::eventually(SOON, "the gateway knows the key", async || {
                api.get("/api/v1/leads/get?leadId=ffffffffffffffffffffffff").await.0 == 404
            })
            .await;
        }
        (secret, key)
    };
    let until_refused = async |secret: &str, why: &str| {
        let [one, two] = both(secret);
        let (one, two) = timeout(SOON, async { tokio::join!(refused(&one), refused(&two)) }).await.expect("refused");
        for answer in [one, two] {
            assert!(answer["error"].as_str().is_some_and(|text| text.contains(why)), "{answer}");
        }
    };

    let (secret, key) = create(None).await;
    let begun = Instant::now();
    let _: ApiKey = stack.call(rpc::KEY_REVOKE, &RevokeKey { key_id: key.key_id }).await;
    until_refused(&secret, "was revoked").await;
    let took = begun.elapsed();
    println!("revoked at two gateways within {took:?}");
    assert!(took < EFFECTIVE_WITHIN, "a revoked key was good for {took:?}");

    let end = service_kit::clock::now().millis() + 2_000;
    let (secret, _) = create(Some(Timestamp::from_millis(end))).await;
    until_refused(&secret, "has expired").await;
    let late =
        Duration::from_millis((service_kit::clock::now().millis() - end).try_into().expect("not before its end"));
    println!("expired at two gateways within {late:?}");
    assert!(late < EFFECTIVE_WITHIN, "an expired key was good for {late:?}");
}

/// Asks over TLS, trusting only this certificate; the protocol agreed on and the status line.
fn ask_over_tls(address: &str, trusted: &CertificateDer<'static>) -> Result<(Vec<u8>, String), String> {
    use std::io::{Read, Write};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connection = rustls::ClientConnection::new(Arc::new(config), "localhost".try_into().expect("a name"));
    let tcp = std::net::TcpStream::connect(address).map_err(|e| e.to_string())?;
    tcp.set_read_timeout(Some(SOON)).expect("a timeout");
    let mut stream = rustls::StreamOwned::new(connection.expect("a connection"), tcp);
    stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").map_err(|e| e.to_string())?;
    let mut status = vec![0; 12];
    stream.read_exact(&mut status).map_err(|e| e.to_string())?;
    let agreed = stream.conn.alpn_protocol().unwrap_or_default().to_vec();
    Ok((agreed, String::from_utf8_lossy(&status).into_owned()))
}

#[tokio::test]
async fn over_tls_with_a_certificate_that_is_renewed() {
    let stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let (chain, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    let make = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (first, renewed) = (make(), make());
    std::fs::write(&chain, first.cert.pem()).expect("written");
    std::fs::write(&key, first.signing_key.serialize_pem()).expect("written");
    let text = |path: &std::path::Path| path.to_str().expect("a path").to_owned();
    let extra = [("GATEWAY_TLS_CERT", text(&chain)), ("GATEWAY_TLS_KEY", text(&key))];
    let extra = extra.each_ref().map(|(name, value)| (*name, value.as_str()));
    let (mut gateway, api) =
        second_gateway(&stack, &[extra.as_slice(), &[("GATEWAY_HEADER_TIMEOUT", "1s")]].concat()).await;
    let address = api.url.strip_prefix("http://").expect("http").to_owned();
    let ask = |trusted: &CertificateDer<'static>| ask_over_tls(&address, trusted);

    let answered = Ok((b"http/1.1".to_vec(), "HTTP/1.1 404".to_owned()));
    assert_eq!(ask(first.cert.der()), answered);
    assert!(ask(renewed.cert.der()).is_err_and(|e| e.contains("certificate")));
    // One who does not shake hands, and one who speaks plainly.
    for said in [&b""[..], b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let mut plain = TcpStream::connect(&address).await.expect("a connection");
        plain.write_all(said).await.expect("sent");
        let mut answer = Vec::new();
        let _ = timeout(SOON, plain.read_to_end(&mut answer)).await.expect("cut");
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }

    // Half a renewal is none; the other half makes it one, without a restart.
    std::fs::write(&chain, renewed.cert.pem()).expect("written");
    gateway.wait_for_log("the TLS certificate stays as it is", SOON).await;
    assert_eq!(ask(first.cert.der()), answered);
    std::fs::write(&key, renewed.signing_key.serialize_pem()).expect("written");
    test_support::eventually(SOON, "the renewed certificate is served", async || ask(renewed.cert.der())).await;
    assert!(ask(first.cert.der()).is_err());
}
