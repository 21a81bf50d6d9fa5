//! Lists of leads and their updates, a page at a time; answered by every instance.

use contract::{
    ObjectId,
    rpc::{Cursor, GetLeadHistory, HistoryEntry, Lead, ListLeads, Page, RpcError, clamp},
};
use sqlx::PgPool;

use crate::store::lists::{self, Filter};

/// What cursors say which list they are of.
const LEADS: &str = "leads";
const HISTORY: &str = "history";
/// How many leads are looked at for a page of those that a filter lets through. More finds rare ones with fewer questions,
/// and takes longer for each.
const LOOKED_AT: u32 = 10_000;

/// Answers with pages.
#[derive(Debug, Clone)]
pub(crate) struct Lists {
    pub(crate) pool: PgPool,
}

impl Lists {
    pub(crate) async fn leads(self, query: ListLeads) -> Result<Page<Lead>, RpcError> {
        let ListLeads { project_id, process_id, state, updated_since, cursor, limit } = query;
        let limit = clamp(limit);
        let before = cursor.map(|cursor| lead_at(&cursor)).transpose()?;
        let filter = Filter { process_id, state: state.as_deref(), updated_since };
        // A filter has no index of its own: one on what changes would cost every update.
        let down_to = match filter.takes_all() {
            true => None,
            false => lists::lead_below(&self.pool, project_id, before, LOOKED_AT).await?,
        };
        let leads = lists::leads(&self.pool, project_id, filter, before, down_to, limit).await?;
        Ok(Page::cut(leads, limit, |lead| lead_place(lead.lead_id), down_to.map(lead_place)))
    }

    pub(crate) async fn history(self, query: GetLeadHistory) -> Result<Page<HistoryEntry>, RpcError> {
        let GetLeadHistory { project_id, lead_id, cursor, limit } = query;
        let limit = clamp(limit);
        let before = cursor.map(|cursor| log_place_at(&cursor)).transpose()?;
        if !lists::has_lead(&self.pool, project_id, lead_id).await? {
            return Err(RpcError::new(404, "lead_not_found", "Lead not found"));
        }
        let updates = lists::history(&self.pool, project_id, lead_id, before, limit).await?;
        Ok(Page::cut(updates, limit, |update| log_place(update.epoch, update.log_sequence), None))
    }
}

fn lead_place(lead_id: ObjectId) -> Cursor {
    Cursor::new(LEADS, &lead_id.to_string())
}

fn lead_at(cursor: &Cursor) -> Result<ObjectId, RpcError> {
    cursor.place(LEADS)?.parse().map_err(|_| Cursor::invalid())
}

pub(crate) fn log_place(epoch: i32, log_seq: u64) -> Cursor {
    Cursor::new(HISTORY, &format!("{epoch}.{log_seq}"))
}

pub(crate) fn log_place_at(cursor: &Cursor) -> Result<(i32, u64), RpcError> {
    let place = cursor.place(HISTORY)?;
    let parts = place.split_once('.').and_then(|(epoch, seq)| Some((epoch.parse().ok()?, seq.parse().ok()?)));
    // What a log can hold, Postgres can.
    parts.filter(|(_, seq)| i64::try_from(*seq).is_ok()).ok_or_else(Cursor::invalid)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn places_round_trip(bytes: [u8; 12], epoch: i32, seq in 0..=i64::MAX as u64) {
            let lead_id = ObjectId::from_bytes(bytes);
            prop_assert_eq!(lead_at(&lead_place(lead_id)), Ok(lead_id));
            prop_assert_eq!(log_place_at(&log_place(epoch, seq)), Ok((epoch, seq)));
            prop_assert!(lead_at(&log_place(epoch, seq)).is_err());
            prop_assert!(log_place_at(&lead_place(lead_id)).is_err());
        }

        #[test]
        fn forged_places_never_panic(place in "[0-9a-f.-]{0,40}|.*") {
            let _ = (lead_at(&Cursor::new(LEADS, &place)), log_place_at(&Cursor::new(HISTORY, &place)));
        }
    }
}
