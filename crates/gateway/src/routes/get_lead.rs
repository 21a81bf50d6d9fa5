//! 1 Accept: `GET /api/v1/leads/get`: a lead as lead-state knows it, in the vendor's shape.

use std::{borrow::Cow, sync::Arc};

use axum::{
    extract::{Request, State},
    http::StatusCode,
};
use contract::{
    ObjectId,
    key::{ApiKey, Scope},
    rpc::{self, Activity, GetLead, Lead},
};
use serde::Serialize;

use crate::{
    error::ApiError,
    fields::{Address, Fields},
    routes::{Answer, LeadView, json},
    server::App,
};

#[derive(Debug, Serialize)]
struct Found<'a> {
    success: bool,
    data: Data<'a>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Data<'a> {
    #[serde(flatten)]
    lead: LeadView<'a>,
    last_disposition: Option<&'a str>,
    activities: Vec<ActivityView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ActivityView<'a> {
    update_id: ObjectId,
    success: bool,
    error: Option<&'a str>,
    from_state: Option<&'a str>,
    to_state: Option<&'a str>,
    disposition: Option<&'a str>,
    user_id: Option<&'a str>,
    timestamp: String,
}

impl<'a> From<&'a Activity> for ActivityView<'a> {
    fn from(activity: &'a Activity) -> Self {
        Self {
            update_id: activity.update_id,
            success: activity.success,
            error: activity.error.as_deref(),
            from_state: activity.from_state.as_deref(),
            to_state: activity.to_state.as_deref(),
            disposition: activity.disposition.as_deref(),
            user_id: activity.user_id.as_deref(),
            timestamp: activity.timestamp.to_iso(),
        }
    }
}

/// Answers with the lead and its last updates.
pub(crate) async fn handle(State(app): State<Arc<App>>, request: Request) -> Answer {
    let key = app.authorize(request.headers(), Scope::LeadsRead)?;
    let (wanted, masked) = parse(request.uri().query().unwrap_or_default(), &key)?;
    let lead: Lead = service_kit::rpc::call(&app.broker()?.client, rpc::LEAD_GET, &wanted).await?;
    Ok(json(StatusCode::OK, &view(&lead, masked)))
}

/// Reads which lead a query string asks for, and whether its phone number is to be masked.
fn parse(query: &str, key: &ApiKey) -> Result<(GetLead, bool), ApiError> {
    let mut fields = Fields::from_query(query)?;
    let Address { lead_id, reference_id, process_id } = fields.address(key)?;
    let masked = match fields.text("masked")?.as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(ApiError::field("masked", "must be true or false")),
    };
    Ok((GetLead { project_id: key.project_id, lead_id, reference_id, process_id }, masked))
}

fn view(lead: &Lead, masked: bool) -> Found<'_> {
    let mut shown = LeadView::from(lead);
    if masked {
        shown.phone = shown.phone.map(|phone| Cow::Owned(mask(&phone)));
    }
    let data = Data {
        lead: shown,
        last_disposition: lead.disposition.as_deref(),
        activities: lead.activities.iter().map(ActivityView::from).collect(),
    };
    Found { success: true, data }
}

/// Hides every digit of a phone number but the last four.
fn mask(phone: &str) -> String {
    let mut hidden = phone.chars().filter(char::is_ascii_digit).count().saturating_sub(4);
    let mut mask = |c: char| {
        if c.is_ascii_digit() && hidden > 0 {
            hidden -= 1;
            return '*';
        }
        c
    };
    phone.chars().map(&mut mask).collect()
}
