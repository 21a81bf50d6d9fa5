//! The event stream of a project (`GET /api/v1/events`), and `leadctl events tail`.

use contract::rpc::{ListKeys, RevokeKey};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{Api, Stack, TEST_TIMEOUT, assert_refused, send};

const EVENTS: &str = "/api/v1/events";

/// Opens the event stream, after this event if one is given.
async fn listen(api: &Api, after: Option<&str>) -> Response {
    let request = api.request(Method::GET, EVENTS);
    let request = after.iter().fold(request, |request, after| request.header("last-event-id", *after));
    request.send().await.expect("an answer")
}

/// Reads this many events of a response, and returns their ids and bodies.
async fn read_events(response: &mut Response, count: usize) -> Vec<(String, Value)> {
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name));
        line.expect("a field").to_owned()
    };
    let read = async {
        let mut text = String::new();
        loop {
            let blocks: Vec<_> = text.split_terminator("\n\n").filter(|block| block.contains("\ndata: ")).collect();
            if text.ends_with("\n\n") && blocks.len() >= count {
                let event = |block: &&str| {
                    let data = serde_json::from_str(&field(block, "data: ")).expect("JSON");
                    (field(block, "id: "), data)
                };
                return blocks.iter().map(event).collect();
            }
            let chunk = response.chunk().await.expect("a chunk").expect("more");
            text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        }
    };
    timeout(TEST_TIMEOUT, read).await.expect("events in time")
}

/// Sends three updates, and returns their ids.
async fn update_three_times(api: &Api, lead: &str) -> Vec<String> {
    let mut updates = Vec::new();
    for number in 0..3 {
        updates.push(api.update(json!({"leadId": lead, "metadata": {"n": number}})).await);
    }
    updates
}

#[tokio::test]
async fn each_project_receives_its_own_events_in_order() {
    let stack = Stack::start_with(&[("GATEWAY_MAX_LISTENERS", "4")]).await;
    let lead = stack.lead(&[]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let mut events = listen(&stack.api, None).await;
    let mut of_other = listen(&other, None).await;
    assert_eq!(events.headers()["content-type"], "text/event-stream");

    let updates = update_three_times(&stack.api, &lead).await;
    // These updates fail, because the lead belongs to the first project.
    let failed = update_three_times(&other, &lead).await;

    let received = read_events(&mut events, 3).await;
    assert_eq!(received.iter().map(|(_, body)| body["updateId"].clone()).collect::<Vec<_>>(), updates);
    assert_eq!(received[2].1["data"]["n"], 2);
    let received = read_events(&mut of_other, 3).await;
    assert_eq!(received.iter().map(|(_, body)| body["updateId"].clone()).collect::<Vec<_>>(), failed);
    assert!(received.iter().all(|(_, body)| body["success"] == false && body["data"] == Value::Null));

    // The stream of a revoked key ends although events arrive, and a project gets no more than its share of the
    // streams.
    let project_id = stack.api.project_id;
    let revoked = Api::of_project(stack.api.url.clone(), &stack.client, project_id).await;
    let mut of_revoked = listen(&revoked, None).await;
    assert_refused(send(stack.api.request(Method::GET, EVENTS)).await, 429, "too_many_listeners");
    let third = Api::create(stack.api.url.clone(), &stack.client, "third").await;
    assert_eq!(listen(&third, None).await.status(), 200);
    let keys = stack.call(&ListKeys::of_project(project_id)).await.items;
    let newest = keys.iter().max_by_key(|key| key.created_at).expect("a key");
    stack.call(&RevokeKey { key_id: newest.key_id, project_id: None }).await;
    let flow = async {
        loop {
            stack.api.update(json!({"leadId": lead, "name": "Ada"})).await;
        }
    };
    let ends = async { while let Ok(Some(_)) = of_revoked.chunk().await {} };
    tokio::select! {
        () = flow => unreachable!(),
        ended = timeout(TEST_TIMEOUT, ends) => ended.expect("the stream of a revoked key ends"),
    }
}

#[tokio::test]
async fn a_client_resumes_behind_the_last_event_it_saw() {
    let mut stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let mut events = listen(&stack.api, None).await;
    let updates = update_three_times(&stack.api, &lead).await;
    let received = read_events(&mut events, 3).await;
    drop(events);

    let mut events = listen(&stack.api, Some(&received[0].0)).await;

    assert_eq!(read_events(&mut events, 2).await, received[1..]);
    let stream = received[0].0.rsplit_once('-').expect("an id").0;
    for (after, status) in [(format!("{stream}-1000000"), 410), ("other-1".into(), 410), ("nonsense".into(), 400)] {
        assert_eq!(listen(&stack.api, Some(&after)).await.status().as_u16(), status, "{after}");
    }
    let tail = ["events", "tail", "--since", "1h", "--limit", "3", "--json"];
    let tailed = stack.leadctl_of_project(&tail).await.assert_ok().json_lines();
    assert_eq!(tailed.iter().map(|event| event["updateId"].clone()).collect::<Vec<_>>(), updates);

    // A gateway that stops ends the stream cleanly and at once.
    assert!(stack.gateway.terminate().await.success());
    let end = timeout(TEST_TIMEOUT, async { while let Ok(Some(_)) = events.chunk().await {} }).await;
    end.expect("the stream ends");
}
