//! Sending a chunk, again and again under the same key until its answer is whole.

use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use contract::{ObjectId, rpc::RpcError};
use reqwest::StatusCode;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use crate::gateway_client::{Answer, Gateway};

/// How long it is tried again while the gateway is away, or refuses for now. Longer rides out a longer stop; what is given up
/// can be resumed.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait before the next try, where the gateway does not say.
const AGAIN: Duration = Duration::from_secs(1);
/// What a line is told that may be accepted a little later.
const PASSING: [&str; 9] = [
    "log_full",
    "broker_unavailable",
    "log_refused",
    "not_confirmed",
    "too_many_in_flight",
    "starting",
    "body_timeout",
    "unreadable_body",
    "unavailable",
];

/// What the gateway says to a line.
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Line {
    line: usize,
    pub(crate) update_id: Option<ObjectId>,
    pub(crate) error: Option<String>,
    pub(crate) code: Option<String>,
}

/// What an answer comes to.
#[derive(Debug)]
enum Verdict {
    Whole(Vec<Line>),
    Again { after: Duration, error: anyhow::Error },
    Never(anyhow::Error),
}

/// Sends so many lines; what each was told. `again` hears why they are sent again.
pub(crate) async fn send(
    gateway: &Gateway,
    key: &str,
    body: Bytes,
    lines: usize,
    mut again: impl FnMut(&anyhow::Error),
) -> anyhow::Result<Vec<Line>> {
    let begun = Instant::now();
    loop {
        let verdict = match gateway.bulk(key, body.clone()).await {
            Ok(answer) => judge(&answer, lines),
            Err(error) => Verdict::Again { after: AGAIN, error },
        };
        match verdict {
            Verdict::Whole(lines) => return Ok(lines),
            Verdict::Never(error) => return Err(error),
            Verdict::Again { after, error } if begun.elapsed() + after > PATIENCE => {
                return Err(error).context("given up; the same with --resume goes on");
            }
            Verdict::Again { after, error } => {
                again(&error);
                sleep(after).await;
            }
        }
    }
}

/// Whether an answer to so many lines is the last word.
fn judge(answer: &Answer, lines: usize) -> Verdict {
    let again = |error| Verdict::Again { after: answer.retry_after.unwrap_or(AGAIN), error };
    match answer.status {
        StatusCode::OK => {}
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => return again(answer.refusal()),
        status if status.is_server_error() => return again(answer.refusal()),
        _ => return Verdict::Never(answer.refusal()),
    }
    let told = answer.body.lines().map(serde_json::from_str).collect::<Result<Vec<Line>, _>>();
    match told {
        Ok(told) if told.len() == lines && told.iter().zip(1..).all(|(line, n)| line.line == n) => {
            let passing = told.iter().find_map(|line| line.code.as_deref().filter(|code| PASSING.contains(code)));
            match passing {
                Some(code) => again(RpcError::new(503, code, "the gateway cannot accept it now").into()),
                None => Verdict::Whole(told),
            }
        }
        // It broke off, or ends with a line about the body.
        told => {
            let last = told.ok().and_then(|mut told| told.pop()?.error);
            let error = last.unwrap_or_else(|| "its answer broke off".to_owned());
            again(RpcError::new(503, "unavailable", error).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        let retry_after = (status == 429).then_some(Duration::from_secs(7));
        Answer { status: StatusCode::from_u16(status).unwrap(), retry_after, body: body.to_owned() }
    }

    #[test]
    fn what_answers_come_to() {
        let good = r#"{"line":1,"success":true,"updateId":"010101010101010101010101","warnings":["w"]}"#;
        let bad = r#"{"line":2,"success":false,"error":"no","code":"invalid_field"}"#;
        let full = r#"{"line":2,"success":false,"error":"full","code":"log_full"}"#;
        let timed_out = r#"{"line":3,"success":false,"error":"late","code":"body_timeout"}"#;
        let told = |status, lines: &[&str]| match judge(&answer(status, &lines.join("\n")), 2) {
            Verdict::Whole(_) => "whole".to_owned(),
            Verdict::Again { after, .. } => format!("after {after:?}"),
            Verdict::Never(_) => "never".to_owned(),
        };
        assert_eq!(told(200, &[good, bad]), "whole");
        for lines in [&[good][..], &[], &[good, full], &[good, bad, timed_out], &[good, "{\"line"], &[good, good]] {
            assert_eq!(told(200, lines), "after 1s", "{lines:?}");
        }
        assert_eq!(told(429, &[]), "after 7s");
        assert_eq!(told(503, &[]), "after 1s");
        for status in [400, 401, 403, 404, 415, 422] {
            assert_eq!(told(status, &[]), "never", "{status}");
        }
    }
}
