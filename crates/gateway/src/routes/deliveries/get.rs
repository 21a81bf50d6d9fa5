//! 1 Accept: `GET /api/v1/deliveries/{deliveryId}`.

use std::sync::Arc;

use contract::key::ApiKey;
use http_api::{DataResponse, DeliveryDetails};

use crate::{
    app::App,
    request::path::DeliveryPath,
    response::{self, HandlerResult},
};

pub(crate) async fn handle(app: Arc<App>, _: Arc<ApiKey>, DeliveryPath(query): DeliveryPath) -> HandlerResult {
    let delivery = app.request(&query).await?;
    response::ok(&DataResponse::new(DeliveryDetails::from(delivery)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Deliveries", "getDelivery", "Read a delivery and its attempts")
        .returns::<DataResponse<DeliveryDetails>>()
        .errors(&[404])
}
