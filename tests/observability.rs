//! Metrics: a real Prometheus scrapes the services, and every series that the alerts and the dashboard use exists and
//! has the right value.

use std::{collections::BTreeSet, path::Path, process::Command};

use serde_json::{Value, json};
use test_support::{Reply, Service, eventually, free_port, http_client};

use crate::support::{Stack, TEST_TIMEOUT};

const OBSERVABILITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/observability");
const RUNBOOKS: &str = include_str!("../docs/operations/runbooks.md");
const RULES: &str = include_str!("../deploy/observability/rules.yaml");
const RULES_TEST: &str = include_str!("../deploy/observability/rules-test.yaml");

/// The groups of alerts on metrics of other programs.
const GROUPS_OF_OTHERS: [&str; 3] = ["nats", "postgres", "kubernetes"];

/// A Prometheus that scrapes every second, with the alerts.
struct Prometheus {
    _process: Service,
    url: String,
    http: reqwest::Client,
    _data: tempfile::TempDir,
}

impl Prometheus {
    /// Returns `None` if Prometheus cannot be installed.
    async fn start(targets: &[&str]) -> Option<Self> {
        let installed = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.ci/prometheus")).output();
        let directory = match installed {
            Ok(output) if output.status.success() => String::from_utf8(output.stdout).expect("a path"),
            other => {
                eprintln!("NOT TESTED: there is no Prometheus: {other:?}");
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
        process.wait_for_http(&format!("http://{listen}/-/ready"), TEST_TIMEOUT).await;
        Some(Self { _process: process, url: format!("http://{listen}"), http: http_client(), _data: data })
    }

    async fn get(&self, path: &str) -> Result<Value, String> {
        let answer = self.http.get(format!("{}{path}", self.url)).send().await.map_err(|e| e.to_string())?;
        let body: Value = serde_json::from_str(&answer.text().await.map_err(|e| e.to_string())?).expect("JSON");
        if body["status"] == "success" { Ok(body["data"].clone()) } else { Err(body.to_string()) }
    }

    /// The series of an expression.
    async fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let escaped: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let data = self.get(&format!("/api/v1/query?query={escaped}")).await?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until an expression has this one value.
    async fn wait_for(&self, expression: &str, expected: &str) {
        eventually(TEST_TIMEOUT, expression, async || {
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
        let data = self.get("/api/v1/alerts").await.expect("alerts");
        let alerts = data["alerts"].as_array().cloned().unwrap_or_default();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        firing.map(|alert| alert["labels"]["alertname"].as_str().expect("a name").to_owned()).collect()
    }
}

/// The metrics in an expression, each with its label selector.
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

/// The labels that an expression groups by.
fn labels(expression: &str) -> Vec<&str> {
    let lists = expression.split("by (").skip(1).map(|rest| rest.split(')').next().expect("a list"));
    lists.flat_map(|list| list.split(',')).map(str::trim).collect()
}

fn dashboard() -> Vec<String> {
    let text = std::fs::read_to_string(format!("{OBSERVABILITY}/dashboard.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().expect("an expression").replace("$__rate_interval", "5s")).collect()
}

#[test]
fn every_alert_has_a_runbook_and_a_test() {
    let alerts: Vec<_> = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in alerts {
        let (_, section) = RUNBOOKS.split_once(&format!("\n### {alert}\n")).unwrap_or_else(|| panic!("{alert}"));
        let section = section.split("\n#").next().unwrap_or_default();
        for part in ["**Means:**", "**Look at:**", "**Do:**"] {
            assert!(section.contains(part), "{alert} lacks {part}");
        }
        assert!(RULES.contains(&format!("runbook: docs/operations/runbooks.md#{}\n", alert.to_lowercase())), "{alert}");
        assert!(RULES_TEST.contains(&format!("alertname: {alert}\n        exp_alerts")), "{alert} is not tested");
    }
}

/// Causes everything that the metrics measure: updates that succeed and fail, webhooks that fail, a dead letter, a
/// call.
async fn make_everything_happen(stack: &Stack) {
    stack.receiver.on("/gone", [Reply::status(410)]);
    stack.receiver.on("/down", std::iter::repeat_n(Reply::status(500), 10));
    let lead_id = stack.lead(&["crm", "gone", "down"]).await;
    let update = stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    assert_eq!(stack.api.outcome(&update).await["status"], "succeeded");
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_health", 1).await;
    let update = stack.api.update(json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    assert_eq!(stack.api.outcome(&update).await["status"], "failed");
    assert_eq!(stack.api.get("/api/v1/nowhere").await.0, 404);
    stack.publish(format!("leads.cmd.{}.update", stack.api.project_id), "{").await;
    stack.publish_call("started", &json!({"leadId": lead_id, "callId": "c-1"})).await;
    // The second delivery to /gone waits, because its callback is disabled.
    let settled = "SELECT count(*) FROM webhooks.deliveries WHERE attempts > 0 OR callback_id IN
                   (SELECT callback_id FROM webhooks.callback_health)";
    stack.wait_for_count(settled, 6).await;
}

/// Asserts that every rule is evaluated, and that every series and label exists that a rule or the dashboard uses.
async fn assert_expressions_have_series(prometheus: &Prometheus) {
    let groups = prometheus.get("/api/v1/rules").await.expect("rules");
    let mut expressions = dashboard();
    for group in groups["groups"].as_array().expect("groups") {
        for rule in group["rules"].as_array().expect("rules") {
            assert_eq!(rule["health"], "ok", "{rule}");
            if !GROUPS_OF_OTHERS.contains(&group["name"].as_str().expect("a name")) {
                expressions.push(rule["query"].as_str().expect("an expression").to_owned());
            }
        }
    }
    assert!(expressions.len() > 40, "{}", expressions.len());
    for expression in expressions {
        prometheus.query(&expression).await.unwrap_or_else(|e| panic!("{expression}: {e}"));
        let selectors = selectors(&expression);
        assert!(!selectors.is_empty(), "{expression}");
        for selector in selectors {
            assert!(!prometheus.query(selector).await.expect("series").is_empty(), "no series of {selector}");
            let metric = selector.split('{').next().expect("a name");
            for label in labels(&expression) {
                let labelled = format!(r#"{metric}{{{label}!=""}}"#);
                assert!(!prometheus.query(&labelled).await.expect("series").is_empty(), "no series of {labelled}");
            }
        }
    }
}

#[tokio::test]
async fn every_series_of_the_alerts_and_the_dashboard_exists_with_its_value() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1h")]).await;
    let ports = [&stack.gateway_ready, &stack.lead_state_ready, &stack.notifier_ready];
    let targets = ports.map(|url| url.trim_start_matches("http://").trim_end_matches("/readyz"));
    let Some(prometheus) = Prometheus::start(&targets).await else { return };
    // Prometheus detects an increase only if it scraped the counter before.
    prometheus.wait_for("count(up == 1)", "3").await;
    let quiet = prometheus.firing().await;
    assert!(quiet.is_empty(), "{quiet:?}");

    make_everything_happen(&stack).await;

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
        ("leadrelay_webhook_notifier_held_deliveries", "1"),
        ("leadrelay_webhook_notifier_paused_callbacks", "0"),
        ("count(leadrelay_webhook_notifier_oldest_pending_age_seconds > 0)", "1"),
        ("leadrelay_webhook_notifier_events_lag_messages", "0"),
    ] {
        prometheus.wait_for(expression, expected).await;
    }

    // Every rule is evaluated, and the right ones fire.
    let expected = ["LeadrelayCallbacksDisabled", "LeadrelayDeadLetters", "LeadrelayDeliveriesExhausted"];
    eventually(TEST_TIMEOUT, "the alerts fire", async || {
        let firing = prometheus.firing().await;
        if firing.iter().eq(expected) { Ok(()) } else { Err(format!("{firing:?}")) }
    })
    .await;
    assert_expressions_have_series(&prometheus).await;
    // No label has a value per tenant.
    let known = [
        "__name__", "code", "instance", "job", "le", "outcome", "reason", "result", "route", "status", "stream",
        "version",
    ];
    for series in prometheus.query(r#"{__name__=~"leadrelay_.*"}"#).await.expect("series") {
        let labels = series["metric"].as_object().expect("labels");
        assert!(labels.keys().all(|label| known.contains(&label.as_str())), "{series}");
    }
}
