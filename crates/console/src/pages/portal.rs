//! The pages of portal links: one callback, or one process with its callbacks, and nothing else of the project. No page
//! shows leads, users, metadata or the configuration.

use contract::{
    ObjectId, Timestamp,
    console::PortalTarget,
    key::Scope,
    rpc::{
        CallbackStatus, Delivery, DeliveryId, DeliveryStatus, FindUpdates, FoundUpdate, GetDelivery, ListDeliveries,
        ListedDelivery, Page as ListPage,
    },
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    pages::{
        actions::{
            Confirmation,
            callbacks::{Target, render_test, send_test},
            deliveries::redeliver_one,
        },
        callbacks::pending,
        deliveries::attempts,
        leads,
    },
    respond::Page,
    session::Portal,
    view::{
        layout::Section,
        parts::{
            ago, callback_state, choice, delivery_status, fact, live, live_rows, next_page, panel, span, table, text,
            time,
        },
    },
    visit::{PAGE, Visit},
};

/// The link of the visitor, and the callbacks that it shows.
async fn shown(visit: &Visit) -> Result<(&Portal, Vec<CallbackStatus>), Fault> {
    let portal = visit.portal()?;
    let mut callbacks = visit.app.request(&portal.list_callbacks()).await?;
    callbacks.retain(|callback| portal.shows(callback));
    Ok((portal, callbacks))
}

/// The callback of the path, if the link shows it.
async fn shown_callback(visit: &Visit) -> Result<(&Portal, CallbackStatus), Fault> {
    let callback_id: ObjectId = visit.id("callback")?;
    let (portal, callbacks) = shown(visit).await?;
    let callback = callbacks.into_iter().find(|callback| callback.callback_id == callback_id);
    Ok((portal, callback.ok_or_else(Fault::no_page)?))
}

/// The delivery of the path, if the link shows its callback.
async fn shown_delivery(visit: &Visit) -> Result<(&Portal, CallbackStatus, Delivery), Fault> {
    let id: DeliveryId = visit.id("delivery")?;
    let (portal, callbacks) = shown(visit).await?;
    let callback = callbacks.into_iter().find(|callback| callback.callback_id == id.callback_id);
    let callback = callback.ok_or_else(Fault::no_page)?;
    let delivery = visit.request(&GetDelivery { project_id: portal.project_id, id }).await?;
    Ok((portal, callback, delivery))
}

/// `GET /portal`: the callback of the link, or the callbacks and updates of its process.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let (portal, callbacks) = shown(&visit).await?;
    let process_id = match portal.target {
        PortalTarget::CallbackId(id) => return Ok(Page::Redirect(format!("/portal/callbacks/{id}"))),
        PortalTarget::ProcessId(id) => id,
    };
    let query = FindUpdates {
        project_id: portal.project_id,
        from: None,
        to: None,
        success: None,
        error_code: None,
        process_id: Some(process_id),
        api_key_id: None,
        user_id: None,
        cursor: visit.cursor(),
        limit: PAGE,
    };
    let updates = visit.request(&query).await;
    let title =
        callbacks.first().map_or_else(|| "Process".to_owned(), |callback| format!("Process {}", callback.process));
    let content = render(&callbacks, &updates, visit.now);
    Ok(Page::list(&visit, title, Section::None, content))
}

pub(super) fn render(
    callbacks: &[CallbackStatus],
    updates: &Result<ListPage<FoundUpdate>, Fault>,
    now: Timestamp,
) -> Markup {
    let rows = html! {
        @for callback in callbacks {
            tr {
                td { a href={ "/portal/callbacks/" (callback.callback_id) } { (callback.name) } }
                td { (callback_state(callback.state)) }
                td.number { (pending(callback).unwrap_or_default()) }
                td { @if let Some(since) = callback.failing_since { (time(since)) " (" (ago(since, now)) ")" } }
            }
        }
    };
    html! {
        (panel("Callbacks", &Ok(()), |()| html! {
            @if callbacks.is_empty() {
                p { "The process has no callback." }
            } @else {
                (table("Callbacks", &["Name", "Health", "Pending", "Failing since"], &rows))
            }
        }))
        (panel("Updates in the last 24 hours", updates, |page| html! {
            @if page.items.is_empty() { p { "None." } } @else { (update_rows(&page.items)) }
            (next_page("/portal", &[], page.next.as_ref()))
        }))
    }
}

/// A table of updates, without anything about their leads.
fn update_rows(updates: &[FoundUpdate]) -> Markup {
    let rows = html! {
        @for FoundUpdate { entry, .. } in updates {
            tr {
                td { span.id { (entry.update_id) } }
                td { (time(entry.logged_at)) }
                td { (leads::outcome(entry)) }
                td { (leads::states(entry)) }
                td.number { (span(entry.applied_at.millis() - entry.logged_at.millis())) }
            }
        }
    };
    table("Updates", &["Update", "Logged", "Outcome", "State", "Latency"], &rows)
}

/// `GET /portal/callbacks/{callback}`.
pub(crate) async fn callback(visit: Visit) -> Result<Page, Fault> {
    let (portal, callback) = shown_callback(&visit).await?;
    let status = visit.parameter("status")?;
    let query = ListDeliveries {
        status,
        callback_id: Some(callback.callback_id),
        cursor: visit.cursor(),
        ..ListDeliveries::of_project(portal.project_id, PAGE)
    };
    let deliveries = visit.request(&query).await;
    let content = render_callback(&callback, &deliveries, status, portal, visit.now);
    Ok(Page::list(&visit, format!("Callback {}", callback.name), Section::None, content))
}

pub(super) fn render_callback(
    callback: &CallbackStatus,
    deliveries: &Result<ListPage<ListedDelivery>, Fault>,
    status: Option<DeliveryStatus>,
    portal: &Portal,
    now: Timestamp,
) -> Markup {
    let path = format!("/portal/callbacks/{}", callback.callback_id);
    let since = |at: Timestamp| html! { (time(at)) " (" (ago(at, now)) ")" };
    html! {
        (live("health", &html! {
            dl.facts {
                (fact("Health", Some(callback_state(callback.state))))
                (fact("Failing since", callback.failing_since.map(since)))
                @if let Some(details) = &callback.details {
                    (fact("Disabled since", details.disabled_since.map(time)))
                    (fact("Pending deliveries", text(pending(callback).as_deref())))
                    (fact("Oldest pending delivery", details.oldest_pending_at.map(since)))
                    (fact("Last error", text(details.last_error.as_deref())))
                }
            }
        }))
        @if portal.may_act { ul.actions { li { a href={ (path) "/test" } { "Send a test" } } } }
        h2 { "Deliveries" }
        form.filters {
            (choice("status", "Status", &DeliveryStatus::ALL, status))
            button { "Filter" }
        }
        (live_rows("deliveries", &html! {
            @match deliveries {
                Ok(page) => {
                    @if page.items.is_empty() { p { "None." } } @else { (delivery_rows(&page.items)) }
                    (next_page(&path, &[("status", status.map(|status| status.to_string()))], page.next.as_ref()))
                }
                Err(fault) => (crate::view::parts::notice(fault)),
            }
        }))
        @if matches!(portal.target, PortalTarget::ProcessId(_)) { p { a href="/portal" { "All callbacks" } } }
    }
}

fn delivery_rows(deliveries: &[ListedDelivery]) -> Markup {
    let rows = html! {
        @for delivery in deliveries {
            tr {
                td { a href={ "/portal/deliveries/" (delivery.id) } { (time(delivery.updated_at)) } }
                td { (delivery_status(delivery.status)) }
                td { span.id { (delivery.id.update_id) } }
                td.number { (delivery.attempts) }
                td { @if let Some(at) = delivery.next_attempt_at { (time(at)) } }
                td.error { (delivery.error.as_deref().unwrap_or_default()) }
            }
        }
    };
    table("Deliveries", &["Changed", "Status", "Update", "Attempts", "Next attempt", "Last error"], &rows)
}

/// `GET /portal/deliveries/{delivery}`.
pub(crate) async fn delivery(visit: Visit) -> Result<Page, Fault> {
    let (portal, callback, delivery) = shown_delivery(&visit).await?;
    let content = render_delivery(&callback, &delivery, portal, visit.segment("delivery"));
    Ok(Page::Show { title: "Delivery".into(), section: Section::None, content })
}

pub(super) fn render_delivery(callback: &CallbackStatus, delivery: &Delivery, portal: &Portal, id: &str) -> Markup {
    html! {
        dl.facts {
            (fact("Status", Some(delivery_status(delivery.status))))
            (fact("Callback", Some(html! { a href={ "/portal/callbacks/" (callback.callback_id) } { (callback.name) } })))
            (fact("webhook-id", Some(html! { span.id { (delivery.update_id) } })))
            (fact("Event", (!delivery.kind.is_update()).then(|| html! { (delivery.kind) })))
            (fact("Next attempt", delivery.next_attempt_at.map(time)))
        }
        @if portal.may_act && delivery.status != DeliveryStatus::Pending {
            ul.actions { li { a href={ "/portal/deliveries/" (id) "/redeliver" } { "Redeliver" } } }
        }
        (panel("Attempts", &Ok(()), |()| attempts("Attempts", &delivery.attempts)))
    }
}

/// `GET /portal/callbacks/{callback}/test`.
pub(crate) async fn confirm_test(visit: Visit) -> Result<Page, Fault> {
    let (portal, callback) = shown_callback(&visit).await?;
    let page = Confirmation {
        path: format!("/portal/callbacks/{}/test", callback.callback_id),
        consequence: html! { p { "One signed ping is sent to " b { (callback.name) } ". It is not a delivery." } },
        fields: html! {},
        button: "Send a test".into(),
    };
    Ok(page.page(&visit, "Test a callback", Section::None, portal.project_id, Scope::ConfigWrite))
}

/// `POST /portal/callbacks/{callback}/test`.
pub(crate) async fn test(visit: Visit) -> Result<Page, Fault> {
    let (portal, callback) = shown_callback(&visit).await?;
    let path = format!("/portal/callbacks/{}", callback.callback_id);
    let result = send_test(&visit, &Target::new(portal.project_id, callback)).await?;
    let content = html! { (render_test(&result)) p { a href=(path) { "Back to the callback" } } };
    Ok(Page::Show { title: "Test a callback".into(), section: Section::None, content })
}

/// `GET /portal/deliveries/{delivery}/redeliver`.
pub(crate) async fn confirm_redelivery(visit: Visit) -> Result<Page, Fault> {
    let (portal, callback, _) = shown_delivery(&visit).await?;
    let page = Confirmation {
        path: format!("/portal/deliveries/{}/redeliver", visit.segment("delivery")),
        consequence: html! {
            p { "The delivery is sent to " b { (callback.name) } " again, at once: the same body under the same " code { "webhook-id" } "." }
        },
        fields: html! {},
        button: "Redeliver".into(),
    };
    Ok(page.page(&visit, "Redeliver", Section::None, portal.project_id, Scope::LeadsWrite))
}

/// `POST /portal/deliveries/{delivery}/redeliver`.
pub(crate) async fn redeliver(visit: Visit) -> Result<Page, Fault> {
    let (portal, ..) = shown_delivery(&visit).await?;
    let id: DeliveryId = visit.id("delivery")?;
    redeliver_one(&visit, portal.project_id, id).await?;
    Ok(Page::Redirect(format!("/portal/deliveries/{id}")))
}
