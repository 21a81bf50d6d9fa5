//! What the figures were taken on: the machine, and the versions of what ran on it.

use std::{collections::BTreeMap, fs, process::Command, thread};

use dev_stack::{LocalNats, LocalPostgres};
use sqlx::{Connection, PgConnection};

/// Looks at the machine, and asks the servers.
pub(crate) async fn environment(
    nats: &LocalNats,
    postgres: &LocalPostgres,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut connection = PgConnection::connect(&postgres.url()).await?;
    let postgres: String = sqlx::query_scalar("SHOW server_version").fetch_one(&mut connection).await?;
    connection.close().await?;
    let (major, minor, patch) = nats.version();
    let known = [
        ("cpu", field("/proc/cpuinfo", "model name")),
        ("cores", thread::available_parallelism().ok().map(|cores| cores.to_string())),
        ("memory", field("/proc/meminfo", "MemTotal").and_then(|text| gib(&text))),
        ("kernel", fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned())),
        ("postgres", Some(postgres)),
        ("nats-server", Some(format!("{major}.{minor}.{patch}"))),
        ("rustc", said(Command::new("rustc").arg("--version"))),
        ("commit", said(Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]))),
    ];
    let known = known.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Ok(known.collect())
}

/// The value of a line `name : value` in one of the kernel's files.
fn field(file: &str, name: &str) -> Option<String> {
    value(&fs::read_to_string(file).ok()?, name)
}

fn value(text: &str, name: &str) -> Option<String> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .map(|(key, value)| (key.trim(), value.trim()))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.to_owned())
}

/// `16384000 kB` as GiB.
fn gib(text: &str) -> Option<String> {
    let kib: f64 = text.split(' ').next()?.parse().ok()?;
    Some(format!("{:.1} GiB", kib / 1024.0 / 1024.0))
}

/// What a program prints; nothing where it is not there, or fails.
fn said(command: &mut Command) -> Option<String> {
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_understood() {
        assert_eq!(value("vendor_id\t: x\nmodel name\t: A: B\n", "model name").as_deref(), Some("A: B"));
        assert_eq!(value("model\t: 17\n", "model name"), None);
        assert_eq!(gib("24684544 kB").as_deref(), Some("23.5 GiB"));
    }
}
