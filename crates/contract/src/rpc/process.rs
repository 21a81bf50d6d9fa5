//! The configuration of processes: listed, read, changed.

use serde::{Deserialize, Serialize};

use super::Cursor;
use crate::{
    ObjectId,
    process::{CallbackSpec, Process, ProcessSpec, SourceSpec},
};

/// Lists the processes of a project by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListProcesses {
    /// The project.
    pub project_id: ObjectId,
    /// The previous page's `next`.
    pub cursor: Option<Cursor>,
    /// The most items to return.
    pub limit: u32,
}

/// Reads a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GetProcess {
    /// The process's project.
    pub project_id: ObjectId,
    /// The process.
    pub process: ProcessSelector,
}

/// Creates the process of this name, or replaces its configuration with the specification.
pub type ApplyProcess = ProcessSpec;

/// Changes the configuration of a process, completely or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ChangeProcess {
    /// The process's project.
    pub project_id: ObjectId,
    /// The process.
    pub process: ProcessSelector,
    /// The change.
    pub change: ProcessChange,
    /// Change the process only if it has this revision; 0 means that it must not exist.
    pub expected_revision: Option<i64>,
    /// Only report the changes.
    #[serde(default)]
    pub dry_run: bool,
}

/// Selects a process of a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum ProcessSelector {
    /// A process to be created.
    New,
    /// The process of this name; `put` creates it if it does not exist. `_` selects the project's fallback callbacks,
    /// which always exist.
    Named(String),
    /// The process of this id.
    Id(ObjectId),
}

/// A change of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ProcessChange {
    /// Replaces the configuration.
    Put {
        /// The new configuration.
        spec: ProcessSpec,
        /// Leaves the callbacks as they are.
        #[serde(default)]
        keep_callbacks: bool,
    },
    /// Adds a callback.
    AddCallback {
        /// The new callback.
        callback: CallbackSpec,
    },
    /// Replaces a callback.
    PutCallback {
        /// The callback.
        callback_id: ObjectId,
        /// Its new configuration.
        callback: CallbackSpec,
    },
    /// Removes a callback.
    RemoveCallback {
        /// The callback.
        callback_id: ObjectId,
    },
    /// Gives a callback a new signing secret. The previous secrets stay valid for the overlap.
    RotateSecret {
        /// The callback.
        callback_id: ObjectId,
        /// The overlap in seconds, at most [`MAX_OVERLAP_SECONDS`](crate::process::MAX_OVERLAP_SECONDS).
        overlap_seconds: u32,
    },
    /// Adds a source of call reports.
    AddSource {
        /// The new source.
        source: SourceSpec,
    },
    /// Replaces a source.
    PutSource {
        /// The source.
        source_id: ObjectId,
        /// Its new configuration.
        source: SourceSpec,
    },
    /// Removes a source.
    RemoveSource {
        /// The source.
        source_id: ObjectId,
    },
}

/// The result of a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ProcessChangeResult {
    /// The process after the change. It shows the secrets of the callbacks in `new_secrets` only.
    pub process: Process,
    /// Whether anything changed, or would change in a dry run.
    pub changed: bool,
    /// Whether the process is new.
    #[serde(default)]
    pub created: bool,
    /// The differences, one line each, for people; empty for a new process.
    #[serde(default)]
    pub changes: Vec<String>,
    /// Warnings about accepted settings that will cause trouble, for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The callbacks that got a new signing secret. It is shown only in this reply.
    pub new_secrets: Vec<ObjectId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_have_this_wire_form() {
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
