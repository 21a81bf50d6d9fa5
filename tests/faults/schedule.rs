//! The faults: their kinds, their order, and how each is injected and undone.

use std::time::Duration;

use async_nats::jetstream;
use contract::streams::LEAD_COMMANDS;
use rand::{Rng, rngs::StdRng, seq::SliceRandom};
use sqlx::PgPool;
use test_support::{LocalNats, LocalPostgres, Proxy, Service, Wire};

use super::print_logs_of_failure;

/// A service under test, with its own proxies to NATS and Postgres.
pub(crate) struct Member {
    pub(crate) service: Service,
    pub(crate) ready: String,
    pub(crate) nats: Proxy,
    pub(crate) postgres: Proxy,
}

/// The services and servers that faults can hit.
pub(crate) struct Victims {
    pub(crate) gateways: Vec<Member>,
    pub(crate) gateway_urls: Vec<String>,
    pub(crate) lead_states: Vec<Member>,
    pub(crate) notifiers: Vec<Member>,
    pub(crate) nats: LocalNats,
    pub(crate) postgres: LocalPostgres,
    pub(crate) js: jetstream::Context,
    pub(crate) pool: PgPool,
    /// Lines about panics, from the logs of services before they were restarted.
    pub(crate) panics: Vec<String>,
}

faults! {
    KillGateway = "kill -9 of a gateway",
    KillLeadState = "kill -9 of a lead-state",
    KillLeader = "kill -9 of the leader",
    KillNotifier = "kill -9 of a webhook-notifier",
    FreezeGateway = "SIGSTOP of a gateway",
    FreezeLeader = "SIGSTOP of the leader (a zombie later)",
    FreezeNotifier = "SIGSTOP of a webhook-notifier",
    TwoLeaders = "two leaders by force",
    KillNats = "kill -9 of NATS",
    KillPostgres = "Postgres stopped in immediate mode",
    CutNats = "connections to NATS cut",
    DelayNats = "connections to NATS delayed",
    StallNats = "connections to NATS stalled",
    CutPostgres = "connections to Postgres cut",
    DelayPostgres = "connections to Postgres delayed",
    StallPostgres = "connections to Postgres stalled",
    FullLog = "the log is full",
}

/// One round: every fault once, in random order.
pub(crate) fn shuffled(random: &mut StdRng) -> Vec<Fault> {
    let mut round = Fault::ALL.to_vec();
    round.shuffle(random);
    round
}

impl Victims {
    /// Injects a fault, holds it for a while, and undoes it.
    pub(crate) async fn inject(&mut self, fault: Fault, random: &mut StdRng) {
        let mut between = |low: u64, high: u64| Duration::from_millis(random.random_range(low..high));
        match fault {
            Fault::KillGateway | Fault::KillLeadState | Fault::KillLeader | Fault::KillNotifier => {
                let gone = between(100, 2000);
                let pick = between(0, 1000).as_millis() as usize;
                let panics = self.victim(fault, pick).await.kill(gone).await;
                self.panics.extend(panics);
            }
            Fault::FreezeGateway | Fault::FreezeLeader | Fault::FreezeNotifier => {
                // Long enough for a standby to take over, and for a lease to pass to another instance.
                let frozen = between(1000, 7000);
                let pick = between(0, 1000).as_millis() as usize;
                let victim = self.victim(fault, pick).await;
                victim.service.freeze();
                tokio::time::sleep(frozen).await;
                victim.service.thaw();
            }
            Fault::TwoLeaders => {
                // The leader is frozen in the middle of its work and loses its lock without noticing it. It resumes
                // when another instance leads.
                let frozen = between(600, 2000);
                let leader = self.leader().await;
                self.lead_states[leader].service.freeze();
                let _ = sqlx::query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lead-state leader'",
                )
                .execute(&self.pool)
                .await;
                tokio::time::sleep(frozen).await;
                self.lead_states[leader].service.thaw();
            }
            Fault::KillNats => {
                self.nats.kill9().await.expect("nats-server ends");
                tokio::time::sleep(between(50, 3000)).await;
                self.nats.restart().await.expect("nats-server starts");
            }
            Fault::KillPostgres => {
                self.postgres.kill9().await.expect("Postgres ends");
                tokio::time::sleep(between(50, 3000)).await;
                self.postgres.restart().await.expect("Postgres starts");
            }
            Fault::CutNats | Fault::DelayNats | Fault::StallNats => {
                let wire = wire(fault, between(20, 400));
                let held = between(500, 7000);
                // The fault hits one service, or all at once.
                let one = between(0, 4000).as_millis() as usize;
                let members: Vec<_> = self.members().collect();
                let hit = if one < 1000 { &members[..] } else { std::slice::from_ref(&members[one % members.len()]) };
                for member in hit {
                    member.nats.set(wire);
                }
                tokio::time::sleep(held).await;
                for member in hit {
                    member.nats.set(Wire::Open);
                }
            }
            Fault::CutPostgres | Fault::DelayPostgres | Fault::StallPostgres => {
                let wire = wire(fault, between(20, 400));
                let held = between(500, 7000);
                let leader = self.leader().await;
                self.lead_states[leader].postgres.set(wire);
                self.notifiers[0].postgres.set(wire);
                tokio::time::sleep(held).await;
                self.lead_states[leader].postgres.set(Wire::Open);
                self.notifiers[0].postgres.set(Wire::Open);
            }
            Fault::FullLog => {
                let held = between(1000, 4000);
                let stream = self.js.get_stream(LEAD_COMMANDS).await.expect("the log");
                let info = stream.get_info().await.expect("the log's state");
                let limit = i64::try_from(info.state.bytes.max(1)).expect("bytes");
                let full = jetstream::stream::Config { max_bytes: limit, ..info.config.clone() };
                self.js.update_stream(full).await.expect("a smaller log");
                tokio::time::sleep(held).await;
                self.js.update_stream(info.config).await.expect("a larger log");
            }
        }
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &Member> {
        self.gateways.iter().chain(&self.lead_states).chain(&self.notifiers)
    }

    pub(crate) fn members_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.gateways.iter_mut().chain(&mut self.lead_states).chain(&mut self.notifiers)
    }

    async fn victim(&mut self, fault: Fault, pick: usize) -> &mut Member {
        match fault {
            Fault::KillGateway | Fault::FreezeGateway => pick_from(&mut self.gateways, pick),
            Fault::KillNotifier | Fault::FreezeNotifier => pick_from(&mut self.notifiers, pick),
            Fault::KillLeader | Fault::FreezeLeader => {
                let leader = self.leader().await;
                &mut self.lead_states[leader]
            }
            _ => pick_from(&mut self.lead_states, pick),
        }
    }

    /// The index of the leader, whose proxy has the connection that holds the lock; 0 if there is no leader.
    async fn leader(&self) -> usize {
        let port: Option<i32> = sqlx::query_scalar(
            "SELECT client_port FROM pg_stat_activity a JOIN pg_locks l USING (pid)
             WHERE l.locktype = 'advisory' AND l.granted AND a.application_name = 'lead-state leader' LIMIT 1",
        )
        .fetch_optional(&self.pool)
        .await
        .unwrap_or_default();
        let owns = |member: &Member| port.is_some_and(|port| member.postgres.owns(port as u16));
        self.lead_states.iter().position(owns).unwrap_or_default()
    }
}

impl Drop for Victims {
    fn drop(&mut self) {
        print_logs_of_failure(self.members().map(|member| &member.service));
    }
}

fn pick_from(members: &mut [Member], pick: usize) -> &mut Member {
    let count = members.len();
    &mut members[pick % count]
}

fn wire(fault: Fault, delay: Duration) -> Wire {
    match fault {
        Fault::CutNats | Fault::CutPostgres => Wire::Cut,
        Fault::DelayNats | Fault::DelayPostgres => Wire::Delayed(delay),
        _ => Wire::Stalled,
    }
}

impl Member {
    /// Kills the service, and starts it again after this time. Returns the log lines about panics before the kill.
    async fn kill(&mut self, gone: Duration) -> Vec<String> {
        let panics = self.panics();
        self.service.kill9().await;
        tokio::time::sleep(gone).await;
        self.service.restart().await;
        panics
    }

    /// The lines about panics in the service's log.
    pub(crate) fn panics(&self) -> Vec<String> {
        self.service.log().lines().filter(|line| line.contains("panicked at")).map(str::to_owned).collect()
    }
}
