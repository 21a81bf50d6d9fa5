//! 5 Apply: erases the content of the ledger rows of erased leads.
//!
//! A lead may have any number of rows, so they are not part of the batch's transaction, which delays all projects. They
//! are erased in steps; after a crash the steps begin again.

use std::time::Duration;

use service_kit::{nats::error_chain, postgres::Pool};

use crate::store::{StoreError, erasures};

/// How often the leader looks for erasures. Longer keeps content longer, shorter costs queries.
const INTERVAL: Duration = Duration::from_secs(1);

/// Erases until it is dropped.
pub(super) async fn erase_contents(pool: Pool) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        if let Err(e) = erase_announced(&pool).await {
            tracing::warn!("cannot erase the updates of a lead, retrying: {}", error_chain(&e));
        }
    }
}

async fn erase_announced(pool: &Pool) -> Result<(), StoreError> {
    for erasure in erasures::announced(pool).await? {
        let mut after = None;
        while let Some(last) = erasures::erase_rows(pool, &erasure, after).await? {
            after = Some(last);
        }
        erasures::finish(pool, &erasure).await?;
        tracing::info!(lead_id = %erasure.lead_id, project_id = %erasure.project_id, "a lead is erased");
    }
    Ok(())
}
