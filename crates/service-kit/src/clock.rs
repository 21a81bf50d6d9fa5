//! The one place where time and randomness come from. Decisions take them as arguments.

use contract::{ObjectId, Timestamp};

/// The wall clock.
pub fn now() -> Timestamp {
    std::time::SystemTime::now().into()
}

/// A new id, of now.
pub fn new_id() -> ObjectId {
    ObjectId::new(now(), rand::random())
}

/// A new trace, for what came without one.
pub fn new_traceparent() -> String {
    contract::trace::new_traceparent(rand::random())
}
