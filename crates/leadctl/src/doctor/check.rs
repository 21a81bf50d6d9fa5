//! The result of a check, and checks that several sources share.

use std::time::Duration;

use contract::Timestamp;
use serde::Serialize;

/// A larger clock difference is a warning: times in answers and webhooks are inconsistent.
const SKEW_WARNING: f64 = 2.0;
/// A larger clock difference is a failure: receivers reject webhook signatures that are minutes off, and keys and calls
/// expire at the wrong time.
const SKEW_FAILURE: f64 = 30.0;

/// Ordered by severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    Ok,
    /// leadctl cannot see it.
    Unknown,
    /// An operator should look at it.
    Warning,
    /// Must be repaired.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) check: String,
    pub(super) state: State,
    pub(super) finding: String,
    /// How to repair it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

impl Check {
    pub(super) fn ok(check: impl Into<String>, finding: impl Into<String>) -> Self {
        Self { check: check.into(), state: State::Ok, finding: finding.into(), advice: None }
    }

    pub(super) fn unknown(check: impl Into<String>, finding: impl Into<String>) -> Self {
        Self { state: State::Unknown, ..Self::ok(check, finding) }
    }

    pub(super) fn failed(check: impl Into<String>, finding: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { state: State::Failed, advice: Some(advice.into()), ..Self::ok(check, finding) }
    }

    pub(super) fn warning(check: impl Into<String>, finding: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { state: State::Warning, advice: Some(advice.into()), ..Self::ok(check, finding) }
    }
}

/// Compares a clock with ours. It was read as `remote` between our times `sent` and `received`, with a resolution of
/// `resolution` seconds.
pub(super) fn skew(whose: &str, sent: Timestamp, remote: Timestamp, received: Timestamp, resolution: f64) -> Check {
    let check = format!("clock of {whose}");
    let seconds = |at: Timestamp| at.millis() as f64 / 1000.0;
    // The clock was read at some time between `sent` and `received`.
    let (early, late) = (seconds(remote) - seconds(received), seconds(remote) + resolution - seconds(sent));
    let least = if early > 0.0 { early } else { (-late).max(0.0) };
    let finding = format!(
        "differs by {} s from this machine's",
        if least < 1.0 { "less than 1".into() } else { format!("{least:.0}") }
    );
    let advice = "synchronize the clocks of both machines (NTP)";
    if least > SKEW_FAILURE {
        Check::failed(check, finding, advice)
    } else if least > SKEW_WARNING {
        Check::warning(check, finding, advice)
    } else {
        Check::ok(check, finding)
    }
}

/// Checks a backlog: its size does not matter, the age of its oldest message does.
pub(super) fn lag(check: &str, messages: u64, oldest: Option<Duration>, advice: &str) -> Check {
    /// Longer than a restart takes.
    const MAX_AGE: Duration = Duration::from_secs(60);
    let finding = match (messages, oldest) {
        (0, _) => "empty".to_owned(),
        (_, None) => format!("{messages} waiting"),
        (_, Some(since)) => format!("{messages} waiting, the oldest for {} s", since.as_secs()),
    };
    match oldest {
        Some(since) if messages > 0 && since > MAX_AGE => Check::failed(check, finding, advice),
        _ => Check::ok(check, finding),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_round_trip_time_is_not_counted_as_clock_skew() {
        let at = Timestamp::from_millis;
        let state =
            |sent, remote, received, resolution| skew("x", at(sent), at(remote), at(received), resolution).state;
        assert_eq!(state(0, 50, 100, 0.0), State::Ok);
        assert_eq!(state(0, 0, 60_000, 0.0), State::Ok, "a slow answer proves nothing");
        assert_eq!(state(0, 5_000, 100, 0.0), State::Warning);
        assert_eq!(state(100_000, 60_000, 100_100, 0.0), State::Failed);
        assert_eq!(state(2_900, 0, 3_000, 1.0), State::Ok, "whole seconds");
        assert_eq!(state(100_000, 95_000, 100_100, 1.0), State::Warning);
    }

    #[test]
    fn only_an_old_backlog_fails() {
        let state = |messages, seconds: Option<u64>| lag("x", messages, seconds.map(Duration::from_secs), "m").state;
        assert_eq!(state(0, None), State::Ok);
        assert_eq!(state(1000, Some(3)), State::Ok);
        assert_eq!(state(1, Some(61)), State::Failed);
    }
}
