//! Checks of the services and of NATS's monitoring port.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use async_nats::Client;
use contract::{Timestamp, streams::STREAM_REPLICAS};
use futures::{StreamExt, future::join_all};
use serde::Deserialize;
use service_kit::clock;
use tokio::time::{Instant, timeout_at};

use super::check::{Check, skew};

/// How long to collect answers of the services. Every run takes this long.
const DISCOVERY_TIME: Duration = Duration::from_secs(1);
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// An instance of a service, as it introduces itself on NATS.
#[derive(Debug, Deserialize)]
pub(super) struct Instance {
    name: String,
    version: String,
    #[serde(default)]
    metadata: HashMap<String, String>,
}

/// The instances that answer queries on NATS.
pub(super) async fn registered(client: &Client) -> Vec<Instance> {
    let mut found = Vec::new();
    let inbox = client.new_inbox();
    if let Ok(mut answers) = client.subscribe(inbox.clone()).await
        && client.publish_with_reply("$SRV.INFO", inbox, "".into()).await.is_ok()
    {
        let deadline = Instant::now() + DISCOVERY_TIME;
        while let Ok(Some(answer)) = timeout_at(deadline, answers.next()).await {
            found.extend(serde_json::from_slice::<Instance>(&answer.payload));
        }
    }
    found
}

/// The number of replicas that each instance of lead-state is configured to give new streams.
pub(super) fn configured_replicas(found: &[Instance]) -> BTreeSet<usize> {
    let lead_states = found.iter().filter(|instance| instance.name == "lead-state");
    lead_states.filter_map(|instance| instance.metadata.get(STREAM_REPLICAS)?.parse().ok()).collect()
}

/// Checks that each service has instances, of the same version.
pub(super) fn present(found: &[Instance]) -> Vec<Check> {
    let versions = |name: &str| {
        let instances = found.iter().filter(|instance| instance.name == name);
        instances.map(|instance| instance.version.clone()).collect::<Vec<_>>()
    };
    ["lead-state", "webhook-notifier"].map(|name| instances(name, &versions(name))).into()
}

fn instances(name: &str, versions: &[String]) -> Check {
    let finding = format!("{} at version {}", versions.len(), versions.join(", "));
    if versions.is_empty() {
        Check::failed(name, "no replica answers", format!("start {name}; its log and /readyz say what it waits for"))
    } else if versions.iter().any(|version| version != VERSION) {
        Check::warning(
            name,
            format!("{finding}; leadctl has version {VERSION}"),
            "finish the upgrade, or use leadctl of that version",
        )
    } else {
        Check::ok(name, finding)
    }
}

fn http() -> anyhow::Result<reqwest::Client> {
    Ok(reqwest::Client::builder()
        .tls_backend_preconfigured(service_kit::tls::client()?)
        .no_proxy()
        .timeout(HTTP_TIMEOUT)
        .build()?)
}

/// Checks on the monitoring ports that NATS servers sync before they ack.
pub(super) async fn monitored(urls: &[String]) -> Vec<Check> {
    #[derive(Deserialize)]
    struct Varz {
        #[serde(default)]
        jetstream: JetStream,
    }
    #[derive(Deserialize, Default)]
    struct JetStream {
        #[serde(default)]
        config: Config,
    }
    #[derive(Deserialize, Default)]
    struct Config {
        #[serde(default)]
        sync_always: bool,
    }
    if urls.is_empty() {
        let finding = "only its monitoring port shows it: --nats-monitor http://HOST:8222";
        return vec![Check::unknown("nats syncs before it acks", finding)];
    }
    let examine = async |url: &String| {
        let check = format!("nats at {url}");
        let varz = async {
            let text = http()?.get(format!("{}/varz", url.trim_end_matches('/'))).send().await?.text().await?;
            anyhow::Ok(serde_json::from_str::<Varz>(&text)?)
        };
        match varz.await {
            Ok(varz) if varz.jetstream.config.sync_always => Check::ok(check, "syncs before it acks"),
            Ok(_) => Check::failed(
                check,
                "does not sync before it acks: a power cut loses accepted updates",
                "set sync_interval: always in its configuration (2.10 and later), as in deploy/nats/nats-server.conf",
            ),
            Err(e) => Check::failed(
                check,
                format!("{e:#}"),
                "start this server, open its monitoring port (http_port: 8222), or correct --nats-monitor",
            ),
        }
    };
    join_all(urls.iter().map(examine)).await
}

/// Checks the services at the given health ports.
pub(super) async fn healthy(urls: &[String]) -> Vec<Check> {
    let examine = async |url: &String| {
        let url = url.trim_end_matches('/').trim_end_matches("/readyz");
        health(url).await.unwrap_or_else(|e| {
            vec![Check::failed(format!("service at {url}"), format!("{e:#}"), "start it, or correct --health")]
        })
    };
    join_all(urls.iter().map(examine)).await.concat()
}

async fn health(url: &str) -> anyhow::Result<Vec<Check>> {
    let http = http()?;
    let metrics = http.get(format!("{url}/metrics")).send().await?.text().await?;
    let sent = clock::now();
    let ready = http.get(format!("{url}/readyz")).send().await?;
    let received = clock::now();
    let date = ready.headers().get("date").and_then(|date| date.to_str().ok()?.parse::<HttpDate>().ok());
    let (status, reasons) = (ready.status(), ready.text().await?);
    let (name, version) = build_info(&metrics).unwrap_or(("service", "unknown"));
    let who = format!("{name} at {url}");
    let mut checks = vec![if status.is_success() {
        Check::ok(&who, format!("ready, version {version}"))
    } else {
        Check::failed(&who, format!("not ready: {}", reasons.trim().replace('\n', "; ")), "repair what it waits for")
    }];
    if version != VERSION {
        checks.push(Check::warning(
            &who,
            format!("version {version}; leadctl has version {VERSION}"),
            "finish the upgrade",
        ));
    }
    if let Some(HttpDate(remote)) = date {
        checks.push(skew(&who, sent, remote, received, 1.0));
    }
    Ok(checks)
}

/// The name and version of a service, from its metrics.
fn build_info(metrics: &str) -> Option<(&str, &str)> {
    let line = metrics.lines().find(|line| line.starts_with("leadrelay_") && line.contains("_build_info{"))?;
    let (name, rest) = line.strip_prefix("leadrelay_")?.split_once("_build_info{")?;
    let version = rest.split_once("version=\"")?.1.split('"').next()?;
    Some((name, version))
}

/// The time in a `Date` header, in whole seconds.
struct HttpDate(Timestamp);

impl std::str::FromStr for HttpDate {
    type Err = time::error::Parse;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // RFC 9110 writes GMT; RFC 2822, which `time` parses, writes +0000.
        let at =
            time::OffsetDateTime::parse(&text.replace("GMT", "+0000"), &time::format_description::well_known::Rfc2822)?;
        Ok(Self(at.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_and_dates_of_a_health_port_are_parsed() {
        let text = "# TYPE x y\nleadrelay_lead_state_build_info{version=\"0.1.0\"} 1\n";
        assert_eq!(build_info(text), Some(("lead_state", "0.1.0")));
        assert_eq!(build_info("leadrelay_x 1"), None);
        let HttpDate(at) = "Mon, 12 Jan 2026 04:55:59 GMT".parse().unwrap();
        assert_eq!(at.to_iso(), "2026-01-12T04:55:59.000Z");
    }

    #[test]
    fn instances_of_another_version_are_a_warning() {
        use super::super::check::State;
        let state = |versions: &[&str]| {
            instances("x", &versions.iter().map(|version| (*version).to_owned()).collect::<Vec<_>>()).state
        };
        assert_eq!(state(&[]), State::Failed);
        assert_eq!(state(&[VERSION, VERSION]), State::Ok);
        assert_eq!(state(&[VERSION, "9.9.9"]), State::Warning);
    }
}
