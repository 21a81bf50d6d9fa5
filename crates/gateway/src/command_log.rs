//! 1 Accept: publishes commands to the command log. An update is accepted once JetStream has acked it, and not before.
//!
//! Commands of HTTP clients share messages ([`Packer`]). A producer's command is a message of its own: its
//! deduplication id is the producer's, and the producer receives its sequence.
//!
//! A client may hang up at any time, and hyper then drops its handler at any await. While
//! [`append`](CommandLog::append) waits for admission, nothing is published yet. An admitted command is published in a
//! task of its own, which holds the in-flight permit and waits for the ack even if the client is gone. So no ack is
//! dropped and no permit is leaked. Shutdown waits for these tasks.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use contract::{
    ObjectId, command,
    pack::PackedCommand,
    subject::{CommandKind, CommandSubject},
};
use futures::future::{Either, join_all};
use service_kit::{
    metrics::Histogram,
    publish::{self, PublishError},
    publisher::{Publisher, Stored},
    shares::Pool,
    traces::{Step, Traces},
};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::{
    admission::{Admission, PATIENCE, Work},
    command::Command,
    error::{ApiError, SharedPool},
    outage::Outage,
    packer::{Outcome, Packer, WaitingCommand},
    work_budget::WorkBudget,
};

/// How long a group waits for its share of the groups in flight.
const MAX_GROUP_WAIT: Duration = Duration::from_secs(15);
/// Most groups of commands that are being published at once, with a share per project.
const MAX_GROUPS: usize = 16;

/// How commands that are published together are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogForm {
    /// In packs, together with other waiting commands.
    Packs,
    /// Each as a message of its own.
    Messages,
}

/// A command, to be published.
#[derive(Debug, Clone)]
pub(crate) struct LogEntry {
    pub(crate) kind: CommandKind,
    /// The id of the update, call event or erasure.
    pub(crate) id: ObjectId,
    /// Its deduplication id in the log, if it is a message of its own.
    pub(crate) message_id: String,
    /// Its own trace, if it has one.
    pub(crate) traceparent: Option<String>,
    pub(crate) payload: Bytes,
}

impl LogEntry {
    /// A command of this project, with this id.
    pub(crate) fn new(project_id: ObjectId, id: ObjectId, command: &Command) -> Result<Self, ApiError> {
        let payload = serde_json::to_vec(command).map_err(|e| internal(&e))?.into();
        let message_id = command::message_id(project_id, id);
        Ok(Self { kind: command.kind().into(), id, message_id, traceparent: None, payload })
    }
}

#[derive(Debug)]
pub(crate) struct CommandLog {
    /// Limits each project's unapplied work in the log.
    pub(crate) admission: Arc<Admission>,
    /// Limits the work that each project's updates cause.
    pub(crate) budget: WorkBudget,
    groups: Arc<Pool<ObjectId>>,
    in_flight: Arc<Pool<ObjectId>>,
    publishing: TaskTracker,
    /// Whether the log accepts updates.
    pub(crate) outage: Arc<Outage>,
    packer: Packer,
    traces: Traces,
}

impl CommandLog {
    /// `pack_sizes` records the number of commands per message.
    pub(crate) fn new(max_in_flight: usize, budget: WorkBudget, pack_sizes: Histogram, traces: Traces) -> Self {
        let outage = Arc::new(Outage::new("the command log", "updates"));
        Self {
            admission: Arc::default(),
            budget,
            groups: Pool::new(MAX_GROUPS),
            in_flight: Pool::new(max_in_flight),
            publishing: TaskTracker::new(),
            packer: Packer::new(outage.clone(), pack_sizes),
            outage,
            traces,
        }
    }

    /// Publishes a command and waits for the ack. While the log has no leader, waits until the deadline of a request
    /// that began at `began`.
    pub(crate) async fn append(
        &self,
        commands: &Publisher,
        project_id: ObjectId,
        entry: LogEntry,
        traceparent: &str,
        began: Instant,
    ) -> Result<(), ApiError> {
        let LogEntry { kind, id: update_id, message_id, payload, .. } = entry;
        // Comes first because it may wait: other requests can use the permit and the budget meanwhile.
        let admitted = self.admission.admit(project_id, Work::of([&payload[..]]), PATIENCE).await?;
        let permit = self.in_flight.try_acquire(project_id);
        let permit = permit.map_err(|e| ApiError::ShareUsed(SharedPool::InFlight, e))?;
        self.budget.admit(project_id, 1, Instant::now()).map_err(ApiError::WorkLimited)?;
        let subject = CommandSubject { project_id, kind }.to_string();
        let mut span = self.traces.begin(Step::Publish, Some(traceparent));
        span.update(update_id);
        let own = span.traceparent();
        let traceparent = Some(own.unwrap_or_else(|| traceparent.to_owned()));
        let command = PackedCommand { subject, traceparent, payload };
        let waiting = WaitingCommand { command, message_id, began };
        let outcomes = self.packer.publish(commands, &self.publishing, project_id, [waiting]);
        let publish = async move {
            let mut published = outcomes_of(outcomes).await;
            let published = published.pop().unwrap_or(Err(PublishError::Unconfirmed));
            drop(permit);
            admitted.published(published.as_ref().ok().map(|stored| stored.sequence));
            if let Err(e) = &published {
                span.fail(refusal(e, update_id).code().to_owned(), e);
            }
            match &published {
                Ok(stored) => {
                    span.note(|| [("leadrelay.log.sequence", (stored.sequence as i64).into())]);
                    tracing::debug!(%update_id, %project_id, sequence = stored.sequence, "update accepted");
                }
                Err(e) => tracing::debug!(%update_id, %project_id, "update not accepted: {e}"),
            }
            published
        };
        match self.publishing.spawn(publish.in_current_span()).await {
            Ok(published) => {
                self.budget.take_back(project_id, without_work([&published]), Instant::now());
                published.map(drop).map_err(|e| refusal(&e, update_id))
            }
            Err(e) => Err(internal(&e)),
        }
    }

    /// Publishes commands in this order, waits for their acks, and returns the result of each. Waits for the project's
    /// budget and its backlog until the deadline, and then for its share of the groups in flight and for a leader of
    /// the log. Commands without a trace of their own get the trace of their request.
    pub(crate) async fn append_all(
        &self,
        commands: &Publisher,
        project_id: ObjectId,
        entries: Vec<LogEntry>,
        traceparent: Option<&str>,
        form: LogForm,
        deadline: Instant,
    ) -> Vec<Result<Stored, ApiError>> {
        if entries.is_empty() {
            return Vec::new();
        }
        while let Err(wait) = self.budget.admit(project_id, entries.len(), Instant::now()) {
            if Instant::now() + wait > deadline {
                return vec![Err(ApiError::WorkLimited(wait)); entries.len()];
            }
            tokio::time::sleep(wait).await;
        }
        let ids: Vec<ObjectId> = entries.iter().map(|entry| entry.id).collect();
        let work = Work::of(entries.iter().map(|entry| &entry.payload[..]));
        let admit = async {
            let admitted =
                self.admission.admit(project_id, work, deadline.saturating_duration_since(Instant::now())).await?;
            // While the log has no leader, the groups in flight wait for one.
            let permit = timeout(MAX_GROUP_WAIT, self.groups.acquire(project_id)).await;
            Ok((admitted, permit.map_err(|_| ApiError::ProjectBacklog)?))
        };
        let (admitted, permit) = match admit.await {
            Ok(admitted) => admitted,
            Err(e) => {
                self.budget.take_back(project_id, ids.len(), Instant::now());
                return vec![Err(e); ids.len()];
            }
        };
        // One span for all of them: they are published together.
        let mut span = self.traces.begin(Step::Publish, traceparent);
        span.note(|| [("messaging.batch.message_count", (ids.len() as i64).into())]);
        let own = span.traceparent();
        let traceparent = traceparent.map(|requests| own.unwrap_or_else(|| requests.to_owned()));
        let began = Instant::now();
        let waiting = entries.into_iter().map(|entry| {
            let LogEntry { kind, message_id, traceparent: entrys, payload, .. } = entry;
            let subject = CommandSubject { project_id, kind }.to_string();
            let command = PackedCommand { subject, traceparent: entrys.or_else(|| traceparent.clone()), payload };
            WaitingCommand { command, message_id, began }
        });
        let published = match form {
            LogForm::Packs => {
                let outcomes = self.packer.publish(commands, &self.publishing, project_id, waiting);
                Either::Left(outcomes_of(outcomes))
            }
            LogForm::Messages => {
                let publish = publish_messages(commands.clone(), waiting.collect(), self.outage.clone(), began);
                Either::Right(publish)
            }
        };
        let publish = async move {
            let published = published.await;
            drop(permit);
            let accepted = published.iter().flatten().count();
            admitted.published(published.iter().flatten().map(|stored| stored.sequence).max());
            tracing::debug!(%project_id, updates = accepted, of = published.len(), "updates accepted");
            if let Some(e) = first_refusal(&published) {
                span.fail("not_published", e);
            }
            published
        };
        match self.publishing.spawn(publish.in_current_span()).await {
            Ok(published) => {
                self.budget.take_back(project_id, without_work(&published), Instant::now());
                published.into_iter().zip(ids).map(|(one, id)| one.map_err(|e| refusal(&e, id))).collect()
            }
            Err(e) => vec![Err(internal(&e)); ids.len()],
        }
    }

    /// Waits until nothing is in flight. Called after the last request.
    pub(crate) async fn drained(&self) {
        self.publishing.close();
        self.publishing.wait().await;
    }
}

/// Counts the commands that cause no work because they are not in the log, or were in it before. Unconfirmed commands
/// may be in the log, and are not counted.
fn without_work<'a>(published: impl IntoIterator<Item = &'a Result<Stored, PublishError>>) -> usize {
    let causes_none = |published: &&Result<Stored, PublishError>| match published {
        Ok(stored) => stored.is_duplicate,
        Err(e) => *e != PublishError::Unconfirmed,
    };
    published.into_iter().filter(causes_none).count()
}

async fn outcomes_of(outcomes: Vec<Outcome>) -> Vec<Result<Stored, PublishError>> {
    join_all(outcomes).await.into_iter().map(|outcome| outcome.unwrap_or(Err(PublishError::Unconfirmed))).collect()
}

/// Publishes commands in this order, each as a message of its own.
async fn publish_messages(
    commands: Publisher,
    waiting: Vec<WaitingCommand>,
    outage: Arc<Outage>,
    began: Instant,
) -> Vec<Result<Stored, PublishError>> {
    let message = |place: usize| {
        let WaitingCommand { command: PackedCommand { subject, traceparent, payload }, message_id, .. } =
            &waiting[place];
        publish::message(subject.clone(), message_id, traceparent.as_deref(), payload.clone())
    };
    let published = commands.publish_each_until(waiting.len(), message, outage.deadline(began)).await;
    match first_refusal(&published) {
        Some(e) => outage.failed(began, e),
        None if published.iter().any(Result::is_ok) => outage.succeeded(),
        None => {}
    }
    published
}

/// The first error that is not the client's mistake.
fn first_refusal(published: &[Result<Stored, PublishError>]) -> Option<&PublishError> {
    published.iter().filter_map(|published| published.as_ref().err()).find(|e| !matches!(e, PublishError::TooLarge))
}

fn refusal(error: &PublishError, update_id: ObjectId) -> ApiError {
    match error {
        PublishError::Full => ApiError::LogFull,
        PublishError::TooLarge => ApiError::CommandTooLarge,
        PublishError::Unconfirmed => ApiError::NotConfirmed(update_id),
        PublishError::NotConnected => ApiError::BrokerUnavailable,
        PublishError::NoResponder => ApiError::LogUnavailable,
        // Commands name no sequence.
        PublishError::WrongLast(_) | PublishError::Refused(_) => ApiError::LogRefused(error.to_string()),
    }
}

fn internal(cause: &dyn std::error::Error) -> ApiError {
    tracing::error!("cannot publish: {cause}");
    ApiError::Internal
}
