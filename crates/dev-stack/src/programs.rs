//! Finding postgres, initdb and nats-server, and installing them where that is allowed.

use crate::{
    Say,
    error::{During, Error},
    user::is_root,
};
use std::{
    env,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{process::Command, time::sleep};

/// Environment variable with the path of a nats-server that is not on the `PATH`.
pub const NATS_SERVER_VARIABLE: &str = "LEADRELAY_NATS_SERVER";

/// Directories to search after the `PATH`: distributions install daemons outside it.
const USUAL: [&str; 6] =
    ["/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/local/pgsql/bin", "/opt/homebrew/bin", "/usr/bin"];

/// Directories with one Postgres per version: parent directory and prefix of the version.
const VERSIONED: [(&str, &str); 4] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/opt/homebrew/opt", "postgresql@"),
    ("/usr/local/opt", "postgresql@"),
];

/// Pause between two attempts to lock the installation.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// Whether missing programs may be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Install {
    /// Yes, with apt-get, as root or with a sudo that needs no password. The command is printed before it runs.
    Allowed,
    /// No: a missing program is an error.
    Forbidden,
}

/// Ensures that postgres, initdb and nats-server are installed.
///
/// The installed services are not started now. A machine with systemd starts them at its next boot, unless they are
/// disabled.
///
/// # Errors
/// [`Error::Missing`] when a program is missing and may not or cannot be installed; [`Error::Command`] when the
/// installation failed.
pub async fn ensure_installed(install: Install, say: Say<'_>) -> Result<(), Error> {
    let packages = missing();
    let Some(program) = packages.first() else { return Ok(()) };
    let command = format!("apt-get update && apt-get install -y --no-install-recommends {}", packages.join(" "));
    let missing_error = |reason: &str| Err(Error::Missing { program, hint: format!("{reason}{}", advice(&command)) });
    if install == Install::Forbidden {
        return missing_error("");
    }
    if find(search_path(), &["apt-get"]).is_none() {
        return missing_error("automatic installation needs apt-get; ");
    }
    if !is_root() && !succeeds(Command::new("sudo").args(["-n", "true"])).await {
        return missing_error("automatic installation needs root, or a sudo without password; ");
    }

    // Wait if another process is installing them, then check again.
    let _lock = lock(&lock_path()).await?;
    let packages = missing();
    if packages.is_empty() {
        return Ok(());
    }
    let sudo = if is_root() { "" } else { "sudo " };
    say(&format!("installing missing programs: {}", command.replace("apt-get", &format!("{sudo}apt-get"))));
    run_apt(&packages).await?;
    match missing().first() {
        None => Ok(()),
        Some(program) => Err(Error::Missing { program, hint: "the installed packages do not contain it".to_owned() }),
    }
}

/// The directory that has both postgres and initdb, of the highest version.
pub(crate) fn postgres() -> Result<PathBuf, Error> {
    find(search_path(), &["postgres", "initdb"])
        .ok_or_else(|| Error::Missing { program: "postgresql", hint: advice("apt-get install postgresql") })
}

/// The nats-server to run.
pub(crate) fn nats_server() -> Result<PathBuf, Error> {
    if let Some(named) = env::var_os(NATS_SERVER_VARIABLE).filter(|named| !named.is_empty()) {
        return Ok(named.into());
    }
    find(search_path(), &["nats-server"])
        .map(|dir| dir.join("nats-server"))
        .ok_or_else(|| Error::Missing { program: "nats-server", hint: advice("apt-get install nats-server") })
}

/// The packages of the missing programs.
fn missing() -> Vec<&'static str> {
    let mut packages = Vec::new();
    if nats_server().is_err() {
        packages.push("nats-server");
    }
    if postgres().is_err() {
        packages.push("postgresql");
    }
    packages
}

fn advice(command: &str) -> String {
    format!(
        "on Debian or Ubuntu run `{command}` as root, with Homebrew `brew install postgresql nats-server`; \
         or put the programs on the PATH"
    )
}

fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<PathBuf> = env::split_paths(&path).collect();
    let versioned = VERSIONED.into_iter().flat_map(|(parent, prefix)| versions(Path::new(parent), prefix));
    on_path.into_iter().chain(versioned).chain(USUAL.map(PathBuf::from))
}

/// The `bin` directories of `parent`'s `{prefix}{version}`, the highest version first.
fn versions(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut found: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, dir)| dir).collect()
}

/// The first directory that has all the programs.
fn find(mut dirs: impl Iterator<Item = PathBuf>, programs: &[&str]) -> Option<PathBuf> {
    dirs.find(|dir| programs.iter().all(|program| dir.join(program).is_file()))
}

fn lock_path() -> PathBuf {
    // One lock per user, because users cannot write to each other's files in a shared directory.
    env::temp_dir().join(format!("leadrelay-install-{}.lock", rustix::process::geteuid().as_raw()))
}

/// Locks the file, creating it if necessary. Cancel-safe: a blocking lock would keep the process alive after Ctrl-C.
async fn lock(path: &Path) -> Result<File, Error> {
    let during = || format!("locking {}", path.display());
    let file = File::options().create(true).append(true).open(path).during(during)?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => sleep(LOCK_INTERVAL).await,
            Err(TryLockError::Error(source)) => return Err(Error::Io { what: during(), source }),
        }
    }
}

async fn run_apt(packages: &[&str]) -> Result<(), Error> {
    // Debian runs policy-rc.d before a package starts its service; exit code 101 forbids it. An existing file is kept.
    const INSTALL: &str = r#"
        set -e
        policy=/usr/sbin/policy-rc.d
        if [ ! -e "$policy" ]; then
            trap 'rm -f "$policy"' EXIT
            trap 'exit 1' HUP INT TERM
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod 755 "$policy"
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get update
        apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
    "#;
    let mut command = if is_root() {
        Command::new("/bin/sh")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "/bin/sh"]);
        sudo
    };
    command.args(["-c", INSTALL, "sh"]).args(packages);
    run(command.stdin(Stdio::null()), "apt-get install").await.map(drop)
}

/// Runs a helper command and returns its output.
pub(crate) async fn run(command: &mut Command, what: &str) -> Result<String, Error> {
    let output = command.output().await.during(|| format!("running {what}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let output = format!("{printed}{}", String::from_utf8_lossy(&output.stderr)).trim().to_owned();
    Err(Error::Command { command: what.to_owned(), output })
}

async fn succeeds(command: &mut Command) -> bool {
    command.output().await.is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[test]
    fn waiting_for_another_installation_can_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let other = File::create(&path).unwrap();
        other.lock().unwrap();

        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let waiting = runtime.block_on(async { timeout(Duration::from_millis(20), lock(&path)).await });
        assert!(waiting.is_err());
        // Waits for blocking tasks, as the end of the process does.
        drop(runtime);

        drop(other);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        assert!(runtime.block_on(lock(&path)).is_ok());
    }
}
