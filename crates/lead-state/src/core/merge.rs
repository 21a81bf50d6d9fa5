//! 4 Decide: merging metadata. Values are copied as raw text, so numbers keep their digits.

use std::borrow::Cow;

use contract::{JsonObject, process::MetadataMerge};
use serde_json::value::RawValue;

pub(crate) fn merge(current: &JsonObject, patch: &JsonObject, mode: MetadataMerge) -> JsonObject {
    match mode {
        MetadataMerge::Shallow => {
            let mut members = current.members();
            members.extend(patch.members());
            JsonObject::from_members(&members)
        }
        MetadataMerge::Deep => merge_patch(Some(current), patch),
    }
}

/// JSON Merge Patch of an object (RFC 7396, section 2).
fn merge_patch(target: Option<&JsonObject>, patch: &JsonObject) -> JsonObject {
    let object = |value: &Cow<'_, RawValue>| JsonObject::from_raw(value.clone().into_owned()).ok();
    let mut members = target.map(JsonObject::members).unwrap_or_default();
    for (key, value) in patch.members() {
        if value.get() == "null" {
            members.shift_remove(&key);
            continue;
        }
        let value = match object(&value) {
            Some(patch) => Cow::Owned(merge_patch(members.get(&key).and_then(object).as_ref(), &patch).into_raw()),
            None => value,
        };
        members.insert(key, value);
    }
    JsonObject::from_members(&members)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn object(text: &str) -> JsonObject {
        JsonObject::from_text(text.into()).unwrap()
    }

    fn merged(current: &str, patch: &str, how: MetadataMerge) -> String {
        merge(&object(current), &object(patch), how).get().to_owned()
    }

    #[test]
    fn shallow_merge_replaces_key_by_key_and_keeps_digits_and_order() {
        assert_eq!(
            merged(
                r#"{"b":{"x":1},"a":123456789012345678901234567890}"#,
                r#"{"c":1.50,"b":{"y":null}}"#,
                MetadataMerge::Shallow
            ),
            r#"{"b":{"y":null},"a":123456789012345678901234567890,"c":1.50}"#
        );
    }

    /// The examples of appendix A that are objects.
    #[test]
    fn deep_merge_follows_the_examples_of_rfc_7396() {
        for (current, patch, result) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, r"{}"),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"e":null,"a":1}"#),
            (r"{}", r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            assert_eq!(merged(current, patch, MetadataMerge::Deep), result, "{current} + {patch}");
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c]{0,3}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[a-c]", inner, 0..3)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    fn json_object() -> impl Strategy<Value = Value> {
        prop::collection::btree_map("[a-c]", json(), 0..4)
            .prop_map(|members| Value::Object(members.into_iter().collect()))
    }

    /// The pseudocode of RFC 7396, section 2.
    fn rfc_merge_patch(target: Value, patch: Value) -> Value {
        let Value::Object(patch) = patch else { return patch };
        let mut target = if let Value::Object(target) = target { target } else { serde_json::Map::new() };
        for (key, value) in patch {
            if value.is_null() {
                target.remove(&key);
            } else {
                let old = target.remove(&key).unwrap_or(Value::Null);
                target.insert(key, rfc_merge_patch(old, value));
            }
        }
        Value::Object(target)
    }

    proptest! {
        #[test]
        fn deep_merge_agrees_with_the_rfc(current in json_object(), patch in json_object()) {
            let got: Value = serde_json::from_str(&merged(&current.to_string(), &patch.to_string(), MetadataMerge::Deep)).unwrap();
            prop_assert_eq!(got, rfc_merge_patch(current, patch));
        }

        #[test]
        fn shallow_merge_agrees_with_map_extension(current in json_object(), patch in json_object()) {
            let got: Value = serde_json::from_str(&merged(&current.to_string(), &patch.to_string(), MetadataMerge::Shallow)).unwrap();
            let (Value::Object(mut expected), Value::Object(patch)) = (current, patch) else { unreachable!() };
            expected.extend(patch);
            prop_assert_eq!(got, Value::Object(expected));
        }
    }
}
