//! 1 Accept: `If-Match`: change a lead or process only if it is still at the version that the client read (RFC 9110,
//! 13.1.1).
//!
//! The entity tag is the version. lead-state compares it when it applies the change.

use axum::http::{HeaderMap, header::IF_MATCH};

use crate::error::ApiError;

/// The version that a request expects. None without the header, and for `*`, which matches any version.
pub(crate) fn expected_version(headers: &HeaderMap) -> Result<Option<u32>, ApiError> {
    let mut values = headers.get_all(IF_MATCH).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" && values.next().is_none() {
        return Ok(None);
    }
    // A proxy that compresses responses marks their tags as weak; the version is the same.
    let quoted = text.strip_prefix("W/").unwrap_or(text);
    let version = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    match version.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit())).map(str::parse) {
        Some(Ok(version)) if values.next().is_none() => Ok(Some(version)),
        _ => Err(ApiError::field("If-Match", "must be one version in double quotes, as in ETag")),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::response::etag;

    fn of(values: &[&[u8]]) -> Result<Option<u32>, String> {
        let mut headers = HeaderMap::new();
        headers.extend(values.iter().map(|value| (IF_MATCH, HeaderValue::from_bytes(value).unwrap())));
        expected_version(&headers).map_err(|e| format!("{} {e}", e.status().as_u16()))
    }

    #[test]
    fn if_match_is_one_version_or_any() {
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&[b"*"]), Ok(None));
        assert_eq!(of(&[b" \"5\" "]), Ok(Some(5)));
        assert_eq!(of(&[b"W/\"5\""]), Ok(Some(5)));
        let odd: [&[&[u8]]; 9] = [
            &[b""],
            &[b"5"],
            &[b"\"\""],
            &[b"\"+5\""],
            &[b"\"5\", \"6\""],
            &[b"\"5\"", b"\"6\""],
            &[b"*", b"*"],
            &[b"\"4294967296\""],
            &[b"\"\xff\""],
        ];
        for odd in odd {
            assert!(of(odd).unwrap_err().starts_with("400 If-Match must be one version"), "{odd:?}");
        }
    }

    proptest! {
        #[test]
        fn entity_tags_round_trip(version: u32) {
            let headers = HeaderMap::from_iter([(IF_MATCH, etag(version.into()).unwrap())]);
            prop_assert_eq!(expected_version(&headers), Ok(Some(version)));
        }
    }
}
