//! The messages of the command log: update commands, call events, creations and erasures. JSON, camelCase, version 1.
//!
//! The gateway publishes them, for its HTTP clients and for producers on NATS. A producer's message is the body of
//! `POST /api/v1/leads/update`, `/api/v1/calls/started` or `/api/v1/calls/ended`; the gateway checks it, makes it a
//! command and answers with JetStream's acknowledgement.

use std::{fmt::Display, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{JsonObject, ObjectId, Timestamp, call_result::CallResult, text};

/// How far the time in a producer's update id may be ahead of the gateway's clock. A larger value admits ids of wrong
/// clocks, and ids in months of the ledger that have not begun.
pub const MAX_ID_AHEAD: Duration = Duration::from_hours(1);
/// How far the time in a producer's update id may lie in the past: the shortest retention of the ledger. The ledger may
/// have dropped the month of an older id, and with it the record that the update was applied.
pub const MAX_ID_AGE: Duration = Duration::from_hours(62 * 24);

/// The deduplication id of a command in the log. Ids of updates are unique in their project.
pub fn message_id(project_id: ObjectId, update_id: ObjectId) -> String {
    format!("{project_id}.{update_id}")
}

/// The deduplication id in the log of a message to which its producer gave the id `id`. It is unique in the producer's
/// project, and never equals the id of an update.
pub fn producer_message_id(project_id: ObjectId, id: impl Display) -> String {
    format!("{project_id}.producer.{id}")
}

/// Whether a producer may give an update this id now.
pub fn is_acceptable_id(update_id: ObjectId, now: Timestamp) -> bool {
    let made = update_id.timestamp();
    made <= now.plus(MAX_ID_AHEAD) && made >= now.minus(MAX_ID_AGE)
}

/// The longest `name`, `referenceId`, `targetState`, `expectedState`, `disposition`, `userId` or `callId`, in
/// characters.
pub const MAX_TEXT_CHARS: usize = 1024;

/// Change a lead: merge metadata, rename it, move it to another state.
///
/// The lead is addressed by `leadId`, or by `processId` + `referenceId`; if both are given they must identify the same
/// lead. The project is the one in the subject.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct UpdateCommand {
    /// The update's id; by default it is derived from the log entry ([`ObjectId::from_log`]). An id that occurs twice
    /// in a project is applied and announced once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// The lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id, unique in its process.
    #[serde(default, deserialize_with = "text::reference_id", skip_serializing_if = "Option::is_none")]
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
    /// The API key of the HTTP request; absent for producers on NATS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_id: Option<ObjectId>,
    /// Change the lead only if it is still at this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_version: Option<u32>,
    /// Change the lead only if it is still in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_state: Option<String>,
    /// Warnings about ignored input, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A call with a lead began. Until it ends or expires, updates of the lead fail, or are queued if the process has
/// `duringCall: "queue"`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallStarted {
    /// The call event's id; by default it is derived from the log entry ([`ObjectId::from_log`]). An id that occurs
    /// twice in a project is applied and announced once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// The lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id, with `process_id`.
    #[serde(default, deserialize_with = "text::reference_id", skip_serializing_if = "Option::is_none")]
    pub reference_id: Option<String>,
    /// The process that `reference_id` belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The call's id, if a lead can have several calls at once. A second start of the same call renews its expiry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    /// Seconds after which a call without an end counts as ended; by default the process's `callTimeoutSeconds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
    /// The API key of the HTTP request; absent for producers on NATS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_id: Option<ObjectId>,
}

/// A call with a lead ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct CallEnded {
    /// The call event's id; by default it is derived from the log entry ([`ObjectId::from_log`]). An id that occurs
    /// twice in a project is applied and announced once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// The lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// The lead's external id, with `process_id`.
    #[serde(default, deserialize_with = "text::reference_id", skip_serializing_if = "Option::is_none")]
    pub reference_id: Option<String>,
    /// The process that `reference_id` belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_id: Option<ObjectId>,
    /// The call that ended; without it, every call of the lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    /// The state to move the lead to, by the rules for updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_state: Option<String>,
    /// The platform's report of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<CallResult>,
    /// The API key of the HTTP request; absent for producers on NATS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_id: Option<ObjectId>,
}

/// Erase a lead: its name, phone, e-mail address, external id, metadata and disposition, and the content of its updates
/// and call events. Its ids, its state, codes and times remain. Only the gateway publishes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct EraseLead {
    /// The erasure's id; by default it is derived from the log entry ([`ObjectId::from_log`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// The lead.
    pub lead_id: ObjectId,
    /// The API key of the HTTP request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_id: Option<ObjectId>,
}

/// Contact data of a lead.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeadContact {
    /// The lead's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The lead's phone number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phone: Option<String>,
    /// The lead's e-mail address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}

/// A lead was created. lead-state publishes this message to the log, for leads of processes with a callback for
/// `lead.created`, so that the event has a ledger row and a place among the events of its lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LeadCreated {
    /// The creation's id, assigned in the transaction that created the lead. An id that occurs twice in a project is
    /// applied and announced once.
    pub update_id: ObjectId,
    /// The lead.
    pub lead_id: ObjectId,
    /// The state in which the lead was created.
    pub state: String,
    /// The lead's contact data.
    #[serde(default)]
    pub contact: LeadContact,
    /// The metadata with which the lead was created.
    pub metadata: JsonObject,
}

/// The last call of a lead with queued updates may have expired. lead-state publishes this message to the log, so that
/// the queued updates are decided at one position of the log. The message has no effect while a call is in progress.
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
    fn invisible_characters_at_the_ends_of_a_reference_are_trimmed() {
        for (given, read) in [
            ("AB 1", Some("AB 1")),
            ("AB1 ", Some("AB1")),
            ("\u{feff} AB1\u{a0}", Some("AB1")),
            ("\u{202a}AB1\u{202c}", Some("AB1")),
            (" ", None),
        ] {
            let body = serde_json::json!({"referenceId": given}).to_string();
            let command: UpdateCommand = serde_json::from_str(&body).unwrap();
            let call: CallStarted = serde_json::from_str(&body).unwrap();
            assert_eq!([command.reference_id.as_deref(), call.reference_id.as_deref()], [read; 2], "{given:?}");
        }
    }

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
            warnings: vec!["name is empty and was ignored".into()],
        };
        let text = serde_json::to_string(&command).unwrap();
        insta::assert_snapshot!(text, @r#"{"updateId":"010101010101010101010101","leadId":"020202020202020202020202","referenceId":"AB123456789","processId":"030303030303030303030303","metadata":{"make":"Toyota","n":123456789012345678901234567890},"name":"Ada","targetState":"interested","disposition":"callback","userId":"u-1","apiKeyId":"040404040404040404040404","expectedVersion":4,"expectedState":"new","warnings":["name is empty and was ignored"]}"#);
        assert_eq!(serde_json::from_str::<UpdateCommand>(&text).unwrap(), command);
    }

    #[test]
    fn ids_of_messages_are_separate_for_projects_and_producers() {
        let (one, other, id) =
            (ObjectId::from_bytes([1; 12]), ObjectId::from_bytes([2; 12]), ObjectId::from_bytes([3; 12]));
        assert_ne!(message_id(one, id), message_id(other, id));
        assert_ne!(producer_message_id(one, "a"), producer_message_id(other, "a"));
        assert_ne!(producer_message_id(one, id), message_id(one, id));
    }

    #[test]
    fn ids_of_updates_are_neither_of_the_future_nor_older_than_the_ledger() {
        let now = Timestamp::from_millis(1_768_193_759_048);
        let made = |seconds: i64| ObjectId::new(Timestamp::from_millis(now.millis() + seconds * 1000), [7; 8]);
        for (seconds, acceptable) in
            [(0, true), (3600, true), (3601, false), (-62 * 86_400 + 1, true), (-62 * 86_400 - 1, false)]
        {
            assert_eq!(is_acceptable_id(made(seconds), now), acceptable, "{seconds}");
        }
    }

    #[test]
    fn unknown_fields_and_nulls_are_ignored() {
        let command: UpdateCommand =
            serde_json::from_str(r#"{"leadId":"020202020202020202020202","projectId":"x","later":1,"name":null}"#)
                .unwrap();
        assert_eq!(command, UpdateCommand { lead_id: Some(ObjectId::from_bytes([2; 12])), ..Default::default() });
    }

    #[test]
    fn call_events_creations_and_erasures_have_this_wire_form() {
        let started = CallStarted {
            update_id: Some(ObjectId::from_bytes([1; 12])),
            lead_id: Some(ObjectId::from_bytes([2; 12])),
            call_id: Some("c-1".into()),
            timeout_seconds: Some(60),
            api_key_id: Some(ObjectId::from_bytes([4; 12])),
            ..Default::default()
        };
        insta::assert_snapshot!(serde_json::to_string(&started).unwrap(), @r#"{"updateId":"010101010101010101010101","leadId":"020202020202020202020202","callId":"c-1","timeoutSeconds":60,"apiKeyId":"040404040404040404040404"}"#);
        let ended = CallEnded {
            reference_id: Some("R".into()),
            process_id: Some(ObjectId::from_bytes([3; 12])),
            ..Default::default()
        };
        insta::assert_snapshot!(serde_json::to_string(&ended).unwrap(), @r#"{"referenceId":"R","processId":"030303030303030303030303"}"#);
        let erase = EraseLead {
            update_id: Some(ObjectId::from_bytes([1; 12])),
            lead_id: ObjectId::from_bytes([2; 12]),
            api_key_id: Some(ObjectId::from_bytes([4; 12])),
        };
        insta::assert_snapshot!(serde_json::to_string(&erase).unwrap(), @r#"{"updateId":"010101010101010101010101","leadId":"020202020202020202020202","apiKeyId":"040404040404040404040404"}"#);
        let created = LeadCreated {
            update_id: ObjectId::from_bytes([1; 12]),
            lead_id: ObjectId::from_bytes([2; 12]),
            state: "new".into(),
            contact: LeadContact {
                name: Some("Ada".into()),
                phone: Some("+14155550123".into()),
                email: Some("ada@example.com".into()),
            },
            metadata: JsonObject::from_text(r#"{"n":1.50}"#.into()).unwrap(),
        };
        let text = serde_json::to_string(&created).unwrap();
        insta::assert_snapshot!(text, @r#"{"updateId":"010101010101010101010101","leadId":"020202020202020202020202","state":"new","contact":{"name":"Ada","phone":"+14155550123","email":"ada@example.com"},"metadata":{"n":1.50}}"#);
        assert_eq!(serde_json::from_str::<LeadCreated>(&text).unwrap(), created);
        let expired = CallExpired { lead_id: ObjectId::from_bytes([2; 12]) };
        insta::assert_snapshot!(serde_json::to_string(&expired).unwrap(), @r#"{"leadId":"020202020202020202020202"}"#);
    }
}
