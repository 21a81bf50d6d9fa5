//! 7 Deliver, 8 Retry: the decision. What becomes of a delivery after an attempt; a pure function.

use std::{fmt, str::FromStr, time::Duration};

use contract::Timestamp;

/// The longest wait that an endpoint can ask for with `Retry-After`. Longer believes an endpoint that may have its clock
/// wrong, shorter asks again before it wants to be asked.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest delay that a schedule can have: a slip of the pen, not a wish.
const MAX_DELAY: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How much of a delay chance adds at most, so that deliveries that failed together do not all come back together.
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

/// Why a text is not a schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSchedule {
    /// One of its parts is not a delay.
    #[error("{0:?} is not a delay; try 0s,5s,5m,2h")]
    Delay(String),
    /// The first attempt runs straight off the event.
    #[error("the first delay must be 0s: the first attempt is made at once")]
    First,
    /// A delay that nobody means.
    #[error("{0:?} is longer than 30 days")]
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

/// What an endpoint made of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// It answered.
    Status {
        /// The status code.
        code: u16,
        /// The `Retry-After` header.
        retry_after: Option<&'a str>,
    },
    /// It did not, or could not be asked.
    Nothing,
}

/// What becomes of the delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The endpoint took it.
    Delivered,
    /// It is tried again at this time.
    RetryAt(Timestamp),
    /// It is not tried again.
    Exhausted,
    /// It is not tried again, and the callback gets nothing more until it is enabled again.
    Disabled,
}

impl Schedule {
    /// Decides after an attempt. `number` is 1 for the first; `random` is from 0 to 1.
    pub fn decide(&self, number: u32, reply: Reply<'_>, now: Timestamp, random: f64) -> Decision {
        let asked = match reply {
            Reply::Status { code: 200..=299, .. } => return Decision::Delivered,
            // "Gone": the receiver wants no more (Standard Webhooks).
            Reply::Status { code: 410, .. } => return Decision::Disabled,
            Reply::Status { code: 429 | 502 | 503 | 504, retry_after: Some(text) } => retry_after(text, now),
            Reply::Status { .. } | Reply::Nothing => None,
        };
        match self.0.get(number as usize) {
            Some(delay) => {
                let delay = (*delay).max(asked.unwrap_or_default().min(MAX_RETRY_AFTER));
                Decision::RetryAt(now.plus(delay.mul_f64(1.0 + JITTER * random.clamp(0.0, 1.0))))
            }
            None => Decision::Exhausted,
        }
    }
}

/// The wait that a `Retry-After` header asks for: seconds, or an HTTP date
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

    const NOW: Timestamp = Timestamp::from_millis(1_768_193_759_000);

    fn status(code: u16) -> Reply<'static> {
        Reply::Status { code, retry_after: None }
    }

    fn after(decision: Decision) -> f64 {
        match decision {
            Decision::RetryAt(at) => (at.millis() - NOW.millis()) as f64 / 1000.0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn schedules_are_read_and_written() {
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
    fn what_an_answer_means() {
        let schedule = Schedule::default();
        for code in [200, 201, 204, 299] {
            assert_eq!(schedule.decide(1, status(code), NOW, 0.5), Decision::Delivered, "{code}");
        }
        for code in [100, 199, 300, 301, 302, 307, 400, 401, 404, 409, 429, 500, 503] {
            assert_eq!(after(schedule.decide(1, status(code), NOW, 0.0)), 5.0, "{code}");
        }
        assert_eq!(after(schedule.decide(1, Reply::Nothing, NOW, 0.0)), 5.0);
        assert_eq!(after(schedule.decide(2, status(500), NOW, 1.0)), 330.0);
        assert_eq!(schedule.decide(10, status(500), NOW, 0.5), Decision::Exhausted);
        assert_eq!(schedule.decide(10, status(200), NOW, 0.5), Decision::Delivered);
        assert_eq!(schedule.decide(1, status(410), NOW, 0.5), Decision::Disabled);
    }

    #[test]
    fn retry_after_is_a_lower_bound_where_it_means_something() {
        let schedule = Schedule::default();
        let asked = |code, text| after(schedule.decide(1, Reply::Status { code, retry_after: Some(text) }, NOW, 0.0));
        assert_eq!(asked(429, "120"), 120.0);
        assert_eq!(asked(503, " 120 "), 120.0);
        assert_eq!(asked(503, "1"), 5.0, "the schedule is the least");
        assert_eq!(asked(503, "999999999"), 86_400.0, "no endpoint holds a delivery for years");
        assert_eq!(asked(500, "120"), 5.0, "only overload means that");
        assert_eq!(asked(503, "Mon, 12 Jan 2026 04:57:59 GMT"), 120.0);
        assert_eq!(asked(503, "Mon, 12 Jan 2015 04:57:59 GMT"), 5.0, "the past is now");
        for nonsense in ["", "-1", "soon", "1.5", "99999999999999999999999"] {
            assert_eq!(asked(503, nonsense), 5.0, "{nonsense}");
        }
    }

    proptest! {
        #[test]
        fn a_retry_is_never_early_never_a_tenth_late_and_never_past_the_schedule(
            number in 1_u32..20,
            code in proptest::option::of(100_u16..600),
            retry_after in proptest::option::of("[0-9]{0,12}|.{0,12}"),
            random in 0.0..=1.0_f64,
        ) {
            let schedule = Schedule::default();
            let reply = match code {
                Some(code) => Reply::Status { code, retry_after: retry_after.as_deref() },
                None => Reply::Nothing,
            };
            let success = code.is_some_and(|code| (200..300).contains(&code));
            match schedule.decide(number, reply, NOW, random) {
                Decision::Delivered => prop_assert!(success),
                Decision::Disabled => prop_assert_eq!(code, Some(410)),
                Decision::Exhausted => prop_assert!(!success && number >= 10),
                Decision::RetryAt(at) => {
                    prop_assert!(!success && number < 10);
                    let least = schedule.0[number as usize];
                    prop_assert!(at >= NOW.plus(least));
                    prop_assert!(at <= NOW.plus(least.max(MAX_RETRY_AFTER).mul_f64(1.1)));
                }
            }
        }

        #[test]
        fn arbitrary_schedules_never_panic(text in ".*") {
            let _ = text.parse::<Schedule>();
        }
    }
}
