//! JSON from outside: checked once when it arrives, then carried as raw text, so values keep their digits and order.
//!
//! [`check`] rejects values that Postgres or a receiver could not store or would silently change: NUL characters, lone
//! surrogates, numbers beyond an f64, duplicate keys, nesting past [`MAX_DEPTH`], invalid UTF-8. A byte order mark is
//! ignored (RFC 8259, 8.1).

use std::{borrow::Cow, cell::RefCell, collections::HashSet, fmt, sync::Arc};

use indexmap::IndexMap;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::text::quoted;

/// Depth of nested objects and arrays. It is well below the limits of common JSON libraries (protobuf 100, serde_json
/// 128), so every receiver can read what we accept.
pub const MAX_DEPTH: usize = 64;

/// Why a text is rejected. The message is for the client that sent the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonFault {
    /// The bytes are not UTF-8.
    #[error("not valid UTF-8 (byte {0})")]
    Utf8(usize),
    /// The text is not JSON, or holds a rejected value.
    #[error("{0}")]
    Invalid(String),
}

/// The error of reading a message, without the text that it quotes: the text may be a secret.
pub fn redacted_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    // serde quotes the value: `invalid type: string "…", expected …`, "unknown variant `…`, expected …".
    for (kind, quote) in [("string", '"'), ("unknown variant", '`'), ("integer", '`'), ("floating point", '`')] {
        let (from, to) = (text.find(&format!("{kind} {quote}")), text.rfind(&format!("{quote}, expected ")));
        if let (Some(from), Some(to)) = (from, to)
            && from < to
        {
            return format!("{}{kind}{}", &text[..from], &text[to + 1..]);
        }
    }
    text
}

/// The UTF-8 encoding of U+FEFF, which some programs write before a text.
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Checks a whole JSON text and returns it as `str`, without a byte order mark.
///
/// # Errors
/// The text is not JSON, or holds a value that is rejected.
pub fn check(bytes: &[u8]) -> Result<&str, JsonFault> {
    check_to_depth(bytes, MAX_DEPTH)
}

/// Checks a command like [`check`]. A command may be one level deeper than the client's body, whose fields may have
/// become metadata.
///
/// # Errors
/// Those of [`check`].
pub fn check_command(bytes: &[u8]) -> Result<&str, JsonFault> {
    check_to_depth(bytes, MAX_DEPTH + 1)
}

fn check_to_depth(mut bytes: &[u8], max_depth: usize) -> Result<&str, JsonFault> {
    // A text that passed through two such programs has two byte order marks.
    while let Some(rest) = bytes.strip_prefix(BYTE_ORDER_MARK) {
        bytes = rest;
    }
    let text = std::str::from_utf8(bytes).map_err(|e| JsonFault::Utf8(e.valid_up_to()))?;
    let place = RefCell::new(Vec::new());
    let mut deserializer = serde_json::Deserializer::from_str(text);
    Strict { place: &place, max_depth }
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end())
        .map_err(|e| JsonFault::Invalid(fault(&e.to_string(), &place.borrow())))?;
    Ok(text)
}

/// serde_json's error of a text. Half a surrogate pair is reported with the path of its string.
fn fault(error: &str, place: &[Option<Cow<'_, str>>]) -> String {
    let surrogate = ["unexpected end of hex escape", "lone leading surrogate in hex escape"];
    let Some(rest) = surrogate.iter().find_map(|text| error.strip_prefix(text)) else { return error.to_owned() };
    let names: Vec<String> = place.iter().flatten().map(|name| name.chars().take(64).collect()).collect();
    let name = if names.is_empty() { "the text".to_owned() } else { names.join(".") };
    format!("{name} contains half a surrogate pair{rest}")
}

/// Visits a value without keeping it.
#[derive(Clone, Copy)]
struct Strict<'a, 'de> {
    /// The objects and arrays around the value: in an object, the key of the member that is read.
    place: &'a RefCell<Vec<Option<Cow<'de, str>>>>,
    max_depth: usize,
}

impl<'de> Strict<'_, 'de> {
    fn enter<E: de::Error>(&self) -> Result<(), E> {
        let mut place = self.place.borrow_mut();
        if place.len() == self.max_depth {
            return Err(E::custom(format_args!("nested deeper than {} levels", self.max_depth)));
        }
        place.push(None);
        Ok(())
    }

    /// Records the key of the member that is read; none between members.
    fn move_to(&self, key: Option<Cow<'de, str>>) {
        if let Some(last) = self.place.borrow_mut().last_mut() {
            *last = key;
        }
    }

    fn leave(&self) {
        self.place.borrow_mut().pop();
    }
}

fn reject_nul<E: de::Error>(text: &str) -> Result<(), E> {
    if text.contains('\0') {
        return Err(E::custom("a string holds the NUL character \\u0000, which cannot be stored"));
    }
    Ok(())
}

impl<'de> DeserializeSeed<'de> for Strict<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        reject_nul(text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.enter()?;
        while items.next_element_seed(self)?.is_some() {}
        self.leave();
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.enter()?;
        let mut seen = HashSet::new();
        while let Some(Key(key)) = entries.next_key()? {
            reject_nul(&key)?;
            self.move_to(Some(key.clone()));
            entries.next_value_seed(self)?;
            self.move_to(None);
            if let Some(key) = seen.replace(key) {
                return Err(de::Error::custom(format_args!("the key {} occurs twice in one object", quoted(&key))));
            }
        }
        self.leave();
        Ok(())
    }
}

/// A key, borrowed from the text where it has no escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// A JSON object as raw text, e.g. lead metadata. Its values are not parsed, so a 30-digit number keeps its digits and
/// keys keep their order. Clones share the text.
#[derive(Clone)]
pub struct JsonObject(Arc<RawValue>);

/// The text is JSON, but not an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a JSON object")]
pub struct NotAnObject;

/// The members of an object in their order, with raw values, borrowed from its text where possible.
pub type Members<'a> = IndexMap<Cow<'a, str>, Cow<'a, RawValue>>;

/// The members of a text that must be an object.
///
/// # Errors
/// The text is not a JSON object.
pub fn members(text: &str) -> Result<Members<'_>, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let members = deserializer.deserialize_map(Collect)?;
    deserializer.end()?;
    Ok(members)
}

struct Collect;

impl<'de> Visitor<'de> for Collect {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut members = Members::with_capacity(8);
        while let Some((Key(key), value)) = entries.next_entry::<Key<'_>, &RawValue>()? {
            members.insert(key, Cow::Borrowed(value));
        }
        Ok(members)
    }
}

impl JsonObject {
    /// `{}`.
    pub fn empty() -> Self {
        Self::from_members(&Members::new())
    }

    /// Takes a raw value that is an object.
    ///
    /// # Errors
    /// It is not an object.
    pub fn from_raw(raw: Box<RawValue>) -> Result<Self, NotAnObject> {
        if raw.get().starts_with('{') { Ok(Self(raw.into())) } else { Err(NotAnObject) }
    }

    /// Takes a text that must be a JSON object. It does not [`check`] the text.
    ///
    /// # Errors
    /// It is not a JSON object.
    pub fn from_text(text: String) -> Result<Self, NotAnObject> {
        Self::from_raw(RawValue::from_string(text).map_err(|_| NotAnObject)?)
    }

    /// Writes members as one object, without whitespace between them.
    pub fn from_members(members: &Members<'_>) -> Self {
        #[allow(clippy::expect_used, reason = "string keys and raw values always serialize")]
        Self(serde_json::value::to_raw_value(members).expect("members serialize").into())
    }

    /// A copy as a raw value.
    pub fn into_raw(self) -> Box<RawValue> {
        (*self.0).to_owned()
    }

    /// The object's text.
    pub fn get(&self) -> &str {
        self.0.get()
    }

    /// The members in order. A key that occurs twice has its last value.
    pub fn members(&self) -> Members<'_> {
        // The constructors accept objects only.
        members(self.get()).unwrap_or_default()
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.get()[1..].trim_start().starts_with('}')
    }
}

impl fmt::Debug for JsonObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.get())
    }
}

impl PartialEq for JsonObject {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for JsonObject {}

impl Serialize for JsonObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for JsonObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_raw(Box::<RawValue>::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for JsonObject {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "JsonObject".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "object"})
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fault(text: &str) -> String {
        check(text.as_bytes()).expect_err(text).to_string()
    }

    #[test]
    fn a_redacted_error_does_not_quote_the_value() {
        let redacted = |text| redacted_error(&serde_json::from_str::<Vec<crate::key::Scope>>(text).unwrap_err());
        for text in [r#""whsec_AAAA""#, r#""whsec_\", expected ""#] {
            let error = redacted(text);
            assert!(error.starts_with("invalid type: string, expected a sequence at line 1"), "{error}");
        }
        assert!(redacted(r#"["whsec_AAAA"]"#).starts_with(
            "unknown variant, expected one of `leads:read`, `leads:write`, `leads:erase`, `calls:write`, `config:read`, `config:write` at"
        ));
        assert!(redacted("{}").starts_with("invalid type: map, expected a sequence at"));
        assert!(redacted("4711").starts_with("invalid type: integer, expected a sequence at"));
        assert!(redacted("47.11").starts_with("invalid type: floating point, expected a sequence at"));
    }

    #[test]
    fn unstorable_values_are_rejected_with_the_reason() {
        assert!(fault(r#"{"a":"x\u0000y"}"#).contains("NUL"));
        assert!(fault(r#"{"a\u0000":1}"#).contains("NUL"));
        assert!(fault(r#"{"a":[{"b":1,"b":2}]}"#).contains(r#""b" occurs twice"#));
        assert!(fault(r#"{"b":1,"\u0062":2}"#).contains(r#""b" occurs twice"#));
        assert!(fault(r#"{"a":1e999}"#).contains("out of range"));
        for (text, place) in [
            (r#"{"name": "x\ud83d"}"#, "name"),
            (r#"{"name": "\udc00", "a": 1}"#, "name"),
            (r#"{"a": 1, "metadata": {"b": {}, "tags": ["x", "\ud83d\u0041"]}}"#, "metadata.tags"),
            (r#"{"a": 1, "\ud83d": 2}"#, "the text"),
            (r#"["\ud83d!"]"#, "the text"),
        ] {
            let fault = fault(text);
            assert!(fault.starts_with(&format!("{place} contains half a surrogate pair at line 1")), "{fault}");
        }
        assert!(fault(&"[".repeat(65)).contains("nested deeper"));
        assert!(fault("{} {}").contains("trailing"));
        assert!(fault("").contains("EOF"));
        assert_eq!(check(b"{\"a\":\"\xff\"}"), Err(JsonFault::Utf8(6)));
    }

    #[test]
    fn storable_values_are_accepted() {
        let nested = format!("{}{}", "[".repeat(64), "]".repeat(64));
        for text in [nested.as_str(), r#"{"n":123456789012345678901234567890,"s":"\ud83d\ude00é","f":1.50}"#, "null"] {
            assert_eq!(check(text.as_bytes()), Ok(text));
            assert_eq!(check(&[BYTE_ORDER_MARK, text.as_bytes()].concat()), Ok(text));
            assert_eq!(check(&[BYTE_ORDER_MARK, BYTE_ORDER_MARK, text.as_bytes()].concat()), Ok(text));
        }
        assert!(fault("{}\u{feff}").contains("trailing"));
    }

    #[test]
    fn an_object_keeps_its_text() {
        let object: JsonObject = serde_json::from_str(r#"{ "n": 100000000000000000000000000001.50, "a":1 }"#).unwrap();
        assert_eq!(object.get(), r#"{ "n": 100000000000000000000000000001.50, "a":1 }"#);
        assert_eq!(
            JsonObject::from_members(&object.members()).get(),
            r#"{"n":100000000000000000000000000001.50,"a":1}"#
        );
        assert!(!object.is_empty());
        assert!(JsonObject::from_text("{ }".into()).unwrap().is_empty());
        assert!(serde_json::from_str::<JsonObject>("[1]").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = check(&bytes);
        }

        #[test]
        fn accepted_texts_are_valid_json(text in r#"[\[\]{}",:0-9a-z\\ ]{0,40}"#) {
            if check(text.as_bytes()).is_ok() {
                prop_assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
            }
        }
    }
}
