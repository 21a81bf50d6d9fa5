//! The messages of the command log: update commands and call events. JSON, camelCase, version 1.
//!
//! Any NATS client may publish them on the subjects of [`subject`](crate::subject), with or without headers.

use serde::{Deserialize, Serialize};

use crate::{JsonObject, ObjectId};

/// The longest `name`, `referenceId`, `targetState`, `expectedState`, `disposition`, `userId` or `callId`, in characters.
pub const MAX_TEXT_CHARS: usize = 1024;

/// Change a lead: merge metadata, rename it, move it to another state.
///
/// The lead is addressed by `leadId`, or by `processId` + `referenceId`; if both are given they must identify the same
/// lead. The project is the one in the subject.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateCommand {
    /// The update's id; by default it is derived from the log entry ([`ObjectId::from_log`]). An id that occurs twice in a
    /// project is applied and announced once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// The lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id, unique in its process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_id: Option<String>,
    /// The process that `reference_id` belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// Members to merge into the lead's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<JsonObject>,
    /// The lead's new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The state to move the lead to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<String>,
    /// The reason, for states that take a disposition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disposition: Option<String>,
    /// The user who changes the lead, for the audit trail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// The API key of the gateway's request; absent for internal producers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_id: Option<ObjectId>,
    /// Change the lead only if it is still at this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_version: Option<u32>,
    /// Change the lead only if it is still in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_state: Option<String>,
}

/// A call with a lead began. Until it ends or expires, updates of the lead fail, or are queued if the process says so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallStarted {
    /// The lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id, with `process_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_id: Option<String>,
    /// The process that `reference_id` belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The call's id, if a lead can have several calls at once. A second start of the same call renews its expiry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    /// After how many seconds a call without an end counts as ended; by default the process's `callTimeoutSeconds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
}

/// A call with a lead ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallEnded {
    /// The lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id, with `process_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_id: Option<String>,
    /// The process that `reference_id` belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The call that ended; without it, every call of the lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
}

/// The last call of a lead with queued updates may have expired. lead-state publishes it to its own log, so the queued
/// updates are decided at one place in the log. It only ends calls that have expired, so any producer may send it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallExpired {
    /// The lead.
    pub lead_id: ObjectId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_command_has_this_wire_form() {
        let command = UpdateCommand {
            update_id: Some(ObjectId::from_bytes([1; 12])),
            lead_id: Some(ObjectId::from_bytes([2; 12])),
            reference_id: Some("AB123456789".into()),
            process_id: Some(ObjectId::from_bytes([3; 12])),
            metadata: Some(
                JsonObject::from_text(r#"{"make":"Toyota","n":123456789012345678901234567890}"#.into()).unwrap(),
            ),
            name: Some("Ada".into()),
            target_state: Some("interested".into()),
            disposition: Some("callback".into()),
            user_id: Some("u-1".into()),
            api_key_id: Some(ObjectId::from_bytes([4; 12])),
            expected_version: Some(4),
            expected_state: Some("new".into()),
        };
        let text = serde_json::to_string(&command).unwrap();
        insta::assert_snapshot!(text, @r#"{"updateId":"010101010101010101010101","leadId":"020202020202020202020202","referenceId":"AB123456789","processId":"030303030303030303030303","metadata":{"make":"Toyota","n":123456789012345678901234567890},"name":"Ada","targetState":"interested","disposition":"callback","userId":"u-1","apiKeyId":"040404040404040404040404","expectedVersion":4,"expectedState":"new"}"#);
        assert_eq!(serde_json::from_str::<UpdateCommand>(&text).unwrap(), command);
    }

    #[test]
    fn unknown_fields_and_nulls_are_ignored() {
        let command: UpdateCommand =
            serde_json::from_str(r#"{"leadId":"020202020202020202020202","projectId":"x","later":1,"name":null}"#)
                .unwrap();
        assert_eq!(command, UpdateCommand { lead_id: Some(ObjectId::from_bytes([2; 12])), ..Default::default() });
    }

    #[test]
    fn call_events_have_this_wire_form() {
        let started = CallStarted {
            lead_id: Some(ObjectId::from_bytes([2; 12])),
            call_id: Some("c-1".into()),
            timeout_seconds: Some(60),
            ..Default::default()
        };
        insta::assert_snapshot!(serde_json::to_string(&started).unwrap(), @r#"{"leadId":"020202020202020202020202","callId":"c-1","timeoutSeconds":60}"#);
        let ended = CallEnded {
            reference_id: Some("R".into()),
            process_id: Some(ObjectId::from_bytes([3; 12])),
            ..Default::default()
        };
        insta::assert_snapshot!(serde_json::to_string(&ended).unwrap(), @r#"{"referenceId":"R","processId":"030303030303030303030303"}"#);
        let expired = CallExpired { lead_id: ObjectId::from_bytes([2; 12]) };
        insta::assert_snapshot!(serde_json::to_string(&expired).unwrap(), @r#"{"leadId":"020202020202020202020202"}"#);
    }
}
