//! TLS for a private server.

use std::path::PathBuf;

/// PEM files for TLS. The certificate must be valid for 127.0.0.1.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The server's certificate chain.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The CA certificate.
    pub ca: PathBuf,
    /// Whether clients need a certificate of that CA, too. The server's certificate must then be valid for clients as
    /// well. nats-server only.
    pub verify_clients: bool,
}
