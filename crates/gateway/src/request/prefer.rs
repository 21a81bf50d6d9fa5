//! 1 Accept: `Prefer: wait=N`: how long a response waits for the outcome (RFC 7240).

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// Longest wait, in seconds. Longer ones hold connections that proxies cut anyway.
const MAX_SECONDS: u64 = 30;

/// May occur several times in a request.
const PREFER: HeaderName = HeaderName::from_static("prefer");
/// In a response: the preference was honored.
pub(crate) const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wait {
    seconds: u64,
}

impl Wait {
    /// The wait that a request prefers. Invalid preferences are ignored, and of several the first counts (RFC 7240, 2).
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(PREFER).iter().filter_map(|value| value.to_str().ok());
        let mut waits = values.flat_map(|value| value.split(',')).filter_map(|preference| {
            let preference = preference.split(';').next().unwrap_or_default();
            let (name, value) = preference.split_once('=')?;
            name.trim().eq_ignore_ascii_case("wait").then(|| value.trim().trim_matches('"').to_owned())
        });
        let seconds: u64 = waits.next()?.parse().ok()?;
        (seconds > 0).then_some(Self { seconds: seconds.min(MAX_SECONDS) })
    }

    pub(crate) fn duration(self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    pub(crate) fn applied(self) -> Option<HeaderValue> {
        HeaderValue::try_from(format!("wait={}", self.seconds)).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[&str]) -> Option<u64> {
        let value = |text: &&str| (PREFER, HeaderValue::from_str(text).unwrap());
        let mut headers = HeaderMap::new();
        headers.extend(values.iter().map(value));
        Wait::of(&headers).map(|wait| wait.seconds)
    }

    #[test]
    fn the_first_valid_wait_counts_up_to_the_limit() {
        for (seconds, texts) in [
            (None, &[][..]),
            (Some(5), &["wait=5"]),
            (Some(5), &["respond-async, WAIT = \"5\"; because=x"]),
            (Some(5), &["return=minimal", "wait=5", "wait=6"]),
            (Some(30), &["wait=31"]),
            (Some(30), &["wait=18446744073709551615"]),
            (None, &["wait=0"]),
            (None, &["wait"]),
            (None, &["wait=soon"]),
            (None, &["wait=-1"]),
            (None, &["wait=soon, wait=5"]),
            (None, &["await=5"]),
        ] {
            assert_eq!(of(texts), seconds, "{texts:?}");
        }
        assert_eq!(Wait { seconds: 5 }.applied().unwrap(), "wait=5");
    }

    proptest! {
        #[test]
        fn any_header_is_a_wait_within_bounds_or_none(text in "[ -~]{0,30}|(wait|Wait)[ =;,\"0-9]{0,8}") {
            prop_assert!(of(&[&text]).is_none_or(|seconds| (1..=MAX_SECONDS).contains(&seconds)));
        }
    }
}
