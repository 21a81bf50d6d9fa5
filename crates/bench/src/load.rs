//! The clients: they post updates to random leads, paced by responses, by a fixed rate or by received webhooks.

use std::{
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::{Buf, BytesMut};
use contract::ObjectId;
use memchr::memmem;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout_at,
};

use crate::{
    latency::{histogram, record},
    protocol::{Content, LONG_BYTES, Load, Pace, Posted, TAG, content_length},
    receiver::Tally,
};

/// The pacing thread's shortest sleep, and so the precision of due times.
const MIN_SLEEP: Duration = Duration::from_micros(200);

pub(crate) fn lead_id(number: u64) -> ObjectId {
    let mut bytes = [0x69; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    ObjectId::from_bytes(bytes)
}

/// A random lead: nine in ten are among the first tenth.
pub(crate) fn random_lead(leads: u64) -> u64 {
    let hot = (leads / 10).max(1);
    if rand::random_range(0..10) < 9 { rand::random_range(0..hot) } else { rand::random_range(0..leads) }
}

/// The path of requests with this content.
fn path(content: Content) -> &'static str {
    match content {
        Content::Update | Content::LongUpdate => "/api/v1/leads/update",
        Content::Activity => "/api/v1/calls/ended",
    }
}

fn body(content: Content, lead: u64, tag: u64) -> String {
    match content {
        Content::Update => update_body(lead, tag),
        Content::LongUpdate => {
            let lead = lead_id(lead);
            padded(
                &format!(r#"{{"leadId":"{lead}","targetState":"interested","metadata":{{{TAG}{tag:012}","text":""#),
                r#""}}"#,
            )
        }
        Content::Activity => {
            let lead = lead_id(lead);
            let head = format!(
                r#"{{"leadId":"{lead}","toState":"interested","result":{{"status":"completed","connected":true,"durationSeconds":94,"metadata":{{{TAG}{tag:012}"}},"summary":""#
            );
            padded(&head, r#""}}"#)
        }
    }
}

/// The beginning and the end of a body, with text between, so that it has [`LONG_BYTES`].
fn padded(head: &str, end: &str) -> String {
    const WORDS: &str = "asked for an offer, call back on thursday afternoon; ";
    let length = LONG_BYTES.saturating_sub(head.len() + end.len());
    let text: String = WORDS.chars().cycle().take(length).collect();
    format!("{head}{text}{end}")
}

pub(crate) fn update_body(lead: u64, tag: u64) -> String {
    let state = if tag.is_multiple_of(2) { "interested" } else { "followup_2" };
    format!(
        r#"{{"leadId":"{}","metadata":{{{TAG}{tag:012}","campaign":"autumn","score":{},"note":"asked for an offer, call back on thursday afternoon"}},"targetState":"{state}","userId":"agent-0042"}}"#,
        lead_id(lead),
        tag % 100
    )
}

/// Posts updates over all connections until the load's duration has passed.
pub(crate) async fn post(load: Load, tally: &Arc<Tally>) -> anyhow::Result<Posted> {
    let start = Instant::now();
    let end = start + load.duration;
    if let Pace::Window(size) = load.pace {
        tally.window.forget_permits(Semaphore::MAX_PERMITS);
        tally.window.add_permits(size);
    }
    let mut clients = JoinSet::new();
    let mut schedules = Vec::new();
    for _ in 0..load.connections {
        let due_times = matches!(load.pace, Pace::Rate(_)).then(|| {
            let (schedule, due_times) = mpsc::unbounded_channel();
            schedules.push(schedule);
            due_times
        });
        let (load, tally) = (load.clone(), tally.clone());
        clients.spawn(async move { Client::connect(load, tally, end).await?.run(due_times).await });
    }
    if let Pace::Rate(rate) = load.pace {
        // A thread of its own sleeps more precisely than the runtime.
        std::thread::spawn(move || schedule_requests(&schedules, rate, start, end));
    }
    let mut total = ConnectionResult::default();
    while let Some(client) = clients.join_next().await {
        let client = client??;
        total.accepted += client.accepted;
        total.expected += client.expected;
        total.refused += client.refused;
        total.refusal = total.refusal.or(client.refusal);
        total.latency.add(&client.latency)?;
    }
    let ConnectionResult { accepted, expected, refused, refusal, latency } = total;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Posted { accepted, expected, refused, refusal, seconds, latency: (&latency).into() })
}

/// Sends the due times of requests to the clients, round robin.
fn schedule_requests(clients: &[mpsc::UnboundedSender<Instant>], rate: u32, start: Instant, end: Instant) {
    let due = |number: u64| start + Duration::from_nanos(number * 1_000_000_000 / u64::from(rate));
    let mut number = 0;
    while due(number) < end {
        let now = Instant::now();
        while due(number) <= now {
            // A failed client returns its error itself.
            let _ = clients[number as usize % clients.len()].send(due(number));
            number += 1;
        }
        std::thread::sleep((due(number) - now).max(MIN_SLEEP));
    }
}

/// The responses on one connection.
struct ConnectionResult {
    accepted: u64,
    expected: u64,
    refused: u64,
    refusal: Option<String>,
    latency: hdrhistogram::Histogram<u64>,
}

impl Default for ConnectionResult {
    fn default() -> Self {
        Self { accepted: 0, expected: 0, refused: 0, refusal: None, latency: histogram() }
    }
}

struct Client {
    stream: TcpStream,
    head: String,
    load: Load,
    tally: Arc<Tally>,
    end: Instant,
}

impl Client {
    async fn connect(load: Load, tally: Arc<Tally>, end: Instant) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(load.gateway)
            .await
            .with_context(|| format!("cannot connect to the gateway at {}", load.gateway))?;
        stream.set_nodelay(true)?;
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: ",
            path(load.content),
            load.gateway,
            load.api_key
        );
        Ok(Self { stream, head, load, tally, end })
    }

    /// Sends requests at their due times if there are any, otherwise one after the other.
    async fn run(
        mut self,
        mut due_times: Option<mpsc::UnboundedReceiver<Instant>>,
    ) -> anyhow::Result<ConnectionResult> {
        let mut result = ConnectionResult::default();
        let mut request = Vec::new();
        let mut buffer = BytesMut::with_capacity(4096);
        loop {
            let due = match &mut due_times {
                Some(due_times) => due_times.recv().await,
                None => Some(Instant::now()).filter(|now| *now < self.end),
            };
            let Some(due) = due else { return Ok(result) };
            if let Pace::Window(_) = self.load.pace {
                let Ok(permit) = timeout_at(self.end.into(), self.tally.window.acquire()).await else {
                    return Ok(result);
                };
                permit?.forget();
            }
            let tag = self.tally.next_tag();
            let lead = random_lead(self.load.leads);
            let (body, expected) = (body(self.load.content, lead, tag), self.load.expects_webhook(lead));
            request.clear();
            write!(request, "{}{}\r\n\r\n{body}", self.head, body.len())?;
            if expected {
                self.tally.expect(tag, if due_times.is_some() { due } else { Instant::now() });
            }
            self.stream.write_all(&request).await.context("the gateway closed the connection")?;
            let (head, length) = loop {
                if let Some(head) = memmem::find(&buffer, b"\r\n\r\n") {
                    break (
                        head + 4,
                        content_length(&buffer[..head]).context("the gateway's response has no content-length")?,
                    );
                }
                ensure!(self.stream.read_buf(&mut buffer).await? > 0, "the gateway closed the connection");
            };
            while buffer.len() < head + length {
                ensure!(self.stream.read_buf(&mut buffer).await? > 0, "the gateway closed the connection");
            }
            record(&mut result.latency, due.elapsed());
            if buffer.starts_with(b"HTTP/1.1 200") {
                result.accepted += 1;
                result.expected += u64::from(expected);
            } else {
                result.refused += 1;
                let response = || String::from_utf8_lossy(&buffer[..head + length]).into_owned();
                result.refusal.get_or_insert_with(response);
            }
            buffer.advance(head + length);
        }
    }
}
