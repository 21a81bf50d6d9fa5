//! Checks of the replicas of streams and buckets on a cluster of NATS servers.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_nats::jetstream::stream::{ClusterInfo, Info, PeerInfo};

use super::check::Check;

/// A replica that its leader has not seen for longer is a finding. Followers answer every second.
const MAX_SILENCE: Duration = Duration::from_secs(5);
/// Operations that a healthy replica may be behind.
const MAX_LAG: u64 = 1000;

/// The replicas of a stream.
#[derive(Debug, Clone)]
pub(super) struct Replication {
    name: String,
    replicas: usize,
    /// None on a server without a cluster.
    cluster: Option<ClusterInfo>,
}

impl From<&Info> for Replication {
    fn from(info: &Info) -> Self {
        // A server without a cluster names itself as the leader, and no cluster.
        let cluster = info.cluster.clone().filter(|cluster| cluster.name.is_some());
        Self { name: info.config.name.clone(), replicas: info.config.num_replicas, cluster }
    }
}

/// Checks the replicas of all streams that could be read: their number, and their states by server.
pub(super) fn examine(streams: &[Replication], configured: &BTreeSet<usize>) -> Vec<Check> {
    let mut checks = number(streams, configured);
    let unhealthy = unhealthy(streams);
    if unhealthy.is_empty() && streams.iter().any(|stream| stream.cluster.is_some() && stream.replicas > 1) {
        checks.push(Check::ok("state of the replicas", "all are online and up to date"));
    }
    checks.extend(unhealthy.into_iter().map(|((server, condition), streams)| {
        let check = format!("replicas on {server}");
        let streams = streams.join(", ");
        match condition {
            Condition::Offline => Check::failed(
                check,
                format!("offline: {streams}; the loss of one more server stops these streams"),
                format!("start nats-server {server}, or replace it: docs/operations/nats.md, A lost server"),
            ),
            Condition::Lagging => Check::warning(
                check,
                format!("behind their leaders: {streams}"),
                format!("wait until {server} has caught up before you stop another server; if it does not, see its log and its disk"),
            ),
        }
    }));
    checks
}

/// Compares the number of replicas with the cluster and with the configuration of lead-state.
fn number(streams: &[Replication], configured: &BTreeSet<usize>) -> Vec<Check> {
    let check = "replicas of the streams";
    let is_clustered = streams.iter().any(|stream| stream.cluster.is_some());
    let mut wanted = configured.iter().copied().max().unwrap_or(1);
    let mut findings = Vec::new();
    if configured.len() > 1 {
        let listed: Vec<_> = configured.iter().map(ToString::to_string).collect();
        findings.push(format!("the instances of lead-state differ: STREAM_REPLICAS is {}", listed.join(" and ")));
    }
    let single: Vec<_> = streams.iter().filter(|stream| stream.replicas < 2).map(|stream| &*stream.name).collect();
    if is_clustered && !single.is_empty() {
        // Three replicas are the least that survive the loss of one.
        wanted = wanted.max(3);
        findings.push(format!(
            "{} have one replica on a cluster: the loss of its server stops them, and may lose them",
            single.join(", ")
        ));
    }
    let others: Vec<_> = streams
        .iter()
        .filter(|stream| !configured.is_empty() && !configured.contains(&stream.replicas))
        .filter(|stream| !is_clustered || stream.replicas > 1)
        .map(|stream| format!("{} has {}", stream.name, stream.replicas))
        .collect();
    if !others.is_empty() {
        let configured: Vec<_> = configured.iter().map(ToString::to_string).collect();
        findings.push(format!("{}, and lead-state is configured for {}", others.join(", "), configured.join(" or ")));
    }
    if findings.is_empty() {
        let counts: BTreeSet<_> = streams.iter().map(|stream| stream.replicas).collect();
        let listed: Vec<_> = counts.iter().map(ToString::to_string).collect();
        return if counts.is_empty() { Vec::new() } else { vec![Check::ok(check, listed.join(" and "))] };
    }
    let edits = streams.iter().filter(|stream| stream.replicas != wanted);
    let edits: Vec<_> = match is_clustered || wanted == 1 {
        true => edits.map(|stream| format!("nats stream edit {} --replicas={wanted}", stream.name)).collect(),
        false => vec!["the server is in no cluster: set STREAM_REPLICAS=1, or set up the cluster".to_owned()],
    };
    let setting = (is_clustered && !configured.contains(&wanted)).then(|| format!("set STREAM_REPLICAS={wanted}"));
    let advice = edits.into_iter().chain(setting).collect::<Vec<_>>().join("; ");
    vec![Check::warning(check, findings.join("; "), advice)]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    Offline,
    Lagging,
}

impl Condition {
    fn of(peer: &PeerInfo) -> Option<Self> {
        // A new leader that has never seen the old one reports no time at all.
        let is_unseen = peer.active > MAX_SILENCE || peer.active.is_zero() && !peer.current;
        if peer.offline || is_unseen {
            Some(Self::Offline)
        } else if !peer.current || peer.lag.unwrap_or_default() > MAX_LAG {
            Some(Self::Lagging)
        } else {
            None
        }
    }
}

/// The streams by the server and the condition of their replicas.
fn unhealthy(streams: &[Replication]) -> BTreeMap<(&str, Condition), Vec<&str>> {
    let mut found = BTreeMap::<_, Vec<_>>::new();
    for Replication { name, cluster, .. } in streams {
        for peer in cluster.iter().flat_map(|cluster| &cluster.replicas) {
            if let Some(condition) = Condition::of(peer) {
                found.entry((peer.name.as_str(), condition)).or_default().push(name.as_str());
            }
        }
    }
    found
}

/// The check of a stream that did not answer.
pub(super) fn without_leader(what: &str, error: &str) -> Check {
    Check::failed(
        what,
        format!("has no leader: {error}"),
        "start the nats-servers that have its replicas: a majority of them elects a leader within 10 s; until then nothing is \
         written to it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(name: &str, replicas: usize, peers: &[PeerInfo]) -> Replication {
        let cluster = ClusterInfo {
            name: Some("c".into()),
            leader: Some("nats-1".into()),
            replicas: peers.to_vec(),
            ..ClusterInfo::default()
        };
        Replication { name: name.into(), replicas, cluster: Some(cluster) }
    }

    fn peer(name: &str) -> PeerInfo {
        PeerInfo { name: name.into(), current: true, active: Duration::from_millis(200), ..PeerInfo::default() }
    }

    fn lone(name: &str, replicas: usize) -> Replication {
        Replication { name: name.into(), replicas, cluster: None }
    }

    fn report(streams: &[Replication], configured: &[usize]) -> String {
        let checks = examine(streams, &configured.iter().copied().collect());
        let line = |check: &Check| {
            let Check { check, state, finding, advice } = check;
            let advice = advice.as_ref().map_or(String::new(), |advice| format!("\n    {advice}"));
            format!("{state:?} {check}: {finding}{advice}")
        };
        checks.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn healthy_streams_have_no_findings() {
        assert_eq!(report(&[lone("A", 1)], &[1]), "Ok replicas of the streams: 1");
        let replicated = stream("A", 3, &[peer("nats-2"), peer("nats-3")]);
        assert_eq!(
            report(&[replicated], &[3]),
            "Ok replicas of the streams: 3\nOk state of the replicas: all are online and up to date"
        );
    }

    #[test]
    fn replicas_are_reported_by_server() {
        let offline = PeerInfo { offline: true, current: false, ..peer("nats-2") };
        let silent = PeerInfo { active: Duration::from_secs(9), ..peer("nats-2") };
        let unseen = PeerInfo { active: Duration::ZERO, current: false, ..peer("nats-2") };
        let lagging = PeerInfo { lag: Some(5000), ..peer("nats-3") };
        let streams =
            [stream("A", 3, &[offline, lagging]), stream("B", 3, &[silent, peer("nats-3")]), stream("C", 3, &[unseen])];

        insta::assert_snapshot!(report(&streams, &[3]), @r"
        Ok replicas of the streams: 3
        Failed replicas on nats-2: offline: A, B, C; the loss of one more server stops these streams
            start nats-server nats-2, or replace it: docs/operations/nats.md, A lost server
        Warning replicas on nats-3: behind their leaders: A
            wait until nats-3 has caught up before you stop another server; if it does not, see its log and its disk
        ");
    }

    #[test]
    fn single_replicas_on_a_cluster_and_other_numbers_than_configured_are_reported() {
        insta::assert_snapshot!(report(&[stream("A", 1, &[])], &[1]), @r"
        Warning replicas of the streams: A have one replica on a cluster: the loss of its server stops them, and may lose them
            nats stream edit A --replicas=3; set STREAM_REPLICAS=3
        ");
        let three = [peer("nats-2"), peer("nats-3")];
        insta::assert_snapshot!(report(&[stream("A", 3, &three), stream("B", 3, &three)], &[5]), @r"
        Warning replicas of the streams: A has 3, B has 3, and lead-state is configured for 5
            nats stream edit A --replicas=5; nats stream edit B --replicas=5
        Ok state of the replicas: all are online and up to date
        ");
        insta::assert_snapshot!(report(&[lone("A", 1)], &[3]), @r"
        Warning replicas of the streams: A has 1, and lead-state is configured for 3
            the server is in no cluster: set STREAM_REPLICAS=1, or set up the cluster
        ");
    }
}
