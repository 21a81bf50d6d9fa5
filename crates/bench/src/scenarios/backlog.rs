//! What a backlog costs: commands that wait in the log, and retries that wait in Postgres.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use contract::ObjectId;
use serde_json::json;

use super::{Memory, Plan, apply::fill_and_drain, progress};
use crate::{
    load::{Load, Pace},
    report::{Report, Target, median, ratios},
    stack::{Stack, apply},
};

const NAME: &str = "backlog";
/// Updates, per second that a run is to last, that count as no backlog.
const SHORT: u64 = 10_000;
/// New updates a second while retries wait.
const RATE: u32 = 1000;
/// Retries of a callback that is well again, that fall due each second meanwhile.
const DUE: u64 = 20;
/// How long anything may take that has no target.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    commands(plan, report).await?;
    retries(plan, report).await
}

async fn commands(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 100_000).await?;
    stack.notifier.terminate().await;
    let (mut short, mut long, mut memory) = (vec![], vec![], Memory::default());
    for _ in plan.runs(&format!("{NAME}, {} commands", plan.size)) {
        let few = fill_and_drain(&mut stack, plan.lasting.as_secs() * SHORT).await?;
        let many = fill_and_drain(&mut stack, plan.size).await?;
        report.detail(NAME, json!({"short": few.rate, "long": many.rate, "taken": many.taken}))?;
        short.push(few.rate);
        long.push(many.rate);
        memory.note(&many.taken);
    }
    let ratios = ratios(&long, &short);
    report.figure(NAME, format!("applied, {} commands in the log", plan.lasting.as_secs() * SHORT), "/s", short, None);
    report.figure(NAME, format!("applied, {} commands in the log", plan.size), "/s", long, None);
    report.figure(NAME, "applied from a backlog, ratio to none", "x", ratios, Target::AtLeast(0.9));
    memory.tell(NAME, report);
    Ok(())
}

/// The callbacks that have retries waiting.
struct Waiting {
    process_id: ObjectId,
    /// Nobody listens there.
    dead: ObjectId,
    /// Takes everything.
    well: ObjectId,
}

async fn retries(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 100_000).await?;
    let dead = format!("http://127.0.0.1:{}/", test_support::free_port());
    let well = format!("http://{}/well", stack.endpoint);
    let callbacks = json!([{"name": "dead", "url": dead}, {"name": "well", "url": well}]);
    let process = apply(&stack.client, stack.project_id, "waiting", callbacks).await?.process;
    let [dead, well] = [0, 1].map(|place| process.callbacks[place].callback_id);
    let waiting = Waiting { process_id: process.process_id.context("a process without an id")?, dead, well };
    sqlx::query("CREATE SCHEMA bench").execute(&stack.pool).await?;
    sqlx::query("CREATE TABLE bench.due (update_id bytea PRIMARY KEY, due timestamptz)").execute(&stack.pool).await?;

    let (mut with_none, mut with_many) = (Measured::default(), Measured::default());
    with_none.measure(&mut stack, plan, report, &waiting, "no retries").await?;
    progress(&format!("{NAME}, {} retries are made", plan.size));
    stack.notifier.terminate().await;
    make_retries(&stack, &waiting, plan.size).await?;
    stack.restart(|stack| &mut stack.notifier).await;
    with_many.measure(&mut stack, plan, report, &waiting, &format!("{} retries", plan.size)).await?;

    let ratio = median(&with_many.p99) / median(&with_none.p99);
    report.figure(NAME, format!("at {RATE}/s, no retries: POST to webhook, p99"), "ms", with_none.p99, None);
    let what = format!("at {RATE}/s, {} retries wait: POST to webhook, p99", plan.size);
    report.figure(NAME, what, "ms", with_many.p99, None);
    report.figure(NAME, "p99 with retries waiting, ratio to none", "x", vec![ratio], Target::AtMost(1.5));
    let what = format!("a retry that is due leaves, {} others wait: at most", plan.size);
    report.figure(NAME, what, "s", with_many.late, Target::AtMost(2.0));
    with_many.memory.tell(NAME, report);
    Ok(())
}

/// What was seen while some retries, or none, waited.
#[derive(Default)]
struct Measured {
    p99: Vec<f64>,
    /// How late the latest retry left, in seconds.
    late: Vec<f64>,
    memory: Memory,
}

impl Measured {
    async fn measure(
        &mut self,
        stack: &mut Stack,
        plan: &Plan,
        report: &mut Report,
        waiting: &Waiting,
        what: &str,
    ) -> anyhow::Result<()> {
        let load = |lasting| Load { pace: Pace::Rate(RATE), ..stack.load(lasting) };
        let (warm, load) = (load(Duration::from_secs(2)), load(plan.lasting));
        stack.driver.reset().await?;
        let posted = stack.driver.post(warm).await?;
        stack.driver.received(posted.accepted, PATIENCE).await?;
        for _ in plan.runs(&format!("{NAME}, {what}")) {
            stack.driver.reset().await?;
            make_due(stack, waiting, plan.lasting).await?;
            let meter = stack.meter();
            let posted = stack.driver.post(load.clone()).await?;
            let received = stack.driver.received(posted.accepted, PATIENCE).await?;
            let (taken, _) = meter.stop();
            ensure!(received.updates == posted.accepted, "{received:?} of {posted:?}");
            let late = latest(stack).await?;
            report.detail(
                NAME,
                json!({"waiting": what, "posted": posted, "received": received, "late": late, "taken": taken}),
            )?;
            self.p99.push(received.latency.p99);
            self.late.push(late);
            self.memory.note(&taken);
        }
        Ok(())
    }
}

/// Makes deliveries that failed once and wait for a dead endpoint: every other one due, the rest within a day.
async fn make_retries(stack: &Stack, waiting: &Waiting, count: u64) -> anyhow::Result<()> {
    sqlx::query(
        r#"INSERT INTO webhooks.deliveries
               (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at, created_at, updated_at,
                last_error, payload)
           SELECT webhooks.id_prefix(now() - interval '1 minute') || int8send(n), $1, $2, $3, 'pending', 1,
                  CASE n % 2 WHEN 0 THEN now() ELSE now() + interval '1 day' * n / $4 END, now(), now(),
                  'cannot connect', '{"data": "' || repeat('x', 300) || '"}'
           FROM generate_series(1, $4) AS n"#,
    )
    .bind(waiting.dead.as_bytes())
    .bind(stack.project_id.as_bytes())
    .bind(waiting.process_id.as_bytes())
    .bind(count.cast_signed())
    .execute(&stack.pool)
    .await
    .context("cannot make retries")?;
    sqlx::query("VACUUM ANALYZE webhooks.deliveries").execute(&stack.pool).await?;
    sqlx::query("CHECKPOINT").execute(&stack.pool).await?;
    Ok(())
}

/// Makes deliveries of the callback that is well again: they fall due one after the other for so long.
async fn make_due(stack: &Stack, waiting: &Waiting, lasting: Duration) -> anyhow::Result<()> {
    sqlx::query("TRUNCATE bench.due").execute(&stack.pool).await?;
    sqlx::query(
        r#"WITH due AS (
               INSERT INTO bench.due
               SELECT webhooks.id_prefix(now()) || int8send(n), now() + n * interval '1 s' / $4
               FROM generate_series(1, $4 * $5) AS n
               RETURNING update_id, due)
           INSERT INTO webhooks.deliveries
               (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at, created_at, updated_at, payload)
           SELECT update_id, $1, $2, $3, 'pending', 1, due, now(), now(), '{"data": null}' FROM due"#,
    )
    .bind(waiting.well.as_bytes())
    .bind(stack.project_id.as_bytes())
    .bind(waiting.process_id.as_bytes())
    .bind(DUE.cast_signed())
    .bind(lasting.as_secs().cast_signed())
    .execute(&stack.pool)
    .await
    .context("cannot make retries that fall due")?;
    Ok(())
}

/// Waits until what fell due has left; by how many seconds the latest was late.
async fn latest(stack: &Stack) -> anyhow::Result<f64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (waiting, late): (i64, f64) = sqlx::query_as(
            "SELECT count(*) FILTER (WHERE a.started_at IS NULL),
                    coalesce(max(extract(epoch FROM a.started_at - d.due)), 0)::float8
             FROM bench.due d LEFT JOIN webhooks.attempts a USING (update_id)",
        )
        .fetch_one(&stack.pool)
        .await?;
        if waiting == 0 {
            return Ok(late);
        }
        ensure!(Instant::now() < deadline, "{waiting} retries that are due have not left");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
