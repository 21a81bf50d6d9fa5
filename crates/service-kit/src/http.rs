//! Serving HTTP/1.1 on a hostile network: hyper's connections under axum's router, bounded in number and in time.
//!
//! | a client that | is cut |
//! |---|---|
//! | opens more connections than an address may have | at once |
//! | dawdles over its TLS handshake, a request's head or the next request | after [`Limits::header_timeout`] |
//! | dawdles over a request's body | by whoever reads the body |
//! | does not take its answer | after [`Limits::write_timeout`] |

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context as TaskContext, Poll, ready},
    time::Duration,
};

use anyhow::Context;
use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tokio_util::sync::CancellationToken;

/// What a server grants its clients.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections at once; the next one waits in the kernel's queue.
    pub connections: usize,
    /// Most connections at once from one IPv4 address or one IPv6 /64 network; the next one is closed. 0 is no limit.
    pub connections_per_address: usize,
    /// How long a client may take for its TLS handshake, and again to send a request's head; and how long an idle
    /// connection is kept.
    pub header_timeout: Duration,
    /// How long a client may take to take an answer once the kernel's buffers are full of it.
    pub write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let patience = Duration::from_secs(30);
        Self { connections: 4096, connections_per_address: 0, header_timeout: patience, write_timeout: patience }
    }
}

/// What a connection may buffer before anybody reads it, in bytes: what strangers can make the process hold.
const BUFFER: usize = 64 << 10;
/// Longest head of a request, in bytes, and most fields in it; more is answered with 431.
const MAX_HEADER_SIZE: usize = 16 << 10;
const MAX_HEADERS: usize = 100;

/// Binds a listening socket.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Serves a router until shutdown, then lets the requests that are under way finish.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    serve_tls(listener, router, limits, None, shutdown).await
}

/// Serves a router as [`serve`] does; where `tls` is given, over TLS only.
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
    let graceful = GracefulShutdown::new();
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(MAX_HEADER_SIZE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(BUFFER);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &slots) => accepted,
            () = shutdown.cancelled() => break,
        };
        let (stream, address, slot) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of file descriptors, or a client that was gone already: neither ends the server.
                tracing::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(place) = addresses.enter(address.ip()) else {
            tracing::debug!(%address, "too many connections from this address");
            continue;
        };
        // Small answers go out at once; without this they may wait for the client's delayed ack.
        let _ = stream.set_nodelay(true);
        let stream = PatientWrites::new(stream, limits.write_timeout);
        let service = TowerToHyperService::new(router.clone());
        let (builder, tls, watcher) = (builder.clone(), tls.clone(), graceful.watcher());
        // Waited for by `graceful`; an error here is the client's.
        tokio::spawn(async move {
            let served = match tls {
                None => connection(&builder, stream, service, watcher).await,
                Some(tls) => match tokio::time::timeout(limits.header_timeout, tls.accept(stream)).await {
                    Ok(Ok(stream)) => connection(&builder, stream, service, watcher).await,
                    Ok(Err(e)) => Err(e).context("TLS"),
                    Err(_) => Err(anyhow::anyhow!("the TLS handshake took too long")),
                },
            };
            if let Err(e) = served {
                tracing::debug!(%address, "connection ended: {e:#}");
            }
            drop((place, slot));
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// Serves one connection until it ends, or the server does.
async fn connection(
    builder: &Builder,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: TowerToHyperService<Router>,
    watcher: Watcher,
) -> anyhow::Result<()> {
    Ok(watcher.watch(builder.serve_connection(TokioIo::new(stream), service)).await?)
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok((stream, address, slot))
}

/// How many connections each address has.
#[derive(Debug)]
struct Addresses {
    most: usize,
    /// Only addresses that have any.
    connections: Mutex<HashMap<IpAddr, usize>>,
}

impl Addresses {
    fn new(most: usize) -> Self {
        Self { most, connections: Mutex::default() }
    }

    /// A place for one more connection from this address, if it may have one.
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = network(address);
        if self.most > 0 {
            let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
            let count = connections.entry(address).or_default();
            if *count >= self.most {
                return None;
            }
            *count += 1;
        }
        Some(Place { addresses: self.clone(), address })
    }
}

/// What counts as one address: a single host usually has a whole IPv6 /64 network to itself.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address => address,
    }
}

/// A connection's place among those of its address, given back when it is dropped.
#[derive(Debug)]
struct Place {
    addresses: Arc<Addresses>,
    address: IpAddr,
}

impl Drop for Place {
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

/// A stream whose writes fail when the peer does not take them in time. The time runs from the first write that has to
/// wait until all is handed over, so a peer that takes a byte now and then gains nothing. A stream that never has to
/// wait, as almost all, never sees a timer.
#[derive(Debug)]
struct PatientWrites {
    stream: TcpStream,
    timeout: Duration,
    /// Made at the first wait.
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether the timer runs.
    waiting: bool,
}

impl PatientWrites {
    fn new(stream: TcpStream, timeout: Duration) -> Self {
        Self { stream, timeout, timer: None, waiting: false }
    }

    /// What a write came to; where it has to wait, for no longer than it may.
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
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not take its answer")))
    }
}

impl AsyncRead for PatientWrites {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PatientWrites {
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

    /// Writers flush when they have nothing left to write: the peer has caught up.
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
    fn an_address_has_its_share_and_gives_it_back() {
        let addresses = Arc::new(Addresses::new(2));
        let enter = |address: &str| addresses.enter(address.parse().unwrap());
        let held = [enter("10.0.0.1").unwrap(), enter("::ffff:10.0.0.1").unwrap()];
        assert!(enter("10.0.0.1").is_none());
        let others = [enter("10.0.0.2"), enter("2001:db8::1"), enter("2001:db8::ffff")];
        assert!(others.iter().all(Option::is_some));
        assert!(enter("2001:db8::2").is_none(), "the same /64");
        assert!(enter("2001:db8:0:1::1").is_some());
        drop(held);
        assert!(enter("10.0.0.1").is_some());
        drop(others);
        assert!(addresses.connections.lock().unwrap().is_empty());
        let unlimited = Arc::new(Addresses::new(0));
        let places: Vec<_> = (0..100).map(|_| unlimited.enter("10.0.0.1".parse().unwrap())).collect();
        assert!(places.iter().all(Option::is_some));
    }

    /// A server whose answer is this many bytes long.
    async fn server(limits: Limits, bytes: usize) -> (SocketAddr, CancellationToken) {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new().route("/", get(async move || vec![b'x'; bytes]));
        tokio::spawn(serve(listener, router, limits, shutdown.clone()));
        (address, shutdown)
    }

    #[tokio::test]
    async fn an_answer_that_is_not_taken_is_not_waited_for() {
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
            // The only place is free again once the slow one is cut; and who takes the answer gets all of it.
            let next = async {
                let mut next = TcpStream::connect(address).await.unwrap();
                next.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
                let mut answer = Vec::new();
                next.read_to_end(&mut answer).await.unwrap();
                answer.len()
            };
            let length = tokio::select! {
                () = hold => unreachable!(),
                length = timeout(SOON, next) => length.expect("the slow client is cut"),
            };
            assert!(length > BYTES);
        }
    }

    #[tokio::test]
    async fn a_server_that_stops_finishes_what_is_under_way() {
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
}
