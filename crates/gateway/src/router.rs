//! 1 Accept: how an endpoint is served: authorized, rate limited, handled, and its response completed.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{AUTHORIZATION, CACHE_CONTROL, HOST, X_CONTENT_TYPE_OPTIONS},
    },
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter, on},
};
use contract::key::{ApiKey, Scope};
use futures::{
    FutureExt,
    future::{BoxFuture, ready},
};
use http_body::Body as _;
use service_kit::clock;
use tracing::Instrument;

use crate::{
    app::App,
    error::ApiError,
    rate_limit::{RateClass, RateLimitStatus},
    request::{Handler, fields},
    response::{self, HandlerResult},
};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// An endpoint of the HTTP API.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint {
    /// `GET` (then also `HEAD`), `POST`, `PUT` or `DELETE`.
    pub method: &'static str,
    /// The path, parameters in braces.
    pub path: &'static str,
    /// The scope that an API key needs.
    pub scope: Scope,
    rate: RateClass,
}

impl Endpoint {
    pub(crate) const fn new(method: &'static str, path: &'static str, scope: Scope, rate: RateClass) -> Self {
        Self { method, path, scope, rate }
    }

    fn reads(&self) -> bool {
        self.method == "GET"
    }
}

/// A call of a handler, without the handler's type: the code that uses it is compiled once and not for each endpoint.
/// The allocations cost less than a tenth of a microsecond per request.
type Responding = BoxFuture<'static, HandlerResult>;
type Respond = Box<dyn FnOnce(Request) -> Responding + Send>;
type KeyedHandler = Arc<dyn Fn(Arc<App>, Arc<ApiKey>, Request) -> Responding + Send + Sync>;

/// Serves an endpoint.
pub(crate) fn endpoint<H, Inputs>(method: MethodFilter, endpoint: Endpoint, handler: H) -> MethodRouter<Arc<App>>
where
    H: Handler<Inputs>,
    Inputs: 'static,
{
    // A parameter that is ignored, such as a `dryRun` in the wrong place, would change more than intended.
    let refuses_query = !endpoint.reads() && !H::READS_QUERY;
    let handler = move |app, key, request: Request| -> Responding {
        let handler = handler.clone();
        Box::pin(async move {
            if refuses_query {
                fields::refuse_query(&request)?;
            }
            handler.call(app, key, request).await
        })
    };
    keyed(method, endpoint, Arc::new(handler))
}

fn keyed(method: MethodFilter, endpoint: Endpoint, handler: KeyedHandler) -> MethodRouter<Arc<App>> {
    on(method, async move |State(app): State<Arc<App>>, request: Request| {
        let (shared, handler) = (app.clone(), handler.clone());
        let respond = move |request| -> Responding { Box::pin(respond(shared, endpoint, handler, request)) };
        finish(&app, request, Box::new(respond)).await
    })
}

/// Checks the key and the rate limit of a request, and calls its handler.
async fn respond(app: Arc<App>, endpoint: Endpoint, handler: KeyedHandler, request: Request) -> HandlerResult {
    // First, so that a request without a valid key costs only a hash and a map lookup.
    let key = app.authorize(request.headers(), endpoint.scope)?;
    let status = app.rates.take(endpoint.rate, key.key_id);
    let mut response = match status.as_ref().and_then(RateLimitStatus::retry_after) {
        Some(seconds) => ApiError::RateLimited(seconds).into_response(),
        None if endpoint.reads() => read(app, key, request, handler).await.into_response(),
        None => handler(app, key, request).await.into_response(),
    };
    if let Some(status) = status {
        status.write_headers(response.headers_mut());
    }
    Ok(response)
}

/// Serves a read within its project's budget. Streams of events are not charged here: events are charged with their
/// updates.
async fn read(app: Arc<App>, key: Arc<ApiKey>, request: Request, handler: KeyedHandler) -> HandlerResult {
    let budget = &app.read_budget;
    let project_id = key.project_id;
    budget.admit_read(project_id, Instant::now()).map_err(ApiError::WorkLimited)?;
    let response = handler(app.clone(), key, request).await?;
    budget.spend(project_id, response.body().size_hint().exact().unwrap_or_default(), Instant::now());
    Ok(response)
}

/// Serves an endpoint whose requests have no API key: its handler authenticates them.
pub(crate) fn unkeyed<F>(
    method: MethodFilter,
    handler: impl Fn(Arc<App>, Request) -> F + Clone + Send + Sync + 'static,
) -> MethodRouter<Arc<App>>
where
    F: Future<Output = HandlerResult> + Send + 'static,
{
    on(method, async move |State(app): State<Arc<App>>, request: Request| {
        let (shared, handler) = (app.clone(), handler.clone());
        let respond = move |request| -> Responding { Box::pin(handler(shared, request)) };
        finish(&app, request, Box::new(respond)).await
    })
}

/// Serves a response that needs no key.
pub(crate) fn document(respond: impl Fn() -> Response + Clone + Send + Sync + 'static) -> MethodRouter<Arc<App>> {
    on(MethodFilter::GET, async move |State(app): State<Arc<App>>, request: Request| {
        let response = respond();
        finish(&app, request, answer(Ok(response))).await
    })
}

/// Responds with a result that is known already.
fn answer(result: HandlerResult) -> Respond {
    Box::new(|_| Box::pin(ready(result)))
}

/// Adds the errors for unknown paths and methods.
pub(crate) fn with_fallbacks(router: Router<Arc<App>>, app: Arc<App>) -> Router {
    router
        .method_not_allowed_fallback(async |State(app): State<Arc<App>>, request: Request| {
            finish(&app, request, answer(Err(ApiError::MethodNotAllowed))).await
        })
        .fallback(async |State(app): State<Arc<App>>, request: Request| {
            finish(&app, request, answer(Err(ApiError::UnknownPath))).await
        })
        .with_state(app)
}

/// Adds the request id to a response, and the body to an error, even if the handler panicked. Not a layer of the
/// router: a layer would box and move every request and response two more times.
async fn finish(app: &App, request: Request, respond: Respond) -> Response {
    let request_id = request_id(request.headers());
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().trim_end_matches('/'));
    let timer = app.metrics.start(path);
    let span = tracing::info_span!("request", id = request_id);
    let handled = match repeated_header(request.headers()) {
        Some(name) => Ok(Err(ApiError::RepeatedHeader(name))),
        None => AssertUnwindSafe(respond(request).instrument(span.clone())).catch_unwind().await,
    };
    let _entered = span.entered();
    let mut response = handled.map(HandlerResult::into_response).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!("a handler panicked: {}", text.unwrap_or("no message"));
        ApiError::Internal.into_response()
    });
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        tracing::debug!(status = error.status().as_u16(), code = error.code(), "refused: {error}");
        app.metrics.count_refusal(error.label());
        let headers = std::mem::take(response.headers_mut());
        response = response::error(&error, &request_id);
        response.headers_mut().extend(headers);
    }
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!("the request failed");
    }
    timer.stop(response.status());
    // A response belongs to one key, and browsers must not guess its content type.
    let headers = response.headers_mut();
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // Every sane request id is a header value.
    if let Ok(value) = HeaderValue::try_from(request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// A repeated `Host` or `Authorization` header: a proxy and the gateway could each use a different one.
fn repeated_header(headers: &HeaderMap) -> Option<&'static str> {
    let is_repeated = |name: &HeaderName| headers.get_all(name).iter().nth(1).is_some();
    [(HOST, "Host"), (AUTHORIZATION, "Authorization")]
        .into_iter()
        .find(|(name, _)| is_repeated(name))
        .map(|(_, text)| text)
}

/// The client's id for its request if that is sane, else a new id.
fn request_id(headers: &HeaderMap) -> String {
    let is_sane = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    match headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(is_sane) {
        Some(id) => id.to_owned(),
        None => clock::new_id().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sane_request_id_is_kept() {
        let id = |text: &str| request_id(&HeaderMap::from_iter([(REQUEST_ID, text.parse().unwrap())]));
        let long = "x".repeat(128);
        for sane in ["a", "A.b_c-9", &long] {
            assert_eq!(id(sane), sane);
        }
        for odd in ["", "a b", "a/b", "<b>", &format!("{long}x")] {
            assert_eq!(id(odd).len(), 24, "{odd}");
        }
        assert_eq!(request_id(&HeaderMap::new()).len(), 24);
    }
}
