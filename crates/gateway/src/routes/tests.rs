//! The HTTP API as a whole, without NATS.

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    http::{HeaderName, HeaderValue, Method, header},
    routing::MethodFilter,
};
use clap::Parser;
use contract::{
    ObjectId,
    key::{ApiKey, Scope},
};
use proptest::prelude::*;
use secrets::api_key::hash;
use service_kit::{kv::BucketCache, metrics, traces::Traces};
use tower::ServiceExt;

use super::{ENDPOINTS, docs, router};
use crate::{
    app::App,
    auth::tests::key,
    config::Config,
    metrics::Metrics,
    rate_limit::RateClass,
    response::HandlerResult,
    router::{self as machinery, Endpoint, REQUEST_ID},
};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

/// An unconnected gateway with two keys.
fn gateway() -> Router {
    gateway_with(&["--update-rate", "0", "--other-rate", "0"])
}

fn app(config: &Config, keys: BucketCache<ApiKey>) -> App {
    let paths = ENDPOINTS.iter().map(|endpoint| endpoint.path);
    App::new(config, keys, Metrics::new(&mut metrics::registry("gateway"), paths), Traces::default())
}

fn gateway_with(arguments: &[&str]) -> Router {
    let arguments = [&["gateway", "--max-body-bytes", "1024"], arguments].concat();
    let config = Cli::parse_from(arguments).config;
    let reader = ApiKey { key_id: ObjectId::from_bytes([0xbb; 12]), scopes: [Scope::LeadsRead].into(), ..key() };
    let keys = [(hash("good"), key()), (hash("reader"), reader)].into_iter().collect();
    router(Arc::new(app(&config, keys)))
}

fn request(method: Method, path: &str, secret: &str, body: &str) -> Request {
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {secret}"))
        .header(REQUEST_ID, "r-1")
        .body(Body::from(body.to_owned()))
        .unwrap()
}

/// Status, the headers that matter, and the body.
async fn answer(router: Router, request: Request) -> String {
    let response = router.oneshot(request).await.unwrap();
    let mut text = response.status().as_u16().to_string();
    let names = [header::ALLOW, header::CONTENT_TYPE, header::RETRY_AFTER, header::WWW_AUTHENTICATE, REQUEST_ID];
    let rates = ["ratelimit-policy", "ratelimit"].map(HeaderName::from_static);
    for name in names.into_iter().chain(rates) {
        if let Some(value) = response.headers().get(&name) {
            text += &format!(" {name}={}", value.to_str().unwrap());
        }
    }
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    text + "\n" + std::str::from_utf8(&body).unwrap()
}

const UPDATE: &str = "/api/v1/leads/update";
const BODY: &str = r#"{"leadId":"696102a4b8c1d2e3f4a5b6c7","name":"Ada"}"#;

#[tokio::test]
async fn a_parameter_that_an_endpoint_does_not_read_is_refused_where_something_would_change() {
    for (method, path) in [
        (Method::POST, "/api/v1/leads/initiate?dryRun=true"),
        (Method::POST, "/api/v1/leads/update/bulk?dryRun=true"),
        (Method::POST, "/api/v1/calls/started?expectedState=new"),
        (Method::POST, "/api/v1/deliveries/recover?dryRun=true"),
        (Method::PUT, "/api/v1/processes/_?dryRun=true"),
        (Method::DELETE, "/api/v1/leads/696102a4b8c1d2e3f4a5b6c7?dryRun=true"),
    ] {
        let answer = answer(gateway(), request(method, path, "good", "{}")).await;
        let (_, parameter) = path.split_once('?').unwrap();
        let (name, _) = parameter.split_once('=').unwrap();
        assert!(answer.starts_with("400 ") && answer.contains(&format!("{name} is unknown")), "{path}: {answer}");
    }
}

#[tokio::test]
async fn errors_have_one_shape() {
    let mut form = request(Method::POST, UPDATE, "good", BODY);
    form.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/csv"));
    let mut keyless = request(Method::POST, UPDATE, "good", BODY);
    keyless.headers_mut().remove(header::AUTHORIZATION);
    let requests = [
        keyless,
        request(Method::POST, UPDATE, "bad", BODY),
        request(Method::POST, UPDATE, "reader", BODY),
        request(Method::POST, "/api/v1/leads/initiate", "reader", "{}"),
        form,
        request(Method::POST, UPDATE, "good", "{}"),
        request(Method::POST, UPDATE, "good", &"x".repeat(1025)),
        request(Method::POST, UPDATE, "good", BODY),
        request(Method::GET, UPDATE, "good", ""),
        request(Method::POST, "/api/v1/leads/get", "good", ""),
        request(Method::GET, "/api/v1/leads/get?leadId=696102a4b8c1d2e3f4a5b6c7", "good", ""),
        request(Method::PATCH, "/api/v1/processes/_/callbacks/696102a4b8c1d2e3f4a5b6c7", "good", ""),
        request(Method::GET, "/api/v1/processes", "reader", ""),
        request(Method::PUT, "/api/v1/processes/7", "good", "{}"),
        request(Method::PUT, "/api/v1/processes/_/callbacks/7", "good", "{}"),
        request(Method::PUT, "/api/v1/processes/_", "good", r#"{"states":7}"#),
        request(Method::GET, "/api/v1/updates/7", "good", ""),
        request(Method::GET, "/api/v1/updates/%ff", "good", ""),
        request(Method::GET, "/api/v1/leads/upd/ate", "good", ""),
        request(Method::GET, "/", "good", ""),
    ];
    let mut answers = Vec::new();
    for request in requests {
        let asked = format!("{} {}", request.method(), request.uri());
        answers.push(format!("{asked}\n{}", answer(gateway(), request).await));
    }
    insta::assert_snapshot!(answers.join("\n\n"), @r#"
    POST /api/v1/leads/update
    401 content-type=application/json www-authenticate=Bearer x-request-id=r-1
    {"success":false,"error":"An API key is required, as Authorization: Bearer <key>","code":"missing_api_key","requestId":"r-1"}

    POST /api/v1/leads/update
    401 content-type=application/json www-authenticate=Bearer x-request-id=r-1
    {"success":false,"error":"The API key is unknown","code":"invalid_api_key","requestId":"r-1"}

    POST /api/v1/leads/update
    403 content-type=application/json x-request-id=r-1
    {"success":false,"error":"The API key lacks the scope leads:write","code":"missing_scope","requestId":"r-1"}

    POST /api/v1/leads/initiate
    403 content-type=application/json x-request-id=r-1
    {"success":false,"error":"The API key lacks the scope leads:write","code":"missing_scope","requestId":"r-1"}

    POST /api/v1/leads/update
    415 content-type=application/json x-request-id=r-1
    {"success":false,"error":"The body must be JSON: send the header Content-Type: application/json","code":"unsupported_media_type","requestId":"r-1"}

    POST /api/v1/leads/update
    400 content-type=application/json x-request-id=r-1
    {"success":false,"error":"Either leadId or referenceId is required","code":"address_missing","requestId":"r-1"}

    POST /api/v1/leads/update
    413 content-type=application/json x-request-id=r-1
    {"success":false,"error":"The body is larger than 1024 bytes","code":"body_too_large","requestId":"r-1"}

    POST /api/v1/leads/update
    503 content-type=application/json retry-after=2 x-request-id=r-1
    {"success":false,"error":"NATS cannot be reached; nothing was accepted","code":"broker_unavailable","requestId":"r-1"}

    GET /api/v1/leads/update
    405 allow=POST content-type=application/json x-request-id=r-1
    {"success":false,"error":"This endpoint does not support this method; the Allow header lists those it does","code":"method_not_allowed","requestId":"r-1"}

    POST /api/v1/leads/get
    405 allow=GET,HEAD content-type=application/json x-request-id=r-1
    {"success":false,"error":"This endpoint does not support this method; the Allow header lists those it does","code":"method_not_allowed","requestId":"r-1"}

    GET /api/v1/leads/get?leadId=696102a4b8c1d2e3f4a5b6c7
    503 content-type=application/json retry-after=2 x-request-id=r-1
    {"success":false,"error":"The request could not be answered because a service is unavailable; retry","code":"unavailable","requestId":"r-1"}

    PATCH /api/v1/processes/_/callbacks/696102a4b8c1d2e3f4a5b6c7
    405 allow=GET,HEAD,PUT,DELETE content-type=application/json x-request-id=r-1
    {"success":false,"error":"This endpoint does not support this method; the Allow header lists those it does","code":"method_not_allowed","requestId":"r-1"}

    GET /api/v1/processes
    403 content-type=application/json x-request-id=r-1
    {"success":false,"error":"The API key lacks the scope config:read","code":"missing_scope","requestId":"r-1"}

    PUT /api/v1/processes/7
    400 content-type=application/json x-request-id=r-1
    {"success":false,"error":"processId must be 24 hex digits, or _ for the fallback callbacks","code":"invalid_field","requestId":"r-1"}

    PUT /api/v1/processes/_/callbacks/7
    400 content-type=application/json x-request-id=r-1
    {"success":false,"error":"callbackId must be 24 hex digits","code":"invalid_field","requestId":"r-1"}

    PUT /api/v1/processes/_
    400 content-type=application/json x-request-id=r-1
    {"success":false,"error":"The body does not describe a process: invalid type: integer, expected a sequence","code":"invalid_process","requestId":"r-1"}

    GET /api/v1/updates/7
    400 content-type=application/json x-request-id=r-1
    {"success":false,"error":"updateId must be 24 hex digits","code":"invalid_field","requestId":"r-1"}

    GET /api/v1/updates/%ff
    400 content-type=application/json x-request-id=r-1
    {"success":false,"error":"updateId must be 24 hex digits","code":"invalid_field","requestId":"r-1"}

    GET /api/v1/leads/upd/ate
    404 content-type=application/json x-request-id=r-1
    {"success":false,"error":"There is no endpoint at this path","code":"unknown_path","requestId":"r-1"}

    GET /
    404 content-type=application/json x-request-id=r-1
    {"success":false,"error":"There is no endpoint at this path","code":"unknown_path","requestId":"r-1"}
    "#);
}

#[tokio::test]
async fn documents_need_no_key() {
    let config = Cli::parse_from(["gateway"]).config;
    let router = router(Arc::new(app(&config, BucketCache::default())));
    for document in docs::DOCUMENTS {
        let request = Request::builder().uri(document.path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200, "{}", document.path);
        assert!(response.headers().contains_key(REQUEST_ID) && !response.headers().contains_key("ratelimit"));
        let gzipped = response.headers().contains_key(header::CONTENT_ENCODING);
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        assert_eq!(body.starts_with(&[0x1f, 0x8b]), gzipped, "{}", document.path);
        if document.path.ends_with(".json") {
            let served: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(served["openapi"], "3.1.0");
        }
    }
}

#[tokio::test]
async fn a_key_beyond_its_rate_limit_gets_retry_after() {
    let router = gateway_with(&["--update-rate", "2", "--other-rate", "1"]);
    let lead = "/api/v1/leads/get";
    let mut answers = Vec::new();
    for (method, path, secret) in [
        (Method::GET, lead, "reader"),
        (Method::GET, lead, "reader"),
        (Method::GET, lead, "good"),
        (Method::POST, UPDATE, "good"),
        (Method::POST, UPDATE, "good"),
        (Method::POST, UPDATE, "good"),
        (Method::POST, UPDATE, "bad"),
    ] {
        let answer = answer(router.clone(), request(method, path, secret, "{}")).await;
        answers.push(answer.split_once('\n').unwrap().0.replace("content-type=application/json x-request-id=r-1", ""));
    }
    insta::assert_snapshot!(answers.join("\n"), @r#"
    400  ratelimit-policy="other";q=1;w=5 ratelimit="other";r=0
    429 content-type=application/json retry-after=5 x-request-id=r-1 ratelimit-policy="other";q=1;w=5 ratelimit="other";r=0;t=5
    400  ratelimit-policy="other";q=1;w=5 ratelimit="other";r=0
    400  ratelimit-policy="updates";q=2;w=5 ratelimit="updates";r=1
    400  ratelimit-policy="updates";q=2;w=5 ratelimit="updates";r=0
    429 content-type=application/json retry-after=3 x-request-id=r-1 ratelimit-policy="updates";q=2;w=5 ratelimit="updates";r=0;t=3
    401 content-type=application/json www-authenticate=Bearer x-request-id=r-1
    "#);
}

#[tokio::test]
async fn a_slash_at_the_end_and_the_content_type_of_curl_are_accepted() {
    let form = HeaderValue::from_static("application/x-www-form-urlencoded");
    let codes = [UPDATE, "/api/v1/leads/update/", "/api/v1/leads/get/"].map(async |path| {
        let method = if path.contains("get") { Method::GET } else { Method::POST };
        let mut request = request(method, path, "good", "{}");
        request.headers_mut().insert(header::CONTENT_TYPE, form.clone());
        answer(gateway(), request).await.contains("\"code\":\"address_missing\"")
    });
    assert_eq!(futures::future::join_all(codes).await, [true; 3]);
}

#[tokio::test]
async fn a_repeated_host_or_key_is_refused() {
    for (name, value) in [(header::HOST, "a"), (header::AUTHORIZATION, "Bearer bad")] {
        let mut request = request(Method::POST, UPDATE, "good", BODY);
        request.headers_mut().append(header::HOST, HeaderValue::from_static("a"));
        request.headers_mut().append(name.clone(), HeaderValue::from_static(value));
        let answer = answer(gateway(), request).await;
        assert!(answer.starts_with("400 ") && answer.contains("repeated_header"), "{name}: {answer}");
    }
}

#[tokio::test]
async fn responses_are_neither_cached_nor_taken_for_another_type() {
    for (path, secret) in [(UPDATE, "good"), (UPDATE, "bad"), ("/nowhere", "good")] {
        let response = gateway().oneshot(request(Method::POST, path, secret, BODY)).await.unwrap();
        assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
        assert_eq!(response.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
    }
}

#[tokio::test]
async fn a_request_before_the_keys_are_loaded_gets_503() {
    let config = Cli::parse_from(["gateway"]).config;
    let router = router(Arc::new(app(&config, BucketCache::default())));
    let answer = answer(router, request(Method::POST, UPDATE, "good", BODY)).await;
    assert!(answer.starts_with("503 ") && answer.contains(r#""code":"starting""#), "{answer}");
}

/// Header values and bodies that are almost valid, and arbitrary ones.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let near = prop::sample::select(vec![
        BODY,
        r#"{"lead":{"projectId":"111111111111111111111111","processId":"696102a4b8c1d2e3f4a5b6c7","phone":"1","name":"A"}}"#,
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "\"order-7\"",
        "W/\"5\"",
        "respond-async, wait=1",
        "Bearer good",
        "application/json; charset=utf-8",
        "leadId=696102a4b8c1d2e3f4a5b6c7&masked=true",
    ]);
    let mangled = (near, any::<prop::sample::Index>(), any::<u8>(), any::<bool>()).prop_map(|(text, at, byte, cut)| {
        let mut bytes = text.as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        bytes
    });
    // The characters of grammars, in any order.
    let signs = prop::sample::select(br#""\{}[]():;,.%&=?/+-_ 0a\u"#.to_vec());
    prop_oneof![mangled, prop::collection::vec(signs, 0..12), any::<Vec<u8>>()]
}

proptest! {
    #[test]
    fn arbitrary_requests_cause_no_internal_error(
        endpoint in prop::sample::select(ENDPOINTS.to_vec()),
        other_method in prop::option::weighted(0.1, prop::sample::select(vec!["HEAD", "PUT"])),
        odd_path in prop::option::weighted(0.1, any_bytes()),
        parameter in any_bytes(),
        query in any_bytes(),
        headers in prop::collection::vec((prop::sample::select(vec![
            "authorization", "content-type", "idempotency-key", "traceparent", "x-request-id", "content-length",
            "if-match", "prefer",
        ]), any_bytes()), 0..6),
        body in any_bytes(),
        keyless in prop::bool::weighted(0.1),
    ) {
        // Escaped or not. Text that is not a URI never reaches the router.
        let escape = |bytes: &[u8]| bytes.iter().map(|byte| format!("%{byte:02x}")).collect::<String>();
        let path = match &odd_path {
            Some(path) => format!("/{}", String::from_utf8_lossy(path)),
            None => {
                let parameter = escape(&parameter);
                let parts = endpoint.path.split('/').map(|part| if part.starts_with('{') { &parameter } else { part });
                parts.collect::<Vec<_>>().join("/")
            }
        };
        let query = std::str::from_utf8(&query).map_or_else(|_| escape(&query), str::to_owned);
        let Ok(uri) = axum::http::Uri::try_from(format!("{path}?{query}")) else { return Ok(()) };
        let method = other_method.unwrap_or(endpoint.method);
        let mut request = Request::builder().method(method).uri(uri).body(Body::from(body)).unwrap();
        if !keyless {
            request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer good"));
        }
        for (name, mut value) in headers {
            // hyper refuses other bytes.
            value.retain(|byte| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f));
            let Ok(value) = HeaderValue::from_bytes(&value) else { continue };
            request.headers_mut().append(HeaderName::from_static(name), value);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let answer = runtime.block_on(answer(gateway(), request));
        // This gateway is not connected, so it cannot accept or read anything.
        let unavailable = answer.contains("unavailable") || method == "HEAD";
        let fault = answer.starts_with('5') && !unavailable;
        prop_assert!(!fault && answer.contains("x-request-id="), "{}", answer);
    }
}

#[tokio::test]
async fn a_panic_gets_a_response() {
    let config = Cli::parse_from(["gateway"]).config;
    let keys = [(hash("good"), key())].into_iter().collect();
    let endpoint = Endpoint::new("GET", "/", Scope::LeadsRead, RateClass::Other);
    let panics = async |_: Arc<App>, _: Arc<ApiKey>, _: Request| -> HandlerResult { panic!("boom") };
    let panics = machinery::endpoint(MethodFilter::GET, endpoint, panics);
    let router = Router::new().route("/", panics).with_state(Arc::new(app(&config, keys)));
    insta::assert_snapshot!(answer(router, request(Method::GET, "/", "good", "")).await, @r#"
    500 content-type=application/json x-request-id=r-1
    {"success":false,"error":"Internal error; see the service's log","code":"internal","requestId":"r-1"}
    "#);
}
