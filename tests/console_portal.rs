//! Portal links of the console: one process or callback, and nothing else of the project.

use contract::{
    console::{MAX_PORTAL_LINKS, PORTAL_AGE},
    rpc::{ListKeys, RevokeKey},
    streams::CONSOLE_LOGINS,
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use test_support::eventually;

use crate::{
    console::{Answer, Console, Project, form_token, project, signed_in},
    nats_permissions::stack_on,
    support::{Api, Stack, TEST_TIMEOUT, assert_ok},
};

/// The source of the console's router, which contains the path of every page and action.
const ROUTER: &str = include_str!("../crates/console/src/router.rs");
/// The routes that visitors of a portal link may use in addition to the pages of the portal.
const ALLOWED: [&str; 3] = ["/", "/login", "/logout"];

/// The console's routes. Routes of actions are without the prefix of the project.
pub(crate) fn routes() -> impl Iterator<Item = &'static str> {
    ROUTER.split('"').skip(1).step_by(2).filter(|text| text.starts_with('/') && !text.contains("{{"))
}

/// The link on a page, or in an output.
pub(crate) fn token(text: &str) -> String {
    let (_, rest) = text.split_once("/login?token=").expect("a link");
    rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
}

impl Console {
    /// Makes a link on the page *Share* of a process or callback, and returns its token.
    async fn share(&self, page: &str, cookie: &str, fields: &str) -> String {
        let made = self.act(&format!("{page}/share"), cookie, fields).await;
        assert_eq!(made.status, StatusCode::OK, "{}", made.text);
        token(&made.text)
    }

    async fn open_link(&self, token: &str) -> Answer {
        self.post("/login", "", Some(&self.url), &format!("token={token}")).await
    }
}

/// Creates a second process of the project with a callback and a delivery. Returns the ids of the callback and the
/// delivery.
async fn other_process(stack: &Stack, project: &Project) -> (String, String) {
    let process = json!({
        "name": "other",
        "states": [{"name": "new", "kind": "initial"}],
        "callbacks": [{"name": "other", "url": stack.receiver.url("/other")}],
    });
    let made = assert_ok(project.api.post("/api/v1/processes", &process).await);
    let process_id = made["data"]["processId"].as_str().expect("an id").parse().expect("an id");
    let callback_id = made["data"]["callbacks"][0]["callbackId"].as_str().expect("an id").to_owned();
    let lead_id = project.api.initiate(process_id, Some("R-2")).await;
    let update = json!({"leadId": lead_id, "metadata": {"n": 1}});
    let update_id = project.api.update(update).await;
    stack.receiver.wait_for_requests("/other", 1, TEST_TIMEOUT).await;
    stack.wait_for_count(crate::support::DELIVERED, 2).await;
    (callback_id.clone(), format!("{update_id}-{callback_id}"))
}

#[tokio::test]
async fn a_portal_link_shows_its_callback_and_nothing_else() {
    let (mut stack, project, console, maker) = signed_in().await;
    let (other_callback, other_delivery) = other_process(&stack, &project).await;

    let token = console.share(&project.callback(), &maker, "hours=24").await;
    let form = console.get(&format!("/login?token={token}"), "").await;
    assert!(form.text.contains(">Open<") && form.cookie.is_empty(), "{}", form.text);
    let visitor = console.open_link(&token).await.cookie;

    // The same link can be opened again.
    assert_eq!(console.open_link(&token).await.location, "/");
    assert_eq!(console.get("/", &visitor).await.location, "/portal");
    let callback_id = project.callback().rsplit('/').next().expect("an id").to_owned();
    let delivery_id = project.delivery().rsplit('/').next().expect("an id").to_owned();
    let callback = format!("/portal/callbacks/{callback_id}");
    let delivery = format!("/portal/deliveries/{delivery_id}");
    assert_eq!(console.get("/portal", &visitor).await.location, callback);
    let (callback, delivery) = (console.get(&callback, &visitor).await, console.get(&delivery, &visitor).await);
    assert!(callback.text.contains("healthy") && callback.text.contains(&delivery_id), "{}", callback.text);
    assert!(delivery.text.contains("Attempts") && delivery.text.contains("delivered"), "{}", delivery.text);
    for page in [&callback, &delivery] {
        for hidden in [&project.lead_id, &project.api.project_id.to_string(), "R-1", "/crm", "Send a test"] {
            assert!(!page.text.contains(hidden), "{hidden}: {}", page.text);
        }
    }
    // Requests every route, with ids that exist. The list comes from the router, so it includes pages that are added
    // later.
    let form = format!("form_token={}", form_token(&callback));
    let fill = |route: &str| project.fill(route);
    let routes: Vec<_> = routes().filter(|route| !ALLOWED.contains(route) && !route.starts_with("/portal")).collect();
    let mut seen_by_maker = 0;
    for route in &routes {
        for path in [fill(route), fill(&format!("/p/{{project}}{route}"))] {
            assert_eq!(console.get(&path, &visitor).await.status, StatusCode::NOT_FOUND, "GET {path}");
            let sent = console.post(&path, &visitor, Some(&console.url), &form).await.status;
            assert!([StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED].contains(&sent), "POST {path}: {sent}");
            seen_by_maker += usize::from(console.get(&path, &maker).await.status == StatusCode::OK);
        }
    }
    assert!(routes.len() > 25 && seen_by_maker > 15, "{seen_by_maker} of {routes:?}");
    // Objects outside the link, and actions that its visitors may not perform, answer 404.
    for path in [
        format!("/portal/callbacks/{other_callback}"),
        format!("/portal/deliveries/{other_delivery}"),
        format!("/portal/callbacks/{callback_id}/test"),
        format!("/portal/deliveries/{delivery_id}/redeliver"),
    ] {
        assert_eq!(console.get(&path, &visitor).await.status, StatusCode::NOT_FOUND, "GET {path}");
        let sent = console.post(&path, &visitor, Some(&console.url), &form).await.status;
        assert!([StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED].contains(&sent), "POST {path}: {sent}");
    }
    assert_eq!(console.get("/portal", &maker).await.status, StatusCode::NOT_FOUND);
    assert_eq!(stack.receiver.requests().len(), 2);

    // An outage does not end the session: the visitor has no API key to sign in with.
    stack.nats.stop().await.expect("stopped");
    let page = console.get("/portal", &visitor).await;
    assert_eq!((page.status, page.location.as_str()), (StatusCode::SERVICE_UNAVAILABLE, ""), "{}", page.text);
}

#[tokio::test]
async fn a_portal_link_of_a_process_shows_its_callbacks_and_acts_until_it_is_revoked() {
    let (stack, project, mut console, _) = signed_in().await;
    let (other_callback, _) = other_process(&stack, &project).await;
    let process = project.pages[10].rsplit('/').next().expect("an id").to_owned();
    let args = [
        "console",
        "portal-link",
        "--process",
        &process,
        "--may-act",
        "--api-key",
        &project.api.key,
        "--url",
        &console.url,
    ];
    let link = stack.leadctl_of_project(&args).await.assert_ok().stdout.trim().to_owned();
    let visitor = console.open_link(&token(&link)).await.cookie;

    let page = console.get("/portal", &visitor).await;

    assert!(page.text.contains("new → interested") && page.text.contains(&project.update_id), "{}", page.text);
    for hidden in [&project.lead_id, &other_callback, "R-1", &project.api.key] {
        assert!(!page.text.contains(hidden), "{hidden}: {}", page.text);
    }
    let callback = format!("/portal/callbacks/{}", project.callback().rsplit('/').next().expect("an id"));
    let delivery = format!("/portal/deliveries/{}", project.delivery().rsplit('/').next().expect("an id"));
    let tested = console.act(&format!("{callback}/test"), &visitor, "").await;
    assert!(tested.text.contains("accepted"), "{}", tested.text);
    let redelivered = console.act(&format!("{delivery}/redeliver"), &visitor, "").await;
    assert_eq!(redelivered.location, delivery, "{}", redelivered.text);
    let line = console.service.wait_for_log("action redeliver: done", TEST_TIMEOUT).await;
    assert!(line.contains("portal link "), "{line}");

    stack.leadctl(&["console", "revoke-portal-link", &link]).await.assert_ok();

    let ended = console.get("/portal", &visitor).await;
    assert_eq!(ended.status, StatusCode::FORBIDDEN);
    assert!(ended.text.contains("This link has ended or was revoked."), "{}", ended.text);
    assert_eq!(console.open_link(&token(&link)).await.status, StatusCode::FORBIDDEN);
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn a_portal_link_needs_a_key_that_allows_as_much_and_ends_with_it() {
    let (stack, project, console, maker) = signed_in().await;
    let share = format!("{}/share", project.callback());
    let partial = project.session_with(&stack, &console, "config:read").await;
    assert_eq!(console.get(&share, &partial).await.status, StatusCode::FORBIDDEN);
    let shared = console.share(&project.callback(), &maker, "hours=1").await;
    let callback = project.callback();
    let args = ["console", "portal-link", "--callback", callback.rsplit('/').next().expect("an id")];
    let of_operator = stack.leadctl_of_project(&args).await.assert_ok().stdout;

    for hours in ["0", "169", "none"] {
        let refused = console.act(&share, &maker, &format!("hours={hours}")).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{hours}: {}", refused.text);
    }
    let revoked = console.act(&share, &maker, &format!("link={}", token(&of_operator))).await;
    assert!(revoked.text.contains("is revoked"), "{}", revoked.text);
    assert_eq!(console.open_link(&token(&of_operator)).await.status, StatusCode::FORBIDDEN);
    let visitor = console.open_link(&shared).await.cookie;
    assert_eq!(console.get("/portal", &visitor).await.status, StatusCode::SEE_OTHER);
    let keys = stack.call(&ListKeys::of_project(project.api.project_id)).await.items;
    let key = keys.iter().find(|key| key.name == "test").expect("the maker's key");
    stack.call(&RevokeKey { key_id: key.key_id, project_id: None }).await;

    let why = "the API key that made it was revoked";
    eventually(TEST_TIMEOUT, "the session of the link ends", async || {
        let answer = console.get("/portal", &visitor).await;
        if answer.text.contains(why) { Ok(()) } else { Err(answer.text) }
    })
    .await;
    let opened = console.open_link(&shared).await;
    assert_eq!((opened.status, opened.cookie.as_str()), (StatusCode::FORBIDDEN, ""));
    assert!(opened.text.contains(why), "{}", opened.text);
}

impl Console {
    /// The ids of the open links that a page lists.
    async fn open_links(&self, page: &str, cookie: &str) -> Vec<String> {
        let page = self.get(&format!("{page}/share"), cookie).await;
        assert_eq!(page.status, StatusCode::OK, "{}", page.text);
        let ids = page.text.split(r#"name="link" value=""#).skip(1);
        ids.map(|rest| rest.split('"').next().expect("a value").to_owned()).collect()
    }
}

async fn links_of(stack: &Stack, project: &Api) -> Vec<Value> {
    let args = ["console", "portal-links", "--json", "--project", &project.project_id.to_string()];
    stack.leadctl(&args).await.assert_ok().json().as_array().expect("a list").clone()
}

#[tokio::test]
async fn open_links_are_listed_to_those_who_may_make_them_and_revoked_there() {
    let (stack, project, console, maker) = signed_in().await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let stranger = console.sign_in_with(&other).await;
    let operator = console.sign_in_as_operator(&stack).await;
    let process = project.pages[10].clone();
    let shared = console.share(&project.callback(), &maker, "hours=2&act=yes").await;
    console.share(&process, &operator, "hours=1").await;

    let listed = links_of(&stack, &project.api).await;

    let fact = |index: usize, name: &str| listed[index][name].as_str().unwrap_or_default().to_owned();
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert_eq!((fact(0, "madeBy"), listed[0]["mayAct"].as_bool()), ("operator".into(), Some(false)));
    assert!(process.ends_with(&fact(0, "processId")) && project.callback().ends_with(&fact(1, "callbackId")));
    assert!(fact(1, "madeBy").starts_with("key test ") && listed[1]["mayAct"] == true, "{listed:?}");
    let ids = [fact(0, "id"), fact(1, "id")];
    for page in [&process, &project.callback()] {
        assert_eq!(console.open_links(page, &operator).await, ids);
    }
    let page = console.get(&format!("{process}/share"), &maker).await.text;
    for shown in ["only look", "test, redeliver", "key test ", "callback <a", "process <a"] {
        assert!(page.contains(shown), "{shown}: {page}");
    }
    assert!(!page.contains(&shared), "{page}");

    // Sessions that may not make links, and sessions of other projects, cannot list or revoke them.
    let reader = project.session_with(&stack, &console, "config:read").await;
    assert_eq!(console.get(&format!("{process}/share"), &reader).await.status, StatusCode::FORBIDDEN);
    assert_eq!(console.get(&format!("{process}/share"), &stranger).await.status, StatusCode::NOT_FOUND);
    assert_eq!(links_of(&stack, &other).await, [] as [Value; 0]);
    let made = assert_ok(
        other.post("/api/v1/processes", &json!({"name": "own", "states": [{"name": "new", "kind": "initial"}]})).await,
    );
    let own = format!("/p/{}/processes/{}", other.project_id, made["data"]["processId"].as_str().expect("an id"));
    assert_eq!(console.open_links(&own, &stranger).await, [""; 0]);
    for link in [&ids[1], &shared] {
        let refused = console.act(&format!("{own}/share"), &stranger, &format!("link={link}")).await;
        assert_eq!(refused.status, StatusCode::NOT_FOUND, "{}", refused.text);
    }
    assert_eq!(links_of(&stack, &project.api).await.len(), 2);

    // Revoked on the page, and with leadctl.
    let visitor = console.open_link(&shared).await.cookie;
    let revoked = console.act(&format!("{process}/share"), &maker, &format!("link={}", ids[1])).await;
    assert!(revoked.text.contains("is revoked"), "{}", revoked.text);
    assert_eq!(console.open_links(&process, &maker).await, ids[..1]);
    assert_eq!(console.get("/portal", &visitor).await.status, StatusCode::FORBIDDEN);
    stack.leadctl_of_project(&["console", "revoke-portal-link", &ids[0]]).await.assert_ok();
    stack.leadctl_of_project(&["console", "portal-links"]).await.assert_prints(&["no open portal links"]);
    for link in [&ids[0], &shared] {
        let refused = stack.leadctl_of_project(&["console", "revoke-portal-link", link]).await;
        assert!(refused.code != 0 && refused.stderr.contains("there is no such link"), "{}", refused.stderr);
    }
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn a_link_to_nothing_is_not_made() {
    let stack = stack_on(None).await;
    project(&stack).await;
    let absent = "0123456789abcdef01234567";

    for (option, list) in [("--process", "leadctl process list"), ("--callback", "leadctl callback list")] {
        let refused = stack.leadctl_of_project(&["console", "portal-link", option, absent]).await;
        assert_ne!(refused.code, 0, "{option}");
        assert!(refused.stderr.contains(absent) && refused.stderr.contains(list), "{}", refused.stderr);
    }

    assert_eq!(links_of(&stack, &stack.api).await, [] as [Value; 0]);
}

#[tokio::test]
async fn a_project_makes_a_bounded_number_of_links() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let js = stack.js();
    let link = |project_id| ::console::NewPortalLink {
        project_id,
        target: contract::console::PortalTarget::ProcessId(contract::ObjectId::from_bytes([1; 12])),
        age: PORTAL_AGE,
        made_by: "test".into(),
        key: None,
        may_act: false,
    };
    for _ in 0..MAX_PORTAL_LINKS {
        ::console::create_portal_link(&js, link(project.api.project_id)).await.expect("a link");
    }
    assert_eq!(links_of(&stack, &project.api).await.len(), MAX_PORTAL_LINKS);

    let refused = ::console::create_portal_link(&js, link(project.api.project_id)).await;

    let error = refused.expect_err("too many links");
    assert!(matches!(error, ::console::PortalLinkError::TooMany(MAX_PORTAL_LINKS)), "{error}");
    ::console::create_portal_link(&js, link(other.project_id)).await.expect("a link of another project");
    assert_eq!(links_of(&stack, &other).await.len(), 1);
    let bucket = js.get_key_value(CONSOLE_LOGINS).await.expect("the bucket");
    assert_eq!(bucket.status().await.expect("a status").values(), MAX_PORTAL_LINKS as u64 + 1);
}
