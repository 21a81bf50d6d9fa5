//! 8 Retry: claims due deliveries in Postgres under a lease, and attempts them.
//!
//! A round claims as many deliveries of each callback as may start now, so a million due deliveries of a slow endpoint
//! delay no other. It claims none of a callback that is held or whose breaker is open. A round starts with each poll,
//! and as soon as a deferred delivery may start, a permit is freed, or a rate limit allows more.
//!
//! The bodies of a round fit into the pool of attempts. A body that is larger than its project's part waits until its
//! project comes first in a round. The first project is chosen at random, so that the backlog of one project cannot
//! hold up the bodies of another.

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
    process_reads::ProcessReads,
    recorder::Stopping,
    store::{
        claim::{ClaimRequest, ClaimedDelivery, Claims, DueCallback, claim, due_callbacks},
        error::StoreError,
    },
};

/// How often Postgres is polled for due deliveries. A longer interval delays retries by as much; a shorter one costs an
/// idle Postgres more.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How long a round waits for more permits to be freed. A longer delay claims more at once; a shorter one leaves
/// permits idle for less time.
const ROUND_DELAY: Duration = Duration::from_millis(5);
/// How long a claim is exclusive: well beyond the longest attempt (30 s) and its record. A longer lease delays
/// deliveries that a crashed notifier had claimed; a shorter one attempts deliveries twice when Postgres pauses.
pub(crate) const LEASE: Duration = Duration::from_secs(60);
/// Maximum number of deliveries of a callback in a round. More deliveries save rounds; fewer let callbacks alternate.
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
    project_id: ObjectId,
    callback_id: ObjectId,
    callback: CallbackLookup,
    reservation: Reservation,
}

/// The projects of callbacks, each with the sum of its permits, in the order of the callbacks, rotated to begin with
/// project `first`.
fn projects(callbacks: impl IntoIterator<Item = (ObjectId, usize)>, first: usize) -> Vec<(ObjectId, usize)> {
    let mut projects = Vec::<(ObjectId, usize)>::new();
    let mut places = HashMap::new();
    for (project_id, permits) in callbacks {
        let place = *places.entry(project_id).or_insert_with(|| {
            projects.push((project_id, 0));
            projects.len() - 1
        });
        projects[place].1 += permits;
    }
    let first = first % projects.len().max(1);
    projects.rotate_left(first);
    projects
}

/// Whether a callback must be looked up in the bucket, given its lookup in memory.
fn needs_bucket(in_memory: Option<&CallbackLookup>) -> bool {
    matches!(in_memory, None | Some(CallbackLookup::Removed))
}

impl Retrier {
    /// Retries until shutdown, then lets the attempts in flight finish.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let (mut attempts, mut reads) = (JoinSet::new(), ProcessReads::default());
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
            match self.round(&mut reads, &mut attempts).await {
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
    async fn round(&self, reads: &mut ProcessReads, attempts: &mut JoinSet<()>) -> Result<(), StoreError> {
        let limiter = &self.deliverer.limiter;
        let due = due_callbacks(&self.pool, clock::now()).await?;
        limiter.begin_round(&due.iter().map(|due| due.callback_id).collect::<HashSet<_>>());
        let lookups = self.look_up(&due, reads).await;
        let rounds = due.iter().zip(lookups).filter_map(|(due, callback)| self.reserve(due, callback));
        let rounds = rounds.collect::<Vec<_>>();
        if rounds.is_empty() {
            return Ok(());
        }
        let requests = self.requests(&rounds);
        // The lease counts from the claim: to read the processes may have taken a while.
        let now = clock::now();
        let claims = claim(&self.pool, &requests, now, now.plus(LEASE)).await?;
        self.start(rounds, claims, attempts);
        Ok(())
    }

    /// Looks up the callbacks; `None` for a callback whose process could not be read.
    ///
    /// Memory may lag behind the bucket. A callback that its process lacks in memory may be new, so its process is
    /// read: the deliveries of a callback end only if the bucket confirms that it was removed.
    async fn look_up(&self, due: &[DueCallback], reads: &mut ProcessReads) -> Vec<Option<CallbackLookup>> {
        let callbacks = &self.deliverer.callbacks;
        let process = |due: &DueCallback| (due.project_id, due.process_id);
        let in_memory = |due: &DueCallback| {
            let process = callbacks.process_in_memory(due.project_id, due.process_id)?;
            Some(callbacks.look_up_in(Some(&process), due.callback_id))
        };
        let lookups = due.iter().map(in_memory).collect::<Vec<_>>();
        let unconfirmed = due.iter().zip(&lookups).filter(|(_, lookup)| needs_bucket(lookup.as_ref()));
        let read = |(project_id, process_id)| callbacks.stored_process(project_id, process_id);
        let stored = reads.read(unconfirmed.map(|(due, _)| process(due)), read).await;
        let look_up_stored = |due: &DueCallback| {
            let stored = stored.get(&process(due))?;
            Some(callbacks.look_up_in(stored.as_ref(), due.callback_id))
        };
        let confirmed = due.iter().zip(lookups).map(|(due, lookup)| match needs_bucket(lookup.as_ref()) {
            true => look_up_stored(due),
            false => lookup,
        });
        confirmed.collect()
    }

    /// Reserves what the round may claim of a callback. `callback` is `None` if its process could not be read.
    fn reserve(&self, due: &DueCallback, callback: Option<CallbackLookup>) -> Option<CallbackRound> {
        let limiter = &self.deliverer.limiter;
        let DueCallback { callback_id, project_id, .. } = *due;
        let reservation = match &callback {
            Some(CallbackLookup::Enabled(target)) => limiter.reserve(&target.endpoint(), MAX_CLAIM),
            // These deliveries are only recorded, without a request to the endpoint.
            Some(CallbackLookup::Removed | CallbackLookup::NoProcess) => {
                limiter.reset_breaker(callback_id);
                let endpoint = Endpoint { callback_id, project_id, max_in_flight: MAX_CLAIM, max_per_second: None };
                limiter.reserve_for_records(&endpoint, MAX_CLAIM)
            }
            Some(CallbackLookup::Held(_) | CallbackLookup::Locked) | None => {
                // Its rate limit must not wake the retries again and again.
                limiter.set_due_retries(callback_id, false);
                return None;
            }
        };
        if reservation.permits.is_empty() {
            limiter.set_due_retries(callback_id, true);
            return None;
        }
        Some(CallbackRound { project_id, callback_id, callback: callback?, reservation })
    }

    /// What to claim, project by project.
    fn requests(&self, rounds: &[CallbackRound]) -> Vec<ClaimRequest> {
        let permits = rounds.iter().map(|round| (round.project_id, round.reservation.permits.len()));
        let projects = projects(permits, rand::random::<u32>() as usize);
        let bytes = self.deliverer.limiter.project_bytes(&projects);
        let places = projects.iter().zip(0..).map(|((project_id, _), place)| (*project_id, place));
        let places = places.collect::<HashMap<_, usize>>();
        let request = |round: &CallbackRound| ClaimRequest {
            callback_id: round.callback_id,
            project_id: round.project_id,
            max_deliveries: round.reservation.permits.len(),
            max_bytes: round.reservation.max_bytes,
            max_project_bytes: bytes[places[&round.project_id]],
        };
        let mut requests = rounds.iter().map(request).collect::<Vec<_>>();
        requests.sort_by_key(|request| places[&request.project_id]);
        requests
    }

    /// Starts the claimed deliveries, and returns the permits that found none.
    fn start(&self, rounds: Vec<CallbackRound>, claims: Claims, attempts: &mut JoinSet<()>) {
        let mut batches = HashMap::<_, Vec<_>>::new();
        for claimed in claims.deliveries {
            batches.entry(claimed.delivery.callback_id).or_default().push(claimed);
        }
        for CallbackRound { callback_id, callback, reservation, .. } in rounds {
            let permits = reservation.permits;
            // No batch: another notifier claimed these, nothing is left, or there was no room for the bodies.
            let batch = batches.remove(&callback_id).unwrap_or_default();
            self.deliverer.limiter.set_due_retries(callback_id, claims.left_some || batch.len() == permits.len());
            for (claimed, mut permit) in batch.into_iter().zip(permits) {
                permit.set_body_size(claimed.delivery.body.len());
                let (deliverer, callback) = (self.deliverer.clone(), callback.clone());
                attempts.spawn(async move {
                    if let Err(Stopping) = retry(&deliverer, callback, claimed, permit).await {
                        tracing::debug!("a claim is left until its lease ends");
                    }
                });
            }
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
        // Such callbacks are never claimed. If one were, its lease would end.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projects_keep_the_order_of_their_callbacks_and_take_turns_to_be_first() {
        let [a, b, c] = [1, 2, 3].map(|byte| ObjectId::from_bytes([byte; 12]));
        let callbacks = [(a, 1), (b, 4), (a, 2), (c, 8)];

        assert_eq!(projects(callbacks, 0), [(a, 3), (b, 4), (c, 8)]);
        assert_eq!(projects(callbacks, 4), [(b, 4), (c, 8), (a, 3)]);
        assert_eq!(projects([], 4), []);
    }
}
