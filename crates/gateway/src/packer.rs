//! 1 Accept: publishes commands that wait for the log as one message, a [pack](contract::pack).
//!
//! A server that syncs before it acknowledges does so once per message, so a pack costs it as much as one command.
//! While no message is in flight, a command is published at once, as a message of its own. Commands that arrive
//! meanwhile wait for that acknowledgement and then share a message. So packs grow with the time that an
//! acknowledgement takes, and no command waits for a pack to fill. A gateway has one message in flight: with two, packs
//! are half as large.

mod queue;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use async_nats::{Subject, jetstream::message::OutboundMessage};
use contract::{
    ObjectId,
    pack::{self, PackedCommand},
    subject::PACKS,
};
use service_kit::{
    clock,
    metrics::Histogram,
    publish::{self, PublishError},
    publisher::{Publisher, Stored},
};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use self::queue::PackQueue;
use crate::outage::Outage;

/// Most bytes of a pack. Larger ones delay the commands behind them, smaller ones sync the log more often.
const MAX_BYTES: usize = 1 << 20;
/// Bytes of a pack's headers, which count for the server's `max_payload`.
const HEADER_BYTES: usize = 512;

/// A command to be published, and its deduplication id if it is a message of its own.
#[derive(Debug)]
pub(crate) struct WaitingCommand {
    pub(crate) command: PackedCommand,
    pub(crate) message_id: String,
    /// When its request began to wait.
    pub(crate) began: Instant,
}

/// The result of publishing a command. A closed channel means that the result is unknown.
pub(crate) type Outcome = oneshot::Receiver<Result<Stored, PublishError>>;

#[derive(Debug)]
struct Queued {
    waiting: WaitingCommand,
    outcome: oneshot::Sender<Result<Stored, PublishError>>,
}

impl AsRef<PackedCommand> for Queued {
    fn as_ref(&self) -> &PackedCommand {
        &self.waiting.command
    }
}

#[derive(Debug)]
pub(crate) struct Packer {
    state: Arc<Mutex<State>>,
    outage: Arc<Outage>,
    /// Commands per message.
    sizes: Histogram,
}

#[derive(Debug, Default)]
struct State {
    queue: PackQueue<Queued>,
    /// Whether a message is in flight.
    in_flight: bool,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Packer {
    pub(crate) fn new(outage: Arc<Outage>, sizes: Histogram) -> Self {
        Self { state: Arc::default(), outage, sizes }
    }

    /// Publishes commands of a project in this order, and returns their outcomes. Callers need not wait for them: a
    /// task of the tracker publishes the commands. Callers bound how many commands wait.
    pub(crate) fn publish(
        &self,
        commands: &Publisher,
        tasks: &TaskTracker,
        project_id: ObjectId,
        waiting: impl IntoIterator<Item = WaitingCommand>,
    ) -> Vec<Outcome> {
        let mut state = lock(&self.state);
        let queued = waiting.into_iter().map(|waiting| {
            let (outcome, receiver) = oneshot::channel();
            state.queue.push(project_id, Queued { waiting, outcome });
            receiver
        });
        let outcomes = queued.collect();
        if !std::mem::replace(&mut state.in_flight, true) {
            let flight = Flight {
                commands: commands.clone(),
                state: self.state.clone(),
                outage: self.outage.clone(),
                sizes: self.sizes.clone(),
                landed: false,
            };
            tasks.spawn(flight.run());
        }
        outcomes
    }
}

/// The right to have a message in flight. Publishes the waiting commands, one message after the other, until none
/// waits.
struct Flight {
    commands: Publisher,
    state: Arc<Mutex<State>>,
    outage: Arc<Outage>,
    sizes: Histogram,
    landed: bool,
}

impl Flight {
    async fn run(mut self) {
        while let Some(pack) = self.next_pack() {
            self.publish(pack).await;
        }
    }

    /// The next commands to publish together. None ends the flight.
    fn next_pack(&mut self) -> Option<Vec<Queued>> {
        let max_bytes = MAX_BYTES.min(self.commands.max_payload().saturating_sub(HEADER_BYTES));
        let mut state = lock(&self.state);
        let pack = state.queue.take_pack(max_bytes);
        if pack.is_empty() {
            (state.in_flight, self.landed) = (false, true);
            return None;
        }
        Some(pack)
    }

    /// Publishes a pack. A pack that is refused because of its size is published in parts, so that every command that
    /// the log has room for is stored.
    async fn publish(&self, pack: Vec<Queued>) {
        let mut parts = vec![pack];
        let mut is_full = false;
        while let Some(mut part) = parts.pop() {
            let published = if is_full { Err(PublishError::Full) } else { self.publish_message(&part).await };
            if !is_full && part.len() > 1 && matches!(published, Err(PublishError::Full | PublishError::TooLarge)) {
                let second = part.split_off(part.len() / 2);
                parts.extend([second, part]);
                continue;
            }
            // Once the log has no room for a single command, the later commands of the pack fail without an attempt.
            is_full = is_full || published == Err(PublishError::Full);
            for Queued { outcome, .. } in part {
                // Its client may have hung up.
                let _ = outcome.send(published.clone());
            }
        }
    }

    /// Publishes commands as one message. While the log has no leader, sends it again under the same id.
    async fn publish_message(&self, part: &[Queued]) -> Result<Stored, PublishError> {
        let began = || part.iter().map(|queued| queued.waiting.began);
        let (Some(first), Some(last)) = (began().min(), began().max()) else { return Err(PublishError::Unconfirmed) };
        let message = message(part)?;
        let copy = || OutboundMessage {
            subject: message.subject.clone(),
            payload: message.payload.clone(),
            headers: message.headers.clone(),
        };
        let published = self.commands.publish_until(copy, self.outage.deadline(last)).await;
        match &published {
            Ok(_) => {
                self.sizes.observe(part.len() as f64);
                self.outage.succeeded();
            }
            // A mistake of the client, not an outage of the log.
            Err(PublishError::TooLarge) => {}
            Err(e) => self.outage.failed(first, e),
        }
        published
    }
}

impl Drop for Flight {
    /// After a panic, drops the queue, so that no command waits forever: the outcomes of the queued commands are
    /// unknown, and the next command begins another flight.
    fn drop(&mut self) {
        if !self.landed {
            *lock(&self.state) = State::default();
        }
    }
}

/// The message of these commands: a pack of them, or the only one as a message of its own.
fn message(part: &[Queued]) -> Result<OutboundMessage, PublishError> {
    if let [Queued { waiting: WaitingCommand { command, message_id, .. }, .. }] = part {
        let PackedCommand { subject, traceparent, payload } = command;
        return Ok(publish::message(subject.clone(), message_id, traceparent.as_deref(), payload.clone()));
    }
    let payload = pack::write(part.iter().map(AsRef::as_ref)).map_err(|e| PublishError::Refused(e.to_string()))?;
    let id = format!("pack-{}", clock::new_id());
    Ok(publish::message(Subject::from_static(PACKS), &id, None, payload))
}
