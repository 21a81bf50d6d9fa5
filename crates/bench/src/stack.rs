//! The system under measurement: a real NATS, a real Postgres that syncs, the release services as processes of their own.

use std::{
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use contract::{
    ObjectId,
    key::Scope,
    process::ProcessSpec,
    rpc::{CreateKey, CreateProject, ProcessChangeResult, Project, Query},
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
    load::{Load, Pace, lead_id},
    meter::{Meter, Subject},
};

/// How long anything may take that is not measured.
const SOON: Duration = Duration::from_secs(60);
/// Room for millions of messages in the log and in the events.
const STREAM_BYTES: &str = "4294967296";
/// The key that callbacks' secrets are sealed with.
const SECRETS_KEY: &str = "S2V5IG9mIHRoZSBiZW5jaCwgMzIgYnl0ZXMgbG9uZy4=";

/// All of it.
pub(crate) struct Stack {
    pub(crate) gateway: Service,
    pub(crate) lead_state: Service,
    pub(crate) notifier: Service,
    ready: [String; 3],
    pub(crate) http: SocketAddr,
    pub(crate) key: String,
    pub(crate) project_id: ObjectId,
    pub(crate) process_id: ObjectId,
    pub(crate) driver: Driver,
    /// Where the callback's endpoint listens.
    pub(crate) endpoint: SocketAddr,
    pub(crate) client: async_nats::Client,
    pub(crate) pool: PgPool,
    pub(crate) nats: LocalNats,
    pub(crate) postgres: LocalPostgres,
    pub(crate) leads: u64,
}

/// A Postgres as one would run it: every commit is on the disk before it is answered.
pub(crate) async fn postgres() -> anyhow::Result<LocalPostgres> {
    dev_stack::ensure_installed(Install::Allowed, &|line| eprintln!("{line}")).await?;
    Ok(LocalPostgres::start(PostgresOptions { fsync: true, ..PostgresOptions::default() }, &dev_stack::quiet).await?)
}

/// A nats-server; with `sync` it syncs before it acks.
pub(crate) async fn nats(sync: bool) -> anyhow::Result<LocalNats> {
    dev_stack::ensure_installed(Install::Allowed, &|line| eprintln!("{line}")).await?;
    let nats = LocalNats::start(NatsOptions { sync, ..NatsOptions::default() }, &dev_stack::quiet).await?;
    ensure!(nats.syncs() == sync, "this nats-server cannot sync before it acks");
    Ok(nats)
}

impl Stack {
    /// Starts everything, with so many leads and one callback.
    pub(crate) async fn start(sync: bool, leads: u64) -> anyhow::Result<Self> {
        Self::start_with(sync, leads, &[]).await
    }

    /// The same with environment variables that all services see.
    pub(crate) async fn start_with(sync: bool, leads: u64, extra: &[(&str, &str)]) -> anyhow::Result<Self> {
        let (nats, postgres) = tokio::try_join!(nats(sync), postgres())?;
        let mut driver = Driver::start()?;
        let endpoint = driver.listen().await?;
        let http = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let start = |name: &str| {
            let health = format!("127.0.0.1:{}", free_port());
            let mut command = Command::new(binary(name));
            command.env("NATS_URL", nats.url()).env("HEALTH_LISTEN", &health);
            command.env("STREAM_MAX_BYTES", STREAM_BYTES).env("DATABASE_URL", postgres.url());
            command.env("SECRETS_KEY", SECRETS_KEY).env("ALLOW_HTTP", "true").env("ALLOW_NETWORKS", "127.0.0.0/8");
            command.env("GATEWAY_LISTEN", http.to_string());
            command.env("GATEWAY_UPDATE_RATE", "0").env("GATEWAY_OTHER_RATE", "0");
            command.envs(extra.iter().copied());
            (Service::spawn(name, command), format!("http://{health}/readyz"))
        };
        let (mut lead_state, lead_state_ready) = start("lead-state");
        let (mut gateway, gateway_ready) = start("gateway");
        let (mut notifier, notifier_ready) = start("webhook-notifier");
        lead_state.wait_for_http(&lead_state_ready, SOON).await;
        gateway.wait_for_http(&gateway_ready, SOON).await;
        notifier.wait_for_http(&notifier_ready, SOON).await;
        let client = service_kit::nats::connect(&NatsConfig::at(nats.url()), "leadctl", &Default::default()).await?;
        let pool = PgPool::connect(&postgres.url()).await?;
        let (project_id, key) = project(&client).await?;
        let callbacks = json!([{"name": "crm", "url": format!("http://{endpoint}/crm"), "maxInFlight": 256}]);
        let applied = apply(&client, project_id, "sales", callbacks).await?;
        let process_id = applied.process.process_id.context("a process without an id")?;
        insert_leads(&pool, project_id, &[process_id], 0..leads).await?;
        let mut stack = Self {
            gateway,
            lead_state,
            notifier,
            ready: [gateway_ready, lead_state_ready, notifier_ready],
            http,
            key,
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
        stack.known().await?;
        Ok(stack)
    }

    /// Waits until the key and the callback have reached the services.
    async fn known(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let request = http_client().get(format!("http://{}/api/v1/leads/get", self.http)).bearer_auth(&self.key);
            if request.send().await?.status().as_u16() != 401 {
                break;
            }
            ensure!(Instant::now() < deadline, "the gateway does not know the key");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let load = Load { connections: 1, pace: Pace::Rate(50), ..self.load(Duration::from_millis(200)) };
        let posted = self.driver.post(load).await?;
        let received = self.driver.received(posted.accepted, SOON).await?;
        ensure!(received.updates == posted.accepted, "{received:?} of {posted:?}");
        self.driver.reset().await
    }

    /// Updates for this time, as fast as they are answered.
    pub(crate) fn load(&self, lasting: Duration) -> Load {
        Load {
            to: self.http,
            key: self.key.clone(),
            leads: self.leads,
            connections: 64,
            pace: Pace::Answered,
            lasting,
            unheard: None,
        }
    }

    /// Starts a service again that was stopped.
    pub(crate) async fn restart(&mut self, which: fn(&mut Self) -> &mut Service) {
        let name = which(self).name().to_owned();
        which(self).restart().await;
        let place = ["gateway", "lead-state", "webhook-notifier"].iter().position(|service| *service == name);
        let ready = self.ready[place.unwrap_or_default()].clone();
        which(self).wait_for_http(&ready, SOON).await;
    }

    /// Measures what all of it takes.
    pub(crate) fn meter(&self) -> Meter {
        let one = |name, pid| Subject { name, pid, tree: false };
        Meter::start(vec![
            one("gateway", self.gateway.pid()),
            one("lead-state", self.lead_state.pid()),
            one("webhook-notifier", self.notifier.pid()),
            one("nats-server", self.nats.pid()),
            Subject { name: "postgres", pid: self.postgres.pid(), tree: true },
            one("driver", self.driver.pid()),
        ])
    }

    /// The number of a query's one row.
    pub(crate) async fn count(&self, sql: &'static str) -> anyhow::Result<i64> {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.context(sql)
    }

    /// How far the log is applied and announced.
    pub(crate) async fn checkpoint(&self) -> anyhow::Result<(u64, u64)> {
        let (applied, announced): (i64, i64) =
            sqlx::query_as("SELECT last_sequence, announced_sequence FROM lead_state.checkpoints")
                .fetch_one(&self.pool)
                .await?;
        Ok((applied.cast_unsigned(), announced.cast_unsigned()))
    }

    /// Where the write-ahead log of Postgres stands, in bytes.
    pub(crate) async fn wal(&self) -> anyhow::Result<i64> {
        self.count("SELECT (pg_current_wal_lsn() - '0/0')::bigint").await
    }

    /// The bytes of a stream, and its last sequence.
    pub(crate) async fn stream(&self, name: &str) -> anyhow::Result<(u64, u64)> {
        let mut stream = service_kit::nats::jetstream(&self.client).get_stream(name).await?;
        let state = &stream.info().await?.state;
        Ok((state.bytes, state.last_sequence))
    }

    /// Bytes of Postgres' log, of the command log and of the events.
    pub(crate) async fn written(&self) -> anyhow::Result<[f64; 3]> {
        let (wal, commands, events) =
            tokio::try_join!(self.wal(), self.stream(LEAD_COMMANDS), self.stream(LEAD_EVENTS))?;
        Ok([wal as f64, commands.0 as f64, events.0 as f64])
    }

    /// Waits until the log is applied and announced to its end.
    pub(crate) async fn settled(&self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let (_, last) = self.stream(LEAD_COMMANDS).await?;
            let (applied, announced) = self.checkpoint().await?;
            if applied == last && announced == last {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{applied} applied and {announced} announced of {last}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn project(client: &async_nats::Client) -> anyhow::Result<(ObjectId, String)> {
    let project: Project = request(client, &CreateProject { name: "bench".into() }).await?;
    let key = api_key::generate(rand::random());
    let create = CreateKey {
        project_id: project.project_id,
        name: "bench".into(),
        sha256: api_key::hash(&key),
        scopes: Scope::ALL.into(),
        expires_at: None,
    };
    let _: contract::key::ApiKey = request(client, &create).await?;
    Ok((project.project_id, key))
}

/// Applies a process with the usual states.
pub(crate) async fn apply(
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
    service_kit::rpc::request(client, query).await.with_context(|| Q::SUBJECT)
}

/// Makes leads, as if they had been initiated; the processes have them in turn.
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
    .context("cannot make leads")?;
    sqlx::query("VACUUM ANALYZE lead_state.leads").execute(pool).await?;
    Ok(())
}

/// Whether this machine's nats-server can sync before it acks.
pub(crate) async fn nats_syncs() -> anyhow::Result<bool> {
    dev_stack::ensure_installed(Install::Allowed, &|line| eprintln!("{line}")).await?;
    let options = NatsOptions { sync: true, ..NatsOptions::default() };
    Ok(LocalNats::start(options, &dev_stack::quiet).await?.syncs())
}
