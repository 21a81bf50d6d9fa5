//! The receiver does as it is told, and remembers everything.
#![expect(clippy::unwrap_used, reason = "clippy sees no test in the functions that tests share")]

use std::time::{Duration, Instant};
use test_support::{Receiver, Reply, eventually, http_client};

const SOON: Duration = Duration::from_secs(5);

async fn status(url: &str) -> u16 {
    http_client().get(url).send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn it_remembers_requests_as_they_came() {
    let receiver = Receiver::start().await;
    let post = http_client().post(receiver.url("/hook?a=1")).header("X-Mark", "here").body("{\"b\": 1.50}").send();
    let response = post.await.unwrap();
    assert_eq!((response.status().as_u16(), &*response.bytes().await.unwrap()), (200, &b""[..]));

    let requests = receiver.requests_to("/hook");
    let [request] = &requests[..] else { panic!("{requests:?}") };
    assert_eq!((request.method.as_str(), request.path(), request.uri.query()), ("POST", "/hook", Some("a=1")));
    assert_eq!((request.header("x-mark"), &request.body[..]), (Some("here"), &b"{\"b\": 1.50}"[..]));
    assert_eq!(request.json()["b"], 1.5);
    assert!(request.received_at.elapsed() < SOON);
    assert_eq!((request.header("x-none"), receiver.requests_to("/other").len()), (None, 0));
}

#[tokio::test]
async fn scripts_are_per_path_and_their_last_reply_stays() {
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
async fn it_is_slow_silent_or_rude_on_demand() {
    let receiver = Receiver::start().await;
    let client = http_client();
    receiver.on("/slow", [Reply::status(200).after(Duration::from_millis(300))]);
    receiver.on("/drip", [Reply::status(200).body("abc").drip(Duration::from_millis(100))]);
    receiver.on("/hang", [Reply::hang()]);
    receiver.on("/drop", [Reply::drop_connection()]);

    let start = Instant::now();
    assert_eq!(status(&receiver.url("/slow")).await, 200);
    assert!(start.elapsed() >= Duration::from_millis(300));

    let start = Instant::now();
    let dripping = client.get(receiver.url("/drip")).send().await.unwrap();
    assert!(start.elapsed() < Duration::from_millis(300), "the headers do not wait for the body");
    assert_eq!(dripping.text().await.unwrap(), "abc");
    assert!(start.elapsed() >= Duration::from_millis(300));

    let hanging = client.get(receiver.url("/hang")).timeout(Duration::from_millis(200)).send().await;
    assert!(hanging.unwrap_err().is_timeout());
    let dropped = client.get(receiver.url("/drop")).send().await.unwrap_err();
    assert!(!dropped.is_timeout() && !dropped.is_connect(), "{dropped:?}");
    assert_eq!((receiver.requests_to("/hang").len(), receiver.requests_to("/drop").len()), (1, 1));

    let port = receiver.address().port();
    let url = receiver.url("/");
    drop(receiver);
    let refused = eventually(SOON, "the port is closed", async || client.get(&url).send().await.err()).await;
    assert!(refused.is_connect(), "{refused:?}");
    assert_eq!(status(&Receiver::start_on(port).await.url("/")).await, 200);
}

#[tokio::test]
async fn waiting_ends_with_the_request_that_is_waited_for() {
    let receiver = Receiver::start().await;
    let sending = async {
        for path in ["/a", "/b", "/a"] {
            status(&receiver.url(path)).await;
        }
    };
    let (to_a, ()) = tokio::join!(receiver.wait_for_requests("/a", 2, SOON), sending);
    assert_eq!(to_a.len(), 2);
    assert_eq!(receiver.wait_for(SOON, |requests| requests.len() == 3).await.len(), 3);
}

#[tokio::test]
#[should_panic(expected = "the requests so far:\n  GET /a ")]
async fn waiting_in_vain_tells_what_came() {
    let receiver = Receiver::start().await;
    status(&receiver.url("/a")).await;
    receiver.wait_for_requests("/a", 2, Duration::from_millis(100)).await;
}

#[tokio::test]
async fn eventually_takes_the_first_yes() {
    let mut asked = 0;
    let mut count = async || {
        asked += 1;
        (asked == 3).then_some(asked)
    };
    assert_eq!(eventually(SOON, "three", &mut count).await, 3);
    eventually(SOON, "true", async || true).await;
    assert_eq!(eventually(SOON, "a number", async || "7".parse::<u8>()).await, 7);
}

#[tokio::test]
#[should_panic(expected = "a number; the last answer was: invalid digit")]
async fn eventually_tells_the_last_answer() {
    eventually(Duration::from_millis(50), "a number", async || "x".parse::<u8>()).await;
}
