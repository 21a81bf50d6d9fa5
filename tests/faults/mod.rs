//! The fault suite: a load of updates, a seeded random schedule of faults, and what must hold after it.
//!
//! Two of each service run as processes, each behind its own proxies to real NATS and Postgres. Clients and internal
//! producers send all the time, and the log is fed to the reference model. In the end every accepted update is in the
//! ledger exactly once, every lead and outcome equals the model, every callback received everything that it subscribed
//! to, and the audit is clean.
//!
//! `just faults MINUTES SEED` runs it for long and prints a table.

mod endpoints;
mod load;
mod schedule;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;
use sqlx::PgPool;
use test_support::{Proxy, binary, eventually, free_port, nats, postgres};
use tokio_util::sync::CancellationToken;

use crate::support::{
    Api, TEST_TIMEOUT,
    history::{self, differences},
    model::{self, Model},
    service, wait_until_applied,
};
use endpoints::Endpoints;
use load::{Client, Ledger, Tap};
use schedule::{Fault, Member, Victims};

/// Waits before the attempts: with the retries below long enough that no delivery is exhausted during a run, and short
/// enough that deliveries are made soon after an endpoint recovers.
const RETRY_SCHEDULE: &str = "0s,200ms,500ms,1s,2s,5s";
/// Further attempts, each after the longest wait.
const RETRIES: usize = 400;
/// How long everything may take to settle at the end, in addition to the duration of the load.
const SETTLING: Duration = Duration::from_secs(120);

/// The length of a run.
enum Length {
    /// Every fault once.
    OneRound,
    /// Rounds until the time is over.
    For(Duration),
}

/// The results of a run.
struct Report {
    faults: BTreeMap<Fault, (u32, Duration)>,
    load: Duration,
    settling: Duration,
    accepted: u64,
    over_http: u64,
    over_nats: u64,
    repeated: u64,
    outcomes: usize,
    applied: usize,
    failed: usize,
    repeated_commands: u64,
    dead_letters: usize,
    delivered: u64,
    duplicates: u64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_loses_an_update_or_applies_one_twice() {
    let report = run(1, Length::OneRound).await;
    println!("{report}");
}

/// `just faults MINUTES SEED`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes the minutes it is given: just faults MINUTES SEED"]
async fn for_minutes() {
    let number = |name: &str| {
        let value = std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: use `just faults MINUTES SEED`"));
        value.parse::<f64>().unwrap_or_else(|_| panic!("{name} must be a number"))
    };
    let (minutes, seed) = (number("FAULTS_MINUTES"), number("FAULTS_SEED"));
    let report = run(seed as u64, Length::For(Duration::from_secs_f64(minutes * 60.0))).await;
    println!("{report}");
}

async fn run(seed: u64, length: Length) -> Report {
    let mut random = StdRng::seed_from_u64(seed);
    let endpoints = Endpoints::start().await;
    let (mut victims, client, leads, model, callbacks) = prepare(&endpoints).await;
    let probe = leads[0].clone();
    let ledger = Arc::<Ledger>::default();
    let tap = Tap::start(victims.js.clone(), model);
    let stop = CancellationToken::new();
    let mut clients = load::start(&client, &victims.js, &leads, &ledger, seed, &stop);

    let began = Instant::now();
    let mut faults = BTreeMap::new();
    'rounds: loop {
        for fault in schedule::shuffled(&mut random) {
            if matches!(length, Length::For(time) if began.elapsed() >= time) {
                break 'rounds;
            }
            eprintln!("{:7.1} s  {fault}", began.elapsed().as_secs_f64());
            victims.inject(fault, &mut random).await;
            let healed = Instant::now();
            wait_until_recovered(&client, &probe, &ledger, &endpoints, &mut random).await;
            let (count, longest) = faults.entry(fault).or_insert((0, Duration::ZERO));
            *count += 1;
            *longest = healed.elapsed().max(*longest);
        }
        // On live data: the clients go on sending.
        audit(&victims).await;
        if matches!(length, Length::OneRound) {
            break;
        }
    }
    stop.cancel();
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client");
    }
    let load = began.elapsed();
    let ended = Instant::now();

    endpoints.recover();
    let deadline = SETTLING + load;
    wait_until_applied(&victims.js.client(), &victims.pool, deadline).await;
    eventually(deadline, "the last calls expire, and no update is queued", async || {
        let queued = sqlx::query_scalar("SELECT count(*) FROM lead_state.queued_updates");
        match queued.fetch_one(&victims.pool).await {
            Ok(0_i64) => Ok(()),
            queued => Err(format!("{queued:?}")),
        }
    })
    .await;
    let last = wait_until_applied(&victims.js.client(), &victims.pool, deadline).await;
    eventually(deadline, "the log is read", async || {
        if tap.read() == last { Ok(()) } else { Err(format!("{} of {last}", tap.read())) }
    })
    .await;
    let received = wait_for_all_deliveries(&victims.pool, &endpoints, &callbacks, deadline).await;
    let settling = ended.elapsed();

    // Nothing changes any more.
    let model = std::mem::take(&mut *tap.model.lock().unwrap_or_else(PoisonError::into_inner));
    let differences = differences(&victims.pool, &model).await;
    assert!(differences.is_empty(), "{} differences from the model, the first: {}", differences.len(), differences[0]);
    let known: HashSet<&String> = model.outcomes.keys().map(|(_, update_id)| update_id).collect();
    let lost: Vec<_> = ledger.accepted().iter().filter(|id| !known.contains(id)).cloned().collect();
    assert!(lost.is_empty(), "{} accepted and not in the log: {lost:?}", lost.len());
    // Outcomes in answers were the right ones.
    let outcomes = std::mem::take(&mut *ledger.outcomes());
    for (update_id, outcome) in &outcomes {
        let key = (leads[0].project_id.to_string(), update_id.clone());
        let model::Outcome { error, data, .. } = &model.outcomes[&key];
        let expected = (json!(error.is_none()), json!(error), json!(data));
        let answered = (&outcome["success"], &outcome["error"], &outcome["data"]);
        assert_eq!(answered, (&expected.0, &expected.1, &expected.2), "{update_id}");
    }
    assert!(!outcomes.is_empty(), "no answer had an outcome");
    // Repeated requests made no further updates.
    let over_http: i64 =
        sqlx::query_scalar("SELECT count(*) FROM lead_state.lead_updates WHERE api_key_id IS NOT NULL")
            .fetch_one(&victims.pool)
            .await
            .expect("the ledger");
    let intended = ledger.intended.load(Ordering::Relaxed);
    assert_eq!(over_http.cast_unsigned(), intended, "each update of an HTTP client is one update");
    for member in victims.members_mut() {
        let ready = member.ready.clone();
        member.service.wait_for_http(&ready, TEST_TIMEOUT).await;
    }
    let panics: Vec<_> = victims.members().flat_map(Member::panics).chain(victims.panics.clone()).collect();
    assert!(panics.is_empty(), "{panics:?}");
    audit(&victims).await;

    Report {
        faults,
        load,
        settling,
        accepted: ledger.accepted().len() as u64,
        over_http: ledger.over_http.load(Ordering::Relaxed),
        over_nats: ledger.over_nats.load(Ordering::Relaxed),
        repeated: ledger.repeated.load(Ordering::Relaxed),
        outcomes: outcomes.len(),
        applied: model.outcomes.len(),
        failed: model.outcomes.values().filter(|outcome| outcome.error.is_some()).count(),
        repeated_commands: model.repeated,
        dead_letters: model.dead_letters.len(),
        delivered: received.values().map(|received| received.delivered).sum(),
        duplicates: received.values().map(|received| received.duplicates).sum(),
    }
}

/// Starts two of each service, behind proxies, and makes two processes with leads.
async fn prepare(endpoints: &Endpoints) -> (Victims, Client, Vec<history::Leads>, Model, Vec<Subscription>) {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let schedule = format!("{RETRY_SCHEDULE}{}", ",5s".repeat(RETRIES));
    let mut groups = Vec::new();
    let mut gateways = Vec::new();
    for name in ["lead-state", "gateway", "webhook-notifier"] {
        let mut members = Vec::new();
        for _ in 0..2 {
            let (to_nats, to_postgres) = (Proxy::start(nats.port()).await, Proxy::start(postgres.port()).await);
            let (nats_url, database_url) = (to_nats.url(&nats.url()), to_postgres.url(&postgres.url()));
            let listen = format!("127.0.0.1:{}", free_port());
            let mut extra = vec![("NATS_URL", nats_url.as_str()), ("RETRY_SCHEDULE", schedule.as_str())];
            if name == "gateway" {
                extra.push(("GATEWAY_LISTEN", listen.as_str()));
                gateways.push(format!("http://{listen}"));
            } else {
                extra.push(("DATABASE_URL", database_url.as_str()));
            }
            let (service, ready) = service(name, &nats, &postgres, &extra);
            members.push(Member { service, ready, nats: to_nats, postgres: to_postgres });
        }
        for member in &mut members {
            let ready = member.ready.clone();
            member.service.wait_for_http(&ready, TEST_TIMEOUT).await;
        }
        groups.push(members);
    }
    let [lead_states, gateway_members, notifiers] = <[_; 3]>::try_from(groups).unwrap_or_else(|_| unreachable!());
    let nats_client = nats.connect().await.expect("a NATS client");
    let pool = PgPool::connect(&postgres.url()).await.expect("a Postgres client");
    let api = Api::create(gateways[0].clone(), &nats_client, "faults").await;

    let callback = |name: &str, only_failed: bool| {
        let mut callback = json!({"name": name, "url": endpoints.url(name), "timeoutSeconds": 1});
        if only_failed {
            callback["events"] = json!(["update.failed"]);
        }
        callback
    };
    let of_process = [
        vec![callback("sales-fast", false), callback("sales-slow", true), callback("sales-flapping", false)],
        vec![callback("support-fast", false), callback("support-failing", true), callback("support-hanging", true)],
    ];
    let mut model = Model::default();
    let mut leads = Vec::new();
    let mut subscriptions = Vec::new();
    for (spec, callbacks) in history::processes(&json!([])).into_iter().zip(of_process) {
        let mut spec = spec;
        spec["callbacks"] = json!(callbacks);
        let of = history::prepare(&api, &nats_client, spec, 8, &mut model).await;
        subscriptions.extend(callbacks.iter().map(|callback| Subscription {
            name: callback["name"].as_str().expect("a name").into(),
            process_id: of.process_id.to_string(),
            only_failed: callback.get("events").is_some(),
        }));
        leads.push(of);
    }
    let client = Client { gateways, key: api.key.clone(), http: test_support::http_client() };
    let js = service_kit::nats::jetstream(&nats_client);
    let victims =
        Victims { gateways: gateway_members, lead_states, notifiers, nats, postgres, js, pool, panics: Vec::new() };
    (victims, client, leads, model, subscriptions)
}

/// Waits until an update that is sent now is delivered.
async fn wait_until_recovered(
    client: &Client,
    leads: &history::Leads,
    ledger: &Ledger,
    endpoints: &Endpoints,
    random: &mut StdRng,
) {
    let body = json!({"leadId": leads.leads[0].0, "metadata": {"probe": true}});
    let update_id = client.update(&body, ledger, random).await;
    let what = format!("update {update_id}, sent after a fault was over, is delivered");
    eventually(TEST_TIMEOUT * 3, &what, async || endpoints.has_received("sales-fast", &update_id)).await;
}

/// A callback, and the outcomes that it subscribes to.
struct Subscription {
    name: String,
    process_id: String,
    only_failed: bool,
}

/// The deliveries of a callback.
struct DeliveryCounts {
    delivered: u64,
    duplicates: u64,
}

/// Waits until every callback has received every outcome that it subscribes to, and nothing else.
async fn wait_for_all_deliveries(
    pool: &PgPool,
    endpoints: &Endpoints,
    callbacks: &[Subscription],
    deadline: Duration,
) -> HashMap<String, DeliveryCounts> {
    let mut all = HashMap::new();
    for callback in callbacks {
        let expected: HashSet<String> = sqlx::query_scalar(
            "SELECT encode(update_id, 'hex') FROM lead_state.lead_updates
             WHERE encode(process_id, 'hex') = $1 AND NOT (success AND $2)",
        )
        .bind(&callback.process_id)
        .bind(callback.only_failed)
        .fetch_all(pool)
        .await
        .expect("the ledger")
        .into_iter()
        .collect();
        let name = &callback.name;
        let received = eventually(deadline, &format!("{name} has received everything"), async || {
            let received = endpoints.received(name);
            let missing: Vec<_> = expected.iter().filter(|id| !received.contains_key(*id)).take(3).collect();
            if missing.is_empty() {
                Ok(received)
            } else {
                Err(format!("{} of {}: e.g. {missing:?} are missing", received.len(), expected.len()))
            }
        })
        .await;
        let unexpected: Vec<_> = received.keys().filter(|id| !expected.contains(*id)).collect();
        assert!(
            unexpected.is_empty(),
            "{name} received updates that it does not subscribe to, or that were not decided: {unexpected:?}"
        );
        let changed: Vec<_> = received.iter().filter(|(_, received)| received.changed).map(|(id, _)| id).collect();
        assert!(changed.is_empty(), "{name} received one update with two bodies: {changed:?}");
        let times: u64 = received.values().map(|received| u64::from(received.times)).sum();
        let delivered = received.len() as u64;
        all.insert(name.clone(), DeliveryCounts { delivered, duplicates: times - delivered });
    }
    // The endpoint has a delivery a moment before it is recorded.
    eventually(deadline, "no delivery is pending", async || {
        let pending: i64 = sqlx::query_scalar("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'")
            .fetch_one(pool)
            .await
            .map_err(|e| e.to_string())?;
        if pending == 0 { Ok(()) } else { Err(format!("{pending} pending")) }
    })
    .await;
    all
}

/// Runs `leadctl audit`, which must be clean.
async fn audit(victims: &Victims) {
    let output = tokio::process::Command::new(binary("leadctl"))
        .arg("audit")
        .env("NATS_URL", victims.nats.url())
        .env("DATABASE_URL", victims.postgres.url())
        .output()
        .await
        .expect("leadctl");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "| fault | times | longest recovery |\n|---|---|---|")?;
        for (fault, (times, longest)) in &self.faults {
            writeln!(f, "| {fault} | {times} | {:.1} s |", longest.as_secs_f64())?;
        }
        let times: u32 = self.faults.values().map(|(times, _)| times).sum();
        let longest = self.faults.values().map(|(_, longest)| *longest).max().unwrap_or_default();
        writeln!(f, "| **all** | {times} | {:.1} s |\n", longest.as_secs_f64())?;
        writeln!(f, "| | |\n|---|---|")?;
        writeln!(
            f,
            "| load, then settling | {:.0} s, {:.1} s |",
            self.load.as_secs_f64(),
            self.settling.as_secs_f64()
        )?;
        writeln!(f, "| updates accepted over HTTP, messages over NATS | {}, {} |", self.over_http, self.over_nats)?;
        writeln!(f, "| sent again after no answer or a refusal | {} |", self.repeated)?;
        writeln!(f, "| accepted ids known to clients, lost of them | {}, 0 |", self.accepted)?;
        writeln!(f, "| outcomes in answers, wrong ones among them | {}, 0 |", self.outcomes)?;
        writeln!(f, "| applied: succeeded, failed | {}, {} |", self.applied - self.failed, self.failed)?;
        writeln!(f, "| repeated in the log and not applied again | {} |", self.repeated_commands)?;
        writeln!(f, "| dead letters | {} |", self.dead_letters)?;
        writeln!(f, "| delivered to six callbacks | {} |", self.delivered)?;
        write!(f, "| duplicates received | {} |", self.duplicates)
    }
}
