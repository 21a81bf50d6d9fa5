//! The board of a project: an overview, with what needs attention.

use std::time::Duration;

use contract::{
    ObjectId, Timestamp,
    audit::AuditRecord,
    key::Scope,
    process::Process,
    rpc::{
        CallbackState, CallbackStatus, CountDeliveries, CountUpdates, DeliveryCounts, DeliveryStatus, GetLag, Lag,
        Lead, ListDeliveries, ListLeads, ListProcesses, ListedDelivery, Page as ListPage, StatisticsGroup,
        UpdateCounts,
    },
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    pages::{
        audits, callbacks, deliveries, leads, processes,
        statistics::{self, Covered},
    },
    respond::Page,
    view::{
        layout::Section,
        parts::{ago, empty, fact, notice, panel, span},
    },
    visit::{Visit, names},
};

/// How many rows a panel has; its list has all.
const ROWS: u32 = 8;

/// A measured lag that is older than this is shown with its age. Lags are measured every five seconds.
const LAG_AGE: Duration = Duration::from_secs(30);

/// The content of the board.
pub(super) struct Board {
    pub(super) covered: Covered,
    /// Whether the visitor sees every project.
    pub(super) sees_all: bool,
    pub(super) lag: Result<Lag, Fault>,
    pub(super) audits: Result<Vec<AuditRecord>, Fault>,
    /// By code.
    pub(super) update_counts: Result<Vec<UpdateCounts>, Fault>,
    pub(super) delivery_counts: Result<Vec<DeliveryCounts>, Fault>,
    pub(super) callbacks: Result<Vec<CallbackStatus>, Fault>,
    pub(super) exhausted: Result<ListPage<ListedDelivery>, Fault>,
    pub(super) pending: Result<ListPage<ListedDelivery>, Fault>,
    pub(super) leads: Result<ListPage<Lead>, Fault>,
    pub(super) processes: Result<ListPage<Process>, Fault>,
}

/// `GET /p/{project}?range=`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id: ObjectId = visit.id("project")?;
    let role = &visit.session.role;
    match role.check(project_id, Scope::LeadsRead) {
        // Each panel says which scope the session lacks.
        Ok(()) | Err(Fault::MissingScope(_)) => {}
        Err(fault) => return Err(fault),
    }
    let deliveries = async |status| {
        role.check(project_id, Scope::LeadsRead)?;
        let query = ListDeliveries { status: Some(status), ..ListDeliveries::of_project(project_id, ROWS) };
        visit.request(&query).await
    };
    let leads = async {
        role.check(project_id, Scope::LeadsRead)?;
        let query = ListLeads {
            project_id,
            process_id: None,
            state: None,
            updated_since: None,
            search: None,
            cursor: None,
            limit: ROWS,
        };
        visit.request(&query).await
    };
    let processes = async {
        role.check(project_id, Scope::ConfigRead)?;
        visit.request(&ListProcesses { project_id, cursor: None, limit: ROWS }).await
    };
    let covered = Covered::new(visit.text("range"), visit.now)?;
    let range = covered.range;
    let update_counts = async {
        role.check(project_id, Scope::LeadsRead)?;
        visit.request(&CountUpdates { project_id, range, by: Some(StatisticsGroup::Code) }).await
    };
    let delivery_counts = async {
        role.check(project_id, Scope::LeadsRead)?;
        visit.request(&CountDeliveries { project_id, range, by: None, callback_id: None }).await
    };
    let audits = async {
        role.check(project_id, Scope::LeadsRead)?;
        audits::of_project(&visit, project_id).await
    };
    let lag = visit.request(&GetLag {});
    let (lag, audits, update_counts, delivery_counts, callbacks, exhausted, pending, leads, processes) = tokio::join!(
        lag,
        audits,
        update_counts,
        delivery_counts,
        visit.callbacks_with_details(project_id),
        deliveries(DeliveryStatus::Exhausted),
        deliveries(DeliveryStatus::Pending),
        leads,
        processes
    );
    let sees_all = role.sees_all();
    let board = Board {
        covered,
        sees_all,
        lag,
        audits,
        update_counts,
        delivery_counts,
        callbacks,
        exhausted,
        pending,
        leads,
        processes,
    };
    let content = render(project_id, &board, visit.now);
    Ok(Page::Live { title: "Board".into(), section: Section::Board, content })
}

pub(super) fn render(project: ObjectId, board: &Board, now: Timestamp) -> Markup {
    let (callbacks, covered) = (names(&board.callbacks), &board.covered);
    let all = |path: &str, text: &str| html! { p { a href={ "/p/" (project) (path) } { (text) } } };
    let deliveries = |page: &ListPage<ListedDelivery>, status: &str| {
        html! {
            @if page.items.is_empty() {
                p { "None." }
            } @else {
                (deliveries::rows(project, &page.items, &callbacks))
                (all(&format!("/deliveries?status={status}"), &format!("All {status} deliveries")))
            }
        }
    };
    html! {
        (statistics::spans(project, covered))
        (panel("At a glance", &Ok(()), |()| glance(project, board, now)))
        (panel(&format!("Updates in the last {}", covered.name), &board.update_counts, |counts| statistics::updates(project, counts, covered)))
        (panel("Refusals by code", &board.update_counts, |counts| statistics::codes(project, counts, covered)))
        (panel(&format!("Deliveries in the last {}", covered.name), &board.delivery_counts, |counts| statistics::deliveries(project, counts, covered)))
        (panel("Callbacks that need attention", &board.callbacks, |callbacks| {
            let is_failing = |callback: &&CallbackStatus| {
                matches!(callback.state, CallbackState::Failing | CallbackState::Disabled)
            };
            html! {
                @if callbacks.iter().any(|callback| is_failing(&callback)) {
                    (callbacks::rows(project, callbacks.iter().filter(is_failing), now))
                } @else {
                    p { "None of " (callbacks.len()) "." }
                }
                (all("/callbacks", "All callbacks"))
            }
        }))
        (panel("Exhausted deliveries", &board.exhausted, |page| deliveries(page, "exhausted")))
        (panel("Pending deliveries", &board.pending, |page| deliveries(page, "pending")))
        (panel("Newest leads", &board.leads, |page| html! {
            @if page.items.is_empty() {
                p { "None yet. " a href={ "/p/" (project) "/leads" } { "How to create the first one" } }
            } @else {
                (leads::rows(project, &page.items))
                (all("/leads", "All leads"))
            }
        }))
        (panel("Processes", &board.processes, |page| html! {
            @if page.items.is_empty() {
                (empty("None yet: a project needs a process before it can have leads.", None))
                (all("/processes", "How to create the first one"))
            } @else {
                (processes::rows(project, &page.items))
                (all("/processes", "All processes"))
            }
        }))
    }
}

/// The rates of the range, the oldest pending delivery, and the lags. A value that cannot be read shows the reason.
fn glance(project: ObjectId, board: &Board, now: Timestamp) -> Markup {
    let covered = &board.covered;
    html! {
        dl.facts {
            @match &board.update_counts {
                Ok(counts) => (statistics::update_rates(project, counts, covered, now)),
                Err(fault) => (fact("Updates", Some(notice(fault)))),
            }
            @match &board.delivery_counts {
                Ok(counts) => (statistics::delivery_rates(project, counts, covered, now)),
                Err(fault) => (fact("Delivered", Some(notice(fault)))),
            }
            (fact("Oldest pending delivery", Some(match &board.callbacks {
                Ok(callbacks) => oldest_pending(project, callbacks, now),
                Err(fault) => notice(fault),
            })))
            @match &board.lag {
                Ok(lag) => {
                    (fact("Apply lag", Some(lag_time(lag.unapplied_since, lag, now))))
                    @if board.sees_all { (fact("Not applied yet", lag.unapplied_messages.map(unapplied))) }
                    (fact("Announce lag", Some(lag_time(lag.unannounced_since, lag, now))))
                }
                Err(fault) => (fact("Apply lag", Some(notice(fault)))),
            }
            (audits::on_board(project, &board.audits, board.sees_all, now))
        }
    }
}

/// The callback whose oldest pending delivery is the oldest of all.
fn oldest_pending(project: ObjectId, callbacks: &[CallbackStatus], now: Timestamp) -> Markup {
    let oldest =
        callbacks.iter().filter_map(|callback| Some((callback.details.as_ref()?.oldest_pending_at?, callback)));
    let path = format!("/p/{project}/deliveries?status=pending");
    match oldest.min_by_key(|(at, _)| *at) {
        Some((at, callback)) => html! {
            a href={ (path) "&callback=" (callback.callback_id) } { (ago(at, now)) } ", of " (callback.name)
        },
        None => html! { a href=(path) { "none" } },
    }
}

/// How many messages of the log are not applied yet, and so are in no count. The number covers all projects: only
/// visitors who see all of them see it.
fn unapplied(messages: u64) -> Markup {
    html! { (messages) " messages of all projects in the log" }
}

/// How long the oldest entry has waited. The lag covers all projects together, so that it reveals nothing about any
/// single project.
fn lag_time(since: Option<Timestamp>, lag: &Lag, now: Timestamp) -> Markup {
    html! {
        @match lag.measured_at {
            Some(measured_at) => {
                (span(since.map_or(0, |at| (measured_at.millis() - at.millis()).max(0))))
                @if measured_at.plus(LAG_AGE) < now { ", measured " (ago(measured_at, now)) }
            }
            None => "not measured yet",
        }
    }
}
