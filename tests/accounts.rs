//! NATS with least privilege: under deploy/nats/accounts.conf everything works, and nothing that it forbids is possible.

use std::time::Duration;

use contract::{ObjectId, streams::LEAD_COMMANDS};
use futures::StreamExt;
use serde_json::json;
use service_kit::config::NatsConfig;
use test_support::{Authorization, LocalNats, NatsOptions, Service, binary, nats_with, postgres};
use tokio::sync::mpsc;

use crate::{
    audit::settled,
    dead_letters::{dead_letters, number, read, wait_for_letters},
    main_job::main_job,
    stack::{Api, SOON, Stack, service, verify},
    story::all_pages,
};

/// The project of the example producer.
const PROJECT: &str = "65e4b2d9f1a2000000000001";
const OTHER: &str = "65e4b2d9f1a2000000000002";
const USERS: [&str; 5] = ["gateway", "lead-state", "webhook-notifier", "leadctl", "producer"];

fn password(user: &str) -> String {
    format!("password of {user}").replace(' ', "-")
}

async fn nats() -> LocalNats {
    let config = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/nats/accounts.conf"));
    let variable = |user: &str| format!("NATS_{}_PASSWORD", user.to_uppercase().replace('-', "_"));
    let authorization = Authorization {
        config: config.expect("accounts.conf"),
        environment: USERS.map(|user| (variable(user), password(user))).into(),
        user: "leadctl".into(),
        password: password("leadctl"),
    };
    nats_with(NatsOptions { authorization: Some(authorization), ..NatsOptions::throwaway() }).await
}

async fn stack() -> Stack {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    let operator = NatsConfig::at(nats.url());
    let urls = USERS.map(|user| (user, nats.url_for(user, &password(user))));
    Stack::start_on(nats, postgres, &operator, |name| {
        let (_, url) = urls.iter().find(|(user, _)| *user == name).expect("a user");
        vec![("NATS_URL".into(), url.clone()), ("RETRY_SCHEDULE".into(), "0s,100ms,100ms".into())]
    })
    .await
}

/// A client of a user, and what the server refuses it.
async fn client(nats: &LocalNats, user: &str) -> (async_nats::Client, mpsc::UnboundedReceiver<String>) {
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

#[tokio::test]
async fn the_main_job_needs_no_more_than_it_is_allowed() {
    let stack = stack().await;
    main_job(&stack).await;

    // A producer, in a project of its own; retries; and what a query tells of it.
    let project_id: ObjectId = PROJECT.parse().expect("an id");
    sqlx::query("INSERT INTO lead_state.projects VALUES ($1, 'produced', now())")
        .bind(project_id.as_bytes())
        .execute(&stack.pool)
        .await
        .expect("a project");
    let api = Api::of_project(stack.api.url.clone(), &stack.client, project_id).await;
    stack.receiver.on("/retried", [503, 503, 200]);
    let spec = json!({"projectId": project_id, "name": "p", "states": [{"name": "new"}, {"name": "lost"}],
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/retried")}]});
    let spec: contract::process::ProcessSpec = serde_json::from_value(spec).expect("a process");
    let applied: contract::rpc::ProcessChangeResult = stack.call(contract::rpc::PROCESS_APPLY, &spec).await;
    let lead_id = api.initiate(applied.process.process_id.expect("an id"), None).await;
    let (producer, _) = client(&stack.nats, "producer").await;
    let mut events = producer.subscribe(format!("leads.evt.{PROJECT}.>")).await.expect("a subscription");
    let js = service_kit::nats::jetstream(&producer);
    let command = json!({"leadId": lead_id, "targetState": "lost"}).to_string();
    let ack = js.publish(format!("leads.cmd.{PROJECT}.update"), command.into()).await.expect("a publish");
    assert_eq!(ack.await.expect("an ack").stream, LEAD_COMMANDS);
    let event = tokio::time::timeout(SOON, events.next()).await.expect("an event in time").expect("an event");
    assert!(event.subject.ends_with(".update.succeeded"), "{}", event.subject);
    let requests = stack.receiver.wait_for_requests("/retried", 3, SOON).await;
    verify(&requests[2], applied.process.callbacks[0].secrets[0].expose());
    let update_id = requests[2].json()["updateId"].as_str().expect("an id").to_owned();
    assert_eq!(api.outcome(&update_id).await["status"], "succeeded");

    // What the gateway asks, and hears, only when it is asked to.
    let update = json!({"leadId": lead_id, "name": "Eve"});
    let (status, tried) =
        api.post("/api/v1/leads/update", &json!({"leadId": lead_id, "name": "Eve", "dryRun": true})).await;
    assert_eq!((status, &tried["outcome"]["success"]), (200, &json!(true)), "{tried}");
    let request = api.http.post(format!("{}/api/v1/leads/update", api.url)).bearer_auth(&api.key);
    let waited = request.header("prefer", "wait=30").body(update.to_string()).send().await.expect("an answer");
    assert_eq!(waited.headers()["preference-applied"], "wait=30");

    // What was told is told again, listed and followed.
    let (told, _) = all_pages(&api, "/api/v1/deliveries?", 10).await;
    assert_eq!(told[0]["status"], "delivered", "{told:?}");
    let again = format!("/api/v1/deliveries/{}/redeliver", told[0]["deliveryId"].as_str().expect("an id"));
    let (status, answer) = api.post(&again, &json!({})).await;
    assert_eq!(status, 200, "{answer}");
    stack.receiver.wait_for_requests("/retried", 4, SOON).await;
    let events = api.http.get(format!("{}/api/v1/events", api.url)).bearer_auth(&api.key).send().await;
    assert_eq!(events.expect("an answer").status().as_u16(), 200);

    // What is configured over HTTP, and tried.
    let path = format!("/api/v1/processes/{}/callbacks", applied.process.process_id.expect("an id"));
    let (status, made) =
        api.post(&path, &json!({"name": "one more", "url": stack.receiver.url("/more"), "enabled": false})).await;
    assert_eq!(status, 200, "{made}");
    let test = format!("{path}/{}/test", made["data"]["callbackId"].as_str().expect("an id"));
    let (status, tested) = api.post(&test, &json!({})).await;
    assert_eq!((status, &tested["data"]["delivered"]), (200, &json!(true)), "{tested}");
    let (status, enabled) = api.post(&test.replace("/test", "/enable"), &json!({})).await;
    assert_eq!((status, &enabled["data"]["wasDisabled"]), (200, &json!(false)), "{enabled}");
    assert_eq!(api.get("/api/v1/processes").await.0, 200);

    // What cannot be read is buried, and a restart takes up where it was: rarer paths need permissions too.
    stack.client.publish(format!("leads.cmd.{PROJECT}.update"), "nonsense".into()).await.expect("a publish");
    let js = service_kit::nats::jetstream(&stack.client);
    test_support::eventually(SOON, "a dead letter", async || {
        let letters = js.get_stream(contract::streams::LEAD_DEAD_LETTERS).await.expect("a stream");
        letters.get_info().await.expect("its state").state.messages == 1
    })
    .await;

    // What leadctl asks no service for.
    let url = stack.nats.url();
    let letter = number(&wait_for_letters(&url, 1).await[0]);
    assert_eq!(read(&url, &["show", &letter]).await["body"], "nonsense");
    let dir = tempfile::tempdir().expect("a directory");
    let body = dir.path().join("mended");
    std::fs::write(&body, json!({"leadId": lead_id, "name": "mended"}).to_string()).expect("a file");
    read(&url, &["replay", &letter, "--body", body.to_str().expect("a path")]).await;
    let nothing = dead_letters(&url, &["replay", "--all", "--reason", "invalid_json"]).await;
    assert_eq!(nothing, (true, "no dead letters to replay\n".into()));
    let found = settled(&stack).await;
    assert_eq!(found["updates"]["deadLetters"], 1, "{found}");
    let project = ["callback", "list", "--json", "--project", PROJECT];
    let callbacks = tokio::process::Command::new(binary("leadctl")).args(project).env("NATS_URL", &url).output().await;
    let callbacks = String::from_utf8(callbacks.expect("leadctl").stdout).expect("UTF-8");
    assert!(callbacks.contains("\"name\":\"crm\"") && callbacks.contains("healthy"), "{callbacks}");
    for service in [&stack.gateway, &stack.lead_state, &stack.notifier] {
        assert!(!service.log().contains("NATS refuses"), "{}", service.log());
    }
}

#[tokio::test]
async fn what_is_forbidden_is_refused() {
    let stack = stack().await;
    let own = PROJECT;
    let publish = [
        // Another project's command, and all that is not a command.
        ("producer", format!("leads.cmd.{OTHER}.update")),
        ("producer", format!("leads.evt.{own}._.update.succeeded")),
        ("producer", format!("$KV.processes.{own}._")),
        ("producer", "$KV.api_keys.x".into()),
        ("producer", "leads.rpc.key.create".into()),
        ("producer", "leads.rpc.lead.get".into()),
        // Reading, emptying and deleting streams.
        ("producer", "$JS.API.STREAM.MSG.GET.LEAD_COMMANDS".into()),
        ("producer", "$JS.API.DIRECT.GET.KV_processes".into()),
        ("producer", "$JS.API.CONSUMER.CREATE.LEAD_COMMANDS.spy".into()),
        ("producer", "$JS.API.CONSUMER.CREATE.LEAD_EVENTS.spy".into()),
        ("producer", "$JS.API.CONSUMER.MSG.NEXT.LEAD_EVENTS.webhook-notifier".into()),
        ("producer", "$JS.API.STREAM.PURGE.LEAD_COMMANDS".into()),
        ("producer", "$JS.API.STREAM.DELETE.LEAD_COMMANDS".into()),
        ("producer", "_INBOX_gateway.forged.1".into()),
        ("gateway", format!("leads.evt.{own}._.update.succeeded")),
        ("gateway", "leads.dead.invalid_json".into()),
        ("gateway", "leads.rpc.key.create".into()),
        ("gateway", "leads.rpc.process.apply".into()),
        ("gateway", "leads.rpc.secrets.rotate".into()),
        ("gateway", "$KV.api_keys.x".into()),
        ("gateway", "$JS.API.STREAM.INFO.KV_processes".into()),
        ("gateway", "$JS.API.STREAM.PURGE.LEAD_COMMANDS".into()),
        ("gateway", "$JS.API.CONSUMER.CREATE.LEAD_EVENTS.spy".into()),
        ("gateway", format!("$JS.API.CONSUMER.CREATE.LEAD_EVENTS.webhook-notifier.leads.evt.{own}.>")),
        ("gateway", "$JS.API.CONSUMER.MSG.NEXT.LEAD_EVENTS.webhook-notifier".into()),
        ("gateway", "$JS.API.CONSUMER.DELETE.LEAD_EVENTS.webhook-notifier".into()),
        ("gateway", "_INBOX_leadctl.forged.1".into()),
        ("webhook-notifier", format!("leads.cmd.{own}.update")),
        ("webhook-notifier", format!("leads.evt.{own}._.update.succeeded")),
        ("webhook-notifier", "$KV.processes.x".into()),
        ("webhook-notifier", "$JS.API.STREAM.INFO.LEAD_COMMANDS".into()),
        ("webhook-notifier", "$JS.API.STREAM.INFO.KV_api_keys".into()),
        ("webhook-notifier", "$JS.API.STREAM.DELETE.LEAD_EVENTS".into()),
        ("webhook-notifier", "leads.rpc.lead.get".into()),
        ("webhook-notifier", "leads.rpc.update.get".into()),
        ("lead-state", format!("leads.cmd.{own}.update")),
        ("lead-state", format!("webhooks.evt.{own}._.exhausted")),
        ("lead-state", "$JS.ACK.LEAD_EVENTS.webhook-notifier.1.1.1.1.1".into()),
        ("lead-state", "$JS.API.STREAM.DELETE.LEAD_COMMANDS".into()),
        ("lead-state", "_INBOX_gateway.forged.1".into()),
        ("leadctl", format!("leads.evt.{own}._.update.succeeded")),
        ("leadctl", "leads.dead.invalid_json".into()),
        ("leadctl", "$KV.processes.x".into()),
        ("leadctl", "$JS.API.STREAM.DELETE.LEAD_COMMANDS".into()),
    ];
    let subscribe = [
        ("producer", ">".to_owned()),
        ("producer", "_INBOX.>".into()),
        ("producer", "_INBOX_gateway.>".into()),
        ("producer", format!("leads.cmd.{own}.>")),
        ("producer", format!("leads.evt.{OTHER}.>")),
        ("producer", "leads.evt.>".into()),
        ("producer", "$KV.processes.>".into()),
        ("gateway", "_INBOX_lead-state.>".into()),
        ("gateway", "leads.cmd.>".into()),
        ("gateway", "leads.rpc.key.create".into()),
        ("webhook-notifier", "_INBOX_gateway.>".into()),
        ("webhook-notifier", "leads.rpc.process.apply".into()),
        ("webhook-notifier", "leads.cmd.>".into()),
        ("lead-state", "_INBOX_leadctl.>".into()),
        ("lead-state", "webhooks.rpc.>".into()),
        ("leadctl", "leads.rpc.process.apply".into()),
        ("leadctl", "_INBOX_lead-state.>".into()),
    ];
    for user in USERS {
        let (client, mut refusals) = client(&stack.nats, user).await;
        let mut refused = async |what: &str, subject: &str| {
            let expected = format!("permissions violation for {what} to \"{subject}\"");
            let refusal = tokio::time::timeout(SOON, refusals.recv()).await;
            let refusal =
                refusal.unwrap_or_else(|_| panic!("{user} is not refused to {what} {subject}")).expect("open");
            assert!(
                refusal.to_lowercase().contains(&expected.to_lowercase()),
                "{user}: {refusal} instead of {expected}"
            );
        };
        for (_, subject) in publish.iter().filter(|(of, _)| *of == user) {
            client.publish(subject.clone(), "{}".into()).await.expect("a publish");
            client.flush().await.expect("a flush");
            refused("publish", subject).await;
        }
        for (_, subject) in subscribe.iter().filter(|(of, _)| *of == user) {
            let _subscription = client.subscribe(subject.clone()).await.expect("a subscription");
            client.flush().await.expect("a flush");
            refused("subscription", subject).await;
        }
    }
    // Nobody comes in without a name, or with a wrong password.
    let url = format!("nats://127.0.0.1:{}", stack.nats.port());
    assert!(async_nats::connect(&url).await.is_err());
    let wrong = async_nats::ConnectOptions::with_user_and_password("gateway".into(), "wrong".into());
    assert!(wrong.connect(&url).await.is_err());
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 0);
}

#[tokio::test]
async fn a_missing_permission_is_said_and_not_taken_for_silence() {
    let (nats, postgres) = tokio::join!(nats(), postgres());
    // A gateway under another's user may neither have its inbox nor see its streams.
    let url = nats.url_for("producer", &password("producer"));
    let (mut gateway, _): (Service, _) = service("gateway", &nats, &postgres, &[("NATS_URL", &url)]);
    let line = gateway.wait_for_log("NATS refuses", SOON + Duration::from_secs(10)).await;
    assert!(line.contains("ERROR") && line.to_lowercase().contains("permissions violation"), "{line}");
    assert!(!gateway.log().contains(&password("producer")));
}
