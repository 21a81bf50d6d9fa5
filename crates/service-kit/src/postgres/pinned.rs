//! 5 Apply, 7 Deliver: one connection for a task that runs one statement after the other.
//!
//! A pool tests a connection when it gives it out and when it gets it back: two round trips beside the statement's own. It
//! also gives out the connection that was idle the longest, whose caches are the coldest.

use sqlx::{Executor, PgPool, Postgres, pool::PoolConnection};

/// A connection from a pool, kept from one statement to the next as long as they succeed.
#[derive(Debug)]
pub struct PinnedConnection {
    pool: PgPool,
    kept: Option<PoolConnection<Postgres>>,
}

impl PinnedConnection {
    /// Acquires its connection when it is first needed. The connection counts towards the pool's limit.
    pub fn new(pool: PgPool) -> Self {
        Self { pool, kept: None }
    }

    /// Gives the connection out. After a success return it with [`keep`](Self::keep); otherwise it is closed when it is
    /// dropped, and the next call acquires another one.
    ///
    /// # Errors
    /// The pool cannot make a connection.
    pub async fn take(&mut self) -> sqlx::Result<PoolConnection<Postgres>> {
        if let Some(connection) = self.kept.take() {
            return Ok(connection);
        }
        let mut connection = self.pool.acquire().await?;
        connection.close_on_drop();
        // By default Postgres plans a statement with arrays again on each execution, for the number of elements: that takes
        // as long as a small batch and finds the same plan.
        connection.execute("SET plan_cache_mode = force_generic_plan").await?;
        Ok(connection)
    }

    /// Keeps the connection for the next statement.
    pub fn keep(&mut self, connection: PoolConnection<Postgres>) {
        self.kept = Some(connection);
    }
}
