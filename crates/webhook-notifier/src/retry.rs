//! 8 Retry: what is due in Postgres is claimed with a lease, and tried.
//!
//! A round claims of every callback that has something due as much as may begin now, so a million due deliveries of a slow
//! endpoint delay nobody; of one whose breaker is open or that is disabled it claims nothing. Rounds come with the poll, and
//! as soon as something was spilled that may begin, a slot came free, or a rate allows more: so a callback catches up at its
//! own pace.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::Context;
use contract::ObjectId;
use service_kit::{clock, health::Readiness, lifecycle::drain, nats::error_chain};
use sqlx::PgPool;
use tokio::{task::JoinSet, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::{Endpoint, Reserved, Slot},
    callbacks::Found,
    core::delivery::{Attempt, Origin},
    deliver::Deliverer,
    recorder::Stopping,
    store::claim::{Claimed, Wanted, claim, due_callbacks},
};

/// How often is looked for what is due. Longer makes retries later by as much, shorter costs Postgres more when there is
/// nothing.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How long a round waits for more slots to come free. Longer claims more at once, shorter leaves slots idle less.
const LINGER: Duration = Duration::from_millis(5);
/// How long a claim is ours: well beyond the longest attempt (30 s) and its record. Longer delays what a crashed notifier
/// had claimed, shorter tries a delivery twice when Postgres pauses.
const LEASE: Duration = Duration::from_secs(60);
/// Most deliveries of a callback in a round. More saves rounds, fewer let the callbacks take turns.
const MAX_CLAIM: u32 = 100;

/// The task that retries.
#[derive(Debug)]
pub(crate) struct Retrier {
    pub(crate) pool: PgPool,
    pub(crate) deliverer: Arc<Deliverer>,
    pub(crate) readiness: Readiness,
}

/// What a round reserved for a callback.
struct Share {
    found: Found,
    reserved: Reserved,
}

impl Retrier {
    /// Retries until shutdown, then lets the attempts under way finish.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut attempts = JoinSet::new();
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let retried = loop {
            tokio::select! {
                () = shutdown.cancelled() => break Ok(()),
                Some(ended) = attempts.join_next() => match ended {
                    Ok(()) => continue,
                    Err(e) => break Err(e).context("a retry's task died"),
                },
                _ = poll.tick() => {}
                () = self.deliverer.slots.work() => tokio::time::sleep(LINGER).await,
            }
            match self.round(&mut attempts).await {
                Ok(()) => self.readiness.ready("postgres"),
                Err(e) => {
                    tracing::warn!("cannot claim what is due, trying again: {}", error_chain(&e));
                    self.readiness.not_ready("postgres", error_chain(&e));
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        };
        drain(attempts).await?;
        retried
    }

    /// Claims what is due and may begin, and begins to try it.
    async fn round(&self, attempts: &mut JoinSet<()>) -> sqlx::Result<()> {
        let now = clock::now();
        let slots = &self.deliverer.slots;
        let mut shares = HashMap::new();
        for due in due_callbacks(&self.pool, now).await? {
            let found = match self.deliverer.callbacks.find(due.project_id, due.process_id, due.callback_id).await {
                Ok(found) => found,
                Err(e) => {
                    tracing::warn!(callback_id = %due.callback_id, "{e}");
                    continue;
                }
            };
            let endpoint = match &found {
                Found::Callback(callback) => callback.endpoint(),
                // It waits until it is enabled, or its secrets can be opened.
                Found::Disabled | Found::Locked => continue,
                // What is not to be told is only recorded: it costs the endpoint nothing.
                Found::Refused(_) | Found::NoProcess => {
                    slots.forgive(due.callback_id);
                    let (callback_id, project_id) = (due.callback_id, due.project_id);
                    Endpoint { callback_id, project_id, max_in_flight: MAX_CLAIM, max_per_second: None }
                }
            };
            let reserved = slots.reserve(&endpoint, MAX_CLAIM);
            if reserved.slots.is_empty() {
                slots.note_behind(due.callback_id, true);
            } else {
                shares.insert(due.callback_id, Share { found, reserved });
            }
        }
        if shares.is_empty() {
            return Ok(());
        }
        let wanted = shares.iter().map(|(callback_id, share)| Wanted {
            callback_id: *callback_id,
            deliveries: share.reserved.slots.len(),
            bytes: share.reserved.bytes,
        });
        let claimed = claim(&self.pool, &wanted.collect::<Vec<_>>(), now, now.plus(LEASE)).await?;
        self.begin(shares, claimed, attempts);
        Ok(())
    }

    /// Begins to try what was claimed. Slots that nothing was found for are given back.
    fn begin(&self, mut shares: HashMap<ObjectId, Share>, claimed: Vec<Claimed>, attempts: &mut JoinSet<()>) {
        let mut batches = HashMap::<_, Vec<_>>::new();
        for claimed in claimed {
            batches.entry(claimed.delivery.callback_id).or_default().push(claimed);
        }
        for (callback_id, batch) in batches {
            let Some(Share { found, mut reserved }) = shares.remove(&callback_id) else { continue };
            let bytes = batch.iter().map(|claimed| claimed.delivery.body.len()).sum::<usize>();
            let behind = batch.len() == reserved.slots.len() || bytes >= reserved.bytes;
            self.deliverer.slots.note_behind(callback_id, behind);
            for (claimed, mut slot) in batch.into_iter().zip(reserved.slots.drain(..)) {
                slot.weigh(claimed.delivery.body.len());
                let (deliverer, found) = (self.deliverer.clone(), found.clone());
                attempts.spawn(async move {
                    if let Err(Stopping) = retry(&deliverer, found, claimed, slot).await {
                        tracing::debug!("a claim is left to its lease");
                    }
                });
            }
        }
        // Claimed by somebody else, or nothing left.
        for callback_id in shares.keys() {
            self.deliverer.slots.note_behind(*callback_id, false);
        }
    }
}

async fn retry(deliverer: &Deliverer, found: Found, claimed: Claimed, slot: Slot) -> Result<(), Stopping> {
    let Claimed { delivery, attempts } = claimed;
    match found {
        Found::Callback(target) => match deliverer.callbacks.open(&target) {
            Ok(callback) => deliverer.attempt(callback, delivery, Origin::Claim, attempts + 1, slot).await,
            Err(_) => Ok(()),
        },
        // Nothing of it is claimed; its lease runs out.
        Found::Disabled | Found::Locked => Ok(()),
        Found::Refused(why) => deliverer.give_up(delivery, Origin::Claim, why).await,
        Found::NoProcess => {
            let attempt = Attempt {
                started_at: clock::now(),
                duration: Duration::ZERO,
                status: None,
                error: Some("not sent: the callback's process is not in the configuration".into()),
                response: None,
                retry_after: None,
            };
            deliverer.settle(delivery, Origin::Claim, attempts + 1, attempt, None).await
        }
    }
}
