//! The parts that every page shares: the session, the checks of forms, and the security headers.

use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    body::to_bytes,
    extract::{RawPathParams, Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode, Uri,
        header::{
            CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, LOCATION, ORIGIN, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS,
        },
    },
    response::{Html, IntoResponse, Response},
    routing::{MethodRouter, post},
};
use maud::Markup;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use service_kit::clock;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{
    app::App,
    fault::Fault,
    session::Session,
    view::layout::{self, Frame, Section},
    visit::Visit,
    visit_rate,
};

/// Scripts, styles and forms of the console only, no other content, no frames.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
    form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The longest form, in bytes: metadata that people enter, percent-encoded.
const MAX_FORM_BYTES: usize = 64 << 10;
/// The longest form that contains a process or a dead letter: 1 MiB with each byte percent-encoded, and the other
/// fields.
const MAX_LARGE_FORM_BYTES: usize = (3 << 20) + MAX_FORM_BYTES;
/// Most forms beyond [`MAX_FORM_BYTES`] that are handled at the same time. A form and its page take several times the
/// form's size in memory.
static LARGE_FORMS: Semaphore = Semaphore::const_new(4);
/// How long a form may take to arrive.
const FORM_TIMEOUT: Duration = Duration::from_secs(10);

/// A page of a signed-in visitor.
pub(crate) enum Page {
    Show {
        title: String,
        section: Section,
        content: Markup,
    },
    /// Like `Show`, and its fragments ([`parts::live`](crate::view::parts::live)) are kept current while it is open.
    Live {
        title: String,
        section: Section,
        content: Markup,
    },
    Redirect(String),
}

impl Page {
    /// A list: its first page is kept current.
    pub(crate) fn list(visit: &Visit, title: impl Into<String>, section: Section, content: Markup) -> Self {
        let title = title.into();
        match visit.cursor() {
            None => Self::Live { title, section, content },
            Some(_) => Self::Show { title, section, content },
        }
    }
}

/// Serves the form of a page to signed-in visitors who may act.
pub(crate) fn action<F>(act: impl Fn(Visit) -> F + Clone + Send + Sync + 'static) -> MethodRouter<Arc<App>>
where
    F: Future<Output = Result<Page, Fault>> + Send + 'static,
{
    action_within(false, act)
}

/// Like [`action`], for a form that contains a process or a dead letter.
pub(crate) fn large_action<F>(act: impl Fn(Visit) -> F + Clone + Send + Sync + 'static) -> MethodRouter<Arc<App>>
where
    F: Future<Output = Result<Page, Fault>> + Send + 'static,
{
    action_within(true, act)
}

fn action_within<F>(
    may_be_large: bool,
    act: impl Fn(Visit) -> F + Clone + Send + Sync + 'static,
) -> MethodRouter<Arc<App>>
where
    F: Future<Output = Result<Page, Fault>> + Send + 'static,
{
    post(async move |State(app): State<Arc<App>>, path: RawPathParams, request: Request| {
        let path = path.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let (headers, uri) = (request.headers().clone(), request.uri().clone());
        let permit = if may_be_large { large_form(&app, &headers).await } else { None };
        let max = if permit.is_some() { MAX_LARGE_FORM_BYTES } else { MAX_FORM_BYTES };
        let form = match form_within(&app, request, max).await {
            Ok(form) => form,
            Err(fault) => return fault_page(&fault, None),
        };
        let page = uri.path().to_owned();
        respond(app, headers, uri, path, form.clone(), async move |visit: Visit| {
            let who = visit.session.identity();
            let done = async {
                check_form_token(&visit.session, &form)?;
                visit.session.check_action()?;
                act(visit).await
            };
            // The checks before an action log nothing themselves.
            done.await.inspect_err(|fault| tracing::info!(who, page, "action refused: {fault}"))
        })
        .await
    })
}

/// The permit for a large form of a signed-in visitor. The forms of others stay small, so that strangers take no
/// memory.
async fn large_form(app: &App, headers: &HeaderMap) -> Option<SemaphorePermit<'static>> {
    let length: usize = headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()?;
    if length <= MAX_FORM_BYTES {
        return None;
    }
    Session::of(app, headers, clock::now()).await.ok()??;
    LARGE_FORMS.acquire().await.ok()
}

/// Shows a page to a signed-in visitor; others are sent to the login.
pub(crate) async fn respond<F>(
    app: Arc<App>,
    headers: HeaderMap,
    uri: Uri,
    path: Vec<(String, String)>,
    form: Vec<(String, String)>,
    show: impl FnOnce(Visit) -> F,
) -> Response
where
    F: Future<Output = Result<Page, Fault>>,
{
    let now = clock::now();
    let session = match Session::of(&app, &headers, now).await {
        Ok(session) => session,
        Err(fault) => return fault_page(&fault, None),
    };
    let Some(session) = session else {
        if app.broker.get().is_none() || !app.keys.is_complete() {
            let fault = Fault::Unavailable("The console is starting. Reload the page in a moment.".into());
            return fault_page(&fault, None);
        }
        let next = uri.path_and_query().map_or("/", |path| path.as_str());
        return see_other(&format!("/login?next={}", utf8_percent_encode(next, NON_ALPHANUMERIC)));
    };
    if !app.visit_rate.admits(&session.visitor()) {
        return visit_rate::refusal();
    }
    let query = parameters(uri.query().unwrap_or_default().as_bytes());
    let visit = Visit { app, session: session.clone(), now, path, query, form };
    let project = visit.id("project").ok();
    let (title, section, content, is_live) = match show(visit).await {
        Ok(Page::Redirect(to)) => return see_other(&to),
        Ok(Page::Show { title, section, content }) => (title, section, content, false),
        Ok(Page::Live { title, section, content }) => (title, section, content, true),
        Err(fault) => return fault_page(&fault, Some((&session, project))),
    };
    let frame = Frame { title: &title, session: Some(&session), project, section, now, is_live };
    Html(layout::page(&frame, &content).into_string()).into_response()
}

/// The page of a fault.
pub(crate) fn fault_page(fault: &Fault, visitor: Option<(&Session, Option<contract::ObjectId>)>) -> Response {
    let (session, project) = visitor.unzip();
    // The frame of a project is shown only to visitors who may know that it exists.
    let project = if matches!(fault, Fault::NotFound(_)) { None } else { project.flatten() };
    let frame =
        Frame { title: fault.title(), session, project, section: Section::None, now: clock::now(), is_live: false };
    (fault.status(), Html(layout::page(&frame, &layout::fault(fault, session)).into_string())).into_response()
}

/// A redirect that browsers follow with GET.
pub(crate) fn see_other(to: &str) -> Response {
    let location = HeaderValue::try_from(to).unwrap_or_else(|_| HeaderValue::from_static("/"));
    (StatusCode::SEE_OTHER, [(LOCATION, location)]).into_response()
}

/// The parameters of a query string or form; empty ones are left out, as forms send their empty fields.
pub(crate) fn parameters(text: &[u8]) -> Vec<(String, String)> {
    form_urlencoded::parse(text).into_owned().filter(|(_, value)| !value.is_empty()).collect()
}

/// A path with the parameters of a query string.
pub(crate) fn with_parameters(path: &str, parameters: &[(String, String)]) -> String {
    if parameters.is_empty() {
        return path.to_owned();
    }
    let query: String = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
    format!("{path}?{query}")
}

/// Reads a form that one of the console's own pages sent.
pub(crate) async fn form(app: &App, request: Request) -> Result<Vec<(String, String)>, Fault> {
    form_within(app, request, MAX_FORM_BYTES).await
}

async fn form_within(app: &App, request: Request, max: usize) -> Result<Vec<(String, String)>, Fault> {
    check_origin(app, request.headers())?;
    let body = tokio::time::timeout(FORM_TIMEOUT, to_bytes(request.into_body(), max)).await;
    match body {
        Ok(Ok(body)) => Ok(parameters(&body)),
        Ok(Err(_)) => Err(Fault::Invalid("The form is too long, or was not sent completely.".into())),
        Err(_) => Err(Fault::Invalid("The form took too long to arrive.".into())),
    }
}

/// Browsers send the site of a form in the header `Origin`, which no site can change.
fn check_origin(app: &App, headers: &HeaderMap) -> Result<(), Fault> {
    let origin = headers.get(ORIGIN).and_then(|origin| origin.to_str().ok());
    if origin == Some(app.public.origin.as_str()) {
        return Ok(());
    }
    Err(Fault::Refused(format!(
        "This form was sent from {}. Open the console at {}, and use its own forms.",
        origin.unwrap_or("a page without an origin"),
        app.public.origin
    )))
}

/// Checks that a form was rendered for this session.
pub(crate) fn check_form_token(session: &Session, fields: &[(String, String)]) -> Result<(), Fault> {
    let sent = fields.iter().find(|(name, _)| name == "form_token").map(|(_, value)| value);
    if sent == Some(&session.form_token) {
        return Ok(());
    }
    Err(Fault::Refused("This form belongs to another session. Reload its page and send it again.".into()))
}

/// Adds the security headers to a response.
pub(crate) async fn with_security_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let fixed = |text| HeaderValue::from_static(text);
    headers.insert(CONTENT_SECURITY_POLICY, fixed(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, fixed("nosniff"));
    headers.insert(REFERRER_POLICY, fixed("same-origin"));
    headers.insert(HeaderName::from_static("cross-origin-opener-policy"), fixed("same-origin"));
    headers.entry(CACHE_CONTROL).or_insert(fixed("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded_and_empty_ones_left_out() {
        let parameters = parameters(b"state=follow+up%26&process=&q=1");
        let expected = [("state", "follow up&"), ("q", "1")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(parameters, expected);
        assert_eq!(with_parameters("/p", &parameters), "/p?state=follow+up%26&q=1");
        assert_eq!(with_parameters("/p", &[]), "/p");
    }

    #[test]
    fn the_policy_allows_nothing_inline() {
        assert!(!POLICY.contains("unsafe") && !POLICY.contains('*') && !POLICY.contains("http"));
    }
}
