//! The OpenAPI document, `proto-schemas/openapi.json`: made from the operations next to the handlers, the types of
//! `http_api`, and the table of errors in docs/ERRORS.md. `just schemas` writes it; a test fails when it is out of
//! date.
//!
//! The schemas come from schemars, which also describes the messages over NATS. utoipa would derive a second schema
//! from each type, be a dependency of the gateway rather than of its tests, and not take errors from the table.

mod components;
mod document;

use contract::{rpc::DeliveryStatus, schema::Side};
use http_api::{ChangeResponse, Example, UpdateAccepted};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::router::Endpoint;

/// The description of an endpoint, in addition to its row in the router.
pub(crate) struct Operation {
    tag: &'static str,
    id: &'static str,
    summary: &'static str,
    description: &'static str,
    parameters: Vec<Value>,
    /// The query string of the curl sample.
    query_example: &'static str,
    body: Option<Body>,
    /// Alternative responses with status 200.
    responses: Vec<Content>,
    response_headers: Vec<&'static str>,
    /// Statuses of errors, besides those that every endpoint has.
    errors: &'static [u16],
}

struct Body {
    required: bool,
    /// Alternative media types; the curl sample uses the first.
    contents: Vec<Content>,
}

/// A body or response in one media type.
struct Content {
    media_type: &'static str,
    schema: Box<dyn Fn(&mut Schemas) -> Value>,
    /// The text on the wire.
    example: String,
}

impl Content {
    fn json(schema: impl Fn(&mut Schemas) -> Value + 'static, example: String) -> Self {
        Self { media_type: "application/json", schema: Box::new(schema), example }
    }

    fn example(&self) -> Value {
        serde_json::from_str(&self.example).unwrap_or_else(|_| json!(self.example))
    }
}

/// A type of a body or response.
pub(crate) trait Shape: JsonSchema + Example + Serialize + 'static {}

impl<T: JsonSchema + Example + Serialize + 'static> Shape for T {}

fn example<T: Shape>() -> String {
    serde_json::to_string(&T::example()).unwrap()
}

impl Operation {
    pub(crate) fn new(tag: &'static str, id: &'static str, summary: &'static str) -> Self {
        Self {
            tag,
            id,
            summary,
            description: "",
            parameters: Vec::new(),
            query_example: "",
            body: None,
            responses: Vec::new(),
            response_headers: Vec::new(),
            errors: &[],
        }
    }

    pub(crate) fn description(mut self, description: &'static str) -> Self {
        self.description = description;
        self
    }

    /// A header of the request, from the components.
    pub(crate) fn header(self, name: &'static str) -> Self {
        self.query_parameter(name)
    }

    /// A parameter of the query string, from the components.
    pub(crate) fn query_parameter(mut self, name: &'static str) -> Self {
        self.parameters.push(json!({"$ref": format!("#/components/parameters/{name}")}));
        self
    }

    pub(crate) fn page_parameters(self) -> Self {
        self.query_parameter("limit").query_parameter("cursor")
    }

    pub(crate) fn query(mut self, name: &'static str, description: &'static str, schema: Value) -> Self {
        self.parameters.push(components::query(name, description, schema));
        self
    }

    pub(crate) fn query_example(mut self, query: &'static str) -> Self {
        self.query_example = query;
        self
    }

    pub(crate) fn body<T: Shape>(mut self) -> Self {
        let content = Content::json(Schemas::request::<T>, example::<T>());
        self.body = Some(Body { required: true, contents: vec![content] });
        self
    }

    pub(crate) fn optional_body<T: Shape>(self) -> Self {
        let mut operation = self.body::<T>();
        operation.body.iter_mut().for_each(|body| body.required = false);
        operation
    }

    /// A body whose schema and example are among the components.
    pub(crate) fn body_component(mut self, name: &'static str) -> Self {
        let content = Content::json(move |_| schema(name), components::example(name).to_owned());
        self.body = Some(Body { required: true, contents: vec![content] });
        self
    }

    /// A body of many values: one per line, or a JSON array.
    pub(crate) fn body_lines<T: Shape>(mut self, max: usize) -> Self {
        let lines = Content {
            media_type: "application/x-ndjson",
            schema: Box::new(|schemas| texts("An update per line", schemas.request::<T>())),
            example: format!("{}\n", example::<T>()),
        };
        let array = Content::json(
            move |schemas| json!({"type": "array", "items": schemas.request::<T>(), "maxItems": max}),
            format!("[{}]", example::<T>()),
        );
        self.body = Some(Body { required: true, contents: vec![lines, array] });
        self
    }

    pub(crate) fn returns<T: Shape>(mut self) -> Self {
        self.responses.push(Content::json(Schemas::response::<T>, example::<T>()));
        self
    }

    /// Another response that the endpoint returns.
    pub(crate) fn or_returns<T: Shape>(self) -> Self {
        self.returns::<T>()
    }

    /// A response of many values, each framed as a text.
    pub(crate) fn streams<T: Shape>(
        mut self,
        media_type: &'static str,
        description: &'static str,
        frame: fn(&str) -> String,
    ) -> Self {
        self.responses.push(Content {
            media_type,
            schema: Box::new(|schemas| texts(description, schemas.response::<T>())),
            example: frame(&example::<T>()),
        });
        self
    }

    pub(crate) fn response_header(mut self, name: &'static str) -> Self {
        self.response_headers.push(name);
        self
    }

    pub(crate) fn errors(mut self, statuses: &'static [u16]) -> Self {
        self.errors = statuses;
        self
    }

    /// A change of a process: takes `If-Match`, and returns the new configuration.
    pub(crate) fn changes<T: Serialize + 'static>(self) -> Self
    where
        ChangeResponse<T>: Shape,
    {
        let returning = self.header("If-Match").returns::<ChangeResponse<T>>();
        returning.response_header("ETag").errors(&[404, 409, 412])
    }

    /// An endpoint that responds once its command is in the log.
    pub(crate) fn logs(self) -> Self {
        let logged = self.header("Idempotency-Key").header("Prefer").header("traceparent").returns::<UpdateAccepted>();
        logged.response_header("Idempotent-Replayed").response_header("Preference-Applied").errors(&[422])
    }

    /// The request as a curl command.
    fn curl(&self, endpoint: &Endpoint) -> String {
        let mut path = endpoint.path.to_owned();
        for (name, _, _, example) in components::PATH_PARAMETERS {
            path = path.replace(&format!("{{{name}}}"), example);
        }
        if !self.query_example.is_empty() {
            path = format!("{path}?{}", self.query_example);
        }
        let method = match (endpoint.method, &self.body) {
            ("GET", _) | ("POST", Some(_)) => String::new(),
            (method, _) => format!("-X {method} "),
        };
        let mut curl =
            format!("curl {method}'http://127.0.0.1:8080{path}' \\\n  -H \"Authorization: Bearer $API_KEY\"");
        if let Some(content) = self.body.as_ref().and_then(|body| body.contents.first()) {
            let (media_type, data) = (content.media_type, content.example.trim_end());
            curl += &format!(" \\\n  -H 'Content-Type: {media_type}' \\\n  -d '{data}'");
        }
        curl
    }
}

/// The schemas of types, collected as they are used.
struct Schemas {
    responses: SchemaGenerator,
    requests: Map<String, Value>,
}

impl Schemas {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Self { responses: Side::Written.of(settings).into_generator(), requests: components::requests() }
    }

    fn response<T: JsonSchema>(&mut self) -> Value {
        self.responses.subschema_for::<T>().to_value()
    }

    /// Requests have separate schemas: a field that is in every response may be absent from a request.
    fn request<T: JsonSchema>(&mut self) -> Value {
        let name = T::schema_name().into_owned();
        let reference = schema(&name);
        self.requests.entry(name).or_insert_with(components::request::<T>);
        reference
    }

    fn into_components(mut self) -> Map<String, Value> {
        let mut components = self.responses.take_definitions(true);
        components.append(&mut self.requests);
        components
    }
}

fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// A text of many JSON values.
fn texts(description: &str, schema: Value) -> Value {
    json!({
        "type": "string", "description": description, "contentMediaType": "application/json", "contentSchema": schema,
    })
}

pub(crate) fn id() -> Value {
    schema("ObjectId")
}

pub(crate) fn text() -> Value {
    text_up_to(1024)
}

pub(crate) fn text_up_to(max_chars: usize) -> Value {
    json!({"type": "string", "maxLength": max_chars})
}

pub(crate) fn date_time() -> Value {
    json!({"type": "string", "format": "date-time"})
}

pub(crate) fn one_of(names: &[&str]) -> Value {
    json!({"type": "string", "enum": names})
}

pub(crate) fn delivery_status() -> Value {
    one_of(&DeliveryStatus::ALL.map(DeliveryStatus::as_str))
}
