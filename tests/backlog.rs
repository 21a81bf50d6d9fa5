//! Memory and latency with a backlog: a million deliveries that wait for a dead endpoint, a million commands in the
//! log, a million updates to audit.
//!
//! The tests are ignored because they take minutes; `just memory` runs them. `BACKLOG` sets another size than a
//! million, and `SAMPLE_SECONDS` another time than a minute for sampling memory.

use std::{
    env,
    process::Stdio,
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use contract::{ObjectId, event::OutcomeKind, headers, subject};
use futures::StreamExt;
use serde_json::json;
use test_support::{Service, eventually, free_port};

use crate::support::{LEDGER_ROWS, Stack, TEST_TIMEOUT, memory_kib, process_id, publish_in_order};

/// The memory that a service may take.
const MOST_KIB: u64 = 64 * 1024;
/// The number of unacknowledged publishes while the log is filled.
const PIPELINED: usize = 4096;
const INTERVAL: Duration = Duration::from_millis(250);

fn from_env(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect(name))
}

fn backlog() -> i64 {
    from_env("BACKLOG", 1_000_000).try_into().expect("BACKLOG")
}

fn sample_for() -> Duration {
    Duration::from_secs(from_env("SAMPLE_SECONDS", 60))
}

/// The peak memory of each service, in KiB.
#[derive(Default)]
struct Peaks([u64; 3]);

impl Peaks {
    fn services(stack: &Stack) -> [(&'static str, &Service); 3] {
        [("gateway", &stack.gateway), ("lead-state", &stack.lead_state), ("webhook-notifier", &stack.notifier)]
    }

    fn sample(&mut self, stack: &Stack) {
        for (peak, (_, service)) in self.0.iter_mut().zip(Self::services(stack)) {
            *peak = (*peak).max(memory_kib(service.pid(), "VmRSS").expect("a running service"));
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

#[tokio::test]
#[ignore = "takes minutes: just memory"]
async fn a_million_deliveries_to_a_dead_endpoint_cost_bounded_memory_and_delay_nothing() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1s,1h")]).await;
    // The first attempt of each delivery to `/retried` fails.
    stack.receiver.on("/retried", [500, 200].repeat(1000));
    let dead = format!("http://127.0.0.1:{}/", free_port());
    let applied = stack
        .process(json!([
            {"name": "dead", "url": dead},
            {"name": "healthy", "url": stack.receiver.url("/healthy")},
            {"name": "retried", "url": stack.receiver.url("/retried")},
        ]))
        .await;
    let process_id = process_id(&applied);
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
        let requests = stack.receiver.wait_for_requests("/healthy", before[0] + 1, TEST_TIMEOUT).await;
        firsts.push(requests[before[0]].received_at.duration_since(posted));
        let requests = stack.receiver.wait_for_requests("/retried", before[1] + 2, TEST_TIMEOUT).await;
        // A retry is due a second after the first attempt, plus up to a tenth of jitter.
        retries.push(requests[before[1] + 1].received_at.duration_since(requests[before[1]].received_at));
        peaks.sample(&stack);
        tokio::time::sleep(INTERVAL).await;
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
    let to_dead = attempts - 3 * i64::try_from(firsts.len()).expect("a few");
    println!("the dead endpoint was sent {to_dead} requests");
    assert!(firsts[firsts.len() - 1] < Duration::from_secs(5), "{:?}", firsts[firsts.len() - 1]);
    assert!(retries[retries.len() - 1] < Duration::from_secs(5), "{:?}", retries[retries.len() - 1]);
    // Attempts that ran concurrently before the breaker opened.
    assert!(to_dead < 150, "{to_dead}");
    peaks.assert_bounded(&stack, "a backlog of deliveries");
}

#[tokio::test]
#[ignore = "takes minutes: just memory"]
async fn a_million_commands_in_the_log_cost_bounded_memory() {
    let mut stack = Stack::start_with(&[("STREAM_MAX_BYTES", "8589934592")]).await;
    let leads = stack.leads(&[], 100).await;
    stack.lead_state.terminate().await;
    let js = stack.js();
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
    let applied = LEDGER_ROWS;
    let mut done = 0;
    while done < backlog() && begun.elapsed() < sample_for() {
        peaks.sample(&stack);
        tokio::time::sleep(INTERVAL).await;
        done = stack.count(applied).await;
    }
    println!("{done} of them applied in {:?}", begun.elapsed());
    eventually(TEST_TIMEOUT, "the first are applied", async || stack.count(applied).await > 0).await;
    peaks.assert_bounded(&stack, "a backlog of commands");
}

/// Fills the log, the ledger, the events and the deliveries as if all leads had been updated in turn, with a delivery
/// of each update to a callback.
async fn make_updates(stack: &Stack, leads: &[String], process_id: ObjectId, callback_id: ObjectId) {
    let begun = Instant::now();
    let (project_id, at) = (stack.api.project_id, service_kit::clock::now());
    let id = |number: i64| ObjectId::new(at, number.to_be_bytes());
    let js = stack.js();
    let commands = (1..=backlog()).map(|number| {
        let body = json!({"updateId": id(number), "leadId": leads[number as usize % leads.len()],
            "metadata": {"n": number, "text": "x".repeat(100)}});
        (format!("leads.cmd.{project_id}.update"), HeaderMap::new(), body.to_string().into())
    });
    let events = (1..=backlog()).map(|number| {
        let mut map = HeaderMap::new();
        map.insert(headers::MESSAGE_ID, id(number).to_string());
        map.insert(headers::POSITION, format!("0.1.{number}.0"));
        (subject::event(project_id, Some(process_id), OutcomeKind::Update, true), map, "x".repeat(500).into())
    });
    tokio::join!(publish_in_order(&js, PIPELINED, commands), publish_in_order(&js, PIPELINED, events));
    for statement in [
        "INSERT INTO lead_state.lead_updates
             (project_id, update_id, log_epoch, log_sequence, log_index, logged_at, lead_id, process_id, command, success,
              from_state, to_state, version, warnings, data, applied_at)
         SELECT l.project_id, substring(int8send($1) FROM 5) || int8send(n), 1, n, 0, now(), l.lead_id, l.process_id,
                json_build_object('text', repeat('x', 100)), true, l.state, l.state,
                1 + row_number() OVER (PARTITION BY l.lead_id ORDER BY n), '{}', l.metadata, now()
         FROM generate_series(1, $2) AS n
         JOIN unnest($3::text[]) WITH ORDINALITY AS leads (id, place) ON place = 1 + n % array_length($3, 1)
         JOIN lead_state.leads l ON l.lead_id = decode(id, 'hex')",
        "UPDATE lead_state.leads l SET version = (SELECT max(version) FROM lead_state.lead_updates u WHERE u.lead_id = l.lead_id)
         WHERE $1 > 0 AND $2 > 0 AND $3::text[] IS NOT NULL",
        "UPDATE lead_state.checkpoints SET last_sequence = $2, announced_sequence = $2 WHERE $1 > 0 AND $3::text[] IS NOT NULL",
        "INSERT INTO webhooks.deliveries
             (update_id, callback_id, project_id, process_id, status, attempts, created_at, updated_at, first_started_at,
              first_duration_ms, first_status_code)
         SELECT update_id, decode($3[1], 'hex'), project_id, process_id, 'delivered', 1, now(), now(), now(), 1, 200
         FROM lead_state.lead_updates WHERE $1 > 0 AND $2 > 0",
    ] {
        let texts =
            if statement.contains("$3[1]") { vec![callback_id.to_string()] } else { leads.to_vec() };
        let query = sqlx::query(statement).bind(at.millis() / 1000).bind(backlog()).bind(texts);
        query.execute(&stack.pool).await.expect(statement);
    }
    sqlx::query("ANALYZE").execute(&stack.pool).await.expect("statistics");
    println!("{} updates made in {:?}", backlog(), begun.elapsed());
}

#[tokio::test]
#[ignore = "takes minutes: just memory"]
async fn an_audit_of_a_million_updates_costs_bounded_memory() {
    let mut stack = Stack::start_with(&[("STREAM_MAX_BYTES", "2147483648")]).await;
    let applied = stack.process_calling(&["crm"]).await;
    let process_id = process_id(&applied);
    let mut leads = Vec::new();
    for _ in 0..100 {
        leads.push(stack.api.initiate(process_id, None).await);
    }
    stack.wait_for_count("SELECT count(*) FROM lead_state.checkpoints", 1).await;
    stack.lead_state.terminate().await;
    stack.notifier.terminate().await;

    make_updates(&stack, &leads, process_id, applied.process.callbacks[0].callback_id).await;
    let begun = Instant::now();
    let mut command = stack.leadctl_command(&["audit", "--json"]);
    let child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("leadctl");
    let pid = child.id().expect("a pid");
    let mut audit = Box::pin(child.wait_with_output());
    let (mut memory, mut disk) = (0, 0);
    let output = loop {
        tokio::select! {
            output = &mut audit => break output.expect("its end"),
            () = tokio::time::sleep(INTERVAL) => {}
        }
        memory = memory.max(memory_kib(pid, "VmHWM").unwrap_or_default());
        let temporary = "SELECT (SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::bigint FROM pg_class
                                 WHERE relpersistence = 't' AND relkind = 'r')
                              + (SELECT coalesce(sum(size), 0)::bigint FROM pg_ls_tmpdir())";
        disk = disk.max(stack.count(temporary).await);
    };
    let (memory, disk) = (memory / 1024, disk >> 20);
    println!(
        "audited in {:?}; leadctl took {memory} MiB at most, Postgres {disk} MiB of temporary disk",
        begun.elapsed()
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((output.status.code(), &report["updates"]["succeeded"]), (Some(0), &json!(backlog())), "{report}");
    assert_eq!(report["callbacks"][0]["delivered"], json!(backlog()), "{report}");
    assert!(memory < MOST_KIB / 1024, "leadctl takes {memory} MiB");
}
