//! Updates: reading one, lists, and their outcomes as bodies of webhooks.

use std::{fmt::Display, time::Duration};

use contract::{
    ObjectId, Timestamp,
    command::MAX_ID_AGE,
    rpc::{
        ActivityCounts, CountActivities, CountUpdates, ErrorCode, FindUpdates, FoundUpdate, GetEvents, GetOutcomes,
        GetUpdate, HistoryEntry, InvalidRange, LedgerEvent, ListUpdates, ListedUpdate, MAX_COUNTED_ACTIVITIES,
        MAX_LIMIT, MAX_UPDATES_DAYS, Outcome, Page, RpcError, Update, UpdateCounts, clamp,
    },
    streams::LEAD_COMMANDS,
};
use service_kit::clock;
use tokio::time::{Instant, sleep};

use super::{Api, cursors};
use crate::store::{
    StoreError, checkpoint, queued_updates, statistics,
    updates::{self, IdRange},
};

/// How long a query for an unknown update waits until the leader has applied the entries that were in the log at its
/// start. Shorter than the time after which callers send the query to another instance.
const CATCH_UP: Duration = Duration::from_millis(700);
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(10);
/// The default range of time in which updates are found.
const DEFAULT_RANGE: Duration = Duration::from_hours(24);
/// How many updates are searched for a page with a condition. More finds rare updates with fewer queries, each of which
/// takes longer.
const SEARCHED_UPDATES: u32 = 10_000;

impl Api {
    pub(super) async fn get_update(self, query: GetUpdate) -> Result<Update, RpcError> {
        if let Some(update) = updates::find(&self.pool, query.project_id, query.update_id).await? {
            return Ok(update);
        }
        if let Some(update) = self.find_queued(&query).await? {
            return Ok(update);
        }
        // The update is either in the log and not applied yet, or it does not exist.
        let unavailable =
            |e: &dyn Display| RpcError::new(ErrorCode::Unavailable, format!("the log is unavailable: {e}"));
        let log = self.js.get_stream(LEAD_COMMANDS).await.map_err(|e| unavailable(&e))?;
        let last = log.cached_info().state.last_sequence;
        let deadline = Instant::now() + CATCH_UP;
        let next = loop {
            let checkpoint = checkpoint::get(&self.pool, LEAD_COMMANDS).await?;
            let next = checkpoint.map_or(1, |checkpoint| checkpoint.next_sequence());
            if next > last {
                return self.find_queued(&query).await?.ok_or_else(|| self.update_not_found(query.update_id));
            }
            if Instant::now() >= deadline {
                break next;
            }
            sleep(CATCH_UP_INTERVAL).await;
        };
        // There is a backlog, which may contain the update. Its id may be old, because a repeated request has the id of
        // the first one and producers make their own ids, but a command with an older id than this is refused.
        let next = log.get_raw_message(next).await.map_err(|e| unavailable(&e))?;
        if query.update_id.timestamp() < Timestamp::from(next.time).minus(MAX_ID_AGE) {
            return Err(self.update_not_found(query.update_id));
        }
        Ok(Update::pending(query.update_id))
    }

    /// An update that is queued, or has just left the queue. The queue is read first, because an update that leaves it
    /// is in the ledger.
    async fn find_queued(&self, query: &GetUpdate) -> Result<Option<Update>, StoreError> {
        match queued_updates::find(&self.pool, query.project_id, query.update_id).await? {
            None => updates::find(&self.pool, query.project_id, query.update_id).await,
            queued => Ok(queued),
        }
    }

    fn update_not_found(&self, update_id: ObjectId) -> RpcError {
        let kept_since = self.ledger_retention.cutoff(clock::now());
        let text = match kept_since.filter(|since| update_id.timestamp() < *since) {
            Some(since) => {
                format!("Update not found; updates from before {} may have been deleted", &since.to_iso()[..10])
            }
            None => "Update not found".into(),
        };
        RpcError::new(ErrorCode::UpdateNotFound, text)
    }

    pub(super) async fn list_updates(self, query: ListUpdates) -> Result<Page<ListedUpdate>, RpcError> {
        let limit = clamp(query.limit);
        match query.lead_id {
            Some(lead_id) => self.list_updates_of_lead(&query, lead_id, limit).await,
            None => self.list_updates_of_project(&query, limit).await,
        }
    }

    async fn list_updates_of_lead(
        &self,
        query: &ListUpdates,
        lead_id: ObjectId,
        limit: u32,
    ) -> Result<Page<ListedUpdate>, RpcError> {
        let before = query.cursor.as_ref().map(cursors::parse_history).transpose()?;
        let since = query.since.map_or(0, Timestamp::unix_seconds);
        let until = query.until.map_or(u32::MAX, Timestamp::unix_seconds_rounded_up);
        let history = updates::history_of_lead(&self.pool, query.project_id, lead_id, before, limit).await?;
        let cursor = |update: &HistoryEntry| cursors::history(update.position());
        let Page { items, next } = Page::cut(history, limit, cursor, None);
        // The log is not in the order of the ids, so an older id does not end the list.
        let is_listed = |update: &&HistoryEntry| {
            let made = update.update_id.timestamp().unix_seconds();
            since <= made && made < until
        };
        let listed = |update: &HistoryEntry| ListedUpdate { update_id: update.update_id, cursor: cursor(update) };
        Ok(Page { items: items.iter().filter(is_listed).map(listed).collect(), next })
    }

    async fn list_updates_of_project(&self, query: &ListUpdates, limit: u32) -> Result<Page<ListedUpdate>, RpcError> {
        let at = query.cursor.as_ref().map(cursors::parse_update).transpose()?;
        let ListUpdates { project_id, since, until, oldest_first, .. } = *query;
        let range = IdRange::new(since, until, at.filter(|_| !oldest_first));
        let ids = updates::ids_of_range(&self.pool, project_id, &range, oldest_first, at, limit).await?;
        let listed = ids.into_iter().map(|update_id| ListedUpdate { update_id, cursor: cursors::update(update_id) });
        Ok(Page::cut(listed.collect(), limit, |update| update.cursor.clone(), None))
    }

    pub(super) async fn find_updates(self, query: FindUpdates) -> Result<Page<FoundUpdate>, RpcError> {
        let limit = clamp(query.limit);
        let from = begin_of_range(&query, clock::now())?;
        let before = query.cursor.as_ref().map(cursors::parse_update).transpose()?;
        let mut range = IdRange::new(Some(from), query.to, before);
        // Conditions have no index, because an index slows down every update.
        let down_to = match has_conditions(&query) {
            false => None,
            true => updates::nth_of_range(&self.pool, query.project_id, &range, SEARCHED_UPDATES).await?,
        };
        if let Some(down_to) = down_to {
            range.from = down_to.as_bytes().into();
        }
        let found = updates::find_in_range(&self.pool, &query, &range, limit).await?;
        let cursor = |update: &FoundUpdate| cursors::update(update.entry.update_id);
        Ok(Page::cut(found, limit, cursor, down_to.map(cursors::update)))
    }

    pub(super) async fn count_updates(self, query: CountUpdates) -> Result<Vec<UpdateCounts>, RpcError> {
        query.range.check()?;
        let counts = statistics::count_updates(&self.pool, query.project_id, query.range, query.by).await?;
        Ok(counts.ok_or(InvalidRange::TooMany)?)
    }

    pub(super) async fn count_activities(self, query: CountActivities) -> Result<ActivityCounts, RpcError> {
        query.check()?;
        let counts = statistics::count_activities(&self.pool, &query).await?;
        counts.ok_or_else(|| {
            let fault =
                format!("the range has more than {MAX_COUNTED_ACTIVITIES} calls: choose a shorter range, or a process");
            RpcError::new(ErrorCode::InvalidField, fault)
        })
    }

    pub(super) async fn get_outcomes(self, query: GetOutcomes) -> Result<Vec<Outcome>, RpcError> {
        check_count(&query.update_ids)?;
        Ok(updates::outcomes(&self.pool, query.project_id, &query.update_ids, &query.kinds).await?)
    }

    pub(super) async fn get_events(self, query: GetEvents) -> Result<Vec<LedgerEvent>, RpcError> {
        check_count(&query.update_ids)?;
        let events = updates::events(&self.pool, query.project_id, &query.update_ids).await?;
        Ok(events.into_iter().map(|(_, event)| event).collect())
    }
}

fn check_count(update_ids: &[ObjectId]) -> Result<(), RpcError> {
    if update_ids.len() > MAX_LIMIT as usize {
        let message = format!("a query can name at most {MAX_LIMIT} updates");
        return Err(RpcError::new(ErrorCode::TooManyUpdates, message));
    }
    Ok(())
}

/// The start of the range in which updates are found.
fn begin_of_range(query: &FindUpdates, now: Timestamp) -> Result<Timestamp, RpcError> {
    let end = query.to.unwrap_or(now);
    let begin = query.from.unwrap_or_else(|| end.minus(DEFAULT_RANGE));
    if query.to.is_some_and(|to| to <= begin) {
        return Err(InvalidRange::Empty.into());
    }
    if begin < end.minus(Duration::from_hours(24 * u64::from(MAX_UPDATES_DAYS))) {
        let message = format!("the range is longer than {MAX_UPDATES_DAYS} d: choose a later from, or an earlier to");
        return Err(RpcError::new(ErrorCode::InvalidField, message));
    }
    Ok(begin)
}

fn has_conditions(query: &FindUpdates) -> bool {
    let FindUpdates { success, error_code, process_id, api_key_id, user_id, .. } = query;
    success.is_some() || error_code.is_some() || process_id.is_some() || api_key_id.is_some() || user_id.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(from: Option<&str>, to: Option<&str>) -> Result<String, String> {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let query = FindUpdates {
            project_id: ObjectId::from_bytes([1; 12]),
            from: from.map(at),
            to: to.map(at),
            success: None,
            error_code: None,
            process_id: None,
            api_key_id: None,
            user_id: None,
            cursor: None,
            limit: 1,
        };
        begin_of_range(&query, at("2026-01-31T00:00:00Z")).map(Timestamp::to_iso).map_err(|e| e.message)
    }

    #[test]
    fn a_range_is_a_day_by_default_and_31_days_at_most() {
        assert_eq!(begin(None, None).unwrap(), "2026-01-30T00:00:00.000Z");
        assert_eq!(begin(None, Some("2026-01-03T12:00:00Z")).unwrap(), "2026-01-02T12:00:00.000Z");
        assert_eq!(begin(Some("2025-12-31T00:00:00Z"), None).unwrap(), "2025-12-31T00:00:00.000Z");
        let too_long = "the range is longer than 31 d: choose a later from, or an earlier to";
        assert_eq!(begin(Some("2025-12-30T23:59:59Z"), None).unwrap_err(), too_long);
        let empty = begin(Some("2026-01-03T00:00:00Z"), Some("2026-01-03T00:00:00Z")).unwrap_err();
        assert_eq!(empty, "to must be later than from");
        // Clients whose clocks are ahead make such ids.
        assert!(begin(Some("2026-02-01T00:00:00Z"), None).is_ok());
    }
}
