//! Limits the length of a response, notes whether one has begun, and counts the open connections.
//!
//! hyper limits the head of a response, but not how many interim (1xx) heads come before it (RFC 9110, section 15.2),
//! and parses all that has arrived before another task gets the thread. So the bytes read between two requests are
//! counted.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures::{TryFutureExt, future::MapOk};
use http::Uri;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_service::Service;

/// Makes connections that fail to read once about `max_response` bytes arrived since the last write.
#[derive(Debug, Clone)]
pub(crate) struct LimitedConnector<C> {
    pub(crate) connector: C,
    pub(crate) max_response: usize,
    pub(crate) open: OpenConnections,
}

/// Counts connections until they are closed.
#[derive(Debug, Clone)]
pub(crate) struct OpenConnections {
    count: Arc<AtomicUsize>,
    max: usize,
}

impl OpenConnections {
    pub(crate) fn new(max: usize) -> Self {
        Self { count: Arc::default(), max }
    }

    /// Whether there are so many connections that no more should be kept.
    pub(crate) fn is_full(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= self.max
    }

    fn add(&self) -> OpenConnection {
        self.count.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self.count.clone())
    }
}

#[derive(Debug)]
struct OpenConnection(Arc<AtomicUsize>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

type Io<T> = TokioIo<LimitedStream<TokioIo<T>>>;

impl<C: Service<Uri>> Service<Uri> for LimitedConnector<C> {
    type Response = Io<C::Response>;
    type Error = C::Error;
    type Future = MapOk<C::Future, Box<dyn FnOnce(C::Response) -> Io<C::Response> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.connector.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (max_response, open) = (self.max_response, self.open.clone());
        let limited = move |io| {
            let (io, reads) = (TokioIo::new(io), ConnectionReads::default());
            TokioIo::new(LimitedStream { io, max_response, left: max_response, reads, _open: open.add() })
        };
        self.connector.call(uri).map_ok(Box::new(limited))
    }
}

/// Whether anything was read from a connection. hyper attaches it to the errors of requests.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConnectionReads(Arc<Reads>);

#[derive(Debug, Default)]
struct Reads {
    /// Whether a response to an earlier request was read.
    earlier: AtomicBool,
    /// Whether a byte was read since the last write.
    since_write: AtomicBool,
}

impl ConnectionReads {
    /// Whether the connection carried an earlier request, and no byte of the response to the last one arrived.
    pub(crate) fn closed_on_reuse(&self) -> bool {
        self.0.earlier.load(Ordering::Relaxed) && !self.0.since_write.load(Ordering::Relaxed)
    }

    fn note_read(&self) {
        self.0.since_write.store(true, Ordering::Relaxed);
    }

    fn note_write(&self) {
        if self.0.since_write.swap(false, Ordering::Relaxed) {
            self.0.earlier.store(true, Ordering::Relaxed);
        }
    }
}

#[derive(Debug)]
pub(crate) struct LimitedStream<T> {
    io: T,
    max_response: usize,
    left: usize,
    reads: ConnectionReads,
    _open: OpenConnection,
}

impl<T: Connection> Connection for LimitedStream<T> {
    fn connected(&self) -> Connected {
        self.io.connected().extra(self.reads.clone())
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for LimitedStream<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.left == 0 {
            return Poll::Ready(Err(io::Error::other(format!(
                "the response is longer than {} bytes",
                self.max_response
            ))));
        }
        let before = to.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, to))?;
        let read = to.filled().len() - before;
        if read > 0 {
            self.reads.note_read();
        }
        self.left = self.left.saturating_sub(read);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> LimitedStream<T> {
    /// A write is part of the next request, whose response may again have the full length. So is a write that fails:
    /// the endpoint has closed the connection.
    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.reads.note_write();
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.left = self.max_response;
        }
        written
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for LimitedStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, from);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, from);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
