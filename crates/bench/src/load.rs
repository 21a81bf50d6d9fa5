//! The clients: updates to random leads, as fast as they are answered, at a fixed rate, or as fast as they come out at the
//! other end.

use std::{
    io::Write,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::{Buf, BytesMut};
use contract::ObjectId;
use memchr::memmem;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout_at,
};

use crate::{
    latency::{Latency, histogram, record},
    receiver::{Book, content_length},
};

/// What stands before the tag of an update: twelve digits in its lead's metadata, by which its webhook is known.
pub(crate) const TAG: &str = r#""tag":""#;
/// How close to its time a request leaves, at best.
const TICK: Duration = Duration::from_micros(200);

/// What to post, how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Load {
    /// Where the gateway listens.
    pub(crate) to: SocketAddr,
    /// The API key.
    pub(crate) key: String,
    /// How many leads there are; see [`lead_id`].
    pub(crate) leads: u64,
    /// Connections, each with one request at a time.
    pub(crate) connections: usize,
    /// How it is paced.
    pub(crate) pace: Pace,
    /// For how long.
    pub(crate) lasting: Duration,
    /// Leads whose webhooks nobody waits for: by number, the first so many of every so many.
    pub(crate) unheard: Option<(u64, u64)>,
}

impl Load {
    /// Whether the webhook of an update of this lead is waited for.
    fn hears_of(&self, lead: u64) -> bool {
        self.unheard.is_none_or(|(first, of)| lead % of >= first)
    }
}

/// How requests follow each other.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Pace {
    /// The next one as soon as one is answered.
    Answered,
    /// So many a second, whatever becomes of those before: a request that is late counts from when it was due.
    Rate(u32),
    /// So many on their way to their webhooks.
    Window(usize),
}

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Posted {
    /// Requests that were answered 200.
    pub(crate) accepted: u64,
    /// How many of their webhooks are waited for.
    pub(crate) expected: u64,
    /// Requests that were answered otherwise.
    pub(crate) refused: u64,
    /// The first answer that was another.
    pub(crate) refusal: Option<String>,
    /// How long it took, in seconds.
    pub(crate) seconds: f64,
    /// From when a request was due to its answer.
    pub(crate) latency: Latency,
}

impl Posted {
    /// Accepted updates in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.accepted as f64 / self.seconds
    }
}

/// The id of the lead with this number.
pub(crate) fn lead_id(number: u64) -> ObjectId {
    let mut bytes = [0x69; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    ObjectId::from_bytes(bytes)
}

/// A lead at random: one of the first tenth nine times out of ten.
pub(crate) fn any_lead(leads: u64) -> u64 {
    let hot = (leads / 10).max(1);
    if rand::random_range(0..10) < 9 { rand::random_range(0..hot) } else { rand::random_range(0..leads) }
}

/// The body of an update.
pub(crate) fn body(lead: u64, tag: u64) -> String {
    let state = if tag.is_multiple_of(2) { "interested" } else { "followup_2" };
    format!(
        r#"{{"leadId":"{}","metadata":{{{TAG}{tag:012}","campaign":"autumn","score":{},"note":"asked for an offer, call back on thursday afternoon"}},"targetState":"{state}","userId":"agent-0042"}}"#,
        lead_id(lead),
        tag % 100
    )
}

/// Posts.
pub(crate) async fn post(load: Load, book: &Arc<Book>) -> anyhow::Result<Posted> {
    let begun = Instant::now();
    let until = begun + load.lasting;
    if let Pace::Window(size) = load.pace {
        book.window.forget_permits(Semaphore::MAX_PERMITS);
        book.window.add_permits(size);
    }
    let mut clients = JoinSet::new();
    let mut dues = Vec::new();
    for _ in 0..load.connections {
        let due = match load.pace {
            Pace::Rate(_) => {
                let (sender, due) = mpsc::unbounded_channel();
                dues.push(sender);
                Some(due)
            }
            Pace::Answered | Pace::Window(_) => None,
        };
        let (load, book) = (load.clone(), book.clone());
        clients.spawn(async move { Client::connect(load, book, until).await?.run(due).await });
    }
    if let Pace::Rate(rate) = load.pace {
        // A thread: its sleep is finer than the runtime's.
        std::thread::spawn(move || pace(&dues, rate, begun, until));
    }
    let mut posted = Tally::default();
    while let Some(client) = clients.join_next().await {
        let client = client??;
        posted.accepted += client.accepted;
        posted.expected += client.expected;
        posted.refused += client.refused;
        posted.refusal = posted.refusal.or(client.refusal);
        posted.latency.add(&client.latency)?;
    }
    let Tally { accepted, expected, refused, refusal, latency } = posted;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Posted { accepted, expected, refused, refusal, seconds, latency: (&latency).into() })
}

/// Tells the clients in turn when their next request is due.
fn pace(dues: &[mpsc::UnboundedSender<Instant>], rate: u32, begun: Instant, until: Instant) {
    let due = |number: u64| begun + Duration::from_nanos(number * 1_000_000_000 / u64::from(rate));
    let mut number = 0;
    while due(number) < until {
        let now = Instant::now();
        while due(number) <= now {
            // A client that failed says so itself.
            let _ = dues[number as usize % dues.len()].send(due(number));
            number += 1;
        }
        std::thread::sleep((due(number) - now).max(TICK));
    }
}

struct Tally {
    accepted: u64,
    expected: u64,
    refused: u64,
    refusal: Option<String>,
    latency: hdrhistogram::Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { accepted: 0, expected: 0, refused: 0, refusal: None, latency: histogram() }
    }
}

struct Client {
    stream: TcpStream,
    head: String,
    load: Load,
    book: Arc<Book>,
    until: Instant,
}

impl Client {
    async fn connect(load: Load, book: Arc<Book>, until: Instant) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(load.to).await.with_context(|| format!("cannot connect to {}", load.to))?;
        stream.set_nodelay(true)?;
        let head = format!(
            "POST /api/v1/leads/update HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: ",
            load.to, load.key
        );
        Ok(Self { stream, head, load, book, until })
    }

    async fn run(mut self, mut due: Option<mpsc::UnboundedReceiver<Instant>>) -> anyhow::Result<Tally> {
        let mut tally = Tally::default();
        let mut request = Vec::new();
        let mut buffer = BytesMut::with_capacity(4096);
        loop {
            let at = match &mut due {
                Some(due) => match due.recv().await {
                    Some(at) => at,
                    None => return Ok(tally),
                },
                None => Instant::now(),
            };
            if due.is_none() && at >= self.until {
                return Ok(tally);
            }
            if let Pace::Window(_) = self.load.pace {
                let Ok(permit) = timeout_at(self.until.into(), self.book.window.acquire()).await else {
                    return Ok(tally);
                };
                permit?.forget();
            }
            let tag = self.book.next_tag();
            let lead = any_lead(self.load.leads);
            let (body, heard) = (body(lead, tag), self.load.hears_of(lead));
            request.clear();
            write!(request, "{}{}\r\n\r\n{body}", self.head, body.len())?;
            if heard {
                self.book.expect(tag, if due.is_some() { at } else { Instant::now() });
            }
            self.stream.write_all(&request).await.context("the gateway hung up")?;
            let (head, length) = loop {
                if let Some(head) = memmem::find(&buffer, b"\r\n\r\n") {
                    break (head + 4, content_length(&buffer[..head]).context("an answer without a length")?);
                }
                ensure!(self.stream.read_buf(&mut buffer).await? > 0, "the gateway hung up");
            };
            while buffer.len() < head + length {
                ensure!(self.stream.read_buf(&mut buffer).await? > 0, "the gateway hung up");
            }
            record(&mut tally.latency, at.elapsed());
            if buffer.starts_with(b"HTTP/1.1 200") {
                tally.accepted += 1;
                tally.expected += u64::from(heard);
            } else {
                tally.refused += 1;
                let answer = || String::from_utf8_lossy(&buffer[..head + length]).into_owned();
                tally.refusal.get_or_insert_with(answer);
            }
            buffer.advance(head + length);
        }
    }
}
