//! Connections to endpoints, kept for the next request.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use contract::process::ClientCertificate;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::{ClientConfig, client::Resumption, sign::SingleCertAndKey};

use super::{
    resolver::Resolver,
    response_limit::{LimitedConnector, OpenConnections},
};

/// How much of a body is read before the connection is closed. A higher limit reuses connections of endpoints with long
/// responses; a lower one reads fewer unused bytes.
pub(crate) const MAX_BODY: usize = 64 * 1024;
/// How long connecting to the addresses of a name may take. IPv4 and IPv6 are tried side by side; in each, the
/// addresses get equal parts of this time. A longer timeout tolerates slower networks; a shorter one leaves more of the
/// attempt for the request if an address is silent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an idle connection is kept. A longer time saves handshakes, but more of the kept connections are closed by
/// the endpoint.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Idle connections per host: as many as one callback may use at once by default, so that a pause between two batches
/// of events closes no connection that the next batch opens again.
const MAX_IDLE_PER_HOST: usize = 256;
/// Connections that may be open per attempt in flight, of all hosts together. Beyond that, each request opens a
/// connection of its own, until enough idle ones have timed out. With more, callbacks with very many hosts take more
/// memory; with fewer, they make other callbacks open more connections.
pub(crate) const MAX_OPEN_PER_ATTEMPT: usize = 4;
/// The size of the read buffer, and so the longest head. A larger buffer lets an endless response occupy a thread for
/// longer; a smaller one rejects heads that other clients accept.
pub(crate) const MAX_READ: usize = 32 * 1024;
/// Maximum bytes that are read of a response: head, body, and some room for interim (1xx) heads.
const MAX_RESPONSE: usize = MAX_BODY + 2 * MAX_READ;
/// Maximum number of header lines of a response. More lines cost memory for each response; fewer reject responses that
/// other clients accept.
const MAX_HEADERS: usize = 1000;

pub(crate) type HttpClient = Client<LimitedConnector<HttpsConnector<HttpConnector<Resolver>>>, Full<Bytes>>;

/// The clients of one TLS identity.
#[derive(Debug)]
pub(crate) struct ConnectionPool {
    /// Keeps connections for the next request.
    kept: HttpClient,
    /// Opens a connection for each request.
    pub(crate) fresh: HttpClient,
    /// The connections of all pools.
    open: OpenConnections,
}

impl ConnectionPool {
    pub(crate) fn new(resolver: Resolver, tls: ClientConfig, open: OpenConnections) -> Self {
        let mut http = HttpConnector::new_with_resolver(resolver);
        // The guard checks the scheme.
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let connector =
            LimitedConnector { connector: https.wrap_connector(http), max_response: MAX_RESPONSE, open: open.clone() };
        let client = |max_idle_per_host| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_max_idle_per_host(max_idle_per_host)
                .http1_max_buf_size(MAX_READ)
                .http1_max_headers(MAX_HEADERS)
                // The status decides, so header lines that other clients ignore are ignored here too.
                .http1_ignore_invalid_headers_in_responses(true)
                .http1_allow_spaces_after_header_name_in_responses(true)
                .http1_allow_obsolete_multiline_headers_in_responses(true)
                .build(connector.clone())
        };
        Self { kept: client(MAX_IDLE_PER_HOST), fresh: client(0), open }
    }

    /// The client for a request.
    pub(crate) fn client(&self) -> &HttpClient {
        if self.open.is_full() { &self.fresh } else { &self.kept }
    }

    /// The pool of a callback with a certificate of its own. It shares neither connections nor TLS sessions with
    /// others: an endpoint identifies the client of a connection, and of a resumed session, by the certificate that it
    /// began with.
    ///
    /// # Errors
    /// Why the certificate cannot be used.
    pub(crate) fn with_certificate(
        resolver: Resolver,
        mut tls: ClientConfig,
        open: OpenConnections,
        certificate: &ClientCertificate,
    ) -> Result<Self, String> {
        tls.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certificate.certified_key()?));
        tls.resumption = Resumption::default();
        Ok(Self::new(resolver, tls, open))
    }
}
