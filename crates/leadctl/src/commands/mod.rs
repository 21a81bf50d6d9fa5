//! One module per subcommand; the larger ones (import, audit, doctor, dead-letters) have modules of their own.

pub(crate) mod call;
pub(crate) mod callback;
mod callback_failures;
pub(crate) mod console;
pub(crate) mod deliveries;
pub(crate) mod events;
pub(crate) mod key;
pub(crate) mod lead;
pub(crate) mod lead_export;
pub(crate) mod listen;
pub(crate) mod migrate;
mod paging;
pub(crate) mod process;
pub(crate) mod project;
pub(crate) mod recover;
pub(crate) mod secrets;
mod sending;
pub(crate) mod source;
pub(crate) mod stats;
pub(crate) mod update;
