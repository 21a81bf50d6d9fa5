//! `onExisting`: a lead that exists is returned or updated instead of rejected, singly and in bulk.

use contract::ObjectId;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{CALL_IN_PROGRESS, Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, process_id};

const INITIATE: &str = "/api/v1/leads/initiate";
const BULK: &str = "/api/v1/leads/bulk/initiate";

/// The body of a lead of this process with the reference `R-1`.
fn given(stack: &Stack, process_id: ObjectId) -> Value {
    json!({
        "projectId": stack.api.project_id, "processId": process_id, "referenceId": "R-1", "name": "Grace",
        "phone": "+14155550123", "metadata": {"make": "Toyota"},
    })
}

#[tokio::test]
async fn a_lead_that_exists_is_refused_by_default_and_returned_on_request() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&["crm"]).await);
    let lead = stack.api.initiate(process_id, Some("R-1")).await;
    let before = stack.api.lead(&lead).await;
    let given = given(&stack, process_id);

    let by_default = stack.api.post(INITIATE, &json!({"lead": given})).await;
    let refused = stack.api.post(INITIATE, &json!({"lead": given, "onExisting": "refuse"})).await;
    let returned = assert_ok(stack.api.post(INITIATE, &json!({"lead": given, "onExisting": "return"})).await);

    assert_refused(by_default, 400, "reference_exists");
    assert_refused(refused, 400, "reference_exists");
    assert_includes(&returned, json!({"_id": lead, "existing": true, "name": "Ada", "metadata": {"source": "import"}}));
    assert_eq!((returned.get("updateId"), stack.api.lead(&lead).await), (None, before));
}

#[tokio::test]
async fn a_missing_lead_is_created_with_every_on_existing_value() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&[]).await);
    for (number, on_existing) in ["refuse", "return", "update"].into_iter().enumerate() {
        let mut lead = given(&stack, process_id);
        lead["referenceId"] = json!(format!("new-{number}"));
        let created = assert_ok(stack.api.post(INITIATE, &json!({"lead": lead, "onExisting": on_existing})).await);
        assert_eq!((&created["name"], created.get("existing")), (&json!("Grace"), None), "{created}");
    }
}

#[tokio::test]
async fn an_update_of_a_lead_that_exists_is_an_update_like_any_other() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&["crm"]).await);
    let lead = stack.api.initiate(process_id, Some("R-1")).await;
    let upsert = json!({"lead": given(&stack, process_id), "onExisting": "update"});

    let updated = assert_ok(stack.api.ask(Method::POST, INITIATE, &[("prefer", "wait=30")], &upsert).await);

    let metadata = json!({"source": "import", "make": "Toyota"});
    let expected =
        json!({"_id": lead, "existing": true, "name": "Grace", "phone": "+4915112345678", "metadata": metadata});
    assert_includes(&updated, expected);
    assert_eq!(updated["warnings"], json!(["lead.phone is ignored: the lead exists and keeps its own"]));
    assert_includes(&updated["outcome"], json!({"success": true, "data": metadata}));
    let delivered = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0].json();
    assert_eq!(delivered, updated["outcome"]);
    let timeline = stack.api.outcome(updated["updateId"].as_str().expect("an id")).await;
    assert_includes(&timeline, json!({"status": "succeeded", "version": 2}));
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn an_update_of_a_lead_that_exists_fails_during_a_call() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&[]).await);
    let lead = stack.api.initiate(process_id, Some("R-1")).await;
    stack.publish_call("started", &json!({"leadId": lead})).await;
    let upsert = json!({"lead": given(&stack, process_id), "onExisting": "update"});

    let refused = assert_ok(stack.api.ask(Method::POST, INITIATE, &[("prefer", "wait=30")], &upsert).await);

    assert_includes(&refused["outcome"], json!({"success": false, "error": CALL_IN_PROGRESS}));
    assert_includes(&refused, json!({"existing": true, "name": "Ada", "metadata": {"source": "import"}}));
}

#[tokio::test]
async fn leads_in_bulk_are_created_returned_or_updated_each_for_itself() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&[]).await);
    let lead = stack.api.initiate(process_id, Some("R-1")).await;
    let mut new = given(&stack, process_id);
    new["referenceId"] = json!("R-2");
    let mut without = given(&stack, process_id);
    without["referenceId"] = Value::Null;
    let leads = json!([given(&stack, process_id), new, without]);

    let updated = assert_ok(stack.api.post(BULK, &json!({"leads": leads, "onExisting": "update"})).await);
    let update = updated["success"][0]["updateId"].as_str().expect("an id").to_owned();
    assert_eq!(stack.api.outcome(&update).await["status"], "succeeded");
    let returned = assert_ok(stack.api.post(BULK, &json!({"leads": leads, "onExisting": "return"})).await);

    assert_includes(&updated["success"][0], json!({"_id": lead, "existing": true, "name": "Ada"}));
    assert_eq!(updated["success"][1].get("existing"), None, "{updated}");
    assert_includes(&updated["errors"][0], json!({"code": "missing_field"}));
    let warning = "leads[0]: lead.phone is ignored: the lead exists and keeps its own";
    assert_eq!(updated["warnings"], json!([warning]));
    for existing in &returned["success"].as_array().expect("leads")[..2] {
        assert_includes(existing, json!({"existing": true, "name": "Grace", "metadata": {"make": "Toyota"}}));
    }
}
