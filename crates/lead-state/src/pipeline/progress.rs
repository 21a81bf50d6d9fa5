//! The progress of the log. Tasks of the leader wait until the entries that they logged are applied. Gateways receive
//! the position up to which the log is applied and announced, and admit the commands of each project by its unapplied
//! work.

use std::time::Duration;

use async_nats::Client;
use contract::{position::LogPosition, streams::LEAD_COMMANDS, subject::APPLIED};
use service_kit::postgres::Pool;
use tokio::sync::watch;

use crate::store::{StoreError, checkpoint};

/// The shortest time between two reports. With rarer reports, gateways hold back projects that send much.
const INTERVAL: Duration = Duration::from_millis(5);
/// How often a waiting task reads the checkpoint.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Waits until the log is applied up to this sequence.
pub(super) async fn wait_until_applied(pool: &Pool, sequence: u64) -> Result<(), StoreError> {
    while sequence > 0 && checkpoint::get(pool, LEAD_COMMANDS).await?.is_none_or(|at| at.applied.sequence < sequence) {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// Reports every change until the sender is dropped. A lost report is superseded by the next one.
pub(crate) async fn report(client: Client, mut applied: watch::Receiver<LogPosition>) {
    loop {
        let position = *applied.borrow_and_update();
        match serde_json::to_vec(&position) {
            Ok(report) => {
                if let Err(e) = client.publish(APPLIED, report.into()).await {
                    tracing::debug!(%position, "cannot report the progress: {e}");
                }
            }
            Err(e) => tracing::error!("a position does not serialize: {e}"),
        }
        tokio::time::sleep(INTERVAL).await;
        if applied.changed().await.is_err() {
            return;
        }
    }
}
