//! Months that are too old are dropped, and nobody misses them; what somebody still needs stays.

use serde_json::json;
use test_support::eventually;

use crate::{
    audit::{audit, settled},
    stack::{SOON, Stack, service},
};

/// Whether a table is there.
async fn is_there(stack: &Stack, table: &str) -> bool {
    let found = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL").bind(table).fetch_one(&stack.pool).await;
    found.expect("a table or none")
}

#[tokio::test]
async fn old_months_are_dropped_but_what_is_needed() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'", 1, SOON).await;
    settled(&stack).await;
    // How far the webhook-notifier is, is noted every ten seconds.
    stack
        .wait_for_count("SELECT count(*) FROM lead_state.checkpoints WHERE delivered_sequence = last_sequence", 1, SOON)
        .await;
    for service in [&mut stack.lead_state, &mut stack.notifier] {
        assert!(service.terminate().await.success());
    }

    // Months long ago, each with an update as it was: of an older log, so that it has no place in this one. Of March 2025 it
    // was applied only now; of April it is not announced; in February a delivery is still pending.
    let months = "
        SELECT lead_state.ensure_partitions('2025-01-01', '2025-04-30');
        CREATE TEMP TABLE rows AS SELECT * FROM lead_state.lead_updates;
        CREATE TEMP TABLE told AS SELECT * FROM webhooks.deliveries;
        CREATE TEMP TABLE tries AS SELECT * FROM webhooks.every_attempt;
        UPDATE tries SET number = 2;
        DO $$
        DECLARE month int; old_id bytea;
        BEGIN
            FOR month IN 1..4 LOOP
                old_id := webhooks.id_prefix(make_timestamptz(2025, month, 15, 0, 0, 0, 'UTC')) || '\\x0000000000000001';
                UPDATE rows SET update_id = old_id, log_epoch = CASE month WHEN 4 THEN 9 ELSE 0 END, log_sequence = month,
                                applied_at = CASE month WHEN 3 THEN now() ELSE '2025-05-01Z' END;
                UPDATE told SET update_id = old_id,
                    status = CASE month WHEN 2 THEN 'pending' ELSE 'delivered' END,
                    next_attempt_at = CASE month WHEN 2 THEN now() + interval '1 day' END,
                    payload = CASE month WHEN 2 THEN '{}' END;
                UPDATE tries SET update_id = old_id;
                INSERT INTO lead_state.lead_updates SELECT * FROM rows;
                INSERT INTO webhooks.deliveries SELECT * FROM told;
                INSERT INTO webhooks.attempts SELECT * FROM tries;
            END LOOP;
        END $$;
        -- They move from the default partitions to their months.
        SELECT webhooks.ensure_partitions('2025-01-01Z', '2025-04-30Z');";
    sqlx::raw_sql(months).execute(&stack.pool).await.expect("old months");
    for month in ["lead_state.lead_updates_2025_01", "webhooks.deliveries_2025_01", "webhooks.attempts_2025_01"] {
        assert!(is_there(&stack, month).await, "{month}");
    }
    let first = "SELECT count(*) FROM webhooks.deliveries_2025_02 WHERE first_started_at <= updated_at AND first_status_code = 200";
    assert_eq!(stack.count(first).await, 1);
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.attempts_2025_02 WHERE number = 2").await, 1);

    let (mut lead_state, lead_state_ready) =
        service("lead-state", &stack.nats, &stack.postgres, &[("LEDGER_RETENTION", "100days")]);
    let (mut notifier, notifier_ready) =
        service("webhook-notifier", &stack.nats, &stack.postgres, &[("DELIVERY_RETENTION", "100days")]);
    lead_state.wait_for_http(&lead_state_ready, SOON).await;
    notifier.wait_for_http(&notifier_ready, SOON).await;
    lead_state.wait_for_log("months of the ledger were dropped", SOON).await;
    notifier.wait_for_log("months of the delivery log were dropped", SOON).await;

    for dropped in [
        "lead_state.lead_updates_2025_01",
        "lead_state.lead_updates_2025_02",
        "webhooks.deliveries_2025_01",
        "webhooks.attempts_2025_01",
        "webhooks.deliveries_2025_03",
        "webhooks.attempts_2025_03",
    ] {
        assert!(!is_there(&stack, dropped).await, "{dropped} is still there");
    }
    for kept in [
        "lead_state.lead_updates_2025_03",
        "lead_state.lead_updates_2025_04",
        "webhooks.deliveries_2025_02",
        "webhooks.attempts_2025_02",
    ] {
        assert!(is_there(&stack, kept).await, "{kept} is needed");
    }

    // What is left of the old ones was made up for this test and is no account; without it the account adds up.
    let forget = "DELETE FROM lead_state.lead_updates WHERE log_epoch <> 1;
        DELETE FROM webhooks.deliveries WHERE update_id < webhooks.id_prefix('2025-06-01Z');
        DELETE FROM webhooks.attempts WHERE update_id < webhooks.id_prefix('2025-06-01Z')";
    sqlx::raw_sql(forget).execute(&stack.pool).await.expect("no rows of before");
    let (code, found) = audit(&stack, &[]).await;
    assert_eq!(code, 0, "{found}");
    assert_eq!(stack.api.outcome(&update_id).await["status"], "succeeded");
    eventually(SOON, "the old one is said not to be kept", async || {
        let (status, body) = stack.api.get("/api/v1/updates/6786fe000000000000000001").await;
        let text = body["error"].as_str().unwrap_or_default().to_owned();
        let said = status == 404 && body["code"] == "update_not_found" && text.contains("may have been deleted");
        if said { Ok(()) } else { Err(format!("{status} {body}")) }
    })
    .await;

    // What cannot be is refused.
    let (mut refused, _) = service(
        "lead-state",
        &stack.nats,
        &stack.postgres,
        &[("LEDGER_RETENTION", "100days"), ("LOG_RETENTION", "101days")],
    );
    assert!(!refused.exited().await.success());
    assert!(refused.log().contains("LEDGER_RETENTION is shorter than LOG_RETENTION"), "{}", refused.log());
}
