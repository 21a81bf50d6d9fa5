//! Tests against a real Postgres: the columns of a written batch, and schemas of other versions.

use std::sync::Arc;

use contract::{
    JsonObject, ObjectId, Timestamp,
    event::{CompletionEvent, OutcomeKind},
    position::LogPosition,
};
use serde_json::{Value, json};
use service_kit::{
    config::DatabaseConfig,
    postgres::{PinnedConnection, Pool, schema::SchemaError},
};
use sqlx::AssertSqlSafe;

use super::{
    StoreError,
    batch::{Batch, write},
    batch_state,
    checkpoint::{self, Checkpoint},
    ledger, pool, queued_updates, schema, updates,
};
use crate::core::{
    batch::{LeadKeys, LedgerRow, Plan, QueuedUpdate},
    decide::{Call, Lead},
    entry::UpdateEntry,
};

fn id(byte: u8) -> ObjectId {
    ObjectId::from_bytes([byte; 12])
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(1_768_000_000_000 + seconds * 1000)
}

fn position(epoch: i32, sequence: u64, index: u32) -> LogPosition {
    LogPosition { epoch, sequence, index }
}

fn object(value: &Value) -> JsonObject {
    JsonObject::from_text(value.to_string()).unwrap()
}

fn lead(metadata: &Value, version: i64) -> Lead {
    Lead {
        lead_id: id(3),
        project_id: id(1),
        process_id: id(2),
        reference_id: Some("r".into()),
        name: Some("Ada".into()),
        state: "won".into(),
        disposition: Some("price".into()),
        metadata: object(metadata),
        version,
        is_erased: false,
    }
}

const COMMAND: &str = r#"{"disposition":"price","apiKeyId":"090909090909090909090909"}"#;

fn row(position: LogPosition, decided_at: LogPosition, event: CompletionEvent) -> LedgerRow {
    LedgerRow {
        position,
        logged_at: at(10),
        text: COMMAND.into(),
        disposition: Some("price".into()),
        api_key_id: Some(id(9)),
        traceparent: Some("trace".into()),
        decided_at,
        event,
    }
}

fn entry(update_id: ObjectId, position: LogPosition) -> UpdateEntry {
    UpdateEntry {
        position,
        logged_at: at(10),
        project_id: id(1),
        update_id,
        command: Box::new(serde_json::from_str(COMMAND).unwrap()),
        text: COMMAND.into(),
        traceparent: Some("trace".into()),
    }
}

fn succeeded(update_id: ObjectId) -> CompletionEvent {
    CompletionEvent {
        process_id: Some(id(2)),
        lead_id: Some(id(3)),
        reference_id: Some("r".into()),
        from_state: Some("new".into()),
        to_state: Some("won".into()),
        version: Some(2),
        disposition: Some("price".into()),
        user_id: Some("user".into()),
        warnings: vec!["first".into(), "second".into()],
        data: Some(object(&json!({"n": 1}))),
        ..CompletionEvent::new(OutcomeKind::Update, id(1), update_id, at(11))
    }
}

fn failed(update_id: ObjectId) -> CompletionEvent {
    CompletionEvent {
        success: false,
        error: Some("no".into()),
        error_code: Some("refused".into()),
        disposition: None,
        warnings: vec![],
        data: None,
        version: None,
        ..succeeded(update_id)
    }
}

/// A lead that was updated by a queued and by a failed update, a call, and another queued update.
fn plan() -> Plan {
    Plan {
        leads: vec![Arc::new(lead(&json!({"n": 1}), 2))],
        calls: vec![(id(3), vec![Call { call_id: "call".into(), started_at: at(1), expires_at: at(100) }])],
        newly_queued: vec![Arc::new(QueuedUpdate { lead_id: id(3), update: entry(id(6), position(2, 9, 4)) })],
        rows: vec![
            row(position(1, 7, 0), position(2, 8, 1), succeeded(id(4))),
            row(position(2, 9, 3), position(2, 9, 3), failed(id(5))),
        ],
        ..Plan::default()
    }
}

async fn migrated() -> (Pool, impl Sized) {
    let postgres = test_support::postgres().await;
    let pool = pool(&DatabaseConfig { database_url: postgres.url(), database_connections: 4 }).unwrap();
    schema().migrate(&pool).await.unwrap();
    (pool, postgres)
}

/// A database with a lead, and a checkpoint at entry 7 of epoch 2.
async fn with_lead() -> (Pool, Checkpoint, impl Sized) {
    let (pool, postgres) = migrated().await;
    let setup = "
        INSERT INTO lead_state.projects VALUES (decode(repeat('01', 12), 'hex'), 'p', now());
        INSERT INTO lead_state.processes (project_id, name, process_id, config, revision)
            VALUES (decode(repeat('01', 12), 'hex'), 'p', decode(repeat('02', 12), 'hex'), '{}', 1);
        INSERT INTO lead_state.leads
                (lead_id, project_id, process_id, reference_id, state, metadata, version, created_at, updated_at)
            VALUES (decode(repeat('03', 12), 'hex'), decode(repeat('01', 12), 'hex'), decode(repeat('02', 12), 'hex'),
                    'r', 'new', '{}', 1, now(), now())";
    sqlx::raw_sql(setup).execute(&pool).await.unwrap();
    let mut connection = pool.acquire().await.unwrap();
    let first = checkpoint::load(&mut connection, "LOG", "created", at(0)).await.unwrap();
    let applied = position(2, 7, 0);
    let from = Checkpoint { applied, announced: position(2, 6, 2), delivered: position(1, 3, 1), ..first.clone() };
    assert!(checkpoint::replace(&mut connection, &first, &from, at(1)).await.unwrap());
    (pool, from, postgres)
}

async fn write_plan(pool: &Pool, from: &Checkpoint, plan: &Plan) -> Result<(), StoreError> {
    let (last, announced) = (position(2, 9, 5), position(2, 7, 0));
    let batch = Batch { from, last, logged_at: at(10), ends_message: false, revisions: &[(id(2), 1)], announced, plan };
    write(&mut PinnedConnection::new(pool.clone()), &batch, at(11)).await
}

async fn rows(pool: &Pool, table: &str, order: &str) -> Vec<Value> {
    let select = format!("SELECT to_jsonb(t) FROM lead_state.{table} t ORDER BY {order}");
    sqlx::query_scalar(AssertSqlSafe(select)).fetch_all(pool).await.unwrap()
}

#[tokio::test]
async fn a_batch_writes_every_column() {
    let (pool, from, _postgres) = with_lead().await;

    write_plan(&pool, &from, &plan()).await.unwrap();

    let hex = |byte: u8| format!("\\x{}", id(byte));
    let time = |seconds| at(seconds).to_iso().replace(".000Z", "+00:00");
    let command = json!({"disposition": "price", "apiKeyId": id(9)});
    let succeeded = json!({
        "project_id": hex(1), "update_id": hex(4), "log_epoch": 1, "log_sequence": 7, "log_index": 0, "logged_at": time(10),
        "lead_id": hex(3), "process_id": hex(2), "reference_id": "r", "command": command, "success": true, "error": null,
        "error_code": null, "from_state": "new", "to_state": "won", "disposition": "price", "version": 2, "user_id": "user",
        "api_key_id": hex(9), "warnings": ["first", "second"], "data": {"n": 1}, "traceparent": "trace",
        "applied_at": time(11), "decided_epoch": 2, "decided_sequence": 8, "decided_index": 1, "kind": "update",
        "counted": true,
        "call_facts": null,
    });
    let mut failed = succeeded.clone();
    for (column, value) in [
        ("update_id", json!(hex(5))),
        ("log_epoch", json!(2)),
        ("log_sequence", json!(9)),
        ("log_index", json!(3)),
        ("success", json!(false)),
        ("error", json!("no")),
        ("error_code", json!("refused")),
        ("version", json!(null)),
        ("warnings", json!([])),
        ("data", json!(null)),
        ("decided_epoch", json!(null)),
        ("decided_sequence", json!(null)),
        ("decided_index", json!(null)),
    ] {
        failed[column] = value;
    }
    assert_eq!(rows(&pool, "lead_updates", "update_id").await, [succeeded, failed]);
    let minute = at(10).to_iso().replace(":50.000Z", ":00+00:00");
    let count = |code: &str, id_month: &str| {
        json!({
            "project_id": hex(1), "minute": minute, "process_id": hex(2), "kind": "update", "code": code,
            "id_month": id_month, "updates": 1,
        })
    };
    let counts = [count("", "1972-02-01"), count("refused", "1972-09-01")];
    assert_eq!(rows(&pool, "update_counts", "code").await, counts);
    let calls = [
        json!({"lead_id": hex(3), "project_id": hex(1), "call_id": "call", "started_at": time(1), "expires_at": time(100)}),
    ];
    assert_eq!(rows(&pool, "active_calls", "call_id").await, calls);
    let queued = json!({
        "project_id": hex(1), "update_id": hex(6), "lead_id": hex(3), "log_epoch": 2, "log_sequence": 9, "log_index": 4,
        "logged_at": time(10), "command": command, "traceparent": "trace",
    });
    assert_eq!(rows(&pool, "queued_updates", "update_id").await, [queued]);
    let expected = Checkpoint {
        applied: position(2, 9, 5),
        last_logged_at: Some(at(10)),
        ends_message: false,
        announced: position(2, 7, 0),
        ..from
    };
    assert_eq!(checkpoint::get(&pool, "LOG").await.unwrap(), Some(expected));
}

#[tokio::test]
async fn a_written_batch_is_read_as_it_was_decided() {
    let (pool, from, _postgres) = with_lead().await;
    let plan = plan();

    write_plan(&pool, &from, &plan).await.unwrap();

    let keys = LeadKeys {
        leads: [id(3)].into(),
        references: [(id(2), "r".into())].into(),
        updates: [(id(1), id(4)), (id(1), id(6)), (id(1), id(7))].into(),
    };
    let mut connection = pool.acquire().await.unwrap();
    let state = batch_state::read(&mut connection, &keys, usize::MAX).await.unwrap().unwrap();
    assert_eq!(state.leads.values().collect::<Vec<_>>(), plan.leads.iter().collect::<Vec<_>>());
    assert_eq!(state.references.get(&(id(2), "r".into())), Some(&id(3)));
    assert_eq!(state.calls.get(&id(3)), Some(&plan.calls[0].1));
    assert_eq!(state.queued.get(&id(3)), Some(&plan.newly_queued));
    assert_eq!(ledger::duplicates(&pool, &keys).await.unwrap(), [(id(1), id(4))].into());
    assert_eq!(queued_updates::duplicates(&pool, &keys).await.unwrap(), [(id(1), id(6))].into());
    let announced = ledger::outbox(&pool, position(2, 7, 0), position(2, 9, 5), 10).await.unwrap();
    let announced: Vec<_> = announced.into_iter().map(|row| (row.decided_at, row.event)).collect();
    assert_eq!(announced, [(position(2, 8, 1), succeeded(id(4))), (position(2, 9, 3), failed(id(5)))]);
    assert_eq!(ledger::last_up_to(&pool, position(2, 9, 2)).await.unwrap(), Some(position(2, 8, 1)));
    let update = updates::find(&pool, id(1), id(4)).await.unwrap().unwrap();
    assert_eq!((update.log_sequence, update.version, update.data), (Some(7), Some(2), succeeded(id(4)).data));
    let history = updates::history_of_lead(&pool, id(1), id(3), Some(position(2, 9, 3)), 10).await.unwrap();
    assert_eq!(history.iter().map(|entry| entry.update_id).collect::<Vec<_>>(), [id(4)]);
}

#[tokio::test]
async fn a_batch_by_an_old_checkpoint_or_old_rules_or_with_a_duplicate_writes_nothing() {
    let (pool, from, _postgres) = with_lead().await;
    let current = Checkpoint { applied: position(2, 9, 5), ..from.clone() };
    write_plan(&pool, &from, &plan()).await.unwrap();
    let written = rows(&pool, "lead_updates", "update_id").await;
    let counted = rows(&pool, "update_counts", "code").await;
    let other = || Plan { rows: vec![], newly_queued: vec![], ..plan() };

    assert!(matches!(write_plan(&pool, &from, &other()).await, Err(StoreError::Fenced)));
    assert!(matches!(write_plan(&pool, &current, &plan()).await, Err(StoreError::Duplicate)));
    sqlx::query("UPDATE lead_state.processes SET revision = 2").execute(&pool).await.unwrap();
    assert!(matches!(write_plan(&pool, &current, &other()).await, Err(StoreError::Fenced)));

    assert_eq!(rows(&pool, "lead_updates", "update_id").await, written);
    assert_eq!(rows(&pool, "update_counts", "code").await, counted);
    assert_eq!(checkpoint::get(&pool, "LOG").await.unwrap().unwrap().applied, current.applied);
}

#[tokio::test]
async fn counts_of_a_minute_grow_with_each_batch() {
    let (pool, from, _postgres) = with_lead().await;
    write_plan(&pool, &from, &Plan { newly_queued: vec![], calls: vec![], ..plan() }).await.unwrap();
    let next = Checkpoint { applied: position(2, 9, 5), ..from };
    let mut of_the_same_month = [4; 12];
    of_the_same_month[11] = 5;
    let rows = [ObjectId::from_bytes(of_the_same_month), id(7)]
        .map(|id| row(position(2, 9, 6), position(2, 9, 6), succeeded(id)))
        .into();
    let plan = Plan { rows, ..Plan::default() };

    let batch = Batch {
        from: &next,
        last: position(2, 9, 7),
        logged_at: at(10),
        ends_message: true,
        revisions: &[],
        announced: next.announced,
        plan: &plan,
    };
    write(&mut PinnedConnection::new(pool.clone()), &batch, at(12)).await.unwrap();

    let select = "SELECT code, sum(updates)::bigint FROM lead_state.update_counts GROUP BY 1 ORDER BY 1";
    let counts: Vec<(String, i64)> = sqlx::query_as(select).fetch_all(&pool).await.unwrap();
    assert_eq!(counts, [(String::new(), 3), ("refused".to_owned(), 1)]);
}

#[tokio::test]
async fn a_corrupt_row_is_named_with_table_column_and_id() {
    let (pool, from, _postgres) = with_lead().await;
    write_plan(&pool, &from, &plan()).await.unwrap();
    sqlx::query("UPDATE lead_state.queued_updates SET command = '[]'").execute(&pool).await.unwrap();

    let error = queued_updates::find(&pool, id(1), id(6)).await.unwrap_err().to_string();

    assert!(error.starts_with(&format!("corrupt row in lead_state.queued_updates: command of {}: ", id(6))), "{error}");
}

#[tokio::test]
async fn a_schema_of_an_earlier_version_is_rejected_with_the_remedy() {
    let (pool, _postgres) = migrated().await;
    assert_eq!(schema().missing_migrations(&pool).await.unwrap(), Vec::<i64>::new());
    sqlx::query(r"UPDATE lead_state._sqlx_migrations SET checksum = '\x00'").execute(&pool).await.unwrap();

    let (migrated, pending) = (schema().migrate(&pool).await, schema().missing_migrations(&pool).await);

    assert!(matches!(pending, Err(SchemaError::Outdated("lead_state"))), "{pending:?}");
    let error = migrated.unwrap_err().to_string();
    assert!(error.contains("earlier version") && error.contains("rm -r .leadrelay"), "{error}");
}
