//! The console's configuration.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use clap::Args;
use contract::secret::Secret;
use service_kit::config::{HealthConfig, NatsConfig};
use url::{Host, Url};

/// The options of the console.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Address of the console's pages.
    #[arg(long = "listen", env = "CONSOLE_LISTEN", default_value = "127.0.0.1:8090")]
    pub listen: SocketAddr,
    /// The URL that people open in their browsers, for example https://console.example.com. By default the address of
    /// --listen, which must then be a loopback address. With http://, only a loopback address is allowed.
    #[arg(long = "url", env = "CONSOLE_URL")]
    pub url: Option<String>,
    /// The key that seals sessions: the base64 of 32 random bytes. Replicas need the same one. Without it, each start
    /// generates a key, and sessions end with the process.
    #[arg(long = "key", env = "CONSOLE_KEY", hide_env_values = true, value_name = "KEY")]
    pub key: Option<Secret>,
    /// The gateway's URL: actions go through its HTTP API.
    #[arg(long, env = "LEADRELAY_GATEWAY_URL", default_value = "http://127.0.0.1:8080")]
    pub gateway_url: String,
    /// The connection to NATS.
    #[command(flatten)]
    pub nats: NatsConfig,
    /// The health endpoints.
    #[command(flatten)]
    pub health: HealthConfig,
}

/// Where browsers find the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublicUrl {
    /// The origin, as browsers send it in the header `Origin`.
    pub(crate) origin: String,
    /// Whether browsers use TLS.
    pub(crate) is_https: bool,
}

impl PublicUrl {
    /// The public URL of a console that listens on this address.
    ///
    /// # Errors
    /// Sessions would cross a network unencrypted, or the URL is not an origin.
    pub(crate) fn new(listen: SocketAddr, url: Option<&str>) -> anyhow::Result<Self> {
        let Some(text) = url else {
            if !listen.ip().is_loopback() {
                bail!(
                    "CONSOLE_URL is not set, and {listen} is not a loopback address: set CONSOLE_URL to the URL that \
                     people open, for example https://console.example.com"
                );
            }
            // As browsers write it: without the port 80.
            let url = Url::parse(&format!("http://{listen}")).context("the console's address is no host of a URL")?;
            return Ok(Self { origin: url.origin().ascii_serialization(), is_https: false });
        };
        let url = Url::parse(text).with_context(|| format!("CONSOLE_URL {text:?} is not a URL"))?;
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() {
            bail!("CONSOLE_URL {text:?} must be a scheme, a host and maybe a port, without a path");
        }
        let is_https = match url.scheme() {
            "https" => true,
            "http" if is_loopback(&url) => false,
            "http" => bail!("CONSOLE_URL {text:?} would send sessions unencrypted: use https:// for other machines"),
            _ => bail!("CONSOLE_URL {text:?} must begin with https:// or http://"),
        };
        Ok(Self { origin: url.origin().ascii_serialization(), is_https })
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(listen: &str, url: Option<&str>) -> Result<(String, bool), String> {
        let public = PublicUrl::new(listen.parse().unwrap(), url);
        public.map(|public| (public.origin, public.is_https)).map_err(|e| e.to_string())
    }

    #[test]
    fn sessions_never_cross_a_network_unencrypted() {
        let ok = |origin: &str, is_https| Ok((origin.to_owned(), is_https));
        assert_eq!(origin("127.0.0.1:8090", None), ok("http://127.0.0.1:8090", false));
        assert_eq!(origin("[::1]:8090", None), ok("http://[::1]:8090", false));
        assert_eq!(origin("127.0.0.1:80", None), ok("http://127.0.0.1", false));
        assert_eq!(origin("0.0.0.0:8090", Some("https://console.example/")), ok("https://console.example", true));
        assert_eq!(origin("0.0.0.0:8090", Some("http://localhost:9000")), ok("http://localhost:9000", false));
        for (listen, url, why) in [
            ("0.0.0.0:8090", None, "not a loopback address"),
            ("0.0.0.0:8090", Some("http://console.example"), "unencrypted"),
            ("127.0.0.1:8090", Some("https://console.example/path"), "without a path"),
            ("127.0.0.1:8090", Some("ftp://console.example"), "must begin with"),
            ("127.0.0.1:8090", Some("console.example"), "not a URL"),
        ] {
            let error = origin(listen, url).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
