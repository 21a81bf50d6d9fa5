//! The cost of a backlog: commands waiting in the log, and retries waiting in Postgres.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use contract::ObjectId;
use serde_json::json;

use super::{LATENCY_RUN_FACTOR, MODERATE_RATE, MemoryUsage, Plan, apply::fill_and_drain, progress};
use crate::{
    protocol::{Load, Pace},
    report::{Report, Target},
    stack::{Stack, TIMEOUT, apply_process},
};

const NAME: &str = "backlog";
/// Commands per second of a run that count as no backlog.
const SHORT: u64 = 10_000;
/// Retries of a healthy callback that fall due per second during a run.
const DUE_PER_SECOND: u64 = 20;

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    measure_commands(plan, report).await?;
    measure_retries(plan, report).await
}

async fn measure_commands(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 100_000).await?;
    stack.notifier.terminate().await;
    let (short_log, long_log) = (plan.duration.as_secs() * SHORT, plan.size / 2);
    let (mut short, mut long, mut memory) = (vec![], vec![], MemoryUsage::default());
    for _ in plan.runs(&format!("{NAME}, {long_log} commands")) {
        let few = fill_and_drain(&mut stack, short_log).await?;
        let many = fill_and_drain(&mut stack, long_log).await?;
        report.detail(NAME, json!({"short": few.rate, "long": many.rate, "usage": many.usage}))?;
        short.push(few.rate);
        long.push(many.rate);
        memory.add(&many.usage);
    }
    let what = |commands| format!("applied, {commands} commands in the log");
    let ratio = ("applied from a backlog, ratio to none", Target::AtLeast(0.9));
    report.comparison(NAME, "/s", (what(short_log), short), (what(long_log), long), ratio);
    memory.report(NAME, report);
    Ok(())
}

async fn measure_retries(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (mut none, mut many) = (RetryStack::start().await?, RetryStack::start().await?);
    progress(&format!("{NAME}, {} retries are being inserted", plan.size));
    many.insert_retries(plan.size).await?;
    for stack in [&mut none, &mut many] {
        stack.warm_up().await?;
    }
    let (mut p99_none, mut p99_many, mut delays, mut memory) = (vec![], vec![], vec![], MemoryUsage::default());
    for _ in plan.runs(&format!("{NAME}, {} retries", plan.size)) {
        p99_none.push(none.measure(plan, report, &mut memory, "no retries").await?.0);
        let (p99, delay) = many.measure(plan, report, &mut memory, &format!("{} retries", plan.size)).await?;
        p99_many.push(p99);
        delays.push(delay);
    }
    let none = (format!("at {MODERATE_RATE}/s, no retries: POST to webhook, p99"), p99_none);
    let many = (format!("at {MODERATE_RATE}/s, {} retries wait: POST to webhook, p99", plan.size), p99_many);
    report.comparison(NAME, "ms", none, many, ("p99 with retries waiting, ratio to none", Target::AtMost(1.5)));
    let what = format!("a retry that is due leaves, {} others wait: at most", plan.size);
    report.figure(NAME, what, "s", delays, Target::AtMost(2.0));
    memory.report(NAME, report);
    Ok(())
}

/// A stack with a process for retries that has two callbacks.
struct RetryStack {
    stack: Stack,
    process_id: ObjectId,
    /// Refuses connections.
    dead_callback: ObjectId,
    healthy_callback: ObjectId,
}

impl RetryStack {
    async fn start() -> anyhow::Result<Self> {
        let stack = Stack::start(false, 100_000).await?;
        let dead = format!("http://127.0.0.1:{}/", test_support::free_port());
        let healthy = format!("http://{}/healthy", stack.endpoint);
        let callbacks = json!([{"name": "dead", "url": dead}, {"name": "healthy", "url": healthy}]);
        let process = apply_process(&stack.client, stack.project_id, "retries", callbacks).await?.process;
        let [dead_callback, healthy_callback] = [0, 1].map(|index| process.callbacks[index].callback_id);
        sqlx::query("CREATE SCHEMA bench").execute(&stack.pool).await?;
        sqlx::query("CREATE TABLE bench.due (update_id bytea PRIMARY KEY, due timestamptz)")
            .execute(&stack.pool)
            .await?;
        let process_id = process.process_id.context("the applied process has no id")?;
        Ok(Self { stack, process_id, dead_callback, healthy_callback })
    }

    fn load(&self, duration: Duration) -> Load {
        Load { pace: Pace::Rate(MODERATE_RATE), ..self.stack.load(duration) }
    }

    /// Opens connections and plans statements.
    async fn warm_up(&mut self) -> anyhow::Result<()> {
        sqlx::query("CHECKPOINT").execute(&self.stack.pool).await?;
        self.stack.post_and_receive(self.load(Duration::from_secs(2))).await?;
        Ok(())
    }

    /// Returns the p99 of a run, and the longest delay of a due retry in seconds.
    async fn measure(
        &mut self,
        plan: &Plan,
        report: &mut Report,
        memory: &mut MemoryUsage,
        what: &str,
    ) -> anyhow::Result<(f64, f64)> {
        let duration = plan.duration * LATENCY_RUN_FACTOR;
        self.insert_due_retries(duration).await?;
        let meter = self.stack.meter();
        let (posted, received) = self.stack.post_and_receive_all(self.load(duration)).await?;
        let (usage, _) = meter.stop();
        let delay = self.longest_delay().await?;
        report.detail(
            NAME,
            json!({"waiting": what, "posted": posted, "received": received, "delay": delay, "usage": usage}),
        )?;
        memory.add(&usage);
        Ok((received.latency.p99, delay))
    }

    /// Inserts deliveries to the dead callback that failed once: every other one is due, the rest within a day.
    async fn insert_retries(&mut self, count: u64) -> anyhow::Result<()> {
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
        .bind(self.dead_callback.as_bytes())
        .bind(self.stack.project_id.as_bytes())
        .bind(self.process_id.as_bytes())
        .bind(count.cast_signed())
        .execute(&self.stack.pool)
        .await
        .context("cannot insert retries")?;
        sqlx::query("VACUUM ANALYZE webhooks.deliveries").execute(&self.stack.pool).await?;
        self.stack.restart(|stack| &mut stack.notifier).await;
        Ok(())
    }

    /// Inserts retries of the healthy callback that fall due one after the other during this time.
    async fn insert_due_retries(&self, duration: Duration) -> anyhow::Result<()> {
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
        .bind(self.healthy_callback.as_bytes())
        .bind(self.stack.project_id.as_bytes())
        .bind(self.process_id.as_bytes())
        .bind(DUE_PER_SECOND.cast_signed())
        .bind(duration.as_secs().cast_signed())
        .execute(&self.stack.pool)
        .await
        .context("cannot insert due retries")?;
        Ok(())
    }

    /// Waits until every due retry has been sent; returns the longest delay in seconds.
    async fn longest_delay(&self) -> anyhow::Result<f64> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let (waiting, delay): (i64, f64) = sqlx::query_as(
                "SELECT count(*) FILTER (WHERE a.started_at IS NULL),
                        coalesce(max(extract(epoch FROM a.started_at - d.due)), 0)::float8
                 FROM bench.due d LEFT JOIN webhooks.attempts a USING (update_id)",
            )
            .fetch_one(&self.stack.pool)
            .await?;
            if waiting == 0 {
                return Ok(delay);
            }
            ensure!(Instant::now() < deadline, "{waiting} due retries have not been sent");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
