//! Callbacks with an order (`ordering: "lead"`): a lead's next delivery waits for the one before, however many notifiers there are
//! and whichever dies; other leads do not wait, nor for anybody's slow endpoint.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use test_support::{Reply, Request, Service};

use crate::stack::{SOON, Stack, service};

/// The numbers that the updates of each lead carried, in the order in which they came.
fn numbers(requests: &[Request]) -> BTreeMap<String, Vec<u64>> {
    let mut numbers = BTreeMap::<_, Vec<_>>::new();
    for request in requests {
        let body = request.json();
        let lead = body["leadId"].as_str().expect("a lead").to_owned();
        numbers.entry(lead).or_default().push(body["data"]["n"].as_u64().expect("a number"));
    }
    numbers
}

/// A stack with another notifier.
async fn two_notifiers(schedule: &str) -> (Stack, Service) {
    let extra = [("RETRY_SCHEDULE", schedule)];
    let stack = Stack::start_with(&extra).await;
    let (mut second, ready) = service("webhook-notifier", &stack.nats, &stack.postgres, &extra);
    second.wait_for_http(&ready, SOON).await;
    (stack, second)
}

async fn update(stack: &Stack, lead: &str, n: u32) -> String {
    stack.api.update(json!({"leadId": lead, "metadata": {"n": n}})).await
}

#[tokio::test]
async fn a_leads_deliveries_come_one_after_the_other_and_nobody_else_waits() {
    let (stack, _second) = two_notifiers("0s,3s,3s").await;
    // Somebody whose attempts take long: the order of others does not wait for that.
    stack.receiver.on("/slow", vec![Reply::hang(); 100]);
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm"), "ordering": "lead"},
            {"name": "slow", "url": stack.receiver.url("/slow"), "timeoutSeconds": 20},
        ]))
        .await;
    let process_id = applied.process.process_id.expect("an id");
    let crm = applied.process.callbacks[0].callback_id;
    let (a, b) = (stack.api.initiate(process_id, Some("A")).await, stack.api.initiate(process_id, Some("B")).await);

    stack.receiver.on("/crm", [500, 200]);
    let first = update(&stack, &a, 1).await;
    stack.receiver.wait_for_requests("/crm", 1, SOON).await;
    let failed = Instant::now();
    let second = update(&stack, &a, 2).await;
    update(&stack, &a, 3).await;
    for n in 1..=3 {
        update(&stack, &b, n).await;
    }
    let came = stack.receiver.wait_for_requests("/crm", 4, SOON).await;
    assert!(failed.elapsed() < Duration::from_secs(3), "{:?}", failed.elapsed());
    assert_eq!(numbers(&came), [(a.clone(), vec![1]), (b.clone(), vec![1, 2, 3])].into());
    let (_, story) = stack.api.get(&format!("/api/v1/deliveries/{second}-{crm}")).await;
    let waiting = (&story["data"]["status"], &story["data"]["nextAttemptAt"], &story["data"]["attempts"]);
    assert_eq!(waiting, (&json!("pending"), &Value::Null, &json!([])), "{story}");

    stack.receiver.on("/crm", [500, 200]);
    let came = stack.receiver.wait_for_requests("/crm", 8, SOON).await;
    assert_eq!(numbers(&came)[&a], [1, 1, 1, 2, 3]);

    // One that is given up lets the next one go.
    stack.receiver.on("/crm", [500, 500, 500, 200]);
    update(&stack, &a, 4).await;
    update(&stack, &a, 5).await;
    let came = stack.receiver.wait_for_requests("/crm", 12, SOON).await;
    assert_eq!(numbers(&came)[&a][5..], [4, 4, 4, 5]);
    // What is told again comes again.
    let (status, answer) = stack.api.post(&format!("/api/v1/deliveries/{first}-{crm}/redeliver"), &json!({})).await;
    assert_eq!(status, 200, "{answer}");
    update(&stack, &a, 6).await;
    let came = stack.receiver.wait_for_requests("/crm", 14, SOON).await;
    assert_eq!(numbers(&came)[&a][9..], [1, 6]);
    assert_eq!(numbers(&came)[&b], [1, 2, 3]);
}

#[tokio::test]
async fn the_order_survives_the_death_of_a_notifier() {
    let (mut stack, _second) = two_notifiers("0s,1s,1s,1s").await;
    stack.receiver.on("/crm", vec![Reply::status(200).after(Duration::from_millis(40)); 1000]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm"), "ordering": "lead"}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for _ in 0..4 {
        leads.push(stack.api.initiate(process_id, None).await);
    }
    for n in 0..20 {
        for lead in &leads {
            update(&stack, lead, n).await;
        }
    }
    stack.receiver.wait_for_requests("/crm", 15, SOON).await;
    stack.notifier.kill9().await;
    // What it had claimed is left to its lease, what it had read is given out again.
    let came = stack
        .receiver
        .wait_for(SOON * 5, |requests| {
            let numbers = numbers(requests);
            numbers.len() == 4 && numbers.values().all(|numbers| numbers.contains(&19))
        })
        .await;
    for (lead, numbers) in numbers(&came) {
        // At least once: what was on its way when it died comes again, before anything else of the lead.
        assert!(numbers.is_sorted(), "{lead}: {numbers:?}");
        let mut distinct = numbers.clone();
        distinct.dedup();
        assert_eq!(distinct, (0..20).collect::<Vec<_>>(), "{lead}");
    }
}
