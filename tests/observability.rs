//! What an operator sees: a real Prometheus scrapes the services, and everything that the alerts and the dashboard ask for is
//! there and says what happened.

use std::{collections::BTreeSet, path::Path, process::Command};

use serde_json::{Value, json};
use test_support::{Reply, Service, eventually, free_port, http_client};

use crate::stack::{SOON, Stack};

const OBSERVABILITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/observability");
const OPERATIONS: &str = include_str!("../docs/operations/runbooks.md");
const RULES: &str = include_str!("../deploy/observability/rules.yaml");
const RULES_TEST: &str = include_str!("../deploy/observability/rules-test.yaml");

/// A Prometheus that scrapes every second, with the alerts.
struct Prometheus {
    _process: Service,
    url: String,
    http: reqwest::Client,
    _data: tempfile::TempDir,
}

impl Prometheus {
    /// None where it cannot be installed.
    async fn start(targets: &[&str]) -> Option<Self> {
        let installed = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.ci/prometheus")).output();
        let directory = match installed {
            Ok(output) if output.status.success() => String::from_utf8(output.stdout).expect("a path"),
            other => {
                eprintln!("NOT TESTED, for there is no Prometheus: {other:?}");
                return None;
            }
        };
        let data = tempfile::tempdir().expect("a directory");
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [format!("{OBSERVABILITY}/rules.yaml")],
            "scrape_configs": [{"job_name": "leadrelay", "static_configs": [{"targets": targets}]}],
        });
        let file = data.path().join("prometheus.json");
        std::fs::write(&file, config.to_string()).expect("its configuration");
        let listen = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(Path::new(directory.trim()).join("prometheus"));
        command.arg("--config.file").arg(file).arg("--storage.tsdb.path").arg(data.path().join("data"));
        command.arg("--web.listen-address").arg(&listen);
        let mut process = Service::spawn("prometheus", command);
        process.wait_for_http(&format!("http://{listen}/-/ready"), SOON).await;
        Some(Self { _process: process, url: format!("http://{listen}"), http: http_client(), _data: data })
    }

    async fn ask(&self, path: &str) -> Result<Value, String> {
        let answer = self.http.get(format!("{}{path}", self.url)).send().await.map_err(|e| e.to_string())?;
        let body: Value = serde_json::from_str(&answer.text().await.map_err(|e| e.to_string())?).expect("JSON");
        if body["status"] == "success" { Ok(body["data"].clone()) } else { Err(body.to_string()) }
    }

    /// The series of an expression.
    async fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let escaped: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let data = self.ask(&format!("/api/v1/query?query={escaped}")).await?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until an expression has this one value.
    async fn wait_for(&self, expression: &str, expected: &str) {
        eventually(SOON, expression, async || {
            let series = self.query(expression).await?;
            match series.as_slice() {
                [one] if one["value"][1] == expected => Ok(()),
                other => Err(format!("{other:?} instead of {expected}")),
            }
        })
        .await;
    }

    /// The names of the alerts that fire.
    async fn firing(&self) -> BTreeSet<String> {
        let data = self.ask("/api/v1/alerts").await.expect("alerts");
        let alerts = data["alerts"].as_array().cloned().unwrap_or_default();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        firing.map(|alert| alert["labels"]["alertname"].as_str().expect("a name").to_owned()).collect()
    }
}

/// The metrics of an expression, each with what selects among its series.
fn selectors(expression: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = expression.match_indices("leadrelay_").map(|(at, _)| at);
    let selectors = starts.map(|at| {
        let rest = &expression[at..];
        let name = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let braces = rest[name..].strip_prefix('{').map_or(0, |inside| inside.find('}').expect("a brace") + 2);
        &rest[..name + braces]
    });
    selectors.collect()
}

/// The labels that an expression keeps apart.
fn labels(expression: &str) -> Vec<&str> {
    let lists = expression.split("by (").skip(1).map(|rest| rest.split(')').next().expect("a list"));
    lists.flat_map(|list| list.split(',')).map(str::trim).collect()
}

/// What the dashboard asks.
fn dashboard() -> Vec<String> {
    let text = std::fs::read_to_string(format!("{OBSERVABILITY}/dashboard.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().expect("an expression").replace("$__rate_interval", "5s")).collect()
}

#[test]
fn every_alert_has_its_section_and_its_test() {
    let alerts: Vec<_> = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in alerts {
        let (_, section) = OPERATIONS.split_once(&format!("\n### {alert}\n")).unwrap_or_else(|| panic!("{alert}"));
        let section = section.split("\n#").next().unwrap_or_default();
        for part in ["**Means:**", "**Look at:**", "**Do:**"] {
            assert!(section.contains(part), "{alert} lacks {part}");
        }
        assert!(RULES.contains(&format!("runbook: docs/operations/runbooks.md#{}\n", alert.to_lowercase())), "{alert}");
        assert!(RULES_TEST.contains(&format!("alertname: {alert}\n        exp_alerts")), "{alert} is not tested");
    }
}

#[tokio::test]
async fn what_alerts_and_dashboard_ask_for_is_there_and_says_what_happened() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1h")]).await;
    let ports = [&stack.gateway_ready, &stack.lead_state_ready, &stack.notifier_ready];
    let targets = ports.map(|url| url.trim_start_matches("http://").trim_end_matches("/readyz"));
    let Some(prometheus) = Prometheus::start(&targets).await else { return };
    // Counters have grown only if they were seen before.
    prometheus.wait_for("count(up == 1)", "3").await;
    let quiet = prometheus.firing().await;
    assert!(quiet.is_empty(), "{quiet:?}");

    stack.receiver.on("/gone", [Reply::status(410)]);
    stack.receiver.on("/down", std::iter::repeat_n(Reply::status(500), 10));
    let callback = |name: &str| json!({"name": name, "url": stack.receiver.url(&format!("/{name}"))});
    let applied = stack.process(json!([callback("crm"), callback("gone"), callback("down")])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let update = stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    assert_eq!(stack.api.outcome(&update).await["status"], "succeeded");
    let update = stack.api.update(json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    assert_eq!(stack.api.outcome(&update).await["status"], "failed");
    assert_eq!(stack.api.get("/api/v1/nowhere").await.0, 404);
    let subject = format!("leads.cmd.{}.update", stack.api.project_id);
    stack.publish(subject, "{").await;
    let call = json!({"leadId": lead_id, "callId": "c-1"}).to_string();
    stack.publish(format!("leads.cmd.{}.call.started", stack.api.project_id), call).await;
    let settled = "SELECT count(*) FROM webhooks.deliveries WHERE attempts > 0 OR status = 'exhausted'";
    stack.wait_for_count(settled, 6, SOON).await;

    for (expression, expected) in [
        (r#"leadrelay_gateway_requests_total{route="/api/v1/leads/update",status="2xx"}"#, "2"),
        (r#"leadrelay_gateway_requests_total{route="none",status="4xx"}"#, "1"),
        (r#"leadrelay_gateway_request_duration_seconds_count{route="/api/v1/leads/update"}"#, "2"),
        ("leadrelay_gateway_publish_duration_seconds_count", "2"),
        ("leadrelay_gateway_requests_in_flight", "0"),
        ("leadrelay_lead_state_leader", "1"),
        (r#"leadrelay_lead_state_updates_total{outcome="succeeded"}"#, "1"),
        (r#"leadrelay_lead_state_updates_total{outcome="failed"}"#, "1"),
        (r#"leadrelay_lead_state_dead_letters_total{reason="invalid_json"}"#, "1"),
        ("sum(leadrelay_lead_state_batch_messages_sum)", "4"),
        ("leadrelay_lead_state_active_calls", "1"),
        ("leadrelay_lead_state_log_lag_messages", "0"),
        (r#"leadrelay_webhook_notifier_attempts_total{result="2xx"}"#, "2"),
        (r#"leadrelay_webhook_notifier_attempt_duration_seconds_count{result="5xx"}"#, "2"),
        (r#"leadrelay_webhook_notifier_deliveries_total{outcome="delivered"}"#, "2"),
        ("leadrelay_webhook_notifier_disabled_callbacks", "1"),
        ("leadrelay_webhook_notifier_pending_deliveries", "2"),
        ("count(leadrelay_webhook_notifier_oldest_pending_age_seconds > 0)", "1"),
        ("leadrelay_webhook_notifier_events_lag_messages", "0"),
    ] {
        prometheus.wait_for(expression, expected).await;
    }

    // Every rule is evaluated, and those fire whose reason is there.
    let expected = ["LeadrelayCallbacksDisabled", "LeadrelayDeadLetters", "LeadrelayDeliveriesExhausted"];
    eventually(SOON, "the alerts fire", async || {
        let firing = prometheus.firing().await;
        if firing.iter().eq(expected) { Ok(()) } else { Err(format!("{firing:?}")) }
    })
    .await;
    let groups = prometheus.ask("/api/v1/rules").await.expect("rules");
    let rules = groups["groups"][0]["rules"].as_array().expect("rules").clone();
    let mut expressions = dashboard();
    for rule in &rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        expressions.push(rule["query"].as_str().expect("an expression").to_owned());
    }
    assert!(expressions.len() > 40, "{}", expressions.len());
    for expression in expressions {
        prometheus.query(&expression).await.unwrap_or_else(|e| panic!("{expression}: {e}"));
        let selectors = selectors(&expression);
        assert!(!selectors.is_empty(), "{expression}");
        for selector in selectors {
            assert!(!prometheus.query(selector).await.expect("series").is_empty(), "nothing has {selector}");
            let metric = selector.split('{').next().expect("a name");
            for label in labels(&expression) {
                let labelled = format!(r#"{metric}{{{label}!=""}}"#);
                assert!(!prometheus.query(&labelled).await.expect("series").is_empty(), "nothing has {labelled}");
            }
        }
    }

    // No label that grows with tenants.
    let known = [
        "__name__", "code", "instance", "job", "le", "outcome", "reason", "result", "route", "status", "stream",
        "version",
    ];
    for series in prometheus.query(r#"{__name__=~"leadrelay_.*"}"#).await.expect("series") {
        let labels = series["metric"].as_object().expect("labels");
        assert!(labels.keys().all(|label| known.contains(&label.as_str())), "{series}");
    }
}
