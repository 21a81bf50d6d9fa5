//! W3C trace context, version 00 (<https://www.w3.org/TR/trace-context/#traceparent-header>).

/// Whether a text is a valid `traceparent`: `00-{32 hex}-{16 hex}-{2 hex}`, lower case, ids not zero.
pub fn is_traceparent(text: &str) -> bool {
    let mut parts = text.split('-');
    let mut part = |length: usize| {
        parts.next().filter(|part| part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    };
    let (version, trace, span, flags) = (part(2), part(32), part(16), part(2));
    let set = |id: Option<&str>| id.is_some_and(|id| id.bytes().any(|b| b != b'0'));
    version == Some("00") && set(trace) && set(span) && flags.is_some() && parts.next().is_none()
}

/// A new sampled trace from 24 random bytes.
pub fn new_traceparent(random: [u8; 24]) -> String {
    let [high, low, span] = [0, 8, 16].map(|from| {
        let mut part = [0; 8];
        part.copy_from_slice(&random[from..from + 8]);
        u64::from_be_bytes(part)
    });
    format!("00-{high:016x}{low:016x}-{span:016x}-01")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_well_formed_values_are_valid() {
        assert!(is_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        assert!(is_traceparent(&new_traceparent([7; 24])));
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        ] {
            assert!(!is_traceparent(text), "{text}");
        }
    }
    proptest! {
        #[test]
        fn valid_values_can_be_headers(
            text in prop_oneof![".*", "0[01]-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.)?"]
        ) {
            if is_traceparent(&text) {
                prop_assert_eq!(text.len(), 55);
                prop_assert!(text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()));
            }
        }
    }
}
