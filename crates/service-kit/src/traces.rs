//! The spans of an update, exported over OTLP/HTTP if the standard variables are set
//! (<https://opentelemetry.io/docs/specs/otel/protocol/exporter/>), and named by OpenTelemetry's conventions.
//!
//! The parent of a span is the message's `traceparent`, and later messages carry the span's own. Without an exporter a
//! message's `traceparent` is passed on unchanged, and a span costs one check of an [`Option`].

use std::{
    borrow::Cow,
    env,
    error::Error,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use contract::trace::is_traceparent;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
pub use opentelemetry::Value;
use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
        TraceState, TracerProvider,
    },
};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, SpanExporter,
    WithHttpConfig,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracer, SdkTracerProvider, SpanData},
};
use tokio::runtime::Handle;

use crate::{clock, nats::error_chain, tls};

/// How long exporting the last spans may take when a service ends. A longer timeout waits for a slow collector; with a
/// shorter one, the service ends sooner.
pub const FLUSH: Duration = Duration::from_secs(2);
/// Maximum bytes that are read of a collector's response.
const MAX_RESPONSE: usize = 64 << 10;

/// A step of an update that is a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// 1 Accept: a client's request, until the response.
    Request {
        /// Its route.
        route: &'static str,
    },
    /// 1 Accept: commands being published, until the log acknowledges them.
    Publish,
    /// 3 Read to 5 Apply: an update, from reading its batch to the commit.
    Apply,
    /// 6 Announce: an event, until the stream acknowledges it.
    Announce,
    /// 7 Deliver: an event, from its arrival until its deliveries are recorded.
    Deliver,
    /// 7 Deliver, 8 Retry: one attempt at a callback.
    Attempt,
}

impl Step {
    fn name(self) -> Cow<'static, str> {
        match self {
            Self::Request { route } => format!("POST {route}").into(),
            Self::Publish => "publish LEAD_COMMANDS".into(),
            Self::Apply => "apply LEAD_COMMANDS".into(),
            Self::Announce => "announce LEAD_EVENTS".into(),
            Self::Deliver => "deliver LEAD_EVENTS".into(),
            Self::Attempt => "POST".into(),
        }
    }

    fn kind(self) -> SpanKind {
        match self {
            Self::Request { .. } => SpanKind::Server,
            Self::Publish | Self::Announce => SpanKind::Producer,
            Self::Apply | Self::Deliver => SpanKind::Consumer,
            Self::Attempt => SpanKind::Client,
        }
    }

    /// The attributes of all spans of the step.
    fn attributes(self) -> Vec<KeyValue> {
        let messaging = |operation, kind, stream| {
            vec![
                KeyValue::new("messaging.system", "nats"),
                KeyValue::new("messaging.operation.name", operation),
                KeyValue::new("messaging.operation.type", kind),
                KeyValue::new("messaging.destination.name", stream),
            ]
        };
        match self {
            Self::Request { route } => {
                vec![KeyValue::new("http.request.method", "POST"), KeyValue::new("http.route", route)]
            }
            Self::Publish => messaging("publish", "send", "LEAD_COMMANDS"),
            Self::Apply => messaging("apply", "process", "LEAD_COMMANDS"),
            Self::Announce => messaging("announce", "send", "LEAD_EVENTS"),
            Self::Deliver => messaging("deliver", "process", "LEAD_EVENTS"),
            Self::Attempt => vec![KeyValue::new("http.request.method", "POST")],
        }
    }
}

/// The exporter of a service's spans, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<Exporting>);

#[derive(Debug, Clone)]
struct Exporting {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Exports spans if the standard variables are set. Must be called on a runtime.
    ///
    /// # Errors
    /// A variable is invalid, such as an endpoint that is not a URL.
    pub fn from_env(service: &'static str) -> anyhow::Result<Self> {
        let is_set = |name| env::var(name).is_ok_and(|value| !value.is_empty());
        let disabled = env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        if disabled || ![OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT].into_iter().any(is_set) {
            return Ok(Self::default());
        }
        let exporter = SpanExporter::builder().with_http().with_http_client(Poster::new()?).build();
        let exporter = exporter.context("cannot export traces with these OTEL_EXPORTER_OTLP variables")?;
        let mut resource = Resource::builder().with_attributes([
            KeyValue::new("service.namespace", "leadrelay"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ]);
        if !is_set("OTEL_SERVICE_NAME") {
            resource = resource.with_service_name(service);
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(QuietExporter(exporter))
            .with_resource(resource.build())
            .build();
        tracing::info!("exporting traces");
        Ok(Self::to(provider))
    }

    fn to(provider: SdkTracerProvider) -> Self {
        let tracer = provider.tracer("leadrelay");
        Self(Some(Exporting { provider, tracer }))
    }

    /// Begins a span now, with this `traceparent` as its parent.
    pub fn begin(&self, step: Step, parent: Option<&str>) -> Span {
        match self.0 {
            Some(_) => self.begin_at(step, parent, clock::precise()),
            None => Span(None),
        }
    }

    /// Begins a span at an earlier time.
    pub fn begin_at(&self, step: Step, parent: Option<&str>, at: SystemTime) -> Span {
        let Some(Exporting { tracer, .. }) = &self.0 else { return Span(None) };
        let parent = parent.and_then(context);
        let unsampled = parent.as_ref().is_some_and(|parent| !parent.is_sampled());
        let context = match parent {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        let builder = SpanBuilder::from_name(step.name()).with_kind(step.kind()).with_start_time(at);
        let mut span = builder.start_with_context(tracer, &context);
        if span.is_recording() {
            span.set_attributes(step.attributes());
        } else if unsampled || !span.span_context().is_valid() {
            return Span(None);
        }
        Span(Some(Box::new(span)))
    }

    /// Exports the last spans within [`FLUSH`] and stops.
    pub async fn end(self) {
        let Some(Exporting { provider, .. }) = self.0 else { return };
        let flush = move || provider.shutdown_with_timeout(FLUSH);
        if !matches!(tokio::task::spawn_blocking(flush).await, Ok(Ok(()))) {
            tracing::warn!("the last spans may not have been exported");
        }
    }
}

/// A span, which ends when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Span(Option<Box<opentelemetry_sdk::trace::Span>>);

impl Span {
    /// The `traceparent` for later messages; none if the parent's is passed on.
    pub fn traceparent(&self) -> Option<String> {
        let context = self.0.as_ref()?.span_context();
        Some(format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags()))
    }

    /// Sets attributes that are only computed for a recorded span.
    pub fn note<const N: usize>(&mut self, attributes: impl FnOnce() -> [(&'static str, Value); N]) {
        if let Some(span) = self.recording() {
            span.set_attributes(attributes().map(|(key, value)| KeyValue::new(key, value)));
        }
    }

    /// Sets the update.
    pub fn update(&mut self, update_id: contract::ObjectId) {
        self.note(|| [("leadrelay.update_id", update_id.to_string().into())]);
    }

    /// Marks the span as failed: `kind` has few values, `why` is for people.
    pub fn fail(&mut self, kind: impl Into<Cow<'static, str>>, why: impl std::fmt::Display) {
        if let Some(span) = self.recording() {
            span.set_attribute(KeyValue::new("error.type", kind.into()));
            span.set_status(Status::error(why.to_string()));
        }
    }

    /// Ends the span at this time.
    pub fn end_at(mut self, at: SystemTime) {
        if let Some(span) = self.recording() {
            span.end_with_timestamp(at);
        }
    }

    fn recording(&mut self) -> Option<&mut opentelemetry_sdk::trace::Span> {
        self.0.as_deref_mut().filter(|span| span.is_recording())
    }
}

/// The span context of a `traceparent`.
fn context(traceparent: &str) -> Option<SpanContext> {
    if !is_traceparent(traceparent) {
        return None;
    }
    let trace_id = TraceId::from_hex(&traceparent[3..35]).ok()?;
    let span_id = SpanId::from_hex(&traceparent[36..52]).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(&traceparent[53..], 16).ok()?);
    Some(SpanContext::new(trace_id, span_id, flags, true, TraceState::default()))
}

/// Does not report failures: [`Poster`] logs when they begin, and not with every batch.
#[derive(Debug)]
struct QuietExporter(SpanExporter);

impl opentelemetry_sdk::trace::SpanExporter for QuietExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        if let Err(e) = self.0.export(batch).await {
            tracing::debug!("spans are lost: {e}");
        }
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

/// The exporter's HTTP client. The exporter has its own thread; requests run on the service's runtime.
#[derive(Debug)]
struct Poster {
    runtime: Handle,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// Whether the last request failed: logged when it changes.
    failing: AtomicBool,
}

impl Poster {
    fn new() -> anyhow::Result<Self> {
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls::client()?).https_or_http().enable_http1();
        let client = Client::builder(TokioExecutor::new()).build(connector.build());
        Ok(Self { runtime: Handle::current(), client, failing: AtomicBool::new(false) })
    }
}

#[async_trait]
impl HttpClient for Poster {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let endpoint = request.uri().clone();
        let client = self.client.clone();
        let post = async move {
            let (head, body) = client.request(request.map(Full::new)).await?.into_parts();
            let body = Limited::new(body, MAX_RESPONSE).collect().await?.to_bytes();
            Ok::<_, HttpError>(Response::from_parts(head, body))
        };
        // The timer needs the runtime, too.
        let post = self.runtime.spawn(async { tokio::time::timeout(OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, post).await });
        let answer = match post.await {
            Ok(Ok(answer)) => answer,
            Ok(Err(e)) => Err(e.into()),
            Err(e) => Err(e.into()),
        };
        let failure = match &answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("the collector answered {}", answer.status())),
            Err(e) => Some(error_chain(&**e as &(dyn Error + 'static))),
        };
        match failure {
            Some(why) if !self.failing.swap(true, Ordering::Relaxed) => {
                tracing::warn!(%endpoint, "cannot export traces; they are lost until the collector accepts them again: {why}");
            }
            None if self.failing.swap(false, Ordering::Relaxed) => {
                tracing::info!(%endpoint, "traces are exported again");
            }
            _ => {}
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry_sdk::trace::Sampler;
    use proptest::prelude::*;

    use super::*;

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    /// Keeps what is exported.
    #[derive(Debug, Default, Clone)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl opentelemetry_sdk::trace::SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    fn traces(sampler: Sampler) -> (Traces, Kept) {
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).with_sampler(sampler).build();
        (Traces::to(provider), kept)
    }

    fn by_parent(root: Sampler) -> Sampler {
        Sampler::ParentBased(Box::new(root))
    }

    #[test]
    fn without_an_exporter_the_parent_is_passed_on() {
        for parent in [Some(SAMPLED), Some(UNSAMPLED), Some("nonsense"), None] {
            let mut span = Traces::default().begin(Step::Publish, parent);
            span.note(|| -> [_; 1] { unreachable!("the span is not recorded") });
            assert_eq!(span.traceparent(), None);
        }
    }

    #[test]
    fn a_span_has_its_parent_and_its_own_id() {
        let (traces, kept) = traces(by_parent(Sampler::AlwaysOn));
        let mut span = traces.begin(Step::Apply, Some(SAMPLED));
        let own = span.traceparent().unwrap();
        assert!(is_traceparent(&own) && own[..36] == SAMPLED[..36] && own[53..] == SAMPLED[53..], "{own}");
        assert_ne!(own[36..52], SAMPLED[36..52]);
        span.fail("refused", "no");
        let end = clock::precise() + Duration::from_secs(1);
        span.end_at(end);
        let span = kept.0.lock().unwrap().remove(0);
        assert_eq!(
            (span.parent_span_id.to_string().as_str(), span.span_context.span_id().to_string().as_str()),
            (&SAMPLED[36..52], &own[36..52])
        );
        assert_eq!(
            (span.name.as_ref(), span.span_kind, span.end_time),
            ("apply LEAD_COMMANDS", SpanKind::Consumer, end)
        );
        assert_eq!(span.status, Status::error("no"));
    }

    #[test]
    fn unsampled_spans_are_not_exported_and_pass_the_decision_on() {
        let (on, kept) = traces(by_parent(Sampler::AlwaysOn));
        assert_eq!(on.begin(Step::Apply, Some(UNSAMPLED)).traceparent(), None, "the parent is passed on unchanged");
        let (off, kept_off) = traces(by_parent(Sampler::AlwaysOff));
        let begun = off.begin(Step::Apply, None).traceparent().unwrap();
        assert!(is_traceparent(&begun) && begun.ends_with("-00"), "{begun}");
        assert!(kept.0.lock().unwrap().is_empty() && kept_off.0.lock().unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_parent_yields_a_valid_traceparent(
            parent in prop_oneof![".*", "0[01]-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.)?", "00-0{32}-[0-9a-f]{16}-01"]
        ) {
            let (traces, _) = traces(by_parent(Sampler::AlwaysOn));
            let begun = traces.begin(Step::Deliver, Some(&parent)).traceparent();
            match begun {
                Some(begun) => {
                    prop_assert!(is_traceparent(&begun));
                    prop_assert!(!is_traceparent(&parent) || begun[..36] == parent[..36]);
                }
                None => prop_assert!(is_traceparent(&parent)),
            }
        }
    }
}
