//! The configuration of a process: its states and policies, and the callbacks that are told of outcomes.
//!
//! [`ProcessSpec`] is what an operator writes and applies; [`Process`] is what lead-state makes of it, stores,
//! and projects to the `processes` bucket. Secrets are in clear in the one and [sealed](crate::secret) in the other.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    ObjectId, Timestamp,
    command::MAX_TEXT_CHARS,
    secret::{Secret, SecretField},
    subject::NO_PROCESS,
};

/// A process as it is stored and watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// The project that the process belongs to.
    pub project_id: ObjectId,
    /// The process; null for the project's fallback callbacks, which are told of updates whose lead is unknown.
    pub process_id: Option<ObjectId>,
    /// Grows with every change: a reader keeps the highest that it saw.
    pub revision: i64,
    /// The process's name, unique in its project.
    pub name: String,
    /// How leads of this process move and change.
    #[serde(flatten)]
    pub rules: Rules,
    /// Who is told of outcomes.
    pub callbacks: Vec<Callback>,
}

/// How leads of a process move and change: all that deciding needs to know of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Rules {
    /// The states, in the order in which people should see them.
    #[serde(default)]
    pub states: Vec<State>,
    /// From each state, where a lead may go. Absent: from anywhere to anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transitions: Option<BTreeMap<String, BTreeSet<String>>>,
    /// How metadata is merged.
    #[serde(default)]
    pub metadata_merge: MetadataMerge,
    /// Whether leads may leave terminal states.
    #[serde(default)]
    pub allow_leaving_terminal: bool,
    /// After how many seconds a call that nobody ended counts as ended.
    #[serde(default = "default_call_timeout_seconds")]
    pub call_timeout_seconds: u32,
    /// What becomes of updates while a call with their lead is in progress.
    #[serde(default, skip_serializing_if = "DuringCall::is_reject")]
    pub during_call: DuringCall,
}

const fn default_call_timeout_seconds() -> u32 {
    2 * 60 * 60
}

impl Rules {
    /// The state of this name.
    pub fn state(&self, name: &str) -> Option<&State> {
        self.states.iter().find(|state| state.name == name)
    }

    /// The state that new leads are in: the one marked initial, else the first.
    pub fn initial_state(&self) -> Option<&State> {
        self.states.iter().find(|state| state.kind == StateKind::Initial).or(self.states.first())
    }
}

/// A state that leads can be in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Its name, e.g. `followup_2`.
    pub name: String,
    /// What kind it is.
    #[serde(default)]
    pub kind: StateKind,
    /// Whether a disposition is stored with it; by default in `interested` and `lost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takes_disposition: Option<bool>,
}

impl State {
    /// Whether a disposition is stored with this state.
    pub fn takes_disposition(&self) -> bool {
        self.takes_disposition.unwrap_or(matches!(self.name.as_str(), "interested" | "lost"))
    }
}

/// What kind of state it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum StateKind {
    /// New leads start here.
    Initial,
    /// Anything between.
    #[default]
    Active,
    /// Leads stay here, unless the process allows leaving.
    Terminal,
}

/// What becomes of updates while a call with their lead is in progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum DuringCall {
    /// They fail.
    #[default]
    Reject,
    /// They are held until the call ends or expires, and decided then, in order.
    Queue,
}

impl DuringCall {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
    fn is_reject(&self) -> bool {
        *self == Self::Reject
    }
}

/// How a command's metadata is merged into the lead's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum MetadataMerge {
    /// Key by key; new values replace old ones whole.
    #[default]
    Shallow,
    /// JSON Merge Patch (RFC 7396): objects merge into objects, null deletes.
    Deep,
}

/// A URL that is told of outcomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Callback {
    /// The callback's id: given on first apply, kept after.
    pub callback_id: ObjectId,
    /// Its name, unique in the process.
    pub name: String,
    /// Where to POST.
    pub url: String,
    /// How to authenticate to the endpoint, beside the signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<CallbackAuth>,
    /// Signing secrets, `whsec_` + base64, sealed; every one of them signs. None where they are not shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Secret>,
    /// Signing secrets that a rotation replaced: each signs as well, until its time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retiring_secrets: Vec<RetiringSecret>,
    /// Which outcomes it is told of; absent is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<BTreeSet<EventKind>>,
    /// Whether it is told anything at all.
    #[serde(default = "default_true")]
    pub enabled: bool,
    /// How long an attempt may take as a whole, in seconds.
    #[serde(default = "default_timeout_seconds")]
    pub timeout_seconds: u32,
    /// How many attempts may run at once, in one notifier.
    #[serde(default = "default_max_in_flight")]
    pub max_in_flight: u32,
    /// How many attempts may begin in a second, in one notifier; absent is as many as come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_second: Option<u32>,
    /// What of it waits for what.
    #[serde(default, skip_serializing_if = "Ordering::is_none")]
    pub ordering: Ordering,
}

/// Which of a callback's deliveries wait for which.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Ordering {
    /// None: each goes out as soon as it can.
    #[default]
    None,
    /// A lead's next one waits until the one before is delivered or exhausted. Other leads do not wait.
    Lead,
}

impl Ordering {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
    fn is_none(&self) -> bool {
        *self == Self::None
    }
}

const fn default_true() -> bool {
    true
}

const fn default_timeout_seconds() -> u32 {
    15
}

const fn default_max_in_flight() -> u32 {
    64
}

impl Callback {
    /// Whether the callback is told of an outcome of this kind.
    pub fn wants(&self, success: bool) -> bool {
        let kind = if success { EventKind::Succeeded } else { EventKind::Failed };
        self.enabled && self.events.as_ref().is_none_or(|events| events.contains(&kind))
    }

    /// The secrets that sign at this time, the newest first.
    pub fn signing_secrets(&self, now: Timestamp) -> impl Iterator<Item = &Secret> {
        let retiring = self.retiring_secrets.iter().filter(move |retiring| now < retiring.until);
        self.secrets.iter().chain(retiring.map(|retiring| &retiring.secret))
    }

    /// All its secrets, as they are stored.
    pub fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let retiring = self.retiring_secrets.iter().map(|retiring| &retiring.secret);
        self.secrets.iter().chain(retiring).chain(self.auth.as_ref().map(CallbackAuth::secret))
    }

    /// The same callback with other secrets: each is put through `change`, which seals or opens it.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn with_secrets<E>(
        &self,
        mut change: impl FnMut(SecretField, &Secret) -> Result<Secret, E>,
    ) -> Result<Self, E> {
        let secrets =
            self.secrets.iter().map(|secret| change(SecretField::Signing, secret)).collect::<Result<_, E>>()?;
        let mut retiring_secrets = self.retiring_secrets.clone();
        for retiring in &mut retiring_secrets {
            retiring.secret = change(SecretField::Signing, &retiring.secret)?;
        }
        let mut auth = self.auth.clone();
        if let Some(auth) = &mut auth {
            *auth.secret_mut() = change(SecretField::Auth, auth.secret())?;
        }
        Ok(Self { secrets, retiring_secrets, auth, ..self.clone() })
    }
}

/// A signing secret that is not used for much longer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RetiringSecret {
    /// The secret; empty where it is not shown.
    #[serde(default, skip_serializing_if = "Secret::is_empty")]
    pub secret: Secret,
    /// From when on it signs no more.
    pub until: Timestamp,
}

/// Most secrets of a callback that may be retiring at once: each makes every webhook's signature header longer.
pub const MAX_RETIRING_SECRETS: usize = 4;
/// How long a replaced secret stays valid where nobody says, in seconds.
pub const DEFAULT_OVERLAP_SECONDS: u32 = 24 * 60 * 60;
/// The longest that a replaced secret may stay valid, in seconds.
pub const MAX_OVERLAP_SECONDS: u32 = 7 * 24 * 60 * 60;

/// How to authenticate to an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum CallbackAuth {
    /// `Authorization: Bearer {token}`.
    Bearer {
        /// The token; empty where it is not shown, and in a spec where the one that is there stays.
        #[serde(default, skip_serializing_if = "Secret::is_empty")]
        token: Secret,
    },
    /// A header of the endpoint's choice.
    Header {
        /// Its name.
        name: String,
        /// Its value; empty where it is not shown, and in a spec where the one that is there stays.
        #[serde(default, skip_serializing_if = "Secret::is_empty")]
        value: Secret,
    },
}

impl CallbackAuth {
    /// The secret in it.
    pub fn secret(&self) -> &Secret {
        match self {
            Self::Bearer { token } => token,
            Self::Header { value, .. } => value,
        }
    }

    /// The secret in it, to be changed.
    pub fn secret_mut(&mut self) -> &mut Secret {
        match self {
            Self::Bearer { token } => token,
            Self::Header { value, .. } => value,
        }
    }

    /// Whether it is sent in the same way.
    pub fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bearer { .. }, Self::Bearer { .. }) => true,
            (Self::Header { name, .. }, Self::Header { name: other, .. }) => name.eq_ignore_ascii_case(other),
            _ => false,
        }
    }
}

/// An outcome that a callback can be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum EventKind {
    /// The lead was changed.
    #[serde(rename = "update.succeeded")]
    Succeeded,
    /// The lead was not changed.
    #[serde(rename = "update.failed")]
    Failed,
}

/// What an operator applies. Applying the same twice changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessSpec {
    /// The project.
    pub project_id: ObjectId,
    /// The process's name, unique in its project, by which it is found again. `_` stands for the project's
    /// fallback callbacks: it has no states.
    pub name: String,
    /// The states, in the order in which people should see them.
    #[serde(default)]
    pub states: Vec<State>,
    /// From each state, where a lead may go. Absent: from anywhere to anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transitions: Option<BTreeMap<String, BTreeSet<String>>>,
    /// How metadata is merged.
    #[serde(default)]
    pub metadata_merge: MetadataMerge,
    /// Whether leads may leave terminal states.
    #[serde(default)]
    pub allow_leaving_terminal: bool,
    /// After how many seconds a call that nobody ended counts as ended.
    #[serde(default = "default_call_timeout_seconds")]
    pub call_timeout_seconds: u32,
    /// What becomes of updates while a call with their lead is in progress.
    #[serde(default, skip_serializing_if = "DuringCall::is_reject")]
    pub during_call: DuringCall,
    /// Who is told of outcomes. A callback that is there but not in this list is removed.
    #[serde(default)]
    pub callbacks: Vec<CallbackSpec>,
}

/// A callback as an operator writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CallbackSpec {
    /// The callback that it is about; absent: the one of this name, or else a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback_id: Option<ObjectId>,
    /// Its name, unique in the process, by which it is found again.
    pub name: String,
    /// Where to POST.
    pub url: String,
    /// How to authenticate to the endpoint, beside the signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<CallbackAuth>,
    /// Signing secrets, `whsec_` + base64 of 24 to 64 bytes. Absent: those it has; for a new one, a new one is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Vec<Secret>>,
    /// Which outcomes it is told of; absent is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<BTreeSet<EventKind>>,
    /// Whether it is told anything at all.
    #[serde(default = "default_true")]
    pub enabled: bool,
    /// How long an attempt may take as a whole, in seconds, 1 to 30.
    #[serde(default = "default_timeout_seconds")]
    pub timeout_seconds: u32,
    /// How many attempts may run at once, in one notifier, 1 to 1000.
    #[serde(default = "default_max_in_flight")]
    pub max_in_flight: u32,
    /// How many attempts may begin in a second, in one notifier, 1 to 10000; absent is as many as come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_second: Option<u32>,
    /// Whether a lead's next delivery waits for the one before.
    #[serde(default, skip_serializing_if = "Ordering::is_none")]
    pub ordering: Ordering,
}

impl ProcessSpec {
    /// Whether this is the project's fallback: callbacks without a process.
    pub fn is_fallback(&self) -> bool {
        self.name == NO_PROCESS
    }

    /// The rules in it.
    pub fn rules(&self) -> Rules {
        Rules {
            states: self.states.clone(),
            transitions: self.transitions.clone(),
            metadata_merge: self.metadata_merge,
            allow_leaving_terminal: self.allow_leaving_terminal,
            call_timeout_seconds: self.call_timeout_seconds,
            during_call: self.during_call,
        }
    }

    /// Everything that is wrong with it, a sentence each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        check_name("name", &self.name, &mut faults);
        if self.is_fallback() {
            if !self.states.is_empty() || self.transitions.is_some() {
                faults.push("the process \"_\" stands for the project's fallback callbacks: it has no states".into());
            }
            if self.during_call == DuringCall::Queue {
                faults.push("duringCall: the process \"_\" has no leads, so nothing can be queued".into());
            }
        } else if self.states.is_empty() {
            faults.push("states: a process needs at least one state".into());
        }
        if self.call_timeout_seconds == 0 {
            faults.push("callTimeoutSeconds: must be at least 1".into());
        }
        let mut names = HashSet::new();
        for state in &self.states {
            check_name("states: a name", &state.name, &mut faults);
            if !names.insert(state.name.as_str()) {
                faults.push(format!("states: {:?} stands twice", state.name));
            }
        }
        if self.states.iter().filter(|state| state.kind == StateKind::Initial).count() > 1 {
            faults.push("states: only one can be initial".into());
        }
        for (from, targets) in self.transitions.iter().flatten() {
            for name in std::iter::once(from).chain(targets).filter(|name| !names.contains(name.as_str())) {
                faults.push(format!("transitions: {name:?} is not among the states"));
            }
        }
        let (mut names, mut ids) = (HashSet::new(), HashSet::new());
        for callback in &self.callbacks {
            if let Some(id) = callback.callback_id.filter(|id| !ids.insert(*id)) {
                faults.push(format!("callbacks: {id} stands twice"));
            }
            if !names.insert(callback.name.as_str()) {
                faults.push(format!("callbacks: {:?} stands twice", callback.name));
            }
            callback.check(&mut faults);
        }
        faults
    }
}

impl CallbackSpec {
    /// Everything that is wrong with it, a sentence each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.check(&mut faults);
        faults
    }

    fn check(&self, faults: &mut Vec<String>) {
        let mut fault = |text: String| faults.push(format!("callback {:?}: {text}", self.name));
        let rest = self.url.strip_prefix("https://").or_else(|| self.url.strip_prefix("http://"));
        if rest.is_none_or(|rest| rest.is_empty() || rest.starts_with('/')) || self.url.chars().any(char::is_whitespace)
        {
            fault(format!("url {:?} is not an http or https URL", self.url));
        }
        if !(1..=30).contains(&self.timeout_seconds) {
            fault("timeoutSeconds must be 1 to 30".into());
        }
        if !(1..=1000).contains(&self.max_in_flight) {
            fault("maxInFlight must be 1 to 1000".into());
        }
        if self.max_per_second.is_some_and(|rate| !(1..=10_000).contains(&rate)) {
            fault("maxPerSecond must be 1 to 10000; leave it out for no limit".into());
        }
        if self.secrets.as_ref().is_some_and(Vec::is_empty) {
            fault("secrets: must not be empty; leave it out to have one made".into());
        }
        if self.secrets.iter().flatten().any(|secret| signing_key(secret).is_none()) {
            fault("secrets: each must be whsec_ and the base64 of 24 to 64 bytes".into());
        }
        if self.auth.as_ref().is_some_and(|auth| auth.secret().is_sealed()) {
            fault("auth: a secret must be in clear here; this one is sealed, and opens only where it came from".into());
        }
        let visible = |secret: &Secret| secret.expose().bytes().all(|b| (0x20..0x7f).contains(&b));
        match &self.auth {
            Some(CallbackAuth::Bearer { token }) if !visible(token) => {
                fault("auth.token must be visible ASCII characters".into());
            }
            Some(CallbackAuth::Header { name, value }) => {
                let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
                if name.is_empty() || !name.bytes().all(is_token) {
                    fault(format!("auth.name {name:?} is not a header name"));
                }
                let lower = name.to_ascii_lowercase();
                if [
                    "content-type",
                    "content-length",
                    "host",
                    "user-agent",
                    "traceparent",
                    "connection",
                    "transfer-encoding",
                ]
                .contains(&lower.as_str())
                    || lower.starts_with("webhook-")
                {
                    fault(format!("auth.name {name:?} is a header that every webhook already carries"));
                }
                if !visible(value) {
                    fault("auth.value must be visible ASCII characters".into());
                }
            }
            _ => {}
        }
        check_name("callbacks: a name", &self.name, faults);
    }
}

fn check_name(what: &str, name: &str, faults: &mut Vec<String>) {
    if name.trim().is_empty() || name.chars().count() > MAX_TEXT_CHARS || name.chars().any(char::is_control) {
        faults.push(format!("{what} must have 1 to {MAX_TEXT_CHARS} characters and no control characters"));
    }
}

/// The key bytes of a Standard Webhooks secret: 24 to 64 bytes in base64 behind `whsec_`
/// (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).
pub fn signing_key(secret: &Secret) -> Option<Zeroizing<Vec<u8>>> {
    let key = Zeroizing::new(BASE64_STANDARD.decode(secret.expose().strip_prefix("whsec_")?).ok()?);
    (24..=64).contains(&key.len()).then_some(key)
}

/// Makes the text of a new signing secret from 32 random bytes.
pub fn new_signing_secret(random: [u8; 32]) -> Secret {
    format!("whsec_{}", BASE64_STANDARD.encode(random)).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn spec(text: &str) -> ProcessSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_whole_spec_has_no_faults() {
        let spec = spec(
            r#"{"projectId":"010101010101010101010101","name":"sales","states":[{"name":"new","kind":"initial"},
            {"name":"interested"},{"name":"lost","kind":"terminal","takesDisposition":true}],
            "transitions":{"new":["interested","lost"]},"metadataMerge":"deep","duringCall":"queue","callbacks":[
            {"name":"crm","url":"https://crm.example/hook","auth":{"type":"header","name":"X-Key","value":"v"},
             "secrets":["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],"events":["update.failed"]}]}"#,
        );
        assert_eq!(spec.faults(), Vec::<String>::new());
        assert_eq!(spec.rules().initial_state().unwrap().name, "new");
        assert_eq!(spec.rules().during_call, DuringCall::Queue);
        assert!(!format!("{spec:?}").contains("MfKQ9r8"));
    }

    #[test]
    fn every_fault_is_named() {
        let spec = spec(
            r#"{"projectId":"010101010101010101010101","name":" ","states":[{"name":"new","kind":"initial"},
            {"name":"new","kind":"initial"}],"transitions":{"new":["gone"]},"callTimeoutSeconds":0,"callbacks":[
            {"name":"a","url":"ftp://x","timeoutSeconds":31,"maxInFlight":0,"maxPerSecond":0,"secrets":["whsec_AAAA"],
             "auth":{"type":"header","name":"Webhook-Id","value":""}},
            {"name":"a","url":"http:///x","secrets":[],"auth":{"type":"bearer","token":"a\nb"}}]}"#,
        );
        insta::assert_snapshot!(spec.faults().join("\n"), @r#"
        name must have 1 to 1024 characters and no control characters
        callTimeoutSeconds: must be at least 1
        states: "new" stands twice
        states: only one can be initial
        transitions: "gone" is not among the states
        callback "a": url "ftp://x" is not an http or https URL
        callback "a": timeoutSeconds must be 1 to 30
        callback "a": maxInFlight must be 1 to 1000
        callback "a": maxPerSecond must be 1 to 10000; leave it out for no limit
        callback "a": secrets: each must be whsec_ and the base64 of 24 to 64 bytes
        callback "a": auth.name "Webhook-Id" is a header that every webhook already carries
        callbacks: "a" stands twice
        callback "a": url "http:///x" is not an http or https URL
        callback "a": secrets: must not be empty; leave it out to have one made
        callback "a": auth.token must be visible ASCII characters
        "#);
    }

    #[test]
    fn a_process_on_the_wire() {
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
                secrets: vec!["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into()],
                retiring_secrets: vec![RetiringSecret { secret: "whsec_old".into(), until: Timestamp::from_millis(7) }],
                events: None,
                enabled: true,
                timeout_seconds: 15,
                max_in_flight: 64,
                max_per_second: Some(50),
                ordering: Ordering::Lead,
            }],
        };
        let text = serde_json::to_string(&process).unwrap();
        insta::assert_snapshot!(text, @r#"{"projectId":"010101010101010101010101","processId":"020202020202020202020202","revision":3,"name":"sales","states":[{"name":"new","kind":"initial"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"duringCall":"queue","callbacks":[{"callbackId":"030303030303030303030303","name":"crm","url":"https://crm.example/hook","auth":{"type":"bearer","token":"t"},"secrets":["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],"retiringSecrets":[{"secret":"whsec_old","until":7}],"enabled":true,"timeoutSeconds":15,"maxInFlight":64,"maxPerSecond":50,"ordering":"lead"}]}"#);
        assert_eq!(serde_json::from_str::<Process>(&text).unwrap(), process);
        assert!(!format!("{process:?}").contains("MfKQ9r8"));
        let callback = &process.callbacks[0];
        let signing = |at| callback.signing_secrets(Timestamp::from_millis(at)).map(Secret::expose).collect::<Vec<_>>();
        assert_eq!(signing(6), ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_old"]);
        assert_eq!(signing(7), ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]);
        assert_eq!(callback.secrets().count(), 3);
    }

    fn arbitrary_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,40}".prop_map(Value::from),
            "(https?|ftp)://[a-z@:.\\[\\]/%0-9]{0,20}".prop_map(Value::from),
            "whsec_[A-Za-z0-9+/=]{0,90}".prop_map(Value::from),
            prop::collection::vec("[a-z_]{0,3}", 0..3).prop_map(Value::from),
            Just(json!({"type": "header", "name": "a b", "value": "\r\n"})),
            Just(json!({"type": "bearer", "token": "ä"})),
            Just(json!([{"name": "new"}, {"name": "new"}])),
            Just(json!({"new": ["gone"]})),
        ]
    }

    proptest! {
        /// Nothing panics, and a spec that is called good can be delivered under: its secrets are keys, and its URLs have a
        /// scheme.
        #[test]
        fn arbitrary_specs_are_refused_or_good(
            of_process in prop::option::of((
                prop::sample::select(vec!["name", "states", "transitions", "callTimeoutSeconds", "metadataMerge", "callbacks"]),
                arbitrary_value(),
            )),
            of_callback in prop::collection::vec((
                prop::sample::select(vec!["name", "url", "auth", "secrets", "events", "enabled", "timeoutSeconds", "maxInFlight"]),
                arbitrary_value(),
            ), 0..3),
        ) {
            let mut callback = json!({"name": "crm", "url": "https://example.com/hook"});
            for (member, value) in of_callback {
                callback[member] = value;
            }
            let mut spec = json!({
                "projectId": "010101010101010101010101", "name": "sales",
                "states": [{"name": "new"}], "callbacks": [callback],
            });
            if let Some((member, value)) = of_process {
                spec[member] = value;
            }
            if let Ok(spec) = serde_json::from_value::<ProcessSpec>(spec) && spec.faults().is_empty() {
                for callback in &spec.callbacks {
                    prop_assert!(callback.secrets.iter().flatten().all(|secret| signing_key(secret).is_some()));
                    prop_assert!(callback.url.starts_with("http"));
                }
            }
        }
    }
}
