//! 1 Accept: `/api/v1/processes/{processId}/callbacks…`: who is told of outcomes, by what secret, and whether that works.

use std::sync::Arc;

use axum::{extract::Request, http::StatusCode};
use contract::{
    ObjectId,
    key::ApiKey,
    process::{Callback, DEFAULT_OVERLAP_SECONDS, MAX_OVERLAP_SECONDS, Process},
    rpc::{self, EnableCallback, EnableResult, Page, ProcessChange, RpcError, TEST_TIMEOUT, TestCallback, TestResult},
};
use serde::Serialize;

use crate::{
    body,
    error::ApiError,
    fields::Fields,
    routes::{
        Answer,
        deliveries::Found,
        json, list,
        processes::{CallbackView, Named, change, changed, check_urls, expected, parse_callback, read, versioned},
    },
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Tested"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct TestedView<'a> {
    webhook_id: ObjectId,
    delivered: bool,
    started_at: String,
    duration_ms: u32,
    status_code: Option<u16>,
    error: Option<&'a str>,
    response: Option<&'a str>,
}

impl<'a> From<&'a TestResult> for TestedView<'a> {
    fn from(tested: &'a TestResult) -> Self {
        Self {
            webhook_id: tested.webhook_id,
            delivered: tested.error.is_none(),
            started_at: tested.started_at.to_iso(),
            duration_ms: tested.duration_ms,
            status_code: tested.status_code,
            error: tested.error.as_deref(),
            response: tested.response.as_deref(),
        }
    }
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Enabled"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct EnabledView {
    was_disabled: bool,
}

/// The process and the callback that a request's path names.
async fn named(request: &mut Request) -> Result<(Named, ObjectId), ApiError> {
    let process = Named::of(request).await?;
    Ok((process, list::path(request, "callbackId", "must be 24 hex digits").await?))
}

fn find(process: &Process, wanted: impl Fn(&Callback) -> bool) -> Result<CallbackView, ApiError> {
    let found = process.callbacks.iter().find(|callback| wanted(callback));
    found.map(CallbackView::from).ok_or_else(|| RpcError::new(404, "callback_not_found", "Callback not found").into())
}

/// Answers with a process's callbacks: all of them on one page.
pub(crate) async fn list(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let process = read(&app, &key, Named::of(&mut request).await?).await?;
    let page = Page { items: process.callbacks.clone(), next: None };
    Ok(versioned(&process, &list::Listed::new(&page, CallbackView::from, &[])))
}

/// Answers with a callback.
pub(crate) async fn get(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let (process, callback_id) = named(&mut request).await?;
    let process = read(&app, &key, process).await?;
    let data = find(&process, |callback| callback.callback_id == callback_id)?;
    Ok(versioned(&process, &Found::new(data)))
}

/// Gives a process one more callback.
pub(crate) async fn create(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let process = Named::of(&mut request).await?;
    let expected = expected(request.headers())?;
    let callback = parse_callback(&body::read(request, app.max_body_bytes).await?)?;
    check_urls(&app, std::slice::from_ref(&callback)).await?;
    let name = callback.name.clone();
    let applied = change(&app, &key, process.which(), expected, ProcessChange::AddCallback { callback }).await?;
    let data = find(&applied.process, |callback| callback.name == name)?;
    Ok(changed(&applied, data))
}

/// Makes a callback what the body says.
pub(crate) async fn put(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let (process, callback_id) = named(&mut request).await?;
    let expected = expected(request.headers())?;
    let callback = parse_callback(&body::read(request, app.max_body_bytes).await?)?;
    check_urls(&app, std::slice::from_ref(&callback)).await?;
    let change = ProcessChange::PutCallback { callback_id, callback };
    let applied = self::change(&app, &key, process.which(), expected, change).await?;
    let data = find(&applied.process, |callback| callback.callback_id == callback_id)?;
    Ok(changed(&applied, data))
}

/// Takes a callback away.
pub(crate) async fn remove(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let (process, callback_id) = named(&mut request).await?;
    let expected = expected(request.headers())?;
    let applied = change(&app, &key, process.which(), expected, ProcessChange::RemoveCallback { callback_id }).await?;
    Ok(changed(&applied, None::<CallbackView>))
}

/// Gives a callback a new signing secret.
pub(crate) async fn rotate_secret(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let (process, callback_id) = named(&mut request).await?;
    let expected = expected(request.headers())?;
    let overlap_seconds = parse_overlap(&body::read(request, app.max_body_bytes).await?)?;
    let change = ProcessChange::RotateSecret { callback_id, overlap_seconds };
    let applied = self::change(&app, &key, process.which(), expected, change).await?;
    let data = find(&applied.process, |callback| callback.callback_id == callback_id)?;
    Ok(changed(&applied, data))
}

/// How long the secrets so far stay valid. No body asks for what is usual; what is not known in it is refused: a misspelt
/// overlap would be another one.
fn parse_overlap(body: &[u8]) -> Result<u32, ApiError> {
    if body.is_empty() {
        return Ok(DEFAULT_OVERLAP_SECONDS);
    }
    let mut fields = Fields::from_json(body)?;
    let overlap = fields.whole_number("overlapSeconds")?.unwrap_or(DEFAULT_OVERLAP_SECONDS);
    if overlap > MAX_OVERLAP_SECONDS {
        return Err(ApiError::field("overlapSeconds", format!("must be a number from 0 to {MAX_OVERLAP_SECONDS}")));
    }
    match fields.rest().keys().next() {
        None => Ok(overlap),
        Some(unknown) => Err(ApiError::field(unknown.chars().take(64).collect::<String>(), "is not known here")),
    }
}

/// Has a callback sent a ping, and answers how that went.
pub(crate) async fn test(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let (Named(process_id), callback_id) = named(&mut request).await?;
    let wanted = TestCallback { project_id: key.project_id, process_id, callback_id };
    let client = &app.broker()?.client;
    let tested: TestResult = service_kit::rpc::call_within(client, rpc::CALLBACK_TEST, &wanted, TEST_TIMEOUT).await?;
    Ok(json(StatusCode::OK, &Found::new(TestedView::from(&tested))))
}

/// Has a callback told again after its failures disabled it.
pub(crate) async fn enable(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let (process, callback_id) = named(&mut request).await?;
    // The webhook-notifier enables whichever it is told to: whose it is, is looked at here.
    let process = read(&app, &key, process).await?;
    find(&process, |callback| callback.callback_id == callback_id)?;
    let client = &app.broker()?.client;
    let EnableResult { was_disabled } =
        service_kit::rpc::query(client, rpc::CALLBACK_ENABLE, &EnableCallback { callback_id }).await?;
    Ok(json(StatusCode::OK, &Found::new(EnabledView { was_disabled })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlap_is_bounded_and_a_day_where_nobody_says() {
        let of = |body: &str| parse_overlap(body.as_bytes()).map_err(|e| format!("{} {e}", e.status().as_u16()));
        for usual in ["", "{}", r#"{"overlapSeconds":null}"#] {
            assert_eq!(of(usual), Ok(86_400), "{usual}");
        }
        assert_eq!(of(r#"{"overlapSeconds":0}"#), Ok(0));
        assert_eq!(of(r#"{"overlapSeconds":604800}"#), Ok(604_800));
        for (odd, told) in [
            (r#"{"overlapSeconds":604801}"#, "400 overlapSeconds must be a number from 0 to 604800"),
            (r#"{"overlapSeconds":-1}"#, "400 overlapSeconds must be a whole number"),
            (r#"{"overlap":1}"#, "400 overlap is not known here"),
            ("[]", "400 The body must be a JSON object"),
        ] {
            assert_eq!(of(odd), Err(told.into()), "{odd}");
        }
    }

    #[test]
    fn a_ping_as_it_is_shown() {
        let tested = TestResult {
            webhook_id: ObjectId::from_bytes([1; 12]),
            started_at: contract::Timestamp::from_millis(1_768_193_759_048),
            duration_ms: 12,
            status_code: Some(500),
            error: Some("the endpoint answered 500 Internal Server Error".into()),
            response: Some("oops".into()),
        };
        insta::assert_snapshot!(serde_json::to_string(&TestedView::from(&tested)).unwrap(), @r#"{"webhookId":"010101010101010101010101","delivered":false,"startedAt":"2026-01-12T04:55:59.048Z","durationMs":12,"statusCode":500,"error":"the endpoint answered 500 Internal Server Error","response":"oops"}"#);
    }
}
