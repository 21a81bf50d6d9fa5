//! 1 Accept: the server: the routes, what is common to all answers, and the gateway's life.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_nats::{Client, jetstream};
use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter, on},
};
use contract::{
    key::{ApiKey, Scope},
    streams::{API_KEYS, LEAD_COMMANDS},
};
use futures::FutureExt;
use service_kit::{
    clock,
    health::{self, Readiness},
    http::{self, Limits},
    kv::BucketCache,
    lifecycle::{DRAIN_DEADLINE, Tasks},
    metrics, nats,
    publisher::Publisher,
    traces::Traces,
};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    auth,
    command_log::CommandLog,
    config::Config,
    error::ApiError,
    idempotency::Records,
    metrics::Metrics,
    outcomes::Outcomes,
    rate::{FORGET_INTERVAL, Rate, RateLimits, Standing},
    routes::{
        Answer, bulk_initiate, bulk_update, callbacks, deliveries, documents, events, events::Listeners, get_lead,
        get_update, initiate_lead, lead_history, list_leads, processes, update_lead,
    },
    tls::Certificate,
};

/// How long requests under way may take to finish once the gateway stops. Longer than a body may take to arrive; with
/// the wait for the last acks shorter than the drain deadline, so that a client that dawdles cannot spoil a shutdown.
const FINISH: Duration = Duration::from_secs(12);

/// Most bulk requests at once. Each may hold some MiB, and a dozen requests of lead-state or a batch of the log.
const BULK_AT_ONCE: usize = 16;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// An endpoint of the HTTP API.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint {
    /// `GET` (then also `HEAD`), `POST`, `PUT` or `DELETE`.
    pub method: &'static str,
    /// The path, parameters in braces.
    pub path: &'static str,
    /// What a key must be good for.
    pub scope: Scope,
    rate: Rate,
}

/// All endpoints. The router is made from this list, so whoever walks it walks everything that is served.
pub const ENDPOINTS: [Endpoint; 25] = [
    Endpoint { method: "POST", path: update_lead::ROUTE, scope: Scope::LeadsWrite, rate: Rate::Updates },
    // It takes a token of each update that it reads, too.
    Endpoint { method: "POST", path: bulk_update::ROUTE, scope: Scope::LeadsWrite, rate: Rate::Other },
    Endpoint { method: "POST", path: "/api/v1/leads/initiate", scope: Scope::LeadsWrite, rate: Rate::Other },
    Endpoint { method: "POST", path: "/api/v1/leads/bulk/initiate", scope: Scope::LeadsWrite, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/leads/get", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/updates/{updateId}", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/leads", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/leads/{leadId}/updates", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/deliveries", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/deliveries/{deliveryId}", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint {
        method: "POST",
        path: "/api/v1/deliveries/{deliveryId}/redeliver",
        scope: Scope::LeadsWrite,
        rate: Rate::Other,
    },
    Endpoint { method: "POST", path: "/api/v1/deliveries/recover", scope: Scope::LeadsWrite, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/events", scope: Scope::LeadsRead, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/processes", scope: Scope::ConfigRead, rate: Rate::Other },
    Endpoint { method: "POST", path: "/api/v1/processes", scope: Scope::ConfigWrite, rate: Rate::Other },
    Endpoint { method: "GET", path: "/api/v1/processes/{processId}", scope: Scope::ConfigRead, rate: Rate::Other },
    Endpoint { method: "PUT", path: "/api/v1/processes/{processId}", scope: Scope::ConfigWrite, rate: Rate::Other },
    Endpoint {
        method: "GET",
        path: "/api/v1/processes/{processId}/callbacks",
        scope: Scope::ConfigRead,
        rate: Rate::Other,
    },
    Endpoint {
        method: "POST",
        path: "/api/v1/processes/{processId}/callbacks",
        scope: Scope::ConfigWrite,
        rate: Rate::Other,
    },
    Endpoint {
        method: "GET",
        path: "/api/v1/processes/{processId}/callbacks/{callbackId}",
        scope: Scope::ConfigRead,
        rate: Rate::Other,
    },
    Endpoint {
        method: "PUT",
        path: "/api/v1/processes/{processId}/callbacks/{callbackId}",
        scope: Scope::ConfigWrite,
        rate: Rate::Other,
    },
    Endpoint {
        method: "DELETE",
        path: "/api/v1/processes/{processId}/callbacks/{callbackId}",
        scope: Scope::ConfigWrite,
        rate: Rate::Other,
    },
    Endpoint {
        method: "POST",
        path: "/api/v1/processes/{processId}/callbacks/{callbackId}/rotate-secret",
        scope: Scope::ConfigWrite,
        rate: Rate::Other,
    },
    Endpoint {
        method: "POST",
        path: "/api/v1/processes/{processId}/callbacks/{callbackId}/test",
        scope: Scope::ConfigWrite,
        rate: Rate::Other,
    },
    Endpoint {
        method: "POST",
        path: "/api/v1/processes/{processId}/callbacks/{callbackId}/enable",
        scope: Scope::ConfigWrite,
        rate: Rate::Other,
    },
];

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct App {
    /// The API keys, by their SHA-256.
    keys: BucketCache<ApiKey>,
    /// Empty until the first connection.
    broker: OnceLock<Broker>,
    pub(crate) command_log: CommandLog,
    pub(crate) idempotency: Records,
    pub(crate) outcomes: Arc<Outcomes>,
    pub(crate) listeners: Arc<Listeners>,
    pub(crate) rates: RateLimits,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
    bulk: Arc<Semaphore>,
    pub(crate) max_body_bytes: usize,
}

/// The connection to NATS.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) client: Client,
    pub(crate) js: jetstream::Context,
    pub(crate) commands: Publisher,
}

impl App {
    pub(crate) fn new(config: &Config, keys: BucketCache<ApiKey>, metrics: Metrics, traces: Traces) -> Self {
        Self {
            keys,
            broker: OnceLock::new(),
            command_log: CommandLog::new(config.max_in_flight as usize, traces.clone()),
            idempotency: Records::default(),
            outcomes: Arc::default(),
            listeners: Arc::new(Listeners::new(config.max_listeners as usize)),
            rates: RateLimits::new(config.update_rate, config.other_rate),
            metrics,
            traces,
            bulk: Arc::new(Semaphore::new(BULK_AT_ONCE)),
            max_body_bytes: config.max_body_bytes as usize,
        }
    }

    /// The right to a bulk request, until it is dropped.
    pub(crate) fn bulk_slot(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.bulk.clone().try_acquire_owned().map_err(|_| ApiError::TooManyBulkRequests)
    }

    /// The key that a request comes under now, if it may do this.
    pub(crate) fn authorize(&self, headers: &HeaderMap, scope: Scope) -> Result<Arc<ApiKey>, ApiError> {
        auth::authorize(&self.keys, headers, scope, clock::now())
    }

    /// The connection, once there is one. It may be lost at the moment.
    pub(crate) fn broker(&self) -> Result<&Broker, ApiError> {
        self.broker.get().ok_or(ApiError::BrokerUnavailable)
    }
}

/// Runs the gateway on the configured address until shutdown.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let listener = http::bind(config.listen).await?;
    run_on(listener, config, shutdown).await
}

/// Runs the gateway on a socket that listens already; `config.listen` is not looked at.
pub async fn run_on(listener: TcpListener, config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let health_listener = http::bind(config.health.health_listen).await?;
    tracing::info!(address = %listener.local_addr()?, "HTTP API");
    let certificate = match (&config.tls_cert, &config.tls_key) {
        (Some(chain), Some(key)) => Some(Certificate::load(chain.clone(), key.clone()).await?),
        _ => None,
    };
    let readiness = Readiness::default();
    // All at once and before anybody can ask, lest it looks ready between two steps.
    for what in [LEAD_COMMANDS, API_KEYS] {
        readiness.not_ready(what, "not found yet");
    }
    let mut registry = metrics::registry("gateway");
    let traces = Traces::from_env("gateway")?;
    let app = Arc::new(App::new(&config, BucketCache::default(), Metrics::new(&mut registry), traces.clone()));
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn_background("health", health::serve(health_listener, readiness.clone(), registry, shutdown.clone()));
    tasks.spawn("api keys", follow_keys(app.clone(), config.clone(), readiness, shutdown.clone()));
    tasks.spawn("rate limits", forget_idle(app.clone(), shutdown.clone()));
    let mut tls = None;
    if let Some(certificate) = certificate {
        tls = Some(certificate.server_config()?);
        tasks.spawn("tls certificate", certificate.follow(shutdown.clone()));
    }
    tasks.spawn("http", async move {
        let limits = Limits {
            connections: config.max_connections as usize,
            connections_per_address: config.max_connections_per_address as usize,
            header_timeout: config.header_timeout.into(),
            write_timeout: config.write_timeout.into(),
        };
        let late = async {
            shutdown.cancelled().await;
            app.outcomes.close();
            app.listeners.stop();
            tokio::time::sleep(FINISH).await;
        };
        tokio::select! {
            served = http::serve_tls(listener, router(app.clone()), limits, tls, shutdown.clone()) => served?,
            () = late => tracing::warn!("requests that did not finish within {FINISH:?} are cut"),
        }
        app.command_log.drained().await;
        Ok(())
    });
    let ended = tasks.run(DRAIN_DEADLINE).await;
    traces.end().await;
    ended
}

/// Connects, then watches the API keys. Requests that come before are told 503.
async fn follow_keys(
    app: Arc<App>,
    config: Config,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let connect = async {
        let client = nats::connect(&config.nats, "gateway", &readiness).await?;
        let js = nats::jetstream(&client);
        let commands = Publisher::observed(js.clone(), app.metrics.publishing.clone());
        let broker = app.broker.get_or_init(|| Broker { client, js, commands });
        nats::stream(&broker.js, LEAD_COMMANDS).await?;
        readiness.ready(LEAD_COMMANDS);
        anyhow::Ok(broker)
    };
    let broker = tokio::select! {
        broker = connect => broker?,
        () = shutdown.cancelled() => return Ok(()),
    };
    app.keys.follow(&broker.js, API_KEYS, readiness, shutdown).await
}

/// Forgets what need not be known of keys that are idle, until shutdown.
async fn forget_idle(app: Arc<App>, shutdown: CancellationToken) -> anyhow::Result<()> {
    while shutdown.run_until_cancelled(tokio::time::sleep(FORGET_INTERVAL)).await.is_some() {
        app.rates.forget_idle();
    }
    Ok(())
}

/// The HTTP API.
pub(crate) fn router(app: Arc<App>) -> Router {
    let [
        update,
        update_bulk,
        initiate,
        initiate_bulk,
        get,
        story,
        leads,
        history,
        told,
        delivery,
        redeliver,
        recover,
        events,
        processes,
        process_create,
        process,
        process_put,
        callbacks,
        callback_create,
        callback,
        callback_put,
        callback_remove,
        rotate_secret,
        test,
        enable,
    ] = ENDPOINTS;
    Router::new()
        .route(update.path, served(update, update_lead::handle))
        .route(update_bulk.path, served(update_bulk, bulk_update::handle))
        .route(initiate.path, served(initiate, initiate_lead::handle))
        .route(initiate_bulk.path, served(initiate_bulk, bulk_initiate::handle))
        .route(get.path, served(get, get_lead::handle))
        .route(story.path, served(story, get_update::handle))
        .route(leads.path, served(leads, list_leads::handle))
        .route(history.path, served(history, lead_history::handle))
        .route(told.path, served(told, deliveries::list))
        .route(delivery.path, served(delivery, deliveries::get))
        .route(redeliver.path, served(redeliver, deliveries::redeliver))
        .route(recover.path, served(recover, deliveries::recover))
        .route(events.path, served(events, events::handle))
        .route(processes.path, served(processes, processes::list).merge(served(process_create, processes::create)))
        .route(process.path, served(process, processes::get).merge(served(process_put, processes::put)))
        .route(callbacks.path, served(callbacks, callbacks::list).merge(served(callback_create, callbacks::create)))
        .route(
            callback.path,
            served(callback, callbacks::get)
                .merge(served(callback_put, callbacks::put))
                .merge(served(callback_remove, callbacks::remove)),
        )
        .route(rotate_secret.path, served(rotate_secret, callbacks::rotate_secret))
        .route(test.path, served(test, callbacks::test))
        .route(enable.path, served(enable, callbacks::enable))
        .merge(documents::routes())
        .method_not_allowed_fallback(async |State(app): State<Arc<App>>, request: Request| {
            finish(&app, request, async |_| Err(ApiError::MethodNotAllowed)).await
        })
        .fallback(async |State(app): State<Arc<App>>, request: Request| {
            finish(&app, request, async |_| Err(ApiError::UnknownPath)).await
        })
        .with_state(app)
}

/// An endpoint as it is served: to keys that may do this now, not too often.
fn served<H, F>(endpoint: Endpoint, handle: H) -> MethodRouter<Arc<App>>
where
    H: Fn(Arc<App>, Arc<ApiKey>, Request) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send,
{
    let method = match endpoint.method {
        "GET" => MethodFilter::GET,
        "PUT" => MethodFilter::PUT,
        "DELETE" => MethodFilter::DELETE,
        _ => MethodFilter::POST,
    };
    on(method, async move |State(app): State<Arc<App>>, request: Request| {
        let answer = async |request: Request| -> Answer {
            // Before anything else is looked at: a stranger costs a hash and a look into a map.
            let key = app.authorize(request.headers(), endpoint.scope)?;
            let standing = app.rates.take(endpoint.rate, key.key_id);
            let mut response = match standing.as_ref().and_then(Standing::refused_for) {
                Some(seconds) => ApiError::RateLimited(seconds).into_response(),
                None => handle(app.clone(), key, request).await.into_response(),
            };
            if let Some(standing) = standing {
                standing.tell(response.headers_mut());
            }
            Ok(response)
        };
        finish(&app, request, answer).await
    })
}

/// Gives an answer its request id and an error its body, also where a handler panicked. Not a layer of the router, which would
/// box and move every request and its answer twice more.
pub(crate) async fn finish<F>(app: &App, request: Request, answer: impl FnOnce(Request) -> F) -> Response
where
    F: Future<Output = Answer>,
{
    let request_id = request_id(request.headers());
    let begun = app.metrics.begin(request.extensions().get::<MatchedPath>().map(MatchedPath::as_str));
    let span = tracing::info_span!("request", id = request_id);
    let handled = AssertUnwindSafe(answer(request).instrument(span.clone())).catch_unwind().await;
    let _entered = span.entered();
    let mut response = handled.map(Answer::into_response).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!("a handler panicked: {}", text.unwrap_or("no message"));
        ApiError::Internal.into_response()
    });
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        tracing::debug!(status = error.status().as_u16(), code = error.code(), "refused: {error}");
        app.metrics.refused(&error);
        let headers = std::mem::take(response.headers_mut());
        response = error.render(&request_id);
        response.headers_mut().extend(headers);
    }
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!("the request failed");
    }
    begun.answered(response.status());
    // What passes as an id is a header value.
    if let Ok(value) = HeaderValue::try_from(request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// The client's own id of its request where it is sane, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let is_sane = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    match headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(is_sane) {
        Some(id) => id.to_owned(),
        None => clock::new_id().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        body::{Body, to_bytes},
        http::{Method, header},
    };
    use clap::Parser;
    use contract::ObjectId;
    use proptest::prelude::*;
    use secrets::api_key::hash;
    use tower::ServiceExt;

    use super::*;
    use crate::auth::tests::key;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    /// A gateway that knows a key and is not connected.
    fn gateway() -> Router {
        gateway_with(&["--update-rate", "0", "--other-rate", "0"])
    }

    fn gateway_with(arguments: &[&str]) -> Router {
        let arguments = [&["gateway", "--max-body-bytes", "1024"], arguments].concat();
        let config = Cli::parse_from(arguments).config;
        let reader = ApiKey { key_id: ObjectId::from_bytes([0xbb; 12]), scopes: [Scope::LeadsRead].into(), ..key() };
        let keys = [(hash("good"), key()), (hash("reader"), reader)].into_iter().collect();
        router(Arc::new(App::new(&config, keys, Metrics::new(&mut metrics::registry("gateway")), Traces::default())))
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
    async fn errors_have_one_shape_everywhere() {
        let mut form = request(Method::POST, UPDATE, "good", BODY);
        form.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
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
            request(Method::GET, "/api/v1/leads/update/", "good", ""),
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
        {"success":false,"error":"The API key is not known","code":"invalid_api_key","requestId":"r-1"}

        POST /api/v1/leads/update
        403 content-type=application/json x-request-id=r-1
        {"success":false,"error":"The API key lacks the scope leads:write","code":"missing_scope","requestId":"r-1"}

        POST /api/v1/leads/initiate
        403 content-type=application/json x-request-id=r-1
        {"success":false,"error":"The API key lacks the scope leads:write","code":"missing_scope","requestId":"r-1"}

        POST /api/v1/leads/update
        415 content-type=application/json x-request-id=r-1
        {"success":false,"error":"The body must be JSON: Content-Type: application/json","code":"unsupported_media_type","requestId":"r-1"}

        POST /api/v1/leads/update
        400 content-type=application/json x-request-id=r-1
        {"success":false,"error":"Either leadId or referenceId is required","code":"missing_field","requestId":"r-1"}

        POST /api/v1/leads/update
        413 content-type=application/json x-request-id=r-1
        {"success":false,"error":"The body is larger than 1024 bytes","code":"body_too_large","requestId":"r-1"}

        POST /api/v1/leads/update
        503 content-type=application/json retry-after=2 x-request-id=r-1
        {"success":false,"error":"NATS cannot be reached; nothing was accepted","code":"broker_unavailable","requestId":"r-1"}

        GET /api/v1/leads/update
        405 allow=POST content-type=application/json x-request-id=r-1
        {"success":false,"error":"This path does not take this method","code":"method_not_allowed","requestId":"r-1"}

        POST /api/v1/leads/get
        405 allow=GET,HEAD content-type=application/json x-request-id=r-1
        {"success":false,"error":"This path does not take this method","code":"method_not_allowed","requestId":"r-1"}

        GET /api/v1/leads/get?leadId=696102a4b8c1d2e3f4a5b6c7
        503 content-type=application/json retry-after=2 x-request-id=r-1
        {"success":false,"error":"NATS cannot be reached; nothing was accepted","code":"broker_unavailable","requestId":"r-1"}

        PATCH /api/v1/processes/_/callbacks/696102a4b8c1d2e3f4a5b6c7
        405 allow=GET,HEAD,PUT,DELETE content-type=application/json x-request-id=r-1
        {"success":false,"error":"This path does not take this method","code":"method_not_allowed","requestId":"r-1"}

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
        {"success":false,"error":"The body does not describe a process: invalid type: integer `7`, expected a sequence","code":"invalid_process","requestId":"r-1"}

        GET /api/v1/updates/7
        400 content-type=application/json x-request-id=r-1
        {"success":false,"error":"updateId must be 24 hex digits","code":"invalid_field","requestId":"r-1"}

        GET /api/v1/updates/%ff
        400 content-type=application/json x-request-id=r-1
        {"success":false,"error":"updateId must be 24 hex digits","code":"invalid_field","requestId":"r-1"}

        GET /api/v1/leads/update/
        404 content-type=application/json x-request-id=r-1
        {"success":false,"error":"There is nothing at this path","code":"unknown_path","requestId":"r-1"}

        GET /
        404 content-type=application/json x-request-id=r-1
        {"success":false,"error":"There is nothing at this path","code":"unknown_path","requestId":"r-1"}
        "#);
    }

    #[tokio::test]
    async fn documents_are_served_without_a_key_and_before_keys_are_known() {
        let config = Cli::parse_from(["gateway"]).config;
        let router = router(Arc::new(App::new(
            &config,
            BucketCache::default(),
            Metrics::new(&mut metrics::registry("gateway")),
            Traces::default(),
        )));
        for document in documents::DOCUMENTS {
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
    async fn a_key_that_asks_too_often_is_told_when_to_come_again() {
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
            answers
                .push(answer.split_once('\n').unwrap().0.replace("content-type=application/json x-request-id=r-1", ""));
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
    async fn a_request_before_the_keys_are_known_is_told_to_come_again() {
        let config = Cli::parse_from(["gateway"]).config;
        let router = router(Arc::new(App::new(
            &config,
            BucketCache::default(),
            Metrics::new(&mut metrics::registry("gateway")),
            Traces::default(),
        )));
        let answer = answer(router, request(Method::POST, UPDATE, "good", BODY)).await;
        assert!(answer.starts_with("503 ") && answer.contains(r#""code":"starting""#), "{answer}");
    }

    /// Header values and bodies that are almost right, and any others.
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
        let mangled =
            (near, any::<prop::sample::Index>(), any::<u8>(), any::<bool>()).prop_map(|(text, at, byte, cut)| {
                let mut bytes = text.as_bytes().to_vec();
                let at = at.index(bytes.len());
                bytes[at] = byte;
                if cut {
                    bytes.truncate(at);
                }
                bytes
            });
        // What grammars are made of, in any order.
        let signs = prop::sample::select(br#""\{}[]():;,.%&=?/+-_ 0a\u"#.to_vec());
        prop_oneof![mangled, prop::collection::vec(signs, 0..12), any::<Vec<u8>>()]
    }

    proptest! {
        #[test]
        fn any_request_is_answered_and_none_is_our_fault(
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
            // As a client would write them, or as they are: what is no URI never reaches the router.
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
                // What else there may be in a header, hyper refuses.
                value.retain(|byte| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f));
                let Ok(value) = HeaderValue::from_bytes(&value) else { continue };
                request.headers_mut().append(HeaderName::from_static(name), value);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let answer = runtime.block_on(answer(gateway(), request));
            // This gateway is not connected: what it would take, it cannot.
            let fault = answer.starts_with('5') && !answer.contains("broker_unavailable") && method != "HEAD";
            prop_assert!(!fault && answer.contains("x-request-id="), "{}", answer);
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_too() {
        let config = Cli::parse_from(["gateway"]).config;
        let keys = [(hash("good"), key())].into_iter().collect();
        let app = App::new(&config, keys, Metrics::new(&mut metrics::registry("gateway")), Traces::default());
        let endpoint = Endpoint { method: "GET", path: "/", scope: Scope::LeadsRead, rate: Rate::Other };
        let panics = served(endpoint, async |_, _, _| -> Answer { panic!("boom") });
        let router = Router::new().route("/", panics).with_state(Arc::new(app));
        insta::assert_snapshot!(answer(router, request(Method::GET, "/", "good", "")).await, @r#"
        500 content-type=application/json x-request-id=r-1
        {"success":false,"error":"Internal error; the service's log says more","code":"internal","requestId":"r-1"}
        "#);
    }

    #[test]
    fn only_a_sane_request_id_is_taken_over() {
        let id = |text: &str| request_id(&HeaderMap::from_iter([(REQUEST_ID, text.parse().unwrap())]));
        let long = "x".repeat(128);
        for sane in ["a", "A.b_c-9", &long] {
            assert_eq!(id(sane), sane);
        }
        for odd in ["", "a b", "a/b", "<b>", &format!("{long}x")] {
            assert_eq!(id(odd).len(), 24, "{odd}");
        }
        assert_eq!(request_id(&HeaderMap::new()).len(), 24);
    }
}
