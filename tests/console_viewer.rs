//! Viewers of the console can read every project and cannot act.

use std::collections::BTreeSet;

use reqwest::StatusCode;
use serde_json::json;

use crate::{
    console::{Console, form_token, project},
    console_portal::{routes, token},
    nats_permissions::stack_on,
    support::TEST_TIMEOUT,
};

/// Routes that are open to every session.
const OF_SESSIONS: [&str; 2] = ["/login", "/logout"];

#[tokio::test]
async fn a_viewer_sees_what_an_operator_sees_and_every_action_is_refused() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let mut console = Console::start(&stack).await;
    // Objects for the actions: a call, a key, a dead letter.
    let started = json!({"leadId": project.lead_id, "callId": "call-7"});
    crate::support::assert_ok(project.api.post("/api/v1/calls/started", &started).await);
    let keys = stack.leadctl_of_project(&["key", "list", "--json"]).await.assert_ok().json_lines();
    let key_id = keys[0]["keyId"].as_str().expect("an id").to_owned();
    stack.publish(format!("leads.cmd.{}.update", project.api.project_id), "{").await;
    let letter = stack.wait_for_letters(1).await[0]["number"].to_string();
    let viewer = console.sign_in_as("viewer", &stack).await;
    let operator = console.sign_in_as_operator(&stack).await;
    let board = console.get(&project.pages[0], &viewer).await;
    assert!(board.text.contains("<span>viewer</span>"), "{}", board.text);
    let form = format!("form_token={}", form_token(&board));
    let form_of_operator = format!("form_token={}", form_token(&console.get(&project.pages[0], &operator).await));
    let sent_before = stack.receiver.requests().len();

    let (mut actions, mut links, mut seen) = (BTreeSet::new(), BTreeSet::new(), 0);
    for route in routes().filter(|route| !OF_SESSIONS.contains(route)) {
        for route in [route.to_owned(), format!("/p/{{project}}{route}")] {
            let path = project.fill(&route).replace("{key}", &key_id).replace("{number}", &letter);
            let sent = console.post(&path, &viewer, Some(&console.url), &form).await;
            let [page, of_operator] = [console.get(&path, &viewer).await, console.get(&path, &operator).await];
            let by_operator = console.post(&path, &operator, Some(&console.url), &form_of_operator).await.status;
            match sent.status {
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                    assert_eq!(by_operator, sent.status, "{path}")
                }
                StatusCode::FORBIDDEN => {
                    assert!(sent.text.contains("Viewers cannot make changes."), "POST {path}: {}", sent.text);
                    actions.insert(path.clone());
                }
                other => panic!("POST {path}: {other} {}", sent.text),
            }
            if page.status == StatusCode::FORBIDDEN {
                assert!(
                    actions.contains(&path) && page.text.contains("Viewers cannot make changes."),
                    "{path}: {}",
                    page.text
                );
                continue;
            }
            assert_eq!((page.status, &page.location), (of_operator.status, &of_operator.location), "GET {path}");
            if page.status == StatusCode::OK {
                seen += 1;
                let forms: Vec<_> =
                    page.text.split("<form").skip(1).filter(|form| form.contains(r#"method="post""#)).collect();
                assert!(forms.len() == 1 && forms[0].contains(r#"action="/logout""#), "{path}: {forms:?}");
                let hrefs = page.text.split(r#"href=""#).skip(1).filter_map(|rest| rest.split(['"', '?']).next());
                links.extend(hrefs.map(str::to_owned));
            }
        }
    }
    // Viewers may open the pages *Share*, which list the open links.
    actions.retain(|path| !path.ends_with("/share"));
    assert!(actions.len() >= 14 && seen > 15, "{seen} {actions:?}");
    let offered: Vec<_> = links.intersection(&actions).collect();
    assert!(offered.is_empty(), "{offered:?}");
    assert_eq!(stack.receiver.requests().len(), sent_before);
    let line = console.service.wait_for_log("action refused: Viewers cannot make changes.", TEST_TIMEOUT).await;
    assert!(line.contains("/replay"), "{line}");
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn a_viewers_link_gives_no_other_role() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;
    let args = ["console", "token", "--role", "viewer", "--url", &console.url];
    let link = token(&stack.leadctl(&args).await.assert_ok().stdout);
    let open = async |token: &str| console.post("/login", "", Some(&console.url), &format!("token={token}")).await;

    let form = console.get(&format!("/login?token={link}"), "").await;
    assert!(form.text.contains("Sign in as viewer"), "{}", form.text);
    let as_operator = open(&link.replace("lrv_", "lrc_")).await;
    assert_eq!((as_operator.status, as_operator.cookie.as_str()), (StatusCode::FORBIDDEN, ""), "{}", as_operator.text);
    let viewer = open(&link).await.cookie;
    assert_eq!(open(&link).await.status, StatusCode::FORBIDDEN, "it works once");

    // A viewer who signs in with an API key gets a session of that key.
    let board = console.get(&project.pages[0], &viewer).await;
    let form = format!("form_token={}&api_key={}", form_token(&board), project.api.key);
    let cookie = console.post("/login", &viewer, Some(&console.url), &form).await.cookie;
    assert_eq!(console.get("/", &cookie).await.location, project.pages[0]);
    assert_eq!(console.get("/system", &cookie).await.status, StatusCode::NOT_FOUND);
}
