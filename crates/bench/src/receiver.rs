//! The callbacks' endpoints: they answer every POST at once and record when the webhook of each update arrived.

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
    latency::{histogram, record},
    protocol::{Received, TAG, content_length},
};

/// The size of the ring of due times; more updates than are ever in flight.
const DUE_TIMES: usize = 1 << 21;

/// The due times of posted updates, and the counters of their webhooks.
pub(crate) struct Tally {
    epoch: Instant,
    /// By tag modulo [`DUE_TIMES`]: nanoseconds since the epoch, 0 if no webhook is expected.
    due_times: Vec<AtomicU64>,
    webhooks: AtomicU64,
    updates: AtomicU64,
    first: AtomicU64,
    last: AtomicU64,
    latency: Mutex<Histogram<u64>>,
    next_tag: AtomicU64,
    /// Gets a permit for each update whose webhook is received.
    pub(crate) window: Semaphore,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            due_times: (0..DUE_TIMES).map(|_| AtomicU64::new(0)).collect(),
            webhooks: AtomicU64::new(0),
            updates: AtomicU64::new(0),
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
            latency: Mutex::new(histogram()),
            next_tag: AtomicU64::new(1),
            window: Semaphore::new(0),
        }
    }

    fn latency(&self) -> MutexGuard<'_, Histogram<u64>> {
        self.latency.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    /// Returns an unused tag.
    pub(crate) fn next_tag(&self) -> u64 {
        self.next_tag.fetch_add(1, Relaxed)
    }

    /// Expects a webhook with this tag; its latency counts from `due`.
    pub(crate) fn expect(&self, tag: u64, due: Instant) {
        self.due_times[tag as usize % DUE_TIMES].store(self.nanos(due), Relaxed);
    }

    fn record_webhook(&self, tag: Option<u64>) {
        let now = self.nanos(Instant::now());
        self.webhooks.fetch_add(1, Relaxed);
        let _ = self.first.compare_exchange(0, now, Relaxed, Relaxed);
        self.last.store(now, Relaxed);
        let Some(tag) = tag else { return };
        let due = self.due_times[tag as usize % DUE_TIMES].swap(0, Relaxed);
        if due != 0 {
            self.updates.fetch_add(1, Relaxed);
            record(&mut self.latency(), Duration::from_nanos(now.saturating_sub(due)));
            self.window.add_permits(1);
        }
    }

    /// The updates whose webhooks were received since the last reset.
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

/// The endpoints of all callbacks.
pub(crate) struct Receiver {
    tally: Arc<Tally>,
    hanging: Arc<RwLock<HashSet<SocketAddr>>>,
}

impl Receiver {
    pub(crate) fn new(tally: Arc<Tally>) -> Self {
        Self { tally, hanging: Arc::default() }
    }

    pub(crate) async fn listen(&self, addresses: Vec<SocketAddr>) -> anyhow::Result<Vec<SocketAddr>> {
        let mut listening = Vec::new();
        for address in addresses {
            let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
            let address = listener.local_addr()?;
            listening.push(address);
            let (tally, hanging) = (self.tally.clone(), self.hanging.clone());
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (tally, hanging) = (tally.clone(), hanging.clone());
                    tokio::spawn(async move {
                        // Closed connections are no error.
                        let _ = serve(stream, &tally, || {
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

/// Answers the requests of a connection with the least HTTP/1.1 that suffices.
async fn serve(mut stream: TcpStream, tally: &Tally, hangs: impl Fn() -> bool) -> anyhow::Result<()> {
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
        tally.record_webhook(read_tag(&buffer[head..head + length]));
        buffer.advance(head + length);
        if hangs() {
            std::future::pending::<()>().await;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
    }
}

/// The tag that [`crate::load::update_body`] wrote.
fn read_tag(body: &[u8]) -> Option<u64> {
    let start = memmem::find(body, TAG.as_bytes())? + TAG.len();
    std::str::from_utf8(body.get(start..start + 12)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_is_read_from_a_webhook() {
        assert_eq!(read_tag(br#"{"data":{"tag":"000000000042"}}"#), Some(42));
        assert_eq!(read_tag(br#"{"data":null}"#), None);
    }

    #[test]
    fn a_repeated_webhook_counts_as_one_update() {
        let tally = Tally::new();
        tally.expect(7, Instant::now());

        for _ in 0..2 {
            tally.record_webhook(Some(7));
        }

        let received = tally.received();
        assert_eq!((received.webhooks, received.updates, received.latency.count), (2, 1, 1));
    }
}
