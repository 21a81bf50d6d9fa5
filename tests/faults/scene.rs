//! The environment of a run of faults: clients and producers that send all the time, callbacks that receive, and a
//! model that is fed from the log. Also the checks at the end of a run.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use async_nats::jetstream;
use rand::rngs::StdRng;
use serde_json::json;
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use test_support::{binary, eventually};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    endpoints::Endpoints,
    gaps::{Gaps, Watch},
    load::{self, Client, Ledger, Tap},
};
use crate::support::{
    Api, TEST_TIMEOUT,
    history::{self, differences},
    model::{self, Model},
    wait_until_applied,
};

/// How long applying and delivering may take at the end, in addition to the duration of the load.
const SETTLING: Duration = Duration::from_secs(120);

/// The addresses of the servers, without the proxies of the services.
#[derive(Debug, Clone)]
pub(crate) struct Servers {
    pub(crate) nats_url: String,
    pub(crate) database_url: String,
    pub(crate) gateways: Vec<String>,
}

/// The load, and the data for the checks at the end.
pub(crate) struct Scene {
    pub(crate) js: jetstream::Context,
    pub(crate) pool: PgPool,
    servers: Servers,
    endpoints: Endpoints,
    client: Client,
    leads: Vec<history::Leads>,
    callbacks: Vec<Subscription>,
    pub(crate) ledger: Arc<Ledger>,
    tap: Tap,
    stop: CancellationToken,
    clients: JoinSet<()>,
    began: Instant,
    applied: Watch,
}

pub(crate) struct Totals {
    load: Duration,
    settling: Duration,
    accepted: u64,
    over_http: u64,
    over_nats: u64,
    repeated: u64,
    outcomes: usize,
    applied: usize,
    failed: usize,
    repeated_commands: u64,
    dead_letters: usize,
    erased: usize,
    delivered: u64,
    duplicates: u64,
}

impl Scene {
    /// Creates processes with leads and callbacks, and starts the clients. A client waits for a response for
    /// `answer_within`.
    pub(crate) async fn start(servers: Servers, seed: u64, answer_within: Duration) -> Self {
        let nats = NatsConfig::at(&servers.nats_url);
        let nats_client =
            service_kit::nats::connect(&nats, "faults", &Default::default()).await.expect("a NATS client");
        let pool = PgPool::connect(&servers.database_url).await.expect("a Postgres client");
        let api = Api::create(servers.gateways[0].clone(), &nats_client, "faults").await;
        let endpoints = Endpoints::start().await;
        let (leads, callbacks, model) = prepare(&endpoints, &api, &nats_client).await;
        let (gateways, http) = (servers.gateways.clone(), test_support::http_client());
        let client = Client { gateways, key: api.key.clone(), http, answer_within };
        let js = service_kit::nats::jetstream(&nats_client);
        let ledger = Arc::<Ledger>::default();
        let tap = Tap::start(js.clone(), model);
        let stop = CancellationToken::new();
        let archive = leads.last().expect("the archive");
        let clients = load::start(&client, &js, &leads, archive, &ledger, seed, &stop);
        let applied = Watch::applied(pool.clone());
        Self {
            js,
            pool,
            servers,
            endpoints,
            client,
            leads,
            callbacks,
            ledger,
            tap,
            stop,
            clients,
            began: Instant::now(),
            applied,
        }
    }

    /// How long the load has lasted.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The longest times without acceptance, application and delivery since the last call.
    pub(crate) fn take_gaps(&self) -> Gaps {
        Gaps {
            acceptance: self.ledger.acceptance.take(),
            application: self.applied.gap.take(),
            delivery: self.endpoints.delivery().take(),
        }
    }

    /// Sends an update, and waits until it is delivered.
    pub(crate) async fn wait_until_recovered(&self, random: &mut StdRng) {
        let body = json!({"leadId": self.leads[0].leads[0].0, "metadata": {"probe": true}});
        let update_id = self.client.update(&body, &self.ledger, random).await;
        let what = format!("update {update_id}, sent after a fault was over, is delivered");
        eventually(TEST_TIMEOUT * 3, &what, async || self.endpoints.has_received("sales-fast", &update_id)).await;
    }

    /// Runs `leadctl audit`, which must be clean.
    pub(crate) async fn audit(&self) {
        let output = tokio::process::Command::new(binary("leadctl"))
            .arg("audit")
            .env("NATS_URL", &self.servers.nats_url)
            .env("DATABASE_URL", &self.servers.database_url)
            .output()
            .await
            .expect("leadctl");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Ends the load, waits until everything is applied and delivered, and runs the checks.
    pub(crate) async fn end(mut self) -> Totals {
        self.stop.cancel();
        while let Some(ended) = self.clients.join_next().await {
            ended.expect("a client");
        }
        let load = self.began.elapsed();
        let ended = Instant::now();

        let Self { js, pool, endpoints, leads, ledger, tap, callbacks, .. } = &self;
        endpoints.recover();
        let deadline = SETTLING + load;
        wait_until_applied(&js.client(), pool, deadline).await;
        eventually(deadline, "the last calls expire, and no update is queued", async || {
            let queued = sqlx::query_scalar("SELECT count(*) FROM lead_state.queued_updates");
            match queued.fetch_one(pool).await {
                Ok(0_i64) => Ok(()),
                queued => Err(format!("{queued:?}")),
            }
        })
        .await;
        let last = wait_until_applied(&js.client(), pool, deadline).await;
        eventually(deadline, "the log is read", async || {
            if tap.read() == last { Ok(()) } else { Err(format!("{} of {last}", tap.read())) }
        })
        .await;
        eventually(deadline, "all erasures are complete", async || {
            let pending = sqlx::query_scalar("SELECT count(*) FROM lead_state.pending_erasures");
            match pending.fetch_one(pool).await {
                Ok(0_i64) => Ok(()),
                pending => Err(format!("{pending:?}")),
            }
        })
        .await;
        let received = wait_for_all_deliveries(pool, endpoints, callbacks, deadline).await;
        let settling = ended.elapsed();

        // From here on nothing changes any more.
        let model = std::mem::take(&mut *tap.model.lock().unwrap_or_else(PoisonError::into_inner));
        let differences = differences(pool, &model).await;
        assert!(
            differences.is_empty(),
            "{} differences from the model, the first: {}",
            differences.len(),
            differences[0]
        );
        let known: HashSet<&String> = model.outcomes.keys().map(|(_, update_id)| update_id).collect();
        let lost: Vec<_> = ledger.accepted().iter().filter(|id| !known.contains(id)).cloned().collect();
        assert!(lost.is_empty(), "{} accepted and not in the log: {lost:?}", lost.len());
        // Outcomes in responses equal those of the model.
        let outcomes = std::mem::take(&mut *ledger.outcomes());
        for (update_id, outcome) in &outcomes {
            let key = (leads[0].project_id.to_string(), update_id.clone());
            // If the lead was erased in the meantime, the outcome may be that before or after the erasure.
            let right = [model.outcomes.get(&key).cloned(), model.stored_outcome(&key)];
            let is_right = right.iter().flatten().any(|model::Outcome { error, data, .. }| {
                [json!(error.is_none()), json!(error), json!(data)]
                    == ["success", "error", "data"].map(|field| outcome[field].clone())
            });
            assert!(is_right, "{update_id} was answered with\n{outcome}\ninstead of\n{right:?}");
        }
        assert!(!outcomes.is_empty(), "no answer had an outcome");
        assert!(!model.erased.is_empty(), "no lead was erased");
        // Repeated requests created no further updates.
        let over_http: i64 =
            sqlx::query_scalar("SELECT count(*) FROM lead_state.lead_updates WHERE api_key_id IS NOT NULL")
                .fetch_one(pool)
                .await
                .expect("the ledger");
        let intended = ledger.intended.load(Ordering::Relaxed);
        assert_eq!(over_http.cast_unsigned(), intended, "each update of an HTTP client is one update");
        self.audit().await;
        Totals {
            load,
            settling,
            accepted: ledger.accepted().len() as u64,
            over_http: ledger.over_http.load(Ordering::Relaxed),
            over_nats: ledger.over_nats.load(Ordering::Relaxed),
            repeated: ledger.repeated.load(Ordering::Relaxed),
            outcomes: outcomes.len(),
            applied: model.outcomes.len(),
            failed: model.outcomes.values().filter(|outcome| outcome.error.is_some()).count(),
            repeated_commands: model.repeated,
            dead_letters: model.dead_letters.len(),
            erased: model.erased.len(),
            delivered: received.values().map(|received| received.delivered).sum(),
            duplicates: received.values().map(|received| received.duplicates).sum(),
        }
    }
}

/// Creates two processes with leads and six callbacks, and a third process without callbacks, the archive, whose leads
/// are erased.
async fn prepare(
    endpoints: &Endpoints,
    api: &Api,
    nats_client: &async_nats::Client,
) -> (Vec<history::Leads>, Vec<Subscription>, Model) {
    let callback = |name: &str, only_failed: bool| {
        let mut callback = json!({"name": name, "url": endpoints.url(name), "timeoutSeconds": 1});
        if only_failed {
            callback["events"] = json!(["update.failed"]);
        }
        callback
    };
    let of_process = [
        vec![callback("sales-fast", false), callback("sales-slow", true), callback("sales-flapping", false)],
        vec![callback("support-fast", false), callback("support-failing", true), callback("support-hanging", true)],
    ];
    let mut model = Model::default();
    let mut leads = Vec::new();
    let mut subscriptions = Vec::new();
    let [sales, support] = history::processes(&json!([]));
    let mut archive = sales.clone();
    archive["name"] = json!("archive");
    for (mut spec, callbacks) in [sales, support].into_iter().zip(of_process) {
        spec["callbacks"] = json!(callbacks);
        let of = history::prepare(api, nats_client, spec, 8, &mut model).await;
        subscriptions.extend(callbacks.iter().map(|callback| Subscription {
            name: callback["name"].as_str().expect("a name").into(),
            process_id: of.process_id.to_string(),
            only_failed: callback.get("events").is_some(),
        }));
        leads.push(of);
    }
    leads.push(history::prepare(api, nats_client, archive, 100, &mut model).await);
    (leads, subscriptions, model)
}

/// A callback, and the outcomes that it subscribes to.
struct Subscription {
    name: String,
    process_id: String,
    only_failed: bool,
}

struct DeliveryCounts {
    delivered: u64,
    duplicates: u64,
}

/// Waits until every callback has received every outcome of an update that it subscribes to, and nothing else.
async fn wait_for_all_deliveries(
    pool: &PgPool,
    endpoints: &Endpoints,
    callbacks: &[Subscription],
    deadline: Duration,
) -> HashMap<String, DeliveryCounts> {
    let mut all = HashMap::new();
    for callback in callbacks {
        let expected: HashSet<String> = sqlx::query_scalar(
            "SELECT encode(update_id, 'hex') FROM lead_state.lead_updates
             WHERE encode(process_id, 'hex') = $1 AND NOT (success AND $2) AND kind = 'update'",
        )
        .bind(&callback.process_id)
        .bind(callback.only_failed)
        .fetch_all(pool)
        .await
        .expect("the ledger")
        .into_iter()
        .collect();
        let name = &callback.name;
        let received = eventually(deadline, &format!("{name} has received everything"), async || {
            let received = endpoints.received(name);
            let missing: Vec<_> = expected.iter().filter(|id| !received.contains_key(*id)).take(3).collect();
            if missing.is_empty() {
                Ok(received)
            } else {
                Err(format!("{} of {}: e.g. {missing:?} are missing", received.len(), expected.len()))
            }
        })
        .await;
        let unexpected: Vec<_> = received.keys().filter(|id| !expected.contains(*id)).collect();
        assert!(
            unexpected.is_empty(),
            "{name} received updates that it does not subscribe to, or that were not decided: {unexpected:?}"
        );
        let changed: Vec<_> = received.iter().filter(|(_, received)| received.changed).map(|(id, _)| id).collect();
        assert!(changed.is_empty(), "{name} received one update with two bodies: {changed:?}");
        let times: u64 = received.values().map(|received| u64::from(received.times)).sum();
        let delivered = received.len() as u64;
        all.insert(name.clone(), DeliveryCounts { delivered, duplicates: times - delivered });
    }
    // An endpoint receives a delivery a moment before the delivery is recorded.
    eventually(deadline, "no delivery is pending", async || {
        let pending: i64 = sqlx::query_scalar("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'")
            .fetch_one(pool)
            .await
            .map_err(|e| e.to_string())?;
        if pending == 0 { Ok(()) } else { Err(format!("{pending} pending")) }
    })
    .await;
    all
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "| | |\n|---|---|")?;
        writeln!(
            f,
            "| load, then settling | {:.0} s, {:.1} s |",
            self.load.as_secs_f64(),
            self.settling.as_secs_f64()
        )?;
        writeln!(f, "| updates accepted over HTTP, messages over NATS | {}, {} |", self.over_http, self.over_nats)?;
        writeln!(f, "| sent again after no answer or a refusal | {} |", self.repeated)?;
        writeln!(f, "| accepted ids known to clients, lost of them | {}, 0 |", self.accepted)?;
        writeln!(f, "| outcomes in answers, wrong ones among them | {}, 0 |", self.outcomes)?;
        writeln!(f, "| applied: succeeded, failed | {}, {} |", self.applied - self.failed, self.failed)?;
        writeln!(f, "| repeated in the log and not applied again | {} |", self.repeated_commands)?;
        writeln!(f, "| dead letters | {} |", self.dead_letters)?;
        writeln!(f, "| leads erased | {} |", self.erased)?;
        writeln!(f, "| delivered to six callbacks | {} |", self.delivered)?;
        write!(f, "| duplicates received | {} |", self.duplicates)
    }
}
