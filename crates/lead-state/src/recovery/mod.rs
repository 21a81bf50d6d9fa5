//! 3 Read in order, 6 Announce: detects that the log, the checkpoint and the events do not share one history, and
//! repairs it.
//!
//! Postgres or NATS may be restored to an older state or lose data, each without the other.
//! [`diagnose`](diagnose::diagnose) only reports what is certain. Every repair is a compare-and-set on the
//! [`Checkpoint`](crate::store::checkpoint::Checkpoint) that begins a new generation or epoch, so that an earlier
//! leader can write nothing more.

pub(crate) mod api;
pub(crate) mod diagnose;
pub(crate) mod state;
pub(crate) mod watch;
