//! Keeps callbacks out of internal networks.
//!
//! Tenants choose the URLs of callbacks, so a URL must not reach a machine behind the firewall. The guard checks the
//! address that the connection then uses: literal addresses in [`Guard::check_url`], names in the
//! [`Resolver`](super::resolver::Resolver). A name that resolves to another address a moment later (DNS rebinding)
//! gains nothing.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use contract::process::restricted_port;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use url::Url;

use super::{dns::LookupError, own_addresses::OwnAddresses};

/// How long the name in a new URL is looked up. A longer timeout keeps the client that configures the URL waiting.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a URL must not be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the URL is invalid: {0}")]
    InvalidUrl(String),
    #[error("the URL is {0}://, and only https is allowed")]
    Scheme(String),
    #[error("the address {address} is not allowed: {network}")]
    Address { address: IpAddr, network: &'static str },
    #[error("the port {port} is that of {service}, and callbacks may not use it (see ALLOW_PORTS)")]
    Port { port: u16, service: &'static str },
    #[error("the name {0} has no address")]
    NoAddress(String),
}

/// The addresses and schemes that callbacks may use.
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard {
    /// Internal networks that are allowed.
    pub(crate) allow_networks: Vec<IpNet>,
    /// Networks that are not allowed, even within the allowed ones.
    pub(crate) deny_networks: Vec<IpNet>,
    /// Not allowed either, whatever network they are in.
    pub(crate) own_addresses: OwnAddresses,
    pub(crate) allow_http: bool,
    /// Ports of other protocols that are allowed.
    pub(crate) allow_ports: Vec<u16>,
}

impl Guard {
    /// Parses and checks a URL, except for its name, which the resolver checks.
    pub(crate) fn check_url(&self, text: &str) -> Result<Url, Refused> {
        let url = Url::parse(text).map_err(|e| Refused::InvalidUrl(e.to_string()))?;
        match url.scheme() {
            "https" => {}
            "http" if self.allow_http => {}
            scheme => return Err(Refused::Scheme(scheme.into())),
        }
        // The parser turns all spellings of an IPv4 address (0x7f.1, 2130706433) into dotted decimals.
        let host = url.host_str().unwrap_or_default();
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            self.check_address(address, port(&url))?;
        }
        match restricted_port(port(&url)).filter(|_| !self.allow_ports.contains(&port(&url))) {
            Some(service) => Err(Refused::Port { port: port(&url), service }),
            None => Ok(url),
        }
    }

    /// Why a callback may not have this URL. A name without an address is no reason: it may get one later, and every
    /// attempt looks it up again.
    pub(crate) async fn refusal(
        &self,
        text: &str,
        lookup: impl AsyncFnOnce(&str) -> Result<Vec<IpAddr>, LookupError>,
    ) -> Option<String> {
        let url = match self.check_url(text) {
            Ok(url) => url,
            Err(e) => return Some(e.to_string()),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Some(
                "the URL contains a user or password, which is visible wherever the URL is shown: use auth instead"
                    .into(),
            );
        }
        let name = url.domain()?;
        let found = tokio::time::timeout(LOOKUP_TIMEOUT, lookup(name)).await.ok()?.ok()?;
        match self.filter(name, port(&url), found) {
            Ok(_) | Err(Refused::NoAddress(_)) => None,
            Err(e) => Some(e.to_string()),
        }
    }

    /// Checks the address of a connection.
    pub(crate) fn check_address(&self, address: IpAddr, port: u16) -> Result<(), Refused> {
        let canonical = address.to_canonical();
        let network = match self.own_addresses.owner(canonical, port) {
            Some(owner) => Some(owner),
            None if self.deny_networks.iter().any(|network| network.contains(&canonical)) => {
                Some("its network is in DENY_NETWORKS")
            }
            None => internal_network(address)
                .filter(|_| !self.allow_networks.iter().any(|allowed| allowed.contains(&address))),
        };
        match network {
            Some(network) => Err(Refused::Address { address, network }),
            None => Ok(()),
        }
    }

    /// The allowed addresses of a name; an error if there is none.
    pub(crate) fn filter(&self, name: &str, port: u16, addresses: Vec<IpAddr>) -> Result<Vec<IpAddr>, Refused> {
        let mut refused = Refused::NoAddress(name.to_owned());
        let mut allowed = Vec::new();
        for address in addresses {
            match self.check_address(address, port) {
                Ok(()) => allowed.push(address),
                Err(e) => refused = e,
            }
        }
        if allowed.is_empty() { Err(refused) } else { Ok(allowed) }
    }
}

/// The port of a URL whose scheme was checked.
fn port(url: &Url) -> u16 {
    url.port_or_known_default().unwrap_or_default()
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, c: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// Addresses that are not public unicast: IANA's special-purpose registry
/// (<https://www.iana.org/assignments/iana-ipv4-special-registry>), multicast, and the one public address with the
/// metadata service of a cloud.
const INTERNAL_V4: [(Ipv4Net, &str); 19] = [
    (v4(0, 0, 0, 0, 8), "this network"),
    (v4(10, 0, 0, 0, 8), "a private network"),
    (v4(100, 64, 0, 0, 10), "a carrier's or cloud's shared network"),
    (v4(127, 0, 0, 0, 8), "loopback"),
    (v4(169, 254, 0, 0, 16), "link-local, where clouds have their metadata"),
    (v4(172, 16, 0, 0, 12), "a private network"),
    (v4(192, 0, 0, 0, 24), "reserved for protocols"),
    (v4(192, 0, 2, 0, 24), "reserved for documentation"),
    (v4(192, 31, 196, 0, 24), "reserved for protocols"),
    (v4(192, 52, 193, 0, 24), "reserved for protocols"),
    (v4(192, 88, 99, 0, 24), "a 6to4 relay"),
    (v4(192, 168, 0, 0, 16), "a private network"),
    (v4(192, 175, 48, 0, 24), "reserved for protocols"),
    (v4(198, 18, 0, 0, 15), "reserved for benchmarks"),
    (v4(198, 51, 100, 0, 24), "reserved for documentation"),
    (v4(203, 0, 113, 0, 24), "reserved for documentation"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved or broadcast"),
    (v4(168, 63, 129, 16, 32), "a cloud's metadata"),
];

/// The same for IPv6 (<https://www.iana.org/assignments/iana-ipv6-special-registry>). Ranges that wrap IPv4 addresses
/// are refused as a whole. The first match names the network; everything outside 2000::/3 is refused in any case.
const INTERNAL_V6: [(Ipv6Net, &str); 18] = [
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128), "unspecified"),
    (Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128), "loopback"),
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 96), "an IPv4 address in IPv6"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96), "an IPv4 address in IPv6"),
    (v6(0x64, 0xff9b, 0, 96), "NAT64"),
    (v6(0x64, 0xff9b, 1, 48), "NAT64"),
    (v6(0x100, 0, 0, 64), "discarded"),
    (v6(0x2001, 0, 0, 32), "Teredo"),
    (v6(0x2001, 0, 0, 23), "reserved for protocols"),
    (v6(0x2001, 0xdb8, 0, 32), "reserved for documentation"),
    (v6(0x2002, 0, 0, 16), "6to4"),
    (v6(0x2620, 0x4f, 0x8000, 48), "reserved for protocols"),
    (v6(0x3fff, 0, 0, 20), "reserved for documentation"),
    (v6(0x5f00, 0, 0, 16), "segment routing"),
    (v6(0xfc00, 0, 0, 7), "a private network (unique local)"),
    (v6(0xfe80, 0, 0, 10), "link-local"),
    (v6(0xfec0, 0, 0, 10), "a private network (site-local)"),
    (v6(0xff00, 0, 0, 8), "multicast"),
];

/// The addresses that IANA assigns.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 3);

/// The internal network of an address, if it is in one.
fn internal_network(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => {
            INTERNAL_V4.iter().find(|(network, _)| network.contains(&address)).map(|(_, name)| *name)
        }
        IpAddr::V6(address) => INTERNAL_V6
            .iter()
            .find(|(network, _)| network.contains(&address))
            .map(|(_, name)| *name)
            .or((!GLOBAL_V6.contains(&address)).then_some("not a public address")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn guard(allow: &[&str]) -> Guard {
        let allow_networks = allow.iter().map(|network| network.parse().unwrap()).collect();
        Guard { allow_networks, allow_http: true, ..Guard::default() }
    }

    #[test]
    fn internal_addresses_are_refused_by_name() {
        for (network, addresses) in [
            ("this network", "0.0.0.0 0.1.2.3"),
            ("a private network", "10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.1.1"),
            ("a carrier's or cloud's shared network", "100.64.0.1 100.100.100.200"),
            ("loopback", "127.0.0.1 127.255.255.254 ::1"),
            ("link-local, where clouds have their metadata", "169.254.169.254"),
            ("a cloud's metadata", "168.63.129.16"),
            ("reserved for protocols", "192.0.0.192 2001:2::1 2001:10::1"),
            ("reserved for documentation", "192.0.2.1 198.51.100.7 203.0.113.7 2001:db8::1 3fff::1"),
            ("a 6to4 relay", "192.88.99.1"),
            ("reserved for benchmarks", "198.18.0.1 198.19.255.255"),
            ("multicast", "224.0.0.1 239.255.255.255 ff02::1"),
            ("reserved or broadcast", "240.0.0.1 255.255.255.255"),
            ("unspecified", "::"),
            ("an IPv4 address in IPv6", "::127.0.0.1 ::ffff:127.0.0.1 ::ffff:8.8.8.8"),
            ("NAT64", "64:ff9b::7f00:1 64:ff9b:1::a00:1"),
            ("discarded", "100::1"),
            ("Teredo", "2001::1"),
            ("6to4", "2002:7f00:1::1"),
            ("segment routing", "5f00::1"),
            ("a private network (unique local)", "fc00::1 fd00:ec2::254"),
            ("link-local", "fe80::1"),
            ("a private network (site-local)", "fec0::1"),
            ("not a public address", "4000::1 ::ffff:0:127.0.0.1"),
        ] {
            for address in addresses.split(' ') {
                assert_eq!(internal_network(address.parse().unwrap()), Some(network), "{address}");
            }
        }
    }

    /// IANA's special-purpose registries as of October 2025, every row:
    /// <https://www.iana.org/assignments/iana-ipv4-special-registry> and
    /// <https://www.iana.org/assignments/iana-ipv6-special-registry>. Some rows are globally reachable (anycast of
    /// protocols, NAT64's well-known prefix); no callback is there, so those are refused as well.
    #[rustfmt::skip]
    const IANA: &[&str] = &[
        "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32", "192.0.0.170/32",
        "192.0.0.171/32", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.88.99.2/32",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
        "255.255.255.255/32", "::1/128", "::/128", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64",
        "100:0:0:1::/64", "2001::/23", "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48",
        "2001:3::/32", "2001:4:112::/48", "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16",
        "2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10",
    ];

    #[test]
    fn the_lists_match_the_iana_registries() {
        for row in IANA {
            let network = row.parse::<IpNet>().unwrap();
            for address in [network.network(), network.broadcast()] {
                assert!(internal_network(address).is_some(), "{row}: {address}");
            }
        }
        // Beyond the registries only multicast, deprecated and unassigned ranges and one cloud are refused.
        let beyond = ["224.0.0.0/4", "168.63.129.16/32", "::/96", "fec0::/10", "ff00::/8"];
        let known = IANA.iter().chain(&beyond).map(|row| row.parse::<IpNet>().unwrap()).collect::<Vec<_>>();
        let listed = INTERNAL_V4.iter().map(|(network, _)| IpNet::from(*network));
        for network in listed.chain(INTERNAL_V6.iter().map(|(network, _)| IpNet::from(*network))) {
            assert!(known.iter().any(|known| known.contains(&network)), "{network} is in no registry");
        }
    }

    /// The rules of the egress policy in deploy/kubernetes: every address but the internal ones.
    fn egress_rules() -> String {
        let v4 = INTERNAL_V4.iter().map(|(network, _)| IpNet::from(*network)).collect::<Vec<_>>();
        let v6 = INTERNAL_V6.iter().map(|(network, _)| IpNet::from(*network));
        let v6 = v6.filter(|network| IpNet::from(GLOBAL_V6).contains(network)).collect::<Vec<_>>();
        let block = |cidr: IpNet, except: &Vec<IpNet>| {
            let except = IpNet::aggregate(except)
                .iter()
                .map(|network| format!("              - {network}\n"))
                .collect::<String>();
            format!("        - ipBlock:\n            cidr: {cidr}\n            except:\n{except}")
        };
        format!("    - to:\n{}{}", block(Ipv4Net::default().into(), &v4), block(GLOBAL_V6.into(), &v6))
    }

    #[test]
    fn the_egress_policy_of_kubernetes_has_the_same_networks() {
        const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/kubernetes/base/network.yaml");
        const MARK: &str = "# Generated by UPDATE_SCHEMAS=1 cargo test --workspace --lib egress_policy:\n";
        let text = std::fs::read_to_string(PATH).unwrap();
        let (before, rules) = text.split_once(MARK).expect("the mark of the generated rules");
        if std::env::var_os("UPDATE_SCHEMAS").is_some() {
            std::fs::write(PATH, format!("{before}{MARK}{}", egress_rules())).unwrap();
        } else {
            assert_eq!(rules, egress_rules(), "{PATH} is outdated");
        }
    }

    #[test]
    fn public_addresses_are_allowed() {
        let addresses = "1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1 \
             168.63.129.17 169.253.255.255 172.15.255.255 172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 \
             198.17.255.255 198.20.0.0 223.255.255.255 2001:200::1 2606:4700:4700::1111 2a00:1450::1 3ffe::1";
        for address in addresses.split_whitespace() {
            assert_eq!(internal_network(address.parse().unwrap()), None, "{address}");
        }
    }

    #[test]
    fn names_are_refused_by_their_addresses() {
        let [public, private, loopback] = ["93.184.215.14", "10.0.0.1", "::1"].map(|text| text.parse().unwrap());
        let guard = guard(&[]);
        let filter = |addresses: &[IpAddr]| guard.filter("a.example", 443, addresses.to_vec());
        assert_eq!(filter(&[public]), Ok(vec![public]));
        assert_eq!(filter(&[private, public]), Ok(vec![public]));
        assert!(matches!(filter(&[private, loopback]), Err(Refused::Address { .. })));
        assert_eq!(filter(&[]), Err(Refused::NoAddress("a.example".into())));
    }

    #[tokio::test(start_paused = true)]
    async fn new_urls_are_checked_as_far_as_their_names_resolve() {
        let guard = guard(&["127.0.0.0/8"]);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let refusal = async |url: &str| {
            let lookup = async |name: &str| match name {
                "public.example" => Ok(vec![address("10.0.0.1"), address("93.184.215.14")]),
                "internal.example" => Ok(vec![address("10.0.0.1")]),
                "slow.example" => std::future::pending().await,
                "new.example" => Ok(Vec::new()),
                name => Err(LookupError::TimedOut(name.to_owned())),
            };
            guard.refusal(url, lookup).await
        };
        for fine in [
            "https://public.example/x",
            "https://slow.example/x",
            "https://new.example/x",
            "https://nowhere.example/x",
            "http://127.0.0.1:9000/x",
        ] {
            assert_eq!(refusal(fine).await, None, "{fine}");
        }
        for (refused, reason) in [
            ("https://internal.example/x", "the address 10.0.0.1 is not allowed: a private network"),
            ("http://0x0a.1/x", "the address 10.0.0.1 is not allowed: a private network"),
            ("ftp://public.example/x", "the URL is ftp://, and only https is allowed"),
            ("https://user@public.example/x", "the URL contains a user or password"),
            ("https://:password@public.example/x", "the URL contains a user or password"),
            ("https://", "the URL is invalid"),
        ] {
            let refusal = refusal(refused).await.unwrap();
            assert!(refusal.contains(reason), "{refused}: {refusal}");
        }
    }

    #[test]
    fn allowed_networks_are_exempt_and_no_others() {
        let guard = guard(&["127.0.0.0/8", "fd12:3456::/32"]);
        assert!(guard.check_url("http://127.0.0.1:9000/").is_ok());
        assert!(guard.check_url("http://[fd12:3456::1]/").is_ok());
        assert!(guard.check_url("http://10.0.0.1/").is_err());
        assert!(guard.check_url("http://[fd12:3457::1]/").is_err());
        // A mapped address is a different address, which is not allowed.
        assert!(guard.check_url("http://[::ffff:127.0.0.1]/").is_err());
    }

    #[test]
    fn denied_networks_and_own_addresses_are_refused_within_allowed_networks() {
        let own_addresses = OwnAddresses::default();
        own_addresses.set(vec![
            ("10.0.0.2:5432".parse().unwrap(), "it is the address of Postgres"),
            ("93.184.215.14:5432".parse().unwrap(), "it is the address of Postgres"),
            ("127.0.0.1:4222".parse().unwrap(), "it is the address of NATS"),
        ]);
        let deny_networks = vec!["10.1.0.0/16".parse().unwrap(), "8.8.8.8/32".parse().unwrap()];
        let guard = Guard { deny_networks, own_addresses, ..guard(&["10.0.0.0/8", "127.0.0.0/8", "::ffff:0:0/96"]) };
        let refusal = |url: &str| guard.check_url(url).err().map(|refused| refused.to_string()).unwrap_or_default();
        for fine in ["10.0.0.1", "10.2.0.1", "127.0.0.1:4221", "127.0.0.1", "[::ffff:10.0.0.1]", "8.8.4.4"] {
            assert_eq!(refusal(&format!("http://{fine}/")), "", "{fine}");
        }
        for (refused, reason) in [
            ("10.1.2.3", "its network is in DENY_NETWORKS"),
            ("[::ffff:10.1.2.3]", "its network is in DENY_NETWORKS"),
            ("8.8.8.8", "its network is in DENY_NETWORKS"),
            // The host of a server, on any port.
            ("10.0.0.2:8222", "it is the address of Postgres"),
            ("93.184.215.14", "it is the address of Postgres"),
            ("[::ffff:10.0.0.2]", "it is the address of Postgres"),
            // Every loopback address is this machine, which other programs share.
            ("127.0.0.1:4222", "it is the address of NATS"),
            ("127.9.9.9:4222", "it is the address of NATS"),
        ] {
            assert!(refusal(&format!("http://{refused}/")).ends_with(reason), "{refused}");
        }
    }

    #[test]
    fn only_https_and_no_ports_of_other_protocols_unless_allowed() {
        let strict = Guard::default();
        assert!(strict.check_url("https://crm.example/hook").is_ok());
        let port = |allow_ports: &[u16]| {
            Guard { allow_ports: allow_ports.to_vec(), ..Guard::default() }.check_url("https://crm.example:22/hook")
        };
        assert_eq!(port(&[]), Err(Refused::Port { port: 22, service: "SSH" }));
        assert!(port(&[22]).is_ok());
        assert_eq!(strict.check_url("http://crm.example/hook"), Err(Refused::Scheme("http".into())));
        assert_eq!(guard(&[]).check_url("ftp://crm.example/hook"), Err(Refused::Scheme("ftp".into())));
        assert!(matches!(guard(&[]).check_url("https://"), Err(Refused::InvalidUrl(_))));
    }

    proptest! {
        #[test]
        fn arbitrary_urls_never_panic(text in ".*") {
            let _ = guard(&[]).check_url(&text);
        }

        #[test]
        fn an_ipv4_address_hidden_in_ipv6_is_never_public(bytes: [u8; 4]) {
            let inner = Ipv4Addr::from(bytes);
            for address in [inner.to_ipv6_mapped(), inner.to_ipv6_compatible()] {
                prop_assert!(internal_network(address.into()).is_some());
            }
        }
    }
}
