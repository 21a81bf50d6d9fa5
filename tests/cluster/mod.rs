//! Production as it runs: replicated servers that fail over.

mod nats;
mod postgres;
