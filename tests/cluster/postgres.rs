//! A Postgres primary with a synchronous standby behind one address: what the services do when it fails over.
//!
//! In each test the services keep running: none is restarted, and what was accepted before, during and after the fault
//! is applied exactly once and delivered.

use std::time::{Duration, Instant};

use contract::ObjectId;
use serde_json::Value;
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use test_support::{LocalPostgres, PostgresOptions, Proxy, eventually, nats, postgres_with};

use crate::support::{
    DELIVERED, LeadctlRun, Load, Stack, TEST_TIMEOUT, assert_exactly_once, health_page, longest_gap, wait_for_unready,
};

/// Several leads, so that a batch has several.
const LEADS: usize = 4;

/// The services on a primary with a synchronous standby.
struct Pair {
    stack: Stack,
    standby: LocalPostgres,
    /// What `DATABASE_URL` leads to, like a Service of Kubernetes.
    address: Proxy,
    url: String,
    /// When the address was switched the last time.
    switched: Instant,
}

impl Pair {
    /// Starts all; `url` makes `DATABASE_URL` of the primary's URL behind the address, and of the standby.
    async fn start_with(url: impl Fn(String, &LocalPostgres) -> String) -> Self {
        let options = PostgresOptions { replication: true, ..PostgresOptions::throwaway() };
        let (nats, primary) = tokio::join!(nats(), postgres_with(options));
        let standby = primary.start_standby(&|line| println!("{line}")).await.expect("a standby");
        primary.set_synchronous(true).await.expect("a setting");
        let address = Proxy::start(primary.port()).await;
        let url = url(address.url(&primary.url()), &standby);
        let operator = NatsConfig::at(nats.url());
        let database = vec![("DATABASE_URL".to_owned(), url.clone())];
        let stack = Stack::start_on(nats, primary, &operator, |_| database.clone()).await;
        Self { stack, standby, address, url, switched: Instant::now() }
    }

    async fn start() -> Self {
        Self::start_with(|url, _| url).await
    }

    /// Updates in the background, which have been applied and delivered before it returns.
    async fn load(&self) -> Load {
        let load = Load::start(&self.stack.api, self.stack.leads(&["crm"], LEADS).await);
        load.wait_for_more_applied(&self.stack.api, 20).await;
        self.stack.receiver.wait_for_requests("/crm", 20, TEST_TIMEOUT).await;
        load
    }

    /// Promotes the standby, and makes it the primary of the stack; the former primary.
    async fn promote(&mut self) -> LocalPostgres {
        self.standby.promote().await.expect("a promotion");
        self.address.lead_to(self.standby.port());
        self.switched = Instant::now();
        self.stack.pool = PgPool::connect(&self.standby.url()).await.expect("a Postgres client");
        std::mem::swap(&mut self.stack.postgres, &mut self.standby);
        std::mem::replace(&mut self.standby, self.stack.postgres.start_standby(&|_| {}).await.expect("a standby"))
    }

    /// Waits until the load goes on through all services.
    async fn wait_for_progress(&self, load: &Load) {
        load.wait_for_more_applied(&self.stack.api, 10).await;
        let delivered = self.stack.receiver.requests().len();
        self.stack.receiver.wait_for_requests("/crm", delivered + 10, TEST_TIMEOUT).await;
    }

    /// Ends the load and checks that nothing was lost; prints the gaps.
    async fn check(&mut self, load: Load, fault: &str) {
        let accepting = load.longest_gap();
        let accepted = load.end().await;
        self.stack.wait_until_ready().await;
        self.stack.wait_for_clean_audit().await;
        self.stack.wait_for_count(DELIVERED, accepted.len() as i64).await;
        let requests = self.stack.receiver.requests();
        assert_exactly_once(&self.stack.pool, self.stack.api.project_id, &accepted, &requests).await;
        let applying = longest_application_gap(&self.stack.pool, self.stack.api.project_id).await;
        let delivering = longest_gap(requests.iter().map(|request| request.received_at).collect());
        println!("gaps: {fault}: accepting {accepting:.1?}, applying {applying:.1?}, delivering {delivering:.1?}");
    }

    /// Runs leadctl with the services' `DATABASE_URL`; it must end before the deadline.
    async fn leadctl(&self, args: &[&str]) -> LeadctlRun {
        let mut command = self.stack.leadctl_command(args);
        command.env("DATABASE_URL", &self.url);
        let run = tokio::time::timeout(TEST_TIMEOUT, LeadctlRun::of(command)).await;
        run.unwrap_or_else(|_| panic!("leadctl {args:?} hangs"))
    }

    /// Waits until the doctor reports a check in this state; the check.
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

async fn longest_application_gap(pool: &PgPool, project: ObjectId) -> Duration {
    let sql = "SELECT coalesce(max(extract(epoch FROM gap)), 0)::float8
               FROM (SELECT applied_at - lag(applied_at) OVER (ORDER BY applied_at) AS gap
                     FROM lead_state.lead_updates WHERE project_id = $1) AS g";
    let seconds = sqlx::query_scalar(sql).bind(project.as_bytes()).fetch_one(pool).await.expect(sql);
    Duration::from_secs_f64(seconds)
}

#[tokio::test]
async fn a_frozen_primary_is_given_up_and_the_promoted_standby_is_used_without_a_restart() {
    let mut pair = Pair::start().await;
    let load = pair.load().await;

    pair.stack.postgres.freeze().expect("a freeze");
    wait_for_unready(&pair.stack.lead_state_ready, "postgres: ").await;
    wait_for_unready(&pair.stack.notifier_ready, "postgres: ").await;
    let doctor = pair.doctor("postgres", "failed").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.contains("does not answer")), "{doctor}");
    let former = pair.promote().await;
    pair.wait_for_progress(&load).await;
    println!("applied and delivered again {:.1?} after the switch", pair.switched.elapsed());

    drop(former);
    pair.check(load, "primary frozen").await;
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
    let load = pair.load().await;

    pair.stack.postgres.kill9().await.expect("a kill");
    drop(pair.promote().await);
    pair.wait_for_progress(&load).await;

    pair.stack.postgres.set_synchronous(true).await.expect("a setting");
    pair.wait_for_progress(&load).await;
    let doctor = pair.doctor("replication", "ok").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.starts_with("1 standby ")), "{doctor}");
    pair.check(load, "primary killed").await;
}

#[tokio::test]
async fn commits_that_wait_for_the_standby_are_reported_and_neither_cancelled_nor_repeated() {
    let mut pair = Pair::start().await;
    let load = pair.load().await;

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
    pair.wait_for_progress(&load).await;
    let reported = pair.stack.lead_state.log().matches("commits have waited for a synchronous standby").count();
    assert_eq!(reported, 1, "logged once per change");
    pair.check(load, "standby away").await;
}

#[tokio::test]
async fn a_route_to_a_standby_is_refused_until_it_leads_to_the_primary_again() {
    let mut pair = Pair::start().await;
    let load = pair.load().await;

    pair.address.lead_to(pair.standby.port());
    pair.address.cut_once();
    wait_for_unready(&pair.stack.lead_state_ready, "it is a standby").await;
    wait_for_unready(&pair.stack.notifier_ready, "it is a standby").await;
    let doctor = pair.doctor("postgres", "failed").await;
    assert!(doctor["finding"].as_str().is_some_and(|finding| finding.contains("it is a standby")), "{doctor}");
    pair.address.lead_to(pair.stack.postgres.port());

    pair.wait_for_progress(&load).await;
    pair.check(load, "route to a standby").await;
}

#[tokio::test]
async fn a_former_primary_that_still_answers_is_left_when_its_address_is_switched() {
    let mut pair = Pair::start().await;
    let load = pair.load().await;

    // Its connections stay open. Without its standby it cannot commit anything any more.
    let former = pair.promote().await;

    pair.wait_for_progress(&load).await;
    drop(former);
    pair.check(load, "switched away from a primary that lives").await;
}

#[tokio::test]
async fn services_end_on_sigterm_while_their_database_hangs() {
    let mut pair = Pair::start().await;
    let load = pair.load().await;

    pair.stack.postgres.freeze().expect("a freeze");
    load.wait_for_more(5).await;
    let started = Instant::now();
    let (lead_state, notifier) = tokio::join!(pair.stack.lead_state.terminate(), pair.stack.notifier.terminate());

    println!("ended {:.1?} after SIGTERM", started.elapsed());
    // Not by SIGKILL, which has no code.
    assert!(lead_state.code().is_some() && notifier.code().is_some(), "{lead_state} {notifier}");
    pair.stack.postgres.thaw().expect("a thaw");
    pair.stack.lead_state.restart().await;
    pair.stack.notifier.restart().await;
    pair.check(load, "SIGTERM while the primary is frozen").await;
}
