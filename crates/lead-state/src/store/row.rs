//! Conversion between columns and domain types. A value that cannot be converted is reported with table, column and row
//! id.

use std::fmt::{self, Display};

use contract::{JsonObject, ObjectId, Timestamp, event::OutcomeKind, json::redacted_error, position::LogPosition};
use serde::de::DeserializeOwned;
use time::OffsetDateTime;

use super::StoreError;

/// Identifies a row in errors.
#[derive(Clone, Copy)]
pub(super) struct Row<Id> {
    table: &'static str,
    id: Id,
}

impl<Id: Display + Copy> Row<Id> {
    pub(super) fn new(table: &'static str, id: Id) -> Self {
        Self { table, id }
    }

    pub(super) fn corrupt(self, column: &'static str, fault: impl Display) -> StoreError {
        StoreError::Corrupt { table: self.table, column, id: self.id.to_string(), fault: fault.to_string() }
    }

    pub(super) fn id(self, column: &'static str, bytes: &[u8]) -> Result<ObjectId, StoreError> {
        ObjectId::try_from(bytes).map_err(|e| self.corrupt(column, format_args!("{}: {e}", Hex(bytes))))
    }

    pub(super) fn optional_id(
        self,
        column: &'static str,
        bytes: Option<&[u8]>,
    ) -> Result<Option<ObjectId>, StoreError> {
        bytes.map(|bytes| self.id(column, bytes)).transpose()
    }

    pub(super) fn kind(self, text: &str) -> Result<OutcomeKind, StoreError> {
        text.parse().map_err(|e| self.corrupt("kind", format_args!("{text:?}: {e}")))
    }

    pub(super) fn object(self, column: &'static str, text: String) -> Result<JsonObject, StoreError> {
        JsonObject::from_text(text).map_err(|e| self.corrupt(column, e))
    }

    pub(super) fn optional_object(
        self,
        column: &'static str,
        text: Option<String>,
    ) -> Result<Option<JsonObject>, StoreError> {
        text.map(|text| self.object(column, text)).transpose()
    }

    /// Reads a JSON column. The error does not quote the value, which may hold a secret.
    pub(super) fn json<T: DeserializeOwned>(self, column: &'static str, text: &str) -> Result<T, StoreError> {
        serde_json::from_str(text).map_err(|e| self.corrupt(column, redacted_error(&e)))
    }

    pub(super) fn optional_json<T: DeserializeOwned>(
        self,
        column: &'static str,
        text: Option<&str>,
    ) -> Result<Option<T>, StoreError> {
        text.map(|text| self.json(column, text)).transpose()
    }

    /// Reads the three columns of a position.
    pub(super) fn position(
        self,
        column: &'static str,
        (epoch, sequence, index): (i32, i64, i32),
    ) -> Result<LogPosition, StoreError> {
        match (u64::try_from(sequence), u32::try_from(index)) {
            (Ok(sequence), Ok(index)) => Ok(LogPosition { epoch, sequence, index }),
            _ => Err(self.corrupt(column, format_args!("{sequence}.{index} is not a position"))),
        }
    }
}

/// The columns of a position. A position that exceeds them is beyond every row.
pub(super) fn position_columns(position: LogPosition) -> (i32, i64, i32) {
    let LogPosition { epoch, sequence, index } = position;
    (epoch, i64::try_from(sequence).unwrap_or(i64::MAX), i32::try_from(index).unwrap_or(i32::MAX))
}

#[derive(Clone, Copy)]
pub(super) struct Hex<'a>(pub(super) &'a [u8]);

impl Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

pub(super) fn time(at: Timestamp) -> OffsetDateTime {
    at.into()
}

/// Exceeds every id. Because the bound is always present, every plan finds the rows by index.
pub(super) const BEYOND_IDS: [u8; 13] = [0xff; 13];

/// The exclusive upper bound of ids, as bytes.
pub(super) fn upper_bound(before: Option<&ObjectId>) -> &[u8] {
    before.map_or(&BEYOND_IDS, |id| id.as_bytes())
}
