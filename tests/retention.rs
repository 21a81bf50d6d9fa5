//! Partitions of months beyond the retention are dropped, unless a row in them is still needed.

use contract::streams::LEAD_COMMANDS;
use serde_json::json;
use test_support::eventually;

use crate::support::{DELIVERED, Stack, TEST_TIMEOUT, service};

/// Creates four months of 2025, each with a copy of the one update. Their positions are those of an older log, because
/// this log does not contain them. In February a delivery is pending, the update of March was applied just now, and the
/// update of April is not announced.
const OLD_MONTHS: &str = "
    SELECT lead_state.ensure_partitions('2025-01-01', '2025-04-30');
    CREATE TEMP TABLE rows AS SELECT * FROM lead_state.lead_updates;
    CREATE TEMP TABLE sent AS SELECT * FROM webhooks.deliveries;
    CREATE TEMP TABLE attempts AS SELECT * FROM webhooks.every_attempt;
    UPDATE attempts SET number = 2;
    DO $$
    DECLARE month int; old_id bytea;
    BEGIN
        FOR month IN 1..4 LOOP
            old_id := webhooks.id_prefix(make_timestamptz(2025, month, 15, 0, 0, 0, 'UTC')) || '\\x0000000000000001';
            UPDATE rows SET update_id = old_id, log_epoch = CASE month WHEN 4 THEN 9 ELSE 0 END, log_sequence = month,
                            applied_at = CASE month WHEN 3 THEN now() ELSE '2025-05-01Z' END;
            UPDATE sent SET update_id = old_id,
                status = CASE month WHEN 2 THEN 'pending' ELSE 'delivered' END,
                next_attempt_at = CASE month WHEN 2 THEN now() + interval '1 day' END,
                payload = CASE month WHEN 2 THEN '{}' END;
            UPDATE attempts SET update_id = old_id;
            INSERT INTO lead_state.lead_updates SELECT * FROM rows;
            INSERT INTO webhooks.deliveries SELECT * FROM sent;
            INSERT INTO lead_state.update_counts
                VALUES ('', make_timestamptz(2025, month, 15, 0, 0, 0, 'UTC'), '', '', '', make_date(2025, month, 1), 1);
            INSERT INTO webhooks.delivery_counts
                VALUES ('', make_timestamptz(2025, month, 15, 0, 0, 0, 'UTC'), '', '', make_date(2025, month, 1), 1, '',
                        1, 0, 0, 0, 0, 0);
            INSERT INTO webhooks.attempts SELECT * FROM attempts;
        END LOOP;
    END $$;
    -- They move from the default partitions to their months.
    SELECT webhooks.ensure_partitions('2025-01-01Z', '2025-04-30Z');";

async fn exists(stack: &Stack, table: &str) -> bool {
    let found = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL").bind(table).fetch_one(&stack.pool).await;
    found.expect("a table or none")
}

/// A stack with one delivered update and old months, and the id of the update. The services that drop months are
/// stopped.
async fn with_old_months() -> (Stack, String) {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.wait_for_count(DELIVERED, 1).await;
    stack.wait_for_clean_audit().await;
    let all_delivered = "SELECT count(*) FROM lead_state.checkpoints WHERE delivered_sequence = last_sequence";
    stack.wait_for_count(all_delivered, 1).await;
    for service in [&mut stack.lead_state, &mut stack.notifier] {
        assert!(service.terminate().await.success());
    }
    stack.sql(OLD_MONTHS).await;
    for month in ["lead_state.lead_updates_2025_01", "webhooks.deliveries_2025_01", "webhooks.attempts_2025_01"] {
        assert!(exists(&stack, month).await, "{month}");
    }
    let first = "SELECT count(*) FROM webhooks.deliveries_2025_02 WHERE first_started_at <= updated_at AND first_status_code = 200";
    assert_eq!(stack.count(first).await, 1);
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.attempts_2025_02 WHERE number = 2").await, 1);
    (stack, update_id)
}

#[tokio::test]
async fn old_months_are_dropped_unless_a_row_is_still_needed() {
    let (stack, update_id) = with_old_months().await;

    let ledger = [("LEDGER_RETENTION", "100days")];
    let (mut lead_state, lead_state_ready) = service("lead-state", &stack.nats, &stack.postgres, &ledger);
    let deliveries = [("DELIVERY_RETENTION", "100days")];
    let (mut notifier, notifier_ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &deliveries);
    lead_state.wait_for_http(&lead_state_ready, TEST_TIMEOUT).await;
    notifier.wait_for_http(&notifier_ready, TEST_TIMEOUT).await;
    lead_state.wait_for_log("months of the ledger were dropped", TEST_TIMEOUT).await;
    notifier.wait_for_log("dropped months of the delivery log", TEST_TIMEOUT).await;

    for (table, dropped, kept) in [
        ("lead_state.lead_updates", ["01", "02"], &["03", "04"][..]),
        ("webhooks.deliveries", ["01", "03"], &["02"]),
        ("webhooks.attempts", ["01", "03"], &["02"]),
    ] {
        for month in dropped {
            assert!(!exists(&stack, &format!("{table}_2025_{month}")).await, "{table} of {month} still exists");
        }
        for month in kept {
            assert!(exists(&stack, &format!("{table}_2025_{month}")).await, "{table} of {month} is needed");
        }
    }
    // Counts are deleted with the rows that they count.
    for (counts, kept) in [
        ("SELECT count(*) FROM lead_state.update_counts WHERE minute < '2026-01-01Z'", 2),
        ("SELECT count(*) FROM webhooks.delivery_counts WHERE minute < '2026-01-01Z'", 1),
    ] {
        stack.wait_for_count(counts, kept).await;
    }
    assert_eq!(stack.api.outcome(&update_id).await["status"], "succeeded");
    eventually(TEST_TIMEOUT, "an old update is reported as no longer kept", async || {
        let (status, body) = stack.api.get("/api/v1/updates/6786fe000000000000000001").await;
        let text = body["error"].as_str().unwrap_or_default().to_owned();
        let gone = status == 404 && body["code"] == "update_not_found" && text.contains("may have been deleted");
        if gone { Ok(()) } else { Err(format!("{status} {body}")) }
    })
    .await;
    // The audit is clean after the rows that this test invented are deleted.
    let forget = "DELETE FROM lead_state.lead_updates WHERE log_epoch <> 1;
        DELETE FROM lead_state.update_counts WHERE minute < '2026-01-01Z';
        DELETE FROM webhooks.delivery_counts WHERE minute < '2026-01-01Z';
        DELETE FROM webhooks.deliveries WHERE update_id < webhooks.id_prefix('2025-06-01Z');
        DELETE FROM webhooks.attempts WHERE update_id < webhooks.id_prefix('2025-06-01Z')";
    stack.sql(forget).await;
    let (code, report) = stack.audit(&[]).await;
    assert_eq!(code, 0, "{report}");
}

/// The months of the ledger from 2025 on, and the only update in June 2025.
const UPDATE_IN_JUNE: &str = "
    SELECT lead_state.ensure_partitions('2025-01-01', now()::date);
    UPDATE lead_state.leads SET created_at = '2025-06-10Z';
    UPDATE lead_state.lead_updates SET logged_at = '2025-06-15Z', applied_at = '2025-06-15Z',
        update_id = webhooks.id_prefix('2025-06-15Z') || '\\x0000000000000001';
    UPDATE webhooks.deliveries SET update_id = webhooks.id_prefix('2025-06-15Z') || '\\x0000000000000001';
    DELETE FROM lead_state.update_counts;
    DELETE FROM webhooks.delivery_counts";

#[tokio::test]
async fn a_month_that_is_dropped_while_an_audit_starts_causes_no_false_alarm() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.wait_for_count(DELIVERED, 1).await;
    stack.wait_for_clean_audit().await;
    for service in [&mut stack.lead_state, &mut stack.notifier] {
        assert!(service.terminate().await.success());
    }
    stack.sql(UPDATE_IN_JUNE).await;
    stack.js().get_stream(LEAD_COMMANDS).await.expect("the log").purge().await.expect("an empty log");

    let mut dropping = stack.pool.begin().await.expect("a transaction");
    let lock = "LOCK TABLE lead_state.lead_updates IN ACCESS EXCLUSIVE MODE";
    sqlx::raw_sql(lock).execute(&mut *dropping).await.expect("a lock");
    let drop_month = async {
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'leadctl' AND wait_event_type = 'Lock'";
        stack.wait_for_count(waiting, 1).await;
        let drop = "DROP TABLE lead_state.lead_updates_2025_06";
        sqlx::raw_sql(drop).execute(&mut *dropping).await.expect("dropped");
        dropping.commit().await.expect("committed");
    };
    let ((code, report), ()) = tokio::join!(stack.audit(&[]), drop_month);

    assert_eq!(code, 0, "{report}");
    let unchecked = report["unchecked"].as_array().expect("unchecked");
    assert!(unchecked.iter().any(|of| of["invariant"] == "lead_differs" && of["count"] == 1), "{report}");
}

#[tokio::test]
async fn deliveries_held_for_longer_than_the_retention_are_exhausted_visibly() {
    let (stack, _) = with_old_months().await;
    stack
        .sql("INSERT INTO webhooks.paused_callbacks SELECT DISTINCT callback_id, now() FROM webhooks.deliveries")
        .await;

    let deliveries = [("DELIVERY_RETENTION", "100days")];
    let (mut notifier, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &deliveries);
    notifier.wait_for_http(&ready, TEST_TIMEOUT).await;

    // The month of the delivery may be dropped right afterwards.
    notifier.wait_for_log("exhausted deliveries that waited for their callback", TEST_TIMEOUT).await;
    let event = stack.wait_for_webhook_event(&format!("webhooks.evt.{}.*.exhausted", stack.api.project_id)).await;
    let error = "not sent: its callback could not be called before its month of the delivery log expired";
    let id = event["updateId"].as_str().unwrap_or_default();
    assert!(id.starts_with("67afd") && event["error"] == error, "{event}");
}

#[tokio::test]
async fn a_ledger_retention_shorter_than_that_of_the_log_is_refused_at_the_start() {
    let (nats, postgres) = tokio::join!(test_support::nats(), test_support::postgres());
    let extra = [("LEDGER_RETENTION", "100days"), ("LOG_RETENTION", "101days")];

    let (mut refused, _) = service("lead-state", &nats, &postgres, &extra);

    assert!(!refused.exited().await.success());
    assert!(refused.log().contains("LEDGER_RETENTION is shorter than LOG_RETENTION"), "{}", refused.log());
}
