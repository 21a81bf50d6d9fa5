//! MongoDB ObjectIds: 12 bytes, written as 24 hex digits.
//!
//! The first four bytes are the Unix second of the id's creation, big-endian
//! (<https://www.mongodb.com/docs/manual/reference/bson-types/#objectid>), so ids sort by age and tables are
//! partitioned by them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

use crate::Timestamp;

/// An id of a project, process, lead, update, callback or API key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId([u8; 12]);

/// The text is not 24 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 24 hex digits")]
pub struct InvalidObjectId;

impl ObjectId {
    /// Makes an id from the current time and eight random bytes.
    pub fn new(now: Timestamp, random: [u8; 8]) -> Self {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&now.unix_seconds().to_be_bytes());
        bytes[4..].copy_from_slice(&random);
        Self(bytes)
    }

    /// The id of a log entry without one: the same entry always gets the same id.
    ///
    /// `sequence` is the stream sequence of the entry's message, `index` the entry's place in it, and `logged_at` the
    /// time at which the stream stored it.
    pub fn from_log(sequence: u64, index: u32, logged_at: Timestamp) -> Self {
        let mut digest = Sha256::new();
        digest.update(sequence.to_be_bytes());
        if index > 0 {
            digest.update(index.to_be_bytes());
        }
        digest.update(logged_at.millis().to_be_bytes());
        let mut random = [0; 8];
        random.copy_from_slice(&digest.finalize()[..8]);
        Self::new(logged_at, random)
    }

    /// The id with exactly these bytes.
    pub const fn from_bytes(bytes: [u8; 12]) -> Self {
        Self(bytes)
    }

    /// The bytes, as they are stored in Postgres.
    pub const fn as_bytes(&self) -> &[u8; 12] {
        &self.0
    }

    /// When the id was created, to the second.
    pub fn timestamp(&self) -> Timestamp {
        let seconds = u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]);
        Timestamp::from_millis(i64::from(seconds) * 1000)
    }

    /// The first day of the month (UTC) in which the id was created. Tables of updates and deliveries are partitioned
    /// by it.
    pub fn month(&self) -> time::Date {
        let day = time::OffsetDateTime::from(self.timestamp()).date();
        day.replace_day(1).unwrap_or(day)
    }
}

impl TryFrom<&[u8]> for ObjectId {
    type Error = InvalidObjectId;

    fn try_from(bytes: &[u8]) -> Result<Self, InvalidObjectId> {
        bytes.try_into().map(Self).map_err(|_| InvalidObjectId)
    }
}

impl FromStr for ObjectId {
    type Err = InvalidObjectId;

    fn from_str(text: &str) -> Result<Self, InvalidObjectId> {
        let mut bytes = [0; 12];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| InvalidObjectId)?;
        Ok(Self(bytes))
    }
}

impl ObjectId {
    /// Calls `f` with the 24 hex digits.
    fn with_digits<T>(&self, f: impl FnOnce(&str) -> T) -> T {
        let mut digits = [0; 24];
        #[allow(clippy::expect_used, reason = "twelve bytes are 24 digits, which are ASCII")]
        hex::encode_to_slice(self.0, &mut digits).expect("24 digits");
        f(std::str::from_utf8(&digits).unwrap_or_default())
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_digits(|digits| f.pad(digits))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ObjectId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.with_digits(|digits| serializer.serialize_str(digits))
    }
}

impl<'de> Deserialize<'de> for ObjectId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ObjectId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an id of 24 hex digits")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ObjectId, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for ObjectId {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ObjectId".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^[0-9a-fA-F]{24}$"})
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_id_of_a_log_entry_is_stable_and_unique() {
        let at = Timestamp::from_millis(1_768_193_759_048);
        let id = ObjectId::from_log(7, 0, at);
        assert_eq!(id, ObjectId::from_log(7, 0, at));
        assert_ne!(id, ObjectId::from_log(8, 0, at));
        assert_ne!(id, ObjectId::from_log(7, 1, at));
        assert_eq!(id.timestamp(), Timestamp::from_millis(1_768_193_759_000));
        assert_eq!(id.to_string(), "69647edf1f9870e82bc7a46d");
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 12]) {
            let id = ObjectId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse::<ObjectId>(), Ok(id));
            prop_assert_eq!(id.to_string().to_uppercase().parse::<ObjectId>(), Ok(id));
        }

        #[test]
        fn anything_else_is_refused(text in ".*") {
            let is_id = text.len() == 24 && text.bytes().all(|b| b.is_ascii_hexdigit());
            prop_assert_eq!(text.parse::<ObjectId>().is_ok(), is_id);
        }
    }
}
