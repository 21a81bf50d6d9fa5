//! Traces: the spans of an update, from the client's request to the webhook, as a collector receives them over OTLP/HTTP.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use contract::ObjectId;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use test_support::{Receiver, Reply, eventually, free_port, nats, postgres};

use crate::stack::{SOON, Stack};

const UPDATE: &str = "/api/v1/leads/update";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// A span, and the service that made it.
#[derive(Debug, Clone)]
struct Collected {
    service: String,
    span: Span,
}

impl Collected {
    fn id(&self) -> String {
        hex(&self.span.span_id)
    }

    fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    fn kind(&self) -> SpanKind {
        self.span.kind()
    }

    /// An attribute, as text.
    fn attribute(&self, key: &str) -> Option<String> {
        attribute(&self.span.attributes, key)
    }

    fn failed(&self) -> bool {
        self.span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref();
    match value {
        Some(AnyValue { value: Some(any_value::Value::StringValue(text)) }) => Some(text.clone()),
        Some(AnyValue { value: Some(any_value::Value::IntValue(number)) }) => Some(number.to_string()),
        other => panic!("{key}: {other:?}"),
    }
}

/// All spans that a collector received.
fn collected(collector: &Receiver) -> Vec<Collected> {
    let mut spans = Vec::new();
    for request in collector.requests_to("/v1/traces") {
        assert_eq!(request.header("content-type"), Some("application/x-protobuf"));
        assert_eq!(request.header("x-tenant"), Some("tests"), "OTEL_EXPORTER_OTLP_HEADERS");
        let export = ExportTraceServiceRequest::decode(request.body.clone()).expect("OTLP");
        for of_resource in export.resource_spans {
            let resource = of_resource.resource.expect("a resource").attributes;
            let service = attribute(&resource, "service.name").expect("a name");
            assert_eq!(attribute(&resource, "service.namespace").as_deref(), Some("leadrelay"));
            let all = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            spans.extend(all.map(|span| Collected { service: service.clone(), span }));
        }
    }
    spans
}

/// The spans of a trace, by when they began, once there are so many.
async fn trace(collector: &Receiver, trace_id: &str, spans: usize) -> Vec<Collected> {
    let mut of_trace = eventually(SOON, "the spans", async || {
        let mut all = collected(collector);
        all.retain(|collected| hex(&collected.span.trace_id) == trace_id);
        if all.len() >= spans {
            Ok(all)
        } else {
            Err(all
                .iter()
                .map(|collected| format!("{} {}\n", collected.service, collected.span.name))
                .collect::<String>())
        }
    })
    .await;
    of_trace.sort_by_key(|collected| collected.span.start_time_unix_nano);
    assert_eq!(of_trace.len(), spans, "{of_trace:#?}");
    of_trace
}

/// A trace as docs/operations/monitoring.md shows it: what hangs beneath what, when it began and how long it took.
fn waterfall(spans: &[Collected], root: &str) -> String {
    fn rows(spans: &[Collected], parent: &str, depth: usize, text: &mut String) {
        let first = spans[0].span.start_time_unix_nano;
        let ms = |nanos: u64| nanos as f64 / 1e6;
        for collected in spans.iter().filter(|collected| collected.parent() == parent) {
            let Span { name, start_time_unix_nano: start, end_time_unix_nano: end, .. } = &collected.span;
            let name = format!("{}{name}", "  ".repeat(depth));
            let mut notes = collected.service.clone();
            let keys =
                ["http.response.status_code", "leadrelay.log.sequence", "leadrelay.outcome", "leadrelay.attempt"];
            for (key, value) in keys.iter().filter_map(|key| Some((key, collected.attribute(key)?))) {
                notes += &format!(" {}={value}", key.trim_start_matches("leadrelay."));
            }
            *text += &format!("{:>9.2} {:>9.2}  {name:<42} {notes}\n", ms(start - first), ms(end - start));
            rows(spans, &collected.id(), depth + 1, text);
        }
    }
    let mut text = "start ms   took ms\n".into();
    rows(spans, root, 0, &mut text);
    text
}

/// What makes a service export to this collector, without much delay.
fn exporting(endpoint: &str) -> [(&str, &str); 4] {
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=tests"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ("RETRY_SCHEDULE", "0s,100ms"),
    ]
}

/// Gives a project a callback; a lead of its.
async fn lead(stack: &Stack) -> String {
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    stack.api.initiate(applied.process.process_id.expect("an id"), None).await
}

/// Posts an update that belongs to this trace; its id.
async fn update(stack: &Stack, traceparent: &str, body: &Value) -> String {
    let (status, answer) = stack.api.ask(reqwest::Method::POST, UPDATE, &[("traceparent", traceparent)], body).await;
    assert_eq!(status, 200, "{answer}");
    answer["updateId"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn an_update_is_one_trace_from_the_request_to_the_webhook() {
    let collector = Receiver::start().await;
    let stack = Stack::start_with(&exporting(&collector.url(""))).await;
    let lead_id = lead(&stack).await;
    stack.receiver.on("/crm", [500, 204]);
    let update_id = update(&stack, &format!("00-{TRACE}-{CLIENT}-01"), &json!({"leadId": lead_id, "name": "x"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    let spans = trace(&collector, TRACE, 7).await;
    eprintln!("{}", waterfall(&spans, CLIENT));

    // Each hangs beneath the one before, but both attempts beneath the delivery.
    let names = [
        ("gateway", "POST /api/v1/leads/update", SpanKind::Server),
        ("gateway", "publish LEAD_COMMANDS", SpanKind::Producer),
        ("lead-state", "apply LEAD_COMMANDS", SpanKind::Consumer),
        ("lead-state", "announce LEAD_EVENTS", SpanKind::Producer),
        ("webhook-notifier", "deliver LEAD_EVENTS", SpanKind::Consumer),
        ("webhook-notifier", "POST", SpanKind::Client),
        ("webhook-notifier", "POST", SpanKind::Client),
    ];
    let by_id: HashMap<_, _> = spans.iter().map(|collected| (collected.id(), collected)).collect();
    assert_eq!(by_id.len(), spans.len());
    for (place, (collected, (service, name, kind))) in spans.iter().zip(names).enumerate() {
        let what = format!("{place}: {collected:#?}");
        assert_eq!((collected.service.as_str(), collected.span.name.as_str(), collected.kind()), (service, name, kind));
        let above = match place {
            0 => CLIENT.to_owned(),
            6 => spans[4].id(),
            _ => spans[place - 1].id(),
        };
        assert_eq!(collected.parent(), above, "{what}");
        assert_eq!(collected.attribute("leadrelay.update_id").as_deref(), Some(update_id.as_str()), "{what}");
        assert!(collected.span.start_time_unix_nano < collected.span.end_time_unix_nano, "{what}");
        if matches!(kind, SpanKind::Producer | SpanKind::Consumer) {
            let stream = name.split(' ').next_back();
            assert_eq!(collected.attribute("messaging.system").as_deref(), Some("nats"), "{what}");
            assert_eq!(collected.attribute("messaging.destination.name").as_deref(), stream, "{what}");
        }
        assert_eq!(collected.failed(), place == 5, "{what}");
    }
    let attribute = |place: usize, key| spans[place].attribute(key);
    assert_eq!(attribute(0, "http.response.status_code").as_deref(), Some("200"));
    assert_eq!(attribute(1, "leadrelay.log.sequence"), attribute(2, "leadrelay.log.sequence"));
    assert_eq!(attribute(2, "leadrelay.outcome").as_deref(), Some("applied"));
    assert_eq!(attribute(2, "messaging.batch.message_count").as_deref(), Some("1"));
    for (place, status) in [(5, "500"), (6, "204")] {
        assert_eq!(attribute(place, "http.response.status_code").as_deref(), Some(status));
        assert_eq!(attribute(place, "leadrelay.attempt"), Some((place - 4).to_string()));
        // What the endpoint does goes on from the attempt that reached it.
        let expected = format!("00-{TRACE}-{}-01", spans[place].id());
        assert_eq!(requests[place - 5].header("traceparent"), Some(expected.as_str()));
    }
    assert_eq!(attribute(5, "error.type").as_deref(), Some("500"));
    assert_eq!(attribute(6, "http.request.resend_count").as_deref(), Some("1"));
}

#[tokio::test]
async fn a_trace_is_exported_when_its_client_or_the_sampler_says_so() {
    let collector = Receiver::start().await;
    let stack = Stack::start_with(&exporting(&collector.url(""))).await;
    let lead_id = lead(&stack).await;

    // Not sampled: it goes on as it came.
    let unsampled = format!("00-{}-{CLIENT}-00", "ab".repeat(16));
    update(&stack, &unsampled, &json!({"leadId": lead_id, "name": "x"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 1, SOON).await;
    assert_eq!(requests[0].header("traceparent"), Some(unsampled.as_str()));

    // A refused update without a trace: it begins one.
    let refused = stack.api.update(json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, SOON).await;
    let new = requests[1].header("traceparent").expect("a trace").to_owned();
    let spans = trace(&collector, &new[3..35], 6).await;
    assert_eq!(spans[0].parent(), "");
    assert_eq!(spans[2].attribute("leadrelay.outcome").as_deref(), Some("refused"));
    assert_eq!(spans[2].attribute("leadrelay.error_code").as_deref(), Some("unknown_state"));
    assert_eq!(spans[2].attribute("leadrelay.update_id"), Some(refused));
    assert!(!spans[2].failed(), "a refusal is an outcome");

    // A producer's command without a trace, too.
    let command = json!({"updateId": ObjectId::from_bytes([7; 12]), "leadId": lead_id, "name": "y"});
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), command.to_string()).await;
    let requests = stack.receiver.wait_for_requests("/crm", 3, SOON).await;
    let new = requests[2].header("traceparent").expect("a trace").to_owned();
    let spans = trace(&collector, &new[3..35], 4).await;
    assert_eq!((spans[0].span.name.as_str(), spans[0].parent()), ("apply LEAD_COMMANDS", String::new()));

    // Two updates in one body: one way into the log, and each its own from there.
    let line = |name| json!({"leadId": lead_id, "name": name}).to_string();
    let bulk = stack.api.http.post(format!("{}/api/v1/leads/update/bulk", stack.api.url)).bearer_auth(&stack.api.key);
    let bulk = bulk.header("traceparent", format!("00-{TRACE}-{CLIENT}-01")).body([line("a"), line("b")].join("\n"));
    assert_eq!(bulk.send().await.expect("an answer").text().await.expect("a body").lines().count(), 2);
    let spans = trace(&collector, TRACE, 10).await;
    eprintln!("{}", waterfall(&spans, CLIENT));
    let publish: Vec<_> = spans.iter().filter(|collected| collected.kind() == SpanKind::Producer).collect();
    assert_eq!(publish[0].attribute("messaging.batch.message_count").as_deref(), Some("2"));
    let applied = spans.iter().filter(|collected| collected.parent() == publish[0].id());
    assert_eq!(applied.filter(|collected| collected.span.name == "apply LEAD_COMMANDS").count(), 2);

    let all = collected(&collector);
    assert!(!all.iter().any(|collected| hex(&collected.span.trace_id) == unsampled[3..35]), "{all:#?}");
}

#[tokio::test]
async fn a_collector_that_is_away_or_hangs_disturbs_nothing() {
    let collector = Receiver::start().await;
    collector.on("/hangs/v1/traces", [Reply::hang()]);
    collector.on("/refuses/v1/traces", [403]);
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let operator = NatsConfig::at(nats.url());
    let mut stack = Stack::start_on(nats, postgres, &operator, |service| {
        let endpoint = match service {
            "gateway" => nobody.clone(),
            "lead-state" => collector.url("/hangs"),
            _ => collector.url("/refuses"),
        };
        exporting(&endpoint).map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    })
    .await;
    let lead_id = lead(&stack).await;
    for number in 1..=3 {
        let update_id = stack.api.update(json!({"leadId": lead_id, "name": format!("x{number}")})).await;
        let requests = stack.receiver.wait_for_requests("/crm", number, SOON).await;
        assert_eq!(requests[number - 1].json()["updateId"], update_id);
    }
    let away = "cannot export traces";
    stack.gateway.wait_for_log(away, SOON).await;
    stack.notifier.wait_for_log(away, SOON).await;
    // Until one of its batches hangs.
    eventually(SOON, "lead-state exports", async || {
        let asked = collector.requests_to("/hangs/v1/traces").len();
        if asked > 0 { Ok(()) } else { Err("nothing came".to_owned()) }
    })
    .await;
    for service in [&mut stack.gateway, &mut stack.lead_state, &mut stack.notifier] {
        let asked = Instant::now();
        let status = service.terminate().await;
        assert!(status.success(), "{}: {status}", service.name());
        assert!(asked.elapsed() < Duration::from_secs(8), "{}: {:?}", service.name(), asked.elapsed());
    }
    for service in [&stack.gateway, &stack.notifier] {
        let log = service.log();
        assert_eq!(log.matches(away).count(), 1, "{log}");
    }
}
