//! Postgres, as far as several services need the same of it.

pub mod pinned;
pub mod schema;

pub use self::{pinned::PinnedConnection, schema::Schema};
