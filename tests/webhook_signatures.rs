//! The reference library of Standard Webhooks verifies our webhooks, also while their secret is rotated.

use serde_json::json;
use standardwebhooks::Webhook;
use test_support::{Request, eventually};

use crate::support::{Stack, TEST_TIMEOUT, process_id, signature_count};

/// Verifies a request as a receiver in Rust would.
fn verified(secret: &str, request: &Request) -> Result<(), String> {
    let webhook = Webhook::new(secret).map_err(|e| e.to_string())?;
    webhook.verify(&request.body, &request.headers).map_err(|e| e.to_string())
}

#[tokio::test]
async fn the_reference_library_verifies_webhooks_before_during_and_after_a_rotation() {
    let stack = Stack::start().await;
    let [old, new] = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"];
    let mut lead = String::new();
    for (round, secrets) in [vec![old], vec![new, old], vec![new]].into_iter().enumerate() {
        let callback = json!({"name": "crm", "url": stack.receiver.url("/crm"), "secrets": secrets});
        let applied = stack.process(json!([callback])).await;
        if lead.is_empty() {
            lead = stack.api.initiate(process_id(&applied), None).await;
        }

        let request = eventually(TEST_TIMEOUT, "webhooks are signed with these secrets", async || {
            let before = stack.receiver.requests_to("/crm").len();
            stack.api.update(json!({"leadId": lead, "metadata": {"round": round, "text": "é"}})).await;
            let requests = stack.receiver.wait_for_requests("/crm", before + 1, TEST_TIMEOUT).await;
            let (request, signatures) = (requests[before].clone(), signature_count(&requests[before]));
            let verified = verified(secrets[0], &request).is_ok();
            if signatures == secrets.len() && verified { Ok(request) } else { Err(format!("{signatures}, {verified}")) }
        })
        .await;

        for secret in [old, new] {
            let verified = verified(secret, &request);
            assert_eq!(verified.is_ok(), secrets.contains(&secret), "round {round}: {verified:?}");
        }
        let mut forged = request.clone();
        forged.body = request.body.iter().copied().chain(*b" ").collect();
        assert!(verified(secrets[0], &forged).is_err(), "a forged body");
    }
}
