//! Checks the verdicts that `leadctl audit` recorded last.

use async_nats::jetstream;
use contract::audit::AuditRecord;
use service_kit::audits::all_audits;

use super::check::Check;
use crate::output;

const CHECK: &str = "last audit";

/// One check for the last audit, or for each last audit that found violations.
pub(super) async fn examine(js: &jetstream::Context) -> Vec<Check> {
    // All entries: one that is left out may have violations.
    match all_audits(js, usize::MAX).await {
        Ok((audits, _)) => judge(&audits),
        Err(e) => vec![Check::unknown(CHECK, format!("{e:#}"))],
    }
}

/// Judges the last audits, the latest first.
fn judge(audits: &[AuditRecord]) -> Vec<Check> {
    let violated: Vec<_> = audits.iter().filter(|audit| !audit.is_clean()).map(violated).collect();
    if !violated.is_empty() {
        return violated;
    }
    // An audit of a project or of a range says nothing about the rest.
    match (audits.iter().find(|audit| audit.project_id.is_none() && audit.is_whole()), audits.first()) {
        (Some(whole), _) => vec![Check::ok(CHECK, clean(whole))],
        (None, Some(part)) => {
            vec![Check::unknown(CHECK, format!("{}; none of all updates: run `leadctl audit`", clean(part)))]
        }
        (None, None) => vec![Check::unknown(CHECK, "never: run `leadctl audit`")],
    }
}

fn clean(audit: &AuditRecord) -> String {
    let AuditRecord { ended_at, updates, .. } = audit;
    format!("{}, clean, {updates} updates checked{}", output::minute(*ended_at), scope(audit))
}

fn violated(audit: &AuditRecord) -> Check {
    let AuditRecord { ended_at, violations, worst, project_id, .. } = audit;
    let worst = worst.as_deref().unwrap_or("unknown");
    let noun = if *violations == 1 { "violation" } else { "violations" };
    let finding = format!("{}, {violations} {noun}{}, most of {worst}", output::minute(*ended_at), scope(audit));
    let project = project_id.map(|id| format!(" --project {id}")).unwrap_or_default();
    Check::failed(
        CHECK,
        finding,
        format!("leadctl audit{project}: docs/operations/runbooks.md, LeadrelayAuditViolated"),
    )
}

/// What the audit covers; empty if all updates.
fn scope(audit: &AuditRecord) -> String {
    let mut scope = audit.project_id.map(|id| format!(" of project {id}")).unwrap_or_default();
    for (word, bound) in [("from", audit.from), ("to", audit.to)] {
        if let Some(at) = bound {
            scope.push_str(&format!(" {word} {}", output::minute(at)));
        }
    }
    if scope.is_empty() { scope } else { format!(", only{scope}") }
}

#[cfg(test)]
mod tests {
    use contract::{ObjectId, Timestamp};

    use super::*;
    use crate::doctor::check::State;

    fn audit() -> AuditRecord {
        AuditRecord {
            project_id: None,
            from: None,
            to: None,
            began_at: Timestamp::from_millis(1_768_193_759_048),
            ended_at: Timestamp::from_millis(1_768_193_760_048),
            updates: 7,
            unchecked: 0,
            violations: 0,
            worst: None,
        }
    }

    /// The state and the finding of the only check.
    fn judged(audits: &[AuditRecord]) -> (State, String) {
        let [check] = judge(audits).try_into().unwrap();
        (check.state, check.finding)
    }

    #[test]
    fn only_a_clean_audit_of_everything_passes() {
        assert_eq!(judged(&[]), (State::Unknown, "never: run `leadctl audit`".into()));
        assert_eq!(judged(&[audit()]), (State::Ok, "2026-01-12T04:56Z, clean, 7 updates checked".into()));
        let range = AuditRecord { from: Some(Timestamp::from_millis(0)), ..audit() };
        let project = AuditRecord { project_id: Some(ObjectId::from_bytes([1; 12])), ..audit() };
        let (state, finding) = judged(std::slice::from_ref(&range));
        assert_eq!(state, State::Unknown);
        assert!(finding.contains("clean, 7 updates checked, only from 1970-01-01T00:00Z; none of all"), "{finding}");
        assert_eq!(judged(&[project]).0, State::Unknown);
        assert_eq!(judged(&[range, audit()]).0, State::Ok);
    }

    #[test]
    fn violations_fail_beside_a_clean_audit_of_something_else() {
        let id = ObjectId::from_bytes([1; 12]);
        let violated = AuditRecord {
            project_id: Some(id),
            violations: 3,
            worst: Some("lead_differs: 6b04 the lead does not exist".into()),
            ..audit()
        };

        let (state, finding) = judged(&[audit(), violated]);

        assert_eq!(state, State::Failed);
        let expected = format!(
            "2026-01-12T04:56Z, 3 violations, only of project {id}, most of lead_differs: 6b04 the lead does not exist"
        );
        assert_eq!(finding, expected);
    }
}
