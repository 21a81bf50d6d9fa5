//! The document as a whole.

use std::collections::BTreeSet;

use contract::{
    activity::ActivityPayload,
    event::{TestPayload, WebhookPayload},
    key::Scope,
    operational::OperationalPayload,
    webhook::EventPayload,
};
use serde_json::{Map, Value, json};

use super::{Body, Content, Operation, Schemas, components};
use crate::{
    rate_limit::RateClass,
    router::Endpoint,
    routes::{
        self, ENDPOINTS, INGEST,
        calls::ingest,
        docs::{DOCUMENTS, OPERATIONS},
    },
};

/// Errors of every request with an API key.
const COMMON_ERRORS: [u16; 6] = [400, 401, 403, 429, 500, 503];
/// Further errors of requests with a body.
const BODY_ERRORS: [u16; 3] = [408, 413, 415];

fn operation(endpoint: &Endpoint, operation: &Operation, schemas: &mut Schemas) -> Value {
    let scope = endpoint.scope.as_str();
    let body_errors: &[u16] = if operation.body.is_some() { &BODY_ERRORS } else { &[] };
    let errors: BTreeSet<_> = COMMON_ERRORS.iter().chain(body_errors).chain(operation.errors).collect();
    let mut responses: Map<_, _> = errors
        .into_iter()
        .map(|status| (status.to_string(), json!({"$ref": format!("#/components/responses/{status}")})))
        .collect();
    let headers = ["X-Request-Id", "RateLimit-Policy", "RateLimit"].iter().chain(&operation.response_headers);
    responses.insert(
        "200".into(),
        json!({
            "description": "OK",
            "headers": components::header_references(headers.copied()),
            "content": alternatives(&operation.responses, schemas),
        }),
    );
    let mut parameters = components::path_parameters(endpoint.path);
    parameters.extend(operation.parameters.clone());
    let mut described = json!({
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": format!("{} Scope: `{scope}`.", operation.description).trim_start(),
        "parameters": parameters,
        "responses": responses,
        "security": [{"apiKey": [scope]}],
        "x-codeSamples": [{"lang": "Shell", "label": "curl", "source": operation.curl(endpoint)}],
    });
    if let Some(Body { required, contents }) = &operation.body {
        let content: Map<_, _> = contents
            .iter()
            .map(|content| {
                let media = json!({"schema": (content.schema)(schemas), "example": content.example()});
                (content.media_type.to_owned(), media)
            })
            .collect();
        described["requestBody"] = json!({"required": required, "content": content});
    }
    described
}

/// The operation of voice platforms: authenticated by the secret of a source, not by an API key.
fn without_key(mut described: Value) -> Value {
    let replace = |text: &Value, from: &str, to: &str| json!(text.as_str().unwrap().replace(from, to));
    described["description"] = replace(&described["description"], " Scope: `calls:write`.", "");
    let source = &mut described["x-codeSamples"][0]["source"];
    *source = replace(source, "Authorization: Bearer $API_KEY", "X-Vapi-Secret: $SECRET");
    described["security"] = json!([{"source": []}]);
    described
}

/// The responses with status 200, all of one media type.
fn alternatives(contents: &[Content], schemas: &mut Schemas) -> Value {
    let media = match contents {
        [content] => json!({"schema": (content.schema)(schemas), "example": content.example()}),
        several => {
            let schemas: Vec<_> = several.iter().map(|content| (content.schema)(schemas)).collect();
            let name =
                |schema: &Value| schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()).unwrap().to_owned();
            let examples: Map<_, _> = schemas
                .iter()
                .map(name)
                .zip(several.iter().map(|content| json!({"value": content.example()})))
                .collect();
            json!({"schema": {"anyOf": schemas}, "examples": examples})
        }
    };
    json!({contents[0].media_type: media})
}

fn paths(schemas: &mut Schemas) -> Value {
    let mut paths = json!({});
    for (endpoint, described) in routes::operations() {
        paths[endpoint.path][endpoint.method.to_lowercase()] = operation(&endpoint, &described, schemas);
    }
    let endpoint = Endpoint::new("POST", INGEST, Scope::CallsWrite, RateClass::Updates);
    paths[INGEST]["post"] = without_key(operation(&endpoint, &ingest::operation(), schemas));
    for (path, content_type, id, summary) in OPERATIONS {
        let kind = if content_type == "application/json" { "object" } else { "string" };
        paths[path]["get"] = json!({
            "operationId": id, "tags": ["Documents"], "summary": summary, "security": [],
            "responses": {
                "200": {
                    "description": "OK",
                    "headers": components::header_references(["X-Request-Id"]),
                    "content": {content_type: {"schema": {"type": kind}}},
                },
                "500": {"$ref": "#/components/responses/500"},
            },
        });
    }
    paths
}

fn webhooks(schemas: &mut Schemas) -> Value {
    let header = |name: &str, description: &str| {
        json!({
            "name": name, "in": "header", "required": true, "description": description, "schema": {"type": "string"},
        })
    };
    let content = |schema: Value| json!({"required": true, "content": {"application/json": {"schema": schema}}});
    let responses = |failed: &str| {
        json!({
            "2XX": {"description": "Accepted"},
            "410": {"description": "Send no more: the callback is disabled"},
            "default": {"description": failed},
        })
    };
    json!({"update": {"post": {
        "operationId": "updateWebhook",
        "tags": ["Webhooks"],
        "summary": "Receive the outcome of an update",
        "description": "Sent at least once to every callback of the lead's process that subscribes to it, signed as in Standard \
            Webhooks, with the callback's `auth`.",
        "parameters": [
            header("webhook-id", "The `updateId`; the same in every attempt"),
            header("webhook-timestamp", "The time of the attempt, in Unix seconds"),
            header("webhook-signature",
                "`v1,` and the base64 of the HMAC-SHA256 of `{webhook-id}.{webhook-timestamp}.{body}`; one for each secret of \
                the callback, separated by spaces"),
            header("traceparent", "W3C trace context, continued from the request"),
        ],
        "requestBody": content(schemas.response::<WebhookPayload<'static>>()),
        "responses": responses("Failed: it is retried with increasing delays, after `Retry-After` if that is given"),
    }}, "event": {"post": {
        "operationId": "eventWebhook",
        "tags": ["Webhooks"],
        "summary": "Receive an event of a lead or a call",
        "description": "Sent like an update to every callback that names the event in its `events`. The `webhook-id` is \
            `{updateId}.{type}`. `data` depends on `type`.",
        "requestBody": content(schemas.response::<EventPayload<'static>>()),
        "responses": responses("Failed: it is retried like an update"),
    }}, "operational": {"post": {
        "operationId": "operationalWebhook",
        "tags": ["Webhooks"],
        "summary": "Receive an event of a callback",
        "description": "Sent like an update to the callbacks of its process and of the process `_` that name it, except to the \
            callback itself. The `webhook-id` is an id of the event, a dot, and `type`.",
        "requestBody": content(schemas.response::<OperationalPayload<'static>>()),
        "responses": responses("Failed: it is retried like an update"),
    }}, "activity": {"post": {
        "operationId": "activityWebhook",
        "tags": ["Webhooks"],
        "summary": "Receive the result of a call",
        "description": "The event `activity.completed`. The `webhook-id` is `{activityId}.activity.completed`.",
        "requestBody": content(schemas.response::<ActivityPayload<'static>>()),
        "responses": responses("Failed: it is retried like an update"),
    }}, "test": {"post": {
        "operationId": "testWebhook",
        "tags": ["Webhooks"],
        "summary": "Receive a ping",
        "description": "Sent when a callback is tested. Signed and authenticated like an update's webhook. It contains no update.",
        "requestBody": content(schemas.response::<TestPayload>()),
        "responses": {"2XX": {"description": "Accepted"}, "default": {"description": "Failed; it is not retried"}},
    }}})
}

fn document() -> Value {
    let mut schemas = Schemas::new();
    let paths = paths(&mut schemas);
    let webhooks = webhooks(&mut schemas);
    schemas.response::<http_api::ErrorResponse>();
    contract::schema::plain(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Leadrelay",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Accepts updates of sales leads, applies each exactly once and in order, and sends the outcome to \
                callback URLs.\n\nBegin with [Update a lead](#operation/updateLead).\n\nBodies are strict JSON of at most \
                256 KiB: no duplicate keys, no NUL, no number beyond a double, at most 64 levels. Null and the empty text count \
                as absent. If something in a request is ignored, the response has `warnings`.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        // The page shows the tags in this order.
        "tags": [
            {"name": "Updates", "description": "Change leads, and read the outcomes"},
            {"name": "Leads", "description": "Create, read and list leads"},
            {"name": "Calls", "description": "Report calls with leads, and read their results"},
            {"name": "Events", "description": "Follow outcomes as a stream"},
            {"name": "Webhooks", "description": "The requests that Leadrelay sends to callbacks"},
            {"name": "Deliveries", "description": "Read and repeat deliveries to callbacks"},
            {"name": "Statistics", "description": "Count updates and deliveries"},
            {"name": "Processes", "description": "Configure states and transitions"},
            {"name": "Callbacks", "description": "Configure and test the URLs that receive outcomes"},
            {"name": "Sources", "description": "Configure the voice platforms that report calls"},
            {"name": "Documents", "description": "This document"},
        ],
        "paths": paths,
        "webhooks": webhooks,
        "components": {
            "securitySchemes": {"apiKey": {
                "type": "http", "scheme": "bearer",
                "description": "An API key. It belongs to one project; leads of other projects do not exist for it.",
            }, "source": {
                "type": "apiKey", "in": "header", "name": "X-Vapi-Secret",
                "description": "The secret or signature of a voice platform. Vapi: `X-Vapi-Secret`, `X-Vapi-Signature` or a \
                    bearer token; Retell: `X-Retell-Signature`; Bland: `X-Webhook-Signature`.",
            }},
            "schemas": schemas.into_components(),
            "parameters": components::parameters(),
            "headers": components::headers(),
            "responses": components::error_responses(),
        },
    }))
}

#[test]
fn the_schema_of_the_api_is_up_to_date() {
    contract::schema::keep("openapi.json", &document());
}

#[test]
fn the_schema_has_exactly_the_served_documents() {
    let described = OPERATIONS.map(|(path, ..)| path);
    assert_eq!(described, DOCUMENTS.map(|document| document.path));
}

#[test]
fn every_operation_of_the_schema_has_a_verb_an_example_and_an_id_of_its_own() {
    let operations = routes::operations();
    let ids: BTreeSet<_> = operations.iter().map(|(_, operation)| operation.id).collect();
    assert_eq!(ids.len(), ENDPOINTS.len());
    for (endpoint, operation) in operations {
        let verb = operation.summary.split(' ').next().unwrap();
        let verbs = "Configure Count Create Deliver Enable Erase Follow List Pause Read Remove Repeat Report Resume Revoke \
                     Rotate Test Update";
        assert!(
            verbs.split(' ').any(|known| known == verb),
            "{} {}: {}",
            endpoint.method,
            endpoint.path,
            operation.summary
        );
        assert!(!operation.responses.is_empty(), "{} {} returns nothing", endpoint.method, endpoint.path);
    }
}

#[test]
fn the_schema_has_every_error() {
    let document = document();
    for error in crate::error::tests::all() {
        let (status, code) = (error.status().as_u16(), error.code().to_owned());
        let response = &document["components"]["responses"][status.to_string()];
        let codes = &response["content"]["application/json"]["schema"]["allOf"][1]["properties"]["code"]["enum"];
        let known = codes.as_array().is_some_and(|codes| codes.contains(&json!(code)));
        assert!(known, "{status} {code} has no row in docs/ERRORS.md, from which the OpenAPI document is made");
    }
    let used = document["paths"].to_string();
    for status in document["components"]["responses"].as_object().unwrap().keys() {
        let used = status == "405" || used.contains(&format!("#/components/responses/{status}\""));
        assert!(used, "no endpoint has the error {status}");
    }
}
