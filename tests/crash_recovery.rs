//! Crashes: every accepted update has exactly one ledger row and at least one webhook, in order, after any process
//! dies.

use std::time::Instant;

use async_nats::jetstream::stream;
use contract::streams::LEAD_EVENTS;
use serde_json::json;
use test_support::{Service, eventually};

use crate::support::{
    BLOCKED, DELIVERED, LEDGER_ROWS, Stack, TEST_TIMEOUT, assert_exactly_once, assert_includes, by_update, service,
    update_each,
};

/// A second lead-state, which stands by.
async fn start_standby(stack: &Stack) -> Service {
    let (mut standby, ready) = service("lead-state", &stack.nats, &stack.postgres, &[]);
    standby.wait_for_http(&ready, TEST_TIMEOUT).await;
    standby.wait_for_log("standing by", TEST_TIMEOUT).await;
    standby
}

#[tokio::test]
async fn a_standby_takes_over_from_a_killed_leader() {
    let mut stack = Stack::start().await;
    let leads = stack.leads(&["crm"], 8).await;
    let _standby = start_standby(&stack).await;
    let load = tokio::spawn(update_each(stack.api.clone(), leads.clone(), 150));
    stack.wait_for_ledger_beyond(300).await;

    stack.lead_state.kill9().await;
    let killed = Instant::now();
    let probe = stack.api.update_until_accepted(&json!({"leadId": leads[0], "name": "probe"})).await;
    stack.api.outcome(&probe).await;

    println!("the standby took over from a killed leader within {:?}", killed.elapsed());
    let mut accepted = load.await.expect("the load");
    accepted.push(probe);
    stack.wait_for_count(DELIVERED, accepted.len() as i64).await;
    assert_exactly_once(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

#[tokio::test]
async fn a_standby_takes_over_from_a_frozen_leader_which_does_no_harm_when_it_wakes() {
    let stack = Stack::start().await;
    let leads = stack.leads(&["crm"], 8).await;
    let _standby = start_standby(&stack).await;
    let load = tokio::spawn(update_each(stack.api.clone(), leads.clone(), 150));
    stack.wait_for_ledger_beyond(300).await;

    stack.lead_state.freeze();
    let frozen = Instant::now();
    let probe = stack.api.update_until_accepted(&json!({"leadId": leads[1], "name": "probe"})).await;
    // Reads from Postgres, because the frozen instance would receive some of the queries and delay each by a second.
    let applied = "SELECT count(*) FROM lead_state.lead_updates WHERE encode(update_id, 'hex') = $1";
    eventually(TEST_TIMEOUT, "the probe is applied", async || {
        let rows: i64 = sqlx::query_scalar(applied).bind(&probe).fetch_one(&stack.pool).await.expect(applied);
        rows == 1
    })
    .await;

    println!("the standby took over from a frozen leader within {:?}", frozen.elapsed());
    stack.lead_state.thaw();
    let mut accepted = load.await.expect("the load");
    accepted.push(probe);
    stack.wait_for_count(DELIVERED, accepted.len() as i64).await;
    assert_exactly_once(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

#[tokio::test]
async fn a_leader_whose_checkpoint_was_moved_writes_nothing() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.checkpoints", 1).await;

    // The leader has decided the command and waits for the checkpoint, which another session moves past it.
    let mut other = stack.pool.begin().await.expect("a transaction");
    let moved = "UPDATE lead_state.checkpoints SET last_sequence = 1, announced_sequence = 1";
    sqlx::query(moved).execute(&mut *other).await.expect(moved);
    stack.api.update(json!({"leadId": lead_id, "name": "too late"})).await;
    stack.wait_for_count(BLOCKED, 1).await;
    other.commit().await.expect("commit");

    let next = stack.api.update_and_wait(json!({"leadId": lead_id, "name": "in time"})).await;
    assert_eq!(next["status"], "succeeded");
    assert_eq!(stack.count(LEDGER_ROWS).await, 1);
    assert_eq!(stack.count("SELECT version FROM lead_state.leads").await, 2);
}

#[tokio::test]
async fn updates_decided_ahead_of_a_failed_write_are_decided_again() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.checkpoints", 1).await;

    // The first update cannot be written while another session locks the checkpoint. Meanwhile the other updates are
    // decided.
    let mut other = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM lead_state.checkpoints FOR UPDATE").execute(&mut *other).await.expect("the checkpoint");
    let mut updates = vec![stack.api.update(json!({"leadId": lead_id, "metadata": {"n": 0}})).await];
    stack.wait_for_count(BLOCKED, 1).await;
    for number in 1..4 {
        updates.push(stack.api.update(json!({"leadId": lead_id, "metadata": {"n": number}})).await);
    }
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name = 'lead-state' AND wait_event_type = 'Lock'";
    assert_eq!(stack.count(cut).await, 1);
    other.rollback().await.expect("rollback");

    for (number, update) in updates.iter().enumerate() {
        let timeline = stack.api.outcome(update).await;
        assert_includes(&timeline, json!({"status": "succeeded", "version": number + 2}));
    }
    let last = "SELECT count(*) FROM lead_state.leads WHERE version = 5 AND metadata->>'n' = '3'";
    assert_eq!(stack.count(last).await, 1);
}

#[tokio::test]
async fn no_update_is_lost_when_nats_and_postgres_are_killed() {
    let mut stack = Stack::start().await;
    let leads = stack.leads(&["crm"], 4).await;
    let load = tokio::spawn(update_each(stack.api.clone(), leads, 150));

    stack.wait_for_ledger_beyond(50).await;
    stack.postgres.kill9().await.expect("kill");
    stack.postgres.restart().await.expect("restart");
    stack.wait_for_ledger_beyond(150).await;
    stack.nats.kill9().await.expect("kill");
    stack.nats.restart().await.expect("restart");
    let accepted = load.await.expect("the load");

    // If the ack of an update was lost, the ledger may have that update and the one that was sent instead.
    eventually(TEST_TIMEOUT * 2, "all is delivered", async || {
        let delivered = by_update(&stack.receiver.requests());
        let missing: Vec<_> = accepted.iter().filter(|id| !delivered.contains_key(*id)).collect();
        let ledger = stack.count(LEDGER_ROWS).await;
        if missing.is_empty() && ledger == delivered.len() as i64 {
            Ok(())
        } else {
            Err(format!("{ledger} in the ledger, not delivered: {missing:?}"))
        }
    })
    .await;
    assert_exactly_once(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

#[tokio::test]
async fn unannounced_updates_are_announced_by_the_next_leader() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    // Changes the subjects of the stream, so that it accepts no events.
    let js = stack.js();
    let events = js.get_stream(LEAD_EVENTS).await.expect("the events").cached_info().config.clone();
    let deaf = stream::Config { subjects: vec!["elsewhere".into()], ..events.clone() };
    js.update_stream(deaf).await.expect("an update");
    let update_id = stack.api.update(json!({"leadId": lead_id, "name": "x"})).await;
    stack.wait_for_count(LEDGER_ROWS, 1).await;

    stack.lead_state.kill9().await;
    js.update_stream(events).await.expect("an update");
    stack.lead_state.restart().await;

    let requests = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    assert_eq!(requests[0].json()["updateId"], json!(update_id));
}
