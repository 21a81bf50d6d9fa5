//! Repeating many deliveries of a callback at a limited rate: counted first.

use contract::{
    Timestamp,
    key::Scope,
    rpc::{Cursor, DeliveryStatus, MAX_PER_SECOND},
};
use http_api::{DataResponse, DateTime, RecoverRequest, RecoverResult};
use maud::html;
use std::time::Duration;

use super::{Confirmation, callbacks::Target};
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{
        layout::Section,
        parts::{fact, status_name, time},
    },
    visit::{Action, Visit},
};

const PATH: &str = "/api/v1/deliveries/recover";
/// Whose deliveries are repeated unless the form says otherwise.
const DEFAULT_AGE: Duration = Duration::from_hours(24);
const DEFAULT_RATE: u32 = 10;
/// How often one form continues a recovery that ran out of time. A longer one is continued with another form.
const MAX_STEPS: usize = 20;

/// What is repeated.
struct Order {
    since: Timestamp,
    status: DeliveryStatus,
    per_second: u32,
    cursor: Option<Cursor>,
}

impl Order {
    /// The order of a form's fields or a URL's parameters.
    fn of<'a>(value: impl Fn(&str) -> Option<&'a str>, now: Timestamp) -> Result<Self, Fault> {
        let invalid = |text: &str| Fault::Invalid(text.to_owned());
        let since = match value("since") {
            None => now.minus(DEFAULT_AGE),
            Some(text) => {
                // Browsers send the local time of a field without a zone, and without seconds if they are 0.
                let whole =
                    if text.len() == "2026-01-12T04:55".len() { format!("{text}:00Z") } else { format!("{text}Z") };
                let since = text.parse().or_else(|_| whole.parse());
                since.map_err(|_| invalid("since must be a time like 2026-01-12T04:55."))?
            }
        };
        let status = match value("status") {
            None | Some("exhausted") => DeliveryStatus::Exhausted,
            Some("delivered") => DeliveryStatus::Delivered,
            Some(_) => return Err(invalid("status must be exhausted or delivered.")),
        };
        let rate = value("per_second").map_or(Ok(DEFAULT_RATE), |text| text.parse().map_err(|_| ()));
        let per_second = rate.ok().filter(|rate| (1..=MAX_PER_SECOND).contains(rate));
        let per_second = per_second
            .ok_or_else(|| Fault::Invalid(format!("per_second must be a number from 1 to {MAX_PER_SECOND}.")))?;
        Ok(Self { since, status, per_second, cursor: value("cursor").map(|text| Cursor::from_text(text.to_owned())) })
    }

    fn request(&self, target: &Target, cursor: Option<Cursor>, dry_run: bool) -> Result<GatewayRequest, Fault> {
        let body = RecoverRequest {
            since: DateTime(self.since),
            status: Some(self.status),
            callback_id: Some(target.callback.callback_id),
            per_second: Some(self.per_second),
            dry_run: Some(dry_run),
            cursor,
        };
        GatewayRequest::post(PATH, &body)
    }
}

/// `GET /p/{project}/callbacks/{callback}/recover`: the count of what the form's button repeats.
pub(crate) async fn confirm(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let order = Order::of(|name| visit.text(name), visit.now)?;
    let counted = match visit.session.credential(target.project_id, Scope::LeadsWrite) {
        // The form for a key says what is missing.
        Err(_) => None,
        Ok(_) => {
            let request = order.request(&target, None, true)?;
            let counted: DataResponse<RecoverResult> =
                visit.send(target.project_id, Scope::LeadsWrite, request).await?;
            Some(counted.data)
        }
    };
    let count = counted
        .as_ref()
        .map(|counted| format!("{}{}", if counted.next.is_some() { "at least " } else { "" }, counted.deliveries));
    let page = Confirmation {
        path: target.page("recover"),
        consequence: html! {
            p {
                "Deliveries to " b { (target.callback.name) } " are sent again, the oldest first, at a limited rate: the \
                same bodies under the same " code { "webhook-id" } "."
            }
            form.filters {
                label for="since" { "Updates since (UTC)" }
                input #since name="since" type="datetime-local" required value=(minute(order.since));
                label for="status" { "that are" }
                select #status name="status" {
                    @for status in [DeliveryStatus::Exhausted, DeliveryStatus::Delivered] {
                        option value=(status_name(status)) selected[status == order.status] { (status_name(status)) }
                    }
                }
                label for="per_second" { "per second" }
                input #per_second name="per_second" type="number" min="1" max=(MAX_PER_SECOND) required value=(order.per_second);
                button { "Count" }
            }
            @if let (Some(count), Some(counted)) = (&count, &counted) {
                dl.facts {
                    (fact("Deliveries", Some(html! { (count) })))
                    (fact("The last one is due", counted.until.map(|at| time(at.0))))
                }
            }
        },
        fields: html! {
            input type="hidden" name="since" value=(order.since.to_iso());
            input type="hidden" name="status" value=(status_name(order.status));
            input type="hidden" name="per_second" value=(order.per_second);
        },
        button: format!("Redeliver {}", count.unwrap_or_default()),
    };
    Ok(page.page(&visit, "Recover a callback", Section::Callbacks, target.project_id, Scope::LeadsWrite))
}

/// A time as the field for times shows it.
fn minute(at: Timestamp) -> String {
    at.to_iso().chars().take("2026-01-12T04:55".len()).collect()
}

/// `POST /p/{project}/callbacks/{callback}/recover`.
pub(crate) async fn recover(visit: Visit) -> Result<Page, Fault> {
    let target = Target::of(&visit).await?;
    let mut order = Order::of(|name| visit.entered(name), visit.now)?;
    let before =
        format!("{} since {}, {} per second", status_name(order.status), order.since.to_iso(), order.per_second);
    let action = Action { scope: Scope::LeadsWrite, ..target.action("recover callback", before) };
    let (mut deliveries, mut until) = (0, None);
    for _ in 0..MAX_STEPS {
        let cursor = order.cursor.take();
        let request = order.request(&target, cursor, false)?;
        let after = |reply: &DataResponse<RecoverResult>| format!("{} repeated", reply.data.deliveries);
        let step = visit.act(&action, request, after).await?.data;
        deliveries += step.deliveries;
        until = step.until.or(until);
        order.cursor = step.next;
        if order.cursor.is_none() {
            break;
        }
    }
    let token = &visit.session.form_token;
    let content = html! {
        dl.facts {
            (fact("Sent again", Some(html! { (deliveries) " deliveries" })))
            (fact("The last one is due", until.map(|at| time(at.0))))
        }
        @if let Some(cursor) = &order.cursor {
            p { "There are more." }
            form.action action=(target.page("recover")) method="post" {
                (super::token_field(token))
                input type="hidden" name="since" value=(order.since.to_iso());
                input type="hidden" name="status" value=(status_name(order.status));
                input type="hidden" name="per_second" value=(order.per_second);
                input type="hidden" name="cursor" value=(cursor.as_str());
                button { "Continue" }
            }
        }
        (target.back())
    };
    Ok(Page::Show { title: "Recovered".into(), section: Section::Callbacks, content })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_browsers_and_of_the_api() {
        let now = Timestamp::from_millis(1_768_193_759_048);
        let since = |text: Option<&'static str>| {
            Order::of(|name| text.filter(|_| name == "since"), now).map(|order| order.since.to_iso())
        };
        assert_eq!(since(Some("2026-01-12T04:55")).unwrap(), "2026-01-12T04:55:00.000Z");
        assert_eq!(since(Some("2026-01-12T04:55:07")).unwrap(), "2026-01-12T04:55:07.000Z");
        assert_eq!(since(Some("2026-01-12T04:55:07.048Z")).unwrap(), "2026-01-12T04:55:07.048Z");
        assert_eq!(since(None).unwrap(), now.minus(DEFAULT_AGE).to_iso());
        assert!(since(Some("yesterday")).is_err());
    }

    #[test]
    fn a_rate_has_bounds() {
        let now = Timestamp::from_millis(0);
        for (text, is_valid) in [("1", true), ("1000", true), ("0", false), ("1001", false), ("many", false)] {
            let order = Order::of(|name| (name == "per_second").then_some(text), now);
            assert_eq!(order.is_ok(), is_valid, "{text}");
        }
    }
}
