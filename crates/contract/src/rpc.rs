//! Queries and administration: NATS micro services (ADR-32), request and reply in JSON.
//!
//! An error comes in the headers `Nats-Service-Error-Code` (an HTTP status) and `Nats-Service-Error`
//! (`{code}: {message}`), with an empty body. The rows in `query.rs` tie each request to its subject and reply.

mod callback;
mod delivery;
mod lead;
mod page;
mod process;
mod project;
mod query;
mod recovery;
mod update;

#[cfg(feature = "schema")]
pub use self::query::catalog;
pub use self::{
    callback::*,
    delivery::*,
    lead::*,
    page::{Cursor, DEFAULT_LIMIT, MAX_LIMIT, Page, clamp},
    process::*,
    project::*,
    query::{DEFAULT_TIMEOUT, Query, SUBJECTS},
    recovery::*,
    update::*,
};

use crate::text::bounded_error;

/// Why a query was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// The HTTP status that fits.
    pub status: u16,
    /// Stable, snake_case, for programs.
    pub code: String,
    /// One sentence, for people.
    pub message: String,
}

impl RpcError {
    /// An error with this status, code and message, which is cut at
    /// [`MAX_ERROR_CHARS`](crate::text::MAX_ERROR_CHARS).
    pub fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: bounded_error(message) }
    }
}
