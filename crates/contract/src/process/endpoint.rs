//! Rules for the endpoints of callbacks: their URLs, ports and authentication headers.

use url::{ParseError, Url};

use super::MAX_URL_BYTES;
use crate::text::name_char;

/// Why a URL cannot be called, or not without showing a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlFault {
    /// It is longer than servers accept.
    #[error("has {0} bytes, and at most {MAX_URL_BYTES} are allowed")]
    TooLong(usize),
    /// It contains a space or an invisible character.
    #[error("contains {0} {1}: remove or percent-encode it")]
    Character(String, &'static str),
    /// It is not a URL, or has another scheme.
    #[error("is not an http or https URL")]
    Scheme,
    /// It has no host.
    #[error("has no host")]
    NoHost,
    /// Its host or port cannot be read.
    #[error("is invalid: {0}")]
    Invalid(String),
    /// It has a user or password.
    #[error("contains a user or password, which is visible wherever the URL is shown: use auth instead")]
    UserInfo,
    /// It has a fragment.
    #[error("has a fragment (from # on), which is never sent: remove it")]
    Fragment,
    /// It has port 0, on which nothing listens.
    #[error("has port 0, which cannot be called")]
    PortZero,
}

/// Parses the URL of a callback.
///
/// # Errors
/// The URL can never be called.
pub fn parse_url(text: &str) -> Result<Url, UrlFault> {
    if text.len() > MAX_URL_BYTES {
        return Err(UrlFault::TooLong(text.len()));
    }
    // The parser silently drops some of these characters.
    let unseen = |c: char| c.is_whitespace() || crate::text::is_invisible(c);
    if let Some((at, c)) = text.char_indices().find(|(_, c)| unseen(*c)) {
        let place = match (at, text[at..].chars().all(unseen)) {
            (0, _) => "at its beginning",
            (_, true) => "at its end",
            _ => "inside",
        };
        return Err(UrlFault::Character(name_char(c), place));
    }
    let (scheme, rest) = text.split_once("://").ok_or(UrlFault::Scheme)?;
    if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
        return Err(UrlFault::Scheme);
    }
    // The parser would read the path as the host.
    if rest.is_empty() || rest.starts_with(['/', '\\', '?', '#']) {
        return Err(UrlFault::NoHost);
    }
    let url = Url::parse(text).map_err(|e| match e {
        ParseError::EmptyHost => UrlFault::NoHost,
        e => UrlFault::Invalid(e.to_string()),
    })?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(UrlFault::UserInfo);
    }
    if url.fragment().is_some() {
        return Err(UrlFault::Fragment);
    }
    if url.port() == Some(0) {
        return Err(UrlFault::PortZero);
    }
    Ok(url)
}

/// Ports of services that are not webhook endpoints. Such a service could take a request for a command of its own
/// protocol. The ports are refused unless the operator allows them.
pub const RESTRICTED_PORTS: [(u16, &str); 44] = [
    (21, "FTP"),
    (22, "SSH"),
    (23, "Telnet"),
    (25, "SMTP"),
    (53, "DNS"),
    (69, "TFTP"),
    (79, "Finger"),
    (110, "POP3"),
    (111, "RPC"),
    (119, "NNTP"),
    (135, "Windows RPC"),
    (139, "NetBIOS"),
    (143, "IMAP"),
    (389, "LDAP"),
    (445, "SMB"),
    (465, "SMTP"),
    (514, "syslog"),
    (587, "SMTP"),
    (636, "LDAP"),
    (873, "rsync"),
    (993, "IMAP"),
    (995, "POP3"),
    (1433, "SQL Server"),
    (1521, "Oracle"),
    (2049, "NFS"),
    (2181, "ZooKeeper"),
    (2375, "Docker"),
    (2376, "Docker"),
    (2379, "etcd"),
    (2380, "etcd"),
    (3306, "MySQL"),
    (3389, "RDP"),
    (4222, "NATS"),
    (5432, "PostgreSQL"),
    (5672, "AMQP"),
    (6222, "NATS"),
    (6379, "Redis"),
    (6443, "Kubernetes"),
    (8222, "NATS"),
    (9042, "Cassandra"),
    (9092, "Kafka"),
    (10250, "the kubelet"),
    (11211, "memcached"),
    (27017, "MongoDB"),
];

/// The service that a port belongs to, if callbacks may not use it.
pub fn restricted_port(port: u16) -> Option<&'static str> {
    let at = RESTRICTED_PORTS.binary_search_by_key(&port, |(port, _)| *port).ok()?;
    Some(RESTRICTED_PORTS[at].1)
}

/// Headers that an authentication may not set, in lower case, with the reason. A name that ends with `-` is a prefix.
const RESERVED_HEADERS: [(&str, &str); 26] = {
    const OURS: &str = "is a header that webhooks set themselves";
    const HOP: &str = "belongs to the connection, not to the request";
    const FORWARDED: &str = "states where a request came from; only proxies may set it";
    [
        ("webhook-", OURS),
        ("content-type", OURS),
        ("content-length", OURS),
        ("content-encoding", OURS),
        ("user-agent", OURS),
        ("host", OURS),
        ("traceparent", OURS),
        ("tracestate", OURS),
        ("accept-encoding", OURS),
        ("connection", HOP),
        ("keep-alive", HOP),
        ("transfer-encoding", HOP),
        ("te", HOP),
        ("trailer", HOP),
        ("upgrade", HOP),
        ("expect", HOP),
        ("http2-settings", HOP),
        ("proxy-", HOP),
        ("forwarded", FORWARDED),
        ("via", FORWARDED),
        ("x-forwarded-", FORWARDED),
        ("x-real-ip", FORWARDED),
        ("x-client-ip", FORWARDED),
        ("true-client-ip", FORWARDED),
        ("cf-connecting-ip", FORWARDED),
        ("x-original-", FORWARDED),
    ]
};

/// Why an authentication may not set this header.
pub fn header_fault(name: &str) -> Option<&'static str> {
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(is_token) {
        return Some("is not a header name");
    }
    // Servers that speak CGI read `_` as `-`.
    let name = name.to_ascii_lowercase().replace('_', "-");
    let is_reserved = |reserved: &str| name == reserved || reserved.ends_with('-') && name.starts_with(reserved);
    RESERVED_HEADERS.iter().find(|(reserved, _)| is_reserved(reserved)).map(|(_, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_that_can_never_be_called_are_refused_with_the_reason() {
        let long = format!("https://crm.example/{}", "x".repeat(70_000));
        for (url, reason) in [
            (long.as_str(), "has 70020 bytes, and at most 2048 are allowed"),
            ("", "is not an http or https URL"),
            ("crm.example", "is not an http or https URL"),
            ("ftp://crm.example", "is not an http or https URL"),
            ("https:crm.example", "is not an http or https URL"),
            ("javascript:alert(1)", "is not an http or https URL"),
            ("https://", "has no host"),
            ("http:///x", "has no host"),
            ("https://:8080/x", "has no host"),
            ("https://?x", "has no host"),
            ("https://crm.example/x ", "contains U+0020 SPACE at its end: remove or percent-encode it"),
            (" https://crm.example/x", "contains U+0020 SPACE at its beginning: remove or percent-encode it"),
            ("https://crm.example/a b", "contains U+0020 SPACE inside: remove or percent-encode it"),
            ("https://crm.example/x\n", "contains U+000A at its end: remove or percent-encode it"),
            ("https://crm\u{200b}.example/", "contains U+200B ZERO WIDTH SPACE inside: remove or percent-encode it"),
            ("https://crm.example:99999/", "is invalid: invalid port number"),
            ("https://[::1/", "is invalid: invalid IPv6 address"),
            ("https://a..b%/", "is invalid: invalid international domain name"),
            (
                "https://u@crm.example/",
                "contains a user or password, which is visible wherever the URL is shown: use auth instead",
            ),
            (
                "https://:p@crm.example/",
                "contains a user or password, which is visible wherever the URL is shown: use auth instead",
            ),
            ("https://crm.example/#top", "has a fragment (from # on), which is never sent: remove it"),
            ("https://crm.example:0/", "has port 0, which cannot be called"),
        ] {
            assert_eq!(parse_url(url).map_err(|e| e.to_string()), Err(reason.into()), "{url:.40}");
        }
        for url in [
            "https://crm.example",
            "HTTPS://crm.example:8443/x?y=%20",
            "http://127.0.0.1:1/",
            "https://bücher.example/ä",
        ] {
            assert!(parse_url(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn ports_of_other_services_are_restricted() {
        assert!(RESTRICTED_PORTS.is_sorted());
        assert_eq!(restricted_port(5432), Some("PostgreSQL"));
        assert_eq!(restricted_port(22), Some("SSH"));
        for port in [80, 443, 3000, 8000, 8080, 8443, 9000, 40_000] {
            assert_eq!(restricted_port(port), None, "{port}");
        }
    }

    #[test]
    fn headers_of_the_connection_and_of_proxies_are_reserved() {
        for name in [
            "Connection",
            "Host",
            "Content-Length",
            "Transfer-Encoding",
            "TE",
            "Upgrade",
            "Trailer",
            "Keep-Alive",
            "Proxy-Authorization",
            "Proxy-Connection",
            "X-Forwarded-For",
            "X_Forwarded_Host",
            "Forwarded",
            "Via",
            "webhook-id",
            "Webhook-Anything",
            "Content-Type",
            "traceparent",
            "X-Real-IP",
        ] {
            assert!(header_fault(name).is_some_and(|why| why != "is not a header name"), "{name}");
        }
        for name in ["", "a b", "Ä", "x:"] {
            assert_eq!(header_fault(name), Some("is not a header name"), "{name:?}");
        }
        for name in ["Authorization", "X-Key", "Cookie", "Api-Key", "Viaduct", "TEA"] {
            assert_eq!(header_fault(name), None, "{name}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_url_without_faults_has_a_host_and_no_secrets(text in ".*|(https?://)?[a-z@:.\\[\\]/%0-9# ]{0,20}") {
            if let Ok(url) = parse_url(&text) {
                proptest::prop_assert!(url.host_str().is_some_and(|host| !host.is_empty()));
                proptest::prop_assert!(url.username().is_empty() && url.password().is_none());
            }
        }
    }
}
