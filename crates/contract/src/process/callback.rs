//! Callbacks as they are stored, and their secrets.

use std::collections::BTreeSet;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{AuthHeader, CallbackAuth, ClientCertificate, EventValues, FilterCondition};
use crate::{
    ObjectId, Timestamp,
    event_kind::{DeliveryKind, EventKind},
    secret::{Secret, SecretField},
};

/// A URL that outcomes are delivered to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Callback {
    /// Its id, assigned when the callback is created.
    pub callback_id: ObjectId,
    /// Its name, unique in the process.
    pub name: String,
    /// The URL that receives the POST requests.
    pub url: String,
    /// How to authenticate to the endpoint, in addition to the signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<CallbackAuth>,
    /// Extra headers that authenticate to the endpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<AuthHeader>,
    /// The certificate that the client presents to the endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate: Option<ClientCertificate>,
    /// Signing secrets, `whsec_` and base64, sealed. Each of them signs every delivery. Empty where secrets are not
    /// shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Secret>,
    /// Signing secrets that a rotation replaced. Each still signs until its `until`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retiring_secrets: Vec<RetiringSecret>,
    /// The events that the callback receives; absent means the outcomes of updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<BTreeSet<EventKind>>,
    /// Conditions, all of which an event must satisfy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filter: Vec<FilterCondition>,
    /// Whether its deliveries are sent. Otherwise they are recorded and wait.
    #[serde(default = "default_true")]
    pub enabled: bool,
    /// How long an attempt may take as a whole, in seconds.
    #[serde(default = "default_timeout_seconds")]
    pub timeout_seconds: u32,
    /// How many attempts may run at once per notifier.
    #[serde(default = "default_max_in_flight")]
    pub max_in_flight: u32,
    /// How many attempts may begin per second and notifier; absent means no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_second: Option<u32>,
    /// The order of the callback's deliveries.
    #[serde(default, skip_serializing_if = "Ordering::is_none")]
    pub ordering: Ordering,
}

/// The order of a callback's deliveries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Ordering {
    /// Each delivery is sent as soon as possible.
    #[default]
    None,
    /// A delivery waits until the lead's previous one is delivered or exhausted. Other leads do not wait.
    Lead,
}

impl Ordering {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
    pub(super) fn is_none(&self) -> bool {
        *self == Self::None
    }
}

pub(super) const fn default_true() -> bool {
    true
}

pub(super) const fn default_timeout_seconds() -> u32 {
    15
}

pub(super) const fn default_max_in_flight() -> u32 {
    64
}

impl Callback {
    /// The kinds of deliveries that the callback gets for a completion event, in the order of delivery.
    pub fn deliveries(&self, event: &EventValues<'_>) -> impl Iterator<Item = DeliveryKind> {
        let named = self.events.as_ref();
        let defaults = if named.is_none() { &EventKind::DEFAULT[..] } else { &[] };
        let subscribed = named.into_iter().flatten().chain(defaults);
        // The filter is evaluated at most once per event, and only if the callback names one of the event's kinds.
        let mut passes = None;
        let mut passes =
            move || *passes.get_or_insert_with(|| self.filter.iter().all(|condition| condition.holds(event)));
        subscribed.filter(move |kind| kind.occurred(event.event()) && passes()).map(|kind| kind.delivery())
    }

    /// Whether it names this event in its `events`.
    pub fn names(&self, event: EventKind) -> bool {
        self.events.as_ref().is_some_and(|events| events.contains(&event))
    }

    /// The secrets that sign at this time, newest first.
    pub fn signing_secrets(&self, now: Timestamp) -> impl Iterator<Item = &Secret> {
        let retiring = self.retiring_secrets.iter().filter(move |retiring| now < retiring.until);
        self.secrets.iter().chain(retiring.map(|retiring| &retiring.secret))
    }

    /// All of its secrets, as stored.
    pub fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let retiring = self.retiring_secrets.iter().map(|retiring| &retiring.secret);
        let headers = self.headers.iter().map(|header| &header.value);
        let key = self.client_certificate.as_ref().map(|certificate| &certificate.key);
        let auth = self.auth.as_ref().map(CallbackAuth::secret);
        self.secrets.iter().chain(retiring).chain(auth).chain(headers).chain(key)
    }

    /// A copy of the callback in which `change` has sealed or opened each secret.
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
        let mut headers = self.headers.clone();
        for header in &mut headers {
            header.value = change(SecretField::Header, &header.value)?;
        }
        let mut client_certificate = self.client_certificate.clone();
        if let Some(certificate) = &mut client_certificate {
            certificate.key = change(SecretField::ClientKey, &certificate.key)?;
        }
        Ok(Self { secrets, retiring_secrets, auth, headers, client_certificate, ..self.clone() })
    }
}

/// A signing secret that was replaced and is still valid for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct RetiringSecret {
    /// The secret. Empty where secrets are not shown.
    #[serde(default, skip_serializing_if = "Secret::is_empty")]
    pub secret: Secret,
    /// When it stops signing.
    pub until: Timestamp,
}

/// How long a replaced secret stays valid by default, in seconds.
pub const DEFAULT_OVERLAP_SECONDS: u32 = 24 * 60 * 60;
/// The longest that a replaced secret may stay valid, in seconds.
pub const MAX_OVERLAP_SECONDS: u32 = 7 * 24 * 60 * 60;

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
