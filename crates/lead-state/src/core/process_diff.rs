//! Configuration: the differences between two versions of a process, and a process without its secrets. Pure.

use std::collections::{HashMap, HashSet};

use contract::{
    ObjectId,
    process::{Callback, Process, Source},
    secret::Secret,
};
use serde::Serialize;
use serde_json::{Map, Value};
use url::Url;

/// Describes the differences, one line each. Secrets are compared but not shown.
pub(crate) fn describe_changes(before: &Process, after: &Process) -> Vec<String> {
    let mut changes = Vec::new();
    changes.extend(difference("name", &Value::from(before.name.as_str()), &Value::from(after.name.as_str())));
    let states = |process: &Process| -> HashMap<_, _> {
        process.rules.states.iter().map(|state| (state.name.clone(), state.clone())).collect()
    };
    let (states_before, states_after) = (states(before), states(after));
    for state in after.rules.states.iter().filter(|state| !states_before.contains_key(&state.name)) {
        changes.push(format!("state {} added", state.name));
    }
    for state in &before.rules.states {
        match states_after.get(&state.name) {
            None => changes.push(format!("state {} removed", state.name)),
            Some(same) if same != state => changes.push(format!("state {} changed", state.name)),
            Some(_) => {}
        }
    }
    changes.extend(differing_members(&before.rules, &after.rules, &["states"]));
    let callbacks: HashMap<_, _> = before.callbacks.iter().map(|before| (before.callback_id, before)).collect();
    let kept: HashSet<_> = after.callbacks.iter().map(|callback| callback.callback_id).collect();
    for callback in &after.callbacks {
        match callbacks.get(&callback.callback_id) {
            None => changes.push(format!("callback {} added", callback.name)),
            Some(before) => changes.extend(describe_callback(before, callback)),
        }
    }
    for removed in before.callbacks.iter().filter(|before| !kept.contains(&before.callback_id)) {
        changes.push(format!("callback {} removed", removed.name));
    }
    changes.extend(describe_sources(&before.sources, &after.sources));
    if changes.is_empty() && before != after {
        changes.push("order changed".into());
    }
    changes
}

fn describe_sources(before: &[Source], after: &[Source]) -> Vec<String> {
    let find =
        |sources: &[Source], source: &Source| sources.iter().find(|other| other.source_id == source.source_id).cloned();
    let mut changes = Vec::new();
    for source in after {
        match find(before, source) {
            None => changes.push(format!("source {} added", source.name)),
            Some(before) => {
                let shown = |source: &Source| Source { secrets: Vec::new(), ..source.clone() };
                let mut differences = differing_members(&shown(&before), &shown(source), &[]);
                if before.secrets != source.secrets {
                    differences.push("secrets changed".into());
                }
                if !differences.is_empty() {
                    changes.push(format!("source {}: {}", source.name, differences.join("; ")));
                }
            }
        }
    }
    let removed = before.iter().filter(|source| find(after, source).is_none());
    changes.extend(removed.map(|source| format!("source {} removed", source.name)));
    changes
}

fn describe_callback(before: &Callback, after: &Callback) -> Option<String> {
    let secrets = [
        ("auth", before.auth == after.auth),
        ("headers", before.headers == after.headers),
        ("clientCertificate", before.client_certificate == after.client_certificate),
        ("secrets", before.secrets == after.secrets),
        ("retiringSecrets", before.retiring_secrets == after.retiring_secrets),
    ];
    let secrets = secrets.into_iter().filter(|(_, same)| !same).map(|(name, _)| format!("{name} changed"));
    let [shown_before, shown_after] = [before, after].map(|callback| {
        let mut shown = callback.clone();
        redact(&mut shown);
        Callback {
            auth: None,
            headers: Vec::new(),
            client_certificate: None,
            secrets: Vec::new(),
            retiring_secrets: Vec::new(),
            ..shown
        }
    });
    let differences: Vec<_> = differing_members(&shown_before, &shown_after, &[]).into_iter().chain(secrets).collect();
    if !differences.is_empty() {
        Some(format!("callback {}: {}", after.name, differences.join("; ")))
    } else if before != after {
        // Only the password in the URL differs.
        Some(format!("callback {}: url changed", after.name))
    } else {
        None
    }
}

/// The differences between the JSON members of two values of one type, including members that are added to the type
/// later.
fn differing_members(before: &impl Serialize, after: &impl Serialize, except: &[&str]) -> Vec<String> {
    let members = |value: Result<Value, _>| match value {
        Ok(Value::Object(members)) => members,
        _ => Map::new(),
    };
    let (before, after) = (members(serde_json::to_value(before)), members(serde_json::to_value(after)));
    let removed = before.keys().filter(|name| !after.contains_key(*name));
    let names = after.keys().chain(removed).filter(|name| !except.contains(&name.as_str()));
    let member = |members: &Map<String, Value>, name: &str| members.get(name).cloned().unwrap_or_default();
    names.filter_map(|name| difference(name, &member(&before, name), &member(&after, name))).collect()
}

/// One difference, with both values if they are short.
fn difference(name: &str, before: &Value, after: &Value) -> Option<String> {
    let short = |value: &Value| match value {
        Value::Null => Some("none".to_owned()),
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(_) | Value::Object(_) => None,
    };
    (before != after).then(|| match (short(before), short(after)) {
        (Some(before), Some(after)) => format!("{name} {before} → {after}"),
        _ => format!("{name} changed"),
    })
}

/// Removes all secrets, except the signing secrets of the callbacks in `shown`.
pub(crate) fn hide_secrets(process: &mut Process, shown: &[ObjectId]) {
    process.sources.iter_mut().for_each(|source| source.secrets.clear());
    let shown: HashSet<_> = shown.iter().collect();
    for callback in &mut process.callbacks {
        let secrets = callback.secrets.clone();
        redact(callback);
        if shown.contains(&callback.callback_id) {
            callback.secrets = secrets;
        }
    }
}

/// Removes all secrets, including a password in the URL.
fn redact(callback: &mut Callback) {
    callback.secrets.clear();
    callback.retiring_secrets.iter_mut().for_each(|retiring| retiring.secret = Secret::default());
    if let Some(auth) = &mut callback.auth {
        *auth.secret_mut() = Secret::default();
    }
    callback.headers.iter_mut().for_each(|header| header.value = Secret::default());
    if let Some(certificate) = &mut callback.client_certificate {
        certificate.key = Secret::default();
    }
    callback.url = redacted_url(&callback.url);
}

fn redacted_url(url: &str) -> String {
    if let Ok(mut parsed) = Url::parse(url)
        && parsed.password().is_some()
        && parsed.set_password(Some("***")).is_ok()
    {
        return parsed.into();
    }
    url.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(text: &str) -> Process {
        serde_json::from_str(text).unwrap()
    }

    fn before() -> Process {
        process(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":1,"name":"p",
                "states":[{"name":"new"},{"name":"old"}],
                "callbacks":[{"callbackId":"050505050505050505050505","name":"a","url":"https://a.example/x",
                              "auth":{"type":"bearer","token":"t"},"headers":[{"name":"X-Key","value":"t"}],"secrets":["s"]},
                             {"callbackId":"060606060606060606060606","name":"b","url":"http://u:pass-word@b.example","secrets":["s"]}]}"#,
        )
    }

    #[test]
    fn differences_are_described_without_secrets() {
        let after = process(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":1,"name":"q",
                "callTimeoutSeconds":5,"transitions":{},"states":[{"name":"new","kind":"initial"},{"name":"lost"}],
                "callbacks":[{"callbackId":"050505050505050505050505","name":"a","url":"http://u:hidden@a2","secrets":["hidden"],
                              "maxPerSecond":9,"auth":{"type":"bearer","token":"hidden"}},
                             {"callbackId":"070707070707070707070707","name":"c","url":"http://c","secrets":["s"]}]}"#,
        );

        assert_eq!(
            describe_changes(&before(), &after),
            [
                "name p → q",
                "state lost added",
                "state new changed",
                "state old removed",
                "callTimeoutSeconds 7200 → 5",
                "transitions changed",
                "callback a: maxPerSecond none → 9; url https://a.example/x → http://u:***@a2/; auth changed; headers changed; secrets changed",
                "callback c added",
                "callback b removed",
            ]
        );
        assert_eq!(describe_changes(&before(), &before()), Vec::<String>::new());
    }

    #[test]
    fn a_change_of_order_or_of_a_password_alone_is_described() {
        let mut after = before();
        after.callbacks.reverse();
        assert_eq!(describe_changes(&before(), &after), ["order changed"]);

        after.callbacks[0].url = "http://u:other@b.example".into();
        assert_eq!(describe_changes(&before(), &after), ["callback b: url changed"]);
    }

    #[test]
    fn differences_of_sources_are_described_without_secrets() {
        let with_sources = |sources: &str| {
            let mut process = before();
            process.sources = serde_json::from_str(sources).unwrap();
            process
        };
        let source = |byte: &str, name: &str, secret: &str| {
            format!(r#"{{"sourceId":"{}","name":"{name}","platform":"vapi","secrets":["{secret}"]}}"#, byte.repeat(12))
        };
        let one = with_sources(&format!("[{},{}]", source("05", "a", "hidden-1"), source("06", "b", "hidden-2")));
        let other = with_sources(&format!("[{},{}]", source("05", "z", "hidden-3"), source("07", "c", "hidden-4")));

        let changes = describe_changes(&one, &other);

        assert_eq!(changes, ["source z: name a → z; secrets changed", "source c added", "source b removed"]);
        let mut shown = one;
        hide_secrets(&mut shown, &[]);
        assert!(!serde_json::to_string(&shown).unwrap().contains("hidden"));
    }

    #[test]
    fn hidden_secrets_include_passwords_in_urls() {
        let mut process = before();
        hide_secrets(&mut process, &[]);

        let shown = serde_json::to_string(&process).unwrap();
        assert!(!shown.contains("pass-word") && !shown.contains("token") && !shown.contains(r#""value""#), "{shown}");
        assert!(shown.contains("http://u:***@b.example/"), "{shown}");
    }
}
