//! The user of a child process. Postgres refuses to run as root, so root runs it as another user.

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

/// The users that run Postgres for root, in order of preference.
const CANDIDATES: [&str; 2] = ["postgres", "nobody"];

/// A user and its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
}

impl User {
    /// The user for a Postgres on `data`: `None` for the caller; for root, the owner of existing data, or one of
    /// [`CANDIDATES`].
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

    /// Runs the command as this user, without the caller's groups.
    pub(crate) fn apply(self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
    }

    /// Whether this user can enter the directory. Checked by an attempt, because parent directories, groups and access
    /// lists matter.
    pub(crate) fn can_enter(self, dir: &Path) -> Result<bool, Error> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"cd "$1""#, "sh"]).arg(dir).current_dir("/");
        self.apply(&mut command);
        let output = command.output().during(|| format!("checking whether {} is reachable", dir.display()))?;
        Ok(output.status.success())
    }

    /// Changes the owner of a file or directory to this user.
    pub(crate) fn give(self, path: &Path) -> Result<(), Error> {
        chown(path, Some(self.uid), Some(self.gid)).during(|| format!("changing the owner of {}", path.display()))
    }
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
