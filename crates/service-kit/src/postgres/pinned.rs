//! 5 Apply, 7 Deliver: one connection for a task that runs one statement after the other.
//!
//! A pool tests a connection before each use, which costs a round trip besides the statement's own.

use sqlx::Executor;

use super::{Pool, Session};

/// A connection from a pool, kept from one statement to the next as long as they succeed.
#[derive(Debug)]
pub struct PinnedConnection {
    pool: Pool,
    kept: Option<Session>,
}

impl PinnedConnection {
    /// Acquires its connection when it is first needed. The connection counts towards the pool's limit.
    pub fn new(pool: Pool) -> Self {
        Self { pool, kept: None }
    }

    /// Takes the connection, or acquires one. After a success return it with [`keep`](Self::keep); otherwise it is
    /// closed when it is dropped, and the next call acquires another one.
    ///
    /// # Errors
    /// The pool cannot make a connection.
    pub async fn take(&mut self) -> sqlx::Result<Session> {
        if let Some(session) = self.kept.take() {
            return Ok(session);
        }
        let mut session = self.pool.acquire().await?;
        session.close_on_drop();
        // By default Postgres plans a statement with arrays again on each execution, for the number of elements: that
        // takes as long as a small batch and finds the same plan.
        session.execute("SET plan_cache_mode = force_generic_plan").await?;
        Ok(session)
    }

    /// Keeps the connection for the next statement.
    pub fn keep(&mut self, session: Session) {
        self.kept = Some(session);
    }
}
