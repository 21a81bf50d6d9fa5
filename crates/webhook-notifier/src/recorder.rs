//! 7 Deliver, 8 Retry: writes delivery records to Postgres in batches.
//!
//! Records that arrive while a batch is written form the next batch. Records that nothing waits for are collected for
//! up to 10 ms: a transaction costs much more than a record in it.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use service_kit::{
    health::{Liveness, Readiness},
    nats::{error_chain, retry_backoff},
    postgres::{PinnedConnection, Pool},
};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout_at},
};

use crate::{
    core::delivery::{DeliveryRecord, DeliveryState},
    metrics::Metrics,
    store::{self, error::StoreError},
};

/// Maximum number of records in a transaction. More records save commits under load; fewer keep a batch's latency down.
const MAX_RECORDS: usize = 500;
/// Bytes of bodies at which a transaction is full. Writing it takes several times as much memory.
const MAX_BYTES: usize = 4 * 1024 * 1024;
/// Records that wait to be written. Beyond that, attempts wait with their permits, and the pull of events with them.
const QUEUE: usize = 1024;

/// Minimum time between the starts of two transactions, unless something waits for the next one or it is full. A longer
/// interval makes fewer and larger transactions, but a crash loses more records, and their deliveries are repeated.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// The recording task ended, which it does only with the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the service is stopping")]
pub(crate) struct Stopping;

/// Sends records to the recording task.
#[derive(Debug, Clone)]
pub(crate) struct Recorder(mpsc::Sender<Pending>);

#[derive(Debug)]
struct Pending {
    record: DeliveryRecord,
    recorded: oneshot::Sender<()>,
}

impl Recorder {
    /// Waits until the record is written.
    pub(crate) async fn record(&self, record: DeliveryRecord) -> Result<(), Stopping> {
        let (recorded, done) = oneshot::channel();
        self.0.send(Pending { record, recorded }).await.map_err(|_| Stopping)?;
        done.await.map_err(|_| Stopping)
    }
}

/// The task that writes records: runs until every [`Recorder`] is dropped.
#[derive(Debug)]
pub(crate) struct RecordingTask {
    queue: mpsc::Receiver<Pending>,
    session: PinnedConnection,
    readiness: Readiness,
    liveness: Liveness,
    /// Notified when the outbox has a new event.
    outbox: Arc<Notify>,
    metrics: Metrics,
}

pub(crate) fn recorder(
    pool: Pool,
    readiness: Readiness,
    liveness: Liveness,
    outbox: Arc<Notify>,
    metrics: Metrics,
) -> (Recorder, RecordingTask) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let session = PinnedConnection::new(pool);
    (Recorder(sender), RecordingTask { queue, session, readiness, liveness, outbox, metrics })
}

impl RecordingTask {
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let mut waiting = VecDeque::new();
        let mut arrived = Vec::new();
        let mut next = Instant::now();
        while self.queue.recv_many(&mut arrived, MAX_RECORDS).await > 0 {
            self.gather(&mut arrived, next).await;
            next = Instant::now() + MIN_INTERVAL;
            waiting.extend(arrived.drain(..).map(|Pending { record, recorded }| (record, recorded)));
            while !waiting.is_empty() {
                let (records, recorded): (Vec<_>, Vec<_>) = next_batch(&mut waiting).into_iter().unzip();
                let started = Instant::now();
                self.write(&records).await;
                self.metrics.recorded(records.len(), started.elapsed());
                for recorded in recorded {
                    // The receiver is gone if shutdown aborted the attempt.
                    let _ = recorded.send(());
                }
            }
        }
        Ok(())
    }

    /// Collects records until the interval has passed, the batch is full, or it contains a record that something waits
    /// for.
    async fn gather(&mut self, arrived: &mut Vec<Pending>, until: Instant) {
        let mut seen = 0;
        while arrived.len() < MAX_RECORDS && !arrived[seen..].iter().any(|pending| is_waited_for(&pending.record)) {
            seen = arrived.len();
            let room = MAX_RECORDS - seen;
            if !matches!(timeout_at(until, self.queue.recv_many(arrived, room)).await, Ok(1..)) {
                break;
            }
        }
    }

    /// Writes a batch, and retries until it is written.
    async fn write(&mut self, records: &[DeliveryRecord]) {
        for (number, delay) in retry_backoff().enumerate() {
            let liveness = self.liveness.clone();
            match liveness.step("recorder", self.try_write(records, number > 0)).await {
                Ok(()) => break,
                Err(e) => {
                    tracing::error!(
                        records = records.len(),
                        "cannot record deliveries, trying again: {}",
                        error_chain(&e)
                    );
                    self.readiness.not_ready("recorder", error_chain(&e));
                    tokio::time::sleep(delay).await;
                }
            }
        }
        self.readiness.ready("recorder");
        if records.iter().any(|record| record.state == DeliveryState::Exhausted || record.disable_callback.is_some()) {
            self.outbox.notify_one();
        }
    }

    async fn try_write(&mut self, records: &[DeliveryRecord], is_repeated: bool) -> Result<(), StoreError> {
        let mut session = self.session.take().await?;
        if !is_repeated && store::record::is_one_statement(records) {
            // One statement is a transaction of its own. Most batches are.
            store::record::write(&mut session, records).await?;
        } else {
            let mut transaction = session.begin().await?;
            if is_repeated {
                // The reply of a commit may have been lost.
                store::record::write_again(&mut transaction, records).await?;
            } else {
                store::record::write(&mut transaction, records).await?;
            }
            session = transaction.commit().await?;
        }
        self.session.keep(session);
        Ok(())
    }
}

/// Whether something waits for the record: the permit of a claim, or the next delivery of an ordered callback.
fn is_waited_for(record: &DeliveryRecord) -> bool {
    record.source.lease().is_some() || record.delivery.order.is_some()
}

/// Takes the next batch off the queue: limited in size, and without two records of one delivery. The rest keeps its
/// order.
fn next_batch<T>(waiting: &mut VecDeque<(DeliveryRecord, T)>) -> Vec<(DeliveryRecord, T)> {
    let mut seen = HashSet::new();
    let mut batch = Vec::new();
    let mut later = VecDeque::new();
    let mut bytes = 0;
    while batch.len() < MAX_RECORDS
        && bytes < MAX_BYTES
        && let Some((record, recorded)) = waiting.pop_front()
    {
        if seen.insert((record.delivery.update_id, record.delivery.callback_id, record.delivery.kind)) {
            bytes += record.delivery.body.len();
            batch.push((record, recorded));
        } else {
            later.push_back((record, recorded));
        }
    }
    later.append(waiting);
    *waiting = later;
    batch
}

#[cfg(test)]
mod tests {
    use contract::{ObjectId, Timestamp, event_kind::DeliveryKind};
    use proptest::prelude::*;

    use super::*;
    use crate::core::delivery::{DeliverySource, PendingDelivery};

    fn record(update: u8, bytes: usize) -> DeliveryRecord {
        let id = ObjectId::from_bytes([1; 12]);
        let delivery = PendingDelivery {
            update_id: ObjectId::from_bytes([update; 12]),
            callback_id: id,
            kind: DeliveryKind::Update,
            project_id: id,
            process_id: None,
            body: "x".repeat(bytes).into(),
            traceparent: None,
            order: None,
        };
        DeliveryRecord::new(delivery, DeliverySource::Event, DeliveryState::Delivered, Timestamp::from_millis(0))
    }

    #[test]
    fn records_with_a_long_body_are_written_in_a_transaction() {
        assert!(store::record::is_one_statement(&[record(1, 2000), record(2, 1)]));
        assert!(!store::record::is_one_statement(&[record(1, 2001), record(2, 1)]));
    }

    #[test]
    fn a_batch_is_limited_in_bytes_and_never_empty() {
        let mut waiting = (0..4).map(|n| (record(n, MAX_BYTES / 2 + n as usize), n)).collect::<VecDeque<_>>();
        let batch = next_batch(&mut waiting).into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!(batch, [0, 1]);
        let mut waiting = VecDeque::from([(record(1, 3 * MAX_BYTES), 1)]);
        assert_eq!(next_batch(&mut waiting).len(), 1);
    }

    proptest! {
        #[test]
        fn records_are_written_once_and_in_order_per_delivery(updates in prop::collection::vec(0_u8..20, 0..200)) {
            let mut waiting = updates.iter().enumerate().map(|(n, update)| (record(*update, 1), n)).collect();
            let mut written = Vec::new();
            while let batch = next_batch(&mut waiting)
                && !batch.is_empty()
            {
                let distinct = batch.iter().map(|(record, _)| record.delivery.update_id).collect::<HashSet<_>>();
                prop_assert_eq!(distinct.len(), batch.len());
                written.extend(batch.into_iter().map(|(_, n)| n));
            }
            for update in 0..20 {
                let of = |order: &[usize]| order.iter().copied().filter(|n| updates[*n] == update).collect::<Vec<_>>();
                prop_assert_eq!(of(&written), of(&(0..updates.len()).collect::<Vec<_>>()));
            }
            prop_assert_eq!(written.len(), updates.len());
        }
    }
}
