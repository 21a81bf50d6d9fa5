//! Hostile tenants: every attack of a table runs at the same time as the updates of a healthy tenant.
//!
//! In `cargo test` a few attacks run at the same time, each by a separate tenant. Each attacker gets the expected
//! rejections and no server error, and the healthy tenant loses nothing. `just hostile` runs one attack after the other
//! and compares the latency of the healthy tenant's webhooks before and during each attack.
//!
//! To add an attack, add a function that attacks until it is dropped, and a row in one of the tables.

mod callbacks;
mod connections;
mod console;
mod http;
mod producers;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::future::{LocalBoxFuture, join_all};
use reqwest::RequestBuilder;
use serde_json::{Value, json};
use test_support::{Receiver, eventually};
use tokio::time::{interval, timeout};

use crate::support::{NameServer, Stack, TEST_TIMEOUT, Tenant, assert_exactly_once, by_update};

/// Limits that attackers reach within seconds: a small pool of attempts, 20 updates and 10 reads a second, and short
/// timeouts for connections.
const LIMITS: [(&str, &str); 9] = [
    ("MAX_IN_FLIGHT", "64"),
    ("RETRY_SCHEDULE", "0s,1s,1m"),
    ("GATEWAY_UPDATE_RATE", "100"),
    ("GATEWAY_OTHER_RATE", "50"),
    ("GATEWAY_WORK_RATE", "4"),
    ("GATEWAY_MAX_LISTENERS", "32"),
    ("GATEWAY_HEADER_TIMEOUT", "3s"),
    ("GATEWAY_WRITE_TIMEOUT", "2s"),
    ("GATEWAY_MAX_CONNECTIONS_PER_ADDRESS", "128"),
];
/// The 99th percentile during an attack may be at most this many times the one without an attack.
const FACTOR: f64 = 2.0;
/// The number of updates that are measured per attack, and by how much it may grow if the attack seems too slow.
const UPDATES: usize = 150;
const ROUNDS: usize = 3;

/// The number of attacks that run at the same time in `cargo test`. All of them together would overload a small
/// machine.
const AT_ONCE: usize = 4;
/// Server errors that are accepted on a machine loaded by attacks and other tests.
const TOO_SLOW: [&str; 2] = ["503 unavailable", "503 not_confirmed"];

/// An attack that one tenant makes.
struct Attack {
    name: &'static str,
    /// The rejections that the attacker must get at least once, in the form of [`Answers`].
    refusals: &'static [&'static str],
    /// Attacks until it is dropped.
    run: for<'a> fn(&'a Attacker<'a>) -> LocalBoxFuture<'a, ()>,
}

/// How often an attacker got each answer: `429 rate_limited`, `200`, or `cut` for a connection that was closed.
#[derive(Default)]
struct Answers(Mutex<BTreeMap<String, usize>>);

impl Answers {
    fn add(&self, answer: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(answer.into()).or_default() += 1;
    }

    fn all(&self) -> BTreeMap<String, usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A hostile tenant, with its own client address.
struct Attacker<'a> {
    stack: &'a Stack,
    healthy: &'a Tenant,
    tenant: Tenant,
    /// The tenant connects from `127.0.0.{host}`.
    host: u8,
    /// The receiver of its callbacks.
    endpoint: Receiver,
    answers: Answers,
}

impl<'a> Attacker<'a> {
    async fn new(stack: &'a Stack, healthy: &'a Tenant, attack: &Attack, host: u8) -> Self {
        let mut tenant = Tenant::new(stack, attack.name, json!([])).await;
        let address = IpAddr::from([127, 0, 0, host]);
        tenant.api.http = reqwest::Client::builder()
            .local_address(address)
            .timeout(TEST_TIMEOUT)
            .no_proxy()
            .build()
            .expect("an HTTP client");
        Self { stack, healthy, tenant, host, endpoint: Receiver::start().await, answers: Answers::default() }
    }

    /// Replaces the callbacks of its process.
    async fn callbacks(&self, callbacks: Value) {
        Tenant::apply(self.stack, &self.tenant.api, callbacks).await;
    }

    /// Sends requests from `clients` clients, each with a pause after each response.
    async fn repeat(&self, clients: usize, pause: Duration, request: impl Fn(usize) -> RequestBuilder) {
        let client = async |client: usize| {
            for number in 0.. {
                self.answers.add(answer(request(number * clients + client)).await);
                tokio::time::sleep(pause).await;
            }
        };
        join_all((0..clients).map(client)).await;
    }

    /// Waits until the attacker got all expected rejections.
    async fn wait_for_refusals(&self, attack: &Attack) {
        eventually(TEST_TIMEOUT, attack.name, async || {
            let answers = self.answers.all();
            let missing = attack.refusals.iter().find(|refusal| !answers.contains_key(**refusal));
            missing.map_or(Ok(()), |missing| Err(format!("no {missing:?} in {answers:?}")))
        })
        .await;
    }

    /// Asserts that the only server errors are those that the attack expects, and those of [`TOO_SLOW`].
    fn assert_no_server_error(&self, attack: &Attack) {
        let answers = self.answers.all();
        let is_expected = |answer: &str| TOO_SLOW.contains(&answer) || attack.refusals.contains(&answer);
        let unexpected = answers.keys().find(|answer| answer.starts_with('5') && !is_expected(answer));
        assert_eq!(unexpected, None, "{}: {answers:?}", attack.name);
    }
}

/// The status and the error code of a response, or the code of its first line.
async fn answer(request: RequestBuilder) -> String {
    let Ok(answer) = request.send().await else { return "cut".to_owned() };
    let status = answer.status().as_u16();
    let Ok(text) = answer.text().await else { return "cut".to_owned() };
    let body: Value = text.lines().next().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    match body["code"].as_str() {
        Some(code) => format!("{status} {code}"),
        None => status.to_string(),
    }
}

/// The tenant that no attack may hurt, and the ids of its updates.
struct Healthy {
    tenant: Tenant,
    accepted: Mutex<Vec<String>>,
}

impl Healthy {
    /// Sends at most 10 updates a second. Returns the sorted times from the POST of each to the receipt of its webhook.
    async fn update(&self, receiver: &Receiver, updates: usize) -> Vec<Duration> {
        let mut latencies = Vec::new();
        let mut ticks = interval(Duration::from_millis(100));
        for number in 0..updates {
            ticks.tick().await;
            let before = receiver.requests_to("/healthy").len();
            let begun = Instant::now();
            let body = json!({"leadId": self.tenant.lead_id, "metadata": {"n": number}});
            let id = self.tenant.api.update_until_accepted(&body).await;
            self.accepted.lock().unwrap_or_else(PoisonError::into_inner).push(id);
            let requests = receiver.wait_for_requests("/healthy", before + 1, TEST_TIMEOUT).await;
            latencies.push(requests[before].received_at.duration_since(begun));
        }
        latencies.sort_unstable();
        latencies
    }

    /// Like [`update`](Self::update) with [`UPDATES`] updates. While the 99th percentile exceeds `bound` milliseconds,
    /// sends more, up to [`ROUNDS`] times as many, because one pause of the machine can decide the percentile of
    /// [`UPDATES`] updates.
    async fn update_during_an_attack(&self, receiver: &Receiver, bound: f64) -> Vec<Duration> {
        let mut latencies = Vec::new();
        for _ in 0..ROUNDS {
            latencies.extend(self.update(receiver, UPDATES).await);
            latencies.sort_unstable();
            if percentile(&latencies, 99) <= bound {
                break;
            }
        }
        latencies
    }

    /// Asserts that every update was applied and delivered as [`assert_exactly_once`] requires, and that the audit is
    /// clean.
    async fn assert_nothing_lost(&self, stack: &Stack) {
        stack.wait_until_applied().await;
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // An update that was not confirmed, and was sent again, may also be in the ledger.
        let applied = "SELECT count(*) FROM lead_state.lead_updates WHERE project_id = $1";
        let project = self.tenant.api.project_id.as_bytes();
        let applied: i64 = sqlx::query_scalar(applied).bind(project).fetch_one(&stack.pool).await.expect("the ledger");
        let requests = eventually(TEST_TIMEOUT, "all its webhooks", async || {
            let requests = stack.receiver.requests_to("/healthy");
            let delivered = by_update(&requests).len();
            if delivered as i64 >= applied { Ok(requests) } else { Err(format!("{delivered} of {applied}")) }
        })
        .await;
        assert_exactly_once(&stack.pool, self.tenant.api.project_id, &accepted, &requests).await;
        eventually(TEST_TIMEOUT, "the audit finds nothing", async || {
            let (code, report) = stack.audit(&[]).await;
            if code == 0 { Ok(()) } else { Err(report.to_string()) }
        })
        .await;
    }
}

/// A stack with a healthy tenant, and the name server of the stack.
async fn start() -> (Stack, Healthy, NameServer) {
    let names = NameServer::start().await;
    let settings: Vec<_> = LIMITS.into_iter().chain([("DNS_SERVERS", names.address.as_str())]).collect();
    let stack = Stack::start_with(&settings).await;
    let url = format!("http://fine.example:{}/healthy", stack.receiver.address().port());
    let callbacks = json!([{"name": "crm", "url": url}]);
    let tenant = Tenant::new(&stack, "healthy", callbacks).await;
    (stack, Healthy { tenant, accepted: Mutex::default() }, names)
}

fn attacks() -> impl Iterator<Item = (&'static Attack, u8)> {
    [http::ATTACKS, callbacks::ATTACKS, connections::ATTACKS, producers::ATTACKS, console::ATTACKS]
        .into_iter()
        .flatten()
        .zip(10..)
}

#[tokio::test]
async fn a_healthy_tenant_loses_nothing_during_any_attack() {
    let (stack, healthy, _names) = start().await;
    let attacks: Vec<_> = attacks().collect();
    for attacks in attacks.chunks(AT_ONCE) {
        let mut attackers = Vec::new();
        for (attack, host) in attacks {
            attackers.push((*attack, Attacker::new(&stack, &healthy.tenant, attack, *host).await));
        }

        let attacking = join_all(attackers.iter().map(|(attack, attacker)| (attack.run)(attacker)));
        let refused = join_all(attackers.iter().map(|(attack, attacker)| attacker.wait_for_refusals(attack)));
        tokio::select! {
            _ = attacking => panic!("an attack ended by itself"),
            // The attacks continue until the healthy tenant is served. Without isolation, hanging endpoints would delay
            // each of its updates by 30 s.
            _ = async { tokio::join!(refused, timeout(TEST_TIMEOUT, healthy.update(&stack.receiver, 5))).1.expect("served") } => {}
        }

        for (attack, attacker) in &attackers {
            attacker.assert_no_server_error(attack);
            attacker.callbacks(json!([])).await;
        }
    }
    healthy.assert_nothing_lost(&stack).await;
}

/// A percentile of sorted times, in milliseconds.
fn percentile(times: &[Duration], percent: usize) -> f64 {
    times[(times.len() - 1) * percent / 100].as_secs_f64() * 1000.0
}

/// Run by `just hostile NAME`, for all attacks or those whose names contain NAME.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "judges latencies for some minutes: just hostile"]
async fn a_healthy_tenant_is_not_delayed_during_any_attack() {
    let (stack, healthy, _names) = start().await;
    let (mut quiet, mut rows) = (Vec::new(), Vec::new());
    let name = std::env::var("HOSTILE_ATTACK").unwrap_or_default();
    for (attack, host) in attacks().filter(|(attack, _)| attack.name.contains(&name)) {
        let attacker = Attacker::new(&stack, &healthy.tenant, attack, host).await;
        quiet.extend(healthy.update(&stack.receiver, 30).await);
        quiet.sort_unstable();
        let bound = percentile(&quiet, 99) * FACTOR;
        let during = tokio::select! {
            () = (attack.run)(&attacker) => panic!("{} ended by itself", attack.name),
            (during, ()) = async { tokio::join!(
                healthy.update_during_an_attack(&stack.receiver, bound),
                attacker.wait_for_refusals(attack)
            ) } => during,
        };
        attacker.assert_no_server_error(attack);
        attacker.callbacks(json!([])).await;
        rows.push((attack.name, during, attacker.answers.all()));
    }
    healthy.assert_nothing_lost(&stack).await;

    let before = percentile(&quiet, 99);
    println!("without an attack: p50 {:.1} ms, p99 {before:.1} ms\n", percentile(&quiet, 50));
    println!("| attack | updates | p50 | p99 | times | the attacker's answers |\n|---|---|---|---|---|---|");
    let mut slow = Vec::new();
    for (name, during, answers) in rows {
        let (p50, p99) = (percentile(&during, 50), percentile(&during, 99));
        let answers: Vec<_> = answers.iter().map(|(answer, count)| format!("{count} × {answer}")).collect();
        let (updates, answers) = (during.len(), answers.join(", "));
        println!("| {name} | {updates} | {p50:.1} ms | {p99:.1} ms | {:.1} | {answers} |", p99 / before);
        if p99 > before * FACTOR {
            slow.push(name);
        }
    }
    assert!(slow.is_empty(), "the p99 is more than {FACTOR} times as long beside: {slow:?}");
}
