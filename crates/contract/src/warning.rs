//! Warnings of responses: a part of the request was ignored, and the rest was done. docs/ERRORS.md explains each.

use std::fmt::Display;

/// A warning in which each `…` stands for a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Warning(&'static str);

macro_rules! warnings {
    ($($name:ident = $text:literal;)*) => {
        #[expect(missing_docs, reason = "the text says it")]
        impl Warning {
            $(pub const $name: Self = Self($text);)*
            /// All warnings.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

warnings! {
    EMPTY = "… is empty and was ignored";
    BESIDE_METADATA = "ignored because metadata is given: …";
    BESIDE_LEAD_ID = "ignored because leadId is given: …";
    BESIDE_LEAD_IDS = "ignored because leadIds is given: …";
    UNKNOWN = "ignored as unknown: …";
    DISPOSITION_WITHOUT_STATE = "disposition is ignored without targetState";
    STATE_TAKES_NO_DISPOSITION = "disposition was ignored: the state … takes none";
    DISPOSITION_NOT_STORED = "disposition was ignored: it is stored with a targetState only";
    WOULD_BE_QUEUED = "a call is in progress: the update would be queued until it ends, at the latest until …";
    STATE_NOT_REACHED = "toState was ignored: …";
    OMITTED = "left out, because the result would be larger than 240 KiB: …";
    NOT_WAITED = "Prefer: wait was ignored: too many requests wait already; read the update instead";
    BESIDE_NAME = "lead.… is ignored because lead.name is given";
    IN_BULK = "leads[…]: …";
    CERTIFICATE_EXPIRES = "callback …: its client certificate expires at …: renew it";
    MORE = "… more";
    DELIVERIES_MISSING = "deliveries are missing: …";
    HEALTH_MISSING = "health is missing: …";
}

impl Warning {
    /// The text with `…` in the place of each value.
    pub const fn template(self) -> &'static str {
        self.0
    }

    /// The warning with its values, in their order.
    pub fn with(self, values: &[&dyn Display]) -> String {
        let mut parts = self.0.split('…');
        let mut text = parts.next().unwrap_or_default().to_owned();
        debug_assert_eq!(parts.clone().count(), values.len(), "{}", self.0);
        for (value, part) in values.iter().zip(parts) {
            text.push_str(&value.to_string());
            text.push_str(part);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_replace_the_placeholders() {
        assert_eq!(
            Warning::IN_BULK.with(&[&3, &"name is empty and was ignored"]),
            "leads[3]: name is empty and was ignored"
        );
        assert_eq!(Warning::NOT_WAITED.with(&[]), Warning::NOT_WAITED.template());
    }
}
