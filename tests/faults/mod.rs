//! The fault suite: a load of updates, a seeded random schedule of faults, and checks at the end.
//!
//! Two of each service run as processes, each behind its own proxies to real NATS and Postgres. Clients and internal
//! producers send all the time, and the log is fed to the reference model. At the end every accepted update is in the
//! ledger exactly once, every lead and outcome equals the model, every callback received everything that it subscribed
//! to, and the audit is clean.
//!
//! `just faults MINUTES SEED` runs the suite for some minutes and prints a table.

/// Declares an enumeration of faults, each with the text for the table.
macro_rules! faults {
    ($($Fault:ident = $text:literal,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Fault {
            $($Fault,)*
        }

        impl Fault {
            pub(crate) const ALL: [Self; [$($text),*].len()] = [$(Self::$Fault),*];
        }

        impl std::fmt::Display for Fault {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self {
                    $(Self::$Fault => $text,)*
                })
            }
        }
    };
}
pub(crate) use faults;

mod endpoints;
pub(crate) mod gaps;
mod load;
pub(crate) mod scene;
mod schedule;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rand::{SeedableRng, rngs::StdRng};
use sqlx::PgPool;
use test_support::{Proxy, Service, free_port, nats, postgres};

use crate::support::{TEST_TIMEOUT, service};
use scene::{Scene, Servers, Totals};
use schedule::{Fault, Member, Victims};

/// The delays before the first attempts. Together with the retries below they last long enough that no delivery is
/// exhausted during a run. Each is short enough that deliveries are sent soon after an endpoint recovers.
const FIRST_RETRIES: &str = "0s,200ms,500ms,1s,2s,5s";
/// The number of further attempts, each after the longest delay.
const RETRIES: usize = 400;

/// The schedule of retries of a run.
pub(crate) fn retry_schedule() -> String {
    format!("{FIRST_RETRIES}{}", ",5s".repeat(RETRIES))
}
/// How long a client waits for a response before it sends again.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(5);

pub(crate) enum Length {
    /// Every fault once.
    OneRound,
    /// Rounds until the time is over.
    For(Duration),
}

/// The seed and the length of a run, from the environment that `just` sets.
pub(crate) fn run_of_minutes() -> (u64, Length) {
    let number = |name: &str| {
        let value = std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: use `just faults MINUTES SEED`"));
        value.parse::<f64>().unwrap_or_else(|_| panic!("{name} must be a number"))
    };
    (number("FAULTS_SEED") as u64, Length::For(Duration::from_secs_f64(number("FAULTS_MINUTES") * 60.0)))
}

/// Prints the ends of the services' logs if the test fails.
pub(crate) fn print_logs_of_failure<'a>(services: impl Iterator<Item = &'a Service>) {
    for service in services.filter(|_| std::thread::panicking()) {
        let log = service.log();
        let lines: Vec<_> = log.lines().collect();
        eprintln!("\n== {}\n{}", service.name(), lines[lines.len().saturating_sub(25)..].join("\n"));
    }
}

struct Report {
    faults: BTreeMap<Fault, (u32, Duration)>,
    totals: Totals,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_loses_an_update_or_applies_one_twice() {
    let report = run(1, Length::OneRound).await;
    println!("{report}");
}

/// Run by `just faults MINUTES SEED`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes the minutes it is given: just faults MINUTES SEED"]
async fn for_minutes() {
    let (seed, length) = run_of_minutes();
    let report = run(seed, length).await;
    println!("{report}");
}

async fn run(seed: u64, length: Length) -> Report {
    let mut random = StdRng::seed_from_u64(seed);
    let mut victims = Victims::start().await;
    let scene = Scene::start(victims.servers(), seed, ANSWER_WITHIN).await;

    let mut faults = BTreeMap::new();
    'rounds: loop {
        for fault in schedule::shuffled(&mut random) {
            if matches!(length, Length::For(time) if scene.elapsed() >= time) {
                break 'rounds;
            }
            eprintln!("{:7.1} s  {fault}", scene.elapsed().as_secs_f64());
            victims.inject(fault, &mut random).await;
            let healed = Instant::now();
            scene.wait_until_recovered(&mut random).await;
            let (count, longest) = faults.entry(fault).or_insert((0, Duration::ZERO));
            *count += 1;
            *longest = healed.elapsed().max(*longest);
        }
        // On live data: the clients go on sending.
        scene.audit().await;
        if matches!(length, Length::OneRound) {
            break;
        }
    }
    let totals = scene.end().await;
    for member in victims.members_mut() {
        let ready = member.ready.clone();
        member.service.wait_for_http(&ready, TEST_TIMEOUT).await;
    }
    let panics: Vec<_> = victims.members().flat_map(Member::panics).chain(victims.panics.clone()).collect();
    assert!(panics.is_empty(), "{panics:?}");
    Report { faults, totals }
}

impl Victims {
    /// Starts two of each service, behind proxies.
    async fn start() -> Self {
        let (nats, postgres) = tokio::join!(nats(), postgres());
        let schedule = retry_schedule();
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
        Self {
            gateways: gateway_members,
            gateway_urls: gateways,
            lead_states,
            notifiers,
            js: service_kit::nats::jetstream(&nats_client),
            nats,
            postgres,
            pool,
            panics: Vec::new(),
        }
    }

    fn servers(&self) -> Servers {
        let (nats_url, database_url) = (self.nats.url(), self.postgres.url());
        Servers { nats_url, database_url, gateways: self.gateway_urls.clone() }
    }
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
        write!(f, "{}", self.totals)
    }
}
