//! The connections of a pool that are not in use, and the server that all of them lead to.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::server::{Connection, Primary};

/// How long an observation of supervision is valid.
const FRESH: Duration = Duration::from_secs(10);

/// Shared by a pool and its sessions.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last one returned is used first: its caches are the warmest.
    idle: Vec<Connection>,
    /// The server that the last connection found.
    primary: Option<Primary>,
    waiting: Option<ReplicationWaits>,
}

/// The connections whose commits wait for a synchronous standby.
#[derive(Debug)]
pub(super) struct ReplicationWaits {
    pub(super) pids: HashSet<i32>,
    pub(super) seen: Instant,
}

impl Connections {
    /// Records the server that a new connection found. If it is another one than before, the connections to the former
    /// are given up.
    pub(super) fn adopt(&self, mut connection: Connection) -> Connection {
        let mut state = self.state();
        match state.primary.take() {
            Some(known) if known.is_same_as(&connection.primary) && !known.is_lost() => connection.primary = known,
            Some(former) => former.lose("DATABASE_URL leads to another server"),
            None => {}
        }
        state.primary = Some(connection.primary.clone());
        state.idle.retain(|idle| !idle.primary.is_lost());
        connection
    }

    pub(super) fn pop_idle(&self) -> Option<Connection> {
        let mut state = self.state();
        state.idle.retain(|idle| !idle.primary.is_lost());
        state.idle.pop()
    }

    pub(super) fn put_back(&self, connection: Connection) {
        if !connection.primary.is_lost() {
            self.state().idle.push(connection);
        }
    }

    /// Whether the commit of this connection was waiting for a standby at the last observation.
    pub(super) fn waits_for_replication(&self, pid: i32) -> bool {
        let state = self.state();
        state.waiting.as_ref().is_some_and(|waits| waits.seen.elapsed() < FRESH && waits.pids.contains(&pid))
    }

    pub(super) fn set_waiting(&self, waiting: Option<ReplicationWaits>) {
        self.state().waiting = waiting;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
