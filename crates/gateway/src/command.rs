//! 1 Accept: the commands of clients and producers. There is one parser per kind of command.

use contract::{
    ObjectId, call_body,
    command::{CallEnded, CallStarted, EraseLead, UpdateCommand},
    event::OutcomeKind,
    fields::BodyError,
    update_body::UpdateBody,
};
use serde::Serialize;

/// A command of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Command {
    Update(Box<UpdateCommand>),
    CallStarted(CallStarted),
    CallEnded(CallEnded),
    Erase(EraseLead),
}

/// A command without its ids, and warnings about ignored fields of its body.
pub(crate) type ParsedCommand = (Command, Vec<String>);

impl Command {
    /// Parses the body of a request or a message: an update or a call event.
    pub(crate) fn parse(kind: OutcomeKind, body: &[u8], project_id: ObjectId) -> Result<ParsedCommand, BodyError> {
        match kind {
            OutcomeKind::Update => UpdateBody::parse(body, Some(project_id)).map(Self::update),
            _ => Self::parse_call(kind, body, project_id),
        }
    }

    /// Parses a line of a bulk request.
    pub(crate) fn parse_line(kind: OutcomeKind, line: &[u8], project_id: ObjectId) -> Result<ParsedCommand, BodyError> {
        match kind {
            OutcomeKind::Update => UpdateBody::parse_line(line, Some(project_id)).map(Self::update),
            _ => Self::parse_call(kind, line, project_id),
        }
    }

    /// The command that erases a lead. It has no body: the path names the lead.
    pub(crate) fn erase(lead_id: ObjectId) -> Self {
        Self::Erase(EraseLead { update_id: None, lead_id, api_key_id: None })
    }

    /// The command of a parsed update.
    pub(crate) fn update(UpdateBody { mut command, warnings }: UpdateBody) -> ParsedCommand {
        command.warnings.clone_from(&warnings);
        (Self::Update(Box::new(command)), warnings)
    }

    fn parse_call(kind: OutcomeKind, body: &[u8], project_id: ObjectId) -> Result<ParsedCommand, BodyError> {
        let call = match kind {
            OutcomeKind::CallStarted => Self::CallStarted(call_body::parse_started(body, project_id)?),
            _ => Self::CallEnded(call_body::parse_ended(body, project_id)?),
        };
        Ok((call, Vec::new()))
    }

    pub(crate) fn kind(&self) -> OutcomeKind {
        match self {
            Self::Update(_) => OutcomeKind::Update,
            Self::CallStarted(_) => OutcomeKind::CallStarted,
            Self::CallEnded(_) => OutcomeKind::CallEnded,
            Self::Erase(_) => OutcomeKind::Erase,
        }
    }

    /// Gives the command its id, and the API key of its request if it has one.
    pub(crate) fn identify(&mut self, id: ObjectId, key_id: Option<ObjectId>) {
        let (update_id, api_key_id) = match self {
            Self::Update(update) => (&mut update.update_id, &mut update.api_key_id),
            Self::CallStarted(call) => (&mut call.update_id, &mut call.api_key_id),
            Self::CallEnded(call) => (&mut call.update_id, &mut call.api_key_id),
            Self::Erase(erase) => (&mut erase.update_id, &mut erase.api_key_id),
        };
        *update_id = Some(id);
        *api_key_id = key_id;
    }
}
