//! The health port: `/healthz` (fails if a restart may help), `/readyz` (the service can do its work now) and
//! `/metrics`.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use futures::future::BoxFuture;
use tokio::{net::TcpListener, time::Instant};
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

/// How long a step may take before the process counts as stuck. Every wait in a step has a shorter deadline, so that
/// only a fault makes one longer.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// The current steps of tasks that a service cannot do without. The service is alive unless one of them is stuck.
#[derive(Debug, Clone, Default)]
pub struct Liveness {
    steps: Arc<Mutex<BTreeMap<&'static str, Instant>>>,
}

impl Liveness {
    /// Runs one step of a task. A task has one step in progress at a time.
    pub async fn step<T>(&self, task: &'static str, step: impl Future<Output = T>) -> T {
        struct Ended<'a>(&'a Liveness, &'static str);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                self.0.lock().remove(self.1);
            }
        }
        self.lock().insert(task, Instant::now());
        let _ended = Ended(self, task);
        step.await
    }

    /// Restarts the time of all current steps, because they wait for something that a restart would not bring about.
    pub fn excuse(&self) {
        self.lock().values_mut().for_each(|since| *since = Instant::now());
    }

    /// The tasks that are stuck, one line each.
    pub fn stuck(&self) -> Vec<String> {
        let steps = self.lock();
        let stuck = steps.iter().filter(|(_, since)| since.elapsed() > STUCK_AFTER);
        stuck.map(|(task, since)| format!("{task}: stuck for {} s", since.elapsed().as_secs())).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, Instant>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the health port, also while the service drains; readiness turns false as soon as shutdown begins.
pub fn serve(
    listener: TcpListener,
    readiness: Readiness,
    liveness: Liveness,
    registry: Registry,
    shutdown: CancellationToken,
) -> BoxFuture<'static, anyhow::Result<()>> {
    Box::pin(serve_until(shutdown, listener, readiness, liveness, registry))
}

async fn serve_until(
    shutdown: CancellationToken,
    listener: TcpListener,
    readiness: Readiness,
    liveness: Liveness,
    registry: Registry,
) -> anyhow::Result<()> {
    tracing::info!(address = %listener.local_addr()?, "health port");
    let router = Router::new()
        .route("/healthz", get(healthz))
        .with_state(liveness)
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

async fn healthz(State(liveness): State<Liveness>) -> (StatusCode, String) {
    respond(&liveness.stuck(), "ok\n")
}

async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    respond(&readiness.waiting_for(), "ready\n")
}

/// 200 unless there are problems.
fn respond(problems: &[String], fine: &str) -> (StatusCode, String) {
    if problems.is_empty() {
        (StatusCode::OK, fine.into())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, problems.join("\n") + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_step_that_does_not_end_is_stuck_unless_it_is_excused() {
        let liveness = Liveness::default();
        let endless = tokio::spawn({
            let liveness = liveness.clone();
            async move { liveness.step("leader", std::future::pending::<()>()).await }
        });
        liveness.step("recorder", tokio::time::sleep(STUCK_AFTER)).await;
        assert_eq!(liveness.stuck(), Vec::<String>::new());

        liveness.excuse();
        tokio::time::sleep(STUCK_AFTER).await;
        assert_eq!(liveness.stuck(), Vec::<String>::new());

        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(liveness.stuck(), ["leader: stuck for 121 s"]);

        endless.abort();
        assert!(endless.await.is_err());
        assert_eq!(liveness.stuck(), Vec::<String>::new());
    }
}
