//! 1 Accept: the errors of the HTTP API: a status, a stable code and one sentence each. docs/ERRORS.md has them all.

use std::time::Duration;

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use contract::{ObjectId, fields::BodyError, key::Scope, rpc::RpcError};
use service_kit::shares::ShareUsed;

/// A pool of the gateway of which every project has a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SharedPool {
    InFlight,
    BulkRequests,
    CallReports,
    EventStreams,
}

impl SharedPool {
    fn code(self) -> &'static str {
        match self {
            Self::InFlight => "too_many_in_flight",
            Self::BulkRequests => "too_many_bulk_requests",
            Self::CallReports => "too_many_call_reports",
            Self::EventStreams => "too_many_listeners",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::InFlight => "updates in flight",
            Self::BulkRequests => "bulk requests",
            Self::CallReports => "call reports",
            Self::EventStreams => "event streams",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::InFlight => "nothing was accepted; wait for responses, or send in bulk",
            Self::BulkRequests => "nothing was accepted; retry when one has ended",
            Self::CallReports => "nothing was accepted; retry",
            Self::EventStreams => "close one, or retry later",
        }
    }
}

/// Why a request fails. The text is for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    /// A fault of the body, a parameter or a header.
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error("The body could not be read: {0}")]
    UnreadableBody(String),
    /// An invalid field, in the words of the vendor's API.
    #[error("{0}")]
    InvalidVendorField(&'static str),
    #[error("An API key is required, as Authorization: Bearer <key>")]
    MissingKey,
    #[error("The API key {0}")]
    InvalidKey(&'static str),
    #[error("The API key lacks the scope {}", .0.as_str())]
    MissingScope(Scope),
    #[error("There is no endpoint at this path")]
    UnknownPath,
    #[error("This endpoint does not support this method; the Allow header lists those it does")]
    MethodNotAllowed,
    #[error("The body did not arrive within {0} seconds")]
    BodyTimeout(u64),
    #[error("The body is larger than {0} bytes")]
    BodyTooLarge(usize),
    #[error("The update is larger than the command log accepts")]
    CommandTooLarge,
    #[error("A bulk request may have {0} updates; this one and all later ones were not read")]
    TooManyLines(usize),
    #[error("The body must be JSON: send the header Content-Type: application/json")]
    UnsupportedMediaType,
    #[error("The body's Content-Encoding must be gzip or deflate, or absent")]
    UnsupportedEncoding,
    #[error("The header {0} is given twice")]
    RepeatedHeader(&'static str),
    #[error("The Idempotency-Key was used with another body")]
    IdempotencyConflict,
    #[error("Too many requests under this API key; retry in {0} s")]
    RateLimited(u64),
    /// The project's updates have caused too much work. Contains the time to wait.
    #[error(
        "This project moves too much data: its leads are large, or have many callbacks; nothing was accepted; \
         retry in {} s", whole_seconds(*.0)
    )]
    WorkLimited(Duration),
    /// Contains the number of the project's idempotency keys.
    #[error(
        "This project has {0} idempotency keys of the last 24 hours, its current share; nothing was accepted; send it without \
         Idempotency-Key, or when keys have expired"
    )]
    IdempotencyShare(u64),
    #[error("Too many updates of this project wait in the log to be applied; nothing was accepted; retry in 2 s")]
    ProjectBacklog,
    #[error("Some of the events after this id are no longer kept")]
    EventsGone,
    #[error("Internal error; see the service's log")]
    Internal,
    #[error("The gateway has just started and has not loaded the API keys yet; retry")]
    Starting,
    /// The project has used up its share of a pool, or the pool is full.
    #[error("Too many {}: {}; {}", .0.name(), .1, .0.advice())]
    ShareUsed(SharedPool, ShareUsed),
    #[error("NATS cannot be reached; nothing was accepted")]
    BrokerUnavailable,
    #[error("The command log has no leader or does not exist; nothing was accepted")]
    LogUnavailable,
    #[error("The command log is full; nothing was accepted")]
    LogFull,
    /// JetStream refused the command, and stored nothing.
    #[error("{0}; nothing was accepted")]
    LogRefused(String),
    #[error("No room for more idempotency keys; nothing was accepted")]
    IdempotencyFull,
    #[error("Idempotency keys cannot be read now; nothing was accepted")]
    IdempotencyUnavailable,
    #[error("The command log did not confirm in time: update {0} may or may not have been accepted")]
    NotConfirmed(ObjectId),
    /// A service is unavailable, and the request may be repeated.
    #[error("The request could not be answered because a service is unavailable; retry")]
    Unavailable,
    /// A change was sent to a service, and no answer came: it may have been made.
    #[error("A service did not answer: the change may or may not have been made; check before you retry")]
    Unconfirmed,
    /// The error of lead-state or webhook-notifier.
    #[error("{0}")]
    Query(RpcError),
}

impl ApiError {
    pub(crate) fn field(field: impl Into<String>, fault: impl Into<String>) -> Self {
        BodyError::field(field, fault).into()
    }

    pub(crate) fn missing(text: &'static str) -> Self {
        BodyError::MissingField(text).into()
    }

    /// After how many seconds to retry, if that is known.
    pub(crate) fn retry_after(&self) -> Option<u64> {
        match self {
            Self::RateLimited(seconds) => Some(*seconds),
            Self::WorkLimited(wait) => Some(whole_seconds(*wait)),
            _ => None,
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status_and_code().0
    }

    pub(crate) fn code(&self) -> &str {
        match self {
            Self::Query(e) => &e.code,
            own => own.status_and_code().1,
        }
    }

    /// The code as the label of a metric. All codes of other services share one label, because they are not a closed
    /// set.
    pub(crate) fn label(&self) -> &'static str {
        self.status_and_code().1
    }

    fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Body(e @ BodyError::ProjectMismatch) => (StatusCode::FORBIDDEN, e.code()),
            Self::Body(e) => (StatusCode::BAD_REQUEST, e.code()),
            Self::UnreadableBody(_) => (StatusCode::BAD_REQUEST, "unreadable_body"),
            Self::InvalidVendorField(_) => (StatusCode::BAD_REQUEST, "invalid_field"),
            Self::TooManyLines(_) => (StatusCode::BAD_REQUEST, "too_many_lines"),
            Self::MissingKey => (StatusCode::UNAUTHORIZED, "missing_api_key"),
            Self::InvalidKey(_) => (StatusCode::UNAUTHORIZED, "invalid_api_key"),
            Self::MissingScope(_) => (StatusCode::FORBIDDEN, "missing_scope"),
            Self::UnknownPath => (StatusCode::NOT_FOUND, "unknown_path"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::BodyTimeout(_) => (StatusCode::REQUEST_TIMEOUT, "body_timeout"),
            Self::EventsGone => (StatusCode::GONE, "events_gone"),
            Self::BodyTooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
            Self::CommandTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "command_too_large"),
            Self::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::UnsupportedEncoding => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding"),
            Self::RepeatedHeader(_) => (StatusCode::BAD_REQUEST, "repeated_header"),
            Self::IdempotencyConflict => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
            Self::RateLimited(_) => (StatusCode::TOO_MANY_REQUESTS, "rate_limited"),
            Self::WorkLimited(_) => (StatusCode::TOO_MANY_REQUESTS, "work_limited"),
            Self::IdempotencyShare(_) => (StatusCode::TOO_MANY_REQUESTS, "idempotency_share"),
            Self::ProjectBacklog => (StatusCode::TOO_MANY_REQUESTS, "project_backlog"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
            Self::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
            Self::ShareUsed(pool, ShareUsed { held: 0, .. }) => (StatusCode::SERVICE_UNAVAILABLE, pool.code()),
            Self::ShareUsed(pool, _) => (StatusCode::TOO_MANY_REQUESTS, pool.code()),
            Self::BrokerUnavailable | Self::LogUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "broker_unavailable"),
            Self::LogFull => (StatusCode::SERVICE_UNAVAILABLE, "log_full"),
            Self::LogRefused(_) => (StatusCode::SERVICE_UNAVAILABLE, "log_refused"),
            Self::IdempotencyFull => (StatusCode::SERVICE_UNAVAILABLE, "idempotency_full"),
            Self::IdempotencyUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "idempotency_unavailable"),
            Self::NotConfirmed(_) => (StatusCode::SERVICE_UNAVAILABLE, "not_confirmed"),
            Self::Unavailable | Self::Unconfirmed => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::Query(e) => {
                let status = StatusCode::from_u16(e.status).ok();
                let error = status.filter(|status| status.is_client_error() || status.is_server_error());
                (error.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), "query")
            }
        }
    }
}

/// Whole seconds, rounded up: a retry that is too early is refused again.
pub(crate) fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

/// The error becomes an extension of the response. The router writes the body, because the body contains the request
/// id.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use axum::http::header::RETRY_AFTER;
    use contract::{json::JsonFault, rpc::ErrorCode};

    use super::*;
    use crate::response;

    /// The next error, or the first for None. Every variant has an arm, so a new variant does not compile until it is
    /// in the tests.
    fn following(error: Option<&ApiError>) -> Option<ApiError> {
        let Some(error) = error else { return Some(ApiError::Body(BodyError::InvalidJson(JsonFault::Utf8(6)))) };
        Some(match error {
            ApiError::Body(error) => match error {
                BodyError::InvalidJson(_) => BodyError::NotAnObject.into(),
                BodyError::NotAnObject => ApiError::field("leadId", "must be 24 hex digits"),
                BodyError::InvalidField { .. } => ApiError::missing("since is required"),
                BodyError::MissingField(_) => {
                    BodyError::AddressMissing(Some("; lead_id is written leadId".into())).into()
                }
                BodyError::AddressMissing(_) => BodyError::NothingToChange.into(),
                BodyError::NothingToChange => BodyError::ProjectMismatch.into(),
                BodyError::ProjectMismatch => ApiError::UnreadableBody("connection reset".into()),
            },
            ApiError::UnreadableBody(_) => ApiError::InvalidVendorField("Input must be an array"),
            ApiError::InvalidVendorField(_) => ApiError::MissingKey,
            ApiError::MissingKey => ApiError::InvalidKey("is unknown"),
            ApiError::InvalidKey(_) => ApiError::MissingScope(Scope::LeadsWrite),
            ApiError::MissingScope(_) => ApiError::UnknownPath,
            ApiError::UnknownPath => ApiError::MethodNotAllowed,
            ApiError::MethodNotAllowed => ApiError::BodyTimeout(10),
            ApiError::BodyTimeout(_) => ApiError::BodyTooLarge(262_144),
            ApiError::BodyTooLarge(_) => ApiError::CommandTooLarge,
            ApiError::CommandTooLarge => ApiError::TooManyLines(10_000),
            ApiError::TooManyLines(_) => ApiError::UnsupportedMediaType,
            ApiError::UnsupportedMediaType => ApiError::UnsupportedEncoding,
            ApiError::UnsupportedEncoding => ApiError::RepeatedHeader("Host"),
            ApiError::RepeatedHeader(_) => ApiError::IdempotencyConflict,
            ApiError::IdempotencyConflict => ApiError::RateLimited(3),
            ApiError::RateLimited(_) => ApiError::WorkLimited(Duration::from_millis(1200)),
            ApiError::WorkLimited(_) => ApiError::IdempotencyShare(600_000),
            ApiError::IdempotencyShare(_) => ApiError::ProjectBacklog,
            ApiError::ProjectBacklog => ApiError::EventsGone,
            ApiError::EventsGone => ApiError::Internal,
            ApiError::Internal => ApiError::Starting,
            ApiError::Starting => ApiError::ShareUsed(SharedPool::InFlight, ShareUsed { held: 2048, total: 4096 }),
            ApiError::ShareUsed(SharedPool::InFlight, ShareUsed { held: 1.., .. }) => {
                ApiError::ShareUsed(SharedPool::InFlight, ShareUsed { held: 0, total: 4096 })
            }
            ApiError::ShareUsed(SharedPool::InFlight, _) => {
                ApiError::ShareUsed(SharedPool::BulkRequests, ShareUsed { held: 16, total: 32 })
            }
            ApiError::ShareUsed(SharedPool::BulkRequests, ShareUsed { held: 1.., .. }) => {
                ApiError::ShareUsed(SharedPool::BulkRequests, ShareUsed { held: 0, total: 32 })
            }
            ApiError::ShareUsed(SharedPool::BulkRequests, _) => {
                ApiError::ShareUsed(SharedPool::CallReports, ShareUsed { held: 32, total: 64 })
            }
            ApiError::ShareUsed(SharedPool::CallReports, ShareUsed { held: 1.., .. }) => {
                ApiError::ShareUsed(SharedPool::CallReports, ShareUsed { held: 0, total: 64 })
            }
            ApiError::ShareUsed(SharedPool::CallReports, _) => {
                ApiError::ShareUsed(SharedPool::EventStreams, ShareUsed { held: 64, total: 128 })
            }
            ApiError::ShareUsed(SharedPool::EventStreams, ShareUsed { held: 1.., .. }) => {
                ApiError::ShareUsed(SharedPool::EventStreams, ShareUsed { held: 0, total: 128 })
            }
            ApiError::ShareUsed(SharedPool::EventStreams, _) => ApiError::BrokerUnavailable,
            ApiError::BrokerUnavailable => ApiError::LogUnavailable,
            ApiError::LogUnavailable => ApiError::LogFull,
            ApiError::LogFull => ApiError::LogRefused("JetStream refused the message: insufficient resources".into()),
            ApiError::LogRefused(_) => ApiError::IdempotencyFull,
            ApiError::IdempotencyFull => ApiError::IdempotencyUnavailable,
            ApiError::IdempotencyUnavailable => ApiError::NotConfirmed(ObjectId::from_bytes([1; 12])),
            ApiError::NotConfirmed(_) => ApiError::Unavailable,
            ApiError::Unavailable => ApiError::Unconfirmed,
            ApiError::Unconfirmed => ApiError::Query(RpcError::new(ErrorCode::LeadNotFound, "Lead not found")),
            ApiError::Query(_) => return None,
        })
    }

    /// Every error, once.
    pub(crate) fn all() -> Vec<ApiError> {
        std::iter::successors(following(None), |error| following(Some(error))).collect()
    }

    #[test]
    fn errors_have_documented_codes_and_fitting_statuses() {
        let documented = include_str!("../../../docs/ERRORS.md");
        for error in all() {
            let row = format!("| HTTP | {} | `{}` |", error.status().as_u16(), error.code());
            assert!(documented.contains(&row), "docs/ERRORS.md lacks {row}");
        }
        let own = all().into_iter().map(|error| (error.status().as_u16(), error.code().to_owned()));
        let of_queries = ErrorCode::ALL.iter().map(|code| (code.status(), code.as_str().to_owned()));
        let rows: Vec<_> =
            own.chain(of_queries).map(|(status, code)| format!("| HTTP | {status} | `{code}` |")).collect();
        let with_status = |line: &&str| line.strip_prefix("| HTTP | ").is_some_and(|rest| rest.starts_with(['4', '5']));
        for line in documented.lines().filter(with_status) {
            assert!(rows.iter().any(|row| line.starts_with(row)), "no response has the code of {line}");
        }
        let table = all().into_iter().map(|e| {
            let response = response::error(&e, "r");
            let retry = if response.headers().contains_key(RETRY_AFTER) { " (retry)" } else { "" };
            format!("{} {}{retry}: {e}", e.status().as_u16(), e.code())
        });
        insta::assert_snapshot!(table.collect::<Vec<_>>().join("\n"), @r"
        400 invalid_json: The body cannot be accepted as JSON: not valid UTF-8 (byte 6)
        400 not_an_object: The body must be a JSON object
        400 invalid_field: leadId must be 24 hex digits
        400 missing_field: since is required
        400 address_missing: Either leadId or referenceId is required; lead_id is written leadId
        400 nothing_to_change: Nothing to change: give metadata, name or targetState
        403 project_mismatch: projectId does not match authenticated project
        400 unreadable_body: The body could not be read: connection reset
        400 invalid_field: Input must be an array
        401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        401 invalid_api_key: The API key is unknown
        403 missing_scope: The API key lacks the scope leads:write
        404 unknown_path: There is no endpoint at this path
        405 method_not_allowed: This endpoint does not support this method; the Allow header lists those it does
        408 body_timeout: The body did not arrive within 10 seconds
        413 body_too_large: The body is larger than 262144 bytes
        413 command_too_large: The update is larger than the command log accepts
        400 too_many_lines: A bulk request may have 10000 updates; this one and all later ones were not read
        415 unsupported_media_type: The body must be JSON: send the header Content-Type: application/json
        415 unsupported_encoding: The body's Content-Encoding must be gzip or deflate, or absent
        400 repeated_header: The header Host is given twice
        422 idempotency_key_reused: The Idempotency-Key was used with another body
        429 rate_limited (retry): Too many requests under this API key; retry in 3 s
        429 work_limited (retry): This project moves too much data: its leads are large, or have many callbacks; nothing was accepted; retry in 2 s
        429 idempotency_share (retry): This project has 600000 idempotency keys of the last 24 hours, its current share; nothing was accepted; send it without Idempotency-Key, or when keys have expired
        429 project_backlog (retry): Too many updates of this project wait in the log to be applied; nothing was accepted; retry in 2 s
        410 events_gone: Some of the events after this id are no longer kept
        500 internal: Internal error; see the service's log
        503 starting (retry): The gateway has just started and has not loaded the API keys yet; retry
        429 too_many_in_flight (retry): Too many updates in flight: this project has 2048 of 4096, its current share; nothing was accepted; wait for responses, or send in bulk
        503 too_many_in_flight (retry): Too many updates in flight: all 4096 are in use; nothing was accepted; wait for responses, or send in bulk
        429 too_many_bulk_requests (retry): Too many bulk requests: this project has 16 of 32, its current share; nothing was accepted; retry when one has ended
        503 too_many_bulk_requests (retry): Too many bulk requests: all 32 are in use; nothing was accepted; retry when one has ended
        429 too_many_call_reports (retry): Too many call reports: this project has 32 of 64, its current share; nothing was accepted; retry
        503 too_many_call_reports (retry): Too many call reports: all 64 are in use; nothing was accepted; retry
        429 too_many_listeners (retry): Too many event streams: this project has 64 of 128, its current share; close one, or retry later
        503 too_many_listeners (retry): Too many event streams: all 128 are in use; close one, or retry later
        503 broker_unavailable (retry): NATS cannot be reached; nothing was accepted
        503 broker_unavailable (retry): The command log has no leader or does not exist; nothing was accepted
        503 log_full (retry): The command log is full; nothing was accepted
        503 log_refused (retry): JetStream refused the message: insufficient resources; nothing was accepted
        503 idempotency_full (retry): No room for more idempotency keys; nothing was accepted
        503 idempotency_unavailable (retry): Idempotency keys cannot be read now; nothing was accepted
        503 not_confirmed (retry): The command log did not confirm in time: update 010101010101010101010101 may or may not have been accepted
        503 unavailable (retry): The request could not be answered because a service is unavailable; retry
        503 unavailable (retry): A service did not answer: the change may or may not have been made; check before you retry
        404 lead_not_found: Lead not found
        ");
    }

    #[test]
    fn a_query_that_fails_with_a_success_status_is_an_internal_error() {
        assert_eq!(ApiError::Query(RpcError::received(200, "odd", "?")).status(), StatusCode::INTERNAL_SERVER_ERROR);
    }
}
