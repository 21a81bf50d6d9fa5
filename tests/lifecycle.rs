//! How services end: not ready before they drain, with nothing lost and exit code 0; and non-zero when a task dies.

use std::{sync::atomic::Ordering, time::Duration};

use serde_json::json;
use test_support::{Reply, binary, eventually, free_port, http_client};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    audit::settled,
    continuity::{assert_settled, load},
    stack::{SOON, Stack, service},
};

/// Waits until a health port says that its service drains.
async fn draining(ready: &str) {
    let client = http_client();
    eventually(SOON, "it is not ready and says why", async || {
        let answer = client.get(ready).send().await.map_err(|e| e.to_string())?;
        let (status, text) = (answer.status().as_u16(), answer.text().await.map_err(|e| e.to_string())?);
        if status == 503 && text.contains("draining") { Ok(()) } else { Err(format!("{status} {text}")) }
    })
    .await;
}

#[tokio::test]
async fn sigterm_under_load_loses_nothing() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for number in 0..8 {
        leads.push(stack.api.initiate(process_id, Some(&format!("R-{number}"))).await);
    }
    // So slow that some are under way whenever the webhook-notifier is told.
    stack.receiver.on("/crm", std::iter::repeat_n(Reply::status(200).after(Duration::from_millis(100)), 8 * 400));
    let loading = tokio::spawn(load(stack.api.clone(), leads, 400));
    for (round, service) in [&mut stack.gateway, &mut stack.notifier, &mut stack.lead_state].into_iter().enumerate() {
        eventually(SOON, "the load goes on", async || {
            let ledger = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM lead_state.lead_updates");
            ledger.fetch_one(&stack.pool).await.is_ok_and(|rows| rows > 150 * (round as i64 + 1))
        })
        .await;
        assert!(!loading.is_finished(), "nothing is left for round {round}");
        let status = service.terminate().await;
        assert!(status.success(), "{status}:\n{}", service.log());
        service.restart().await;
    }
    let accepted = loading.await.expect("the load");
    settled(&stack).await;
    // Hardly one more either: what the gateway took while it drained, it answered; and it said so where it could not know.
    let applied = stack.count("SELECT count(*) FROM lead_state.lead_updates").await as usize;
    let unconfirmed = stack.api.unconfirmed.load(Ordering::Relaxed);
    assert!((accepted.len()..=accepted.len() + unconfirmed).contains(&applied), "{applied}, {unconfirmed} unconfirmed");
    let requests = stack.receiver.requests();
    assert_settled(&stack.pool, stack.api.project_id, &accepted, &requests).await;
    // Nor was anything told twice: what the webhook-notifier had begun, it recorded.
    assert_eq!(requests.len(), applied);
}

#[tokio::test]
async fn restarts_one_at_a_time_and_all_at_once_under_load_leave_a_clean_audit() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for number in 0..8 {
        leads.push(stack.api.initiate(process_id, Some(&format!("R-{number}"))).await);
    }
    let loading = tokio::spawn(load(stack.api.clone(), leads, 400));
    let pool = stack.pool.clone();
    let applied_more = async |than: i64| {
        eventually(SOON, "the load goes on", async || {
            let ledger = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM lead_state.lead_updates");
            ledger.fetch_one(&pool).await.is_ok_and(|rows| rows > than)
        })
        .await;
    };
    // One at a time, as a rolling upgrade does.
    for (round, service) in [&mut stack.lead_state, &mut stack.notifier, &mut stack.gateway].into_iter().enumerate() {
        applied_more(150 * (round as i64 + 1)).await;
        let status = service.terminate().await;
        assert!(status.success(), "{status}:\n{}", service.log());
        service.restart().await;
    }
    // All at once, twice.
    for round in 0..2 {
        stack.gateway.wait_for_http(&stack.gateway_ready, SOON).await;
        stack.lead_state.wait_for_http(&stack.lead_state_ready, SOON).await;
        stack.notifier.wait_for_http(&stack.notifier_ready, SOON).await;
        applied_more(600 + 300 * round).await;
        assert!(!loading.is_finished(), "nothing is left for round {round}");
        let ended = tokio::join!(stack.gateway.terminate(), stack.lead_state.terminate(), stack.notifier.terminate());
        assert!(ended.0.success() && ended.1.success() && ended.2.success(), "{ended:?}");
        tokio::join!(stack.gateway.restart(), stack.lead_state.restart(), stack.notifier.restart());
    }
    let accepted = loading.await.expect("the load");
    let found = settled(&stack).await;
    // An update whose answer was cut off is sent again as another one.
    assert!(found["updates"]["succeeded"].as_u64() >= Some(accepted.len() as u64), "{found}");
    assert_settled(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

#[tokio::test]
async fn a_gateway_is_not_ready_before_it_drains_and_answers_what_it_took() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let listen = format!("127.0.0.1:{}", free_port());
    let (mut gateway, ready) = service("gateway", &stack.nats, &stack.postgres, &[("GATEWAY_LISTEN", &listen)]);
    gateway.wait_for_http(&ready, SOON).await;

    // A client in the middle of its request.
    let mut client = TcpStream::connect(&listen).await.expect("a connection");
    let body = json!({"leadId": lead_id, "name": "Grace"}).to_string();
    let head = format!(
        "POST /api/v1/leads/update HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\
         Expect: 100-continue\r\n\r\n",
        stack.api.key,
        body.len()
    );
    client.write_all(format!("{head}{}", &body[..10]).as_bytes()).await.expect("half a request");
    // It has begun to read the body when it says so.
    let mut go_on = [0; 25];
    client.read_exact(&mut go_on).await.expect("an interim answer");
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");

    let (status, answer) = tokio::join!(gateway.terminate(), async {
        draining(&ready).await;
        client.write_all(&body.as_bytes()[10..]).await.expect("the other half");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("an answer");
        answer
    });
    assert!(status.success(), "{status}:\n{}", gateway.log());
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let start = answer.find(r#""updateId":""#).expect("an id") + r#""updateId":""#.len();
    assert_eq!(stack.api.outcome(&answer[start..start + 24]).await["status"], "succeeded");
}

#[tokio::test]
async fn a_notifier_is_not_ready_before_it_drains_and_finishes_what_it_began() {
    let mut stack = Stack::start().await;
    let (mut notifier, ready) = service(
        "webhook-notifier",
        &stack.nats,
        &stack.postgres,
        &[("ALLOW_HTTP", "true"), ("ALLOW_NETWORKS", "127.0.0.0/8")],
    );
    notifier.wait_for_http(&ready, SOON).await;
    // The only one from here on.
    assert!(stack.notifier.terminate().await.success());
    stack.receiver.on("/crm", [Reply::status(200).after(Duration::from_secs(2))]);
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.receiver.wait_for_requests("/crm", 1, SOON).await;

    let (status, ()) = tokio::join!(notifier.terminate(), draining(&ready));
    assert!(status.success(), "{status}:\n{}", notifier.log());
    // Recorded before it ended, so nobody tells it again.
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'").await, 1);
    assert_eq!(stack.receiver.requests_to("/crm").len(), 1);
}

#[tokio::test]
async fn a_task_that_dies_takes_its_process_down() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    // Stands for a schema of another version: no use to try again, nor to skip what cannot be applied.
    let rename = async |from: &str, to: &str| {
        let statement = format!("ALTER TABLE lead_state.{from} RENAME TO {to}");
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&stack.pool).await.expect("a rename");
    };
    rename("lead_updates", "elsewhere").await;
    let update = stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    // It may take its time to drain.
    let ended = tokio::time::timeout(SOON * 2, stack.lead_state.exited()).await;
    let status = ended.unwrap_or_else(|_| panic!("it does not end by itself:\n{}", stack.lead_state.log()));
    assert_eq!(status.code(), Some(1), "{status}");
    assert!(stack.lead_state.log().contains("task leader failed"), "{}", stack.lead_state.log());

    // Nor does the next one lead, and try for ever.
    stack.lead_state.restart().await;
    let ended = tokio::time::timeout(SOON * 2, stack.lead_state.exited()).await;
    let status = ended.unwrap_or_else(|_| panic!("it does not end by itself:\n{}", stack.lead_state.log()));
    assert_eq!(status.code(), Some(1), "{status}");

    rename("elsewhere", "lead_updates").await;
    stack.lead_state.restart().await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    assert_eq!(request.json()["updateId"], json!(update));
}

#[tokio::test]
async fn each_service_says_once_what_the_nats_server_cannot_give() {
    let mut stack = Stack::start().await;
    // Also not again of a server that is the same after a reconnect.
    stack.nats.kill9().await.expect("kill");
    stack.nats.restart().await.expect("restart");
    let old = usize::from(stack.nats.version() < (2, 10, 0));
    for service in [&stack.gateway, &stack.lead_state, &stack.notifier] {
        eventually(SOON, "it is connected again", async || service.log().matches("connected to NATS").count() > 1)
            .await;
        let log = service.log();
        assert_eq!(log.matches("the NATS server's version").count(), 1, "{log}");
        assert_eq!(log.matches("but not a power cut").count(), old, "{log}");
    }
}

/// How upgrades go where a job migrates: the new version waits for it, and the one before goes on with what it made.
#[tokio::test]
async fn who_does_not_migrate_waits_for_the_schema_and_who_is_older_takes_a_newer_one() {
    let (nats, postgres) = (test_support::nats().await, test_support::postgres().await);
    let mut services =
        ["lead-state", "webhook-notifier"].map(|name| service(name, &nats, &postgres, &[("NO_MIGRATE", "true")]));
    let client = http_client();
    for ((_, ready), schema) in services.iter().zip(["lead_state", "webhooks"]) {
        eventually(SOON, "it says that it waits for the schema", async || {
            let answer = client.get(ready).send().await.map_err(|e| e.to_string())?;
            let (status, text) = (answer.status().as_u16(), answer.text().await.map_err(|e| e.to_string())?);
            if status == 503 && text.contains(&format!("schema: {schema} lacks migrations [1")) {
                Ok(())
            } else {
                Err(text)
            }
        })
        .await;
    }
    let migrate = async || {
        let output = tokio::process::Command::new(binary("leadctl"))
            .args(["migrate", "--database-url", &postgres.url()])
            .output()
            .await
            .expect("leadctl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    migrate().await;
    for (service, ready) in &mut services {
        service.wait_for_http(ready, SOON).await;
    }

    let pool = sqlx::PgPool::connect(&postgres.url()).await.expect("Postgres");
    for schema in ["lead_state", "webhooks"] {
        let newer = format!(
            "INSERT INTO {schema}._sqlx_migrations (version, description, success, checksum, execution_time) \
             VALUES (9999, 'of a newer version', true, '', 0)"
        );
        sqlx::query(sqlx::AssertSqlSafe(newer)).execute(&pool).await.expect("a migration");
    }
    migrate().await;
    for name in ["lead-state", "webhook-notifier"] {
        let (mut service, ready) = service(name, &nats, &postgres, &[]);
        service.wait_for_http(&ready, SOON).await;
    }
}
