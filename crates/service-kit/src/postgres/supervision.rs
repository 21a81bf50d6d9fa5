//! Watches the server that the connections of a pool lead to.
//!
//! A server that freezes, or whose host is gone, neither answers nor closes connections, and a switch of its address
//! leaves connections to the former primary open. So one connection is queried every second and replaced every few
//! seconds: if the server does not answer, or the new connection leads to another one, every statement under way is
//! given up at once.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::{
    connections::ReplicationWaits,
    error::{gave_up, reason},
    pool::{ANSWER_DEADLINE, Pool},
    session::Session,
};
use crate::{
    health::{Liveness, Readiness},
    metrics::{Gauge, Register, Registry, Seconds, Unit},
};

/// How often the server is queried. A longer interval delays a failover.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the connection is replaced. A longer interval keeps connections to a former primary for longer.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(5);
/// A commit that waits for a standby for longer than this is reported. A healthy standby confirms within milliseconds.
const NOTICED_WAIT: Duration = Duration::from_secs(3);

/// The commits that wait for a synchronous standby, with their age in seconds. Postgres shows each role its own
/// connections.
const WAITING: &str = "
    SELECT pid, extract(epoch FROM clock_timestamp() - state_change)::float8 FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event = 'SyncRep'";

/// The state of Postgres as metrics.
#[derive(Debug, Clone)]
pub struct PostgresMetrics {
    available: Gauge,
    replication_wait: Seconds,
}

impl PostgresMetrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let available = "1 while Postgres answers and accepts writes, 0 otherwise";
        let wait = "How long the oldest commit of this service has waited for a synchronous standby";
        Self {
            available: registry.add("postgres_available", available, Gauge::default()),
            replication_wait: registry.add_unit("postgres_replication_wait", Unit::Seconds, wait, Seconds::default()),
        }
    }
}

/// Supervises a pool: gives up a server that is lost, and reports commits that wait for replication.
#[derive(Debug)]
pub struct Supervision {
    /// The pool.
    pub pool: Pool,
    /// Shows the conditions `postgres` and `replication`.
    pub readiness: Readiness,
    /// A wait for replication does not make it fail, because a restart would not end the wait.
    pub liveness: Liveness,
    /// Shows the same conditions as metrics.
    pub metrics: PostgresMetrics,
}

/// The last observed state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Available,
    WaitsForReplication,
    Unavailable,
}

struct Probe {
    session: Session,
    since: Instant,
}

/// Waits until the server does not answer any more. Returns the last error. For commands, which have more time than a
/// service.
pub async fn until_lost(pool: &Pool) -> sqlx::Error {
    const ATTEMPTS: usize = 3;
    let (mut probe, mut failures) = (None, 0);
    loop {
        match query(pool, &mut probe).await {
            Ok(_) => failures = 0,
            Err(e) if failures + 1 == ATTEMPTS => return e,
            Err(_) => {
                probe = None;
                failures += 1;
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

impl Supervision {
    /// Runs until shutdown, and while the service drains: a database that hangs must not hold up the drain.
    ///
    /// # Errors
    /// It never fails; the result is that of every task.
    pub async fn run(self) -> anyhow::Result<()> {
        let mut probe = None;
        let mut state = State::Available;
        loop {
            let waiting = query(&self.pool, &mut probe).await;
            if let Err(e) = &waiting
                && let Some(silent) = probe.take()
            {
                silent.session.lose(reason(e));
            }
            state = self.report(state, &waiting);
            let waiting = waiting.unwrap_or_default();
            let pids = waiting.iter().map(|(pid, _)| *pid).collect();
            self.pool.set_waiting((!waiting.is_empty()).then(|| ReplicationWaits { pids, seen: Instant::now() }));
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Updates readiness and metrics; logs only changes.
    fn report(&self, before: State, waiting: &sqlx::Result<Vec<(i32, f64)>>) -> State {
        let longest = waiting.iter().flatten().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
        self.metrics.available.set(waiting.is_ok().into());
        self.metrics.replication_wait.set(longest);
        match waiting {
            Err(e) => {
                let reason = reason(e);
                if before != State::Unavailable {
                    tracing::warn!("Postgres is unavailable: {reason}");
                }
                self.readiness.not_ready("postgres", reason);
                State::Unavailable
            }
            Ok(_) => {
                self.readiness.ready("postgres");
                let state = if longest > NOTICED_WAIT.as_secs_f64() {
                    self.liveness.excuse();
                    let waits = format!("commits have waited for a synchronous standby for {longest:.0} s");
                    if before != State::WaitsForReplication {
                        tracing::error!(
                            "{waits}: start the standby, or change synchronous_standby_names on the primary"
                        );
                    }
                    self.readiness.not_ready("replication", waits);
                    State::WaitsForReplication
                } else {
                    self.readiness.ready("replication");
                    State::Available
                };
                match (before, state) {
                    (State::Unavailable, _) => tracing::info!("Postgres is available again"),
                    (State::WaitsForReplication, State::Available) => {
                        tracing::info!("the standby confirms commits again")
                    }
                    _ => {}
                }
                state
            }
        }
    }
}

/// Reads the commits that wait for a standby. After an error, the probe is there only if the server was silent.
async fn query(pool: &Pool, probe: &mut Option<Probe>) -> sqlx::Result<Vec<(i32, f64)>> {
    let former = probe.take().filter(|former| !former.session.is_lost());
    let mut queried = match former {
        Some(recent) if recent.since.elapsed() <= RECONNECT_INTERVAL => recent,
        former => match pool.connect_apart("leadrelay supervision", &[]).await {
            Ok(session) => Probe { session, since: Instant::now() },
            // While the server answers on the former connection, it is available.
            Err(e) => former.filter(|former| !former.session.is_lost()).ok_or(e)?,
        },
    };
    match timeout(ANSWER_DEADLINE, sqlx::query_as(WAITING).fetch_all(&mut queried.session)).await {
        Ok(Ok(waiting)) => {
            *probe = Some(queried);
            Ok(waiting)
        }
        Ok(Err(e)) => Err(e),
        Err(_) => {
            *probe = Some(queried);
            Err(gave_up(format!("Postgres did not answer within {ANSWER_DEADLINE:?}")))
        }
    }
}
