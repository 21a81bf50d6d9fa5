//! The configuration of a process: the rules of its leads, the callbacks that get outcomes, and the sources that report
//! calls.
//!
//! An operator writes and applies a [`ProcessSpec`]; lead-state makes a [`Process`] of it, stores it, and projects it
//! to the bucket `processes`. Secrets are in clear in the former and [sealed](crate::secret) in the latter.

mod auth;
mod callback;
mod certificate;
mod endpoint;
mod filter;
mod limits;
mod source;
mod spec;
mod strict;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use self::{
    auth::{AuthHeader, CallbackAuth, ClientAuthentication, Oauth2Client, have_same_origin},
    callback::{
        Callback, DEFAULT_OVERLAP_SECONDS, MAX_OVERLAP_SECONDS, Ordering, RetiringSecret, new_signing_secret,
        signing_key,
    },
    certificate::ClientCertificate,
    endpoint::{RESTRICTED_PORTS, UrlFault, header_fault, parse_url, restricted_port},
    filter::{EventValues, FilterCondition},
    limits::*,
    source::{IngestId, InvalidIngestId, InvalidPlatform, MIN_SOURCE_SECRET_BYTES, Platform, Source, SourceSpec},
    spec::{CallbackSpec, ProcessSpec, RequestedUrl},
};
use crate::ObjectId;
pub use crate::event_kind::EventKind;

/// A process, as lead-state stores it and the services watch it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Its project.
    pub project_id: ObjectId,
    /// The process; null for the project's fallback callbacks, which get the outcomes of updates whose lead is unknown.
    pub process_id: Option<ObjectId>,
    /// Grows with every change: a reader keeps the highest revision that it has read.
    pub revision: i64,
    /// Its name, unique in its project.
    pub name: String,
    /// The rules of its leads.
    #[serde(flatten)]
    pub rules: Rules,
    /// The callbacks that get outcomes.
    pub callbacks: Vec<Callback>,
    /// The platforms that report calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
}

/// The rules of a process's leads: everything about it that a decision depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct Rules {
    /// The states, in display order.
    pub states: Vec<State>,
    /// From each state, the states a lead may move to. Absent: any transition is allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transitions: Option<BTreeMap<String, BTreeSet<String>>>,
    /// How metadata is merged.
    pub metadata_merge: MetadataMerge,
    /// Whether leads may leave terminal states.
    pub allow_leaving_terminal: bool,
    /// Seconds after which a call without an end counts as ended.
    pub call_timeout_seconds: u32,
    /// What happens to updates while a call with their lead is in progress.
    #[serde(skip_serializing_if = "DuringCall::is_reject")]
    pub during_call: DuringCall,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            states: Vec::new(),
            transitions: None,
            metadata_merge: MetadataMerge::default(),
            allow_leaving_terminal: false,
            call_timeout_seconds: DEFAULT_CALL_TIMEOUT_SECONDS,
            during_call: DuringCall::default(),
        }
    }
}

/// The default of [`Rules::call_timeout_seconds`].
pub const DEFAULT_CALL_TIMEOUT_SECONDS: u32 = 2 * 60 * 60;

impl Rules {
    /// The state of this name.
    pub fn state(&self, name: &str) -> Option<&State> {
        self.states.iter().find(|state| state.name == name)
    }

    /// The state of new leads: the initial one, or else the first.
    pub fn initial_state(&self) -> Option<&State> {
        self.states.iter().find(|state| state.kind == StateKind::Initial).or(self.states.first())
    }
}

/// A state of leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Its name, e.g. `followup_2`.
    pub name: String,
    /// Its kind.
    #[serde(default)]
    pub kind: StateKind,
    /// Whether a disposition is stored with it; by default only with `interested` and `lost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takes_disposition: Option<bool>,
}

impl State {
    /// Whether a disposition is stored with this state.
    pub fn takes_disposition(&self) -> bool {
        self.takes_disposition.unwrap_or(matches!(self.name.as_str(), "interested" | "lost"))
    }
}

/// The kind of a state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum StateKind {
    /// New leads start here.
    Initial,
    /// Neither initial nor terminal.
    #[default]
    Active,
    /// Leads stay here, unless the process allows leaving terminal states.
    Terminal,
}

/// What happens to updates while a call with their lead is in progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum DuringCall {
    /// Updates fail.
    #[default]
    Reject,
    /// Updates are queued until the call ends or expires, and then decided in order.
    Queue,
}

impl DuringCall {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
    pub(super) fn is_reject(&self) -> bool {
        *self == Self::Reject
    }
}

/// How the metadata of a command is merged into the lead's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum MetadataMerge {
    /// Key by key; a new value replaces the old one as a whole.
    #[default]
    Shallow,
    /// JSON Merge Patch (RFC 7396): objects merge into objects, null deletes.
    Deep,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Timestamp, secret::Secret};

    #[test]
    fn a_process_has_this_wire_form() {
        let process = Process {
            project_id: ObjectId::from_bytes([1; 12]),
            process_id: Some(ObjectId::from_bytes([2; 12])),
            revision: 3,
            name: "sales".into(),
            rules: Rules {
                states: vec![State { name: "new".into(), kind: StateKind::Initial, takes_disposition: None }],
                call_timeout_seconds: 7200,
                during_call: DuringCall::Queue,
                ..Rules::default()
            },
            callbacks: vec![Callback {
                callback_id: ObjectId::from_bytes([3; 12]),
                name: "crm".into(),
                url: "https://crm.example/hook".into(),
                auth: Some(CallbackAuth::Bearer { token: "t".into() }),
                headers: vec![AuthHeader { name: "X-Key".into(), value: "v".into() }],
                client_certificate: Some(ClientCertificate { certificate: "c".into(), key: "k".into() }),
                secrets: vec!["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into()],
                retiring_secrets: vec![RetiringSecret { secret: "whsec_old".into(), until: Timestamp::from_millis(7) }],
                events: None,
                filter: vec![],
                enabled: true,
                timeout_seconds: 15,
                max_in_flight: 64,
                max_per_second: Some(50),
                ordering: Ordering::Lead,
            }],
            sources: vec![Source {
                source_id: ObjectId::from_bytes([4; 12]),
                name: "dialer".into(),
                platform: Platform::Vapi,
                secrets: vec!["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into()],
                enabled: true,
            }],
        };
        let text = serde_json::to_string(&process).unwrap();
        insta::assert_snapshot!(text, @r#"{"projectId":"010101010101010101010101","processId":"020202020202020202020202","revision":3,"name":"sales","states":[{"name":"new","kind":"initial"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"duringCall":"queue","callbacks":[{"callbackId":"030303030303030303030303","name":"crm","url":"https://crm.example/hook","auth":{"type":"bearer","token":"t"},"headers":[{"name":"X-Key","value":"v"}],"clientCertificate":{"certificate":"c","key":"k"},"secrets":["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],"retiringSecrets":[{"secret":"whsec_old","until":7}],"enabled":true,"timeoutSeconds":15,"maxInFlight":64,"maxPerSecond":50,"ordering":"lead"}],"sources":[{"sourceId":"040404040404040404040404","name":"dialer","platform":"vapi","secrets":["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],"enabled":true}]}"#);
        assert_eq!(serde_json::from_str::<Process>(&text).unwrap(), process);
        assert!(!format!("{process:?}").contains("MfKQ9r8"));
        let callback = &process.callbacks[0];
        let signing = |at| callback.signing_secrets(Timestamp::from_millis(at)).map(Secret::expose).collect::<Vec<_>>();
        assert_eq!(signing(6), ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_old"]);
        assert_eq!(signing(7), ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]);
        assert_eq!(callback.secrets().count(), 5);
    }
}
