//! 8 Retry: claims due deliveries in Postgres under a lease, and attempts them.
//!
//! A round claims of each callback as many deliveries as may start now, so a million due deliveries of a slow endpoint
//! delay no other; of a callback that is held or whose breaker is open it claims none. A round starts with each
//! poll, and as soon as a delivery was deferred that may start, a permit was freed, or a rate limit allows more.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use contract::ObjectId;
use service_kit::{clock, health::Readiness, lifecycle::drain, nats::error_chain, postgres::Pool};
use tokio::{task::JoinSet, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::{
        endpoint::Endpoint,
        limiter::{AttemptPermit, Reservation},
    },
    callbacks::CallbackLookup,
    core::{
        delivery::DeliverySource,
        outcome::{Attempt, AttemptOutcome},
    },
    deliver::Deliverer,
    recorder::Stopping,
    store::{
        claim::{ClaimRequest, ClaimedDelivery, claim, due_callbacks},
        error::StoreError,
    },
};

/// How often due deliveries are looked for. Longer delays retries by as much, shorter costs an idle Postgres more.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How long a round waits for more permits to be freed. Longer claims more at once, shorter leaves permits idle for
/// less.
const ROUND_DELAY: Duration = Duration::from_millis(5);
/// How long a claim is exclusive: well beyond the longest attempt (30 s) and its record. Longer delays what a crashed
/// notifier had claimed, shorter attempts a delivery twice when Postgres pauses.
pub(crate) const LEASE: Duration = Duration::from_secs(60);
/// Most deliveries of a callback in a round. More saves rounds, fewer lets callbacks alternate.
const MAX_CLAIM: u32 = 100;

/// The task that retries.
#[derive(Debug)]
pub(crate) struct Retrier {
    pub(crate) pool: Pool,
    pub(crate) deliverer: Arc<Deliverer>,
    pub(crate) readiness: Readiness,
}

/// What a round may claim of a callback.
struct CallbackRound {
    callback: CallbackLookup,
    reservation: Reservation,
}

impl Retrier {
    /// Retries until shutdown, then lets the attempts in flight finish.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut attempts = JoinSet::new();
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let retried = loop {
            tokio::select! {
                () = shutdown.cancelled() => break Ok(()),
                Some(ended) = attempts.join_next() => match ended {
                    Ok(()) => continue,
                    Err(e) => break Err(e).context("the task of a retry died"),
                },
                _ = poll.tick() => {}
                () = self.deliverer.limiter.retry_work() => tokio::time::sleep(ROUND_DELAY).await,
            }
            match self.round(&mut attempts).await {
                Ok(()) => self.readiness.ready("retry"),
                Err(e) => {
                    tracing::warn!("cannot claim due deliveries, trying again: {}", error_chain(&e));
                    self.readiness.not_ready("retry", error_chain(&e));
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        };
        drain(attempts).await?;
        retried
    }

    /// Claims the due deliveries that may start, and starts them.
    async fn round(&self, attempts: &mut JoinSet<()>) -> Result<(), StoreError> {
        let now = clock::now();
        let limiter = &self.deliverer.limiter;
        let mut rounds = HashMap::new();
        let due = due_callbacks(&self.pool, now).await?;
        limiter.retain_due_retries(&due.iter().map(|due| due.callback_id).collect::<HashSet<_>>());
        for due in due {
            let callback = self.deliverer.callbacks.look_up(due.project_id, due.process_id, due.callback_id).await;
            let callback = match callback {
                Ok(callback) => callback,
                Err(e) => {
                    tracing::warn!(callback_id = %due.callback_id, "{e}");
                    // As for a held callback below.
                    limiter.set_due_retries(due.callback_id, false);
                    continue;
                }
            };
            let endpoint = match &callback {
                CallbackLookup::Enabled(target) => target.endpoint(),
                CallbackLookup::Held(_) | CallbackLookup::Locked => {
                    // Its rate limit must not wake the retries again and again.
                    limiter.set_due_retries(due.callback_id, false);
                    continue;
                }
                // These deliveries are only recorded, without a request to the endpoint.
                CallbackLookup::Removed | CallbackLookup::NoProcess => {
                    limiter.reset_breaker(due.callback_id);
                    let (callback_id, project_id) = (due.callback_id, due.project_id);
                    Endpoint { callback_id, project_id, max_in_flight: MAX_CLAIM, max_per_second: None }
                }
            };
            let reservation = limiter.reserve(&endpoint, MAX_CLAIM);
            if reservation.permits.is_empty() {
                limiter.set_due_retries(due.callback_id, true);
            } else {
                rounds.insert(due.callback_id, CallbackRound { callback, reservation });
            }
        }
        if rounds.is_empty() {
            return Ok(());
        }
        let requests = rounds.iter().map(|(callback_id, round)| ClaimRequest {
            callback_id: *callback_id,
            max_deliveries: round.reservation.permits.len(),
            max_bytes: round.reservation.max_bytes,
        });
        let claimed = claim(&self.pool, &requests.collect::<Vec<_>>(), now, now.plus(LEASE)).await?;
        self.start(rounds, claimed, attempts);
        Ok(())
    }

    /// Starts the claimed deliveries, and returns the permits that found none.
    fn start(
        &self,
        mut rounds: HashMap<ObjectId, CallbackRound>,
        claimed: Vec<ClaimedDelivery>,
        attempts: &mut JoinSet<()>,
    ) {
        let mut batches = HashMap::<_, Vec<_>>::new();
        for claimed in claimed {
            batches.entry(claimed.delivery.callback_id).or_default().push(claimed);
        }
        for (callback_id, batch) in batches {
            let Some(CallbackRound { callback, mut reservation }) = rounds.remove(&callback_id) else { continue };
            let bytes = batch.iter().map(|claimed| claimed.delivery.body.len()).sum::<usize>();
            let has_more = batch.len() == reservation.permits.len() || bytes >= reservation.max_bytes;
            self.deliverer.limiter.set_due_retries(callback_id, has_more);
            for (claimed, mut permit) in batch.into_iter().zip(reservation.permits.drain(..)) {
                permit.set_body_size(claimed.delivery.body.len());
                let (deliverer, callback) = (self.deliverer.clone(), callback.clone());
                attempts.spawn(async move {
                    if let Err(Stopping) = retry(&deliverer, callback, claimed, permit).await {
                        tracing::debug!("a claim is left until its lease ends");
                    }
                });
            }
        }
        // Another notifier claimed these, or nothing is left.
        for callback_id in rounds.keys() {
            self.deliverer.limiter.set_due_retries(*callback_id, false);
        }
    }
}

async fn retry(
    deliverer: &Deliverer,
    callback: CallbackLookup,
    claimed: ClaimedDelivery,
    permit: AttemptPermit,
) -> Result<(), Stopping> {
    let ClaimedDelivery { delivery, attempts, lease_until } = claimed;
    let (source, number) = (DeliverySource::Claim { lease_until }, attempts + 1);
    match callback {
        CallbackLookup::Enabled(target) => match deliverer.callbacks.prepare(&target) {
            Ok(callback) => deliverer.attempt(callback, delivery, source, number, permit).await,
            Err(_) => Ok(()),
        },
        // Never claimed. If they were, the lease would end.
        CallbackLookup::Held(_) | CallbackLookup::Locked => Ok(()),
        CallbackLookup::Removed => deliverer.mark_exhausted(delivery, source, "the callback was removed".into()).await,
        CallbackLookup::NoProcess => {
            let error = "not sent: the callback's process is not in the configuration".into();
            let (started_at, outcome) = (clock::now(), AttemptOutcome::NoResponse { error });
            let attempt = Attempt { started_at, duration: Duration::ZERO, outcome, response: None };
            deliverer.record_attempt(delivery, source, number, attempt, None).await
        }
    }
}
