//! 2 Log: logs the creations of leads that callbacks receive (docs/adr/0056-log-created-leads-from-an-outbox.md).
//!
//! The statement that creates a lead writes the creation into an outbox. The query that created the lead logs the
//! creation before it answers, so that the creation precedes the client's next command. The leader logs creations that
//! a crash or an outage of the log left in the outbox. A creation that is logged twice is applied once, by its id.

use std::time::Duration;

use async_nats::jetstream;
use contract::{
    command::message_id,
    subject::{CommandKind, CommandSubject},
};
use service_kit::{
    clock,
    postgres::Pool,
    publish::{PublishError, message, publish},
};

use super::progress::wait_until_applied;
use crate::store::created_leads::{self, CreatedLead};

/// How often the leader looks for creations in the outbox. Longer keeps rows longer, shorter costs queries.
const INTERVAL: Duration = Duration::from_secs(2);
/// The longest interval, reached while logging creations has no effect.
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// The age at which a creation in the outbox counts as left there. A lower age logs creations twice that a query is
/// about to log; a higher one delays those that a crash left.
const LEFTOVER_AGE: Duration = Duration::from_secs(5);
/// How many creations are logged at once. Each may have a MiB.
const LOGGED_AT_ONCE: i64 = 64;
/// How many applied creations one statement deletes.
const DELETED_AT_ONCE: i64 = 5000;

/// Logs a creation and waits until the log has it. Returns its sequence.
pub(crate) async fn log_created(js: &jetstream::Context, created: &CreatedLead) -> Result<u64, PublishError> {
    let CreatedLead { project_id, update_id, command } = created;
    let subject = CommandSubject { project_id: *project_id, kind: CommandKind::LeadCreated }.to_string();
    let id = message_id(*project_id, *update_id);
    let logged = publish(js, message(subject, &id, None, command.clone().into_bytes().into())).await?;
    Ok(logged.sequence)
}

/// Logs creations that were left, and deletes those that are applied, until it is dropped.
pub(super) async fn log_created_leads(pool: Pool, js: jetstream::Context) {
    let mut pause = INTERVAL;
    let mut logged = Vec::new();
    loop {
        tokio::time::sleep(pause).await;
        match log_leftovers(&pool, &js).await {
            Ok(left) if left.is_empty() => pause = INTERVAL,
            Ok(left) => {
                let without_effect = left == logged;
                pause = if without_effect { MAX_INTERVAL.min(pause * 2) } else { Duration::ZERO };
                logged = left;
            }
            Err(e) => {
                tracing::warn!("cannot log created leads, retrying: {e:#}");
                pause = INTERVAL;
            }
        }
    }
}

/// Logs the oldest creations that were left, and waits until they are applied. Returns them.
async fn log_leftovers(pool: &Pool, js: &jetstream::Context) -> anyhow::Result<Vec<CreatedLead>> {
    while created_leads::delete_applied(pool, DELETED_AT_ONCE).await? == DELETED_AT_ONCE.unsigned_abs() {}
    let left = created_leads::before(pool, clock::now().minus(LEFTOVER_AGE), LOGGED_AT_ONCE).await?;
    let mut last = 0;
    for created in &left {
        last = log_created(js, created).await?.max(last);
    }
    // Until they are applied, the same creations are left.
    wait_until_applied(pool, last).await?;
    Ok(left)
}
