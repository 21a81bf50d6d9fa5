//! Signs visitors in, with an API key, a one-time link or a portal link, and out.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderValue, StatusCode, Uri, header::SET_COOKIE},
    response::{Html, IntoResponse, Response},
};
use contract::secret::Secret;
use maud::{Markup, html};
use service_kit::clock;

use crate::{
    app::App,
    fault::Fault,
    login_link::{self, LoginRole},
    portal_link, respond,
    session::{self, Role, Session, SignedIn},
    view::{
        layout::{self, Frame, Section},
        parts::notice,
    },
    visit_rate,
};

/// All visitors who open links: they share the rate of one visitor.
const LINKS: &str = "links";

/// `GET /login`: a form. Sending the form redeems a link's token. This request does not: mail scanners and browsers
/// fetch links ahead of people.
pub(crate) async fn form(uri: Uri) -> Response {
    let fields = respond::parameters(uri.query().unwrap_or_default().as_bytes());
    show(&fields, None)
}

/// `POST /login`.
pub(crate) async fn submit(State(app): State<Arc<App>>, request: Request) -> Response {
    let session = Session::of(&app, request.headers(), clock::now()).await;
    let fields = match respond::form(&app, request).await {
        Ok(fields) => fields,
        Err(fault) => return show(&[], Some(&fault)),
    };
    // An operator who adds a key on the page of an action stays an operator. A form without the session's form token,
    // such as that of the login page, starts a new session. A session that cannot be read is that of a portal link,
    // never an operator's.
    let operator = session
        .unwrap_or_default()
        .filter(|session| session.role == Role::Operator && respond::check_form_token(session, &fields).is_ok());
    match sign_in(&app, operator.as_ref(), &fields).await {
        Ok(cookie) => with_cookie(respond::see_other(local_path(field(&fields, "next"))), cookie),
        Err(fault) => show(&shown_again(fields, operator.is_some(), &fault), Some(&fault)),
    }
}

/// The fields of a form that failed, for the next try.
fn shown_again(mut fields: Vec<(String, String)>, is_operator: bool, fault: &Fault) -> Vec<(String, String)> {
    fields.retain(|(name, _)| match name.as_str() {
        "next" => true,
        // An operator who mistypes a key stays an operator.
        "form_token" => is_operator,
        // A token that was refused is refused again, so the page shows the form for API keys.
        "token" => !matches!(fault, Fault::Refused(_)),
        _ => false,
    });
    fields
}

/// `POST /logout`.
pub(crate) async fn end(State(app): State<Arc<App>>, request: Request) -> Response {
    let session = Session::of(&app, request.headers(), clock::now()).await;
    let ended = respond::form(&app, request).await.and_then(|fields| match &session? {
        Some(session) => respond::check_form_token(session, &fields),
        None => Ok(()),
    });
    match ended {
        Ok(()) => with_cookie(respond::see_other("/login"), session::no_cookie(&app)),
        Err(fault) => respond::fault_page(&fault, None),
    }
}

fn is_link(token: &str) -> bool {
    portal_link::is_portal_token(token) || login_link::is_login_token(token)
}

/// Signs in with the link's token or the API key of the form. Returns the cookie of the new session.
async fn sign_in(app: &App, operator: Option<&Session>, fields: &[(String, String)]) -> Result<HeaderValue, Fault> {
    let now = clock::now();
    let role = match (field(fields, "token"), field(fields, "api_key")) {
        // Each of these tokens costs a request to NATS.
        (Some(token), _) if is_link(token) && !app.visit_rate.admits(&LINKS.to_owned()) => {
            return Err(visit_rate::fault());
        }
        (Some(token), _) if portal_link::is_portal_token(token) => {
            portal_link::find(app, token, now).await?;
            tracing::info!("a portal link was opened");
            SignedIn::Portal(token.into())
        }
        (Some(token), _) => {
            let role = login_link::redeem(app.broker()?, token, now).await?;
            tracing::info!("{} signed in with a link", role.name());
            SignedIn::Link(role)
        }
        (None, Some(key)) => {
            let secret = Secret::from(key.trim());
            let key = session::valid_key(app, &secret, now).ok_or_else(|| match app.keys.is_complete() {
                true => Fault::Refused("This API key is unknown, revoked or expired.".into()),
                false => Fault::Unavailable("The console is starting. Try again in a moment.".into()),
            })?;
            tracing::info!(key_id = %key.key_id, "an API key signed in");
            operator.map_or(SignedIn::Key(secret.clone()), |session| SignedIn::OperatorWith(secret, session))
        }
        (None, None) => return Err(Fault::Invalid("Enter an API key.".into())),
    };
    Ok(session::new_cookie(app, role, now))
}

fn field<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// Where to go after the login: a path of the console, never another site.
fn local_path(next: Option<&str>) -> &str {
    // Browsers read a backslash as a slash, and leave out tabs and line breaks (WHATWG URL, basic URL parser).
    let is_refused = |c: char| c == '\\' || c.is_control();
    let is_local = |path: &&str| path.starts_with('/') && !path.starts_with("//") && !path.contains(is_refused);
    next.filter(is_local).unwrap_or("/")
}

fn with_cookie(mut response: Response, cookie: HeaderValue) -> Response {
    response.headers_mut().insert(SET_COOKIE, cookie);
    response
}

fn show(fields: &[(String, String)], fault: Option<&Fault>) -> Response {
    let frame = Frame {
        title: "Sign in",
        session: None,
        project: None,
        section: Section::None,
        now: clock::now(),
        is_live: false,
    };
    let content = render(field(fields, "token"), field(fields, "next"), field(fields, "form_token"), fault);
    let status = fault.map_or(StatusCode::OK, Fault::status);
    (status, Html(layout::page(&frame, &content).into_string())).into_response()
}

pub(super) fn render(
    token: Option<&str>,
    next: Option<&str>,
    form_token: Option<&str>,
    fault: Option<&Fault>,
) -> Markup {
    html! {
        @if let Some(fault) = fault { (notice(fault)) }
        form.login action="/login" method="post" {
            @if let Some(next) = next { input type="hidden" name="next" value=(next); }
            @if let Some(form_token) = form_token { input type="hidden" name="form_token" value=(form_token); }
            @if let Some(token) = token {
                input type="hidden" name="token" value=(token);
                @if portal_link::is_portal_token(token) {
                    p { "This link shows you webhooks and their deliveries." }
                    button autofocus { "Open" }
                } @else if LoginRole::of_token(token) == Some(LoginRole::Viewer) {
                    p { "This link signs you in as a viewer, once: you see every project, but cannot change anything." }
                    button autofocus { "Sign in as viewer" }
                } @else {
                    p { "This link signs you in as an operator, once." }
                    button autofocus { "Sign in as operator" }
                }
            } @else {
                label for="api_key" { "API key" }
                input #api_key name="api_key" type="password" required autocomplete="off" spellcheck="false";
                button { "Sign in" }
                p { "The key gives access to its project, within its scopes." }
                p { "Operators create a one-time link instead: " code { "leadctl console token" } }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_that_failed_keeps_what_the_next_try_needs() {
        let fields = ["next", "form_token", "token", "api_key"].map(|name| (name.to_owned(), name.to_owned()));
        let shown = |is_operator, fault| {
            let shown = shown_again(fields.to_vec(), is_operator, &fault);
            shown.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };

        assert_eq!(shown(true, Fault::Refused("unknown".into())), ["next", "form_token"]);
        assert_eq!(shown(false, Fault::Refused("used".into())), ["next"]);
        assert_eq!(shown(false, Fault::Unavailable("no bucket".into())), ["next", "token"]);
    }

    #[test]
    fn the_login_leads_to_no_other_site() {
        for (next, expected) in [
            (None, "/"),
            (Some("/p/1?q=2"), "/p/1?q=2"),
            (Some("//evil.example"), "/"),
            (Some("/\\evil.example"), "/"),
            (Some("/\t/evil.example"), "/"),
            (Some("https://evil.example"), "/"),
            (Some("/a\r\nset-cookie: x"), "/"),
        ] {
            assert_eq!(local_path(next), expected, "{next:?}");
        }
    }
}
