//! A pool of connections in which every wait has a deadline.
//!
//! sqlx's own pool waits without a deadline when a connection returns to it, and only detects one connection after the
//! other that their server is gone. This pool knows the server that its connections lead to: when that server is lost,
//! all connections are given up together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{
    TryStreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use sqlx::{
    Describe, Execute, Executor, Postgres, SqlStr,
    postgres::{PgConnectOptions, PgRow, PgStatement, PgTypeInfo},
};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    connections::{Connections, ReplicationWaits},
    error::{gave_up, is_unavailable},
    server::{Connection, DatabaseUrlError, servers},
    session::{Session, Step, Transaction},
};
use crate::config::DatabaseConfig;

/// How long to wait for a connection of the pool. A longer deadline hides that Postgres is gone; a shorter one fails
/// while the pool is busy.
const ACQUIRE_DEADLINE: Duration = Duration::from_secs(5);
/// The pause between two attempts to connect while a server restarts.
const CONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How long a server may take to answer a trivial query. A longer deadline delays a failover; a shorter one mistakes a
/// busy machine for a dead one.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(3);
/// Settings of every connection. The server closes connections that a stopped process left open, so that others do not
/// wait for their locks.
const SETTINGS: [(&str, &str); 5] = [
    // Bounds how long a process that stopped during a transaction holds its locks.
    ("idle_in_transaction_session_timeout", "3s"),
    // Does not apply while a commit waits for replication: it counts until the commit begins.
    ("statement_timeout", "30s"),
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "2"),
    ("tcp_keepalives_count", "3"),
];

/// A pool of connections to the server of a `DATABASE_URL` that accepts writes. Clones share it.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    servers: Vec<PgConnectOptions>,
    /// The index of the server to try first: the one that accepted last, or the next after a failure.
    preferred: AtomicUsize,
    size: u32,
    permits: Arc<Semaphore>,
    connections: Arc<Connections>,
}

impl Pool {
    /// A pool that connects on first use, so that a service can start before its database. `settings` are added to
    /// those of every pool.
    ///
    /// # Errors
    /// `DATABASE_URL` cannot be used.
    pub fn new(config: &DatabaseConfig, name: &str, settings: &[(&str, &str)]) -> Result<Self, DatabaseUrlError> {
        let servers = servers(&config.database_url)?;
        let configure = |server: PgConnectOptions| {
            server.application_name(name).options(SETTINGS.into_iter().chain(settings.iter().copied()))
        };
        let size = config.database_connections;
        Ok(Self(Arc::new(Inner {
            servers: servers.into_iter().map(configure).collect(),
            preferred: AtomicUsize::new(0),
            size,
            permits: Arc::new(Semaphore::new(size as usize)),
            connections: Arc::default(),
        })))
    }

    /// A connection of the pool.
    ///
    /// # Errors
    /// There is none within 5 s: Postgres is unavailable, or all are in use.
    pub async fn acquire(&self) -> sqlx::Result<Session> {
        let deadline = Instant::now() + ACQUIRE_DEADLINE;
        let Ok(permit) = timeout_at(deadline, self.0.permits.clone().acquire_owned()).await else {
            let size = self.0.size;
            return Err(gave_up(format!("all {size} connections to Postgres were in use for {ACQUIRE_DEADLINE:?}")));
        };
        let permit = permit.map_err(|_| sqlx::Error::PoolClosed)?;
        while let Some(connection) = self.0.connections.pop_idle() {
            let primary = connection.primary.clone();
            let mut session = Session::new(self.0.connections.clone(), connection, None);
            match timeout(ANSWER_DEADLINE, session.ping()).await {
                Ok(Ok(())) => return Ok(session.with_permit(permit)),
                // The server has closed it.
                Ok(Err(_)) => {}
                Err(_) => primary.lose(format!("Postgres did not answer within {ANSWER_DEADLINE:?}")),
            }
        }
        let mut failure = None;
        let connect = async {
            loop {
                match self.connect().await {
                    Ok(connection) => return Ok(connection),
                    Err(e) if is_unavailable(&e) => failure = Some(e),
                    Err(e) => return Err(e),
                }
                sleep(CONNECT_PAUSE).await;
            }
        };
        match timeout_at(deadline, connect).await {
            Ok(connected) => Ok(Session::new(self.0.connections.clone(), connected?, Some(permit))),
            Err(_) => Err(failure.unwrap_or_else(|| gave_up("Postgres does not answer"))),
        }
    }

    /// Begins a transaction on a connection of the pool.
    ///
    /// # Errors
    /// Postgres is unavailable.
    pub async fn begin(&self) -> sqlx::Result<Transaction> {
        self.acquire().await?.begin().await
    }

    /// A connection outside of the pool, with settings of its own; tried once.
    ///
    /// # Errors
    /// Postgres is unavailable.
    pub async fn connect_apart(&self, name: &str, settings: &[(&str, &str)]) -> sqlx::Result<Session> {
        let configure =
            |server: &PgConnectOptions| server.clone().application_name(name).options(settings.iter().copied());
        let connection = self.connect_to(&self.0.servers.iter().map(configure).collect::<Vec<_>>()).await?;
        Ok(Session::new(self.0.connections.clone(), connection, None))
    }

    async fn connect(&self) -> sqlx::Result<Connection> {
        self.connect_to(&self.0.servers).await
    }

    /// Connects to the first server that accepts writes.
    async fn connect_to(&self, servers: &[PgConnectOptions]) -> sqlx::Result<Connection> {
        let first = self.0.preferred.load(Ordering::Relaxed);
        let mut failure: Option<sqlx::Error> = None;
        for index in (0..servers.len()).map(|n| (first + n) % servers.len()) {
            match Connection::open(&servers[index]).await {
                Ok(connection) => {
                    self.0.preferred.store(index, Ordering::Relaxed);
                    return Ok(self.0.connections.adopt(connection));
                }
                Err(e) => {
                    // The error of an unavailable server takes precedence: that server may be the one to use.
                    if failure.as_ref().is_none_or(|failure| !is_unavailable(failure)) {
                        failure = Some(e);
                    }
                    // The deadline may cut an attempt off before it comes to the other servers, so the next attempt
                    // begins with them.
                    self.0.preferred.store((index + 1) % servers.len(), Ordering::Relaxed);
                }
            }
        }
        Err(failure.unwrap_or(sqlx::Error::PoolClosed))
    }

    pub(super) fn set_waiting(&self, waiting: Option<ReplicationWaits>) {
        self.0.connections.set_waiting(waiting);
    }
}

impl<'c> Executor<'c> for &'c Pool {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Step>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        // All rows at once: a stream that borrows from the session beside it is not possible in safe code.
        let steps = async move {
            let mut session = self.acquire().await?;
            let steps: Vec<_> = session.fetch_many(query).try_collect().await?;
            Ok::<_, sqlx::Error>(stream::iter(steps.into_iter().map(Ok::<_, sqlx::Error>)))
        };
        Box::pin(stream::once(steps).try_flatten())
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(async move { self.acquire().await?.fetch_optional(query).await })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        Box::pin(async move { self.acquire().await?.prepare_with(sql, parameters).await })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        Box::pin(async move { self.acquire().await?.describe(sql).await })
    }
}
