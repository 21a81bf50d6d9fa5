//! 1 Accept: the messages of producers on NATS.
//!
//! A producer has a NATS account of its own, so its messages reach the services only as requests to
//! `leads.intake.{projectId}.…`, and only this module reads them, regardless of their headers and reply subjects. A
//! message is checked, admitted and turned into a command like an HTTP request. Once the log has the command, the
//! gateway replies as JetStream does, so that any JetStream client can publish.
//!
//! Each project has a subscription and a queue of its own, bounded in messages and bytes, and the subscriptions have a
//! connection of their own: a producer that floods loses its own messages and does not delay those of other projects.
//! All producers of a project together have the rate of one API key. The messages of a project are logged in the order
//! in which this gateway received them.

mod entry;

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use async_nats::{Client, Message, Subscriber};
use bytes::Bytes;
use contract::{ObjectId, position::LogPosition, streams::LEAD_COMMANDS, subject};
use futures::StreamExt;
use serde_json::json;
use service_kit::{clock, config::NatsConfig, health::Readiness, nats, publisher::Stored};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::PATIENCE,
    app::App,
    command_log::LogForm,
    error::{ApiError, whole_seconds},
};

/// The name of the subscriptions in `/readyz`.
pub(crate) const RESOURCE: &str = "intake";
/// Gateways share the messages: each message goes to one of them.
const QUEUE_GROUP: &str = "gateway";
/// Most messages of a project in the buffer of the NATS client. Each is moved to the project's queue, or refused, as
/// soon as it arrives.
const SUBSCRIPTION_MESSAGES: usize = 1024;
/// Most messages of a project that wait to be logged. A smaller queue refuses producers that publish many messages
/// without waiting for acks: clients allow 4000 unacked messages by default.
const QUEUE_MESSAGES: usize = 4096;
/// Most bytes of messages of a project that wait to be logged.
const QUEUE_BYTES: usize = 4 << 20;
/// Most messages that are published together. Larger groups delay acks; smaller ones sync the log more often.
const GROUP_MESSAGES: usize = 256;
/// How often the list of projects is read. A new project's producers are served from the next read on.
const REFRESH: Duration = Duration::from_secs(1);
/// How long a gateway that stops still accepts messages that are on their way to it.
const DRAIN: Duration = Duration::from_secs(1);
/// The gateway's error codes are 20000 plus the HTTP status. JetStream's own codes begin at 10000.
const ERROR_CODES: u32 = 20_000;

/// Serves the producers of every project that has an API key, and follows how far the log is applied, until shutdown.
pub(crate) async fn run(
    app: Arc<App>,
    config: NatsConfig,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let client = tokio::select! {
        client = nats::connect_again(&config, "gateway", SUBSCRIPTION_MESSAGES) => client?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let applied = client.subscribe(subject::APPLIED).await.context("cannot subscribe to the progress of the log")?;
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_applied(app.clone(), applied, shutdown.clone()));
    let mut served = HashMap::new();
    loop {
        if app.keys.is_complete() {
            serve_projects(&app, &client, &mut served, &mut tasks, &shutdown).await?;
            readiness.ready(RESOURCE);
        }
        tokio::select! {
            () = tokio::time::sleep(REFRESH) => {}
            Some(ended) = tasks.join_next() => ended.context("a task of the intake panicked")??,
            () = shutdown.cancelled() => break,
        }
    }
    while let Some(ended) = tasks.join_next().await {
        ended.context("a task of the intake panicked")??;
    }
    nats::flush(&client).await;
    Ok(())
}

/// Starts to serve new projects, and stops serving those without an API key.
async fn serve_projects(
    app: &Arc<App>,
    client: &Client,
    served: &mut HashMap<ObjectId, CancellationToken>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let known: HashSet<ObjectId> = app.keys.all().iter().map(|key| key.project_id).collect();
    served.retain(|project_id, stop| {
        let keep = known.contains(project_id);
        if !keep {
            stop.cancel();
        }
        keep
    });
    let new: Vec<_> = known.into_iter().filter(|project_id| !served.contains_key(project_id)).collect();
    for project_id in &new {
        let messages = client.queue_subscribe(subject::intake_of(*project_id), QUEUE_GROUP.into()).await;
        let stop = shutdown.child_token();
        let project = ProjectIntake { app: app.clone(), client: client.clone(), project_id: *project_id };
        tasks.spawn(project.serve(messages.context("cannot subscribe to a project's producers")?, stop.clone()));
        served.insert(*project_id, stop);
    }
    if !new.is_empty() {
        // Without a connection, the client subscribes once it is connected.
        let _ = timeout(REFRESH, client.flush()).await;
    }
    Ok(())
}

async fn follow_applied(app: Arc<App>, mut applied: Subscriber, shutdown: CancellationToken) -> anyhow::Result<()> {
    while let Some(Some(report)) = shutdown.run_until_cancelled(applied.next()).await {
        match serde_json::from_slice::<LogPosition>(&report.payload) {
            Ok(applied) => app.command_log.admission.record_applied(applied),
            Err(e) => tracing::warn!("the progress of the log cannot be read: {e}"),
        }
    }
    if shutdown.is_cancelled() { Ok(()) } else { bail!("the subscription to the progress of the log ended") }
}

/// The producers of one project.
struct ProjectIntake {
    app: Arc<App>,
    client: Client,
    project_id: ObjectId,
}

/// A message that waits to be logged. Its bytes count until it is answered.
struct Queued {
    message: Message,
    received: Instant,
    _bytes: OwnedSemaphorePermit,
}

impl ProjectIntake {
    async fn serve(self, messages: Subscriber, stop: CancellationToken) -> anyhow::Result<()> {
        let (queue, queued) = mpsc::channel(QUEUE_MESSAGES);
        let (received, ()) = tokio::join!(self.receive(messages, queue, stop), self.append(queued));
        received
    }

    /// Queues messages as they arrive. Refuses a message at once if the queue has no room for it.
    async fn receive(
        &self,
        mut messages: Subscriber,
        queue: mpsc::Sender<Queued>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let bytes = Arc::new(Semaphore::new(QUEUE_BYTES));
        while let Some(message) = stop.run_until_cancelled(messages.next()).await {
            let Some(message) = message else { bail!("the subscription to a project's producers ended") };
            self.enqueue(message, &queue, &bytes).await;
        }
        let rest = async {
            messages.drain().await?;
            while let Some(message) = messages.next().await {
                self.enqueue(message, &queue, &bytes).await;
            }
            anyhow::Ok(())
        };
        // Producers resend messages that got no reply.
        let _ = timeout(DRAIN, rest).await;
        Ok(())
    }

    async fn enqueue(&self, message: Message, queue: &mpsc::Sender<Queued>, bytes: &Arc<Semaphore>) {
        let max_bytes = self.app.max_body_bytes;
        let reply = message.reply.clone();
        let queued = if message.payload.len() > max_bytes {
            Err(ApiError::BodyTooLarge(max_bytes))
        } else {
            // One message always fits.
            let size = u32::try_from(message.length.min(QUEUE_BYTES)).unwrap_or(u32::MAX);
            let permit = bytes.clone().try_acquire_many_owned(size).map_err(|_| ApiError::ProjectBacklog);
            permit.and_then(|permit| {
                queue
                    .try_send(Queued { message, received: Instant::now(), _bytes: permit })
                    .map_err(|_| ApiError::ProjectBacklog)
            })
        };
        if let Err(e) = queued {
            self.answer(reply, Err(e)).await;
        }
    }

    /// Logs the queued messages in order, one group at a time.
    async fn append(&self, mut queued: mpsc::Receiver<Queued>) {
        let max = self.app.rates.max_updates().map_or(GROUP_MESSAGES, |max| GROUP_MESSAGES.min(max.get() as usize));
        let mut group = Vec::new();
        while queued.recv_many(&mut group, max).await > 0 {
            // Their producers take them for lost soon, and send them again.
            let late = group.iter().take_while(|queued| queued.received.elapsed() > PATIENCE).count();
            for Queued { message, .. } in group.drain(..late) {
                self.answer(message.reply, Err(ApiError::ProjectBacklog)).await;
            }
            let outcomes = match self.wait_for_rate(&group).await {
                Ok(()) => self.append_group(&group).await,
                Err(e) => vec![Err(e); group.len()],
            };
            for (Queued { message, .. }, outcome) in group.drain(..).zip(outcomes) {
                self.answer(message.reply, outcome).await;
            }
        }
    }

    /// Waits until the rate of the project's producers admits these messages. Fails if the first one would wait longer
    /// than [`PATIENCE`].
    async fn wait_for_rate(&self, group: &[Queued]) -> Result<(), ApiError> {
        let Some(first) = group.first() else { return Ok(()) };
        let Some(count) = u32::try_from(group.len()).ok().and_then(NonZeroU32::new) else { return Ok(()) };
        while let Some(wait) = self.app.rates.take_updates(self.project_id, count) {
            if first.received.elapsed() + wait > PATIENCE {
                return Err(ApiError::RateLimited(whole_seconds(wait)));
            }
            sleep(wait).await;
        }
        Ok(())
    }

    async fn append_group(&self, group: &[Queued]) -> Vec<Result<Stored, ApiError>> {
        let entries: Vec<_> = group
            .iter()
            .map(|Queued { message, .. }| entry::parse(message, self.project_id, clock::new_id(), clock::now()))
            .collect();
        let valid: Vec<_> = entries.iter().flatten().cloned().collect();
        let deadline = group.first().map_or_else(Instant::now, |first| first.received + PATIENCE);
        let appended = match self.app.broker() {
            Ok(broker) => {
                let log = &self.app.command_log;
                log.append_all(&broker.commands, self.project_id, valid, None, LogForm::Messages, deadline).await
            }
            Err(e) => vec![Err(e); valid.len()],
        };
        let mut appended = appended.into_iter();
        let outcome = |entry: Result<_, _>| entry.and_then(|_| appended.next().unwrap_or(Err(ApiError::Internal)));
        entries.into_iter().map(outcome).collect()
    }

    async fn answer(&self, reply: Option<async_nats::Subject>, outcome: Result<Stored, ApiError>) {
        if let Err(e) = &outcome {
            self.app.metrics.count_refusal(e.label());
            tracing::debug!(project_id = %self.project_id, "a producer's message is refused: {e}");
        }
        let Some(reply) = reply else { return };
        if let Err(e) = self.client.publish(reply, acknowledgement(&outcome)).await {
            tracing::debug!("cannot answer a producer: {e}");
        }
    }
}

/// The reply to a producer, in the form of JetStream's reply to a publish.
fn acknowledgement(outcome: &Result<Stored, ApiError>) -> Bytes {
    let answer = match outcome {
        Ok(stored) if stored.is_duplicate => {
            json!({"stream": LEAD_COMMANDS, "seq": stored.sequence, "duplicate": true})
        }
        Ok(stored) => json!({"stream": LEAD_COMMANDS, "seq": stored.sequence}),
        Err(e) => {
            let status = e.status().as_u16();
            let description = format!("{}: {e}", e.code());
            let error =
                json!({"code": status, "err_code": ERROR_CODES + u32::from(status), "description": description});
            json!({"stream": LEAD_COMMANDS, "seq": 0, "error": error})
        }
    };
    answer.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_to_producers_have_the_form_of_jetstream() {
        let stored = Stored { sequence: 7, is_duplicate: false };
        let answers = [
            Ok(stored),
            Ok(Stored { is_duplicate: true, ..stored }),
            Err(ApiError::ProjectBacklog),
            Err(ApiError::field("name", "must be a string")),
        ];
        let texts = answers.map(|outcome| String::from_utf8(acknowledgement(&outcome).to_vec()).unwrap());
        insta::assert_snapshot!(texts.join("\n"));
    }
}
