//! The part of the updates that is audited.

use contract::{ObjectId, Timestamp, subject::CommandSubject};

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scope {
    /// Updates logged at or after this time.
    pub(crate) from: Option<Timestamp>,
    /// Updates logged before this time.
    pub(crate) to: Option<Timestamp>,
    pub(crate) project_id: Option<ObjectId>,
}

impl Scope {
    pub(crate) fn contains(&self, logged_at: Timestamp) -> bool {
        self.from.is_none_or(|from| logged_at >= from) && self.to.is_none_or(|to| logged_at < to)
    }

    /// Whether a message of the command log belongs to the scope's project.
    pub(crate) fn contains_command(&self, subject: &str) -> bool {
        let project = || CommandSubject::parse(subject).ok().map(|subject| subject.project_id);
        self.project_id.is_none_or(|id| project() == Some(id))
    }

    /// The subjects of the scope's project below `prefix`, or `all`.
    pub(crate) fn subjects(&self, all: &str, prefix: &str) -> String {
        self.project_id.map_or_else(|| all.to_owned(), |id| format!("{prefix}.{id}.>"))
    }
}
