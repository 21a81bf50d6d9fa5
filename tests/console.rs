//! The operator console, with its own NATS user: which pages each session can see, and which requests are rejected.

use std::collections::BTreeSet;

use contract::{ObjectId, Timestamp, console::ConsoleLogin, replay::Replay, rpc::RevokeKey, streams::CONSOLE_LOGINS};
use futures::{StreamExt, future::join_all};
use reqwest::{
    Method, StatusCode,
    header::{CONTENT_SECURITY_POLICY, COOKIE, LOCATION, ORIGIN, SET_COOKIE},
};
use secrets::api_key;
use serde_json::json;
use service_kit::replay_note::write_replay_note;
use test_support::{Service, eventually, free_port};

use crate::{
    nats_permissions::{password, stack_on},
    support::{Api, Stack, TEST_TIMEOUT, create_key, process_id, service},
};

/// A running console, and an HTTP client for it.
pub(crate) struct Console {
    pub(crate) service: Service,
    pub(crate) url: String,
    pub(crate) http: reqwest::Client,
}

/// A response of the console.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) location: String,
    pub(crate) cookie: String,
    pub(crate) text: String,
}

impl Console {
    pub(crate) async fn start(stack: &Stack) -> Self {
        Self::start_at(stack, &stack.nats.url_for("console", &password("console"))).await
    }

    /// Starts a console that connects to this URL of NATS.
    pub(crate) async fn start_at(stack: &Stack, nats_url: &str) -> Self {
        let listen = format!("127.0.0.1:{}", free_port());
        let gateway = stack.api.url.as_str();
        let extra = [("NATS_URL", nats_url), ("CONSOLE_LISTEN", &listen), ("LEADRELAY_GATEWAY_URL", gateway)];
        let (mut service, ready) = service("console", &stack.nats, &stack.postgres, &extra);
        service.wait_for_http(&ready, TEST_TIMEOUT).await;
        Self { service, url: format!("http://{listen}"), http: test_support::http_client() }
    }

    pub(crate) async fn get(&self, path: &str, cookie: &str) -> Answer {
        // A test may exceed the rate limit for pages.
        eventually(TEST_TIMEOUT, "the visitor may open a page", async || {
            let answer = self.send(self.http.get(format!("{}{path}", self.url)).header(COOKIE, cookie)).await;
            if answer.status == StatusCode::TOO_MANY_REQUESTS { Err(answer.text) } else { Ok(answer) }
        })
        .await
    }

    /// The text of a page, once it contains this part.
    async fn wait_for(&self, path: &str, cookie: &str, part: &str) -> String {
        eventually(TEST_TIMEOUT, part, async || {
            let page = self.get(path, cookie).await.text;
            if page.contains(part) { Ok(page) } else { Err(page) }
        })
        .await
    }

    /// Sends a form from a page of this origin.
    pub(crate) async fn post(&self, path: &str, cookie: &str, origin: Option<&str>, form: &str) -> Answer {
        eventually(TEST_TIMEOUT, "the visitor may send a form", async || {
            let request = self.http.request(Method::POST, format!("{}{path}", self.url)).header(COOKIE, cookie);
            let request = request.header("content-type", "application/x-www-form-urlencoded").body(form.to_owned());
            let answer =
                self.send(origin.into_iter().fold(request, |request, origin| request.header(ORIGIN, origin))).await;
            if answer.status == StatusCode::TOO_MANY_REQUESTS { Err(answer.text) } else { Ok(answer) }
        })
        .await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.expect("an answer");
        let header = |name| {
            let value = response.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
            value.unwrap_or_default()
        };
        assert!(
            header(CONTENT_SECURITY_POLICY).starts_with("default-src 'none'; script-src 'self'; style-src 'self';")
        );
        Answer {
            status: response.status(),
            location: header(LOCATION),
            cookie: header(SET_COOKIE).split(';').next().unwrap_or_default().to_owned(),
            text: response.text().await.expect("text"),
        }
    }

    /// Signs in with a form from the console's origin, and returns the cookie.
    pub(crate) async fn sign_in(&self, form: &str) -> String {
        let answer = self.post("/login", "", Some(&self.url), form).await;
        assert_eq!((answer.status, answer.location.as_str()), (StatusCode::SEE_OTHER, "/"), "{answer:?}");
        answer.cookie
    }

    pub(crate) async fn sign_in_as_operator(&self, stack: &Stack) -> String {
        self.sign_in_as("operator", stack).await
    }

    /// Signs in with a link of leadctl for this role, and returns the cookie.
    pub(crate) async fn sign_in_as(&self, role: &str, stack: &Stack) -> String {
        let link = stack.leadctl(&["console", "token", "--role", role, "--url", &self.url]).await.assert_ok().stdout;
        let (_, token) = link.trim().split_once("/login?").expect("a link");
        self.sign_in(token).await
    }

    /// Signs in with an API key, which a new console may not have read yet.
    pub(crate) async fn sign_in_with(&self, api: &Api) -> String {
        let form = format!("api_key={}", api.key);
        eventually(TEST_TIMEOUT, "the console knows the key", async || {
            let answer = self.post("/login", "", Some(&self.url), &form).await;
            if answer.status == StatusCode::SEE_OTHER { Ok(answer.cookie) } else { Err(answer.text) }
        })
        .await
    }
}

/// The objects of a project, and the paths of its pages.
pub(crate) struct Project {
    pub(crate) api: Api,
    pub(crate) lead_id: String,
    pub(crate) update_id: String,
    pub(crate) pages: Vec<String>,
}

/// A project with a process, a lead, an update and its delivery.
pub(crate) async fn project(stack: &Stack) -> Project {
    let applied = stack.process_calling(&["crm"]).await;
    let api = stack.api.clone();
    let lead_id = api.initiate(process_id(&applied), Some("R-1")).await;
    let update_id = api.update(json!({"leadId": lead_id, "targetState": "interested"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let base = format!("/p/{}", api.project_id);
    let pages = [
        String::new(),
        "/leads".into(),
        format!("/leads/{lead_id}"),
        format!("/updates/{update_id}"),
        "/deliveries".into(),
        "/deliveries?status=delivered".into(),
        format!("/deliveries/{update_id}-{callback_id}"),
        "/callbacks".into(),
        format!("/callbacks/{callback_id}"),
        "/processes".into(),
        format!("/processes/{}", process_id(&applied)),
        "/calls".into(),
        "/updates".into(),
        "/updates?status=succeeded".into(),
        "/keys".into(),
        format!("/callbacks/{callback_id}/share"),
        format!("/processes/{}/share", process_id(&applied)),
    ];
    let pages = pages.map(|page| format!("{base}{page}")).to_vec();
    // The delivery is recorded after the receiver's answer.
    stack.wait_for_count(crate::support::DELIVERED, 1).await;
    Project { api, lead_id, update_id, pages }
}

/// A stack with a project, a console, and the cookie of a session with the project's key.
pub(crate) async fn signed_in() -> (Stack, Project, Console, String) {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_with(&project.api).await;
    (stack, project, console, cookie)
}

#[tokio::test]
async fn every_page_is_shown_to_the_key_of_its_project() {
    let (_stack, project, console, cookie) = signed_in().await;

    for page in &project.pages {
        let answer = console.get(page, &cookie).await;
        assert_eq!(answer.status, StatusCode::OK, "{page}: {}", answer.text);
        assert!(!answer.text.contains("class=\"notice\""), "{page}: {}", answer.text);
    }
    let update = console.get(&format!("/p/{}/updates/{}", project.api.project_id, project.update_id), &cookie).await;
    for part in ["Decided and applied", "new → interested", "delivered", project.lead_id.as_str()] {
        assert!(update.text.contains(part), "{part}: {}", update.text);
    }
    let lead = console.get(&format!("/go/{}", project.lead_id), &cookie).await;
    assert_eq!(lead.location, format!("/p/{}/leads/{}", project.api.project_id, project.lead_id));
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn another_project_does_not_exist_for_a_key() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let console = Console::start(&stack).await;

    let cookie = console.sign_in_with(&other).await;

    let own = format!("/p/{}", other.project_id);
    assert_eq!(console.get("/", &cookie).await.location, own);
    for page in ["/system", "/system/dead-letters/1"] {
        assert_eq!(console.get(page, &cookie).await.status, StatusCode::NOT_FOUND, "{page}");
    }
    let board = console.get(&own, &cookie).await;
    assert_eq!(board.status, StatusCode::OK, "{}", board.text);
    let foreign = format!("/p/{}", project.api.project_id);
    for page in &project.pages {
        assert_eq!(console.get(page, &cookie).await.status, StatusCode::NOT_FOUND, "{page}");
        // The ids of the other project, in paths of the session's own project.
        let below_own = page.replace(&foreign, &own);
        if below_own.len() > own.len() + "/deliveries?status=delivered".len() {
            assert_eq!(console.get(&below_own, &cookie).await.status, StatusCode::NOT_FOUND, "{below_own}");
        }
        assert_eq!(console.get(page, "").await.status, StatusCode::SEE_OTHER, "{page} without a session");
    }
    for id in [&project.lead_id, &project.update_id] {
        assert_eq!(console.get(&format!("/go/{id}"), &cookie).await.status, StatusCode::NOT_FOUND, "{id}");
    }
}

#[tokio::test]
async fn a_login_link_signs_in_once_and_until_it_expires() {
    let stack = stack_on(None).await;
    let console = Console::start(&stack).await;
    let link = stack.leadctl(&["console", "token", "--url", &console.url]).await.assert_ok().stdout.trim().to_owned();
    let (_, token) = link.split_once("/login?token=").expect("a link");

    // Opening the link does not use it up.
    for _ in 0..2 {
        let form = console.get(&format!("/login?token={token}"), "").await;
        assert!(form.text.contains(token) && form.cookie.is_empty(), "{form:?}");
    }
    let cookie = console.sign_in(&format!("token={token}")).await;
    let projects = console.get("/", &cookie).await;
    assert!(projects.text.contains(&stack.api.project_id.to_string()), "{}", projects.text);
    let board = console.get(&format!("/p/{}", stack.api.project_id), &cookie).await;
    assert_eq!(board.status, StatusCode::OK, "{}", board.text);
    let expired = format!("lrc_{}", "0".repeat(64));
    let login = ConsoleLogin { expires_at: Timestamp::from_millis(1) };
    let bucket = stack.js().get_key_value(CONSOLE_LOGINS).await.expect("the bucket");
    let entry = serde_json::to_vec(&login).expect("JSON");
    bucket.create(api_key::hash(&expired), entry.into()).await.expect("an entry");
    for refused in [token, &expired, "lrc_1", &"lrc_1".repeat(17)] {
        let answer = console.post("/login", "", Some(&console.url), &format!("token={refused}")).await;
        assert_eq!((answer.status, answer.cookie.as_str()), (StatusCode::FORBIDDEN, ""), "{refused}: {}", answer.text);
    }
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn guesses_of_links_have_a_rate_and_api_keys_still_sign_in() {
    let stack = stack_on(None).await;
    let console = Console::start(&stack).await;

    let guesses = join_all((0..300).map(async |n| {
        let request = console.http.post(format!("{}/login", console.url)).header(ORIGIN, &console.url);
        console.send(request.body(format!("token=lrp_{n:0>80}"))).await.status.as_u16()
    }));
    let statuses: BTreeSet<_> = guesses.await.into_iter().collect();

    assert_eq!(statuses, BTreeSet::from([403, 429]));
    console.sign_in_with(&stack.api).await;
}

#[tokio::test]
async fn forms_of_other_sites_and_sessions_are_refused() {
    let stack = stack_on(None).await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_with(&stack.api).await;
    let form = format!("api_key={}", stack.api.key);

    for origin in [None, Some("https://evil.example"), Some("null")] {
        let answer = console.post("/login", "", origin, &form).await;
        assert_eq!((answer.status, answer.cookie.as_str()), (StatusCode::FORBIDDEN, ""), "{origin:?}");
    }
    for form in ["", "form_token=00000000000000000000000000000000"] {
        let answer = console.post("/logout", &cookie, Some(&console.url), form).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{form}: {}", answer.text);
    }
    let board = console.get(&format!("/p/{}", stack.api.project_id), &cookie).await;
    let (_, rest) = board.text.split_once(r#"name="form_token" value=""#).expect("a form token");
    let token = rest.split('"').next().expect("a value");
    let ended = console.post("/logout", &cookie, Some(&console.url), &format!("form_token={token}")).await;
    assert_eq!((ended.location.as_str(), ended.cookie.as_str()), ("/login", "leadrelay="), "{ended:?}");
}

#[tokio::test]
async fn a_revoked_key_ends_its_sessions() {
    let stack = stack_on(None).await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_with(&stack.api).await;
    let board = format!("/p/{}", stack.api.project_id);
    assert_eq!(console.get(&board, &cookie).await.status, StatusCode::OK);

    let keys = stack.leadctl_of_project(&["key", "list", "--json"]).await.assert_ok().json_lines();
    let key_id: ObjectId = keys[0]["keyId"].as_str().expect("an id").parse().expect("an id");
    stack.call(&RevokeKey { key_id, project_id: None }).await;

    eventually(TEST_TIMEOUT, "the session ends", async || {
        let answer = console.get(&board, &cookie).await;
        if answer.location.starts_with("/login?next=") { Ok(()) } else { Err(answer.text) }
    })
    .await;
}

#[tokio::test]
async fn a_panel_says_which_service_does_not_answer_while_the_page_is_shown() {
    let (mut stack, project, console, cookie) = signed_in().await;

    stack.notifier.terminate().await;

    let path = format!("/p/{}/updates/{}", project.api.project_id, project.update_id);
    let update = console.get(&path, &cookie).await;
    assert_eq!(update.status, StatusCode::OK);
    assert!(update.text.contains("webhook-notifier is not running."), "{}", update.text);
    assert!(update.text.contains("Decided and applied"), "{}", update.text);
}

#[tokio::test]
async fn the_board_shows_rates_and_lags_and_its_numbers_lead_to_their_lists() {
    let (_stack, project, console, cookie) = signed_in().await;

    let board = format!("/p/{}?range=1h", project.api.project_id);
    let board = console.wait_for(&board, &cookie, "Announce lag</dt><dd>0 ms").await;

    for fact in ["Accepted and applied", "Delivered", "per second", "Oldest pending delivery", "Apply lag</dt><dd>0 ms"]
    {
        assert!(board.contains(fact), "{fact}: {board}");
    }
    let lists: Vec<_> = board.split(r#"<a href=""#).skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let lists: Vec<_> = lists.into_iter().filter(|path| path.contains("?status=") || path.contains("?from=")).collect();
    assert!(lists.len() > 5, "{lists:?}");
    for path in lists {
        let list = console.get(&path.replace("&amp;", "&"), &cookie).await;
        assert_eq!(list.status, StatusCode::OK, "{path}: {}", list.text);
        let has_rows = list.text.contains("<tbody><tr>");
        assert_eq!(
            has_rows,
            !(path.contains("failed") || path.contains("exhausted") || path.contains("pending")),
            "{path}"
        );
    }
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn the_system_page_lists_every_stream_and_keys_are_listed_page_by_page() {
    let stack = stack_on(None).await;
    let console = Console::start(&stack).await;
    let project_id = stack.api.project_id;
    for number in 0..60 {
        stack.call(&create_key(project_id, &format!("key-{number}"), &number.to_string())).await;
    }
    let operator = console.sign_in_as_operator(&stack).await;

    let system = console.get("/system", &operator).await.text;
    let first = console.get(&format!("/p/{project_id}/keys"), &operator).await.text;

    let streams: Vec<String> = stack.js().stream_names().map(|name| name.expect("a name")).collect().await;
    assert!(streams.len() >= 9, "{streams:?}");
    for stream in streams {
        assert!(system.contains(&format!("<td>{stream}</td>")), "{stream}: {system}");
    }
    let (_, rest) = first.split_once(r#"<a rel="next" href=""#).expect("a next page");
    let next = rest.split('"').next().expect("a URL").replace("&amp;", "&");
    let second = console.get(&next, &operator).await.text;
    let shown =
        |page: &str| (0..60).filter(|number| page.contains(&format!("<td>key-{number}</td>"))).collect::<BTreeSet<_>>();
    let (of_first, of_second) = (shown(&first), shown(&second));
    assert!(of_first.is_disjoint(&of_second), "{of_first:?} {of_second:?}");
    assert_eq!(of_first.len() + of_second.len(), 60);
    assert_eq!(first.matches("/revoke").count(), 50);
    assert!(!second.contains(r#"rel="next""#), "{second}");
    // The page of a key beyond the first page.
    let (_, rest) = second.rsplit_once(&format!("/p/{project_id}/keys/")).expect("a link");
    let revoke = format!("/p/{project_id}/keys/{}/revoke", rest.split('/').next().expect("an id"));
    let (_, row) = second.rsplit_once("<tr><td>").expect("a row");
    let name = row.split('<').next().expect("a name");
    assert!(console.get(&revoke, &operator).await.text.contains(&format!("<dt>Key</dt><dd>{name}</dd>")), "{name}");
}

/// The form token of a page.
pub(crate) fn form_token(page: &Answer) -> String {
    hidden(page, "form_token")
}

/// The last hidden field of this name on a page.
pub(crate) fn hidden(page: &Answer, name: &str) -> String {
    let (_, rest) = page.text.rsplit_once(&format!(r#"name="{name}" value=""#)).expect("a hidden field");
    rest.split('"').next().expect("a value").to_owned()
}

impl Console {
    /// Opens the page of an action, and sends its form with these fields.
    pub(crate) async fn act(&self, path: &str, cookie: &str, fields: &str) -> Answer {
        let page = self.get(path, cookie).await;
        assert_eq!(page.status, StatusCode::OK, "{}", page.text);
        let form = format!("form_token={}&{fields}", form_token(&page));
        self.post(path, cookie, Some(&self.url), &form).await
    }
}

impl Project {
    pub(crate) fn delivery(&self) -> String {
        self.pages[6].clone()
    }

    fn delivery_id(&self) -> String {
        self.delivery().rsplit('/').next().expect("an id").to_owned()
    }

    pub(crate) fn callback(&self) -> String {
        self.pages[8].clone()
    }

    pub(crate) fn lead(&self) -> String {
        self.pages[2].clone()
    }

    /// The path of a route of the console, with the ids of this project.
    pub(crate) fn fill(&self, route: &str) -> String {
        let last = |page: String| page.rsplit('/').next().expect("an id").to_owned();
        let ids = [
            ("{project}", self.api.project_id.to_string()),
            ("{callback}", last(self.callback())),
            ("{delivery}", last(self.delivery())),
            ("{process}", last(self.pages[10].clone())),
            ("{lead}", self.lead_id.clone()),
            ("{update}", self.update_id.clone()),
            ("{id}", self.lead_id.clone()),
        ];
        ids.iter().fold(route.to_owned(), |route, (name, id)| route.replace(name, id))
    }

    /// A session of a key with these scopes.
    pub(crate) async fn session_with(&self, stack: &Stack, console: &Console, scopes: &str) -> String {
        let project_id = self.api.project_id.to_string();
        let args = ["key", "create", "--project", &project_id, "--name", "some", "--scope", scopes, "--json"];
        let created = stack.leadctl(&args).await.assert_ok().json();
        let key = created["apiKey"].as_str().expect("a key").to_owned();
        console.sign_in_with(&Api { key, ..self.api.clone() }).await
    }
}

#[tokio::test]
async fn actions_go_through_the_gateway_with_the_key_of_the_session() {
    let (stack, project, mut console, cookie) = signed_in().await;

    let redelivered = console.act(&format!("{}/redeliver", project.delivery()), &cookie, "").await;
    assert_eq!(redelivered.location, project.delivery(), "{}", redelivered.text);
    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    assert_eq!(requests[0].header("webhook-id"), requests[1].header("webhook-id"));
    let tested = console.act(&format!("{}/test", project.callback()), &cookie, "").await;
    assert!(tested.text.contains("accepted"), "{}", tested.text);
    let rotated = console.act(&format!("{}/rotate-secret", project.callback()), &cookie, "hours=1").await;
    assert!(rotated.text.contains("whsec_"), "{}", rotated.text);
    let enabled = console.act(&format!("{}/enable", project.callback()), &cookie, "").await;
    assert_eq!(enabled.location, project.callback(), "{}", enabled.text);

    for action in ["redeliver", "test callback", "rotate secret", "enable callback"] {
        let line = console.service.wait_for_log(&format!("action {action}: done"), TEST_TIMEOUT).await;
        for part in ["key test ", "before", "after", &project.api.project_id.to_string()] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
    assert!(!console.service.log().contains("whsec_") && !console.service.log().contains(&project.api.key));
}

#[tokio::test]
async fn selected_deliveries_are_counted_then_repeated_and_so_are_those_of_a_callback() {
    let (stack, project, console, cookie) = signed_in().await;
    let list = console.get(&project.pages[4], &cookie).await;
    let id = project.delivery().rsplit('/').next().expect("an id").to_owned();
    assert!(list.text.contains(&format!(r#"type="checkbox" name="delivery" value="{id}""#)), "{}", list.text);

    let path = format!("/p/{}/deliveries/redeliver", project.api.project_id);
    let counted = console.get(&format!("{path}?delivery={id}"), &cookie).await;
    assert!(counted.text.contains("1 delivery is sent again"), "{}", counted.text);
    let form = format!("form_token={}&delivery={id}&delivery={id}", form_token(&counted));
    let repeated = console.post(&path, &cookie, Some(&console.url), &form).await;
    assert!(repeated.text.contains("1 of 1 are sent again"), "{}", repeated.text);
    stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let none = console.get(&path, &cookie).await;
    assert_eq!(none.status, StatusCode::BAD_REQUEST, "{}", none.text);

    stack.wait_for_count(crate::support::DELIVERED, 1).await;
    let path = format!("{}/recover", project.callback());
    let counted = console.get(&format!("{path}?status=delivered&per_second=100"), &cookie).await;
    assert!(counted.text.contains("<dt>Deliveries</dt><dd>1</dd>"), "{}", counted.text);
    let since = hidden(&counted, "since").replace(':', "%3A");
    let form = format!("form_token={}&since={since}&status=delivered&per_second=100", form_token(&counted));
    let recovered = console.post(&path, &cookie, Some(&console.url), &form).await;
    assert!(recovered.text.contains("1 deliveries"), "{}", recovered.text);
    stack.receiver.wait_for_requests("/crm", 3, TEST_TIMEOUT).await;
}

#[tokio::test]
async fn a_call_is_ended_with_a_form() {
    let (_stack, project, console, cookie) = signed_in().await;
    let started = json!({"leadId": project.lead_id, "callId": "call 7"});
    crate::support::assert_ok(project.api.post("/api/v1/calls/started", &started).await);
    let calls = format!("/p/{}/calls", project.api.project_id);
    console.wait_for(&calls, &cookie, "call 7").await;

    let path = format!("{}/end-call", project.lead());
    let page = console.get(&format!("{path}?call=call+7"), &cookie).await;
    assert!(page.text.contains("that end: 1."), "{}", page.text);
    let fields =
        format!("form_token={}&idempotency_key={}&call=call+7", form_token(&page), hidden(&page, "idempotency_key"));
    let ended = console.post(&path, &cookie, Some(&console.url), &fields).await;

    assert!(ended.location.contains("/updates/"), "{}", ended.text);
    console.wait_for(&calls, &cookie, "No call is in progress.").await;
    let again = console.get(&format!("{path}?call=call+7"), &cookie).await;
    assert_eq!(again.status, StatusCode::NOT_FOUND, "{}", again.text);
}

#[tokio::test]
async fn a_key_is_revoked_with_a_form() {
    let (stack, project, mut console, cookie) = signed_in().await;
    let args = ["key", "create", "--name", "leaked", "--scope", "leads:read", "--json"];
    let created = stack.leadctl_of_project(&args).await.assert_ok().json();
    let (key_id, text) = (created["keyId"].as_str().expect("an id"), created["apiKey"].as_str().expect("a key"));
    let keys = format!("/p/{}/keys", project.api.project_id);
    let path = format!("{keys}/{key_id}/revoke");
    let listed = console.get(&keys, &cookie).await.text;
    assert!(listed.contains("leaked") && listed.contains(&path) && !listed.contains(text), "{listed}");

    let viewer = project.session_with(&stack, &console, "config:read").await;
    let confirmation = console.get(&path, &viewer).await;
    assert!(
        confirmation.text.contains("needs an API key of this project with the scope config:write"),
        "{confirmation:?}"
    );
    let revoked = console.act(&path, &cookie, "").await;

    assert_eq!(revoked.location, keys, "{}", revoked.text);
    let listed = console.get(&keys, &cookie).await.text;
    assert!(listed.contains("revoked</span>") && !listed.contains(&path), "{listed}");
    let leaked = Api { key: text.to_owned(), ..project.api.clone() };
    eventually(TEST_TIMEOUT, "the gateway refuses the key", async || leaked.get("/api/v1/leads").await.0 == 401).await;
    let line = console.service.wait_for_log("action revoke key: done", TEST_TIMEOUT).await;
    assert!(line.contains(key_id) && line.contains("leads:read"), "{line}");
}

#[tokio::test]
async fn an_update_is_previewed_then_sent_once_and_not_after_the_lead_has_changed() {
    let (_stack, project, console, cookie) = signed_in().await;
    let path = format!("{}/update", project.lead());
    let entered = "metadata=%7B%22budget%22%3A123456789012345678901234567890%7D";

    let preview = console.act(&path, &cookie, &format!("step=preview&{entered}")).await;
    assert!(preview.text.contains("would succeed"), "{}", preview.text);
    assert!(!project.api.lead(&project.lead_id).await.to_string().contains("budget"));
    let send = format!(
        "step=send&idempotency_key={}&version={}&{entered}",
        hidden(&preview, "idempotency_key"),
        hidden(&preview, "version")
    );
    let sent = console.act(&path, &cookie, &send).await;
    let again = console.act(&path, &cookie, &send).await;

    assert!(sent.location.contains("/updates/"), "{}", sent.text);
    assert_eq!(sent.location, again.location, "{}", again.text);
    let timeline = console.get(&sent.location, &cookie).await;
    for part in ["123456789012345678901234567890", "console: key test"] {
        assert!(timeline.text.contains(part), "{part}: {}", timeline.text);
    }
    let stale = send.replace("idempotency_key=", "idempotency_key=1");
    let refused = console.act(&path, &cookie, &stale).await;
    let refused = if refused.location.is_empty() { refused } else { console.get(&refused.location, &cookie).await };
    assert!(refused.text.contains("version_mismatch"), "{}", refused.text);
    let invalid = console.act(&path, &cookie, "step=preview&metadata=%5B1%5D").await;
    assert!(invalid.text.contains("Metadata must be a JSON object"), "{}", invalid.text);
}

#[tokio::test]
async fn an_action_needs_its_own_form_and_a_key_with_its_scope() {
    let (stack, project, mut console, cookie) = signed_in().await;
    let path = format!("{}/redeliver", project.delivery());
    let token = form_token(&console.get(&path, &cookie).await);

    let own = Some(console.url.clone());
    let own = own.as_deref();
    for (origin, form) in [
        (own, String::new()),
        (own, "form_token=0".into()),
        (Some("https://evil.example"), format!("form_token={token}")),
        (None, format!("form_token={token}")),
    ] {
        let answer = console.post(&path, &cookie, origin, &form).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{origin:?} {form}: {}", answer.text);
    }
    let anonymous = console.post(&path, "", own, &format!("form_token={token}")).await;
    assert!(anonymous.location.starts_with("/login"), "{anonymous:?}");
    let viewer = project.session_with(&stack, &console, "leads:read").await;
    let page = console.get(&path, &viewer).await;
    assert!(page.text.contains("needs an API key of this project with the scope leads:write"), "{}", page.text);
    let refused = console.post(&path, &viewer, own, &format!("form_token={}", form_token(&page))).await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN, "{}", refused.text);
    let line = console.service.wait_for_log("action redeliver: not done", TEST_TIMEOUT).await;
    assert!(line.contains("key some ") && line.contains("leads:write"), "{line}");
    let other_session = console.post(&path, &viewer, own, &format!("form_token={token}")).await;
    assert_eq!(other_session.status, StatusCode::FORBIDDEN, "{}", other_session.text);
    assert_eq!(stack.receiver.requests().len(), 1);
}

#[tokio::test]
async fn actions_on_another_projects_objects_do_not_exist() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_with(&other).await;
    let board = console.get(&format!("/p/{}", other.project_id), &cookie).await;
    let form = format!("form_token={}&hours=1&step=preview&state=won", form_token(&board));

    let (delivery, callback, lead) = (project.delivery(), project.callback(), project.lead());
    let actions = [
        format!("{delivery}/redeliver"),
        format!("{callback}/test"),
        format!("{callback}/enable"),
        format!("{callback}/rotate-secret"),
        format!("{callback}/recover"),
        format!("{lead}/update"),
        format!("{lead}/end-call"),
    ];
    for foreign in &actions {
        let below_own = foreign.replace(&project.api.project_id.to_string(), &other.project_id.to_string());
        for path in [foreign, &below_own] {
            assert_eq!(console.get(path, &cookie).await.status, StatusCode::NOT_FOUND, "{path}");
            let sent = console.post(path, &cookie, Some(&console.url), &form).await;
            assert_eq!(sent.status, StatusCode::NOT_FOUND, "{path}: {}", sent.text);
        }
    }
    assert_eq!(stack.receiver.requests().len(), 1);
}

#[tokio::test]
async fn an_operator_sees_services_streams_and_dead_letters() {
    let mut stack = stack_on(None).await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_as_operator(&stack).await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{\"broken\": <b>").await;
    let letters = stack.wait_for_letters(1).await;

    let system = console.get("/system", &cookie).await;

    for part in ["webhook-notifier", "lead-state", "LEAD_COMMANDS", "Entries not applied yet", "invalid_json"] {
        assert!(system.text.contains(part) && !system.text.contains("class=\"notice\""), "{part}: {}", system.text);
    }
    assert!(!system.text.contains("does not answer"), "{}", system.text);
    let number = letters[0]["number"].as_u64().expect("a number");
    let letter = console.get(&format!("/system/dead-letters/{number}"), &cookie).await;
    for part in ["not replayed", "{&quot;broken&quot;: &lt;b&gt;", &format!("leadctl dead-letters replay {number}")] {
        assert!(letter.text.contains(part), "{part}: {}", letter.text);
    }
    let none = console.get("/system/dead-letters/999", &cookie).await;
    assert_eq!(none.status, StatusCode::NOT_FOUND, "{}", none.text);
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());

    stack.nats.stop().await.expect("stopped");
    let system = console.wait_for("/system", &cookie, "The console has lost its connection to NATS.").await;
    assert!(!system.contains("does not answer"), "{system}");
}

#[tokio::test]
async fn a_dead_letter_is_listed_behind_many_notes_about_its_replay() {
    let stack = stack_on(None).await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_as_operator(&stack).await;
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    let number = stack.wait_for_letters(1).await[0]["number"].as_u64().expect("a number");
    let mut last = 0;
    for _ in 0..60 {
        last = write_replay_note(&stack.js(), number, last, Replay::NotSent).await.expect("a note");
    }

    let system = console.get("/system", &cookie).await.text;

    assert!(system.contains(&format!(r#"href="/system/dead-letters/{number}""#)), "{system}");
    assert!(system.contains("a replay was refused"), "{system}");
}

#[tokio::test]
async fn an_id_leads_to_its_page_although_another_project_may_have_a_pending_update_with_it() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let unknown_lead = json!({"leadId": "0123456789abcdef01234567", "metadata": {"n": 1}});
    let update_id = other.update(unknown_lead).await;
    other.outcome(&update_id).await;
    let console = Console::start(&stack).await;
    let operator = console.sign_in_as_operator(&stack).await;
    let mut lock = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM lead_state.checkpoints FOR UPDATE").execute(&mut *lock).await.expect("the checkpoint");
    project.api.update(json!({"leadId": project.lead_id, "metadata": {"n": 1}})).await;
    let assumed = console.get(&format!("/p/{}/updates/{update_id}", project.api.project_id), &operator).await;
    assert!(assumed.text.contains("pending"), "{}", assumed.text);

    let found = console.get(&format!("/go/{update_id}"), &operator).await;

    assert_eq!(found.location, format!("/p/{}/updates/{update_id}", other.project_id), "{}", found.text);
    lock.rollback().await.expect("a rollback");
}

#[tokio::test]
async fn an_operator_adds_a_key_to_act_and_stays_an_operator() {
    // Waits until the console accepts the key, by signing in with it.
    let (stack, project, console, _) = signed_in().await;
    let operator = console.sign_in_as_operator(&stack).await;
    let path = format!("{}/redeliver", project.delivery());

    // The login form keeps the query parameters of the page.
    let selected = format!("/p/{}/deliveries/redeliver?delivery={}", project.api.project_id, project.delivery_id());
    let mut page = console.get(&selected, &operator).await;
    assert!(page.text.contains("needs an API key of this project"), "{}", page.text);
    let key = project.api.key.as_str();
    // After a mistyped key, the form is shown again.
    for (key, status) in [("mistyped", StatusCode::FORBIDDEN), (key, StatusCode::SEE_OTHER)] {
        let next = hidden(&page, "next").replace('/', "%2F").replace('?', "%3F").replace('=', "%3D");
        let form = format!("form_token={}&next={next}&api_key={key}", form_token(&page));
        page = console.post("/login", &operator, Some(&console.url), &form).await;
        assert_eq!(page.status, status, "{}", page.text);
    }
    let added = page;
    assert_eq!(added.location, selected, "{}", added.text);

    let projects = console.get("/", &added.cookie).await;
    assert!(projects.text.contains("operator with key test"), "{}", projects.text);
    let done = console.act(&path, &added.cookie, "").await;
    assert_eq!(done.location, project.delivery(), "{}", done.text);
}

#[tokio::test]
async fn an_operator_corrects_a_dead_letter_and_replays_it_once() {
    let (stack, project, console, _) = signed_in().await;
    let operator = console.sign_in_as_operator(&stack).await;
    let body = format!("{{\"leadId\":\"{}\",\"name\":\"Ada\"", project.lead_id);
    stack.publish(format!("leads.cmd.{}.update", project.api.project_id), body.clone()).await;
    let number = stack.wait_for_letters(1).await[0]["number"].as_u64().expect("a number");
    let letter = format!("/system/dead-letters/{number}");
    let path = format!("{letter}/replay");
    let page = console.get(&path, &operator).await;
    let form = format!("form_token={}&next=%2F&api_key={}", form_token(&page), project.api.key);
    let operator = console.post("/login", &operator, Some(&console.url), &form).await.cookie;
    let with = |body: &str| format!("body={}", body.replace('{', "%7B").replace('}', "%7D"));

    let refused = console.act(&path, &operator, &with(&body)).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.text);
    assert!(console.get(&letter, &operator).await.text.contains("a replay was refused"));
    let done = console.act(&path, &operator, &with(&format!("{body}}}"))).await;

    assert!(done.location.starts_with(&format!("/p/{}/updates/", project.api.project_id)), "{done:?}");
    assert_eq!(stack.api.lead(&project.lead_id).await["name"], "Ada");
    assert!(console.get(&letter, &operator).await.text.contains("replayed as entry"));
    assert_eq!(console.get(&path, &operator).await.status, StatusCode::BAD_REQUEST);
    let again = stack.leadctl(&["dead-letters", "replay", &number.to_string()]).await;
    assert!(again.stderr.contains("already replayed"), "{again:?}");
    stack.wait_for_clean_audit().await;
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn operators_see_how_many_messages_are_not_applied() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;
    let operator = console.sign_in_as_operator(&stack).await;
    let of_key = console.sign_in_with(&project.api).await;
    let board = format!("/p/{}", project.api.project_id);
    let mut lock = stack.pool.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM lead_state.checkpoints FOR UPDATE").execute(&mut *lock).await.expect("the checkpoint");

    for _ in 0..3 {
        project.api.update(json!({"leadId": project.lead_id, "metadata": {"n": 1}})).await;
    }

    let expected = "<dt>Not applied yet</dt><dd>3 messages of all projects in the log</dd>";
    eventually(TEST_TIMEOUT, "three messages wait", async || {
        let board = console.get(&board, &operator).await.text;
        if board.contains(expected) { Ok(()) } else { Err(board) }
    })
    .await;
    assert!(!console.get(&board, &of_key).await.text.contains("Not applied yet"));
    lock.rollback().await.expect("a rollback");
}
