//! 1 Accept: `POST /api/v1/calls/ingest/{platform}/{ingestId}`: the webhooks of voice platforms.
//!
//! Webhooks have no API key: the secret of their source authenticates them. webhook-notifier verifies them, because a
//! gateway has no key that opens sealed secrets
//! ([ADR 51](../../../../../docs/adr/0051-verify-call-reports-in-the-webhook-notifier.md)).

use std::{sync::Arc, time::Instant};

use axum::{
    RequestExt,
    extract::{RawPathParams, Request},
    http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use contract::{
    event::OutcomeKind,
    idempotency::IdempotencyRecord,
    process::{IngestId, Platform},
    rpc::{ErrorCode, RpcError, VerifyReport},
    subject::process_key,
    warning::Warning,
};
use http_api::{EventIgnored, UpdateAccepted};
use service_kit::clock;
use sha2::{Digest, Sha256};

use crate::{
    accept::{self, Waiting},
    adapters::{self, CallReport, Report, ReportId},
    app::{App, ReportingSource},
    auth,
    command::Command,
    error::ApiError,
    idempotency::{Claim, IDEMPOTENT_REPLAYED},
    outage::PendingRequest,
    rate_limit::{RateClass, RateLimitStatus},
    request::{body, trace::RequestTrace},
    response::{self, HandlerResult},
};

pub(crate) const PATH: &str = "/api/v1/calls/ingest/{platform}/{ingestId}";
/// The largest report, in bytes. In base64 it fits into a NATS message, which has at most 1 MiB by default. Transcripts
/// with the time of each word need more room than an update.
const MAX_BYTES: usize = 512 << 10;
/// The cost of a byte of a report in the budget of its source: how often the byte is read, copied or sent until the
/// report is verified.
const WORK_PER_BYTE: u64 = 4;

/// Responds once the call event is in the log.
pub(crate) async fn handle(app: Arc<App>, request: Request) -> HandlerResult {
    let mut trace = RequestTrace::begin(&app, PATH, request.headers());
    let response = ingest(&app, request, &mut trace).await;
    trace.record(response.as_ref().map(Response::status));
    response
}

async fn ingest(app: &App, mut request: Request, trace: &mut RequestTrace) -> HandlerResult {
    // Comes first, so that for unknown sources no body is read and no rate limit is kept.
    let (id, platform, source) = known_source(app, &mut request).await?;
    let status = app.rates.take(RateClass::Updates, id.source_id);
    let limited = status.as_ref().and_then(RateLimitStatus::retry_after);
    let response = match limited {
        Some(seconds) => Err(ApiError::RateLimited(seconds)),
        None => accept_report(app, &id, platform, source, request, trace).await,
    };
    let mut response = response.into_response();
    if let Some(status) = status {
        status.write_headers(response.headers_mut());
    }
    Ok(response)
}

async fn accept_report(
    app: &App,
    id: &IngestId,
    platform: Platform,
    source: ReportingSource,
    request: Request,
    trace: &mut RequestTrace,
) -> HandlerResult {
    let _permit = app.report_permit(id.project_id)?;
    let began = Instant::now();
    if source.platform != platform {
        return Err(ApiError::field("platform", format!("is {platform}, and the source's is {}", source.platform)));
    }
    let (signature, secret_sha256) = proof(platform, request.headers());
    // Charged to the source and not to the project: anyone who knows the path can send forged reports.
    app.read_budget.admit_read(id.source_id, began).map_err(ApiError::WorkLimited)?;
    let body = body::read(request, MAX_BYTES).await?;
    app.read_budget.spend(id.source_id, body.len() as u64 * WORK_PER_BYTE, Instant::now());
    let signed = if signature.is_some() { BASE64_STANDARD.encode(&body) } else { String::new() };
    let IngestId { project_id, process_id, source_id } = *id;
    app.request(&VerifyReport { project_id, process_id, source_id, signature, secret_sha256, body: signed }).await?;
    match adapters::map(platform, &body, process_id)? {
        Report::Other(event) => response::ok(&EventIgnored::new(event)),
        Report::Call(report) => log(app, id, report, PendingRequest { began, bytes: body.len() }, trace).await,
    }
}

/// Logs a call event. A repeated report of the same step of the call is the same event, even if the rest of the report
/// differs.
async fn log(
    app: &App,
    id: &IngestId,
    CallReport { kind, id: step, body, omitted }: CallReport,
    pending: PendingRequest,
    trace: &mut RequestTrace,
) -> HandlerResult {
    let (mut command, mut warnings) = Command::parse(kind, &body, id.project_id)?;
    let key = idempotency_key(id, &step);
    let record = IdempotencyRecord::new(kind, key.as_bytes(), None, None, clock::new_id());
    let claimed = Box::pin(app.idempotency.claim(&app.broker()?.js, id.project_id, &key, &record, pending)).await?;
    let Claim { update_id, replayed } = claimed;
    command.identify(update_id, None);
    trace.span.update(update_id);
    accept::log(app, id.project_id, &command, claimed, Waiting::NONE, &trace.traceparent, pending.began).await?;
    if !omitted.is_empty() {
        warnings.push(Warning::OMITTED.with(&[&omitted.join(", ")]));
    }
    let message = match kind {
        OutcomeKind::CallStarted => "Call start accepted",
        _ => "Call end accepted",
    };
    let accepted = UpdateAccepted { success: true, message: message.into(), update_id, warnings, outcome: None };
    let mut response = response::ok(&accepted)?;
    if replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// The key of a report. No client can send it as an `Idempotency-Key`: it contains line breaks.
fn idempotency_key(id: &IngestId, ReportId { call_id, step }: &ReportId) -> String {
    format!("{}\n{step}\n{call_id}", id.source_id)
}

async fn known_source(app: &App, request: &mut Request) -> Result<(IngestId, Platform, ReportingSource), ApiError> {
    let not_found = || ApiError::Query(RpcError::new(ErrorCode::SourceNotFound, "Source not found"));
    let parameters = request.extract_parts::<RawPathParams>().await.map_err(|_| not_found())?;
    let parameter = |name| parameters.iter().find(|(parameter, _)| *parameter == name).map(|(_, text)| text);
    let platform: Option<Platform> = parameter("platform").and_then(|text| text.parse().ok());
    let id: Option<IngestId> = parameter("ingestId").and_then(|text| text.parse().ok());
    let (Some(platform), Some(id)) = (platform, id) else { return Err(not_found()) };
    let process = app.sources.get(&process_key(id.project_id, id.process_id));
    let sources = process.iter().flat_map(|process| &process.sources);
    match sources.copied().find(|source| source.source_id == id.source_id && source.enabled) {
        Some(source) => Ok((id, platform, source)),
        None if app.sources.is_complete() => Err(not_found()),
        None => Err(ApiError::Unavailable),
    }
}

/// What authenticates a report: its signature, or the digest of the secret that came with it.
fn proof(platform: Platform, headers: &HeaderMap) -> (Option<String>, Option<String>) {
    let header = |name: &'static str| headers.get(HeaderName::from_static(name))?.to_str().ok().map(str::trim);
    let signature = match platform {
        Platform::Vapi => header("x-vapi-signature"),
        Platform::Retell => header("x-retell-signature"),
        Platform::Bland => header("x-webhook-signature"),
    };
    let bearer = || headers.contains_key(AUTHORIZATION).then(|| auth::bearer(headers)).flatten();
    let secret = match platform {
        Platform::Vapi => header("x-vapi-secret").or_else(bearer),
        Platform::Retell | Platform::Bland => None,
    };
    let digest = |secret: &str| hex::encode(Sha256::digest(secret));
    (signature.map(str::to_owned), secret.map(digest))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Calls", "ingestCall", "Report a call by the webhook of a voice platform")
        .description(
            "For Vapi, Retell and Bland, as their webhooks are: the body is the platform's, at most 512 KiB, and its \
             signature or secret is that of the source. The start and the end of a call are accepted like \
             `POST /api/v1/calls/started` and `/calls/ended`; a repetition is the same event. Other events are ignored.",
        )
        .header("traceparent")
        .body_component("PlatformReport")
        .returns::<UpdateAccepted>()
        .or_returns::<EventIgnored>()
        .response_header("Idempotent-Replayed")
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_platform_sends_its_own_proof() {
        let headers = |headers: &[(&'static str, &'static str)]| {
            let header = |(name, value): &(&'static str, &'static str)| {
                (HeaderName::from_static(name), HeaderValue::from_static(value))
            };
            headers.iter().map(header).collect::<HeaderMap>()
        };
        // echo -n s3cret | sha256sum
        let digest = "1ec1c26b50d5d3c58d9583181af8076655fe00756bf7285940ba3670f99fcba0";
        for (platform, given, expected) in [
            (Platform::Vapi, &[("x-vapi-secret", "s3cret")][..], (None, Some(digest))),
            (Platform::Vapi, &[("authorization", "Bearer s3cret")], (None, Some(digest))),
            (Platform::Vapi, &[("x-vapi-signature", "ab")], (Some("ab"), None)),
            (Platform::Retell, &[("x-retell-signature", "v=1,d=ab")], (Some("v=1,d=ab"), None)),
            (Platform::Bland, &[("x-webhook-signature", "ab")], (Some("ab"), None)),
            (Platform::Bland, &[("authorization", "Bearer s3cret"), ("x-vapi-signature", "ab")], (None, None)),
        ] {
            let (signature, secret) = proof(platform, &headers(given));
            assert_eq!((signature.as_deref(), secret.as_deref()), expected, "{platform} {given:?}");
        }
    }
}
