//! Queries and administration: NATS micro services (ADR-32), request and reply in JSON.
//!
//! An error comes in the headers `Nats-Service-Error-Code` (an HTTP status) and `Nats-Service-Error`
//! (`{code}: {message}`), with an empty body. The rows in `query.rs` tie each request to its subject and reply.

mod callback;
mod delivery;
mod error;
mod lag;
mod lead;
mod page;
mod process;
mod project;
mod query;
mod recovery;
mod source;
mod statistics;
mod update;

#[cfg(feature = "schema")]
pub use self::query::catalog;
pub use self::{
    callback::*,
    delivery::*,
    error::{ErrorCode, RpcError},
    lag::*,
    lead::*,
    page::{Cursor, DEFAULT_LIMIT, MAX_LIMIT, Page, clamp},
    process::*,
    project::*,
    query::{DEFAULT_TIMEOUT, Query, SUBJECTS},
    recovery::*,
    source::*,
    statistics::*,
    update::*,
};
