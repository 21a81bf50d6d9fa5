//! Start and stop of services. A service that stops is unready before it drains, loses nothing, and exits with 0; a
//! service whose task dies exits with another code. A service starts on a schema that another version migrated.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use contract::rpc::{ErrorCode, GetRecovery, Query, RpcError};
use serde_json::json;
use service_kit::{
    lifecycle::Tasks,
    rpc::{self, RequestError, request},
};
use test_support::{Reply, Service, binary, eventually, free_port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    sync::{Notify, Semaphore},
};
use tokio_util::sync::CancellationToken;

use crate::support::{
    DELIVERED, LEDGER_ROWS, LeadctlRun, Stack, TEST_TIMEOUT, assert_exactly_once, service, update_each,
    wait_for_failure, wait_for_unready,
};

#[tokio::test]
async fn sigterm_under_load_loses_nothing_and_delivers_nothing_twice() {
    let mut stack = Stack::start().await;
    let leads = stack.leads(&["crm"], 8).await;
    // The endpoint is slow, so that some deliveries are in flight whenever the webhook-notifier is stopped.
    stack.receiver.on("/crm", [Reply::status(200).after(Duration::from_millis(100))]);
    let load = tokio::spawn(update_each(stack.api.clone(), leads, 400));

    for round in 0..3 {
        stack.wait_for_ledger_beyond(150 * (round + 1)).await;
        assert!(!load.is_finished(), "nothing is left for round {round}");
        let service = match round {
            0 => &mut stack.gateway,
            1 => &mut stack.notifier,
            _ => &mut stack.lead_state,
        };
        let status = service.terminate().await;
        assert!(status.success(), "{status}:\n{}", service.log());
        service.restart().await;
    }
    let accepted = load.await.expect("the load");
    stack.wait_for_clean_audit().await;

    // All applied updates were accepted, except those that the gateway answered with `not_confirmed`.
    let applied = stack.count(LEDGER_ROWS).await as usize;
    let unconfirmed = stack.api.unconfirmed.load(Ordering::Relaxed);
    assert!((accepted.len()..=accepted.len() + unconfirmed).contains(&applied), "{applied}, {unconfirmed} unconfirmed");
    let requests = stack.receiver.requests();
    assert_exactly_once(&stack.pool, stack.api.project_id, &accepted, &requests).await;
    assert_eq!(requests.len(), applied, "deliveries under way were recorded before the end");
}

#[tokio::test]
async fn restarts_one_at_a_time_and_all_at_once_under_load_leave_a_clean_audit() {
    let mut stack = Stack::start().await;
    let leads = stack.leads(&["crm"], 8).await;
    let load = tokio::spawn(update_each(stack.api.clone(), leads, 400));

    // Restarts one service at a time, as a rolling upgrade does.
    for round in 0..3 {
        stack.wait_for_ledger_beyond(150 * (round + 1)).await;
        let service = match round {
            0 => &mut stack.lead_state,
            1 => &mut stack.notifier,
            _ => &mut stack.gateway,
        };
        let status = service.terminate().await;
        assert!(status.success(), "{status}:\n{}", service.log());
        service.restart().await;
    }
    // Restarts all services at once, twice.
    for round in 0..2 {
        stack.wait_until_ready().await;
        stack.wait_for_ledger_beyond(600 + 300 * round).await;
        assert!(!load.is_finished(), "nothing is left for round {round}");
        let ended = tokio::join!(stack.gateway.terminate(), stack.lead_state.terminate(), stack.notifier.terminate());
        assert!(ended.0.success() && ended.1.success() && ended.2.success(), "{ended:?}");
        tokio::join!(stack.gateway.restart(), stack.lead_state.restart(), stack.notifier.restart());
    }
    let accepted = load.await.expect("the load");

    // If the response of an update was cut off, the client sent another update instead.
    let report = stack.wait_for_clean_audit().await;
    assert!(report["updates"]["succeeded"].as_u64() >= Some(accepted.len() as u64), "{report}");
    assert_exactly_once(&stack.pool, stack.api.project_id, &accepted, &stack.receiver.requests()).await;
}

#[tokio::test]
async fn a_gateway_is_unready_before_it_drains_and_answers_requests_it_has_begun() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let listen = format!("127.0.0.1:{}", free_port());
    let (mut gateway, ready) = service("gateway", &stack.nats, &stack.postgres, &[("GATEWAY_LISTEN", &listen)]);
    gateway.wait_for_http(&ready, TEST_TIMEOUT).await;

    // A client in the middle of its request: the gateway reads the body after it has answered "100 Continue".
    let mut client = TcpStream::connect(&listen).await.expect("a connection");
    let body = json!({"leadId": lead_id, "name": "Grace"}).to_string();
    let head = format!(
        "POST /api/v1/leads/update HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\
         Expect: 100-continue\r\n\r\n",
        stack.api.key,
        body.len()
    );
    client.write_all(format!("{head}{}", &body[..10]).as_bytes()).await.expect("half a request");
    let mut interim = [0; 25];
    client.read_exact(&mut interim).await.expect("an interim answer");
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");

    let (status, answer) = tokio::join!(gateway.terminate(), async {
        wait_for_unready(&ready, "draining").await;
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

/// Sends a request on a kept connection and reads the whole response. Returns `None` if the connection ends first.
async fn exchange(client: &mut TcpStream) -> Option<String> {
    client.write_all(b"GET /api/v1/leads/none HTTP/1.1\r\nHost: x\r\n\r\n").await.ok()?;
    let mut response = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&response).to_ascii_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
            if body.len() == length.expect("a length").parse::<usize>().expect("a number") {
                return Some(text);
            }
        }
        if client.read_buf(&mut response).await.ok()? == 0 {
            return None;
        }
    }
}

#[tokio::test]
async fn a_stopping_gateway_answers_idle_connections_once_more_and_asks_to_close_them() {
    let (nats, postgres) = (test_support::nats().await, test_support::postgres().await);
    let listen = format!("127.0.0.1:{}", free_port());
    let (mut gateway, _) = service("gateway", &nats, &postgres, &[("GATEWAY_LISTEN", &listen)]);
    let mut client = eventually(TEST_TIMEOUT, "a connection", async || TcpStream::connect(&listen).await).await;
    let first = exchange(&mut client).await.expect("a response");
    assert!(!first.contains("connection: close"), "{first}");

    let (status, last) = tokio::join!(gateway.terminate(), async {
        // The connection is idle nearly all the time, like connections in a proxy's pool.
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let response = exchange(&mut client).await.expect("a response, and not a closed connection");
            if response.contains("connection: close") {
                return client.read(&mut [0]).await.expect("the end of the connection");
            }
        }
    });

    assert_eq!(last, 0, "nothing follows");
    assert!(status.success(), "{status}:\n{}", gateway.log());
}

#[tokio::test]
async fn a_notifier_is_unready_before_it_drains_and_records_deliveries_under_way() {
    let mut stack = Stack::start().await;
    stack.receiver.on("/crm", [Reply::status(200).after(Duration::from_secs(2))]);
    let lead_id = stack.lead(&["crm"]).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;

    let (status, ()) = tokio::join!(stack.notifier.terminate(), wait_for_unready(&stack.notifier_ready, "draining"));

    assert!(status.success(), "{status}:\n{}", stack.notifier.log());
    assert_eq!(stack.count(DELIVERED).await, 1);
    // The next notifier does not send the delivery again.
    stack.notifier.restart().await;
    stack.wait_for_clean_audit().await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 1);
}

#[tokio::test]
async fn a_leader_that_cannot_apply_ends_its_process_at_every_start_until_it_can() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    // The table is missing, as with an incompatible schema. Neither retrying nor skipping the update would help.
    stack.sql("ALTER TABLE lead_state.lead_updates RENAME TO elsewhere").await;
    let update = stack.api.update(json!({"leadId": lead_id, "name": "Grace"})).await;

    let log = wait_for_failure(&mut stack.lead_state).await;
    assert!(log.contains("task leader failed"), "{log}");
    stack.lead_state.restart().await;
    wait_for_failure(&mut stack.lead_state).await;

    stack.sql("ALTER TABLE lead_state.elsewhere RENAME TO lead_updates").await;
    stack.lead_state.restart().await;
    let request = &stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0];
    assert_eq!(request.json()["updateId"], json!(update));
}

#[tokio::test]
async fn each_service_warns_once_of_what_the_nats_server_lacks() {
    let mut stack = Stack::start().await;

    // After a reconnect to the same server, the service does not warn again.
    stack.nats.kill9().await.expect("kill");
    stack.nats.restart().await.expect("restart");

    let old = usize::from(stack.nats.version() < (2, 10, 0));
    for service in [&stack.gateway, &stack.lead_state, &stack.notifier] {
        let reconnected = async || service.log().matches("connected to NATS").count() > 1;
        eventually(TEST_TIMEOUT, "it is connected again", reconnected).await;
        let log = service.log();
        assert_eq!(log.matches("the NATS server's version").count(), 1, "{log}");
        assert_eq!(log.matches("but not a power cut").count(), old, "{log}");
    }
}

async fn migrate(database_url: &str) {
    let mut command = Command::new(binary("leadctl"));
    command.args(["migrate", "--database-url", database_url]);
    LeadctlRun::of(command).await.assert_ok();
}

#[tokio::test]
async fn a_service_that_may_not_migrate_waits_for_the_schema() {
    let (nats, postgres) = (test_support::nats().await, test_support::postgres().await);
    let names = ["lead-state", "webhook-notifier"];
    let mut services = names.map(|name| service(name, &nats, &postgres, &[("NO_MIGRATE", "true")]));
    for ((_, ready), schema) in services.iter().zip(["lead_state", "webhooks"]) {
        wait_for_unready(ready, &format!("schema: {schema} lacks migrations [1")).await;
    }

    migrate(&postgres.url()).await;

    for (service, ready) in &mut services {
        service.wait_for_http(ready, TEST_TIMEOUT).await;
    }
}

#[tokio::test]
async fn migrate_waits_for_a_postgres_that_starts_later() {
    let mut postgres = test_support::postgres().await;
    postgres.kill9().await.expect("kill");
    let mut command = std::process::Command::new(binary("leadctl"));
    command.args(["migrate", "--wait", "5m", "--database-url", &postgres.url()]);
    let mut migrate = Service::spawn("leadctl", command);
    migrate.wait_for_log("waiting for Postgres: ", TEST_TIMEOUT).await;

    postgres.restart().await.expect("restart");

    let status = tokio::time::timeout(TEST_TIMEOUT, migrate.exited()).await.expect("it ends");
    assert!(status.success(), "{}", migrate.log());
    assert!(migrate.log().contains("schema webhooks is up to date"), "{}", migrate.log());
}

#[tokio::test]
async fn a_service_starts_on_the_schema_of_a_newer_version() {
    let (nats, postgres) = (test_support::nats().await, test_support::postgres().await);
    migrate(&postgres.url()).await;
    let pool = sqlx::PgPool::connect(&postgres.url()).await.expect("Postgres");
    for schema in ["lead_state", "webhooks"] {
        let newer = format!(
            "INSERT INTO {schema}._sqlx_migrations (version, description, success, checksum, execution_time) \
             VALUES (9999, 'of a newer version', true, '', 0)"
        );
        sqlx::query(sqlx::AssertSqlSafe(newer)).execute(&pool).await.expect("a migration");
    }

    migrate(&postgres.url()).await;

    for name in ["lead-state", "webhook-notifier"] {
        let (mut service, ready) = service(name, &nats, &postgres, &[]);
        service.wait_for_http(&ready, TEST_TIMEOUT).await;
    }
}

#[tokio::test]
async fn a_service_that_stops_answers_the_queries_under_way_and_takes_no_more() {
    let nats = test_support::nats().await;
    let (client, caller) = (nats.connect().await.expect("a client"), nats.connect().await.expect("a caller"));
    let shutdown = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    let service = rpc::service(&client, "recovery", "answers slowly", []).await.expect("a service");
    let (begun, answer) = (Arc::new(Semaphore::new(0)), Arc::new(Notify::new()));
    let handler = {
        let (begun, answer) = (begun.clone(), answer.clone());
        move |_: GetRecovery| {
            let (begun, answer) = (begun.clone(), answer.clone());
            async move {
                begun.add_permits(1);
                answer.notified().await;
                Err(RpcError::new(ErrorCode::NotApplicable, "answered"))
            }
        }
    };
    rpc::serve(&mut tasks, &service, shutdown.clone(), handler).await.expect("an endpoint");
    client.flush().await.expect("the server knows the endpoint");
    let under_way = {
        let caller = caller.clone();
        tokio::spawn(async move { request(&caller, &GetRecovery {}).await })
    };
    begun.acquire().await.expect("a query under way").forget();

    shutdown.cancel();

    eventually(TEST_TIMEOUT, "queries reach no instance", async || {
        // Sent once, unlike a repeatable query.
        let wait = Duration::from_millis(200);
        let sent = rpc::exchange::<_, serde_json::Value>(&caller, GetRecovery::SUBJECT, &GetRecovery {}, wait).await;
        matches!(sent, Err(RequestError::NoResponder { .. }))
    })
    .await;
    answer.notify_waiters();
    let answered = under_way.await.expect("the caller");
    assert!(matches!(answered, Err(RequestError::Answered(e)) if e.message == "answered"));
    tasks.run(TEST_TIMEOUT).await.expect("drained");
}
