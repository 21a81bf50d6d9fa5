//! The receiver replies by its script and records all requests; `eventually`.
#![expect(clippy::unwrap_used, reason = "clippy sees no test in the functions that tests share")]

use std::time::{Duration, Instant};
use test_support::{Receiver, Reply, eventually, http_client};

const TEST_TIMEOUT: Duration = Duration::from_secs(5);

async fn status(url: &str) -> u16 {
    http_client().get(url).send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn requests_are_recorded_unchanged() {
    let receiver = Receiver::start().await;
    let post = http_client().post(receiver.url("/hook?a=1")).header("X-Mark", "here").body("{\"b\": 1.50}").send();
    let response = post.await.unwrap();
    assert_eq!((response.status().as_u16(), &*response.bytes().await.unwrap()), (200, &b""[..]));

    let requests = receiver.requests_to("/hook");
    let [request] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((request.method.as_str(), request.path(), request.uri.query()), ("POST", "/hook", Some("a=1")));
    assert_eq!((request.header("x-mark"), &request.body[..]), (Some("here"), &b"{\"b\": 1.50}"[..]));
    assert_eq!(request.json()["b"], 1.5);
    assert!(request.received_at.elapsed() < TEST_TIMEOUT);
    assert_eq!((request.header("x-none"), receiver.requests_to("/other").len()), (None, 0));
}

#[tokio::test]
async fn scripts_are_per_path_and_repeat_their_last_reply() {
    let receiver = Receiver::start().await;
    receiver.on("/a", [503, 429, 201]);
    receiver.on("/b", [Reply::status(429).retry_after(7), Reply::redirect("http://127.0.0.1:1/")]);
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(status(&receiver.url("/a")).await);
    }
    assert_eq!(statuses, [503, 429, 201, 201]);

    let client = http_client();
    let throttled = client.get(receiver.url("/b")).send().await.unwrap();
    assert_eq!((throttled.status().as_u16(), &throttled.headers()["retry-after"]), (429, &"7".parse().unwrap()));
    let moved = client.get(receiver.url("/b")).send().await.unwrap();
    assert_eq!((moved.status().as_u16(), &moved.headers()["location"]), (302, &"http://127.0.0.1:1/".parse().unwrap()));

    receiver.on("/a", [204]);
    assert_eq!(status(&receiver.url("/a")).await, 204);
    assert_eq!(receiver.requests().len(), 7);
}

#[tokio::test]
async fn replies_are_delayed_missing_or_cut_off_by_the_script() {
    let receiver = Receiver::start().await;
    let client = http_client();
    receiver.on("/slow", [Reply::status(200).after(Duration::from_millis(300))]);
    receiver.on("/drip", [Reply::status(200).body("abc").drip(Duration::from_millis(100))]);
    receiver.on("/endless", [Reply::status(200).body("abc").drip(TEST_TIMEOUT * 10)]);
    receiver.on("/hang", [Reply::hang()]);
    receiver.on("/drop", [Reply::drop_connection()]);

    let start = Instant::now();
    assert_eq!(status(&receiver.url("/slow")).await, 200);
    assert!(start.elapsed() >= Duration::from_millis(300));

    let start = Instant::now();
    let dripping = client.get(receiver.url("/drip")).send().await.unwrap();
    assert_eq!(dripping.text().await.unwrap(), "abc");
    assert!(start.elapsed() >= Duration::from_millis(300));
    // The headers do not wait for the body.
    assert_eq!(status(&receiver.url("/endless")).await, 200);

    let hanging = client.get(receiver.url("/hang")).timeout(Duration::from_millis(200)).send().await;
    assert!(hanging.unwrap_err().is_timeout());
    let dropped = client.get(receiver.url("/drop")).send().await.unwrap_err();
    assert!(!dropped.is_timeout() && !dropped.is_connect(), "{dropped:?}");
    assert_eq!((receiver.requests_to("/hang").len(), receiver.requests_to("/drop").len()), (1, 1));

    let port = receiver.address().port();
    let url = receiver.url("/");
    drop(receiver);
    let refused = eventually(TEST_TIMEOUT, "the port is closed", async || client.get(&url).send().await.err()).await;
    assert!(refused.is_connect(), "{refused:?}");
    assert_eq!(status(&Receiver::start_on(port).await.url("/")).await, 200);
}

#[tokio::test]
async fn waiting_ends_with_the_expected_request() {
    let receiver = Receiver::start().await;
    let sending = async {
        for path in ["/a", "/b", "/a"] {
            status(&receiver.url(path)).await;
        }
    };
    let (to_a, ()) = tokio::join!(receiver.wait_for_requests("/a", 2, TEST_TIMEOUT), sending);
    assert_eq!(to_a.len(), 2);
    assert_eq!(receiver.wait_for(TEST_TIMEOUT, |requests| requests.len() == 3).await.len(), 3);
}

#[tokio::test]
#[should_panic(expected = "the requests so far:\n  GET /a ")]
async fn a_wait_in_vain_panics_with_the_requests_so_far() {
    let receiver = Receiver::start().await;
    status(&receiver.url("/a")).await;
    receiver.wait_for_requests("/a", 2, Duration::from_millis(100)).await;
}

#[tokio::test]
async fn eventually_returns_the_first_success() {
    let mut probes = 0;
    let mut count = async || {
        probes += 1;
        (probes == 3).then_some(probes)
    };
    assert_eq!(eventually(TEST_TIMEOUT, "three", &mut count).await, 3);
    eventually(TEST_TIMEOUT, "true", async || true).await;
    assert_eq!(eventually(TEST_TIMEOUT, "a number", async || "7".parse::<u8>()).await, 7);
}

#[tokio::test]
#[should_panic(expected = "a number; the last result was: invalid digit")]
async fn eventually_panics_with_the_last_result() {
    eventually(Duration::from_millis(50), "a number", async || "x".parse::<u8>()).await;
}
