//! Statistics: counts of updates and deliveries by their outcome.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ErrorCode, RpcError};
use crate::{ObjectId, Timestamp, named::named};

const MINUTE_MS: i64 = 60_000;

/// The most rows of counts that a query reads. Reading more takes longer than a page should.
pub const MAX_STATISTICS_ROWS: i64 = 500_000;

/// The most steps and groups that a query returns. More may not fit into a message.
pub const MAX_STATISTICS_STEPS: i64 = 3_000;

named! {
    /// The length of the spans that are counted together. Hours and days are those of UTC.
    StatisticsStep, InvalidStep,
    /// A minute.
    Minute = "minute",
    /// An hour.
    Hour = "hour",
    /// A day.
    Day = "day",
}

impl StatisticsStep {
    /// The length of one step.
    pub const fn length(self) -> Duration {
        Duration::from_millis(self.millis().unsigned_abs())
    }

    /// The length of one step, in milliseconds.
    pub const fn millis(self) -> i64 {
        match self {
            Self::Minute => MINUTE_MS,
            Self::Hour => 60 * MINUTE_MS,
            Self::Day => 24 * 60 * MINUTE_MS,
        }
    }

    /// The longest range that may be counted by this step, in days: it bounds what a query reads and returns.
    pub const fn max_days(self) -> i64 {
        match self {
            Self::Minute => 1,
            Self::Hour | Self::Day => 31,
        }
    }
}

named! {
    /// The grouping of the counts of a step.
    StatisticsGroup, InvalidGroup,
    /// The lead's process, or the callback's.
    Process = "process",
    /// For updates `update`, `call.started` or `call.ended`; for deliveries their kind.
    Kind = "kind",
    /// The error code. Only updates have one.
    Code = "code",
    /// The callback. Only deliveries have one.
    Callback = "callback",
}

/// A range of time in steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StatisticsRange {
    /// The start of the range.
    pub from: Timestamp,
    /// The end of the range, not included.
    pub to: Timestamp,
    /// The length of the spans that are counted together.
    pub step: StatisticsStep,
}

/// Why a range is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRange {
    /// It is empty.
    #[error("to must be later than from")]
    Empty,
    /// It does not begin and end at whole minutes, which are the smallest unit of the counts.
    #[error("from and to must be whole minutes")]
    NoMinutes,
    /// It is too long for its step.
    #[error("the range is longer than {days} d, the limit of step={0}: choose a shorter range, or a longer step", days = .0.max_days())]
    TooLong(StatisticsStep),
    /// It has too many counts.
    #[error("the range has too many counts: choose a shorter range, or a longer step, or leave `by` out")]
    TooMany,
}

impl From<InvalidRange> for RpcError {
    fn from(error: InvalidRange) -> Self {
        Self::new(ErrorCode::InvalidField, error.to_string())
    }
}

impl StatisticsRange {
    /// The last 24 hours, by the hour.
    pub fn last_day(now: Timestamp) -> Self {
        Self::last(24, StatisticsStep::Hour, now)
    }

    /// The last `steps` steps, up to the one that contains `now`.
    pub fn last(steps: i64, step: StatisticsStep, now: Timestamp) -> Self {
        let to = now.millis().div_euclid(step.millis()).saturating_add(1).saturating_mul(step.millis());
        let from = to.saturating_sub(steps.saturating_mul(step.millis()));
        Self { from: Timestamp::from_millis(from), to: Timestamp::from_millis(to), step }
    }

    /// A range of whole steps: `from` is rounded down and `to` up. By default the last 24 hours, by the hour.
    ///
    /// # Errors
    /// The range is empty or too long.
    pub fn new(
        from: Option<Timestamp>,
        to: Option<Timestamp>,
        step: Option<StatisticsStep>,
        now: Timestamp,
    ) -> Result<Self, InvalidRange> {
        let step = step.unwrap_or(StatisticsStep::Hour);
        let millis = step.millis();
        let floor = |at: i64| at.div_euclid(millis).saturating_mul(millis);
        let end = to.unwrap_or(now).millis();
        let begin = from.map_or(end.saturating_sub(StatisticsStep::Day.millis()), Timestamp::millis);
        let to = Timestamp::from_millis(floor(end.saturating_add(millis - 1)));
        // Without `from`, the range is exactly a day, although `to` may have been rounded up.
        let from = from.map_or(to.millis() - StatisticsStep::Day.millis(), |_| floor(begin));
        let range = Self { from: Timestamp::from_millis(from), to, step };
        range.check().map(|()| range)
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// The range is empty or too long, or not made of minutes.
    pub fn check(self) -> Result<(), InvalidRange> {
        let length = self.to.millis().saturating_sub(self.from.millis());
        if length <= 0 {
            return Err(InvalidRange::Empty);
        }
        if [self.from, self.to].iter().any(|end| end.millis().rem_euclid(MINUTE_MS) != 0) {
            return Err(InvalidRange::NoMinutes);
        }
        // Both ends may have been rounded.
        let max = self.step.max_days() * StatisticsStep::Day.millis() + 2 * self.step.millis();
        if length > max { Err(InvalidRange::TooLong(self.step)) } else { Ok(()) }
    }
}

/// Counts the updates and call events of a project by their outcome, in order of time, without empty steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CountUpdates {
    /// The project.
    pub project_id: ObjectId,
    /// The times at which the log stored the commands.
    pub range: StatisticsRange,
    /// How to group the counts. A group that only deliveries have is ignored.
    pub by: Option<StatisticsGroup>,
}

/// The outcomes of the updates of one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateCounts {
    /// The start of the step.
    pub at: Timestamp,
    /// The value that `by` selects; null without `by`, for successes by code, and for an unknown process.
    pub group: Option<String>,
    /// How many succeeded.
    pub succeeded: i64,
    /// How many failed.
    pub failed: i64,
}

/// Counts the attempts and exhausted deliveries of a project, in order of time, without empty steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CountDeliveries {
    /// The project.
    pub project_id: ObjectId,
    /// The times at which attempts started, and deliveries were exhausted.
    pub range: StatisticsRange,
    /// How to group the counts. A group that only updates have is ignored.
    pub by: Option<StatisticsGroup>,
    /// Only attempts and deliveries of this callback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback_id: Option<ObjectId>,
}

/// The outcomes of the attempts and deliveries of one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeliveryCounts {
    /// The start of the step.
    pub at: Timestamp,
    /// The value that `by` selects; null without `by`, and for the fallback process.
    pub group: Option<String>,
    /// How many attempts were accepted.
    pub delivered: i64,
    /// How many of these within 100 ms.
    pub within_100ms: i64,
    /// How many of these within a second.
    pub within_1s: i64,
    /// How many of these within ten seconds.
    pub within_10s: i64,
    /// How many attempts failed.
    pub failed: i64,
    /// How many deliveries were exhausted.
    pub exhausted: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn range(from: Option<&str>, to: Option<&str>, step: Option<StatisticsStep>) -> Result<String, InvalidRange> {
        let now = at("2026-01-12T04:55:59Z");
        let range = StatisticsRange::new(from.map(at), to.map(at), step, now)?;
        Ok(format!("{} {} {}", range.from.to_iso(), range.to.to_iso(), range.step))
    }

    #[test]
    fn a_range_is_made_of_whole_steps() {
        let day = "2026-01-11T05:00:00.000Z 2026-01-12T05:00:00.000Z hour";
        assert_eq!(range(None, None, None).unwrap(), day);
        let begin = Some("2026-01-12T04:10:30Z");
        let minutes = "2026-01-12T04:10:00.000Z 2026-01-12T04:56:00.000Z minute";
        assert_eq!(range(begin, None, Some(StatisticsStep::Minute)).unwrap(), minutes);
        let days = "2026-01-12T00:00:00.000Z 2026-01-13T00:00:00.000Z day";
        assert_eq!(range(begin, None, Some(StatisticsStep::Day)).unwrap(), days);
    }

    #[test]
    fn a_range_that_is_not_made_of_minutes_is_refused() {
        let hour = StatisticsRange::last(1, StatisticsStep::Hour, at("2026-01-12T04:55:59Z"));
        let late = Timestamp::from_millis(hour.from.millis() + 30_000);
        assert_eq!(hour.check(), Ok(()));
        assert_eq!(StatisticsRange { from: late, ..hour }.check(), Err(InvalidRange::NoMinutes));
        assert_eq!(
            StatisticsRange { to: late, from: Timestamp::from_millis(0), ..hour }.check(),
            Err(InvalidRange::NoMinutes)
        );
    }

    #[test]
    fn an_empty_or_too_long_range_is_refused() {
        let (begin, end) = (Some("2026-01-10T00:00:00Z"), Some("2026-01-12T00:00:00Z"));
        assert_eq!(range(end, begin, None), Err(InvalidRange::Empty));
        assert_eq!(range(begin, begin, None), Err(InvalidRange::Empty));
        assert!(range(begin, end, Some(StatisticsStep::Hour)).is_ok());
        let error = range(begin, end, Some(StatisticsStep::Minute)).unwrap_err();
        let text = "the range is longer than 1 d, the limit of step=minute: choose a shorter range, or a longer step";
        assert_eq!(error.to_string(), text);
        assert!(range(Some("2025-12-01T00:00:00Z"), None, None).is_err());
    }
}

/// The longest range that activities are counted in, in days: a calendar month of any time zone fits.
pub const MAX_ACTIVITY_DAYS: i64 = 32;

/// The most activities that a query counts. Counting more takes longer than a page should.
pub const MAX_COUNTED_ACTIVITIES: i64 = 500_000;

/// Counts the activities of a project: the calls that ended with a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CountActivities {
    /// The project.
    pub project_id: ObjectId,
    /// The start of the range. It is compared with the time in an activity's id: when its result was accepted, to the
    /// second.
    pub from: Timestamp,
    /// The end of the range, not included.
    pub to: Timestamp,
    /// Only activities of leads of this process.
    pub process_id: Option<ObjectId>,
    /// Only activities of leads of this group.
    pub group_id: Option<String>,
    /// The offset from UTC, in minutes, of the time zone whose days are counted.
    #[serde(default)]
    pub offset_minutes: i32,
    /// Whether to count leads as well.
    #[serde(default)]
    pub include_leads: bool,
}

impl CountActivities {
    /// Checks the bounds.
    ///
    /// # Errors
    /// The range is empty or too long, or no time zone has the offset.
    pub fn check(&self) -> Result<(), RpcError> {
        let length = self.to.millis().saturating_sub(self.from.millis());
        let fault = if length <= 0 {
            "end must be later than start".into()
        } else if length > MAX_ACTIVITY_DAYS * StatisticsStep::Day.millis() {
            format!("the range is longer than {MAX_ACTIVITY_DAYS} d: choose a shorter one")
        } else if !(-14 * 60..=14 * 60).contains(&self.offset_minutes) {
            "timezoneOffsetMinutes must be from -840 to 840".into()
        } else {
            return Ok(());
        };
        Err(RpcError::new(ErrorCode::InvalidField, fault))
    }
}

/// The counts of activities.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ActivityCounts {
    /// The counts of the activities.
    pub calls: CallCounts,
    /// The `interested` activities by day. Days without any are left out.
    pub interested_by_day: Vec<DayCount>,
    /// The counts of leads with at least one such activity; null unless leads are counted.
    pub leads: Option<CallCounts>,
}

/// Counts of activities, or of leads that have at least one of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallCounts {
    /// Outgoing calls.
    pub attempts: i64,
    /// Calls that were answered.
    pub connected: i64,
    /// Incoming calls.
    pub incoming: i64,
    /// Connected calls with a disposition, or that moved the lead to another state.
    pub meaningfully_handled: i64,
    /// Calls that moved the lead to the state `interested`, or confirmed it.
    pub interested: i64,
}

/// A count of one day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DayCount {
    /// The day, e.g. `2026-01-12`.
    pub date: String,
    /// The number of activities.
    pub count: i64,
}
