//! The callbacks' endpoints: take every POST at once, and note when which update was heard of.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::{Buf, BytesMut};
use hdrhistogram::Histogram;
use memchr::memmem;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::{
    driver::Received,
    latency::{histogram, record},
    load::TAG,
};

/// How many updates' times are known: more than are ever on their way.
const TIMES: usize = 1 << 21;

/// When updates were to be posted, and what was heard of them.
pub(crate) struct Book {
    epoch: Instant,
    /// By tag modulo their number: nanoseconds since the epoch, 0 where nothing is expected.
    times: Vec<AtomicU64>,
    webhooks: AtomicU64,
    updates: AtomicU64,
    first: AtomicU64,
    last: AtomicU64,
    latency: Mutex<Histogram<u64>>,
    tags: AtomicU64,
    /// Gets a permit for every update that was heard of.
    pub(crate) window: Semaphore,
}

impl Book {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            times: (0..TIMES).map(|_| AtomicU64::new(0)).collect(),
            webhooks: AtomicU64::new(0),
            updates: AtomicU64::new(0),
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
            latency: Mutex::new(histogram()),
            tags: AtomicU64::new(1),
            window: Semaphore::new(0),
        }
    }

    fn latency(&self) -> MutexGuard<'_, Histogram<u64>> {
        self.latency.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    /// A tag that no update has had.
    pub(crate) fn next_tag(&self) -> u64 {
        self.tags.fetch_add(1, Relaxed)
    }

    /// An update with this tag was to be posted at this time.
    pub(crate) fn expect(&self, tag: u64, at: Instant) {
        self.times[tag as usize % TIMES].store(self.nanos(at), Relaxed);
    }

    fn hear(&self, tag: Option<u64>) {
        let now = self.nanos(Instant::now());
        self.webhooks.fetch_add(1, Relaxed);
        let _ = self.first.compare_exchange(0, now, Relaxed, Relaxed);
        self.last.store(now, Relaxed);
        let Some(tag) = tag else { return };
        let then = self.times[tag as usize % TIMES].swap(0, Relaxed);
        if then != 0 {
            self.updates.fetch_add(1, Relaxed);
            record(&mut self.latency(), Duration::from_nanos(now.saturating_sub(then)));
            self.window.add_permits(1);
        }
    }

    /// How many updates were heard of since the last reset.
    pub(crate) fn updates(&self) -> u64 {
        self.updates.load(Relaxed)
    }

    pub(crate) fn reset(&self) {
        for number in [&self.webhooks, &self.updates, &self.first, &self.last] {
            number.store(0, Relaxed);
        }
        self.latency().reset();
    }

    pub(crate) fn received(&self) -> Received {
        Received {
            webhooks: self.webhooks.load(Relaxed),
            updates: self.updates(),
            seconds: Duration::from_nanos(self.last.load(Relaxed) - self.first.load(Relaxed)).as_secs_f64(),
            latency: (&*self.latency()).into(),
        }
    }
}

/// Listens; see [`Book`] for what it notes.
pub(crate) struct Receiver {
    book: Arc<Book>,
    hanging: Arc<RwLock<HashSet<SocketAddr>>>,
}

impl Receiver {
    pub(crate) fn new(book: Arc<Book>) -> Self {
        Self { book, hanging: Arc::default() }
    }

    pub(crate) async fn listen(&mut self, addresses: Vec<SocketAddr>) -> anyhow::Result<Vec<SocketAddr>> {
        let mut listening = Vec::new();
        for address in addresses {
            let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
            let address = listener.local_addr()?;
            listening.push(address);
            let (book, hanging) = (self.book.clone(), self.hanging.clone());
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (book, hanging) = (book.clone(), hanging.clone());
                    tokio::spawn(async move {
                        // A client that hangs up has had enough.
                        let _ = serve(stream, &book, || {
                            hanging.read().unwrap_or_else(PoisonError::into_inner).contains(&address)
                        })
                        .await;
                    });
                }
            });
        }
        Ok(listening)
    }

    pub(crate) fn hang(&self, addresses: &[SocketAddr]) {
        let mut hanging = self.hanging.write().unwrap_or_else(PoisonError::into_inner);
        hanging.clear();
        hanging.extend(addresses);
    }
}

/// Answers request after request; no more than HTTP/1.1 asks of such a server.
async fn serve(mut stream: TcpStream, book: &Book, hangs: impl Fn() -> bool) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::with_capacity(8192);
    loop {
        let (head, length) = loop {
            if let Some(head) = memmem::find(&buffer, b"\r\n\r\n") {
                break (head + 4, content_length(&buffer[..head]).unwrap_or(0));
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        while buffer.len() < head + length {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        book.hear(tag(&buffer[head..head + length]));
        buffer.advance(head + length);
        if hangs() {
            std::future::pending::<()>().await;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
    }
}

/// The value of a head's `Content-Length`.
pub(crate) fn content_length(head: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"content-length:";
    let line = head
        .split(|byte| *byte == b'\n')
        .find(|line| line.len() > NAME.len() && line[..NAME.len()].eq_ignore_ascii_case(NAME))?;
    std::str::from_utf8(&line[NAME.len()..]).ok()?.trim().parse().ok()
}

/// The tag in a body, as [`crate::load`] wrote it.
fn tag(body: &[u8]) -> Option<u64> {
    let at = memmem::find(body, TAG.as_bytes())? + TAG.len();
    std::str::from_utf8(body.get(at..at + 12)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_tags_are_read() {
        assert_eq!(content_length(b"POST / HTTP/1.1\r\nContent-Length: 17\r\nhost: x"), Some(17));
        assert_eq!(content_length(b"POST / HTTP/1.1\r\nhost: x"), None);
        assert_eq!(tag(br#"{"data":{"tag":"000000000042"}}"#), Some(42));
        assert_eq!(tag(br#"{"data":null}"#), None);
    }

    #[test]
    fn an_update_is_heard_of_once() {
        let book = Book::new();
        book.expect(7, Instant::now());
        for _ in 0..2 {
            book.hear(Some(7));
        }
        let received = book.received();
        assert_eq!((received.webhooks, received.updates, received.latency.count), (2, 1, 1));
    }
}
