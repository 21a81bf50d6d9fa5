//! Finds leads by id, external id, e-mail address, the end of the phone number, or the beginning of the name.

use contract::{ObjectId, rpc};
use service_kit::postgres::Pool;

use super::{
    StoreError,
    leads::{LeadFilter, LeadRow, MAX_PAGE_BYTES, TABLE},
    row::{Hex, Row, time},
};
use crate::core::lead_search::LeadSearch;

/// The ids of a project's leads that match a search, newest first; None if more than `most` match.
pub(crate) async fn matching(
    pool: &Pool,
    project_id: ObjectId,
    search: &LeadSearch,
    most: usize,
) -> Result<Option<Vec<ObjectId>>, StoreError> {
    // Each branch uses an index. The last character of Unicode sorts after all characters that may continue a text.
    let rows = sqlx::query_scalar!(
        r#"SELECT lead_id AS "lead_id!" FROM lead_state.leads WHERE project_id = $1 AND lead_id = $2
           UNION ALL
           (SELECT l.lead_id FROM lead_state.processes AS p JOIN lead_state.leads AS l USING (process_id)
            WHERE p.project_id = $1 AND md5(l.reference_id) = md5($3) AND l.reference_id = $3 LIMIT $7)
           UNION ALL
           (SELECT lead_id FROM lead_state.leads
            WHERE project_id = $1 AND md5(lower(email)) = md5(lower($4)) AND lower(email) = lower($4) LIMIT $7)
           UNION ALL
           (SELECT lead_id FROM lead_state.leads
            WHERE project_id = $1
                AND left(reverse(regexp_replace(phone, '[^0-9]', '', 'g')), 32) COLLATE "C" >= $5
                AND left(reverse(regexp_replace(phone, '[^0-9]', '', 'g')), 32) COLLATE "C" < $5 || 'x'
                AND phone IS NOT NULL LIMIT $7)
           UNION ALL
           (SELECT lead_id FROM lead_state.leads
            WHERE project_id = $1
                AND left(lower(name), 64) COLLATE "C" >= left(lower($6), 64)
                AND left(lower(name), 64) COLLATE "C" < left(lower($6), 64) || U&'\+10FFFF'
                AND name IS NOT NULL LIMIT $7)"#,
        project_id.as_bytes(),
        search.lead_id.as_ref().map(|id| id.as_bytes()) as _,
        search.reference_id,
        search.email.as_deref(),
        search.phone_end.as_deref(),
        search.name_start.as_deref(),
        most as i64 + 1
    )
    .fetch_all(pool)
    .await?;
    if rows.len() > most {
        return Ok(None);
    }
    let ids = rows.iter().map(|bytes| Row::new(TABLE, Hex(bytes)).id("lead_id", bytes));
    let mut ids = ids.collect::<Result<Vec<_>, _>>()?;
    ids.sort_unstable_by(|a, b| b.cmp(a));
    ids.dedup();
    Ok(Some(ids))
}

/// The leads among `lead_ids` that pass the filter, newest first: `limit` of them, and one more to show that there are
/// more.
pub(crate) async fn list(
    pool: &Pool,
    project_id: ObjectId,
    lead_ids: &[ObjectId],
    filter: LeadFilter<'_>,
    limit: u32,
) -> Result<Vec<rpc::Lead>, StoreError> {
    let lead_ids = lead_ids.iter().map(|id| *id.as_bytes()).collect::<Vec<_>>();
    let rows = sqlx::query_as!(
        LeadRow,
        r#"WITH requested AS MATERIALIZED (
               SELECT lead_id, process_id, reference_id, name, phone, email, state, disposition, metadata::text
                      AS metadata, version, created_at, updated_at
               FROM lead_state.leads
               WHERE project_id = $1 AND lead_id = ANY($2) AND erased_at IS NULL
                   AND ($3::bytea IS NULL OR process_id = $3) AND ($4::text IS NULL OR state = $4)
                   AND ($5::timestamptz IS NULL OR updated_at >= $5)
               ORDER BY lead_id DESC LIMIT $6
           ), sized AS (
               SELECT *, sum(octet_length(metadata)) OVER (ORDER BY lead_id DESC) - octet_length(metadata) AS before
               FROM requested
           )
           SELECT lead_id AS "lead_id!", process_id AS "process_id!", reference_id, name, phone, email,
                  state AS "state!", disposition, metadata AS "metadata!", version AS "version!",
                  created_at AS "created_at!", updated_at AS "updated_at!"
           FROM sized WHERE before <= $7 ORDER BY lead_id DESC"#,
        project_id.as_bytes(),
        &lead_ids as &[[u8; 12]],
        filter.process_id.as_ref().map(|id| id.as_bytes()) as _,
        filter.state,
        filter.updated_since.map(time),
        i64::from(limit) + 1,
        MAX_PAGE_BYTES
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| row.into_lead(project_id)).collect()
}
