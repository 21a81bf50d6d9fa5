//! Each producer has its own NATS account, because NATS checks no permission for reply subjects. No reply subject of a
//! producer's message delivers the reply to a subject of the services.

use std::{collections::BTreeSet, path::PathBuf};

use async_nats::Message;
use contract::{
    rpc,
    streams::{LEAD_COMMANDS, LEAD_DEAD_LETTERS, WEBHOOK_EVENTS},
};
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};
use test_support::eventually;

use crate::{
    nats_permissions::{OTHER, PROJECT, assert_nothing_refused, client, producers_project, stack_on},
    support::{LEDGER_ROWS, Stack, TEST_TIMEOUT},
};

/// Subjects of the services' account at which a reply would do harm, in addition to the subjects of queries. `OTHER` is
/// another project.
const HARMFUL: &str = "
    $JS.API.STREAM.PURGE.LEAD_COMMANDS $JS.API.STREAM.DELETE.LEAD_COMMANDS $JS.API.STREAM.MSG.DELETE.LEAD_COMMANDS
    $JS.API.STREAM.UPDATE.LEAD_COMMANDS $JS.API.STREAM.CREATE.SPY $JS.API.STREAM.PURGE.LEAD_EVENTS
    $JS.API.STREAM.RESTORE.LEAD_EVENTS $JS.API.STREAM.SNAPSHOT.LEAD_EVENTS $JS.API.STREAM.LEADER.STEPDOWN.LEAD_COMMANDS
    $JS.API.CONSUMER.CREATE.LEAD_COMMANDS $JS.API.CONSUMER.CREATE.LEAD_EVENTS.spy
    $JS.API.CONSUMER.DELETE.LEAD_EVENTS.webhook-notifier $JS.API.CONSUMER.MSG.NEXT.LEAD_EVENTS.webhook-notifier
    $JS.API.ACCOUNT.PURGE.LEADRELAY $JS.API.STREAM.PURGE.KV_processes $JS.API.STREAM.PURGE.KV_api_keys
    $JS.ACK.LEAD_EVENTS.webhook-notifier.1.1.1.1.1 $JS.FC.KV_processes.x $JS.FC.KV_api_keys.x
    $KV.processes.OTHER.x $KV.api_keys.x $KV.idempotency.OTHER.x
    leads.cmd.OTHER.update leads.cmd.OTHER.call.started leads.cmd.OTHER.call.expired leads.cmd.pack
    leads.intake.OTHER.update leads.applied leads.dead.invalid_json leads.dead.replayed.1
    leads.evt.OTHER._.update.succeeded leads.evt.OTHER._.update.failed webhooks.evt.OTHER._.exhausted
    webhooks.evt.OTHER._.callback.disabled _INBOX_gateway.x _INBOX_lead-state.x _INBOX_webhook-notifier.x _INBOX_leadctl.x
    $SRV.PING $SRV.STATS";

fn harmful_subjects() -> BTreeSet<String> {
    let own = HARMFUL.split_whitespace().map(|subject| subject.replace("OTHER", OTHER));
    own.chain(rpc::SUBJECTS.iter().map(|subject| (*subject).to_owned())).collect()
}

/// Whether a message is an ack on one of these subjects.
fn is_ack_at(message: &Message, subjects: &BTreeSet<String>) -> bool {
    let body: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
    body["stream"] == LEAD_COMMANDS && subjects.contains(message.subject.as_str())
}

/// The number of messages and the last sequence of each stream and bucket that no producer may change.
async fn untouchable(stack: &Stack) -> Vec<(u64, u64)> {
    let mut states = Vec::new();
    for stream in [LEAD_DEAD_LETTERS, WEBHOOK_EVENTS, "KV_processes", "KV_api_keys", "KV_idempotency"] {
        let state = stack.stream_state(stream).await;
        states.push((state.messages, state.last_sequence));
    }
    states
}

/// Publishes with each harmful subject as reply subject, on this nats-server.
async fn publish_with_harmful_reply_subjects(program: Option<PathBuf>) {
    let stack = stack_on(program).await;
    let (_, _, lead_id, _) = producers_project(&stack).await;
    let (observer, _) = client(&stack.nats, "observer").await;
    let (producer, _) = client(&stack.nats, "producer").await;
    let mut traffic = observer.subscribe(">").await.expect("a subscription");
    observer.flush().await.expect("a flush");
    let command = format!("leads.cmd.{PROJECT}.update");
    let body = || json!({"leadId": lead_id, "metadata": {"a": 1}}).to_string().into();
    let ack = async || {
        let answer = producer.request(command.clone(), body()).await.map_err(|e| e.to_string())?;
        let ack: Value = serde_json::from_slice(&answer.payload).expect("an ack");
        assert!(ack["stream"] == LEAD_COMMANDS && ack["error"].is_null(), "{ack}");
        Ok::<_, String>(ack)
    };
    eventually(TEST_TIMEOUT, "the gateway serves the project", async || ack().await).await;
    let subjects = harmful_subjects();
    let before = untouchable(&stack).await;

    for reply in &subjects {
        producer.publish_with_reply(command.clone(), reply.clone(), body()).await.expect("a publish");
    }
    // Messages of a project are handled in order, so the others have been answered before this one.
    ack().await.expect("an ack");
    // NATS itself rejects messages whose reply subject is reserved.
    let taken = subjects.iter().filter(|reply| !reply.starts_with("$JS.ACK.")).count();
    let logged = u64::try_from(taken).expect("a number") + 2;
    stack.wait_for_count(LEDGER_ROWS, i64::try_from(logged).expect("a number")).await;

    let state = stack.stream_state(LEAD_COMMANDS).await;
    assert_eq!((state.messages, state.last_sequence), (logged, logged), "each was logged, and nothing else");
    assert_eq!(untouchable(&stack).await, before);
    observer.publish("end.of.test", "".into()).await.expect("a publish");
    while let Some(message) = traffic.next().await
        && message.subject.as_str() != "end.of.test"
    {
        assert!(!is_ack_at(&message, &subjects), "{} received an ack", message.subject);
    }
    assert_nothing_refused(&stack);

    // The check above detects acks: a message published in the account of the services gets one.
    let reply = format!("leads.evt.{OTHER}._.update.failed");
    observer.publish_with_reply(command.clone(), reply, body()).await.expect("a publish");
    let arrives = async { while !is_ack_at(&traffic.next().await.expect("a message"), &subjects) {} };
    tokio::time::timeout(TEST_TIMEOUT, arrives.boxed()).await.expect("an ack in the account of the services");
}

/// The nats-server of the Linux distribution, if it is installed.
fn distributions_server() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).chain(["/usr/sbin".into()]).collect();
    dirs.into_iter().map(|dir| dir.join("nats-server")).find(|program| program.is_file())
}

#[tokio::test]
async fn a_reply_subject_reaches_nothing_of_the_services_on_the_distributions_server() {
    let Some(program) = distributions_server() else {
        return eprintln!("skipped: the distribution's nats-server is not installed");
    };
    publish_with_harmful_reply_subjects(Some(program)).await;
}

#[tokio::test]
async fn a_reply_subject_reaches_nothing_of_the_services_on_a_current_server() {
    let Some(program) = std::env::var_os("LEADRELAY_NATS_SERVER").filter(|program| !program.is_empty()) else {
        return eprintln!("skipped: LEADRELAY_NATS_SERVER names no current nats-server");
    };
    publish_with_harmful_reply_subjects(Some(program.into())).await;
}
