//! The connection to NATS, and the streams and buckets that the services need.

use std::{
    future::Future,
    io,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::Context;
use async_nats::{
    Client, ConnectOptions, Event, ServerAddr, ServerError,
    jetstream::{
        self,
        context::{RequestError, RequestErrorKind},
        kv,
        response::Response,
        stream::{self, Stream},
    },
};
use backon::{BackoffBuilder, ExponentialBuilder};
use contract::{
    ObjectId,
    secret::Secret,
    streams::{StreamLimits, buckets, streams},
    subject::inbox_prefix,
};
use futures::future::BoxFuture;
use percent_encoding::percent_decode_str;

use crate::{clock, config::NatsConfig, health::Readiness, version::ServerVersion};

/// How often a silent connection is probed. A server that froze or vanished is detected after three intervals. A longer
/// interval keeps requests waiting for it; a shorter one mistakes a busy machine for a dead one.
const PING_INTERVAL: Duration = Duration::from_millis(1500);
/// How long a server may take to accept a connection. A frozen one does not answer, and the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long JetStream may take to reply or acknowledge. A longer timeout keeps clients waiting while a broker is down;
/// a shorter one mistakes a slow disk for a lost message.
pub(crate) const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the last messages of a process may take to be sent.
const FLUSH: Duration = Duration::from_secs(2);

/// Connects under this name, with inboxes of its own, and retries until NATS accepts; `readiness` follows the
/// connection. Logs the limitations of the server's version, also after a reconnect to another one. The connection
/// lasts until the process ends.
///
/// # Errors
/// The configuration is invalid.
pub fn connect<'a>(
    config: &'a NatsConfig,
    name: &'a str,
    readiness: &'a Readiness,
) -> BoxFuture<'a, anyhow::Result<Client>> {
    Box::pin(connect_as(config, name, readiness.clone(), ConnectOptions::new(), VersionNotice::default()))
}

/// A second connection of a service, whose subscriptions hold `subscription_capacity` messages each. The first
/// connection reports the server's version and whether there is a connection.
///
/// # Errors
/// The configuration is invalid.
pub fn connect_again<'a>(
    config: &'a NatsConfig,
    name: &'a str,
    subscription_capacity: usize,
) -> BoxFuture<'a, anyhow::Result<Client>> {
    let options = ConnectOptions::new().subscription_capacity(subscription_capacity);
    let notice = VersionNotice { is_silent: true, ..VersionNotice::default() };
    Box::pin(connect_as(config, name, Readiness::default(), options, notice))
}

async fn connect_as(
    config: &NatsConfig,
    name: &str,
    readiness: Readiness,
    options: ConnectOptions,
    notice: VersionNotice,
) -> anyhow::Result<Client> {
    readiness.not_ready("nats", "not connected");
    let observed = readiness.clone();
    let notice = Arc::new(notice);
    let reconnected = notice.clone();
    let servers = config
        .nats_url
        .split(',')
        .map(|url| url.trim().parse::<ServerAddr>())
        .collect::<Result<Vec<_>, _>>()
        .context("NATS_URL is not a list of nats:// or tls:// URLs")?;
    let mut options = options
        .name(name)
        .custom_inbox_prefix(inbox_prefix(name))
        .ping_interval(PING_INTERVAL)
        .connection_timeout(CONNECT_TIMEOUT)
        // The first reconnect is immediate, later ones are at most a second apart.
        .reconnect_delay_callback(|attempts| Duration::from_millis((attempts as u64 * 100).min(1000)))
        .event_callback(move |event| {
            let readiness = observed.clone();
            let notice = reconnected.clone();
            async move {
                match event {
                    Event::Connected => {
                        tracing::info!("connected to NATS");
                        readiness.ready("nats");
                        notice.reconnected().await;
                    }
                    Event::Disconnected | Event::Closed => {
                        tracing::warn!("connection to NATS lost");
                        readiness.not_ready("nats", "not connected");
                    }
                    // Without this line a missing permission looks like a peer that does not reply.
                    Event::ServerError(ServerError::Other(e))
                        if e.to_ascii_lowercase().contains("permissions violation") =>
                    {
                        tracing::error!("NATS refuses: {e}");
                    }
                    // A full subscription reports each message that it drops: a flood of messages is a flood of events.
                    event @ (Event::SlowConsumer(_) | Event::ClientError(_)) => tracing::debug!("NATS: {event}"),
                    event => tracing::warn!("NATS: {event}"),
                }
            }
        });
    // The client reads no credentials from URLs, and logs the URLs at debug.
    if let Some((user, password)) = credentials(&servers, config.nats_password.as_ref()) {
        options = options.user_and_password(user, password);
    }
    if let Some(file) = &config.nats_creds {
        options = options
            .credentials_file(file)
            .await
            .with_context(|| format!("cannot read the NATS credentials {}", file.display()))?;
    }
    if let Some(file) = &config.nats_ca {
        options = options.add_root_certificates(file.clone());
    }
    if let (Some(cert), Some(key)) = (&config.nats_cert, &config.nats_key) {
        options = options.add_client_certificate(cert.clone(), key.clone());
    }
    let servers = servers.into_iter().map(without_credentials).collect::<Result<Vec<_>, _>>()?;
    let client = retry("connect to NATS", || options.clone().connect(&servers)).await?;
    readiness.ready("nats");
    notice.client.get_or_init(|| client.clone());
    notice.log();
    Ok(client)
}

/// Logs the limitations of each server version once.
#[derive(Default)]
struct VersionNotice {
    is_silent: bool,
    client: OnceLock<Client>,
    logged: Mutex<Option<String>>,
}

impl VersionNotice {
    /// The client reports a connection before it has the new server's information; a flush completes after it has.
    async fn reconnected(&self) {
        let Some(client) = self.client.get() else { return };
        if let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), client.flush()).await {
            self.log();
        }
    }

    fn log(&self) {
        let Some(version) = self.client.get().map(|client| client.server_info().version) else { return };
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_silent || logged.as_ref() == Some(&version) {
            return;
        }
        tracing::info!(version, "the NATS server's version");
        for limitation in ServerVersion::parse(&version).limitations() {
            tracing::warn!(version, "the NATS server is older than recommended: {limitation}");
        }
        *logged = Some(version);
    }
}

/// User and password from the URL of a server, percent-decoded. The configured password is for a URL without one.
fn credentials(servers: &[ServerAddr], configured: Option<&Secret>) -> Option<(String, String)> {
    let decoded = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    servers.iter().find_map(|server| {
        let password =
            server.password().map(decoded).or_else(|| configured.map(|secret| secret.expose().to_owned()))?;
        Some((decoded(server.username()?), password))
    })
}

/// Sends what the client buffers, before a process ends: the last acks and answers.
pub async fn flush(client: &Client) {
    if !matches!(tokio::time::timeout(FLUSH, client.flush()).await, Ok(Ok(()))) {
        tracing::warn!("the last acks and answers may be lost: events are redelivered, and callers time out");
    }
}

/// The server's address without user and password.
fn without_credentials(server: ServerAddr) -> io::Result<ServerAddr> {
    let mut url = server.into_inner();
    // Only a URL without a host refuses this, and no server has one.
    let _ = (url.set_username(""), url.set_password(None));
    ServerAddr::from_url(url)
}

/// A JetStream context of this connection.
pub fn jetstream(client: &Client) -> jetstream::Context {
    jetstream::ContextBuilder::new()
        .timeout(ACK_TIMEOUT)
        .ack_timeout(ACK_TIMEOUT)
        // Callers bound what they have in flight; this is only the client's own limit.
        .max_ack_inflight(65_536)
        .backpressure_on_inflight(true)
        .build(client.clone())
}

/// Creates missing streams and buckets. Existing ones stay as they are, except that batches are allowed on a stream
/// that an older server created.
///
/// # Errors
/// JetStream refuses.
pub fn create_streams(js: &jetstream::Context, limits: StreamLimits) -> BoxFuture<'_, anyhow::Result<()>> {
    Box::pin(create_missing(js, limits))
}

async fn create_missing(js: &jetstream::Context, limits: StreamLimits) -> anyhow::Result<()> {
    let mark = ObjectId::new(clock::now(), rand::random());
    let version = ServerVersion::parse(&js.client().server_info().version);
    for config in streams(limits, mark) {
        let config = version.supported(config);
        let stream = retry("create a stream", || js.get_or_create_stream(config.clone())).await?;
        let allows = &stream.cached_info().config;
        if allows.num_replicas != config.num_replicas {
            tracing::warn!(
                "{} has {} replicas, and STREAM_REPLICAS is {}: it is applied when a stream is created; see leadctl doctor",
                config.name,
                allows.num_replicas,
                config.num_replicas
            );
        }
        if config.allow_atomic_publish && !allows.allow_atomic_publish {
            tracing::info!("setting {ALLOW_ATOMIC} on {}", config.name);
            retry("allow batches", || allow_batches(js, &config.name)).await?;
        }
    }
    for config in buckets(limits) {
        retry("create a bucket", || js.get_or_create_stream(bucket_stream(&config))).await?;
    }
    Ok(())
}

/// The setting of a stream that allows atomic batches.
const ALLOW_ATOMIC: &str = "allow_atomic";

/// Allows atomic batches on a stream. The other settings are sent back as raw JSON: a newer server may have settings
/// that this client does not know.
async fn allow_batches(js: &jetstream::Context, stream: &str) -> Result<(), RequestError> {
    let failed = |error| RequestError::with_source(RequestErrorKind::Other, error);
    let mut info = match js.request(format!("STREAM.INFO.{stream}"), &()).await? {
        Response::Ok::<serde_json::Value>(info) => info,
        Response::Err { error } => return Err(failed(error)),
    };
    let mut config = info["config"].take();
    config[ALLOW_ATOMIC] = true.into();
    match js.request(format!("STREAM.UPDATE.{stream}"), &config).await? {
        Response::Ok::<serde_json::Value>(_) => Ok(()),
        Response::Err { error } => Err(failed(error)),
    }
}

/// The stream of a bucket (NATS ADR-8). `create_key_value` reads the account's statistics first and cannot parse those
/// of servers before 2.10.
fn bucket_stream(config: &kv::Config) -> stream::Config {
    stream::Config {
        name: format!("KV_{}", config.bucket),
        subjects: vec![format!("$KV.{}.>", config.bucket)],
        max_messages_per_subject: config.history,
        max_age: config.max_age,
        max_bytes: config.max_bytes,
        storage: config.storage,
        num_replicas: config.num_replicas,
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..stream::Config::default()
    }
}

/// Waits until a stream exists.
pub fn stream<'a>(js: &'a jetstream::Context, name: &'static str) -> BoxFuture<'a, anyhow::Result<Stream>> {
    let what = format!("find the stream {name} (lead-state creates it)");
    Box::pin(async move { retry(&what, || js.get_stream(name)).await })
}

/// Waits until a bucket exists.
pub fn bucket<'a>(js: &'a jetstream::Context, name: &'static str) -> BoxFuture<'a, anyhow::Result<kv::Store>> {
    let what = format!("find the bucket {name} (lead-state creates it)");
    Box::pin(async move { retry(&what, || js.get_key_value(name)).await })
}

/// Retries until it succeeds; callers stop it by dropping the future.
async fn retry<T, E, F>(what: &str, attempt: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<T, E>>,
    E: std::error::Error + Send + Sync + 'static,
{
    for delay in retry_backoff() {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(e) => {
                tracing::warn!("cannot {what}, trying again: {}", error_chain(&e));
                tokio::time::sleep(delay).await;
            }
        }
    }
    anyhow::bail!("gave up trying to {what}")
}

/// The delays of an endless retry loop: from 100 ms to 2 s, with jitter.
pub fn retry_backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(2))
        .without_max_times()
        .with_jitter()
        .build()
}

/// An error and its causes in one line.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>();
    causes.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_a_url_are_decoded_and_precede_the_configured_password() {
        let of = |url: &str| credentials(&[url.parse().unwrap()], Some(&"configured=".into()));
        let found = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(of("nats://leadctl:abc=@nats:4222"), found("leadctl", "abc="));
        assert_eq!(of("nats://le%40d:p%40ss%2Fw@nats:4222"), found("le@d", "p@ss/w"));
        assert_eq!(of("nats://leadctl@nats:4222"), found("leadctl", "configured="));
        assert_eq!(of("nats://nats:4222"), None);

        let address = without_credentials("tls://le%40d:p%40ss@nats:4222".parse().unwrap()).unwrap();
        assert_eq!(address.as_url_str(), "tls://nats:4222");
    }
}
