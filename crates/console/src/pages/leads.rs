//! Leads: a list with filters, and one with its state, metadata, history and deliveries.

use std::collections::BTreeMap;

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    process::Process,
    rpc::{
        Call, GetLead, GetLeadHistory, GetProcess, HistoryEntry, Lead, ListCalls, ListDeliveries, ListLeads,
        ListedDelivery, MAX_LIMIT, Page as ListPage, ProcessSelector,
    },
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    pages::{calls, deliveries},
    respond::Page,
    view::{
        graph,
        layout::Section,
        parts::{
            Kind, badge, curl, empty, fact, json, link, live, live_rows, masked, next_page, panel, table, text, time,
        },
    },
    visit::{PAGE, Visit, names},
};

/// How many deliveries a lead shows; the list has all.
const LEAD_DELIVERIES: u32 = 10;

/// The filters of the list, as in its URL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filters {
    pub(super) state: Option<String>,
    /// The text that the list is searched for.
    pub(super) search: Option<String>,
    pub(super) process: Option<ObjectId>,
}

/// `GET /p/{project}/leads`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let given = |name: &str| visit.text(name).map(str::to_owned);
    let filters = Filters { state: given("state"), search: given("q"), process: visit.parameter("process")? };
    let query = ListLeads {
        project_id,
        process_id: filters.process,
        state: filters.state.clone(),
        updated_since: None,
        search: filters.search.clone(),
        cursor: visit.cursor(),
        limit: PAGE,
    };
    let page = visit.request(&query).await?;
    let body = format!(
        r#"{{"lead":{{"projectId":"{project_id}","processId":"PROCESS_ID","phone":"+14155550101","name":"Ada"}},"init":true}}"#
    );
    let content = render_list(project_id, &page, &filters, &curl("/api/v1/leads/initiate", &body));
    Ok(Page::list(&visit, "Leads", Section::Leads, content))
}

pub(super) fn render_list(project: ObjectId, page: &ListPage<Lead>, filters: &Filters, curl: &str) -> Markup {
    let query = [
        ("state", filters.state.clone()),
        ("q", filters.search.clone()),
        ("process", filters.process.map(|id| id.to_string())),
    ];
    html! {
        form.filters {
            label for="state" { "State" }
            input #state name="state" value=[filters.state.as_deref()];
            label for="text" { "Name, reference, phone or e-mail" }
            input #text name="q" type="search" value=[filters.search.as_deref()];
            @if let Some(process) = filters.process { input type="hidden" name="process" value=(process); }
            button { "Filter" }
        }
        (live_rows("leads", &html! {
            @if page.items.is_empty() && page.next.is_none() {
                @if *filters == Filters::default() {
                    (empty("There are no leads yet. This command creates the first one:", Some(curl)))
                } @else {
                    (empty("No lead meets these conditions.", None))
                }
            } @else {
                (rows(project, &page.items))
                (next_page(&format!("/p/{project}/leads"), &query, page.next.as_ref()))
            }
        }))
    }
}

/// A table of leads.
pub(super) fn rows(project: ObjectId, leads: &[Lead]) -> Markup {
    let rows = html! {
        @for lead in leads {
            tr {
                td { a href={ "/p/" (project) "/leads/" (lead.lead_id) } { (lead.name.as_deref().unwrap_or("without a name")) } }
                td { (lead.reference_id.as_deref().unwrap_or_default()) }
                td { (lead.state) }
                td { (link(project, "processes", lead.process_id)) }
                td.number { (lead.version) }
                td { (time(lead.updated_at)) }
            }
        }
    };
    table("Leads", &["Name", "Reference", "State", "Process", "Version", "Changed"], &rows)
}

/// The parts of a lead's page other than the lead.
pub(super) struct Around {
    pub(super) process: Result<Process, Fault>,
    pub(super) calls: Result<ListPage<Call>, Fault>,
    pub(super) history: Result<ListPage<HistoryEntry>, Fault>,
    pub(super) deliveries: Result<ListPage<ListedDelivery>, Fault>,
    pub(super) callbacks: BTreeMap<ObjectId, String>,
}

/// `GET /p/{project}/leads/{lead}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let lead_id = visit.id("lead")?;
    let query = GetLead { project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
    let lead = visit.request(&query).await?;
    let history = GetLeadHistory { project_id, lead_id, cursor: visit.cursor(), limit: PAGE };
    let deliveries =
        ListDeliveries { lead_id: Some(lead_id), ..ListDeliveries::of_project(project_id, LEAD_DELIVERIES) };
    let process = async {
        visit.session.role.check(project_id, Scope::ConfigRead)?;
        visit.request(&GetProcess { project_id, process: ProcessSelector::Id(lead.process_id) }).await
    };
    let calls = ListCalls { project_id, lead_id: Some(lead_id), cursor: None, limit: MAX_LIMIT };
    let (process, calls, history, deliveries, callbacks) = tokio::join!(
        process,
        visit.request(&calls),
        visit.request(&history),
        visit.request(&deliveries),
        visit.callbacks(project_id)
    );
    let around = Around { process, calls, history, deliveries, callbacks: names(&callbacks) };
    let title = lead.name.clone().unwrap_or_else(|| format!("Lead {lead_id}"));
    let content = render(project_id, &lead, &around, visit.session.may_act(), visit.now);
    Ok(Page::list(&visit, title, Section::Leads, content))
}

pub(super) fn render(project: ObjectId, lead: &Lead, around: &Around, may_act: bool, now: Timestamp) -> Markup {
    let path = format!("/p/{project}/leads/{}", lead.lead_id);
    html! {
        (live("lead", &html! { dl.facts {
            (fact("Id", Some(html! { span.id { (lead.lead_id) } })))
            (fact("Reference", text(lead.reference_id.as_deref())))
            (fact("State", text(Some(&lead.state))))
            (fact("Disposition", text(lead.disposition.as_deref())))
            (fact("Phone", lead.phone.as_deref().map(masked)))
            (fact("E-mail", text(lead.email.as_deref())))
            (fact("Process", Some(link(project, "processes", lead.process_id))))
            (fact("Version", Some(html! { (lead.version) })))
            (fact("Created", Some(time(lead.created_at))))
            (fact("Changed", Some(time(lead.updated_at))))
        } }))
        @if may_act { ul.actions { li { a href={ (path) "/update" } { "Send an update" } } } }
        (panel("Calls in progress", &around.calls, |page| html! {
            @if page.items.is_empty() { p { "None." } } @else { (calls::rows(project, &page.items, may_act, now)) }
        }))
        (panel("State", &around.process, |process| graph::states(&process.rules, Some(&lead.state))))
        (live("metadata", &json("Metadata", &lead.metadata)))
        (panel("Updates", &around.history, |page| html! {
            @if page.items.is_empty() { p { "No update yet." } } @else { (history(project, &page.items)) }
            (next_page(&path, &[], page.next.as_ref()))
        }))
        (panel("Deliveries", &around.deliveries, |page| html! {
            @if page.items.is_empty() {
                p { "No outcome of this lead was delivered." }
            } @else {
                (deliveries::rows(project, &page.items, &around.callbacks))
            }
            @if page.next.is_some() {
                p { a href={ "/p/" (project) "/deliveries?lead=" (lead.lead_id) } { "All deliveries of this lead" } }
            }
        }))
    }
}

fn history(project: ObjectId, entries: &[HistoryEntry]) -> Markup {
    let rows = html! {
        @for entry in entries {
            tr {
                td { a href={ "/p/" (project) "/updates/" (entry.update_id) } { (time(entry.logged_at)) } }
                td { (outcome(entry)) }
                td { (states(entry)) }
                td { (entry.disposition.as_deref().unwrap_or_default()) }
                td { (entry.user_id.as_deref().unwrap_or_default()) }
                td { (entry.error.as_deref().unwrap_or_default()) }
            }
        }
    };
    table("Updates", &["Logged", "Outcome", "State", "Disposition", "User", "Error"], &rows)
}

/// Whether an update succeeded, or its error code.
pub(super) fn outcome(entry: &HistoryEntry) -> Markup {
    if entry.success {
        badge(Kind::Good, "succeeded")
    } else {
        badge(Kind::Bad, entry.error_code.as_deref().unwrap_or("failed"))
    }
}

/// How an update moved its lead.
pub(super) fn states(entry: &HistoryEntry) -> String {
    match (entry.from_state.as_deref(), entry.to_state.as_deref()) {
        (Some(from), Some(to)) if from != to => format!("{from} → {to}"),
        // A call event or an erasure that did not change the state.
        (None, None) if !entry.kind.is_update() => entry.kind.to_string(),
        (None, Some(to)) if !entry.kind.is_update() => format!("{}: {to}", entry.kind),
        (from, to) => to.or(from).unwrap_or_default().to_owned(),
    }
}
