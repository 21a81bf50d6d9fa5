//! Updates by their ids: reading one, lists, and their outcomes as bodies of webhooks.

use contract::{
    JsonObject, ObjectId, Timestamp,
    call_result::CallResult,
    command::MAX_TEXT_CHARS,
    event::CompletionEvent,
    event_kind::DeliveryKind,
    position::LogPosition,
    rpc::{self, Activity, FindUpdates, FoundUpdate, HistoryEntry, LedgerEvent, Outcome, ShortResult, UpdateStatus},
};
use service_kit::postgres::Pool;
use time::OffsetDateTime;

use super::{
    StoreError,
    ledger::TABLE,
    row::{BEYOND_IDS, Hex, Row, position_columns, upper_bound},
};

/// The most bytes of outcomes in one response, without those of the last one, so that the response fits into a NATS
/// message of 2 MiB.
const MAX_OUTCOME_BYTES: i64 = 256 << 10;

/// A decided update or call event.
pub(crate) async fn find(
    pool: &Pool,
    project_id: ObjectId,
    update_id: ObjectId,
) -> Result<Option<rpc::Update>, StoreError> {
    let row = sqlx::query!(
        r#"SELECT kind, log_sequence, logged_at, lead_id, process_id, reference_id, command::text AS "command!", success,
                  error, error_code, from_state, to_state, version, user_id, api_key_id, warnings, data::text AS data,
                  applied_at
           FROM lead_state.lead_updates WHERE project_id = $1 AND update_id = $2"#,
        project_id.as_bytes(),
        update_id.as_bytes()
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let stored = Row::new(TABLE, &update_id);
    Ok(Some(rpc::Update {
        kind: stored.kind(&row.kind)?,
        update_id,
        status: if row.success { UpdateStatus::Succeeded } else { UpdateStatus::Failed },
        command: Some(stored.object("command", row.command)?),
        log_sequence: Some(row.log_sequence as u64),
        logged_at: Some(row.logged_at.into()),
        lead_id: stored.optional_id("lead_id", row.lead_id.as_deref())?,
        process_id: stored.optional_id("process_id", row.process_id.as_deref())?,
        reference_id: row.reference_id,
        error: row.error,
        error_code: row.error_code,
        from_state: row.from_state,
        to_state: row.to_state,
        version: row.version,
        user_id: row.user_id,
        api_key_id: stored.optional_id("api_key_id", row.api_key_id.as_deref())?,
        warnings: row.warnings,
        applied_at: Some(row.applied_at.into()),
        data: stored.optional_object("data", row.data)?,
        queued_until: None,
    }))
}

/// A lead's latest updates and call events, newest first.
pub(super) async fn latest_of_lead(
    pool: &Pool,
    project_id: ObjectId,
    lead_id: ObjectId,
) -> Result<Vec<Activity>, StoreError> {
    let rows = sqlx::query!(
        r#"SELECT kind, update_id, success, error, from_state, to_state, disposition, user_id, applied_at,
                  CASE WHEN kind = 'call.ended' AND success THEN command->>'result' END AS result
           FROM lead_state.lead_updates WHERE lead_id = $1 AND project_id = $2
           ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT $3"#,
        lead_id.as_bytes(),
        project_id.as_bytes(),
        rpc::LEAD_ACTIVITIES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let stored = Row::new(TABLE, Hex(&row.update_id));
            Ok(Activity {
                kind: stored.kind(&row.kind)?,
                update_id: stored.id("update_id", &row.update_id)?,
                success: row.success,
                error: row.error,
                from_state: row.from_state,
                to_state: row.to_state,
                disposition: row.disposition,
                user_id: row.user_id,
                timestamp: row.applied_at.into(),
                result: stored.optional_json("command", row.result.as_deref())?.map(short),
            })
        })
        .collect()
}

fn short(result: CallResult) -> ShortResult {
    let CallResult { status, connected, disposition, duration_seconds, .. } = result;
    ShortResult { status, connected, disposition, duration_seconds }
}

/// A lead's updates and call events before this log position, newest first: `limit` of them, and one more to show that
/// there are more.
pub(crate) async fn history_of_lead(
    pool: &Pool,
    project_id: ObjectId,
    lead_id: ObjectId,
    before: Option<LogPosition>,
    limit: u32,
) -> Result<Vec<HistoryEntry>, StoreError> {
    let (epoch, sequence, index) = before.map_or((i32::MAX, i64::MAX, i32::MAX), position_columns);
    let rows = sqlx::query_as!(
        EntryRow,
        r#"SELECT kind, update_id, lead_id, process_id, reference_id, success, error, error_code, from_state, to_state,
                  disposition, version, user_id, api_key_id, warnings, log_epoch, log_sequence, log_index, logged_at,
                  applied_at
           FROM lead_state.lead_updates
           WHERE lead_id = $1 AND project_id = $2 AND (log_epoch, log_sequence, log_index) < ($3, $4, $5)
           ORDER BY log_epoch DESC, log_sequence DESC, log_index DESC LIMIT $6"#,
        lead_id.as_bytes(),
        project_id.as_bytes(),
        epoch,
        sequence,
        index,
        i64::from(limit) + 1
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| Ok(row.into_update()?.entry)).collect()
}

struct EntryRow {
    kind: String,
    update_id: Vec<u8>,
    lead_id: Option<Vec<u8>>,
    process_id: Option<Vec<u8>>,
    reference_id: Option<String>,
    success: bool,
    error: Option<String>,
    error_code: Option<String>,
    from_state: Option<String>,
    to_state: Option<String>,
    disposition: Option<String>,
    version: Option<i64>,
    user_id: Option<String>,
    api_key_id: Option<Vec<u8>>,
    warnings: Vec<String>,
    log_epoch: i32,
    log_sequence: i64,
    log_index: i32,
    logged_at: OffsetDateTime,
    applied_at: OffsetDateTime,
}

impl EntryRow {
    fn into_update(self) -> Result<FoundUpdate, StoreError> {
        let stored = Row::new(TABLE, Hex(&self.update_id));
        Ok(FoundUpdate {
            lead_id: stored.optional_id("lead_id", self.lead_id.as_deref())?,
            process_id: stored.optional_id("process_id", self.process_id.as_deref())?,
            reference_id: self.reference_id,
            entry: HistoryEntry {
                kind: stored.kind(&self.kind)?,
                update_id: stored.id("update_id", &self.update_id)?,
                success: self.success,
                error: self.error,
                error_code: self.error_code,
                from_state: self.from_state,
                to_state: self.to_state,
                disposition: self.disposition,
                version: self.version,
                user_id: self.user_id,
                api_key_id: stored.optional_id("api_key_id", self.api_key_id.as_deref())?,
                warnings: self.warnings,
                epoch: self.log_epoch,
                log_sequence: self.log_sequence as u64,
                log_index: self.log_index.cast_unsigned(),
                logged_at: self.logged_at.into(),
                applied_at: self.applied_at.into(),
            },
        })
    }
}

/// A part of a project's updates, by the bytes of their ids.
#[derive(Debug, Clone)]
pub(crate) struct IdRange {
    /// The first bytes of the lowest id.
    pub(crate) from: Vec<u8>,
    /// The exclusive upper bound of the ids.
    pub(crate) before: Vec<u8>,
}

impl IdRange {
    /// The ids made at `from` or later and before `to`, to the second, and below `cursor`.
    pub(crate) fn new(from: Option<Timestamp>, to: Option<Timestamp>, cursor: Option<ObjectId>) -> Self {
        let from = from.map_or(0, Timestamp::unix_seconds).to_be_bytes();
        let end = to.map(|at| at.unix_seconds_rounded_up().to_be_bytes());
        let end = end.as_ref().map_or(&BEYOND_IDS[..], |seconds| &seconds[..]);
        Self { from: from.into(), before: end.min(upper_bound(cursor.as_ref())).into() }
    }
}

/// The `count`-th update of a range, newest first; None if there are fewer.
pub(crate) async fn nth_of_range(
    pool: &Pool,
    project_id: ObjectId,
    range: &IdRange,
    count: u32,
) -> Result<Option<ObjectId>, StoreError> {
    let update_id = sqlx::query_scalar!(
        r#"SELECT update_id FROM lead_state.lead_updates
           WHERE project_id = $1 AND update_id >= $2 AND update_id < $3
           ORDER BY update_id DESC OFFSET $4 LIMIT 1"#,
        project_id.as_bytes(),
        range.from,
        range.before,
        i64::from(count) - 1
    )
    .fetch_optional(pool)
    .await?;
    update_id.map(|bytes| Row::new(TABLE, Hex(&bytes)).id("update_id", &bytes)).transpose()
}

/// The updates of a range that meet a query's conditions, newest first: `limit` of them, and one more to show that
/// there are more.
pub(crate) async fn find_in_range(
    pool: &Pool,
    query: &FindUpdates,
    range: &IdRange,
    limit: u32,
) -> Result<Vec<FoundUpdate>, StoreError> {
    let rows = sqlx::query_as!(
        EntryRow,
        r#"SELECT kind, update_id, lead_id, process_id, reference_id, success, error, error_code, from_state, to_state,
                  disposition, version, user_id, api_key_id, warnings, log_epoch, log_sequence, log_index, logged_at,
                  applied_at
           FROM lead_state.lead_updates
           WHERE project_id = $1 AND update_id >= $2 AND update_id < $3
               AND ($4::boolean IS NULL OR success = $4) AND ($5::text IS NULL OR error_code = $5)
               AND ($6::bytea IS NULL OR process_id = $6) AND ($7::bytea IS NULL OR api_key_id = $7)
               AND ($8::text IS NULL OR user_id = $8)
           ORDER BY update_id DESC LIMIT $9"#,
        query.project_id.as_bytes(),
        range.from,
        range.before,
        query.success,
        query.error_code.as_deref(),
        query.process_id.as_ref().map(|id| id.as_bytes()) as _,
        query.api_key_id.as_ref().map(|id| id.as_bytes()) as _,
        query.user_id.as_deref(),
        i64::from(limit) + 1
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(EntryRow::into_update).collect()
}

/// The ids of a range of a project's updates and call events, newest first, or oldest first after `after`: `limit` of
/// them, and one more to show that there are more.
pub(crate) async fn ids_of_range(
    pool: &Pool,
    project_id: ObjectId,
    range: &IdRange,
    oldest_first: bool,
    after: Option<ObjectId>,
    limit: u32,
) -> Result<Vec<ObjectId>, StoreError> {
    let limit = i64::from(limit) + 1;
    let rows = if oldest_first {
        sqlx::query_scalar!(
            r#"SELECT update_id FROM lead_state.lead_updates
               WHERE project_id = $1 AND update_id >= $2 AND update_id > $3 AND update_id < $4
               ORDER BY update_id LIMIT $5"#,
            project_id.as_bytes(),
            range.from,
            after.as_ref().map_or(&[][..], |id| id.as_bytes()),
            range.before,
            limit
        )
        .fetch_all(pool)
        .await?
    } else {
        sqlx::query_scalar!(
            r#"SELECT update_id FROM lead_state.lead_updates
               WHERE project_id = $1 AND update_id >= $2 AND update_id < $3 ORDER BY update_id DESC LIMIT $4"#,
            project_id.as_bytes(),
            range.from,
            range.before,
            limit
        )
        .fetch_all(pool)
        .await?
    };
    rows.iter().map(|bytes| Row::new(TABLE, Hex(bytes)).id("update_id", bytes)).collect()
}

/// The bodies of these deliveries in their order, except those of erased leads: as many as fit into a response, and at
/// least one if there is any.
pub(crate) async fn outcomes(
    pool: &Pool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
    kinds: &[DeliveryKind],
) -> Result<Vec<Outcome>, StoreError> {
    let outcome = |(place, LedgerEvent { event, .. }): (usize, LedgerEvent)| -> Result<Option<Outcome>, StoreError> {
        let stored = Row::new(TABLE, &event.update_id);
        let kind = kinds.get(place).copied().unwrap_or_default();
        let body = kind.body(&event).map_err(|e| stored.corrupt("data", e))?;
        let Some(payload) = body else { return Ok(None) };
        let payload = JsonObject::from_text(payload).map_err(|e| stored.corrupt("data", e))?;
        Ok(Some(Outcome { update_id: event.update_id, kind, lead_id: event.lead_id, payload }))
    };
    let events = events(pool, project_id, update_ids).await?;
    events.into_iter().map(outcome).filter_map(Result::transpose).collect()
}

/// The events of these updates, except those of erased leads, each with its index in `update_ids`: as many as fit into
/// a response, and at least one if there is any.
pub(crate) async fn events(
    pool: &Pool,
    project_id: ObjectId,
    update_ids: &[ObjectId],
) -> Result<Vec<(usize, LedgerEvent)>, StoreError> {
    let update_ids = update_ids.iter().map(|id| id.as_bytes().to_vec()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"WITH requested AS MATERIALIZED (
               SELECT r.place, u.*, CASE WHEN u.kind <> 'update' THEN left(u.command->>'callId', $4) END AS call_id,
                      CASE WHEN u.kind = 'call.ended' AND u.success THEN u.command->>'result' END AS activity,
                      CASE WHEN u.kind = 'lead.created' AND u.success THEN u.command->>'contact' END AS contact,
                      u.data::text AS text
               FROM unnest($2::bytea[]) WITH ORDINALITY AS r (update_id, place)
               JOIN lead_state.lead_updates AS u ON u.project_id = $1 AND u.update_id = r.update_id
               WHERE NOT EXISTS (SELECT FROM lead_state.leads AS l WHERE l.lead_id = u.lead_id AND l.erased_at IS NOT NULL)
           ), sized AS (
               SELECT *, sum(bytes) OVER (ORDER BY place) - bytes AS before
               FROM requested, LATERAL (SELECT coalesce(octet_length(text), 0) + coalesce(octet_length(activity), 0)) AS l (bytes)
           )
           SELECT place AS "place!", kind AS "kind!", update_id AS "update_id!", process_id, lead_id, reference_id,
                  success AS "success!", error, error_code, from_state, to_state, version, user_id, call_id, activity, contact,
                  CASE WHEN success THEN disposition END AS disposition, applied_at AS "applied_at!", text,
                  log_epoch AS "log_epoch!", log_sequence AS "log_sequence!", log_index AS "log_index!"
           FROM sized WHERE before = 0 OR before + bytes <= $3 ORDER BY place"#,
        project_id.as_bytes(),
        &update_ids[..],
        MAX_OUTCOME_BYTES,
        MAX_TEXT_CHARS as i32
    )
    .fetch_all(pool)
    .await?;
    let events = rows.into_iter().map(|row| {
        let stored = Row::new(TABLE, Hex(&row.update_id));
        let event = CompletionEvent {
            kind: stored.kind(&row.kind)?,
            update_id: stored.id("update_id", &row.update_id)?,
            project_id,
            process_id: stored.optional_id("process_id", row.process_id.as_deref())?,
            lead_id: stored.optional_id("lead_id", row.lead_id.as_deref())?,
            reference_id: row.reference_id,
            success: row.success,
            error: row.error,
            error_code: row.error_code,
            from_state: row.from_state,
            to_state: row.to_state,
            version: row.version,
            disposition: row.disposition,
            call_id: row.call_id,
            activity: stored.optional_json("command", row.activity.as_deref())?,
            contact: stored.optional_json("command", row.contact.as_deref())?,
            user_id: row.user_id,
            warnings: Vec::new(),
            timestamp: row.applied_at.into(),
            data: stored.optional_object("data", row.text)?,
        };
        let position = stored.position("log_sequence", (row.log_epoch, row.log_sequence, row.log_index))?;
        Ok((usize::try_from(row.place - 1).unwrap_or(usize::MAX), LedgerEvent { position, event }))
    });
    events.collect()
}
