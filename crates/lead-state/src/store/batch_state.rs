//! 4 Decide: reads the rows that a batch's entries name.
//!
//! None of these reads takes a lock: only the leader updates leads, and a leader that lost its lease fails at the
//! checkpoint.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use contract::ObjectId;
use futures::TryStreamExt;
use service_kit::postgres::Session;

use super::{
    StoreError, queued_updates,
    row::{Hex, Row},
};
use crate::core::{
    batch::{BatchState, LeadKeys},
    decide::{Call, Lead},
};

/// Most bytes of metadata that a batch reads or announces, unless a single entry has more. A larger bound costs memory,
/// a smaller one splits batches of large leads.
pub(crate) const MAX_BYTES: usize = 16 << 20;

/// Reads leads, their calls and queued updates; the rules are in [`rules`](super::rules). None if there are more than
/// `budget` bytes of metadata and commands.
///
/// Updates that are recorded already are not looked up: with one of them, [`write`](super::batch::write) fails with
/// [`StoreError::Duplicate`].
pub(crate) async fn read(
    connection: &mut Session,
    keys: &LeadKeys,
    budget: usize,
) -> Result<Option<BatchState>, StoreError> {
    let mut reader = LeadReader { state: BatchState::default(), in_call: Vec::new(), budget };
    if !reader.read_by_id(connection, keys).await? || !reader.read_by_reference(connection, keys).await? {
        return Ok(None);
    }
    let LeadReader { mut state, in_call, budget } = reader;
    if in_call.is_empty() {
        return Ok(Some(state));
    }
    let (calls, queueing) = read_calls(connection, &in_call).await?;
    state.calls = calls;
    if !queueing.is_empty() {
        let queued = queued_updates::of_leads(connection, queueing.into_iter(), budget).await?;
        let Some(queued) = queued else { return Ok(None) };
        state.queued = queued;
    }
    Ok(Some(state))
}

struct LeadRow {
    lead_id: Vec<u8>,
    project_id: Vec<u8>,
    process_id: Vec<u8>,
    reference_id: Option<String>,
    name: Option<String>,
    state: String,
    disposition: Option<String>,
    metadata: String,
    version: i64,
    erased: bool,
    in_call: bool,
}

impl TryFrom<LeadRow> for Lead {
    type Error = StoreError;

    fn try_from(row: LeadRow) -> Result<Self, StoreError> {
        let stored = Row::new("leads", Hex(&row.lead_id));
        Ok(Self {
            lead_id: stored.id("lead_id", &row.lead_id)?,
            project_id: stored.id("project_id", &row.project_id)?,
            process_id: stored.id("process_id", &row.process_id)?,
            reference_id: row.reference_id,
            name: row.name,
            state: row.state,
            disposition: row.disposition,
            metadata: stored.object("metadata", row.metadata)?,
            version: row.version,
            is_erased: row.erased,
        })
    }
}

/// Reads leads row by row, so that memory never holds more than the budget. The methods return false when the budget is
/// exceeded.
struct LeadReader {
    state: BatchState,
    in_call: Vec<ObjectId>,
    budget: usize,
}

impl LeadReader {
    /// Adds a lead; None if the budget is exceeded.
    fn add(&mut self, row: LeadRow) -> Result<Option<Arc<Lead>>, StoreError> {
        let Some(left) = self.budget.checked_sub(row.metadata.len()) else { return Ok(None) };
        self.budget = left;
        let in_call = row.in_call;
        let lead = Arc::new(Lead::try_from(row)?);
        if in_call {
            self.in_call.push(lead.lead_id);
        }
        self.state.leads.insert(lead.lead_id, lead.clone());
        Ok(Some(lead))
    }

    async fn read_by_id(&mut self, connection: &mut Session, keys: &LeadKeys) -> Result<bool, StoreError> {
        if keys.leads.is_empty() {
            return Ok(true);
        }
        let ids: Vec<_> = keys.leads.iter().map(|lead| *lead.as_bytes()).collect();
        let mut rows = sqlx::query_as!(
            LeadRow,
            r#"SELECT l.lead_id, l.project_id, l.process_id, l.reference_id, l.name, l.state, l.disposition,
                      l.metadata::text AS "metadata!", l.version, l.erased_at IS NOT NULL AS "erased!",
                      EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = l.lead_id) AS "in_call!"
               FROM lead_state.leads l WHERE l.lead_id = ANY($1::bytea[])"#,
            &ids as _
        )
        .fetch(connection);
        while let Some(row) = rows.try_next().await? {
            if self.add(row)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn read_by_reference(&mut self, connection: &mut Session, keys: &LeadKeys) -> Result<bool, StoreError> {
        if keys.references.is_empty() {
            return Ok(true);
        }
        let (processes, references): (Vec<_>, Vec<_>) =
            keys.references.iter().map(|(process, reference)| (*process.as_bytes(), reference.as_str())).unzip();
        // Lateral with a limit: one index look-up per lead, whatever the planner estimates of the table's size.
        let mut rows = sqlx::query_as!(
            LeadRow,
            r#"SELECT l.lead_id, l.project_id, l.process_id, l.reference_id, l.name, l.state, l.disposition,
                      l.metadata::text AS "metadata!", l.version, l.erased_at IS NOT NULL AS "erased!",
                      EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = l.lead_id) AS "in_call!"
               FROM unnest($1::bytea[], $2::text[]) AS n (process_id, reference_id)
               CROSS JOIN LATERAL (
                   SELECT * FROM lead_state.leads l
                   WHERE l.process_id = n.process_id
                       AND md5(l.reference_id) = md5(n.reference_id) AND l.reference_id = n.reference_id
                   LIMIT 1
               ) AS l"#,
            &processes as _,
            &references as _
        )
        .fetch(connection);
        while let Some(row) = rows.try_next().await? {
            let Some(lead) = self.add(row)? else { return Ok(false) };
            if let Some(reference) = &lead.reference_id {
                self.state.references.insert((lead.process_id, reference.clone()), lead.lead_id);
            }
        }
        Ok(true)
    }
}

/// The calls of leads, and the leads among them that have queued updates.
async fn read_calls(
    connection: &mut Session,
    leads: &[ObjectId],
) -> Result<(HashMap<ObjectId, Vec<Call>>, HashSet<ObjectId>), StoreError> {
    let ids: Vec<_> = leads.iter().map(|lead| *lead.as_bytes()).collect();
    let mut calls = HashMap::<_, Vec<Call>>::new();
    let mut queueing = HashSet::new();
    let rows = sqlx::query!(
        r#"SELECT c.lead_id, c.call_id, c.started_at, c.expires_at,
                  EXISTS (SELECT FROM lead_state.queued_updates q WHERE q.lead_id = c.lead_id) AS "queueing!"
           FROM lead_state.active_calls c WHERE c.lead_id = ANY($1::bytea[])"#,
        &ids as _
    )
    .fetch_all(connection)
    .await?;
    for row in rows {
        let lead_id = Row::new("active_calls", &row.call_id).id("lead_id", &row.lead_id)?;
        if row.queueing {
            queueing.insert(lead_id);
        }
        calls.entry(lead_id).or_default().push(Call {
            call_id: row.call_id,
            started_at: row.started_at.into(),
            expires_at: row.expires_at.into(),
        });
    }
    Ok((calls, queueing))
}
