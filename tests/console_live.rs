//! Live pages of the console: streams send the fragments that changed.

use contract::rpc::{ListKeys, RevokeKey};
use futures::future::join_all;
use reqwest::{
    Response, StatusCode,
    header::{ACCEPT, COOKIE},
};
use serde_json::{Value, json};
use test_support::eventually;
use tokio::time::timeout;

use crate::{
    console::{Console, project, signed_in},
    nats_permissions::stack_on,
    support::{Api, TEST_TIMEOUT, memory_kib},
};

/// The stream of a page, as a browser opens it.
struct Stream(Response);

impl Stream {
    async fn open(console: &Console, path: &str, cookie: &str, last: Option<&str>) -> Self {
        // A test may exceed the rate limit for pages.
        eventually(TEST_TIMEOUT, "the visitor may open a page", async || {
            let request = console.http.get(format!("{}{path}", console.url));
            // A stream lasts longer than any other response; each read of it has a deadline.
            let request = request.timeout(10 * TEST_TIMEOUT).header(ACCEPT, "text/event-stream").header(COOKIE, cookie);
            let request = last.iter().fold(request, |request, last| request.header("last-event-id", *last));
            let response = request.send().await.expect("an answer");
            if response.status() == StatusCode::TOO_MANY_REQUESTS { Err(response.status()) } else { Ok(Self(response)) }
        })
        .await
    }

    fn status(&self) -> StatusCode {
        self.0.status()
    }

    /// The id and the data of the next event, or `None` at the end.
    async fn next(&mut self) -> Option<(String, Value)> {
        let read = async {
            let mut text = String::new();
            while !text.ends_with("\n\n") {
                let chunk = self.0.chunk().await.ok().flatten()?;
                text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
            }
            let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).expect("a field").to_owned();
            Some((field("id: "), serde_json::from_str(&field("data: ")).expect("JSON")))
        };
        timeout(TEST_TIMEOUT, read).await.expect("an event in time")
    }

    /// The first event whose fragments contain a text.
    async fn until(&mut self, text: &str) -> (String, Value) {
        let read = async {
            loop {
                let event = self.next().await.expect("an event");
                if fragments(&event.1).iter().any(|html| html.contains(text)) {
                    return event;
                }
            }
        };
        timeout(TEST_TIMEOUT, read).await.expect("the fragment in time")
    }

    async fn end(mut self) {
        let read = async { while self.next().await.is_some() {} };
        timeout(TEST_TIMEOUT, read).await.expect("the end of the stream in time");
    }
}

fn fragments(event: &Value) -> Vec<&str> {
    event["fragments"].as_array().expect("fragments").iter().map(|html| html.as_str().expect("HTML")).collect()
}

#[tokio::test]
async fn a_stream_sends_the_fragments_that_change() {
    let (_stack, project, console, cookie) = signed_in().await;
    let lead = project.pages[2].clone();

    let mut stream = Stream::open(&console, &lead, &cookie, None).await;
    let (_, first) = stream.next().await.expect("an event");
    project.api.update(json!({"leadId": project.lead_id, "metadata": {"color": "teal"}})).await;
    let (id, changed) = stream.until("teal").await;

    let page = console.get(&lead, &cookie).await.text;
    assert!(page.contains(r#"id="live""#), "{page}");
    for html in fragments(&first) {
        assert!(html.contains("teal") || html.contains("data-live="), "{html}");
    }
    // The graph of the states is not sent again.
    assert!(fragments(&first).iter().any(|html| html.contains("<svg")));
    assert!(!fragments(&changed).iter().any(|html| html.contains("<svg")), "{changed}");
    // A browser that reconnects gets only the fragments that changed in the meantime.
    drop(stream);
    let mut stream = Stream::open(&console, &lead, &cookie, Some(&id)).await;
    let (_, resumed) = stream.next().await.expect("an event");
    assert!(!fragments(&resumed).iter().any(|html| html.contains("<svg") || html.contains("Metadata")), "{resumed}");
}

#[tokio::test]
async fn the_stream_of_a_settled_delivery_says_that_it_is_final() {
    let (_stack, project, console, cookie) = signed_in().await;

    let mut stream = Stream::open(&console, &project.delivery(), &cookie, None).await;

    let (_, last) = stream.next().await.expect("an event");
    assert_eq!(last["isFinal"], true, "{last}");
    assert!(stream.next().await.is_none());
    assert!(!console.get(&project.delivery(), &cookie).await.text.contains(r#"id="live""#));
}

#[tokio::test]
async fn streams_are_for_those_who_may_see_the_page_and_end_with_their_key() {
    let (stack, project, console, cookie) = signed_in().await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let foreign = console.sign_in_with(&other).await;
    let board = project.pages[0].clone();

    for page in &project.pages {
        assert_eq!(Stream::open(&console, page, &foreign, None).await.status(), StatusCode::NOT_FOUND, "{page}");
    }
    assert_eq!(Stream::open(&console, &board, "", None).await.status(), StatusCode::FORBIDDEN);
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(Stream::open(&console, &board, &cookie, None).await);
        assert_eq!(streams[streams.len() - 1].status(), StatusCode::OK);
    }
    let refused = Stream::open(&console, &board, &cookie, None).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE, "one stream too many for a session");

    let keys = stack.call(&ListKeys::of_project(project.api.project_id)).await.items;
    stack.call(&RevokeKey { key_id: keys[0].key_id, project_id: None }).await;

    for stream in streams {
        stream.end().await;
    }
}

#[tokio::test]
async fn streams_end_when_the_console_stops() {
    let (_stack, project, mut console, cookie) = signed_in().await;
    let mut stream = Stream::open(&console, &project.pages[0], &cookie, None).await;
    stream.next().await.expect("an event");

    assert!(console.service.terminate().await.success());

    stream.end().await;
    assert!(!console.service.log().contains("did not finish"), "{}", console.service.log());
}

#[tokio::test]
async fn two_hundred_live_pages_take_little_memory() {
    // A project may have half of all streams.
    const SESSIONS: [usize; 2] = [30, 20];
    const MOST_KIB: u64 = 64 * 1024;
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;
    let pages = [0, 8, 2, 12].map(|page: usize| project.pages[page].clone());
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let pages_of_other = ["", "/updates", "/leads", "/deliveries"].map(|page| format!("/p/{}{page}", other.project_id));
    let before = memory_kib(console.service.pid(), "VmRSS").expect("a process");

    let mut streams = Vec::new();
    for (sessions, api, pages) in [(SESSIONS[0], &project.api, pages), (SESSIONS[1], &other, pages_of_other)] {
        for session in 0..sessions {
            let cookie = console.sign_in_with(api).await;
            for page in &pages {
                // Pages with different parameters do not share a snapshot.
                let stream = Stream::open(&console, &format!("{page}?session={session}"), &cookie, None).await;
                assert_eq!(stream.status(), StatusCode::OK);
                streams.push(stream);
            }
        }
    }
    let events = join_all(streams.iter_mut().map(async |stream| {
        for _ in 0..3 {
            stream.next().await.expect("an event");
        }
    }));
    events.await;

    let peak = memory_kib(console.service.pid(), "VmHWM").expect("a process");
    println!("{} live pages: {before} KiB before, {peak} KiB at most", streams.len());
    assert_eq!(streams.len(), 200);
    assert!(peak < MOST_KIB, "{peak} KiB");
}
