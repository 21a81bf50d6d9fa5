//! Failover of a Postgres primary with a synchronous standby behind one address.
//!
//! Every update that was accepted before, during and after a fault is applied exactly once and delivered. The services
//! keep running, except in tests that restart them on purpose.

use std::time::{Duration, Instant};

use serde_json::Value;
use service_kit::{
    config::{DatabaseConfig, NatsConfig},
    health::{Liveness, Readiness},
    postgres::{Pool, PostgresMetrics, Supervision},
};
use sqlx::PgPool;
use test_support::{LocalPostgres, PostgresOptions, Proxy, eventually, nats, postgres_with};
use tokio::time::timeout;

use super::{check, load, restart_services, wait_for_progress};
use crate::support::{LeadctlRun, Stack, TEST_TIMEOUT, health_page, wait_for_unready};

/// The services on a primary with a synchronous standby.
struct Pair {
    stack: Stack,
    standby: LocalPostgres,
    /// The address in `DATABASE_URL`, like a Service of Kubernetes.
    address: Proxy,
    /// The time of the last switch of the address.
    switched: Instant,
}

impl Pair {
    /// Starts all servers and services. `url` returns `DATABASE_URL`; its arguments are the URL of the address and the
    /// standby.
    async fn start_with(url: impl Fn(String, &LocalPostgres) -> String) -> Self {
        let options = PostgresOptions { replication: true, ..PostgresOptions::throwaway() };
        let (nats, primary) = tokio::join!(nats(), postgres_with(options));
        let standby = primary.start_standby(&|line| println!("{line}")).await.expect("a standby");
        primary.set_synchronous(true).await.expect("a setting");
        let address = Proxy::start(primary.port()).await;
        let url = url(address.url(&primary.url()), &standby);
        let operator = NatsConfig::at(nats.url());
        let database = vec![("DATABASE_URL".to_owned(), url)];
        let stack = Stack::start_on(nats, primary, &operator, |_| database.clone()).await;
        Self { stack, standby, address, switched: Instant::now() }
    }

    async fn start() -> Self {
        Self::start_with(|url, _| url).await
    }

    /// Promotes the standby, and makes it the primary of the stack. `standby` is then the former primary, which is not
    /// a standby yet.
    async fn switch(&mut self) {
        self.standby.promote().await.expect("a promotion");
        self.address.lead_to(self.standby.port());
        self.switched = Instant::now();
        self.stack.pool = PgPool::connect(&self.standby.url()).await.expect("a Postgres client");
        std::mem::swap(&mut self.stack.postgres, &mut self.standby);
    }

    /// Switches to the standby, starts a new standby, and returns the former primary.
    async fn promote(&mut self) -> LocalPostgres {
        self.switch().await;
        std::mem::replace(&mut self.standby, self.stack.postgres.start_standby(&|_| {}).await.expect("a standby"))
    }

    /// Runs leadctl, which must end before the deadline.
    async fn leadctl(&self, args: &[&str]) -> LeadctlRun {
        let run = tokio::time::timeout(TEST_TIMEOUT, self.stack.leadctl(args)).await;
        run.unwrap_or_else(|_| panic!("leadctl {args:?} hangs"))
    }

    /// Waits until the doctor reports a check in this state, and returns the check.
    async fn doctor(&self, what: &str, state: &str) -> Value {
        eventually(TEST_TIMEOUT, what, async || {
            let report = self.leadctl(&["doctor", "--json"]).await.json();
            let checks = report["checks"].as_array().expect("checks").clone();
            let found = checks.iter().find(|check| check["check"] == what && check["state"] == state);
            found.cloned().ok_or_else(|| format!("{checks:?}"))
        })
        .await
    }
}

/// Shorter than the deadline of a single statement, 35 s.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(25);

#[tokio::test]
async fn a_frozen_primary_is_given_up_and_the_promoted_standby_is_used_without_a_restart() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    pair.stack.postgres.freeze().expect("a freeze");
    wait_for_unready(&pair.stack.lead_state_ready, "postgres: ").await;
    wait_for_unready(&pair.stack.notifier_ready, "postgres: ").await;
    let doctor = pair.doctor("postgres", "failed").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.contains("does not answer")), "{doctor}");
    let former = pair.promote().await;
    wait_for_progress(&pair.stack, &load).await;
    println!("applied and delivered again {:.1?} after the switch", pair.switched.elapsed());

    drop(former);
    // Work that was in flight is recorded, too.
    check(&mut pair.stack, load, "primary frozen").await;
}

#[tokio::test]
async fn a_statement_on_a_frozen_server_is_given_up_before_its_own_deadline() {
    let postgres = test_support::postgres().await;
    let database = DatabaseConfig { database_url: postgres.url(), database_connections: 4 };
    let pool = Pool::new(&database, "test", &[]).expect("a pool");
    let readiness = Readiness::default();
    readiness.not_ready("postgres", "not supervised yet");
    let metrics = PostgresMetrics::new(&mut service_kit::metrics::registry("test"));
    let supervision =
        Supervision { pool: pool.clone(), readiness: readiness.clone(), liveness: Liveness::default(), metrics };
    let supervised = tokio::spawn(supervision.run());
    let mut session = pool.acquire().await.expect("a session");
    eventually(TEST_TIMEOUT, "the server is supervised", async || readiness.waiting_for().is_empty()).await;

    postgres.freeze().expect("a freeze");

    let ended = timeout(GIVEN_UP_WITHIN, sqlx::query("SELECT 1").execute(&mut session)).await;
    ended.expect("the server is given up").expect_err("it does not answer");
    supervised.abort();
}

#[tokio::test]
async fn a_killed_primary_fails_over_with_several_hosts_and_a_new_synchronous_standby() {
    let several = |url: String, standby: &LocalPostgres| {
        let (_, port) = url.rsplit_once(':').expect("a port");
        let (port, _) = port.split_once('/').expect("a path");
        let servers = format!("127.0.0.1:{},127.0.0.1:{port}", standby.port());
        url.replace(&format!("127.0.0.1:{port}"), &servers) + "?target_session_attrs=read-write"
    };
    let mut pair = Pair::start_with(several).await;
    let load = load(&pair.stack).await;

    pair.stack.postgres.kill9().await.expect("a kill");
    drop(pair.promote().await);
    wait_for_progress(&pair.stack, &load).await;

    pair.stack.postgres.set_synchronous(true).await.expect("a setting");
    wait_for_progress(&pair.stack, &load).await;
    let doctor = pair.doctor("replication", "ok").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.starts_with("1 standby ")), "{doctor}");
    check(&mut pair.stack, load, "primary killed").await;
}

#[tokio::test]
async fn a_former_primary_is_rewound_and_becomes_the_synchronous_standby() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    pair.stack.postgres.kill9().await.expect("a kill");
    pair.switch().await;
    wait_for_progress(&pair.stack, &load).await;
    pair.standby.rewind(&pair.stack.postgres).await.expect("a standby");
    pair.stack.postgres.set_synchronous(true).await.expect("a setting");
    wait_for_progress(&pair.stack, &load).await;

    let doctor = pair.doctor("replication", "ok").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.starts_with("1 standby ")), "{doctor}");
    check(&mut pair.stack, load, "primary killed, rewound as a standby").await;
}

#[tokio::test]
async fn services_that_are_restarted_one_after_the_other_during_a_fault_lose_nothing() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    pair.standby.stop().await.expect("a stop");
    restart_services(&mut pair.stack, &load).await;
    pair.standby.restart().await.expect("a restart");
    wait_for_progress(&pair.stack, &load).await;

    pair.address.lead_to(pair.standby.port());
    pair.address.cut_once();
    restart_services(&mut pair.stack, &load).await;
    pair.address.lead_to(pair.stack.postgres.port());
    wait_for_progress(&pair.stack, &load).await;

    pair.stack.postgres.freeze().expect("a freeze");
    restart_services(&mut pair.stack, &load).await;
    drop(pair.promote().await);
    // The standby was created before its primary was synchronous, so without this the next failover could lose the last
    // commits.
    pair.stack.postgres.set_synchronous(true).await.expect("a setting");
    wait_for_progress(&pair.stack, &load).await;

    pair.stack.postgres.kill9().await.expect("a kill");
    restart_services(&mut pair.stack, &load).await;
    pair.switch().await;
    wait_for_progress(&pair.stack, &load).await;
    check(&mut pair.stack, load, "all services restarted during each fault").await;
}

#[tokio::test]
async fn commits_that_wait_for_the_standby_are_reported_and_neither_cancelled_nor_repeated() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    pair.standby.stop().await.expect("a stop");
    wait_for_unready(&pair.stack.lead_state_ready, "replication: commits have waited").await;
    wait_for_unready(&pair.stack.notifier_ready, "replication: commits have waited").await;

    let doctor = pair.doctor("replication", "failed").await;
    let (finding, advice) = (doctor["finding"].as_str().expect("a finding"), doctor["advice"].as_str().expect("one"));
    assert!(finding.contains("wait for a synchronous standby") && finding.contains("no standby"), "{finding}");
    assert!(advice.contains("start the standby") && advice.contains("synchronous_standby_names"), "{advice}");
    let audit = pair.leadctl(&["audit"]).await;
    assert!(audit.code == 0 || audit.code == 1, "the audit can look: {audit:?}");
    pair.leadctl(&["recover"]).await.assert_ok();
    for ready in [&pair.stack.lead_state_ready, &pair.stack.notifier_ready] {
        let (status, text) = health_page(ready, "/healthz").await.expect("a health page");
        assert_eq!(status, 200, "a restart would not help: {text}");
        let (_, metrics) = health_page(ready, "/metrics").await.expect("metrics");
        let waits = |line: &str| line.contains("postgres_replication_wait_seconds ") && !line.ends_with(" 0.0");
        assert!(metrics.lines().any(waits), "{metrics}");
    }

    pair.standby.restart().await.expect("a restart");
    wait_for_progress(&pair.stack, &load).await;
    let reported = pair.stack.lead_state.log().matches("commits have waited for a synchronous standby").count();
    assert_eq!(reported, 1, "logged once per change");
    check(&mut pair.stack, load, "standby away").await;
}

#[tokio::test]
async fn a_route_to_a_standby_is_refused_until_it_leads_to_the_primary_again() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    pair.address.lead_to(pair.standby.port());
    pair.address.cut_once();
    wait_for_unready(&pair.stack.lead_state_ready, "it is a standby").await;
    wait_for_unready(&pair.stack.notifier_ready, "it is a standby").await;
    let doctor = pair.doctor("postgres", "failed").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.contains("it is a standby")), "{doctor}");
    pair.address.lead_to(pair.stack.postgres.port());

    wait_for_progress(&pair.stack, &load).await;
    check(&mut pair.stack, load, "route to a standby").await;
}

#[tokio::test]
async fn connections_to_a_former_primary_are_closed_when_the_address_is_switched() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    // The connections to the former primary stay open. Without its standby it can no longer commit.
    let former = pair.promote().await;

    wait_for_progress(&pair.stack, &load).await;
    drop(former);
    check(&mut pair.stack, load, "switched away from a primary that lives").await;
}

#[tokio::test]
async fn services_end_on_sigterm_while_their_database_hangs() {
    let mut pair = Pair::start().await;
    let load = load(&pair.stack).await;

    pair.stack.postgres.freeze().expect("a freeze");
    load.wait_for_more(5).await;
    let started = Instant::now();
    let (lead_state, notifier) = tokio::join!(pair.stack.lead_state.terminate(), pair.stack.notifier.terminate());

    println!("ended {:.1?} after SIGTERM", started.elapsed());
    // The services were not killed by SIGKILL, because then they would have no exit code.
    assert!(lead_state.code().is_some() && notifier.code().is_some(), "{lead_state} {notifier}");
    pair.stack.postgres.thaw().expect("a thaw");
    pair.stack.lead_state.restart().await;
    pair.stack.notifier.restart().await;
    check(&mut pair.stack, load, "SIGTERM while the primary is frozen").await;
}
