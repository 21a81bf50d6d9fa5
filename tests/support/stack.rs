//! The system under test: NATS, Postgres, the three services and a receiver of webhooks.

use std::{path::Path, process::Command};

use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use contract::{
    ObjectId,
    process::ProcessSpec,
    rpc::{ErrorCode, ProcessChangeResult, Query, RpcError},
    streams::PROCESSES,
    subject::process_key,
};
use lead_state::core::entry::LogMessage;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use test_support::{
    LocalNats, LocalPostgres, Receiver, Service, binary, eventually, free_port, nats, nats_cluster, postgres,
};

use super::{Api, TEST_TIMEOUT};

/// The key that seals secrets, unless a test sets another one.
pub(crate) const SECRETS_KEY: &str = "S2V5IG9mIHRoZSB0ZXN0cywgMzIgYnl0ZXMgbG9uZy4=";

pub(crate) struct Stack {
    pub(crate) gateway: Service,
    /// The URL of `/readyz` on its health port.
    pub(crate) gateway_ready: String,
    pub(crate) lead_state: Service,
    pub(crate) lead_state_ready: String,
    pub(crate) notifier: Service,
    pub(crate) notifier_ready: String,
    pub(crate) receiver: Receiver,
    pub(crate) api: Api,
    pub(crate) client: async_nats::Client,
    pub(crate) pool: PgPool,
    pub(crate) nats: LocalNats,
    /// The other members of its cluster, if it is in one.
    pub(crate) nats_peers: Vec<LocalNats>,
    pub(crate) postgres: LocalPostgres,
    /// `DATABASE_URL` of the services and of leadctl.
    pub(crate) database_url: String,
}

/// The URL of all servers of a cluster.
pub(crate) fn cluster_url<'a>(servers: impl IntoIterator<Item = &'a LocalNats>) -> String {
    servers.into_iter().map(LocalNats::url).collect::<Vec<_>>().join(",")
}

/// Starts a service with `extra` in its environment. Returns the process, and the URL of its `/readyz`.
pub(crate) fn service(
    name: &str,
    nats: &LocalNats,
    postgres: &LocalPostgres,
    extra: &[(&str, &str)],
) -> (Service, String) {
    service_of(&binary(name), name, nats, postgres, extra)
}

/// Like [`service`], with this program.
pub(crate) fn service_of(
    program: &Path,
    name: &str,
    nats: &LocalNats,
    postgres: &LocalPostgres,
    extra: &[(&str, &str)],
) -> (Service, String) {
    let health = format!("127.0.0.1:{}", free_port());
    let mut command = Command::new(program);
    command.env("NATS_URL", nats.url()).env("HEALTH_LISTEN", &health).env("RUST_LOG", "info");
    if !matches!(name, "gateway" | "console") {
        command.env("DATABASE_URL", postgres.url()).env("SECRETS_KEY", SECRETS_KEY);
    }
    if name == "gateway" {
        // The rate limits are off, because tests send all their requests with one key.
        for unlimited in ["GATEWAY_UPDATE_RATE", "GATEWAY_OTHER_RATE", "GATEWAY_WORK_RATE"] {
            command.env(unlimited, "0");
        }
        command.env("GATEWAY_LISTEN", "127.0.0.1:0");
    }
    if name == "webhook-notifier" {
        command.env("ALLOW_HTTP", "true").env("ALLOW_NETWORKS", "127.0.0.0/8");
    }
    command.envs(extra.iter().copied());
    (Service::spawn(name, command), format!("http://{health}/readyz"))
}

impl Stack {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts everything; `extra` are environment variables that all services see.
    pub(crate) async fn start_with(extra: &[(&str, &str)]) -> Self {
        let (nats, postgres) = tokio::join!(nats(), postgres());
        let operator = NatsConfig::at(nats.url());
        Self::start_on(nats, postgres, &operator, |_| {
            extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        })
        .await
    }

    /// Starts everything on a cluster of three nats-servers, with three replicas of each stream; `extra` are
    /// environment variables that all services see.
    pub(crate) async fn start_on_cluster(extra: &[(&str, &str)]) -> Self {
        let (mut servers, postgres) = tokio::join!(nats_cluster(), postgres());
        let nats_url = cluster_url(&servers);
        let nats = servers.remove(0);
        let settings = [("NATS_URL", nats_url.as_str()), ("STREAM_REPLICAS", "3")];
        let settings = settings.iter().chain(extra);
        let settings: Vec<_> = settings.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let operator = NatsConfig::at(&nats_url);
        let stack = Self::start_on(nats, postgres, &operator, |_| settings.clone()).await;
        Self { nats_peers: servers, ..stack }
    }

    /// The URL of NATS: of all its servers.
    pub(crate) fn nats_url(&self) -> String {
        cluster_url([&self.nats].into_iter().chain(&self.nats_peers))
    }

    /// The member of the cluster with this name.
    pub(crate) fn nats_server(&mut self, name: &str) -> &mut LocalNats {
        let mut servers = [&mut self.nats].into_iter().chain(&mut self.nats_peers);
        servers.find(|server| server.name() == Some(name)).unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// Starts everything on these servers. `operator` is how the test itself reaches NATS; `extra` are a service's
    /// environment variables.
    pub(crate) async fn start_on(
        nats: LocalNats,
        postgres: LocalPostgres,
        operator: &NatsConfig,
        extra: impl Fn(&str) -> Vec<(String, String)>,
    ) -> Self {
        let listen = format!("127.0.0.1:{}", free_port());
        let start = |name: &str, more: &[(String, String)]| {
            let extra = [extra(name).as_slice(), more].concat();
            let extra: Vec<_> = extra.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            service(name, &nats, &postgres, &extra)
        };
        let (mut lead_state, lead_state_ready) = start("lead-state", &[]);
        let (mut gateway, gateway_ready) = start("gateway", &[("GATEWAY_LISTEN".to_owned(), listen.clone())]);
        let (mut notifier, notifier_ready) = start("webhook-notifier", &[]);
        lead_state.wait_for_http(&lead_state_ready, TEST_TIMEOUT).await;
        gateway.wait_for_http(&gateway_ready, TEST_TIMEOUT).await;
        notifier.wait_for_http(&notifier_ready, TEST_TIMEOUT).await;
        let client = service_kit::nats::connect(operator, "leadctl", &Default::default()).await.expect("a NATS client");
        let given = extra("lead-state").into_iter().find(|(name, _)| name == "DATABASE_URL");
        let database_url = given.map_or_else(|| postgres.url(), |(_, url)| url);
        let pool = PgPool::connect(&postgres.url()).await.expect("a Postgres client");
        let api = Api::create(format!("http://{listen}"), &client, "test").await;
        let receiver = Receiver::start().await;
        Self {
            gateway,
            gateway_ready,
            lead_state,
            lead_state_ready,
            notifier,
            notifier_ready,
            receiver,
            api,
            client,
            pool,
            nats,
            nats_peers: Vec::new(),
            postgres,
            database_url,
        }
    }

    pub(crate) async fn call<Q: Query>(&self, query: &Q) -> Q::Reply {
        call(&self.client, query).await
    }

    /// Applies a process with the usual states and these callbacks.
    pub(crate) async fn process(&self, callbacks: Value) -> ProcessChangeResult {
        let spec = json!({
            "projectId": self.api.project_id,
            "name": "sales",
            "states": [
                {"name": "new", "kind": "initial"}, {"name": "interested"}, {"name": "followup_2"},
                {"name": "lost", "kind": "terminal"},
            ],
            "callbacks": callbacks,
        });
        self.apply(spec).await
    }

    /// Applies the fallback process of a project with these callbacks.
    pub(crate) async fn fallback_of(&self, project_id: ObjectId, callbacks: Value) -> ProcessChangeResult {
        self.apply(json!({"projectId": project_id, "name": "_", "callbacks": callbacks})).await
    }

    /// The number of messages in the stream of dead letters.
    pub(crate) async fn dead_letters(&self) -> u64 {
        self.stream_state(contract::streams::LEAD_DEAD_LETTERS).await.messages
    }

    pub(crate) async fn apply(&self, spec: Value) -> ProcessChangeResult {
        let spec: ProcessSpec = serde_json::from_value(spec).expect("a process");
        self.call(&spec).await
    }

    pub(crate) fn js(&self) -> jetstream::Context {
        service_kit::nats::jetstream(&self.client)
    }

    /// The present state of a stream.
    pub(crate) async fn stream_state(&self, stream: &str) -> jetstream::stream::State {
        let stream = self.js().get_stream(stream).await.expect("a stream");
        stream.cached_info().state.clone()
    }

    /// The entries of the log: its messages, and the commands of its packs.
    pub(crate) async fn log_entries(&self) -> Vec<LogMessage> {
        let log = self.js().get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
        let state = &log.cached_info().state;
        let mut entries = Vec::new();
        for sequence in state.first_sequence.max(1)..=state.last_sequence {
            let message = log.get_raw_message(sequence).await.expect("a message");
            let (subject, logged_at) = (message.subject.into_string(), message.time.into());
            let message = LogMessage::alone(sequence, logged_at, subject, Some(message.headers), message.payload);
            entries.extend(message.into_entries());
        }
        entries
    }

    /// Applies a process with callbacks of these names, each at the receiver's path of that name.
    pub(crate) async fn process_calling(&self, callbacks: &[&str]) -> ProcessChangeResult {
        let callback = |name: &&str| json!({"name": name, "url": self.receiver.url(&format!("/{name}"))});
        self.process(callbacks.iter().map(callback).collect()).await
    }

    /// A lead of such a process.
    pub(crate) async fn lead(&self, callbacks: &[&str]) -> String {
        self.leads(callbacks, 1).await.remove(0)
    }

    /// This many leads of such a process, with the references `R-0`, `R-1`, …
    pub(crate) async fn leads(&self, callbacks: &[&str], count: usize) -> Vec<String> {
        let applied = self.process_calling(callbacks).await;
        let mut leads = Vec::new();
        for number in 0..count {
            leads.push(self.api.initiate(process_id(&applied), Some(&format!("R-{number}"))).await);
        }
        leads
    }

    /// Sends a message of a project's producers to the gateway, and returns the reply.
    pub(crate) async fn produce(
        &self,
        project_id: ObjectId,
        kind: &str,
        headers: &[(&str, &str)],
        body: &impl ToString,
    ) -> Value {
        let subject = format!("leads.intake.{project_id}.{kind}");
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        // A gateway serves a new project within a second.
        eventually(TEST_TIMEOUT, "the gateway answers producers", async || {
            let body = body.to_string().into();
            let answer = self.client.request_with_headers(subject.clone(), map.clone(), body).await;
            answer.map(|answer| serde_json::from_slice(&answer.payload).expect("an answer")).map_err(|e| e.to_string())
        })
        .await
    }

    /// Publishes an update of this stack's project to the log, as the gateway does.
    pub(crate) async fn publish_update(&self, body: &Value) {
        self.publish(format!("leads.cmd.{}.update", self.api.project_id), body.to_string()).await;
    }

    /// Publishes a call event (`started`, `ended`, `expired`) of this stack's project to the log.
    pub(crate) async fn publish_call(&self, event: &str, body: &Value) {
        self.publish(format!("leads.cmd.{}.call.{event}", self.api.project_id), body.to_string()).await;
    }

    /// Publishes a message to the log, and waits until the log has it.
    pub(crate) async fn publish(&self, subject: String, body: impl Into<bytes::Bytes>) {
        self.client.request(subject, body.into()).await.expect("an ack");
    }

    /// Starts a second gateway with `extra` in its environment. Returns the process, and a client of it for the same
    /// project.
    pub(crate) async fn second_gateway(&self, extra: &[(&str, &str)]) -> (Service, Api) {
        let listen = format!("127.0.0.1:{}", free_port());
        let nats_url = self.nats_url();
        let extra = [&[("NATS_URL", nats_url.as_str())], extra, &[("GATEWAY_LISTEN", listen.as_str())]].concat();
        let (mut gateway, ready) = service("gateway", &self.nats, &self.postgres, &extra);
        gateway.wait_for_http(&ready, TEST_TIMEOUT).await;
        (gateway, Api { url: format!("http://{listen}"), ..self.api.clone() })
    }

    /// Sets the last change of all processes to an hour ago, because the audit does not check updates right after a
    /// change.
    pub(crate) async fn backdate_processes(&self) {
        let backdate = "ALTER TABLE lead_state.processes DISABLE TRIGGER set_changed_at;
            UPDATE lead_state.processes SET changed_at = now() - interval '1 hour'";
        self.sql(backdate).await;
    }

    /// Replaces the entry of a process in the bucket, and returns the previous entry.
    pub(crate) async fn replace_entry(&self, process_id: ObjectId, entry: impl Into<Bytes>) -> Bytes {
        let bucket = self.js().get_key_value(PROCESSES).await.expect("the bucket");
        let key = process_key(self.api.project_id, Some(process_id));
        let before = bucket.get(&key).await.expect("an answer").expect("an entry");
        bucket.put(key, entry.into()).await.expect("written");
        before
    }

    /// Runs statements that return nothing.
    pub(crate) async fn sql(&self, statements: &str) {
        let ran = sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned())).execute(&self.pool).await;
        if let Err(e) = ran {
            panic!("{statements}: {e}");
        }
    }
}

/// Sends a query and returns the reply. Repeats the query while the service is unavailable, as on a loaded machine.
pub(crate) async fn call<Q: Query>(client: &async_nats::Client, query: &Q) -> Q::Reply {
    eventually(TEST_TIMEOUT, Q::SUBJECT, async || {
        match service_kit::rpc::request(client, query).await.map_err(RpcError::from) {
            Ok(reply) => Ok(reply),
            Err(e) if e.code == ErrorCode::Unavailable.as_str() => Err(e.to_string()),
            Err(e) => panic!("{}: {} {e}", Q::SUBJECT, e.code),
        }
    })
    .await
}

/// The id of a process that was applied.
pub(crate) fn process_id(applied: &ProcessChangeResult) -> ObjectId {
    applied.process.process_id.expect("the id of a process")
}
