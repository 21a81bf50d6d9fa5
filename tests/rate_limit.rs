//! The rate limit of an API key.

use reqwest::Method;
use serde_json::json;

use crate::support::{Api, Stack, UPDATE, assert_ok, health_page};

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
    // Neither another key nor the other endpoints are limited, and the key itself is served again after a while.
    assert_ok(other.post(UPDATE, &body).await);
    stack.api.lead(&lead_id).await;
    stack.api.update_until_accepted(&body).await;
    let (_, metrics) = health_page(&stack.gateway_ready, "/metrics").await.expect("metrics");
    let counter = "leadrelay_gateway_requests_refused_total{code=\"rate_limited\"} ";
    let counted = metrics.lines().find_map(|line| line.strip_prefix(counter)).expect("a counter");
    assert!(counted.parse::<usize>().expect("a number") >= limited, "{metrics}");
}
