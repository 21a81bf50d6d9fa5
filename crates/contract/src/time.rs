//! Instants on the wire: milliseconds since the Unix epoch.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// An instant, in milliseconds since 1970-01-01T00:00:00Z; a JSON number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The instant this many milliseconds after the epoch.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the epoch.
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Seconds since the epoch, clamped to the range of an ObjectId.
    pub fn unix_seconds(self) -> u32 {
        self.0.div_euclid(1000).clamp(0, i64::from(u32::MAX)) as u32
    }

    /// Seconds since the epoch, rounded up and clamped to the range of an ObjectId.
    pub fn unix_seconds_rounded_up(self) -> u32 {
        Self(self.0.saturating_add(999)).unix_seconds()
    }

    /// This instant plus a span, saturating.
    pub fn plus(self, span: std::time::Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }

    /// This instant minus a span, saturating.
    pub fn minus(self, span: std::time::Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }

    /// ISO 8601 in UTC with milliseconds, e.g. `2026-01-12T04:55:59.048Z`.
    pub fn to_iso(self) -> String {
        let at = OffsetDateTime::from(self);
        let text = at.format(&Rfc3339).unwrap_or_default();
        // Rfc3339 trims trailing zeros of the fraction; clients of the vendor's API expect three digits.
        match text.get(..19) {
            Some(seconds) => format!("{seconds}.{:03}Z", at.millisecond()),
            None => text,
        }
    }
}

/// The text is not a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a time such as 2026-01-12T04:55:59Z")]
pub struct InvalidTimestamp;

/// ISO 8601 as in RFC 3339, with any offset; fractions of a millisecond are cut off.
impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, InvalidTimestamp> {
        OffsetDateTime::parse(text, &Rfc3339).map(Self::from).map_err(|_| InvalidTimestamp)
    }
}

impl From<Timestamp> for OffsetDateTime {
    fn from(at: Timestamp) -> Self {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(at.0) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }
}

impl From<OffsetDateTime> for Timestamp {
    fn from(at: OffsetDateTime) -> Self {
        Self((at.unix_timestamp_nanos() / 1_000_000) as i64)
    }
}

impl From<std::time::SystemTime> for Timestamp {
    fn from(at: std::time::SystemTime) -> Self {
        OffsetDateTime::from(at).into()
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Timestamp {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Timestamp".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "integer", "format": "int64"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iso_text_has_three_fraction_digits() {
        assert_eq!(Timestamp::from_millis(1_768_193_759_048).to_iso(), "2026-01-12T04:55:59.048Z");
        assert_eq!(Timestamp::from_millis(1_768_193_759_000).to_iso(), "2026-01-12T04:55:59.000Z");
        assert_eq!(Timestamp::from_millis(1_768_193_759_500).to_iso(), "2026-01-12T04:55:59.500Z");
    }

    #[test]
    fn iso_text_is_read_with_any_offset() {
        let at = Timestamp::from_millis(1_768_193_759_048);
        for text in ["2026-01-12T04:55:59.048Z", "2026-01-12t05:55:59.0489+01:00"] {
            assert_eq!(text.parse(), Ok(at), "{text}");
        }
        for odd in ["", "2026-01-12", "2026-01-12T04:55:59", "1768193759048", "2026-13-12T04:55:59Z"] {
            assert_eq!(odd.parse::<Timestamp>(), Err(InvalidTimestamp), "{odd}");
        }
    }
}
