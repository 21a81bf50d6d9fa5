//! A connection on which every wait has a deadline.

use std::{
    future::Future,
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use futures::{
    TryStreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use sqlx::{
    Connection as _, Describe, Either, Execute, Executor, PgConnection, Postgres, SqlStr,
    migrate::{MigrateError, Migrator},
    postgres::{PgQueryResult, PgRow, PgStatement, PgTypeInfo},
};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    connections::Connections,
    error::{READ_ONLY, gave_up, is_lock_timeout},
    server::{Connection, Primary},
};

/// How long a statement may take. Longer than the server's `statement_timeout`, whose error says more.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(35);
/// How long migrations may take. They may build an index of a large table.
const MIGRATION_DEADLINE: Duration = Duration::from_secs(60 * 60);
/// How long a migration pauses after it could not lock a table.
const LOCK_PAUSE: Duration = Duration::from_millis(500);
/// How often an overdue statement checks whether it still waits for replication.
const OVERDUE_INTERVAL: Duration = Duration::from_secs(1);

/// A connection of a [`Pool`](super::Pool). It returns to the pool when it is dropped, unless a wait was cut off: then
/// it is closed at once, because its state and the outcome of its last statement are unknown.
#[derive(Debug)]
pub struct Session {
    /// None only while it is dropped.
    connection: Option<Connection>,
    connections: Arc<Connections>,
    /// None for a connection apart from the pool's.
    permit: Option<OwnedSemaphorePermit>,
    deadline: Duration,
    /// Whether a wait has begun and not ended.
    interrupted: bool,
    /// Whether its settings are not the pool's, or it is in a transaction.
    private: bool,
}

impl Session {
    pub(super) fn new(
        connections: Arc<Connections>,
        connection: Connection,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let private = permit.is_none();
        Self {
            connection: Some(connection),
            connections,
            permit,
            deadline: STATEMENT_DEADLINE,
            interrupted: false,
            private,
        }
    }

    /// Makes the connection one of the pool's.
    pub(super) fn with_permit(mut self, permit: OwnedSemaphorePermit) -> Self {
        self.permit = Some(permit);
        self.private = false;
        self
    }

    /// Closes the connection when the session is dropped, because its settings were changed.
    pub fn close_on_drop(&mut self) {
        self.private = true;
    }

    /// Sets how long a statement may take. By default that is longer than the server's `statement_timeout`, 30 s.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// Postgres is unavailable.
    pub async fn begin(mut self) -> sqlx::Result<Transaction> {
        self.execute("BEGIN").await?;
        let was_private = std::mem::replace(&mut self.private, true);
        Ok(Transaction { session: self, was_private })
    }

    /// Checks that the server answers.
    ///
    /// # Errors
    /// The server does not answer.
    pub async fn ping(&mut self) -> sqlx::Result<()> {
        let (raw, mut wait) = self.parts();
        wait.bounded(raw.ping()).await
    }

    /// Waits until the server that the connection leads to is not the primary any more. Returns the reason.
    pub async fn lost(&self) -> String {
        match &self.connection {
            Some(connection) => connection.primary.lost().await,
            None => std::future::pending().await,
        }
    }

    /// Gives up the server that the connection leads to, for the whole pool.
    pub(super) fn lose(&self, reason: impl Into<String>) {
        if let Some(connection) = &self.connection {
            connection.primary.lose(reason);
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.connection.as_ref().is_none_or(|connection| connection.primary.is_lost())
    }

    /// Runs migrations.
    ///
    /// # Errors
    /// One of them failed, or the server was lost, or the deadline passed.
    // Boxed: otherwise the compiler cannot prove that the future of a service, which runs this, is Send.
    pub(super) fn migrate<'a>(&'a mut self, migrator: &'a Migrator) -> BoxFuture<'a, Result<(), MigrateError>> {
        Box::pin(async move {
            // Building an index takes longer than any other statement may. A lock is waited for only briefly: if the
            // migration waits for a long read of a table, such as an audit, all writes to the table wait behind it.
            self.execute(
                "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET lock_timeout = '2s'",
            )
            .await?;
            let (raw, Wait { primary, interrupted, .. }) = self.parts();
            *interrupted = true;
            let run = async {
                loop {
                    match migrator.run_direct(None, &mut *raw, false).await {
                        Err(e) if is_lock_timeout(&e) => tokio::time::sleep(LOCK_PAUSE).await,
                        migrated => return migrated,
                    }
                }
            };
            tokio::select! {
                migrated = run => migrated,
                reason = primary.lost() => Err(gave_up(reason).into()),
                () = tokio::time::sleep(MIGRATION_DEADLINE) => {
                    Err(gave_up(format!("the migrations did not end within {MIGRATION_DEADLINE:?}")).into())
                }
            }
        })
    }

    #[allow(clippy::expect_used, reason = "only drop takes the connection")]
    fn parts(&mut self) -> (&mut PgConnection, Wait<'_>) {
        let Connection { raw, primary, pid } = self.connection.as_mut().expect("a connection until it is dropped");
        let deadline = self.deadline;
        (raw, Wait { primary, pid: *pid, connections: &self.connections, deadline, interrupted: &mut self.interrupted })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take()
            && !self.interrupted
            && !self.private
            && self.permit.is_some()
        {
            self.connections.put_back(connection);
        }
    }
}

/// A transaction. Without [`commit`](Self::commit) its connection is closed, and Postgres rolls back.
#[derive(Debug)]
pub struct Transaction {
    session: Session,
    was_private: bool,
}

impl Transaction {
    /// Commits and returns the session.
    ///
    /// # Errors
    /// The transaction has failed; or its outcome is unknown, because Postgres did not answer.
    pub async fn commit(mut self) -> sqlx::Result<Session> {
        self.session.execute("COMMIT").await?;
        self.session.private = self.was_private;
        Ok(self.session)
    }
}

impl Deref for Transaction {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut Session {
        &mut self.session
    }
}

struct Wait<'a> {
    primary: &'a Primary,
    pid: i32,
    connections: &'a Connections,
    deadline: Duration,
    interrupted: &'a mut bool,
}

impl Wait<'_> {
    /// Waits until the server has answered, is not the primary any more, or the deadline has passed. A commit that
    /// waits for a synchronous standby has no deadline: cutting it off would not undo it, and a second attempt would
    /// only wait, too.
    async fn bounded<T>(&mut self, answer: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
        *self.interrupted = true;
        let overdue = async {
            tokio::time::sleep(self.deadline).await;
            while self.connections.waits_for_replication(self.pid) {
                tokio::time::sleep(OVERDUE_INTERVAL).await;
            }
        };
        let result = tokio::select! {
            biased;
            result = answer => result,
            reason = self.primary.lost() => Err(gave_up(reason)),
            () = overdue => Err(gave_up(format!("Postgres did not answer a statement within {:?}", self.deadline))),
        };
        match &result {
            Ok(_) => *self.interrupted = false,
            Err(sqlx::Error::Database(e)) if e.code().as_deref() == Some(READ_ONLY) => {
                self.primary.lose("the server became read-only");
            }
            Err(sqlx::Error::Database(_)) => *self.interrupted = false,
            Err(_) => {}
        }
        result
    }
}

/// One item of a statement's result.
pub(super) type Step = Either<PgQueryResult, PgRow>;

impl<'c> Executor<'c> for &'c mut Session {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Step>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let (raw, wait) = self.parts();
        let steps = raw.fetch_many(query);
        Box::pin(stream::try_unfold((steps, wait), |(mut steps, mut wait)| async move {
            let step = wait.bounded(steps.try_next()).await?;
            Ok(step.map(|step| (step, (steps, wait))))
        }))
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let (raw, mut wait) = self.parts();
        let row = raw.fetch_optional(query);
        Box::pin(async move { wait.bounded(row).await })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        let (raw, mut wait) = self.parts();
        let prepared = raw.prepare_with(sql, parameters);
        Box::pin(async move { wait.bounded(prepared).await })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        let (raw, mut wait) = self.parts();
        let described = raw.describe(sql);
        Box::pin(async move { wait.bounded(described).await })
    }
}
