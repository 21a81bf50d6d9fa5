//! Callbacks: their health, and one with its configuration and last deliveries.

use std::collections::BTreeMap;

use contract::{
    ObjectId, Timestamp,
    key::Scope,
    process::{Callback, CallbackAuth, ClientCertificate, EventKind, FilterCondition, Ordering, Process},
    rpc::{
        CallbackFailures, CallbackState, CallbackStatus, CountDeliveries, DeliveryCounts, DeliveryStatus, GetProcess,
        GroupFailures, ListDeliveries, ListedDelivery, MAX_PENDING_COUNTED, Page as ListPage, ProcessSelector,
    },
    subject::NO_PROCESS,
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    pages::{
        deliveries, failures,
        statistics::{self, Covered},
    },
    respond::Page,
    view::{
        layout::Section,
        parts::{ago, callback_state, curl, empty, fact, live, panel, span, table, text, time},
    },
    visit::Visit,
};

/// How many deliveries of each kind a callback shows; the list has all.
const SHOWN: u32 = 10;

/// The actions on a callback: path and label.
const ACTIONS: [(&str, &str); 8] = [
    ("test", "Send a test"),
    ("enable", "Enable"),
    ("pause", "Pause"),
    ("resume", "Resume"),
    ("recover", "Recover deliveries"),
    ("backfill", "Deliver past events"),
    ("rotate-secret", "Rotate the secret"),
    ("share", "Share"),
];

/// The only link for visitors who may not act: the open portal links.
const LINKS: (&str, &str) = ("share", "Portal links");

/// `GET /p/{project}/callbacks`.
pub(crate) async fn list(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let callbacks = visit.callbacks_with_details(project_id).await?;
    let path = "/api/v1/processes/PROCESS_ID/callbacks";
    let curl = curl(path, r#"{"name":"crm","url":"https://crm.example.com/hook"}"#);
    let content = render_list(project_id, &callbacks, visit.now, &curl);
    Ok(Page::Live { title: "Callbacks".into(), section: Section::Callbacks, content: live("callbacks", &content) })
}

pub(super) fn render_list(project: ObjectId, callbacks: &[CallbackStatus], now: Timestamp, curl: &str) -> Markup {
    html! {
        @if callbacks.is_empty() {
            (empty("There are no callbacks yet. This command adds one to a process:", Some(curl)))
        } @else {
            (rows(project, callbacks, now))
        }
    }
}

/// A table of callbacks.
pub(super) fn rows<'a>(
    project: ObjectId,
    callbacks: impl IntoIterator<Item = &'a CallbackStatus>,
    now: Timestamp,
) -> Markup {
    let rows = html! {
        @for callback in callbacks {
            tr {
                td { a href={ "/p/" (project) "/callbacks/" (callback.callback_id) } { (callback.name) } }
                td { (callback_state(callback.state)) }
                td { (process(project, callback)) }
                td.number { (pending(callback).unwrap_or_default()) }
                td { @if let Some(since) = callback.failing_since { (time(since)) " (" (ago(since, now)) ")" } }
                td { (callback.reason.as_deref().unwrap_or_default()) }
            }
        }
    };
    table("Callbacks", &["Name", "Health", "Process", "Pending", "Failing since", "Disabled because"], &rows)
}

/// How many deliveries are pending. None if they were not counted.
pub(super) fn pending(callback: &CallbackStatus) -> Option<String> {
    let pending = callback.details.as_ref()?.pending;
    Some(if pending < MAX_PENDING_COUNTED { pending.to_string() } else { format!("{pending} or more") })
}

fn process(project: ObjectId, callback: &CallbackStatus) -> Markup {
    let (segment, name) = match callback.process_id {
        Some(id) => (id.to_string(), callback.process.as_str()),
        None => (NO_PROCESS.to_owned(), "Fallback callbacks"),
    };
    html! { a href={ "/p/" (project) "/processes/" (segment) } { (name) } }
}

/// The parts of a callback's page other than its health.
pub(super) struct Around {
    pub(super) covered: Covered,
    pub(super) counts: Result<Vec<DeliveryCounts>, Fault>,
    pub(super) failures: Result<CallbackFailures, Fault>,
    pub(super) process: Result<Process, Fault>,
    pub(super) pending: Result<ListPage<ListedDelivery>, Fault>,
    pub(super) exhausted: Result<ListPage<ListedDelivery>, Fault>,
}

/// `GET /p/{project}/callbacks/{callback}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::ConfigRead)?;
    let callback = visit.callback(project_id).await?;
    let callback_id = callback.callback_id;
    let selector = match callback.process_id {
        Some(id) => ProcessSelector::Id(id),
        None => ProcessSelector::Named(NO_PROCESS.to_owned()),
    };
    let process = GetProcess { project_id, process: selector };
    let deliveries = async |status| {
        visit.session.role.check(project_id, Scope::LeadsRead)?;
        let query = ListDeliveries {
            status: Some(status),
            callback_id: Some(callback_id),
            ..ListDeliveries::of_project(project_id, SHOWN)
        };
        visit.request(&query).await
    };
    let covered = Covered::new(None, visit.now)?;
    let range = covered.range;
    let counts = async {
        visit.session.role.check(project_id, Scope::LeadsRead)?;
        let query = CountDeliveries { project_id, range, by: None, callback_id: Some(callback_id) };
        visit.request(&query).await
    };
    let failures = async {
        visit.session.role.check(project_id, Scope::LeadsRead)?;
        visit.request(&GroupFailures { project_id, callback_id, since: range.from }).await
    };
    let (counts, failures, process, pending, exhausted) = tokio::join!(
        counts,
        failures,
        visit.request(&process),
        deliveries(DeliveryStatus::Pending),
        deliveries(DeliveryStatus::Exhausted)
    );
    let around = Around { covered, counts, failures, process, pending, exhausted };
    let content = render(project_id, &callback, &around, visit.session.may_act(), visit.now);
    Ok(Page::Live { title: format!("Callback {}", callback.name), section: Section::Callbacks, content })
}

pub(super) fn render(
    project: ObjectId,
    callback: &CallbackStatus,
    around: &Around,
    may_act: bool,
    now: Timestamp,
) -> Markup {
    let deliveries = |status: &str, page: &ListPage<ListedDelivery>| {
        let names = BTreeMap::from([(callback.callback_id, callback.name.clone())]);
        html! {
            @if page.items.is_empty() {
                p { "None." }
            } @else {
                (deliveries::rows(project, &page.items, &names))
            }
            @if page.next.is_some() {
                p {
                    a href={ "/p/" (project) "/deliveries?status=" (status) "&callback=" (callback.callback_id) } {
                        "All " (status) " deliveries of this callback"
                    }
                }
            }
        }
    };
    html! {
        (live("health", &html! {
            dl.facts {
                (fact("Health", Some(callback_state(callback.state))))
                (fact("Failing since", callback.failing_since.map(|at| html! { (time(at)) " (" (ago(at, now)) ")" })))
                (fact("Disabled because", text(callback.reason.as_deref())))
                @if let Some(details) = &callback.details {
                    (fact("Disabled since", details.disabled_since.map(time)))
                    (fact("Pending deliveries", text(pending(callback).as_deref())))
                    (fact("Oldest pending delivery", details.oldest_pending_at.map(|at| html! { (time(at)) " (" (ago(at, now)) ")" })))
                    (fact("Last error", text(details.last_error.as_deref())))
                }
                (fact("Process", Some(process(project, callback))))
            }
            ul.actions {
                @for (action, label) in if may_act { &ACTIONS[..] } else { &[LINKS] } {
                    @if applies(action, callback.state) {
                        li { a href={ "/p/" (project) "/callbacks/" (callback.callback_id) "/" (action) } { (label) } }
                    }
                }
            }
        }))
        (panel("Deliveries in the last 24 hours", &around.counts, |counts| statistics::of_callback(project, callback.callback_id, counts, &around.covered)))
        (panel("Failures in the last 24 hours", &around.failures, |found| failures::groups(project, callback.callback_id, found)))
        (panel("Configuration", &around.process, |process| {
            match process.callbacks.iter().find(|known| known.callback_id == callback.callback_id) {
                Some(callback) => configuration(callback),
                None => html! { p { "The callback was removed from its process." } },
            }
        }))
        (panel("Pending deliveries", &around.pending, |page| deliveries("pending", page)))
        (panel("Exhausted deliveries", &around.exhausted, |page| deliveries("exhausted", page)))
    }
}

/// Whether an action has an effect on a callback in this state.
fn applies(action: &str, state: CallbackState) -> bool {
    match action {
        "enable" => state == CallbackState::Disabled,
        "pause" => matches!(state, CallbackState::Healthy | CallbackState::Failing),
        "resume" => state == CallbackState::Paused,
        _ => true,
    }
}

fn configuration(callback: &Callback) -> Markup {
    let events = callback.events.as_ref().map(|events| {
        let name = |event: &EventKind| match event {
            EventKind::Succeeded => "succeeded updates",
            EventKind::Failed => "failed updates",
            other => other.as_str(),
        };
        events.iter().map(name).collect::<Vec<_>>().join(", ")
    });
    html! {
        dl.facts {
            (fact("URL", text(Some(&callback.url))))
            (fact("Receives", text(Some(events.as_deref().unwrap_or("all outcomes")))))
            @for condition in &callback.filter {
                (fact("Only if", Some(html! { code { (condition.field) } " " (requirement(condition)) })))
            }
            (fact("Authentication", Some(match &callback.auth {
                None => html! { "signature only" },
                Some(CallbackAuth::Bearer { .. }) => html! { "signature and a bearer token" },
                Some(CallbackAuth::Header { name, .. }) => html! { "signature and the header " (name) },
                Some(CallbackAuth::Oauth2(client)) => html! {
                    "signature and access tokens for the client " (client.client_id) " from " (client.token_url)
                },
            })))
            @for header in &callback.headers {
                (fact("Extra header", text(Some(&header.name))))
            }
            @if let Some(expires_at) = callback.client_certificate.as_ref().and_then(ClientCertificate::expires_at) {
                (fact("Client certificate expires", Some(time(expires_at))))
            }
            (fact("Timeout", Some(html! { (span(i64::from(callback.timeout_seconds) * 1000)) })))
            (fact("Attempts at once", Some(html! { (callback.max_in_flight) })))
            (fact("Attempts per second", callback.max_per_second.map(|rate| html! { (rate) })))
            (fact("Order", text(Some(match callback.ordering {
                Ordering::None => "each delivery as soon as possible",
                Ordering::Lead => "one after the other for each lead",
            }))))
            @for retiring in &callback.retiring_secrets {
                (fact("A replaced secret signs until", Some(time(retiring.until))))
            }
        }
    }
}

/// What a condition of a filter requires of its field.
fn requirement(condition: &FilterCondition) -> String {
    match condition {
        FilterCondition { equals: Some(value), .. } => format!("is {value:?}"),
        FilterCondition { one_of: Some(values), .. } => {
            let values: Vec<_> = values.iter().map(|value| format!("{value:?}")).collect();
            format!("is one of {}", values.join(", "))
        }
        FilterCondition { exists: Some(false), .. } => "has no value".into(),
        FilterCondition { .. } => "has a value".into(),
    }
}
