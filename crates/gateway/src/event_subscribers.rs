//! 1 Accept: the clients that follow events, bounded in total, with a share per project.

use std::sync::Arc;

use contract::ObjectId;
use service_kit::shares::{Permit, Pool};
use tokio_util::sync::CancellationToken;

use crate::error::{ApiError, SharedPool};

#[derive(Debug)]
pub(crate) struct EventSubscribers {
    pool: Arc<Pool<ObjectId>>,
    /// Ends all streams.
    stopping: CancellationToken,
}

impl EventSubscribers {
    pub(crate) fn new(max: usize) -> Self {
        Self { pool: Pool::new(max), stopping: CancellationToken::new() }
    }

    /// Ends all streams and admits no more.
    pub(crate) fn stop(&self) {
        self.stopping.cancel();
    }

    /// Completes when all streams must end.
    pub(crate) async fn stopped(&self) {
        self.stopping.cancelled().await;
    }

    /// Admits one more subscriber of this project, if its share allows it.
    pub(crate) fn acquire(&self, project_id: ObjectId) -> Result<Permit<ObjectId>, ApiError> {
        if self.stopping.is_cancelled() {
            return Err(ApiError::Unavailable);
        }
        self.pool.try_acquire(project_id).map_err(|e| ApiError::ShareUsed(SharedPool::EventStreams, e))
    }
}
