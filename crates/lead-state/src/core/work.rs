//! 4 Decide: the work that a batch causes, per project. Pure.

use contract::{ObjectId, work::WorkReport};

use super::batch::Plan;

/// How often the metadata of an update's lead is copied, in addition to once per callback: it is merged, written to the
/// lead and the ledger, and announced.
const COPIES: u64 = 4;

/// The work of a plan, given how many callbacks each process has.
pub fn of(plan: &Plan, callbacks: impl Fn(ObjectId) -> u64) -> WorkReport {
    let mut report = WorkReport::default();
    for row in &plan.rows {
        let metadata = row.event.data.as_ref().map_or(0, |data| data.get().len() as u64);
        let copies = COPIES + row.event.process_id.map_or(0, &callbacks);
        report.add(row.event.project_id, row.text.len() as u64 + metadata * copies);
    }
    for queued in &plan.newly_queued {
        report.add(queued.update.project_id, queued.update.text.len() as u64);
    }
    report
}
