//! 1 Accept: `GET /api/v1/processes`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::ListProcesses};
use http_api::{ConfiguredProcess, ListResponse};

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

impl FromQuery for ListProcesses {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        Ok(Self { project_id: key.project_id, cursor, limit })
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    Query { query, warnings }: Query<ListProcesses>,
) -> HandlerResult {
    let page = app.request(&query).await?;
    response::ok(&ListResponse::<ConfiguredProcess>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Processes", "listProcesses", "List processes")
        .description("By name. Secrets are never shown.")
        .page_parameters()
        .returns::<ListResponse<ConfiguredProcess>>()
}
