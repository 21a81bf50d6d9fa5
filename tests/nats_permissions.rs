//! NATS with least privilege: with deploy/nats/accounts.conf every feature works, and NATS rejects all forbidden
//! subjects. See also `accounts`.

use std::{path::PathBuf, time::Duration};

use contract::{ObjectId, streams::LEAD_COMMANDS};
use futures::StreamExt;
use reqwest::Method;
use serde_json::json;
use service_kit::config::NatsConfig;
use test_support::{Authorization, LocalNats, NatsOptions, Service, eventually, nats_with, postgres};
use tokio::sync::mpsc;

use crate::support::{
    Api, LEDGER_ROWS, Stack, TEST_TIMEOUT, UPDATE, all_pages, assert_includes, assert_main_job, assert_ok,
    letter_number, process_id, secret, send, service, verify,
};

/// The project of the example producer.
pub(crate) const PROJECT: &str = "65e4b2d9f1a2000000000001";
pub(crate) const OTHER: &str = "65e4b2d9f1a2000000000002";
const USERS: [&str; 7] = ["gateway", "lead-state", "webhook-notifier", "console", "leadctl", "backup", "producer"];

pub(crate) fn password(user: &str) -> String {
    format!("password of {user}").replace(' ', "-")
}

/// A nats-server with the accounts of the deployment, and a user `observer` without restrictions in the account of the
/// services.
async fn nats(program: Option<PathBuf>) -> LocalNats {
    let config = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/nats/accounts.conf"));
    let observer = format!("users: [\n{{ user: observer, password: {} }}", password("observer"));
    let variable = |user: &str| format!("NATS_{}_PASSWORD", user.to_uppercase().replace('-', "_"));
    let authorization = Authorization {
        config: config.expect("accounts.conf").replacen("users: [", &observer, 1),
        environment: USERS.map(|user| (variable(user), password(user))).into(),
        user: "leadctl".into(),
        password: password("leadctl"),
    };
    nats_with(NatsOptions { authorization: Some(authorization), program, ..NatsOptions::throwaway() }).await
}

async fn stack() -> Stack {
    stack_on(None).await
}

pub(crate) async fn stack_on(program: Option<PathBuf>) -> Stack {
    let (nats, postgres) = tokio::join!(nats(program), postgres());
    let operator = NatsConfig::at(nats.url());
    let port = nats.port();
    // The passwords are in separate variables, not in the URLs, as in Kubernetes.
    Stack::start_on(nats, postgres, &operator, |user| {
        vec![
            ("NATS_URL".into(), format!("nats://{user}@127.0.0.1:{port}")),
            ("NATS_PASSWORD".into(), password(user)),
            ("RETRY_SCHEDULE".into(), "0s,100ms,100ms".into()),
        ]
    })
    .await
}

/// Connects as a user. Returns the client, and the errors that the server sends to it.
pub(crate) async fn client(nats: &LocalNats, user: &str) -> (async_nats::Client, mpsc::UnboundedReceiver<String>) {
    let (refused, refusals) = mpsc::unbounded_channel();
    let client = async_nats::ConnectOptions::with_user_and_password(user.to_owned(), password(user))
        .custom_inbox_prefix(contract::subject::inbox_prefix(user))
        .event_callback(move |event| {
            let refused = refused.clone();
            async move {
                if let async_nats::Event::ServerError(e) = event {
                    let _ = refused.send(e.to_string());
                }
            }
        })
        .connect(format!("nats://127.0.0.1:{}", nats.port()))
        .await;
    (client.expect(user), refusals)
}

/// Asserts that NATS refused nothing to any service.
pub(crate) fn assert_nothing_refused(stack: &Stack) {
    for service in [&stack.gateway, &stack.lead_state, &stack.notifier] {
        assert!(!service.log().contains("NATS refuses"), "{}", service.log());
    }
}

/// Creates the project that the example producer may publish to, with a process and a lead. Returns a client of the
/// project, the ids of the process and the lead, and the secret of the callback.
pub(crate) async fn producers_project(stack: &Stack) -> (Api, ObjectId, String, String) {
    let project_id: ObjectId = PROJECT.parse().expect("an id");
    sqlx::query("INSERT INTO lead_state.projects VALUES ($1, 'produced', now())")
        .bind(project_id.as_bytes())
        .execute(&stack.pool)
        .await
        .expect("a project");
    let api = Api::of_project(stack.api.url.clone(), &stack.client, project_id).await;
    let spec = json!({"projectId": project_id, "name": "p", "states": [{"name": "new"}, {"name": "lost"}],
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/retried")}]});
    let applied = stack.apply(spec).await;
    let lead_id = api.initiate(process_id(&applied), None).await;
    (api, process_id(&applied), lead_id, secret(&applied.process, "crm"))
}

#[tokio::test]
async fn the_main_job_is_permitted() {
    let stack = stack().await;

    assert_main_job(&stack).await;

    assert_nothing_refused(&stack);
}

#[tokio::test]
async fn a_voice_platform_may_report_calls() {
    let stack = stack().await;
    let process = process_id(&stack.process(json!([])).await);
    let lead = stack.api.initiate(process, None).await;
    let secret = "the-secret-of-the-platform";
    let source = json!({"name": "dialer", "platform": "vapi", "secrets": [secret]});
    let source = assert_ok(stack.api.post(&format!("/api/v1/processes/{process}/sources"), &source).await);
    let url = format!("{}{}", stack.api.url, source["data"]["ingestPath"].as_str().expect("a path"));
    let call = json!({"id": "c", "metadata": {"leadId": lead}});
    let report = json!({"message": {"type": "status-update", "status": "in-progress", "call": call}}).to_string();

    let answer = eventually(TEST_TIMEOUT, "the source is known", async || {
        let request = stack.api.http.post(&url).header("x-vapi-secret", secret).body(report.clone());
        let (status, answer) = send(request).await;
        if status == 404 { Err(answer.to_string()) } else { Ok(assert_ok((status, answer))) }
    });
    let answer = answer.await;

    assert_eq!(stack.api.outcome(answer["updateId"].as_str().expect("an id")).await["status"], "succeeded");
    assert_nothing_refused(&stack);
}

#[tokio::test]
async fn a_producer_may_publish_commands_and_read_the_events_of_its_project() {
    let stack = stack().await;
    let (api, _, lead_id, secret) = producers_project(&stack).await;
    stack.receiver.on("/retried", [503, 503, 200]);
    let (producer, _) = client(&stack.nats, "producer").await;
    let mut events = producer.subscribe(format!("leads.evt.{PROJECT}.>")).await.expect("a subscription");
    let js = service_kit::nats::jetstream(&producer);

    let body = json!({"leadId": lead_id, "targetState": "lost"}).to_string();
    let ack = eventually(TEST_TIMEOUT, "an ack", async || {
        let ack = js.publish(format!("leads.cmd.{PROJECT}.update"), body.clone().into()).await.expect("a publish");
        ack.await.map_err(|e| e.to_string())
    })
    .await;

    assert_eq!((ack.stream.as_str(), ack.sequence, ack.duplicate), (LEAD_COMMANDS, 1, false));
    let refused = js.publish(format!("leads.cmd.{PROJECT}.update"), "{}".into()).await.expect("a publish");
    let refused = refused.await.expect_err("a refusal").to_string();
    assert!(refused.contains("address_missing"), "{refused}");
    let event = tokio::time::timeout(TEST_TIMEOUT, events.next()).await.expect("an event in time").expect("an event");
    assert!(event.subject.ends_with(".update.succeeded"), "{}", event.subject);
    let requests = stack.receiver.wait_for_requests("/retried", 3, TEST_TIMEOUT).await;
    verify(&requests[2], &secret);
    let body = requests[2].json();
    assert_eq!(api.outcome(body["updateId"].as_str().expect("an id")).await["status"], "succeeded");
    assert_nothing_refused(&stack);
}

#[tokio::test]
async fn every_feature_of_the_gateway_is_permitted() {
    let stack = stack().await;
    let (api, process_id, lead_id, _) = producers_project(&stack).await;

    let dry_run = json!({"leadId": lead_id, "name": "Eve"});
    assert_includes(
        &assert_ok(api.post(&format!("{UPDATE}?dryRun=true"), &dry_run).await),
        json!({"outcome": {"success": true}}),
    );
    let update = json!({"leadId": lead_id, "name": "Eve"});
    let request = api.request(Method::POST, UPDATE).header("prefer", "wait=30").body(update.to_string());
    assert_eq!(request.send().await.expect("an answer").headers()["preference-applied"], "wait=30");

    let delivery = eventually(TEST_TIMEOUT, "a delivery", async || {
        let (deliveries, _) = all_pages(&api, "/api/v1/deliveries?status=delivered&", 10).await;
        deliveries.first().map(|delivery| delivery["deliveryId"].as_str().expect("an id").to_owned())
    })
    .await;
    assert_ok(api.post(&format!("/api/v1/deliveries/{delivery}/redeliver"), &json!({})).await);
    stack.receiver.wait_for_requests("/retried", 2, TEST_TIMEOUT).await;
    let events = api.request(Method::GET, "/api/v1/events").send().await.expect("an answer");
    assert_eq!(events.status().as_u16(), 200);

    let path = format!("/api/v1/processes/{process_id}/callbacks");
    let callback = json!({"name": "one more", "url": stack.receiver.url("/more"), "enabled": false});
    let created = assert_ok(api.post(&path, &callback).await);
    let callback = format!("{path}/{}", created["data"]["callbackId"].as_str().expect("an id"));
    let tested = assert_ok(api.post(&format!("{callback}/test"), &json!({})).await);
    assert_eq!(tested["data"]["delivered"], true, "{tested}");
    let enabled = assert_ok(api.post(&format!("{callback}/enable"), &json!({})).await);
    assert_eq!(enabled["data"]["wasDisabled"], false, "{enabled}");
    assert_ok(api.get("/api/v1/processes").await);
    eventually(TEST_TIMEOUT, "the use of the key is recorded", async || {
        assert_ok(api.get("/api/v1/keys").await)["data"][0]["lastUsedAt"].is_string()
    })
    .await;
    assert_nothing_refused(&stack);
}

#[tokio::test]
async fn dead_letters_and_every_command_of_leadctl_are_permitted() {
    let stack = stack().await;
    let (_, _, lead_id, _) = producers_project(&stack).await;
    stack.client.publish(format!("leads.cmd.{PROJECT}.update"), "nonsense".into()).await.expect("a publish");

    let letter = letter_number(&stack.wait_for_letters(1).await[0]);
    assert_eq!(stack.dead_letters_json(&["show", &letter]).await["body"], "nonsense");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), json!({"leadId": lead_id, "name": "mended"}).to_string()).expect("a file");
    stack.dead_letters_json(&["replay", &letter, "--body", file.path().to_str().expect("a path")]).await;
    let nothing = stack.leadctl(&["dead-letters", "replay", "--all", "--reason", "invalid_json"]).await;
    nothing.assert_ok().assert_prints(&["no dead letters to replay\n"]);
    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["updates"]["deadLetters"], 1, "{report}");
    let callbacks = stack.leadctl(&["callback", "list", "--json", "--project", PROJECT]).await;
    callbacks.assert_prints(&["\"name\":\"crm\"", "healthy"]);
    // Runs the doctor with the NATS user of the job `doctor`. A missing permission would be reported as a fault.
    let doctor = stack.leadctl(&["doctor", "--json"]).await.json();
    let failed: Vec<_> =
        doctor["checks"].as_array().expect("checks").iter().filter(|c| c["state"] == "failed").collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert_nothing_refused(&stack);
}

/// Subjects that each user may not publish to: commands of another project, events, buckets, queries, inboxes of
/// others, and the API that reads, empties and deletes streams. `OWN` stands for the producer's project, `OTHER` for
/// another one.
const FORBIDDEN_TO_PUBLISH: &str = "
    producer: leads.cmd.OTHER.update leads.cmd.pack leads.evt.OWN._.update.succeeded $KV.processes.OWN._ $KV.api_keys.x
        leads.rpc.key.create leads.rpc.lead.get $JS.API.STREAM.MSG.GET.LEAD_COMMANDS $JS.API.DIRECT.GET.KV_processes
        $JS.API.CONSUMER.CREATE.LEAD_COMMANDS.spy $JS.API.CONSUMER.CREATE.LEAD_EVENTS.spy
        $JS.API.CONSUMER.MSG.NEXT.LEAD_EVENTS.webhook-notifier $JS.API.STREAM.PURGE.LEAD_COMMANDS
        $JS.API.STREAM.DELETE.LEAD_COMMANDS _INBOX_gateway.forged.1 leads.intake.OTHER.update
    gateway: leads.applied leads.intake.OWN.update leads.evt.OWN._.update.succeeded leads.dead.invalid_json leads.rpc.key.create leads.rpc.process.apply
        leads.rpc.secrets.rotate $KV.api_keys.x $KV.processes.x $KV.audits.all.whole $JS.API.STREAM.PURGE.LEAD_COMMANDS
        $JS.API.CONSUMER.CREATE.LEAD_EVENTS.spy $JS.API.CONSUMER.CREATE.LEAD_EVENTS.webhook-notifier.leads.evt.OWN.>
        $JS.API.CONSUMER.MSG.NEXT.LEAD_EVENTS.webhook-notifier $JS.API.CONSUMER.DELETE.LEAD_EVENTS.webhook-notifier
        _INBOX_leadctl.forged.1
    webhook-notifier: leads.cmd.OWN.update leads.cmd.pack leads.intake.OWN.update leads.evt.OWN._.update.succeeded $KV.processes.x
        $JS.API.STREAM.INFO.LEAD_COMMANDS $JS.API.STREAM.INFO.KV_api_keys $JS.API.STREAM.DELETE.LEAD_EVENTS
        leads.rpc.lead.get leads.rpc.update.get
    lead-state: $KV.key_uses.x $KV.audits.all.whole leads.cmd.OWN.update leads.cmd.pack leads.intake.OWN.update webhooks.evt.OWN._.exhausted $JS.ACK.LEAD_EVENTS.webhook-notifier.1.1.1.1.1
        $JS.API.STREAM.DELETE.LEAD_COMMANDS _INBOX_gateway.forged.1
    console: leads.cmd.OWN.update leads.cmd.pack leads.intake.OWN.update leads.evt.OWN._.update.succeeded leads.rpc.lead.initiate
        leads.rpc.key.create leads.rpc.key.revoke leads.rpc.process.change webhooks.rpc.delivery.redeliver webhooks.rpc.callback.enable
        webhooks.rpc.callback.pause $KV.api_keys.x $KV.processes.x $KV.key_uses.x $KV.audits.all.whole $JS.API.STREAM.DELETE.KV_console_logins leads.dead.invalid_json
        $JS.API.STREAM.MSG.GET.LEAD_COMMANDS $JS.API.STREAM.MSG.GET.KV_processes
    leadctl: leads.cmd.pack leads.evt.OWN._.update.succeeded leads.dead.invalid_json $KV.processes.x
        $JS.API.STREAM.DELETE.LEAD_COMMANDS
    backup: leads.cmd.OWN.update leads.cmd.pack leads.rpc.lead.get $KV.api_keys.x $JS.API.STREAM.DELETE.LEAD_EVENTS
        $JS.API.STREAM.PURGE.LEAD_COMMANDS $JS.API.STREAM.RESTORE.LEAD_EVENTS $JS.API.STREAM.MSG.GET.KV_processes";

/// Subjects that each user may not subscribe to.
const FORBIDDEN_TO_SUBSCRIBE: &str = "
    producer: > _INBOX.> _INBOX_gateway.> leads.cmd.OWN.> leads.evt.OTHER.> leads.evt.> $KV.processes.>
    gateway: _INBOX_lead-state.> leads.cmd.> leads.rpc.key.create
    webhook-notifier: _INBOX_gateway.> leads.rpc.process.apply leads.cmd.> leads.intake.>
    lead-state: _INBOX_leadctl.> webhooks.rpc.> leads.intake.>
    console: _INBOX_gateway.> leads.cmd.> leads.evt.> leads.rpc.lead.get $KV.api_keys.>
    leadctl: leads.rpc.process.apply _INBOX_lead-state.>
    backup: _INBOX_gateway.> leads.cmd.> leads.evt.>";

/// The subjects of a user in one of these tables.
fn subjects_of(user: &str, table: &str) -> Vec<String> {
    let (_, rest) = table.split_once(&format!(" {user}:")).expect("a row");
    let subjects = rest.split_whitespace().take_while(|word| !word.ends_with(':'));
    subjects.map(|subject| subject.replace("OWN", PROJECT).replace("OTHER", OTHER)).collect()
}

#[tokio::test]
async fn forbidden_subjects_are_refused_to_each_user() {
    let stack = stack().await;
    for user in USERS {
        let (client, mut refusals) = client(&stack.nats, user).await;
        let mut expect_refusal = async |what: &str, subject: &str| {
            let expected = format!("permissions violation for {what} to \"{subject}\"").to_lowercase();
            let refusal = tokio::time::timeout(TEST_TIMEOUT, refusals.recv()).await;
            let refusal = refusal.unwrap_or_else(|_| panic!("{user} is not refused the {what} to {subject}"));
            let refusal = refusal.expect("an open channel").to_lowercase();
            assert!(refusal.contains(&expected), "{user}: {refusal} instead of {expected}");
        };
        for subject in subjects_of(user, FORBIDDEN_TO_PUBLISH) {
            client.publish(subject.clone(), "{}".into()).await.expect("a publish");
            client.flush().await.expect("a flush");
            expect_refusal("publish", &subject).await;
        }
        for subject in subjects_of(user, FORBIDDEN_TO_SUBSCRIBE) {
            let _subscription = client.subscribe(subject.clone()).await.expect("a subscription");
            client.flush().await.expect("a flush");
            expect_refusal("subscription", &subject).await;
        }
    }

    // A client without a user, or with a wrong password, is refused.
    let url = format!("nats://127.0.0.1:{}", stack.nats.port());
    assert!(async_nats::connect(&url).await.is_err());
    let wrong = async_nats::ConnectOptions::with_user_and_password("gateway".into(), "wrong".into());
    assert!(wrong.connect(&url).await.is_err());
    assert_eq!(stack.count(LEDGER_ROWS).await, 0);
}

#[tokio::test]
async fn a_missing_permission_is_logged_as_an_error() {
    let (nats, postgres) = tokio::join!(nats(None), postgres());
    // A producer's user may neither subscribe to the gateway's inbox nor read the streams of the services.
    let url = nats.url_for("producer", &password("producer"));
    let (mut gateway, _): (Service, _) = service("gateway", &nats, &postgres, &[("NATS_URL", &url)]);
    let line = gateway.wait_for_log("NATS refuses", TEST_TIMEOUT + Duration::from_secs(10)).await;
    assert!(line.contains("ERROR") && line.to_lowercase().contains("permissions violation"), "{line}");
    assert!(!gateway.log().contains(&password("producer")));
}
