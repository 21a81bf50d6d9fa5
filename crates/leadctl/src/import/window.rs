//! The chunks that were sent and whose outcomes are not written yet.

use std::collections::{HashMap, VecDeque};

use contract::{ObjectId, Timestamp};

use crate::import::follow::Outcome;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RowStatus {
    /// The row itself is wrong; it was not sent.
    Invalid {
        /// The code with which the gateway would refuse the row's body, if it would.
        code: Option<&'static str>,
        error: String,
    },
    /// The gateway did not accept it.
    Rejected {
        code: String,
        error: String,
    },
    /// Accepted; the import waits for the outcome.
    Awaited(ObjectId),
    /// Accepted; the outcome did not arrive in time.
    Pending(ObjectId),
    Succeeded(ObjectId),
    Failed {
        update_id: ObjectId,
        code: Option<String>,
        error: String,
    },
    /// An interrupted import sent it too long ago to repeat it: it may have been accepted or not.
    Unknown,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RowRecord {
    pub(crate) number: u64,
    pub(crate) lead_id: Option<String>,
    pub(crate) reference_id: Option<String>,
    pub(crate) status: RowStatus,
}

/// The rows of one request.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) records: Vec<RowRecord>,
    /// The time of the first attempt.
    pub(crate) sent_at: Timestamp,
    /// An event before the first attempt: following from it misses no outcome of the chunk.
    pub(crate) last_event_id: Option<String>,
}

impl Chunk {
    fn awaited(&self) -> usize {
        self.records.iter().filter(|record| matches!(record.status, RowStatus::Awaited(_))).count()
    }
}

/// The chunks whose outcomes are not written yet, in the order of the file.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// Each with its number of awaited rows.
    chunks: VecDeque<(Chunk, usize)>,
    /// Chunks removed so far.
    removed: usize,
    /// Chunk number (counted from the first chunk of the import) and row index of each awaited update.
    positions: HashMap<ObjectId, (usize, usize)>,
}

impl Window {
    pub(crate) fn push(&mut self, chunk: Chunk) {
        let number = self.removed + self.chunks.len();
        for (n, record) in chunk.records.iter().enumerate() {
            if let RowStatus::Awaited(update_id) = record.status {
                self.positions.insert(update_id, (number, n));
            }
        }
        let awaited = chunk.awaited();
        self.chunks.push_back((chunk, awaited));
    }

    /// Records an outcome; returns whether it was awaited.
    pub(crate) fn record(&mut self, outcome: Outcome) -> bool {
        let Some((chunk, row)) = self.positions.remove(&outcome.update_id) else { return false };
        let Some((chunk, awaited)) = self.chunks.get_mut(chunk - self.removed) else { return false };
        let record = &mut chunk.records[row];
        record.lead_id = record.lead_id.take().or(outcome.lead_id.map(|id| id.to_string()));
        record.status = match outcome.error {
            None => RowStatus::Succeeded(outcome.update_id),
            Some(error) => RowStatus::Failed { update_id: outcome.update_id, code: outcome.code, error },
        };
        *awaited -= 1;
        true
    }

    /// Marks the oldest chunk's awaited rows as pending.
    pub(crate) fn stop_waiting_for_oldest(&mut self) {
        let Some((chunk, awaited)) = self.chunks.front_mut() else { return };
        *awaited = 0;
        for record in &mut chunk.records {
            if let RowStatus::Awaited(update_id) = record.status {
                self.positions.remove(&update_id);
                record.status = RowStatus::Pending(update_id);
            }
        }
    }

    /// Removes and returns the oldest chunk if none of its rows is awaited.
    pub(crate) fn pop_complete(&mut self) -> Option<Chunk> {
        let (chunk, _) = self.chunks.pop_front_if(|(_, awaited)| *awaited == 0)?;
        self.removed += 1;
        Some(chunk)
    }

    pub(crate) fn oldest(&self) -> Option<&Chunk> {
        self.chunks.front().map(|(chunk, _)| chunk)
    }

    pub(crate) fn rows(&self) -> usize {
        self.chunks.iter().map(|(chunk, _)| chunk.records.len()).sum()
    }

    pub(crate) fn awaited(&self) -> impl ExactSizeIterator<Item = ObjectId> + '_ {
        self.positions.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ObjectId {
        ObjectId::from_bytes([n; 12])
    }

    fn chunk(statuses: impl IntoIterator<Item = RowStatus>) -> Chunk {
        let records = statuses.into_iter().zip(1..);
        let records = records.map(|(status, number)| RowRecord { number, lead_id: None, reference_id: None, status });
        Chunk { records: records.collect(), sent_at: Timestamp::from_millis(0), last_event_id: None }
    }

    fn outcome(n: u8, error: Option<&str>) -> Outcome {
        Outcome {
            update_id: id(n),
            lead_id: Some(id(9)),
            error: error.map(str::to_owned),
            code: error.map(|_| "c".into()),
        }
    }

    #[test]
    fn chunks_are_completed_in_file_order_with_outcomes_in_any_order() {
        let mut window = Window::default();
        window.push(chunk([RowStatus::Awaited(id(1)), RowStatus::Invalid { code: None, error: "odd".into() }]));
        window.push(chunk([RowStatus::Awaited(id(2))]));
        assert!(
            window.record(outcome(2, Some("no")))
                && !window.record(outcome(2, None))
                && !window.record(outcome(7, None))
        );
        assert!(window.pop_complete().is_none(), "the first chunk is incomplete");
        assert_eq!((window.rows(), window.awaited().collect::<Vec<_>>()), (3, vec![id(1)]));
        assert!(window.record(outcome(1, None)));
        let first = window.pop_complete().unwrap();
        assert_eq!(first.records[0].status, RowStatus::Succeeded(id(1)));
        assert_eq!(first.records[0].lead_id, Some(id(9).to_string()));
        window.push(chunk([RowStatus::Awaited(id(3)), RowStatus::Awaited(id(4))]));
        let second = window.pop_complete().unwrap();
        assert_eq!(
            second.records[0].status,
            RowStatus::Failed { update_id: id(2), code: Some("c".into()), error: "no".into() }
        );
        // Chunk numbers keep counting after chunks were removed.
        assert!(window.record(outcome(4, None)) && window.pop_complete().is_none());
        window.stop_waiting_for_oldest();
        assert!(!window.record(outcome(3, None)), "its chunk is no longer awaited");
        let third = window.pop_complete().unwrap();
        assert_eq!(third.records[0].status, RowStatus::Pending(id(3)));
        assert_eq!(third.records[1].status, RowStatus::Succeeded(id(4)));
        assert!(window.oldest().is_none() && window.awaited().len() == 0);
    }
}
