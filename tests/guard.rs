//! What an endpoint cannot do to the webhook-notifier: have it reach an internal address, fill its memory, hold it up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use test_support::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

use crate::stack::{SOON, Stack};

/// A listener that counts who connects, and says nothing.
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

/// The attempts of an update's deliveries, once each delivery has one.
async fn attempts(stack: &Stack, update_id: &str, callbacks: usize, deadline: Duration) -> Vec<Value> {
    eventually(deadline, "every delivery was attempted", async || {
        let (_, story) = stack.api.get(&format!("/api/v1/updates/{update_id}")).await;
        let deliveries = story["data"]["deliveries"].as_array().cloned().unwrap_or_default();
        let first = deliveries.iter().filter_map(|delivery| delivery["attempts"].get(0).cloned()).collect::<Vec<_>>();
        if first.len() == callbacks { Ok(first) } else { Err(story.to_string()) }
    })
    .await
}

#[tokio::test]
async fn an_internal_address_is_never_connected_to_however_it_is_spelled() {
    let (port, connections, _listening) = counting("127.0.0.1:0").await;
    // Another network is allowed: this one is not.
    let stack = Stack::start_with(&[("ALLOW_NETWORKS", "192.0.2.0/24")]).await;
    let hosts = ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "localhost", "①②⑦.0.0.1"];
    let callbacks =
        hosts.iter().map(|host| json!({"name": host, "url": format!("http://{host}:{port}/hook")})).collect::<Vec<_>>();
    let applied = stack.process(json!(callbacks)).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    for attempt in attempts(&stack, &update_id, hosts.len(), SOON).await {
        let error = attempt["error"].as_str().unwrap_or_default();
        assert!(error.starts_with("refused: the address ") && error.contains("not allowed"), "{attempt}");
    }
    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

/// What a hostile endpoint answers.
const HOSTILE: &[&str] =
    &["huge", "drip-head", "drip-body", "endless-headers", "endless-line", "endless-interim", "bomb", "redirect"];

/// How much they send.
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
            // 1 MiB of zeros, deflated a thousandfold, again and again: what it would be if it were inflated is beside the
            // point, as nobody looks at it.
            let head = "HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            flood(&mut stream, &[b"400\r\n", [0x1f; 1024].as_slice(), b"\r\n"].concat()).await
        }
        _ => stream.write_all(b"HTTP/1.1 307 No\r\nlocation: /huge\r\ncontent-length: 0\r\n\r\n").await,
    }
}

/// The resident memory of a process in KiB, by the name that `/proc` has for it.
pub(crate) fn memory(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process's status");
    let line = status.lines().find(|line| line.starts_with(field)).expect(field);
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

#[tokio::test]
async fn an_answer_of_any_size_or_slowness_costs_bounded_memory_and_time() {
    let (proxy, proxied, _listening) = counting("127.0.0.1:0").await;
    let proxy = format!("http://127.0.0.1:{proxy}");
    let proxies = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let extra = proxies.map(|name| (name, proxy.as_str()));
    let stack = Stack::start_with(&[extra.as_slice(), &[("RETRY_SCHEDULE", "0s,1h")]].concat()).await;
    let hostile = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = hostile.local_addr().expect("an address");
    let _serving = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut answering = JoinSet::new();
        while let Ok((stream, _)) = hostile.accept().await {
            answering.spawn(answer(stream));
        }
    }));
    let callbacks = HOSTILE
        .iter()
        .map(|path| json!({"name": path, "url": format!("http://{address}/{path}"), "timeoutSeconds": 3}))
        .collect::<Vec<_>>();
    let applied = stack.process(json!(callbacks)).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let before = memory(stack.notifier.pid(), "VmRSS");
    let begun = Instant::now();
    let mut last = String::new();
    for number in 0..8 {
        last = stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
    }
    // Whatever is open by now waits for its breaker; of the last update those count that were attempted.
    let first = "SELECT count(*) FROM webhooks.every_attempt";
    eventually(SOON, "every delivery was attempted or waits for its breaker", async || {
        let waiting = "SELECT count(*) FROM webhooks.deliveries WHERE attempts = 0";
        let (attempted, waiting) = (stack.count(first).await, stack.count(waiting).await);
        let all = 8 * i64::try_from(HOSTILE.len()).expect("a few");
        if attempted + waiting >= all { Ok(()) } else { Err(format!("{attempted} and {waiting} of {all}")) }
    })
    .await;
    let took = begun.elapsed();
    let peak = memory(stack.notifier.pid(), "VmHWM");
    println!("hostile answers: {} MiB before, {} MiB at most, all over after {took:?}", before / 1024, peak / 1024);
    assert!(peak < before + 32 * 1024, "{before} KiB became {peak} KiB");
    let longest = stack.count("SELECT max(duration_ms)::bigint FROM webhooks.every_attempt").await;
    println!("the longest attempt: {longest} ms");
    // Other tests run on the same machine, which may be a small one.
    assert!(longest < 10_000, "an attempt with 3 s took {longest} ms");
    assert_eq!(proxied.load(Ordering::Relaxed), 0, "no proxy is taken from the environment");
    let redirected = stack.count("SELECT count(*) FROM webhooks.every_attempt WHERE status_code = 307").await;
    assert!(redirected > 0, "a redirect is an answer like any other");
    let (status, _) = stack.api.get(&format!("/api/v1/updates/{last}")).await;
    assert_eq!(status, 200);
}
