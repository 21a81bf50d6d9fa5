//! 7 Deliver, 8 Retry: callbacks with an order (`ordering: "lead"`): a lead's next delivery waits for the one before.
//!
//! What such a callback is told is recorded first, without a time. Its turn has come when it is the oldest of its lead that is
//! pending, and nothing can come before it any more: every event before its own is recorded. Then it becomes due, and is a
//! retry like any other. That is looked at when it was recorded and when the one before was settled, by whoever did that; and
//! for all leads now and then, for whoever died in between.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use async_nats::jetstream;
use contract::{
    ObjectId,
    streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER, ORDER_CONSUMER},
};
use service_kit::clock;
use sqlx::PgPool;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{admission::limiter::Slots, store};

/// How often all leads are looked at. Longer holds up longer what a notifier that died had to begin, shorter costs Postgres
/// more.
const EVERYBODY: Duration = Duration::from_secs(10);
/// Most leads that are looked at in one statement.
const LEADS: usize = 500;
/// Most leads that are remembered; past it all are looked at. More takes memory.
const REMEMBERED: usize = 10_000;
/// How long until it is looked again whether all before an event is recorded by now: at first, and at most.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_millis(320);

/// A lead, to a callback with an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lead {
    pub(crate) callback_id: ObjectId,
    pub(crate) lead_id: ObjectId,
}

/// Up to where nothing can come any more: all before this event of the stream is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Floor {
    pub(crate) stream: String,
    pub(crate) reached: u64,
}

/// The leads to look at.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    asked: Mutex<Asked>,
    told: Notify,
}

#[derive(Debug, Default)]
struct Asked {
    leads: HashSet<Lead>,
    everybody: bool,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it looked at whose turn it is of a lead.
    pub(crate) fn ask(&self, lead: Lead) {
        let mut asked = self.lock();
        if asked.leads.len() < REMEMBERED {
            asked.leads.insert(lead);
        } else {
            asked.everybody = true;
        }
        drop(asked);
        self.told.notify_one();
    }

    /// Has it looked at all leads.
    pub(crate) fn ask_everybody(&self) {
        self.lock().everybody = true;
        self.told.notify_one();
    }

    /// Gives turns until shutdown.
    pub(crate) async fn run(
        self: Arc<Self>,
        js: jetstream::Context,
        pool: PgPool,
        slots: Arc<Slots>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut everybody_at = Instant::now();
        let mut again = LOOK_AGAIN;
        loop {
            let Asked { leads, everybody } = std::mem::take(&mut *self.lock());
            let all = everybody || Instant::now() >= everybody_at;
            if all {
                everybody_at = Instant::now() + EVERYBODY;
            }
            let early = match look(&js, &pool, &slots, &leads, all).await {
                Ok(early) => early,
                Err(e) => {
                    tracing::warn!("cannot see whose turn it is, trying again: {e:#}");
                    again = LOOK_AGAIN_AT_MOST;
                    Early { leads: leads.into_iter().collect(), begun: false, everybody: all }
                }
            };
            let wait = if early.leads.is_empty() && !early.everybody {
                again = LOOK_AGAIN;
                everybody_at
            } else {
                again = if early.begun { LOOK_AGAIN } else { (again * 2).min(LOOK_AGAIN_AT_MOST) };
                let mut asked = self.lock();
                asked.leads.extend(early.leads);
                asked.everybody |= early.everybody;
                Instant::now() + again
            };
            // What is asked meanwhile is looked at together with what is early, unless there is nothing of that.
            let told = async {
                if again == LOOK_AGAIN {
                    self.told.notified().await;
                } else {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(wait.min(everybody_at)) => {}
                () = told => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }
}

/// What is left of a look.
struct Early {
    /// Before whose next delivery something may still come.
    leads: Vec<Lead>,
    /// Whether others were not early.
    begun: bool,
    /// Whether all must be looked at once more.
    everybody: bool,
}

/// Looks at these leads, or at all.
async fn look(
    js: &jetstream::Context,
    pool: &PgPool,
    slots: &Slots,
    leads: &HashSet<Lead>,
    all: bool,
) -> anyhow::Result<Early> {
    let mut early = Early { leads: Vec::new(), begun: false, everybody: false };
    let mut leads = leads.iter().copied().collect::<Vec<_>>();
    let mut after = None;
    let mut floor = None;
    loop {
        let mut last = !all;
        if leads.is_empty() && all {
            leads = store::ordering::waiting(pool, after, LEADS as i64).await?;
            after = leads.last().copied();
            last = leads.len() < LEADS;
        }
        for leads in leads.chunks(LEADS) {
            // Read before the deliveries are: what is recorded later is behind it.
            let floor = match &floor {
                Some(floor) => floor,
                None => floor.insert(self::floor(js).await?),
            };
            for turn in store::ordering::give(pool, leads, floor, clock::now()).await? {
                if turn.begun {
                    early.begun = true;
                } else if early.leads.len() < REMEMBERED {
                    early.leads.push(turn.lead);
                } else {
                    early.everybody = true;
                }
            }
        }
        leads.clear();
        if last {
            break;
        }
    }
    if early.begun {
        slots.wake();
    }
    Ok(early)
}

/// How far all is recorded.
async fn floor(js: &jetstream::Context) -> anyhow::Result<Floor> {
    let stream = js.get_stream(LEAD_EVENTS).await.context("cannot find the stream of events")?;
    // Who acks has recorded, whichever of the two; the one that only records is mostly further, and need not be there.
    let told = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read how far events are told")?;
    let recorded = stream.consumer_info(ORDER_CONSUMER).await.map_or(0, |consumer| consumer.ack_floor.stream_sequence);
    let reached = recorded.max(told.ack_floor.stream_sequence) + 1;
    Ok(Floor { stream: streams::identity(stream.cached_info()), reached })
}
