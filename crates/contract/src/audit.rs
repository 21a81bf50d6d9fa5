//! The verdicts of audits: entries of the bucket [`AUDITS`](crate::streams::AUDITS). `leadctl audit` writes one when it
//! ends. An audit that is interrupted or cannot run leaves the previous verdict.

use serde::{Deserialize, Serialize};

use crate::{ObjectId, Timestamp};

/// The verdict of an audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditRecord {
    /// The project; none for all projects.
    pub project_id: Option<ObjectId>,
    /// Only updates that were logged at or after this time were checked.
    pub from: Option<Timestamp>,
    /// Only updates that were logged before this time were checked.
    pub to: Option<Timestamp>,
    /// When the audit began.
    pub began_at: Timestamp,
    /// When it ended.
    pub ended_at: Timestamp,
    /// How many updates and call events it checked.
    pub updates: i64,
    /// How many rows it could not check.
    pub unchecked: i64,
    /// How many violations it found.
    pub violations: i64,
    /// The invariant with the most violations, and the first of them.
    pub worst: Option<String>,
}

impl AuditRecord {
    /// The key of the entry. A scope has one entry for audits of all its updates and one for audits of a time range, so
    /// that an audit of a range never replaces a complete one.
    pub fn key(&self) -> String {
        let [whole, range] = keys(self.project_id);
        if self.is_whole() { whole } else { range }
    }

    /// Whether every update of the scope was checked, whenever it was logged.
    pub fn is_whole(&self) -> bool {
        self.from.is_none() && self.to.is_none()
    }

    /// Whether it found no violation.
    pub fn is_clean(&self) -> bool {
        self.violations == 0
    }

    /// Whether this audit began after `other` ended and covers everything that `other` covers. An audit of all updates
    /// is only replaced by another one, because it also checks leads without updates.
    pub fn replaces(&self, other: &Self) -> bool {
        self.began_at >= other.ended_at
            && (self.project_id.is_none() || self.project_id == other.project_id)
            && (self.is_whole() || !other.is_whole())
            && self.from.is_none_or(|from| other.from.is_some_and(|other| from <= other))
            && self.to.is_none_or(|to| to >= other.end())
    }

    /// The end of the range that was checked. No update was checked that was logged after the audit ended.
    fn end(&self) -> Timestamp {
        self.to.map_or(self.ended_at, |to| to.min(self.ended_at))
    }

    /// The record that replaces the last verdict `known`; none if `known` stays. Violations stay until an audit covers
    /// them again: a clean audit of another range does not replace them, and violations of another range are added to
    /// them.
    pub fn after(&self, known: &Self) -> Option<Self> {
        if known.is_clean() || self.is_whole() && !self.is_clean() || self.replaces(known) {
            return Some(self.clone());
        }
        (!self.is_clean()).then(|| {
            let from = self.from.zip(known.from);
            Self {
                from: from.map(|(one, other)| one.min(other)),
                // Never unbounded, because no audit checked all updates.
                to: Some(self.end().max(known.end())),
                began_at: self.began_at.min(known.began_at),
                ended_at: self.ended_at.max(known.ended_at),
                updates: self.updates + known.updates,
                unchecked: self.unchecked + known.unchecked,
                violations: self.violations + known.violations,
                ..if self.violations < known.violations { known.clone() } else { self.clone() }
            }
        })
    }
}

/// The keys of a project's entries, or of those for all projects: one for audits of all updates, and one for those of a
/// range.
pub fn keys(project_id: Option<ObjectId>) -> [String; 2] {
    let scope = project_id.map_or_else(|| "all".to_owned(), |id| id.to_string());
    ["whole", "range"].map(|what| format!("{scope}.{what}"))
}

/// The audits that no later one replaces, the latest first.
pub fn latest(mut records: Vec<AuditRecord>) -> Vec<AuditRecord> {
    records.sort_by_key(|record| std::cmp::Reverse(record.ended_at));
    let mut latest: Vec<AuditRecord> = Vec::new();
    for record in records {
        if !latest.iter().any(|later| later.replaces(&record)) {
            latest.push(record);
        }
    }
    latest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    /// An audit without violations from `began` on, which took 10 ms.
    fn audit(began: i64) -> AuditRecord {
        AuditRecord {
            project_id: None,
            from: None,
            to: None,
            began_at: at(began),
            ended_at: at(began + 10),
            updates: 7,
            unchecked: 0,
            violations: 0,
            worst: None,
        }
    }

    fn of_project(byte: u8, began: i64) -> AuditRecord {
        AuditRecord { project_id: Some(ObjectId::from_bytes([byte; 12])), ..audit(began) }
    }

    fn of_range(from: Option<i64>, to: Option<i64>, began: i64) -> AuditRecord {
        AuditRecord { from: from.map(at), to: to.map(at), ..audit(began) }
    }

    #[test]
    fn violations_stay_until_an_audit_covers_them_again() {
        let violated = |audit: AuditRecord| AuditRecord { violations: 2, worst: Some("w".into()), ..audit };
        let (early, late) = (of_range(None, Some(50), 100), of_range(Some(50), None, 200));

        assert_eq!(violated(late.clone()).after(&early), Some(violated(late.clone())), "nothing to keep");
        assert_eq!(late.after(&violated(early.clone())), None);
        let both = violated(late.clone()).after(&violated(early.clone())).expect("violations of both ranges");
        assert_eq!((both.from, both.to, both.violations, both.updates), (None, Some(at(210)), 4, 14));
        assert_eq!((both.began_at, both.ended_at, both.key()), (at(100), at(210), late.key()));
        assert_eq!(AuditRecord { began_at: at(300), ..late.clone() }.after(&both), None, "only one of the ranges");
        assert!(audit(300).replaces(&both), "all updates");
        let ends = violated(of_range(Some(10), Some(20), 300)).after(&violated(of_range(Some(15), Some(30), 100)));
        assert_eq!(ends.map(|both| (both.from, both.to)), Some((Some(at(10)), Some(at(30)))));
        // Both audits checked the same updates, so their counts are not added.
        assert_eq!(violated(audit(105)).after(&violated(audit(100))), Some(violated(audit(105))));
    }

    #[test]
    fn an_audit_has_this_wire_form() {
        let record = AuditRecord { violations: 2, worst: Some("lead_differs: 6b04".into()), ..of_project(1, 5) };
        let text = serde_json::to_string(&record).unwrap();
        insta::assert_snapshot!(text, @r#"{"projectId":"010101010101010101010101","from":null,"to":null,"beganAt":5,"endedAt":15,"updates":7,"unchecked":0,"violations":2,"worst":"lead_differs: 6b04"}"#);
        assert_eq!(serde_json::from_str::<AuditRecord>(&text).unwrap(), record);
        let without_violations = text.replace(r#""violations":2,"#, "");
        assert!(serde_json::from_str::<AuditRecord>(&without_violations).is_err(), "it would look clean");
    }

    #[test]
    fn a_scope_has_one_entry_for_all_updates_and_one_for_a_range() {
        let keys = [audit(0).key(), of_range(Some(1), None, 0).key(), of_project(1, 0).key()];
        assert_eq!(keys, ["all.whole", "all.range", "010101010101010101010101.whole"]);
    }

    #[test]
    fn only_a_later_audit_that_covers_another_replaces_it() {
        assert!(audit(20).replaces(&audit(0)) && audit(20).replaces(&of_project(1, 0)));
        assert!(audit(20).replaces(&of_range(Some(1), Some(2), 0)));
        assert!(!audit(5).replaces(&audit(0)), "it began before the other had ended");
        assert!(!of_project(1, 20).replaces(&audit(0)) && !of_project(1, 20).replaces(&of_project(2, 0)));
        let range = of_range(Some(5), Some(9), 0);
        assert!(of_range(Some(5), None, 20).replaces(&range) && of_range(None, Some(9), 20).replaces(&range));
        for (from, to) in [(Some(6), None), (None, Some(8)), (Some(6), Some(9))] {
            assert!(!of_range(from, to, 20).replaces(&range), "{from:?} {to:?}");
            assert!(!of_range(from, to, 20).replaces(&audit(0)), "{from:?} {to:?}");
        }
    }

    #[test]
    fn a_range_without_an_end_is_covered_up_to_the_end_of_its_audit() {
        // It ended at 10.
        let nightly = of_range(Some(5), None, 0);
        assert!(of_range(Some(5), Some(10), 20).replaces(&nightly));
        assert!(
            !of_range(Some(5), Some(9), 20).replaces(&nightly) && !of_range(Some(6), Some(10), 20).replaces(&nightly)
        );
        assert!(of_range(Some(5), Some(10), 20).replaces(&of_range(Some(5), Some(99), 0)), "beyond its end");
        assert!(!of_range(None, Some(99), 20).replaces(&audit(0)), "of all updates");
    }

    #[test]
    fn replaced_audits_are_left_out() {
        let records = vec![of_project(1, 0), of_range(Some(1), None, 60), audit(20), of_project(2, 40)];

        let latest = latest(records);

        assert_eq!(latest, [of_range(Some(1), None, 60), of_project(2, 40), audit(20)]);
    }
}
