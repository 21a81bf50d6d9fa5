//! The pages: a handler that sends the queries, and a pure function that renders their replies.

pub(crate) mod actions;
mod audits;
pub(crate) mod board;
pub(crate) mod callbacks;
pub(crate) mod calls;
pub(crate) mod dead_letters;
pub(crate) mod deliveries;
mod failures;
pub(crate) mod go;
pub(crate) mod keys;
pub(crate) mod leads;
pub(crate) mod login;
pub(crate) mod portal;
pub(crate) mod processes;
pub(crate) mod projects;
mod statistics;
pub(crate) mod system;
pub(crate) mod updates;

#[cfg(test)]
mod tests;
