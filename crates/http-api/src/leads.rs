//! Leads: creation, lookup, lists and history.

use contract::{
    JsonObject, ObjectId,
    event::OutcomeKind,
    rpc::{self, ShortResult, UpdateStatus},
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::{
    convert::{read_both, response_from},
    examples::example,
    time::DateTime,
    updates::Outcome,
};

/// A lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Lead {
    /// The lead's id, `leadId` everywhere else.
    #[serde(rename = "_id")]
    pub id: ObjectId,
    /// Its name.
    pub name: Option<String>,
    /// Its phone number, masked if the request has `masked=true`.
    pub phone: Option<String>,
    /// Its e-mail address, in lower case.
    pub email: Option<String>,
    /// Its project.
    pub project_id: ObjectId,
    /// Its process.
    pub process_id: ObjectId,
    /// Its external id, unique in its process.
    pub reference_id: Option<String>,
    /// Its current state, one of the states of its process.
    pub current_state: String,
    /// Further data about the lead.
    pub metadata: JsonObject,
    /// When it was created.
    pub created_at: DateTime,
    /// When it last changed.
    pub updated_at: DateTime,
}

response_from!(lead: rpc::Lead => Lead {
    name, phone, email, project_id, process_id, reference_id, metadata, created_at, updated_at,
} with { id: lead.lead_id, current_state: lead.state });

/// A lead with additional fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "{T}Lead"))]
pub struct LeadWith<T> {
    /// The lead.
    #[serde(flatten)]
    pub lead: Lead,
    /// The additional fields.
    #[serde(flatten)]
    pub more: T,
}

impl<'de, T: serde::de::DeserializeOwned> Deserialize<'de> for LeadWith<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_both(deserializer).map(|(lead, more)| Self { lead, more })
    }
}

/// `data` of `GET /api/v1/leads/get`.
pub type LeadDetails = LeadWith<Details>;

/// An item of `GET /api/v1/leads`.
pub type ListedLead = LeadWith<Versioned>;

/// The additional fields of a single lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "Detailed"))]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// The last disposition that was stored.
    pub last_disposition: Option<String>,
    /// Its last updates and call events, the newest first.
    pub activities: Vec<Activity>,
}

/// The additional fields of a lead in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "Listed"))]
#[serde(rename_all = "camelCase")]
pub struct Versioned {
    /// The last disposition that was stored.
    pub last_disposition: Option<String>,
    /// Its version, for `If-Match` and, in lines of bulk requests, `$expectedVersion`.
    pub version: i64,
}

impl From<rpc::Lead> for LeadDetails {
    fn from(mut lead: rpc::Lead) -> Self {
        let activities = std::mem::take(&mut lead.activities).into_iter().map(Into::into).collect();
        let more = Details { last_disposition: lead.disposition.take(), activities };
        Self { lead: lead.into(), more }
    }
}

impl From<rpc::Lead> for ListedLead {
    fn from(mut lead: rpc::Lead) -> Self {
        let more = Versioned { last_disposition: lead.disposition.take(), version: lead.version };
        Self { lead: lead.into(), more }
    }
}

/// A recent update of a lead, or event of a call with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// `update`, `call.started`, `call.ended`, `erase` or `lead.created`.
    pub kind: OutcomeKind,
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// Whether it was applied.
    pub success: bool,
    /// Why the update failed.
    pub error: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The disposition given with the update.
    pub disposition: Option<String>,
    /// Who changed the lead, as the update said.
    pub user_id: Option<String>,
    /// When the update was decided.
    pub timestamp: DateTime,
    /// The result of the call that ended, in short; `GET /api/v1/activities/{updateId}` returns all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ShortResult>,
}

response_from!(activity: rpc::Activity => Activity {
    kind, update_id, success, error, from_state, to_state, disposition, user_id, timestamp, result,
});

/// An item of `GET /api/v1/leads/{leadId}/updates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// `update`, `call.started`, `call.ended`, `erase` or `lead.created`.
    pub kind: OutcomeKind,
    /// The update, or the call event.
    pub update_id: ObjectId,
    /// `succeeded` or `failed`.
    pub status: UpdateStatus,
    /// Why it failed, for people.
    pub error: Option<String>,
    /// Why it failed, for programs.
    pub error_code: Option<String>,
    /// The state before.
    pub from_state: Option<String>,
    /// The state after.
    pub to_state: Option<String>,
    /// The disposition given with it.
    pub disposition: Option<String>,
    /// The lead's version after it.
    pub version: Option<i64>,
    /// Who changed the lead, as the update said.
    pub user_id: Option<String>,
    /// The API key of the request; null for internal producers.
    pub api_key_id: Option<ObjectId>,
    /// Warnings about ignored fields.
    pub warnings: Vec<String>,
    /// When it was accepted.
    pub logged_at: DateTime,
    /// When it was decided and applied.
    pub applied_at: DateTime,
}

response_from!(update: rpc::HistoryEntry => HistoryEntry {
    kind, update_id, error, error_code, from_state, to_state, disposition, version, user_id, api_key_id, warnings, logged_at,
    applied_at,
} with { status: if update.success { UpdateStatus::Succeeded } else { UpdateStatus::Failed } });

/// An item of `GET /api/v1/updates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ListedUpdate {
    /// The lead. If it is unknown, the id that the update gave.
    pub lead_id: Option<ObjectId>,
    /// The lead's process; null for an unknown lead.
    pub process_id: Option<ObjectId>,
    /// The lead's external id. If the lead is unknown, the id that the update gave.
    pub reference_id: Option<String>,
    /// The rest, as in the history of its lead.
    #[serde(flatten)]
    pub entry: HistoryEntry,
}

response_from!(update: rpc::FoundUpdate => ListedUpdate { lead_id, process_id, reference_id } with {
    entry: update.entry.into(),
});

/// A new lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct NewLead {
    /// The API key's project.
    pub project_id: ObjectId,
    /// The process that the lead begins in.
    pub process_id: ObjectId,
    /// Its name, or else `firstName`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub name: Option<String>,
    /// Joined with `lastName` where there is no `name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub first_name: Option<String>,
    /// Joined with `firstName`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub last_name: Option<String>,
    /// 5 to 15 digits, best as E.164; required without `email`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub phone: Option<String>,
    /// Stored in lower case; required without `phone`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub email: Option<String>,
    /// Its external id, unique in its process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub reference_id: Option<String>,
    /// Stored, not interpreted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 1024)))]
    pub group_id: Option<String>,
    /// Further data about the lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<JsonObject>,
}

/// What to do if the process already has a lead with this `referenceId`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum OnExisting {
    /// The request is refused.
    #[default]
    Refuse,
    /// The lead is returned as it is.
    Return,
    /// The lead's name and metadata are updated, as by `POST /api/v1/leads/update`.
    Update,
}

/// The body of `POST /api/v1/leads/initiate`: a lead to create, or the id of one to look up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("anyOf" = [{"required": ["lead"]}, {"required": ["leadId"]}])))]
#[serde(rename_all = "camelCase")]
pub struct InitiateRequest {
    /// The lead to create.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead: Option<NewLead>,
    /// The lead to look up instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead_id: Option<ObjectId>,
    /// Accepted and ignored: Leadrelay makes no calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<bool>,
    /// What to do with a lead that exists; `refuse` by default. The other values need `lead.referenceId`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_existing: Option<OnExisting>,
}

/// The response of `POST /api/v1/leads/initiate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct InitiateResponse {
    /// Always true.
    pub success: bool,
    /// The lead.
    #[serde(flatten)]
    pub lead: Lead,
    /// Whether the lead existed, so that `onExisting` applied.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub existing: bool,
    /// The update of an existing lead, for `GET /api/v1/updates/{updateId}`.
    #[serde(rename = "updateId", skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
    /// The outcome of the update; only with `Prefer: wait`, and if it arrived in time. Its `data` and the lead are
    /// those after the update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Warnings about ignored parts of the request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl<'de> Deserialize<'de> for InitiateResponse {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Rest {
            success: bool,
            #[serde(default)]
            existing: bool,
            update_id: Option<ObjectId>,
            outcome: Option<Outcome>,
            #[serde(default)]
            warnings: Vec<String>,
        }
        let (lead, Rest { success, existing, update_id, outcome, warnings }) = read_both(deserializer)?;
        Ok(Self { success, lead, existing, update_id, outcome, warnings })
    }
}

/// The body of `POST /api/v1/leads/bulk/initiate`: leads to create, or the ids of leads to look up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("anyOf" = [{"required": ["leads"]}, {"required": ["leadIds"]}])))]
#[serde(rename_all = "camelCase")]
pub struct BulkInitiateRequest {
    /// The leads to create.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1000)))]
    pub leads: Option<Vec<NewLead>>,
    /// The leads to look up instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 1000)))]
    pub lead_ids: Option<Vec<ObjectId>>,
    /// What to do with leads that exist; `refuse` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_existing: Option<OnExisting>,
}

/// A lead of the response of `POST /api/v1/leads/bulk/initiate`.
pub type InitiatedLead = LeadWith<Upserted>;

/// The additional fields of a lead of a bulk request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "Initiated"))]
#[serde(rename_all = "camelCase")]
pub struct Upserted {
    /// Whether the lead existed, so that `onExisting` applied.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub existing: bool,
    /// The update of an existing lead, for `GET /api/v1/updates/{updateId}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_id: Option<ObjectId>,
}

/// The response of `POST /api/v1/leads/bulk/initiate`.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BulkInitiateResponse {
    /// The leads that were created or found, in the order of the request. A lead that is updated is shown as it was
    /// before.
    pub success: Vec<InitiatedLead>,
    /// The leads that were neither created nor found, in the order of the request.
    pub errors: Vec<RefusedLead>,
    /// Warnings about ignored parts of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A lead that was neither created nor found.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RefusedLead {
    /// The lead or the id, as in the request.
    #[cfg_attr(feature = "schema", schemars(with = "serde_json::Value"))]
    pub data: Box<RawValue>,
    /// Its external id, if it has one.
    pub reference_id: Option<String>,
    /// Why, for people.
    pub error: String,
    /// Why, for programs.
    pub code: String,
}

example!(
    lead_details: LeadDetails,
    r#"{"_id":"696102a4b8c1d2e3f4a5b6c7","name":"Ada Lovelace","phone":"+14155550123","email":"ada@example.com","projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","currentState":"interested","metadata":{"make":"Toyota","model":"Camry"},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T09:30:00.000Z","lastDisposition":"callback","activities":[{"kind":"update","updateId":"6b0426971c73026dafa27e40","success":true,"error":null,"fromState":"new","toState":"interested","disposition":"callback","userId":"agent-7","timestamp":"2026-01-12T09:30:00.000Z"}]}"#
);
example!(
    listed_lead: ListedLead,
    r#"{"_id":"696102a4b8c1d2e3f4a5b6c7","name":"Ada Lovelace","phone":"+14155550123","email":"ada@example.com","projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","currentState":"interested","metadata":{"make":"Toyota","model":"Camry"},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T09:30:00.000Z","lastDisposition":"callback","version":2}"#
);
example!(
    history_entry: HistoryEntry,
    r#"{"kind":"update","updateId":"6b0426971c73026dafa27e40","status":"succeeded","error":null,"errorCode":null,"fromState":"new","toState":"interested","disposition":"callback","version":2,"userId":"agent-7","apiKeyId":"696102a4b8c1d2e3f4a5b603","warnings":[],"loggedAt":"2026-01-12T09:29:59.991Z","appliedAt":"2026-01-12T09:30:00.000Z"}"#
);
example!(
    listed_update: ListedUpdate,
    r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","kind":"update","updateId":"6b0426971c73026dafa27e40","status":"failed","error":"Lead update is not allowed while a call is in progress for this lead","errorCode":"call_in_progress","fromState":"new","toState":"new","disposition":null,"version":1,"userId":"agent-7","apiKeyId":"696102a4b8c1d2e3f4a5b603","warnings":[],"loggedAt":"2026-01-12T09:29:59.991Z","appliedAt":"2026-01-12T09:30:00.000Z"}"#
);
example!(
    initiate_request: InitiateRequest,
    r#"{"lead":{"projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","name":"Ada Lovelace","phone":"+14155550123","referenceId":"AB123456789","metadata":{"make":"Toyota"}}}"#
);
example!(
    initiate_response: InitiateResponse,
    r#"{"success":true,"_id":"696102a4b8c1d2e3f4a5b6c7","name":"Ada Lovelace","phone":"+14155550123","email":null,"projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","referenceId":"AB123456789","currentState":"new","metadata":{"make":"Toyota"},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z"}"#
);
example!(
    bulk_initiate_request: BulkInitiateRequest,
    r#"{"leads":[{"projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","name":"Ada Lovelace","phone":"+14155550123"},{"projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","name":"Grace Hopper","referenceId":"AB123456790"}]}"#
);
example!(
    bulk_initiate_response: BulkInitiateResponse,
    r#"{"success":[{"_id":"696102a4b8c1d2e3f4a5b6c7","name":"Ada Lovelace","phone":"+14155550123","email":null,"projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","referenceId":null,"currentState":"new","metadata":{},"createdAt":"2026-01-12T04:55:59.048Z","updatedAt":"2026-01-12T04:55:59.048Z"}],"errors":[{"data":{"projectId":"696102a4b8c1d2e3f4a5b601","processId":"696102a4b8c1d2e3f4a5b602","name":"Grace Hopper","referenceId":"AB123456790"},"referenceId":"AB123456790","error":"phone or email is required in lead object","code":"missing_field"}]}"#
);
