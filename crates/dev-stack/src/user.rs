//! The user a child runs as. Postgres refuses to run as root, so root hands it to somebody else.

use crate::error::{During, Error};
use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

/// Who, in order of preference, runs Postgres for root.
const CANDIDATES: [&str; 2] = ["postgres", "nobody"];

/// A user and its group, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
}

impl User {
    /// Who shall run Postgres on `data`: `None` for the caller itself; for root, whoever owns the data already, else
    /// one of [`CANDIDATES`].
    pub(crate) fn for_postgres(data: &Path) -> Result<Option<Self>, Error> {
        if !is_root() {
            return Ok(None);
        }
        if let Ok(metadata) = fs::metadata(data)
            && metadata.uid() != 0
        {
            return Ok(Some(Self { uid: metadata.uid(), gid: metadata.gid() }));
        }
        CANDIDATES.into_iter().find_map(Self::named).map(Some).ok_or_else(|| {
            Error::User(format!("Postgres does not run as root, and there is no user {}", CANDIDATES.join(" or ")))
        })
    }

    fn named(name: &str) -> Option<Self> {
        let number = |what| {
            let output = Command::new("id").args([what, name]).output().ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        Some(Self { uid: number("-u")?, gid: number("-g")? })
    }

    /// Makes the command run as this user, without any other group of the caller.
    pub(crate) fn apply(self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
    }

    /// Whether this user can enter the directory: tried, since ancestors, groups and access lists all have a say.
    pub(crate) fn can_enter(self, dir: &Path) -> Result<bool, Error> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"cd "$1""#, "sh"]).arg(dir).current_dir("/");
        self.apply(&mut command);
        let output = command.output().during(|| format!("looking whether {} is reachable", dir.display()))?;
        Ok(output.status.success())
    }

    /// Gives the file or directory to this user.
    pub(crate) fn give(self, path: &Path) -> Result<(), Error> {
        chown(path, Some(self.uid), Some(self.gid)).during(|| format!("giving {} to its user", path.display()))
    }
}

/// Whether the caller is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
