//! The one place where time and randomness come from. Decisions take them as arguments.

use std::time::SystemTime;

use contract::{ObjectId, Timestamp};

/// The wall clock.
pub fn now() -> Timestamp {
    precise().into()
}

/// The wall clock, finer than what crosses NATS: for spans, most of which take less than a millisecond or two.
pub fn precise() -> SystemTime {
    SystemTime::now()
}

/// A new id, of now.
pub fn new_id() -> ObjectId {
    ObjectId::new(now(), rand::random())
}

/// A new trace, for what came without one.
pub fn new_traceparent() -> String {
    contract::trace::new_traceparent(rand::random())
}
