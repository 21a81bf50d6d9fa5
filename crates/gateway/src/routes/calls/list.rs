//! 1 Accept: `GET /api/v1/calls`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::ListCalls};
use http_api::{Call, ListResponse};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

impl FromQuery for ListCalls {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        Ok(Self { project_id: key.project_id, lead_id: parameters.id("leadId")?, cursor, limit })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    Query { query, warnings }: Query<ListCalls>,
) -> HandlerResult {
    response::ok(&ListResponse::<Call>::new(app.request(&query).await?, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Calls", "listCalls", "List the calls in progress")
        .description("Ordered by lead. Expired calls are not in the list.")
        .query("leadId", "Only calls with this lead", crate::openapi::id())
        .page_parameters()
        .query_example("limit=50")
        .returns::<ListResponse<Call>>()
}
