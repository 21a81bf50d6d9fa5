//! The health port: `/healthz` (the process runs), `/readyz` (it can do its work now) and `/metrics`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    http,
    metrics::{self, Registry},
};

/// The conditions that a service waits for. It is ready when there are none.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    waiting: Arc<Mutex<BTreeMap<&'static str, String>>>,
}

impl Readiness {
    /// Adds the condition `what`, with the reason.
    pub fn not_ready(&self, what: &'static str, why: impl Into<String>) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(what, why.into());
    }

    /// Removes a condition.
    pub fn ready(&self, what: &'static str) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(what);
    }

    /// The conditions with their reasons, one line each.
    pub fn waiting_for(&self) -> Vec<String> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.iter().map(|(what, why)| format!("{what}: {why}")).collect()
    }
}

/// Serves the health port, also while the service drains; readiness turns false as soon as shutdown begins.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    registry: Registry,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    tracing::info!(address = %listener.local_addr()?, "health port");
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(readiness.clone())
        .route("/metrics", get(show_metrics))
        .with_state(Arc::new(registry));
    let drain = async {
        shutdown.cancelled().await;
        readiness.not_ready("shutdown", "draining");
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = http::serve(listener, router, http::Limits::default(), CancellationToken::new()) => served,
        () = drain => Ok(()),
    }
}

async fn show_metrics(State(registry): State<Arc<Registry>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(&registry))
}

async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    let waiting = readiness.waiting_for();
    if waiting.is_empty() {
        (StatusCode::OK, "ready\n".into())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, waiting.join("\n") + "\n")
    }
}
