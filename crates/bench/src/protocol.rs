//! The messages between the bench and its driver, and the types that the driver's clients and endpoints share.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::latency::Latency;

/// Precedes the tag of an update or activity: twelve digits in its metadata that connect a webhook with its request.
pub(crate) const TAG: &str = r#""tag":""#;

/// A command to the driver.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum DriverCommand {
    /// Listen on these addresses; the answer is the bound addresses.
    Listen(Vec<SocketAddr>),
    /// Accept requests on these addresses, but never answer them.
    Hang(Vec<SocketAddr>),
    /// Post updates; the answer is [`Posted`].
    Post(Load),
    /// Reset the counters of received webhooks.
    Reset,
    /// Wait until this many updates are received or the timeout has passed; the answer is [`Received`].
    Await(u64, Duration),
}

/// The updates to post.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) gateway: SocketAddr,
    pub(crate) api_key: String,
    /// The number of leads; see [`crate::load::lead_id`].
    pub(crate) leads: u64,
    /// Connections, each with one request at a time.
    pub(crate) connections: usize,
    pub(crate) pace: Pace,
    pub(crate) content: Content,
    pub(crate) duration: Duration,
    /// `(n, m)`: do not expect webhooks for the first n of every m leads.
    pub(crate) ignored_leads: Option<(u64, u64)>,
}

impl Load {
    pub(crate) fn expects_webhook(&self, lead: u64) -> bool {
        self.ignored_leads.is_none_or(|(first, every)| lead % every >= first)
    }
}

/// What a request reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Content {
    /// An update of some hundred bytes.
    Update,
    /// An update of [`LONG_BYTES`].
    LongUpdate,
    /// The end of a call with a result, of [`LONG_BYTES`].
    Activity,
}

/// The length of long requests.
pub(crate) const LONG_BYTES: usize = 2048;

/// When the next request is sent.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Pace {
    /// As soon as the previous one is answered.
    Answered,
    /// At a fixed rate per second (open loop): the latency of a late request counts from its due time.
    Rate(u32),
    /// As soon as fewer than this many updates wait for their webhook.
    Window(usize),
}

/// The responses to the posted updates.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Posted {
    /// Requests answered with 200.
    pub(crate) accepted: u64,
    /// Accepted updates whose webhook is expected.
    pub(crate) expected: u64,
    /// Requests answered with another status.
    pub(crate) refused: u64,
    /// The first response with another status.
    pub(crate) refusal: Option<String>,
    pub(crate) seconds: f64,
    /// From the due time of a request to its response.
    pub(crate) latency: Latency,
}

impl Posted {
    /// Accepted updates per second.
    pub(crate) fn rate(&self) -> f64 {
        self.accepted as f64 / self.seconds
    }
}

/// The webhooks received since the last reset.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Received {
    /// All webhooks, including repeated ones.
    pub(crate) webhooks: u64,
    /// Updates whose webhook has been received.
    pub(crate) updates: u64,
    /// From the first webhook to the last.
    pub(crate) seconds: f64,
    /// From the due time of the update to its webhook.
    pub(crate) latency: Latency,
}

/// The `Content-Length` of a request or response.
pub(crate) fn content_length(head: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"content-length:";
    let line = head
        .split(|byte| *byte == b'\n')
        .find(|line| line.len() > NAME.len() && line[..NAME.len()].eq_ignore_ascii_case(NAME))?;
    std::str::from_utf8(&line[NAME.len()..]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::content_length;

    #[test]
    fn the_content_length_is_read_case_insensitively() {
        assert_eq!(content_length(b"POST / HTTP/1.1\r\nContent-Length: 17\r\nhost: x"), Some(17));
        assert_eq!(content_length(b"POST / HTTP/1.1\r\nhost: x"), None);
    }
}
