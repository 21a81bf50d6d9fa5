//! 6 Announce: publishes completion events from the ledger. JetStream acks them before the announce watermark moves.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::message::OutboundMessage;
use bytes::Bytes;
use contract::{
    JsonObject,
    event::CompletionEvent,
    headers,
    position::{EventPosition, LogPosition},
    streams::LEAD_EVENTS,
    subject,
};
use service_kit::{
    clock,
    nats::{error_chain, retry_backoff},
    postgres::Pool,
    publish::{PublishError, message},
    publisher::Publisher,
    traces::{Span, Step, Traces},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::timeout,
};

use crate::store::{
    self, StoreError,
    checkpoint::{Checkpoint, forget_events, set_announced},
    ledger::{Announcement, outbox},
};

/// Limit of the events that wait for the announcer, in KiB of memory. With a higher limit, the applier continues longer
/// while NATS is slow.
const WAITING_KIB: u32 = 16 * 1024;
/// The least that an event counts: its memory in addition to its content. So at most 1024 events wait.
const MIN_KIB: u32 = 16;
/// How long the applier may be idle before the watermark is written in a transaction of its own. Otherwise the next
/// batch writes it. A longer time announces more events again after a crash; a shorter one competes with the applier
/// for the checkpoint's row.
const WRITE_AFTER: Duration = Duration::from_millis(20);
/// How many events are read from the ledger at once after a crash. Each may have a MiB.
const BACKLOG_ROWS: i64 = 64;

/// An upper bound of an event's bytes beside its payload: its subject and headers.
const HEADER_BYTES: usize = 1024;

/// The events of batches that are written.
#[derive(Debug)]
struct AppliedBatches {
    /// In log order.
    announcements: Vec<Announcement>,
    /// The position of the last entry.
    last: LogPosition,
    /// The part of the limit that they take until they are announced.
    room: OwnedSemaphorePermit,
}

/// Hands written batches to the announcer.
#[derive(Debug)]
pub(crate) struct AnnounceSender {
    sender: mpsc::Sender<AppliedBatches>,
    room: Arc<Semaphore>,
}

impl AnnounceSender {
    /// Hands over the events of a batch, once there is room for them. Does nothing if the announcer has ended: the next
    /// term announces from the ledger.
    pub(crate) async fn send(&self, announcements: Vec<Announcement>, last: LogPosition) {
        let kib = announcements.iter().map(waiting_kib).fold(0, u32::saturating_add).clamp(MIN_KIB, WAITING_KIB);
        let room = tokio::select! {
            room = self.room.clone().acquire_many_owned(kib) => room,
            () = self.sender.closed() => return,
        };
        // The semaphore is never closed.
        let Ok(room) = room else { return };
        let _ = self.sender.send(AppliedBatches { announcements, last, room }).await;
    }
}

/// The part of the limit that an event takes, in KiB.
fn waiting_kib(announcement: &Announcement) -> u32 {
    let event = &announcement.event;
    let length = |object: Option<&JsonObject>| object.map_or(0, |object| object.get().len());
    let result = event.activity.as_ref().map_or(0, |result| {
        let texts = [&result.summary, &result.recording_url, &result.transcript_url];
        let texts = texts.into_iter().flatten().map(String::len).sum::<usize>();
        texts + length(result.analysis.as_ref()) + length(result.metadata.as_ref())
    });
    let bytes = length(event.data.as_ref()) + result;
    u32::try_from(bytes / 1024).unwrap_or(u32::MAX).clamp(MIN_KIB, WAITING_KIB)
}

pub(crate) fn channel() -> (AnnounceSender, Applied) {
    // Every batch takes at least `MIN_KIB`, so a batch that the semaphore admits finds room in the channel.
    let (sender, receiver) = mpsc::channel((WAITING_KIB / MIN_KIB) as usize);
    (AnnounceSender { sender, room: Arc::new(Semaphore::new(WAITING_KIB as usize)) }, Applied(receiver))
}

/// Receives written batches from the applier.
#[derive(Debug)]
pub(crate) struct Applied(mpsc::Receiver<AppliedBatches>);

impl Applied {
    /// All waiting batches, as one, because a server that syncs before each acknowledgement then syncs once for many
    /// events. None once the applier has ended.
    async fn recv(&mut self) -> Option<AppliedBatches> {
        let mut batches = self.0.recv().await?;
        while let Ok(next) = self.0.try_recv() {
            batches.announcements.extend(next.announcements);
            batches.last = next.last;
            batches.room.merge(next.room);
        }
        Some(batches)
    }
}

/// Why the announcer ends its term.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnnounceError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The next term announces the undelivered events again.
    #[error("{LEAD_EVENTS} lost events")]
    EventsLost,
}

pub(crate) struct Announcer {
    pub(crate) pool: Pool,
    pub(crate) events: Publisher,
    pub(crate) checkpoint: Checkpoint,
    /// The announce watermark. The applier writes it with its next batch.
    pub(crate) announced: watch::Sender<LogPosition>,
    /// The last sequence of the event stream. Only the leader publishes to this stream.
    pub(crate) last_stored: watch::Sender<u64>,
    pub(crate) traces: Traces,
}

impl Announcer {
    /// Announces every applied batch, until the channel is closed.
    pub(crate) async fn run(self, mut applied: Applied) -> Result<(), AnnounceError> {
        let mut written = self.checkpoint.announced;
        loop {
            let batches = match timeout(WRITE_AFTER, applied.recv()).await {
                Ok(batches) => batches,
                Err(_) if *self.announced.borrow() == written => applied.recv().await,
                Err(_) => {
                    written = *self.announced.borrow();
                    self.write(CheckpointChange::Announced(written)).await?;
                    continue;
                }
            };
            let Some(AppliedBatches { announcements, last, room }) = batches else { break };
            self.announce(&announcements, last, false).await?;
            self.announced.send_replace(last);
            drop(room);
        }
        let announced = *self.announced.borrow();
        Ok(self.write(CheckpointChange::Announced(announced)).await?)
    }

    /// Announces the ledger's rows between the watermark and the checkpoint, epoch by epoch. A crash or a rewind leaves
    /// such rows.
    pub(crate) async fn catch_up(&mut self) -> Result<(), AnnounceError> {
        let applied = self.checkpoint.applied;
        if self.checkpoint.announced < applied {
            tracing::info!(announced = %self.checkpoint.announced, %applied, "announcing the ledger's backlog");
        }
        while self.checkpoint.announced < applied {
            let announced = self.checkpoint.announced;
            let end = LogPosition { epoch: announced.epoch, sequence: i64::MAX as u64, index: u32::MAX };
            let rows = outbox(&self.pool, announced, applied.min(end), BACKLOG_ROWS).await?;
            let up_to = match rows.last() {
                Some(row) if rows.len() as i64 >= BACKLOG_ROWS => row.decided_at,
                _ if announced.epoch < applied.epoch => LogPosition::message(announced.epoch + 1, 0),
                _ => applied,
            };
            self.announce(&rows, up_to, true).await?;
            self.write(CheckpointChange::Announced(up_to)).await?;
            self.checkpoint.announced = up_to;
            self.announced.send_replace(up_to);
        }
        Ok(())
    }

    /// Publishes events until JetStream has acked all of them. The stream stores them in this order: after a failure,
    /// only those behind the stored ones are published again. If the first ones may be stored already, they are
    /// published one by one: the server refuses what follows a duplicate in a chain.
    async fn announce(
        &self,
        announcements: &[Announcement],
        up_to: LogPosition,
        mut may_be_stored: bool,
    ) -> Result<(), AnnounceError> {
        let prepared: Vec<_> = announcements.iter().map(|announcement| self.serialize(announcement)).collect();
        let mut rest: Vec<_> = announcements.iter().zip(&prepared).collect();
        let mut delays = retry_backoff();
        while !rest.is_empty() {
            let before = *self.last_stored.borrow();
            let generation = self.checkpoint.generation;
            let next = if may_be_stored { &rest[..1] } else { &rest[..] };
            let messages = next.iter().map(|(announcement, event)| outbound(announcement, event, generation)).collect();
            let (acks, failed) = self.events.publish_chain(messages, before).await;
            let last = acks.iter().map(|ack| ack.sequence).fold(before, u64::max);
            self.last_stored.send_replace(last);
            rest.drain(..acks.len());
            if let Some(ack) = acks.last() {
                delays = retry_backoff();
                may_be_stored = ack.is_duplicate;
            }
            match failed {
                None => {}
                // The stream lost its end, or was created again.
                Some(PublishError::WrongLast(now)) if now < last => {
                    self.write(CheckpointChange::EventsLost).await?;
                    return Err(AnnounceError::EventsLost);
                }
                // The acks of some were lost, or a former leader published them.
                Some(PublishError::WrongLast(now)) => {
                    self.last_stored.send_replace(now);
                    may_be_stored = true;
                }
                Some(e) => {
                    tracing::warn!(%up_to, "cannot announce, retrying: {e}");
                    may_be_stored = true;
                    tokio::time::sleep(delays.next().unwrap_or_default()).await;
                }
            }
        }
        Ok(())
    }

    fn serialize(&self, announcement: &Announcement) -> SerializedEvent {
        let event = &announcement.event;
        let mut span = self.traces.begin(Step::Announce, announcement.traceparent.as_deref());
        span.update(event.update_id);
        let mut payload = to_json(event);
        let max_payload = self.events.max_payload();
        if payload.len() + HEADER_BYTES > max_payload {
            // Announced without its content, so that it does not stop all later events, and with them the log.
            tracing::error!(update_id = %event.update_id, "an event of {} bytes exceeds the max_payload of NATS", payload.len());
            let warning = format!(
                "data and activity are omitted: the event exceeds the max_payload of NATS, {max_payload} bytes"
            );
            let warnings = event.warnings.iter().cloned().chain([warning]).collect();
            payload = to_json(&CompletionEvent { data: None, activity: None, warnings, ..event.clone() });
        }
        SerializedEvent { payload, span }
    }

    /// Writes to the checkpoint; retries while Postgres is unavailable.
    async fn write(&self, change: CheckpointChange) -> Result<(), StoreError> {
        for delay in retry_backoff() {
            let written = async {
                let mut connection = store::acquire(&self.pool).await?;
                match change {
                    CheckpointChange::Announced(up_to) => {
                        set_announced(&mut connection, &self.checkpoint, up_to, clock::now()).await
                    }
                    CheckpointChange::EventsLost => forget_events(&mut connection, &self.checkpoint).await,
                }
            };
            match written.await {
                Ok(()) => break,
                Err(StoreError::Unavailable(e)) => {
                    tracing::warn!(?change, "cannot write the checkpoint, retrying: {}", error_chain(&e));
                    tokio::time::sleep(delay).await;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// A change that the announcer writes to the checkpoint.
#[derive(Debug, Clone, Copy)]
enum CheckpointChange {
    /// Everything up to this position is announced.
    Announced(LogPosition),
    /// The stream lost events that were announced.
    EventsLost,
}

struct SerializedEvent {
    payload: Bytes,
    /// Open until JetStream has acked the event.
    span: Span,
}

#[allow(clippy::expect_used, reason = "a completion event always serializes")]
fn to_json(event: &CompletionEvent) -> Bytes {
    serde_json::to_vec(event).expect("a completion event serializes").into()
}

fn outbound(announcement: &Announcement, event: &SerializedEvent, generation: i32) -> OutboundMessage {
    let Announcement { decided_at, traceparent, event: completion } = announcement;
    // The id contains the project, because two projects may have an update with the same id. It contains the generation,
    // because JetStream remembers the ids of the one before and would drop the event as a duplicate.
    let id = match generation {
        0 => format!("{}-{}", completion.update_id, completion.project_id),
        generation => format!("{}-{}-{generation}", completion.update_id, completion.project_id),
    };
    let own = event.span.traceparent();
    let mut message = message(
        subject::event(completion.project_id, completion.process_id, completion.kind, completion.success),
        &id,
        own.as_deref().or(traceparent.as_deref()),
        event.payload.clone(),
    );
    let position = EventPosition { generation, log: *decided_at };
    message.headers.get_or_insert_default().insert(headers::POSITION, position.to_string());
    message
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn batches_that_wait_are_announced_together_and_hold_their_room_until_then() {
        let (to_announce, mut applied) = channel();
        let batches = u64::from(WAITING_KIB / MIN_KIB);
        for sequence in 1..=batches {
            to_announce.send(Vec::new(), LogPosition::message(1, sequence)).await;
        }
        let last = LogPosition::message(1, batches + 1);
        assert!(to_announce.send(Vec::new(), last).now_or_never().is_none(), "there is no room");

        let waiting = applied.recv().await.expect("batches");
        assert_eq!(waiting.last, LogPosition::message(1, batches));
        assert!(to_announce.send(Vec::new(), last).now_or_never().is_none(), "they are not announced yet");
        drop(waiting);
        to_announce.send(Vec::new(), last).await;
        assert_eq!(applied.recv().await.expect("a batch").last, last);

        drop(applied);
        to_announce.send(Vec::new(), last).await;
    }
}
