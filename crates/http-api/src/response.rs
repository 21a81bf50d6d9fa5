//! The shapes that responses share: one value, a page of a list, and an error.

use contract::rpc::Cursor;
use serde::{Deserialize, Serialize};

use crate::examples::{Example, example};

/// A response with one value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "{T}Response"))]
pub struct DataResponse<T> {
    /// Always true.
    pub success: bool,
    /// The requested value.
    pub data: T,
    /// Warnings about ignored parts of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl<T> DataResponse<T> {
    /// A successful response without warnings.
    pub fn new(data: T) -> Self {
        Self { success: true, data, warnings: Vec::new() }
    }
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "ListOf{T}"))]
pub struct ListResponse<T> {
    /// Always true.
    pub success: bool,
    /// The items of this page. A page may have fewer items than `limit`, or none, even if more pages follow.
    pub data: Vec<T>,
    /// The `cursor` of the next page; null at the end.
    pub next: Option<Cursor>,
    /// Warnings about ignored parts of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl<T> ListResponse<T> {
    /// A page of a service's list, its items converted.
    pub fn new<I: Into<T>>(page: contract::rpc::Page<I>, warnings: Vec<String>) -> Self {
        let data = page.items.into_iter().map(Into::into).collect();
        Self { success: true, data, next: page.next, warnings }
    }
}

/// The body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ErrorResponse {
    /// Always false.
    pub success: bool,
    /// What is wrong and what to do, in one sentence, for people.
    pub error: String,
    /// A stable code, for programs.
    pub code: String,
    /// The id of the request, as in `X-Request-Id` and in the gateway's log.
    pub request_id: String,
}

impl<T: Example> Example for DataResponse<T> {
    fn example() -> Self {
        Self::new(T::example())
    }
}

impl<T: Example> Example for ListResponse<T> {
    fn example() -> Self {
        Self { success: true, data: vec![T::example()], next: None, warnings: vec![] }
    }
}

example!(
    error_response: ErrorResponse,
    r#"{"success":false,"error":"Either leadId or referenceId is required","code":"address_missing","requestId":"6b042697a94eb229cf7757d0"}"#
);
