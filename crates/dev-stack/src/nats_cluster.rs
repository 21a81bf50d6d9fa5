//! Several private nats-servers as one cluster.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    Say,
    error::{During, Error},
    nats::{Authorization, ClusterMember, LocalNats, NatsOptions},
    port,
};

/// How long the servers may take to elect the leader that creates streams.
const ELECTION_DEADLINE: Duration = Duration::from_secs(30);
/// The pause between two checks for that leader.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

impl ClusterMember {
    /// Its part of the configuration of nats-server.
    pub(crate) fn config(&self) -> String {
        let Self { cluster, name, route_port, peers, monitor_port } = self;
        let routes: Vec<_> = peers.iter().map(|port| format!("\"nats://127.0.0.1:{port}\"")).collect();
        format!(
            "server_name: \"{name}\"\n\
             http: \"127.0.0.1:{monitor_port}\"\n\
             cluster {{\n  name: \"{cluster}\"\n  listen: \"127.0.0.1:{route_port}\"\n  routes: [{}]\n}}\n",
            routes.join(", ")
        )
    }
}

impl LocalNats {
    /// Starts `servers` servers as one cluster, and waits until they can create streams. `options` apply to each of
    /// them; all have the same users, and each has a temporary directory.
    ///
    /// # Errors
    /// As for [`LocalNats::start`]; [`Error::NotReady`] when the servers elect no leader.
    pub async fn start_cluster(servers: usize, options: NatsOptions, say: Say<'_>) -> Result<Vec<Self>, Error> {
        let free = || port::free().during(|| "looking for a free port".to_owned());
        let peers = (0..servers).map(|_| free()).collect::<Result<Vec<_>, _>>()?;
        let secret = || hex::encode(rand::random::<[u8; 16]>());
        // A server of another cluster that finds one of these ports is refused by its name.
        let cluster = format!("local-{}", secret());
        let authorization = options.authorization.clone().unwrap_or_else(|| Authorization::with_password(secret()));
        let mut members = Vec::with_capacity(servers);
        for (number, route_port) in (1..).zip(peers.iter().copied()) {
            let member = ClusterMember {
                cluster: cluster.clone(),
                name: format!("nats-{number}"),
                route_port,
                peers: peers.clone(),
                monitor_port: free()?,
            };
            let (authorization, cluster) = (Some(authorization.clone()), Some(member));
            let options = NatsOptions { dir: None, port: None, authorization, cluster, ..options.clone() };
            members.push(Self::start(options, say).await?);
        }
        if let Some(member) = members.first() {
            wait_for_leader(member).await?;
        }
        Ok(members)
    }
}

/// Waits until JetStream answers: before the servers have elected a leader, it refuses.
async fn wait_for_leader(member: &LocalNats) -> Result<(), Error> {
    let deadline = Instant::now() + ELECTION_DEADLINE;
    let not_ready = |log: String| Error::NotReady { name: "the cluster".into(), deadline: ELECTION_DEADLINE, log };
    let client = member.connect().await.map_err(|e| not_ready(e.to_string()))?;
    loop {
        let answer = match client.request("$JS.API.INFO", "".into()).await {
            Ok(answer) => String::from_utf8_lossy(&answer.payload).into_owned(),
            Err(e) => format!("\"error\": {e}"),
        };
        // The answer also has the number of past errors, as `"errors":`.
        if !answer.contains("\"error\":") {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(not_ready(answer));
        }
        sleep(PROBE_INTERVAL).await;
    }
}
