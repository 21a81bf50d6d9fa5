//! `leadctl lead export`: what is stored about one lead, as one JSON document. No query lists undecided updates.

use async_nats::Client;
use contract::{
    ObjectId,
    rpc::{
        Call, Delivery, GetLead, GetLeadHistory, GetUpdate, Lead, ListCalls, ListUpdateDeliveries, MAX_LIMIT,
        ParkedUpdate, Query, Update, UpdateDeliveries,
    },
};
use serde::Serialize;

use crate::{clients::admin, output};

/// An update or a call event of the lead, with its command and its deliveries.
#[derive(Debug, Serialize)]
struct ExportedUpdate<'a> {
    update: &'a Update,
    deliveries: &'a [Delivery],
    /// Since when its event is parked, because its process cannot be read; null if it is not parked.
    parked: Option<&'a ParkedUpdate>,
}

/// Prints the document update by update, so that memory holds one of them, whatever the length of the history.
pub(crate) async fn export(client: &Client, project_id: ObjectId, lead_id: ObjectId) -> anyhow::Result<()> {
    let query = GetLead { project_id, lead_id: Some(lead_id), reference_id: None, process_id: None };
    let lead = admin::request(client, &query).await?;
    let calls = calls(client, project_id, lead_id).await?;
    output::json_text(&head(&lead, &calls)?);
    let (mut cursor, mut is_first) = (None, true);
    loop {
        let query = GetLeadHistory { project_id, lead_id, cursor, limit: MAX_LIMIT };
        let page = admin::request(client, &query).await?;
        for entry in &page.items {
            let update_id = entry.update_id;
            let update = admin::request(client, &GetUpdate { project_id, update_id }).await?;
            let UpdateDeliveries { deliveries, parked, .. } =
                admin::request(client, &ListUpdateDeliveries { project_id, update_id }).await?;
            let exported = ExportedUpdate { update: &update, deliveries: &deliveries, parked: parked.as_ref() };
            let comma = if is_first { "" } else { "," };
            output::json_text(&format!("{comma}{}", serde_json::to_string(&exported)?));
            is_first = false;
        }
        cursor = page.next;
        if cursor.is_none() {
            output::json_text("]}");
            return Ok(());
        }
    }
}

async fn calls(client: &Client, project_id: ObjectId, lead_id: ObjectId) -> anyhow::Result<Vec<Call>> {
    let mut calls = Vec::new();
    let mut cursor = None;
    loop {
        let query = ListCalls { project_id, lead_id: Some(lead_id), cursor, limit: MAX_LIMIT };
        let page: <ListCalls as Query>::Reply = admin::request(client, &query).await?;
        calls.extend(page.items);
        cursor = page.next;
        if cursor.is_none() {
            return Ok(calls);
        }
    }
}

/// The beginning of the document, up to the first update.
fn head(lead: &Lead, calls: &[Call]) -> anyhow::Result<String> {
    let (lead, calls) = (serde_json::to_string(lead)?, serde_json::to_string(calls)?);
    Ok(format!(r#"{{"lead":{lead},"calls":{calls},"updates":["#))
}
