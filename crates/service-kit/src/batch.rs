//! 1 Accept, 6 Announce: messages that go into a stream together, as one atomic batch (NATS ADR-50).
//!
//! A server that syncs before it acks does so once per message, but only a few times per batch: a batch is a group
//! commit. Nobody waits for company: a message goes at once and by itself unless so many are on their way that a batch
//! is cheaper; then [`Publisher::publish`] sends together what has gathered while those before were on their way.
//!
//! A batch is stored as a whole or refused as a whole, for one message that is too large or was stored before (a
//! repeated message id), or because the stream is full. So what was refused together is published again one by one,
//! and every message has an outcome of its own. The same is done where batches gain nothing: on servers before 2.15,
//! where the stream does not allow them, and where trying shows that each by itself is quicker (a server that does not
//! sync before it acks does not say so). There, what has gathered goes without waiting between its messages, which still saves
//! both sides most of the reads and writes, and as a fast-ingest batch where the server knows those, which saves most of the acks.

use std::{
    collections::VecDeque,
    fmt,
    future::ready,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_nats::{
    Client, HeaderMap,
    jetstream::{self, ErrorCode, message::OutboundMessage, publish::PublishAck},
};
use contract::headers;
use futures::future::{Either, join_all};
use tokio::sync::oneshot;

use crate::{
    choice::{Choice, Way},
    ingest::{Ingest, IngestError},
    metrics::Publishing,
    nats,
    publish::{self, PublishError},
    version::ServerVersion,
};

/// Most messages of a batch: what the server takes.
const BATCH_MESSAGES: usize = 1000;
/// Most bytes of a batch. More delays those that wait for the next one, less syncs more often.
const BATCH_BYTES: usize = 1 << 20;
/// From how many messages on a batch is cheaper: for the server it is work like that of about ten messages (staged in a
/// file of its own, which is synced too). Measured: docs/results/sync-before-ack.md.
const WORTH_A_BATCH: usize = 16;
/// From how many messages on one ack for all of them is cheaper than one each: the server acks the first one and the last one.
const WORTH_ONE_ACK: usize = 4;
/// Most batches, or other groups of what has gathered, on their way at once. More of them are smaller and sync more often, fewer
/// leave the server idle while an ack travels. The server takes 50 of a stream, of all its publishers.
const IN_FLIGHT: usize = 2;
/// How often the version of the server is read, which is a copy of all that it says of itself.
const READ_VERSION: Duration = Duration::from_secs(1);
/// How long a stream that does not allow batches is not asked again. It may allow them after an upgrade.
const REFUSED: Duration = Duration::from_secs(30);
/// What a message takes beside its subject, payload and the values of its own headers.
const OVERHEAD: usize = 256;

/// That a message is in its stream, now or since one with its id was published before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its sequence there. None where the ack was for others, too, and names the last one's alone.
    pub sequence: Option<u64>,
}

impl From<PublishAck> for Stored {
    fn from(ack: PublishAck) -> Self {
        Self { sequence: Some(ack.sequence) }
    }
}

/// Publishes to one stream, in atomic batches where they pay and the stream allows them.
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
    ingest: Ingest,
    mode: Mutex<Mode>,
    queue: Mutex<Queue>,
    /// The way of messages that come one by one, of many callers, and gather.
    singles: Mutex<Choice>,
    /// The way of messages that come together, of one caller.
    sequences: Mutex<Choice>,
    metrics: Publishing,
}

/// How to publish together, as far as is known.
#[derive(Debug, Default)]
struct Mode {
    /// The server's version, and when it was read: the next connection may lead to another server.
    version: Option<(Instant, ServerVersion)>,
    /// When the stream said that it does not allow atomic batches.
    refused_at: Option<Instant>,
    /// When it said that it does not allow fast-ingest batches.
    ingest_refused_at: Option<Instant>,
}

/// Messages that wait to go with others, and what is on its way.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    groups: usize,
    alone: usize,
}

struct Waiting {
    message: OutboundMessage,
    outcome: oneshot::Sender<Result<Stored, PublishError>>,
}

impl Publisher {
    /// A publisher on this connection.
    pub fn new(js: jetstream::Context) -> Self {
        Self::observed(js, Publishing::default())
    }

    /// A publisher on this connection, and where it notes how that goes.
    pub fn observed(js: jetstream::Context, metrics: Publishing) -> Self {
        let client = js.client();
        // Where the server syncs, the first trial finds that out. Where it does not, the two can be too close on a quick disk for a
        // trial to tell, and this is the one that takes less of both sides.
        let choice = || Mutex::new(Choice::new(Way::Apart));
        let ingest = Ingest::new(client.clone(), nats::ACK_TIMEOUT);
        let (mode, queue, singles, sequences) = (Mutex::default(), Mutex::default(), choice(), choice());
        Self { shared: Arc::new(Shared { js, client, ingest, mode, queue, singles, sequences, metrics }) }
    }

    /// Publishes a message and waits until the stream has it. It may go in one batch with others that are published at
    /// the same time; in what order is not said. Callers bound how many wait.
    pub async fn publish(&self, message: OutboundMessage) -> Result<Stored, PublishError> {
        self.timed(self.publish_one(message)).await
    }

    async fn timed<T>(&self, publish: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let published = publish.await;
        self.shared.metrics.acks.observe(begun.elapsed().as_secs_f64());
        published
    }

    async fn publish_one(&self, message: OutboundMessage) -> Result<Stored, PublishError> {
        if let Some(_alone) = Alone::begin(&self.shared) {
            return publish::publish(&self.shared.js, message).await.map(Stored::from);
        }
        let (outcome, told) = oneshot::channel();
        if let Some(turn) = Turn::begin(&self.shared, Waiting { message, outcome }) {
            // Not supervised: those whose messages it carries wait for it, and are told when it dies.
            tokio::spawn(turn.run());
        }
        told.await.unwrap_or(Err(PublishError::Unconfirmed))
    }

    /// Publishes messages in this order, then waits for what became of each of them. Callers bound how many there are.
    pub async fn publish_each(&self, messages: Vec<OutboundMessage>) -> Vec<Result<Stored, PublishError>> {
        let publish = async {
            let mut outcomes = Vec::with_capacity(messages.len());
            for batch in batches(messages) {
                outcomes.extend(self.shared.publish_sequence(batch).await);
            }
            outcomes
        };
        self.timed(publish).await
    }

    /// Publishes messages in this order, then waits until the stream has them all.
    ///
    /// After an error some may be stored: publish them all again, their message ids keep them from being stored twice.
    pub async fn publish_all(&self, messages: impl IntoIterator<Item = OutboundMessage>) -> Result<(), PublishError> {
        let publish = async {
            for batch in batches(messages) {
                for outcome in self.shared.publish_sequence(batch).await {
                    outcome?;
                }
            }
            Ok(())
        };
        self.timed(publish).await
    }
}

impl Shared {
    /// Counts what messages took, each.
    fn took(&self, choice: &Mutex<Choice>, way: Way, each: Duration, messages: usize) {
        if lock(choice).took(way, each, messages, Instant::now()) {
            match way {
                Way::Batch => tracing::info!("atomic batches are quicker now: publishing in batches"),
                Way::Apart => tracing::info!(
                    "acks come sooner without atomic batches, as from a server that does not sync before it acks: publishing \
                     each message by itself"
                ),
            }
        }
    }

    /// Publishes messages that came together, the way that is quicker; the outcome of each. Where the other way is tried, only so
    /// many go that way as it takes to know: by themselves to a server that syncs for each of them, hundreds would take long.
    async fn publish_sequence(&self, mut messages: Vec<OutboundMessage>) -> Vec<Result<Stored, PublishError>> {
        if messages.len() < WORTH_A_BATCH {
            return self.publish_apart(messages).await;
        }
        let (way, most) = lock(&self.sequences).next();
        let rest = messages.split_off(most.min(messages.len()));
        let mut outcomes = self.publish_timed(&self.sequences, way, messages).await;
        if !rest.is_empty() {
            let (way, _) = lock(&self.sequences).next();
            outcomes.extend(self.publish_timed(&self.sequences, way, rest).await);
        }
        outcomes
    }

    /// Publishes messages this way where there is a choice, and notes how long that took each.
    async fn publish_timed(
        &self,
        choice: &Mutex<Choice>,
        way: Way,
        messages: Vec<OutboundMessage>,
    ) -> Vec<Result<Stored, PublishError>> {
        if !self.has_batches() {
            return self.publish_apart(messages).await;
        }
        let (count, begun) = (messages.len(), Instant::now());
        let outcomes = match way {
            Way::Batch => self.publish_together(messages).await,
            Way::Apart => self.publish_apart(messages).await,
        };
        // As many as a batch takes at least: what fewer take tells nothing of the ways.
        if count >= WORTH_A_BATCH && outcomes.iter().all(Result::is_ok) {
            self.took(choice, way, begun.elapsed() / u32::try_from(count).unwrap_or(u32::MAX), count);
        }
        outcomes
    }

    /// Whether to try an atomic batch.
    fn has_batches(&self) -> bool {
        let mut mode = lock(&self.mode);
        self.version(&mut mode).syncs_batches_as_one() && !is_refused(mode.refused_at)
    }

    /// Whether to try a fast-ingest batch.
    fn has_ingest(&self) -> bool {
        let mut mode = lock(&self.mode);
        self.version(&mut mode).knows_fast_ingest() && !is_refused(mode.ingest_refused_at)
    }

    fn version(&self, mode: &mut Mode) -> ServerVersion {
        if let Some((_, version)) = mode.version.filter(|(read_at, _)| read_at.elapsed() <= READ_VERSION) {
            return version;
        }
        let version = ServerVersion::parse(&self.client.server_info().version);
        mode.version = Some((Instant::now(), version));
        version
    }

    /// Publishes messages in this order, together where that is possible; the outcome of each.
    async fn publish_together(&self, messages: Vec<OutboundMessage>) -> Vec<Result<Stored, PublishError>> {
        if messages.len() >= WORTH_A_BATCH {
            match self.publish_batch(&messages).await {
                Ok(outcomes) => {
                    self.metrics.batches.observe(messages.len() as f64);
                    return outcomes.into_iter().map(Ok).collect();
                }
                // Whether the batch is there or not: as a whole.
                Err(PublishError::Unconfirmed) => {
                    return messages.iter().map(|_| Err(PublishError::Unconfirmed)).collect();
                }
                Err(e) => tracing::debug!(messages = messages.len(), "a batch was refused, publishing one by one: {e}"),
            }
        }
        self.publish_apart(messages).await
    }

    /// Publishes messages in this order, each stored as it comes; the outcome of each. One ack is for all of them where the
    /// stream allows that and all goes well.
    async fn publish_apart(&self, messages: Vec<OutboundMessage>) -> Vec<Result<Stored, PublishError>> {
        if messages.len() >= WORTH_ONE_ACK && publish::connected(&self.client).is_ok() && self.has_ingest() {
            match self.ingest.publish(&messages).await {
                Ok(()) => return messages.iter().map(|_| Ok(Stored { sequence: None })).collect(),
                Err(IngestError::Unconfirmed) => {
                    return messages.iter().map(|_| Err(PublishError::Unconfirmed)).collect();
                }
                Err(IngestError::Disabled) => {
                    tracing::warn!("the stream takes no fast-ingest batches: each message is acked by itself");
                    lock(&self.mode).ingest_refused_at = Some(Instant::now());
                }
                Err(e) => tracing::debug!(messages = messages.len(), "publishing again, one by one: {e}"),
            }
        }
        let mut acks = Vec::with_capacity(messages.len());
        for message in messages {
            acks.push(match publish::send(&self.js, message).await {
                Ok(ack) => Either::Left(async { Ok(ack.await?.into()) }),
                Err(e) => Either::Right(ready(Err(e))),
            });
        }
        join_all(acks).await
    }

    /// Publishes messages as one batch. After an error other than [`PublishError::Unconfirmed`] none is stored, or those
    /// that are will be known again by their message ids.
    async fn publish_batch(&self, messages: &[OutboundMessage]) -> Result<Vec<Stored>, PublishError> {
        let max_payload = self.client.max_payload();
        if messages.iter().any(|message| size(message) > max_payload) {
            return Err(PublishError::TooLarge);
        }
        publish::connected(&self.client)?;
        let id = format!("{:016x}", rand::random::<u64>());
        let Some((last, others)) = messages.split_last() else { return Ok(Vec::new()) };
        for (place, message) in (1..).zip(others) {
            let map = batch_headers(message, &id, place);
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
                    lock(&self.mode).refused_at = Some(Instant::now());
                }
                return Err(e.into());
            }
        };
        let Some(first) = committed(&ack, &id, messages.len() as u64) else {
            lock(&self.mode).refused_at = Some(Instant::now());
            return Err(PublishError::Refused("the stream's server does not know atomic batches".into()));
        };
        Ok((first..=ack.sequence).map(|sequence| Stored { sequence: Some(sequence) }).collect())
    }
}

/// Whether the stream said so lately.
fn is_refused(at: Option<Instant>) -> bool {
    at.is_some_and(|at| at.elapsed() <= REFUSED)
}

/// The sequence of a batch's first message, if this acks the batch. A server that knows no batches, as there may be one
/// in a cluster, acks the last message alone.
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

/// About how many bytes a message is on the wire, rather more.
fn size(message: &OutboundMessage) -> usize {
    message.subject.len() + message.payload.len() + OVERHEAD
}

/// Messages in their order, as much in each batch as it takes.
fn batches(messages: impl IntoIterator<Item = OutboundMessage>) -> impl Iterator<Item = Vec<OutboundMessage>> {
    let mut messages = messages.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut room = Room::default();
        let mut batch = Vec::new();
        while let Some(message) = messages.next_if(|message| room.takes(size(message))) {
            batch.push(message);
        }
        (!batch.is_empty()).then_some(batch)
    })
}

/// What a batch can still take.
#[derive(Debug, Default)]
struct Room {
    messages: usize,
    bytes: usize,
}

impl Room {
    /// Takes a message of this size, or says that the batch is full. The first one always fits.
    fn takes(&mut self, size: usize) -> bool {
        let fits = self.messages == 0 || (self.messages < BATCH_MESSAGES && self.bytes + size <= BATCH_BYTES);
        if fits {
            self.messages += 1;
            self.bytes += size;
        }
        fits
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A message on its way by itself.
struct Alone<'a>(&'a Shared);

impl<'a> Alone<'a> {
    /// None when the message should go with others.
    fn begin(shared: &'a Shared) -> Option<Self> {
        let mut queue = lock(&shared.queue);
        if queue.groups > 0 || queue.alone >= WORTH_A_BATCH {
            return None;
        }
        queue.alone += 1;
        Some(Self(shared))
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        lock(&self.0.queue).alone -= 1;
    }
}

/// The right to have messages on their way together. Publishes what waits, group after group, until nothing does.
struct Turn {
    shared: Arc<Shared>,
    over: bool,
}

impl Turn {
    /// Lets a message wait; with a turn if it need not.
    fn begin(shared: &Arc<Shared>, waiting: Waiting) -> Option<Self> {
        let mut queue = lock(&shared.queue);
        queue.waiting.push_back(waiting);
        if queue.groups == IN_FLIGHT {
            return None;
        }
        queue.groups += 1;
        Some(Self { shared: shared.clone(), over: false })
    }

    async fn run(mut self) {
        while let Some((way, group)) = self.next() {
            let (messages, outcomes): (Vec<_>, Vec<_>) = group.into_iter().map(|w| (w.message, w.outcome)).unzip();
            for (outcome, told) in
                self.shared.publish_timed(&self.shared.singles, way, messages).await.into_iter().zip(outcomes)
            {
                // Nobody listens any more where a client hung up.
                let _ = told.send(outcome);
            }
        }
    }

    /// What waits, as much as goes together, and which way. With nothing, the turn is over.
    fn next(&mut self) -> Option<(Way, Vec<Waiting>)> {
        let (way, most) = lock(&self.shared.singles).next();
        let mut queue = lock(&self.shared.queue);
        let mut room = Room::default();
        let mut group = Vec::new();
        while group.len() < most
            && let Some(waiting) = queue.waiting.pop_front_if(|waiting| room.takes(size(&waiting.message)))
        {
            group.push(waiting);
        }
        if group.is_empty() {
            queue.groups -= 1;
            self.over = true;
            return None;
        }
        Some((way, group))
    }
}

impl Drop for Turn {
    /// A panic must not take the turn with it.
    fn drop(&mut self) {
        if !mem::replace(&mut self.over, true) {
            lock(&self.shared.queue).groups -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_ack_of_the_last_message_is_no_ack_of_the_batch() {
        let ack = |batch_id: Option<&str>, batch_size| PublishAck {
            sequence: 30,
            batch_id: batch_id.map(str::to_owned),
            batch_size,
            ..PublishAck::default()
        };
        assert_eq!(committed(&ack(Some("b"), Some(20)), "b", 20), Some(11));
        for alone in [ack(None, None), ack(Some("a"), Some(20)), ack(Some("b"), Some(19)), ack(Some("b"), None)] {
            assert_eq!(committed(&alone, "b", 20), None, "{alone:?}");
        }
    }

    proptest! {
        #[test]
        fn a_batch_is_bounded_and_never_empty(sizes in prop::collection::vec(1..3 * BATCH_BYTES / 2, 1..50), small: bool) {
            let sizes: Vec<_> = if small { sizes.iter().cycle().map(|size| size % 300).take(2500).collect() } else { sizes };
            let mut left = sizes.as_slice();
            while !left.is_empty() {
                let mut room = Room::default();
                let taken = left.iter().take_while(|size| room.takes(**size)).count();
                let bytes: usize = left[..taken].iter().sum();
                prop_assert!(taken == 1 || (2..=BATCH_MESSAGES).contains(&taken) && bytes <= BATCH_BYTES);
                // And it takes what it can.
                prop_assert!(taken == left.len() || taken == BATCH_MESSAGES || bytes + left[taken] > BATCH_BYTES);
                left = &left[taken..];
            }
        }
    }
}
