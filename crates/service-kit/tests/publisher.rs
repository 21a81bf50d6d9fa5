//! Publishes to a real nats-server of any version, in atomic batches if it syncs them as a whole and singly otherwise.
//! Callers see the same outcomes.
#![expect(clippy::unwrap_used, reason = "clippy sees no test in the functions that tests share")]

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::jetstream::{
    self,
    message::OutboundMessage,
    stream::{Config, DiscardPolicy},
};
use contract::{
    headers,
    streams::{LEAD_COMMANDS, LEAD_EVENTS, StreamLimits, WEBHOOK_EVENTS},
};
use futures::{StreamExt, future::join_all};
use service_kit::{
    nats,
    publish::{self, PublishError},
    publisher::{Publisher, Stored},
};
use test_support::{LocalNats, Signal, eventually};

const SOON: Duration = Duration::from_secs(30);
const LIMITS: StreamLimits = StreamLimits { max_bytes: 64 << 20, replicas: 1 };

/// Whether this server syncs batches as a whole, so that the publisher uses them.
fn batches(nats: &LocalNats) -> bool {
    nats.version() >= (2, 15, 0)
}

async fn start() -> (LocalNats, jetstream::Context) {
    let nats = test_support::nats().await;
    let js = nats::jetstream(&nats.connect().await.unwrap());
    nats::create_streams(&js, LIMITS).await.unwrap();
    (nats, js)
}

fn command(id: &str, payload: impl Into<bytes::Bytes>) -> OutboundMessage {
    publish::message("leads.cmd.p.update", id, None, payload.into())
}

/// Publishes all messages at the same time; returns the outcome of each.
async fn at_once(
    publisher: &Publisher,
    messages: impl IntoIterator<Item = OutboundMessage>,
) -> Vec<Result<Stored, PublishError>> {
    join_all(messages.into_iter().map(|message| publisher.publish(message))).await
}

/// The message ids of a stream in order, and how many of its messages came in batches.
async fn stored(js: &jetstream::Context, stream: &str) -> (Vec<String>, usize) {
    let mut stream = js.get_stream(stream).await.unwrap();
    let count = stream.info().await.unwrap().state.messages as usize;
    let consumer = stream.create_consumer(jetstream::consumer::pull::OrderedConfig::default()).await.unwrap();
    let messages: Vec<_> = consumer.messages().await.unwrap().take(count).map(Result::unwrap).collect().await;
    let header = |message: &jetstream::Message, name: &str| {
        message.headers.as_ref().and_then(|map| map.get(name)).map(ToString::to_string)
    };
    let ids = messages.iter().map(|message| header(message, headers::MESSAGE_ID).unwrap()).collect();
    (ids, messages.iter().filter(|message| header(message, headers::BATCH_ID).is_some()).count())
}

/// If the server syncs batches as a whole, the trial used them for all of the sequence but its beginning; later
/// messages used the faster mode.
fn assert_batched(nats: &LocalNats, batched: usize, most: usize) {
    let expected = if batches(nats) { 800..=most } else { 0..=0 };
    assert!(expected.contains(&batched), "{batched} in batches, not {expected:?}");
}

#[tokio::test]
async fn a_sequence_is_stored_in_order() {
    let (nats, js) = start().await;
    // More than fit into a batch, first by count, then by bytes.
    let event = |n: usize, size: usize| {
        publish::message("leads.evt.p.q.update.completed", &n.to_string(), None, vec![b'x'; size].into())
    };
    let publisher = Publisher::new(js.clone());
    publisher.publish_all((0..1500).map(|n| event(n, 100))).await.unwrap();
    publisher.publish_all((1500..1540).map(|n| event(n, 100_000))).await.unwrap();
    let (ids, batched) = stored(&js, LEAD_EVENTS).await;
    assert_eq!(ids, (0..1540).map(|n| n.to_string()).collect::<Vec<_>>());
    // Ten of the 40 large messages fit into a batch, which is below the minimum.
    assert_batched(&nats, batched, 1500);
}

#[tokio::test]
async fn nothing_behind_a_message_that_failed_is_stored() {
    let (_nats, js) = start().await;
    let limits = js.get_stream(LEAD_EVENTS).await.unwrap().cached_info().config.clone();
    let publisher = Publisher::new(js.clone());
    let event = |n: u64| {
        let payload = vec![b'x'; if n % 10 == 7 { 2000 } else { 100 }].into();
        publish::message("leads.evt.p.q.update.completed", &n.to_string(), None, payload)
    };
    // Single messages, then a batch, which falls back to single messages.
    for (first, end) in [(0, 10), (10, 60)] {
        let last = js.get_stream(LEAD_EVENTS).await.unwrap().cached_info().state.last_sequence;
        js.update_stream(Config { max_message_size: 1000, ..limits.clone() }).await.unwrap();

        let (acks, failed) = publisher.publish_chain((first..end).map(event).collect(), last).await;

        assert_eq!((acks.len(), failed), (7, Some(PublishError::TooLarge)));
        let (ids, _) = stored(&js, LEAD_EVENTS).await;
        assert_eq!(ids, (0..first + 7).map(|n| n.to_string()).collect::<Vec<_>>());

        js.update_stream(limits.clone()).await.unwrap();
        let (acks, failed) = publisher.publish_chain((first + 7..end).map(event).collect(), last + 7).await;
        assert_eq!((acks.len() as u64, failed), (end - first - 7, None));
    }
    let (ids, _) = stored(&js, LEAD_EVENTS).await;
    assert_eq!(ids, (0..60).map(|n| n.to_string()).collect::<Vec<_>>(), "in order");
}

#[tokio::test]
async fn a_chain_behind_another_sequence_is_refused_and_names_the_last_one() {
    let (_nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    let event = |n: u64| publish::message("leads.evt.p.q.update.completed", &n.to_string(), None, "{}".into());
    let events = |range: std::ops::Range<u64>| range.map(event).collect::<Vec<_>>();
    assert_eq!(publisher.publish_chain(events(0..5), 0).await.1, None);

    // The acks of the last two were lost, or another leader published them.
    assert_eq!(publisher.publish_chain(events(3..8), 3).await, (vec![], Some(PublishError::WrongLast(5))));
    // The others were at their places in the chain.
    assert_eq!(stored(&js, LEAD_EVENTS).await.0, (0..8).map(|n| n.to_string()).collect::<Vec<_>>());
    let is_duplicate = |acks: Vec<Stored>| acks.into_iter().map(|ack| ack.is_duplicate).collect::<Vec<_>>();
    for n in 3..8 {
        let (acks, failed) = publisher.publish_chain(events(n..n + 1), 8).await;
        assert_eq!((is_duplicate(acks), failed), (vec![true], None));
    }
    // What follows a duplicate is refused.
    let (acks, failed) = publisher.publish_chain(events(7..9), 8).await;
    assert_eq!((is_duplicate(acks), failed), (vec![true], Some(PublishError::WrongLast(8))));
    let (acks, failed) = publisher.publish_chain(events(8..40), 8).await;
    assert_eq!((acks.last().map(|ack| ack.sequence), failed), (Some(40), None));

    // A batch is refused as well.
    assert_eq!(publisher.publish_chain(events(40..80), 39).await, (vec![], Some(PublishError::WrongLast(40))));
}

#[tokio::test]
async fn a_duplicate_does_not_refuse_other_messages() {
    let (_nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    publisher.publish(command("7", "{}")).await.unwrap();
    // One message is in the stream already, one occurs twice.
    let ids: Vec<_> = (0..100).chain([42]).map(|n| n.to_string()).collect();
    let outcomes = at_once(&publisher, ids.iter().map(|id| command(id, "{}"))).await;
    let stands: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
    assert_eq!(stands[7].sequence, 1);
    let (ids, _) = stored(&js, LEAD_COMMANDS).await;
    assert_eq!((ids.len(), ids.iter().collect::<HashSet<_>>().len()), (100, 100));

    // After a crash between the acknowledgements and the checkpoint, all of them are published again, with more.
    publisher.publish_all((0..200).map(|n| command(&n.to_string(), "{}"))).await.unwrap();
    assert_eq!(stored(&js, LEAD_COMMANDS).await.0.len(), 200);
}

#[tokio::test]
async fn only_the_message_that_is_too_large_is_refused() {
    let (_nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    let body = |n| if n == 50 { vec![b'x'; 5 << 20] } else { vec![b'x'; 100] };
    let outcomes = at_once(&publisher, (0..100).map(|n| command(&n.to_string(), body(n)))).await;
    for (n, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(PublishError::TooLarge) => assert_eq!(n, 50),
            outcome => assert!(outcome.is_ok() && n != 50, "{n}: {outcome:?}"),
        }
    }
    assert_eq!(stored(&js, LEAD_COMMANDS).await.0.len(), 99);
}

#[tokio::test]
async fn each_message_of_a_sequence_has_its_outcome() {
    let (nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    publisher.publish(command("7", "{}")).await.unwrap();
    // The first 50 are a batch that is refused, because one of them is a duplicate; the message that is too large is in
    // no batch; the last 49 are a batch.
    let body = |n| vec![b'x'; if n == 50 { 5 << 20 } else { 100 }];
    let outcomes = publisher.publish_each((0..100).map(|n| command(&n.to_string(), body(n))).collect()).await;
    for (n, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(PublishError::TooLarge) => assert_eq!(n, 50),
            outcome => assert!(outcome.is_ok() && n != 50, "{n}: {outcome:?}"),
        }
    }
    let outcomes = publisher.publish_each((100..1500).map(|n| command(&n.to_string(), "{}")).collect()).await;
    for (outcome, sequence) in outcomes.into_iter().zip(100..) {
        assert_eq!(outcome.unwrap().sequence, sequence);
    }
    let (ids, batched) = stored(&js, LEAD_COMMANDS).await;
    let expected = [7].into_iter().chain((0..1500).filter(|n| ![7, 50].contains(n)));
    assert_eq!(ids, expected.map(|n| n.to_string()).collect::<Vec<_>>());
    assert_batched(&nats, batched, 49 + 1400);
}

#[tokio::test]
async fn a_full_stream_stores_what_fits_and_refuses_the_rest() {
    let (_nats, js) = start().await;
    js.delete_stream(LEAD_COMMANDS).await.unwrap();
    nats::create_streams(&js, StreamLimits { max_bytes: 100_000, replicas: 1 }).await.unwrap();
    let publisher = Publisher::new(js.clone());
    let outcomes = at_once(&publisher, (0..200).map(|n| command(&n.to_string(), vec![b'x'; 1000]))).await;
    let (ids, _) = stored(&js, LEAD_COMMANDS).await;
    let kept: HashSet<_> = ids.into_iter().collect();
    assert!((50..100).contains(&kept.len()), "{}", kept.len());
    for (n, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(PublishError::Full) => assert!(!kept.contains(&n.to_string())),
            outcome => assert!(outcome.is_ok() && kept.contains(&n.to_string()), "{n}: {outcome:?}"),
        }
    }
}

#[tokio::test]
async fn messages_are_not_kept_without_a_connection() {
    let (mut nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    publisher.publish(command("0", "{}")).await.unwrap();
    nats.kill9().await.unwrap();
    eventually(SOON, "the client knows", async || {
        js.client().connection_state() != async_nats::connection::State::Connected
    })
    .await;
    for outcome in at_once(&publisher, (0..50).map(|n| command(&n.to_string(), "{}"))).await {
        assert!(matches!(outcome, Err(PublishError::NotConnected)), "{outcome:?}");
    }
    assert!(matches!(publisher.publish_all([command("1", "{}")]).await, Err(PublishError::NotConnected)));
}

#[tokio::test]
async fn messages_that_a_frozen_server_did_not_acknowledge_are_sent_again_and_stored_once() {
    let (nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    publisher.publish(command("0", "{}")).await.unwrap();
    nats.signal(Signal::Stop).unwrap();
    let deadline = Instant::now() + SOON;
    let singles = join_all((1..100).map(|n| publisher.publish_until(move || command(&n.to_string(), "{}"), deadline)));
    let sequence = publisher.publish_each_until(50, |n| command(&(100 + n).to_string(), "{}"), deadline);
    let thaw = async {
        // Longer than a message waits for its acknowledgement.
        tokio::time::sleep(Duration::from_secs(3)).await;
        nats.signal(Signal::Cont).unwrap();
    };

    let (singles, sequence, ()) = tokio::join!(singles, sequence, thaw);

    for outcome in singles.into_iter().chain(sequence) {
        assert!(outcome.is_ok(), "{outcome:?}");
    }
    let (ids, _) = stored(&js, LEAD_COMMANDS).await;
    assert_eq!(ids.len(), 150);
    assert_eq!(ids.into_iter().collect::<HashSet<_>>().len(), 150);
}

#[tokio::test]
async fn messages_without_a_stream_wait_until_there_is_one_or_the_deadline_has_passed() {
    let (_nats, js) = start().await;
    js.delete_stream(LEAD_COMMANDS).await.unwrap();
    let publisher = Publisher::new(js.clone());

    let soon = Instant::now() + Duration::from_millis(300);
    let outcome = publisher.publish_until(|| command("0", "{}"), soon).await;
    assert_eq!(outcome, Err(PublishError::NoResponder));

    let waiting = publisher.publish_each_until(49, |n| command(&(1 + n).to_string(), "{}"), Instant::now() + SOON);
    let create = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        nats::create_streams(&js, LIMITS).await.unwrap();
    };
    let (outcomes, ()) = tokio::join!(waiting, create);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let (ids, _) = stored(&js, LEAD_COMMANDS).await;
    assert_eq!(ids, (1..50).map(|n| n.to_string()).collect::<Vec<_>>(), "in order");
}

#[tokio::test]
async fn a_stream_that_does_not_allow_batches_gets_single_messages() {
    let (_nats, js) = start().await;
    js.delete_stream(LEAD_COMMANDS).await.unwrap();
    let plain = Config { name: LEAD_COMMANDS.into(), subjects: vec!["leads.cmd.>".into()], ..Config::default() };
    js.create_stream(plain).await.unwrap();
    let publisher = Publisher::new(js.clone());
    let outcomes = publisher.publish_each((0..100).map(|n| command(&n.to_string(), "{}")).collect()).await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let (ids, batched) = stored(&js, LEAD_COMMANDS).await;
    assert_eq!((ids.len(), batched), (100, 0));
}

#[tokio::test]
async fn batches_are_allowed_on_an_existing_stream_and_nothing_else_changes() {
    let (nats, js) = start().await;
    js.delete_stream(LEAD_COMMANDS).await.unwrap();
    let mine = Config {
        name: LEAD_COMMANDS.into(),
        subjects: vec!["leads.cmd.>".into(), "mine".into()],
        max_bytes: 123_456,
        discard: DiscardPolicy::New,
        description: Some("an operator's".into()),
        ..Config::default()
    };
    let before = js.create_stream(mine).await.unwrap().cached_info().config.clone();
    nats::create_streams(&js, LIMITS).await.unwrap();
    let config = async |name| js.get_stream(name).await.unwrap().cached_info().config.clone();
    let knows_batches = nats.version() >= (2, 12, 0);
    let mut after = config(LEAD_COMMANDS).await;
    assert_eq!(after.allow_atomic_publish, knows_batches);
    after.allow_atomic_publish = false;
    // The server adds metadata about its version and the request's.
    after.metadata = before.metadata.clone();
    assert_eq!(after, before);
    assert_eq!(config(LEAD_EVENTS).await.allow_atomic_publish, knows_batches);
    assert!(!config(WEBHOOK_EVENTS).await.allow_atomic_publish);
}

#[tokio::test]
async fn a_killed_server_keeps_what_it_acknowledged() {
    let (mut nats, js) = start().await;
    let publisher = Publisher::new(js.clone());
    let acked = Arc::new(AtomicUsize::new(0));
    let lanes: Vec<_> = (0..100)
        .map(|lane| {
            let (publisher, acked) = (publisher.clone(), acked.clone());
            tokio::spawn(async move {
                let mut ids = Vec::new();
                // Until the kill.
                for n in 0.. {
                    let id = format!("{lane}-{n}");
                    match publisher.publish(command(&id, vec![b'x'; 300])).await {
                        Ok(_) => ids.push(id),
                        Err(PublishError::Unconfirmed | PublishError::NotConnected | PublishError::NoResponder) => {
                            break;
                        }
                        Err(e) => panic!("{e}"),
                    }
                    acked.fetch_add(1, Ordering::Relaxed);
                }
                ids
            })
        })
        .collect();
    eventually(SOON, "the load is under way", async || acked.load(Ordering::Relaxed) > 1000).await;
    nats.kill9().await.unwrap();
    let mut ids = Vec::new();
    for lane in lanes {
        ids.extend(lane.await.unwrap());
    }
    nats.restart().await.unwrap();
    eventually(SOON, "the stream is back", async || js.get_stream(LEAD_COMMANDS).await.map(drop)).await;
    let (kept, _) = stored(&js, LEAD_COMMANDS).await;
    let kept: HashSet<_> = kept.into_iter().collect();
    let lost: Vec<_> = ids.iter().filter(|id| !kept.contains(*id)).collect();
    assert!(lost.is_empty(), "acked and lost: {lost:?} of {}", ids.len());
    assert!(ids.len() > 1000);
}
