//! 1 Accept: `GET /api/v1/leads/{leadId}/updates`: a lead's audit trail.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{Cursor, GetLeadHistory},
};
use http_api::{HistoryEntry, ListResponse};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters, path::LeadPath},
    response::{self, HandlerResult},
};

/// The page of a list that a request selects.
pub(crate) struct PageQuery {
    cursor: Option<Cursor>,
    limit: u32,
}

impl FromQuery for PageQuery {
    fn from_query(parameters: &mut Fields<'_>, _: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        Ok(Self { cursor, limit })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    LeadPath(lead_id): LeadPath,
    Query { query: PageQuery { cursor, limit }, warnings }: Query<PageQuery>,
) -> HandlerResult {
    let query = GetLeadHistory { project_id: key.project_id, lead_id, cursor, limit };
    let page = app.request(&query).await?;
    response::ok(&ListResponse::<HistoryEntry>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Leads", "listLeadUpdates", "List a lead's updates")
        .description("The lead's audit trail: every applied or refused update, newest first.")
        .page_parameters()
        .returns::<ListResponse<HistoryEntry>>()
        .errors(&[404])
}
