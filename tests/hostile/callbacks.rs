//! Attacks through callbacks: endpoints that hang, are slow, or fail, and names whose DNS queries get no response.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use test_support::{Reply, free_port};

use super::{Attack, Attacker};
use crate::support::UPDATE;

pub(super) const ATTACKS: &[Attack] = &[
    Attack { name: "an endpoint that hangs", refusals: &[], run: |a| Box::pin(hanging(a)) },
    Attack { name: "slow endpoints under load", refusals: &[], run: |a| Box::pin(slow(a)) },
    Attack { name: "a hundred dead callbacks", refusals: &[], run: |a| Box::pin(dead(a)) },
    Attack { name: "names without an answer", refusals: &[], run: |a| Box::pin(unresolved(a)) },
];

/// Sends updates with these callbacks, `per_second` in total.
async fn update(a: &Attacker<'_>, callbacks: Value, per_second: u32) {
    a.callbacks(callbacks).await;
    let request = |n: usize| {
        let body = json!({"leadId": a.tenant.lead_id, "metadata": {"n": n}});
        a.tenant.api.request(Method::POST, UPDATE).body(body.to_string())
    };
    a.repeat(1, Duration::from_secs(1) / per_second, request).await;
}

async fn hanging(a: &Attacker<'_>) {
    a.endpoint.on("/hanging", [Reply::hang()]);
    let callback =
        json!({"name": "hanging", "url": a.endpoint.url("/hanging"), "timeoutSeconds": 30, "maxInFlight": 1000});
    update(a, json!([callback]), 90).await;
}

async fn slow(a: &Attacker<'_>) {
    a.endpoint.on("/slow", [Reply::status(200).after(Duration::from_millis(200))]);
    let callback = |name| json!({"name": name, "url": a.endpoint.url("/slow"), "maxInFlight": 1000});
    update(a, json!([callback("one"), callback("other")]), 90).await;
}

async fn dead(a: &Attacker<'_>) {
    a.endpoint.on("/500", [500]);
    a.endpoint.on("/hanging", [Reply::hang()]);
    let urls = [format!("http://127.0.0.1:{}/", free_port()), a.endpoint.url("/500"), a.endpoint.url("/hanging")];
    let callback = |n: usize| json!({"name": format!("dead {n}"), "url": urls[n % urls.len()], "timeoutSeconds": 5});
    update(a, (0..100).map(callback).collect(), 20).await;
}

/// Causes lookups that wait for a name server until they time out.
async fn unresolved(a: &Attacker<'_>) {
    let callback =
        |n: usize| json!({"name": format!("{n}"), "url": format!("http://hang-{n}.example/"), "timeoutSeconds": 10});
    update(a, (0..60).map(callback).collect(), 20).await;
}
