//! 2 Log, 4 Decide: logs the expiry of calls behind which updates are queued.
//!
//! Every decision has a position in the log. A timer that released the queue would decide between two entries, and
//! between other ones when the log is applied again to a restored Postgres. An entry that is logged twice or too early
//! does no harm, because only the log's time decides.

use std::{collections::HashSet, time::Duration};

use async_nats::jetstream;
use contract::{
    ObjectId,
    command::CallExpired,
    subject::{CommandKind, CommandSubject},
};
use service_kit::{
    clock,
    postgres::Pool,
    publish::{message, publish},
};

use super::progress::wait_until_applied;
use crate::store::queued_updates;

/// How often the leader looks for queued updates behind expired calls. Longer delays them, shorter costs queries.
const INTERVAL: Duration = Duration::from_secs(1);
/// The longest interval, reached while logged expiries have no effect: the log's clock is behind, or the database
/// refuses the queued updates.
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Logs expired calls until it is dropped.
pub(crate) async fn log_expired_calls(pool: Pool, js: jetstream::Context) {
    let mut logged = HashSet::new();
    let mut pause = INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        match log_due(&pool, &js).await {
            Ok(leads) => {
                let without_effect = !leads.is_empty() && leads.iter().all(|lead| logged.contains(lead));
                pause = if without_effect { MAX_INTERVAL.min(pause * 2) } else { INTERVAL };
                logged = leads;
            }
            Err(e) => tracing::warn!("cannot log expired calls, retrying: {e:#}"),
        }
    }
}

/// Logs the calls that have expired by now, and waits until these entries are applied. Returns the calls' leads.
async fn log_due(pool: &Pool, js: &jetstream::Context) -> anyhow::Result<HashSet<ObjectId>> {
    let now = clock::now();
    let mut last = 0;
    let mut leads = HashSet::new();
    for (project_id, lead_id) in queued_updates::due_leads(pool, now).await? {
        let subject = CommandSubject { project_id, kind: CommandKind::CallExpired }.to_string();
        let payload = serde_json::to_vec(&CallExpired { lead_id })?;
        let id = format!("expired-{lead_id}-{}", now.millis());
        last = publish(js, message(subject, &id, None, payload.into())).await?.sequence;
        leads.insert(lead_id);
    }
    // Until they are applied, the same leads are due.
    wait_until_applied(pool, last).await?;
    Ok(leads)
}
