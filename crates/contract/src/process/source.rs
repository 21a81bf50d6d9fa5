//! Sources of call reports: voice platforms whose webhooks the gateway accepts, and their secrets.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{MAX_ACTIVE_SECRETS, MAX_AUTH_BYTES, limits::check_name};
use crate::{
    ObjectId,
    named::named,
    secret::{Secret, SecretField},
    subject::NO_PROCESS,
    text::quoted,
};

/// The shortest secret of a source, in bytes: a shorter one can be guessed.
pub const MIN_SOURCE_SECRET_BYTES: usize = 16;

named! {
    /// A voice platform.
    Platform, InvalidPlatform,
    /// <https://docs.vapi.ai/server-url/events>.
    Vapi = "vapi",
    /// <https://docs.retellai.com/features/webhook-overview>.
    Retell = "retell",
    /// <https://docs.bland.ai/tutorials/post-call-webhooks>.
    Bland = "bland",
}

/// A voice platform that reports calls to `POST /api/v1/calls/ingest/{platform}/{ingestId}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Its id, assigned when the source is created.
    pub source_id: ObjectId,
    /// Its name, unique in the process.
    pub name: String,
    /// The platform.
    pub platform: Platform,
    /// The secrets that authenticate its reports, sealed. A report needs one of them. Empty where secrets are not
    /// shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Secret>,
    /// Whether its reports are accepted.
    #[serde(default = "super::callback::default_true")]
    pub enabled: bool,
}

impl Source {
    /// A copy of the source in which `change` has sealed or opened each secret.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn with_secrets<E>(
        &self,
        mut change: impl FnMut(SecretField, &Secret) -> Result<Secret, E>,
    ) -> Result<Self, E> {
        let secrets =
            self.secrets.iter().map(|secret| change(SecretField::Source, secret)).collect::<Result<_, E>>()?;
        Ok(Self { secrets, ..self.clone() })
    }
}

/// A source as an operator writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SourceSpec {
    /// The source to replace. Absent: the source with this name, or a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_id: Option<ObjectId>,
    /// Its name, unique in the process, which identifies it.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = super::MAX_NAME_CHARS)))]
    pub name: String,
    /// The platform.
    pub platform: Platform,
    /// The secrets that authenticate its reports, as the platform has them. A report needs one of them. Absent: the
    /// current ones stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_ACTIVE_SECRETS)))]
    pub secrets: Option<Vec<Secret>>,
    /// Whether its reports are accepted.
    #[serde(default = "super::callback::default_true")]
    pub enabled: bool,
}

impl SourceSpec {
    /// Its errors, one sentence each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.check(&mut faults);
        faults
    }

    pub(super) fn check(&self, faults: &mut Vec<String>) {
        let mut fault = |text: String| faults.push(format!("source {}: {text}", quoted(&self.name)));
        for secret in self.secrets.iter().flatten() {
            let bytes = secret.expose().len();
            if secret.is_sealed() {
                fault(
                    "secrets: each must be in clear; a sealed one opens only in the source it was copied from".into(),
                );
            } else if !(MIN_SOURCE_SECRET_BYTES..=MAX_AUTH_BYTES).contains(&bytes)
                || !secret.expose().bytes().all(|b| b.is_ascii_graphic())
            {
                fault(format!(
                    "secrets: each must be {MIN_SOURCE_SECRET_BYTES} to {MAX_AUTH_BYTES} visible ASCII characters"
                ));
            }
        }
        match self.secrets.as_ref().map(Vec::len) {
            Some(0) => fault("secrets: must not be empty; omit it to keep the current ones".into()),
            Some(count) if count > MAX_ACTIVE_SECRETS => {
                fault(format!("secrets: {count} are given, and at most {MAX_ACTIVE_SECRETS} are allowed"));
            }
            _ => {}
        }
        check_name("sources: a name", &self.name, faults);
    }
}

/// The address of a source: `{projectId}-{processId}-{sourceId}`, with `_` for the fallback process. It names all
/// three, so that the gateway needs no index of sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IngestId {
    /// The project.
    pub project_id: ObjectId,
    /// The process; none for `_`.
    pub process_id: Option<ObjectId>,
    /// The source.
    pub source_id: ObjectId,
}

impl IngestId {
    /// The path that the platform's webhooks are sent to.
    pub fn path(&self, platform: Platform) -> String {
        format!("/api/v1/calls/ingest/{platform}/{self}")
    }
}

impl fmt::Display for IngestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process_id {
            Some(process_id) => write!(f, "{}-{process_id}-{}", self.project_id, self.source_id),
            None => write!(f, "{}-{NO_PROCESS}-{}", self.project_id, self.source_id),
        }
    }
}

/// The text is not an [`IngestId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be {{projectId}}-{{processId}}-{{sourceId}}")]
pub struct InvalidIngestId;

impl FromStr for IngestId {
    type Err = InvalidIngestId;

    fn from_str(text: &str) -> Result<Self, InvalidIngestId> {
        let mut parts = text.split('-');
        let (Some(project), Some(process), Some(source), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidIngestId);
        };
        let id = |text: &str| text.parse().map_err(|_| InvalidIngestId);
        let process_id = if process == NO_PROCESS { None } else { Some(id(process)?) };
        Ok(Self { project_id: id(project)?, process_id, source_id: id(source)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ingest_id_names_project_process_and_source() {
        let [project_id, process_id, source_id] = [1, 2, 3].map(|byte| ObjectId::from_bytes([byte; 12]));
        for id in [
            IngestId { project_id, process_id: Some(process_id), source_id },
            IngestId { project_id, process_id: None, source_id },
        ] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        let path = IngestId { project_id, process_id: None, source_id }.path(Platform::Vapi);
        assert_eq!(path, "/api/v1/calls/ingest/vapi/010101010101010101010101-_-030303030303030303030303");
        let id = "010101010101010101010101";
        for odd in ["", id, &format!("{id}-{id}"), &format!("{id}-{id}-x"), &format!("{id}-_-{id}-{id}")] {
            assert_eq!(odd.parse::<IngestId>(), Err(InvalidIngestId), "{odd}");
        }
    }

    #[test]
    fn every_fault_of_a_source_is_listed() {
        let faults = |text: &str| serde_json::from_str::<SourceSpec>(text).unwrap().faults().join("\n");
        let valid = r#"{"name":"dialer","platform":"vapi","secrets":["0123456789abcdef"]}"#;
        assert_eq!(faults(valid), "");
        assert_eq!(faults(r#"{"name":"dialer","platform":"retell"}"#), "");
        let odd =
            r#"{"name":" ","platform":"bland","secrets":["short","sealed:v1:d3efba69:AAAA","a b c d e f g h i j"]}"#;
        insta::assert_snapshot!(faults(odd), @r#"
        source " ": secrets: each must be 16 to 4096 visible ASCII characters
        source " ": secrets: each must be in clear; a sealed one opens only in the source it was copied from
        source " ": secrets: each must be 16 to 4096 visible ASCII characters
        sources: a name must have 1 to 255 characters and no control characters
        "#);
        let none = r#"{"name":"dialer","platform":"bland","secrets":[]}"#;
        assert!(faults(none).contains("must not be empty"));
        assert!("twilio".parse::<Platform>().is_err());
    }
}
