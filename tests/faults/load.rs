//! A load of updates over HTTP and NATS, and the tap that feeds the log to the reference model.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, pull},
    message::OutboundMessage,
};
use contract::streams::LEAD_COMMANDS;
use futures::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use reqwest::RequestBuilder;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::gaps::Gap;
use crate::support::{
    history::{self, Leads},
    model::Model,
};

/// How long a client repeats an update. Every fault is shorter.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);
/// The mean pause of a client between two updates.
const PAUSE: Duration = Duration::from_millis(40);
/// The mean pause between two erasures.
const ERASURE_PAUSE: Duration = Duration::from_secs(5);

/// What the clients know about their updates.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    accepted: Mutex<HashSet<String>>,
    /// Outcomes in responses, by update. Some clients send `Prefer: wait`.
    outcomes: Mutex<HashMap<String, Value>>,
    /// Updates of the HTTP clients, each counted once.
    pub(crate) intended: AtomicU64,
    /// The number of requests that were rejected or not answered, so that the update was sent again.
    pub(crate) repeated: AtomicU64,
    /// Accepted by the gateways.
    pub(crate) over_http: AtomicU64,
    /// Acked by NATS.
    pub(crate) over_nats: AtomicU64,
    /// Requests that a gateway answered with 503.
    pub(crate) unavailable: AtomicU64,
    /// The time between two acceptances over HTTP.
    pub(crate) acceptance: Gap,
}

impl Ledger {
    /// Ids of accepted updates whose id a client knows.
    pub(crate) fn accepted(&self) -> MutexGuard<'_, HashSet<String>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn outcomes(&self) -> MutexGuard<'_, HashMap<String, Value>> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client of the gateways.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) gateways: Vec<String>,
    pub(crate) key: String,
    pub(crate) http: reqwest::Client,
    /// How long the client waits for a response before it sends again.
    pub(crate) answer_within: Duration,
}

impl Client {
    /// Sends an update until it is accepted, and returns its id.
    pub(crate) async fn update(&self, body: &Value, ledger: &Ledger, random: &mut StdRng) -> String {
        let waits = random.random_bool(0.3);
        let request = |gateway: &str| {
            let request = self.update_request(gateway, body);
            if waits { request.header("prefer", "wait=1") } else { request }
        };
        self.send_until_accepted(request, ledger, random).await
    }

    /// Erases a lead, and returns the id of the erasure.
    async fn erase(&self, lead_id: &str, ledger: &Ledger, random: &mut StdRng) -> String {
        let request = |gateway: &str| self.http.delete(format!("{gateway}/api/v1/leads/{lead_id}"));
        self.send_until_accepted(request, ledger, random).await
    }

    /// Sends a request to random gateways until it is accepted, and returns the id of its update. All repetitions have
    /// one idempotency key, so they are one update.
    async fn send_until_accepted(
        &self,
        request: impl Fn(&str) -> RequestBuilder,
        ledger: &Ledger,
        random: &mut StdRng,
    ) -> String {
        let idempotency_key = format!("{:032x}", rand::random::<u128>());
        ledger.intended.fetch_add(1, Ordering::Relaxed);
        let deadline = Instant::now() + GIVE_UP_AFTER;
        loop {
            let request = request(self.gateways.choose(random).expect("a gateway"));
            match self.try_send(request.header("idempotency-key", &idempotency_key), ledger).await {
                Ok((update_id, outcome)) => {
                    if let Some(outcome) = outcome {
                        ledger.outcomes().insert(update_id.clone(), outcome);
                    }
                    ledger.over_http.fetch_add(1, Ordering::Relaxed);
                    ledger.acceptance.record();
                    ledger.accepted().insert(update_id.clone());
                    return update_id;
                }
                Err(e) => assert!(Instant::now() < deadline, "not accepted within {GIVE_UP_AFTER:?}: {e:#}"),
            }
            ledger.repeated.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(random.random_range(20..200))).await;
        }
    }

    fn update_request(&self, gateway: &str, body: &Value) -> RequestBuilder {
        let mut body = body.as_object().expect("a body").clone();
        let expected_state = body.remove("expectedState");
        let state = expected_state.as_ref().and_then(Value::as_str).map(|state| format!("?expectedState={state}"));
        let mut request = self.http.post(format!("{gateway}/api/v1/leads/update{}", state.unwrap_or_default()));
        if let Some(version) = body.remove("expectedVersion") {
            request = request.header("if-match", format!("\"{version}\""));
        }
        request.body(Value::Object(body).to_string())
    }

    /// Sends a request once. Returns the id of its update and, if the response has it, the outcome.
    async fn try_send(&self, request: RequestBuilder, ledger: &Ledger) -> anyhow::Result<(String, Option<Value>)> {
        let answer = request.bearer_auth(&self.key).timeout(self.answer_within).send().await?;
        if answer.status() == 503 {
            ledger.unavailable.fetch_add(1, Ordering::Relaxed);
        }
        let answer = answer.bytes().await?;
        let answer: Value = serde_json::from_slice(&answer)?;
        if answer["success"] != true {
            // Other rejections would be repeated forever, because they do not depend on the state of the servers.
            let code = answer["code"].as_str().unwrap_or_default();
            let unavailable = [
                "log_full",
                "too_many_in_flight",
                "not_confirmed",
                "starting",
                "broker_unavailable",
                "idempotency_unavailable",
                "log_refused",
                "project_backlog",
            ];
            assert!(unavailable.contains(&code), "an update was refused: {answer}");
        }
        let update_id = answer["updateId"].as_str().filter(|_| answer["success"] == true).map(str::to_owned);
        Ok((update_id.context(answer.to_string())?, answer.get("outcome").cloned()))
    }
}

/// Starts clients that send until they are stopped, each with its own random history, and one client that erases leads
/// of the archive.
pub(crate) fn start(
    client: &Client,
    js: &jetstream::Context,
    leads: &[Leads],
    archive: &Leads,
    ledger: &Arc<Ledger>,
    seed: u64,
    stop: &CancellationToken,
) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for number in 0..6 {
        let (client, leads, ledger, stop) = (client.clone(), leads.to_vec(), ledger.clone(), stop.clone());
        clients.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed ^ number);
            while !stop.is_cancelled() {
                let of = leads.choose(&mut random).expect("leads");
                let body = history::update(of, &mut random);
                let mut named = body.clone();
                named["projectId"] = json!(of.project_id);
                // The gateway rejects updates that change nothing.
                if ["metadata", "name", "targetState"].iter().any(|field| named.get(field).is_some()) {
                    client.update(&named, &ledger, &mut random).await;
                }
                pause(&mut random).await;
            }
        });
    }
    {
        let (client, archive, ledger, stop) = (client.clone(), archive.clone(), ledger.clone(), stop.clone());
        clients.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed ^ 50);
            for (lead_id, _) in &archive.leads {
                let pause = ERASURE_PAUSE.mul_f64(random.random_range(0.0..2.0));
                if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                    break;
                }
                client.erase(lead_id, &ledger, &mut random).await;
            }
        });
    }
    for number in 100..102 {
        let (js, leads, ledger, stop) = (js.clone(), leads.to_vec(), ledger.clone(), stop.clone());
        clients.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed ^ number);
            let mut last = None;
            while !stop.is_cancelled() {
                let of = leads.choose(&mut random).expect("leads");
                let now = service_kit::clock::now();
                // Sometimes a producer repeats its last message.
                let again = last.take().filter(|_| random.random_bool(0.1));
                let (subject, payload) = again.unwrap_or_else(|| history::message(of, now, &mut random));
                produce(&js, &subject, &payload, &ledger, &mut random).await;
                last = Some((subject, payload));
                pause(&mut random).await;
            }
        });
    }
    clients
}

async fn pause(random: &mut StdRng) {
    tokio::time::sleep(PAUSE.mul_f64(random.random_range(0.0..2.0))).await;
}

/// Publishes as an internal producer does, until the log has it.
async fn produce(js: &jetstream::Context, subject: &str, payload: &bytes::Bytes, ledger: &Ledger, random: &mut StdRng) {
    let deadline = Instant::now() + GIVE_UP_AFTER;
    loop {
        let message = OutboundMessage { subject: subject.into(), payload: payload.clone(), headers: None };
        match service_kit::publish::publish(js, message).await {
            Ok(_) => break,
            Err(e) => assert!(Instant::now() < deadline, "not in the log within {GIVE_UP_AFTER:?}: {e}"),
        }
        ledger.repeated.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(random.random_range(20..200))).await;
    }
    ledger.over_nats.fetch_add(1, Ordering::Relaxed);
    let update_id =
        serde_json::from_slice::<Value>(payload).ok().and_then(|body| body["updateId"].as_str().map(str::to_owned));
    if let Some(update_id) = update_id.filter(|_| subject.ends_with(".update") && !subject.contains("no-project")) {
        ledger.accepted().insert(update_id);
    }
}

/// Feeds the log to a model, from its beginning and as it grows.
pub(crate) struct Tap {
    pub(crate) model: Arc<Mutex<Model>>,
    read: Arc<AtomicU64>,
    _task: tokio_util::task::AbortOnDropHandle<()>,
}

impl Tap {
    pub(crate) fn start(js: jetstream::Context, model: Model) -> Self {
        let (model, read) = (Arc::new(Mutex::new(model)), Arc::<AtomicU64>::default());
        let (feed, count) = (model.clone(), read.clone());
        let task = tokio::spawn(async move {
            loop {
                // The server may be unavailable. The next consumer continues where this one ended.
                let _ = follow(&js, &feed, &count).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self { model, read, _task: tokio_util::task::AbortOnDropHandle::new(task) }
    }

    /// The last sequence that was read.
    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Acquire)
    }
}

async fn follow(js: &jetstream::Context, model: &Mutex<Model>, read: &AtomicU64) -> anyhow::Result<()> {
    let log = js.get_stream(LEAD_COMMANDS).await?;
    let consumer = log
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: read.load(Ordering::Acquire) + 1 },
            ack_policy: AckPolicy::None,
            memory_storage: true,
            inactive_threshold: Duration::from_secs(10),
            ..Default::default()
        })
        .await?;
    let mut messages =
        consumer.stream().heartbeat(Duration::from_secs(1)).expires(Duration::from_secs(3)).messages().await?;
    loop {
        let message = messages.next().await.context("the consumer ended")??;
        let info = message.info().map_err(|e| anyhow::anyhow!("{e}"))?;
        let expected = read.load(Ordering::Acquire) + 1;
        if info.stream_sequence < expected {
            continue;
        }
        // Either retention removed messages, or a message was lost in transit. The next consumer shows which.
        anyhow::ensure!(info.stream_sequence == expected, "a gap behind {}", expected - 1);
        let mut model = model.lock().unwrap_or_else(PoisonError::into_inner);
        model.feed(info.stream_sequence, info.published.into(), &message.subject, &message.payload);
        read.store(info.stream_sequence, Ordering::Release);
    }
}
