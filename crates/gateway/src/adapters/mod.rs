//! 1 Accept: maps the webhooks of voice platforms to call events. Pure: the body of a webhook becomes the body of
//! `POST /api/v1/calls/started` or `/calls/ended`, which is then parsed like a client's.
//!
//! docs/guide/calls.md has the mapping. A field without a counterpart in a call's result is copied into the result's
//! metadata. If the result is too large, its largest fields are left out, and the metadata lists their names.

mod bland;
mod object;
mod report;
mod retell;
mod vapi;

use contract::{ObjectId, event::OutcomeKind, fields::BodyError, json, process::Platform};

pub(crate) use self::report::{CallReport, ReportId};
use self::{object::Object, report::Event};

/// Longest event name in a response, in characters.
const NAME_CHARS: usize = 64;

/// What a webhook reports.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// A call began or ended.
    Call(CallReport),
    /// An event of another kind, by its name.
    Other(String),
}

/// Maps a platform's webhook. A `referenceId` without a `processId` names a lead of this process.
pub(crate) fn map(platform: Platform, body: &[u8], process_id: Option<ObjectId>) -> Result<Report, BodyError> {
    let text = json::check(body).map_err(BodyError::InvalidJson)?;
    let object = Object::parse(text).ok_or(BodyError::NotAnObject)?;
    let event = match platform {
        Platform::Vapi => vapi::read(object)?,
        Platform::Retell => retell::read(object)?,
        Platform::Bland => bland::read(object)?,
    };
    match event {
        Event::Started(call) => Ok(Report::Call(call.report(OutcomeKind::CallStarted, "started", None, process_id)?)),
        Event::Ended(call) => Ok(Report::Call(call.report(OutcomeKind::CallEnded, "ended", None, process_id)?)),
        Event::Completed(call, result) => {
            Ok(Report::Call(call.report(OutcomeKind::CallEnded, "result", Some(result), process_id)?))
        }
        Event::Other(name) => Ok(Report::Other(name.chars().take(NAME_CHARS).collect())),
    }
}

#[cfg(test)]
mod tests;
