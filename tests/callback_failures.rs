//! The failures of a callback: grouped by status and error, each with a sample.

use contract::ObjectId;
use serde_json::{Value, json};
use test_support::Reply;

use crate::support::{Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, process_id};

const EXHAUSTED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted'";
const FAILED_ONCE: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 1";
const NEVER_ATTEMPTED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 0";

/// A system with a lead, and a callback whose endpoint gives these replies.
struct Failing {
    stack: Stack,
    lead: String,
    callback: ObjectId,
    path: String,
}

impl Failing {
    async fn start(schedule: &str, replies: impl IntoIterator<Item = Reply>) -> Self {
        let stack = Stack::start_with(&[("RETRY_SCHEDULE", schedule)]).await;
        stack.receiver.on("/crm", replies);
        let applied = stack.process_calling(&["crm"]).await;
        let callback = applied.process.callbacks[0].callback_id;
        let process_id = process_id(&applied);
        let lead = stack.api.initiate(process_id, None).await;
        let path = format!("/api/v1/processes/{process_id}/callbacks/{callback}");
        Self { stack, lead, callback, path }
    }

    async fn update(&self, number: usize) -> String {
        self.stack.api.update(json!({"leadId": self.lead, "metadata": {"n": number}})).await
    }

    async fn failures(&self, query: &str) -> Value {
        assert_ok(self.stack.api.get(&format!("{}/failures{query}", self.path)).await)["data"].take()
    }
}

#[tokio::test]
async fn exhausted_deliveries_are_grouped_by_their_failure_with_a_sample() {
    let answer = || Reply::status(500).body("out of memory");
    let failing = Failing::start("0s,50ms", [answer()]).await;
    let Failing { stack, callback, .. } = &failing;
    for number in 0..3 {
        failing.update(number).await;
    }
    stack.wait_for_count(EXHAUSTED, 3).await;

    let failures = failing.failures("").await;

    let group = &failures["groups"][0];
    assert_includes(
        group,
        json!({"statusCode": 500, "error": "the endpoint answered 500 Internal Server Error", "pending": 0,
               "exhausted": 3, "response": "out of memory"}),
    );
    assert_eq!((failures["groups"].as_array().map(Vec::len), &failures["complete"]), (Some(1), &json!(true)));
    let sample = group["sample"].as_str().expect("the id of a delivery");
    let delivery = assert_ok(stack.api.get(&format!("/api/v1/deliveries/{sample}")).await);
    assert_eq!(delivery["data"]["status"], "exhausted");

    stack
        .sql(
            "UPDATE webhooks.deliveries SET updated_at = now() - interval '2 days'
              WHERE update_id = (SELECT update_id FROM webhooks.deliveries ORDER BY updated_at LIMIT 1)",
        )
        .await;
    assert_eq!(failing.failures("").await["groups"][0]["exhausted"], 2, "those of the last day");
    assert_eq!(failing.failures("?since=2026-01-01T00:00:00Z").await["groups"][0]["exhausted"], 3);
    assert_eq!(failing.failures("?since=2099-01-01T00:00:00Z").await, json!({"groups": [], "complete": true}));

    let args = ["callback", "failures", &callback.to_string()];
    let table = stack.leadctl_of_project(&args).await.assert_ok();
    table.assert_prints(&["500", "out of memory", sample]);
    let unknown = failing.path.replace(&callback.to_string(), &ObjectId::from_bytes([1; 12]).to_string());
    assert_refused(stack.api.get(&format!("{unknown}/failures")).await, 404, "callback_not_found");
}

#[tokio::test]
async fn pending_deliveries_that_failed_are_grouped_and_those_never_attempted_are_not() {
    let failing = Failing::start("0s,1h", [Reply::status(503), Reply::status(418)]).await;
    let Failing { stack, path, .. } = &failing;
    failing.update(0).await;
    stack.wait_for_count(FAILED_ONCE, 1).await;
    for number in 1..3 {
        failing.update(number).await;
    }
    stack.wait_for_count(FAILED_ONCE, 3).await;
    assert_ok(stack.api.post(&format!("{path}/pause"), &json!({})).await);
    failing.update(3).await;
    stack.wait_for_count(NEVER_ATTEMPTED, 1).await;

    let failures = failing.failures("").await;

    let groups = failures["groups"].as_array().expect("groups");
    let counts: Vec<_> = groups.iter().map(|group| (&group["statusCode"], &group["pending"])).collect();
    assert_eq!(counts, [(&json!(418), &json!(2)), (&json!(503), &json!(1))], "{failures}");
}

#[tokio::test]
async fn failures_of_a_callback_with_more_than_is_read_are_incomplete() {
    let failing = Failing::start("0s", [Reply::drop_connection()]).await;
    let Failing { stack, .. } = &failing;
    failing.update(0).await;
    stack.wait_for_count(EXHAUSTED, 1).await;
    assert_eq!(failing.failures("").await["complete"], true);

    stack
        .sql("INSERT INTO webhooks.deliveries (update_id, callback_id, kind, project_id, process_id, status, attempts,
                                               created_at, updated_at, exhausted_announced, last_error, exhausted_at)
              SELECT substring(update_id FROM 1 FOR 4) || int8send(n), callback_id, kind, project_id, process_id, status,
                     attempts, created_at, updated_at, true, last_error, exhausted_at
              FROM webhooks.deliveries, generate_series(1, 600) AS n")
        .await;

    let failures = failing.failures("").await;
    let groups = failures["groups"].as_array().expect("groups");
    let counted: i64 = groups.iter().map(|group| group["exhausted"].as_i64().expect("a number")).sum();
    assert_eq!((counted, &failures["complete"]), (500, &json!(false)), "{failures}");
}

#[tokio::test]
async fn statistics_of_one_callback_have_no_attempts_of_others() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms")]).await;
    stack.receiver.on("/dead", [500]);
    let applied = stack.process_calling(&["crm", "dead"]).await;
    let [crm, dead] = [0, 1].map(|place: usize| applied.process.callbacks[place].callback_id);
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.api.update(json!({"leadId": lead, "name": "Ada"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.wait_for_count(EXHAUSTED, 1).await;
    stack.wait_for_clean_audit().await;

    for (callback, delivered, failed) in [(crm, 1, 0), (dead, 0, 2)] {
        for step in ["minute", "hour", "day"] {
            let path = format!("/api/v1/stats?callbackId={callback}&step={step}");
            let counts = assert_ok(stack.api.get(&path).await)["data"]["deliveries"].take();
            let counts: Vec<(i64, i64)> = counts
                .as_array()
                .expect("a list")
                .iter()
                .map(|counts| {
                    (counts["delivered"].as_i64().expect("a number"), counts["failed"].as_i64().expect("a number"))
                })
                .collect();
            let sums = counts.iter().fold((0, 0), |sums, counts| (sums.0 + counts.0, sums.1 + counts.1));
            assert_eq!(sums, (delivered, failed), "{callback} {step}");
        }
    }
    let dead = dead.to_string();
    let printed = stack.leadctl_of_project(&["stats", "--callback", &dead]).await.assert_ok();
    assert!(!printed.stdout.contains("SUCCEEDED") && printed.stdout.contains("ATTEMPTS FAILED"), "{}", printed.stdout);
}
