//! Filters of callbacks: the conditions that an event must satisfy.
//!
//! `leadctl audit` evaluates the same conditions in SQL (`#>>`), so values are compared as texts: numbers and objects
//! as they are written.

use std::{borrow::Cow, cell::RefCell, collections::HashMap, rc::Rc};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{MAX_FILTER_CONDITIONS, MAX_FILTER_PATH, MAX_FILTER_VALUES, MAX_NAME_CHARS};
use crate::{
    JsonObject,
    command::MAX_TEXT_CHARS,
    event::CompletionEvent,
    json::{self, Members},
    text::quoted,
};

/// The prefix of a path into the lead's metadata.
const METADATA: &str = "metadata.";
/// The most bytes of a JSON string that a condition may equal: a character has at most twelve, as two escapes.
const MAX_COMPARED_BYTES: usize = 12 * MAX_TEXT_CHARS + 2;

/// A condition that an event must satisfy: exactly one of `equals`, `in` and `exists`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
#[serde(rename_all = "camelCase")]
pub struct FilterCondition {
    /// `fromState`, `toState`, `disposition`, `processId`, or `metadata.` and a path into the lead's metadata after the
    /// update, its names and indices separated by dots.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_NAME_CHARS)))]
    pub field: String,
    /// The value must be this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<String>,
    /// The value must be one of these texts.
    #[serde(default, rename = "in", skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_FILTER_VALUES)))]
    pub one_of: Option<Vec<String>>,
    /// Whether there must be a value. Null counts as no value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
}

impl FilterCondition {
    /// Whether an event satisfies the condition.
    pub fn holds(&self, event: &EventValues<'_>) -> bool {
        let value = event.get(&self.field);
        let is = |expected: &String| value.as_deref() == Some(expected.as_str());
        match self {
            Self { equals: Some(expected), .. } => is(expected),
            Self { one_of: Some(expected), .. } => expected.iter().any(is),
            Self { exists, .. } => *exists == Some(value.is_some()),
        }
    }

    /// The fault of the condition, if it has one.
    fn fault(&self) -> Option<String> {
        let field = quoted(&self.field);
        let given = [self.equals.is_some(), self.one_of.is_some(), self.exists.is_some()];
        if given.into_iter().filter(|given| *given).count() != 1 {
            return Some(format!("filter: {field} needs one of equals, in and exists"));
        }
        if self.field.chars().nth(MAX_NAME_CHARS).is_some() {
            return Some(format!("filter: {field} has more than {MAX_NAME_CHARS} characters"));
        }
        if !["fromState", "toState", "disposition", "processId"].contains(&self.field.as_str()) {
            let Some(path) = self.field.strip_prefix(METADATA) else {
                return Some(format!(
                    "filter: {field} must be fromState, toState, disposition, processId, or metadata. and a path"
                ));
            };
            if path.split('.').count() > MAX_FILTER_PATH {
                return Some(format!("filter: {field} is deeper than {MAX_FILTER_PATH} levels"));
            }
            if !path.split('.').all(is_segment) {
                return Some(format!("filter: {field} contains an empty name, or a number that is not an index"));
            }
        }
        let values = self.equals.iter().chain(self.one_of.iter().flatten());
        if self.one_of.as_ref().is_some_and(|values| !(1..=MAX_FILTER_VALUES).contains(&values.len())) {
            return Some(format!("filter: in of {field} must have 1 to {MAX_FILTER_VALUES} values"));
        }
        if values.into_iter().any(|value| value.chars().nth(MAX_TEXT_CHARS).is_some() || value.contains('\0')) {
            return Some(format!("filter: a value for {field} has more than {MAX_TEXT_CHARS} characters, or a NUL"));
        }
        None
    }
}

/// The values of an event that conditions compare. Each object and list of the metadata is parsed once for all
/// conditions of all callbacks.
pub struct EventValues<'a> {
    event: &'a CompletionEvent,
    /// Parsed values by the address of their text.
    parsed: RefCell<HashMap<usize, Rc<Parsed<'a>>>>,
}

/// A JSON value, parsed to a depth of one.
enum Parsed<'a> {
    Object(Members<'a>),
    List(Vec<&'a RawValue>),
    /// Neither an object nor a list.
    Scalar,
}

impl<'a> EventValues<'a> {
    /// The values of this event.
    pub fn of(event: &'a CompletionEvent) -> Self {
        Self { event, parsed: RefCell::default() }
    }

    pub(super) fn event(&self) -> &'a CompletionEvent {
        self.event
    }

    fn get(&self, field: &str) -> Option<Cow<'a, str>> {
        let event = self.event;
        match field {
            "fromState" => event.from_state.as_deref().map(Cow::Borrowed),
            "toState" => event.to_state.as_deref().map(Cow::Borrowed),
            "disposition" => event.disposition.as_deref().map(Cow::Borrowed),
            "processId" => event.process_id.map(|id| id.to_string().into()),
            path => self.at(event.data.as_ref()?, path.strip_prefix(METADATA)?),
        }
    }

    /// The value at a path, as a text.
    fn at(&self, metadata: &'a JsonObject, path: &str) -> Option<Cow<'a, str>> {
        let value = path.split('.').try_fold(metadata.get(), |value, segment| self.inner(value, segment))?;
        match value.as_bytes().first()? {
            b'n' => None,
            // A longer text cannot equal a condition's text, so it is not decoded.
            b'"' if value.len() <= MAX_COMPARED_BYTES => serde_json::from_str::<String>(value).ok().map(Cow::Owned),
            _ => Some(Cow::Borrowed(value)),
        }
    }

    /// The member or item of a value.
    fn inner(&self, value: &'a str, segment: &str) -> Option<&'a str> {
        let parsed = self.parsed.borrow_mut().entry(value.as_ptr().addr()).or_insert_with(|| parse(value)).clone();
        match &*parsed {
            Parsed::Object(members) => match members.get(segment)? {
                Cow::Borrowed(member) => Some(member.get()),
                Cow::Owned(_) => None,
            },
            Parsed::List(items) => items.get(segment.parse::<usize>().ok()?).map(|item| item.get()),
            Parsed::Scalar => None,
        }
    }
}

fn parse(value: &str) -> Rc<Parsed<'_>> {
    let parsed = match value.as_bytes().first() {
        Some(b'{') => json::members(value).ok().map(Parsed::Object),
        Some(b'[') => serde_json::from_str(value).ok().map(Parsed::List),
        _ => None,
    };
    Rc::new(parsed.unwrap_or(Parsed::Scalar))
}

/// The faults of a filter, one sentence each.
pub(super) fn faults(filter: &[FilterCondition]) -> Vec<String> {
    if filter.len() > MAX_FILTER_CONDITIONS {
        let count = filter.len();
        return vec![format!("filter: {count} conditions are given, and at most {MAX_FILTER_CONDITIONS} are allowed")];
    }
    filter.iter().filter_map(FilterCondition::fault).collect()
}

/// Whether a text can be a segment of a path: a name or an index. Other forms of a number, such as `-1` and `01`, are
/// refused, because Postgres would read them as indexes.
fn is_segment(segment: &str) -> bool {
    let is_index = segment == "0" || segment.bytes().all(|b| b.is_ascii_digit()) && !segment.starts_with('0');
    let number = segment.trim_start().trim_start_matches(['+', '-']);
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    !segment.is_empty() && !segment.contains('\0') && (is_index || !is_number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tests::event;

    fn condition(text: &str) -> FilterCondition {
        serde_json::from_str(text).unwrap()
    }

    fn metadata(text: &str) -> CompletionEvent {
        CompletionEvent { data: Some(JsonObject::from_text(text.into()).unwrap()), ..event() }
    }

    #[test]
    fn a_condition_compares_a_value_as_text() {
        let data = r#"{"source":"web","n":1.50,"flag":true,"none":null,"empty":"","deep":{"list":[{"a":"é"},7]},"ob":{"x":1}}"#;
        let event = CompletionEvent { disposition: Some("hot".into()), ..metadata(data) };
        let values = EventValues::of(&event);
        for (field, value) in [
            ("fromState", "new"),
            ("toState", "interested"),
            ("disposition", "hot"),
            ("processId", "030303030303030303030303"),
            ("metadata.source", "web"),
            ("metadata.n", "1.50"),
            ("metadata.flag", "true"),
            ("metadata.empty", ""),
            ("metadata.deep.list.0.a", "é"),
            ("metadata.deep.list.1", "7"),
            ("metadata.ob", r#"{"x":1}"#),
        ] {
            let holds = |rest: String| condition(&format!(r#"{{"field":"{field}",{rest}}}"#)).holds(&values);
            let text = serde_json::to_string(value).unwrap();
            assert!(holds(format!(r#""equals":{text}"#)), "{field}");
            assert!(holds(format!(r#""in":["other",{text}]"#)), "{field}");
            assert!(holds(r#""exists":true"#.into()) && !holds(r#""exists":false"#.into()), "{field}");
            assert!(!holds(r#""equals":"other""#.into()) && !holds(r#""in":["other"]"#.into()), "{field}");
        }
        for field in
            ["metadata.none", "metadata.gone", "metadata.source.x", "metadata.deep.list.2", "metadata.deep.list.a"]
        {
            let holds = |rest: &str| condition(&format!(r#"{{"field":"{field}",{rest}}}"#)).holds(&values);
            assert!(holds(r#""exists":false"#) && !holds(r#""exists":true"#), "{field}");
            assert!(!holds(r#""equals":"null""#), "{field}");
        }
        let failed = CompletionEvent { data: None, to_state: None, ..event.clone() };
        let failed = EventValues::of(&failed);
        assert!(condition(r#"{"field":"metadata.source","exists":false}"#).holds(&failed));
        assert!(!condition(r#"{"field":"toState","in":["interested"]}"#).holds(&failed));
    }

    #[test]
    fn a_text_is_compared_up_to_the_longest_one_of_a_condition() {
        let longest = "\u{1f600}".repeat(MAX_TEXT_CHARS);
        let escaped = "\\ud83d\\ude00".repeat(MAX_TEXT_CHARS);
        let event = metadata(&format!(r#"{{"a":"{escaped}","b":"{escaped}x","c":"{}"}}"#, "x".repeat(1 << 20)));
        let values = EventValues::of(&event);
        let condition = |field: &str, rest: &str| condition(&format!(r#"{{"field":"metadata.{field}",{rest}}}"#));
        assert!(condition("a", &format!(r#""equals":"{longest}""#)).holds(&values));
        for field in ["b", "c"] {
            assert!(!condition(field, &format!(r#""equals":"{longest}""#)).holds(&values), "{field}");
            assert!(condition(field, r#""exists":true"#).holds(&values), "{field}");
        }
    }

    #[test]
    fn a_filter_beyond_its_bounds_is_refused() {
        let long = "x".repeat(1025);
        let refused = [
            r#"{"field":"state","exists":true}"#.to_owned(),
            r#"{"field":"metadata","exists":true}"#.into(),
            r#"{"field":"metadata.","exists":true}"#.into(),
            r#"{"field":"metadata.a..b","exists":true}"#.into(),
            r#"{"field":"metadata.a.-1","exists":true}"#.into(),
            r#"{"field":"metadata.a.01","exists":true}"#.into(),
            r#"{"field":"metadata.a.b.c.d.e.f.g.h.i","exists":true}"#.into(),
            r#"{"field":"toState"}"#.into(),
            r#"{"field":"toState","equals":"a","exists":true}"#.into(),
            r#"{"field":"toState","in":[]}"#.into(),
            format!(r#"{{"field":"toState","equals":"{long}"}}"#),
            format!(r#"{{"field":"toState","in":[{}]}}"#, [r#""a""#; 51].join(",")),
        ];
        let faults = refused.map(|text| {
            let faults = faults(&[condition(&text)]);
            assert_eq!(faults.len(), 1, "{text}");
            faults.concat()
        });
        insta::assert_snapshot!(faults.join("\n"));
        assert!(super::faults(&[condition(r#"{"field":"metadata.a.0.b c","in":["1"]}"#)]).is_empty());
        let many = vec![condition(r#"{"field":"toState","exists":true}"#); 11];
        assert_eq!(super::faults(&many), ["filter: 11 conditions are given, and at most 10 are allowed"]);
    }
}
