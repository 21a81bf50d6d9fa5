//! 7 Deliver: an answer has an end.
//!
//! hyper bounds an answer's head, but not how many interim ones (1xx, RFC 9110, section 15.2) come before it, and it parses
//! whatever there is before anything else gets the thread. So what is read between two requests is counted.

use std::{
    io::{self, IoSlice},
    pin::Pin,
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

/// Makes connections of which reading fails when `most` bytes, or with the last read a few more, have come since the last that
/// was written.
#[derive(Debug, Clone)]
pub(crate) struct Bounded<C> {
    pub(crate) connector: C,
    pub(crate) most: usize,
}

/// A connection as hyper takes it.
type Io<T> = TokioIo<BoundedStream<TokioIo<T>>>;

impl<C: Service<Uri>> Service<Uri> for Bounded<C> {
    type Response = Io<C::Response>;
    type Error = C::Error;
    type Future = MapOk<C::Future, Box<dyn FnOnce(C::Response) -> Io<C::Response> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.connector.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let most = self.most;
        let bounded = move |io| TokioIo::new(BoundedStream { io: TokioIo::new(io), most, left: most });
        self.connector.call(uri).map_ok(Box::new(bounded))
    }
}

/// Such a connection.
pub(crate) struct BoundedStream<T> {
    io: T,
    most: usize,
    left: usize,
}

impl<T: Connection> Connection for BoundedStream<T> {
    fn connected(&self) -> Connected {
        self.io.connected()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for BoundedStream<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.left == 0 {
            return Poll::Ready(Err(io::Error::other(format!("the answer has no end within {} bytes", self.most))));
        }
        let before = to.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, to))?;
        self.left = self.left.saturating_sub(to.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> BoundedStream<T> {
    /// What was written is part of a request, which has an answer of its own.
    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.left = self.most;
        }
        written
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for BoundedStream<T> {
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
