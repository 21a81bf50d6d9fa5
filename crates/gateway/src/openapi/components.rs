//! The components that operations share: parameters, headers, error responses, and the bodies that configure processes.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use contract::{
    process::{CallbackSpec, ProcessSpec, SourceSpec},
    schema::Side,
};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{id, schema};

/// The table of errors.
const ERRORS: &str = include_str!("../../../../docs/ERRORS.md");

const OBJECT_ID: &str = "^[0-9a-fA-F]{24}$";

/// Parameters of paths: name, description, pattern, example.
pub(super) const PATH_PARAMETERS: [(&str, &str, &str, &str); 10] = [
    ("leadId", "The lead", OBJECT_ID, "696102a4b8c1d2e3f4a5b6c7"),
    ("updateId", "The update", OBJECT_ID, "6b0426971c73026dafa27e40"),
    ("activityId", "The activity: the `updateId` of the end of its call", OBJECT_ID, "6b042697fb36c4d70216a36b"),
    (
        "deliveryId",
        "`{updateId}-{callbackId}`, and `-{kind}` if it does not report the outcome of an update",
        "^[0-9a-fA-F]{24}-[0-9a-fA-F]{24}(-[a-z_.]+)?$",
        "6b0426971c73026dafa27e40-696102a4b8c1d2e3f4a5b604",
    ),
    (
        "processId",
        "The process; `_` is the project's fallback callbacks",
        "^([0-9a-fA-F]{24}|_)$",
        "696102a4b8c1d2e3f4a5b602",
    ),
    ("callbackId", "The callback", OBJECT_ID, "696102a4b8c1d2e3f4a5b604"),
    ("sourceId", "The source", OBJECT_ID, "696102a4b8c1d2e3f4a5b605"),
    ("keyId", "The API key", OBJECT_ID, "696102a4b8c1d2e3f4a5b603"),
    ("platform", "The voice platform", "^(vapi|retell|bland)$", "vapi"),
    (
        "ingestId",
        "`{projectId}-{processId}-{sourceId}`, as in the source's `ingestPath`",
        "^[0-9a-fA-F]{24}-([0-9a-fA-F]{24}|_)-[0-9a-fA-F]{24}$",
        "696102a4b8c1d2e3f4a5b601-696102a4b8c1d2e3f4a5b602-696102a4b8c1d2e3f4a5b605",
    ),
];

/// The parameters in a path.
pub(super) fn path_parameters(path: &str) -> Vec<Value> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let parameter = |name| {
        let known = PATH_PARAMETERS.iter().find(|(known, ..)| *known == name);
        let (_, description, pattern, example) = known.unwrap_or_else(|| panic!("describe {{{name}}} here"));
        json!({
            "name": name, "in": "path", "required": true, "description": description, "example": example,
            "schema": {"type": "string", "pattern": pattern},
        })
    };
    names.map(parameter).collect()
}

pub(super) fn query(name: &str, description: &str, schema: Value) -> Value {
    json!({"name": name, "in": "query", "description": description, "schema": schema})
}

/// The self-contained schema of a request's type.
pub(super) fn request<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.meta_schema = None;
        settings.inline_subschemas = true;
    });
    Side::Read.of(settings).into_generator().into_root_schema_for::<T>().to_value()
}

/// The bodies that configure processes: the types of [`contract::process`], and the further fields of responses, which
/// may be sent back and are ignored.
pub(super) fn requests() -> Map<String, Value> {
    let read_only = |schema: Value| json!({"description": "Ignored", "anyOf": [schema, {"type": "null"}]});
    let mut callback = request::<CallbackSpec>();
    callback["properties"]["retiringSecrets"] = json!({"type": "array", "description": "Ignored"});
    callback["properties"]["health"] = json!({"type": ["object", "null"], "description": "Ignored"});
    let mut process = request::<ProcessSpec>();
    process["properties"]["processId"] = read_only(id());
    process["properties"]["version"] = json!({"type": "integer", "description": "Ignored"});
    process["properties"]["callbacks"]["items"] = callback.clone();
    let mut source = request::<SourceSpec>();
    source["properties"]["ingestPath"] = json!({"type": "string", "description": "Ignored"});
    process["properties"]["sources"]["items"] = source.clone();
    let report = json!({"type": "object", "description": "The body of the platform's webhook"});
    if let Some(required) = process["required"].as_array_mut() {
        // The API key determines the project.
        required.retain(|name| name != "projectId");
    }
    let object_id = json!({"type": "string", "pattern": OBJECT_ID, "examples": ["696102a4b8c1d2e3f4a5b6c7"]});
    Map::from_iter(
        [
            ("ObjectId", object_id),
            ("ProcessRequest", process),
            ("CallbackRequest", callback),
            ("SourceRequest", source),
            ("PlatformReport", report),
        ]
        .map(|(name, schema)| (name.to_owned(), schema)),
    )
}

/// An example for one of these bodies.
pub(super) fn example(name: &str) -> &'static str {
    match name {
        "ProcessRequest" => {
            r#"{"name":"car-sales","states":[{"name":"new","kind":"initial"},{"name":"interested"},{"name":"lost","kind":"terminal"}],"callbacks":[{"name":"crm","url":"https://crm.example.com/leadrelay"}]}"#
        }
        "CallbackRequest" => {
            r#"{"name":"crm","url":"https://crm.example.com/leadrelay","events":["update.succeeded"]}"#
        }
        "SourceRequest" => r#"{"name":"dialer","platform":"vapi","secrets":["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]}"#,
        "PlatformReport" => {
            r#"{"message":{"type":"status-update","status":"in-progress","call":{"id":"call-7","metadata":{"leadId":"696102a4b8c1d2e3f4a5b6c7"}}}}"#
        }
        other => panic!("there is no component {other}"),
    }
}

pub(super) fn parameters() -> Value {
    let header = |name: &str, description: &str, more: Value| {
        let mut parameter = json!({"name": name, "in": "header", "description": description});
        parameter.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        parameter
    };
    let string = || json!({"schema": {"type": "string"}});
    json!({
        "limit": query("limit", "The number of items", json!({
            "type": "integer", "minimum": 1, "maximum": contract::rpc::MAX_LIMIT, "default": contract::rpc::DEFAULT_LIMIT,
        })),
        "cursor": query("cursor", "`next` of the previous page", super::text()),
        "masked": query("masked", "Hide all but the last four digits of phone numbers", json!({"type": "boolean"})),
        "Idempotency-Key": header("Idempotency-Key", "Within 24 hours, a repeated key with the same body is the same update",
            json!({"schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ !#-\\[\\]-~]+$"}})),
        "Prefer": header("Prefer", "`wait=N`: respond when the outcome is known, or after N seconds, 30 at most",
            json!({"example": "wait=10", "schema": {"type": "string"}})),
        "If-Match": header("If-Match", "Change the lead or process only if it is still at this version",
            json!({"example": "\"4\"", "schema": {"type": "string", "pattern": "^(\\*|(W/)?\"[0-9]{1,9}\")$"}})),
        "traceparent": header("traceparent", "W3C trace context; continues in the update's webhooks", string()),
        "Last-Event-ID": header("Last-Event-ID", "Continue after this event", string()),
    })
}

pub(super) fn headers() -> Value {
    let header = |description: &str| json!({"description": description, "schema": {"type": "string"}});
    json!({
        "X-Request-Id": header("The request's X-Request-Id if it is valid, otherwise a new id"),
        "RateLimit-Policy": header("The limit and its window"),
        "RateLimit": header("The remaining requests"),
        "Retry-After": {"description": "Seconds to wait before a retry", "schema": {"type": "integer", "minimum": 0}},
        "WWW-Authenticate": header("`Bearer`"),
        "ETag": header("The version of the lead or process, for `If-Match`"),
        "Idempotent-Replayed": header("`true` if the `Idempotency-Key` was used before"),
        "Preference-Applied": header("The wait that was applied"),
    })
}

pub(super) fn header_references<'a>(names: impl IntoIterator<Item = &'a str>) -> Value {
    let reference = |name: &str| (name.to_owned(), json!({"$ref": format!("#/components/headers/{name}")}));
    Value::Object(names.into_iter().map(reference).collect())
}

/// The error responses, by status, with all codes of the table.
pub(super) fn error_responses() -> Value {
    let errors = crate::error::tests::all();
    let response = |(status, codes): (u16, Vec<(&str, String)>)| {
        let meanings = codes.iter().map(|(code, meaning)| format!("- `{code}`: {meaning}"));
        let names: Vec<_> = codes.iter().map(|(code, _)| code).collect();
        let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or_default();
        let more: &[&str] = match status {
            401 => &["WWW-Authenticate"],
            429 | 503 => &["Retry-After"],
            _ => &[],
        };
        let own = errors.iter().find(|error| error.status().as_u16() == status);
        let (code, text) = match own {
            Some(error) => (error.code().to_owned(), error.to_string()),
            None => (codes[0].0.to_owned(), codes[0].1.clone()),
        };
        let response = json!({
            "description": format!("{reason}\n\n{}", meanings.collect::<Vec<_>>().join("\n")),
            "headers": header_references(["X-Request-Id"].iter().chain(more).copied()),
            "content": {"application/json": {
                "schema": {"allOf": [schema("ErrorResponse"), {"properties": {"code": {"enum": names}}}]},
                "example": {"success": false, "error": text, "code": code, "requestId": "6b042697a94eb229cf7757d0"},
            }},
        });
        (status.to_string(), response)
    };
    Value::Object(documented_errors().into_iter().map(response).collect())
}

/// The errors of the HTTP API in the table: code and meaning, by status.
fn documented_errors() -> BTreeMap<u16, Vec<(&'static str, String)>> {
    let mut errors = BTreeMap::<u16, Vec<_>>::new();
    for line in ERRORS.lines() {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let ["HTTP", status, code, meaning, _] = cells[..] else { continue };
        let Ok(status) = status.parse() else { panic!("not a status: {line}") };
        errors.entry(status).or_default().push((code.trim_matches('`'), without_links(meaning)));
    }
    errors
}

/// `[text](target)` becomes `text`: the targets are in other documents.
fn without_links(text: &str) -> String {
    let mut parts = text.split("](");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once(')').map_or(part, |(_, rest)| rest));
    }
    plain.replace('[', "")
}
