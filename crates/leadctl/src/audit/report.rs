//! The report of an audit, as JSON and as text.

use contract::{Timestamp, audit::AuditRecord};
use serde::Serialize;

use super::scope::Scope;
use crate::output::{self, escape::escaped, say};

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) clean: bool,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) updates: UpdateCounts,
    pub(crate) callbacks: Vec<CallbackCounts>,
    /// Projects with parked events.
    pub(crate) parked: Vec<ParkedCounts>,
    pub(crate) invariants: Vec<CheckedInvariant>,
    pub(crate) unchecked: Vec<Unchecked>,
}

/// How far the log is applied and announced.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Checkpoint {
    #[serde(skip)]
    pub(crate) stream_created_at: String,
    pub(crate) generation: i32,
    pub(crate) epoch: i32,
    pub(crate) last_sequence: i64,
    #[serde(skip)]
    pub(crate) last_index: i32,
    pub(crate) announced_epoch: i32,
    pub(crate) announced_sequence: i64,
    #[serde(skip)]
    pub(crate) announced_index: i32,
}

/// Updates and call events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct UpdateCounts {
    pub(crate) accepted: i64,
    pub(crate) succeeded: i64,
    pub(crate) failed: i64,
    /// In the log after the checkpoint, or queued.
    pub(crate) pending: i64,
    /// Queued until a call ends.
    pub(crate) queued: i64,
    /// Log entries that repeat an update or call event.
    pub(crate) duplicates: i64,
    pub(crate) dead_letters: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CallbackCounts {
    pub(crate) callback_id: String,
    /// Null if the callback was removed.
    pub(crate) name: Option<String>,
    pub(crate) announced: i64,
    pub(crate) delivered: i64,
    pub(crate) exhausted: i64,
    /// With another attempt to come, or announced and not dispatched yet.
    pub(crate) pending: i64,
    /// In events that wait until their process can be read.
    pub(crate) parked: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ParkedCounts {
    pub(crate) project_id: String,
    pub(crate) events: i64,
}

#[derive(Debug, Serialize)]
pub(crate) struct CheckedInvariant {
    pub(crate) invariant: &'static str,
    pub(crate) statement: &'static str,
    pub(crate) count: i64,
    pub(crate) violations: Vec<Violation>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Violation {
    /// The update, delivery (`updateId/callbackId`), lead or stream.
    pub(crate) id: String,
    pub(crate) fault: String,
}

/// Rows that could not be checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Unchecked {
    pub(crate) invariant: &'static str,
    pub(crate) count: i64,
    pub(crate) reason: &'static str,
}

impl Report {
    /// The verdict, as it is recorded.
    pub(crate) fn record(&self, scope: Scope, began_at: Timestamp, ended_at: Timestamp) -> AuditRecord {
        let Scope { from, to, project_id } = scope;
        let worst = self.invariants.iter().filter(|checked| checked.count > 0).max_by_key(|checked| checked.count);
        let worst = worst.map(|CheckedInvariant { invariant, violations, .. }| match violations.first() {
            Some(Violation { id, fault }) => format!("{invariant}: {id} {fault}"),
            None => (*invariant).to_owned(),
        });
        AuditRecord {
            project_id,
            from,
            to,
            began_at,
            ended_at,
            updates: self.updates.accepted,
            unchecked: self.unchecked.iter().map(|unchecked| unchecked.count).sum(),
            violations: self.invariants.iter().map(|checked| checked.count).sum(),
            worst,
        }
    }

    pub(crate) fn show(&self) {
        let UpdateCounts { accepted, succeeded, failed, pending, queued, duplicates, dead_letters } = self.updates;
        say(format_args!("{accepted:>10} updates and call events accepted"));
        for (count, what) in [(succeeded, "succeeded"), (failed, "failed"), (pending, "pending")] {
            say(format_args!("{count:>10}   {what}"));
        }
        if queued > 0 {
            say(format_args!("{queued:>10}     of these queued during calls"));
        }
        say(format_args!("{duplicates:>10} duplicates, applied once"));
        say(format_args!("{dead_letters:>10} dead letters"));
        if !self.callbacks.is_empty() {
            let row = |callback: &CallbackCounts| {
                let CallbackCounts { callback_id, name, announced, delivered, exhausted, pending, parked } = callback;
                let counts = [announced, delivered, exhausted, pending, parked].map(|count| format!("{count:>9}"));
                let [announced, delivered, exhausted, pending, parked] = counts;
                let name = name.clone().unwrap_or_else(|| "(removed)".to_owned());
                [callback_id.clone(), announced, delivered, exhausted, pending, parked, name]
            };
            let head = ["CALLBACK", "ANNOUNCED", "DELIVERED", "EXHAUSTED", "  PENDING", "   PARKED", "NAME"];
            let rows: Vec<_> = self.callbacks.iter().map(row).collect();
            say(format_args!("\n{}", output::table(Some(head), &rows)));
        }
        for ParkedCounts { project_id, events } in &self.parked {
            say(format_args!("{events:>10} events of project {project_id} are parked: their process cannot be read"));
        }
        say("");
        for Unchecked { invariant, count, reason } in &self.unchecked {
            say(format_args!("not checked  {invariant}: {count}: {reason}"));
        }
        let violated: Vec<_> = self.invariants.iter().filter(|checked| checked.count > 0).collect();
        for CheckedInvariant { invariant, statement, count, violations } in &violated {
            say(format_args!("VIOLATED  {invariant}: {count} violations of: {statement}"));
            for Violation { id, fault } in violations {
                say(format_args!("  {id}  {}", escaped(fault)));
            }
            let more = count - violations.len() as i64;
            if more > 0 {
                say(format_args!("  and {more} more; --json lists all"));
            }
        }
        let all = self.invariants.len();
        match violated.len() {
            0 => say(format_args!("CLEAN: all {all} invariants hold")),
            some => say(format_args!("NOT CLEAN: {some} of {all} invariants are violated")),
        }
    }
}
