//! The data directory of `up`: its lock, and the small files in it.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The data directory, locked by this process for as long as this value lives.
pub(super) struct DataDir {
    path: PathBuf,
    /// The operating system releases the lock when the process ends, also after `kill -9`.
    _lock: File,
}

/// Size at which a log is rotated.
const LOG_BYTES: u64 = 32 << 20;

/// A log file that is rotated to `NAME.1` when it reaches its limit; the previous `NAME.1` is deleted.
pub(super) struct Log {
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

    fn rotate(&mut self) -> io::Result<()> {
        let mut older = self.path.clone().into_os_string();
        older.push(".1");
        match fs::rename(&self.path, older) {
            // The file was renamed before, and the new one could not be opened; or somebody removed the file.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        *self = Self::open(self.path.clone(), self.limit)?;
        Ok(())
    }
}

impl Write for Log {
    /// Writes a line. The rotation happens between lines.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.limit {
            // If the rotation fails, the open file gets the line, too, and the next line tries again.
            let _ = self.rotate();
        }
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The ports of the previous start, so that URLs stay the same.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Ports {
    pub(super) gateway: Option<u16>,
    pub(super) receiver: Option<u16>,
    #[serde(default)]
    pub(super) console: Option<u16>,
}

impl DataDir {
    /// Opens the directory, creating it if necessary. Other users may enter it: Postgres may run as one.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
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
            Err(TryLockError::WouldBlock) => {
                bail!("another `leadctl up` uses {}: stop it first, or choose another --data-dir", path.display())
            }
            Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("cannot lock {}", lock.display())),
        }
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file atomically, readable only by its owner.
    pub(super) fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let path = self.join(name);
        let write = || {
            // Temporary files have mode 0600 from the start.
            let mut file = tempfile::NamedTempFile::new_in(&self.path)?;
            file.write_all(content.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|e| e.error)
        };
        write().map(drop).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes a file, if it exists.
    pub(super) fn remove(&self, name: &str) -> anyhow::Result<()> {
        let path = self.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Reads a file; `None` if it does not exist.
    pub(super) fn read(&self, name: &str) -> anyhow::Result<Option<String>> {
        let path = self.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Reads a file that `write_json` wrote; `None` if it does not exist.
    pub(super) fn read_json<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<Option<T>> {
        let Some(text) = self.read(name)? else { return Ok(None) };
        serde_json::from_str(&text)
            .map(Some)
            .with_context(|| format!("{} is damaged; remove it and start again", self.join(name).display()))
    }

    pub(super) fn write_json<T: Serialize>(&self, name: &str, value: &T) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(value).with_context(|| format!("cannot write {name} as JSON"))?;
        self.write(name, &(text + "\n"))
    }

    /// Opens a log to append to.
    pub(super) fn log(&self, name: &str) -> anyhow::Result<Log> {
        let path = self.join(name);
        let shown = path.display().to_string();
        Log::open(path, LOG_BYTES).with_context(|| format!("cannot open the log {shown}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let owner = DataDir::open(&path).unwrap();
        assert!(DataDir::open(&path).err().unwrap().to_string().contains("another `leadctl up`"));
        drop(owner);
        assert!(DataDir::open(&path).is_ok());
    }

    #[test]
    fn a_log_is_rotated_at_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let open = || Log::open(path.clone(), 20).unwrap();
        open().write_all(b"earlier\n").unwrap();
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
    fn no_line_is_lost_when_a_rotation_fails() {
        let dir = tempfile::tempdir().unwrap();
        let (path, older) = (dir.path().join("a.log"), dir.path().join("a.log.1"));
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let mut log = Log::open(path.clone(), 8).unwrap();
        // A file cannot replace a directory.
        fs::create_dir(&older).unwrap();
        log.write_all(b"line 1\n").unwrap();
        log.write_all(b"line 2\n").unwrap();
        assert_eq!(read(&path), "line 1\nline 2\n");

        fs::remove_dir(&older).unwrap();
        log.write_all(b"line 3\n").unwrap();
        assert_eq!((read(&older), read(&path)), ("line 1\nline 2\n".into(), "line 3\n".into()));

        // As after a rename without a new file.
        fs::remove_file(&path).unwrap();
        log.write_all(b"line 4\n").unwrap();
        assert_eq!((read(&older), read(&path)), ("line 1\nline 2\n".into(), "line 4\n".into()));
    }

    #[test]
    fn files_are_private_and_replaced_atomically() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert!(data.read_json::<Ports>("ports.json").unwrap().is_none());
        for port in [1, 2] {
            data.write_json("ports.json", &Ports { gateway: Some(port), ..Ports::default() }).unwrap();
            assert_eq!(data.read_json::<Ports>("ports.json").unwrap().unwrap().gateway, Some(port));
        }
        assert_eq!(fs::metadata(data.join("ports.json")).unwrap().permissions().mode() & 0o777, 0o600);
        data.remove("ports.json").unwrap();
        data.remove("ports.json").unwrap();
    }
}
