//! The callbacks under load: fast, slow, flapping, failing and hanging ones. They count what they receive and keep
//! hashes of the bodies.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, body::Bytes, extract::State, http::StatusCode, http::Uri};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::gaps::Gap;

/// The interval at which the flapping endpoint fails and works.
const FLAP: Duration = Duration::from_secs(2);

/// The requests of one update that an endpoint received.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received {
    /// The number of accepted requests.
    pub(crate) times: u32,
    /// The hash of the first body.
    body: u64,
    /// Whether a body differed from the first.
    pub(crate) changed: bool,
}

/// A server with all endpoints, each at `/{name}`.
#[derive(Debug)]
pub(crate) struct Endpoints {
    port: u16,
    shared: Arc<Shared>,
    _server: JoinHandle<anyhow::Result<()>>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    /// Whether the failing and the hanging endpoint work.
    recovered: AtomicBool,
    /// The accepted requests, by endpoint and update.
    received: Mutex<HashMap<String, HashMap<String, Received>>>,
    /// The time between two deliveries.
    delivery: Gap,
}

impl Shared {
    fn received(&self) -> MutexGuard<'_, HashMap<String, HashMap<String, Received>>> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Endpoints {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let shared = Arc::new(Shared {
            started: Instant::now(),
            recovered: AtomicBool::new(false),
            received: Mutex::default(),
            delivery: Gap::default(),
        });
        let router = Router::new().fallback(receive).with_state(shared.clone());
        let limits = service_kit::http::Limits::default();
        let server = service_kit::http::serve(listener, router, limits, CancellationToken::new());
        Self { port, shared, _server: tokio::spawn(server) }
    }

    /// The time between two deliveries to any endpoint.
    pub(crate) fn delivery(&self) -> &Gap {
        &self.shared.delivery
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }

    /// Lets the failing and the hanging endpoint recover.
    pub(crate) fn recover(&self) {
        self.shared.recovered.store(true, Ordering::Relaxed);
    }

    /// The accepted requests of an endpoint, by update.
    pub(crate) fn received(&self, name: &str) -> HashMap<String, Received> {
        self.shared.received().get(name).cloned().unwrap_or_default()
    }

    pub(crate) fn has_received(&self, name: &str, update_id: &str) -> bool {
        self.shared.received().get(name).is_some_and(|received| received.contains_key(update_id))
    }
}

async fn receive(State(shared): State<Arc<Shared>>, uri: Uri, body: Bytes) -> StatusCode {
    let name = uri.path().trim_start_matches('/');
    let recovered = shared.recovered.load(Ordering::Relaxed);
    let kind = name.rsplit('-').next().unwrap_or_default();
    match kind {
        "slow" => tokio::time::sleep(Duration::from_millis(200)).await,
        "flapping" if shared.started.elapsed().as_secs() / FLAP.as_secs() % 2 == 1 && !recovered => {
            return StatusCode::SERVICE_UNAVAILABLE;
        }
        "failing" if !recovered => return StatusCode::INTERNAL_SERVER_ERROR,
        "hanging" if !recovered => tokio::time::sleep(Duration::from_secs(3600)).await,
        _ => {}
    }
    let Ok(json) = serde_json::from_slice::<Value>(&body) else { return StatusCode::BAD_REQUEST };
    let Some(update_id) = json["updateId"].as_str() else { return StatusCode::BAD_REQUEST };
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    let hash = hasher.finish();
    let mut all = shared.received();
    let of_endpoint = all.entry(name.to_owned()).or_default();
    let of_update = Received { times: 0, body: hash, changed: false };
    let received = of_endpoint.entry(update_id.to_owned()).or_insert(of_update);
    received.times += 1;
    received.changed |= received.body != hash;
    drop(all);
    shared.delivery.record();
    StatusCode::OK
}
