//! Follows the gateway's event stream (Server-Sent Events). After a lost connection it continues from the last event.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context, bail};
use http_api::Event;
use reqwest::{Response, StatusCode};
use tokio::time::sleep;

use crate::{clients::gateway::GatewayClient, exit_status::is_unavailable, output};

const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Longest field of an event. An event contains the lead's metadata, up to 1 MiB.
const MAX_FIELD_BYTES: usize = 16 << 20;

#[derive(Debug)]
pub(crate) enum StreamEvent {
    Event(Box<Event>),
    /// The gateway no longer keeps the events since the last one.
    Gap,
}

pub(crate) struct EventStream {
    gateway: GatewayClient,
    last_event_id: Option<String>,
    response: Option<Response>,
    frames: Frames,
    /// The last reason that was shown for being disconnected.
    shown_reason: Option<String>,
}

impl EventStream {
    /// Follows the events after `last_event_id`; without it, those from now on.
    pub(crate) fn new(gateway: GatewayClient, last_event_id: Option<String>) -> Self {
        Self { gateway, last_event_id, response: None, frames: Frames::default(), shown_reason: None }
    }

    pub(crate) fn last_event_id(&self) -> Option<&str> {
        self.last_event_id.as_deref()
    }

    /// Connects, and waits for the id of the event that the stream starts after.
    pub(crate) async fn start(&mut self) -> anyhow::Result<()> {
        while self.last_event_id.is_none() {
            self.step().await?;
        }
        Ok(())
    }

    /// Waits for the next event. Cancel-safe.
    ///
    /// # Errors
    /// The key may not read events, or an event cannot be parsed.
    pub(crate) async fn next(&mut self) -> anyhow::Result<StreamEvent> {
        loop {
            if let Some(event) = self.step().await? {
                return Ok(event);
            }
        }
    }

    /// Handles one frame, or reads more bytes.
    async fn step(&mut self) -> anyhow::Result<Option<StreamEvent>> {
        if let Some(Frame { id, data }) = self.frames.next() {
            self.last_event_id = id.or(self.last_event_id.take());
            return match data {
                Some(data) => {
                    let event = serde_json::from_str(&data).context("cannot parse an event of the gateway")?;
                    Ok(Some(StreamEvent::Event(Box::new(event))))
                }
                None => Ok(None),
            };
        }
        let Some(response) = &mut self.response else { return self.connect().await };
        match response.chunk().await {
            Ok(Some(bytes)) => self.frames.push(&bytes)?,
            // The gateway ends the stream on errors; reconnect.
            Ok(None) | Err(_) => {
                self.response = None;
                sleep(RETRY_DELAY).await;
            }
        }
        Ok(None)
    }

    async fn connect(&mut self) -> anyhow::Result<Option<StreamEvent>> {
        let response = match self.gateway.events(self.last_event_id()).await {
            Ok(response) => response,
            Err(error) if is_unavailable(&error) => {
                self.wait(&error).await;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        match response.status() {
            StatusCode::OK => {
                self.frames = Frames::default();
                self.response = Some(response);
                self.shown_reason = None;
                Ok(None)
            }
            StatusCode::GONE => {
                self.last_event_id = None;
                Ok(Some(StreamEvent::Gap))
            }
            status if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                let error = self.gateway.read(response).await.map_or_else(|error| error, |answer| answer.error());
                self.wait(&error).await;
                Ok(None)
            }
            _ => Err(self.gateway.read(response).await?.error().context("cannot follow outcomes")),
        }
    }

    /// Waits before the next attempt. Shows each reason once, because the gateway may be down for long.
    async fn wait(&mut self, error: &anyhow::Error) {
        let reason = format!("{error:#}");
        if self.shown_reason.as_ref() != Some(&reason) {
            output::note(format_args!("waiting for events of the gateway: {reason}"));
            self.shown_reason = Some(reason);
        }
        sleep(RETRY_DELAY).await;
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Frame {
    id: Option<String>,
    data: Option<String>,
}

/// Parses Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html) as the gateway writes
/// them: lines end with a line feed.
#[derive(Debug, Default)]
struct Frames {
    /// The incomplete line.
    line: Vec<u8>,
    id: Option<String>,
    data: Option<String>,
    complete: VecDeque<Frame>,
}

impl Frames {
    fn push(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > MAX_FIELD_BYTES {
                bail!("an event of the gateway has more than {MAX_FIELD_BYTES} bytes");
            }
            if let Some(line) = self.line.strip_suffix(b"\n") {
                let line = std::str::from_utf8(line).context("an event of the gateway is not UTF-8")?.to_owned();
                self.line.clear();
                self.push_line(&line);
            }
        }
        Ok(())
    }

    fn push_line(&mut self, line: &str) {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.id = Some(value.to_owned()),
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            _ if line.is_empty() => self.complete.push_back(Frame { id: self.id.take(), data: self.data.take() }),
            _ => {}
        }
    }

    fn next(&mut self) -> Option<Frame> {
        self.complete.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(bytes: &[u8], part: usize) -> Vec<Frame> {
        let mut frames = Frames::default();
        bytes.chunks(part).for_each(|part| frames.push(part).unwrap());
        std::iter::from_fn(|| frames.next()).collect()
    }

    #[test]
    fn frames_are_parsed_from_chunks_of_any_size() {
        let text = "retry: 2000\nid: s-1\n\n:\n\nid: s-2\ndata: {\"a\":\ndata: 1}\n\nid: s-3\n";
        let frame = |id: Option<&str>, data: Option<&str>| Frame { id: id.map(Into::into), data: data.map(Into::into) };
        for part in 1..text.len() {
            let expected = [frame(Some("s-1"), None), frame(None, None), frame(Some("s-2"), Some("{\"a\":\n1}"))];
            assert_eq!(frames(text.as_bytes(), part), expected);
        }
        let mut endless = Frames::default();
        assert!((0..=MAX_FIELD_BYTES >> 10).any(|_| endless.push(&[b'x'; 1024]).is_err()));
    }

    proptest! {
        #[test]
        fn data_of_several_lines_is_joined(data in "[^\r\n]{0,40}(\n[^\r\n]{0,40}){0,3}", part in 1_usize..50) {
            let lines: String = data.split('\n').map(|line| format!("data: {line}\n")).collect();
            let read = frames(format!("id: s-1\n{lines}\n").as_bytes(), part);
            prop_assert_eq!(read, vec![Frame { id: Some("s-1".into()), data: Some(data) }]);
        }
    }
}
