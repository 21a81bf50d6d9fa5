//! 1 Accept: `/api/v1/processes…`: how processes are configured; lead-state knows and changes it.

use std::{borrow::Cow, str::FromStr, sync::Arc};

use axum::{
    extract::Request,
    http::{HeaderMap, StatusCode, header::ETAG},
    response::Response,
};
use contract::{
    ObjectId,
    json::{Members, redacted_error},
    key::ApiKey,
    process::{Callback, CallbackSpec, Process, ProcessSpec, RetiringSecret, Rules},
    rpc::{
        self, ChangeProcess, CheckUrls, GetProcess, ListProcesses, Page, ProcessChange, ProcessChangeResult,
        ProcessSelector, RpcError, UrlCheck,
    },
    subject::NO_PROCESS,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::value::{RawValue, to_raw_value};

use crate::{
    body,
    error::ApiError,
    fields::Fields,
    if_match::{etag, expected_version},
    routes::{Answer, deliveries::Found, json, list},
    server::App,
};

/// How a path names a process: by its id, or `_` for the project's fallback callbacks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Named(pub(crate) Option<ObjectId>);

impl FromStr for Named {
    type Err = contract::id::InvalidObjectId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == NO_PROCESS { Ok(Self(None)) } else { text.parse().map(|id| Self(Some(id))) }
    }
}

impl Named {
    /// The process that a request's path names.
    pub(crate) async fn of(request: &mut Request) -> Result<Self, ApiError> {
        list::path(request, "processId", "must be 24 hex digits, or _ for the fallback callbacks").await
    }

    pub(crate) fn which(self) -> ProcessSelector {
        self.0.map_or_else(|| ProcessSelector::Named(NO_PROCESS.into()), ProcessSelector::Id)
    }
}

/// A process without its secrets. Its `version` is what `ETag` tells.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "ConfiguredProcess"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct ProcessView<'a> {
    process_id: Option<ObjectId>,
    project_id: ObjectId,
    version: i64,
    name: &'a str,
    #[serde(flatten)]
    rules: &'a Rules,
    callbacks: Vec<CallbackView>,
}

impl<'a> From<&'a Process> for ProcessView<'a> {
    fn from(process: &'a Process) -> Self {
        Self {
            process_id: process.process_id,
            project_id: process.project_id,
            version: process.revision,
            name: &process.name,
            rules: &process.rules,
            callbacks: process.callbacks.iter().map(CallbackView::from).collect(),
        }
    }
}

/// A callback without its secrets, but for those that were made just now.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "ConfiguredCallback"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct CallbackView {
    #[serde(flatten)]
    callback: Callback,
    /// When those that a rotation replaced are used no more.
    retiring_secrets: Vec<RetiringView>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "SecretRetires"))]
struct RetiringView {
    until: String,
}

impl From<&Callback> for CallbackView {
    fn from(callback: &Callback) -> Self {
        let mut callback = callback.clone();
        let retiring = std::mem::take(&mut callback.retiring_secrets);
        let until = |retiring: RetiringSecret| RetiringView { until: retiring.until.to_iso() };
        Self { callback, retiring_secrets: retiring.into_iter().map(until).collect() }
    }
}

/// What became of a change.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "{T}Changed"))]
pub(crate) struct Changed<'a, T> {
    success: bool,
    data: T,
    changed: bool,
    changes: &'a [String],
}

/// An answer with the version of the process that it is about.
pub(crate) fn versioned(process: &Process, body: &impl Serialize) -> Response {
    let mut response = json(StatusCode::OK, body);
    if let Some(etag) = etag(process.revision) {
        response.headers_mut().insert(ETAG, etag);
    }
    response
}

/// The answer to a change: what it is about now, and what is different.
pub(crate) fn changed<T: Serialize>(applied: &ProcessChangeResult, data: T) -> Response {
    let ProcessChangeResult { process, changed, changes, .. } = applied;
    versioned(process, &Changed { success: true, data, changed: *changed, changes })
}

/// Answers with a page of the project's processes.
pub(crate) async fn list(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    let mut fields = Fields::from_query(request.uri().query().unwrap_or_default())?;
    let (cursor, limit) = list::page(&mut fields)?;
    fields.ignore_rest("as unknown");
    let wanted = ListProcesses { project_id: key.project_id, cursor, limit };
    let page: Page<Process> = service_kit::rpc::query(&app.broker()?.client, rpc::PROCESS_LIST, &wanted).await?;
    Ok(list::Listed::new(&page, ProcessView::from, &fields.warnings).answer())
}

/// Answers with a process.
pub(crate) async fn get(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let process = read(&app, &key, Named::of(&mut request).await?).await?;
    Ok(versioned(&process, &Found::new(ProcessView::from(&process))))
}

/// A process as it stands.
pub(crate) async fn read(app: &App, key: &ApiKey, named: Named) -> Result<Process, ApiError> {
    let wanted = GetProcess { project_id: key.project_id, process: named.which() };
    Ok(service_kit::rpc::query(&app.broker()?.client, rpc::PROCESS_GET, &wanted).await?)
}

/// Makes a process.
pub(crate) async fn create(app: Arc<App>, key: Arc<ApiKey>, request: Request) -> Answer {
    make(&app, &key, None, request).await
}

/// Makes a process what the body says.
pub(crate) async fn put(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let named = Named::of(&mut request).await?;
    make(&app, &key, Some(named), request).await
}

async fn make(app: &App, key: &ApiKey, named: Option<Named>, request: Request) -> Answer {
    let expected = expected(request.headers())?;
    let body = body::read(request, app.max_body_bytes).await?;
    let (spec, keep_callbacks) = parse(&body, key, named)?;
    check_urls(app, &spec.callbacks).await?;
    let which = named.map_or(ProcessSelector::New, Named::which);
    let applied = change(app, key, which, expected, ProcessChange::Put { spec, keep_callbacks }).await?;
    Ok(changed(&applied, ProcessView::from(&applied.process)))
}

/// The version of the process that a request wants to meet.
pub(crate) fn expected(headers: &HeaderMap) -> Result<Option<i64>, ApiError> {
    Ok(expected_version(headers)?.map(i64::from))
}

/// Has a change made, all of it or nothing.
pub(crate) async fn change(
    app: &App,
    key: &ApiKey,
    process: ProcessSelector,
    expected_revision: Option<i64>,
    change: ProcessChange,
) -> Result<ProcessChangeResult, ApiError> {
    let change = ChangeProcess { project_id: key.project_id, process, change, expected_revision, dry_run: false };
    Ok(service_kit::rpc::call(&app.broker()?.client, rpc::PROCESS_CHANGE, &change).await?)
}

/// Refuses URLs that would not be called: the webhook-notifier, which calls them, knows.
pub(crate) async fn check_urls(app: &App, callbacks: &[CallbackSpec]) -> Result<(), ApiError> {
    let client = &app.broker()?.client;
    if callbacks.is_empty() {
        return Ok(());
    }
    let urls = CheckUrls { urls: callbacks.iter().map(|callback| callback.url.clone()).collect() };
    let checks: Vec<UrlCheck> = service_kit::rpc::query(client, rpc::CALLBACK_CHECK, &urls).await?;
    let refused = callbacks.iter().zip(checks).find_map(|(callback, check)| Some((&callback.name, check.refused?)));
    match refused {
        None => Ok(()),
        Some((name, why)) => Err(RpcError::new(400, "url_refused", format!("callback {name:?}: {why}")).into()),
    }
}

/// Reads a process, and whether its callbacks are to stay as they are. What is not known is refused: ignoring a misspelt
/// rule would be another rule. What is shown and cannot be set may be sent back.
fn parse(body: &[u8], key: &ApiKey, named: Option<Named>) -> Result<(ProcessSpec, bool), ApiError> {
    let mut fields = Fields::from_json(body)?;
    if fields.id("projectId")?.is_some_and(|project_id| project_id != key.project_id) {
        return Err(ApiError::OtherProject);
    }
    if let Some(process_id) = fields.id("processId")? {
        match named {
            None => return Err(ApiError::field("processId", "is given to a new process")),
            Some(Named(own)) if own != Some(process_id) => {
                return Err(ApiError::field("processId", "is not the process of the path"));
            }
            Some(_) => {}
        }
    }
    fields.take("version");
    let mut members = given(fields.rest());
    let keep_callbacks = !members.contains_key("callbacks");
    if let Some(callbacks) = members.get_mut("callbacks")
        && let Ok(each) = serde_json::from_str::<Vec<Members<'_>>>(callbacks.get())
    {
        *callbacks = raw(&each.into_iter().map(settable).collect::<Vec<_>>())?;
    }
    members.insert("projectId".into(), raw(&key.project_id)?);
    if matches!(named, Some(Named(None))) && !members.contains_key("name") {
        members.insert("name".into(), raw(&NO_PROCESS)?);
    }
    let spec: ProcessSpec = typed("a process", &members)?;
    refuse(spec.faults())?;
    Ok((spec, keep_callbacks))
}

/// Reads a callback.
pub(crate) fn parse_callback(body: &[u8]) -> Result<CallbackSpec, ApiError> {
    let members = settable(Fields::from_json(body)?.rest());
    let spec: CallbackSpec = typed("a callback", &members)?;
    refuse(spec.faults())?;
    Ok(spec)
}

/// Without what is null, which counts as absent.
fn given(mut members: Members<'_>) -> Members<'_> {
    members.retain(|_, value| value.get() != "null");
    members
}

/// What can be set of a callback.
fn settable(members: Members<'_>) -> Members<'_> {
    let mut members = given(members);
    members.shift_remove("retiringSecrets");
    members
}

fn raw(value: &impl Serialize) -> Result<Cow<'static, RawValue>, ApiError> {
    to_raw_value(value).map(Cow::Owned).map_err(|_| ApiError::Internal)
}

/// Members as what they describe. What is wrong is said without the value, which may be a secret.
fn typed<T: DeserializeOwned>(what: &str, members: &Members<'_>) -> Result<T, ApiError> {
    let text = serde_json::to_string(members).map_err(|_| ApiError::Internal)?;
    serde_json::from_str(&text).map_err(|e| {
        let fault = redacted_error(&e);
        let fault = fault.split(" at line ").next().unwrap_or_default();
        invalid(&format!("The body does not describe {what}: {fault}"))
    })
}

fn refuse(faults: Vec<String>) -> Result<(), ApiError> {
    if faults.is_empty() { Ok(()) } else { Err(invalid(&faults.join("; "))) }
}

fn invalid(message: &str) -> ApiError {
    RpcError::new(400, "invalid_process", message).into()
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;
    use crate::auth::tests::{PROJECT, key};

    #[test]
    fn what_is_asked() {
        let id = "696102a4b8c1d2e3f4a5b6c7";
        let new = None;
        let own = Some(Named(Some(id.parse().unwrap())));
        let fallback = Some(Named(None));
        let told = [
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
        .map(|(named, body)| {
            let real = body.replace("OURS", &PROJECT.to_string()).replace("ID", id);
            let told = match parse(real.as_bytes(), &key(), named) {
                Ok((spec, keep)) => format!("{} keep={keep}", serde_json::to_string(&spec).unwrap()),
                Err(e) => format!("{} {}: {e}", e.status().as_u16(), e.code()),
            };
            format!("{body}\n    {}", told.replace(id, "ID").replace(&PROJECT.to_string(), "OURS"))
        });
        insta::assert_snapshot!(told.join("\n"), @r##"
        {"name":"p","states":[{"name":"new"}]}
            {"projectId":"OURS","name":"p","states":[{"name":"new","kind":"active"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[]} keep=true
        {"projectId":"OURS","name":"p","transitions":null,"states":[{"name":"new"}],"callbacks":[]}
            {"projectId":"OURS","name":"p","states":[{"name":"new","kind":"active"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[]} keep=false
        {"processId":"ID","name":"p","states":[{"name":"new"}]}
            400 invalid_field: processId is given to a new process
        {"projectId":"ID","name":"p","states":[{"name":"new"}]}
            403 project_mismatch: projectId does not match authenticated project
        {"name":"p"}
            400 invalid_process: states: a process needs at least one state
        {"name":"p","states":[{"name":"new"}],"transition":{}}
            400 invalid_process: The body does not describe a process: unknown field `transition`, expected one of `projectId`, `name`, `states`, `transitions`, `metadataMerge`, `allowLeavingTerminal`, `callTimeoutSeconds`, `duringCall`, `callbacks`
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
            400 invalid_process: The body does not describe a process: unknown field `secret`, expected one of `callbackId`, `name`, `url`, `auth`, `secrets`, `events`, `enabled`, `timeoutSeconds`, `maxInFlight`, `maxPerSecond`, `ordering`
        {"name":"p","states":[{"name":"new"}],"callbacks":[{"name":"crm","url":"crm.example","secrets":["whsec_x"]}]}
            400 invalid_process: callback "crm": url "crm.example" is not an http or https URL; callback "crm": secrets: each must be whsec_ and the base64 of 24 to 64 bytes
        {}
            {"projectId":"OURS","name":"_","states":[],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[]} keep=true
        {"processId":null,"name":"_","states":[{"name":"new"}]}
            400 invalid_process: the process "_" stands for the project's fallback callbacks: it has no states
        "##);
    }

    #[test]
    fn a_process_as_it_is_shown() {
        let callback = r#"{"callbackId":"030303030303030303030303","name":"crm","url":"https://crm.example","auth":{"type":"bearer"},
            "retiringSecrets":[{"until":1768193759048}]}"#;
        let process: Process = serde_json::from_str(&format!(
            r#"{{"projectId":"{PROJECT}","processId":"020202020202020202020202","revision":7,"name":"p",
                 "states":[{{"name":"new","kind":"initial"}}],"callbacks":[{callback}]}}"#
        ))
        .unwrap();
        assert_eq!(process.callbacks[0].retiring_secrets[0].until, Timestamp::from_millis(1_768_193_759_048));
        insta::assert_snapshot!(serde_json::to_string(&ProcessView::from(&process)).unwrap(), @r#"{"processId":"020202020202020202020202","projectId":"111111111111111111111111","version":7,"name":"p","states":[{"name":"new","kind":"initial"}],"metadataMerge":"shallow","allowLeavingTerminal":false,"callTimeoutSeconds":7200,"callbacks":[{"callbackId":"030303030303030303030303","name":"crm","url":"https://crm.example","auth":{"type":"bearer"},"enabled":true,"timeoutSeconds":15,"maxInFlight":64,"retiringSecrets":[{"until":"2026-01-12T04:55:59.048Z"}]}]}"#);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body: Vec<u8>, text in "[a-z]{0,3}") {
            let _ = parse(&body, &key(), None);
            let _ = parse_callback(&body);
            let near = format!(r#"{{"name":"{text}","callbacks":[{{"name":"{text}","auth":{{"type":"{text}"}}}}]}}"#);
            let _ = parse(near.as_bytes(), &key(), Some(Named(None)));
            let _ = text.parse::<Named>();
        }
    }
}
