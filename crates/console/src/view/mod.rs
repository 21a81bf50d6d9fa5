//! The building blocks of pages. Everything here is pure.

pub(crate) mod chart;
pub(crate) mod diff;
pub(crate) mod graph;
pub(crate) mod layout;
pub(crate) mod parts;
