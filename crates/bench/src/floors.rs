//! The floors: the least code that does the same job as a service, each in its own process.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, pull},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use clap::Subcommand;
use contract::ObjectId;
use futures::StreamExt;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::value::RawValue;
use service_kit::config::NatsConfig;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::load::{lead_id, random_lead, update_body};

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Floor {
    /// Parse bodies, publish them to JetStream, and await each ack.
    Gateway { nats: String, listen: SocketAddr, stream: String },
    /// Read a stream from its start without acks; print messages per second.
    Read { nats: String, stream: String },
    /// Write batches of 500 updates with lead-state's statements only; print updates per second.
    Apply { postgres: String, leads: u64, seconds: u64 },
    /// Write each update in its own transaction, on 16 connections; print updates per second.
    OneByOne { postgres: String, leads: u64, seconds: u64 },
    /// Sign and post on 64 connections; print posts per second.
    Client { endpoint: SocketAddr, seconds: u64 },
}

impl Floor {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let rate = match self {
            Self::Gateway { nats, listen, stream } => return gateway(&nats, listen, stream).await,
            Self::Read { nats, stream } => read(&nats, &stream).await?,
            Self::Apply { postgres, leads, seconds } => apply(&postgres, leads, Duration::from_secs(seconds)).await?,
            Self::OneByOne { postgres, leads, seconds } => {
                one_by_one(&postgres, leads, Duration::from_secs(seconds)).await?
            }
            Self::Client { endpoint, seconds } => client(endpoint, Duration::from_secs(seconds)).await?,
        };
        println!("{rate}");
        Ok(())
    }
}

async fn connect(nats: &str) -> anyhow::Result<jetstream::Context> {
    let client = service_kit::nats::connect(&NatsConfig::at(nats), "leadctl", &Default::default()).await?;
    Ok(service_kit::nats::jetstream(&client))
}

/// The fields that must be parsed before an update can be accepted.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Update<'a> {
    #[serde(borrow)]
    lead_id: &'a str,
    #[serde(borrow)]
    metadata: &'a RawValue,
}

async fn gateway(nats: &str, listen: SocketAddr, stream: String) -> anyhow::Result<()> {
    let js = connect(nats).await?;
    let subject: async_nats::Subject = stream.clone().into();
    js.get_or_create_stream(jetstream::stream::Config {
        name: stream.clone(),
        subjects: vec![stream],
        ..Default::default()
    })
    .await?;
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (js, subject) = (js.clone(), subject.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let (js, subject) = (js.clone(), subject.clone());
            async move {
                let body = request.into_body().collect().await?.to_bytes();
                let update: Update<'_> = serde_json::from_slice(&body)?;
                ensure!(
                    update.lead_id.len() == 24 && update.metadata.get().starts_with('{'),
                    "leadId or metadata is invalid"
                );
                js.publish(subject, body).await?.await?;
                anyhow::Ok(Response::new(Full::new(Bytes::from_static(
                    br#"{"success":true,"message":"Lead update initiated"}"#,
                ))))
            }
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn read(nats: &str, stream: &str) -> anyhow::Result<f64> {
    let mut stream = connect(nats).await?.get_stream(stream).await?;
    let messages = stream.info().await?.state.messages;
    let consumer = stream
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::None,
            memory_storage: true,
            ..Default::default()
        })
        .await?;
    let start = Instant::now();
    let mut received = consumer.stream().max_messages_per_batch(4096).messages().await?.take(messages as usize);
    let mut bytes = 0;
    while let Some(message) = received.next().await {
        bytes += message?.payload.len();
    }
    ensure!(bytes > 0, "the stream is empty");
    Ok(messages as f64 / start.elapsed().as_secs_f64())
}

/// The ids of the project and the process of the leads.
async fn project_and_process(connection: &mut PgConnection) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    Ok(sqlx::query_as("SELECT project_id, process_id FROM lead_state.leads LIMIT 1").fetch_one(connection).await?)
}

/// The columns that a batch of updates writes.
#[derive(Default)]
struct Rows {
    leads: Vec<[u8; 12]>,
    updates: Vec<[u8; 12]>,
    sequences: Vec<i64>,
    commands: Vec<String>,
    states: Vec<&'static str>,
    metadata: Vec<String>,
}

impl Rows {
    /// Updates of different leads, distributed like the driver's.
    fn random(count: usize, leads: u64, sequence: &AtomicU64) -> Self {
        let mut rows = Self::default();
        let mut seen = std::collections::HashSet::new();
        while rows.leads.len() < count {
            let lead = random_lead(leads);
            if !seen.insert(lead) {
                continue;
            }
            let tag = sequence.fetch_add(1, Relaxed);
            let command = update_body(lead, tag);
            let update = ObjectId::new(service_kit::clock::now(), rand::random());
            rows.leads.push(*lead_id(lead).as_bytes());
            rows.updates.push(*update.as_bytes());
            rows.sequences.push(tag.cast_signed());
            rows.states.push("interested");
            rows.metadata.push(format!(r#"{{"source":"import","city":"Berlin","tag":"{tag:012}","campaign":"autumn","score":1,"note":"asked for an offer, call back on thursday afternoon"}}"#));
            rows.commands.push(command);
        }
        rows
    }

    async fn write(&self, connection: &mut PgConnection, project: &[u8], process: &[u8]) -> sqlx::Result<()> {
        let mut transaction = connection.begin().await?;
        sqlx::query("UPDATE floor.checkpoint SET last_seq = $1")
            .bind(self.sequences.last())
            .execute(&mut *transaction)
            .await?;
        self.write_rows(&mut transaction, project, process).await?;
        transaction.commit().await
    }

    async fn write_rows(&self, transaction: &mut PgConnection, project: &[u8], process: &[u8]) -> sqlx::Result<()> {
        sqlx::query(
            r#"UPDATE lead_state.leads AS l
               SET state = n.state, metadata = n.metadata::json, version = l.version + 1, updated_at = now()
               FROM unnest($1::bytea[], $2::text[], $3::text[]) AS n (lead_id, state, metadata)
               WHERE l.lead_id = n.lead_id"#,
        )
        .bind(&self.leads)
        .bind(&self.states)
        .bind(&self.metadata)
        .execute(&mut *transaction)
        .await?;
        sqlx::query(
            r#"INSERT INTO lead_state.lead_updates
                   (project_id, update_id, log_epoch, log_sequence, log_index, logged_at, lead_id, process_id, command, success,
                    from_state, to_state, version, user_id, warnings, data, applied_at)
               SELECT $1, n.update_id, 0, n.log_sequence, 0, now(), n.lead_id, $2, n.command::json, true,
                      n.state, n.state, 1, 'agent-0042', '{}', n.metadata::json, now()
               FROM unnest($3::bytea[], $4::bytea[], $5::bigint[], $6::text[], $7::text[], $8::text[])
                   AS n (update_id, lead_id, log_sequence, command, state, metadata)"#,
        )
        .bind(project)
        .bind(process)
        .bind(&self.updates)
        .bind(&self.leads)
        .bind(&self.sequences)
        .bind(&self.commands)
        .bind(&self.states)
        .bind(&self.metadata)
        .execute(&mut *transaction)
        .await?;
        Ok(())
    }
}

async fn apply(postgres: &str, leads: u64, duration: Duration) -> anyhow::Result<f64> {
    let mut connection = PgConnection::connect(postgres).await?;
    let (project, process) = project_and_process(&mut connection).await?;
    sqlx::raw_sql(
        "CREATE SCHEMA IF NOT EXISTS floor; CREATE TABLE IF NOT EXISTS floor.checkpoint (last_seq bigint);
         TRUNCATE floor.checkpoint; INSERT INTO floor.checkpoint VALUES (0)",
    )
    .execute(&mut connection)
    .await?;
    let sequence = AtomicU64::new(1);
    let (start, mut written) = (Instant::now(), 0);
    while start.elapsed() < duration {
        let rows = Rows::random(500, leads, &sequence);
        rows.write(&mut connection, &project, &process).await?;
        written += rows.leads.len();
    }
    Ok(written as f64 / start.elapsed().as_secs_f64())
}

async fn one_by_one(postgres: &str, leads: u64, duration: Duration) -> anyhow::Result<f64> {
    let pool = PgPool::connect(postgres).await?;
    let (project, process) = project_and_process(&mut *pool.acquire().await?).await?;
    let (project, process) = (Arc::new(project), Arc::new(process));
    let sequence = Arc::new(AtomicU64::new(1));
    let mut writers = JoinSet::new();
    let start = Instant::now();
    for _ in 0..16 {
        let mut connection = PgConnection::connect(postgres).await?;
        let (project, process, sequence) = (project.clone(), process.clone(), sequence.clone());
        writers.spawn(async move {
            let mut written = 0_u64;
            while start.elapsed() < duration {
                let rows = Rows::random(1, leads, &sequence);
                let mut transaction = connection.begin().await?;
                sqlx::query("SELECT state, metadata::text FROM lead_state.leads WHERE lead_id = $1 FOR UPDATE")
                    .bind(rows.leads[0])
                    .execute(&mut *transaction)
                    .await?;
                rows.write_rows(&mut transaction, &project, &process).await?;
                transaction.commit().await?;
                written += 1;
            }
            anyhow::Ok(written)
        });
    }
    let mut written = 0;
    while let Some(count) = writers.join_next().await {
        written += count??;
    }
    Ok(written as f64 / start.elapsed().as_secs_f64())
}

/// A body of the same size as the webhooks of the scenarios.
fn webhook_body(tag: u64) -> String {
    format!(
        r#"{{"action_type":"update","updateId":"{}","success":true,"error":null,"leadId":"{}","referenceId":"crm-1","timestamp":1768193759048,"data":{{"source":"import","city":"Berlin","tag":"{tag:012}","campaign":"autumn","score":1,"note":"asked for an offer, call back on thursday afternoon"}}}}"#,
        lead_id(tag),
        lead_id(1)
    )
}

async fn client(endpoint: SocketAddr, duration: Duration) -> anyhow::Result<f64> {
    let posted = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..64 {
        let posted = posted.clone();
        clients.spawn(async move {
            let stream = TcpStream::connect(endpoint).await?;
            stream.set_nodelay(true)?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let key = Hmac::<sha2::Sha256>::new_from_slice(&[7; 32]).context("cannot create the signing key")?;
            while start.elapsed() < duration {
                let tag = posted.fetch_add(1, Relaxed);
                let (id, body) = (lead_id(tag).to_string(), webhook_body(tag));
                let timestamp = service_kit::clock::now().unix_seconds();
                let mut mac = key.clone();
                mac.update(format!("{id}.{timestamp}.").as_bytes());
                mac.update(body.as_bytes());
                let signature = format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()));
                let request = Request::post("/crm")
                    .header("host", endpoint.to_string())
                    .header("content-type", "application/json")
                    .header("user-agent", "floor")
                    .header("webhook-id", id)
                    .header("webhook-timestamp", timestamp)
                    .header("webhook-signature", signature)
                    .body(Full::new(Bytes::from(body)))?;
                let response = sender.send_request(request).await?;
                ensure!(response.status().is_success(), "{}", response.status());
                response.into_body().collect().await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }
    Ok(posted.load(Relaxed) as f64 / start.elapsed().as_secs_f64())
}
