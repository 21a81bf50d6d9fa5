//! `leadctl update watch`: prints an update's timeline whenever it changes, until it is complete.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use contract::{ObjectId, rpc::UpdateStatus};
use http_api::{TimelineResponse, UpdateTimeline};
use tokio::time::{Instant, sleep_until};

use crate::{
    clients::gateway::GatewayClient,
    exit_status::{ExitStatus, is_unavailable},
    output::{
        self,
        timeline::{self, DeliveryProgress},
    },
};

/// Pause between two requests. While the update is pending, the gateway delays its answer, too.
const INTERVAL: Duration = Duration::from_millis(200);
/// Pause after a request that failed.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Watches an update for at most `timeout`. With `json`, each print is one line.
///
/// # Errors
/// The update does not exist, or the gateway is unavailable at the end of `timeout`.
pub(crate) async fn watch(
    gateway: &GatewayClient,
    update_id: ObjectId,
    timeout: Duration,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let (mut printed, mut reported) = (String::new(), String::new());
    loop {
        let pause = match read(gateway, update_id).await {
            Ok((timeline, body)) => {
                let text = if json { body } else { timeline::render(&timeline, &BTreeMap::new()) };
                if text != printed {
                    if json {
                        output::json_text(&text)
                    } else {
                        output::say(&text)
                    }
                    printed = text;
                }
                if let Some(end) = end(&timeline) {
                    return Ok(end.map_or(ExitCode::SUCCESS, Into::into));
                }
                if Instant::now() >= deadline {
                    output::note(format_args!("not complete after {}", humantime::format_duration(timeout)));
                    return Ok(ExitStatus::TimedOut.into());
                }
                INTERVAL
            }
            Err(error) if is_unavailable(&error) && Instant::now() < deadline => {
                let reason = format!("retrying: {error:#}");
                if reason != reported {
                    output::note(&reason);
                    reported = reason;
                }
                RETRY_DELAY
            }
            Err(error) => return Err(error),
        };
        sleep_until(deadline.min(Instant::now() + pause)).await;
    }
}

/// The timeline, and the response that it is from.
async fn read(gateway: &GatewayClient, update_id: ObjectId) -> anyhow::Result<(UpdateTimeline, String)> {
    let response = gateway.get(&format!("/api/v1/updates/{update_id}")).await?;
    let TimelineResponse { data, .. } = response.json()?;
    Ok((data, response.body))
}

/// How the watch ends, without a status if the update is delivered; none if the timeline is not complete.
fn end(timeline: &UpdateTimeline) -> Option<Option<ExitStatus>> {
    match (timeline.status, DeliveryProgress::of(timeline)) {
        (UpdateStatus::Pending, _) | (_, DeliveryProgress::Pending) => None,
        (UpdateStatus::Failed, _) => Some(Some(ExitStatus::UpdateFailed)),
        (UpdateStatus::Succeeded, DeliveryProgress::Exhausted) => Some(Some(ExitStatus::DeliveryExhausted)),
        (UpdateStatus::Succeeded, DeliveryProgress::Delivered) => Some(None),
    }
}
