//! The directory of a server: its location, its owner, and small files in it.

use crate::{
    Say,
    error::{During, Error},
    port,
    process::Process,
    user::User,
};
use std::{
    fs::{self, File, Permissions, TryLockError},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Where root's Postgres keeps its data if its user cannot reach the requested directory. Survives a reboot.
const REACHABLE: &str = "/var/tmp";

/// Ports to try if other processes take them first.
const PORT_ATTEMPTS: usize = 5;

/// A directory locked by this process for as long as this value lives.
#[derive(Debug)]
pub(crate) struct ServerDir {
    path: PathBuf,
    user: Option<User>,
    /// Set for a temporary directory.
    temporary: Option<TempDir>,
    /// The operating system releases the lock when the process ends, also after `kill -9`.
    _lock: File,
}

impl ServerDir {
    /// Opens `dir`, creating it if necessary; `None` creates a temporary directory. `user` must be able to enter it.
    ///
    /// A directory that `user` cannot reach is replaced by a symbolic link to one in [`REACHABLE`].
    ///
    /// # Errors
    /// [`Error::InUse`] when another process holds it; [`Error::User`] when `user` cannot reach it and it is not empty.
    pub(crate) fn open(dir: Option<&Path>, user: Option<User>, say: Say<'_>) -> Result<Self, Error> {
        let (path, temporary) = match dir {
            Some(dir) => (open_reachable(dir, user, say)?, None),
            None => {
                let temporary = create_temporary(user)?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let path = path.canonicalize().during(|| format!("opening {}", path.display()))?;
        let lock = path.join("lock");
        let file =
            File::options().create(true).append(true).open(&lock).during(|| format!("opening {}", lock.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path, user, temporary, _lock: file }),
            Err(TryLockError::WouldBlock) => Err(Error::InUse(path)),
            Err(TryLockError::Error(source)) => Err(Error::Io { what: format!("locking {}", lock.display()), source }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn user(&self) -> Option<User> {
        self.user
    }

    /// The temporary directory, which the watcher removes.
    pub(crate) fn cleanup_dir(&self) -> Option<&Path> {
        self.temporary.as_ref().map(TempDir::path)
    }

    /// Leaves the removal of a temporary directory to the watcher of the server that still runs in it.
    pub(crate) fn leave_cleanup_to_watcher(&mut self) {
        if let Some(temporary) = &mut self.temporary {
            temporary.disable_cleanup(true);
        }
    }

    /// The secret in the file `name`, generated on first use and readable only by the server's user.
    pub(crate) fn secret(&self, name: &str) -> Result<String, Error> {
        let path = self.join(name);
        match fs::read_to_string(&path) {
            Ok(secret) => return Ok(secret),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Io { what: format!("reading {}", path.display()), source }),
        }
        let secret = hex::encode(rand::random::<[u8; 16]>());
        self.write_private(name, &secret)?;
        Ok(secret)
    }

    /// Writes the file `name` atomically, readable only by the server's user.
    pub(crate) fn write_private(&self, name: &str, content: &str) -> Result<(), Error> {
        let path = self.join(name);
        let draft = self.join(&format!("{name}.new"));
        let write = || {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()
        };
        write().during(|| format!("writing {}", draft.display()))?;
        if let Some(user) = self.user {
            user.give(&draft)?;
        }
        fs::rename(&draft, &path).during(|| format!("writing {}", path.display()))
    }

    /// Launches the server on the preferred port, on that of its previous start, or on any free one. Tries other ports
    /// if processes take these first.
    pub(crate) async fn launch(
        &self,
        preferred: Option<u16>,
        launch: impl AsyncFn(u16) -> Result<Process, Error>,
    ) -> Result<(Process, u16), Error> {
        let last = || fs::read_to_string(self.join("port")).ok()?.trim().parse().ok();
        let mut wanted = preferred.into_iter().chain(last()).find(|port| port::is_free(*port));
        let mut attempt = 1;
        loop {
            let port = match wanted.take() {
                Some(port) => port,
                None => port::free().during(|| "looking for a free port".to_owned())?,
            };
            match launch(port).await {
                Ok(process) => {
                    self.write_private("port", &port.to_string())?;
                    return Ok((process, port));
                }
                Err(Error::Died { log, .. }) if port_was_taken(&log) && attempt < PORT_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

fn port_was_taken(log: &str) -> bool {
    log.to_lowercase().contains("address already in use")
}

fn open_reachable(dir: &Path, user: Option<User>, say: Say<'_>) -> Result<PathBuf, Error> {
    if dir.is_symlink() && !dir.exists() {
        let what = format!(
            "{} links to a directory that no longer exists; remove the link to start with an empty one",
            dir.display()
        );
        return Err(Error::Io { what, source: io::ErrorKind::NotFound.into() });
    }
    fs::create_dir_all(dir).during(|| format!("creating {}", dir.display()))?;
    make_private(dir, user)?;
    let Some(user) = user else { return Ok(dir.to_owned()) };
    if user.can_enter(dir)? {
        return Ok(dir.to_owned());
    }
    // Only an empty directory can be removed, so no data is lost.
    if fs::remove_dir(dir).is_err() {
        return Err(Error::User(format!(
            "Postgres does not run as root, and user {} cannot reach {}: choose another directory",
            user.uid,
            dir.display()
        )));
    }
    let place = tempfile::Builder::new().prefix("leadrelay-").tempdir_in(REACHABLE);
    let place = place.during(|| format!("creating a directory in {REACHABLE}"))?.keep();
    make_private(&place, Some(user))?;
    symlink(&place, dir).during(|| format!("linking {} to {}", dir.display(), place.display()))?;
    say(&format!(
        "Postgres does not run as root, and its user cannot reach {}: its data is in {}",
        dir.display(),
        place.display()
    ));
    Ok(place)
}

fn create_temporary(user: Option<User>) -> Result<TempDir, Error> {
    for parent in [std::env::temp_dir(), REACHABLE.into()] {
        let dir = tempfile::Builder::new().prefix("leadrelay-").tempdir_in(&parent);
        let dir = dir.during(|| format!("creating a directory in {}", parent.display()))?;
        make_private(dir.path(), user)?;
        if user.is_none_or(|user| user.can_enter(dir.path()).unwrap_or(false)) {
            return Ok(dir);
        }
    }
    Err(Error::User(format!("Postgres does not run as root, and its user cannot reach {REACHABLE}")))
}

fn make_private(dir: &Path, user: Option<User>) -> Result<(), Error> {
    if let Some(user) = user {
        user.give(dir)?;
    }
    fs::set_permissions(dir, Permissions::from_mode(0o700))
        .during(|| format!("restricting access to {}", dir.display()))
}
