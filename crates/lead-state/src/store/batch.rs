//! 5 Apply: what a batch reads, and the one transaction that it writes.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use contract::{ObjectId, Timestamp, position::LogPosition, process::Rules};
use futures::TryStreamExt;
use service_kit::postgres::PinnedConnection;
use sqlx::{Connection, PgConnection, PgPool};

use super::{StoreError, checkpoint::Checkpoint, held, id, object, time};
use crate::core::{
    batch::{BatchState, LeadKeys, Plan, UpdateKey},
    decide::{Call, Lead},
};

/// Most processes whose rules are kept; past it they are read anew.
const KEPT_RULES: usize = 10_000;

/// Most bytes of metadata that a batch reads or announces, unless a single entry has more. A larger bound costs memory, a
/// smaller one splits batches of large leads.
pub(crate) const BYTES: usize = 16 << 20;

/// Reads all that a batch keys, but the rules. None if the leads' metadata is more than `budget` bytes.
///
/// Outside of the batch's transaction: only the leader changes leads that are there, and a leader that is none any
/// more fails at the checkpoint. So nothing here needs a lock. Which of the updates are in the ledger already is not looked
/// up: one that is there makes [`write()`] fail with [`WriteError::Known`].
pub(crate) async fn read(
    connection: &mut PgConnection,
    keys: &LeadKeys,
    budget: usize,
) -> Result<Option<BatchState>, StoreError> {
    let mut state = BatchState::default();
    let Some(in_call) = read_leads(connection, keys, &mut state, budget).await? else { return Ok(None) };
    if in_call.is_empty() {
        return Ok(Some(state));
    }
    let (calls, holding) = read_calls(connection, &in_call).await?;
    state.calls = calls;
    if !holding.is_empty() {
        let Some(held) = held::of_leads(connection, holding.into_iter(), budget).await? else { return Ok(None) };
        state.queued = held;
    }
    Ok(Some(state))
}

/// A lead as it stands in the table.
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
    in_call: bool,
}

impl TryFrom<LeadRow> for Lead {
    type Error = StoreError;

    fn try_from(row: LeadRow) -> Result<Self, StoreError> {
        let lead_id = id("leads", "lead_id", &row.lead_id)?;
        Ok(Self {
            lead_id,
            project_id: id("leads", "project_id", &row.project_id)?,
            process_id: id("leads", "process_id", &row.process_id)?,
            reference_id: row.reference_id,
            name: row.name,
            state: row.state,
            disposition: row.disposition,
            metadata: object("leads", "metadata", lead_id, row.metadata)?,
            version: row.version,
        })
    }
}

/// Reads leads row by row, so that no more than the budget is ever held; which of them have calls. None if that is not
/// enough.
async fn read_leads(
    connection: &mut PgConnection,
    keys: &LeadKeys,
    state: &mut BatchState,
    mut budget: usize,
) -> Result<Option<Vec<ObjectId>>, StoreError> {
    let mut in_call = Vec::new();
    let mut add = |row: LeadRow, state: &mut BatchState| {
        let Some(left) = budget.checked_sub(row.metadata.len()) else { return Ok(None) };
        budget = left;
        let has_call = row.in_call;
        let lead = Arc::new(Lead::try_from(row)?);
        if has_call {
            in_call.push(lead.lead_id);
        }
        state.leads.insert(lead.lead_id, lead.clone());
        Ok::<_, StoreError>(Some(lead))
    };
    if !keys.leads.is_empty() {
        let ids: Vec<_> = keys.leads.iter().map(|lead| *lead.as_bytes()).collect();
        let mut rows = sqlx::query_as!(
            LeadRow,
            r#"SELECT l.lead_id, l.project_id, l.process_id, l.reference_id, l.name, l.state, l.disposition,
                      l.metadata::text AS "metadata!", l.version,
                      EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = l.lead_id) AS "in_call!"
               FROM lead_state.leads l WHERE l.lead_id = ANY($1::bytea[])"#,
            &ids as _
        )
        .fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            if add(row, state)?.is_none() {
                return Ok(None);
            }
        }
    }
    if !keys.references.is_empty() {
        let (processes, references): (Vec<_>, Vec<_>) =
            keys.references.iter().map(|(process, reference)| (*process.as_bytes(), reference.as_str())).unzip();
        // Lateral with a limit: looked up one by one through the index, whatever the planner thinks of the table's size.
        let mut rows = sqlx::query_as!(
            LeadRow,
            r#"SELECT l.lead_id, l.project_id, l.process_id, l.reference_id, l.name, l.state, l.disposition,
                      l.metadata::text AS "metadata!", l.version,
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
        .fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            let Some(lead) = add(row, state)? else { return Ok(None) };
            if let Some(reference) = &lead.reference_id {
                state.references.insert((lead.process_id, reference.clone()), lead.lead_id);
            }
        }
    }
    Ok(Some(in_call))
}

/// The calls of leads, and of which of them updates are held.
async fn read_calls(
    connection: &mut PgConnection,
    leads: &[ObjectId],
) -> Result<(HashMap<ObjectId, Vec<Call>>, HashSet<ObjectId>), StoreError> {
    let ids: Vec<_> = leads.iter().map(|lead| *lead.as_bytes()).collect();
    let mut calls = HashMap::<_, Vec<Call>>::new();
    let mut holding = HashSet::new();
    let rows = sqlx::query!(
        r#"SELECT c.lead_id, c.call_id, c.started_at, c.expires_at,
                  EXISTS (SELECT FROM lead_state.queued_updates h WHERE h.lead_id = c.lead_id) AS "holding!"
           FROM lead_state.active_calls c WHERE c.lead_id = ANY($1::bytea[])"#,
        &ids as _
    )
    .fetch_all(connection)
    .await?;
    for row in rows {
        let lead_id = id("active_calls", "lead_id", &row.lead_id)?;
        if row.holding {
            holding.insert(lead_id);
        }
        calls.entry(lead_id).or_default().push(Call {
            call_id: row.call_id,
            started_at: row.started_at.into(),
            expires_at: row.expires_at.into(),
        });
    }
    Ok((calls, holding))
}

/// Which of a batch's updates are in the ledger already.
pub(crate) async fn read_known(pool: &PgPool, keys: &LeadKeys) -> Result<HashSet<UpdateKey>, StoreError> {
    let (projects, updates): (Vec<_>, Vec<_>) =
        keys.updates.iter().map(|(project, update)| (*project.as_bytes(), *update.as_bytes())).unzip();
    // Lateral with a limit: looked up one by one, each in its partition's index.
    let rows = sqlx::query!(
        r#"SELECT u.project_id, u.update_id
           FROM unnest($1::bytea[], $2::bytea[]) AS n (project_id, update_id)
           CROSS JOIN LATERAL (
               SELECT u.project_id, u.update_id FROM lead_state.lead_updates u
               WHERE u.project_id = n.project_id AND u.update_id = n.update_id
               LIMIT 1
           ) AS u"#,
        &projects as _,
        &updates as _
    )
    .fetch_all(pool)
    .await?;
    rows.iter()
        .map(|row| {
            let id = |column, bytes| id("lead_updates", column, bytes);
            Ok((id("project_id", &row.project_id)?, id("update_id", &row.update_id)?))
        })
        .collect()
}

/// The rules of processes, as last read, with their revisions.
#[derive(Debug, Default)]
pub(crate) struct KnownRules(HashMap<ObjectId, (i64, Arc<Rules>)>);

impl KnownRules {
    /// The rules of processes; only those that are not known are read.
    pub(crate) async fn of(
        &mut self,
        pool: &PgPool,
        processes: &BTreeSet<ObjectId>,
    ) -> Result<HashMap<ObjectId, Arc<Rules>>, StoreError> {
        let unknown: Vec<_> = processes.iter().filter(|process| !self.0.contains_key(process)).copied().collect();
        if self.0.len() + unknown.len() > KEPT_RULES {
            self.0.clear();
        }
        self.read(pool, &unknown).await?;
        let rules = |process: &ObjectId| self.0.get(process).map(|(_, rules)| (*process, rules.clone()));
        Ok(processes.iter().filter_map(rules).collect())
    }

    /// Reads the rules of processes again; whether they are others than were known.
    pub(crate) async fn renew(&mut self, pool: &PgPool, processes: &BTreeSet<ObjectId>) -> Result<bool, StoreError> {
        let known = self.revisions(processes);
        self.read(pool, &processes.iter().copied().collect::<Vec<_>>()).await?;
        Ok(self.revisions(processes) != known)
    }

    /// The processes of these whose rules are known, and their revisions.
    pub(crate) fn revisions(&self, processes: &BTreeSet<ObjectId>) -> Vec<(ObjectId, i64)> {
        processes.iter().filter_map(|process| Some((*process, self.0.get(process)?.0))).collect()
    }

    async fn read(&mut self, pool: &PgPool, processes: &[ObjectId]) -> Result<(), StoreError> {
        if processes.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = processes.iter().map(|process| *process.as_bytes()).collect();
        let rows = sqlx::query!(
            r#"SELECT process_id AS "process_id!", revision, config::text AS "config!"
               FROM lead_state.processes WHERE process_id = ANY($1::bytea[])"#,
            &ids as _
        )
        .fetch_all(pool)
        .await?;
        for row in rows {
            let process_id = id("processes", "process_id", &row.process_id)?;
            let rules: Rules = serde_json::from_str(&row.config).map_err(|e| StoreError::Corrupt {
                table: "processes",
                fault: format!("config of {process_id}: {e}"),
            })?;
            self.0.insert(process_id, (row.revision, Arc::new(rules)));
        }
        Ok(())
    }
}

/// The SQLSTATE that `lead_state.require_changed_leads` raises.
const GONE: &str = "LR001";

/// Why a batch was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// The checkpoint is not where this reader left it: somebody else leads now, or the commit of this very batch
    /// went through unheard. Or rules that it was decided by are not of these revisions any more. Nothing was written.
    #[error("the checkpoint was moved by another reader")]
    Fenced,
    /// An update is in the ledger already, or held. Nothing was written; whoever looked before knows which.
    #[error("an update is in the ledger already")]
    Known,
    /// The database did not do it. Whether it was written is not known after a lost connection; the checkpoint tells.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for WriteError {
    fn from(error: sqlx::Error) -> Self {
        let is_known = error.as_database_error().is_some_and(|e| {
            e.is_unique_violation() && e.table().is_some_and(|table| table.starts_with("lead_updates"))
        });
        let is_gone = error.as_database_error().is_some_and(|e| e.code().as_deref() == Some(GONE));
        match error {
            _ if is_known => Self::Known,
            e if is_gone => Self::Store(StoreError::Corrupt { table: "leads", fault: e.to_string() }),
            e => Self::Store(e.into()),
        }
    }
}

/// A batch to be written.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    /// Where the checkpoint must be.
    pub(crate) from: &'a Checkpoint,
    /// The last log entry of the batch.
    pub(crate) last: LogPosition,
    /// When the log stored it.
    pub(crate) logged_at: Timestamp,
    /// The processes by whose rules it was decided, and the revisions of these.
    pub(crate) revisions: &'a [(ObjectId, i64)],
    /// The announce watermark, written with the batch.
    pub(crate) announced: LogPosition,
    /// What it changes.
    pub(crate) plan: &'a Plan,
}

/// Writes a batch in one transaction: checkpoint, leads, calls, what is held, ledger. All of it or nothing.
pub(crate) async fn write(session: &mut PinnedConnection, batch: &Batch<'_>, now: Timestamp) -> Result<(), WriteError> {
    let plan = batch.plan;
    let mut connection = session.take().await?;
    if plan.is_plain() {
        // A statement is a transaction: nothing more need be said to Postgres.
        write_updates(&mut connection, batch, now).await?;
    } else {
        let mut transaction = connection.begin().await?;
        write_updates(&mut transaction, batch, now).await?;
        if !plan.calls.is_empty() {
            write_calls(&mut transaction, &plan.calls).await?;
        }
        held::write(&mut transaction, batch.from, plan).await?;
        transaction.commit().await?;
    }
    session.keep(connection);
    Ok(())
}

/// Moves the checkpoint by compare-and-set, and only if that went well changes leads and writes the ledger: a zombie or a
/// second reader gets no further, nor does who decided by rules of yesterday. One statement, for each costs a round trip, and most batches are small.
async fn write_updates(
    connection: &mut PgConnection,
    &Batch { from, last, logged_at, revisions, announced, plan }: &Batch<'_>,
    now: Timestamp,
) -> Result<(), WriteError> {
    fn column<'a, R, T>(rows: &'a [R], value: impl Fn(&'a R) -> T) -> Vec<T> {
        rows.iter().map(value).collect()
    }
    let Plan { leads, rows, .. } = plan;
    let warnings = column(rows, |row| {
        let warnings = &row.event.warnings;
        (!warnings.is_empty()).then(|| serde_json::json!(warnings))
    });
    let moved = sqlx::query_scalar!(
        r#"WITH moved AS (
               UPDATE lead_state.checkpoints
               SET last_sequence = $1, updated_at = $2, last_logged_at = $3,
                   announced_epoch = greatest(announced_epoch, $4),
                   announced_sequence = CASE WHEN (announced_epoch, announced_sequence) < ($4, $5) THEN $5 ELSE announced_sequence END
               WHERE stream = $6 AND generation = $7 AND epoch = $8 AND last_sequence = $9
                   AND NOT EXISTS (SELECT FROM unnest($39::bytea[], $40::bigint[]) AS r (process_id, revision)
                                   JOIN lead_state.processes p USING (process_id) WHERE p.revision <> r.revision)
               RETURNING 1
           ), changed AS (
               UPDATE lead_state.leads AS l
               SET name = n.name, state = n.state, disposition = n.disposition, metadata = n.metadata::json,
                   version = n.version, updated_at = $2
               FROM unnest($10::bytea[], $11::text[], $12::text[], $13::text[], $14::text[], $15::bigint[])
                   AS n (lead_id, name, state, disposition, metadata, version)
               WHERE l.lead_id = n.lead_id AND EXISTS (SELECT FROM moved)
               RETURNING 1
           ), logged AS (
               INSERT INTO lead_state.lead_updates
                   (project_id, update_id, log_epoch, log_sequence, log_index, logged_at, lead_id, process_id, reference_id, command, success,
                    error, error_code, from_state, to_state, disposition, version, user_id, api_key_id, warnings, data,
                    traceparent, applied_at, decided_epoch, decided_sequence, decided_index)
               SELECT n.project_id, n.update_id, n.epoch, n.log_sequence, 0, n.logged_at, n.lead_id, n.process_id, n.reference_id,
                      n.command::json, n.error IS NULL, n.error, n.error_code, n.from_state, n.to_state, n.disposition,
                      n.version, n.user_id, n.api_key_id,
                      CASE WHEN n.warnings IS NULL THEN '{}' ELSE ARRAY(SELECT json_array_elements_text(n.warnings)) END,
                      n.data::json, n.traceparent, n.applied_at, CASE WHEN n.decided_sequence IS NOT NULL THEN $8 END,
                      n.decided_sequence, CASE WHEN n.decided_sequence IS NOT NULL THEN 0 END
               FROM unnest($16::bytea[], $17::bytea[], $18::bigint[], $19::timestamptz[], $20::bytea[], $21::bytea[],
                           $22::text[], $23::text[], $24::text[], $25::text[], $26::text[], $27::text[], $28::text[],
                           $29::bigint[], $30::text[], $31::bytea[], $32::json[], $33::text[], $34::text[],
                           $35::timestamptz[], $36::int[], $37::bigint[])
                   AS n (project_id, update_id, log_sequence, logged_at, lead_id, process_id, reference_id, command, error,
                         error_code, from_state, to_state, disposition, version, user_id, api_key_id, warnings, data,
                         traceparent, applied_at, epoch, decided_sequence)
               WHERE EXISTS (SELECT FROM moved)
           )
           SELECT CASE WHEN EXISTS (SELECT FROM moved)
                       THEN lead_state.require_changed_leads((SELECT count(*) FROM changed), $38) ELSE false END AS "moved!""#,
        last.sequence as i64,
        time(now),
        time(logged_at),
        announced.epoch,
        announced.sequence as i64,
        from.stream,
        from.generation,
        from.applied.epoch,
        from.applied.sequence as i64,
        &column(leads, |lead| *lead.lead_id.as_bytes()) as _,
        &column(leads, |lead| lead.name.as_deref()) as _,
        &column(leads, |lead| lead.state.as_str()) as _,
        &column(leads, |lead| lead.disposition.as_deref()) as _,
        &column(leads, |lead| lead.metadata.get()) as _,
        &column(leads, |lead| lead.version),
        &column(rows, |row| *row.event.project_id.as_bytes()) as _,
        &column(rows, |row| *row.event.update_id.as_bytes()) as _,
        &column(rows, |row| row.update.position.sequence as i64),
        &column(rows, |row| time(row.update.logged_at)),
        &column(rows, |row| row.event.lead_id.map(|id| *id.as_bytes())) as _,
        &column(rows, |row| row.event.process_id.map(|id| *id.as_bytes())) as _,
        &column(rows, |row| row.event.reference_id.as_deref()) as _,
        &column(rows, |row| &*row.update.text) as _,
        &column(rows, |row| row.event.error.as_deref()) as _,
        &column(rows, |row| row.event.error_code.as_deref()) as _,
        &column(rows, |row| row.event.from_state.as_deref()) as _,
        &column(rows, |row| row.event.to_state.as_deref()) as _,
        &column(rows, |row| row.update.command.disposition.as_deref()) as _,
        &column(rows, |row| row.event.version) as _,
        &column(rows, |row| row.event.user_id.as_deref()) as _,
        &column(rows, |row| row.update.command.api_key_id.map(|id| *id.as_bytes())) as _,
        &warnings as _,
        &column(rows, |row| row.event.data.as_ref().map(|data| data.get())) as _,
        &column(rows, |row| row.update.traceparent.as_deref()) as _,
        &column(rows, |row| time(row.event.timestamp)),
        &column(rows, |row| row.update.position.epoch),
        &column(rows, |row| (row.decided_at != row.update.position).then_some(row.decided_at.sequence as i64)) as _,
        leads.len() as i64,
        &column(revisions, |(process, _)| *process.as_bytes()) as _,
        &column(revisions, |(_, revision)| *revision)
    )
    .fetch_one(connection)
    .await?;
    if moved { Ok(()) } else { Err(WriteError::Fenced) }
}

async fn write_calls(connection: &mut PgConnection, calls: &[(ObjectId, Vec<Call>)]) -> Result<(), StoreError> {
    let leads: Vec<_> = calls.iter().map(|(lead, _)| *lead.as_bytes()).collect();
    sqlx::query!(r#"DELETE FROM lead_state.active_calls WHERE lead_id = ANY($1::bytea[])"#, &leads as _)
        .execute(&mut *connection)
        .await?;
    let calls: Vec<_> = calls.iter().flat_map(|(lead, calls)| calls.iter().map(move |call| (lead, call))).collect();
    let leads: Vec<_> = calls.iter().map(|(lead, _)| *lead.as_bytes()).collect();
    let ids: Vec<_> = calls.iter().map(|(_, call)| call.call_id.as_str()).collect();
    let starts: Vec<_> = calls.iter().map(|(_, call)| time(call.started_at)).collect();
    let ends: Vec<_> = calls.iter().map(|(_, call)| time(call.expires_at)).collect();
    sqlx::query!(
        r#"INSERT INTO lead_state.active_calls (lead_id, call_id, started_at, expires_at)
           SELECT * FROM unnest($1::bytea[], $2::text[], $3::timestamptz[], $4::timestamptz[])"#,
        &leads as _,
        &ids as _,
        &starts,
        &ends
    )
    .execute(connection)
    .await?;
    Ok(())
}
