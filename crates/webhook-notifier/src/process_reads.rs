//! 8 Retry: reads processes of due deliveries in the bucket, where memory does not suffice. A process that cannot be
//! read delays no other.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use contract::subject::process_key;
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, timeout_at};

use crate::{callbacks::ProcessUnreadable, store::parked::ProcessRef};

/// How long a round waits for processes. A longer timeout delays the retries of all tenants when NATS
/// does not answer; a shorter one leaves more processes to a later round when NATS is slow.
const TIMEOUT: Duration = Duration::from_millis(500);
/// How long after a failure a process is not read again. A longer pause delays its
/// deliveries when NATS is back; a shorter one repeats useless reads of malformed entries.
const PAUSE: Duration = Duration::from_secs(5);
/// Maximum number of reads per round. More reads take more memory; fewer leave more processes to the next round.
const MAX_READS: usize = 64;

/// Reads processes, and remembers failed reads across rounds.
#[derive(Debug, Default)]
pub(crate) struct ProcessReads {
    /// The processes that could not be read, and until when they are not read again.
    failed: HashMap<ProcessRef, Instant>,
}

impl ProcessReads {
    /// Returns the processes that could be read. `None` instead of a process: it is not in the configuration. A process
    /// that could not be read is missing from the result.
    pub(crate) async fn read<T, F>(
        &mut self,
        processes: impl IntoIterator<Item = ProcessRef>,
        read: impl Fn(ProcessRef) -> F,
    ) -> HashMap<ProcessRef, Option<T>>
    where
        F: Future<Output = Result<Option<T>, ProcessUnreadable>>,
    {
        let start = Instant::now();
        let mut found = HashMap::new();
        let processes = processes.into_iter().collect::<HashSet<_>>();
        self.failed.retain(|process, _| processes.contains(process));
        let may_be_read = |process: &&ProcessRef| self.failed.get(*process).is_none_or(|until| *until <= start);
        let mut unread = processes.iter().filter(may_be_read).copied().take(MAX_READS).collect::<HashSet<_>>();
        let mut reads = FuturesUnordered::new();
        for process in &unread {
            let (process, read) = (*process, read(*process));
            reads.push(async move { (process, read.await) });
        }
        while let Ok(Some((process, result))) = timeout_at(start + TIMEOUT, reads.next()).await {
            unread.remove(&process);
            match result {
                Ok(known) => {
                    self.failed.remove(&process);
                    found.insert(process, known);
                }
                Err(e) => self.note_failure(process, &e),
            }
        }
        for (project_id, process_id) in unread {
            let cause = format!("no answer within {TIMEOUT:?}");
            let e = ProcessUnreadable::new(process_key(project_id, process_id), cause, false);
            self.note_failure((project_id, process_id), &e);
        }
        found
    }

    /// Logs the first of successive failures of a process.
    fn note_failure(&mut self, process: ProcessRef, e: &ProcessUnreadable) {
        if self.failed.insert(process, Instant::now() + PAUSE).is_none() {
            let (project_id, process_id) = process;
            tracing::error!(%project_id, ?process_id, "due deliveries wait: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, future::pending};

    use contract::ObjectId;

    use super::*;

    fn process(byte: u8) -> ProcessRef {
        (ObjectId::from_bytes([byte; 12]), None)
    }

    /// Reads from a bucket where process 2 is malformed and 3 is never answered, and the others are missing.
    async fn read(reads: &mut ProcessReads, processes: &[u8]) -> (HashMap<ProcessRef, Option<u8>>, Vec<u8>) {
        let sent = &RefCell::new(Vec::new());
        let read = |(project_id, _): ProcessRef| async move {
            let number = project_id.as_bytes()[0];
            sent.borrow_mut().push(number);
            match number {
                2 => Err(ProcessUnreadable::new("2", "malformed", true)),
                3 => pending().await,
                _ => Ok(None),
            }
        };
        let found = reads.read(processes.iter().map(|number| process(*number)), read).await;
        let mut sent = sent.take();
        sent.sort_unstable();
        (found, sent)
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_without_an_answer_delays_the_others_for_a_bounded_time() {
        let mut reads = ProcessReads::default();
        let start = Instant::now();

        let (found, sent) = read(&mut reads, &[3, 1, 4, 1, 2, 3]).await;

        assert_eq!(start.elapsed(), TIMEOUT);
        assert_eq!(found, HashMap::from([(process(1), None), (process(4), None)]));
        assert_eq!(sent, [1, 2, 3, 4], "each is read once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_could_not_be_read_is_not_read_again_for_a_while() {
        let mut reads = ProcessReads::default();
        read(&mut reads, &[2, 3]).await;
        let start = Instant::now();

        assert_eq!(read(&mut reads, &[1, 2, 3]).await.1, [1]);
        assert_eq!(start.elapsed(), Duration::ZERO, "and delays no round meanwhile");

        tokio::time::sleep(PAUSE).await;
        assert_eq!(read(&mut reads, &[2, 3]).await.1, [2, 3]);
        assert_eq!(reads.failed.len(), 2);
        read(&mut reads, &[1, 4]).await;
        assert!(reads.failed.is_empty(), "a process without due deliveries is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn many_processes_are_read_in_several_rounds() {
        let mut reads = ProcessReads::default();
        let all: Vec<u8> = (5..205).collect();

        let (found, sent) = read(&mut reads, &all).await;

        assert_eq!((found.len(), sent.len()), (MAX_READS, MAX_READS));
    }
}
