//! The addresses of this installation, which no callback may reach even where internal networks are allowed: those of
//! Postgres and NATS, and of the machine itself.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context;
use service_kit::postgres;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::dns::Dns;
use crate::config::Config;

/// How often the servers' names are looked up. A shorter interval detects a failover to another address sooner.
const REFRESH_INTERVAL: Duration = Duration::from_secs(30);

const POSTGRES: &str = "it is the address of Postgres";
const NATS: &str = "it is the address of NATS";
const MACHINE: &str = "it is an address of this machine";

/// Shared by all copies of the guard.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnAddresses(Arc<RwLock<Vec<(SocketAddr, &'static str)>>>);

impl OwnAddresses {
    pub(crate) fn set(&self, addresses: Vec<(SocketAddr, &'static str)>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// Describes the owner of an address of this installation. A server's host is its own, with all ports. Loopback
    /// addresses are shared with other programs, so only the port counts, and all of them are one machine.
    pub(crate) fn owner(&self, address: IpAddr, port: u16) -> Option<&'static str> {
        let own = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_owner = |own: &SocketAddr| match own.ip().is_loopback() {
            true => address.is_loopback() && own.port() == port,
            false => own.ip() == address,
        };
        own.iter().find(|(own, _)| is_owner(own)).map(|(_, owner)| *owner)
    }
}

/// Keeps the addresses up to date.
pub(crate) struct OwnServers {
    servers: Vec<OwnServer>,
    health: SocketAddr,
    addresses: OwnAddresses,
}

struct OwnServer {
    owner: &'static str,
    host: String,
    port: u16,
    /// As last looked up: a name that cannot be looked up now keeps its addresses.
    addresses: Vec<IpAddr>,
}

impl OwnServers {
    pub(crate) fn new(config: &Config, health: SocketAddr, addresses: OwnAddresses) -> anyhow::Result<Self> {
        let postgres = postgres::servers(&config.database.database_url)?.into_iter().map(|server| {
            let (host, port) = (server.get_host().to_owned(), server.get_port());
            OwnServer { owner: POSTGRES, host, port, addresses: Vec::new() }
        });
        let mut servers = postgres.collect::<Vec<_>>();
        for server in config.nats.nats_url.split(',') {
            let server = server.trim();
            let url = if server.contains("://") { server.to_owned() } else { format!("nats://{server}") };
            // Without the URL in the error: it contains the password.
            let url = Url::parse(&url).ok().context("NATS_URL is not a valid URL of NATS")?;
            let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            servers.push(OwnServer { owner: NATS, host, port: url.port().unwrap_or(4222), addresses: Vec::new() });
        }
        Ok(Self { servers, health, addresses })
    }

    /// Looks up the servers. `advertised` are the servers of the NATS cluster.
    pub(crate) async fn refresh(&mut self, dns: &Dns, advertised: &[String]) {
        for server in &mut self.servers {
            let found = match server.host.parse() {
                Ok(address) => Ok(vec![address]),
                Err(_) => dns.look_up(&server.host).await,
            };
            match found {
                Ok(found) if !found.is_empty() => server.addresses = found,
                // A directory of Unix sockets has no address.
                _ if server.host.starts_with('/') => {}
                _ => tracing::warn!("cannot look up the address of {}; the previous address stays in use", server.host),
            }
        }
        let configured = self.servers.iter().flat_map(|server| {
            server.addresses.iter().map(|address| (SocketAddr::new(*address, server.port), server.owner))
        });
        let cluster = advertised.iter().filter_map(|address| Some((address.parse().ok()?, NATS)));
        let mut own = configured.chain(cluster).collect::<Vec<_>>();
        let interfaces = own.iter().filter_map(|(server, _)| local_address(*server)).collect::<BTreeSet<_>>();
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        own.extend(interfaces.into_iter().chain(loopback).map(|ip| (SocketAddr::new(ip, self.health.port()), MACHINE)));
        self.addresses.set(own);
    }

    /// Keeps the addresses and the system's DNS configuration up to date until shutdown.
    pub(crate) async fn run(
        mut self,
        dns: Arc<Dns>,
        client: async_nats::Client,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(REFRESH_INTERVAL) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
            dns.reload();
            self.refresh(&dns, &client.server_info().connect_urls).await;
        }
    }
}

/// The address of this machine from which packets to a server are sent. Sends no packet.
fn local_address(server: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(server).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_to_this_machine_leave_from_its_own_address() {
        assert_eq!(local_address("127.0.0.1:4222".parse().unwrap()), Some(Ipv4Addr::LOCALHOST.into()));
    }
}
