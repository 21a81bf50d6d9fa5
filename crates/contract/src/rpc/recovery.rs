//! Recovery of lead-state after the log, the database or the events were lost or set back.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Serialize};

use crate::{Timestamp, position::LogPosition};

/// Reads how the log, the checkpoint and the events relate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GetRecovery {}

/// A kind of recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryKind {
    /// Apply again the commands that Postgres lost and the log still holds.
    Replay,
    /// Continue with the log as it is, in a new epoch.
    NewEpoch,
    /// Announce again the updates that were applied since a time.
    Reannounce,
}

impl fmt::Display for RecoveryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replay => "replay",
            Self::NewEpoch => "new-epoch",
            Self::Reannounce => "reannounce",
        })
    }
}

/// Why lead-state has halted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Halted {
    /// For programs: `database_restored`, `log_lost_end`, `log_begins_late` or `log_replaced`.
    pub reason: Cow<'static, str>,
    /// The description, for people.
    pub text: String,
    /// The recovery that fits.
    pub remedy: RecoveryKind,
}

impl Halted {
    /// An event was announced whose entry is beyond the checkpoint.
    pub const DATABASE_RESTORED: &str = "database_restored";
    /// The log ends before the checkpoint.
    pub const LOG_LOST_END: &str = "log_lost_end";
    /// The log lacks the entries after the checkpoint.
    pub const LOG_BEGINS_LATE: &str = "log_begins_late";
    /// The entry at the checkpoint is not the one that was applied.
    pub const LOG_REPLACED: &str = "log_replaced";
    /// All reasons.
    pub const REASONS: [&str; 4] =
        [Self::DATABASE_RESTORED, Self::LOG_LOST_END, Self::LOG_BEGINS_LATE, Self::LOG_REPLACED];
}

/// How the log, the checkpoint and the events relate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RecoveryStatus {
    /// How many times announcements were rewound.
    pub generation: i32,
    /// The last update that was applied.
    pub applied: LogPosition,
    /// The last update whose event was announced.
    pub announced: LogPosition,
    /// The last update up to which the webhook-notifier acknowledged every event, as recorded every ten seconds.
    pub delivered: LogPosition,
    /// The first entry in the log.
    pub log_first: u64,
    /// The last entry in the log.
    pub log_last: u64,
    /// Why lead-state has halted; null while it runs.
    pub halted: Option<Halted>,
}

/// Recovers, if the checkpoint has not moved since the status was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Recover {
    /// The kind of recovery.
    pub kind: RecoveryKind,
    /// Announce again from this time on; only for [`RecoveryKind::Reannounce`].
    pub since: Option<Timestamp>,
    /// [`RecoveryStatus::generation`] as it was read.
    pub generation: i32,
    /// [`RecoveryStatus::applied`] as it was read.
    pub applied: LogPosition,
}
