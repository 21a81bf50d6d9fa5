//! The work that updates cause, in bytes: lead-state reports it per project after each batch, gateways charge it to the
//! project's budget.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ObjectId;

/// The work that some updates of a project cause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The number of updates.
    pub updates: u64,
    /// The bytes that are read, merged, stored and sent for them.
    pub bytes: u64,
}

/// The work of a batch. Published without an ack: the work of a lost report is not charged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkReport {
    /// By project.
    pub projects: BTreeMap<ObjectId, Work>,
}

impl WorkReport {
    /// Adds the work of one update.
    pub fn add(&mut self, project_id: ObjectId, bytes: u64) {
        let work = self.projects.entry(project_id).or_default();
        work.updates += 1;
        work.bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_this_wire_form() {
        let mut report = WorkReport::default();
        report.add(ObjectId::from_bytes([1; 12]), 4000);
        report.add(ObjectId::from_bytes([1; 12]), 500);
        let text = serde_json::to_string(&report).unwrap();
        insta::assert_snapshot!(text, @r#"{"projects":{"010101010101010101010101":{"updates":2,"bytes":4500}}}"#);
        assert_eq!(serde_json::from_str::<WorkReport>(&text).unwrap(), report);
    }
}
