//! Production as it runs: replicated servers that fail over.

mod postgres;
