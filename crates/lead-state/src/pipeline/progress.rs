//! How far the log is applied: waited for by what the leader logs itself, and reported with how far it is announced to the
//! gateways, which admit the commands of each project by how many of them are not applied yet.

use std::time::Duration;

use async_nats::Client;
use contract::{position::LogPosition, streams::LEAD_COMMANDS, subject::APPLIED};
use service_kit::postgres::Pool;
use tokio::sync::watch;

use crate::store::{StoreError, checkpoint};

/// The shortest time between two reports. Longer reports let gateways hold back projects that send much.
const INTERVAL: Duration = Duration::from_millis(5);
/// How often the checkpoint is read by what waits for it.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Waits until the log is applied up to this sequence.
pub(super) async fn wait_until_applied(pool: &Pool, sequence: u64) -> Result<(), StoreError> {
    while sequence > 0 && checkpoint::get(pool, LEAD_COMMANDS).await?.is_none_or(|at| at.applied.sequence < sequence) {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// Reports every change, for as long as there are any. A lost report is made up for by the next one.
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
