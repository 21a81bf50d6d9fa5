//! `leadctl up`: the development stack on a data directory.

use std::{collections::HashMap, path::Path, process::Command, time::SystemTime};

use contract::process::ProcessSpec;
use serde_json::json;
use service_kit::config::NatsConfig;
use sqlx::PgPool;
use tempfile::TempDir;
use test_support::{Receiver, Service, binary, eventually};

use crate::support::{Api, TEST_TIMEOUT, assert_exactly_once, by_update, call, process_id, update_each};

/// An empty data directory.
fn data_dir() -> TempDir {
    let data = tempfile::tempdir().expect("a directory");
    // The user that Postgres runs as must be able to enter it.
    std::fs::set_permissions(data.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
    data
}

/// The command `leadctl up` on a data directory; `env` has variables of an earlier `stack.env`.
fn up(data: &Path, env: &HashMap<String, String>) -> Command {
    let mut command = Command::new(binary("leadctl"));
    command.args(["up", "--data-dir"]).arg(data);
    command.env_remove("NATS_URL").env_remove("DATABASE_URL").env_remove("LEADRELAY_STACK").envs(env);
    command
}

/// Starts `leadctl up --demo` on a data directory.
fn up_demo(data: &Path) -> Service {
    let mut command = up(data, &HashMap::new());
    command.arg("--demo");
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
    let data = data_dir();
    let receiver = Receiver::start().await;
    let started = SystemTime::now();
    let mut leadctl = up_demo(data.path());
    let env = stack_env(data.path(), started).await;
    leadctl.wait_for_log("Ctrl-C", TEST_TIMEOUT).await;
    assert!(!leadctl.log().contains("could not be shown"), "{}", leadctl.log());
    let (api, leads) = project_with_leads(&env, &receiver).await;

    // `up` is killed under load and started again, while the load continues to send requests to the gateway's port.
    let load = tokio::spawn(update_each(api.clone(), leads, 200));
    receiver.wait_for_requests("/crm", 500, TEST_TIMEOUT * 2).await;
    leadctl.kill9().await;
    let started = SystemTime::now();
    let mut leadctl = up_demo(data.path());
    let again = stack_env(data.path(), started).await;
    let accepted = load.await.expect("the load");
    assert!(!leadctl.log().contains("could not be shown"), "{}", leadctl.log());

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

#[tokio::test]
async fn a_stack_starts_again_in_a_shell_that_has_loaded_its_settings() {
    let data = data_dir();
    let started = SystemTime::now();
    let mut leadctl = Service::spawn("leadctl", up(data.path(), &HashMap::new()));
    let env = stack_env(data.path(), started).await;
    assert!(leadctl.terminate().await.success());

    let started = SystemTime::now();
    let mut leadctl = Service::spawn("leadctl", up(data.path(), &env));
    let again = stack_env(data.path(), started).await;

    assert_eq!(env["DATABASE_URL"], again["DATABASE_URL"]);
    assert!(leadctl.log().contains("NATS_URL and DATABASE_URL of stack.env: ignored"), "{}", leadctl.log());
    assert!(leadctl.terminate().await.success());

    // The servers of the variables have stopped, and another stack cannot start them.
    let other = data_dir();
    let mut leadctl = Service::spawn("leadctl", up(other.path(), &env));
    assert!(!leadctl.exited().await.success());
    assert!(leadctl.log().contains("run `unset NATS_URL DATABASE_URL`"), "{}", leadctl.log());
}

#[tokio::test]
async fn a_demo_that_cannot_be_shown_does_not_stop_the_stack() {
    let data = data_dir();
    // The receiver does not have the secrets of the callbacks, as after a rotation by the operator.
    std::fs::write(data.path().join("demo.json"), r#"{"signingSecrets":{}}"#).expect("demo.json");
    let started = SystemTime::now();
    let mut leadctl = up_demo(data.path());

    let env = stack_env(data.path(), started).await;

    assert!(env.contains_key("LEADRELAY_LEAD_ID"));
    leadctl.wait_for_log("Ctrl-C stops everything", TEST_TIMEOUT).await;
    let reason = "The demo could not be shown: the webhook to /crm is not signed with its callback's secret";
    assert!(leadctl.log().contains(reason), "{}", leadctl.log());
    assert!(leadctl.terminate().await.success());
}
