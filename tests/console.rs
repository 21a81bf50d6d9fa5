//! The operator console, with its own user of NATS: who sees what, and what is refused.

use contract::{ObjectId, Timestamp, console::ConsoleLogin, rpc::RevokeKey, streams::CONSOLE_LOGINS};
use reqwest::{
    Method, StatusCode,
    header::{CONTENT_SECURITY_POLICY, COOKIE, LOCATION, ORIGIN, SET_COOKIE},
};
use secrets::api_key;
use serde_json::json;
use test_support::{Service, eventually, free_port};

use crate::{
    nats_permissions::{password, stack_on},
    support::{Api, Stack, TEST_TIMEOUT, process_id, service},
};

/// A console that runs, and a client of it.
struct Console {
    service: Service,
    url: String,
    http: reqwest::Client,
}

/// What the console answered.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    location: String,
    cookie: String,
    text: String,
}

impl Console {
    async fn start(stack: &Stack) -> Self {
        let listen = format!("127.0.0.1:{}", free_port());
        let nats_url = stack.nats.url_for("console", &password("console"));
        let extra = [("NATS_URL", nats_url.as_str()), ("CONSOLE_LISTEN", &listen)];
        let (mut service, ready) = service("console", &stack.nats, &stack.postgres, &extra);
        service.wait_for_http(&ready, TEST_TIMEOUT).await;
        Self { service, url: format!("http://{listen}"), http: test_support::http_client() }
    }

    async fn get(&self, path: &str, cookie: &str) -> Answer {
        self.send(self.http.get(format!("{}{path}", self.url)).header(COOKIE, cookie)).await
    }

    /// Sends a form from a page of this origin.
    async fn post(&self, path: &str, cookie: &str, origin: Option<&str>, form: &str) -> Answer {
        let request = self.http.request(Method::POST, format!("{}{path}", self.url)).header(COOKIE, cookie);
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form.to_owned());
        self.send(origin.into_iter().fold(request, |request, origin| request.header(ORIGIN, origin))).await
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

    /// Signs in with a form of the console's own; the cookie.
    async fn sign_in(&self, form: &str) -> String {
        let answer = self.post("/login", "", Some(&self.url), form).await;
        assert_eq!((answer.status, answer.location.as_str()), (StatusCode::SEE_OTHER, "/"), "{answer:?}");
        answer.cookie
    }

    /// Signs in with an API key, which a new console may not have read yet.
    async fn sign_in_with(&self, api: &Api) -> String {
        let form = format!("api_key={}", api.key);
        eventually(TEST_TIMEOUT, "the console knows the key", async || {
            let answer = self.post("/login", "", Some(&self.url), &form).await;
            if answer.status == StatusCode::SEE_OTHER { Ok(answer.cookie) } else { Err(answer.text) }
        })
        .await
    }
}

/// What a project has, and where its pages are.
struct Project {
    api: Api,
    lead_id: String,
    update_id: String,
    pages: Vec<String>,
}

/// A project with a process, a lead, an update and its delivery.
async fn project(stack: &Stack) -> Project {
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
    ];
    let pages = pages.map(|page| format!("{base}{page}")).to_vec();
    // The delivery is recorded after the receiver's answer.
    stack.wait_for_count(crate::support::DELIVERED, 1).await;
    Project { api, lead_id, update_id, pages }
}

#[tokio::test]
async fn every_page_is_shown_to_the_key_of_its_project() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;

    let cookie = console.sign_in_with(&project.api).await;

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
    let board = console.get(&own, &cookie).await;
    assert_eq!(board.status, StatusCode::OK, "{}", board.text);
    let foreign = format!("/p/{}", project.api.project_id);
    for page in &project.pages {
        assert_eq!(console.get(page, &cookie).await.status, StatusCode::NOT_FOUND, "{page}");
        // The ids of the other project below the own one.
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

    // Opening the link uses nothing up.
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

    let keys = stack.leadctl_of_project(&["key", "list", "--json"]).await.assert_ok().json();
    let key_id: ObjectId = keys[0]["keyId"].as_str().expect("an id").parse().expect("an id");
    stack.call(&RevokeKey { key_id }).await;

    eventually(TEST_TIMEOUT, "the session ends", async || {
        let answer = console.get(&board, &cookie).await;
        if answer.location.starts_with("/login?next=") { Ok(()) } else { Err(answer.text) }
    })
    .await;
}

#[tokio::test]
async fn a_panel_says_which_service_does_not_answer_while_the_page_is_shown() {
    let mut stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;
    let cookie = console.sign_in_with(&project.api).await;

    stack.notifier.terminate().await;

    let path = format!("/p/{}/updates/{}", project.api.project_id, project.update_id);
    let update = console.get(&path, &cookie).await;
    assert_eq!(update.status, StatusCode::OK);
    assert!(update.text.contains("webhook-notifier does not run."), "{}", update.text);
    assert!(update.text.contains("Decided and applied"), "{}", update.text);
}
