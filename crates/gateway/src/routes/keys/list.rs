//! 1 Accept: `GET /api/v1/keys`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{ListKeys, Page},
};
use http_api::ListResponse;

use crate::{
    app::App,
    error::ApiError,
    request::{FromQuery, Query, fields::Fields},
    response::{self, HandlerResult},
};

impl FromQuery for ListKeys {
    fn from_query(_: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError> {
        Ok(Self { project_id: key.project_id })
    }
}

/// All keys are on one page.
pub(crate) async fn handle(app: Arc<App>, _: Arc<ApiKey>, Query { query, warnings }: Query<ListKeys>) -> HandlerResult {
    let page = Page { items: app.request(&query).await?, next: None };
    response::ok(&ListResponse::<http_api::ApiKey>::new(page, warnings))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("API keys", "listKeys", "List API keys")
        .description("The keys of the project, the oldest first, all on one page. Operators create keys, with `leadctl key create`. \
                      `lastUsedAt` is written every ten seconds.")
        .returns::<ListResponse<http_api::ApiKey>>()
}
