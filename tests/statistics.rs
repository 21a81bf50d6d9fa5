//! Statistics: exact counts of updates, attempts and deliveries.

use contract::{ObjectId, rpc::EnableCallback};
use serde_json::{Value, json};

use crate::support::{Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, process_id};

fn total(items: &Value, field: &str) -> i64 {
    items.as_array().expect("a list").iter().map(|item| item[field].as_i64().expect("a number")).sum()
}

/// A system with a callback that accepts everything, and one that refuses everything.
struct Counted {
    stack: Stack,
    process_id: ObjectId,
    lead: String,
    crm: ObjectId,
    dead: ObjectId,
}

impl Counted {
    async fn start() -> Self {
        let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms")]).await;
        stack.receiver.on("/dead", [500]);
        let applied = stack.process_calling(&["crm", "dead"]).await;
        let [crm, dead] = [0, 1].map(|place: usize| applied.process.callbacks[place].callback_id);
        let process_id = process_id(&applied);
        let lead = stack.api.initiate(process_id, None).await;
        Self { stack, process_id, lead, crm, dead }
    }

    /// Sends three updates that succeed, one of them twice, and one that fails. Returns the id of the last one.
    async fn send_updates(&self) -> String {
        let Self { stack, lead, .. } = self;
        let repeated =
            json!({"updateId": ObjectId::new(service_kit::clock::now(), [7; 8]), "leadId": lead, "name": "Ada"});
        for _ in 0..2 {
            stack.publish_update(&repeated).await;
        }
        stack.api.update_and_wait(json!({"leadId": lead, "metadata": {"n": 1}})).await;
        stack.api.update(json!({"leadId": lead, "targetState": "nowhere"})).await;
        let last = stack.api.update_and_wait(json!({"leadId": lead, "metadata": {"n": 2}})).await;
        last["updateId"].as_str().expect("an id").to_owned()
    }

    async fn updates(&self) -> Vec<(String, String, i64)> {
        let select = "SELECT kind, code, sum(updates)::bigint FROM lead_state.update_counts
                      WHERE project_id = $1 AND process_id = $2 GROUP BY 1, 2 ORDER BY 1, 2";
        let counts = sqlx::query_as(select)
            .bind(self.stack.api.project_id.as_bytes())
            .bind(self.process_id.as_bytes())
            .fetch_all(&self.stack.pool);
        counts.await.expect("counts")
    }

    /// The delivered and failed attempts, and exhaustions, of a callback.
    async fn deliveries(&self, callback: ObjectId) -> (i64, i64, i64) {
        let select =
            "SELECT coalesce(sum(delivered_100ms + delivered_1s + delivered_10s + delivered_longer), 0)::bigint,
                             coalesce(sum(failed), 0)::bigint, coalesce(sum(exhausted), 0)::bigint
                      FROM webhooks.delivery_counts WHERE callback_id = $1 AND kind = 'update'";
        let counts = sqlx::query_as(select).bind(callback.as_bytes()).fetch_one(&self.stack.pool);
        counts.await.expect("counts")
    }
}

const EXHAUSTED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted'";
const EXHAUSTED_TWICE: &str =
    "SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted' AND cardinality(exhausted_at) = 2";

#[tokio::test]
async fn every_update_is_counted_once_by_its_outcome() {
    let counted = Counted::start().await;

    counted.send_updates().await;

    counted.stack.wait_until_applied().await;
    let expected = [("", 3), ("unknown_state", 1)].map(|(code, updates)| ("update".into(), code.into(), updates));
    assert_eq!(counted.updates().await, expected);
    counted.stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn every_attempt_and_exhausted_delivery_is_counted_once() {
    let counted = Counted::start().await;
    let Counted { stack, crm, dead, .. } = &counted;

    let last = counted.send_updates().await;

    stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
    stack.wait_for_count(EXHAUSTED, 4).await;
    stack.wait_for_clean_audit().await;
    assert_eq!((counted.deliveries(*crm).await, counted.deliveries(*dead).await), ((4, 0, 0), (0, 8, 4)));

    // Enabling the callback closes its circuit breaker.
    let callback = format!("/api/v1/processes/{}/callbacks/{dead}", counted.process_id);
    assert_ok(stack.api.post(&format!("{callback}/enable"), &json!({})).await);
    assert_ok(stack.api.post(&format!("/api/v1/deliveries/{last}-{dead}/redeliver"), &json!({})).await);

    stack.wait_for_count(EXHAUSTED_TWICE, 1).await;
    stack.wait_for_clean_audit().await;
    assert_eq!(counted.deliveries(*dead).await, (0, 10, 5));
}

#[tokio::test]
async fn statistics_are_read_over_http_and_by_leadctl() {
    let counted = Counted::start().await;
    let Counted { stack, crm, dead, process_id, .. } = &counted;
    counted.send_updates().await;
    stack.wait_for_count(EXHAUSTED, 4).await;
    stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    let stats = async |query: &str| assert_ok(stack.api.get(&format!("/api/v1/stats{query}")).await)["data"].take();
    let all = stats("").await;
    assert_includes(&all, json!({"step": "hour", "by": null}));
    assert_eq!((total(&all["updates"], "succeeded"), total(&all["updates"], "failed")), (3, 1), "{all}");
    let counts = ["delivered", "failed", "exhausted"].map(|field| total(&all["deliveries"], field));
    assert_eq!(counts, [4, 8, 4], "{all}");
    let by_code = stats("?step=minute&by=code").await;
    let failed = by_code["updates"].as_array().expect("a list").iter().find(|counts| counts["failed"] == 1);
    assert_eq!(failed.expect("a failure")["group"], "unknown_state", "{by_code}");
    let by_callback = stats("?step=day&by=callback").await;
    for (callback, delivered, failed) in [(crm, 4, 0), (dead, 0, 8)] {
        let deliveries = by_callback["deliveries"].as_array().expect("a list");
        let own: Value = deliveries.iter().filter(|counts| counts["group"] == json!(callback)).cloned().collect();
        assert_eq!((total(&own, "delivered"), total(&own, "failed")), (delivered, failed), "{by_callback}");
    }
    assert_refused(stack.api.get("/api/v1/stats?from=2026-01-01T00:00:00Z").await, 400, "invalid_field");

    let project = stack.api.project_id.to_string();
    let table = stack.leadctl(&["stats", "--project", &project, "--by", "process"]).await.assert_ok();
    assert!(table.stdout.contains(&process_id.to_string()), "{}", table.stdout);
    let args = ["stats", "--project", &project, "--from", "1h", "--step", "minute", "--json"];
    let printed = stack.leadctl(&args).await.assert_ok().json();
    assert_eq!(total(&printed["updates"], "succeeded"), 3, "{printed}");
}

#[tokio::test]
async fn deliveries_of_a_disabled_ordered_callback_wait_and_are_counted_when_they_are_sent() {
    let stack = Stack::start().await;
    stack.receiver.on("/ordered", [410, 200]);
    let callbacks = json!([{"name": "ordered", "url": stack.receiver.url("/ordered"), "ordering": "lead"}]);
    let applied = stack.process(callbacks).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.api.update_and_wait(json!({"leadId": lead, "name": "Ada"})).await;
    stack.wait_for_count(EXHAUSTED, 1).await;

    stack.api.update_and_wait(json!({"leadId": lead, "name": "Grace"})).await;

    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'", 1).await;
    stack.call(&EnableCallback { callback_id: applied.process.callbacks[0].callback_id }).await;
    stack.wait_for_clean_audit().await;
    let counted = "SELECT (sum(exhausted) * 10 + sum(delivered_100ms + delivered_1s + delivered_10s))::bigint
                   FROM webhooks.delivery_counts";
    assert_eq!(stack.count(counted).await, 11);
}
