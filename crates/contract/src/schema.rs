//! JSON Schemas of what crosses NATS, made of the types; for tests, and the documents in `proto-schemas/` that they keep.

use std::{env, fs, path::PathBuf};

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use crate::rpc::Query;

/// The variable that has the documents written instead of compared: `just schemas`.
const UPDATE: &str = "UPDATE_SCHEMAS";

/// From which side a schema looks at a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What is accepted: a field that may be missing is not required.
    Read,
    /// What is sent: every field that is always there is required.
    Written,
}

impl Side {
    /// These settings, from this side.
    pub fn of(self, settings: SchemaSettings) -> SchemaSettings {
        match self {
            Self::Read => settings.for_deserialize(),
            Self::Written => settings.for_serialize(),
        }
    }
}

/// The schema of a message, complete in itself. Draft 7 is what AsyncAPI, and every validator and generator of code, reads.
pub fn message<T: JsonSchema>(side: Side) -> Value {
    let generator = side.of(SchemaSettings::draft07()).into_generator();
    plain(generator.into_root_schema_for::<T>().to_value())
}

/// The same with descriptions for people who do not read Rust: without links into the code, a paragraph a line.
pub fn plain(mut schema: Value) -> Value {
    match &mut schema {
        Value::Array(items) => items.iter_mut().for_each(|item| *item = plain(item.take())),
        Value::Object(members) => {
            for (name, member) in members.iter_mut() {
                match member {
                    Value::String(text) if name == "description" => *text = without_links(text),
                    other => *other = plain(other.take()),
                }
            }
        }
        _ => {}
    }
    schema
}

/// A query, for the documents.
#[derive(Debug)]
pub struct QueryEntry {
    /// The subject.
    pub subject: &'static str,
    /// Whether it may be sent more than once.
    pub repeatable: bool,
    /// The request's name and schema.
    pub request: (String, Value),
    /// The name and schema of the reply, or of the items of which the reply is a list.
    pub reply: (String, Value),
    /// Whether the reply is a JSON array.
    pub is_list: bool,
}

impl QueryEntry {
    /// Describes a query whose reply, or the item of its reply, is `R`.
    pub fn new<Q: Query + JsonSchema, R: JsonSchema>(is_list: bool) -> Self {
        Self {
            subject: Q::SUBJECT,
            repeatable: Q::REPEATABLE,
            request: (Q::schema_name().into_owned(), message::<Q>(Side::Read)),
            reply: (R::schema_name().into_owned(), message::<R>(Side::Written)),
            is_list,
        }
    }

    /// The service that answers it.
    pub fn service(&self) -> &'static str {
        if self.subject.starts_with("webhooks.") { "webhook-notifier" } else { "lead-state" }
    }
}

/// ``[`Name`](path)`` and ``[`Name`]`` become `` `Name` ``.
fn without_links(text: &str) -> String {
    let mut told = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("[`") {
        told.push_str(before);
        let Some((name, after)) = link.split_once("`]") else {
            rest = link;
            break;
        };
        told.extend(["`", name, "`"]);
        let target = after.strip_prefix('(').and_then(|target| target.split_once(')'));
        rest = target.map_or(after, |(_, after)| after);
    }
    told.push_str(rest);
    told
}

/// Holds a generated document of `proto-schemas/` against what it should be, or writes it.
///
/// # Panics
/// It is not what it should be.
pub fn keep(file: &str, document: &Value) {
    let text = format!("{document:#}\n");
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto-schemas")).join(file);
    if env::var_os(UPDATE).is_some() {
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
        return;
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    if kept != text {
        let line = kept.lines().zip(text.lines()).take_while(|(kept, made)| kept == made).count() + 1;
        panic!(
            "proto-schemas/{file} is not what the code says, from line {line} on: `just schemas` \
             (UPDATE_SCHEMAS=1 cargo test -p contract -p gateway schema) writes it anew; look at the difference, \
             and commit it if clients may see it"
        );
    }
}
