//! The JSON of responses.

use contract::{
    JsonObject, ObjectId, Timestamp,
    event::{CompletionEvent, OutcomeKind, WebhookPayload},
    event_kind::DeliveryKind,
    process::Process,
    rpc::{self, Cursor, DeliveryId, DeliveryStatus, Page, UpdateStatus},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::*;

const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);
const AT: Timestamp = Timestamp::from_millis(1_768_193_759_048);

/// The JSON of a response. Asserts that it deserializes to the same response.
fn json<T: Serialize + DeserializeOwned>(response: &T) -> String {
    let text = serde_json::to_string(response).unwrap();
    assert_eq!(serde_json::to_string(&serde_json::from_str::<T>(&text).unwrap()).unwrap(), text);
    text
}

fn object(text: &str) -> JsonObject {
    JsonObject::from_text(text.into()).unwrap()
}

fn lead() -> rpc::Lead {
    rpc::Lead {
        lead_id: ObjectId::from_bytes([1; 12]),
        project_id: PROJECT,
        process_id: ObjectId::from_bytes([2; 12]),
        reference_id: Some("R".into()),
        name: Some("Ada".into()),
        phone: Some("+14155550123".into()),
        email: None,
        state: "interested".into(),
        disposition: Some("callback".into()),
        metadata: object(r#"{"n":100000000000000000000000000001.50}"#),
        version: 2,
        created_at: AT,
        updated_at: AT,
        activities: vec![rpc::Activity {
            kind: OutcomeKind::Update,
            update_id: ObjectId::from_bytes([3; 12]),
            success: true,
            error: None,
            from_state: Some("new".into()),
            to_state: Some("interested".into()),
            disposition: Some("callback".into()),
            user_id: None,
            timestamp: AT,
            result: None,
        }],
    }
}

#[test]
fn leads() {
    let initiated = InitiateResponse {
        success: true,
        lead: lead().into(),
        existing: false,
        update_id: None,
        outcome: None,
        warnings: vec![],
    };
    insta::assert_snapshot!(json(&initiated), @r#"{"success":true,"_id":"010101010101010101010101","name":"Ada","phone":"+14155550123","email":null,"projectId":"111111111111111111111111","processId":"020202020202020202020202","referenceId":"R","currentState":"interested","metadata":{"n":100000000000000000000000000001.50},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z"}"#);
    let details = DataResponse::new(LeadDetails::from(lead()));
    insta::assert_snapshot!(json(&details), @r#"{"success":true,"data":{"_id":"010101010101010101010101","name":"Ada","phone":"+14155550123","email":null,"projectId":"111111111111111111111111","processId":"020202020202020202020202","referenceId":"R","currentState":"interested","metadata":{"n":100000000000000000000000000001.50},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z","lastDisposition":"callback","activities":[{"kind":"update","updateId":"030303030303030303030303","success":true,"error":null,"fromState":"new","toState":"interested","disposition":"callback","userId":null,"timestamp":"2026-01-12T04:55:59.048Z"}]}}"#);
    let page = Page { items: vec![lead()], next: Some(Cursor::new("leads", "x")) };
    let listed = ListResponse::<ListedLead>::new(page, vec![]);
    insta::assert_snapshot!(json(&listed), @r#"{"success":true,"data":[{"_id":"010101010101010101010101","name":"Ada","phone":"+14155550123","email":null,"projectId":"111111111111111111111111","processId":"020202020202020202020202","referenceId":"R","currentState":"interested","metadata":{"n":100000000000000000000000000001.50},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z","lastDisposition":"callback","version":2}],"next":"bGVhZHM6eA"}"#);
}

#[test]
fn an_audit_trail() {
    let update = rpc::HistoryEntry {
        kind: OutcomeKind::CallEnded,
        update_id: ObjectId::from_bytes([1; 12]),
        success: false,
        error: Some("No".into()),
        error_code: Some("no".into()),
        from_state: Some("new".into()),
        to_state: Some("new".into()),
        disposition: None,
        version: Some(1),
        user_id: Some("u-1".into()),
        api_key_id: Some(ObjectId::from_bytes([4; 12])),
        warnings: vec!["w".into()],
        epoch: 1,
        log_sequence: 7,
        log_index: 0,
        logged_at: AT,
        applied_at: AT,
    };
    let listed = ListResponse::<HistoryEntry>::new(Page { items: vec![update], next: None }, vec![]);
    insta::assert_snapshot!(json(&listed), @r#"{"success":true,"data":[{"kind":"call.ended","updateId":"010101010101010101010101","status":"failed","error":"No","errorCode":"no","fromState":"new","toState":"new","disposition":null,"version":1,"userId":"u-1","apiKeyId":"040404040404040404040404","warnings":["w"],"loggedAt":"2026-01-12T04:55:59.048Z","appliedAt":"2026-01-12T04:55:59.048Z"}],"next":null}"#);
}

fn pending() -> rpc::Update {
    rpc::Update::pending(ObjectId::from_bytes([1; 12]))
}

fn timeline(update: rpc::Update, deliveries: Option<Vec<rpc::Delivery>>) -> String {
    let deliveries = deliveries.map(|deliveries| deliveries.into_iter().map(Into::into).collect());
    let data = UpdateTimeline { deliveries, ..update.into() };
    json(&TimelineResponse { success: true, data, warnings: vec![] })
}

#[test]
fn the_timeline_of_an_update_that_is_still_in_the_log() {
    insta::assert_snapshot!(timeline(pending(), Some(vec![])), @r#"{"success":true,"data":{"updateId":"010101010101010101010101","status":"pending","command":null,"outcome":null,"errorCode":null,"warnings":[],"fromState":null,"toState":null,"version":null,"userId":null,"apiKeyId":null,"loggedAt":null,"appliedAt":null,"deliveries":[]}}"#);
}

#[test]
fn the_timeline_of_an_update_with_deliveries() {
    let update = rpc::Update {
        status: UpdateStatus::Succeeded,
        command: Some(object(r#"{"leadId":"020202020202020202020202","metadata":{"n":1.50}}"#)),
        log_sequence: Some(7),
        logged_at: Some(AT),
        lead_id: Some(ObjectId::from_bytes([2; 12])),
        process_id: Some(ObjectId::from_bytes([3; 12])),
        reference_id: Some("R".into()),
        from_state: Some("new".into()),
        to_state: Some("new".into()),
        version: Some(2),
        user_id: Some("u-1".into()),
        api_key_id: Some(ObjectId::from_bytes([4; 12])),
        warnings: vec!["disposition was ignored".into()],
        applied_at: Some(AT),
        data: Some(object(r#"{"n":1.50}"#)),
        ..pending()
    };
    let delivery = rpc::Delivery {
        update_id: update.update_id,
        callback_id: ObjectId::from_bytes([5; 12]),
        kind: DeliveryKind::Update,
        status: DeliveryStatus::Pending,
        next_attempt_at: Some(AT.plus(std::time::Duration::from_secs(5))),
        attempts: vec![rpc::Attempt {
            number: 1,
            started_at: AT,
            duration_ms: 12,
            status_code: Some(500),
            error: Some("the endpoint answered 500".into()),
            response: Some("oops".into()),
        }],
    };
    insta::assert_snapshot!(timeline(update, Some(vec![delivery])), @r#"{"success":true,"data":{"updateId":"010101010101010101010101","status":"succeeded","command":{"leadId":"020202020202020202020202","metadata":{"n":1.50}},"outcome":{"action_type":"update","updateId":"010101010101010101010101","success":true,"error":null,"leadId":"020202020202020202020202","referenceId":"R","timestamp":1768193759048,"data":{"n":1.50}},"errorCode":null,"warnings":["disposition was ignored"],"fromState":"new","toState":"new","version":2,"userId":"u-1","apiKeyId":"040404040404040404040404","loggedAt":"2026-01-12T04:55:59.048Z","appliedAt":"2026-01-12T04:55:59.048Z","deliveries":[{"callbackId":"050505050505050505050505","status":"pending","nextAttemptAt":"2026-01-12T04:56:04.048Z","attempts":[{"number":1,"startedAt":"2026-01-12T04:55:59.048Z","durationMs":12,"statusCode":500,"error":"the endpoint answered 500","response":"oops"}]}]}}"#);
}

#[test]
fn the_timeline_of_a_failed_update_without_the_notifier() {
    let update = rpc::Update {
        status: UpdateStatus::Failed,
        lead_id: Some(ObjectId::from_bytes([2; 12])),
        error: Some("Lead update is not allowed while a call is in progress for this lead".into()),
        error_code: Some("call_in_progress".into()),
        applied_at: Some(AT),
        ..pending()
    };
    insta::assert_snapshot!(timeline(update, None), @r#"{"success":true,"data":{"updateId":"010101010101010101010101","status":"failed","command":null,"outcome":{"action_type":"update","updateId":"010101010101010101010101","success":false,"error":"Lead update is not allowed while a call is in progress for this lead","leadId":"020202020202020202020202","referenceId":null,"timestamp":1768193759048,"data":null},"errorCode":"call_in_progress","warnings":[],"fromState":null,"toState":null,"version":null,"userId":null,"apiKeyId":null,"loggedAt":null,"appliedAt":"2026-01-12T04:55:59.048Z","deliveries":null}}"#);
}

fn event() -> CompletionEvent {
    CompletionEvent {
        process_id: Some(ObjectId::from_bytes([3; 12])),
        lead_id: Some(ObjectId::from_bytes([4; 12])),
        from_state: Some("new".into()),
        to_state: Some("lost".into()),
        version: Some(2),
        warnings: vec!["two".into()],
        data: Some(object(r#"{"n":1.50}"#)),
        ..CompletionEvent::new(OutcomeKind::Update, ObjectId::from_bytes([2; 12]), ObjectId::from_bytes([1; 12]), AT)
    }
}

#[test]
fn an_outcome_is_the_body_of_a_webhook() {
    let webhook = serde_json::to_string(&WebhookPayload::from(&event())).unwrap();
    assert_eq!(json(&Outcome::from(event())), webhook);
    assert_eq!(json(&Event::from(event())), webhook.replace("}}", r#"},"errorCode":null}"#));
}

#[test]
fn a_dry_run_has_no_update_id() {
    let response = DryRunResponse {
        success: true,
        message: "Dry run: nothing was changed".into(),
        dry_run: true,
        outcome: event().into(),
        warnings: vec!["one".into(), "two".into()],
    };
    insta::assert_snapshot!(json(&response), @r#"{"success":true,"message":"Dry run: nothing was changed","dryRun":true,"outcome":{"success":true,"error":null,"errorCode":null,"leadId":"040404040404040404040404","referenceId":null,"fromState":"new","toState":"lost","version":2,"data":{"n":1.50}},"warnings":["one","two"]}"#);
}

#[test]
fn deliveries() {
    let delivery = rpc::ListedDelivery {
        id: DeliveryId {
            update_id: ObjectId::from_bytes([1; 12]),
            callback_id: ObjectId::from_bytes([2; 12]),
            kind: DeliveryKind::Update,
        },
        process_id: Some(ObjectId::from_bytes([3; 12])),
        status: DeliveryStatus::Exhausted,
        attempts: 10,
        next_attempt_at: None,
        created_at: AT,
        updated_at: AT,
        status_code: Some(500),
        error: Some("the endpoint answered 500".into()),
    };
    let listed = ListResponse::<ListedDelivery>::new(Page { items: vec![delivery], next: None }, vec![]);
    insta::assert_snapshot!(json(&listed), @r#"{"success":true,"data":[{"deliveryId":"010101010101010101010101-020202020202020202020202","updateId":"010101010101010101010101","callbackId":"020202020202020202020202","processId":"030303030303030303030303","status":"exhausted","attempts":10,"nextAttemptAt":null,"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z","statusCode":500,"error":"the endpoint answered 500"}],"next":null}"#);
}

#[test]
fn a_process_shows_when_secrets_retire() {
    let process: Process = serde_json::from_str(&format!(
        r#"{{"projectId":"{PROJECT}","processId":"020202020202020202020202","revision":7,"name":"p",
             "states":[{{"name":"new","kind":"initial"}}],"callbacks":[{{"callbackId":"030303030303030303030303","name":"crm",
             "url":"https://crm.example","auth":{{"type":"bearer"}},"retiringSecrets":[{{"until":{}}}]}}]}}"#,
        AT.millis(),
    ))
    .unwrap();
    insta::assert_snapshot!(json(&ConfiguredProcess::from(process)), @r#"{"processId":"020202020202020202020202","projectId":"111111111111111111111111","version":7,"name":"p","states":[{"name":"new","kind":"initial"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[{"callbackId":"030303030303030303030303","name":"crm","url":"https://crm.example","auth":{"type":"bearer"},"enabled":true,"timeoutSeconds":15,"maxInFlight":64,"retiringSecrets":[{"until":"2026-01-12T04:55:59.048Z"}]}]}"#);
}

#[test]
fn the_test_of_a_callback() {
    let tested = rpc::TestResult {
        webhook_id: ObjectId::from_bytes([1; 12]),
        started_at: AT,
        duration_ms: 12,
        status_code: Some(500),
        error: Some("the endpoint answered 500 Internal Server Error".into()),
        response: Some("oops".into()),
    };
    insta::assert_snapshot!(json(&TestResult::from(tested)), @r#"{"webhookId":"010101010101010101010101","delivered":false,"startedAt":"2026-01-12T04:55:59.048Z","durationMs":12,"statusCode":500,"error":"the endpoint answered 500 Internal Server Error","response":"oops"}"#);
}
