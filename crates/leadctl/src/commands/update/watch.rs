//! `leadctl update watch`: prints an update's timeline whenever it changes, until it is complete.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use contract::{ObjectId, rpc::UpdateStatus};
use http_api::TimelineResponse;
use tokio::time::{Instant, sleep};

use crate::{
    clients::gateway::GatewayClient,
    exit_status::ExitStatus,
    output::{
        self,
        timeline::{self, DeliveryProgress},
    },
};

/// Pause between two requests. While the update is pending, the gateway delays its answer, too.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long to wait for the first delivery after the outcome: a process may have no callbacks.
const FIRST_DELIVERY_TIMEOUT: Duration = Duration::from_secs(3);

/// Watches an update for at most `timeout`. With `json`, each print is one line.
pub(crate) async fn watch(
    gateway: &GatewayClient,
    update_id: ObjectId,
    timeout: Duration,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let (mut printed, mut decided_at) = (String::new(), None);
    loop {
        let response = gateway.get(&format!("/api/v1/updates/{update_id}")).await?;
        let TimelineResponse { data, .. } = response.json()?;
        let text = if json { response.body } else { timeline::render(&data, &BTreeMap::new()) };
        if text != printed {
            if json {
                output::json_text(&text)
            } else {
                output::say(&text)
            }
            printed = text;
        }
        if data.status != UpdateStatus::Pending {
            let decided_at = *decided_at.get_or_insert_with(Instant::now);
            let progress = match DeliveryProgress::of(&data) {
                DeliveryProgress::None if decided_at.elapsed() < FIRST_DELIVERY_TIMEOUT => DeliveryProgress::Pending,
                progress => progress,
            };
            match (progress, data.status) {
                (DeliveryProgress::Pending, _) => {}
                (DeliveryProgress::Exhausted, UpdateStatus::Succeeded) => {
                    return Ok(ExitStatus::DeliveryExhausted.into());
                }
                (_, UpdateStatus::Succeeded) => return Ok(ExitCode::SUCCESS),
                _ => return Ok(ExitStatus::UpdateFailed.into()),
            }
        }
        if Instant::now() >= deadline {
            output::note(format_args!("not complete after {}", humantime::format_duration(timeout)));
            return Ok(ExitStatus::TimedOut.into());
        }
        sleep(INTERVAL).await;
    }
}
