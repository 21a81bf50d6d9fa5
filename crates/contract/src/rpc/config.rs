//! The configuration of processes: asked for, changed, tried.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Cursor;
use crate::{
    ObjectId, Timestamp,
    process::{CallbackSpec, ProcessSpec},
};

/// Whose processes, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListProcesses {
    /// The project.
    pub project_id: ObjectId,
    /// Where to go on.
    #[serde(default)]
    pub cursor: Option<Cursor>,
    /// At most so many.
    pub limit: u32,
}

/// Which process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct GetProcess {
    /// Whose process.
    pub project_id: ObjectId,
    /// Which one.
    pub process: ProcessSelector,
}

/// A change of a process's configuration: all of it or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ChangeProcess {
    /// Whose process.
    pub project_id: ObjectId,
    /// Which one.
    pub process: ProcessSelector,
    /// What is to change.
    pub change: ProcessChange,
    /// Only if the process is at this revision; 0 where there is none.
    #[serde(default)]
    pub expected_revision: Option<i64>,
    /// Only say what would change.
    #[serde(default)]
    pub dry_run: bool,
}

/// How a process is named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum ProcessSelector {
    /// One that there is not yet.
    New,
    /// The one of this name; putting makes it where there is none. `_` are the project's fallback callbacks, which are there
    /// in any case.
    Named(String),
    /// The one of this id.
    Id(ObjectId),
}

/// What is to change of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ProcessChange {
    /// It is to be this.
    Put {
        /// What it is to be.
        spec: ProcessSpec,
        /// But for its callbacks, which stay as they are.
        #[serde(default)]
        keep_callbacks: bool,
    },
    /// One more callback.
    AddCallback {
        /// What it is to be.
        callback: CallbackSpec,
    },
    /// A callback is to be this.
    PutCallback {
        /// Which one.
        callback_id: ObjectId,
        /// What it is to be.
        callback: CallbackSpec,
    },
    /// A callback is to go.
    RemoveCallback {
        /// Which one.
        callback_id: ObjectId,
    },
    /// A callback gets a new signing secret. Those it has had so far stay valid for the overlap, and no longer.
    RotateSecret {
        /// Which one.
        callback_id: ObjectId,
        /// For how long, in seconds, at most [`MAX_OVERLAP_SECONDS`](crate::process::MAX_OVERLAP_SECONDS).
        overlap_seconds: u32,
    },
}

/// May callbacks have these URLs?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CheckUrls {
    /// The URLs.
    pub urls: Vec<String>,
}

/// Whether a callback may have a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UrlCheck {
    /// Why not; null where it may.
    pub refused: Option<String>,
}

/// How long a test may take: the longest timeout of a callback, and what it takes beside that.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(35);

/// Which callback to send a ping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TestCallback {
    /// Whose callback.
    pub project_id: ObjectId,
    /// Its process; null for the project's fallback callbacks.
    pub process_id: Option<ObjectId>,
    /// The callback.
    pub callback_id: ObjectId,
}

/// How a ping went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TestResult {
    /// Its `webhook-id`.
    pub webhook_id: ObjectId,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took, in milliseconds.
    pub duration_ms: u32,
    /// The status that the endpoint answered with, if it did.
    pub status_code: Option<u16>,
    /// What went wrong; null when the endpoint took it.
    pub error: Option<String>,
    /// The first bytes of the answer's body.
    pub response: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_on_the_wire() {
        let id = ObjectId::from_bytes([1; 12]);
        let callback: CallbackSpec = serde_json::from_str(r#"{"name":"crm","url":"https://crm.example"}"#).unwrap();
        let changes = [
            (ProcessSelector::New, ProcessChange::AddCallback { callback: callback.clone() }),
            (ProcessSelector::Named("_".into()), ProcessChange::PutCallback { callback_id: id, callback }),
            (ProcessSelector::Id(id), ProcessChange::RemoveCallback { callback_id: id }),
            (ProcessSelector::Id(id), ProcessChange::RotateSecret { callback_id: id, overlap_seconds: 5 }),
        ];
        let texts = changes.map(|(process, change)| {
            let change = ChangeProcess { project_id: id, process, change, expected_revision: Some(7), dry_run: false };
            let text = serde_json::to_string(&change).unwrap();
            assert_eq!(serde_json::from_str::<ChangeProcess>(&text).unwrap(), change);
            text
        });
        insta::assert_snapshot!(texts.join("\n"), @r#"
        {"projectId":"010101010101010101010101","process":"new","change":{"addCallback":{"callback":{"name":"crm","url":"https://crm.example","enabled":true,"timeoutSeconds":15,"maxInFlight":64}}},"expectedRevision":7,"dryRun":false}
        {"projectId":"010101010101010101010101","process":{"named":"_"},"change":{"putCallback":{"callbackId":"010101010101010101010101","callback":{"name":"crm","url":"https://crm.example","enabled":true,"timeoutSeconds":15,"maxInFlight":64}}},"expectedRevision":7,"dryRun":false}
        {"projectId":"010101010101010101010101","process":{"id":"010101010101010101010101"},"change":{"removeCallback":{"callbackId":"010101010101010101010101"}},"expectedRevision":7,"dryRun":false}
        {"projectId":"010101010101010101010101","process":{"id":"010101010101010101010101"},"change":{"rotateSecret":{"callbackId":"010101010101010101010101","overlapSeconds":5}},"expectedRevision":7,"dryRun":false}
        "#);
    }
}
