//! The rate of applied updates as leads and ledger grow.

use std::time::Instant;

use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection};

use super::{MemoryUsage, Plan, apply::fill_and_drain, progress};
use crate::{
    load::lead_id,
    report::{Report, Target},
    stack::{Stack, insert_leads},
};

const NAME: &str = "scale";
/// Leads of the small stack.
const FEW: u64 = 10_000;
/// Ledger rows per lead of the large stack.
const UPDATES_PER_LEAD: u64 = 5;
/// Updates of a run per second of `--seconds`. Postgres logs a page in full at its first change after a checkpoint. In
/// a short run, every page of a million leads is logged in full; in the five minutes between two checkpoints, few
/// changes are the first of their page. So a run is long enough to change pages repeatedly.
const RATE: u64 = 35_000;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut small = Stack::start(false, FEW).await?;
    small.notifier.terminate().await;

    let (leads, updates) = (plan.size.max(FEW), plan.size * UPDATES_PER_LEAD);
    progress(&format!("{NAME}, {leads} leads and a ledger of {updates} are being inserted"));
    let start = Instant::now();
    let mut large = Stack::start(false, FEW).await?;
    large.notifier.terminate().await;
    large.lead_state.terminate().await;
    insert_leads(&large.pool, large.project_id, &[large.process_id], FEW..leads).await?;
    large.leads = leads;
    insert_ledger(&large, updates).await?;
    report.detail(NAME, json!({"leads": leads, "ledger": updates, "insertSeconds": start.elapsed().as_secs_f64()}))?;

    let (mut few, mut many, mut memory) = (vec![], vec![], MemoryUsage::default());
    for _ in plan.runs(NAME) {
        few.push(measure(&mut small, plan, report, &mut memory).await?);
        many.push(measure(&mut large, plan, report, &mut memory).await?);
    }
    let few = (format!("applied, {FEW} leads, ledger from 0 on"), few);
    let many = (format!("applied, {leads} leads, ledger from {updates} on"), many);
    report.comparison(NAME, "/s", few, many, ("applied with many, ratio to few", Target::AtLeast(0.9)));
    memory.report(NAME, report);
    Ok(())
}

/// Returns the rate of a run.
async fn measure(stack: &mut Stack, plan: &Plan, report: &mut Report, memory: &mut MemoryUsage) -> anyhow::Result<f64> {
    let drained = fill_and_drain(stack, plan.duration.as_secs() * RATE).await?;
    report.detail(NAME, json!({"leads": stack.leads, "rate": drained.rate, "usage": drained.usage}))?;
    memory.add(&drained.usage);
    Ok(drained.rate)
}

/// Inserts ledger rows that look like a day of updates to all leads, from before the log began.
async fn insert_ledger(stack: &Stack, updates: u64) -> anyhow::Result<()> {
    let prefix = lead_id(0).as_bytes()[..4].to_vec();
    // Update ids consist of the second and a number.
    let first_second = i64::from(service_kit::clock::now().unix_seconds()) - 24 * 60 * 60;
    let mut connection = stack.pool.acquire().await?;
    let indexes = drop_indexes(&mut connection, "lead_state.lead_updates").await?;
    sqlx::query(
        r#"INSERT INTO lead_state.lead_updates
               (project_id, update_id, log_epoch, log_sequence, log_index, logged_at, lead_id, process_id, command, success,
                from_state, to_state, version, user_id, warnings, data, applied_at)
           SELECT $1, substring(int8send($2 + n * 86400 / $3) FROM 5) || int8send(n), 0, n, 0, now(),
                  $4 || int8send(n * 7919 % $5), $6,
                  ('{"leadId":"' || encode($4 || int8send(n * 7919 % $5), 'hex') || '","metadata":{"tag":"' || lpad(n::text, 12, '0')
                   || '","campaign":"autumn","score":1,"note":"asked for an offer, call back on thursday afternoon"},'
                   || '"targetState":"interested","userId":"agent-0042"}')::json,
                  true, 'interested', 'followup_2', 2, 'agent-0042', '{}',
                  ('{"source":"import","city":"Berlin","tag":"' || lpad(n::text, 12, '0')
                   || '","campaign":"autumn","score":1,"note":"asked for an offer, call back on thursday afternoon"}')::json,
                  now()
           FROM generate_series(1, $3) AS n"#,
    )
    .bind(stack.project_id.as_bytes())
    .bind(first_second)
    .bind(updates.cast_signed())
    .bind(prefix)
    .bind(stack.leads.cast_signed())
    .bind(stack.process_id.as_bytes())
    .execute(&mut *connection)
    .await?;
    sqlx::query("SET maintenance_work_mem = '256MB'").execute(&mut *connection).await?;
    build_indexes(&mut connection, indexes).await?;
    sqlx::query("VACUUM ANALYZE lead_state.lead_updates").execute(&mut *connection).await?;
    // Otherwise Postgres would flush these rows during the measurement.
    sqlx::query("CHECKPOINT").execute(&mut *connection).await?;
    // Its maintenance_work_mem must not return to the pool.
    connection.close().await?;
    Ok(())
}

/// Drops the indexes of a table, but for its primary key, and returns their definitions: building them at the end is
/// several times faster than maintaining them row by row.
pub(super) async fn drop_indexes(connection: &mut PgConnection, table: &str) -> anyhow::Result<Vec<String>> {
    let indexes = sqlx::query_as::<_, (String, String)>(
        "SELECT indexrelid::regclass::text, replace(pg_get_indexdef(indexrelid), ' ON ONLY ', ' ON ') FROM pg_index
         WHERE indrelid = $1::regclass AND NOT indisprimary",
    );
    let indexes = indexes.bind(table).fetch_all(&mut *connection).await?;
    for (name, _) in &indexes {
        sqlx::query(AssertSqlSafe(format!("DROP INDEX {name}"))).execute(&mut *connection).await?;
    }
    Ok(indexes.into_iter().map(|(_, definition)| definition).collect())
}

pub(super) async fn build_indexes(connection: &mut PgConnection, definitions: Vec<String>) -> anyhow::Result<()> {
    for definition in definitions {
        sqlx::query(AssertSqlSafe(definition)).execute(&mut *connection).await?;
    }
    Ok(())
}
