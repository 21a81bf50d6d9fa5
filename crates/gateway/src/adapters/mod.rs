//! 1 Accept: the webhooks of voice platforms as call events. Pure: the body of a webhook becomes the body of
//! `POST /api/v1/calls/started` or `/calls/ended`, which is parsed as any other.
//!
//! docs/guide/calls.md says what becomes what. A field that has no place in a call's result goes into its metadata as it
//! is. What would make the result too large is left out, the largest first, and named.

mod bland;
mod object;
mod report;
mod retell;
mod vapi;

use contract::{ObjectId, event::OutcomeKind, fields::BodyError, json, process::Platform};

pub(crate) use self::report::{CallReport, ReportId};
use self::{object::Object, report::Event};

/// The most characters of an event's name that a response repeats.
const NAME_CHARS: usize = 64;

/// What a webhook reports.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// A call began or ended.
    Call(CallReport),
    /// An event of another kind, by its name.
    Other(String),
}

/// Maps a webhook of a platform. A `referenceId` without a process is one of this process.
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
