//! 1 Accept: everything that a request can be refused with: a status, a stable code and one sentence each.

use axum::{
    http::{
        HeaderValue, StatusCode,
        header::{RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use contract::{ObjectId, json::JsonFault, key::Scope, rpc::RpcError};
use serde::Serialize;

use crate::routes::json;

/// After how many seconds a refused client should try again. What is in flight drains in well under a second; a
/// broker or a full log takes longer than one retry to come back, and clients that hurry only add to the load.
const RETRY_AFTER_SECONDS: u16 = 2;

/// Why a request is refused. The text is for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("The body cannot be accepted as JSON: {0}")]
    InvalidJson(JsonFault),
    #[error("The body must be a JSON object")]
    NotAnObject,
    #[error("The body could not be read: {0}")]
    UnreadableBody(String),
    #[error("{field} {fault}")]
    InvalidField { field: String, fault: String },
    /// A field that holds what it may not, in the words in which the vendor's API says it.
    #[error("{0}")]
    UnfitField(&'static str),
    #[error("{0}")]
    MissingField(&'static str),
    #[error("Nothing to change: give metadata, name or targetState")]
    NothingToChange,
    #[error("An API key is required, as Authorization: Bearer <key>")]
    MissingKey,
    #[error("The API key {0}")]
    InvalidKey(&'static str),
    #[error("The API key lacks the scope {}", .0.as_str())]
    MissingScope(Scope),
    #[error("projectId does not match authenticated project")]
    OtherProject,
    #[error("There is nothing at this path")]
    UnknownPath,
    #[error("This path does not take this method")]
    MethodNotAllowed,
    #[error("The body did not arrive within {0} seconds")]
    BodyTimeout(u64),
    #[error("The body is larger than {0} bytes")]
    BodyTooLarge(usize),
    #[error("The update is larger than the command log takes")]
    CommandTooLarge,
    #[error("The update is larger than {0} bytes")]
    LineTooLarge(usize),
    #[error("A bulk request takes {0} updates; this one and what comes after it was not read")]
    TooManyLines(usize),
    #[error("The body must be JSON: Content-Type: application/json")]
    UnsupportedMediaType,
    #[error("The Idempotency-Key was used with another body")]
    IdempotencyConflict,
    #[error("Too many requests under this API key; try again in {0} s")]
    RateLimited(u64),
    #[error("The events behind this id are no longer kept, or not all of them")]
    EventsGone,
    #[error("Internal error; the service's log says more")]
    Internal,
    #[error("The gateway has just started and does not know the API keys yet")]
    Starting,
    #[error("Too many updates are in flight; nothing was accepted")]
    TooManyInFlight,
    #[error("Too many bulk requests are under way; nothing was accepted")]
    TooManyBulkRequests,
    #[error("Too many clients follow events already")]
    TooManyListeners,
    #[error("NATS cannot be reached; nothing was accepted")]
    BrokerUnavailable,
    #[error("The command log is full; nothing was accepted")]
    LogFull,
    #[error("No room for more idempotency keys; nothing was accepted")]
    IdempotencyFull,
    #[error("Idempotency keys cannot be looked up now; nothing was accepted")]
    IdempotencyUnavailable,
    #[error("The command log did not confirm in time: update {0} may or may not have been accepted")]
    NotConfirmed(ObjectId),
    /// What lead-state or webhook-notifier answered.
    #[error("{0}")]
    Query(RpcError),
}

impl From<RpcError> for ApiError {
    fn from(error: RpcError) -> Self {
        // That something is stored and only waits for its effect is no secret.
        if error.status == 503 && error.code != "not_projected" {
            // Which service and subject is the operator's to know, not the client's.
            tracing::warn!(code = error.code, "a query went unanswered: {error}");
            return Self::Query(RpcError { message: "The answer is not available now; try again".into(), ..error });
        }
        Self::Query(error)
    }
}

impl ApiError {
    /// A field that holds what it may not.
    pub(crate) fn field(field: impl Into<String>, fault: impl Into<String>) -> Self {
        Self::InvalidField { field: field.into(), fault: fault.into() }
    }

    /// The HTTP status.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::InvalidJson(_)
            | Self::NotAnObject
            | Self::UnreadableBody(_)
            | Self::InvalidField { .. }
            | Self::UnfitField(_)
            | Self::MissingField(_)
            | Self::NothingToChange
            | Self::TooManyLines(_) => StatusCode::BAD_REQUEST,
            Self::MissingKey | Self::InvalidKey(_) => StatusCode::UNAUTHORIZED,
            Self::MissingScope(_) | Self::OtherProject => StatusCode::FORBIDDEN,
            Self::UnknownPath => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge(_) | Self::CommandTooLarge | Self::LineTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::EventsGone => StatusCode::GONE,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::IdempotencyConflict => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Starting
            | Self::TooManyInFlight
            | Self::TooManyBulkRequests
            | Self::TooManyListeners
            | Self::BrokerUnavailable
            | Self::LogFull
            | Self::IdempotencyFull
            | Self::IdempotencyUnavailable
            | Self::NotConfirmed(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Query(e) => StatusCode::from_u16(e.status)
                .ok()
                .filter(|status| status.is_client_error() || status.is_server_error())
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    /// The stable code.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::Query(e) => &e.code,
            own => own.own_code().unwrap_or_default(),
        }
    }

    /// The stable code of what the gateway itself refuses.
    pub(crate) fn own_code(&self) -> Option<&'static str> {
        Some(match self {
            Self::InvalidJson(_) => "invalid_json",
            Self::NotAnObject => "not_an_object",
            Self::UnreadableBody(_) => "unreadable_body",
            Self::InvalidField { .. } | Self::UnfitField(_) => "invalid_field",
            Self::MissingField(_) => "missing_field",
            Self::NothingToChange => "nothing_to_change",
            Self::MissingKey => "missing_api_key",
            Self::InvalidKey(_) => "invalid_api_key",
            Self::MissingScope(_) => "missing_scope",
            Self::OtherProject => "project_mismatch",
            Self::UnknownPath => "unknown_path",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::BodyTimeout(_) => "body_timeout",
            Self::BodyTooLarge(_) => "body_too_large",
            Self::CommandTooLarge => "command_too_large",
            Self::LineTooLarge(_) => "line_too_large",
            Self::TooManyLines(_) => "too_many_lines",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::IdempotencyConflict => "idempotency_key_reused",
            Self::RateLimited(_) => "rate_limited",
            Self::EventsGone => "events_gone",
            Self::Internal => "internal",
            Self::Starting => "starting",
            Self::TooManyInFlight => "too_many_in_flight",
            Self::TooManyBulkRequests => "too_many_bulk_requests",
            Self::TooManyListeners => "too_many_listeners",
            Self::BrokerUnavailable => "broker_unavailable",
            Self::LogFull => "log_full",
            Self::IdempotencyFull => "idempotency_full",
            Self::IdempotencyUnavailable => "idempotency_unavailable",
            Self::NotConfirmed(_) => "not_confirmed",
            Self::Query(_) => return None,
        })
    }

    /// The whole answer.
    pub(crate) fn render(&self, request_id: &str) -> Response {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Refusal<'a> {
            success: bool,
            error: String,
            code: &'a str,
            request_id: &'a str,
        }
        let status = self.status();
        let refusal = Refusal { success: false, error: self.to_string(), code: self.code(), request_id };
        let mut response = json(status, &refusal);
        let headers = response.headers_mut();
        match (self, status) {
            (Self::RateLimited(seconds), _) => {
                headers.insert(RETRY_AFTER, (*seconds).into());
            }
            (_, StatusCode::UNAUTHORIZED) => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            (_, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => {
                headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS.into());
            }
            _ => {}
        }
        response
    }
}

/// The error travels as an extension: only what finishes every answer knows the request id that the body names.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One of each.
    pub(crate) fn refusals() -> Vec<ApiError> {
        vec![
            ApiError::InvalidJson(JsonFault::Utf8(6)),
            ApiError::NotAnObject,
            ApiError::UnreadableBody("connection reset".into()),
            ApiError::field("leadId", "must be 24 hex digits"),
            ApiError::UnfitField("Input must be an array"),
            ApiError::MissingField("Either leadId or referenceId is required"),
            ApiError::NothingToChange,
            ApiError::MissingKey,
            ApiError::InvalidKey("is not known"),
            ApiError::MissingScope(Scope::LeadsWrite),
            ApiError::OtherProject,
            ApiError::UnknownPath,
            ApiError::MethodNotAllowed,
            ApiError::BodyTimeout(10),
            ApiError::BodyTooLarge(262_144),
            ApiError::CommandTooLarge,
            ApiError::LineTooLarge(262_144),
            ApiError::TooManyLines(10_000),
            ApiError::UnsupportedMediaType,
            ApiError::IdempotencyConflict,
            ApiError::RateLimited(3),
            ApiError::EventsGone,
            ApiError::Internal,
            ApiError::Starting,
            ApiError::TooManyInFlight,
            ApiError::TooManyBulkRequests,
            ApiError::TooManyListeners,
            ApiError::BrokerUnavailable,
            ApiError::LogFull,
            ApiError::IdempotencyFull,
            ApiError::IdempotencyUnavailable,
            ApiError::NotConfirmed(ObjectId::from_bytes([1; 12])),
            RpcError::new(404, "lead_not_found", "Lead not found").into(),
            RpcError::new(503, "unavailable", "no service answers leads.rpc.lead.get").into(),
        ]
    }

    #[test]
    fn every_refusal_with_its_status_code_and_text() {
        let mut refusals = refusals();
        let own = include_str!("error.rs").split("fn own_code").nth(1).unwrap().split("=> return None").next().unwrap();
        for code in own.split("=> \"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
            assert!(refusals.iter().any(|refusal| refusal.code() == code), "refusals() has no {code}");
        }
        refusals.push(RpcError::new(200, "odd", "an error is never a success").into());
        let documented = include_str!("../../../docs/ERRORS.md");
        for refusal in refusals.iter().filter(|refusal| refusal.code() != "odd") {
            let row = format!("| HTTP | {} | `{}` |", refusal.status().as_u16(), refusal.code());
            assert!(documented.contains(&row), "docs/ERRORS.md lacks {row}");
        }
        let table = refusals.iter().map(|e| {
            let retry = if e.render("r").headers().contains_key(RETRY_AFTER) { " (retry)" } else { "" };
            format!("{} {}{retry}: {e}", e.status().as_u16(), e.code())
        });
        insta::assert_snapshot!(table.collect::<Vec<_>>().join("\n"), @r"
        400 invalid_json: The body cannot be accepted as JSON: not valid UTF-8 (byte 6)
        400 not_an_object: The body must be a JSON object
        400 unreadable_body: The body could not be read: connection reset
        400 invalid_field: leadId must be 24 hex digits
        400 invalid_field: Input must be an array
        400 missing_field: Either leadId or referenceId is required
        400 nothing_to_change: Nothing to change: give metadata, name or targetState
        401 missing_api_key: An API key is required, as Authorization: Bearer <key>
        401 invalid_api_key: The API key is not known
        403 missing_scope: The API key lacks the scope leads:write
        403 project_mismatch: projectId does not match authenticated project
        404 unknown_path: There is nothing at this path
        405 method_not_allowed: This path does not take this method
        408 body_timeout: The body did not arrive within 10 seconds
        413 body_too_large: The body is larger than 262144 bytes
        413 command_too_large: The update is larger than the command log takes
        413 line_too_large: The update is larger than 262144 bytes
        400 too_many_lines: A bulk request takes 10000 updates; this one and what comes after it was not read
        415 unsupported_media_type: The body must be JSON: Content-Type: application/json
        422 idempotency_key_reused: The Idempotency-Key was used with another body
        429 rate_limited (retry): Too many requests under this API key; try again in 3 s
        410 events_gone: The events behind this id are no longer kept, or not all of them
        500 internal: Internal error; the service's log says more
        503 starting (retry): The gateway has just started and does not know the API keys yet
        503 too_many_in_flight (retry): Too many updates are in flight; nothing was accepted
        503 too_many_bulk_requests (retry): Too many bulk requests are under way; nothing was accepted
        503 too_many_listeners (retry): Too many clients follow events already
        503 broker_unavailable (retry): NATS cannot be reached; nothing was accepted
        503 log_full (retry): The command log is full; nothing was accepted
        503 idempotency_full (retry): No room for more idempotency keys; nothing was accepted
        503 idempotency_unavailable (retry): Idempotency keys cannot be looked up now; nothing was accepted
        503 not_confirmed (retry): The command log did not confirm in time: update 010101010101010101010101 may or may not have been accepted
        404 lead_not_found: Lead not found
        503 unavailable (retry): The answer is not available now; try again
        500 odd: an error is never a success
        ");
    }
}
