//! The installation as a whole, for operators: services, streams, how far the log is applied, dead letters.

use std::{collections::BTreeMap, time::Duration};

use async_nats::{Client, jetstream::stream::Info};
use contract::{
    rpc::{GetRecovery, RecoveryStatus},
    streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER},
};
use futures::{StreamExt, future::try_join_all};
use maud::{Markup, html};
use serde::Deserialize;
use service_kit::nats::error_chain;
use tokio::time::{Instant, timeout_at};

use crate::{
    app::Broker,
    dead_letters::{self, Newest},
    fault::Fault,
    pages::{
        audits::{self, Audits},
        dead_letters::rows,
    },
    respond::Page,
    view::{
        layout::Section,
        parts::{Kind, badge, fact, panel, table},
    },
    visit::Visit,
};

/// How long answers of the services are collected.
const DISCOVERY_TIME: Duration = Duration::from_millis(500);
/// How long another replica may take once each service has answered. Every view of the page takes at least this long.
const DISCOVERY_REST: Duration = Duration::from_millis(50);
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// A stream that is fuller than this percentage is marked as nearly full.
const HIGH_PERCENT: u64 = 70;
/// The services that answer queries.
const SERVICES: [&str; 2] = ["lead-state", "webhook-notifier"];

/// The versions of each service's replicas.
type Replicas = BTreeMap<&'static str, Vec<String>>;

/// A stream or bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StreamState {
    pub(super) name: String,
    pub(super) messages: u64,
    pub(super) bytes: u64,
    /// The limit in bytes, if there is one.
    pub(super) max_bytes: Option<u64>,
    pub(super) replicas: usize,
    /// The server that leads the stream's copies; none in a single server.
    pub(super) leader: Option<String>,
    /// The copies that are offline or behind.
    pub(super) late: Vec<String>,
}

/// The events that wait for webhook-notifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventBacklog {
    pub(super) waiting: u64,
    pub(super) in_progress: usize,
}

/// The content of the page.
pub(super) struct System {
    pub(super) replicas: Result<Replicas, Fault>,
    pub(super) recovery: Result<RecoveryStatus, Fault>,
    pub(super) backlog: Result<EventBacklog, Fault>,
    pub(super) streams: Result<Vec<StreamState>, Fault>,
    pub(super) letters: Result<Newest, Fault>,
    pub(super) audits: Result<Audits, Fault>,
}

/// `GET /system`.
pub(crate) async fn show(visit: Visit) -> Result<Page, Fault> {
    visit.all_projects()?;
    let broker = visit.app.broker()?;
    let (replicas, recovery, backlog, streams, letters, audits) = tokio::join!(
        replicas(&broker.client),
        visit.request(&GetRecovery {}),
        backlog(broker),
        streams(broker),
        dead_letters::newest(&broker.js),
        audits::all(broker)
    );
    let content = render(&System { replicas, recovery, backlog, streams, letters, audits });
    Ok(Page::Live { title: "System".into(), section: Section::None, content })
}

async fn streams(broker: &Broker) -> Result<Vec<StreamState>, Fault> {
    let read = async |name: String| match broker.js.get_stream(&name).await {
        Ok(stream) => Ok(StreamState::of(stream.cached_info())),
        Err(e) => {
            tracing::warn!("cannot read the stream {name}: {}", error_chain(&e));
            Err(Fault::Unavailable(format!("The stream {name} cannot be read. Reload the page to try again.")))
        }
    };
    try_join_all(streams::names().into_iter().map(read)).await
}

async fn backlog(broker: &Broker) -> Result<EventBacklog, Fault> {
    let unavailable = |e: &(dyn std::error::Error + 'static)| {
        tracing::warn!("cannot read the consumer {NOTIFIER_CONSUMER}: {}", error_chain(e));
        Fault::Unavailable("The consumer of webhook-notifier cannot be read. Start webhook-notifier.".into())
    };
    let events = broker.js.get_stream(LEAD_EVENTS).await.map_err(|e| unavailable(&e))?;
    let consumer = events.consumer_info(NOTIFIER_CONSUMER).await.map_err(|e| unavailable(&e))?;
    Ok(EventBacklog { waiting: consumer.num_pending, in_progress: consumer.num_ack_pending })
}

impl StreamState {
    fn of(info: &Info) -> Self {
        let cluster = info.cluster.as_ref();
        let late = cluster.iter().flat_map(|cluster| &cluster.replicas).filter(|peer| peer.offline || !peer.current);
        Self {
            leader: cluster.and_then(|cluster| cluster.leader.clone()),
            late: late.map(|peer| peer.name.clone()).collect(),
            name: info.config.name.clone(),
            messages: info.state.messages,
            bytes: info.state.bytes,
            max_bytes: u64::try_from(info.config.max_bytes).ok().filter(|max| *max > 0),
            replicas: info.config.num_replicas,
        }
    }
}

/// Requests the names and versions of all services, and collects the replies for a while.
async fn replicas(client: &Client) -> Result<Replicas, Fault> {
    #[derive(Deserialize)]
    struct Info {
        name: String,
        version: String,
    }
    let unavailable = |e: &(dyn std::error::Error + 'static)| {
        tracing::warn!("cannot discover the services: {}", error_chain(e));
        Fault::Unavailable("The services cannot be discovered: the console has no connection to NATS.".into())
    };
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.map_err(|e| unavailable(&e))?;
    client.publish_with_reply("$SRV.INFO", inbox, "".into()).await.map_err(|e| unavailable(&e))?;
    let mut found = Replicas::from(SERVICES.map(|name| (name, Vec::new())));
    let mut deadline = Instant::now() + DISCOVERY_TIME;
    while let Ok(Some(answer)) = timeout_at(deadline, answers.next()).await {
        if let Ok(info) = serde_json::from_slice::<Info>(&answer.payload)
            && let Some(versions) = found.get_mut(info.name.as_str())
        {
            versions.push(info.version);
            if found.values().all(|versions| !versions.is_empty()) {
                deadline = deadline.min(Instant::now() + DISCOVERY_REST);
            }
        }
    }
    Ok(found)
}

pub(super) fn render(system: &System) -> Markup {
    html! {
        (panel("Services", &system.replicas, services))
        (panel("The command log", &system.recovery, recovery))
        (panel("Events to deliver", &system.backlog, |backlog| html! {
            dl.facts {
                (fact("Waiting", Some(html! { (backlog.waiting) })))
                (fact("Being delivered", Some(html! { (backlog.in_progress) })))
            }
        }))
        (panel("Last audits", &system.audits, audits::rows))
        (panel("Dead letters", &system.letters, rows))
        (panel("Streams and buckets", &system.streams, |streams| self::streams_table(streams)))
        p { "More checks, and what to do: " code { "leadctl doctor" } "." }
    }
}

fn services(replicas: &Replicas) -> Markup {
    let rows = html! {
        @for (name, versions) in replicas {
            tr {
                td { (name) }
                td {
                    @if versions.is_empty() { (badge(Kind::Bad, "does not answer")) } @else { (badge(Kind::Good, "answers")) }
                }
                td.number { (versions.len()) }
                td {
                    (versions.join(", "))
                    @if versions.iter().any(|version| version != VERSION) {
                        " " (badge(Kind::Waiting, &format!("the console has {VERSION}")))
                    }
                }
            }
        }
    };
    table("Services", &["Service", "Health", "Replicas", "Versions"], &rows)
}

fn recovery(status: &RecoveryStatus) -> Markup {
    let behind = status.log_last.saturating_sub(status.applied.sequence);
    html! {
        @if let Some(halted) = &status.halted {
            p.notice { "lead-state has halted: " (halted.text) " Remedy: " code { "leadctl recover" } }
        }
        dl.facts {
            (fact("State", Some(if status.halted.is_some() { badge(Kind::Bad, "halted") } else { badge(Kind::Good, "runs") })))
            (fact("Entries not applied yet", Some(html! { (behind) })))
            (fact("Last entry", Some(html! { (status.log_last) })))
            (fact("Applied up to", Some(html! { (status.applied) })))
            (fact("Announced up to", Some(html! { (status.announced) })))
            (fact("Delivered or recorded up to", Some(html! { (status.delivered) ", written every 10 s" })))
        }
    }
}

fn streams_table(streams: &[StreamState]) -> Markup {
    let rows = html! {
        @for stream in streams {
            tr {
                td { (stream.name) }
                td.number { (stream.messages) }
                td { (size(stream.bytes)) }
                td {
                    @match stream.max_bytes {
                        Some(max) => {
                            @let percent = stream.bytes * 100 / max;
                            (percent) " % of " (size(max))
                            @if percent > HIGH_PERCENT { " " (badge(Kind::Bad, "nearly full")) }
                        }
                        None => "no limit",
                    }
                }
                td {
                    (stream.replicas)
                    @if !stream.late.is_empty() {
                        " " (badge(Kind::Bad, &format!("behind: {}", stream.late.join(", "))))
                    }
                }
                td { (stream.leader.as_deref().unwrap_or("–")) }
            }
        }
    };
    table("Streams and buckets", &["Name", "Messages", "Size", "Full", "Copies", "Leader"], &rows)
}

/// A number of bytes, in the smallest unit that keeps the number below 10 240.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut unit = 0;
    let mut rest = bytes;
    while rest >= 10_240 && unit + 1 < UNITS.len() {
        rest /= 1024;
        unit += 1;
    }
    format!("{rest} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use contract::{
        position::LogPosition,
        rpc::{Halted, RecoveryKind},
    };

    use super::*;

    #[test]
    fn sizes_are_whole_numbers_of_a_unit() {
        assert_eq!(
            [0, 10_239, 10_240, 1 << 30, 1 << 40].map(size),
            ["0 B", "10239 B", "10 KiB", "1024 MiB", "1024 GiB"]
        );
    }

    #[test]
    fn a_halted_leader_and_an_absent_service_are_named() {
        let position = |sequence| LogPosition { epoch: 1, sequence, index: 0 };
        let recovery = RecoveryStatus {
            generation: 0,
            applied: position(7),
            announced: position(6),
            delivered: position(5),
            log_first: 1,
            log_last: 9,
            halted: Some(Halted {
                reason: "log_replaced".into(),
                text: "the log was replaced.".into(),
                remedy: RecoveryKind::NewEpoch,
            }),
        };
        let stream = |name: &str, max_bytes| StreamState {
            name: name.into(),
            messages: 3,
            bytes: 800,
            max_bytes,
            replicas: 3,
            leader: Some("n1".into()),
            late: vec!["n2".into()],
        };
        let system = System {
            replicas: Ok(Replicas::from([("lead-state", vec!["0.0.0".into()]), ("webhook-notifier", vec![])])),
            recovery: Ok(recovery),
            backlog: Ok(EventBacklog { waiting: 7, in_progress: 2 }),
            streams: Ok(vec![stream("LEAD_COMMANDS", Some(1024)), stream("KV_processes", None)]),
            letters: Ok(Newest { letters: vec![], may_have_more: false }),
            audits: Ok(Audits { last: vec![], left_out: 0 }),
        };
        let html = render(&system).0.replace("><", ">\n<").replace(VERSION, "VERSION");
        insta::assert_snapshot!(html);
    }
}
