//! The configuration that operators write, and its validation.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use super::{
    AuthHeader, CallbackAuth, ClientCertificate, DEFAULT_CALL_TIMEOUT_SECONDS, DuringCall, EventKind, FilterCondition,
    MAX_ACTIVE_SECRETS, MAX_CALLBACKS, MAX_SOURCES, MAX_STATES, MAX_TRANSITIONS, MetadataMerge, Ordering, Rules,
    SourceSpec, State, StateKind, UrlFault, limits::check_name, parse_url, signing_key, strict,
};
use crate::{ObjectId, secret::Secret, subject::NO_PROCESS, text::quoted};

/// The configuration of a process as an operator writes it. Applying it twice changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessSpec {
    /// The project.
    pub project_id: ObjectId,
    /// Its name, unique in its project, which identifies it. `_` stands for the project's fallback callbacks and has no
    /// states.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = super::MAX_NAME_CHARS)))]
    pub name: String,
    /// The states, in display order.
    #[serde(default, deserialize_with = "strict::states")]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_STATES)))]
    pub states: Vec<State>,
    /// From each state, the states a lead may move to. Absent: any transition is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transitions: Option<BTreeMap<String, BTreeSet<String>>>,
    /// How metadata is merged.
    #[serde(default)]
    pub metadata_merge: MetadataMerge,
    /// Whether leads may leave terminal states.
    #[serde(default)]
    pub allow_leaving_terminal: bool,
    /// Seconds after which a call without an end counts as ended.
    #[serde(default = "default_call_timeout_seconds")]
    pub call_timeout_seconds: u32,
    /// What happens to updates while a call with their lead is in progress.
    #[serde(default, skip_serializing_if = "DuringCall::is_reject")]
    pub during_call: DuringCall,
    /// The callbacks that get outcomes. Existing callbacks that are not in this list are removed.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_CALLBACKS)))]
    pub callbacks: Vec<CallbackSpec>,
    /// The platforms that report calls. Absent: the current ones stay; otherwise those that are not in this list are
    /// removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_SOURCES)))]
    pub sources: Option<Vec<SourceSpec>>,
}

/// A callback as an operator writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CallbackSpec {
    /// The callback to replace. Absent: the callback with this name, or a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback_id: Option<ObjectId>,
    /// Its name, unique in the process, which identifies it.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = super::MAX_NAME_CHARS)))]
    pub name: String,
    /// The URL that receives the POST requests.
    #[cfg_attr(feature = "schema", schemars(length(max = super::MAX_URL_BYTES)))]
    pub url: String,
    /// How to authenticate to the endpoint, in addition to the signature.
    #[serde(default, deserialize_with = "strict::auth", skip_serializing_if = "Option::is_none")]
    pub auth: Option<CallbackAuth>,
    /// Extra headers that authenticate to the endpoint.
    #[serde(default, deserialize_with = "strict::headers", skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = super::MAX_AUTH_HEADERS)))]
    pub headers: Vec<AuthHeader>,
    /// The certificate that the client presents to the endpoint (mutual TLS).
    #[serde(default, deserialize_with = "strict::client_certificate", skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<ClientCertificate>,
    /// Signing secrets, `whsec_` + base64 of 24 to 64 bytes. Absent: the current ones; a new callback gets a generated
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_ACTIVE_SECRETS)))]
    pub secrets: Option<Vec<Secret>>,
    /// The events that the callback receives; absent means the outcomes of updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<BTreeSet<EventKind>>,
    /// Conditions, all of which an event must satisfy. Without conditions, the callback receives every event that it
    /// names.
    #[serde(default, deserialize_with = "strict::filter", skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = super::MAX_FILTER_CONDITIONS)))]
    pub filter: Vec<FilterCondition>,
    /// Whether its deliveries are sent. Otherwise they are recorded and wait.
    #[serde(default = "super::callback::default_true")]
    pub enabled: bool,
    /// How long an attempt may take as a whole, in seconds, 1 to 30.
    #[serde(default = "super::callback::default_timeout_seconds")]
    pub timeout_seconds: u32,
    /// How many attempts may run at once per notifier, 1 to 1000.
    #[serde(default = "super::callback::default_max_in_flight")]
    pub max_in_flight: u32,
    /// How many attempts may begin per second and notifier, 1 to 10000; absent means no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_second: Option<u32>,
    /// Whether a lead's next delivery waits for the previous one.
    #[serde(default, skip_serializing_if = "Ordering::is_none")]
    pub ordering: Ordering,
}

/// A URL that is requested for a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedUrl {
    /// Where deliveries are sent.
    Callback,
    /// Where its access tokens are requested.
    TokenEndpoint,
}

impl ProcessSpec {
    /// Whether these are the project's fallback callbacks.
    pub fn is_fallback(&self) -> bool {
        self.name == NO_PROCESS
    }

    /// Its rules.
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

    /// Its errors, one sentence each. If a list exceeds its bound, nothing else is checked.
    pub fn faults(&self) -> Vec<String> {
        let transitions = self.transitions.iter().flatten().map(|(_, targets)| targets.len().max(1)).sum();
        let mut faults: Vec<_> = [
            check_count("states", self.states.len(), MAX_STATES),
            check_count("transitions", transitions, MAX_TRANSITIONS),
            check_count("callbacks", self.callbacks.len(), MAX_CALLBACKS),
            check_count("sources", self.sources.as_ref().map_or(0, Vec::len), MAX_SOURCES),
        ]
        .into_iter()
        .flatten()
        .collect();
        if faults.is_empty() {
            self.check(&mut faults);
        }
        faults
    }

    fn check(&self, faults: &mut Vec<String>) {
        check_name("name", &self.name, faults);
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
            check_name("states: a name", &state.name, faults);
            if !names.insert(state.name.as_str()) {
                faults.push(format!("states: {} occurs twice", quoted(&state.name)));
            }
        }
        if self.states.iter().filter(|state| state.kind == StateKind::Initial).count() > 1 {
            faults.push("states: only one can be initial".into());
        }
        for (from, targets) in self.transitions.iter().flatten() {
            for name in std::iter::once(from).chain(targets).filter(|name| !names.contains(name.as_str())) {
                faults.push(format!("transitions: {} is not among the states", quoted(name)));
            }
        }
        let (mut names, mut ids) = (HashSet::new(), HashSet::new());
        for callback in &self.callbacks {
            if let Some(id) = callback.callback_id.filter(|id| !ids.insert(*id)) {
                faults.push(format!("callbacks: {id} occurs twice"));
            }
            if !names.insert(callback.name.as_str()) {
                faults.push(format!("callbacks: {} occurs twice", quoted(&callback.name)));
            }
            callback.check(faults);
        }
        let (mut names, mut ids) = (HashSet::new(), HashSet::new());
        for source in self.sources.iter().flatten() {
            if let Some(id) = source.source_id.filter(|id| !ids.insert(*id)) {
                faults.push(format!("sources: {id} occurs twice"));
            }
            if !names.insert(source.name.as_str()) {
                faults.push(format!("sources: {} occurs twice", quoted(&source.name)));
            }
            source.check(faults);
        }
    }
}

impl CallbackSpec {
    /// Its errors, one sentence each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.check(&mut faults);
        faults
    }

    /// The URLs that are requested for it: the callback's own, and that of its token endpoint.
    pub fn urls(&self) -> impl Iterator<Item = (RequestedUrl, &str)> {
        let token_url = match &self.auth {
            Some(CallbackAuth::Oauth2(client)) => Some((RequestedUrl::TokenEndpoint, client.token_url.as_str())),
            _ => None,
        };
        std::iter::once((RequestedUrl::Callback, self.url.as_str())).chain(token_url)
    }

    fn check(&self, faults: &mut Vec<String>) {
        let mut fault = |text: String| faults.push(format!("callback {}: {text}", quoted(&self.name)));
        match parse_url(&self.url) {
            Ok(_) => {}
            // The URL contains a secret.
            Err(e @ UrlFault::UserInfo) => fault(format!("url {e}")),
            Err(e) => fault(format!("url {} {e}", quoted(&self.url))),
        }
        if !(1..=30).contains(&self.timeout_seconds) {
            fault("timeoutSeconds must be 1 to 30".into());
        }
        if !(1..=1000).contains(&self.max_in_flight) {
            fault("maxInFlight must be 1 to 1000".into());
        }
        if self.max_per_second.is_some_and(|rate| !(1..=10_000).contains(&rate)) {
            fault("maxPerSecond must be 1 to 10000; omit it for no limit".into());
        }
        if let Some(secrets) = &self.secrets {
            if secrets.is_empty() {
                fault("secrets: must not be empty; omit it to have one generated".into());
            } else if let Some(excess) = check_count("secrets", secrets.len(), MAX_ACTIVE_SECRETS) {
                fault(excess);
            } else if secrets.iter().any(|secret| signing_key(secret).is_none()) {
                fault("secrets: each must be whsec_ and the base64 of 24 to 64 bytes".into());
            }
        }
        super::filter::faults(&self.filter).into_iter().for_each(&mut fault);
        super::auth::faults(self.auth.as_ref(), &self.headers).into_iter().for_each(&mut fault);
        let certificate = self.client_certificate.as_ref().map(|certificate| certificate.faults(&self.url));
        certificate.into_iter().flatten().for_each(fault);
        check_name("callbacks: a name", &self.name, faults);
    }
}

const fn default_call_timeout_seconds() -> u32 {
    DEFAULT_CALL_TIMEOUT_SECONDS
}

fn check_count(what: &str, count: usize, max: usize) -> Option<String> {
    (count > max).then(|| format!("{what}: {count} are given, and at most {max} are allowed"))
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
    fn a_valid_spec_has_no_faults() {
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
    fn every_fault_is_listed() {
        let spec = spec(
            r#"{"projectId":"010101010101010101010101","name":" ","states":[{"name":"new","kind":"initial"},
            {"name":"new","kind":"initial"}],"transitions":{"new":["gone"]},"callTimeoutSeconds":0,"callbacks":[
            {"name":"a","url":"ftp://x","timeoutSeconds":31,"maxInFlight":0,"maxPerSecond":0,"secrets":["whsec_AAAA"],
             "auth":{"type":"header","name":"Webhook-Id","value":""}},
            {"name":"a","url":"http:///x","secrets":[],"auth":{"type":"bearer","token":"a\nb"}}]}"#,
        );
        insta::assert_snapshot!(spec.faults().join("\n"), @r#"
        name must have 1 to 255 characters and no control characters
        callTimeoutSeconds: must be at least 1
        states: "new" occurs twice
        states: only one can be initial
        transitions: "gone" is not among the states
        callback "a": url "ftp://x" is not an http or https URL
        callback "a": timeoutSeconds must be 1 to 30
        callback "a": maxInFlight must be 1 to 1000
        callback "a": maxPerSecond must be 1 to 10000; omit it for no limit
        callback "a": secrets: each must be whsec_ and the base64 of 24 to 64 bytes
        callback "a": auth.name "Webhook-Id" is a header that webhooks set themselves
        callbacks: "a" occurs twice
        callback "a": url "http:///x" has no host
        callback "a": secrets: must not be empty; omit it to have one generated
        callback "a": auth.token must be visible ASCII characters
        "#);
    }

    #[test]
    fn a_value_beyond_a_bound_is_refused_with_the_bound() {
        fn faults(change: impl FnOnce(&mut ProcessSpec)) -> String {
            let mut spec = spec(
                r#"{"projectId":"010101010101010101010101","name":"p","states":[{"name":"new"}],
                    "callbacks":[{"name":"crm","url":"https://crm.example"}]}"#,
            );
            assert_eq!(spec.faults(), Vec::<String>::new());
            change(&mut spec);
            spec.faults().join("; ")
        }
        let state = |name: String| State { name, kind: StateKind::Active, takes_disposition: None };
        let secret = || crate::process::new_signing_secret([7; 32]);
        let bearer = |length| Some(CallbackAuth::Bearer { token: "x".repeat(length).as_str().into() });

        for (found, expected) in [
            (faults(|p| p.states = (0..200).map(|n| state(format!("s{n}"))).collect()), ""),
            (
                faults(|p| p.states = (0..201).map(|n| state(format!("s{n}"))).collect()),
                "states: 201 are given, and at most 200 are allowed",
            ),
            (
                faults(|p| {
                    p.transitions = Some([("new".to_owned(), (0..5001).map(|n| n.to_string()).collect())].into());
                }),
                "transitions: 5001 are given, and at most 5000 are allowed",
            ),
            (
                faults(|p| p.callbacks = vec![p.callbacks[0].clone(); 101]),
                "callbacks: 101 are given, and at most 100 are allowed",
            ),
            (faults(|p| p.callbacks[0].secrets = Some((0..5).map(|_| secret()).collect())), ""),
            (
                faults(|p| p.callbacks[0].secrets = Some((0..6).map(|_| secret()).collect())),
                r#"callback "crm": secrets: 6 are given, and at most 5 are allowed"#,
            ),
            (faults(|p| p.callbacks[0].auth = bearer(4096)), ""),
            (
                faults(|p| p.callbacks[0].auth = bearer(4097)),
                r#"callback "crm": auth.token has 4097 bytes, and at most 4096 are allowed"#,
            ),
            (faults(|p| p.name = "ä".repeat(255)), ""),
            (faults(|p| p.name = "ä".repeat(256)), "name must have 1 to 255 characters and no control characters"),
            (
                faults(|p| p.callbacks[0].url = format!("https://crm.example/{}", "x".repeat(2029))),
                &format!(
                    r#"callback "crm": url "https://crm.example/{}"… has 2049 bytes, and at most 2048 are allowed"#,
                    "x".repeat(80)
                ),
            ),
            (
                faults(|p| p.callbacks[0].url = "https://u:secret@crm.example".into()),
                r#"callback "crm": url contains a user or password, which is visible wherever the URL is shown: use auth instead"#,
            ),
        ] {
            assert_eq!(found, expected);
        }
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
        #[test]
        fn specs_without_faults_have_valid_secrets_and_urls(
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
