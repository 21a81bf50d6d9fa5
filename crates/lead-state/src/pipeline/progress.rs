//! Reports to the gateways how far the log is applied and announced. They admit the commands of each project by how many
//! of them are not applied yet.

use std::time::Duration;

use async_nats::Client;
use contract::{position::LogPosition, subject::APPLIED};
use tokio::sync::watch;

/// The shortest time between two reports. Longer reports let gateways hold back projects that send much.
const INTERVAL: Duration = Duration::from_millis(5);

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
