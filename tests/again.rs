//! Deliveries listed, made again and recovered; outcomes followed as they come about.

use std::time::Duration;

use contract::ObjectId;
use serde_json::{Value, json};
use test_support::{Reply, eventually};

use crate::{
    audit::settled,
    stack::{SOON, Stack, verify},
    story::{all_pages, leadctl, leadctl_json},
};

/// Waits until so many deliveries stand so.
async fn wait_for(stack: &Stack, status: &str, count: usize) -> Vec<Value> {
    eventually(SOON, status, async || {
        let (found, _) = all_pages(&stack.api, &format!("/api/v1/deliveries?status={status}&"), 7).await;
        if found.len() == count { Ok(found) } else { Err(format!("{} {status}", found.len())) }
    })
    .await
}

fn ids(items: &[Value], name: &str) -> Vec<String> {
    items.iter().map(|item| item[name].as_str().expect(name).to_owned()).collect()
}

#[tokio::test]
async fn a_delivery_is_made_again_byte_for_byte() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms,50ms")]).await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let secret = applied.process.callbacks[0].secrets[0].expose().to_owned();
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), Some("R")).await;
    // Numbers and blanks stay what they are.
    let body = format!(r#"{{"leadId":"{lead}","metadata":{{"n": 100000000000000000000000000001.50, "t":"ä\n" }}}}"#);
    let request = stack.api.http.post(format!("{}/api/v1/leads/update", stack.api.url)).bearer_auth(&stack.api.key);
    let answer = request.header("content-type", "application/json").body(body).send().await.expect("an answer");
    let answer: Value = serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
    let update = answer["updateId"].as_str().expect("an id").to_owned();
    let delivered = wait_for(&stack, "delivered", 1).await;
    let delivery = delivered[0]["deliveryId"].as_str().expect("an id").to_owned();
    let path = format!("/api/v1/deliveries/{delivery}");

    // It was taken; then the endpoint is away for longer than a schedule has patience; then it is back.
    let (status, again) = stack.api.post(&format!("{path}/redeliver"), &json!({})).await;
    assert_eq!((status, &again["data"]["status"]), (200, &json!("pending")), "{again}");
    let requests = stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    wait_for(&stack, "delivered", 1).await;
    stack.receiver.on("/crm", [Reply::status(500), Reply::status(500), Reply::status(500), Reply::status(200)]);
    assert_eq!(stack.api.post(&format!("{path}/redeliver"), &json!({})).await.0, 200);
    wait_for(&stack, "exhausted", 1).await;
    let project = stack.api.project_id.to_string();
    let output = leadctl(&stack, &["deliveries", "redeliver", &delivery, "--project", &project]).await;
    assert!(output.status.success(), "{output:?}");
    wait_for(&stack, "delivered", 1).await;
    let all = stack.receiver.requests_to("/crm");
    assert_eq!((requests.len(), all.len()), (2, 6));
    for request in &all {
        assert_eq!(request.body, all[0].body);
        assert_eq!(request.header("webhook-id"), Some(update.as_str()));
        assert_eq!(request.header("traceparent"), all[0].header("traceparent"));
        verify(request, &secret);
    }
    let (_, shown) = stack.api.get(&path).await;
    let codes = shown["data"]["attempts"].as_array().expect("attempts").iter().map(|a| a["statusCode"].clone());
    assert_eq!(codes.collect::<Vec<_>>(), [200, 200, 500, 500, 500, 200].map(|code| json!(code)));
    settled(&stack).await;

    // What cannot be made again says why.
    let nobody = format!("{}-{}", update, ObjectId::from_bytes([1; 12]));
    stack.process(json!([])).await;
    for (id, status, code) in [(&nobody, 404, "delivery_not_found"), (&delivery, 409, "callback_gone")] {
        eventually(SOON, code, async || {
            let (got, answer) = stack.api.post(&format!("/api/v1/deliveries/{id}/redeliver"), &json!({})).await;
            if (got, &answer["code"]) == (status, &json!(code)) { Ok(()) } else { Err(answer.to_string()) }
        })
        .await;
    }
}

#[tokio::test]
async fn what_was_given_up_is_found_and_recovered_at_its_pace() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    let callbacks = json!([{"name": "dead", "url": stack.receiver.url("/dead")}, {"name": "crm", "url": stack.receiver.url("/crm")}]);
    let applied = stack.process(callbacks).await;
    let dead = applied.process.callbacks[0].callback_id.to_string();
    let process_id = applied.process.process_id.expect("an id");
    let (lead, other) = (stack.api.initiate(process_id, None).await, stack.api.initiate(process_id, None).await);
    stack.receiver.on("/dead", [400]);
    let since = service_kit::clock::now().minus(Duration::from_secs(1)).to_iso();
    let mut updates = Vec::new();
    for number in 0..20 {
        let lead = if number % 2 == 0 { &lead } else { &other };
        updates.push(stack.api.update(json!({"leadId": lead, "metadata": {"n": number}})).await);
    }
    let exhausted = wait_for(&stack, "exhausted", 20).await;
    wait_for(&stack, "delivered", 20).await;
    assert!(exhausted.iter().all(|delivery| delivery["callbackId"] == json!(dead)));
    let mut sorted = ids(&exhausted, "updateId");
    sorted.sort();
    updates.sort();
    assert_eq!(sorted, updates);
    for (query, count) in [
        (String::new(), 40),
        (format!("leadId={lead}&"), 20),
        (format!("leadId={lead}&status=exhausted&"), 10),
        (format!("updateId={}&", updates[0]), 2),
        (format!("updateId={}&leadId={lead}&callbackId={dead}&", ids(&exhausted, "updateId")[0]), 0),
        (format!("callbackId={dead}&status=delivered&"), 0),
        ("since=2100-01-01T00:00:00Z&".into(), 0),
    ] {
        let (found, _) = all_pages(&stack.api, &format!("/api/v1/deliveries?{query}"), 3).await;
        let is_of_lead = query.starts_with("updateId") && query.contains("leadId");
        assert!(found.len() == count || is_of_lead && found.len() <= 1, "{query}: {} instead of {count}", found.len());
        let mut distinct = ids(&found, "deliveryId");
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), found.len(), "{query}");
    }

    // Nothing happens in a dry run, nor by mistake.
    let recover = |more: Value| {
        let mut body = json!({"since": since, "perSecond": 10});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        body
    };
    let path = "/api/v1/deliveries/recover";
    let (status, dry) = stack.api.post(path, &recover(json!({"dryRun": true}))).await;
    assert_eq!((status, &dry["data"]["deliveries"]), (200, &json!(20)), "{dry}");
    let (status, odd) = stack.api.post(path, &recover(json!({"callback": dead}))).await;
    assert_eq!((status, &odd["code"]), (400, &json!("invalid_field")), "{odd}");
    let project = stack.api.project_id.to_string();
    let dry = ["deliveries", "recover", "--project", &project, "--since", &since, "--dry-run"];
    assert_eq!(leadctl_json(&stack, &dry).await.1[0]["deliveries"], 20);
    assert_eq!(stack.receiver.requests_to("/dead").len(), 20);

    stack.receiver.on("/dead", [200]);
    let (status, done) = stack.api.post(path, &recover(json!({"callbackId": dead}))).await;
    assert_eq!((status, &done["data"]["deliveries"], &done["data"]["next"]), (200, &json!(20), &Value::Null), "{done}");
    let requests = stack.receiver.wait_for_requests("/dead", 40, SOON).await;
    let took = requests[39].received_at.duration_since(requests[20].received_at);
    assert!(took >= Duration::from_millis(1200), "ten a second, and a poll of half a second: {took:?}");
    wait_for(&stack, "delivered", 40).await;

    // A receiver that lost everything gets it again, in order.
    let crm = applied.process.callbacks[1].callback_id;
    let (_, done) =
        stack.api.post(path, &recover(json!({"callbackId": crm, "status": "delivered", "perSecond": 1000}))).await;
    assert_eq!(done["data"]["deliveries"], 20, "{done}");
    let requests = stack.receiver.wait_for_requests("/crm", 40, SOON).await;
    let told = crate::stack::by_update(&requests);
    assert!(told.values().all(|bodies| bodies.len() == 2 && bodies[0] == bodies[1]), "{told:?}");
    wait_for(&stack, "delivered", 40).await;
    settled(&stack).await;
}

/// Reads an answer of events until so many came; their ids and bodies.
async fn read_events(response: &mut reqwest::Response, count: usize) -> Vec<(String, Value)> {
    let mut text = String::new();
    let read = async {
        loop {
            let blocks = text.split_terminator("\n\n").filter(|block| block.contains("\ndata: "));
            let complete = text.ends_with("\n\n");
            let events = blocks.collect::<Vec<_>>();
            if complete && events.len() >= count {
                let field = |block: &str, name: &str| {
                    let line = block.lines().find_map(|line| line.strip_prefix(name));
                    line.expect("a field").to_owned()
                };
                return events
                    .iter()
                    .map(|block| (field(block, "id: "), serde_json::from_str(&field(block, "data: ")).expect("JSON")))
                    .collect();
            }
            let chunk = response.chunk().await.expect("a chunk").expect("more");
            text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        }
    };
    tokio::time::timeout(SOON, read).await.expect("events in time")
}

#[tokio::test]
async fn events_are_followed_and_taken_up_again() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let other = crate::stack::Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let listen = async |api: &crate::stack::Api, after: Option<&str>| {
        let mut request = api.http.get(format!("{}/api/v1/events", api.url)).bearer_auth(&api.key);
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        request.send().await.expect("an answer")
    };
    let mut events = listen(&stack.api, None).await;
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    let mut of_other = listen(&other, None).await;
    let mut updates = Vec::new();
    for number in 0..3 {
        updates.push(stack.api.update(json!({"leadId": lead, "metadata": {"n": number}})).await);
        // What fails is an outcome, too; and none of anybody else's.
        other.update(json!({"leadId": lead, "name": "mine"})).await;
    }
    let told = read_events(&mut events, 3).await;
    assert_eq!(told.iter().map(|(_, body)| body["updateId"].clone()).collect::<Vec<_>>(), updates);
    assert_eq!(told[2].1["data"]["n"], 2);
    let others = read_events(&mut of_other, 3).await;
    assert!(others.iter().all(|(_, body)| body["success"] == false && body["data"] == Value::Null));

    // Who was away goes on behind what it saw, and who never was there cannot.
    drop(events);
    let mut events = listen(&stack.api, Some(&told[0].0)).await;
    assert_eq!(read_events(&mut events, 2).await, told[1..]);
    let stream = told[0].0.rsplit_once('-').expect("an id").0;
    for (after, status) in [(format!("{stream}-1000000"), 410), ("other-1".into(), 410), ("nonsense".into(), 400)] {
        assert_eq!(listen(&stack.api, Some(&after)).await.status().as_u16(), status, "{after}");
    }

    // The same for operators.
    let project = stack.api.project_id.to_string();
    let tail = ["events", "tail", "--project", &project, "--since", "1h", "--limit", "3"];
    let (code, tailed) = leadctl_json(&stack, &tail).await;
    assert_eq!(code, Some(0));
    assert_eq!(tailed.iter().map(|event| event["updateId"].clone()).collect::<Vec<_>>(), updates);

    // A gateway that stops ends it, cleanly and at once.
    assert!(stack.gateway.terminate().await.success());
    let end = tokio::time::timeout(SOON, async { while let Ok(Some(_)) = events.chunk().await {} }).await;
    end.expect("the answer ends");
}
