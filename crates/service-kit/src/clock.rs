//! The only source of time and randomness. Decisions take them as arguments.

use std::time::SystemTime;

use contract::{ObjectId, Timestamp};

/// The wall clock.
pub fn now() -> Timestamp {
    precise().into()
}

/// The wall clock in full precision, for spans, most of which take less than two milliseconds.
pub fn precise() -> SystemTime {
    SystemTime::now()
}

/// A new id with the current time.
pub fn new_id() -> ObjectId {
    ObjectId::new(now(), rand::random())
}

/// A new trace, for a message without one.
pub fn new_traceparent() -> String {
    contract::trace::new_traceparent(rand::random())
}
