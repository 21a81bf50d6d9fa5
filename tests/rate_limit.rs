//! The rate limits of API keys and producers, and the budget of work of a project.

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{Api, Stack, TEST_TIMEOUT, UPDATE, assert_ok, health_page};

#[tokio::test]
async fn one_key_that_floods_is_slowed_down_and_no_other() {
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "20"), ("GATEWAY_OTHER_RATE", "1000")]).await;
    let lead_id = stack.lead(&[]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let body = json!({"leadId": lead_id, "name": "Ada"});

    let mut statuses = Vec::new();
    for _ in 0..40 {
        let request = stack.api.request(Method::POST, UPDATE).body(body.to_string());
        let answer = request.send().await.expect("an answer");
        statuses.push(answer.status().as_u16());
        let header = |name| answer.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
        assert_eq!(header("ratelimit-policy").as_deref(), Some("\"updates\";q=20;w=5"));
        if answer.status() == 429 {
            assert_eq!(header("retry-after").as_deref(), Some("1"));
            assert_eq!(header("ratelimit").as_deref(), Some("\"updates\";r=0;t=1"));
        }
    }

    assert_eq!(statuses[..20], [200; 20]);
    let limited = statuses.iter().filter(|status| **status == 429).count();
    assert!(limited > 0 && statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    // Other keys and other endpoints are not limited, and the key itself is served again after a while.
    assert_ok(other.post(UPDATE, &body).await);
    stack.api.lead(&lead_id).await;
    stack.api.update_until_accepted(&body).await;
    let (_, metrics) = health_page(&stack.gateway_ready, "/metrics").await.expect("metrics");
    let counter = "leadrelay_gateway_requests_refused_total{code=\"rate_limited\"} ";
    let counted = metrics.lines().find_map(|line| line.strip_prefix(counter)).expect("a counter");
    assert!(counted.parse::<usize>().expect("a number") >= limited, "{metrics}");
}

#[tokio::test]
async fn producers_of_a_project_share_a_rate_limit_separate_from_keys_and_other_projects() {
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "20")]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let lead_id = stack.lead(&[]).await;
    let body = json!({"leadId": lead_id, "name": "Ada"});
    let produce = |project_id| stack.produce(project_id, "update", &[], &body);

    let answers = join_all((0..100).map(|_| produce(stack.api.project_id))).await;
    let refusal = |answer: &Value| answer["error"]["description"].as_str().map(str::to_owned);
    let refusals: Vec<_> = answers.iter().filter_map(refusal).collect();
    // The accepted messages are the burst, and those that the rate admits while the others wait.
    let accepted = answers.len() - refusals.len();
    assert!((20..=60).contains(&accepted), "{accepted} accepted, {refusals:?}");
    assert!(refusals.iter().all(|refusal| refusal.starts_with("rate_limited: ")), "{refusals:?}");

    assert!(refusal(&produce(other.project_id).await).is_none());
    assert_ok(stack.api.post(UPDATE, &body).await);
    eventually(TEST_TIMEOUT, "the producers are served again", async || {
        refusal(&produce(stack.api.project_id).await).map_or(Ok(()), Err)
    })
    .await;
}

#[tokio::test]
async fn a_project_that_used_up_its_budget_of_work_is_refused_and_no_other() {
    const UPDATES: usize = 100;
    let stack = Stack::start_with(&[("GATEWAY_WORK_RATE", "1")]).await;
    let lead_id = stack.lead(&[]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    stack.api.update_and_wait(json!({"leadId": lead_id, "metadata": {"blob": "x".repeat(250_000)}})).await;

    // Each update has few bytes, but causes a megabyte of work.
    let body = json!({"leadId": lead_id, "name": "Ada"});
    stack.api.update_until_accepted(&body).await;
    let answers = join_all((0..UPDATES).map(|_| async {
        let answer = stack.api.request(Method::POST, UPDATE).body(body.to_string()).send().await.expect("an answer");
        let waits = answer.headers().get("retry-after").is_some();
        (answer.status().as_u16(), waits, answer.text().await.expect("a body"))
    }));
    let others = async { assert_ok(other.post(UPDATE, &body).await) };
    let (answers, _) = tokio::join!(answers, others);

    let refused: Vec<_> = answers.iter().filter(|(status, ..)| *status != 200).collect();
    assert!(!refused.is_empty(), "none of {UPDATES} refused");
    for (status, waits, text) in refused {
        assert!(*status == 429 && *waits && text.contains("work_limited"), "{status} {text}");
    }
    // The accepted updates are applied, and the project is served again after a while.
    stack.api.update_until_accepted(&body).await;
    let accepted = answers.iter().filter(|(status, ..)| *status == 200).count();
    stack.wait_for_count("SELECT count(*) FROM lead_state.lead_updates WHERE success", accepted as i64 + 3).await;
}
