//! Traces: the spans of an update, from the client's request to the webhook, as a collector receives them over
//! OTLP/HTTP.

use std::collections::HashMap;

use contract::ObjectId;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use reqwest::Method;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use test_support::{Receiver, Reply, Request, eventually, free_port, nats, postgres};

use crate::support::{Stack, TEST_TIMEOUT, UPDATE, assert_ok};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// A span, and the service that created it.
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

/// The spans that a collector received.
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

/// Waits until a trace has this many spans, and returns them in the order of their start.
async fn trace(collector: &Receiver, trace_id: &str, spans: usize) -> Vec<Collected> {
    let mut of_trace = eventually(TEST_TIMEOUT, "the spans", async || {
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

/// A trace in the form of docs/operations/monitoring.md: the tree of spans with start and duration.
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

/// The settings of a service that exports to this collector with little delay.
fn exporting(endpoint: &str) -> [(&str, &str); 4] {
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=tests"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ("RETRY_SCHEDULE", "0s,100ms"),
    ]
}

/// Posts an update with this trace context, and returns its id.
async fn update(stack: &Stack, traceparent: &str, body: &Value) -> String {
    let answer = assert_ok(stack.api.ask(Method::POST, UPDATE, &[("traceparent", traceparent)], body).await);
    answer["updateId"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn an_update_is_one_trace_from_the_request_to_the_webhook() {
    let (collector, stack, lead_id) = exporting_stack().await;
    stack.receiver.on("/crm", [500, 204]);
    let update_id = update(&stack, &format!("00-{TRACE}-{CLIENT}-01"), &json!({"leadId": lead_id, "name": "x"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let spans = trace(&collector, TRACE, 7).await;
    eprintln!("{}", waterfall(&spans, CLIENT));

    // Each span is a child of the previous one; both attempts are children of the delivery.
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
        // The trace continues at the endpoint from the attempt that reached it.
        let expected = format!("00-{TRACE}-{}-01", spans[place].id());
        assert_eq!(requests[place - 5].header("traceparent"), Some(expected.as_str()));
    }
    assert_eq!(attribute(5, "error.type").as_deref(), Some("500"));
    assert_eq!(attribute(6, "http.request.resend_count").as_deref(), Some("1"));
}

/// A collector, a stack that exports to it, and a lead.
async fn exporting_stack() -> (Receiver, Stack, String) {
    let collector = Receiver::start().await;
    let stack = Stack::start_with(&exporting(&collector.url(""))).await;
    let lead_id = stack.lead(&["crm"]).await;
    (collector, stack, lead_id)
}

/// The trace id in a webhook's `traceparent`.
fn trace_id(request: &Request) -> String {
    request.header("traceparent").expect("a trace")[3..35].to_owned()
}

#[tokio::test]
async fn an_unsampled_trace_is_passed_on_and_not_exported() {
    let (collector, stack, lead_id) = exporting_stack().await;
    let unsampled = format!("00-{}-{CLIENT}-00", "ab".repeat(16));

    update(&stack, &unsampled, &json!({"leadId": lead_id, "name": "x"})).await;
    // Webhooks of two updates may arrive in either order.
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.api.update(json!({"leadId": lead_id, "name": "y"})).await;

    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    assert_eq!(requests[0].header("traceparent"), Some(unsampled.as_str()));
    // Spans are exported in order. Once the spans of the second update are there, those of the first would be, too.
    trace(&collector, &trace_id(&requests[1]), 6).await;
    let all = collected(&collector);
    assert!(!all.iter().any(|collected| hex(&collected.span.trace_id) == unsampled[3..35]), "{all:#?}");
}

#[tokio::test]
async fn an_update_without_a_trace_starts_one_at_its_entry() {
    let (collector, stack, lead_id) = exporting_stack().await;

    let refused = stack.api.update(json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    let requests = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    let spans = trace(&collector, &trace_id(&requests[0]), 6).await;
    assert_eq!(spans[0].parent(), "");
    assert_eq!(spans[2].attribute("leadrelay.outcome").as_deref(), Some("refused"));
    assert_eq!(spans[2].attribute("leadrelay.error_code").as_deref(), Some("unknown_state"));
    assert_eq!(spans[2].attribute("leadrelay.update_id"), Some(refused));
    assert!(!spans[2].failed(), "a refusal is an outcome");

    // A command that is published directly to the log starts its trace at lead-state.
    let command = json!({"updateId": ObjectId::from_bytes([7; 12]), "leadId": lead_id, "name": "y"});
    stack.publish_update(&command).await;
    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let spans = trace(&collector, &trace_id(&requests[1]), 4).await;
    assert_eq!((spans[0].span.name.as_str(), spans[0].parent()), ("apply LEAD_COMMANDS", String::new()));
}

#[tokio::test]
async fn the_updates_of_a_bulk_request_share_the_spans_up_to_the_log() {
    let (collector, stack, lead_id) = exporting_stack().await;

    let line = |name| json!({"leadId": lead_id, "name": name}).to_string();
    let bulk = stack.api.request(Method::POST, "/api/v1/leads/update/bulk");
    let bulk = bulk.header("traceparent", format!("00-{TRACE}-{CLIENT}-01")).body([line("a"), line("b")].join("\n"));
    assert_eq!(bulk.send().await.expect("an answer").text().await.expect("a body").lines().count(), 2);

    let spans = trace(&collector, TRACE, 10).await;
    eprintln!("{}", waterfall(&spans, CLIENT));
    let publish: Vec<_> = spans.iter().filter(|collected| collected.kind() == SpanKind::Producer).collect();
    assert_eq!(publish[0].attribute("messaging.batch.message_count").as_deref(), Some("2"));
    let applied = spans.iter().filter(|collected| collected.parent() == publish[0].id());
    assert_eq!(applied.filter(|collected| collected.span.name == "apply LEAD_COMMANDS").count(), 2);
}

#[tokio::test]
async fn a_collector_that_is_unreachable_hangs_or_refuses_delays_nothing() {
    let collector = Receiver::start().await;
    collector.on("/hangs/v1/traces", [Reply::hang()]);
    collector.on("/refuses/v1/traces", [403]);
    let unreachable = format!("http://127.0.0.1:{}", free_port());
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let operator = NatsConfig::at(nats.url());
    let mut stack = Stack::start_on(nats, postgres, &operator, |service| {
        let endpoint = match service {
            "gateway" => unreachable.clone(),
            "lead-state" => collector.url("/hangs"),
            _ => collector.url("/refuses"),
        };
        exporting(&endpoint).map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    })
    .await;
    let lead_id = stack.lead(&["crm"]).await;
    for number in 1..=3 {
        let update_id = stack.api.update(json!({"leadId": lead_id, "name": format!("x{number}")})).await;
        let requests = stack.receiver.wait_for_requests("/crm", number, TEST_TIMEOUT).await;
        assert_eq!(requests[number - 1].json()["updateId"], update_id);
    }
    let failure = "cannot export traces";
    stack.gateway.wait_for_log(failure, TEST_TIMEOUT).await;
    stack.notifier.wait_for_log(failure, TEST_TIMEOUT).await;
    // An export of lead-state must hang when the service stops.
    eventually(TEST_TIMEOUT, "lead-state exports", async || !collector.requests_to("/hangs/v1/traces").is_empty())
        .await;
    for service in [&mut stack.gateway, &mut stack.lead_state, &mut stack.notifier] {
        let status = service.terminate().await;
        assert!(status.success(), "{}: {status}", service.name());
    }
    // The hanging export was cut off.
    assert!(stack.lead_state.log().contains("the last spans may not have been exported"), "{}", stack.lead_state.log());
    for service in [&stack.gateway, &stack.notifier] {
        let log = service.log();
        assert_eq!(log.matches(failure).count(), 1, "{log}");
    }
}
