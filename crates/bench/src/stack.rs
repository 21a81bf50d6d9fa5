//! The measured system: a real NATS, a real Postgres with fsync, and release builds of the services as processes.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use contract::{
    ObjectId,
    key::Scope,
    process::ProcessSpec,
    rpc::{CreateKey, CreateProject, ProcessChangeResult, Query},
    streams::{LEAD_COMMANDS, LEAD_EVENTS},
};
use dev_stack::{Install, LocalNats, LocalPostgres, NatsOptions, PostgresOptions};
use secrets::api_key;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use test_support::{Service, binary, free_port, http_client};

use crate::{
    driver::Driver,
    load::lead_id,
    meter::{MeasuredProcess, Meter},
    protocol::{Content, Load, Pace, Posted, Received},
};

/// For steps that are not measured.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);
/// Large enough for millions of commands or events.
const STREAM_BYTES: &str = "4294967296";
/// Encrypts the callbacks' secrets.
const SECRETS_KEY: &str = "S2V5IG9mIHRoZSBiZW5jaCwgMzIgYnl0ZXMgbG9uZy4=";

pub(crate) struct Stack {
    pub(crate) gateway: Service,
    pub(crate) lead_state: Service,
    pub(crate) notifier: Service,
    /// By the name of the service.
    readiness_urls: BTreeMap<&'static str, String>,
    pub(crate) gateway_address: SocketAddr,
    pub(crate) api_key: String,
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: ObjectId,
    pub(crate) driver: Driver,
    /// Of the callback.
    pub(crate) endpoint: SocketAddr,
    pub(crate) client: async_nats::Client,
    pub(crate) pool: PgPool,
    pub(crate) nats: LocalNats,
    pub(crate) postgres: LocalPostgres,
    pub(crate) leads: u64,
}

/// A Postgres that syncs every commit, as in production.
pub(crate) async fn postgres() -> anyhow::Result<LocalPostgres> {
    install().await?;
    Ok(LocalPostgres::start(PostgresOptions { fsync: true, ..PostgresOptions::default() }, &dev_stack::quiet).await?)
}

/// A nats-server; with `sync`, one that syncs before it acks.
pub(crate) async fn nats(sync: bool) -> anyhow::Result<LocalNats> {
    let nats = start_nats(sync).await?;
    ensure!(nats.syncs() == sync, "this nats-server cannot sync before it acks; use version 2.10 or later");
    Ok(nats)
}

/// Whether the installed nats-server can sync before it acks.
pub(crate) async fn nats_can_sync() -> anyhow::Result<bool> {
    Ok(start_nats(true).await?.syncs())
}

async fn start_nats(sync: bool) -> anyhow::Result<LocalNats> {
    install().await?;
    Ok(LocalNats::start(NatsOptions { sync, ..NatsOptions::default() }, &dev_stack::quiet).await?)
}

async fn install() -> anyhow::Result<()> {
    Ok(dev_stack::ensure_installed(Install::Allowed, &|line| eprintln!("{line}")).await?)
}

impl Stack {
    /// Starts the servers, the services and the driver, with this number of leads and one callback.
    pub(crate) async fn start(sync: bool, leads: u64) -> anyhow::Result<Self> {
        let (nats, postgres) = tokio::try_join!(nats(sync), postgres())?;
        let mut driver = Driver::start()?;
        let endpoint = driver.listen().await?;
        let gateway_address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let start = |name: &str| {
            let health = format!("127.0.0.1:{}", free_port());
            let mut command = Command::new(binary(name));
            command.env("NATS_URL", nats.url()).env("HEALTH_LISTEN", &health);
            command.env("STREAM_MAX_BYTES", STREAM_BYTES).env("DATABASE_URL", postgres.url());
            command.env("SECRETS_KEY", SECRETS_KEY).env("ALLOW_HTTP", "true").env("ALLOW_NETWORKS", "127.0.0.0/8");
            command.env("GATEWAY_LISTEN", gateway_address.to_string());
            command.env("GATEWAY_UPDATE_RATE", "0").env("GATEWAY_OTHER_RATE", "0").env("GATEWAY_WORK_RATE", "0");
            (Service::spawn(name, command), format!("http://{health}/readyz"))
        };
        let (mut lead_state, lead_state_ready) = start("lead-state");
        let (mut gateway, gateway_ready) = start("gateway");
        let (mut notifier, notifier_ready) = start("webhook-notifier");
        lead_state.wait_for_http(&lead_state_ready, TIMEOUT).await;
        gateway.wait_for_http(&gateway_ready, TIMEOUT).await;
        notifier.wait_for_http(&notifier_ready, TIMEOUT).await;
        let client = service_kit::nats::connect(&NatsConfig::at(nats.url()), "leadctl", &Default::default()).await?;
        let pool = PgPool::connect(&postgres.url()).await?;
        let (project_id, api_key) = create_project(&client).await?;
        let events = ["update.succeeded", "update.failed", "activity.completed"];
        let url = format!("http://{endpoint}/crm");
        let callbacks = json!([{"name": "crm", "url": url, "maxInFlight": 256, "events": events}]);
        let applied = apply_process(&client, project_id, "sales", callbacks).await?;
        let process_id = applied.process.process_id.context("the applied process has no id")?;
        insert_leads(&pool, project_id, &[process_id], 0..leads).await?;
        let mut stack = Self {
            gateway,
            lead_state,
            notifier,
            readiness_urls: BTreeMap::from([
                ("gateway", gateway_ready),
                ("lead-state", lead_state_ready),
                ("webhook-notifier", notifier_ready),
            ]),
            gateway_address,
            api_key,
            project_id,
            process_id,
            driver,
            endpoint,
            client,
            pool,
            nats,
            postgres,
            leads,
        };
        stack.wait_until_configured().await?;
        Ok(stack)
    }

    /// Waits until the gateway accepts the API key and the notifier calls the callback.
    async fn wait_until_configured(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let url = format!("http://{}/api/v1/leads/get", self.gateway_address);
            let request = http_client().get(url).bearer_auth(&self.api_key);
            if request.send().await?.status().as_u16() != 401 {
                break;
            }
            ensure!(Instant::now() < deadline, "the gateway does not accept the API key");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let load = Load { connections: 1, pace: Pace::Rate(50), ..self.load(Duration::from_millis(200)) };
        self.post_and_receive_all(load).await?;
        self.driver.reset().await
    }

    /// Posts updates and waits for their webhooks; counts only these.
    pub(crate) async fn post_and_receive(&mut self, load: Load) -> anyhow::Result<(Posted, Received)> {
        self.driver.reset().await?;
        let posted = self.driver.post(load).await?;
        let received = self.driver.received(posted.expected, TIMEOUT).await?;
        Ok((posted, received))
    }

    /// Like [`Self::post_and_receive`], but fails if a webhook is missing.
    pub(crate) async fn post_and_receive_all(&mut self, load: Load) -> anyhow::Result<(Posted, Received)> {
        let (posted, received) = self.post_and_receive(load).await?;
        ensure!(received.updates == posted.expected, "webhooks are missing: received {received:?} of {posted:?}");
        Ok((posted, received))
    }

    /// Updates to all leads on 64 connections, each sent as soon as the previous one is answered.
    pub(crate) fn load(&self, duration: Duration) -> Load {
        Load {
            gateway: self.gateway_address,
            api_key: self.api_key.clone(),
            leads: self.leads,
            connections: 64,
            pace: Pace::Answered,
            content: Content::Update,
            duration,
            ignored_leads: None,
        }
    }

    /// Starts a stopped service again and waits until it is ready.
    pub(crate) async fn restart(&mut self, select: fn(&mut Self) -> &mut Service) {
        let name = select(self).name().to_owned();
        let url = self.readiness_urls[name.as_str()].clone();
        select(self).restart().await;
        select(self).wait_for_http(&url, TIMEOUT).await;
    }

    /// Starts to measure the services, the servers and the driver.
    pub(crate) fn meter(&self) -> Meter {
        let single = |name, pid| MeasuredProcess { name, pid, tree: false };
        Meter::start(vec![
            single("gateway", self.gateway.pid()),
            single("lead-state", self.lead_state.pid()),
            single("webhook-notifier", self.notifier.pid()),
            single("nats-server", self.nats.pid()),
            MeasuredProcess { name: "postgres", pid: self.postgres.pid(), tree: true },
            single("driver", self.driver.pid()),
        ])
    }

    /// The result of a query with one row and one number.
    pub(crate) async fn count(&self, sql: &'static str) -> anyhow::Result<i64> {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.context(sql)
    }

    /// The sequences of the last applied and the last announced command.
    pub(crate) async fn checkpoint(&self) -> anyhow::Result<(u64, u64)> {
        let (applied, announced): (i64, i64) =
            sqlx::query_as("SELECT last_sequence, announced_sequence FROM lead_state.checkpoints")
                .fetch_one(&self.pool)
                .await?;
        Ok((applied.cast_unsigned(), announced.cast_unsigned()))
    }

    /// The bytes written to Postgres' write-ahead log so far.
    async fn wal_bytes(&self) -> anyhow::Result<i64> {
        self.count("SELECT (pg_current_wal_lsn() - '0/0')::bigint").await
    }

    /// The size in bytes and the last sequence of a stream.
    pub(crate) async fn stream_state(&self, name: &str) -> anyhow::Result<(u64, u64)> {
        let mut stream = service_kit::nats::jetstream(&self.client).get_stream(name).await?;
        let state = &stream.info().await?.state;
        Ok((state.bytes, state.last_sequence))
    }

    /// The bytes of Postgres' write-ahead log, of the command log and of the events.
    pub(crate) async fn written_bytes(&self) -> anyhow::Result<[f64; 3]> {
        let (wal, commands, events) =
            tokio::try_join!(self.wal_bytes(), self.stream_state(LEAD_COMMANDS), self.stream_state(LEAD_EVENTS))?;
        Ok([wal as f64, commands.0 as f64, events.0 as f64])
    }

    /// Waits until every command in the log is applied and announced.
    pub(crate) async fn wait_until_announced(&self, timeout: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let (_, last) = self.stream_state(LEAD_COMMANDS).await?;
            let (applied, announced) = self.checkpoint().await?;
            if applied == last && announced == last {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the log has {last} commands, only {applied} are applied and {announced} announced"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Creates a project and an API key with all scopes.
async fn create_project(client: &async_nats::Client) -> anyhow::Result<(ObjectId, String)> {
    let project = request(client, &CreateProject { name: "bench".into() }).await?;
    let key = api_key::generate(rand::random());
    let create = CreateKey {
        project_id: project.project_id,
        name: "bench".into(),
        sha256: api_key::hash(&key),
        scopes: Scope::ALL.into(),
        expires_at: None,
    };
    request(client, &create).await?;
    Ok((project.project_id, key))
}

/// Applies a process with four states.
pub(crate) async fn apply_process(
    client: &async_nats::Client,
    project_id: ObjectId,
    name: &str,
    callbacks: Value,
) -> anyhow::Result<ProcessChangeResult> {
    let spec: ProcessSpec = serde_json::from_value(json!({
        "projectId": project_id,
        "name": name,
        "states": [
            {"name": "new", "kind": "initial"}, {"name": "interested"}, {"name": "followup_2"},
            {"name": "lost", "kind": "terminal"},
        ],
        "callbacks": callbacks,
    }))?;
    request(client, &spec).await
}

async fn request<Q: Query>(client: &async_nats::Client, query: &Q) -> anyhow::Result<Q::Reply> {
    service_kit::rpc::request(client, query).await.with_context(|| format!("{} failed", Q::SUBJECT))
}

/// Inserts leads with these numbers, distributed over the processes.
pub(crate) async fn insert_leads(
    pool: &PgPool,
    project_id: ObjectId,
    processes: &[ObjectId],
    numbers: std::ops::Range<u64>,
) -> anyhow::Result<()> {
    let prefix = lead_id(0).as_bytes()[..4].to_vec();
    sqlx::query(
        r#"INSERT INTO lead_state.leads
               (lead_id, project_id, process_id, reference_id, name, phone, state, metadata, version, created_at, updated_at)
           SELECT $1 || int8send(n), $2, $3[1 + n % cardinality($3)], 'crm-' || n, 'Ada Lovelace', '+4915112345678', 'new',
                  '{"source":"import","city":"Berlin"}', 1, now(), now()
           FROM generate_series($4, $5) AS n"#,
    )
    .bind(prefix)
    .bind(project_id.as_bytes())
    .bind(processes.iter().map(|process_id| process_id.as_bytes().as_slice()).collect::<Vec<_>>())
    .bind(numbers.start.cast_signed())
    .bind(numbers.end.cast_signed() - 1)
    .execute(pool)
    .await
    .context("cannot insert leads")?;
    sqlx::query("VACUUM ANALYZE lead_state.leads").execute(pool).await?;
    Ok(())
}
