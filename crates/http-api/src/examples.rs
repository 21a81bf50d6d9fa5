//! Examples of requests and responses, for the OpenAPI document.

use serde::de::DeserializeOwned;

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

/// `data` is null in the response to a removal.
impl<T> Example for Option<T> {
    fn example() -> Self {
        None
    }
}

/// Implements [`Example`] for a type by parsing JSON. A test in the module `$name` asserts that the example serializes
/// to the same JSON.
macro_rules! example {
    ($name:ident: $Type:ty, $text:expr) => {
        impl $crate::examples::Example for $Type {
            fn example() -> Self {
                $crate::examples::parse($text)
            }
        }

        #[cfg(test)]
        mod $name {
            use super::*;

            #[test]
            fn the_example_round_trips() {
                assert_eq!(serde_json::to_string(&<$Type as $crate::examples::Example>::example()).unwrap(), $text);
            }
        }
    };
}
pub(crate) use example;
