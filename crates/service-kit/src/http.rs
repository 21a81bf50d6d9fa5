//! Serves HTTP/1.1 on a hostile network: hyper connections under an axum router, bounded in number and in time.
//!
//! | a client that | is disconnected |
//! |---|---|
//! | opens more connections than allowed per address | immediately |
//! | sends no request, and has waited longest when all connections are in use | when the next one is accepted |
//! | is slow with its TLS handshake, a request's head or the next request | after [`Limits::header_timeout`] |
//! | is slow with a request's body | by the handler that reads the body |
//! | does not read its response | after [`Limits::write_timeout`] |

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context as TaskContext, Poll, ready},
    time::Duration,
};

use anyhow::Context;
use axum::{Router, extract::Request, response::Response};
use futures::future::{BoxFuture, Either};
use hyper::{
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::http1::Builder,
    service::Service,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The limits of a server's clients.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum number of connections. The next one takes the place of the connection that has waited longest for its
    /// first request; if there is none, it waits.
    pub connections: usize,
    /// Maximum number of connections from one IPv4 address or one IPv6 /64 network; the next one is closed. 0 means no
    /// limit.
    pub connections_per_address: usize,
    /// How long a client may take for its TLS handshake, and again to send a request's head; and how long an idle
    /// connection is kept.
    pub header_timeout: Duration,
    /// How long a client may read nothing once the kernel's buffers are full of the response.
    pub write_timeout: Duration,
    /// How long connections are still accepted and kept after shutdown, with `Connection: close` in each response. So
    /// clients learn from a response that the connection ends; a request that they send while the server closes the
    /// connection would fail. Ends early once no connection is left.
    pub close_notice: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let timeout = Duration::from_secs(30);
        Self {
            connections: 4096,
            connections_per_address: 0,
            header_timeout: timeout,
            write_timeout: timeout,
            close_notice: Duration::ZERO,
        }
    }
}

/// Bytes that a connection may buffer before they are read, and so the memory that an unknown client can occupy.
const BUFFER: usize = 64 << 10;
/// Maximum size of a request's head, in bytes, and maximum number of its fields; a larger head gets 431.
const MAX_HEADER_SIZE: usize = 16 << 10;
const MAX_HEADERS: usize = 100;

/// How many connections may wait in the kernel's queue. With a shorter queue, a burst makes honest clients lose
/// connections.
const BACKLOG: u32 = 4096;

/// Binds a listening socket.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Like tokio's own `bind`: a restarted service need not wait for old connections.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().with_context(|| format!("cannot listen on {address}"))
}

/// Serves a router until shutdown, asks clients to close their connections ([`Limits::close_notice`]), then lets the
/// requests in progress finish.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    serve_tls(listener, router, limits, None, shutdown).await
}

/// Like [`serve`]; with `tls`, over TLS only.
pub async fn serve_tls(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    tls: Option<Arc<ServerConfig>>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let tls = tls.map(TlsAcceptor::from);
    let slots = Arc::new(Semaphore::new(limits.connections));
    let addresses = Arc::new(Addresses::new(limits.connections_per_address));
    let silent = Arc::new(SilentConnections::default());
    let graceful = GracefulShutdown::new();
    let connections = TaskTracker::new();
    connections.close();
    let over = async {
        shutdown.cancelled().await;
        let _ = tokio::time::timeout(limits.close_notice, connections.wait()).await;
    };
    tokio::pin!(over);
    let builder = protocol(limits);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut over => break,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of file descriptors, or the client has gone already.
                tracing::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(permit) = addresses.acquire(address.ip()) else {
            tracing::debug!(%address, "too many connections from this address");
            continue;
        };
        let slot = tokio::select! {
            slot = free_slot(&slots, &silent) => slot?,
            () = &mut over => break,
        };
        // Without this a small response may wait for the client's delayed ack.
        let _ = stream.set_nodelay(true);
        let stream = WriteTimeout::new(stream, limits.write_timeout);
        let silence = silent.begin();
        let evicted = silence.evicted.clone();
        let service = ConnectionService {
            service: TowerToHyperService::new(router.clone()),
            silence,
            shutdown: shutdown.clone(),
        };
        let (builder, tls, watcher) = (builder.clone(), tls.clone(), graceful.watcher());
        // `graceful` waits for the connection. Its errors are the client's.
        connections.spawn(async move {
            let serve = async {
                match tls {
                    None => connection(&builder, stream, service, watcher).await,
                    Some(tls) => match tokio::time::timeout(limits.header_timeout, tls.accept(stream)).await {
                        Ok(Ok(stream)) => connection(&builder, stream, service, watcher).await,
                        Ok(Err(e)) => Err(e).context("TLS"),
                        Err(_) => Err(anyhow::anyhow!("the TLS handshake took too long")),
                    },
                }
            };
            let served = tokio::select! {
                served = serve => served,
                () = evicted.cancelled() => Err(anyhow::anyhow!("sent no request, and its place was needed")),
            };
            if let Err(e) = served {
                tracing::debug!(%address, "connection ended: {e:#}");
            }
            drop((permit, slot));
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// HTTP/1.1 within the limits of one connection.
fn protocol(limits: Limits) -> Builder {
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(MAX_HEADER_SIZE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(BUFFER);
    builder
}

/// Serves one connection until it or the server ends.
async fn connection(
    builder: &Builder,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: ConnectionService,
    watcher: Watcher,
) -> anyhow::Result<()> {
    Ok(watcher.watch(builder.serve_connection(TokioIo::new(stream), service)).await?)
}

/// How long a connection may be silent before another may take its place: its first request may be in transit.
const SILENCE: Duration = Duration::from_millis(250);

/// Waits for a free slot. Evicts the connection that has waited longest for its first request, once it has been silent
/// for [`SILENCE`].
async fn free_slot(slots: &Arc<Semaphore>, silent: &SilentConnections) -> anyhow::Result<OwnedSemaphorePermit> {
    if let Ok(slot) = slots.clone().try_acquire_owned() {
        return Ok(slot);
    }
    loop {
        silent.evict_oldest(Instant::now());
        tokio::select! {
            slot = slots.clone().acquire_owned() => return Ok(slot?),
            () = tokio::time::sleep(SILENCE / 4) => {}
        }
    }
}

/// The connections that sent no request yet, in the order of their acceptance.
#[derive(Debug, Default)]
struct SilentConnections(Mutex<Silent>);

#[derive(Debug, Default)]
struct Silent {
    accepted: u64,
    connections: BTreeMap<u64, (Instant, CancellationToken)>,
}

impl SilentConnections {
    fn begin(self: &Arc<Self>) -> Silence {
        let evicted = CancellationToken::new();
        let mut silent = self.lock();
        silent.accepted += 1;
        let number = silent.accepted;
        silent.connections.insert(number, (Instant::now(), evicted.clone()));
        Silence { connections: self.clone(), number, evicted, over: AtomicBool::new(false) }
    }

    fn evict_oldest(&self, now: Instant) {
        let mut silent = self.lock();
        if let Some(oldest) = silent.connections.first_entry()
            && now.duration_since(oldest.get().0) >= SILENCE
        {
            oldest.remove().1.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Silent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's time until its first request.
#[derive(Debug)]
struct Silence {
    connections: Arc<SilentConnections>,
    number: u64,
    evicted: CancellationToken,
    over: AtomicBool,
}

impl Silence {
    fn end(&self) {
        if !self.over.swap(true, Ordering::Relaxed) {
            self.connections.lock().connections.remove(&self.number);
        }
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        self.end();
    }
}

/// The service of a connection: the first request ends its silence, and the first request after shutdown is its last.
#[derive(Debug)]
struct ConnectionService {
    service: TowerToHyperService<Router>,
    silence: Silence,
    shutdown: CancellationToken,
}

type RouterFuture = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

impl Service<Request<Incoming>> for ConnectionService {
    type Response = Response;
    type Error = Infallible;
    type Future = Either<RouterFuture, BoxFuture<'static, Result<Response, Infallible>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.silence.end();
        let response = self.service.call(request);
        if !self.shutdown.is_cancelled() {
            return Either::Left(response);
        }
        Either::Right(Box::pin(async move {
            let mut response = response.await?;
            // hyper closes the connection after a response with this header.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            Ok(response)
        }))
    }
}

/// How many connections each address has.
#[derive(Debug)]
struct Addresses {
    limit: usize,
    /// Only addresses with connections.
    connections: Mutex<HashMap<IpAddr, usize>>,
}

impl Addresses {
    fn new(limit: usize) -> Self {
        Self { limit, connections: Mutex::default() }
    }

    /// A permit for one more connection from this address, unless it is at the limit.
    fn acquire(self: &Arc<Self>, address: IpAddr) -> Option<ConnectionPermit> {
        let address = network(address);
        if self.limit > 0 {
            let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
            let count = connections.entry(address).or_default();
            if *count >= self.limit {
                return None;
            }
            *count += 1;
        }
        Some(ConnectionPermit { addresses: self.clone(), address })
    }
}

/// The key of the limit per address: a single host usually has a whole IPv6 /64 network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address => address,
    }
}

/// Counts a connection of an address until it is dropped.
#[derive(Debug)]
struct ConnectionPermit {
    addresses: Arc<Addresses>,
    address: IpAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut connections = self.addresses.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = connections.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.address);
            }
        }
    }
}

/// A stream whose writes fail when the peer does not read them in time. The time runs from the first blocked write
/// until everything is written, so a peer that reads a byte now and then gains nothing. A stream that never blocks,
/// which is almost every stream, creates no timer.
#[derive(Debug)]
struct WriteTimeout {
    stream: TcpStream,
    timeout: Duration,
    /// Created when a write first blocks.
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether the timer runs.
    waiting: bool,
}

impl WriteTimeout {
    fn new(stream: TcpStream, timeout: Duration) -> Self {
        Self { stream, timeout, timer: None, waiting: false }
    }

    /// The result of a write; an error if it blocks for too long.
    fn bounded<T>(&mut self, cx: &mut TaskContext<'_>, write: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if write.is_ready() {
            return write;
        }
        let deadline = Instant::now() + self.timeout;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if !self.waiting {
            self.waiting = true;
            timer.as_mut().reset(deadline);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read the response")))
    }
}

impl AsyncRead for WriteTimeout {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WriteTimeout {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let write = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, write)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let write = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, write)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Writers flush when everything is written, so the peer has caught up.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        self.waiting = false;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn connections_per_address_are_limited_until_one_closes() {
        let addresses = Arc::new(Addresses::new(2));
        let acquire = |address: &str| addresses.acquire(address.parse().unwrap());
        let first = [acquire("10.0.0.1").unwrap(), acquire("::ffff:10.0.0.1").unwrap()];
        assert!(acquire("10.0.0.1").is_none());
        let others = [acquire("10.0.0.2"), acquire("2001:db8::1"), acquire("2001:db8::ffff")];
        assert!(others.iter().all(Option::is_some));
        assert!(acquire("2001:db8::2").is_none(), "the same /64");
        assert!(acquire("2001:db8:0:1::1").is_some());
        drop(first);
        assert!(acquire("10.0.0.1").is_some());
        drop(others);
        assert!(addresses.connections.lock().unwrap().is_empty());
        let unlimited = Arc::new(Addresses::new(0));
        let permits: Vec<_> = (0..100).map(|_| unlimited.acquire("10.0.0.1".parse().unwrap())).collect();
        assert!(permits.iter().all(Option::is_some));
    }

    /// A server whose response has this many bytes.
    async fn server(limits: Limits, bytes: usize) -> (SocketAddr, CancellationToken) {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new().route("/", get(async move || vec![b'x'; bytes]));
        tokio::spawn(serve(listener, router, limits, shutdown.clone()));
        (address, shutdown)
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_response_is_disconnected() {
        const BYTES: usize = 64 << 20;
        let limits = Limits { connections: 1, write_timeout: Duration::from_millis(300), ..Limits::default() };
        let (address, _shutdown) = server(limits, BYTES).await;
        for drips in [false, true] {
            let mut slow = TcpStream::connect(address).await.unwrap();
            slow.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            let hold = async {
                // A byte now and then is not enough.
                while drips && slow.read_u8().await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                std::future::pending::<()>().await;
            };
            // The only connection is free once the slow client is disconnected. Only a head is read: a test that a busy
            // machine keeps from reading would be disconnected, too.
            let next = async {
                let mut next = TcpStream::connect(address).await.unwrap();
                next.write_all(b"HEAD / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
                let mut response = Vec::new();
                next.read_to_end(&mut response).await.unwrap();
                response
            };
            let response = tokio::select! {
                () = hold => unreachable!(),
                response = timeout(6 * SOON, next) => response.expect("the slow client is disconnected"),
            };
            assert!(response.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&response));
        }
    }

    #[tokio::test]
    async fn the_connection_that_waited_longest_for_its_first_request_makes_room() {
        let (address, _shutdown) = server(Limits { connections: 3, ..Limits::default() }, 10).await;
        let request = async |connection: &mut TcpStream| {
            connection.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await?;
            connection.read(&mut [0; 1024]).await
        };
        let mut used = TcpStream::connect(address).await.unwrap();
        assert!(request(&mut used).await.unwrap() > 0);
        let mut oldest = TcpStream::connect(address).await.unwrap();
        let mut silent = TcpStream::connect(address).await.unwrap();

        let mut next = TcpStream::connect(address).await.unwrap();

        assert!(timeout(SOON, request(&mut next)).await.expect("a place").unwrap() > 0);
        assert!(matches!(timeout(SOON, oldest.read(&mut [0])).await.expect("closed"), Ok(0) | Err(_)));
        for kept in [&mut used, &mut silent] {
            assert!(timeout(SOON, request(kept)).await.expect("kept").unwrap() > 0);
        }
    }

    #[tokio::test]
    async fn a_stopping_server_finishes_requests_in_progress() {
        let (address, shutdown) = server(Limits::default(), 10).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut first = [0];
        client.read_exact(&mut first).await.unwrap();
        shutdown.cancel();
        let mut rest = Vec::new();
        timeout(SOON, client.read_to_end(&mut rest)).await.expect("closed").unwrap();
        assert!(rest.ends_with(b"xxxxxxxxxx"));
    }

    #[tokio::test]
    async fn a_stopping_server_answers_an_idle_connection_and_asks_to_close_it() {
        let (address, shutdown) = server(Limits { close_notice: 6 * SOON, ..Limits::default() }, 10).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut first = vec![0; 1024];
        let read = client.read(&mut first).await.unwrap();
        assert!(!String::from_utf8_lossy(&first[..read]).contains("connection: close"));

        shutdown.cancel();
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();

        let mut last = String::new();
        timeout(SOON, client.read_to_string(&mut last)).await.expect("closed").unwrap();
        assert!(last.contains("connection: close") && last.ends_with("xxxxxxxxxx"), "{last}");
        // Without connections there is nothing to wait for.
        let refused = async {
            while TcpStream::connect(address).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(SOON, refused).await.expect("the server has ended");
    }
}
