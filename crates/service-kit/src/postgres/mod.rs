//! The Postgres code that several services share: a pool whose waits all have a deadline, and supervision of the server
//! behind it.

mod connections;
pub mod error;
mod pinned;
mod pool;
pub mod schema;
mod server;
mod session;
mod supervision;

pub use self::{
    pinned::PinnedConnection,
    pool::Pool,
    schema::Schema,
    server::{DatabaseUrlError, servers},
    session::{Session, Transaction},
    supervision::{PostgresMetrics, Supervision, until_lost},
};
