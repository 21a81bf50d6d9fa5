//! 1 Accept: the bodies that configure processes and callbacks.

use std::borrow::Cow;

use contract::{
    fields::BodyError,
    json::{Members, redacted_error},
    key::ApiKey,
    process::{CallbackSpec, ProcessSpec, SourceSpec},
    rpc::{ErrorCode, RpcError},
    subject::NO_PROCESS,
    text::join_faults,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::{RawValue, to_raw_value};

use crate::{
    error::ApiError,
    request::{FromBody, fields::Fields, path::ProcessPath},
};

/// A process as a body configures it.
#[derive(Debug)]
pub(crate) struct ProcessBody {
    pub(crate) spec: ProcessSpec,
    /// Whether the callbacks stay as they are.
    pub(crate) keep_callbacks: bool,
}

/// Parses a process. Unknown fields are refused: ignoring a misspelt rule would apply another rule. Fields of responses
/// that cannot be set are accepted and ignored.
pub(crate) fn parse(body: &[u8], key: &ApiKey, process: Option<ProcessPath>) -> Result<ProcessBody, ApiError> {
    let mut fields = Fields::from_json(body)?;
    if fields.id("projectId")?.is_some_and(|project_id| project_id != key.project_id) {
        return Err(BodyError::ProjectMismatch.into());
    }
    if let Some(process_id) = fields.id("processId")? {
        match process {
            None => return Err(ApiError::field("processId", "must be absent: a new process gets an id")),
            Some(ProcessPath(own)) if own != Some(process_id) => {
                return Err(ApiError::field("processId", "is not the process of the path"));
            }
            Some(_) => {}
        }
    }
    fields.take("version");
    let mut members = without_null(fields.rest());
    let keep_callbacks = !members.contains_key("callbacks");
    if let Some(callbacks) = members.get_mut("callbacks")
        && let Ok(each) = serde_json::from_str::<Vec<Members<'_>>>(callbacks.get())
    {
        *callbacks = raw(&each.into_iter().map(settable).collect::<Vec<_>>())?;
    }
    if let Some(sources) = members.get_mut("sources")
        && let Ok(each) = serde_json::from_str::<Vec<Members<'_>>>(sources.get())
    {
        *sources = raw(&each.into_iter().map(settable).collect::<Vec<_>>())?;
    }
    members.insert("projectId".into(), raw(&key.project_id)?);
    if matches!(process, Some(ProcessPath(None))) && !members.contains_key("name") {
        members.insert("name".into(), raw(&NO_PROCESS)?);
    }
    let spec: ProcessSpec = typed("a process", &members)?;
    refuse(spec.faults())?;
    Ok(ProcessBody { spec, keep_callbacks })
}

/// A callback as a body configures it.
impl FromBody for CallbackSpec {
    fn from_body(body: &[u8], _: &ApiKey) -> Result<Self, ApiError> {
        let members = settable(Fields::from_json(body)?.rest());
        let spec: CallbackSpec = typed("a callback", &members)?;
        refuse(spec.faults())?;
        Ok(spec)
    }
}

/// A source as a body configures it.
impl FromBody for SourceSpec {
    fn from_body(body: &[u8], _: &ApiKey) -> Result<Self, ApiError> {
        let members = settable(Fields::from_json(body)?.rest());
        let spec: SourceSpec = typed("a source", &members)?;
        refuse(spec.faults())?;
        Ok(spec)
    }
}

/// Null counts as absent.
fn without_null(mut members: Members<'_>) -> Members<'_> {
    members.retain(|_, value| value.get() != "null");
    members
}

/// The members of a callback or source that can be set.
fn settable(members: Members<'_>) -> Members<'_> {
    let mut members = without_null(members);
    members.shift_remove("retiringSecrets");
    members.shift_remove("health");
    members.shift_remove("ingestPath");
    members
}

fn raw(value: &impl Serialize) -> Result<Cow<'static, RawValue>, ApiError> {
    to_raw_value(value).map(Cow::Owned).map_err(|_| ApiError::Internal)
}

/// Deserializes members. The error does not quote the value, which may be a secret.
fn typed<T: DeserializeOwned>(what: &str, members: &Members<'_>) -> Result<T, ApiError> {
    let text = serde_json::to_string(members).map_err(|_| ApiError::Internal)?;
    serde_json::from_str(&text).map_err(|e| {
        let fault = redacted_error(&e);
        let fault = fault.split(" at line ").next().unwrap_or_default();
        invalid(&format!("The body does not describe {what}: {fault}"))
    })
}

fn refuse(faults: Vec<String>) -> Result<(), ApiError> {
    if faults.is_empty() { Ok(()) } else { Err(invalid(&join_faults(&faults))) }
}

fn invalid(message: &str) -> ApiError {
    ApiError::Query(RpcError::new(ErrorCode::InvalidProcess, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn processes_are_parsed_strictly() {
        let id = "696102a4b8c1d2e3f4a5b6c7";
        let new = None;
        let own = Some(ProcessPath(Some(id.parse().unwrap())));
        let fallback = Some(ProcessPath(None));
        let parsed = [
            (new, r#"{"name":"p","states":[{"name":"new"}]}"#),
            (new, r#"{"projectId":"OURS","name":"p","transitions":null,"states":[{"name":"new"}],"callbacks":[]}"#),
            (new, r#"{"processId":"ID","name":"p","states":[{"name":"new"}]}"#),
            (new, r#"{"projectId":"ID","name":"p","states":[{"name":"new"}]}"#),
            (new, r#"{"name":"p"}"#),
            (new, r#"{"name":"p","states":[{"name":"new"}],"transition":{}}"#),
            (new, r#"{"name":"p","states":[{"name":"new","kind":"final"}]}"#),
            (new, r#"{"name":"p","states":"new"}"#),
            (new, "[]"),
            (own, r#"{"processId":"ID","projectId":"OURS","version":7,"name":"p","states":[{"name":"new"}],"callbacks":[{"callbackId":"ID","name":"crm","url":"https://crm.example","auth":{"type":"bearer"},"maxPerSecond":null,"retiringSecrets":[{"until":"2026-01-12T04:55:59Z"}]}]}"#),
            (own, r#"{"processId":"OURS","name":"p","states":[{"name":"new"}]}"#),
            (own, r#"{"name":"p","states":[{"name":"new"}],"callbacks":[{"name":"crm","url":"crm.example","secret":"s"}]}"#),
            (own, r#"{"name":"p","states":[{"name":"new"}],"callbacks":[{"name":"crm","url":"crm.example","secrets":["whsec_x"]}]}"#),
            (fallback, "{}"),
            (fallback, r#"{"processId":null,"name":"_","states":[{"name":"new"}]}"#),
        ]
        .map(|(process, body)| {
            let real = body.replace("OURS", &PROJECT.to_string()).replace("ID", id);
            let result = match parse(real.as_bytes(), &key(), process) {
                Ok(ProcessBody { spec, keep_callbacks }) => {
                    format!("{} keep={keep_callbacks}", serde_json::to_string(&spec).unwrap())
                }
                Err(e) => format!("{} {}: {e}", e.status().as_u16(), e.code()),
            };
            format!("{body}\n    {}", result.replace(id, "ID").replace(&PROJECT.to_string(), "OURS"))
        });
        insta::assert_snapshot!(parsed.join("\n"), @r##"
        {"name":"p","states":[{"name":"new"}]}
            {"projectId":"OURS","name":"p","states":[{"name":"new","kind":"active"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[]} keep=true
        {"projectId":"OURS","name":"p","transitions":null,"states":[{"name":"new"}],"callbacks":[]}
            {"projectId":"OURS","name":"p","states":[{"name":"new","kind":"active"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[]} keep=false
        {"processId":"ID","name":"p","states":[{"name":"new"}]}
            400 invalid_field: processId must be absent: a new process gets an id
        {"projectId":"ID","name":"p","states":[{"name":"new"}]}
            403 project_mismatch: projectId does not match authenticated project
        {"name":"p"}
            400 invalid_process: states: a process needs at least one state
        {"name":"p","states":[{"name":"new"}],"transition":{}}
            400 invalid_process: The body does not describe a process: unknown field `transition`, expected one of `projectId`, `name`, `states`, `transitions`, `metadataMerge`, `allowLeavingTerminal`, `callTimeoutSeconds`, `duringCall`, `callbacks`, `sources`
        {"name":"p","states":[{"name":"new","kind":"final"}]}
            400 invalid_process: The body does not describe a process: unknown variant, expected one of `initial`, `active`, `terminal`
        {"name":"p","states":"new"}
            400 invalid_process: The body does not describe a process: invalid type: string, expected a sequence
        []
            400 not_an_object: The body must be a JSON object
        {"processId":"ID","projectId":"OURS","version":7,"name":"p","states":[{"name":"new"}],"callbacks":[{"callbackId":"ID","name":"crm","url":"https://crm.example","auth":{"type":"bearer"},"maxPerSecond":null,"retiringSecrets":[{"until":"2026-01-12T04:55:59Z"}]}]}
            {"projectId":"OURS","name":"p","states":[{"name":"new","kind":"active"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[{"callbackId":"ID","name":"crm","url":"https://crm.example","auth":{"type":"bearer"},"enabled":true,"timeoutSeconds":15,"maxInFlight":64}]} keep=false
        {"processId":"OURS","name":"p","states":[{"name":"new"}]}
            400 invalid_field: processId is not the process of the path
        {"name":"p","states":[{"name":"new"}],"callbacks":[{"name":"crm","url":"crm.example","secret":"s"}]}
            400 invalid_process: The body does not describe a process: unknown field `secret`, expected one of `callbackId`, `name`, `url`, `auth`, `headers`, `clientCertificate`, `secrets`, `events`, `filter`, `enabled`, `timeoutSeconds`, `maxInFlight`, `maxPerSecond`, `ordering`
        {"name":"p","states":[{"name":"new"}],"callbacks":[{"name":"crm","url":"crm.example","secrets":["whsec_x"]}]}
            400 invalid_process: callback "crm": url "crm.example" is not an http or https URL; callback "crm": secrets: each must be whsec_ and the base64 of 24 to 64 bytes
        {}
            {"projectId":"OURS","name":"_","states":[],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[]} keep=true
        {"processId":null,"name":"_","states":[{"name":"new"}]}
            400 invalid_process: the process "_" stands for the project's fallback callbacks: it has no states
        "##);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>, text in "[a-z]{0,3}") {
            let _ = parse(&body, &key(), None);
            let _ = CallbackSpec::from_body(&body, &key());
            let near = format!(r#"{{"name":"{text}","callbacks":[{{"name":"{text}","auth":{{"type":"{text}"}}}}]}}"#);
            let _ = parse(near.as_bytes(), &key(), Some(ProcessPath(None)));
        }
    }
}
