//! What a backlog costs: commands that wait in the log, and retries that wait in Postgres.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use contract::ObjectId;
use serde_json::json;

use super::{CALM, LONGER, Memory, Plan, apply::fill_and_drain, progress};
use crate::{
    load::{Load, Pace},
    report::{Report, Target, ratios},
    stack::{Stack, apply},
};

const NAME: &str = "backlog";
/// Updates, per second that a run is to last, that count as no backlog.
const SHORT: u64 = 10_000;
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

async fn retries(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (mut none, mut many) = (Waiting::start().await?, Waiting::start().await?);
    progress(&format!("{NAME}, {} retries are made", plan.size));
    many.make_retries(plan.size).await?;
    for waiting in [&mut none, &mut many] {
        waiting.warm_up().await?;
    }
    let (mut p99_none, mut p99_many, mut lates) = (vec![], vec![], vec![]);
    let mut memory = Memory::default();
    for _ in plan.runs(&format!("{NAME}, {} retries", plan.size)) {
        p99_none.push(none.measure(plan, report, &mut memory, "no retries").await?.0);
        let (p99, late) = many.measure(plan, report, &mut memory, &format!("{} retries", plan.size)).await?;
        p99_many.push(p99);
        lates.push(late);
    }
    let ratios = ratios(&p99_many, &p99_none);
    report.figure(NAME, format!("at {CALM}/s, no retries: POST to webhook, p99"), "ms", p99_none, None);
    let what = format!("at {CALM}/s, {} retries wait: POST to webhook, p99", plan.size);
    report.figure(NAME, what, "ms", p99_many, None);
    report.figure(NAME, "p99 with retries waiting, ratio to none", "x", ratios, Target::AtMost(1.5));
    let what = format!("a retry that is due leaves, {} others wait: at most", plan.size);
    report.figure(NAME, what, "s", lates, Target::AtMost(2.0));
    memory.tell(NAME, report);
    Ok(())
}

/// A stack in which retries may wait, and of which callbacks.
struct Waiting {
    stack: Stack,
    process_id: ObjectId,
    /// Nobody listens there.
    dead: ObjectId,
    /// Takes everything.
    well: ObjectId,
}

impl Waiting {
    async fn start() -> anyhow::Result<Self> {
        let stack = Stack::start(false, 100_000).await?;
        let dead = format!("http://127.0.0.1:{}/", test_support::free_port());
        let well = format!("http://{}/well", stack.endpoint);
        let callbacks = json!([{"name": "dead", "url": dead}, {"name": "well", "url": well}]);
        let process = apply(&stack.client, stack.project_id, "waiting", callbacks).await?.process;
        let [dead, well] = [0, 1].map(|place| process.callbacks[place].callback_id);
        sqlx::query("CREATE SCHEMA bench").execute(&stack.pool).await?;
        sqlx::query("CREATE TABLE bench.due (update_id bytea PRIMARY KEY, due timestamptz)")
            .execute(&stack.pool)
            .await?;
        Ok(Self { stack, process_id: process.process_id.context("a process without an id")?, dead, well })
    }

    fn load(&self, lasting: Duration) -> Load {
        Load { pace: Pace::Rate(CALM), ..self.stack.load(lasting) }
    }

    /// Connections are made and statements planned once.
    async fn warm_up(&mut self) -> anyhow::Result<()> {
        sqlx::query("CHECKPOINT").execute(&self.stack.pool).await?;
        let posted = self.stack.driver.post(self.load(Duration::from_secs(2))).await?;
        self.stack.driver.received(posted.accepted, PATIENCE).await?;
        Ok(())
    }

    /// The p99 of a run, and how late the latest retry left, in seconds.
    async fn measure(
        &mut self,
        plan: &Plan,
        report: &mut Report,
        memory: &mut Memory,
        what: &str,
    ) -> anyhow::Result<(f64, f64)> {
        let lasting = plan.lasting * LONGER;
        self.stack.driver.reset().await?;
        self.make_due(lasting).await?;
        let meter = self.stack.meter();
        let posted = self.stack.driver.post(self.load(lasting)).await?;
        let received = self.stack.driver.received(posted.accepted, PATIENCE).await?;
        let (taken, _) = meter.stop();
        ensure!(received.updates == posted.accepted, "{received:?} of {posted:?}");
        let late = self.latest().await?;
        report.detail(
            NAME,
            json!({"waiting": what, "posted": posted, "received": received, "late": late, "taken": taken}),
        )?;
        memory.note(&taken);
        Ok((received.latency.p99, late))
    }

    /// Makes deliveries that failed once and wait for a dead endpoint: every other one due, the rest within a day.
    async fn make_retries(&mut self, count: u64) -> anyhow::Result<()> {
        self.stack.notifier.terminate().await;
        sqlx::query(
            r#"INSERT INTO webhooks.deliveries
                   (update_id, callback_id, project_id, process_id, status, attempts, next_attempt_at, created_at, updated_at,
                    last_error, payload)
               SELECT webhooks.id_prefix(now() - interval '1 minute') || int8send(n), $1, $2, $3, 'pending', 1,
                      CASE n % 2 WHEN 0 THEN now() ELSE now() + interval '1 day' * n / $4 END, now(), now(),
                      'cannot connect', '{"data": "' || repeat('x', 300) || '"}'
               FROM generate_series(1, $4) AS n"#,
        )
        .bind(self.dead.as_bytes())
        .bind(self.stack.project_id.as_bytes())
        .bind(self.process_id.as_bytes())
        .bind(count.cast_signed())
        .execute(&self.stack.pool)
        .await
        .context("cannot make retries")?;
        sqlx::query("VACUUM ANALYZE webhooks.deliveries").execute(&self.stack.pool).await?;
        self.stack.restart(|stack| &mut stack.notifier).await;
        Ok(())
    }

    /// Makes deliveries of the callback that is well again: they fall due one after the other for so long.
    async fn make_due(&self, lasting: Duration) -> anyhow::Result<()> {
        sqlx::query("TRUNCATE bench.due").execute(&self.stack.pool).await?;
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
        .bind(self.well.as_bytes())
        .bind(self.stack.project_id.as_bytes())
        .bind(self.process_id.as_bytes())
        .bind(DUE.cast_signed())
        .bind(lasting.as_secs().cast_signed())
        .execute(&self.stack.pool)
        .await
        .context("cannot make retries that fall due")?;
        Ok(())
    }

    /// Waits until what fell due has left; by how many seconds the latest was late.
    async fn latest(&self) -> anyhow::Result<f64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (waiting, late): (i64, f64) = sqlx::query_as(
                "SELECT count(*) FILTER (WHERE a.started_at IS NULL),
                        coalesce(max(extract(epoch FROM a.started_at - d.due)), 0)::float8
                 FROM bench.due d LEFT JOIN webhooks.attempts a USING (update_id)",
            )
            .fetch_one(&self.stack.pool)
            .await?;
            if waiting == 0 {
                return Ok(late);
            }
            ensure!(Instant::now() < deadline, "{waiting} retries that are due have not left");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
