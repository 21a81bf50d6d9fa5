//! Why a page, or a panel of it, cannot be shown.

use axum::http::StatusCode;
use contract::{key::Scope, rpc::RpcError};
use service_kit::rpc::RequestError;

/// Why a page or a panel cannot be shown. The text is for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// The page or its object does not exist, or belongs to another project.
    #[error("{0}")]
    NotFound(String),
    /// The session's API key lacks a scope.
    #[error("The API key of this session lacks the scope {}. Sign in with a key that has it.", .0.as_str())]
    MissingScope(Scope),
    /// The request is not allowed: its form is from another site or session, or the visitor's link, login or API key
    /// does not allow it.
    #[error("{0}")]
    Refused(String),
    /// The query parameters or the form cannot be read.
    #[error("{0}")]
    Invalid(String),
    /// A rate limit of the gateway or of the console refused the request: nothing was done.
    #[error("{0}")]
    TooMany(String),
    /// A service does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// The gateway cannot be reached: it did not receive the request.
    #[error("{0}")]
    NotSent(String),
}

impl Fault {
    pub(crate) fn no_page() -> Self {
        Self::NotFound("There is no such page.".into())
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::MissingScope(_) | Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable(_) | Self::NotSent(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub(crate) fn title(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "Not found",
            Self::MissingScope(_) => "Not allowed",
            Self::Refused(_) => "Refused",
            Self::Invalid(_) => "Invalid request",
            Self::TooMany(_) => "Too many requests",
            Self::Unavailable(_) | Self::NotSent(_) => "Not available",
        }
    }
}

impl From<RequestError> for Fault {
    fn from(error: RequestError) -> Self {
        let service = |subject: &str| {
            if subject.starts_with("webhooks.") { "webhook-notifier" } else { "lead-state" }
        };
        let unavailable = match &error {
            RequestError::Answered(answer) => return answer.clone().into(),
            RequestError::NotConnected { .. } => "The console has lost its connection to NATS.".to_owned(),
            RequestError::NoResponder { subject } => format!("{} is not running.", service(subject)),
            RequestError::TimedOut { subject, .. } | RequestError::Failed { subject, .. } => {
                format!("{} does not answer.", service(subject))
            }
        };
        tracing::warn!("a query failed: {error}");
        Self::Unavailable(format!("{unavailable} Reload the page to try again."))
    }
}

impl From<RpcError> for Fault {
    fn from(error: RpcError) -> Self {
        match error.status {
            404 => Self::NotFound(error.message),
            400..500 if error.status != 429 => Self::Invalid(error.message),
            _ => Self::Unavailable(error.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_fault_names_the_service_that_does_not_answer() {
        let subject = || "webhooks.rpc.delivery.list".to_owned();
        let timed_out = RequestError::TimedOut { subject: subject(), timeout: Duration::from_secs(5) };
        let absent = RequestError::NoResponder { subject: "leads.rpc.lead.get".into() };

        let texts = [Fault::from(timed_out), Fault::from(absent)].map(|fault| fault.to_string());

        assert!(texts[0].starts_with("webhook-notifier does not answer."), "{texts:?}");
        assert!(texts[1].starts_with("lead-state is not running."), "{texts:?}");
    }

    #[test]
    fn rpc_errors_keep_their_status_class() {
        let fault = |status| Fault::from(RpcError::received(status, "code", "text")).status().as_u16();
        assert_eq!([404, 400, 409, 429, 500, 503].map(fault), [404, 400, 400, 503, 503, 503]);
    }
}
