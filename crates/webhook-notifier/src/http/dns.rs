//! Looks up the names of callbacks.
//!
//! `getaddrinfo` holds a thread for as long as a name server is silent, so that a few hundred names that hang stop all
//! lookups of the process. These lookups hold no thread, end after [`LOOKUP_TIMEOUT`] or as soon as no attempt waits
//! for them, and a project has at most [`MAX_PROJECT_LOOKUPS`] of them in flight. Names resolve as in other programs on
//! the machine: `/etc/hosts` first, then the name servers, search domains and options of `/etc/resolv.conf`.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use anyhow::Context;
use contract::ObjectId;
use hickory_resolver::{
    Hosts, TokioResolver,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider},
    proto::{
        op::{Query, ResponseCode},
        rr::{Name, RecordType},
    },
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// How long a lookup may take. A longer timeout suits slow name servers; a shorter one frees the project's place
/// sooner.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a name server may take for one question.
const SERVER_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of a project's lookups in flight; further lookups wait. A higher maximum connects sooner to many new
/// names; a lower one leaves more of the name servers to other projects.
const MAX_PROJECT_LOOKUPS: usize = 16;
/// How long an answer is kept at most. A longer time saves lookups; a shorter one detects sooner that an endpoint has
/// moved.
const MAX_TTL: Duration = Duration::from_secs(60);
/// How long the absence of a name is kept at most: a callback may be created a moment before its name.
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(10);
const MAX_CACHED: u64 = 4096;

const DNS_PORT: u16 = 53;
const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// The name servers did not say whether a name has addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("the name {0} was not resolved within {n} s: its name servers do not answer", n = LOOKUP_TIMEOUT.as_secs())]
    TimedOut(String),
    #[error("the name {name} cannot be resolved: {cause}")]
    Failed { name: String, cause: String },
}

#[derive(Debug)]
pub(crate) struct Dns {
    /// Name servers to use instead of the system's.
    servers: Vec<SocketAddr>,
    system: RwLock<Arc<System>>,
    projects: ProjectLookups,
}

/// The system's configuration, as it was read.
struct System {
    resolver: TokioResolver,
    hosts: Hosts,
    modified: [Option<SystemTime>; 2],
}

impl std::fmt::Debug for System {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("System").field("modified", &self.modified).finish_non_exhaustive()
    }
}

impl Dns {
    /// Reads the system's configuration. `servers` replace its name servers, if there are any.
    pub(crate) fn new(servers: Vec<SocketAddr>) -> anyhow::Result<Self> {
        let system = System::read(&servers).context("cannot set up the lookup of names")?;
        Ok(Self { servers, system: RwLock::new(Arc::new(system)), projects: ProjectLookups::default() })
    }

    fn system(&self) -> Arc<System> {
        self.system.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the system's configuration again if its files have changed: a machine may have moved to another network.
    pub(crate) fn reload(&self) {
        if self.system().modified == modified() {
            return;
        }
        match System::read(&self.servers) {
            Ok(system) => *self.system.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(system),
            Err(e) => tracing::warn!("the changed {RESOLV_CONF} is not used: {e:#}"),
        }
    }

    /// The addresses of a name, for a callback of this project. Empty if it has no address.
    pub(crate) async fn look_up_for(&self, project_id: ObjectId, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        let _permit = self.projects.acquire(project_id).await;
        self.look_up(name).await
    }

    /// The addresses of a name. Empty if it has no address.
    pub(crate) async fn look_up(&self, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        let found = timeout(LOOKUP_TIMEOUT, self.system().look_up(name)).await;
        match found.unwrap_or(Err(NetError::Timeout)) {
            Ok(addresses) => Ok(addresses),
            Err(e) if has_no_address(&e) => Ok(Vec::new()),
            Err(NetError::Timeout) => Err(LookupError::TimedOut(name.to_owned())),
            Err(e) => Err(LookupError::Failed { name: name.to_owned(), cause: cause(&e) }),
        }
    }
}

/// Whether the name servers say that a name does not exist, or has no address.
fn has_no_address(error: &NetError) -> bool {
    let NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, .. })) = error else { return false };
    matches!(response_code, ResponseCode::NXDomain | ResponseCode::NoError)
}

fn cause(error: &NetError) -> String {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, .. })) => {
            format!("the name server answered {response_code}")
        }
        error => error.to_string(),
    }
}

/// When the files of the configuration were modified.
fn modified() -> [Option<SystemTime>; 2] {
    [RESOLV_CONF, HOSTS].map(|path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok())
}

impl System {
    fn read(servers: &[SocketAddr]) -> anyhow::Result<Self> {
        let modified = modified();
        let text = match fs::read_to_string(RESOLV_CONF) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).context("cannot read /etc/resolv.conf"),
        };
        let (config, options) = configuration(&text, servers);
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        Ok(Self {
            resolver: builder.with_options(options).build()?,
            hosts: Hosts::from_system().unwrap_or_default(),
            modified,
        })
    }

    async fn look_up(&self, name: &str) -> Result<Vec<IpAddr>, NetError> {
        let name = Name::from_ascii(name).map_err(NetError::from)?;
        // The hosts file comes before the search domains, so that a name of the machine needs no name server.
        let listed = [RecordType::A, RecordType::AAAA]
            .into_iter()
            .filter_map(|record_type| self.hosts.lookup_static_host(&Query::query(name.clone(), record_type)));
        let listed: Vec<IpAddr> = listed
            .flat_map(|lookup| lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect::<Vec<_>>())
            .collect();
        if !listed.is_empty() {
            return Ok(listed);
        }
        Ok(self.resolver.lookup_ip(name).await?.iter().collect())
    }
}

/// The resolver's configuration from the text of `/etc/resolv.conf`, with these name servers instead if there are any.
fn configuration(text: &str, servers: &[SocketAddr]) -> (ResolverConfig, ResolverOpts) {
    let (system, faults) = resolv_conf::Config::parse_with_errors(text.as_bytes());
    for fault in faults {
        tracing::warn!("{RESOLV_CONF}: {fault}");
    }
    // If the file names no server, the local machine's is used, as resolv.conf(5) says.
    let system_servers = system.get_nameservers_or_local();
    let system_servers = system_servers.iter().map(|server| SocketAddr::new(server.into(), DNS_PORT));
    let servers = if servers.is_empty() { system_servers.collect() } else { servers.to_vec() };
    let servers = servers.iter().map(|server| {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = server.port();
            connection
        });
        NameServerConfig::new(server.ip(), true, connections.to_vec())
    });
    let search = system.get_last_search_or_domain().filter_map(|domain| Name::from_ascii(domain).ok());
    let mut options = ResolverOpts::default();
    options.ndots = system.ndots as usize;
    options.attempts = system.attempts as usize;
    options.timeout = Duration::from_secs(system.timeout.into()).clamp(Duration::from_secs(1), SERVER_TIMEOUT);
    options.edns0 = system.edns0;
    // Queries both, like getaddrinfo: the connection then tries them in turns.
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    // `System::look_up` reads the hosts file, before the search domains.
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = MAX_CACHED;
    options.positive_max_ttl = Some(MAX_TTL);
    options.negative_max_ttl = Some(MAX_NEGATIVE_TTL);
    (ResolverConfig::from_parts(None, search.collect(), servers.collect()), options)
}

/// The lookup slots of each project that has lookups in flight.
#[derive(Debug, Default)]
struct ProjectLookups(Mutex<HashMap<ObjectId, Arc<Semaphore>>>);

impl ProjectLookups {
    async fn acquire(&self, project_id: ObjectId) -> Option<OwnedSemaphorePermit> {
        let places = {
            let mut projects = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A permit, or a wait for one, holds a reference.
            projects.retain(|_, places| Arc::strong_count(places) > 1);
            projects.entry(project_id).or_insert_with(|| Arc::new(Semaphore::new(MAX_PROJECT_LOOKUPS))).clone()
        };
        // The semaphore is never closed.
        places.acquire_owned().await.ok()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use hickory_resolver::proto::{
        op::{Message, OpCode},
        rr::{
            RData, Record,
            rdata::{A, AAAA},
        },
    };
    use tokio::net::UdpSocket;
    use tokio_util::task::AbortOnDropHandle;

    use super::*;

    fn loopback() -> Vec<IpAddr> {
        vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
    }

    /// A name server that counts questions. It does not answer for names that begin with `hang`, answers names that
    /// begin with `fine` with loopback addresses, and reports other names as nonexistent.
    async fn name_server() -> (SocketAddr, Arc<AtomicUsize>, AbortOnDropHandle<()>) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let questions = Arc::new(AtomicUsize::new(0));
        let counted = questions.clone();
        let serving = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                let question = Message::from_vec(&buffer[..length]).unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
                let query = question.queries[0].clone();
                let (name, is_v4) = (query.name().to_string(), query.query_type() == RecordType::A);
                if name.starts_with("hang") {
                    continue;
                }
                let mut answer = Message::response(question.id, OpCode::Query);
                if name.starts_with("fine") {
                    let address =
                        if is_v4 { RData::A(A(Ipv4Addr::LOCALHOST)) } else { RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)) };
                    answer.add_answer(Record::from_rdata(query.name().clone(), 3600, address));
                } else {
                    answer.metadata.response_code = ResponseCode::NXDomain;
                }
                answer.add_query(query);
                socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
            }
        });
        (address, questions, AbortOnDropHandle::new(serving))
    }

    #[tokio::test]
    async fn names_that_hang_delay_no_other_project() {
        let (server, questions, _serving) = name_server().await;
        let dns = Arc::new(Dns::new(vec![server]).unwrap());
        let [hostile, other] = [1, 2].map(|byte| ObjectId::from_bytes([byte; 12]));
        let hanging = (0..1000).map(|number| {
            let dns = dns.clone();
            tokio::spawn(async move { dns.look_up_for(hostile, &format!("hang-{number}.example.")).await })
        });
        let hanging = hanging.collect::<Vec<_>>();
        // All places of the hostile project are taken.
        while questions.load(Ordering::Relaxed) < 2 * MAX_PROJECT_LOOKUPS {
            tokio::task::yield_now().await;
        }

        let found = dns.look_up_for(other, "fine.example.").await;

        assert_eq!(found, Ok(loopback()));
        let places = dns.projects.0.lock().unwrap()[&hostile].clone();
        assert_eq!(places.available_permits(), 0, "the lookups of the hostile project still wait for each other");
        drop(places);
        // A lookup ends with the request that needs it.
        hanging.iter().for_each(tokio::task::JoinHandle::abort);
        for lookup in hanging {
            assert!(lookup.await.unwrap_err().is_cancelled());
        }
        assert!(dns.projects.0.lock().unwrap().values().all(|places| Arc::strong_count(places) == 1));
    }

    #[tokio::test]
    async fn answers_are_cached_and_silence_is_an_error() {
        let (server, _, serving) = name_server().await;
        let dns = Dns::new(vec![server]).unwrap();

        let unknown = dns.look_up("unknown.example.").await;
        let silent = dns.look_up("hang.example.").await;
        let found = dns.look_up("fine.example.").await;
        drop(serving);
        let cached = dns.look_up("fine.example.").await;

        assert_eq!(unknown, Ok(Vec::new()));
        assert_eq!(silent, Err(LookupError::TimedOut("hang.example.".into())));
        assert_eq!((&found, &cached), (&Ok(loopback()), &found));
    }

    #[test]
    fn resolv_conf_is_read_as_other_programs_read_it() {
        let kubernetes = "search leadrelay.svc.cluster.local svc.cluster.local cluster.local\n\
             nameserver 10.96.0.10\noptions ndots:5 timeout:30\n";
        let (config, options) = configuration(kubernetes, &[]);
        let search = config.search().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(search, ["leadrelay.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
        assert_eq!((options.ndots, options.timeout), (5, SERVER_TIMEOUT));
        let servers = |config: &ResolverConfig| {
            let servers = config.name_servers().iter();
            servers.map(|server| SocketAddr::new(server.ip, server.connections[0].port)).collect::<Vec<_>>()
        };
        assert_eq!(servers(&config), ["10.96.0.10:53".parse().unwrap()]);

        let own = ["192.0.2.1:5353".parse().unwrap()];
        let (config, options) = configuration(kubernetes, &own);
        assert_eq!((servers(&config), config.search().len(), options.ndots), (own.to_vec(), 3, 5));

        let (config, _) = configuration("", &[]);
        assert_eq!(servers(&config), ["127.0.0.1:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
    }

    #[tokio::test]
    async fn names_of_the_hosts_file_need_no_name_server() {
        let dns = Dns::new(vec!["127.0.0.1:1".parse().unwrap()]).unwrap();
        let found = dns.look_up("localhost").await.unwrap();
        assert!(!found.is_empty() && found.iter().all(IpAddr::is_loopback), "{found:?}");
    }
}
