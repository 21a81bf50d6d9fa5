//! 2 Log, 4 Decide: calls that expire while updates are held.
//!
//! What is decided, is decided at a place in the log: so an expiry that nothing else in the log tells of is put into it. A
//! timer that decided by itself would need a place of its own between the entries, and after a restore of the database
//! it would decide elsewhere. What is said twice does no harm, nor what is said too early: only the log's time counts.

use std::{collections::HashSet, time::Duration};

use async_nats::jetstream;
use contract::{
    ObjectId,
    command::CallExpired,
    streams::LEAD_COMMANDS,
    subject::{CommandKind, CommandSubject},
};
use service_kit::{
    clock,
    publish::{message, publish},
};
use sqlx::PgPool;

use crate::store::{checkpoint, held};

/// How often the leader looks for held updates whose call has expired. Longer holds them longer, shorter asks Postgres more
/// often.
const INTERVAL: Duration = Duration::from_secs(1);
/// How rarely it looks, at most, while what it said had no effect: the log's clock is behind, or the database refuses
/// what was held.
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Puts into the log that calls have expired, until it is dropped. What fails is tried again the next time.
pub(crate) async fn tell(pool: PgPool, js: jetstream::Context) {
    let mut told = HashSet::new();
    let mut pause = INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        match round(&pool, &js).await {
            Ok(leads) => {
                let in_vain = leads.iter().any(|lead| told.contains(lead));
                pause = if in_vain { MAX_INTERVAL.min(pause * 2) } else { INTERVAL };
                told = leads;
            }
            Err(e) => tracing::warn!("cannot tell that calls have expired, trying again: {e:#}"),
        }
    }
}

/// Tells of all that are due now, and waits until that is applied; which leads those were.
async fn round(pool: &PgPool, js: &jetstream::Context) -> anyhow::Result<HashSet<ObjectId>> {
    let now = clock::now();
    let mut last = 0;
    let mut leads = HashSet::new();
    for (project_id, lead_id) in held::due(pool, now).await? {
        let subject = CommandSubject { project_id, kind: CommandKind::CallExpired }.to_string();
        let payload = serde_json::to_vec(&CallExpired { lead_id })?;
        let id = format!("expired-{lead_id}-{}", now.millis());
        last = publish(js, message(subject, &id, None, payload.into())).await?.sequence;
        leads.insert(lead_id);
    }
    // Until then the same ones are due.
    while last > 0 && checkpoint::get(pool, LEAD_COMMANDS).await?.is_none_or(|checkpoint| checkpoint.last_seq < last) {
        tokio::time::sleep(INTERVAL).await;
    }
    Ok(leads)
}
