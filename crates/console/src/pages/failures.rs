//! The failed deliveries of a callback, grouped by status and error.

use contract::{
    ObjectId,
    rpc::{CallbackFailures, DeliveryStatus, FailureGroup},
};
use maud::{Markup, html};

use crate::view::parts::{table, time};

/// A row for each status and error, with its deliveries and a sample.
pub(super) fn groups(project: ObjectId, callback: ObjectId, failures: &CallbackFailures) -> Markup {
    let rows = html! {
        @for group in &failures.groups {
            tr {
                td { @match group.status_code { Some(code) => (code), None => "no response" } }
                td.error { (group.error.as_deref().unwrap_or_default()) }
                td.number { (count(project, callback, group, DeliveryStatus::Pending, group.pending)) }
                td.number { (count(project, callback, group, DeliveryStatus::Exhausted, group.exhausted)) }
                td { (time(group.last_at)) }
                td {
                    a href={ "/p/" (project) "/deliveries/" (group.sample) } { "Delivery" }
                    @if let Some(response) = &group.response {
                        details { summary { "First bytes" } pre tabindex="0" { (response) } }
                    }
                }
            }
        }
    };
    html! {
        @if failures.groups.is_empty() {
            p { "None." }
        } @else {
            (table("Failures", &["Status", "Error", "Pending", "Exhausted", "Last", "Sample"], &rows))
        }
        @if !failures.complete {
            p { "Not all deliveries of this callback were read: there may be more failures than these." }
        }
    }
}

/// How many deliveries of a group have this status, with a link to them.
fn count(project: ObjectId, callback: ObjectId, group: &FailureGroup, status: DeliveryStatus, count: i64) -> Markup {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("status", status.as_str()).append_pair("callback", &callback.to_string());
    if let Some(code) = group.status_code {
        query.append_pair("code", &code.to_string());
    }
    if let Some(error) = &group.error {
        query.append_pair("error", error);
    }
    html! {
        @if count == 0 { "0" } @else { a href={ "/p/" (project) "/deliveries?" (query.finish()) } { (count) } }
    }
}
