//! Whether applying slows down as leads and ledger grow.

use std::time::Instant;

use serde_json::json;
use sqlx::AssertSqlSafe;

use super::{Memory, Plan, apply::fill_and_drain, progress};
use crate::{
    load::lead_id,
    report::{Report, Target, median},
    stack::{Stack, insert_leads},
};

const NAME: &str = "scale";
/// Leads at the beginning.
const FEW: u64 = 10_000;
/// Updates in the ledger per lead, when both have grown.
const UPDATES_PER_LEAD: u64 = 5;
/// Updates of a run, per second that other scenarios' runs last: half as long, or less.
const RATE: u64 = 10_000;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, FEW).await?;
    stack.notifier.terminate().await;
    let mut memory = Memory::default();
    let few = rates(&mut stack, plan, report, &mut memory, "few leads, an empty ledger").await?;

    let (leads, updates) = (plan.size.max(FEW), plan.size * UPDATES_PER_LEAD);
    progress(&format!("{NAME}, {leads} leads and a ledger of {updates} are made"));
    stack.lead_state.terminate().await;
    let begun = Instant::now();
    insert_leads(&stack.pool, stack.project_id, &[stack.process_id], FEW..leads).await?;
    stack.leads = leads;
    insert_ledger(&stack, updates).await?;
    report.detail(NAME, json!({"leads": leads, "ledger": updates, "madeIn": begun.elapsed().as_secs_f64()}))?;
    let many = rates(&mut stack, plan, report, &mut memory, "many leads, a large ledger").await?;

    let ratio = median(&many) / median(&few);
    report.figure(NAME, format!("applied, {FEW} leads, ledger from 0 on"), "/s", few, None);
    report.figure(NAME, format!("applied, {leads} leads, ledger from {updates} on"), "/s", many, None);
    report.figure(NAME, "applied with many, ratio to few", "x", vec![ratio], Target::AtLeast(0.8));
    memory.tell(NAME, report);
    Ok(())
}

async fn rates(
    stack: &mut Stack,
    plan: &Plan,
    report: &mut Report,
    memory: &mut Memory,
    what: &str,
) -> anyhow::Result<Vec<f64>> {
    let mut rates = Vec::new();
    for _ in plan.runs(&format!("{NAME}, {what}")) {
        let drained = fill_and_drain(stack, plan.lasting.as_secs() * RATE).await?;
        report.detail(NAME, json!({"leads": stack.leads, "rate": drained.rate, "taken": drained.taken}))?;
        rates.push(drained.rate);
        memory.note(&drained.taken);
    }
    Ok(rates)
}

/// Makes ledger rows of all leads, as if they had been updated through a day, one after the other, before the log began.
async fn insert_ledger(stack: &Stack, updates: u64) -> anyhow::Result<()> {
    let prefix = lead_id(0).as_bytes()[..4].to_vec();
    // The ids of updates are made of the second and a number.
    let first_second = i64::from(service_kit::clock::now().unix_seconds()) - 24 * 60 * 60;
    let mut connection = stack.pool.acquire().await?;
    // Indexes are made at the end: row by row they take several times as long.
    let indexes = sqlx::query_as::<_, (String, String)>(
        "SELECT indexrelid::regclass::text, replace(pg_get_indexdef(indexrelid), ' ON ONLY ', ' ON ') FROM pg_index
         WHERE indrelid = 'lead_state.lead_updates'::regclass AND NOT indisprimary",
    );
    let indexes = indexes.fetch_all(&mut *connection).await?;
    for (name, _) in &indexes {
        sqlx::query(AssertSqlSafe(format!("DROP INDEX {name}"))).execute(&mut *connection).await?;
    }
    sqlx::query(
        r#"INSERT INTO lead_state.lead_updates
               (project_id, update_id, epoch, log_seq, logged_at, lead_id, process_id, command, success,
                from_state, to_state, version, user_id, warnings, data, applied_at)
           SELECT $1, substring(int8send($2 + n * 86400 / $3) FROM 5) || int8send(n), 0, n, now(),
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
    for (_, definition) in indexes {
        sqlx::query(AssertSqlSafe(definition)).execute(&mut *connection).await?;
    }
    sqlx::query("VACUUM ANALYZE lead_state.lead_updates").execute(&mut *connection).await?;
    // With what was set on it.
    connection.close().await?;
    Ok(())
}
