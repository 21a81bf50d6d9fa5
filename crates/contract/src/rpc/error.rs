//! The error codes of queries, each with its HTTP status. docs/ERRORS.md explains them.

use crate::text::bounded_error;

macro_rules! codes {
    ($($variant:ident = $status:literal $code:literal,)*) => {
        /// An error of the services that answer queries.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[expect(missing_docs, reason = "docs/ERRORS.md says when each is given")]
        pub enum ErrorCode {
            $($variant,)*
        }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The HTTP status that fits.
            pub const fn status(self) -> u16 {
                match self {
                    $(Self::$variant => $status,)*
                }
            }

            /// The stable snake_case code, for programs.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $code,)*
                }
            }
        }
    };
}

codes! {
    AddressMissing = 400 "address_missing",
    InvalidCursor = 400 "invalid_cursor",
    InvalidField = 400 "invalid_field",
    InvalidHash = 400 "invalid_hash",
    InvalidName = 400 "invalid_name",
    InvalidProcess = 400 "invalid_process",
    InvalidQuery = 400 "invalid_query",
    MetadataTooLarge = 400 "metadata_too_large",
    MissingField = 400 "missing_field",
    NoScopes = 400 "no_scopes",
    ProcessHasNoStates = 400 "process_has_no_states",
    ReferenceExists = 400 "reference_exists",
    SearchTooBroad = 400 "search_too_broad",
    TextTooLong = 400 "text_too_long",
    TooManyUpdates = 400 "too_many_updates",
    UrlRefused = 400 "url_refused",
    InvalidSignature = 401 "invalid_signature",
    ActivityNotFound = 404 "activity_not_found",
    CallbackNotFound = 404 "callback_not_found",
    DeliveryNotFound = 404 "delivery_not_found",
    KeyNotFound = 404 "key_not_found",
    LeadNotFound = 404 "lead_not_found",
    ProcessNotFound = 404 "process_not_found",
    ProjectNotFound = 404 "project_not_found",
    SourceNotFound = 404 "source_not_found",
    UpdateNotFound = 404 "update_not_found",
    CallbackDisabled = 409 "callback_disabled",
    CallbackExists = 409 "callback_exists",
    CallbackGone = 409 "callback_gone",
    DeliveryPending = 409 "delivery_pending",
    KeyExists = 409 "key_exists",
    MovedOn = 409 "moved_on",
    NotApplicable = 409 "not_applicable",
    ProcessExists = 409 "process_exists",
    ProjectExists = 409 "project_exists",
    SecretsLocked = 409 "secrets_locked",
    SourceExists = 409 "source_exists",
    StateInUse = 409 "state_in_use",
    TooManySecrets = 409 "too_many_secrets",
    OutcomeGone = 410 "outcome_gone",
    VersionMismatch = 412 "version_mismatch",
    CallbackBusy = 429 "callback_busy",
    TooManyQueries = 429 "too_many_queries",
    TooManyTests = 429 "too_many_tests",
    Internal = 500 "internal",
    NotProjected = 503 "not_projected",
    ServiceBusy = 503 "too_many_queries",
    Unavailable = 503 "unavailable",
}

/// Why a query was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// The HTTP status that fits.
    pub status: u16,
    /// Stable, snake_case, for programs. Not an [`ErrorCode`], as a newer service may answer with codes that are
    /// unknown here.
    pub code: String,
    /// One sentence, for people.
    pub message: String,
}

impl RpcError {
    /// An error with this code, and a message that is cut at [`MAX_ERROR_CHARS`](crate::text::MAX_ERROR_CHARS).
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::received(code.status(), code.as_str(), message)
    }

    /// An error received from another program.
    pub fn received(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: bounded_error(message) }
    }
}
