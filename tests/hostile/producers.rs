//! Attacks by producers over NATS, which need no API key. The rate limit and the backlog limit of their project bound
//! them.

use std::time::Duration;

use async_nats::Client;
use bytes::Bytes;
use futures::future::join_all;
use serde_json::{Value, json};
use service_kit::{config::NatsConfig, health::Readiness, nats};
use tokio::time::interval;

use super::{Attack, Attacker};
use crate::support::TEST_TIMEOUT;

pub(super) const ATTACKS: &[Attack] = &[
    Attack { name: "a producer that does not wait for acks", refusals: &[], run: |a| Box::pin(unacknowledged(a)) },
    Attack {
        name: "producers with a thousand messages under way",
        refusals: &["ack", "429 rate_limited"],
        run: |a| Box::pin(pipelined(a)),
    },
];

/// A client like that of a producer, and the subject of its updates.
async fn producer(a: &Attacker<'_>) -> (Client, String) {
    let config = NatsConfig::at(a.stack.nats.url());
    let client = nats::connect(&config, "producer", &Readiness::default()).await.expect("a client");
    (client, format!("leads.intake.{}.update", a.tenant.api.project_id))
}

fn update(a: &Attacker<'_>) -> Bytes {
    json!({"leadId": a.tenant.lead_id, "metadata": {"text": "x".repeat(200)}}).to_string().into()
}

/// The gateway's reply to a producer: `ack`, or the status and the code of the error.
async fn answer(client: &Client, subject: String, body: Bytes) -> String {
    let answered = tokio::time::timeout(TEST_TIMEOUT, client.request(subject, body)).await;
    let Ok(Ok(answer)) = answered else { return "none".to_owned() };
    let answer: Value = serde_json::from_slice(&answer.payload).expect("an answer");
    let Some(status) = answer["error"]["code"].as_u64() else { return "ack".to_owned() };
    let description = answer["error"]["description"].as_str().expect("a description");
    format!("{status} {}", description.split_once(':').expect("a code").0)
}

/// Publishes more messages than may wait, twice a second, so that some are lost. The last one requests a reply, and may
/// be lost, too.
async fn unacknowledged(a: &Attacker<'_>) {
    let (client, subject) = producer(a).await;
    let body = update(a);
    let mut ticks = interval(Duration::from_millis(500));
    loop {
        ticks.tick().await;
        for _ in 0..5000 {
            client.publish(subject.clone(), body.clone()).await.expect("a publish");
        }
        a.answers.add(answer(&client, subject.clone(), body.clone()).await);
    }
}

async fn pipelined(a: &Attacker<'_>) {
    let (client, subject) = producer(a).await;
    let body = update(a);
    let request = async || loop {
        a.answers.add(answer(&client, subject.clone(), body.clone()).await);
    };
    join_all((0..1000).map(|_| request())).await;
}
