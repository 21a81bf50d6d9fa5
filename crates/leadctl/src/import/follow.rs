//! The outcomes of updates as they come about, from the gateway's Server-Sent Events; heard again from the last one after
//! every loss of the connection.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context, bail};
use contract::{ObjectId, rpc::UpdateStatus};
use reqwest::{Response, StatusCode};
use serde::Deserialize;
use tokio::time::sleep;

use crate::{gateway_client::Gateway, story::Found};

/// How long to wait before the gateway is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest field of an event. An event holds a lead's metadata, which may have a mebibyte.
const MAX_FIELD: usize = 16 << 20;
/// How much is kept of why an update failed.
const ERROR_CHARS: usize = 500;

/// What became of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) update_id: ObjectId,
    pub(crate) lead_id: Option<ObjectId>,
    /// Why it failed; none where it did not.
    pub(crate) error: Option<String>,
    /// The same for programs.
    pub(crate) code: Option<String>,
}

/// What is heard.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Outcome(Outcome),
    /// Events behind the last one are no longer kept: what came meanwhile must be asked for.
    Gap,
}

/// A client that listens.
pub(crate) struct Follower {
    gateway: Gateway,
    /// The last event that was heard, or behind which to begin.
    last: Option<String>,
    response: Option<Response>,
    frames: Frames,
}

impl Follower {
    /// Listens to what comes behind an event; without one, to what comes from now on.
    pub(crate) fn new(gateway: Gateway, last: Option<String>) -> Self {
        Self { gateway, last, response: None, frames: Frames::default() }
    }

    /// Where it is: behind which event.
    pub(crate) fn last(&self) -> Option<&str> {
        self.last.as_deref()
    }

    /// Connects, and learns behind which event it begins.
    pub(crate) async fn begin(&mut self) -> anyhow::Result<()> {
        while self.last.is_none() {
            self.step().await?;
        }
        Ok(())
    }

    /// The next outcome, however long it takes. Nothing is lost where this is dropped.
    ///
    /// # Errors
    /// The key may not listen, or the gateway says what cannot be read.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Heard> {
        loop {
            if let Some(heard) = self.step().await? {
                return Ok(heard);
            }
        }
    }

    /// Goes on by a frame, or by a part of one.
    async fn step(&mut self) -> anyhow::Result<Option<Heard>> {
        if let Some(Frame { id, data }) = self.frames.next() {
            self.last = id.or(self.last.take());
            return match data {
                Some(data) => Ok(Some(Heard::Outcome(read(&data)?))),
                None => Ok(None),
            };
        }
        let Some(response) = &mut self.response else { return self.connect().await };
        match response.chunk().await {
            Ok(Some(bytes)) => self.frames.push(&bytes)?,
            // It ends whenever anything goes wrong there; then one comes again.
            Ok(None) | Err(_) => {
                self.response = None;
                sleep(AGAIN).await;
            }
        }
        Ok(None)
    }

    async fn connect(&mut self) -> anyhow::Result<Option<Heard>> {
        let Ok(response) = self.gateway.events(self.last()).await else {
            sleep(AGAIN).await;
            return Ok(None);
        };
        match response.status() {
            StatusCode::OK => {
                self.frames = Frames::default();
                self.response = Some(response);
                Ok(None)
            }
            StatusCode::GONE => {
                self.last = None;
                Ok(Some(Heard::Gap))
            }
            status if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                sleep(AGAIN).await;
                Ok(None)
            }
            _ => Err(self
                .gateway
                .read(response)
                .await?
                .refusal()
                .context("outcomes cannot be followed; --wait 0s does without")),
        }
    }
}

/// An event's data.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    update_id: ObjectId,
    success: bool,
    error: Option<String>,
    #[serde(default)]
    error_code: Option<String>,
    lead_id: Option<ObjectId>,
}

fn read(data: &str) -> anyhow::Result<Outcome> {
    let event: Event = serde_json::from_str(data).context("the gateway tells an event that is none")?;
    let error = (!event.success).then(|| event.error.unwrap_or_default().chars().take(ERROR_CHARS).collect());
    Ok(Outcome { update_id: event.update_id, lead_id: event.lead_id, error, code: event.error_code })
}

/// Asks what became of an update; none while it is pending.
pub(crate) async fn ask(gateway: &Gateway, update_id: ObjectId) -> anyhow::Result<Option<Outcome>> {
    loop {
        let answer = gateway.get(&format!("/api/v1/updates/{update_id}")).await?;
        if answer.status == StatusCode::TOO_MANY_REQUESTS {
            sleep(answer.retry_after.unwrap_or(AGAIN)).await;
            continue;
        }
        let Found { data } = answer.read()?;
        let error = match data.status {
            UpdateStatus::Pending => return Ok(None),
            UpdateStatus::Succeeded => None,
            UpdateStatus::Failed => Some(data.error().unwrap_or_default().chars().take(ERROR_CHARS).collect()),
        };
        return Ok(Some(Outcome { update_id, lead_id: None, error, code: data.error_code }));
    }
}

/// An event as it is sent.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    id: Option<String>,
    data: Option<String>,
}

/// Reads events (https://html.spec.whatwg.org/multipage/server-sent-events.html) as far as the gateway's need it: lines end
/// with a line feed.
#[derive(Debug, Default)]
struct Frames {
    /// What came of the line that is not whole yet.
    line: Vec<u8>,
    id: Option<String>,
    data: Option<String>,
    whole: VecDeque<Frame>,
}

impl Frames {
    fn push(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > MAX_FIELD {
                bail!("the gateway tells an event of more than {MAX_FIELD} bytes");
            }
            if let Some(line) = self.line.strip_suffix(b"\n") {
                let line =
                    std::str::from_utf8(line).context("the gateway tells an event that is not UTF-8")?.to_owned();
                self.line.clear();
                self.take(&line);
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &str) {
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
            _ if line.is_empty() => self.whole.push_back(Frame { id: self.id.take(), data: self.data.take() }),
            _ => {}
        }
    }

    fn next(&mut self) -> Option<Frame> {
        self.whole.pop_front()
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
    fn frames_are_read_wherever_they_break() {
        let text = "retry: 2000\nid: s-1\n\n:\n\nid: s-2\ndata: {\"a\":\ndata: 1}\n\nid: s-3\n";
        let frame = |id: Option<&str>, data: Option<&str>| Frame { id: id.map(Into::into), data: data.map(Into::into) };
        for part in 1..text.len() {
            let expected = [frame(Some("s-1"), None), frame(None, None), frame(Some("s-2"), Some("{\"a\":\n1}"))];
            assert_eq!(frames(text.as_bytes(), part), expected);
        }
        let mut endless = Frames::default();
        assert!((0..=MAX_FIELD >> 10).any(|_| endless.push(&[b'x'; 1024]).is_err()));
    }

    #[test]
    fn outcomes_are_read_off_events() {
        let event = r#"{"action_type":"update","updateId":"010101010101010101010101","success":false,"error":"no","leadId":null,"data":null,"errorCode":"c"}"#;
        let failed = Outcome {
            update_id: ObjectId::from_bytes([1; 12]),
            lead_id: None,
            error: Some("no".into()),
            code: Some("c".into()),
        };
        assert_eq!(read(event).unwrap(), failed);
        let succeeded = event.replace("false", "true").replace("\"c\"", "null");
        assert_eq!(read(&succeeded).unwrap(), Outcome { error: None, code: None, ..failed });
    }

    proptest! {
        #[test]
        fn what_is_in_lines_is_read_from_them(data in "[^\r\n]{0,40}(\n[^\r\n]{0,40}){0,3}", part in 1_usize..50) {
            let lines: String = data.split('\n').map(|line| format!("data: {line}\n")).collect();
            let read = frames(format!("id: s-1\n{lines}\n").as_bytes(), part);
            prop_assert_eq!(read, vec![Frame { id: Some("s-1".into()), data: Some(data) }]);
        }
    }
}
