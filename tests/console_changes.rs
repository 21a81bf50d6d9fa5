//! Changes of the configuration in the console: processes are edited after a preview of the differences, and past
//! events are delivered to new callbacks.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::{
    console::{hidden, signed_in},
    support::TEST_TIMEOUT,
};

/// A text as a form sends it.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[tokio::test]
async fn a_process_is_edited_after_a_look_at_the_differences_and_a_conflict_shows_both() {
    let (stack, project, mut console, cookie) = signed_in().await;
    let process = project.pages[10].clone();
    let path = format!("{process}/edit");
    let api = format!("/api/v1/processes/{}", process.rsplit('/').next().expect("an id"));
    let read = async || project.api.get(&api).await.1["data"].clone();
    let before = read().await;
    let page = console.get(&path, &cookie).await;
    assert!(!page.text.contains("callbackId") && page.text.contains("&quot;interested&quot;"), "{}", page.text);
    let with = |seconds: u32| {
        let mut rules = before.clone();
        rules["callTimeoutSeconds"] = json!(seconds);
        for kept in ["processId", "projectId", "version", "callbacks"] {
            rules.as_object_mut().expect("an object").remove(kept);
        }
        encoded(&rules.to_string())
    };
    let version = before["version"].as_i64().expect("a version");

    let preview = console.act(&path, &cookie, &format!("step=preview&version={version}&text={}", with(600))).await;
    assert!(preview.text.contains("<ins>+   &quot;callTimeoutSeconds&quot;: 600"), "{}", preview.text);
    assert_eq!(read().await, before, "a preview changes nothing");
    let long = format!("step=preview&version={version}&text={}{}", with(600), "+".repeat(100 << 10));
    let long = console.act(&path, &cookie, &long).await;
    assert!(long.text.contains("<ins>+   &quot;callTimeoutSeconds&quot;: 600"), "{}", long.text);
    let apply = format!("step=apply&version={}&text={}", hidden(&preview, "version"), with(600));
    let applied = console.act(&path, &cookie, &apply).await;

    assert_eq!(applied.location, process, "{}", applied.text);
    let after = read().await;
    assert_eq!((&after["callTimeoutSeconds"], &after["callbacks"]), (&json!(600), &before["callbacks"]));
    console.service.wait_for_log("action edit process: done", TEST_TIMEOUT).await;
    // A form that was opened before the change, at the previous version.
    let stale = format!("step=apply&version={version}&text={}", with(700));
    let conflict = console.act(&path, &cookie, &stale).await;
    for part in [
        "was changed since",
        "<del>-   &quot;callTimeoutSeconds&quot;: 600",
        "<ins>+   &quot;callTimeoutSeconds&quot;: 700",
    ] {
        assert!(conflict.text.contains(part), "{part}: {}", conflict.text);
    }
    assert_eq!(read().await, after);
    // The form keeps a text that cannot be applied.
    for (text, why) in [("[1]", "not a JSON object"), (r#"{"name":"sales","stats":[]}"#, "stats")] {
        let version = hidden(&conflict, "version");
        let refused =
            console.act(&path, &cookie, &format!("step=apply&version={version}&text={}", encoded(text))).await;
        assert!(refused.status == StatusCode::OK && refused.text.contains(why), "{}", refused.text);
        assert!(refused.text.contains("</textarea>"), "{}", refused.text);
    }
    let viewer = project.session_with(&stack, &console, "config:read").await;
    assert!(console.get(&path, &viewer).await.text.contains("the scope config:write"));
    let current = format!("step=apply&version={}&text={}", hidden(&conflict, "version"), with(700));
    let refused = console.act(&path, &viewer, &current).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN, "{}", refused.text);
}

#[tokio::test]
async fn past_events_are_counted_then_delivered_to_a_new_callback() {
    let (stack, project, console, cookie) = signed_in().await;
    let process = project.pages[10].rsplit('/').next().expect("an id").to_owned();
    let new = json!({"name": "new", "url": stack.receiver.url("/new")});
    let (_, added) = project.api.post(&format!("/api/v1/processes/{process}/callbacks"), &new).await;
    let callback_id: &Value = &added["data"]["callbackId"];
    let path = format!("/p/{}/callbacks/{}/backfill", project.api.project_id, callback_id.as_str().expect("an id"));
    // A backfill delays deliveries of events of the last minute.
    stack.sql("UPDATE lead_state.lead_updates SET applied_at = applied_at - interval '5 minutes'").await;

    let counted = console.get(&path, &cookie).await;
    let count =
        counted.text.split("<dt>Deliveries</dt><dd>").nth(1).and_then(|rest| rest.split('<').next()).expect("a count");
    assert!(count.parse::<u32>().is_ok_and(|count| count > 0), "{}", counted.text);
    assert_eq!(stack.receiver.requests_to("/new").len(), 0);
    let since = encoded(&hidden(&counted, "since"));
    let sent = console.act(&path, &cookie, &format!("since={since}&per_second=100")).await;

    assert!(sent.text.contains(&format!("{count} deliveries")), "{}", sent.text);
    stack.receiver.wait_for_requests("/new", count.parse().expect("a number"), TEST_TIMEOUT).await;
}
