//! 1 Accept: `GET /api/v1/keys`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::ListKeys};
use http_api::ListResponse;

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields, page::Parameters},
    response::{self, HandlerResult},
};

impl FromQuery for ListKeys {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        let (cursor, limit) = parameters.page()?;
        Ok(Self { project_id: key.project_id, key_id: None, cursor, limit })
    }
}

pub(crate) async fn handle(app: Arc<App>, _: Arc<ApiKey>, Query { query, warnings }: Query<ListKeys>) -> HandlerResult {
    let page = app.request(&query).await?;
    response::ok(&ListResponse::<http_api::ApiKey>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("API keys", "listKeys", "List API keys")
        .description(
            "The keys of the project, the oldest first. Operators create keys, with `leadctl key create`. \
                      `lastUsedAt` is written every ten seconds.",
        )
        .page_parameters()
        .returns::<ListResponse<http_api::ApiKey>>()
}
