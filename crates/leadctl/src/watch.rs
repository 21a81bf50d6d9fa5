//! `leadctl update watch`: an update's story as it unfolds, until its end.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use contract::{ObjectId, rpc::UpdateStatus};
use tokio::time::{Instant, sleep};

use crate::{
    exit::Came,
    gateway_client::Gateway,
    output,
    story::{Found, Told},
};

/// How often it is asked. The gateway waits a while itself for what is not decided yet.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long after the outcome it is waited for deliveries, where there are none yet: a process may have no callbacks.
const DELIVERIES: Duration = Duration::from_secs(3);

/// Watches an update for at most this long; prints its story whenever it has changed, as JSON a line each.
pub(crate) async fn watch(
    gateway: &Gateway,
    update_id: ObjectId,
    patience: Duration,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + patience;
    let (mut shown, mut decided) = (String::new(), None);
    loop {
        let answer = gateway.get(&format!("/api/v1/updates/{update_id}")).await?;
        let story = answer.read::<Found>()?.data;
        let text = if json { answer.body } else { story.tell(&BTreeMap::new()) };
        if text != shown {
            output::say(&text);
            shown = text;
        }
        if story.status != UpdateStatus::Pending {
            let decided = *decided.get_or_insert_with(Instant::now);
            let told = match story.told() {
                Told::None if decided.elapsed() < DELIVERIES => Told::Waiting,
                told => told,
            };
            match (told, story.status) {
                (Told::Waiting, _) => {}
                (Told::GivenUp, UpdateStatus::Succeeded) => return Ok(Came::NotTold.into()),
                (_, UpdateStatus::Succeeded) => return Ok(ExitCode::SUCCESS),
                _ => return Ok(Came::Failed.into()),
            }
        }
        if Instant::now() >= deadline {
            eprintln!("leadctl: not at its end after {}", humantime::format_duration(patience));
            return Ok(Came::TimedOut.into());
        }
        sleep(INTERVAL).await;
    }
}
