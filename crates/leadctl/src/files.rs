//! The data directory of `up`: who owns it, and the small files in it.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The data directory, this process's alone for as long as this value lives.
pub(crate) struct DataDir {
    path: PathBuf,
    /// Held, not read: the system lets go of it when the process ends, however it ends.
    _lock: File,
}

/// How long a log gets before another is begun.
const LOG_BYTES: u64 = 32 << 20;

/// A log to append to. When it is long it makes room: it becomes `NAME.1` in place of the one before, and a new one begins.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    limit: u64,
}

impl Log {
    fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(&path)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes, limit })
    }

    fn begin_another(&mut self) -> io::Result<()> {
        let mut older = self.path.clone().into_os_string();
        older.push(".1");
        fs::rename(&self.path, older)?;
        *self = Self::open(self.path.clone(), self.limit)?;
        Ok(())
    }
}

impl Write for Log {
    /// Writes a line: one is never in two logs.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.limit {
            self.begin_another()?;
        }
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The ports of last time, so that URLs stay what they are.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Ports {
    pub(crate) gateway: Option<u16>,
    pub(crate) receiver: Option<u16>,
}

impl DataDir {
    /// Opens the directory, made if need be: for everybody to pass through, since Postgres may run as another user.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .with_context(|| format!("cannot create the data directory {}", path.display()))?;
        let path = path.canonicalize().with_context(|| format!("cannot open the data directory {}", path.display()))?;
        let lock = path.join("lock");
        let file = File::options().create(true).append(true).open(&lock);
        let file = file.with_context(|| format!("cannot open {}", lock.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path, _lock: file }),
            Err(TryLockError::WouldBlock) => bail!(
                "another `leadctl up` runs on {}: stop it first, or give this one a --data-dir of its own",
                path.display()
            ),
            Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("cannot lock {}", lock.display())),
        }
    }

    /// The path of a file in it.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file as a whole or not at all, for nobody else to read.
    pub(crate) fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let path = self.join(name);
        let write = || {
            // Temporary files are the owner's alone (0600) from the start.
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            file.write_all(content.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|e| e.error)
        };
        write().map(drop).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes a file; it need not be there.
    pub(crate) fn remove(&self, name: &str) -> anyhow::Result<()> {
        let path = self.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Reads a file; nothing when it is not there.
    pub(crate) fn read(&self, name: &str) -> anyhow::Result<Option<String>> {
        let path = self.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Reads a file that `write_json` wrote; nothing when it is not there.
    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<Option<T>> {
        let Some(text) = self.read(name)? else { return Ok(None) };
        serde_json::from_str(&text)
            .map(Some)
            .with_context(|| format!("{} is damaged; remove it to start it anew", self.join(name).display()))
    }

    /// Writes a value as JSON.
    pub(crate) fn write_json<T: Serialize>(&self, name: &str, value: &T) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(value).with_context(|| format!("cannot write {name} as JSON"))?;
        self.write(name, &(text + "\n"))
    }

    /// Opens a log to append to; it and the one before it have at most 64 MiB together.
    pub(crate) fn log(&self, name: &str) -> anyhow::Result<Log> {
        let path = self.join(name);
        let shown = path.display().to_string();
        Log::open(path, LOG_BYTES).with_context(|| format!("cannot open the log {shown}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let owner = DataDir::open(&path).unwrap();
        assert!(DataDir::open(&path).err().unwrap().to_string().contains("another `leadctl up`"));
        drop(owner);
        assert!(DataDir::open(&path).is_ok());
    }

    #[test]
    fn a_log_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let open = || Log::open(path.clone(), 20).unwrap();
        open().write_all(b"of before\n").unwrap();
        let mut log = open();
        for n in 1..=4 {
            log.write_all(format!("line {n}\n").as_bytes()).unwrap();
        }
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((read("a.log.1"), read("a.log")), ("line 2\nline 3\n".into(), "line 4\n".into()));
        log.write_all(b"a line that is longer than all of it\n").unwrap();
        assert_eq!(read("a.log.1"), "line 4\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn files_are_private_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert!(data.read_json::<Ports>("ports.json").unwrap().is_none());
        for port in [1, 2] {
            data.write_json("ports.json", &Ports { gateway: Some(port), receiver: None }).unwrap();
            assert_eq!(data.read_json::<Ports>("ports.json").unwrap().unwrap().gateway, Some(port));
        }
        assert_eq!(fs::metadata(data.join("ports.json")).unwrap().permissions().mode() & 0o777, 0o600);
        data.remove("ports.json").unwrap();
        data.remove("ports.json").unwrap();
    }
}
