//! The last audits: on the board of a project, and on the page of the system.

use contract::{ObjectId, Timestamp, audit::AuditRecord};
use maud::{Markup, html};
use service_kit::audits::{all_audits, audits_of};

use crate::{
    app::Broker,
    fault::Fault,
    view::parts::{Kind, ago, badge, fact, notice, table, time},
    visit::Visit,
};

/// Most entries of projects that the page of the system reads. More would make it slow.
const MAX_ENTRIES: usize = 100;

/// The last audits of all scopes.
pub(super) struct Audits {
    /// The latest first.
    pub(super) last: Vec<AuditRecord>,
    /// How many entries of projects were not read.
    pub(super) left_out: usize,
}

/// The last audits of a project, for its board. Visitors who see every project also see the audits of all projects
/// together.
pub(super) async fn of_project(visit: &Visit, project_id: ObjectId) -> Result<Vec<AuditRecord>, Fault> {
    let with_those_of_all = visit.session.role.sees_all();
    audits_of(&visit.app.broker()?.js, project_id, with_those_of_all).await.map_err(unavailable)
}

/// The last audits of all scopes.
pub(super) async fn all(broker: &Broker) -> Result<Audits, Fault> {
    let (last, left_out) = all_audits(&broker.js, MAX_ENTRIES).await.map_err(unavailable)?;
    Ok(Audits { last, left_out })
}

fn unavailable(error: anyhow::Error) -> Fault {
    tracing::warn!("cannot read the verdicts of audits: {error:#}");
    Fault::Unavailable("The verdicts of audits cannot be read. Reload the page to try again.".into())
}

/// The last audits as a fact of a board. Only visitors who see all projects see the violated invariant: it may concern
/// the log as a whole.
pub(super) fn on_board(
    project: ObjectId,
    audits: &Result<Vec<AuditRecord>, Fault>,
    sees_all: bool,
    now: Timestamp,
) -> Markup {
    let command = if sees_all { "leadctl audit".to_owned() } else { format!("leadctl audit --project {project}") };
    let value = html! {
        @match audits {
            Err(fault) => (notice(fault)),
            Ok(audits) if audits.is_empty() => { "never: run " code { (command) } }
            Ok(audits) => {
                @for audit in audits {
                    div {
                        (time(audit.ended_at)) " (" (ago(audit.ended_at, now)) ") " (verdict(audit)) ", "
                        (audit.updates) " updates checked"
                        @if sees_all || !audit.is_whole() { " of " (scope(audit)) }
                        @if let Some(worst) = audit.worst.as_ref().filter(|_| sees_all) { ". Most frequent violation: " (worst) }
                    }
                }
            }
        }
    };
    fact("Last audit", Some(value))
}

/// The last audits as a table.
pub(super) fn rows(audits: &Audits) -> Markup {
    let rows = html! {
        @for audit in &audits.last {
            tr {
                td { (time(audit.began_at)) }
                td { (time(audit.ended_at)) }
                td { (verdict(audit)) }
                td { (scope(audit)) }
                td.number { (audit.updates) }
                td.number { (audit.unchecked) }
                td { (audit.worst.as_deref().unwrap_or_default()) }
            }
        }
    };
    let columns = [
        "Began",
        "Ended",
        "Verdict",
        "Scope",
        "Updates checked",
        "Rows not checked",
        "Most frequent violation, first update",
    ];
    html! {
        @if audits.last.is_empty() {
            p { "Never: run " code { "leadctl audit" } "." }
        } @else {
            (table("Last audits", &columns, &rows))
        }
        @if audits.left_out > 0 { p { "Audits of more projects, " (audits.left_out) " entries: see the projects' boards." } }
    }
}

fn verdict(audit: &AuditRecord) -> Markup {
    match audit.violations {
        0 if audit.is_whole() => badge(Kind::Good, "clean"),
        // The rest may not be clean.
        0 => badge(Kind::Off, "clean, partial scope"),
        1 => badge(Kind::Bad, "1 violation"),
        violations => badge(Kind::Bad, &format!("{violations} violations")),
    }
}

/// What was checked.
fn scope(audit: &AuditRecord) -> Markup {
    html! {
        @match audit.project_id {
            Some(id) => { "project " span.id { (id) } }
            None => "all projects",
        }
        @if let Some(from) = audit.from { ", logged from " (time(from)) }
        @if let Some(to) = audit.to { (if audit.from.is_some() { " to " } else { ", logged before " }) (time(to)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(1_768_193_759_048 + millis)
    }

    const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);

    fn audit() -> AuditRecord {
        AuditRecord {
            project_id: None,
            from: None,
            to: None,
            began_at: at(-60_000),
            ended_at: at(-30_000),
            updates: 1000,
            unchecked: 12,
            violations: 0,
            worst: None,
        }
    }

    fn violated() -> AuditRecord {
        AuditRecord {
            project_id: Some(PROJECT),
            violations: 2,
            worst: Some("lead_differs: 6b04 <the lead>".into()),
            ..audit()
        }
    }

    #[test]
    fn the_last_audits_of_all_scopes() {
        let range = AuditRecord { from: Some(at(-3_600_000)), ..audit() };
        let audits = Audits { last: vec![range, violated(), audit()], left_out: 3 };
        insta::assert_snapshot!(rows(&audits).0.replace("><", ">\n<"));
        let none = rows(&Audits { last: vec![], left_out: 0 }).0;
        assert!(none.contains("Never: run <code>leadctl audit</code>"), "{none}");
    }

    #[test]
    fn a_board_shows_the_verdict_and_how_to_get_one() {
        let board = |audits: &[AuditRecord], sees_all| on_board(PROJECT, &Ok(audits.to_vec()), sees_all, at(0)).0;
        let clean = board(&[audit()], true);
        for part in ["(30 s ago)", "✓</span> clean</span>, 1000 updates checked of all projects"] {
            assert!(clean.contains(part), "{part}: {clean}");
        }
        assert!(board(&[], true).contains("never: run <code>leadctl audit</code>"));
        assert!(board(&[], false).contains(&format!("never: run <code>leadctl audit --project {PROJECT}</code>")));
        let violated = [violated()];
        let [of_operator, of_key] = [true, false].map(|sees_all| board(&violated, sees_all));
        assert!(
            of_operator.contains("✗</span> 2 violations") && of_operator.contains("6b04 &lt;the lead&gt;"),
            "{of_operator}"
        );
        assert!(of_key.contains("✗</span> 2 violations") && !of_key.contains("6b04"), "{of_key}");
    }

    #[test]
    fn a_clean_part_does_not_look_like_a_clean_audit() {
        let range = AuditRecord { from: Some(at(-3_600_000)), to: Some(at(0)), project_id: Some(PROJECT), ..audit() };
        let html = on_board(PROJECT, &Ok(vec![range]), false, at(0)).0;
        assert!(
            html.contains("clean, partial scope") && html.contains("logged from") && !html.contains("badge good"),
            "{html}"
        );
    }
}
