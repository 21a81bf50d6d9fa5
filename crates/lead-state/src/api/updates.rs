//! Lists of updates, and their outcomes as webhooks tell them: what the webhook-notifier asks for when something is to be told
//! again; answered by every instance.

use contract::{
    ObjectId,
    rpc::{Cursor, GetOutcomes, HistoryEntry, ListUpdates, ListedUpdate, MAX_LIMIT, Outcome, Page, RpcError, clamp},
};
use sqlx::PgPool;

use crate::{
    api::lists::{log_place, log_place_at},
    store::{lists, updates},
};

/// What cursors say which list they are of.
const UPDATES: &str = "updates";

/// Answers with updates.
#[derive(Debug, Clone)]
pub(crate) struct Updates {
    pub(crate) pool: PgPool,
}

impl Updates {
    pub(crate) async fn list(self, query: ListUpdates) -> Result<Page<ListedUpdate>, RpcError> {
        let limit = clamp(query.limit);
        match query.lead_id {
            Some(lead_id) => self.of_lead(&query, lead_id, limit).await,
            None => self.of_project(&query, limit).await,
        }
    }

    async fn of_lead(
        &self,
        query: &ListUpdates,
        lead_id: ObjectId,
        limit: u32,
    ) -> Result<Page<ListedUpdate>, RpcError> {
        let before = query.cursor.as_ref().map(log_place_at).transpose()?;
        let since = query.since.map_or(0, contract::Timestamp::unix_seconds);
        let history = lists::history(&self.pool, query.project_id, lead_id, before, limit).await?;
        let listed = |update: &HistoryEntry| ListedUpdate {
            update_id: update.update_id,
            cursor: log_place(update.epoch, update.log_sequence),
        };
        let mut page = Page::cut(history.iter().map(listed).collect(), limit, |update| update.cursor.clone(), None);
        // In the order of the log older ids may come later: all of a lead's are looked at.
        page.items.retain(|update| update.update_id.timestamp().unix_seconds() >= since);
        Ok(page)
    }

    async fn of_project(&self, query: &ListUpdates, limit: u32) -> Result<Page<ListedUpdate>, RpcError> {
        let place = match &query.cursor {
            Some(cursor) => Some(cursor.place(UPDATES)?.parse().map_err(|_| Cursor::invalid())?),
            None => None,
        };
        let ListUpdates { project_id, since, oldest_first, .. } = *query;
        let ids = updates::of_project(&self.pool, project_id, since, oldest_first, place, limit).await?;
        let listed = ids
            .into_iter()
            .map(|update_id| ListedUpdate { update_id, cursor: Cursor::new(UPDATES, &update_id.to_string()) });
        Ok(Page::cut(listed.collect(), limit, |update| update.cursor.clone(), None))
    }

    pub(crate) async fn outcomes(self, query: GetOutcomes) -> Result<Vec<Outcome>, RpcError> {
        if query.update_ids.len() > MAX_LIMIT as usize {
            let message = format!("at most {MAX_LIMIT} outcomes are told at once");
            return Err(RpcError::new(400, "too_many_updates", message));
        }
        Ok(updates::outcomes(&self.pool, query.project_id, &query.update_ids).await?)
    }
}
