//! When a delivery is attempted again: a pure function of the attempt's outcome.

use std::{fmt, str::FromStr, time::Duration};

use contract::Timestamp;

use super::{delivery::DeliveryState, outcome::AttemptOutcome};

/// The longest wait that an endpoint can request with `Retry-After`. A longer one trusts endpoints whose clock is
/// wrong; a shorter one retries before the endpoint is ready.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest delay that a schedule can have: longer delays are treated as typing errors.
const MAX_DELAY: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// The largest random part added to a delay, so that deliveries that failed together are not retried together.
const JITTER: f64 = 0.1;

/// How long to wait before each attempt of a delivery, the first included: its length is the number of attempts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule(Vec<Duration>);

/// The schedule of Standard Webhooks: ten attempts in a little over three days.
impl Default for Schedule {
    fn default() -> Self {
        const MINUTE: u64 = 60;
        const HOUR: u64 = 60 * MINUTE;
        let delays = [0, 5, 5 * MINUTE, 30 * MINUTE, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR];
        Self(delays.map(Duration::from_secs).into())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSchedule {
    #[error("{0:?} is not a delay; use a list such as 0s,5s,5m,2h")]
    Delay(String),
    #[error("the first delay must be 0s: the first attempt is made without a delay")]
    First,
    #[error("{0:?} is too long: a delay is at most 30 days")]
    TooLong(String),
}

impl FromStr for Schedule {
    type Err = InvalidSchedule;

    fn from_str(text: &str) -> Result<Self, InvalidSchedule> {
        let delays = text.split(',').map(|part| {
            let delay =
                humantime::parse_duration(part.trim()).map_err(|_| InvalidSchedule::Delay(part.trim().to_owned()))?;
            if delay > MAX_DELAY { Err(InvalidSchedule::TooLong(part.trim().to_owned())) } else { Ok(delay) }
        });
        let delays = delays.collect::<Result<Vec<_>, _>>()?;
        if delays.first() != Some(&Duration::ZERO) {
            return Err(InvalidSchedule::First);
        }
        Ok(Self(delays))
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let delays = self.0.iter().map(|delay| humantime::format_duration(*delay).to_string().replace(' ', ""));
        f.write_str(&delays.collect::<Vec<_>>().join(","))
    }
}

impl Schedule {
    /// The state of a delivery after an attempt. `number` is 1 for the first; `random` is from 0 to 1.
    pub(crate) fn next_state(
        &self,
        number: u32,
        outcome: &AttemptOutcome,
        now: Timestamp,
        random: f64,
    ) -> DeliveryState {
        if let AttemptOutcome::Accepted { .. } = outcome {
            return DeliveryState::Delivered;
        }
        match self.0.get(number as usize) {
            Some(delay) if !outcome.is_gone() => {
                let requested = outcome.retry_after().and_then(|text| retry_after(text, now)).unwrap_or_default();
                let delay = (*delay).max(requested.min(MAX_RETRY_AFTER));
                DeliveryState::RetryAt(now.plus(delay.mul_f64(1.0 + JITTER * random.clamp(0.0, 1.0))))
            }
            _ => DeliveryState::Exhausted,
        }
    }
}

/// The wait that a `Retry-After` header requests: seconds, or an HTTP date
/// (<https://www.rfc-editor.org/rfc/rfc9110#name-retry-after>).
fn retry_after(text: &str, now: Timestamp) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = Timestamp::from(httpdate::parse_http_date(text).ok()?);
    Some(Duration::from_millis(u64::try_from(until.millis() - now.millis()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::core::outcome::tests::outcome;

    const NOW: Timestamp = Timestamp::from_millis(1_768_193_759_000);

    fn with_retry_after(status: u16, text: &str) -> AttemptOutcome {
        AttemptOutcome::Rejected { status, error: "overloaded".into(), retry_after: Some(text.into()) }
    }

    fn no_response() -> AttemptOutcome {
        AttemptOutcome::NoResponse { error: "timeout".into() }
    }

    /// The seconds until the next attempt.
    fn delay(state: DeliveryState) -> f64 {
        match state {
            DeliveryState::RetryAt(at) => (at.millis() - NOW.millis()) as f64 / 1000.0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn schedules_are_parsed_and_printed() {
        let schedule = "0s, 5s,5m,30m,2h,5h,10h,14h,20h,1day".parse::<Schedule>().unwrap();
        assert_eq!(schedule, Schedule::default());
        assert_eq!(schedule.to_string(), "0s,5s,5m,30m,2h,5h,10h,14h,20h,1day");
        assert_eq!(schedule.to_string().parse(), Ok(schedule));
        assert_eq!("5s".parse::<Schedule>(), Err(InvalidSchedule::First));
        assert_eq!("0s,soon".parse::<Schedule>(), Err(InvalidSchedule::Delay("soon".into())));
        assert_eq!("".parse::<Schedule>(), Err(InvalidSchedule::Delay("".into())));
        assert_eq!("0s,1year".parse::<Schedule>(), Err(InvalidSchedule::TooLong("1year".into())));
    }

    #[test]
    fn only_2xx_delivers_and_410_ends_the_delivery() {
        let schedule = Schedule::default();
        for status in [200, 201, 204, 299] {
            assert_eq!(schedule.next_state(1, &outcome(status), NOW, 0.5), DeliveryState::Delivered, "{status}");
        }
        for status in [100, 199, 300, 301, 302, 307, 400, 401, 404, 409, 429, 500, 503] {
            assert_eq!(delay(schedule.next_state(1, &outcome(status), NOW, 0.0)), 5.0, "{status}");
        }
        assert_eq!(delay(schedule.next_state(1, &no_response(), NOW, 0.0)), 5.0);
        assert_eq!(delay(schedule.next_state(2, &outcome(500), NOW, 1.0)), 330.0);
        assert_eq!(schedule.next_state(10, &outcome(500), NOW, 0.5), DeliveryState::Exhausted);
        assert_eq!(schedule.next_state(10, &outcome(200), NOW, 0.5), DeliveryState::Delivered);
        assert_eq!(schedule.next_state(1, &outcome(410), NOW, 0.5), DeliveryState::Exhausted);
    }

    #[test]
    fn retry_after_is_a_lower_bound_where_the_status_means_overload() {
        let schedule = Schedule::default();
        let requested = |status, text| delay(schedule.next_state(1, &with_retry_after(status, text), NOW, 0.0));
        assert_eq!(requested(429, "120"), 120.0);
        assert_eq!(requested(503, " 120 "), 120.0);
        assert_eq!(requested(503, "1"), 5.0, "never less than the schedule");
        assert_eq!(requested(503, "999999999"), 86_400.0, "at most a day");
        assert_eq!(requested(500, "120"), 5.0, "500 does not mean overload");
        assert_eq!(requested(503, "Mon, 12 Jan 2026 04:57:59 GMT"), 120.0);
        assert_eq!(requested(503, "Mon, 12 Jan 2015 04:57:59 GMT"), 5.0, "a date in the past");
        for nonsense in ["", "-1", "soon", "1.5", "99999999999999999999999"] {
            assert_eq!(requested(503, nonsense), 5.0, "{nonsense}");
        }
    }

    proptest! {
        #[test]
        fn a_retry_is_at_most_a_tenth_late_and_never_early_or_past_the_schedule(
            number in 1_u32..20,
            status in proptest::option::of(100_u16..600),
            text in proptest::option::of("[0-9]{0,12}|.{0,12}"),
            random in 0.0..=1.0_f64,
        ) {
            let schedule = Schedule::default();
            let outcome = match (status, text) {
                (Some(status), Some(text)) if !(200..300).contains(&status) => with_retry_after(status, &text),
                (Some(status), _) => outcome(status),
                (None, _) => no_response(),
            };
            let accepted = status.is_some_and(|status| (200..300).contains(&status));
            match schedule.next_state(number, &outcome, NOW, random) {
                DeliveryState::Delivered => prop_assert!(accepted),
                DeliveryState::Exhausted => prop_assert!(!accepted && (number >= 10 || status == Some(410))),
                DeliveryState::RetryAt(at) => {
                    prop_assert!(!accepted && number < 10);
                    let least = schedule.0[number as usize];
                    prop_assert!(at >= NOW.plus(least));
                    prop_assert!(at <= NOW.plus(least.max(MAX_RETRY_AFTER).mul_f64(1.1)));
                }
                DeliveryState::Queued => prop_assert!(false, "an attempted delivery is not queued"),
            }
        }

        #[test]
        fn arbitrary_schedules_never_panic(text in ".*") {
            let _ = text.parse::<Schedule>();
        }
    }
}
