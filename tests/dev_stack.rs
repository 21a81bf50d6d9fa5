//! `leadctl up`: the development stack on a data directory.

use std::{collections::HashMap, path::Path, process::Command, time::SystemTime};

use contract::process::ProcessSpec;
use serde_json::json;
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use test_support::{Receiver, Service, binary, eventually};

use crate::support::{Api, TEST_TIMEOUT, assert_exactly_once, by_update, call, process_id, update_each};

/// `leadctl up --demo` on a data directory.
fn up(data: &Path) -> Service {
    let mut command = Command::new(binary("leadctl"));
    command.args(["up", "--demo", "--data-dir"]).arg(data).env_remove("NATS_URL").env_remove("DATABASE_URL");
    Service::spawn("leadctl", command)
}

/// The variables in `stack.env`, which `up` writes once everything is ready.
async fn stack_env(data: &Path, started: SystemTime) -> HashMap<String, String> {
    let file = data.join("stack.env");
    eventually(TEST_TIMEOUT * 3, "stack.env is written", async || {
        let written = std::fs::metadata(&file).and_then(|meta| meta.modified()).map_err(|e| e.to_string())?;
        if written < started {
            return Err("it is from the run before".to_owned());
        }
        let text = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
        Ok(text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    })
    .await
}

/// Creates a project with 16 leads on a stack that `up` started, with a callback at the receiver's `/crm`.
async fn project_with_leads(env: &HashMap<String, String>, receiver: &Receiver) -> (Api, Vec<String>) {
    let nats = NatsConfig::at(&env["NATS_URL"]);
    let client = service_kit::nats::connect(&nats, "test", &Default::default()).await.expect("NATS");
    let api = Api::create(env["LEADRELAY_GATEWAY_URL"].clone(), &client, "load").await;
    let spec = json!({
        "projectId": api.project_id, "name": "sales", "states": [{"name": "new"}],
        "callbacks": [{"name": "crm", "url": receiver.url("/crm")}],
    });
    let spec: ProcessSpec = serde_json::from_value(spec).expect("a process");
    let applied = call(&client, &spec).await;
    let mut leads = Vec::new();
    for _ in 0..16 {
        leads.push(api.initiate(process_id(&applied), None).await);
    }
    (api, leads)
}

/// Waits until all processes that were started for this directory have ended.
async fn wait_until_no_process(data: &Path) {
    let ours = data.to_string_lossy().into_owned();
    eventually(TEST_TIMEOUT, "no process is left", async || {
        let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
        let commands = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok());
        let left: Vec<_> = commands.filter(|line| line.contains(&ours)).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_killed_up_resumes_on_its_data_directory_and_loses_nothing() {
    let data = tempfile::tempdir().expect("a directory");
    // The user that Postgres runs as must be able to enter it.
    std::fs::set_permissions(data.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
    let receiver = Receiver::start().await;
    let started = SystemTime::now();
    let mut leadctl = up(data.path());
    let env = stack_env(data.path(), started).await;
    leadctl.wait_for_log("Ctrl-C", TEST_TIMEOUT).await;
    let (api, leads) = project_with_leads(&env, &receiver).await;

    // `up` is killed under load and started again, while the load continues to send requests to the gateway's port.
    let load = tokio::spawn(update_each(api.clone(), leads, 200));
    receiver.wait_for_requests("/crm", 500, TEST_TIMEOUT * 2).await;
    leadctl.kill9().await;
    let started = SystemTime::now();
    let mut leadctl = up(data.path());
    let again = stack_env(data.path(), started).await;
    let accepted = load.await.expect("the load");

    for name in ["LEADRELAY_GATEWAY_URL", "LEADRELAY_API_KEY", "LEADRELAY_PROJECT_ID", "LEADRELAY_LEAD_ID"] {
        assert_eq!(env[name], again[name], "{name} was kept");
    }
    assert_eq!(accepted.len(), 16 * 200);
    eventually(TEST_TIMEOUT * 2, "all is delivered", async || {
        let delivered = by_update(&receiver.requests());
        let missing = accepted.iter().filter(|id| !delivered.contains_key(*id)).count();
        if missing == 0 { Ok(()) } else { Err(format!("{missing} of {}", accepted.len())) }
    })
    .await;
    let pool = PgPool::connect(&again["DATABASE_URL"]).await.expect("Postgres");
    assert_exactly_once(&pool, api.project_id, &accepted, &receiver.requests()).await;
    pool.close().await;

    // It would be killed, not stopped, if it took longer than the stop of its services may take.
    assert!(leadctl.terminate().await.success());
    wait_until_no_process(data.path()).await;
}
