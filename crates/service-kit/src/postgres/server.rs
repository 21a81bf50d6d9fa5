//! The servers of a `DATABASE_URL`, and connecting to one that accepts writes.

use std::{
    str::FromStr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use sqlx::{Connection as _, PgConnection, Row, postgres::PgConnectOptions};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::error::{gave_up, reason};

/// How long a server may take to accept a connection. A longer deadline delays a failover; a shorter one gives up a
/// busy server.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// Why a `DATABASE_URL` cannot be used. Does not quote it, because it contains the password.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseUrlError {
    /// Not a URL of Postgres.
    #[error(
        "DATABASE_URL is not a URL of Postgres: write postgres://user:password@host:port/database, with several servers as \
         host1:port1,host2:port2"
    )]
    Invalid(#[source] sqlx::Error),
    /// The scheme is not one of Postgres.
    #[error("DATABASE_URL does not start with postgres://")]
    Scheme,
    /// Servers are listed in the parameter `host`.
    #[error(
        "DATABASE_URL lists servers in the parameter host: list them before the database instead, as host1:port1,host2:port2"
    )]
    HostParameter,
    /// The services need a server that accepts writes.
    #[error(
        "DATABASE_URL has target_session_attrs={0}: only read-write is possible, which is also the default, because the \
         services write"
    )]
    TargetSessionAttrs(String),
}

/// The servers of a `DATABASE_URL`, in its order: usually one; several as
/// `postgres://user@host1:5432,host2:5432/database`. `target_session_attrs=read-write` is accepted because clients of
/// libpq need it; a [`Pool`](super::Pool) never uses another kind of server.
///
/// # Errors
/// It is not a URL of Postgres, or has an option that is not supported.
pub fn servers(database_url: &str) -> Result<Vec<PgConnectOptions>, DatabaseUrlError> {
    let (scheme, rest) = database_url.split_once("://").ok_or(DatabaseUrlError::Scheme)?;
    if !matches!(scheme, "postgres" | "postgresql") {
        return Err(DatabaseUrlError::Scheme);
    }
    let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut parameters = Vec::new();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=') {
            Some(("target_session_attrs", "read-write" | "primary")) => {}
            Some(("target_session_attrs", other)) => return Err(DatabaseUrlError::TargetSessionAttrs(other.into())),
            Some(("host" | "hostaddr" | "port", list)) if list.contains(',') || list.contains("%2C") => {
                return Err(DatabaseUrlError::HostParameter);
            }
            _ => parameters.push(parameter),
        }
    }
    let query = parameters.join("&");
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    let server = |host: &str| PgConnectOptions::from_str(&format!("{scheme}://{user}{host}{path}?{query}"));
    hosts.split(',').map(|host| server(host).map_err(DatabaseUrlError::Invalid)).collect()
}

/// One run of a server that accepts writes.
#[derive(Debug, Clone)]
pub(super) struct Primary(Arc<Life>);

#[derive(Debug)]
struct Life {
    /// When its postmaster started, to the microsecond: no other server has the same.
    started: String,
    lost: CancellationToken,
    reason: OnceLock<String>,
}

impl Primary {
    fn new(started: String) -> Self {
        Self(Arc::new(Life { started, lost: CancellationToken::new(), reason: OnceLock::new() }))
    }

    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        self.0.started == other.0.started
    }

    /// Ends every wait for it. Its connections are not used again.
    pub(super) fn lose(&self, reason: impl Into<String>) {
        let _ = self.0.reason.set(reason.into());
        self.0.lost.cancel();
    }

    pub(super) fn is_lost(&self) -> bool {
        self.0.lost.is_cancelled()
    }

    /// Waits until the server is lost. Returns the reason.
    pub(super) async fn lost(&self) -> String {
        self.0.lost.cancelled().await;
        self.0.reason.get().cloned().unwrap_or_default()
    }
}

/// A connection to a server that accepted writes when it was made.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) raw: PgConnection,
    pub(super) primary: Primary,
    /// The process that serves the connection.
    pub(super) pid: i32,
}

impl Connection {
    /// Connects within [`CONNECT_DEADLINE`] and refuses a server that does not accept writes.
    pub(super) async fn open(server: &PgConnectOptions) -> sqlx::Result<Self> {
        let address = format!("{}:{}", server.get_host(), server.get_port());
        let connect = async {
            let mut raw = PgConnection::connect_with(server).await?;
            // Not prepared: the statement is sent once per connection.
            let row = sqlx::raw_sql(
                "SELECT pg_backend_pid(), pg_postmaster_start_time()::text, pg_is_in_recovery(),
                        current_setting('transaction_read_only') = 'on'",
            )
            .fetch_one(&mut raw)
            .await?;
            let (pid, started): (i32, String) = (row.try_get(0)?, row.try_get(1)?);
            let (is_standby, is_read_only): (bool, bool) = (row.try_get(2)?, row.try_get(3)?);
            match (is_standby, is_read_only) {
                (true, _) => Err(gave_up("it is a standby, which does not accept writes")),
                (_, true) => Err(gave_up("it is read-only (default_transaction_read_only)")),
                _ => Ok(Self { raw, primary: Primary::new(started), pid }),
            }
        };
        match timeout(CONNECT_DEADLINE, connect).await {
            Ok(Ok(connection)) => Ok(connection),
            // Its code decides whether to try again.
            Ok(Err(e @ sqlx::Error::Database(_))) => Err(e),
            Ok(Err(e @ (sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_)))) => {
                Err(gave_up(format!("cannot connect to Postgres at {address}: {}", reason(&e))))
            }
            Ok(Err(e)) => Err(e),
            Err(_) => Err(gave_up(format!("Postgres at {address} does not answer within {CONNECT_DEADLINE:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(url: &str) -> Vec<(String, u16)> {
        servers(url).unwrap().iter().map(|server| (server.get_host().to_owned(), server.get_port())).collect()
    }

    #[test]
    fn a_url_may_list_several_servers() {
        assert_eq!(hosts("postgres://u:p@a:5433/db"), [("a".into(), 5433)]);
        assert_eq!(
            hosts("postgresql://u:p%40x@a:5433,b,[::1]:5434/db?sslmode=disable&target_session_attrs=read-write"),
            [("a".into(), 5433), ("b".into(), 5432), ("[::1]".into(), 5434)]
        );
        let both = servers("postgres://user:p@a,b/base?application_name=x").unwrap();
        for server in both {
            assert_eq!((server.get_username(), server.get_database()), ("user", Some("base")));
            assert_eq!(server.get_application_name(), Some("x"));
        }
    }

    #[test]
    fn unsupported_urls_are_refused_with_a_correction() {
        let refused = |url: &str| servers(url).unwrap_err().to_string();
        assert!(refused("mysql://u:p0pw@a/db").contains("postgres://"));
        assert!(refused("u:p0pw@a/db").contains("postgres://"));
        assert!(refused("postgres://u:p0pw@a:x,b/db").contains("host1:port1,host2:port2"));
        assert!(refused("postgres://u:p0pw@a/db?host=a,b").contains("before the database"));
        assert!(refused("postgres://u:p0pw@a,b/db?target_session_attrs=standby").contains("only read-write"));
        for url in ["postgres://u:p0pw@a:x/db", "mysql://u:p0pw@a/db", "postgres://u:p0pw@a/db?port=1,2"] {
            assert!(!format!("{:?}", servers(url).unwrap_err()).contains("p0pw"));
        }
    }
}
