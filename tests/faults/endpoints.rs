//! The callbacks under load: fast, slow, flapping, failing and hanging ones. They remember what they were told, not the
//! words.

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

/// How the flapping one changes its mind.
const FLAP: Duration = Duration::from_secs(2);

/// What an endpoint was told of an update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told {
    /// How often it accepted it.
    pub(crate) times: u32,
    /// The body's hash; every time the same.
    body: u64,
    /// Whether a body differed from the first.
    pub(crate) changed: bool,
}

/// A server with all of them, under `/{name}`.
#[derive(Debug)]
pub(crate) struct Endpoints {
    port: u16,
    shared: Arc<Shared>,
    _server: JoinHandle<anyhow::Result<()>>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    /// Whether the failing and the hanging one are well again.
    recovered: AtomicBool,
    /// By endpoint and update: what was answered with success.
    told: Mutex<HashMap<String, HashMap<String, Told>>>,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, HashMap<String, HashMap<String, Told>>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Endpoints {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let shared =
            Arc::new(Shared { started: Instant::now(), recovered: AtomicBool::new(false), told: Mutex::default() });
        let router = Router::new().fallback(receive).with_state(shared.clone());
        let limits = service_kit::http::Limits::default();
        let server = service_kit::http::serve(listener, router, limits, CancellationToken::new());
        Self { port, shared, _server: tokio::spawn(server) }
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }

    /// Lets the failing and the hanging one recover.
    pub(crate) fn recover(&self) {
        self.shared.recovered.store(true, Ordering::Relaxed);
    }

    /// What this one accepted, by update.
    pub(crate) fn told(&self, name: &str) -> HashMap<String, Told> {
        self.shared.told().get(name).cloned().unwrap_or_default()
    }

    /// Whether this one accepted news of an update.
    pub(crate) fn knows(&self, name: &str, update_id: &str) -> bool {
        self.shared.told().get(name).is_some_and(|told| told.contains_key(update_id))
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
    let mut told = shared.told();
    let known = told.entry(name.to_owned()).or_default();
    let told = known.entry(update_id.to_owned()).or_insert(Told { times: 0, body: hash, changed: false });
    told.times += 1;
    told.changed |= told.body != hash;
    StatusCode::OK
}
