//! Checks of the data: `leadctl audit`, and independent checks in SQL and against the webhooks.

use std::collections::HashSet;

use contract::ObjectId;
use serde_json::Value;
use sqlx::PgPool;
use test_support::{Request, eventually};

use super::{Stack, TEST_TIMEOUT, by_update};

impl Stack {
    /// Runs `leadctl audit`, and returns its exit code and its report.
    pub(crate) async fn audit(&self, args: &[&str]) -> (i32, Value) {
        let run = self.leadctl(&[&["audit", "--json"], args].concat()).await;
        (run.code, run.json())
    }

    /// Waits until everything is applied, announced and delivered, and the audit is clean. Returns its report.
    pub(crate) async fn wait_for_clean_audit(&self) -> Value {
        eventually(TEST_TIMEOUT * 2, "a clean audit with nothing pending", async || {
            let (code, report) = self.audit(&[]).await;
            let pending = report["updates"]["pending"] != 0
                || report["callbacks"].as_array().expect("callbacks").iter().any(|callback| callback["pending"] != 0)
                || report["checkpoint"]["announcedSequence"] != report["checkpoint"]["lastSequence"];
            if code == 0 && !pending { Ok(report) } else { Err(report.to_string()) }
        })
        .await
    }
}

/// Asserts that every accepted update of a project is in the ledger exactly once, was applied in the order of the log,
/// and was delivered with one body.
pub(crate) async fn assert_exactly_once(pool: &PgPool, project: ObjectId, accepted: &[String], requests: &[Request]) {
    let project = project.as_bytes();
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT encode(update_id, 'hex') FROM lead_state.lead_updates WHERE project_id = $1")
            .bind(project)
            .fetch_all(pool)
            .await
            .expect("the ledger");
    let ledger: HashSet<&String> = ids.iter().collect();
    assert_eq!(ids.len(), ledger.len(), "an update is in the ledger twice");
    let lost: Vec<_> = accepted.iter().filter(|id| !ledger.contains(id)).collect();
    assert!(lost.is_empty(), "accepted and not in the ledger: {lost:?}");

    // Versions have no gaps in log order, and every lead has its last version.
    for (broken, what) in [
        (
            "SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY lead_id
                                           ORDER BY log_epoch, log_sequence, log_index) AS place
                                   FROM lead_state.lead_updates WHERE success AND project_id = $1) AS u
             WHERE version <> place + 1",
            "versions do not follow the log",
        ),
        (
            "SELECT count(*) FROM lead_state.leads l WHERE project_id = $1 AND l.version <>
                 1 + (SELECT count(*) FROM lead_state.lead_updates u WHERE u.lead_id = l.lead_id AND u.success)",
            "a lead differs from its ledger rows",
        ),
    ] {
        let count: i64 = sqlx::query_scalar(broken).bind(project).fetch_one(pool).await.expect(broken);
        assert_eq!(count, 0, "{what}");
    }

    let delivered = by_update(requests);
    let missing: Vec<_> = ids.iter().filter(|id| !delivered.contains_key(*id)).collect();
    assert!(missing.is_empty(), "in the ledger and not delivered: {missing:?}");
    assert_eq!(delivered.len(), ids.len(), "delivered and not in the ledger");
    for bodies in delivered.values() {
        assert!(bodies.iter().all(|body| body == &bodies[0]), "one update with two bodies: {bodies:?}");
    }
}
