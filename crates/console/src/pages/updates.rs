//! Updates: a list with filters, and the timeline of one.

use std::{collections::BTreeMap, time::Duration};

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    rpc::{
        CountUpdates, Delivery, DeliveryStatus, FindUpdates, FoundUpdate, GetUpdate, ListUpdateDeliveries,
        Page as ListPage, StatisticsGroup, StatisticsRange, Update, UpdateCounts, UpdateDeliveries, UpdateStatus,
    },
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    pages::{
        deliveries::{self, attempts},
        leads,
    },
    respond::Page,
    view::{
        layout::Section,
        parts::{
            Kind, badge, choice, curl, delivery_status, empty, fact, filter_fields, json, link, live, live_rows,
            next_page, panel, span, table, text, time,
        },
    },
    visit::{PAGE, Visit, names},
};

/// The outcomes that the list can be filtered by.
const OUTCOMES: [(&str, bool); 2] = [("succeeded", true), ("failed", false)];

/// The filters of the list, as in its URL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filters {
    pub(super) status: Option<String>,
    pub(super) code: Option<String>,
    pub(super) process: Option<ObjectId>,
    pub(super) key: Option<ObjectId>,
    pub(super) user: Option<String>,
    pub(super) from: Option<Timestamp>,
    pub(super) to: Option<Timestamp>,
}

/// How many error codes have tabs of their own.
const CODE_TABS: usize = 5;

/// The numbers of updates in the tabs above the list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tabs {
    succeeded: i64,
    failed: i64,
    /// The most frequent error codes.
    codes: Vec<(String, i64)>,
}

impl Tabs {
    /// The sums of counts by code.
    pub(super) fn new(counts: &[UpdateCounts]) -> Self {
        let mut codes: BTreeMap<&str, i64> = BTreeMap::new();
        for UpdateCounts { group, failed, .. } in counts {
            if let Some(code) = group {
                *codes.entry(code).or_default() += failed;
            }
        }
        let mut codes: Vec<_> = codes.into_iter().map(|(code, failed)| (code.to_owned(), failed)).collect();
        codes.sort_by_key(|(_, failed)| std::cmp::Reverse(*failed));
        codes.truncate(CODE_TABS);
        let sum = |count: fn(&UpdateCounts) -> i64| counts.iter().map(count).sum();
        Self { succeeded: sum(|counts| counts.succeeded), failed: sum(|counts| counts.failed), codes }
    }

    pub(super) fn render(&self, project: ObjectId, filters: &Filters) -> Markup {
        let Self { succeeded, failed, codes } = self;
        let tab = |status: Option<&str>, code: Option<&str>, title: &str, count: i64| {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.extend_pairs(
                status.map(|status| ("status", status)).into_iter().chain(code.map(|code| ("code", code))),
            );
            let is_current = (filters.status.as_deref(), filters.code.as_deref()) == (status, code);
            html! {
                li {
                    a href={ "/p/" (project) "/updates?" (query.finish()) } aria-current=[is_current.then_some("page")] {
                        (title) " " b { (count) }
                    }
                }
            }
        };
        html! {
            nav.sections.tabs aria-label="Outcomes of the last 24 hours" {
                ul {
                    (tab(None, None, "all", succeeded + failed))
                    (tab(Some("succeeded"), None, "succeeded", *succeeded))
                    (tab(Some("failed"), None, "failed", *failed))
                    @for (code, failed) in codes { (tab(Some("failed"), Some(code), code, *failed)) }
                }
            }
        }
    }
}

/// `GET /p/{project}/updates`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let given = |name: &str| visit.text(name).map(str::to_owned);
    let filters = Filters {
        status: given("status"),
        code: given("code"),
        process: visit.parameter("process")?,
        key: visit.parameter("key")?,
        user: given("user"),
        from: visit.parameter("from")?,
        to: visit.parameter("to")?,
    };
    let success = filters.status.as_deref().map(|text| {
        let known = OUTCOMES.iter().find(|(name, _)| *name == text).map(|(_, success)| *success);
        known.ok_or_else(|| Fault::Invalid("status must be succeeded or failed.".into()))
    });
    let query = FindUpdates {
        project_id,
        from: filters.from,
        to: filters.to,
        success: success.transpose()?,
        error_code: filters.code.clone(),
        process_id: filters.process,
        api_key_id: filters.key,
        user_id: filters.user.clone(),
        cursor: visit.cursor(),
        limit: PAGE,
    };
    // The tabs count all updates of the last 24 hours, so they are left out when the list has other filters.
    let counts = async {
        let is_day = Filters { status: None, code: None, ..filters.clone() } == Filters::default();
        let range = StatisticsRange::last_day(visit.now);
        let count = CountUpdates { project_id, range, by: Some(StatisticsGroup::Code) };
        if is_day { visit.request(&count).await.ok() } else { None }
    };
    let (page, counts) = tokio::join!(visit.request(&query), counts);
    let curl = curl("/api/v1/leads/update", r#"{"leadId":"LEAD_ID","metadata":{"color":"blue"}}"#);
    let content = html! {
        @if let Some(counts) = counts { (live("tabs", &Tabs::new(&counts).render(project_id, &filters))) }
        (render_list(project_id, &page?, &filters, &curl))
    };
    Ok(Page::list(&visit, "Updates", Section::Updates, content))
}

pub(super) fn render_list(project: ObjectId, page: &ListPage<FoundUpdate>, filters: &Filters, curl: &str) -> Markup {
    let id = |id: Option<ObjectId>| id.map(|id| id.to_string());
    let query = [
        ("status", filters.status.clone()),
        ("code", filters.code.clone()),
        ("process", id(filters.process)),
        ("key", id(filters.key)),
        ("user", filters.user.clone()),
        ("from", filters.from.map(Timestamp::to_iso)),
        ("to", filters.to.map(Timestamp::to_iso)),
    ];
    html! {
        form.filters {
            (choice("status", "Outcome", &OUTCOMES.map(|(name, _)| name), filters.status.as_deref()))
            (filter_fields(&query[1..], &["Code", "Process", "API key", "User", "From", "To"]))
            button { "Filter" }
        }
        (live_rows("updates", &html! {
            @if page.items.is_empty() && page.next.is_none() {
                @if *filters == Filters::default() {
                    (empty("No update was decided in the last 24 hours. An update:", Some(curl)))
                } @else {
                    (empty("No update meets these conditions. Without a time, only the last 24 hours are searched.", None))
                }
            } @else {
                (rows(project, &page.items))
                (next_page(&format!("/p/{project}/updates"), &query, page.next.as_ref()))
            }
        }))
    }
}

fn rows(project: ObjectId, updates: &[FoundUpdate]) -> Markup {
    let rows = html! {
        @for FoundUpdate { lead_id, reference_id, entry, .. } in updates {
            tr {
                td { a href={ "/p/" (project) "/updates/" (entry.update_id) } { (time(entry.logged_at)) } }
                td {
                    @match lead_id {
                        Some(lead) => (link(project, "leads", lead)),
                        None => (reference_id.as_deref().unwrap_or_default()),
                    }
                }
                td { (leads::outcome(entry)) }
                td { (leads::states(entry)) }
                td { (entry.user_id.as_deref().unwrap_or_default()) }
                td.number { (span(entry.applied_at.millis() - entry.logged_at.millis())) }
                td { (entry.error.as_deref().unwrap_or_default()) }
            }
        }
    };
    table("Updates", &["Logged", "Lead", "Outcome", "State", "User", "Latency", "Error"], &rows)
}

/// `GET /p/{project}/updates/{update}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let update_id = visit.id("update")?;
    let (update, deliveries) = (GetUpdate { project_id, update_id }, ListUpdateDeliveries { project_id, update_id });
    let (update, deliveries, callbacks) =
        tokio::join!(visit.request(&update), visit.request(&deliveries), visit.callbacks(project_id));
    let update = update?;
    let content = render(project_id, &update, &deliveries, &names(&callbacks));
    let (title, section) = (format!("Update {update_id}"), Section::Updates);
    Ok(match is_settled(&update, &deliveries, visit.now) {
        true => Page::Show { title, section, content },
        false => Page::Live { title, section, content },
    })
}

/// How long after its decision an update may still get deliveries beside those that it has.
const ANNOUNCED_WITHIN: Duration = Duration::from_mins(1);
/// How long after its decision an update may still get its first delivery: its event may wait behind many others.
const RECORDED_WITHIN: Duration = Duration::from_hours(1);

/// Whether the timeline of an update is complete. Only a repeated delivery changes it later.
fn is_settled(update: &Update, deliveries: &Result<UpdateDeliveries, Fault>, now: Timestamp) -> bool {
    let is_pending = |delivery: &Delivery| delivery.status == DeliveryStatus::Pending;
    let is_complete = |found: &UpdateDeliveries| {
        let within = if found.deliveries.is_empty() { RECORDED_WITHIN } else { ANNOUNCED_WITHIN };
        let is_old = update.applied_at.is_some_and(|at| at.plus(within) < now);
        is_old && found.parked.is_none() && !found.deliveries.iter().any(is_pending)
    };
    deliveries.as_ref().is_ok_and(is_complete)
}

pub(super) fn render(
    project: ObjectId,
    update: &Update,
    deliveries: &Result<UpdateDeliveries, Fault>,
    callbacks: &BTreeMap<ObjectId, String>,
) -> Markup {
    html! {
        (live("update", &html! { dl.facts {
            (fact("Outcome", Some(outcome(update))))
            (fact("Error", text(update.error.as_deref())))
            (fact("Lead", update.lead_id.map(|lead| link(project, "leads", lead))))
            (fact("Reference", text(update.reference_id.as_deref())))
            (fact("Process", update.process_id.map(|process| link(project, "processes", process))))
            (fact("State", change(update)))
            (fact("Version", update.version.map(|version| html! { (version) })))
            (fact("User", text(update.user_id.as_deref())))
            (fact("API key", update.api_key_id.map(|key| html! {
                a.id href={ "/p/" (project) "/updates?key=" (key) } { (key) }
            })))
            @for warning in &update.warnings { (fact("Warning", text(Some(warning)))) }
        } }))
        (panel("Timeline", &Ok(()), |()| html! { ol.timeline { (steps(update)) } }))
        (panel("Deliveries", deliveries, |deliveries| self::deliveries(project, deliveries, callbacks)))
        (live("documents", &html! {
            @if let Some(command) = &update.command { (json("Command", command)) }
            @if let Some(data) = &update.data { (json("Metadata after the update", data)) }
        }))
    }
}

pub(super) fn outcome(update: &Update) -> Markup {
    match (update.status, update.error_code.as_deref()) {
        (UpdateStatus::Succeeded, _) => badge(Kind::Good, "succeeded"),
        (UpdateStatus::Failed, code) => badge(Kind::Bad, &format!("failed: {}", code.unwrap_or("unknown"))),
        (UpdateStatus::Pending, _) if update.queued_until.is_some() => badge(Kind::Waiting, "queued"),
        (UpdateStatus::Pending, _) => badge(Kind::Waiting, "pending"),
    }
}

fn change(update: &Update) -> Option<Markup> {
    match (update.from_state.as_deref(), update.to_state.as_deref()) {
        (Some(from), Some(to)) if from != to => Some(html! { (from) " → " (to) }),
        (Some(state), _) => Some(html! { (state) " (unchanged)" }),
        // The update created the lead.
        (None, Some(state)) => Some(html! { (state) }),
        (None, None) => None,
    }
}

fn steps(update: &Update) -> Markup {
    let latency = update.logged_at.zip(update.applied_at).map(|(logged, applied)| applied.millis() - logged.millis());
    html! {
        li { b { "Made" } " " (time(update.update_id.timestamp())) " to the second, by the id" }
        @if let Some(at) = update.logged_at {
            li {
                b { "Logged" } " " (time(at))
                @if let Some(sequence) = update.log_sequence { " as entry " (sequence) " of the command log" }
            }
        }
        @if let Some(until) = update.queued_until {
            li { b { "Queued" } " until the call ends, at the latest " (time(until)) }
        }
        @match update.applied_at {
            Some(at) => li {
                b { "Decided and applied" } " " (time(at))
                @if let Some(millis) = latency { ", " (span(millis)) " after it was logged" }
            },
            None => li { b { "Not decided yet" } },
        }
    }
}

fn deliveries(project: ObjectId, deliveries: &UpdateDeliveries, callbacks: &BTreeMap<ObjectId, String>) -> Markup {
    html! {
        @if let Some(parked) = &deliveries.parked {
            p.notice { "Waiting since " (time(parked.since)) ": " (parked.reason) }
        }
        @if deliveries.deliveries.is_empty() && deliveries.parked.is_none() {
            p { "No callback of the process receives this outcome, or it was not announced yet." }
        }
        @for delivery in &deliveries.deliveries { (self::delivery(project, delivery, callbacks)) }
    }
}

fn delivery(project: ObjectId, delivery: &Delivery, callbacks: &BTreeMap<ObjectId, String>) -> Markup {
    let Delivery { callback_id, kind, .. } = delivery;
    let name = callbacks.get(callback_id).cloned().unwrap_or_else(|| callback_id.to_string());
    // A callback may receive several events of one update.
    let name = if kind.is_update() { name } else { format!("{name}: {kind}") };
    html! {
        h3 {
            a href={ "/p/" (project) "/deliveries/" (deliveries::id(delivery)) } { (name) }
            " " (delivery_status(delivery.status))
        }
        @if let Some(at) = delivery.next_attempt_at { p { "Next attempt " (time(at)) } }
        (attempts(&format!("Attempts for {name}"), &delivery.attempts))
    }
}

#[cfg(test)]
mod tests {
    use contract::event_kind::DeliveryKind;

    use super::*;

    #[test]
    fn a_timeline_without_deliveries_is_final_after_an_hour() {
        let id = ObjectId::from_bytes([1; 12]);
        let applied_at = Timestamp::from_millis(0);
        let update = Update { applied_at: Some(applied_at), ..Update::pending(id) };
        let delivery = |status| Delivery {
            update_id: id,
            callback_id: id,
            kind: DeliveryKind::Update,
            status,
            next_attempt_at: None,
            attempts: vec![],
        };
        let is_settled = |deliveries, age: Duration| {
            let found = UpdateDeliveries { deliveries, ..UpdateDeliveries::default() };
            is_settled(&update, &Ok(found), applied_at.plus(age))
        };
        let (minutes, hours) = (Duration::from_mins(2), Duration::from_hours(2));

        assert!(!is_settled(vec![], minutes) && is_settled(vec![], hours));
        assert!(is_settled(vec![delivery(DeliveryStatus::Delivered)], minutes));
        assert!(!is_settled(vec![delivery(DeliveryStatus::Pending)], hours));
    }

    #[test]
    fn a_created_lead_has_no_state_before() {
        let states = |from: Option<&str>, to: Option<&str>| {
            let update = Update::pending(ObjectId::from_bytes([1; 12]));
            let update = Update { from_state: from.map(str::to_owned), to_state: to.map(str::to_owned), ..update };
            change(&update).map(|markup| markup.0)
        };

        assert_eq!(states(None, Some("new")), Some("new".into()));
        assert_eq!(states(Some("new"), Some("new")), Some("new (unchanged)".into()));
        assert_eq!(states(Some("new"), Some("won")), Some("new → won".into()));
    }

    #[test]
    fn tabs_have_the_sums_of_the_most_frequent_codes() {
        let counts = |at, group: Option<&str>, succeeded, failed| UpdateCounts {
            at: Timestamp::from_millis(at),
            group: group.map(str::to_owned),
            succeeded,
            failed,
        };
        let mut hours = vec![
            counts(0, None, 7, 0),
            counts(1, None, 3, 0),
            counts(0, Some("x&y"), 0, 2),
            counts(1, Some("x&y"), 0, 9),
        ];
        hours.extend((0..6).map(|n| counts(0, Some(&format!("code{n}")), 0, n)));
        let tabs = Tabs::new(&hours);
        let filters = Filters { status: Some("failed".into()), code: Some("x&y".into()), ..Filters::default() };

        let html = tabs.render(ObjectId::from_bytes([1; 12]), &filters).into_string();

        assert_eq!((tabs.succeeded, tabs.failed, tabs.codes.len()), (10, 26, CODE_TABS));
        assert!(
            html.contains(r#"updates?status=failed&amp;code=x%26y" aria-current="page">x&amp;y <b>11</b>"#),
            "{html}"
        );
        assert!(html.contains("all <b>36</b>") && !html.contains("code0"), "{html}");
        assert_eq!(html.matches("aria-current").count(), 1);
    }
}
