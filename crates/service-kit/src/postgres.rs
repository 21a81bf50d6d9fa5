//! 5 Apply, 7 Deliver: a connection of one's own, for a task that has one statement after the other.
//!
//! A pool asks a connection whether it lives before it gives it out and when it gets it back: two round trips beside the one of
//! a statement; and it gives out the one that was idle the longest, whose caches are the coldest.

use sqlx::{Executor, PgPool, Postgres, pool::PoolConnection};

/// A connection out of a pool, kept from one statement to the next as long as they succeed.
#[derive(Debug)]
pub struct PinnedConnection {
    pool: PgPool,
    kept: Option<PoolConnection<Postgres>>,
}

impl PinnedConnection {
    /// Takes its connection when it is first needed. It counts among those that the pool may have.
    pub fn new(pool: PgPool) -> Self {
        Self { pool, kept: None }
    }

    /// Gives the connection out. Whoever succeeded with it gives it back to [`keep`](Self::keep); else it is closed, and the
    /// next one is another.
    ///
    /// # Errors
    /// When there is none and the pool cannot make one.
    pub async fn take(&mut self) -> sqlx::Result<PoolConnection<Postgres>> {
        if let Some(connection) = self.kept.take() {
            return Ok(connection);
        }
        let mut connection = self.pool.acquire().await?;
        connection.close_on_drop();
        // By itself Postgres plans a statement with arrays anew each time, for as many elements as there are: that takes
        // as long as a small batch, and finds the same plan.
        connection.execute("SET plan_cache_mode = force_generic_plan").await?;
        Ok(connection)
    }

    /// Keeps the connection for the next statement.
    pub fn keep(&mut self, connection: PoolConnection<Postgres>) {
        self.kept = Some(connection);
    }
}
