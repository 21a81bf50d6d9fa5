//! The requests and responses of the HTTP API. The gateway writes them, clients in Rust read them, and the OpenAPI
//! document is generated from them, so each shape is declared once.
//!
//! Responses are made from the replies of lead-state and webhook-notifier ([`contract::rpc`]) with `From`: the HTTP API
//! writes times as RFC 3339 texts, the services as milliseconds.

mod deliveries;
#[cfg(feature = "schema")]
mod examples;
mod leads;
mod processes;
mod response;
mod time;
mod updates;

#[cfg(feature = "schema")]
pub use crate::examples::Example;
pub use crate::{
    deliveries::{DeliveryDetails, ListedDelivery, RecoverRequest, RecoverResult},
    leads::{
        Activity, BulkInitiateRequest, BulkInitiateResponse, Details, HistoryEntry, InitiateRequest, InitiateResponse,
        Lead, LeadDetails, LeadWith, ListedLead, NewLead, RefusedLead, Versioned,
    },
    processes::{
        ChangeResponse, ConfiguredCallback, ConfiguredProcess, EnableResult, RotateSecretRequest, SecretExpiry,
        TestResult,
    },
    response::{DataResponse, ErrorResponse, ListResponse},
    time::DateTime,
    updates::{
        ActionType, Attempt, BulkUpdateResult, Delivery, DryRunOutcome, DryRunResponse, Event, Outcome,
        TimelineResponse, UpdateAccepted, UpdateRequest, UpdateTimeline,
    },
};

/// Makes a response of a service's reply: fields of the same name move over, those after `with` are computed.
macro_rules! response_from {
    ($reply:ident: $Reply:ty => $Response:ty {
        $($field:ident),* $(,)?
    } $(with { $($other:ident: $value:expr),* $(,)? })?) => {
        impl From<$Reply> for $Response {
            fn from($reply: $Reply) -> Self {
                Self { $($field: $crate::time::Convert::convert($reply.$field),)* $($($other: $value,)*)? }
            }
        }
    };
}
use response_from;

/// Gives a type its [`Example`], from JSON as it is on the wire; a test in a module of this name holds them together.
macro_rules! example {
    ($name:ident: $Type:ty, $text:expr) => {
        #[cfg(feature = "schema")]
        impl $crate::Example for $Type {
            fn example() -> Self {
                $crate::examples::parse($text)
            }
        }

        #[cfg(test)]
        mod $name {
            use super::*;

            #[test]
            fn the_example_is_written_as_it_is_read() {
                assert_eq!(serde_json::to_string(&<$Type as $crate::Example>::example()).unwrap(), $text);
            }
        }
    };
}
use example;

/// Reads an object whose members belong to two types. `#[serde(flatten)]` cannot: it buffers values, and a buffered
/// [`JsonObject`](contract::JsonObject) is no raw JSON any more.
fn read_both<'de, D, A, B>(deserializer: D) -> Result<(A, B), D::Error>
where
    D: serde::Deserializer<'de>,
    A: serde::de::DeserializeOwned,
    B: serde::de::DeserializeOwned,
{
    use serde::{Deserialize, de::Error};
    let object = Box::<serde_json::value::RawValue>::deserialize(deserializer)?;
    let first = serde_json::from_str(object.get()).map_err(D::Error::custom)?;
    let second = serde_json::from_str(object.get()).map_err(D::Error::custom)?;
    Ok((first, second))
}
