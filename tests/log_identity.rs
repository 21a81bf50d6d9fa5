//! The identity of the log: a recreated log starts a new epoch, a reconfigured log does not, and the leader does not
//! read past a gap.

use std::iter::repeat_n;

use async_nats::HeaderMap;
use contract::streams::LEAD_COMMANDS;
use serde_json::json;
use test_support::eventually;

use crate::support::{Stack, TEST_TIMEOUT, assert_includes, publish_in_order};

const EPOCH: &str = "SELECT epoch::bigint FROM lead_state.checkpoints";

#[tokio::test]
async fn a_recreated_log_starts_a_new_epoch() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    for number in 0..3 {
        let timeline = stack.api.update_and_wait(json!({"leadId": lead_id, "metadata": {"n": number}})).await;
        assert_eq!(timeline["status"], "succeeded");
    }

    stack.js().delete_stream(LEAD_COMMANDS).await.expect("deleted");
    // lead-state creates the streams when it starts.
    stack.lead_state.terminate().await;
    stack.lead_state.restart().await;
    stack.lead_state.wait_for_log("starting a new epoch", TEST_TIMEOUT).await;
    let update = stack.api.update_until_accepted(&json!({"leadId": lead_id, "metadata": {"n": 3}})).await;

    assert_includes(&stack.api.outcome(&update).await, json!({"status": "succeeded", "version": 5}));
    assert_eq!(stack.count(EPOCH).await, 2);
    stack.receiver.wait_for_requests("/crm", 4, TEST_TIMEOUT).await;
}

#[tokio::test]
async fn a_reconfigured_log_keeps_its_epoch() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    stack.api.update(json!({"leadId": lead_id, "name": "a"})).await;
    stack.wait_until_applied().await;

    // nats-server 2.9 changes the stream's creation time if the stream is reconfigured between two restarts.
    stack.nats.restart().await.expect("nats-server");
    let js = stack.js();
    eventually(TEST_TIMEOUT, "the log is reconfigured", async || {
        let log = js.get_stream(LEAD_COMMANDS).await.map_err(|e| e.to_string())?;
        let mut config = log.cached_info().config.clone();
        config.max_bytes /= 2;
        js.update_stream(config).await.map_err(|e| e.to_string())
    })
    .await;
    stack.nats.restart().await.expect("nats-server");
    stack.api.update_until_accepted(&json!({"leadId": lead_id, "name": "b"})).await;

    stack.wait_for_count("SELECT version FROM lead_state.leads", 3).await;
    assert_eq!(stack.count(EPOCH).await, 1, "a new epoch");
}

#[tokio::test]
async fn the_leader_does_not_read_past_a_hole_in_the_log() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    // Logs more commands than the leader reads ahead, while nothing can be applied.
    let mut holding = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT 1 FROM lead_state.checkpoints FOR UPDATE")
        .execute(&mut *holding)
        .await
        .expect("the checkpoint");
    let js = stack.js();
    let subject = format!("leads.cmd.{}.update", stack.api.project_id);
    let body = bytes::Bytes::from(json!({"leadId": lead_id, "name": "x"}).to_string());
    publish_in_order(&js, 256, repeat_n((subject, HeaderMap::new(), body), 15_000)).await;

    let log = js.get_stream(LEAD_COMMANDS).await.expect("the log");
    log.purge().sequence(14_001).await.expect("a purge");
    holding.rollback().await.expect("rollback");

    stack.lead_state.wait_for_log("LEAD_COMMANDS begins at 14001", TEST_TIMEOUT * 2).await;
    let last = stack.count("SELECT max(log_sequence) FROM lead_state.lead_updates").await;
    assert!(last < 14_000, "{last} was applied, behind a hole in the log");
}
