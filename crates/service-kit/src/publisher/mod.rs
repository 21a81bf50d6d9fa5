//! 1 Accept, 6 Announce: publishes messages to a stream, those of one caller as one atomic batch (NATS ADR-50) if that
//! is faster.
//!
//! A server that syncs before it acknowledges does so once per message, but only a few times per batch: a batch is a
//! group commit. A batch is stored or refused as a whole: refused if one message is too large or a duplicate, or if the
//! stream is full. The messages of a refused batch are published again one by one, so each has its own outcome.
//! Messages are also published singly where batches gain nothing: on servers before 2.15, on streams that do not allow
//! them, and where a trial shows that single messages are faster (a client cannot see whether the server syncs). They
//! are then sent without a wait between them, which saves most of the reads and writes. Where the order counts, each
//! names the sequence of the one before, so that none is stored after a gap.

mod batch;
mod resend;
mod stored;
mod strategy;

use std::{
    fmt,
    future::ready,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use async_nats::{
    Client, HeaderMap,
    jetstream::{self, ErrorCode, message::OutboundMessage, publish::PublishAck},
};
use contract::headers;
use futures::future::{Either, join_all};
use tokio::sync::Semaphore;

pub use self::stored::Stored;
use self::{
    batch::{batches, wire_size},
    strategy::{PublishMode, PublishStrategy},
};
use crate::{
    metrics::Publishing,
    publish::{self, PublishError},
    version::ServerVersion,
};

/// The number of messages from which a batch is cheaper. A batch costs the server about as much as ten messages (a
/// staging file, which is synced too). Measured: docs/results/sync-before-ack.md.
const MIN_BATCH: usize = 16;
/// How long one message waits for its acknowledgement before it is sent again. A longer wait delays messages that were
/// sent to a dead leader; a shorter one sends more duplicates to a server with a slow disk.
const RESEND_AFTER: Duration = Duration::from_secs(2);
/// How many of the waiting messages are sent again at once. They probe a stream without a leader.
const MAX_RESENDS: usize = 64;
/// How often the server's version is read; reading copies all of the server's information.
const READ_SERVER: Duration = Duration::from_secs(1);
/// How long a stream that does not allow batches is not tried again. It may allow them after an upgrade.
const RETRY_AFTER_REFUSAL: Duration = Duration::from_secs(30);

type Outcome = Result<Stored, PublishError>;

/// Publishes to one stream, in atomic batches where they are faster and the stream allows them.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

struct Shared {
    js: jetstream::Context,
    client: Client,
    support: Mutex<Support>,
    sequences: Mutex<PublishStrategy>,
    /// Permits to send messages again while the stream has no leader.
    resends: Semaphore,
    /// How many publishes wait for the stream's leader.
    waiting: AtomicUsize,
    metrics: Publishing,
}

/// What the server and the stream support, as far as is known.
#[derive(Debug, Default)]
struct Support {
    /// The server's version, and when it was read: the next connection may lead to another server.
    server: Option<(Instant, ServerVersion)>,
    /// When the stream last refused batches in general.
    refused_at: Option<Instant>,
}

impl Publisher {
    /// A publisher on this connection.
    pub fn new(js: jetstream::Context) -> Self {
        Self::observed(js, Publishing::default())
    }

    /// A publisher on this connection that records metrics.
    pub fn observed(js: jetstream::Context, metrics: Publishing) -> Self {
        let client = js.client();
        // If the server syncs, the first trial shows it. If it does not, a trial may not tell the two apart on a fast
        // disk, and single messages take less CPU on both sides.
        let sequences = Mutex::new(PublishStrategy::new(PublishMode::Single));
        let (support, resends, waiting) = (Mutex::default(), Semaphore::new(MAX_RESENDS), AtomicUsize::new(0));
        Self { shared: Arc::new(Shared { js, client, support, sequences, resends, waiting, metrics }) }
    }

    /// Maximum bytes of a message with its headers, as the server reports it.
    pub fn max_payload(&self) -> usize {
        self.shared.client.max_payload()
    }

    /// Publishes a message and waits until the stream has it. Callers bound how many messages wait.
    pub async fn publish(&self, message: OutboundMessage) -> Result<Stored, PublishError> {
        self.timed(async { publish::publish(&self.shared.js, message).await.map(Stored::from) }).await
    }

    async fn timed<T>(&self, publish: impl Future<Output = T>) -> T {
        // Without a connection nothing is sent, and fails at once.
        let is_connected = publish::connected(&self.shared.client).is_ok();
        let started = Instant::now();
        let published = publish.await;
        if is_connected {
            self.shared.metrics.acks.observe(started.elapsed().as_secs_f64());
        }
        published
    }

    /// Publishes messages in this order and returns the outcome of each. Callers bound how many there are.
    pub async fn publish_each(&self, messages: Vec<OutboundMessage>) -> Vec<Result<Stored, PublishError>> {
        let publish = async {
            let mut outcomes = Vec::with_capacity(messages.len());
            for batch in batches(messages) {
                outcomes.extend(self.shared.publish_sequence(batch, None).await);
            }
            outcomes
        };
        self.timed(publish).await
    }

    /// Publishes messages in this order and waits until the stream has them all.
    ///
    /// # Errors
    /// Some may be stored. Publish all of them again; the stream recognizes duplicates by their message ids.
    pub async fn publish_all(&self, messages: impl IntoIterator<Item = OutboundMessage>) -> Result<(), PublishError> {
        let publish = async {
            for batch in batches(messages) {
                for outcome in self.shared.publish_sequence(batch, None).await {
                    outcome?;
                }
            }
            Ok(())
        };
        self.timed(publish).await
    }

    /// Publishes messages in this order to a stream whose last sequence is `last`, and to which nothing else publishes.
    /// Stores them without a gap: nothing that follows a message which failed. Returns the acks before the first
    /// failure, and that failure. It is [`PublishError::WrongLast`] if the stream has another last sequence, or behind
    /// a duplicate.
    pub async fn publish_chain(
        &self,
        messages: Vec<OutboundMessage>,
        mut last: u64,
    ) -> (Vec<Stored>, Option<PublishError>) {
        let publish = async {
            let mut acks = Vec::with_capacity(messages.len());
            for batch in batches(messages) {
                for outcome in self.shared.publish_sequence(batch, Some(last)).await {
                    match outcome {
                        Ok(ack) => acks.push(ack),
                        Err(e) => return (acks, Some(e)),
                    }
                }
                last = last_sequence(last, &acks);
            }
            (acks, None)
        };
        self.timed(publish).await
    }
}

/// The stream's last sequence after these acks.
fn last_sequence(before: u64, acks: &[Stored]) -> u64 {
    acks.iter().map(|ack| ack.sequence).fold(before, u64::max)
}

impl Shared {
    /// Records the time per message of a mode.
    fn observe(&self, mode: PublishMode, each: Duration, messages: usize) {
        if lock(&self.sequences).observe(mode, each, messages, Instant::now()) {
            match mode {
                PublishMode::Batch => tracing::info!("publishing in atomic batches: they are faster now"),
                PublishMode::Single => tracing::info!(
                    "publishing single messages: they are faster than atomic batches now, as on a server that does not sync \
                     before it acknowledges"
                ),
            }
        }
    }

    /// Publishes the messages of one caller in the faster mode; returns the outcome of each. A trial of the other mode
    /// takes no more messages than it needs: hundreds of single messages would take long on a server that syncs each of
    /// them.
    /// With the stream's last sequence as `chain`, the outcomes end after the first failure.
    async fn publish_sequence(&self, mut messages: Vec<OutboundMessage>, chain: Option<u64>) -> Vec<Outcome> {
        if messages.len() < MIN_BATCH {
            return self.publish_singly(messages, chain).await;
        }
        let (mode, limit) = lock(&self.sequences).next();
        let rest = messages.split_off(limit.min(messages.len()));
        let mut outcomes = self.publish_timed(mode, messages, chain).await;
        let is_broken = chain.is_some() && outcomes.iter().any(Result::is_err);
        if !rest.is_empty() && !is_broken {
            let (mode, _) = lock(&self.sequences).next();
            let acks = outcomes.iter().flatten().copied().collect::<Vec<_>>();
            let chain = chain.map(|last| last_sequence(last, &acks));
            outcomes.extend(self.publish_timed(mode, rest, chain).await);
        }
        outcomes
    }

    /// Publishes messages in this mode if the server supports batches, and records the time per message.
    async fn publish_timed(
        &self,
        mode: PublishMode,
        messages: Vec<OutboundMessage>,
        chain: Option<u64>,
    ) -> Vec<Outcome> {
        if !self.has_batches() {
            return self.publish_singly(messages, chain).await;
        }
        let (count, started) = (messages.len(), Instant::now());
        let outcomes = match mode {
            PublishMode::Batch => self.publish_batched(messages, chain).await,
            PublishMode::Single => self.publish_singly(messages, chain).await,
        };
        // Fewer messages than a batch needs say nothing about the modes.
        if count >= MIN_BATCH && outcomes.iter().all(Result::is_ok) {
            self.observe(mode, started.elapsed() / u32::try_from(count).unwrap_or(u32::MAX), count);
        }
        outcomes
    }

    /// Whether to try an atomic batch.
    fn has_batches(&self) -> bool {
        let mut support = lock(&self.support);
        let is_refused = support.refused_at.is_some_and(|at| at.elapsed() <= RETRY_AFTER_REFUSAL);
        self.server(&mut support).syncs_batches_as_one() && !is_refused
    }

    fn server(&self, support: &mut Support) -> ServerVersion {
        if let Some((_, version)) = support.server.filter(|(read_at, _)| read_at.elapsed() <= READ_SERVER) {
            return version;
        }
        let version = ServerVersion::parse(&self.client.server_info().version);
        support.server = Some((Instant::now(), version));
        version
    }

    /// Publishes messages in this order, as one batch if possible; returns the outcome of each.
    async fn publish_batched(&self, messages: Vec<OutboundMessage>, chain: Option<u64>) -> Vec<Outcome> {
        if messages.len() >= MIN_BATCH {
            match self.publish_batch(&messages, chain).await {
                Ok(outcomes) => {
                    self.metrics.batches.observe(messages.len() as f64);
                    return outcomes.into_iter().map(Ok).collect();
                }
                // The batch is stored as a whole or not at all.
                Err(PublishError::Unconfirmed) => {
                    return messages.iter().map(|_| Err(PublishError::Unconfirmed)).collect();
                }
                Err(e) => tracing::debug!(
                    messages = messages.len(),
                    "the batch was refused, publishing its messages one by one: {e}"
                ),
            }
        }
        self.publish_singly(messages, chain).await
    }

    /// Publishes messages in this order, each stored by itself, without waiting between them; returns the outcome of
    /// each. In a chain each is stored only behind the one before.
    async fn publish_singly(&self, messages: Vec<OutboundMessage>, chain: Option<u64>) -> Vec<Outcome> {
        let mut acks = Vec::with_capacity(messages.len());
        for (place, mut message) in (0..).zip(messages) {
            if let Some(last) = chain {
                let map = message.headers.get_or_insert_default();
                map.insert(headers::EXPECTED_LAST_SEQUENCE, (last + place).to_string());
            }
            match publish::send(&self.js, message).await {
                Ok(ack) => acks.push(Either::Left(async { Ok(ack.await?.into()) })),
                Err(e) => {
                    acks.push(Either::Right(ready(Err(e))));
                    if chain.is_some() {
                        break;
                    }
                }
            }
        }
        join_all(acks).await
    }

    /// Publishes messages as one batch. After an error other than [`PublishError::Unconfirmed`] none is stored, or the
    /// stream recognizes those that are by their message ids.
    async fn publish_batch(
        &self,
        messages: &[OutboundMessage],
        chain: Option<u64>,
    ) -> Result<Vec<Stored>, PublishError> {
        let max_payload = self.client.max_payload();
        if messages.iter().any(|message| wire_size(message) > max_payload) {
            return Err(PublishError::TooLarge);
        }
        publish::connected(&self.client)?;
        let id = format!("{:016x}", rand::random::<u64>());
        let Some((last, others)) = messages.split_last() else { return Ok(Vec::new()) };
        for (place, message) in (1..).zip(others) {
            let mut map = batch_headers(message, &id, place);
            // Only the first message of a batch may name it.
            if let Some(last) = chain.filter(|_| place == 1) {
                map.insert(headers::EXPECTED_LAST_SEQUENCE, last.to_string());
            }
            let sent = self.client.publish_with_headers(message.subject.clone(), map, message.payload.clone());
            sent.await.map_err(|e| PublishError::Refused(e.to_string()))?;
        }
        let mut map = batch_headers(last, &id, messages.len());
        map.insert(headers::BATCH_COMMIT, "1");
        let commit =
            OutboundMessage { subject: last.subject.clone(), payload: last.payload.clone(), headers: Some(map) };
        let ack = match publish::send(&self.js, commit).await?.await {
            Ok(ack) => ack,
            Err(e) => {
                if publish::error_code(&e) == Some(ErrorCode::ATOMIC_PUBLISH_DISABLED) {
                    tracing::warn!("the stream does not allow atomic batches: publishing one by one");
                    lock(&self.support).refused_at = Some(Instant::now());
                }
                return Err(e.into());
            }
        };
        let Some(first) = committed(&ack, &id, messages.len() as u64) else {
            lock(&self.support).refused_at = Some(Instant::now());
            return Err(PublishError::Refused("the stream's server does not support atomic batches".into()));
        };
        Ok((first..=ack.sequence).map(Stored::at).collect())
    }
}

/// The sequence of a batch's first message, if `ack` is for the batch. A server without batches, as one member of a
/// cluster may be, acknowledges only the last message.
fn committed(ack: &PublishAck, id: &str, messages: u64) -> Option<u64> {
    let whole = ack.batch_id.as_deref() == Some(id) && ack.batch_size == Some(messages);
    whole.then(|| (ack.sequence + 1).checked_sub(messages)).flatten()
}

fn batch_headers(message: &OutboundMessage, id: &str, place: usize) -> HeaderMap {
    let mut map = message.headers.clone().unwrap_or_default();
    map.insert(headers::BATCH_ID, id);
    map.insert(headers::BATCH_SEQUENCE, place.to_string());
    map
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        batch::{BATCH_BYTES, BATCH_MESSAGES, BatchBudget},
        *,
    };

    #[test]
    fn an_ack_of_the_last_message_alone_is_not_an_ack_of_the_batch() {
        let ack = |batch_id: Option<&str>, batch_size| PublishAck {
            sequence: 30,
            batch_id: batch_id.map(str::to_owned),
            batch_size,
            ..PublishAck::default()
        };
        assert_eq!(committed(&ack(Some("b"), Some(20)), "b", 20), Some(11));
        for singles_in_flight in
            [ack(None, None), ack(Some("a"), Some(20)), ack(Some("b"), Some(19)), ack(Some("b"), None)]
        {
            assert_eq!(committed(&singles_in_flight, "b", 20), None, "{singles_in_flight:?}");
        }
    }

    proptest! {
        #[test]
        fn a_batch_is_bounded_and_never_empty(sizes in prop::collection::vec(1..3 * BATCH_BYTES / 2, 1..50), small: bool) {
            let sizes: Vec<_> = if small { sizes.iter().cycle().map(|size| size % 300).take(2500).collect() } else { sizes };
            let mut rest = sizes.as_slice();
            while !rest.is_empty() {
                let mut budget = BatchBudget::default();
                let taken = rest.iter().take_while(|size| budget.try_add(**size)).count();
                let bytes: usize = rest[..taken].iter().sum();
                prop_assert!(taken == 1 || (2..=BATCH_MESSAGES).contains(&taken) && bytes <= BATCH_BYTES);
                // The batch is as full as possible.
                prop_assert!(taken == rest.len() || taken == BATCH_MESSAGES || bytes + rest[taken] > BATCH_BYTES);
                rest = &rest[taken..];
            }
        }
    }
}
