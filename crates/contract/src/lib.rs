//! Everything that crosses NATS: subjects, streams, buckets, commands, events, queries and ids.
//!
//! Each wire message is one frozen struct with a snapshot of its bytes. Fields may be added as optional ones, never
//! renamed or retyped. Unknown fields are ignored on read, except in queries, which refuse them.

pub mod activity;
pub mod audit;
pub mod call_body;
pub mod call_result;
pub mod command;
pub mod console;
pub mod event;
pub mod event_kind;
pub mod fields;
pub mod headers;
pub mod id;
pub mod idempotency;
pub mod json;
pub mod key;
mod named;
pub mod operational;
pub mod pack;
pub mod phone;
pub mod position;
pub mod process;
#[cfg(test)]
mod proto_schemas;
pub mod replay;
pub mod rpc;
#[cfg(feature = "schema")]
pub mod schema;
#[cfg(test)]
mod schema_files;
pub mod secret;
pub mod streams;
pub mod subject;
pub mod text;
pub mod time;
pub mod trace;
pub mod update_body;
pub mod warning;
pub mod webhook;
pub mod work;

pub use crate::{id::ObjectId, json::JsonObject, time::Timestamp};
