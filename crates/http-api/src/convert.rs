//! Converts the services' replies to responses of the HTTP API, and deserializes these responses for clients.

use contract::Timestamp;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::value::RawValue;

use crate::time::DateTime;

/// Implements `From` for a response and a service's reply: fields of the same name are converted, the fields after
/// `with` are computed.
macro_rules! response_from {
    ($reply:ident: $Reply:ty => $Response:ty {
        $($field:ident),* $(,)?
    } $(with { $($other:ident: $value:expr),* $(,)? })?) => {
        impl From<$Reply> for $Response {
            fn from($reply: $Reply) -> Self {
                Self { $($field: $crate::convert::Convert::convert($reply.$field),)* $($($other: $value,)*)? }
            }
        }
    };
}
pub(crate) use response_from;

/// Converts a field of a reply to the type of the response's field.
pub(crate) trait Convert<T> {
    fn convert(self) -> T;
}

impl<T> Convert<T> for T {
    fn convert(self) -> T {
        self
    }
}

impl Convert<DateTime> for Timestamp {
    fn convert(self) -> DateTime {
        DateTime(self)
    }
}

impl Convert<Option<DateTime>> for Option<Timestamp> {
    fn convert(self) -> Option<DateTime> {
        self.map(DateTime)
    }
}

/// Deserializes one JSON object as two types. `#[serde(flatten)]` cannot be used: it buffers values, and a
/// [`JsonObject`](contract::JsonObject) needs the raw JSON.
pub(crate) fn read_both<'de, D, A, B>(deserializer: D) -> Result<(A, B), D::Error>
where
    D: Deserializer<'de>,
    A: DeserializeOwned,
    B: DeserializeOwned,
{
    let object = Box::<RawValue>::deserialize(deserializer)?;
    let first = serde_json::from_str(object.get()).map_err(D::Error::custom)?;
    let second = serde_json::from_str(object.get()).map_err(D::Error::custom)?;
    Ok((first, second))
}
