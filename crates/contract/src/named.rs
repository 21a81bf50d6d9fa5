//! Enumerations whose values have names: on the wire, in subjects, in paths and in the database.

/// Declares an enumeration by the names of its values, and the error for a text that is none of them.
macro_rules! named {
    ($(#[$attribute:meta])* $Type:ident, $Invalid:ident, $($(#[$value_attribute:meta])* $Value:ident = $name:literal,)*) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub enum $Type {
            $($(#[$value_attribute])* #[serde(rename = $name)] $Value,)*
        }

        impl $Type {
            /// All values, in their order.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$Value),*];

            /// The name.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$Value => $name,)*
                }
            }
        }

        impl std::fmt::Display for $Type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $Type {
            type Err = $Invalid;

            fn from_str(text: &str) -> Result<Self, $Invalid> {
                Self::ALL.into_iter().find(|value| value.as_str() == text).ok_or($Invalid)
            }
        }

        #[doc = concat!("The text is not the name of a [`", stringify!($Type), "`].")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
        #[error("must be {}", $crate::named::one_of(&[$($name),*]))]
        pub struct $Invalid;
    };
}

pub(crate) use named;

/// Names for an error: "a, b or c", and a longer list after "one of".
pub(crate) fn one_of(names: &[&str]) -> String {
    match names {
        [others @ .., last] if (1..5).contains(&others.len()) => format!("{} or {last}", others.join(", ")),
        _ => format!("one of {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        event_kind::EventKind,
        rpc::{DeliveryStatus, InvalidDeliveryStatus},
    };

    #[test]
    fn names_round_trip() {
        for kind in EventKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        assert_eq!("lost".parse::<DeliveryStatus>(), Err(InvalidDeliveryStatus));
        assert_eq!(InvalidDeliveryStatus.to_string(), "must be pending, delivered or exhausted");
        let many = "update".parse::<EventKind>().unwrap_err().to_string();
        assert!(many.starts_with("must be one of update.succeeded, update.failed, lead.created, "), "{many}");
    }
}
