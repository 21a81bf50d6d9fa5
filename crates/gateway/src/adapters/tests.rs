use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const LEAD: &str = "696102a4b8c1d2e3f4a5b6c7";
const PROCESS: ObjectId = ObjectId::from_bytes([0x22; 12]);

macro_rules! sample {
    ($name:literal) => {
        include_str!(concat!("../../../../tests/samples/calls/", $name, ".json"))
    };
}

fn map_text(platform: Platform, text: &str) -> Result<Report, BodyError> {
    map(
        platform,
        text.replace("LEAD", LEAD).replace("\"PROCESS\"", &format!("\"{PROCESS}\"")).as_bytes(),
        Some(PROCESS),
    )
}

fn show(platform: Platform, text: &str) -> String {
    match map_text(platform, text) {
        Ok(Report::Call(CallReport { kind, id, body, omitted })) => {
            let body = String::from_utf8(body).unwrap();
            format!("{kind} {} of {} {omitted:?}\n{body}", id.step, id.call_id)
        }
        Ok(Report::Other(event)) => format!("ignored: {event}"),
        Err(e) => format!("{}: {e}", e.code()),
    }
}

fn report(platform: Platform, text: &str) -> CallReport {
    match map_text(platform, text) {
        Ok(Report::Call(report)) => report,
        other => panic!("no call: {other:?}"),
    }
}

#[test]
fn the_webhooks_of_vapi_become_call_events() {
    let shown = [
        sample!("vapi-ringing"),
        sample!("vapi-started"),
        sample!("vapi-ended"),
        sample!("vapi-report"),
        sample!("vapi-unanswered"),
        r#"{"message":{"type":"transcript","call":{"id":"c"}}}"#,
        r#"{"message":{"type":"status-update","status":"ended","call":{"id":"c"}}}"#,
        r#"{"message":{"type":"status-update","status":"ended","call":{"metadata":{"leadId":"LEAD"}}}}"#,
        r#"{"type":"status-update"}"#,
        "[]",
    ]
    .map(|text| show(Platform::Vapi, text));
    insta::assert_snapshot!(shown.join("\n\n"));
}

#[test]
fn the_webhooks_of_retell_become_call_events() {
    let shown = [
        sample!("retell-started"),
        sample!("retell-ended"),
        sample!("retell-analyzed"),
        sample!("retell-unanswered"),
        sample!("retell-transcript"),
        r#"{"event":"call_ended","call":{}}"#,
        r#"{"call":{}}"#,
    ]
    .map(|text| show(Platform::Retell, text));
    insta::assert_snapshot!(shown.join("\n\n"));
}

#[test]
fn the_webhooks_of_bland_become_call_events() {
    let shown = [
        sample!("bland-completed"),
        sample!("bland-voicemail"),
        sample!("bland-stream"),
        r#"{"call_id":"c","status":"no-answer","metadata":{"leadId":"LEAD"},"queue_status":"complete"}"#,
        r#"{"call_id":"c","status":"in-progress"}"#,
        r#"{"completed":true}"#,
    ]
    .map(|text| show(Platform::Bland, text));
    insta::assert_snapshot!(shown.join("\n\n"));
}

#[test]
fn every_call_event_is_one_that_the_api_accepts() {
    for (platform, text) in [
        (Platform::Vapi, sample!("vapi-started")),
        (Platform::Vapi, sample!("vapi-report")),
        (Platform::Retell, sample!("retell-analyzed")),
        (Platform::Bland, sample!("bland-completed")),
        (Platform::Bland, sample!("bland-voicemail")),
    ] {
        let CallReport { kind, body, .. } = report(platform, text);
        crate::command::Command::parse(kind, &body, PROCESS).unwrap();
    }
}

#[test]
fn a_result_that_is_too_large_loses_its_largest_fields_and_names_them() {
    let long = |kib: usize| "x".repeat(kib << 10);
    let body = json!({"call_id": "c", "completed": true, "metadata": {"leadId": LEAD}, "summary": long(100),
        "transcripts": [long(200)], "variables": {"a": long(150)}, "to": "+12223334444"});

    let CallReport { kind, body, omitted, .. } = report(Platform::Bland, &body.to_string());

    assert_eq!(omitted, ["transcripts", "variables"]);
    crate::command::Command::parse(kind, &body, PROCESS).unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["result"]["metadata"]["omitted"], json!(["transcripts", "variables"]));
    assert_eq!(body["result"]["metadata"]["to"], "+12223334444");
    assert_eq!(body["result"]["summary"].as_str().unwrap().len(), 100 << 10);

    let body = json!({"call_id": "c", "completed": true, "metadata": {"leadId": LEAD}, "summary": long(250),
        "analysis": {"a": long(250)}});
    let CallReport { body, omitted, .. } = report(Platform::Bland, &body.to_string());
    assert_eq!(omitted, ["metadata", "completed", "analysis", "summary"]);
    crate::command::Command::parse(OutcomeKind::CallEnded, &body, PROCESS).unwrap();
}

#[test]
fn a_result_of_too_many_fields_names_the_first_of_those_that_it_loses() {
    let fields = (0..30_000).map(|number| (format!("{:0<40}", format!("field-{number}-")), json!(1)));
    let mut body: serde_json::Map<_, _> = fields.collect();
    body.insert("call_id".into(), json!("c"));
    body.insert("completed".into(), json!(true));
    body.insert("metadata".into(), json!({"leadId": LEAD}));

    let CallReport { kind, body, omitted, .. } = report(Platform::Bland, &Value::Object(body).to_string());

    crate::command::Command::parse(kind, &body, PROCESS).unwrap();
    let kept = serde_json::from_slice::<Value>(&body).unwrap()["result"]["metadata"].as_object().unwrap().len() - 1;
    // Every field of the body but `call_id`, which does not go into the metadata.
    let left_out = 30_002 - kept;
    assert_eq!((omitted.len(), omitted[16].as_str()), (17, format!("and {} more", left_out - 16).as_str()));
    assert!(omitted[..16].iter().all(|name| name.chars().count() == 32), "{omitted:?}");
    assert!(kept > 500, "{kept}");
}

#[test]
fn a_field_of_another_type_than_documented_goes_into_the_metadata() {
    let text = r#"{"call_id":"c","completed":true,"metadata":{"leadId":"LEAD"},"summary":7,"disposition_tag":["a"],
        "recording_url":"","call_length":"soon"}"#;

    let body: Value = serde_json::from_slice(&report(Platform::Bland, text).body).unwrap();

    let metadata = &body["result"]["metadata"];
    assert_eq!(metadata["summary"], 7);
    assert_eq!(metadata["disposition_tag"], json!(["a"]));
    assert_eq!((&metadata["recording_url"], &metadata["call_length"]), (&json!(""), &json!("soon")));
    assert_eq!(body["result"]["durationSeconds"], Value::Null);
}

proptest! {
    #[test]
    fn arbitrary_bodies_never_panic(
        platform in prop::sample::select(Platform::ALL.to_vec()),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let samples = [sample!("vapi-report"), sample!("retell-analyzed"), sample!("bland-completed")];
        for sample in samples {
            let mut bytes = sample.as_bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = map(platform, &bytes, None);
        }
    }
}
