//! 1 Accept: a module per endpoint, and the shapes that they share.

use std::borrow::Cow;

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use contract::{JsonObject, ObjectId, rpc::Lead};
use serde::Serialize;

use crate::error::ApiError;

pub(crate) mod bulk_initiate;
pub(crate) mod bulk_update;
pub(crate) mod callbacks;
pub(crate) mod deliveries;
pub(crate) mod documents;
pub(crate) mod dry_run;
pub(crate) mod events;
pub(crate) mod get_lead;
pub(crate) mod get_update;
pub(crate) mod initiate_lead;
pub(crate) mod lead_history;
pub(crate) mod list;
pub(crate) mod list_leads;
pub(crate) mod processes;
pub(crate) mod update_lead;

/// What a handler answers.
pub(crate) type Answer = Result<Response, ApiError>;

/// An answer with a JSON body.
pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let text = match serde_json::to_vec(body) {
        Ok(text) => text,
        Err(e) => {
            tracing::error!("an answer cannot be written: {e}");
            return ApiError::Internal.into_response();
        }
    };
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A lead in the vendor's shape.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Lead"))]
#[serde(rename_all = "camelCase")]
pub(crate) struct LeadView<'a> {
    #[serde(rename = "_id")]
    id: ObjectId,
    name: Option<&'a str>,
    phone: Option<Cow<'a, str>>,
    email: Option<&'a str>,
    project_id: ObjectId,
    process_id: ObjectId,
    reference_id: Option<&'a str>,
    current_state: &'a str,
    metadata: &'a JsonObject,
    created_at: String,
    updated_at: String,
}

impl<'a> From<&'a Lead> for LeadView<'a> {
    fn from(lead: &'a Lead) -> Self {
        Self {
            id: lead.lead_id,
            name: lead.name.as_deref(),
            phone: lead.phone.as_deref().map(Cow::Borrowed),
            email: lead.email.as_deref(),
            project_id: lead.project_id,
            process_id: lead.process_id,
            reference_id: lead.reference_id.as_deref(),
            current_state: &lead.state,
            metadata: &lead.metadata,
            created_at: lead.created_at.to_iso(),
            updated_at: lead.updated_at.to_iso(),
        }
    }
}
