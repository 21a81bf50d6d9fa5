//! Sends a chunk, and repeats it under the same idempotency key until the response is complete.

use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use contract::rpc::RpcError;
use http_api::BulkUpdateResult;
use reqwest::StatusCode;
use tokio::time::{Instant, sleep};

use crate::{
    clients::gateway::{GatewayClient, GatewayResponse},
    exit_status::is_unavailable,
};

/// How long a request is retried without progress. A longer time survives a longer outage; afterwards the import can be
/// resumed.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause before a retry, unless the gateway sends `Retry-After`.
pub(super) const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Error codes of lines that may be accepted later.
const TRANSIENT_CODES: [&str; 12] = [
    "log_full",
    "broker_unavailable",
    "log_refused",
    "not_confirmed",
    "too_many_in_flight",
    "starting",
    "body_timeout",
    "unreadable_body",
    "unavailable",
    "work_limited",
    "project_backlog",
    "internal",
];

/// The code of lines that were refused because the API key was revoked, or expired, during the request.
const KEY_ENDED: &str = "invalid_api_key";

#[derive(Debug)]
enum SendResult {
    Complete(Vec<BulkUpdateResult>),
    /// `accepted` lines of the chunk are in the log.
    Retry {
        after: Duration,
        error: anyhow::Error,
        accepted: usize,
    },
    Failed(anyhow::Error),
}

/// Limits how long failures are retried.
#[derive(Debug, Default)]
pub(super) struct Patience {
    failing_since: Option<Instant>,
    /// The most lines that were accepted.
    accepted: usize,
}

impl Patience {
    /// Waits before a retry.
    ///
    /// # Errors
    /// `error`, if the retry would be [`RETRY_TIMEOUT`] after the first failure since more lines were accepted.
    pub(super) async fn pause(&mut self, after: Duration, error: anyhow::Error, accepted: usize) -> anyhow::Result<()> {
        let now = Instant::now();
        if accepted > self.accepted {
            *self = Self { failing_since: None, accepted };
        }
        if now + after > *self.failing_since.get_or_insert(now) + RETRY_TIMEOUT {
            return Err(error).context("gave up; run the same command with --resume to continue");
        }
        sleep(after).await;
        Ok(())
    }
}

/// Sends a body of `lines` lines and returns the result of each. `on_retry` is called before each retry.
pub(crate) async fn send(
    gateway: &GatewayClient,
    key: &str,
    body: Bytes,
    lines: usize,
    mut on_retry: impl FnMut(&anyhow::Error),
) -> anyhow::Result<Vec<BulkUpdateResult>> {
    let mut patience = Patience::default();
    loop {
        let result = match gateway.bulk(key, body.clone()).await {
            Ok(answer) => classify(&answer, lines),
            Err(error) if is_unavailable(&error) => SendResult::Retry { after: RETRY_DELAY, error, accepted: 0 },
            Err(error) => SendResult::Failed(error),
        };
        match result {
            SendResult::Complete(lines) => return Ok(lines),
            SendResult::Failed(error) => return Err(error),
            SendResult::Retry { after, error, accepted } => {
                on_retry(&error);
                patience.pause(after, error, accepted).await?;
            }
        }
    }
}

fn classify(answer: &GatewayResponse, lines: usize) -> SendResult {
    let retry = |error, accepted| {
        let after = answer.retry_after.unwrap_or(RETRY_DELAY);
        SendResult::Retry { after, error, accepted }
    };
    match answer.status {
        StatusCode::OK => {}
        _ if answer.may_pass() => return retry(answer.error(), 0),
        _ => return SendResult::Failed(answer.error()),
    }
    let results = answer.body.lines().map(serde_json::from_str).collect::<Result<Vec<BulkUpdateResult>, _>>();
    let accepted = results.iter().flatten().filter(|line| line.update_id.is_some()).count();
    match results {
        Ok(results) if results.len() == lines && results.iter().zip(1..).all(|(line, n)| line.line == n) => {
            let transient =
                results.iter().find_map(|line| line.code.as_deref().filter(|code| TRANSIENT_CODES.contains(code)));
            // The lines after the end of the key were not accepted. A resumed import sends the chunk again under its
            // key.
            let ended = results.iter().find(|line| line.code.as_deref() == Some(KEY_ENDED));
            if let Some(line) = ended {
                let error = line.error.clone().unwrap_or_default();
                return SendResult::Failed(RpcError::received(401, KEY_ENDED, error).into());
            }
            match transient {
                Some(code) => {
                    let error = RpcError::received(503, code, "the gateway cannot accept updates now");
                    retry(error.into(), accepted)
                }
                None => SendResult::Complete(results),
            }
        }
        // The response is incomplete, or its last line is an error about the whole body.
        results => {
            let last = results.ok().and_then(|mut results| results.pop()?.error);
            let error = last.unwrap_or_else(|| "the response is incomplete".to_owned());
            retry(RpcError::received(503, "unavailable", error).into(), accepted)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn answer(status: u16, body: &str) -> GatewayResponse {
        let retry_after = (status == 429).then_some(Duration::from_secs(7));
        GatewayResponse { status: StatusCode::from_u16(status).unwrap(), retry_after, body: body.to_owned() }
    }

    /// Errors of a whole request, or of other endpoints.
    const NOT_OF_LINES: [&str; 11] = [
        "rate_limited",
        "idempotency_share",
        "idempotency_full",
        "idempotency_unavailable",
        "too_many_bulk_requests",
        "too_many_call_reports",
        "too_many_listeners",
        "too_many_queries",
        "too_many_tests",
        "callback_busy",
        "not_projected",
    ];

    #[test]
    fn every_documented_error_that_may_pass_is_retried() {
        let documented = include_str!("../../../../docs/ERRORS.md").lines().filter_map(|line| {
            let mut cells = line.strip_prefix("| HTTP | ")?.split(" | ");
            let status: u16 = cells.next()?.parse().ok()?;
            let code = cells.next()?.trim_matches('`');
            (matches!(status, 408 | 429 | 500..) && !NOT_OF_LINES.contains(&code)).then_some(code)
        });
        // The gateway answers 400 to a body that broke off.
        let expected: BTreeSet<_> = documented.chain(["unreadable_body"]).collect();
        assert_eq!(BTreeSet::from(TRANSIENT_CODES), expected);
    }

    #[test]
    fn incomplete_and_transient_responses_are_retried() {
        let good = r#"{"line":1,"success":true,"updateId":"010101010101010101010101","warnings":["w"]}"#;
        let bad = r#"{"line":2,"success":false,"error":"no","code":"invalid_field"}"#;
        let full = r#"{"line":2,"success":false,"error":"full","code":"log_full"}"#;
        let timed_out = r#"{"line":3,"success":false,"error":"late","code":"body_timeout"}"#;
        let result = |status, lines: &[&str]| match classify(&answer(status, &lines.join("\n")), 2) {
            SendResult::Complete(_) => "whole".to_owned(),
            SendResult::Retry { after, .. } => format!("after {after:?}"),
            SendResult::Failed(_) => "never".to_owned(),
        };
        assert_eq!(result(200, &[good, bad]), "whole");
        for lines in [&[good][..], &[], &[good, full], &[good, bad, timed_out], &[good, "{\"line"], &[good, good]] {
            assert_eq!(result(200, lines), "after 1s", "{lines:?}");
        }
        let ended = r#"{"line":2,"success":false,"error":"The API key is revoked","code":"invalid_api_key"}"#;
        assert_eq!(result(200, &[good, ended]), "never", "a resumed import sends the chunk again");
        assert_eq!(result(429, &[]), "after 7s");
        assert_eq!(result(503, &[]), "after 1s");
        for status in [400, 401, 403, 404, 415, 422] {
            assert_eq!(result(status, &[]), "never", "{status}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_retried_for_a_minute_since_the_last_progress() {
        const PAUSE: Duration = Duration::from_secs(25);
        let mut patience = Patience::default();
        let mut pause = async |accepted| patience.pause(PAUSE, anyhow::anyhow!("down"), accepted).await.is_ok();

        assert_eq!([pause(0).await, pause(0).await, pause(7).await, pause(7).await], [true; 4]);
        assert!(!pause(7).await, "no line was accepted in the last minute");
    }

    #[test]
    fn accepted_lines_of_an_incomplete_response_are_counted() {
        let good = r#"{"line":1,"success":true,"updateId":"010101010101010101010101"}"#;
        let full = r#"{"line":2,"success":false,"error":"full","code":"log_full"}"#;
        let result = classify(&answer(200, &[good, full].join("\n")), 2);
        assert!(matches!(result, SendResult::Retry { accepted: 1, .. }), "{result:?}");
    }
}
