//! Deliveries: a list with filters, and one with its attempts.

use std::{collections::BTreeMap, time::Duration};

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    rpc::{
        Attempt, Delivery, DeliveryId, DeliveryStatus, GetDelivery, ListDeliveries, ListedDelivery, Page as ListPage,
    },
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    respond::Page,
    view::{
        layout::Section,
        parts::{
            bar, choice, curl, delivery_status, empty, fact, filter_fields, link, live, live_rows, next_page, panel,
            span, table, time,
        },
    },
    visit::{PAGE, Visit, names},
};

/// The filters of the list, as in its URL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filters {
    pub(super) status: Option<DeliveryStatus>,
    pub(super) callback: Option<ObjectId>,
    pub(super) lead: Option<ObjectId>,
    pub(super) process: Option<ObjectId>,
    pub(super) code: Option<u16>,
    pub(super) error: Option<String>,
    pub(super) since: Option<Timestamp>,
    pub(super) until: Option<Timestamp>,
}

/// `GET /p/{project}/deliveries`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let filters = Filters {
        status: visit.parameter("status")?,
        callback: visit.parameter("callback")?,
        lead: visit.parameter("lead")?,
        process: visit.parameter("process")?,
        code: visit.parameter("code")?,
        error: visit.text("error").map(str::to_owned),
        since: visit.parameter("since")?,
        until: visit.parameter("until")?,
    };
    let query = ListDeliveries {
        status: filters.status,
        callback_id: filters.callback,
        lead_id: filters.lead,
        since: filters.since,
        until: filters.until,
        process_id: filters.process,
        status_code: filters.code,
        error: filters.error.clone(),
        cursor: visit.cursor(),
        ..ListDeliveries::of_project(project_id, PAGE)
    };
    let (page, callbacks) = tokio::join!(visit.request(&query), visit.callbacks(project_id));
    let curl = curl("/api/v1/leads/update", r#"{"leadId":"LEAD_ID","metadata":{"color":"blue"}}"#);
    let shown = Shown { project: project_id, callbacks: &names(&callbacks), may_act: visit.session.may_act() };
    let content = render_list(&shown, &page?, &filters, &curl);
    Ok(Page::list(&visit, "Deliveries", Section::Deliveries, content))
}

/// The context in which deliveries are shown.
pub(super) struct Shown<'a> {
    pub(super) project: ObjectId,
    /// The names of the project's callbacks.
    pub(super) callbacks: &'a BTreeMap<ObjectId, String>,
    /// Whether the visitor may act.
    pub(super) may_act: bool,
}

pub(super) fn render_list(shown: &Shown<'_>, page: &ListPage<ListedDelivery>, filters: &Filters, curl: &str) -> Markup {
    let Shown { project, callbacks, may_act } = *shown;
    let query = [
        ("status", filters.status.map(|status| status.to_string())),
        ("callback", filters.callback.map(|id| id.to_string())),
        ("lead", filters.lead.map(|id| id.to_string())),
        ("process", filters.process.map(|id| id.to_string())),
        ("code", filters.code.map(|code| code.to_string())),
        ("error", filters.error.clone()),
        ("since", filters.since.map(Timestamp::to_iso)),
        ("until", filters.until.map(Timestamp::to_iso)),
    ];
    html! {
        form.filters {
            (choice("status", "Status", &DeliveryStatus::ALL, filters.status))
            label for="callback" { "Callback" }
            select #callback name="callback" {
                option value="" { "all" }
                @for (id, name) in callbacks {
                    option value=(id) selected[filters.callback == Some(*id)] { (name) }
                }
                // A callback that was removed, or whose name this session may not read.
                @if let Some(id) = filters.callback.filter(|id| !callbacks.contains_key(id)) {
                    option value=(id) selected { (id) }
                }
            }
            @if let Some(lead) = filters.lead { input type="hidden" name="lead" value=(lead); }
            (filter_fields(&query[3..], &["Process", "Status code", "Last error", "Since", "Until"]))
            button { "Filter" }
        }
        (live_rows("deliveries", &html! {
            @if page.items.is_empty() && page.next.is_none() {
                @if *filters == Filters::default() {
                    (empty("There are no deliveries yet. The outcome of an update is delivered to the callbacks of its \
                        lead's process. An update:", Some(curl)))
                } @else {
                    (empty("No delivery meets these conditions.", None))
                }
            } @else {
                @if may_act {
                    form action={ "/p/" (project) "/deliveries/redeliver" } {
                        (table_of(project, &page.items, callbacks, true))
                        p { button { "Redeliver the selected deliveries" } }
                    }
                } @else {
                    (rows(project, &page.items, callbacks))
                }
                (next_page(&format!("/p/{project}/deliveries"), &query, page.next.as_ref()))
            }
        }))
    }
}

/// A table of deliveries.
pub(super) fn rows(project: ObjectId, deliveries: &[ListedDelivery], callbacks: &BTreeMap<ObjectId, String>) -> Markup {
    table_of(project, deliveries, callbacks, false)
}

/// A table of deliveries. Within a form, delivered and exhausted ones can be selected.
fn table_of(
    project: ObjectId,
    deliveries: &[ListedDelivery],
    callbacks: &BTreeMap<ObjectId, String>,
    is_selectable: bool,
) -> Markup {
    let rows = html! {
        @for delivery in deliveries {
            tr {
                @if is_selectable {
                    td {
                        @if delivery.status != DeliveryStatus::Pending {
                            input type="checkbox" name="delivery" value=(delivery.id) aria-label={ "Select " (delivery.id) };
                        }
                    }
                }
                td { (delivery_status(delivery.status)) }
                td { a href={ "/p/" (project) "/deliveries/" (delivery.id) } { (time(delivery.updated_at)) } }
                td { (callback(project, delivery.id.callback_id, callbacks)) }
                td { (link(project, "updates", delivery.id.update_id)) }
                td.number { (delivery.attempts) }
                td { @if let Some(at) = delivery.next_attempt_at { (time(at)) } }
                td.error { (delivery.error.as_deref().unwrap_or_default()) }
            }
        }
    };
    let columns = ["Select", "Status", "Changed", "Callback", "Update", "Attempts", "Next attempt", "Last error"];
    table("Deliveries", if is_selectable { &columns } else { &columns[1..] }, &rows)
}

/// A link to a callback.
fn callback(project: ObjectId, id: ObjectId, callbacks: &BTreeMap<ObjectId, String>) -> Markup {
    match callbacks.get(&id) {
        Some(name) => html! { a href={ "/p/" (project) "/callbacks/" (id) } { (name) } },
        None => link(project, "callbacks", id),
    }
}

/// `GET /p/{project}/deliveries/{delivery}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let id: DeliveryId = visit.id("delivery")?;
    let query = GetDelivery { project_id, id };
    let (delivery, callbacks) = tokio::join!(visit.request(&query), visit.callbacks(project_id));
    let delivery = delivery?;
    let shown = Shown { project: project_id, callbacks: &names(&callbacks), may_act: visit.session.may_act() };
    let content = render(&shown, &delivery);
    let (title, section) = ("Delivery".to_owned(), Section::Deliveries);
    Ok(match delivery.status {
        DeliveryStatus::Pending => Page::Live { title, section, content },
        DeliveryStatus::Delivered | DeliveryStatus::Exhausted => Page::Show { title, section, content },
    })
}

pub(super) fn render(shown: &Shown<'_>, delivery: &Delivery) -> Markup {
    let Shown { project, callbacks, may_act } = *shown;
    html! {
        (live("delivery", &html! {
            dl.facts {
                (fact("Status", Some(delivery_status(delivery.status))))
                (fact("Update", Some(link(project, "updates", delivery.update_id))))
                (fact("Callback", Some(callback(project, delivery.callback_id, callbacks))))
                (fact("Event", (!delivery.kind.is_update()).then(|| html! { (delivery.kind) })))
                (fact("Next attempt", delivery.next_attempt_at.map(time)))
            }
            @if may_act && delivery.status != DeliveryStatus::Pending {
                ul.actions {
                    li { a href={ "/p/" (project) "/deliveries/" (id(delivery)) "/redeliver" } { "Redeliver" } }
                }
            }
        }))
        (panel("Attempts", &Ok(()), |()| attempts("Attempts", &delivery.attempts)))
    }
}

/// The id of a delivery, which its page has in its path.
pub(super) fn id(delivery: &Delivery) -> DeliveryId {
    DeliveryId { update_id: delivery.update_id, callback_id: delivery.callback_id, kind: delivery.kind }
}

/// The attempts of a delivery, each with its duration as a bar.
pub(super) fn attempts(caption: &str, attempts: &[Attempt]) -> Markup {
    let duration = |attempt: &Attempt| Duration::from_millis(attempt.duration_ms.into());
    let longest = attempts.iter().map(duration).max().unwrap_or_default();
    let rows = html! {
        @for attempt in attempts {
            tr {
                td.number { (attempt.number) }
                td { (time(attempt.started_at)) }
                td { (bar(duration(attempt), longest)) " " (span(attempt.duration_ms.into())) }
                td { @match attempt.status_code { Some(code) => (code), None => "no response" } }
                td { (attempt.error.as_deref().unwrap_or("accepted")) }
                td {
                    @if let Some(response) = &attempt.response {
                        details { summary { "First bytes" } pre tabindex="0" { (response) } }
                    }
                }
            }
        }
    };
    html! {
        @if attempts.is_empty() {
            p { "No attempt yet." }
        } @else {
            (table(caption, &["No.", "Began", "Took", "Status", "Result", "Response"], &rows))
        }
    }
}
