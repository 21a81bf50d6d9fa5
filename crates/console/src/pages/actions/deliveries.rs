//! Repeats deliveries: one, or a selection from a list.

use contract::{
    ObjectId,
    key::Scope,
    rpc::{Delivery, DeliveryId, DeliveryStatus, GetDelivery},
};
use http_api::{DataResponse, ListedDelivery};
use maud::{Markup, html};

use super::Confirmation;
use crate::{
    fault::Fault,
    gateway::GatewayRequest,
    respond::Page,
    view::{
        layout::Section,
        parts::{Kind, badge, delivery_status, link, table},
    },
    visit::{Action, PAGE, Visit},
};

/// `GET /p/{project}/deliveries/{delivery}/redeliver`.
pub(crate) async fn confirm(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let id: DeliveryId = visit.id("delivery")?;
    let delivery = visit.request(&GetDelivery { project_id, id }).await?;
    let effect = match delivery.status {
        DeliveryStatus::Pending => "It is pending: it will be attempted anyway, and cannot be repeated before it ends.",
        DeliveryStatus::Delivered => "The endpoint has already accepted it, and will receive it again.",
        DeliveryStatus::Exhausted => "It is attempted again from the beginning of the retry schedule.",
    };
    let page = Confirmation {
        path: format!("/p/{project_id}/deliveries/{id}/redeliver"),
        consequence: html! {
            p { "One delivery is sent again, at once: the same body under the same " code { "webhook-id" } "." }
            p { (effect) }
        },
        fields: html! {},
        button: "Redeliver".into(),
    };
    Ok(page.page(&visit, "Redeliver", Section::Deliveries, project_id, Scope::LeadsWrite))
}

/// `POST /p/{project}/deliveries/{delivery}/redeliver`.
pub(crate) async fn redeliver(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let id: DeliveryId = visit.id("delivery")?;
    redeliver_one(&visit, project_id, id).await?;
    Ok(Page::Redirect(format!("/p/{project_id}/deliveries/{id}")))
}

pub(in crate::pages) async fn redeliver_one(visit: &Visit, project_id: ObjectId, id: DeliveryId) -> Result<(), Fault> {
    let delivery = visit.request(&GetDelivery { project_id, id }).await?;
    let action = Action {
        name: "redeliver",
        project_id,
        scope: Scope::LeadsWrite,
        object: format!("delivery {id}"),
        before: state(&delivery),
    };
    let request = GatewayRequest::post(format!("/api/v1/deliveries/{id}/redeliver"), &serde_json::json!({}))?;
    let after = |reply: &DataResponse<ListedDelivery>| reply.data.status.to_string();
    visit.act(&action, request, after).await.map(drop)
}

fn state(delivery: &Delivery) -> String {
    format!("{} after {} attempts", delivery.status, delivery.attempts.len())
}

/// The deliveries that a list's form selected: at most a page of them.
fn selected<'a>(ids: impl Iterator<Item = &'a str>) -> Result<Vec<DeliveryId>, Fault> {
    let parse = |text: &str| text.parse().map_err(|_| Fault::Invalid(format!("{text:?} is not the id of a delivery.")));
    let mut ids = ids.map(parse).collect::<Result<Vec<DeliveryId>, _>>()?;
    let mut seen = std::collections::BTreeSet::new();
    ids.retain(|id| seen.insert(id.to_string()));
    match ids.len() {
        0 => Err(Fault::Invalid("No delivery is selected. Go back to the list, and select at least one.".into())),
        count if count > PAGE as usize => Err(Fault::Invalid(format!("At most {PAGE} deliveries can be selected."))),
        _ => Ok(ids),
    }
}

/// `GET /p/{project}/deliveries/redeliver?delivery=…`: says first how many deliveries are repeated.
pub(crate) async fn confirm_selected(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    let ids = selected(visit.texts("delivery"))?;
    let page = Confirmation {
        path: format!("/p/{project_id}/deliveries/redeliver"),
        consequence: html! {
            p { (counted(ids.len())) " sent again, at once: the same bodies under the same " code { "webhook-id" } "." }
            p { "Deliveries that are pending are not repeated: they will be attempted anyway." }
        },
        fields: html! { @for id in &ids { input type="hidden" name="delivery" value=(id); } },
        button: format!("Redeliver {}", ids.len()),
    };
    Ok(page.page(&visit, "Redeliver", Section::Deliveries, project_id, Scope::LeadsWrite))
}

fn counted(count: usize) -> String {
    if count == 1 { "1 delivery is".to_owned() } else { format!("{count} deliveries are") }
}

/// `POST /p/{project}/deliveries/redeliver`.
pub(crate) async fn redeliver_selected(visit: Visit) -> Result<Page, Fault> {
    let project_id = visit.project(Scope::LeadsRead)?;
    // A key without the scope is refused once, not for each delivery.
    visit.session.credential(project_id, Scope::LeadsWrite)?;
    let mut results = Vec::new();
    for id in selected(visit.fields("delivery"))? {
        results.push((id, redeliver_one(&visit, project_id, id).await));
    }
    let content = render_results(project_id, &results);
    Ok(Page::Show { title: "Redelivered".into(), section: Section::Deliveries, content })
}

pub(in crate::pages) fn render_results(project: ObjectId, results: &[(DeliveryId, Result<(), Fault>)]) -> Markup {
    let done = results.iter().filter(|(_, result)| result.is_ok()).count();
    let rows = html! {
        @for (id, result) in results {
            tr {
                td { (link(project, "deliveries", id)) }
                td {
                    @match result {
                        Ok(()) => (delivery_status(DeliveryStatus::Pending)),
                        Err(_) => (badge(Kind::Bad, "not repeated")),
                    }
                }
                td { @if let Err(fault) = result { (fault.to_string()) } }
            }
        }
    };
    html! {
        p { (done) " of " (results.len()) " are sent again." }
        (table("Results", &["Delivery", "Status", "Why not"], &rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_deduplicated_and_bounded() {
        let id = |number: usize| format!("{number:024x}-{number:024x}");
        let ids: Vec<_> = (0..=PAGE as usize).map(id).collect();
        let selected = |ids: &[String]| selected(ids.iter().map(String::as_str)).map(|ids| ids.len());

        assert_eq!(selected(&ids[1..]), Ok(50));
        assert_eq!(selected(&[id(1), id(1)]), Ok(1));
        for refused in [&ids[..], &[], &["nothing".to_owned()]] {
            assert!(matches!(selected(refused), Err(Fault::Invalid(_))), "{refused:?}");
        }
    }
}
