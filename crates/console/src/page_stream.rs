//! Keeps open pages current: a stream of server-sent events at a page's own URL, with the fragments that changed.
//!
//! No task renders in the background: the streams of one page share a snapshot, and the first stream that finds it too
//! old renders the next one. A stream makes an event only when its connection has room for it.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode, Uri,
        header::{ACCEPT, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use futures::{future::BoxFuture, stream};
use serde::Serialize;
use service_kit::clock;
use tokio::time::{Instant, sleep_until};

use crate::{
    app::App,
    fault::Fault,
    live::{Fragment, Place, Snapshot},
    respond::{Page, parameters},
    session::Session,
    view::parts,
    visit::Visit,
    visit_rate,
};

/// How long a snapshot is current. A longer time shows changes later, a shorter one costs more queries.
const INTERVAL: Duration = Duration::from_secs(2);
/// Rendering one page takes at most one part in this many of the time.
const RENDERING_SHARE: u32 = 10;
/// How long a browser waits before it opens a broken stream again.
const RETRY_MS: u32 = 2000;

const EVENT_STREAM: &str = "text/event-stream";

/// Renders the page of a visit.
pub(crate) type Render = Arc<dyn Fn(Visit) -> BoxFuture<'static, Result<Page, Fault>> + Send + Sync>;

/// Whether a request asks for the stream of a page.
pub(crate) fn is_wanted(headers: &HeaderMap) -> bool {
    headers.get(ACCEPT).is_some_and(|accept| accept == EVENT_STREAM)
}

/// Serves the stream of a page to a signed-in visitor who may see the page.
pub(crate) async fn stream(
    app: Arc<App>,
    headers: HeaderMap,
    uri: &Uri,
    path: Vec<(String, String)>,
    render: Render,
) -> Response {
    let refuse = |status: StatusCode, text: &str| (status, text.to_owned()).into_response();
    let session = match Session::of(&app, &headers, clock::now()).await {
        Ok(Some(session)) => session,
        Ok(None) => return refuse(StatusCode::FORBIDDEN, "You are not signed in."),
        Err(fault) => return refuse(fault.status(), &fault.to_string()),
    };
    if !app.visit_rate.admits(&session.visitor()) {
        return visit_rate::refusal();
    }
    // Visitors with the same identity see the same content.
    let key = (session.role.identity(), uri.to_string());
    let place = app.live.place([session.form_token.clone(), session.stream_holder()], key);
    let Some(place) = place else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "Too many pages are live.");
    };
    let query = parameters(uri.query().unwrap_or_default().as_bytes());
    let stream = PageStream {
        seen: headers.get("last-event-id").and_then(|id| hashes(id.to_str().ok()?)).unwrap_or_default(),
        app,
        place,
        headers,
        path,
        query,
        render,
        due: Instant::now(),
        is_over: false,
    };
    // Reports a fault as a status. The first event reuses the snapshot.
    if let Err(fault) = stream.snapshot(session).await {
        return refuse(fault.status(), &fault.to_string());
    }
    let events = stream::unfold(stream, async |mut stream| Some((Ok::<_, Infallible>(stream.next().await?), stream)));
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM)),
        // Proxies would buffer the stream otherwise.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(events)).into_response()
}

/// One stream of one page.
struct PageStream {
    app: Arc<App>,
    place: Place,
    headers: HeaderMap,
    path: Vec<(String, String)>,
    query: Vec<(String, String)>,
    render: Render,
    /// The hashes of the fragments that the browser has.
    seen: Vec<u64>,
    due: Instant,
    is_over: bool,
}

/// The data of an event.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Event<'a> {
    at: &'a str,
    fragments: Vec<&'a str>,
    is_final: bool,
}

impl PageStream {
    /// The next event. None once the page is final, the session has ended, or the console stops.
    async fn next(&mut self) -> Option<Bytes> {
        if self.is_over {
            return None;
        }
        tokio::select! {
            () = sleep_until(self.due) => {}
            () = self.app.shutdown.cancelled() => return None,
        }
        // The session is checked for each event: a revoked key ends it.
        let session = Session::of(&self.app, &self.headers, clock::now()).await.transpose()?;
        let snapshot = tokio::select! {
            snapshot = async { self.snapshot(session?).await } => snapshot,
            () = self.app.shutdown.cancelled() => return None,
        };
        match snapshot {
            Ok(snapshot) => {
                self.due = snapshot.due;
                self.is_over = snapshot.is_final;
                Some(self.event(&snapshot))
            }
            // The browser shows how old the page is.
            Err(Fault::Unavailable(_)) => {
                self.due = Instant::now() + INTERVAL;
                Some(Bytes::from_static(b": not available\n\n"))
            }
            Err(_) => None,
        }
    }

    /// The shared snapshot if it is current, otherwise a new one.
    async fn snapshot(&self, session: Session) -> Result<Snapshot, Fault> {
        let mut last = self.place.page.lock().await;
        if let Some(current) = last.as_ref().filter(|snapshot| Instant::now() < snapshot.due) {
            return Ok(current.clone());
        }
        // The semaphore is never closed.
        let _permit = self.app.live.renders.acquire().await;
        let (begin, now) = (Instant::now(), clock::now());
        let (path, query) = (self.path.clone(), self.query.clone());
        let visit = Visit { app: self.app.clone(), session, now, path, query, form: vec![] };
        let (content, is_final) = match (self.render)(visit).await? {
            Page::Live { content, .. } => (content, false),
            Page::Show { content, .. } => (content, true),
            Page::Redirect(_) => return Err(Fault::no_page()),
        };
        let interval = INTERVAL.max(begin.elapsed() * RENDERING_SHARE);
        let fragments = parts::live_fragments(&content).map(Fragment::new).collect();
        let snapshot = Snapshot { fragments, at: now, due: begin + interval, is_final };
        *last = Some(snapshot.clone());
        Ok(snapshot)
    }

    /// The event with the fragments that the browser does not have.
    fn event(&mut self, snapshot: &Snapshot) -> Bytes {
        let is_known = self.seen.len() == snapshot.fragments.len();
        let changed = |(index, fragment): &(usize, &Fragment)| !is_known || self.seen[*index] != fragment.hash;
        let fragments =
            snapshot.fragments.iter().enumerate().filter(changed).map(|(_, fragment)| fragment.html.as_str());
        let at = snapshot.at.to_iso();
        let event = Event { at: &at, fragments: fragments.collect(), is_final: snapshot.is_final };
        // A struct of texts is always written.
        let data = serde_json::to_string(&event).unwrap_or_default();
        self.seen = snapshot.fragments.iter().map(|fragment| fragment.hash).collect();
        let id: Vec<_> = self.seen.iter().map(|hash| format!("{hash:x}")).collect();
        format!("retry: {RETRY_MS}\nid: {}\ndata: {data}\n\n", id.join(".")).into()
    }
}

/// The hashes of an event's id.
fn hashes(id: &str) -> Option<Vec<u64>> {
    id.split('.').map(|hash| u64::from_str_radix(hash, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_an_event_names_what_the_browser_has() {
        assert_eq!(hashes("1.ff"), Some(vec![1, 255]));
        assert_eq!(hashes("1.x"), None);
    }
}
