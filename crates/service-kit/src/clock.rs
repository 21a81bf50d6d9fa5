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
