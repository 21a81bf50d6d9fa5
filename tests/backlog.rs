//! Memory and promptness with a backlog: a million deliveries that wait for a dead endpoint, a million commands in the log.
//!
//! Ignored, for they take minutes: `just memory` runs them. `BACKLOG` is another number than a million, `SAMPLE_SECONDS`
//! another time than a minute.

use std::{
    env,
    time::{Duration, Instant},
};

use futures::StreamExt;
use serde_json::json;
use test_support::{Service, eventually, free_port};

use crate::stack::{SOON, Stack};

/// What a service may take.
const MOST_KIB: u64 = 64 * 1024;
/// How many publishes may be unacked while the log is filled.
const PIPELINED: usize = 4096;
const EVERY: Duration = Duration::from_millis(250);

fn from_env(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect(name))
}

fn backlog() -> i64 {
    from_env("BACKLOG", 1_000_000).try_into().expect("BACKLOG")
}

fn sample_for() -> Duration {
    Duration::from_secs(from_env("SAMPLE_SECONDS", 60))
}

/// The most that each service was seen to take, in KiB.
#[derive(Default)]
struct Peaks([u64; 3]);

impl Peaks {
    fn services(stack: &Stack) -> [(&'static str, &Service); 3] {
        [("gateway", &stack.gateway), ("lead-state", &stack.lead_state), ("webhook-notifier", &stack.notifier)]
    }

    fn sample(&mut self, stack: &Stack) {
        for (peak, (_, service)) in self.0.iter_mut().zip(Self::services(stack)) {
            *peak = (*peak).max(memory(service.pid()));
        }
    }

    fn assert_bounded(&self, stack: &Stack, what: &str) {
        for (peak, (name, _)) in self.0.iter().zip(Self::services(stack)) {
            println!("{what}: {name} takes {:.1} MiB at most", *peak as f64 / 1024.0);
        }
        for (peak, (name, _)) in self.0.iter().zip(Self::services(stack)) {
            assert!(*peak < MOST_KIB, "{what}: {name} takes {peak} KiB");
        }
    }
}

/// The resident memory of a process, in KiB.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process's status");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

#[tokio::test]
#[ignore = "takes minutes: just memory"]
async fn deliveries_that_wait_for_a_dead_endpoint_cost_nothing() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1s,1h")]).await;
    // Each retry fails its first attempt.
    stack.receiver.on("/retried", [500, 200].repeat(1000));
    let dead = format!("http://127.0.0.1:{}/", free_port());
    let applied = stack
        .process(json!([
            {"name": "dead", "url": dead},
            {"name": "healthy", "url": stack.receiver.url("/healthy")},
            {"name": "retried", "url": stack.receiver.url("/retried")},
        ]))
        .await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, None).await;

    stack.notifier.terminate().await;
    let begun = Instant::now();
    sqlx::query(
        r#"
        INSERT INTO webhooks.deliveries
            (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at, created_at, updated_at, payload)
        SELECT webhooks.id_prefix(now()) || int8send(n), $1, $2, $3, 'pending', 0, now(), now(), now(),
               '{"data": "' || repeat('x', 300) || '"}'
        FROM generate_series(1, $4) AS n
        "#,
    )
    .bind(applied.process.callbacks[0].callback_id.as_bytes())
    .bind(stack.api.project_id.as_bytes())
    .bind(process_id.as_bytes())
    .bind(backlog())
    .execute(&stack.pool)
    .await
    .expect("the backlog");
    println!("{} deliveries made in {:?}", backlog(), begun.elapsed());
    stack.notifier.restart().await;

    let mut peaks = Peaks::default();
    let (mut firsts, mut retries) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    while begun.elapsed() < sample_for() {
        let posted = Instant::now();
        let before = ["/healthy", "/retried"].map(|path| stack.receiver.requests_to(path).len());
        stack.api.update(json!({"leadId": lead_id, "metadata": {"n": firsts.len()}})).await;
        let requests = stack.receiver.wait_for_requests("/healthy", before[0] + 1, SOON).await;
        firsts.push(requests[before[0]].received_at.duration_since(posted));
        let requests = stack.receiver.wait_for_requests("/retried", before[1] + 2, SOON).await;
        // Due a second after the first attempt, and up to a tenth later.
        retries.push(requests[before[1] + 1].received_at.duration_since(requests[before[1]].received_at));
        peaks.sample(&stack);
        tokio::time::sleep(EVERY).await;
    }
    firsts.sort_unstable();
    retries.sort_unstable();
    println!(
        "meanwhile: POST to webhook p50 {:?}, at most {:?}; first attempt to the retry due after 1 s p50 {:?}, at most {:?}; {} of each",
        firsts[firsts.len() / 2],
        firsts[firsts.len() - 1],
        retries[retries.len() / 2],
        retries[retries.len() - 1],
        firsts.len(),
    );
    let attempts = stack.count("SELECT coalesce(sum(attempts), 0)::bigint FROM webhooks.deliveries").await;
    let to_the_dead = attempts - 3 * i64::try_from(firsts.len()).expect("a few");
    println!("the dead endpoint was asked {to_the_dead} times");
    assert!(firsts[firsts.len() - 1] < Duration::from_secs(5), "{:?}", firsts[firsts.len() - 1]);
    assert!(retries[retries.len() - 1] < Duration::from_secs(5), "{:?}", retries[retries.len() - 1]);
    // Before its breaker opened, as many as run at once.
    assert!(to_the_dead < 150, "{to_the_dead}");
    peaks.assert_bounded(&stack, "a backlog of deliveries");
}

#[tokio::test]
#[ignore = "takes minutes: just memory"]
async fn commands_that_wait_in_the_log_cost_no_memory() {
    let mut stack = Stack::start_with(&[("STREAM_MAX_BYTES", "8589934592")]).await;
    let applied = stack.process(json!([])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for _ in 0..100 {
        leads.push(stack.api.initiate(process_id, None).await);
    }
    stack.lead_state.terminate().await;
    let js = service_kit::nats::jetstream(&stack.client);
    let subject = format!("leads.cmd.{}.update", stack.api.project_id);
    let begun = Instant::now();
    let publishes = futures::stream::iter(0..backlog()).map(|number| {
        let body =
            json!({"leadId": leads[number as usize % leads.len()], "metadata": {"n": number, "text": "x".repeat(100)}});
        let (js, subject) = (&js, subject.clone());
        async move { js.publish(subject, body.to_string().into()).await.expect("published").await.expect("an ack") }
    });
    let logged = publishes.buffer_unordered(PIPELINED).count().await;
    println!("{logged} commands logged in {:?}", begun.elapsed());
    stack.lead_state.restart().await;

    let mut peaks = Peaks::default();
    let begun = Instant::now();
    let applied = "SELECT count(*) FROM lead_state.lead_updates";
    let mut done = 0;
    while done < backlog() && begun.elapsed() < sample_for() {
        peaks.sample(&stack);
        tokio::time::sleep(EVERY).await;
        done = stack.count(applied).await;
    }
    println!("{done} of them applied in {:?}", begun.elapsed());
    eventually(SOON, "the first are applied", async || stack.count(applied).await > 0).await;
    peaks.assert_bounded(&stack, "a backlog of commands");
}
