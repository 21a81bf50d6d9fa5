//! Clients of NATS, Postgres and the gateway.

pub(crate) mod admin;
pub(crate) mod event_stream;
pub(crate) mod gateway;
pub(crate) mod postgres;
pub(crate) mod stream_reader;
