//! 1 to 8: what the doctor sees of the services and of the monitoring port of NATS.

use std::{collections::BTreeMap, time::Duration};

use async_nats::Client;
use contract::Timestamp;
use futures::StreamExt;
use serde::Deserialize;
use service_kit::clock;
use tokio::time::{Instant, timeout_at};

use super::{Check, State, skew};
use crate::gateway_client;

/// How long services may take to say that they are there. Longer makes every run longer.
const ANSWERS: Duration = Duration::from_secs(1);
/// How long an HTTP port may take.
const HTTP: Duration = Duration::from_secs(5);
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The services that answer queries.
pub(super) async fn registered(client: &Client) -> Vec<Check> {
    #[derive(Deserialize)]
    struct Info {
        name: String,
        version: String,
    }
    let mut found: BTreeMap<&str, Vec<String>> = [("lead-state", Vec::new()), ("webhook-notifier", Vec::new())].into();
    let inbox = client.new_inbox();
    if let Ok(mut answers) = client.subscribe(inbox.clone()).await
        && client.publish_with_reply("$SRV.INFO", inbox, "".into()).await.is_ok()
    {
        let deadline = Instant::now() + ANSWERS;
        while let Ok(Some(answer)) = timeout_at(deadline, answers.next()).await {
            if let Ok(info) = serde_json::from_slice::<Info>(&answer.payload)
                && let Some(versions) = found.get_mut(info.name.as_str())
            {
                versions.push(info.version);
            }
        }
    }
    found.into_iter().map(|(name, versions)| instances(name, &versions)).collect()
}

fn instances(name: &str, versions: &[String]) -> Check {
    let found = format!("{} at version {}", versions.len(), versions.join(", "));
    if versions.is_empty() {
        Check::wrong(name, "none answers", format!("start {name}; its log and /readyz say what it waits for"))
    } else if versions.iter().any(|version| version != VERSION) {
        Check::warning(
            name,
            format!("{found}; leadctl is {VERSION}"),
            "end the upgrade, or use the leadctl of that version",
        )
    } else {
        Check::ok(name, found)
    }
}

fn http() -> anyhow::Result<reqwest::Client> {
    Ok(reqwest::Client::builder().tls_backend_preconfigured(gateway_client::tls()?).no_proxy().timeout(HTTP).build()?)
}

/// Whether NATS servers sync before they ack, by what they say on their monitoring ports.
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
        return vec![Check {
            what: "nats syncs before it acks".into(),
            state: State::Unknown,
            found: "only its monitoring port says so: --nats-monitor http://HOST:8222".into(),
            mend: None,
        }];
    }
    let mut checks = Vec::new();
    for url in urls {
        let what = format!("nats at {url}");
        let asked = async {
            let text = http()?.get(format!("{}/varz", url.trim_end_matches('/'))).send().await?.text().await?;
            anyhow::Ok(serde_json::from_str::<Varz>(&text)?)
        };
        checks.push(match asked.await {
            Ok(varz) if varz.jetstream.config.sync_always => Check::ok(what, "syncs before it acks"),
            Ok(_) => Check::wrong(
                what,
                "does not sync before it acks: a power cut loses what was accepted",
                "set sync_interval: always in its configuration (2.10 and later), as in deploy/nats/nats-server.conf",
            ),
            Err(e) => Check::wrong(
                what,
                format!("{e:#}"),
                "open its monitoring port (http_port: 8222), or correct --nats-monitor",
            ),
        });
    }
    checks
}

/// The services whose health ports are known.
pub(super) async fn healthy(urls: &[String]) -> Vec<Check> {
    let mut checks = Vec::new();
    for url in urls {
        let url = url.trim_end_matches('/').trim_end_matches("/readyz");
        match health(url).await {
            Ok(seen) => checks.extend(seen),
            Err(e) => checks.push(Check::wrong(
                format!("service at {url}"),
                format!("{e:#}"),
                "start it, or correct --health",
            )),
        }
    }
    checks
}

async fn health(url: &str) -> anyhow::Result<Vec<Check>> {
    let http = http()?;
    let metrics = http.get(format!("{url}/metrics")).send().await?.text().await?;
    let asked = clock::now();
    let ready = http.get(format!("{url}/readyz")).send().await?;
    let answered = clock::now();
    let date = ready.headers().get("date").and_then(|date| date.to_str().ok()?.parse::<HttpDate>().ok());
    let (status, waits) = (ready.status(), ready.text().await?);
    let (name, version) = build(&metrics).unwrap_or(("service", "unknown"));
    let who = format!("{name} at {url}");
    let mut checks = vec![if status.is_success() {
        Check::ok(&who, format!("ready, version {version}"))
    } else {
        Check::wrong(&who, format!("not ready: {}", waits.trim().replace('\n', "; ")), "mend what it waits for")
    }];
    if version != VERSION {
        checks.push(Check::warning(&who, format!("version {version}; leadctl is {VERSION}"), "end the upgrade"));
    }
    if let Some(HttpDate(said)) = date {
        checks.push(skew(&who, asked, said, answered, 1.0));
    }
    Ok(checks)
}

/// Which service it is and which version, by its metrics.
fn build(metrics: &str) -> Option<(&str, &str)> {
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
        // RFC 9110 says GMT where RFC 2822, which time reads, says +0000.
        let at =
            time::OffsetDateTime::parse(&text.replace("GMT", "+0000"), &time::format_description::well_known::Rfc2822)?;
        Ok(Self(at.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_health_port_says_is_read() {
        let text = "# TYPE x y\nleadrelay_lead_state_build_info{version=\"0.1.0\"} 1\n";
        assert_eq!(build(text), Some(("lead_state", "0.1.0")));
        assert_eq!(build("leadrelay_x 1"), None);
        let HttpDate(at) = "Mon, 12 Jan 2026 04:55:59 GMT".parse().unwrap();
        assert_eq!(at.to_iso(), "2026-01-12T04:55:59.000Z");
    }

    #[test]
    fn instances_of_another_version_are_worth_a_word() {
        let state = |versions: &[&str]| {
            instances("x", &versions.iter().map(|version| (*version).to_owned()).collect::<Vec<_>>()).state
        };
        assert_eq!(state(&[]), State::Wrong);
        assert_eq!(state(&[VERSION, VERSION]), State::Ok);
        assert_eq!(state(&[VERSION, "9.9.9"]), State::Warning);
    }
}
