//! 1 Accept: `GET /api/v1/processes/{processId}/callbacks/{callbackId}`.

use std::sync::Arc;

use contract::{
    ObjectId,
    key::ApiKey,
    process::{Callback, Process},
    rpc::{CallbackStatus, ErrorCode, ListCallbacks, RpcError},
    warning::Warning,
};
use http_api::{CallbackHealth, CallbackResponse, CallbackWithHealth, ConfiguredCallback};

use crate::{
    app::App,
    error::ApiError,
    request::path::{CallbackPath, ProcessPath},
    response::{self, HandlerResult},
    routes::processes::change,
};

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
) -> HandlerResult {
    let (process, mut health) = read(&app, &key, process).await?;
    let version = process.revision;
    let callback = find(process, |callback| callback.callback_id == callback_id)?;
    let data = CallbackWithHealth { callback, health: health.take(callback_id) };
    response::versioned(version, &CallbackResponse { success: true, data, warnings: health.warnings() })
}

/// The health of a project's callbacks, or why webhook-notifier did not return it.
pub(crate) struct Health(Result<Vec<CallbackStatus>, ApiError>);

impl Health {
    /// The health of a callback; none if webhook-notifier did not answer, or has not read the callback yet.
    pub(crate) fn take(&mut self, callback_id: ObjectId) -> Option<CallbackHealth> {
        let statuses = self.0.as_mut().ok()?;
        let place = statuses.iter().position(|status| status.callback_id == callback_id)?;
        CallbackHealth::of(statuses.swap_remove(place))
    }

    pub(crate) fn warnings(self) -> Vec<String> {
        self.0.err().map(|error| Warning::HEALTH_MISSING.with(&[&error])).into_iter().collect()
    }
}

/// Reads a process and the health of its project's callbacks.
pub(crate) async fn read(app: &App, key: &ApiKey, process: ProcessPath) -> Result<(Process, Health), ApiError> {
    let list = ListCallbacks { project_id: key.project_id, details: true };
    let (process, statuses) = tokio::join!(change::read(app, key, process), app.request(&list));
    Ok((process?, Health(statuses)))
}

/// The callback of a process that matches.
pub(crate) fn find(process: Process, matches: impl Fn(&Callback) -> bool) -> Result<ConfiguredCallback, ApiError> {
    let callback = process.callbacks.into_iter().find(|callback| matches(callback));
    callback
        .map(ConfiguredCallback::from)
        .ok_or_else(|| ApiError::Query(RpcError::new(ErrorCode::CallbackNotFound, "Callback not found")))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "getCallback", "Read a callback")
        .description("Its configuration without secrets, and its health.")
        .returns::<CallbackResponse>()
        .response_header("ETag")
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use contract::rpc::{CallbackDetails, CallbackState};

    use super::*;

    const CALLBACK: ObjectId = ObjectId::from_bytes([1; 12]);

    fn health(answer: Result<CallbackDetails, ApiError>) -> Health {
        Health(answer.map(|details| {
            vec![CallbackStatus {
                callback_id: CALLBACK,
                name: "crm".into(),
                process_id: None,
                process: "_".into(),
                state: CallbackState::Healthy,
                failing_since: None,
                reason: None,
                details: Some(details),
            }]
        }))
    }

    #[test]
    fn callbacks_without_the_notifier_have_a_warning_instead_of_their_health() {
        let mut absent = health(Err(ApiError::Unavailable));
        assert_eq!(absent.take(CALLBACK), None);
        let warning = "health is missing: The request could not be answered because a service is unavailable; retry";
        assert_eq!(absent.warnings(), [warning]);
    }

    #[test]
    fn a_callback_that_the_notifier_has_not_read_yet_has_no_health_and_no_warning() {
        let details = CallbackDetails { disabled_since: None, pending: 3, oldest_pending_at: None, last_error: None };
        let mut known = health(Ok(details));
        assert_eq!(known.take(CALLBACK).map(|health| health.pending), Some(3));
        assert_eq!(known.take(ObjectId::from_bytes([2; 12])), None);
        assert!(known.warnings().is_empty());
    }
}
