//! 1 Accept: the parameters of paths.

use std::str::FromStr;

use axum::extract::Request;
use contract::{
    ObjectId,
    key::ApiKey,
    rpc::{DeliveryId, GetDelivery, ProcessSelector},
    subject::NO_PROCESS,
};

use super::{FromRequest, path_parameter};
use crate::{app::App, error::ApiError};

/// Declares an input that is an id in the path.
macro_rules! id_paths {
    ($($Path:ident: $name:literal),* $(,)?) => {$(
        pub(crate) struct $Path(pub(crate) ObjectId);

        impl FromRequest for $Path {
            async fn from_request(request: &mut Request, _: &App, _: &ApiKey) -> Result<Self, ApiError> {
                path_parameter(request, $name, "must be 24 hex digits").await.map(Self)
            }
        }
    )*};
}

id_paths! { LeadPath: "leadId", UpdatePath: "updateId", ActivityPath: "activityId", KeyPath: "keyId" }

/// `{deliveryId}`, in the key's project.
pub(crate) struct DeliveryPath(pub(crate) GetDelivery);

impl FromRequest for DeliveryPath {
    async fn from_request(request: &mut Request, _: &App, key: &ApiKey) -> Result<Self, ApiError> {
        let fault = "must be {updateId}-{callbackId}, followed by -{kind} for events other than updates";
        let id: DeliveryId = path_parameter(request, "deliveryId", fault).await?;
        Ok(Self(GetDelivery { project_id: key.project_id, id }))
    }
}

/// `{processId}`: an id, or none for `_`, the project's fallback callbacks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProcessPath(pub(crate) Option<ObjectId>);

impl FromStr for ProcessPath {
    type Err = contract::id::InvalidObjectId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == NO_PROCESS { Ok(Self(None)) } else { text.parse().map(|id| Self(Some(id))) }
    }
}

impl ProcessPath {
    pub(crate) fn selector(self) -> ProcessSelector {
        self.0.map_or_else(|| ProcessSelector::Named(NO_PROCESS.into()), ProcessSelector::Id)
    }
}

impl FromRequest for ProcessPath {
    async fn from_request(request: &mut Request, _: &App, _: &ApiKey) -> Result<Self, ApiError> {
        path_parameter(request, "processId", "must be 24 hex digits, or _ for the fallback callbacks").await
    }
}

/// `{processId}` and `{callbackId}`.
pub(crate) struct CallbackPath {
    pub(crate) process: ProcessPath,
    pub(crate) callback_id: ObjectId,
}

impl FromRequest for CallbackPath {
    async fn from_request(request: &mut Request, app: &App, key: &ApiKey) -> Result<Self, ApiError> {
        let process = ProcessPath::from_request(request, app, key).await?;
        Ok(Self { process, callback_id: path_parameter(request, "callbackId", "must be 24 hex digits").await? })
    }
}

/// `{processId}` and `{sourceId}`.
pub(crate) struct SourcePath {
    pub(crate) process: ProcessPath,
    pub(crate) source_id: ObjectId,
}

impl FromRequest for SourcePath {
    async fn from_request(request: &mut Request, app: &App, key: &ApiKey) -> Result<Self, ApiError> {
        let process = ProcessPath::from_request(request, app, key).await?;
        Ok(Self { process, source_id: path_parameter(request, "sourceId", "must be 24 hex digits").await? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn arbitrary_process_paths_never_panic(text: String) {
            let _ = text.parse::<ProcessPath>();
        }
    }
}
