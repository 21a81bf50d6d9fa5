//! JSON Schemas of the messages, generated from the types, and the documents in `proto-schemas/`.

use std::{env, fs, path::PathBuf};

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use crate::rpc::Query;

/// If this variable is set, the documents are written instead of compared: `just schemas`.
const UPDATE: &str = "UPDATE_SCHEMAS";

/// The direction of the messages that a schema describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Messages that are read: fields with a default are not required.
    Read,
    /// Messages that are written: fields that are always present are required.
    Written,
}

impl Side {
    /// The settings for this side.
    pub fn of(self, settings: SchemaSettings) -> SchemaSettings {
        match self {
            Self::Read => settings.for_deserialize(),
            Self::Written => settings.for_serialize(),
        }
    }
}

/// The self-contained schema of a message. AsyncAPI, validators and code generators all read draft 7.
pub fn message<T: JsonSchema>(side: Side) -> Value {
    let generator = side.of(SchemaSettings::draft07()).into_generator();
    plain(generator.into_root_schema_for::<T>().to_value())
}

/// The schema with descriptions that have no links into the Rust code.
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
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("[`") {
        plain.push_str(before);
        let Some((name, after)) = link.split_once("`]") else {
            rest = link;
            break;
        };
        plain.extend(["`", name, "`"]);
        let target = after.strip_prefix('(').and_then(|target| target.split_once(')'));
        rest = target.map_or(after, |(_, after)| after);
    }
    plain.push_str(rest);
    plain
}

/// Compares a document of `proto-schemas/` with the generated one, or writes it.
///
/// # Panics
/// The documents differ.
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
            "proto-schemas/{file} differs from the code at line {line}: run `just schemas` \
             (UPDATE_SCHEMAS=1 cargo test -p contract -p gateway schema), review the difference, and commit it"
        );
    }
}
