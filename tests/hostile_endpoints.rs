//! Hostile endpoints cannot make the webhook-notifier connect to an internal address, fill its memory, delay it, or
//! stop its name lookups.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use test_support::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

use crate::support::{Api, NameServer, Stack, TEST_TIMEOUT, memory_kib, process_id};

/// Starts a listener that counts connections and closes them.
async fn counting(address: &str) -> (u16, Arc<AtomicUsize>, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind(address).await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            drop(stream);
        }
    });
    (port, count, AbortOnDropHandle::new(server))
}

#[tokio::test]
async fn no_spelling_of_an_internal_address_is_connected_to() {
    let (port, connections, _listening) = counting("127.0.0.1:0").await;
    // Only a network of none of these addresses is allowed.
    let stack = Stack::start_with(&[("ALLOW_NETWORKS", "192.0.2.0/24")]).await;
    let hosts = ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "localhost", "①②⑦.0.0.1"];
    let callback = |host| json!({"name": host, "url": format!("http://{host}:{port}/hook")});
    let applied = stack.process(hosts.iter().map(callback).collect()).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;

    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;

    let attempts = eventually(TEST_TIMEOUT, "every delivery was attempted", async || {
        let timeline = stack.api.outcome(&update_id).await;
        let deliveries = timeline["deliveries"].as_array().cloned().unwrap_or_default();
        let first: Vec<_> = deliveries.iter().filter_map(|delivery| delivery["attempts"].get(0).cloned()).collect();
        if first.len() == hosts.len() { Ok(first) } else { Err(timeline.to_string()) }
    })
    .await;
    for attempt in attempts {
        let error = attempt["error"].as_str().unwrap_or_default();
        assert!(error.starts_with("refused: the address ") && error.contains("not allowed"), "{attempt}");
    }
    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

/// A tenant has callbacks with names whose lookups hang, and with addresses of the installation. Another tenant is
/// healthy.
#[tokio::test]
async fn callbacks_with_hanging_dns_or_internal_addresses_connect_to_nothing() {
    let names = NameServer::start().await;
    let (port, connections, _listening) = counting("0.0.0.0:0").await;
    let stack = Stack::start_with(&[("DNS_SERVERS", &names.address), ("DENY_NETWORKS", "127.9.0.0/16")]).await;
    let hostile = Api::create(stack.api.url.clone(), &stack.client, "hostile").await;
    let nats_port = stack.nats.url().rsplit_once(':').expect("a port").1.trim_end_matches('/').to_owned();
    let refused = [
        (format!("127.0.0.1:{}", stack.postgres.port()), "it is the address of Postgres"),
        (format!("fine-nats.example:{nats_port}"), "it is the address of NATS"),
        (format!("127.9.1.2:{port}"), "its network is in DENY_NETWORKS"),
    ];
    let hanging = (0..60).map(|number| format!("hang-{number}.example:{port}"));
    let hosts = refused.iter().map(|(host, _)| host.clone()).chain(hanging);
    let callback = |host: String| json!({"name": host, "url": format!("http://{host}/hook"), "timeoutSeconds": 10});
    let callbacks = hosts.map(callback).collect::<Vec<_>>();
    let process = |api: &Api, callbacks| json!({"projectId": api.project_id, "name": "sales", "states": [{"name": "new"}], "callbacks": callbacks});
    let hostile_process = stack.apply(process(&hostile, json!(callbacks))).await;
    let hostile_lead = hostile.initiate(process_id(&hostile_process), None).await;
    let healthy_url = format!("http://fine.example:{}/crm", stack.receiver.address().port());
    let healthy_process = stack.apply(process(&stack.api, json!([{"name": "crm", "url": healthy_url}]))).await;
    let healthy_lead = stack.api.initiate(process_id(&healthy_process), None).await;

    let hostile_update = hostile.update(json!({"leadId": hostile_lead, "name": "x"})).await;
    eventually(TEST_TIMEOUT, "lookups hang", async || names.unanswered() >= 32).await;
    let begun = Instant::now();
    stack.api.update(json!({"leadId": healthy_lead, "name": "x"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;

    let took = begun.elapsed();
    println!("a webhook beside {} questions without an answer: {took:?}", names.unanswered());
    // All hanging lookups take 20 s in total: 16 at a time, 5 s each.
    assert!(took < Duration::from_secs(10), "the healthy tenant's webhook took {took:?}");
    for (host, reason) in refused {
        eventually(TEST_TIMEOUT, "the attempt is recorded", async || {
            let timeline = hostile.outcome(&hostile_update).await;
            let deliveries = timeline["deliveries"].as_array().cloned().unwrap_or_default();
            let error = |delivery: &serde_json::Value| delivery["attempts"][0]["error"].as_str().map(str::to_owned);
            let errors = deliveries.iter().filter_map(error).collect::<Vec<_>>();
            if errors.iter().any(|error| error.ends_with(reason)) { Ok(()) } else { Err(format!("{host}: {errors:?}")) }
        })
        .await;
    }
    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

/// The hostile responses, by path.
const HOSTILE: &[&str] =
    &["huge", "drip-head", "drip-body", "endless-headers", "endless-line", "endless-interim", "bomb", "redirect"];

/// The number of bytes of an endless response.
const LENGTH: usize = 300 * 1024 * 1024;

async fn flood(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let mut sent = 0;
    while sent < LENGTH {
        stream.write_all(bytes).await?;
        sent += bytes.len();
    }
    Ok(())
}

async fn drip(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    loop {
        stream.write_all(bytes).await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let text = String::from_utf8_lossy(&request);
    let path = text.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
    match path.as_str() {
        "huge" => {
            stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {LENGTH}\r\n\r\n").as_bytes()).await?;
            flood(&mut stream, &[b'x'; 64 * 1024]).await
        }
        "drip-head" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await?;
            drip(&mut stream, b"x").await
        }
        "drip-body" => {
            stream.write_all(b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n").await?;
            drip(&mut stream, b"1\r\nx\r\n").await
        }
        "endless-headers" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            flood(&mut stream, &b"x-header: value\r\n".repeat(1000)).await
        }
        "endless-line" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await?;
            flood(&mut stream, &[b'x'; 64 * 1024]).await
        }
        "endless-interim" => flood(&mut stream, b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n").await,
        "bomb" => {
            // A body that would be a thousand times as long when decompressed.
            let head = "HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            flood(&mut stream, &[b"400\r\n", [0x1f; 1024].as_slice(), b"\r\n"].concat()).await
        }
        _ => stream.write_all(b"HTTP/1.1 307 No\r\nlocation: /huge\r\ncontent-length: 0\r\n\r\n").await,
    }
}

/// Starts a server with the hostile responses, each at its own path, and returns its address.
async fn hostile_server() -> (std::net::SocketAddr, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = tokio::spawn(async move {
        let mut answering = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            answering.spawn(answer(stream));
        }
    });
    (address, AbortOnDropHandle::new(server))
}

#[tokio::test]
async fn an_answer_of_any_size_or_slowness_costs_bounded_memory_and_time() {
    let (proxy, proxied, _listening) = counting("127.0.0.1:0").await;
    let proxy = format!("http://127.0.0.1:{proxy}");
    let proxies = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let extra = proxies.map(|name| (name, proxy.as_str()));
    let stack = Stack::start_with(&[extra.as_slice(), &[("RETRY_SCHEDULE", "0s,1h")]].concat()).await;
    let (address, _server) = hostile_server().await;
    let callback = |path| json!({"name": path, "url": format!("http://{address}/{path}"), "timeoutSeconds": 3});
    let applied = stack.process(HOSTILE.iter().map(callback).collect()).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let memory = |field| memory_kib(stack.notifier.pid(), field).expect("the notifier's memory");
    let before = memory("VmRSS");

    let begun = Instant::now();
    for number in 0..8 {
        stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
    }
    eventually(TEST_TIMEOUT, "every delivery was attempted or waits for its breaker", async || {
        let attempted = stack.count("SELECT count(*) FROM webhooks.every_attempt").await;
        let waiting = stack.count("SELECT count(*) FROM webhooks.deliveries WHERE attempts = 0").await;
        let all = 8 * i64::try_from(HOSTILE.len()).expect("a few");
        if attempted + waiting >= all { Ok(()) } else { Err(format!("{attempted} and {waiting} of {all}")) }
    })
    .await;

    let (took, peak) = (begun.elapsed(), memory("VmHWM"));
    println!("hostile answers: {} MiB before, {} MiB at most, all over after {took:?}", before / 1024, peak / 1024);
    assert!(peak < before + 32 * 1024, "{before} KiB became {peak} KiB");
    let longest = stack.count("SELECT max(duration_ms)::bigint FROM webhooks.every_attempt").await;
    println!("the longest attempt: {longest} ms");
    assert_eq!(proxied.load(Ordering::Relaxed), 0, "no proxy is taken from the environment");
    let redirected = stack.count("SELECT count(*) FROM webhooks.every_attempt WHERE status_code = 307").await;
    assert!(redirected > 0, "a redirect is recorded as an answer");
}
