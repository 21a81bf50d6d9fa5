//! The rows that were sent and whose outcomes are not written yet: a bounded number of chunks.

use std::collections::{HashMap, VecDeque};

use contract::{ObjectId, Timestamp};

use crate::import::follow::Outcome;

/// What is known of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is wrong, and was not sent.
    Invalid(String),
    /// The gateway did not accept it.
    Refused {
        code: String,
        error: String,
    },
    /// Accepted; its outcome is awaited.
    Waiting(ObjectId),
    /// Accepted; its outcome was not waited for any longer.
    Pending(ObjectId),
    Succeeded(ObjectId),
    Failed {
        update_id: ObjectId,
        code: Option<String>,
        error: String,
    },
    /// It was sent by an import that was cut off, too long ago to be sent again: it may have been accepted or not.
    Unknown,
}

/// A row, and what became of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) number: u64,
    pub(crate) lead_id: Option<String>,
    pub(crate) reference_id: Option<String>,
    pub(crate) fate: Fate,
}

/// Rows that were sent in one request.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) records: Vec<Record>,
    /// When it was first sent.
    pub(crate) sent_at: Timestamp,
    /// An event that was announced before it was sent.
    pub(crate) heard: Option<String>,
}

impl Chunk {
    fn waiting(&self) -> usize {
        self.records.iter().filter(|record| matches!(record.fate, Fate::Waiting(_))).count()
    }
}

/// The chunks whose outcomes are not written yet, in the order of the file.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// With how many of its rows wait.
    chunks: VecDeque<(Chunk, usize)>,
    /// How many chunks were taken out.
    taken: usize,
    /// Where the updates are that are waited for: chunk, counted from the first ever, and row.
    places: HashMap<ObjectId, (usize, usize)>,
}

impl Window {
    pub(crate) fn push(&mut self, chunk: Chunk) {
        let number = self.taken + self.chunks.len();
        for (n, record) in chunk.records.iter().enumerate() {
            if let Fate::Waiting(update_id) = record.fate {
                self.places.insert(update_id, (number, n));
            }
        }
        let waiting = chunk.waiting();
        self.chunks.push_back((chunk, waiting));
    }

    /// Hears of an outcome; whether it was waited for.
    pub(crate) fn hear(&mut self, outcome: Outcome) -> bool {
        let Some((chunk, row)) = self.places.remove(&outcome.update_id) else { return false };
        let Some((chunk, waiting)) = self.chunks.get_mut(chunk - self.taken) else { return false };
        let record = &mut chunk.records[row];
        record.lead_id = record.lead_id.take().or(outcome.lead_id.map(|id| id.to_string()));
        record.fate = match outcome.error {
            None => Fate::Succeeded(outcome.update_id),
            Some(error) => Fate::Failed { update_id: outcome.update_id, code: outcome.code, error },
        };
        *waiting -= 1;
        true
    }

    /// Stops waiting for the outcomes of the oldest chunk.
    pub(crate) fn give_up_oldest(&mut self) {
        let Some((chunk, waiting)) = self.chunks.front_mut() else { return };
        *waiting = 0;
        for record in &mut chunk.records {
            if let Fate::Waiting(update_id) = record.fate {
                self.places.remove(&update_id);
                record.fate = Fate::Pending(update_id);
            }
        }
    }

    /// Takes the oldest chunk out if none of its rows wait.
    pub(crate) fn take_settled(&mut self) -> Option<Chunk> {
        let (chunk, _) = self.chunks.pop_front_if(|(_, waiting)| *waiting == 0)?;
        self.taken += 1;
        Some(chunk)
    }

    /// The oldest chunk.
    pub(crate) fn oldest(&self) -> Option<&Chunk> {
        self.chunks.front().map(|(chunk, _)| chunk)
    }

    /// How many rows are in it.
    pub(crate) fn rows(&self) -> usize {
        self.chunks.iter().map(|(chunk, _)| chunk.records.len()).sum()
    }

    /// The updates whose outcomes are awaited.
    pub(crate) fn waiting(&self) -> impl ExactSizeIterator<Item = ObjectId> + '_ {
        self.places.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ObjectId {
        ObjectId::from_bytes([n; 12])
    }

    fn chunk(fates: impl IntoIterator<Item = Fate>) -> Chunk {
        let records = fates.into_iter().zip(1..);
        let records = records.map(|(fate, number)| Record { number, lead_id: None, reference_id: None, fate });
        Chunk { records: records.collect(), sent_at: Timestamp::from_millis(0), heard: None }
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
    fn chunks_are_settled_in_order_whatever_order_outcomes_come_in() {
        let mut window = Window::default();
        window.push(chunk([Fate::Waiting(id(1)), Fate::Invalid("odd".into())]));
        window.push(chunk([Fate::Waiting(id(2))]));
        assert!(
            window.hear(outcome(2, Some("no"))) && !window.hear(outcome(2, None)) && !window.hear(outcome(7, None))
        );
        assert!(window.take_settled().is_none(), "the first one waits");
        assert_eq!((window.rows(), window.waiting().collect::<Vec<_>>()), (3, vec![id(1)]));
        assert!(window.hear(outcome(1, None)));
        let first = window.take_settled().unwrap();
        assert_eq!(first.records[0].fate, Fate::Succeeded(id(1)));
        assert_eq!(first.records[0].lead_id, Some(id(9).to_string()));
        window.push(chunk([Fate::Waiting(id(3)), Fate::Waiting(id(4))]));
        let second = window.take_settled().unwrap();
        assert_eq!(
            second.records[0].fate,
            Fate::Failed { update_id: id(2), code: Some("c".into()), error: "no".into() }
        );
        // Numbers of chunks go on where others were taken out.
        assert!(window.hear(outcome(4, None)) && window.take_settled().is_none());
        window.give_up_oldest();
        assert!(!window.hear(outcome(3, None)), "it is not waited for any more");
        let third = window.take_settled().unwrap();
        assert_eq!(third.records[0].fate, Fate::Pending(id(3)));
        assert_eq!(third.records[1].fate, Fate::Succeeded(id(4)));
        assert!(window.oldest().is_none() && window.waiting().len() == 0);
    }
}
