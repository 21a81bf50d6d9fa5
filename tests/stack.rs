//! The system under test: NATS, Postgres, the three services, a receiver; a project with a process and leads.

use std::{
    collections::HashMap,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use contract::{
    ObjectId,
    key::Scope,
    process::ProcessSpec,
    rpc::{self, CreateKey, CreateProject, ProcessChangeResult, Project},
};
use secrets::api_key;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use service_kit::{config::NatsConfig, nats::error_chain};
use sqlx::PgPool;
use test_support::{LocalNats, LocalPostgres, Receiver, Service, binary, eventually, free_port, nats, postgres};

/// How long anything may take before a test gives up. Longer only makes a red test slower.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// The key that secrets are sealed with, unless a test says otherwise.
pub(crate) const SECRETS_KEY: &str = "S2V5IG9mIHRoZSB0ZXN0cywgMzIgYnl0ZXMgbG9uZy4=";

/// The exact words of the seed.
pub(crate) const CALL_IN_PROGRESS: &str = "Lead update is not allowed while a call is in progress for this lead";

pub(crate) struct Stack {
    pub(crate) gateway: Service,
    /// The health port's page that says whether it is ready.
    pub(crate) gateway_ready: String,
    pub(crate) lead_state: Service,
    /// The same of lead-state.
    pub(crate) lead_state_ready: String,
    pub(crate) notifier: Service,
    /// The same of the webhook-notifier.
    pub(crate) notifier_ready: String,
    pub(crate) receiver: Receiver,
    pub(crate) api: Api,
    pub(crate) client: async_nats::Client,
    pub(crate) pool: PgPool,
    pub(crate) nats: LocalNats,
    pub(crate) postgres: LocalPostgres,
}

/// A project's way into the gateway.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) project_id: ObjectId,
    pub(crate) http: reqwest::Client,
    /// How often the gateway said that an update may or may not be in the log.
    pub(crate) unconfirmed: Arc<AtomicUsize>,
}

/// Names a service's binary and what it must be told.
pub(crate) fn service(
    name: &str,
    nats: &LocalNats,
    postgres: &LocalPostgres,
    extra: &[(&str, &str)],
) -> (Service, String) {
    let health = format!("127.0.0.1:{}", free_port());
    let mut command = Command::new(binary(name));
    command.env("NATS_URL", nats.url()).env("HEALTH_LISTEN", &health).env("RUST_LOG", "info");
    if name != "gateway" {
        command.env("DATABASE_URL", postgres.url()).env("SECRETS_KEY", SECRETS_KEY);
    }
    if name == "gateway" {
        // Tests make all their requests under one key.
        command.env("GATEWAY_UPDATE_RATE", "0").env("GATEWAY_OTHER_RATE", "0");
    }
    if name == "webhook-notifier" {
        command.env("ALLOW_HTTP", "true").env("ALLOW_NETWORKS", "127.0.0.0/8");
    }
    // Unless the test says where.
    command.env("GATEWAY_LISTEN", "127.0.0.1:0");
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
        lead_state.wait_for_http(&lead_state_ready, SOON).await;
        gateway.wait_for_http(&gateway_ready, SOON).await;
        notifier.wait_for_http(&notifier_ready, SOON).await;
        let client = service_kit::nats::connect(operator, "leadctl", &Default::default()).await.expect("a NATS client");
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
            postgres,
        }
    }

    /// Asks a query or administers.
    pub(crate) async fn call<R: DeserializeOwned>(&self, subject: &str, query: &impl serde::Serialize) -> R {
        call(&self.client, subject, query).await
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

    /// Gives a project fallback callbacks.
    pub(crate) async fn fallback_of(&self, project_id: ObjectId, callbacks: Value) -> ProcessChangeResult {
        self.apply(json!({"projectId": project_id, "name": "_", "callbacks": callbacks})).await
    }

    /// Waits until everything that is in the log is applied and announced; the log's last sequence.
    pub(crate) async fn wait_until_applied(&self) -> u64 {
        wait_until_applied(&self.client, &self.pool, SOON * 4).await
    }

    /// How many dead letters there are.
    pub(crate) async fn dead_letters(&self) -> u64 {
        let js = service_kit::nats::jetstream(&self.client);
        let mut stream = js.get_stream(contract::streams::LEAD_DEAD_LETTERS).await.expect("the dead letters");
        stream.info().await.expect("their state").state.messages
    }

    pub(crate) async fn apply(&self, spec: Value) -> ProcessChangeResult {
        let spec: ProcessSpec = serde_json::from_value(spec).expect("a process");
        self.call(rpc::PROCESS_APPLY, &spec).await
    }

    /// Publishes as an internal producer does, any client and no headers, and waits until the log has it.
    pub(crate) async fn publish(&self, subject: String, body: impl Into<bytes::Bytes>) {
        self.client.request(subject, body.into()).await.expect("an ack");
    }

    /// The number of a query's one row.
    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.expect(sql)
    }

    /// Waits until the number of a query's one row is this.
    pub(crate) async fn wait_for_count(&self, sql: &'static str, expected: i64, deadline: Duration) {
        eventually(deadline, sql, async || {
            let count: Result<i64, _> = sqlx::query_scalar(sql).fetch_one(&self.pool).await;
            match count {
                Ok(count) if count == expected => Ok(()),
                other => Err(format!("{other:?} instead of {expected}")),
            }
        })
        .await;
    }
}

/// Waits until everything that is in the log is applied and announced; the log's last sequence.
pub(crate) async fn wait_until_applied(client: &async_nats::Client, pool: &PgPool, deadline: Duration) -> u64 {
    let js = service_kit::nats::jetstream(client);
    eventually(deadline, "the log is applied", async || {
        let mut log = js.get_stream(contract::streams::LEAD_COMMANDS).await.map_err(|e| e.to_string())?;
        let last = log.info().await.map_err(|e| e.to_string())?.state.last_sequence;
        let (applied, announced): (i64, i64) =
            sqlx::query_as("SELECT last_sequence, announced_sequence FROM lead_state.checkpoints")
                .fetch_one(pool)
                .await
                .map_err(|e| e.to_string())?;
        let done = applied.cast_unsigned() == last && announced == applied;
        if done { Ok(last) } else { Err(format!("{applied} applied and {announced} announced of {last}")) }
    })
    .await
}

pub(crate) async fn call<R: DeserializeOwned>(
    client: &async_nats::Client,
    subject: &str,
    query: &impl serde::Serialize,
) -> R {
    match service_kit::rpc::call(client, subject, query).await {
        Ok(reply) => reply,
        Err(e) => panic!("{subject}: {} {e}", e.code),
    }
}

impl Api {
    /// A new project with a key of all scopes, good at the gateway.
    pub(crate) async fn create(url: String, client: &async_nats::Client, name: &str) -> Self {
        let project: Project = call(client, rpc::PROJECT_CREATE, &CreateProject { name: name.into() }).await;
        Self::of_project(url, client, project.project_id).await
    }

    /// A key of all scopes for this project, good at the gateway.
    pub(crate) async fn of_project(url: String, client: &async_nats::Client, project_id: ObjectId) -> Self {
        let key = api_key::generate(rand::random());
        let create = CreateKey {
            project_id,
            name: "test".into(),
            sha256: api_key::hash(&key),
            scopes: Scope::ALL.into(),
            expires_at: None,
        };
        let _: contract::key::ApiKey = call(client, rpc::KEY_CREATE, &create).await;
        let api = Self { url, key, project_id, http: test_support::http_client(), unconfirmed: Arc::default() };
        eventually(SOON, "the gateway knows the key", async || {
            let (status, body) = api.get("/api/v1/leads/get").await;
            if status == 401 { Err(body.to_string()) } else { Ok(()) }
        })
        .await;
        api
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self.http.post(format!("{}{path}", self.url)).body(body.to_string());
        self.send(request.header("content-type", "application/json")).await
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        self.send(self.http.get(format!("{}{path}", self.url))).await
    }

    /// A request of any method, with headers.
    pub(crate) async fn ask(
        &self,
        method: reqwest::Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> (u16, Value) {
        let request = self.http.request(method, format!("{}{path}", self.url)).body(body.to_string());
        self.send(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let answer = request.bearer_auth(&self.key).send().await.expect("an answer");
        let status = answer.status().as_u16();
        let text = answer.text().await.expect("a body");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Initiates a lead; its id.
    pub(crate) async fn initiate(&self, process_id: ObjectId, reference_id: Option<&str>) -> String {
        let lead = json!({
            "projectId": self.project_id, "processId": process_id, "phone": "+4915112345678", "name": "Ada",
            "referenceId": reference_id, "metadata": {"source": "import"},
        });
        let (status, body) = self.post("/api/v1/leads/initiate", &json!({"lead": lead, "init": true})).await;
        assert_eq!(status, 200, "{body}");
        body["_id"].as_str().expect("an id").to_owned()
    }

    /// Posts an update that must be accepted; its id.
    pub(crate) async fn update(&self, body: Value) -> String {
        let (status, answer) = self.post("/api/v1/leads/update", &body).await;
        assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
        answer["updateId"].as_str().expect("an id").to_owned()
    }

    /// Posts an update until it is accepted, however often the gateway is away; its id.
    pub(crate) async fn update_stubbornly(&self, body: &Value) -> String {
        let deadline = Instant::now() + SOON * 2;
        loop {
            let fault = match self.try_update(body).await {
                Ok(update_id) => return update_id,
                Err(fault) => fault,
            };
            if fault.contains("not_confirmed") {
                self.unconfirmed.fetch_add(1, Ordering::Relaxed);
            }
            eprintln!("not accepted, sent again: {fault}");
            assert!(Instant::now() < deadline, "the update is not accepted: {fault}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_update(&self, body: &Value) -> Result<String, String> {
        let request = self.http.post(format!("{}/api/v1/leads/update", self.url)).bearer_auth(&self.key);
        let answer = request.body(body.to_string()).send().await.map_err(|e| error_chain(&e))?;
        let bytes = answer.bytes().await.map_err(|e| error_chain(&e))?;
        let body: Value = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        body["updateId"].as_str().filter(|_| body["success"] == true).map(str::to_owned).ok_or(body.to_string())
    }

    /// Waits until an update has its outcome and returns its story.
    pub(crate) async fn outcome(&self, update_id: &str) -> Value {
        eventually(SOON, "the update has its outcome", async || {
            let (status, body) = self.get(&format!("/api/v1/updates/{update_id}")).await;
            let done = status == 200 && body["data"]["status"] != "pending";
            if done { Ok(body["data"].clone()) } else { Err(format!("{status} {body}")) }
        })
        .await
    }
}

/// Asserts that a request carries a right Standard Webhooks signature.
pub(crate) fn verify(request: &test_support::Request, secret: &str) {
    assert!(verifies(request, secret), "signature");
}

/// Whether a request carries a right Standard Webhooks signature, checked here anew.
pub(crate) fn verifies(request: &test_support::Request, secret: &str) -> bool {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use hmac::{Hmac, KeyInit, Mac};
    let key = BASE64_STANDARD.decode(secret.strip_prefix("whsec_").expect("whsec_")).expect("base64");
    let header = |name| request.header(name).unwrap_or_else(|| panic!("no {name}"));
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&key).expect("a key");
    mac.update(format!("{}.{}.", header("webhook-id"), header("webhook-timestamp")).as_bytes());
    mac.update(&request.body);
    let expected = format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()));
    header("webhook-signature").split(' ').any(|signature| signature == expected)
}

/// Bodies by `updateId`, in the order in which they came.
pub(crate) fn by_update(requests: &[test_support::Request]) -> HashMap<String, Vec<Value>> {
    let mut bodies: HashMap<String, Vec<Value>> = HashMap::new();
    for request in requests {
        let body = request.json();
        bodies.entry(body["updateId"].as_str().expect("updateId").to_owned()).or_default().push(body);
    }
    bodies
}
