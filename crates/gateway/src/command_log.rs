//! 1 Accept: publishes commands to the command log. An update is accepted once JetStream has acked it, and not before.
//!
//! A client may hang up at any time, and hyper then drops its handler at any await. Before
//! [`append`](CommandLog::append) nothing has happened; from its first poll the publish is a task of its own, which holds
//! its in-flight permit and waits for the ack even if the client is gone. So the log has the whole command or nothing of
//! it, no ack is dropped, and no permit is leaked; shutdown waits for these tasks.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::Subject;
use bytes::Bytes;
use contract::{
    ObjectId, command,
    subject::{CommandKind, CommandSubject},
};
use service_kit::{
    publish::{self, PublishError},
    publisher::{Publisher, Stored},
    shares::Pool,
    traces::{Step, Traces},
};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::{
    admission::{Admission, PATIENCE, Work},
    command::Command,
    error::{ApiError, SharedPool},
    outage::Outage,
    work_budget::WorkBudget,
};

/// Most groups of commands that are being published at once, with a share per project.
const MAX_GROUPS: usize = 16;

/// A command, to be published.
#[derive(Debug, Clone)]
pub(crate) struct LogEntry {
    pub(crate) kind: CommandKind,
    /// The update, or the call event.
    pub(crate) id: ObjectId,
    /// Its deduplication id in the log.
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
    /// What each project may have in the log unapplied.
    pub(crate) admission: Arc<Admission>,
    /// What each project may cost.
    pub(crate) budget: WorkBudget,
    groups: Arc<Pool<ObjectId>>,
    in_flight: Arc<Pool<ObjectId>>,
    publishing: TaskTracker,
    /// Whether the log accepts updates.
    pub(crate) outage: Arc<Outage>,
    traces: Traces,
}

impl CommandLog {
    pub(crate) fn new(max_in_flight: usize, budget: WorkBudget, traces: Traces) -> Self {
        Self {
            admission: Arc::default(),
            budget,
            groups: Pool::new(MAX_GROUPS),
            in_flight: Pool::new(max_in_flight),
            publishing: TaskTracker::new(),
            outage: Arc::new(Outage::new("the command log", "updates")),
            traces,
        }
    }

    /// Publishes a command and waits for the ack. Without a leader of the log, waits for one as long as a request may that
    /// began then.
    pub(crate) async fn append(
        &self,
        commands: &Publisher,
        project_id: ObjectId,
        entry: LogEntry,
        traceparent: &str,
        began: Instant,
    ) -> Result<(), ApiError> {
        let LogEntry { kind, id: update_id, message_id, payload, .. } = entry;
        // It may wait, and so precedes what others could have meanwhile.
        let admitted = self.admission.admit(project_id, Work::of([&payload[..]]), PATIENCE).await?;
        let permit = self.in_flight.try_acquire(project_id);
        let permit = permit.map_err(|e| ApiError::ShareUsed(SharedPool::InFlight, e))?;
        self.budget.admit(project_id, 1, Instant::now()).map_err(ApiError::WorkLimited)?;
        let subject = CommandSubject { project_id, kind }.to_string();
        let mut span = self.traces.begin(Step::Publish, Some(traceparent));
        span.update(update_id);
        let own = span.traceparent();
        let traceparent = own.unwrap_or_else(|| traceparent.to_owned());
        let subject = Subject::from(subject);
        let message =
            move || publish::message(subject.clone(), &message_id, Some(traceparent.as_str()), payload.clone());
        let (commands, outage) = (commands.clone(), self.outage.clone());
        let publish = async move {
            let published = commands.publish_until(message, outage.deadline(began)).await;
            drop(permit);
            admitted.published(published.as_ref().ok().map(|stored| stored.up_to));
            if let Err(e) = &published {
                span.fail(refusal(e, update_id).code().to_owned(), e);
            }
            match &published {
                Ok(stored) => {
                    if let Some(sequence) = stored.sequence {
                        span.note(|| [("leadrelay.log.sequence", (sequence as i64).into())]);
                    }
                    tracing::debug!(%update_id, %project_id, sequence = stored.sequence, "update accepted");
                    outage.succeeded();
                }
                // The client's mistake, not the log's.
                Err(PublishError::TooLarge) => {}
                Err(e) => outage.failed(began, e),
            }
            published
        };
        match self.publishing.spawn(publish.in_current_span()).await {
            Ok(published) => published.map(drop).map_err(|e| refusal(&e, update_id)),
            Err(e) => Err(internal(&e)),
        }
    }

    /// Publishes commands in this order, waits for their acks, and returns the result of each. Waits within `patience` for
    /// the project's budget, then as long for its backlog, and then for its share of the groups in flight and for a leader of
    /// the log. Commands without a trace of their own get the one of their request.
    pub(crate) async fn append_all(
        &self,
        commands: &Publisher,
        project_id: ObjectId,
        entries: Vec<LogEntry>,
        traceparent: Option<&str>,
        patience: Duration,
    ) -> Vec<Result<Stored, ApiError>> {
        if entries.is_empty() {
            return Vec::new();
        }
        let deadline = Instant::now() + patience;
        while let Err(wait) = self.budget.admit(project_id, entries.len(), Instant::now()) {
            if Instant::now() + wait > deadline {
                return vec![Err(ApiError::WorkLimited(wait)); entries.len()];
            }
            tokio::time::sleep(wait).await;
        }
        let count = entries.len();
        let ids: Vec<ObjectId> = entries.iter().map(|entry| entry.id).collect();
        let work = Work::of(entries.iter().map(|entry| &entry.payload[..]));
        let admitted = match self.admission.admit(project_id, work, patience).await {
            Ok(admitted) => admitted,
            Err(e) => return vec![Err(e); ids.len()],
        };
        let permit = self.groups.acquire(project_id).await;
        // One span for all of them: they are published together.
        let mut span = self.traces.begin(Step::Publish, traceparent);
        span.note(|| [("messaging.batch.message_count", (ids.len() as i64).into())]);
        let own = span.traceparent();
        let traceparent = traceparent.map(|requests| own.unwrap_or_else(|| requests.to_owned()));
        let message = move |place: usize| {
            let LogEntry { kind, message_id, traceparent: entrys, payload, .. } = &entries[place];
            let subject = CommandSubject { project_id, kind: *kind }.to_string();
            publish::message(subject, message_id, entrys.as_deref().or(traceparent.as_deref()), payload.clone())
        };
        let (commands, outage) = (commands.clone(), self.outage.clone());
        let began = Instant::now();
        let publish = async move {
            let published = commands.publish_each_until(count, message, outage.deadline(began)).await;
            drop(permit);
            let accepted = published.iter().flatten().count();
            admitted.published(published.iter().flatten().map(|stored| stored.up_to).max());
            tracing::debug!(%project_id, updates = accepted, of = published.len(), "updates accepted");
            let mut refused = published.iter().filter_map(|published| published.as_ref().err());
            match refused.find(|e| !matches!(e, PublishError::TooLarge)) {
                Some(e) => {
                    span.fail("not_published", e);
                    outage.failed(began, e);
                }
                None if accepted > 0 => outage.succeeded(),
                None => {}
            }
            published
        };
        match self.publishing.spawn(publish.in_current_span()).await {
            Ok(published) => published.into_iter().zip(ids).map(|(one, id)| one.map_err(|e| refusal(&e, id))).collect(),
            Err(e) => vec![Err(internal(&e)); ids.len()],
        }
    }

    /// Waits until nothing is in flight. Called after the last request.
    pub(crate) async fn drained(&self) {
        self.publishing.close();
        self.publishing.wait().await;
    }
}

fn refusal(error: &PublishError, update_id: ObjectId) -> ApiError {
    match error {
        PublishError::Full => ApiError::LogFull,
        PublishError::TooLarge => ApiError::CommandTooLarge,
        PublishError::Unconfirmed => ApiError::NotConfirmed(update_id),
        PublishError::NotConnected => ApiError::BrokerUnavailable,
        PublishError::NoResponder => ApiError::LogUnavailable,
        PublishError::Refused(_) => ApiError::LogRefused(error.to_string()),
    }
}

fn internal(cause: &dyn std::error::Error) -> ApiError {
    tracing::error!("cannot publish: {cause}");
    ApiError::Internal
}
