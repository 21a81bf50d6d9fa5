//! The machine, and the versions of the programs that were measured on it.

use std::{collections::BTreeMap, fs, process::Command, thread};

use dev_stack::{LocalNats, LocalPostgres};
use sqlx::{Connection, PgConnection};

/// Reads the machine's properties and the servers' versions; those that cannot be read are left out.
pub(crate) async fn environment(
    nats: &LocalNats,
    postgres: &LocalPostgres,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut connection = PgConnection::connect(&postgres.url()).await?;
    let postgres: String = sqlx::query_scalar("SHOW server_version").fetch_one(&mut connection).await?;
    connection.close().await?;
    let (major, minor, patch) = nats.version();
    let properties = [
        ("cpu", file_value("/proc/cpuinfo", "model name")),
        ("cores", thread::available_parallelism().ok().map(|cores| cores.to_string())),
        ("memory", file_value("/proc/meminfo", "MemTotal").and_then(|text| gib(&text))),
        ("kernel", fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned())),
        ("postgres", Some(postgres)),
        ("nats-server", Some(format!("{major}.{minor}.{patch}"))),
        ("rustc", output_of(Command::new("rustc").arg("--version"))),
        ("commit", output_of(Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]))),
    ];
    Ok(properties.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
}

fn file_value(file: &str, name: &str) -> Option<String> {
    find_value(&fs::read_to_string(file).ok()?, name)
}

/// The value of a line `name : value`.
fn find_value(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.trim(), value.trim()))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.to_owned())
}

/// `16384000 kB` as GiB.
fn gib(text: &str) -> Option<String> {
    let kib: f64 = text.split(' ').next()?.parse().ok()?;
    Some(format!("{:.1} GiB", kib / 1024.0 / 1024.0))
}

/// What a program prints; `None` if it is not installed or fails.
fn output_of(command: &mut Command) -> Option<String> {
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_proc_files_are_read() {
        assert_eq!(find_value("vendor_id\t: x\nmodel name\t: A: B\n", "model name").as_deref(), Some("A: B"));
        assert_eq!(find_value("model\t: 17\n", "model name"), None);
        assert_eq!(gib("24684544 kB").as_deref(), Some("23.5 GiB"));
    }
}
