//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks/{callbackId}/test`.

use std::sync::Arc;

use contract::{key::ApiKey, rpc::TestCallback};
use http_api::{DataResponse, TestResult};

use crate::{
    app::App,
    request::path::{CallbackPath, ProcessPath},
    response::{self, HandlerResult},
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process: ProcessPath(process_id), callback_id }: CallbackPath,
) -> HandlerResult {
    let query = TestCallback { project_id: key.project_id, process_id, callback_id };
    let tested = app.request(&query).await?;
    response::ok(&DataResponse::new(TestResult::from(tested)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "testCallback", "Test a callback")
        .description(
            "Sends the callback a signed ping and returns the result. The ping is not a delivery, is not retried, and \
             does not count as a success or failure of the callback.",
        )
        .returns::<DataResponse<TestResult>>()
        .errors(&[404, 409])
}
