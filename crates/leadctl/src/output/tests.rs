//! No text from outside reaches the terminal as a command, through any of the listings.

use std::{cell::RefCell, collections::BTreeMap};

use contract::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{
    audit::report::{CallbackCounts, CheckedInvariant, Report, UpdateCounts, Violation},
    commands::{callback, deliveries, events, lead, process, recover, secrets, update::send},
    dead_letters::{self, letters::Letter},
    output::{self, timeline},
};

const ID: &str = "696102a4b8c1d2e3f4a5b6c7";
/// Clears the screen, changes colors, forges a line and reverses the text.
const HOSTILE: &str = "x\u{1b}[2J\u{9b}31m\r\nforged\u{202e}";

thread_local! {
    static PRINTED: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Stands in for standard output.
pub(super) fn write_line(line: &str) {
    PRINTED.with_borrow_mut(|printed| printed.push_str(&format!("{line}\n")));
}

/// What `print` prints.
pub(crate) fn printed(print: impl FnOnce()) -> String {
    PRINTED.take();
    print();
    PRINTED.take()
}

#[test]
fn a_table_is_aligned_by_characters_not_bytes() {
    let rows = [["ä", "b"].map(str::to_owned), ["ccc", ""].map(str::to_owned)];
    assert_eq!(super::table(Some(["A", "LONG"]), &rows), "A    LONG\nä    b\nccc");
    assert_eq!(super::table(None, &rows), "ä    b\nccc");
}

type Print<'a> = Box<dyn FnOnce() + 'a>;

/// The value with the hostile text for each text that may be any text.
fn hostile<T: DeserializeOwned>(mut value: Value) -> T {
    fn texts(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            Value::String(_) => found.push(path.to_owned()),
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(n, item)| texts(item, &format!("{path}/{n}"), found))
            }
            Value::Object(members) => {
                members.iter().for_each(|(name, item)| texts(item, &format!("{path}/{name}"), found))
            }
            _ => {}
        }
    }
    let mut paths = Vec::new();
    texts(&value, "", &mut paths);
    for path in paths {
        let mut changed = value.clone();
        *changed.pointer_mut(&path).unwrap() = HOSTILE.into();
        if T::deserialize(&changed).is_ok() {
            value = changed;
        }
    }
    serde_json::from_value(value).unwrap()
}

fn row<const N: usize>(cells: [String; N]) {
    output::say(output::table(None, &[cells]));
}

#[test]
fn no_listing_lets_text_control_the_terminal() {
    let attempt =
        json!({"number": 1, "startedAt": 5, "durationMs": 9, "statusCode": 500, "error": "e", "response": "r"});
    let process = json!({
        "projectId": ID, "processId": ID, "revision": 7, "name": "p", "states": [{"name": "new", "kind": "initial"}],
        "transitions": {"new": ["new"]}, "metadataMerge": "deep", "allowLeavingTerminal": false, "callTimeoutSeconds": 9,
        "callbacks": [{"callbackId": ID, "name": "c", "url": "https://c.example"}],
    });
    let position = json!({"epoch": 1, "sequence": 1, "index": 0});
    let lead = json!({
        "leadId": ID, "projectId": ID, "processId": ID, "referenceId": "r", "name": "n", "phone": "p", "email": "e", "state": "s",
        "disposition": "d", "metadata": {"a": 1}, "version": 1, "createdAt": 5, "updatedAt": 5,
        "activities": [{"kind": "update", "updateId": ID, "success": false, "error": "e", "timestamp": 5}],
    });
    let history = json!({
        "kind": "update", "updateId": ID, "success": false, "error": "e", "fromState": "a", "toState": "b", "version": 1, "userId": "u",
        "warnings": [], "epoch": 1, "logSequence": 1, "loggedAt": 5, "appliedAt": 5,
    });
    let delivery = json!({"updateId": ID, "callbackId": ID, "status": "pending", "attempts": [attempt]});
    let listed = json!({
        "updateId": ID, "callbackId": ID, "status": "pending", "attempts": 1, "createdAt": 5, "updatedAt": 5, "error": "e",
    });
    let details = json!({"pending": 1, "lastError": "e"});
    let callback = json!({
        "callbackId": ID, "name": "n", "process": "p", "state": "failing", "reason": "r", "details": details,
    });
    let test =
        json!({"webhookId": ID, "startedAt": 5, "durationMs": 9, "statusCode": 500, "error": "e", "response": "r"});
    let changed = json!({"process": process, "changed": true, "changes": ["c"], "newSecrets": [ID]});
    let recovery = json!({
        "generation": 1, "applied": position, "announced": position, "delivered": position, "logFirst": 1, "logLast": 1,
        "halted": {"reason": "r", "text": "t", "remedy": "replay"},
    });
    let locked = json!({"process": "p", "projectId": ID, "callbackId": ID, "error": "e"});
    let rotated = json!({"keyId": "0a0b0c0d", "resealed": 1, "unchanged": 0, "remaining": 0, "locked": [locked]});
    let event = json!({
        "updateId": ID, "projectId": ID, "referenceId": "r", "success": false, "error": "e", "timestamp": 5, "data": null,
    });
    let preview = json!({"success": false, "error": "e"});
    let update = json!({
        "updateId": ID, "status": "failed", "command": {"a": "b"}, "errorCode": "c", "warnings": ["w"], "fromState": "a",
        "toState": "b", "version": 1, "userId": "u", "outcome": {"action_type": "update", "updateId": ID, "success": false,
        "error": "e", "leadId": ID, "referenceId": "r", "timestamp": 5, "data": null}, "deliveries": [{"callbackId": ID,
        "status": "pending", "attempts": [{"number": 1, "startedAt": "2026-01-12T09:00:02.000Z", "durationMs": 12,
        "statusCode": 500, "error": "e", "response": "r"}]}],
    });
    let text = || HOSTILE.to_owned();
    let letter = Letter {
        number: 1,
        reason: text(),
        error: text(),
        subject: text(),
        dead_since: Timestamp::from_millis(5),
        truncated_from: None,
        replay_of: None,
        replay: None,
    };
    let counts = CallbackCounts {
        callback_id: ID.to_owned(),
        name: Some(text()),
        announced: 1,
        delivered: 1,
        exhausted: 0,
        pending: 0,
        parked: 0,
    };
    let violations = vec![Violation { id: ID.to_owned(), fault: text() }];
    let updates =
        UpdateCounts { accepted: 1, succeeded: 1, failed: 0, pending: 0, queued: 0, duplicates: 0, dead_letters: 0 };
    let audit = Report {
        clean: false,
        checkpoint: None,
        updates,
        callbacks: vec![counts],
        parked: Vec::new(),
        invariants: vec![CheckedInvariant { invariant: "i", statement: "s", count: 1, violations }],
        unchecked: Vec::new(),
    };
    let listings: [(&str, Print<'_>); 17] = [
        ("lead get", Box::new(|| lead::show(&hostile(lead.clone())))),
        ("lead list", Box::new(|| row(lead::lead_row(&hostile(lead.clone()))))),
        ("lead history", Box::new(|| row(lead::update_row(&hostile(history))))),
        ("deliveries show", Box::new(|| deliveries::show(format!("{ID}-{ID}").parse().unwrap(), &hostile(delivery)))),
        ("deliveries list", Box::new(|| row(deliveries::row(&hostile(listed))))),
        ("callback list", Box::new(|| row(callback::row(&hostile(callback))))),
        ("callback test", Box::new(|| callback::show_test(HOSTILE, &hostile(test)))),
        ("process get", Box::new(|| process::show_process(&hostile(process.clone())))),
        ("process list", Box::new(|| row(process::row(&hostile(process.clone()))))),
        ("process apply", Box::new(|| process::show(&hostile(changed), false))),
        ("recover", Box::new(|| recover::show(&hostile(recovery)))),
        ("secrets rotate", Box::new(|| secrets::show(&hostile(rotated)))),
        ("events tail", Box::new(|| output::say(events::summary(&hostile(event))))),
        ("update send --dry-run", Box::new(|| output::say(send::preview(&hostile(preview))))),
        ("update get", Box::new(|| output::say(timeline::render(&hostile(update), &BTreeMap::new())))),
        ("dead-letters list", Box::new(|| dead_letters::list(&[letter], 1, false).unwrap())),
        ("audit", Box::new(|| audit.show())),
    ];
    for (command, print) in listings {
        let printed = printed(print);
        assert!(printed.contains("\\u{1b}"), "{command} shows no text: {printed}");
        let control = printed.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert_eq!(control, None, "{command}: {printed:?}");
        assert!(!printed.lines().any(|line| line.starts_with("forged")), "{command}: {printed}");
    }
    let json = printed(|| output::json(&json!({"text": HOSTILE})).unwrap());
    assert_eq!(json.trim_end().chars().find(|c| c.is_control()), None, "{json:?}");
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["text"], HOSTILE);
}
