//! 1 Accept: `POST /api/v1/deliveries/{deliveryId}/redeliver`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    rpc::{GetDelivery, Redeliver},
};
use http_api::{DataResponse, ListedDelivery};

use crate::{
    app::App,
    request::path::DeliveryPath,
    response::{self, HandlerResult},
};

pub(crate) async fn handle(
    app: Arc<App>,
    _: Arc<ApiKey>,
    DeliveryPath(GetDelivery { project_id, id }): DeliveryPath,
) -> HandlerResult {
    let delivery = app.request(&Redeliver { project_id, id }).await?;
    response::ok(&DataResponse::new(ListedDelivery::from(delivery)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Deliveries", "redeliver", "Repeat a delivery")
        .description(
            "Sends a delivered or exhausted delivery again, at once: the same body under the same `webhook-id`. No request \
             body is needed.",
        )
        .returns::<DataResponse<ListedDelivery>>()
        .errors(&[404, 409, 410])
}
