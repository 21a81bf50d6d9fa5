//! 1 Accept: TLS for the HTTP API, with a certificate that can be renewed at any time.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context;
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_util::sync::CancellationToken;

/// How often the files are checked for renewal.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// A certificate chain and its private key, in PEM files.
#[derive(Debug)]
pub(crate) struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    served: RwLock<Arc<CertifiedKey>>,
}

/// The contents of the two files.
#[derive(Debug, PartialEq, Eq)]
struct Pem {
    chain: Vec<u8>,
    key: Vec<u8>,
}

impl Certificate {
    pub(crate) async fn load(chain: PathBuf, key: PathBuf) -> anyhow::Result<Arc<Self>> {
        let provider = Arc::new(ring::default_provider());
        let served = RwLock::new(parse(&read(&chain, &key).await?, &provider)?);
        Ok(Arc::new(Self { chain, key, provider, served }))
    }

    /// A configuration that uses the current certificate for each handshake.
    pub(crate) fn server_config(self: &Arc<Self>) -> anyhow::Result<Arc<ServerConfig>> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// Watches the files until shutdown. Files that cannot be served, as during a replacement, leave the certificate
    /// unchanged.
    pub(crate) async fn follow(self: Arc<Self>, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut seen = None;
        while shutdown.run_until_cancelled(tokio::time::sleep(CHECK_INTERVAL)).await.is_some() {
            let pem = match read(&self.chain, &self.key).await {
                Ok(pem) => pem,
                Err(e) => {
                    tracing::warn!("keeping the current TLS certificate: {e:#}");
                    continue;
                }
            };
            if seen.as_ref() == Some(&pem) {
                continue;
            }
            match parse(&pem, &self.provider) {
                Ok(renewed) => {
                    let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
                    if served.cert != renewed.cert {
                        tracing::info!("serving a renewed TLS certificate");
                    }
                    *served = renewed;
                }
                Err(e) => tracing::warn!("keeping the current TLS certificate: {e:#}"),
            }
            seen = Some(pem);
        }
        Ok(())
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.served.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

async fn read(chain: &PathBuf, key: &PathBuf) -> anyhow::Result<Pem> {
    let read =
        async |path: &PathBuf| tokio::fs::read(path).await.with_context(|| format!("cannot read {}", path.display()));
    Ok(Pem { chain: read(chain).await?, key: read(key).await? })
}

fn parse(pem: &Pem, provider: &CryptoProvider) -> anyhow::Result<Arc<CertifiedKey>> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(&pem.chain).collect::<Result<_, _>>().context("the certificates are not PEM")?;
    let key = PrivateKeyDer::from_pem_slice(&pem.key).context("the private key is not PEM")?;
    Ok(Arc::new(CertifiedKey::from_der(chain, key, provider).context("the certificate and its key do not match")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem() -> Pem {
        let made = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
        Pem { chain: made.cert.pem().into(), key: made.signing_key.serialize_pem().into() }
    }

    #[test]
    fn only_a_certificate_with_its_own_key_is_served() {
        let provider = ring::default_provider();
        let (mine, other) = (pem(), pem());
        assert!(parse(&mine, &provider).is_ok());
        for (chain, key, fault) in [
            (&mine.chain[..], &other.key[..], "do not match"),
            (&[], &mine.key, "do not match"),
            (&mine.chain[..40], &mine.key, "not PEM"),
            (&mine.chain, &mine.key[..40], "not PEM"),
            (&mine.chain, &mine.chain, "not PEM"),
        ] {
            let error = parse(&Pem { chain: chain.into(), key: key.into() }, &provider).unwrap_err();
            assert!(format!("{error:#}").contains(fault), "{error:#}");
        }
    }
}
