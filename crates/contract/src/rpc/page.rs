//! Pages of lists. A cursor is a position in the order of the list, not a count: items added or changed in the meantime
//! do not shift the pages.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::{ErrorCode, RpcError};

/// The default number of items per page.
pub const DEFAULT_LIMIT: u32 = 50;
/// The most items per page. More saves requests, and takes memory in every service on the way.
pub const MAX_LIMIT: u32 = 200;
/// The most bytes of a page's items, unless the first alone is larger: the page must fit into a NATS message (1 MiB).
const MAX_BYTES: usize = 512 << 10;

/// The position at which the next page of a list begins. Only the list that made it accepts it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Cursor(String);

impl Cursor {
    /// The cursor of a place in this list.
    pub fn new(list: &str, place: &str) -> Self {
        Self(BASE64_URL_SAFE_NO_PAD.encode(format!("{list}:{place}")))
    }

    /// The place in this list.
    ///
    /// # Errors
    /// It is not a cursor, or it is from another list.
    pub fn place(&self, list: &str) -> Result<String, RpcError> {
        let text = BASE64_URL_SAFE_NO_PAD.decode(&self.0).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let place = text.as_deref().and_then(|text| text.strip_prefix(list)?.strip_prefix(':'));
        place.map(str::to_owned).ok_or_else(Self::invalid)
    }

    /// The error for an invalid cursor.
    pub fn invalid() -> RpcError {
        let message = "cursor is not from this list: omit it for the first page, then send the next of the page before";
        RpcError::new(ErrorCode::InvalidCursor, message)
    }

    /// A cursor from a client; it may be invalid.
    pub fn from_text(text: String) -> Self {
        Self(text)
    }

    /// The text for clients.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(rename = "PageOf{T}"))]
#[serde(rename_all = "camelCase")]
pub struct Page<T> {
    /// The items. There may be fewer than `limit`, even none, although more follow.
    pub items: Vec<T>,
    /// The cursor of the next page; null at the end.
    pub next: Option<Cursor>,
}

impl<T: Serialize> Page<T> {
    /// The first of `items`: at most `limit`, and as many as fit into a message. If some are left over, the next page
    /// begins at the `place` of the last item, otherwise at `rest`.
    pub fn cut(mut items: Vec<T>, limit: u32, place: impl Fn(&T) -> Cursor, rest: Option<Cursor>) -> Self {
        let (mut fitting, mut bytes) = (0, 0);
        for item in items.iter().take(limit.max(1) as usize) {
            bytes += serde_json::to_vec(item).map_or(0, |text| text.len());
            if fitting > 0 && bytes > MAX_BYTES {
                break;
            }
            fitting += 1;
        }
        let cut = fitting < items.len();
        items.truncate(fitting);
        let next = if cut { items.last().map(place) } else { rest };
        Self { items, next }
    }
}

/// Limits the number of items that a client asked for.
pub fn clamp(limit: u32) -> u32 {
    limit.clamp(1, MAX_LIMIT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(text: &str) -> Cursor {
        Cursor::new("texts", text)
    }

    #[test]
    fn a_page_is_bounded_in_items_and_bytes_but_holds_the_first_item() {
        let texts = |bytes: &[usize]| bytes.iter().map(|bytes| "x".repeat(*bytes)).collect::<Vec<_>>();
        let cut = |bytes: &[usize], limit| {
            let page = Page::cut(texts(bytes), limit, |text| place(text), Some(Cursor::new("texts", "rest")));
            (page.items.len(), page.next.map(|next| next.place("texts").unwrap().len()))
        };
        assert_eq!(cut(&[], 3), (0, Some(4)));
        assert_eq!(cut(&[1, 2, 3], 3), (3, Some(4)));
        assert_eq!(cut(&[1, 2, 3], 2), (2, Some(2)));
        assert_eq!(cut(&[MAX_BYTES * 2, 1], 2), (1, Some(MAX_BYTES * 2)));
        assert_eq!(cut(&[1, MAX_BYTES], 2), (1, Some(1)));
        assert_eq!(Page::cut(texts(&[1]), 1, |text| place(text), None).next, None);
    }

    #[test]
    fn a_cursor_is_valid_in_its_list_only() {
        let cursor = Cursor::new("leads", "7");
        assert_eq!(cursor.place("leads").unwrap(), "7");
        assert_eq!(cursor.place("lead").unwrap_err().code, "invalid_cursor");
        assert_eq!(cursor.place("updates").unwrap_err().code, "invalid_cursor");
    }

    proptest! {
        #[test]
        fn places_round_trip_in_url_safe_letters(place in ".*") {
            let cursor = Cursor::new("list", &place);
            prop_assert_eq!(cursor.place("list").unwrap(), place);
            prop_assert!(cursor.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
        }

        #[test]
        fn arbitrary_cursors_never_panic(text in ".*") {
            let _ = Cursor::from_text(text).place("list");
        }
    }
}
