//! Streaming replication: a standby, and its promotion.

use std::{fs, io::Write as _, path::PathBuf};

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{LocalPostgres, START_DEADLINE, as_user, launch};
use crate::{
    Say,
    error::{During, Error},
    process::Signal,
    programs::run,
    server_dir::ServerDir,
};

impl LocalPostgres {
    /// Starts a temporary server that streams from this one, which must have been started with
    /// [`PostgresOptions::replication`](super::PostgresOptions::replication). It has the same users and password.
    ///
    /// # Errors
    /// As for [`LocalPostgres::start`]; or the copy failed.
    pub async fn start_standby(&self, say: Say<'_>) -> Result<Self, Error> {
        let home = ServerDir::open(None, self.home.user(), say)?;
        home.write_private("password", &self.password)?;
        let mut copy = as_user(&self.program("pg_basebackup"), &home);
        copy.arg("-D").arg(home.join("data")).args(["-d", &self.url()]);
        copy.args(["--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream", "--no-sync"]);
        run(&mut copy, "pg_basebackup").await?;
        let launch = async |port| launch(&self.programs, &home, &self.settings, &self.password, port, say).await;
        let (process, port) = home.launch(None, launch).await?;
        let (programs, settings) = (self.programs.clone(), self.settings.clone());
        Ok(Self { process, home, programs, settings, password: self.password.clone(), port })
    }

    /// Makes a former primary a standby of the server that was promoted in its place: undoes the changes that only the
    /// former primary has (`pg_rewind`), and starts it.
    ///
    /// # Errors
    /// As for [`LocalPostgres::restart`]; or pg_rewind failed.
    pub async fn rewind(&mut self, primary: &Self) -> Result<(), Error> {
        self.stop().await?;
        // pg_rewind lets the server recover first, with the settings of its directory alone.
        let settings = self.home.join("data").join("postgresql.auto.conf");
        let opened = fs::OpenOptions::new().append(true).open(&settings);
        let appended = opened.and_then(|mut file| file.write_all(b"wal_log_hints = on\nwal_keep_size = 256MB\n"));
        appended.during(|| format!("writing {}", settings.display()))?;
        // Before its first checkpoint, the new primary does not show its timeline to pg_rewind.
        primary.execute("CHECKPOINT").await?;
        let mut rewind = as_user(&self.program("pg_rewind"), &self.home);
        rewind.arg("-D").arg(self.home.join("data")).args(["--source-server", &primary.url()]);
        rewind.args(["--write-recovery-conf", "--no-sync"]);
        run(&mut rewind, "pg_rewind").await?;
        self.restart().await
    }

    /// Makes a standby the primary.
    ///
    /// # Errors
    /// The server is not a standby, or does not become the primary.
    pub async fn promote(&self) -> Result<(), Error> {
        self.execute(&format!("SELECT pg_promote(true, {})", START_DEADLINE.as_secs())).await
    }

    /// Sets whether each commit waits until a standby has stored it.
    ///
    /// # Errors
    /// The server does not answer.
    pub async fn set_synchronous(&self, synchronous: bool) -> Result<(), Error> {
        let names = if synchronous { "*" } else { "" };
        self.execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'")).await?;
        self.execute("SELECT pg_reload_conf()").await
    }

    /// Freezes the server with all its processes, as a host that hangs: it neither answers nor closes connections.
    ///
    /// # Errors
    /// The system cannot signal.
    pub fn freeze(&self) -> Result<(), Error> {
        // The postmaster first, so that it starts no other processes.
        self.process.signal(Signal::Stop)?;
        self.signal_children(Signal::Stop)
    }

    /// Resumes the server after [`LocalPostgres::freeze`].
    ///
    /// # Errors
    /// The system cannot signal.
    pub fn thaw(&self) -> Result<(), Error> {
        self.signal_children(Signal::Cont)?;
        self.process.signal(Signal::Cont)
    }

    fn signal_children(&self, signal: Signal) -> Result<(), Error> {
        let reading = || "reading /proc".to_owned();
        for entry in fs::read_dir("/proc").during(reading)? {
            let path = entry.during(reading)?.path();
            let pid = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
            if let Some(pid) = pid
                && parent(path) == Some(self.pid())
            {
                crate::process::send(pid, signal).during(|| format!("sending a signal to {pid}"))?;
            }
        }
        Ok(())
    }

    async fn execute(&self, statement: &str) -> Result<(), Error> {
        let run = async {
            let mut connection = PgConnection::connect(&self.url()).await?;
            sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await?;
            connection.close().await
        };
        run.await.map_err(|e| Error::Command { command: statement.to_owned(), output: e.to_string() })
    }
}

/// The parent of the process with this directory in `/proc`; None if it has ended.
fn parent(process: PathBuf) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}
