//! An HTTP receiver that replies by a script and records all requests.

use bytes::Bytes;
use futures::stream;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri, header::LOCATION, header::RETRY_AFTER,
};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

/// How the receiver answers one request. A number is a reply with that status: `receiver.on("/hook", [503, 200])`.
#[derive(Clone, Debug)]
pub struct Reply {
    after: Duration,
    end: End,
}

#[derive(Clone, Debug)]
enum End {
    Answer { status: StatusCode, headers: HeaderMap, body: Bytes, drip: Option<Duration> },
    Hang,
    Drop,
}

impl Reply {
    /// An answer with this status, and no body.
    pub fn status(status: u16) -> Self {
        let status = StatusCode::from_u16(status).expect("a status of HTTP");
        let end = End::Answer { status, headers: HeaderMap::new(), body: Bytes::new(), drip: None };
        Self { after: Duration::ZERO, end }
    }

    /// Reads the request and never answers; the connection stays open.
    pub fn hang() -> Self {
        Self { after: Duration::ZERO, end: End::Hang }
    }

    /// Reads the request and closes the connection without an answer.
    pub fn drop_connection() -> Self {
        Self { after: Duration::ZERO, end: End::Drop }
    }

    /// A redirect (302) to `location`.
    pub fn redirect(location: &str) -> Self {
        Self::status(302).header(LOCATION.as_str(), location)
    }

    /// Adds `Retry-After`, in seconds or as a date.
    pub fn retry_after(self, value: impl fmt::Display) -> Self {
        self.header(RETRY_AFTER.as_str(), &value.to_string())
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let End::Answer { headers, .. } = &mut self.end else { panic!("a reply that is no answer has no headers") };
        headers.append(
            HeaderName::from_bytes(name.as_bytes()).expect("the name of a header"),
            HeaderValue::from_str(value).expect("the value of a header"),
        );
        self
    }

    /// Sets the body.
    pub fn body(mut self, content: impl Into<Bytes>) -> Self {
        let End::Answer { body, .. } = &mut self.end else { panic!("a reply that is no answer has no body") };
        *body = content.into();
        self
    }

    /// Sends the body one byte at a time, `interval` apart. Status and headers go at once.
    pub fn drip(mut self, interval: Duration) -> Self {
        let End::Answer { drip, .. } = &mut self.end else { panic!("a reply that is no answer has no body") };
        *drip = Some(interval);
        self
    }

    /// Waits this long, once the request is read and recorded, before it answers.
    pub fn after(mut self, delay: Duration) -> Self {
        self.after = delay;
        self
    }
}

impl From<u16> for Reply {
    fn from(status: u16) -> Self {
        Self::status(status)
    }
}

/// A recorded request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// Path and query.
    pub uri: Uri,
    /// All headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// When its last byte was received.
    pub received_at: Instant,
}

impl Request {
    /// The path, without the query.
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// The value of a header, if there is one.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("a header of text"))
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }
}

/// An HTTP/1.1 server on 127.0.0.1. It answers 200 on paths without a script, and ends with its connections when it is
/// dropped.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    scripts: Mutex<HashMap<String, VecDeque<Reply>>>,
    requests: watch::Sender<Vec<Request>>,
}

impl Receiver {
    /// Starts a receiver on a free port.
    pub async fn start() -> Self {
        Self::start_on(0).await
    }

    /// Starts a receiver on this port, for one that comes back or starts late.
    pub async fn start_on(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("a port to listen on");
        let address = listener.local_addr().expect("the address of a listener");
        let shared = Arc::new(Shared { scripts: Mutex::default(), requests: watch::Sender::default() });
        let server = AbortOnDropHandle::new(tokio::spawn(serve(listener, shared.clone())));
        Self { address, shared, _server: server }
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a path, which starts with a slash.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// From now on, requests to `path` get these replies in this order; the last one is repeated.
    pub fn on<R: Into<Reply>>(&self, path: &str, replies: impl IntoIterator<Item = R>) {
        let replies: VecDeque<Reply> = replies.into_iter().map(Into::into).collect();
        assert!(!replies.is_empty(), "no reply for {path}");
        self.shared.scripts().insert(path.to_owned(), replies);
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.borrow().clone()
    }

    /// All requests to `path` so far, in order.
    pub fn requests_to(&self, path: &str) -> Vec<Request> {
        self.requests().into_iter().filter(|request| request.path() == path).collect()
    }

    /// Waits until the requests so far satisfy `enough`, and returns them.
    pub async fn wait_for(&self, deadline: Duration, enough: impl Fn(&[Request]) -> bool) -> Vec<Request> {
        let mut requests = self.shared.requests.subscribe();
        let waiting = requests.wait_for(|requests| enough(requests));
        match timeout(deadline, waiting).await {
            Ok(Ok(requests)) => requests.clone(),
            _ => panic!("not within {deadline:?}; the requests so far:{}", summary(&self.requests())),
        }
    }

    /// Waits for `count` requests to `path`, and returns all requests to it.
    pub async fn wait_for_requests(&self, path: &str, count: usize, deadline: Duration) -> Vec<Request> {
        let to_path = |request: &&Request| request.path() == path;
        self.wait_for(deadline, |requests| requests.iter().filter(to_path).count() >= count).await;
        self.requests_to(path)
    }
}

impl Shared {
    fn scripts(&self) -> MutexGuard<'_, HashMap<String, VecDeque<Reply>>> {
        self.scripts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_reply(&self, path: &str) -> Reply {
        let mut scripts = self.scripts();
        let Some(script) = scripts.get_mut(path) else { return Reply::status(200) };
        let last = script.len() == 1;
        let next = if last { script.front().cloned() } else { script.pop_front() };
        next.expect("a script is never empty")
    }
}

fn summary(requests: &[Request]) -> String {
    let line = |request: &Request| {
        let body = String::from_utf8_lossy(&request.body).chars().take(200).collect::<String>();
        format!("\n  {} {} {body}", request.method, request.uri)
    };
    if requests.is_empty() { " none".to_owned() } else { requests.iter().map(line).collect() }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    // If the listener fails, the receiver ends, and its test notices.
    while let Ok((stream, _)) = listener.accept().await {
        let shared = shared.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| answer(request, shared.clone()));
            // An error means that the client closed the connection, or that the script drops it.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// An error makes hyper close the connection without an answer.
async fn answer(request: hyper::Request<Incoming>, shared: Arc<Shared>) -> io::Result<Response<Body>> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let reply = shared.next_reply(parts.uri.path());
    let request =
        Request { method: parts.method, uri: parts.uri, headers: parts.headers, body, received_at: Instant::now() };
    shared.requests.send_modify(|requests| requests.push(request));
    sleep(reply.after).await;
    match reply.end {
        End::Answer { status, headers, body, drip } => {
            let mut response = Response::new(match drip {
                None => Full::new(body).boxed_unsync(),
                Some(interval) => dripping(body, interval),
            });
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            Ok(response)
        }
        End::Hang => std::future::pending().await,
        End::Drop => Err(io::Error::other("the script drops the connection")),
    }
}

fn dripping(body: Bytes, interval: Duration) -> Body {
    let drops = stream::unfold(body, move |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        sleep(interval).await;
        Some((Ok(Frame::data(rest.split_to(1))), rest))
    });
    StreamBody::new(drops).boxed_unsync()
}
