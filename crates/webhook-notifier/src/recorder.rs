//! 7 Deliver, 8 Retry: what was attempted and what comes next goes to Postgres, batch by batch.
//!
//! Reports that arrive while a batch is written are the next batch. One that follows it closely waits a moment for company
//! where nothing waits for it: a transaction takes much more than a report in it.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use service_kit::{
    health::Readiness,
    nats::{error_chain, retry_backoff},
    postgres::PinnedConnection,
};
use sqlx::{Connection, PgPool};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, timeout_at},
};

use crate::{
    core::delivery::{Origin, Report, Standing},
    metrics::Metrics,
    store,
};

/// Most reports in a transaction. More saves commits under load, fewer keeps a batch's latency down.
const MAX_REPORTS: usize = 500;
/// Most bytes of bodies in a transaction, the last report's aside: what it costs in memory, several times over.
const MAX_BYTES: usize = 4 * 1024 * 1024;
/// Reports that wait. Whoever brings one more waits, and with it the slots and the pull.
const QUEUE: usize = 1024;

/// How soon after the last transaction the next one begins, unless somebody waits for it or it is full. Longer makes fewer and
/// larger ones; what a crash meets unrecorded is delivered again.
const PACE: Duration = Duration::from_millis(10);

/// The recorder is gone; it ends only with the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the service is stopping")]
pub(crate) struct Stopping;

/// Where reports go.
#[derive(Debug, Clone)]
pub(crate) struct Recorder(mpsc::Sender<Pending>);

#[derive(Debug)]
struct Pending {
    report: Report,
    recorded: oneshot::Sender<()>,
}

impl Recorder {
    /// Has a report recorded, and waits until it is.
    pub(crate) async fn record(&self, report: Report) -> Result<(), Stopping> {
        let (recorded, done) = oneshot::channel();
        self.0.send(Pending { report, recorded }).await.map_err(|_| Stopping)?;
        done.await.map_err(|_| Stopping)
    }
}

/// The task that records: runs until every [`Recorder`] is dropped.
#[derive(Debug)]
pub(crate) struct Recording {
    queue: mpsc::Receiver<Pending>,
    session: PinnedConnection,
    readiness: Readiness,
    /// Told when something is to be announced.
    announce: Arc<Notify>,
    metrics: Metrics,
}

/// A recorder and its task.
pub(crate) fn recorder(
    pool: PgPool,
    readiness: Readiness,
    announce: Arc<Notify>,
    metrics: Metrics,
) -> (Recorder, Recording) {
    let (sender, queue) = mpsc::channel(QUEUE);
    (Recorder(sender), Recording { queue, session: PinnedConnection::new(pool), readiness, announce, metrics })
}

impl Recording {
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let mut waiting = VecDeque::new();
        let mut arrived = Vec::new();
        let mut next = Instant::now();
        while self.queue.recv_many(&mut arrived, MAX_REPORTS).await > 0 {
            self.gather(&mut arrived, next).await;
            next = Instant::now() + PACE;
            waiting.extend(arrived.drain(..).map(|Pending { report, recorded }| (report, recorded)));
            while !waiting.is_empty() {
                let (reports, recorded): (Vec<_>, Vec<_>) = next_batch(&mut waiting).into_iter().unzip();
                let begun = Instant::now();
                self.write(&reports).await;
                self.metrics.recorded(reports.len(), begun.elapsed());
                for recorded in recorded {
                    // Whoever waited may have been cut.
                    let _ = recorded.send(());
                }
            }
        }
        Ok(())
    }

    /// Waits for more until it is time, a batch is full, or something that waits for its record has come.
    async fn gather(&mut self, arrived: &mut Vec<Pending>, until: Instant) {
        let mut seen = 0;
        while arrived.len() < MAX_REPORTS && !arrived[seen..].iter().any(|pending| is_waited_for(&pending.report)) {
            seen = arrived.len();
            let room = MAX_REPORTS - seen;
            if !matches!(timeout_at(until, self.queue.recv_many(arrived, room)).await, Ok(1..)) {
                break;
            }
        }
    }

    /// Writes a batch, and goes on trying until it is written.
    async fn write(&mut self, reports: &[Report]) {
        for delay in retry_backoff() {
            match self.try_write(reports).await {
                Ok(()) => break,
                Err(e) => {
                    tracing::error!(reports = reports.len(), "cannot record, trying again: {}", error_chain(&e));
                    self.readiness.not_ready("postgres", error_chain(&e));
                    tokio::time::sleep(delay).await;
                }
            }
        }
        self.readiness.ready("postgres");
        if reports.iter().any(|report| report.standing == Standing::Exhausted || report.disable.is_some()) {
            self.announce.notify_one();
        }
    }

    async fn try_write(&mut self, reports: &[Report]) -> sqlx::Result<()> {
        let mut connection = self.session.take().await?;
        if reports
            .iter()
            .all(|report| report.origin == Origin::Event && report.disable.is_none() && report.delivery.order.is_none())
        {
            // One statement, which is a transaction: what most batches are.
            store::record::record(&mut connection, reports).await?;
        } else {
            let mut transaction = connection.begin().await?;
            store::record::record(&mut transaction, reports).await?;
            transaction.commit().await?;
        }
        self.session.keep(connection);
        Ok(())
    }
}

/// Whether something goes on only when this is recorded: a claim's slot, or the next delivery of a callback with an order.
fn is_waited_for(report: &Report) -> bool {
    report.origin == Origin::Claim || report.delivery.order.is_some()
}

/// Takes the next batch off the queue: bounded, and no delivery twice in it; what does not fit keeps its order.
fn next_batch<T>(waiting: &mut VecDeque<(Report, T)>) -> Vec<(Report, T)> {
    let mut seen = HashSet::new();
    let mut batch = Vec::new();
    let mut later = VecDeque::new();
    let mut bytes = 0;
    while batch.len() < MAX_REPORTS
        && bytes < MAX_BYTES
        && let Some((report, recorded)) = waiting.pop_front()
    {
        if seen.insert((report.delivery.update_id, report.delivery.callback_id)) {
            bytes += report.delivery.body.len();
            batch.push((report, recorded));
        } else {
            later.push_back((report, recorded));
        }
    }
    later.append(waiting);
    *waiting = later;
    batch
}

#[cfg(test)]
mod tests {
    use contract::{ObjectId, Timestamp};
    use proptest::prelude::*;

    use super::*;
    use crate::core::delivery::Delivery;

    fn report(update: u8, bytes: usize) -> Report {
        let id = ObjectId::from_bytes([1; 12]);
        Report {
            delivery: Delivery {
                update_id: ObjectId::from_bytes([update; 12]),
                callback_id: id,
                project_id: id,
                process_id: None,
                body: "x".repeat(bytes).into(),
                traceparent: None,
                order: None,
            },
            origin: Origin::Event,
            standing: Standing::Delivered,
            attempt: None,
            error: None,
            disable: None,
            at: Timestamp::from_millis(0),
        }
    }

    #[test]
    fn a_batch_is_bounded_in_bytes_yet_never_empty() {
        let mut waiting = (0..4).map(|n| (report(n, MAX_BYTES / 2 + n as usize), n)).collect::<VecDeque<_>>();
        let batch = next_batch(&mut waiting).into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!(batch, [0, 1]);
        let mut waiting = VecDeque::from([(report(1, 3 * MAX_BYTES), 1)]);
        assert_eq!(next_batch(&mut waiting).len(), 1);
    }

    proptest! {
        #[test]
        fn every_report_comes_once_and_those_of_a_delivery_in_order(updates in prop::collection::vec(0_u8..20, 0..200)) {
            let mut waiting = updates.iter().enumerate().map(|(n, update)| (report(*update, 1), n)).collect();
            let mut written = Vec::new();
            while let batch = next_batch(&mut waiting)
                && !batch.is_empty()
            {
                let distinct = batch.iter().map(|(report, _)| report.delivery.update_id).collect::<HashSet<_>>();
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
