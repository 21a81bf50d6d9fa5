//! TLS for a private server.

use std::path::PathBuf;

/// What a server needs for TLS: files in PEM. The certificate must be good for 127.0.0.1.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The server's certificate, with what is between it and the CA.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The CA that vouches for it.
    pub ca: PathBuf,
    /// Whether clients must show a certificate of that CA too. The server's own certificate must then be good for clients.
    /// nats-server only.
    pub verify_clients: bool,
}
