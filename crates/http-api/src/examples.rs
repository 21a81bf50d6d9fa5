//! Examples of requests and responses, for the OpenAPI document.

use serde::de::DeserializeOwned;

use crate::{DataResponse, ListResponse};

/// A type with a realistic example.
pub trait Example {
    /// A value as clients send or receive it.
    fn example() -> Self;
}

/// Reads an example.
///
/// # Panics
/// The text does not describe the type.
pub(crate) fn parse<T: DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("the example {text} of {}: {e}", std::any::type_name::<T>()))
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
