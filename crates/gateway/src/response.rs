//! 1 Accept: responses: JSON bodies, entity tags, errors.

use axum::{
    body::Body,
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_TYPE, ETAG, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use contract::text::bounded_error;
use http_api::ErrorResponse;
use serde::Serialize;

use crate::error::ApiError;

pub(crate) type HandlerResult = Result<Response, ApiError>;

/// After how many seconds a refused client should retry. Commands in flight drain in well under a second. A broker or a
/// full log takes longer than one retry to recover, and earlier retries would only add load.
const RETRY_AFTER_SECONDS: u16 = 2;

/// 200 with a JSON body.
pub(crate) fn ok(body: &impl Serialize) -> HandlerResult {
    json(StatusCode::OK, body)
}

/// 200 with a JSON body, and its version in `ETag`, for `If-Match`.
pub(crate) fn versioned(version: i64, body: &impl Serialize) -> HandlerResult {
    let mut response = json(StatusCode::OK, body)?;
    if let Some(etag) = etag(version) {
        response.headers_mut().insert(ETAG, etag);
    }
    Ok(response)
}

/// A version as an entity tag.
pub(crate) fn etag(version: i64) -> Option<HeaderValue> {
    HeaderValue::try_from(format!("\"{version}\"")).ok()
}

fn json(status: StatusCode, body: &impl Serialize) -> HandlerResult {
    let text = serde_json::to_vec(body).map_err(|e| {
        tracing::error!("cannot serialize a response: {e}");
        ApiError::Internal
    })?;
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// The response for an error.
pub(crate) fn error(error: &ApiError, request_id: &str) -> Response {
    let status = error.status();
    let body = ErrorResponse {
        success: false,
        error: bounded_error(error.to_string()),
        code: error.code().to_owned(),
        request_id: request_id.to_owned(),
    };
    let mut response = json(status, &body).unwrap_or_else(|_| status.into_response());
    let headers = response.headers_mut();
    match (error.retry_after(), status) {
        (Some(seconds), _) => {
            headers.insert(RETRY_AFTER, seconds.into());
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
