//! 1 Accept: the server: the routes, what is common to all answers, and the gateway's life.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
};

use async_nats::{Client, jetstream};
use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{get, post},
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
    kv::View,
    lifecycle::{DRAIN_DEADLINE, Tasks},
    nats,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    auth,
    command_log::CommandLog,
    config::Config,
    error::ApiError,
    routes::{get_lead, get_update, initiate_lead, update_lead},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct App {
    /// The API keys, by their SHA-256.
    keys: View<ApiKey>,
    /// Empty until the first connection.
    broker: OnceLock<Broker>,
    pub(crate) command_log: CommandLog,
    pub(crate) max_body_bytes: usize,
}

/// The connection to NATS.
#[derive(Debug)]
pub(crate) struct Broker {
    pub(crate) client: Client,
    pub(crate) js: jetstream::Context,
}

impl App {
    pub(crate) fn new(config: &Config, keys: View<ApiKey>) -> Self {
        Self {
            keys,
            broker: OnceLock::new(),
            command_log: CommandLog::new(config.max_in_flight as usize),
            max_body_bytes: config.max_body_bytes as usize,
        }
    }

    /// The key that a request comes under, if it may do this now.
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
    let readiness = Readiness::default();
    let app = Arc::new(App::new(&config, View::default()));
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn_background("health", health::serve(health_listener, readiness.clone(), shutdown.clone()));
    tasks.spawn("api keys", follow_keys(app.clone(), config.clone(), readiness, shutdown.clone()));
    tasks.spawn("http", async move {
        // Twice what may be in flight: clients past that are told so rather than left waiting in the kernel's queue.
        let limits = Limits { connections: 2 * config.max_in_flight as usize, ..Limits::default() };
        http::serve(listener, router(app.clone()), limits, shutdown).await?;
        app.command_log.drained().await;
        Ok(())
    });
    tasks.run(DRAIN_DEADLINE).await
}

/// Connects, then watches the API keys. Requests that come before are told 503.
async fn follow_keys(
    app: Arc<App>,
    config: Config,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    readiness.not_ready(LEAD_COMMANDS, "not found yet");
    let connect = async {
        let client = nats::connect(&config.nats, "gateway", &readiness).await?;
        let js = nats::jetstream(&client);
        let broker = app.broker.get_or_init(|| Broker { client, js });
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

/// The HTTP API.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/api/v1/leads/update", post(update_lead::handle))
        .route("/api/v1/leads/initiate", post(initiate_lead::handle))
        .route("/api/v1/leads/get", get(get_lead::handle))
        .route("/api/v1/updates/{updateId}", get(get_update::handle))
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .fallback(async || ApiError::UnknownPath)
        .layer(from_fn(finish))
        .with_state(app)
}

/// Gives every answer its request id and every error its body, also where a handler panicked.
async fn finish(request: Request, next: Next) -> Response {
    let request_id = request_id(request.headers());
    let span = tracing::info_span!("request", id = request_id);
    let handled = AssertUnwindSafe(next.run(request).instrument(span.clone())).catch_unwind().await;
    let _entered = span.entered();
    let mut response = handled.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!("a handler panicked: {}", text.unwrap_or("no message"));
        ApiError::Internal.into_response()
    });
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        tracing::debug!(status = error.status().as_u16(), code = error.code(), "refused: {error}");
        response = error.render(&request_id);
    }
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!("the request failed");
    }
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
