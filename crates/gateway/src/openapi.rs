//! 1 Accept: the OpenAPI document, `proto-schemas/openapi.json`, made of the endpoints, the types of their answers, and the table
//! of errors in the docs. `just schemas` writes it; a test says where it is not what the gateway serves.
//!
//! Whoever adds an endpoint describes it in [`operations`]; whoever adds an error gives it a row in the table.

use std::collections::{BTreeMap, BTreeSet};

use contract::{
    event::{TestPayload, WebhookPayload},
    process::{CallbackSpec, DEFAULT_OVERLAP_SECONDS, MAX_OVERLAP_SECONDS, ProcessSpec},
    schema::Side,
};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::{
    routes::{
        LeadView, bulk_initiate, bulk_update, callbacks, deliveries, documents::DOCUMENTS, dry_run, events, get_lead,
        get_update, initiate_lead, lead_history, list::Listed, list_leads, processes, update_lead,
    },
    server::ENDPOINTS,
};

/// The table of codes, which is for people, too.
const ERRORS: &str = include_str!("../../../docs/ERRORS.md");

/// What may happen to every request with a key. 429 and 503 ask to come again.
const ALWAYS: [u16; 6] = [400, 401, 403, 429, 500, 503];
/// What more may happen where a body is read.
const WITH_BODY: [u16; 3] = [408, 413, 415];

/// An endpoint as the document describes it.
struct Operation {
    method: &'static str,
    path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    description: &'static str,
    parameters: Vec<Value>,
    body: Option<Value>,
    /// Of a 200, by content type.
    answer: Value,
    headers: &'static [&'static str],
    /// The statuses that it may be refused with, beside those of all.
    refusals: &'static [u16],
}

/// Schemas of the types, gathered as they are named.
struct Schemas(SchemaGenerator);

impl Schemas {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Self(Side::Written.of(settings).into_generator())
    }

    fn of<T: JsonSchema>(&mut self) -> Value {
        self.0.subschema_for::<T>().to_value()
    }

    fn json<T: JsonSchema>(&mut self) -> Value {
        json!({"application/json": {"schema": self.of::<T>()}})
    }
}

fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn parameter(name: &str) -> Value {
    json!({"$ref": format!("#/components/parameters/{name}")})
}

fn query(name: &str, description: &str, schema: Value) -> Value {
    json!({"name": name, "in": "query", "description": description, "schema": schema})
}

fn path(name: &str, description: &str, schema: Value) -> Value {
    json!({"name": name, "in": "path", "required": true, "description": description, "schema": schema})
}

fn object_id() -> Value {
    schema("ObjectId")
}

fn flag() -> Value {
    json!({"type": "boolean"})
}

fn date_time() -> Value {
    json!({"type": "string", "format": "date-time"})
}

/// A text that, like every other, may also be null.
fn text(description: &str) -> Value {
    json!({"type": ["string", "null"], "maxLength": 1024, "description": description})
}

fn id(description: &str) -> Value {
    json!({"anyOf": [object_id(), {"type": "null"}], "description": description})
}

fn json_body(schema: Value) -> Option<Value> {
    Some(json!({"required": true, "content": {"application/json": {"schema": schema}}}))
}

/// Texts, each with such JSON in it: on lines of their own, or as events.
fn texts_of(media_type: &str, description: &str, schema: Value) -> Value {
    json!({media_type: {"schema": {
        "type": "string", "description": description, "contentMediaType": "application/json", "contentSchema": schema,
    }}})
}

/// The endpoints. Those that are served and not here, or the other way round, fail a test.
fn operations(schemas: &mut Schemas) -> Vec<Operation> {
    let delivery_id =
        || path("deliveryId", "`{updateId}-{callbackId}`", json!({"type": "string", "pattern": DELIVERY_ID}));
    let page = || [parameter("limit"), parameter("cursor")];
    let headers = || [parameter("traceparent")];
    let status = || json!({"type": "string", "enum": ["pending", "delivered", "exhausted"]});
    vec![
        Operation {
            method: "POST",
            path: "/api/v1/leads/update",
            id: "updateLead",
            tag: "Updates",
            summary: "Change a lead",
            description: "Merges metadata into a lead, renames it, moves it to another state. Asynchronous: 200 says that the \
                update is in the log and will be applied exactly once. What became of it goes to the callbacks of the lead's \
                process, and to `GET /api/v1/updates/{updateId}`.",
            parameters: [parameter("Idempotency-Key"), parameter("Prefer"), parameter("If-Match")]
                .into_iter()
                .chain(headers())
                .collect(),
            body: json_body(schema("UpdateRequest")),
            answer: {
                let answers = [schemas.of::<update_lead::Accepted>(), schemas.of::<dry_run::Tried<'static>>()];
                json!({"application/json": {"schema": {"anyOf": answers}}})
            },
            headers: &["Idempotent-Replayed", "Preference-Applied"],
            refusals: &[404, 422],
        },
        Operation {
            method: "POST",
            path: "/api/v1/leads/update/bulk",
            id: "updateLeads",
            tag: "Updates",
            summary: "Change up to 10 000 leads",
            description: "One update per line, or a JSON array of them. The answer is streamed: a line for each, in the same order, \
                whatever became of the others. 200 says nothing of the lines.",
            parameters: [parameter("Idempotency-Key")].into_iter().chain(headers()).collect(),
            body: Some(json!({"required": true, "content": {
                "application/x-ndjson": texts_of(
                    "application/x-ndjson", "An update per line", schema("UpdateRequest"),
                )["application/x-ndjson"],
                "application/json": {"schema":
                    {"type": "array", "items": schema("UpdateRequest"), "maxItems": bulk_update::MAX_LINES}},
            }})),
            answer: texts_of(
                "application/x-ndjson",
                "A line per update",
                schemas.of::<bulk_update::LineAnswer<'static>>(),
            ),
            headers: &["Idempotent-Replayed"],
            refusals: &[422],
        },
        Operation {
            method: "POST",
            path: "/api/v1/leads/initiate",
            id: "initiateLead",
            tag: "Leads",
            summary: "Create a lead, or look one up",
            description: "Creates a lead in its process's initial state. With `leadId` instead of `lead` looks one up.",
            parameters: vec![],
            body: json_body(schema("InitiateRequest")),
            answer: schemas.json::<initiate_lead::Initiated<'static>>(),
            headers: &[],
            refusals: &[404],
        },
        Operation {
            method: "POST",
            path: "/api/v1/leads/bulk/initiate",
            id: "initiateLeads",
            tag: "Leads",
            summary: "Create up to 1000 leads, or look them up",
            description: "Each by itself; 200 says nothing of the leads. The body may have 4 MiB.",
            parameters: vec![],
            body: json_body(json!({
                "type": "object",
                "properties": {
                    "leads": {"type": "array", "minItems": 1, "maxItems": bulk_initiate::MAX_LEADS,
                        "items": schema("NewLead")},
                    "leadIds": {"type": "array", "minItems": 1, "maxItems": bulk_initiate::MAX_LEADS,
                        "items": object_id()},
                },
                "anyOf": [{"required": ["leads"]}, {"required": ["leadIds"]}],
            })),
            answer: json!({"application/json": {"schema": {
                "type": "object",
                "required": ["success", "errors"],
                "properties": {
                    "success": {"type": "array", "items": schemas.of::<LeadView<'static>>()},
                    "errors": {"type": "array", "items": schemas.of::<bulk_initiate::Failed>()},
                    "warnings": {"type": "array", "items": {"type": "string"}},
                },
            }}}),
            headers: &[],
            refusals: &[],
        },
        Operation {
            method: "GET",
            path: "/api/v1/leads/get",
            id: "getLead",
            tag: "Leads",
            summary: "A lead and its last updates",
            description: "By `leadId`, or by `referenceId`, `projectId` and `processId`.",
            parameters: vec![
                query("leadId", "The lead", object_id()),
                query("referenceId", "Its external id", json!({"type": "string", "maxLength": 1024})),
                query("projectId", "The key's project", object_id()),
                query("processId", "The process of `referenceId`", object_id()),
                parameter("masked"),
            ],
            body: None,
            answer: schemas.json::<get_lead::Found<'static>>(),
            headers: &["ETag"],
            refusals: &[404],
        },
        Operation {
            method: "GET",
            path: "/api/v1/updates/{updateId}",
            id: "getUpdate",
            tag: "Updates",
            summary: "What became of an update, and its webhooks",
            description: "One place for an update's whole story: the command, the outcome, every delivery and attempt.",
            parameters: vec![path("updateId", "The update", object_id())],
            body: None,
            answer: schemas.json::<get_update::Found<'static>>(),
            headers: &[],
            refusals: &[404],
        },
        Operation {
            method: "GET",
            path: "/api/v1/leads",
            id: "listLeads",
            tag: "Leads",
            summary: "The project's leads, page by page",
            description: "The newest first. All that is given must hold.",
            parameters: [
                query("processId", "Only leads of this process", object_id()),
                query("state", "Only leads in this state", json!({"type": "string", "maxLength": 1024})),
                query("updatedSince", "Only leads that changed then or later", date_time()),
                parameter("masked"),
            ]
            .into_iter()
            .chain(page())
            .collect(),
            body: None,
            answer: schemas.json::<Listed<'static, list_leads::ListedLead<'static>>>(),
            headers: &[],
            refusals: &[],
        },
        Operation {
            method: "GET",
            path: "/api/v1/leads/{leadId}/updates",
            id: "leadHistory",
            tag: "Leads",
            summary: "A lead's audit trail, page by page",
            description: "Every update that was applied to it or refused, the last first.",
            parameters: [path("leadId", "The lead", object_id())].into_iter().chain(page()).collect(),
            body: None,
            answer: schemas.json::<Listed<'static, lead_history::PastUpdateView<'static>>>(),
            headers: &[],
            refusals: &[404],
        },
        Operation {
            method: "GET",
            path: "/api/v1/deliveries",
            id: "listDeliveries",
            tag: "Deliveries",
            summary: "What was told to whom, page by page",
            description: "A delivery is an update on its way to one callback. Those of the newest updates come first.",
            parameters: [
                query("status", "Only those that stand so", status()),
                query("callbackId", "Only to this callback", object_id()),
                query("updateId", "Only of this update", object_id()),
                query("leadId", "Only of this lead's updates", object_id()),
                query("since", "Only of updates that were made then or later", date_time()),
            ]
            .into_iter()
            .chain(page())
            .collect(),
            body: None,
            answer: schemas.json::<Listed<'static, deliveries::ListedView<'static>>>(),
            headers: &[],
            refusals: &[],
        },
        Operation {
            method: "GET",
            path: "/api/v1/deliveries/{deliveryId}",
            id: "getDelivery",
            tag: "Deliveries",
            summary: "A delivery and its attempts",
            description: "",
            parameters: vec![delivery_id()],
            body: None,
            answer: schemas.json::<deliveries::Found<deliveries::Shown<'static>>>(),
            headers: &[],
            refusals: &[404],
        },
        Operation {
            method: "POST",
            path: "/api/v1/deliveries/{deliveryId}/redeliver",
            id: "redeliver",
            tag: "Deliveries",
            summary: "Make a delivery again",
            description: "One that is delivered or exhausted: the same body under the same `webhook-id`, due at once. No body is \
                needed.",
            parameters: vec![delivery_id()],
            body: None,
            answer: schemas.json::<deliveries::Found<deliveries::ListedView<'static>>>(),
            headers: &[],
            refusals: &[404, 409, 410],
        },
        Operation {
            method: "POST",
            path: "/api/v1/deliveries/recover",
            id: "recoverDeliveries",
            tag: "Deliveries",
            summary: "Make many deliveries again",
            description: "All exhausted ones, after an endpoint was away for too long; or all delivered ones, for a receiver that \
                lost what it had. The oldest are due first, so many a second.",
            parameters: vec![],
            body: json_body(schema("RecoverRequest")),
            answer: schemas.json::<deliveries::Found<deliveries::RecoveredView<'static>>>(),
            headers: &[],
            refusals: &[404, 409, 410],
        },
        Operation {
            method: "GET",
            path: "/api/v1/events",
            id: "followEvents",
            tag: "Updates",
            summary: "Outcomes as they come about",
            description: "Server-Sent Events; `data` of each is the body of the webhooks, with `errorCode` beside it. Resumable: with `Last-Event-ID` it goes on \
                behind that event.",
            parameters: vec![
                json!({"name": "Last-Event-ID", "in": "header", "description": "Go on behind this event",
                    "schema": {"type": "string"}}),
                query("lastEventId", "The same, where headers cannot be set", json!({"type": "string"})),
            ],
            body: None,
            answer: texts_of("text/event-stream", "Events", schemas.of::<events::Told<'static>>()),
            headers: &[],
            refusals: &[410],
        },
    ]
    .into_iter()
    .chain(configuration(schemas))
    .collect()
}

/// The endpoints that configure processes.
fn configuration(schemas: &mut Schemas) -> [Operation; 12] {
    let process_id = || {
        let schema = json!({"type": "string", "pattern": "^([0-9a-fA-F]{24}|_)$"});
        path("processId", "The process; `_` are the project's fallback callbacks", schema)
    };
    let callback = || vec![process_id(), path("callbackId", "The callback", object_id())];
    let change = |mut parameters: Vec<Value>| {
        parameters.push(parameter("If-Match"));
        parameters
    };
    let process = || json_body(schema("ProcessRequest"));
    let callback_body = || json_body(schema("CallbackRequest"));
    let changed_process = schemas.json::<processes::Changed<'static, processes::ProcessView<'static>>>();
    let changed_callback = schemas.json::<processes::Changed<'static, processes::CallbackView>>();
    let operation = |method, path, id, summary, description, parameters, body, answer| Operation {
        method,
        path,
        id,
        tag: "Configuration",
        summary,
        description,
        parameters,
        body,
        answer,
        headers: if method == "GET" { &["ETag"] } else { &[] },
        refusals: &[404],
    };
    let made = |operation: Operation| Operation { headers: &["ETag"], refusals: &[404, 409, 412], ..operation };
    [
        Operation {
            headers: &[],
            refusals: &[],
            ..operation(
                "GET",
                "/api/v1/processes",
                "listProcesses",
                "The project's processes, page by page",
                "By name. Secrets are never shown.",
                vec![parameter("limit"), parameter("cursor")],
                None,
                schemas.json::<Listed<'static, processes::ProcessView<'static>>>(),
            )
        },
        made(operation(
            "POST",
            "/api/v1/processes",
            "createProcess",
            "Make a process",
            "Signing secrets that are made for its callbacks are shown in this answer, and never again.",
            change(vec![]),
            process(),
            changed_process.clone(),
        )),
        operation(
            "GET",
            "/api/v1/processes/{processId}",
            "getProcess",
            "How a process is configured",
            "What is answered can be put back. Secrets are never shown.",
            vec![process_id()],
            None,
            schemas.json::<deliveries::Found<processes::ProcessView<'static>>>(),
        ),
        made(operation(
            "PUT",
            "/api/v1/processes/{processId}",
            "putProcess",
            "Configure a process",
            "It becomes what the body says. Without `callbacks` they stay; those that are not in the list go. Callbacks keep \
                their ids and secrets.",
            change(vec![process_id()]),
            process(),
            changed_process,
        )),
        operation(
            "GET",
            "/api/v1/processes/{processId}/callbacks",
            "listCallbacks",
            "Who is told of a process's outcomes",
            "All on one page.",
            vec![process_id()],
            None,
            schemas.json::<Listed<'static, processes::CallbackView>>(),
        ),
        made(operation(
            "POST",
            "/api/v1/processes/{processId}/callbacks",
            "createCallback",
            "Give a process one more callback",
            "A signing secret that is made for it is shown in this answer, and never again.",
            change(vec![process_id()]),
            callback_body(),
            changed_callback.clone(),
        )),
        operation(
            "GET",
            "/api/v1/processes/{processId}/callbacks/{callbackId}",
            "getCallback",
            "How a callback is configured",
            "Secrets are never shown.",
            callback(),
            None,
            schemas.json::<deliveries::Found<processes::CallbackView>>(),
        ),
        made(operation(
            "PUT",
            "/api/v1/processes/{processId}/callbacks/{callbackId}",
            "putCallback",
            "Configure a callback",
            "It becomes what the body says. Secrets that are left out stay.",
            change(callback()),
            callback_body(),
            changed_callback.clone(),
        )),
        made(operation(
            "DELETE",
            "/api/v1/processes/{processId}/callbacks/{callbackId}",
            "removeCallback",
            "Take a callback away",
            "What was not delivered to it yet ends as exhausted.",
            change(callback()),
            None,
            schemas.json::<processes::Changed<'static, Option<processes::CallbackView>>>(),
        )),
        made(operation(
            "POST",
            "/api/v1/processes/{processId}/callbacks/{callbackId}/rotate-secret",
            "rotateSecret",
            "Give a callback another signing secret",
            "It is shown in this answer, and never again. Those before it sign as well until the overlap is over. No body is \
                needed.",
            change(callback()),
            Some(json!({"content": {"application/json": {"schema": schema("RotateRequest")}}})),
            changed_callback,
        )),
        Operation {
            refusals: &[404, 409],
            ..operation(
                "POST",
                "/api/v1/processes/{processId}/callbacks/{callbackId}/test",
                "testCallback",
                "Send a callback a signed ping",
                "Answers how that went. It is no delivery, is not retried, and says nothing of how the callback fares. No body is \
                    needed.",
                callback(),
                None,
                schemas.json::<deliveries::Found<callbacks::TestedView<'static>>>(),
            )
        },
        operation(
            "POST",
            "/api/v1/processes/{processId}/callbacks/{callbackId}/enable",
            "enableCallback",
            "Tell a callback again",
            "After its failures disabled it: what waited for it goes out. Whatever its configuration says stays. No body is needed.",
            callback(),
            None,
            schemas.json::<deliveries::Found<callbacks::EnabledView>>(),
        ),
    ]
}

/// What a request holds that is read as this type: complete in itself, with what is answered beside it and may be sent back.
fn request<T: JsonSchema>(answered: &Value) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.meta_schema = None;
        settings.inline_subschemas = true;
    });
    let mut schema = Side::Read.of(settings).into_generator().into_root_schema_for::<T>().to_value();
    for (name, more) in answered.as_object().into_iter().flatten() {
        schema["properties"][name] = more.clone();
    }
    if let Some(required) = schema["required"].as_array_mut() {
        // It is the key's.
        required.retain(|name| name != "projectId");
    }
    schema
}

const OBJECT_ID: &str = "^[0-9a-fA-F]{24}$";
const DELIVERY_ID: &str = "^[0-9a-fA-F]{24}-[0-9a-fA-F]{24}$";

/// What requests hold. They are read field by field, so there is no type to ask.
fn requests() -> Value {
    let metadata = json!({"type": ["object", "null"], "description": "Merged into the lead's metadata"});
    let callback = request::<CallbackSpec>(&json!({
        "retiringSecrets": {"type": "array", "description": "Not to be set"},
    }));
    let mut process = request::<ProcessSpec>(&json!({
        "processId": id("Not to be set"), "version": {"type": "integer", "description": "Not to be set"},
    }));
    process["properties"]["callbacks"]["items"] = callback.clone();
    json!({
        "ObjectId": {"type": "string", "pattern": OBJECT_ID, "examples": ["696102a4b8c1d2e3f4a5b6c7"]},
        "UpdateRequest": {
            "type": "object",
            "description": "At least one of `metadata` (with a member), `name` and `targetState` must be there. Where `metadata` \
                is absent or null, every field that is not named here is merged into the lead's metadata. Null and the empty \
                text count as absent.",
            "properties": {
                "leadId": id("The lead; required without `referenceId`"),
                "referenceId": text("The lead's external id; requires `projectId` and `processId`"),
                "projectId": id("The key's project"),
                "processId": id("The process of `referenceId`"),
                "metadata": metadata,
                "name": text("The lead's new name"),
                "targetState": text("The state to move the lead to"),
                "disposition": text("Why; stored with states that take one"),
                "userId": text("Who changes the lead, for the audit trail"),
                "expectedVersion": {"type": ["integer", "null"], "minimum": 0, "maximum": u32::MAX,
                    "description": "Change the lead only if it is still at this version"},
                "expectedState": text("Change the lead only if it is still in this state"),
                "dryRun": {"type": ["boolean", "null"],
                    "description": "Only say what would be; not in bulk requests"},
            },
            "anyOf": [{"required": ["leadId"]}, {"required": ["referenceId", "projectId", "processId"]}],
            "examples": [{"leadId": "696102a4b8c1d2e3f4a5b6c7", "targetState": "interested",
                "metadata": {"make": "Toyota", "model": "Camry"}}],
        },
        "NewLead": {
            "type": "object",
            "required": ["projectId", "processId"],
            "properties": {
                "projectId": object_id(),
                "processId": object_id(),
                "name": text("Or else `firstName`"),
                "firstName": text("Joined with `lastName`"),
                "lastName": text("Joined with `firstName`"),
                "phone": text("5 to 15 digits, best as E.164; required without `email`"),
                "email": text("Stored in lower case; required without `phone`"),
                "referenceId": text("The lead's external id, unique in its process"),
                "groupId": text("Stored, not interpreted"),
                "metadata": {"type": ["object", "null"], "description": "What else is known of it"},
            },
            "examples": [{"projectId": "696102a4b8c1d2e3f4a5b601", "processId": "696102a4b8c1d2e3f4a5b602",
                "name": "Ada Lovelace", "phone": "+14155550123", "referenceId": "AB123456789"}],
        },
        "InitiateRequest": {
            "type": "object",
            "properties": {
                "lead": {"anyOf": [schema("NewLead"), {"type": "null"}]},
                "leadId": id("Look this lead up instead"),
                "init": {"description": "Accepted and not interpreted: Leadrelay makes no calls"},
            },
            "anyOf": [{"required": ["lead"]}, {"required": ["leadId"]}],
        },
        "ProcessRequest": process,
        "CallbackRequest": callback,
        "RotateRequest": {
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "overlapSeconds": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_OVERLAP_SECONDS,
                    "default": DEFAULT_OVERLAP_SECONDS, "description": "How long the secrets so far sign as well"},
            },
        },
        "RecoverRequest": {
            "type": "object",
            "required": ["since"],
            "additionalProperties": false,
            "properties": {
                "since": {"type": "string", "format": "date-time",
                    "description": "Those of updates that were made then or later"},
                "status": {"enum": ["exhausted", "delivered", null], "description": "`exhausted` by default"},
                "callbackId": id("Only to this callback"),
                "perSecond": {"type": ["integer", "null"], "minimum": 1, "maximum": contract::rpc::MAX_PER_SECOND,
                    "default": 10, "description": "How many are due in a second"},
                "dryRun": {"type": ["boolean", "null"], "description": "Only count them"},
                "cursor": text("The `next` of the answer before"),
            },
        },
    })
}

fn parameters() -> Value {
    json!({
        "limit": query("limit", "How many items", json!({
            "type": "integer", "minimum": 1, "maximum": contract::rpc::MAX_LIMIT, "default": contract::rpc::DEFAULT_LIMIT,
        })),
        "cursor": query("cursor", "The `next` of the page before", json!({"type": "string", "maxLength": 1024})),
        "masked": query("masked", "Hide the digits of phone numbers but the last four", flag()),
        "Idempotency-Key": {
            "name": "Idempotency-Key", "in": "header",
            "description": "Within 24 hours the same key with the same body is the same update",
            "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ !#-\\[\\]-~]+$"},
        },
        "Prefer": {
            "name": "Prefer", "in": "header", "example": "wait=10",
            "description": "`wait=N`: answer when the outcome is known, or after N seconds, 30 at most",
            "schema": {"type": "string"},
        },
        "If-Match": {
            "name": "If-Match", "in": "header", "example": "\"4\"",
            "description": "Change the lead or process only if it is still at this version",
            "schema": {"type": "string", "pattern": "^(\\*|(W/)?\"[0-9]{1,9}\")$"},
        },
        "traceparent": {
            "name": "traceparent", "in": "header",
            "description": "W3C trace context; goes with the update to its webhooks",
            "schema": {"type": "string"},
        },
    })
}

fn headers() -> Value {
    let header = |description: &str, schema: Value| json!({"description": description, "schema": schema});
    let string = || json!({"type": "string"});
    json!({
        "X-Request-Id": header("The request's own id if it is sane, else a new one", string()),
        "RateLimit-Policy": header("What may be asked in which time", string()),
        "RateLimit": header("What remains of it", string()),
        "Retry-After": header("After how many seconds to come again", json!({"type": "integer", "minimum": 0})),
        "WWW-Authenticate": header("`Bearer`", string()),
        "ETag": header("The version of the lead or process, for `If-Match`", string()),
        "Idempotent-Replayed": header("`true` where the `Idempotency-Key` was used before", string()),
        "Preference-Applied": header("That the answer waited, and how long it would have", string()),
    })
}

fn headers_of<'a>(names: impl IntoIterator<Item = &'a str>) -> Value {
    let link = |name: &str| (name.to_owned(), json!({"$ref": format!("#/components/headers/{name}")}));
    Value::Object(names.into_iter().map(link).collect())
}

/// The errors of the HTTP API in the table: code and meaning, by status.
fn errors() -> BTreeMap<u16, Vec<(&'static str, &'static str)>> {
    let mut errors = BTreeMap::<u16, Vec<_>>::new();
    for line in ERRORS.lines() {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let ["HTTP", status, code, meaning, _] = cells[..] else { continue };
        let Ok(status) = status.parse() else { panic!("not a status: {line}") };
        errors.entry(status).or_default().push((code.trim_matches('`'), meaning));
    }
    errors
}

/// What each status means, with all its codes.
fn responses() -> Value {
    let mut responses = Map::new();
    for (status, codes) in errors() {
        let meanings = codes.iter().map(|(code, meaning)| format!("- `{code}`: {}", without_links(meaning)));
        let names: Vec<_> = codes.iter().map(|(code, _)| code).collect();
        let reason = axum::http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        let more: &[&str] = match status {
            401 => &["WWW-Authenticate"],
            429 | 503 => &["Retry-After"],
            _ => &[],
        };
        let response = json!({
            "description": format!("{}\n\n{}", reason.unwrap_or_default(), meanings.collect::<Vec<_>>().join("\n")),
            "headers": headers_of(["X-Request-Id"].iter().chain(more).copied()),
            "content": {"application/json": {"schema": {
                "allOf": [schema("Error"), {"properties": {"code": {"enum": names}}}],
            }}},
        });
        responses.insert(status.to_string(), response);
    }
    Value::Object(responses)
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

/// Times are texts in the types of answers; their names say which.
fn mark_times(schema: &mut Value) {
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        for (name, property) in properties {
            let is_time = name.ends_with("At") || name == "until" || name == "timestamp";
            let is_text = property["type"] == "string" || property["type"] == json!(["string", "null"]);
            if is_time && is_text {
                property["format"] = json!("date-time");
            }
        }
    }
    match schema {
        Value::Object(members) => members.values_mut().for_each(mark_times),
        Value::Array(items) => items.iter_mut().for_each(mark_times),
        _ => {}
    }
}

fn document() -> Value {
    let mut schemas = Schemas::new();
    let mut paths = json!({});
    for operation in operations(&mut schemas) {
        let endpoint = ENDPOINTS.iter().find(|e| (e.method, e.path) == (operation.method, operation.path));
        let scope = endpoint.map_or("", |endpoint| endpoint.scope.as_str());
        let with_body: &[u16] = if operation.body.is_some() { &WITH_BODY } else { &[] };
        let refusals: BTreeSet<_> = ALWAYS.iter().chain(with_body).chain(operation.refusals).collect();
        let mut responses: Map<_, _> = refusals
            .into_iter()
            .map(|status| (status.to_string(), json!({"$ref": format!("#/components/responses/{status}")})))
            .collect();
        let headers = ["X-Request-Id", "RateLimit-Policy", "RateLimit"].iter().chain(operation.headers);
        let taken = json!({"description": "OK", "headers": headers_of(headers.copied()), "content": operation.answer});
        responses.insert("200".into(), taken);
        let mut described = json!({
            "operationId": operation.id,
            "tags": [operation.tag],
            "summary": operation.summary,
            "description": format!("{} Scope: `{scope}`.", operation.description).trim_start(),
            "parameters": operation.parameters,
            "responses": responses,
            "security": [{"apiKey": [scope]}],
        });
        if let Some(body) = operation.body {
            described["requestBody"] = body;
        }
        paths[operation.path][operation.method.to_lowercase()] = described;
    }
    for (path, id, content_type, schema, summary) in [
        ("/api/v1/openapi.json", "openapi", "application/json", json!({"type": "object"}), "This document"),
        ("/api/v1/docs", "docs", "text/html", json!({"type": "string"}), "A page that shows it"),
        (
            "/api/v1/docs/redoc-2.5.4.js",
            "docsScript",
            "text/javascript",
            json!({"type": "string"}),
            "The page's script",
        ),
    ] {
        paths[path]["get"] = json!({
            "operationId": id, "tags": ["Documents"], "summary": summary, "security": [],
            "responses": {
                "200": {"description": "OK", "headers": headers_of(["X-Request-Id"]),
                    "content": {content_type: {"schema": schema}}},
                "500": {"$ref": "#/components/responses/500"},
            },
        });
    }
    let webhook_header = |name: &str, description: &str| json!({"name": name, "in": "header", "required": true, "description": description, "schema": {"type": "string"}});
    let webhooks = json!({"update": {"post": {
        "operationId": "updateWebhook",
        "tags": ["Webhooks"],
        "summary": "What became of an update",
        "description": "Sent to every callback of the lead's process that wants it, at least once, signed as Standard Webhooks \
            has it, with what the callback's `auth` says.",
        "parameters": [
            webhook_header("webhook-id", "The `updateId`; the same whenever it is sent again"),
            webhook_header("webhook-timestamp", "When it was sent, in Unix seconds"),
            webhook_header("webhook-signature",
                "`v1,` and the base64 of the HMAC-SHA256 of `{webhook-id}.{webhook-timestamp}.{body}`; one for each secret of \
                the callback, with spaces between"),
            webhook_header("traceparent", "W3C trace context, from the request on"),
        ],
        "requestBody": {"required": true, "content": schemas.json::<WebhookPayload<'static>>()},
        "responses": {
            "2XX": {"description": "Taken"},
            "410": {"description": "Never again: the callback is disabled"},
            "default": {"description": "Not taken: it is sent again, later and later; after `Retry-After` where that is given"},
        },
    }}, "test": {"post": {
        "operationId": "testWebhook",
        "tags": ["Webhooks"],
        "summary": "A ping, when a callback is tested",
        "description": "Signed and authenticated like an update, of which it tells nothing.",
        "requestBody": {"required": true, "content": schemas.json::<TestPayload>()},
        "responses": {"2XX": {"description": "Taken"}, "default": {"description": "Not taken; it is not sent again"}},
    }}});
    let mut components = schemas.0.take_definitions(true);
    components
        .extend(requests().as_object().into_iter().flatten().map(|(name, schema)| (name.clone(), schema.clone())));
    components.insert(
        "Error".into(),
        json!({
            "type": "object",
            "required": ["success", "error", "code", "requestId"],
            "properties": {
                "success": {"const": false},
                "error": {"type": "string", "description": "One sentence, for people"},
                "code": {"type": "string", "description": "Stable, for programs"},
                "requestId": {"type": "string", "description": "As in `X-Request-Id`, and in the gateway's log"},
            },
        }),
    );
    let mut components = Value::Object(components);
    mark_times(&mut components);
    contract::schema::plain(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Leadrelay",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Takes updates of sales leads, applies each exactly once and in order, and tells callback URLs what became \
                of it.\n\nBodies are strict JSON of at most 256 KiB: no key twice, no NUL, no number beyond a double, at most 64 \
                levels. Null and the empty text count as absent. Where something in a request is ignored, the answer has \
                `warnings`.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "Updates", "description": "Changes of leads, and what became of them"},
            {"name": "Leads", "description": "Leads as they stand, and as they came to"},
            {"name": "Deliveries", "description": "What was told to whom, and telling it again"},
            {"name": "Configuration", "description": "Processes, and who is told of outcomes"},
            {"name": "Webhooks", "description": "What Leadrelay sends"},
            {"name": "Documents", "description": "What you read"},
        ],
        "paths": paths,
        "webhooks": webhooks,
        "components": {
            "securitySchemes": {"apiKey": {
                "type": "http", "scheme": "bearer",
                "description": "An API key. It belongs to one project; leads of another project do not exist for it.",
            }},
            "schemas": components,
            "parameters": parameters(),
            "headers": headers(),
            "responses": responses(),
        },
    }))
}

#[test]
fn the_schema_of_the_api_is_kept() {
    contract::schema::keep("openapi.json", &document());
}

#[test]
fn what_is_served_is_in_the_schema_and_nothing_else() {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let described: BTreeSet<_> = paths
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let endpoints = ENDPOINTS.iter().map(|endpoint| (endpoint.method.to_owned(), endpoint.path.to_owned()));
    let documents = DOCUMENTS.iter().map(|document| ("GET".to_owned(), document.path.to_owned()));
    let served: BTreeSet<_> = endpoints.chain(documents).collect();
    if let Some((method, path)) = served.difference(&described).next() {
        panic!("{method} {path} is served: describe it in operations() of gateway/src/openapi.rs, then `just schemas`");
    }
    if let Some((method, path)) = described.difference(&served).next() {
        panic!(
            "{method} {path} is not served: remove it from operations() of gateway/src/openapi.rs, then `just schemas`"
        );
    }
}

#[test]
fn every_error_is_in_the_schema() {
    let document = document();
    for error in crate::error::tests::refusals() {
        let (status, code) = (error.status().as_u16(), error.code().to_owned());
        let response = &document["components"]["responses"][status.to_string()];
        let codes = &response["content"]["application/json"]["schema"]["allOf"][1]["properties"]["code"]["enum"];
        let known = codes.as_array().is_some_and(|codes| codes.contains(&json!(code)));
        assert!(known, "{status} {code} has no row in the table of errors, from which the OpenAPI document is made");
    }
    // And each of them is of some use to somebody.
    let used = document["paths"].to_string();
    for status in document["components"]["responses"].as_object().unwrap().keys() {
        let elsewhere = ["405"].contains(&status.as_str());
        assert!(
            elsewhere || used.contains(&format!("#/components/responses/{status}\"")),
            "no endpoint answers {status}"
        );
    }
}
