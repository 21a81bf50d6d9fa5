//! Recovers or backfills a callback: makes its deliveries again, or makes those of past events that it does not have.
//! The deliveries are counted first, and then made at a limited rate.

use contract::{
    Timestamp,
    key::Scope,
    rpc::{Cursor, DeliveryStatus, MAX_PER_SECOND},
};
use http_api::{BackfillRequest, DataResponse, DateTime, RecoverRequest, RecoverResult};
use maud::{Markup, html};
use std::time::Duration;

use super::{Confirmation, callbacks::Target};
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{
        layout::Section,
        parts::{fact, notice, time},
    },
    visit::{Action, Visit},
};

/// The default of `since`: how far back a recovery or backfill goes.
const DEFAULT_AGE: Duration = Duration::from_hours(24);
const DEFAULT_RATE: u32 = 10;
/// Most requests of one form: each continues where the one before stopped. A longer recovery needs another form.
const MAX_STEPS: usize = 20;

/// Which deliveries are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Existing deliveries, again.
    Recovery,
    /// Deliveries of past events that the callback does not have.
    Backfill,
}

impl Kind {
    /// The last segment of the page's path.
    const fn segment(self) -> &'static str {
        match self {
            Self::Recovery => "recover",
            Self::Backfill => "backfill",
        }
    }

    const fn scope(self) -> Scope {
        match self {
            Self::Recovery => Scope::LeadsWrite,
            Self::Backfill => Scope::ConfigWrite,
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Recovery => "Recover a callback",
            Self::Backfill => "Deliver past events",
        }
    }

    const fn action(self) -> &'static str {
        match self {
            Self::Recovery => "recover callback",
            Self::Backfill => "backfill callback",
        }
    }

    fn consequence(self, callback: &str) -> Markup {
        match self {
            Self::Recovery => html! {
                p {
                    "Deliveries to " b { (callback) } " are sent again, the oldest first, at a limited rate: the \
                    same bodies under the same " code { "webhook-id" } "."
                }
            },
            Self::Backfill => html! {
                p {
                    "Past events are delivered to " b { (callback) } ", the oldest first, at a limited rate: those that it would \
                    have got as it is configured now, and does not have. Repeating this delivers none twice."
                }
            },
        }
    }
}

/// A recovery or backfill to carry out.
struct Order {
    kind: Kind,
    since: Timestamp,
    status: DeliveryStatus,
    per_second: u32,
    cursor: Option<Cursor>,
}

impl Order {
    /// Parses the fields of a form, or the parameters of a URL.
    fn of<'a>(kind: Kind, value: impl Fn(&str) -> Option<&'a str>, now: Timestamp) -> Result<Self, Fault> {
        let invalid = |text: &str| Fault::Invalid(text.to_owned());
        let since = match value("since") {
            None => now.minus(DEFAULT_AGE),
            Some(text) => {
                // Browsers send the value of a `datetime-local` field without a zone, and without seconds if these are
                // zero.
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
        Ok(Self {
            kind,
            since,
            status,
            per_second,
            cursor: value("cursor").map(|text| Cursor::from_text(text.to_owned())),
        })
    }

    fn request(&self, target: &Target, cursor: Option<Cursor>, dry_run: bool) -> Result<GatewayRequest, Fault> {
        let (since, per_second, dry_run) = (DateTime(self.since), Some(self.per_second), Some(dry_run));
        match self.kind {
            Kind::Recovery => {
                let (status, callback_id) = (Some(self.status), Some(target.callback.callback_id));
                let body = RecoverRequest { since, status, callback_id, per_second, dry_run, cursor };
                GatewayRequest::post("/api/v1/deliveries/recover", &body)
            }
            Kind::Backfill => {
                GatewayRequest::post(target.api("backfill"), &BackfillRequest { since, per_second, dry_run, cursor })
            }
        }
    }

    /// The fields of a form for this order.
    fn hidden(&self) -> Markup {
        html! {
            input type="hidden" name="since" value=(self.since.to_iso());
            @if self.kind == Kind::Recovery { input type="hidden" name="status" value=(self.status); }
            input type="hidden" name="per_second" value=(self.per_second);
        }
    }
}

/// `GET /p/{project}/callbacks/{callback}/recover`.
pub(crate) async fn confirm(visit: Visit) -> Result<Page, Fault> {
    confirm_order(&visit, Kind::Recovery).await
}

/// `POST /p/{project}/callbacks/{callback}/recover`.
pub(crate) async fn recover(visit: Visit) -> Result<Page, Fault> {
    carry_out(&visit, Kind::Recovery).await
}

/// `GET /p/{project}/callbacks/{callback}/backfill`.
pub(crate) async fn confirm_backfill(visit: Visit) -> Result<Page, Fault> {
    confirm_order(&visit, Kind::Backfill).await
}

/// `POST /p/{project}/callbacks/{callback}/backfill`.
pub(crate) async fn backfill(visit: Visit) -> Result<Page, Fault> {
    carry_out(&visit, Kind::Backfill).await
}

/// The page with the number of deliveries that its form would make.
async fn confirm_order(visit: &Visit, kind: Kind) -> Result<Page, Fault> {
    let target = Target::of(visit).await?;
    let order = Order::of(kind, |name| visit.text(name), visit.now)?;
    let counted = match visit.session.credential(target.project_id, kind.scope()) {
        // The form for an API key names the missing scope.
        Err(_) => None,
        Ok(_) => {
            let request = order.request(&target, None, true)?;
            let counted: DataResponse<RecoverResult> = visit.send(target.project_id, kind.scope(), request).await?;
            Some(counted.data)
        }
    };
    let count = counted
        .as_ref()
        .map(|counted| format!("{}{}", if counted.next.is_some() { "at least " } else { "" }, counted.deliveries));
    let page = Confirmation {
        path: target.page(kind.segment()),
        consequence: html! {
            (kind.consequence(&target.callback.name))
            form.filters {
                label for="since" { "Updates since (UTC)" }
                input #since name="since" type="datetime-local" required value=(minute(order.since));
                @if kind == Kind::Recovery {
                    label for="status" { "that are" }
                    select #status name="status" {
                        @for status in [DeliveryStatus::Exhausted, DeliveryStatus::Delivered] {
                            option value=(status) selected[status == order.status] { (status) }
                        }
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
        fields: order.hidden(),
        button: format!(
            "{} {}",
            if kind == Kind::Recovery { "Redeliver" } else { "Deliver" },
            count.unwrap_or_default()
        ),
    };
    Ok(page.page(visit, kind.title(), Section::Callbacks, target.project_id, kind.scope()))
}

/// A time as the value of a `datetime-local` field.
fn minute(at: Timestamp) -> String {
    at.to_iso().chars().take("2026-01-12T04:55".len()).collect()
}

async fn carry_out(visit: &Visit, kind: Kind) -> Result<Page, Fault> {
    let target = Target::of(visit).await?;
    let mut order = Order::of(kind, |name| visit.entered(name), visit.now)?;
    let status = if kind == Kind::Recovery { order.status.as_str() } else { "past events" };
    let before = format!("{status} since {}, {} per second", order.since.to_iso(), order.per_second);
    let action = Action { scope: kind.scope(), ..target.action(kind.action(), before) };
    let mut progress = Progress::default();
    for _ in 0..MAX_STEPS {
        let request = order.request(&target, order.cursor.clone(), false)?;
        let after = |reply: &DataResponse<RecoverResult>| format!("{} made", reply.data.deliveries);
        match visit.act(&action, request, after).await {
            Ok(DataResponse { data: step, .. }) => {
                progress.deliveries += step.deliveries;
                progress.until = step.until.or(progress.until);
                order.cursor = step.next;
            }
            // The page shows the steps before, and the form that continues with this one.
            Err(fault) if order.cursor.is_some() => {
                progress.failed = Some(fault);
                break;
            }
            Err(fault) => return Err(fault),
        }
        if order.cursor.is_none() {
            break;
        }
    }
    let path = target.page(kind.segment());
    let content = html! { (progress.render(&order, &path, &visit.session.form_token)) (target.back()) };
    Ok(Page::Show { title: kind.title().to_owned(), section: Section::Callbacks, content })
}

/// The result of the steps of one form.
#[derive(Default)]
struct Progress {
    deliveries: u64,
    /// When the last of them is due.
    until: Option<DateTime>,
    /// Why the steps ended early.
    failed: Option<Fault>,
}

impl Progress {
    /// The result, and the form that continues at the order's cursor.
    fn render(&self, order: &Order, path: &str, form_token: &str) -> Markup {
        let made = if order.kind == Kind::Recovery { "Sent again" } else { "Will be sent" };
        html! {
            @if let Some(fault) = &self.failed { (notice(fault)) }
            dl.facts {
                (fact(made, Some(html! { (self.deliveries) " deliveries" })))
                (fact("The last one is due", self.until.map(|at| time(at.0))))
            }
            @if let Some(cursor) = &order.cursor {
                p { "There are more." }
                form.action action=(path) method="post" {
                    (super::token_field(form_token))
                    (order.hidden())
                    input type="hidden" name="cursor" value=(cursor.as_str());
                    button { "Continue" }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_browsers_and_of_the_api() {
        let now = Timestamp::from_millis(1_768_193_759_048);
        let since = |text: Option<&'static str>| {
            Order::of(Kind::Recovery, |name| text.filter(|_| name == "since"), now).map(|order| order.since.to_iso())
        };
        assert_eq!(since(Some("2026-01-12T04:55")).unwrap(), "2026-01-12T04:55:00.000Z");
        assert_eq!(since(Some("2026-01-12T04:55:07")).unwrap(), "2026-01-12T04:55:07.000Z");
        assert_eq!(since(Some("2026-01-12T04:55:07.048Z")).unwrap(), "2026-01-12T04:55:07.048Z");
        assert_eq!(since(None).unwrap(), now.minus(DEFAULT_AGE).to_iso());
        assert!(since(Some("yesterday")).is_err());
    }

    #[test]
    fn a_failed_step_leaves_the_result_and_the_place_to_continue() {
        let cursor = Cursor::new("deliveries", "7");
        let value = |name: &str| (name == "cursor").then_some(cursor.as_str());
        let order = Order::of(Kind::Recovery, value, Timestamp::from_millis(0)).unwrap();
        let failed = Some(Fault::Unavailable("The gateway does not answer.".into()));

        let html = Progress { deliveries: 900, until: None, failed }.render(&order, "/p/1/recover", "f0").0;

        assert!(html.contains("The gateway does not answer.") && html.contains("900 deliveries"), "{html}");
        assert!(html.contains(&format!(r#"name="cursor" value="{}""#, cursor.as_str())), "{html}");
    }

    #[test]
    fn a_rate_has_bounds() {
        let now = Timestamp::from_millis(0);
        for (text, is_valid) in [("1", true), ("1000", true), ("0", false), ("1001", false), ("many", false)] {
            let order = Order::of(Kind::Backfill, |name| (name == "per_second").then_some(text), now);
            assert_eq!(order.is_ok(), is_valid, "{text}");
        }
    }
}
