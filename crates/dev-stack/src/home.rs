//! The directory a server lives in: its place, its owner, and the small files kept in it.

use crate::{
    Say,
    error::{During, Error},
    user::User,
};
use std::{
    fs::{self, File, Permissions, TryLockError},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Where root's Postgres lives when its user cannot reach the directory asked for. Survives a reboot.
const REACHABLE: &str = "/var/tmp";

/// A directory of the caller's alone, locked for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    user: Option<User>,
    /// Set for a throw-away.
    temporary: Option<TempDir>,
    /// Held, not read: the system lets go of it when the owner ends, however it ends.
    _lock: File,
}

impl Home {
    /// Opens `dir`, made if need be; `None` is a fresh throw-away. `user` is who must be able to live there.
    ///
    /// A directory that `user` cannot reach is replaced by a symbolic link to one that it can.
    ///
    /// # Errors
    /// [`Error::InUse`] when another process holds it; [`Error::User`] when `user` cannot reach it and it is not empty.
    pub(crate) fn open(dir: Option<&Path>, user: Option<User>, say: Say<'_>) -> Result<Self, Error> {
        let (path, temporary) = match dir {
            Some(dir) => (settle(dir, user, say)?, None),
            None => {
                let temporary = fresh(user)?;
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

    /// What a watcher shall remove: the directory of a throw-away.
    pub(crate) fn litter(&self) -> Option<&Path> {
        self.temporary.as_ref().map(TempDir::path)
    }

    /// Leaves the removal of a throw-away to the watcher of the server that still runs in it.
    pub(crate) fn leave_to_watcher(&mut self) {
        if let Some(temporary) = &mut self.temporary {
            temporary.disable_cleanup(true);
        }
    }

    /// The secret kept in the file `name`, made up on first use; readable by nobody but the server's user.
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

    /// Writes the file `name` as a whole or not at all, for nobody but the server's user.
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

    /// The port of last time.
    pub(crate) fn last_port(&self) -> Option<u16> {
        fs::read_to_string(self.join("port")).ok()?.trim().parse().ok()
    }

    pub(crate) fn keep_port(&self, port: u16) -> Result<(), Error> {
        self.write_private("port", &port.to_string())
    }
}

fn settle(dir: &Path, user: Option<User>, say: Say<'_>) -> Result<PathBuf, Error> {
    if dir.is_symlink() && !dir.exists() {
        let what = format!(
            "{} points to a directory that is gone, and its data with it; remove it to start anew",
            dir.display()
        );
        return Err(Error::Io { what, source: io::ErrorKind::NotFound.into() });
    }
    fs::create_dir_all(dir).during(|| format!("creating {}", dir.display()))?;
    own(dir, user)?;
    let Some(user) = user else { return Ok(dir.to_owned()) };
    if user.can_enter(dir)? {
        return Ok(dir.to_owned());
    }
    // Only an empty directory can be removed, so nothing is lost here.
    if fs::remove_dir(dir).is_err() {
        return Err(Error::User(format!(
            "Postgres does not run as root, and user {} cannot reach {}: choose another directory",
            user.uid,
            dir.display()
        )));
    }
    let place = tempfile::Builder::new().prefix("leadrelay-").tempdir_in(REACHABLE);
    let place = place.during(|| format!("creating a directory in {REACHABLE}"))?.keep();
    own(&place, Some(user))?;
    symlink(&place, dir).during(|| format!("linking {} to {}", dir.display(), place.display()))?;
    say(&format!(
        "Postgres does not run as root, and its user cannot reach {}: its data is in {}",
        dir.display(),
        place.display()
    ));
    Ok(place)
}

fn fresh(user: Option<User>) -> Result<TempDir, Error> {
    for parent in [std::env::temp_dir(), REACHABLE.into()] {
        let dir = tempfile::Builder::new().prefix("leadrelay-").tempdir_in(&parent);
        let dir = dir.during(|| format!("creating a directory in {}", parent.display()))?;
        own(dir.path(), user)?;
        if user.is_none_or(|user| user.can_enter(dir.path()).unwrap_or(false)) {
            return Ok(dir);
        }
    }
    Err(Error::User(format!("Postgres does not run as root, and its user cannot reach {REACHABLE}")))
}

fn own(dir: &Path, user: Option<User>) -> Result<(), Error> {
    if let Some(user) = user {
        user.give(dir)?;
    }
    fs::set_permissions(dir, Permissions::from_mode(0o700)).during(|| format!("closing {} to others", dir.display()))
}
