//! 1 Accept: `GET /api/v1/leads/{leadId}/updates`: a lead's audit trail, as lead-state keeps it.

use std::sync::Arc;

use axum::extract::Request;
use contract::{
    ObjectId,
    key::ApiKey,
    rpc::{self, GetLeadHistory, HistoryEntry, Page, UpdateStatus},
};
use serde::Serialize;

use crate::{
    fields::Fields,
    routes::{Answer, list},
    server::App,
};

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PastUpdate"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct PastUpdateView<'a> {
    update_id: ObjectId,
    status: UpdateStatus,
    error: Option<&'a str>,
    error_code: Option<&'a str>,
    from_state: Option<&'a str>,
    to_state: Option<&'a str>,
    disposition: Option<&'a str>,
    version: Option<i64>,
    user_id: Option<&'a str>,
    api_key_id: Option<ObjectId>,
    warnings: &'a [String],
    logged_at: String,
    applied_at: String,
}

/// Answers with a page of updates.
pub(crate) async fn handle(app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> Answer {
    let lead_id = list::path(&mut request, "leadId", "must be 24 hex digits").await?;
    let mut fields = Fields::from_query(request.uri().query().unwrap_or_default())?;
    let (cursor, limit) = list::page(&mut fields)?;
    fields.ignore_rest("as unknown");
    let wanted = GetLeadHistory { project_id: key.project_id, lead_id, cursor, limit };
    let page: Page<HistoryEntry> = service_kit::rpc::query(&app.broker()?.client, rpc::LEAD_HISTORY, &wanted).await?;
    Ok(list::Listed::new(&page, PastUpdateView::from, &fields.warnings).answer())
}

impl<'a> From<&'a HistoryEntry> for PastUpdateView<'a> {
    fn from(update: &'a HistoryEntry) -> Self {
        Self {
            update_id: update.update_id,
            status: if update.success { UpdateStatus::Succeeded } else { UpdateStatus::Failed },
            error: update.error.as_deref(),
            error_code: update.error_code.as_deref(),
            from_state: update.from_state.as_deref(),
            to_state: update.to_state.as_deref(),
            disposition: update.disposition.as_deref(),
            version: update.version,
            user_id: update.user_id.as_deref(),
            api_key_id: update.api_key_id,
            warnings: &update.warnings,
            logged_at: update.logged_at.to_iso(),
            applied_at: update.applied_at.to_iso(),
        }
    }
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;

    use super::*;

    #[test]
    fn a_page_of_an_audit_trail() {
        let at = Timestamp::from_millis(1_768_193_759_048);
        let update = HistoryEntry {
            update_id: ObjectId::from_bytes([1; 12]),
            success: false,
            error: Some("No".into()),
            error_code: Some("no".into()),
            from_state: Some("new".into()),
            to_state: Some("new".into()),
            disposition: None,
            version: Some(1),
            user_id: Some("u-1".into()),
            api_key_id: Some(ObjectId::from_bytes([4; 12])),
            warnings: vec!["w".into()],
            epoch: 1,
            log_sequence: 7,
            logged_at: at,
            applied_at: at,
        };
        let page = Page { items: vec![update], next: None };
        let listed = list::Listed::new(&page, PastUpdateView::from, &[]);
        insta::assert_snapshot!(serde_json::to_string(&listed).unwrap(), @r#"{"success":true,"data":[{"updateId":"010101010101010101010101","status":"failed","error":"No","errorCode":"no","fromState":"new","toState":"new","disposition":null,"version":1,"userId":"u-1","apiKeyId":"040404040404040404040404","warnings":["w"],"loggedAt":"2026-01-12T04:55:59.048Z","appliedAt":"2026-01-12T04:55:59.048Z"}],"next":null}"#);
    }
}
