//! Three nats-servers with three replicas of each stream: the effects on clients and operators when servers are lost.

use std::{
    collections::BTreeMap,
    fmt,
    process::Command,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use async_nats::jetstream::{self, stream::ClusterInfo};
use contract::streams::{IDEMPOTENCY, LEAD_COMMANDS};
use futures::future::join_all;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Value, json};
use test_support::{
    LocalNats, LocalPostgres, Service, Signal, binary, eventually, free_port, http_client, nats_cluster, postgres,
};

use crate::{
    faults::{
        Length, faults,
        gaps::Gaps,
        print_logs_of_failure, retry_schedule, run_of_minutes,
        scene::{Scene, Servers, Totals},
    },
    support::{Stack, TEST_TIMEOUT, UPDATE, cluster_url, service},
};

/// How long a client waits for an answer: longer than a gateway waits for the leader of a stream.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// The streams and buckets that must have three replicas.
const STREAMS: [&str; 7] = [
    "LEAD_COMMANDS",
    "LEAD_EVENTS",
    "WEBHOOK_EVENTS",
    "LEAD_DEAD_LETTERS",
    "KV_api_keys",
    "KV_processes",
    "KV_idempotency",
];

/// The servers that have replicas of a stream.
async fn placement(js: &jetstream::Context, stream: &str) -> Result<ClusterInfo, String> {
    let stream = js.get_stream(stream).await.map_err(|e| e.to_string())?;
    stream.cached_info().cluster.clone().ok_or_else(|| "not in a cluster".to_owned())
}

/// The server that leads a stream.
async fn leader_of(js: &jetstream::Context, stream: &str) -> String {
    eventually(TEST_TIMEOUT, &format!("{stream} has a leader"), async || {
        placement(js, stream).await?.leader.filter(|leader| !leader.is_empty()).ok_or_else(|| "no leader".to_owned())
    })
    .await
}

/// Waits until every stream has all its replicas, online and up to date.
async fn wait_until_replicated(js: &jetstream::Context) {
    for stream in STREAMS {
        eventually(TEST_TIMEOUT, &format!("all replicas of {stream} are up to date"), async || {
            let placement = placement(js, stream).await?;
            let healthy = placement.replicas.iter().filter(|peer| peer.current && !peer.offline).count();
            let is_complete = healthy == 2 && placement.leader.is_some();
            if is_complete { Ok(()) } else { Err(format!("{placement:?}")) }
        })
        .await;
    }
}

/// Waits until the doctor has this finding, and returns the duration of its last run.
async fn wait_for_finding(command: impl Fn() -> tokio::process::Command, check: &str, advice: &str) -> Duration {
    eventually(TEST_TIMEOUT, &format!("the doctor reports {check}"), async || {
        let began = Instant::now();
        let output = command().args(["doctor", "--json"]).output().await.map_err(|e| e.to_string())?;
        let took = began.elapsed();
        let report: Value = serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())?;
        let failed = |found: &&Value| found["check"] == check && found["state"] == "failed";
        let found = report["checks"].as_array().expect("checks").iter().find(failed);
        let found = found.ok_or_else(|| format!("{took:?}: {report}"))?;
        assert!(found["advice"].as_str().is_some_and(|text| text.contains(advice)), "{found}");
        Ok::<_, String>(took)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_wait_for_the_new_leaders_of_the_log_and_of_the_idempotency_keys() {
    let mut stack = Stack::start_on_cluster(&[]).await;
    let leads = stack.leads(&["crm"], 8).await;
    wait_until_replicated(&stack.js()).await;

    for stream in [LEAD_COMMANDS.to_owned(), format!("KV_{IDEMPOTENCY}")] {
        let leader = leader_of(&stack.js(), &stream).await;
        stack.nats_server(&leader).kill9().await.expect("the leader ends");
        let requests = leads.iter().enumerate().map(|(number, lead)| {
            let request = stack.api.http.post(format!("{}{UPDATE}", stack.api.url)).bearer_auth(&stack.api.key);
            let request = request.timeout(TEST_TIMEOUT).body(json!({"leadId": lead, "name": stream}).to_string());
            // Half of the requests have an idempotency key.
            let keyed = number % 2 == 0;
            if keyed { request.header("idempotency-key", format!("{stream}-{number}")) } else { request }.send()
        });
        for answer in join_all(requests).await {
            let answer = answer.expect("an answer");
            let (status, text) = (answer.status(), answer.text().await.expect("a body"));
            assert_eq!(status, 200, "{text}");
        }
        stack.nats_server(&leader).restart().await.expect("the server starts");
        wait_until_replicated(&stack.js()).await;
    }

    let updates = 2 * leads.len() as i64;
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates", updates).await;
    stack.wait_for_clean_audit().await;
    let log = stack.gateway.log();
    let refusals = log.lines().filter(|line| line.contains("WARN") && line.contains("does not accept")).count();
    assert_eq!(refusals, 0, "{log}");
    let waits = log.lines().filter(|line| line.contains("messages wait for the stream's leader")).count();
    assert!((1..=4).contains(&waits), "lines per election, not per request: {log}");
}

#[tokio::test]
async fn up_on_an_existing_cluster_replicates_and_reports_the_streams() {
    let servers = nats_cluster().await;
    let data = tempfile::tempdir().expect("a directory");
    // The user that Postgres runs as must be able to enter it.
    std::fs::set_permissions(data.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
    let mut command = Command::new(binary("leadctl"));
    command.args(["up", "--data-dir"]).arg(data.path()).env("NATS_URL", cluster_url(&servers));
    command.env_remove("DATABASE_URL").env_remove("STREAM_REPLICAS");

    let mut up = Service::spawn("leadctl", command);

    up.wait_for_log("new streams get 3 replicas", TEST_TIMEOUT * 2).await;
    up.wait_for_log("Ctrl-C", TEST_TIMEOUT * 2).await;
    wait_until_replicated(&jetstream::new(servers[0].connect().await.expect("a client"))).await;
    assert!(up.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes some minutes"]
async fn no_lost_server_loses_an_update_or_applies_one_twice() {
    let report = run(1, Length::OneRound).await;
    println!("{report}");
}

/// Run by `just faults-cluster MINUTES SEED`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes the minutes it is given: just faults-cluster MINUTES SEED"]
async fn for_minutes() {
    let (seed, length) = run_of_minutes();
    let report = run(seed, length).await;
    println!("{report}");
}

faults! {
    KillLogLeader = "kill -9 of the log's leader",
    FreezeLogLeader = "SIGSTOP of the log's leader",
    KillFollower = "kill -9 of a follower",
    FreezeFollower = "SIGSTOP of a follower",
    KillMetaLeader = "kill -9 of the meta leader",
    FreezeMetaLeader = "SIGSTOP of the meta leader",
    TwoAway = "two of three away",
    AllAway = "all three away",
    RollingRestart = "rolling restart",
    EmptiedVolume = "a server back with an empty volume",
}

/// The effects of the faults in a run.
struct Report {
    /// For each fault: how often it occurred, the longest gaps, and the number of requests that were answered with 503.
    faults: BTreeMap<Fault, (u32, Gaps, u64)>,
    totals: Totals,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| fault | times | longest gap in acceptance | in application | in delivery | answered 503 |")?;
        writeln!(f, "|---|---|---|---|---|---|")?;
        for (fault, (times, gaps, unavailable)) in &self.faults {
            writeln!(f, "| {fault} | {times} | {gaps} | {unavailable} |")?;
        }
        write!(f, "\n{}", self.totals)
    }
}

async fn run(seed: u64, length: Length) -> Report {
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start().await;
    let scene = Scene::start(cluster.servers(), seed, ANSWER_WITHIN).await;
    wait_until_replicated(&scene.js).await;

    let mut faults = BTreeMap::new();
    'rounds: loop {
        let mut round = Fault::ALL.to_vec();
        round.shuffle(&mut random);
        for fault in round {
            if matches!(length, Length::For(time) if scene.elapsed() >= time) {
                break 'rounds;
            }
            let began = scene.elapsed().as_secs_f64();
            let refused = scene.ledger.unavailable.load(Ordering::Relaxed);
            scene.take_gaps();
            cluster.inject(fault, &scene).await;
            scene.wait_until_recovered(&mut random).await;
            let gaps = scene.take_gaps();
            let refused = scene.ledger.unavailable.load(Ordering::Relaxed) - refused;
            eprintln!("{began:7.1} s  {fault}: {gaps} | {refused}");
            let (times, longest, unavailable) = faults.entry(fault).or_insert((0, Gaps::default(), 0));
            *times += 1;
            *longest = longest.max(gaps);
            *unavailable += refused;
            wait_until_replicated(&scene.js).await;
        }
        // The audit runs on live data, while the clients continue to send.
        scene.audit().await;
        if matches!(length, Length::OneRound) {
            break;
        }
    }
    let totals = scene.end().await;
    for (service, ready) in &mut cluster.services {
        service.wait_for_http(ready, TEST_TIMEOUT).await;
        let log = service.log();
        assert!(!log.contains("panicked at"), "{log}");
    }
    Report { faults, totals }
}

/// Three nats-servers, a Postgres, and two of each service.
struct Cluster {
    nats: Vec<LocalNats>,
    postgres: LocalPostgres,
    services: Vec<(Service, String)>,
    gateways: Vec<String>,
}

impl Cluster {
    async fn start() -> Self {
        let (nats, postgres) = tokio::join!(nats_cluster(), postgres());
        let (nats_url, schedule) = (cluster_url(&nats), retry_schedule());
        let mut services = Vec::new();
        let mut gateways = Vec::new();
        for name in ["lead-state", "gateway", "webhook-notifier"] {
            for _ in 0..2 {
                let listen = format!("127.0.0.1:{}", free_port());
                let extra = [
                    ("NATS_URL", nats_url.as_str()),
                    ("STREAM_REPLICAS", "3"),
                    ("RETRY_SCHEDULE", schedule.as_str()),
                    ("GATEWAY_LISTEN", listen.as_str()),
                ];
                let (mut service, ready) = service(name, &nats[0], &postgres, &extra);
                service.wait_for_http(&ready, TEST_TIMEOUT).await;
                services.push((service, ready));
                if name == "gateway" {
                    gateways.push(format!("http://{listen}"));
                }
            }
        }
        Self { nats, postgres, services, gateways }
    }

    fn servers(&self) -> Servers {
        let (nats_url, database_url) = (cluster_url(&self.nats), self.postgres.url());
        Servers { nats_url, database_url, gateways: self.gateways.clone() }
    }

    fn leadctl(&self) -> impl Fn() -> tokio::process::Command + use<> {
        let Servers { nats_url, database_url, .. } = self.servers();
        move || {
            let mut command = tokio::process::Command::new(binary("leadctl"));
            command.env("NATS_URL", &nats_url).env("DATABASE_URL", &database_url).kill_on_drop(true);
            command
        }
    }

    /// Breaks the cluster, checks the doctor's finding, and repairs the cluster.
    async fn inject(&mut self, fault: Fault, scene: &Scene) {
        match fault {
            Fault::KillLogLeader | Fault::KillFollower | Fault::KillMetaLeader => {
                let victim = self.victim(fault, scene).await;
                self.nats[victim].kill9().await.expect("nats-server ends");
                self.while_one_is_away(victim, scene).await;
                self.nats[victim].restart().await.expect("nats-server starts");
            }
            Fault::FreezeLogLeader | Fault::FreezeFollower | Fault::FreezeMetaLeader => {
                let victim = self.victim(fault, scene).await;
                self.nats[victim].signal(Signal::Stop).expect("nats-server freezes");
                self.while_one_is_away(victim, scene).await;
                self.nats[victim].signal(Signal::Cont).expect("nats-server resumes");
            }
            Fault::TwoAway => {
                for server in &mut self.nats[..2] {
                    server.kill9().await.expect("nats-server ends");
                }
                wait_for_finding(self.leadctl(), "jetstream", "more than half of them").await;
                for server in &mut self.nats[..2] {
                    server.restart().await.expect("nats-server starts");
                }
            }
            Fault::AllAway => {
                for server in &mut self.nats {
                    server.kill9().await.expect("nats-server ends");
                }
                wait_for_finding(self.leadctl(), "nats", "start NATS").await;
                for server in &mut self.nats {
                    server.restart().await.expect("nats-server starts");
                }
            }
            Fault::RollingRestart => {
                for server in &mut self.nats {
                    server.restart().await.expect("nats-server starts");
                    wait_until_replicated(&scene.js).await;
                }
            }
            Fault::EmptiedVolume => {
                let victim = self.victim(fault, scene).await;
                self.nats[victim].restart_empty().await.expect("nats-server starts");
            }
        }
    }

    /// The index of the server that a fault hits.
    async fn victim(&self, fault: Fault, scene: &Scene) -> usize {
        let leader = match fault {
            Fault::KillMetaLeader | Fault::FreezeMetaLeader => self.meta_leader().await,
            _ => leader_of(&scene.js, LEAD_COMMANDS).await,
        };
        let place = self.nats.iter().position(|server| server.name() == Some(&leader)).expect("a member");
        let is_follower = matches!(fault, Fault::KillFollower | Fault::FreezeFollower | Fault::EmptiedVolume);
        if is_follower { (place + 1) % self.nats.len() } else { place }
    }

    /// The server that leads the cluster, which creates streams and consumers.
    async fn meta_leader(&self) -> String {
        let url = format!("{}/jsz", self.nats[0].monitor_url().expect("a member of a cluster"));
        eventually(TEST_TIMEOUT, "the cluster has a leader", async || {
            let answer = http_client().get(&url).send().await.map_err(|e| e.to_string())?;
            let state: Value =
                serde_json::from_str(&answer.text().await.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
            let leader = state["meta_cluster"]["leader"].as_str().filter(|leader| !leader.is_empty());
            leader.map(str::to_owned).ok_or_else(|| state.to_string())
        })
        .await
    }

    /// Waits until updates are accepted without the server, and the doctor reports it.
    async fn while_one_is_away(&self, victim: usize, scene: &Scene) {
        let accepted = scene.ledger.over_http.load(Ordering::Relaxed);
        eventually(TEST_TIMEOUT, "updates are accepted without the server", async || {
            scene.ledger.over_http.load(Ordering::Relaxed) > accepted + 20
        })
        .await;
        let name = self.nats[victim].name().expect("a member of a cluster");
        wait_for_finding(self.leadctl(), &format!("replicas on {name}"), &format!("start nats-server {name}")).await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        print_logs_of_failure(self.services.iter().map(|(service, _)| service));
    }
}
