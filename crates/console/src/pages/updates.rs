//! The timeline of one update.

use std::collections::BTreeMap;

use contract::{
    ObjectId,
    key::Scope,
    rpc::{Delivery, GetUpdate, ListUpdateDeliveries, Update, UpdateDeliveries, UpdateStatus},
};
use maud::{Markup, html};

use crate::{
    fault::Fault,
    pages::deliveries::{self, attempts},
    respond::Page,
    view::{
        layout::Section,
        parts::{Kind, badge, delivery_status, fact, json, link, panel, span, text, time},
    },
    visit::{Visit, names},
};

/// `GET /p/{project}/updates/{update}`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let update_id = visit.id("update")?;
    let (update, deliveries) = (GetUpdate { project_id, update_id }, ListUpdateDeliveries { project_id, update_id });
    let (update, deliveries, callbacks) =
        tokio::join!(visit.request(&update), visit.request(&deliveries), visit.callbacks(project_id));
    let content = render(project_id, &update?, &deliveries, &names(&callbacks));
    Ok(Page::Show { title: format!("Update {update_id}"), section: Section::None, content })
}

pub(super) fn render(
    project: ObjectId,
    update: &Update,
    deliveries: &Result<UpdateDeliveries, Fault>,
    callbacks: &BTreeMap<ObjectId, String>,
) -> Markup {
    html! {
        dl.facts {
            (fact("Outcome", Some(outcome(update))))
            (fact("Error", text(update.error.as_deref())))
            (fact("Lead", update.lead_id.map(|lead| link(project, "leads", lead))))
            (fact("Reference", text(update.reference_id.as_deref())))
            (fact("Process", update.process_id.map(|process| link(project, "processes", process))))
            (fact("State", change(update)))
            (fact("Version", update.version.map(|version| html! { (version) })))
            (fact("User", text(update.user_id.as_deref())))
            (fact("API key", update.api_key_id.map(|key| html! { span.id { (key) } })))
            @for warning in &update.warnings { (fact("Warning", text(Some(warning)))) }
        }
        section.panel {
            h2 { "Timeline" }
            ol.timeline { (steps(update)) }
        }
        (panel("Deliveries", deliveries, |deliveries| self::deliveries(project, deliveries, callbacks)))
        @if let Some(command) = &update.command { (json("Command", command)) }
        @if let Some(data) = &update.data { (json("Metadata after the update", data)) }
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
        (Some(state), _) | (None, Some(state)) => Some(html! { (state) " (unchanged)" }),
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
