//! Postgres under Patroni, which fails over without an operator. Needs the Debian packages `patroni` and `etcd-server`.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use reqwest::StatusCode;
use serde_json::{Value, json};
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use tempfile::TempDir;
use test_support::{LocalPostgres, Service, eventually, free_port, nats, postgres};

use super::{check, load, restart_services, wait_for_progress};
use crate::support::{Stack, TEST_TIMEOUT};

const PASSWORD: &str = "secret";

/// A server of Postgres with its Patroni.
struct Node {
    patroni: Service,
    data: PathBuf,
    port: u16,
    rest_port: u16,
}

impl Node {
    /// `like` is a server that determines the Postgres installation and the user to run as.
    fn start(name: &str, dir: &Path, etcd_port: u16, like: &LocalPostgres) -> Self {
        let (port, rest_port) = (free_port(), free_port());
        let data = dir.join(name);
        let programs = like.program("postgres").parent().expect("a directory").to_owned();
        let account = |name: &str| json!({"username": name, "password": PASSWORD});
        let local = |port: u16| format!("127.0.0.1:{port}");
        let access = ["all", "replication"].map(|what| format!("host {what} all 127.0.0.1/32 scram-sha-256"));
        // The configuration is JSON, which is valid YAML. The times are the shortest that Patroni accepts.
        let config = json!({
            "scope": "leadrelay",
            "name": name,
            "restapi": {"listen": local(rest_port), "connect_address": local(rest_port)},
            "etcd3": {"host": local(etcd_port)},
            "bootstrap": {
                "dcs": {
                    "ttl": 20, "loop_wait": 1, "retry_timeout": 3, "synchronous_mode": true,
                    "postgresql": {"use_pg_rewind": true, "use_slots": true, "parameters": {"wal_log_hints": "on"}},
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "no-sync"],
            },
            "postgresql": {
                "listen": local(port), "connect_address": local(port), "data_dir": data, "bin_dir": programs,
                "pgpass": dir.join(format!("{name}.pgpass")), "pg_hba": access,
                "authentication": {
                    "superuser": account("leadrelay"), "replication": account("replicator"),
                    "rewind": account("rewinder"),
                },
                "parameters": {"unix_socket_directories": "", "shared_buffers": "32MB"},
            },
        });
        let file = dir.join(format!("{name}.yml"));
        fs::write(&file, config.to_string()).expect("a file");
        let mut command = as_owner_of(like.dir());
        command.args(["patroni".as_ref(), file.as_os_str()]).current_dir(dir);
        Self { patroni: Service::spawn("patroni", command), data, port, rest_port }
    }

    fn url(&self) -> String {
        format!("postgres://leadrelay:{PASSWORD}@127.0.0.1:{}/postgres", self.port)
    }

    /// Waits until Patroni reports that the server has this role: `primary` or `sync`.
    async fn wait_for_role(&self, role: &str) {
        eventually(TEST_TIMEOUT * 2, role, async || {
            let answer = reqwest::get(format!("http://127.0.0.1:{}/{role}", self.rest_port)).await;
            let answer = answer.map_err(|e| e.to_string())?;
            let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
            if status == StatusCode::OK { Ok(()) } else { Err(format!("{status} {text}\n{}", self.patroni.log())) }
        })
        .await;
    }

    /// Kills Patroni and Postgres, as if the host had failed.
    async fn kill9(&mut self) {
        self.patroni.kill9().await;
        self.kill_postgres();
    }

    /// All processes of Postgres end with the postmaster.
    fn kill_postgres(&self) {
        let Ok(file) = fs::read_to_string(self.data.join("postmaster.pid")) else { return };
        let pid = file.lines().next().expect("a pid");
        Command::new("kill").args(["-9", pid]).status().expect("kill");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Postgres keeps running when its Patroni ends.
        self.patroni.freeze();
        self.kill_postgres();
    }
}

/// A command that runs its arguments as the owner of a directory.
fn as_owner_of(dir: &Path) -> Command {
    let owner = fs::metadata(dir).expect("a directory");
    // Postgres does not run as root, and only root may change the user.
    if fs::metadata("/proc/self").expect("/proc").uid() == owner.uid() {
        return Command::new("env");
    }
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={}", owner.uid())).arg(format!("--regid={}", owner.gid())).arg("--clear-groups");
    command
}

/// Two servers, of which one is the primary and the other its synchronous standby.
struct Cluster {
    nodes: [Node; 2],
    _etcd: Service,
    _dir: TempDir,
}

impl Cluster {
    async fn start(like: &LocalPostgres) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (client, peer) = (free_port(), free_port());
        let (client_url, peer_url) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let mut etcd = Command::new("etcd");
        etcd.arg("--data-dir").arg(dir.path().join("etcd")).args(["--unsafe-no-fsync", "--name", "etcd"]);
        etcd.args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url]);
        etcd.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
        etcd.args(["--initial-cluster", &format!("etcd={peer_url}")]);
        let mut etcd = Service::spawn("etcd", etcd);
        etcd.wait_for_http(&format!("{client_url}/health"), TEST_TIMEOUT).await;

        let owner = fs::metadata(like.dir()).expect("a directory");
        let home = dir.path().join("nodes");
        fs::create_dir(&home).expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).expect("permissions");
        chown(&home, Some(owner.uid()), Some(owner.gid())).expect("an owner");
        let first = Node::start("node0", &home, client, like);
        first.wait_for_role("primary").await;
        let second = Node::start("node1", &home, client, like);
        second.wait_for_role("sync").await;
        Self { nodes: [first, second], _etcd: etcd, _dir: dir }
    }

    /// The URL of both servers, of which clients use the primary.
    fn url(&self) -> String {
        let [first, second] = &self.nodes;
        let servers = format!("127.0.0.1:{},127.0.0.1:{}", first.port, second.port);
        first.url().replace(&format!("127.0.0.1:{}", first.port), &servers) + "?target_session_attrs=read-write"
    }
}

#[tokio::test]
#[ignore = "needs patroni and etcd-server: just patroni"]
async fn patroni_fails_over_and_back_automatically() {
    let (nats, own) = tokio::join!(nats(), postgres());
    let mut cluster = Cluster::start(&own).await;
    let database = vec![("DATABASE_URL".to_owned(), cluster.url())];
    let operator = NatsConfig::at(nats.url());
    // The Postgres server that the stack started itself is not used.
    let mut stack = Stack::start_on(nats, own, &operator, |_| database.clone()).await;
    let load = load(&stack).await;

    for lost in 0..2 {
        let killed = Instant::now();
        cluster.nodes[lost].kill9().await;
        cluster.nodes[1 - lost].wait_for_role("primary").await;
        let promoted = killed.elapsed();
        wait_for_progress(&stack, &load).await;
        println!(
            "promoted {promoted:.1?} after the kill, applied and delivered again {:.1?} after it",
            killed.elapsed()
        );

        cluster.nodes[lost].patroni.restart().await;
        cluster.nodes[lost].wait_for_role("sync").await;
        restart_services(&mut stack, &load).await;
        wait_for_progress(&stack, &load).await;
    }

    let report: Value = stack.leadctl(&["doctor", "--json"]).await.json();
    let checks = report["checks"].as_array().expect("checks");
    let replication = checks.iter().find(|check| check["check"] == "replication").expect("a check");
    assert_eq!(replication["state"], "ok", "{replication}");
    stack.pool = PgPool::connect(&cluster.nodes[0].url()).await.expect("a Postgres client");
    check(&mut stack, load, "Patroni, primary killed twice").await;
}
