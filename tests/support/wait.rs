//! Waits for conditions that the services reach on their own.

use std::time::Duration;

use serde_json::Value;
use sqlx::PgPool;
use test_support::{Service, eventually};

use super::Stack;

/// How long a condition may take before a test fails. A longer time only makes a failing test slower.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// The number of deliveries that succeeded.
pub(crate) const DELIVERED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'";
/// Sessions of lead-state that wait for a lock.
pub(crate) const BLOCKED: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
/// The number of ledger rows.
pub(crate) const LEDGER_ROWS: &str = "SELECT count(*) FROM lead_state.lead_updates WHERE kind = 'update'";

/// Waits until everything in the log is applied and announced, and returns the last sequence of the log.
pub(crate) async fn wait_until_applied(client: &async_nats::Client, pool: &PgPool, deadline: Duration) -> u64 {
    let js = service_kit::nats::jetstream(client);
    eventually(deadline, "the log is applied", async || {
        let mut log = js.get_stream(contract::streams::LEAD_COMMANDS).await.map_err(|e| e.to_string())?;
        let last = log.info().await.map_err(|e| e.to_string())?.state.last_sequence;
        let (applied, announced): (i64, i64) =
            sqlx::query_as("SELECT last_sequence, announced_sequence FROM lead_state.checkpoints")
                .fetch_one(pool)
                .await
                .map_err(|e| e.to_string())?;
        let done = applied.cast_unsigned() == last && announced == applied;
        if done { Ok(last) } else { Err(format!("{applied} applied and {announced} announced of {last}")) }
    })
    .await
}

impl Stack {
    /// Waits until everything in the log is applied and announced, and returns the last sequence of the log.
    pub(crate) async fn wait_until_applied(&self) -> u64 {
        wait_until_applied(&self.client, &self.pool, TEST_TIMEOUT * 4).await
    }

    /// The number that a query returns in its only row.
    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.expect(sql)
    }

    /// Waits until a query returns this number.
    pub(crate) async fn wait_for_count(&self, sql: &'static str, expected: i64) {
        self.wait_for_count_within(TEST_TIMEOUT, sql, expected).await;
    }

    pub(crate) async fn wait_for_count_within(&self, deadline: Duration, sql: &'static str, expected: i64) {
        eventually(deadline, sql, async || {
            let count: Result<i64, _> = sqlx::query_scalar(sql).fetch_one(&self.pool).await;
            match count {
                Ok(count) if count == expected => Ok(()),
                other => Err(format!("{other:?} instead of {expected}")),
            }
        })
        .await;
    }

    /// Waits until more updates than this are in the ledger. Postgres may be unavailable in the meantime.
    pub(crate) async fn wait_for_ledger_beyond(&self, rows: i64) {
        eventually(TEST_TIMEOUT, "the load goes on", async || {
            sqlx::query_scalar::<_, i64>(LEDGER_ROWS).fetch_one(&self.pool).await.is_ok_and(|count| count > rows)
        })
        .await;
    }

    /// Waits until all services are ready.
    pub(crate) async fn wait_until_ready(&mut self) {
        self.lead_state.wait_for_http(&self.lead_state_ready, TEST_TIMEOUT).await;
        self.gateway.wait_for_http(&self.gateway_ready, TEST_TIMEOUT).await;
        self.notifier.wait_for_http(&self.notifier_ready, TEST_TIMEOUT).await;
    }

    /// Waits for an event on a subject of the webhook events.
    pub(crate) async fn wait_for_webhook_event(&self, subject: &str) -> Value {
        let stream = self.js().get_stream(contract::streams::WEBHOOK_EVENTS).await.expect("the stream");
        eventually(TEST_TIMEOUT, subject, async || {
            let event = stream.get_last_raw_message_by_subject(subject).await.map_err(|e| e.to_string())?;
            serde_json::from_slice::<Value>(&event.payload).map_err(|e| e.to_string())
        })
        .await
    }
}

/// Waits until a service ends with a failure, and returns its log.
pub(crate) async fn wait_for_failure(service: &mut Service) -> String {
    let ended = tokio::time::timeout(TEST_TIMEOUT * 2, service.exited()).await;
    let status = ended.unwrap_or_else(|_| panic!("it does not end by itself:\n{}", service.log()));
    assert_eq!(status.code(), Some(1), "{status}");
    service.log()
}

/// Another page of the health port with this `/readyz`. Returns the status and the text.
pub(crate) async fn health_page(ready: &str, page: &str) -> Result<(u16, String), String> {
    let url = ready.replace("/readyz", page);
    let answer = test_support::http_client().get(url).send().await.map_err(|e| e.to_string())?;
    let status = answer.status().as_u16();
    Ok((status, answer.text().await.map_err(|e| e.to_string())?))
}

/// Waits until a service is not ready and its health page says why.
pub(crate) async fn wait_for_unready(ready: &str, why: &str) {
    eventually(TEST_TIMEOUT, why, async || {
        let (status, text) = health_page(ready, "/readyz").await?;
        if status == 503 && text.contains(why) { Ok(()) } else { Err(format!("{status} {text}")) }
    })
    .await;
}
