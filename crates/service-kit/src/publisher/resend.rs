//! Publishes until the stream has a leader, or a deadline has passed.
//!
//! The servers of a replicated stream take 4 to 9 s to elect another leader after its server died. Until then JetStream does
//! not answer, or answers that there is no stream. What was sent meanwhile is sent again under the same message ids, so the
//! stream stores it once.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use async_nats::jetstream::message::OutboundMessage;
use tokio::{
    sync::SemaphorePermit,
    time::{sleep, timeout, timeout_at},
};

use super::{Publisher, RESEND_AFTER, Stored};
use crate::publish::PublishError;

/// The pause between two resends of one permit. Longer delays messages after an election, shorter costs more while it lasts.
const PAUSE: Duration = Duration::from_millis(200);
impl Publisher {
    /// As [`publish`](Self::publish); while the stream cannot acknowledge, sends the message again until the deadline.
    ///
    /// # Errors
    /// [`PublishError::Unconfirmed`] if one of the messages that were sent may be stored.
    pub async fn publish_until(&self, message: OutboundMessage, deadline: Instant) -> Result<Stored, PublishError> {
        let mut outcome = self.publish_within(RESEND_AFTER, copy(&message)).await;
        let mut waiting = None;
        while let Err(error) = &outcome
            && let Some(permit) = self.resend_permit(error, deadline, &mut waiting).await
        {
            let again = self.publish_within(RESEND_AFTER, copy(&message)).await;
            outcome = outcome.or_else(|first| again.map_err(|last| first.followed_by(last)));
            self.pace(permit, outcome.is_err(), deadline).await;
        }
        outcome
    }

    /// As [`publish_each`](Self::publish_each); while the stream cannot acknowledge, sends the messages without an
    /// acknowledgement again, in order, until the deadline.
    pub async fn publish_each_until(
        &self,
        messages: Vec<OutboundMessage>,
        deadline: Instant,
    ) -> Vec<Result<Stored, PublishError>> {
        let mut outcomes = self.publish_each(messages.iter().map(copy).collect()).await;
        let mut waiting = None;
        while let Some(first) = outcomes.iter().position(|outcome| outcome.as_ref().is_err_and(PublishError::may_pass))
            && let Err(error) = &outcomes[first]
            && let Some(permit) = self.resend_permit(error, deadline, &mut waiting).await
        {
            // One message probes for a leader; the others follow once there is one.
            let probed = self.publish_within(RESEND_AFTER, copy(&messages[first])).await;
            let found = probed.is_ok();
            merge(&mut outcomes[first], probed);
            if found {
                let waits = |(place, outcome): (usize, &Result<_, PublishError>)| {
                    outcome.as_ref().is_err_and(PublishError::may_pass).then_some(place)
                };
                let unacknowledged: Vec<usize> = outcomes.iter().enumerate().filter_map(waits).collect();
                let again = unacknowledged.iter().map(|place| copy(&messages[*place])).collect();
                for (place, outcome) in unacknowledged.into_iter().zip(self.publish_each(again).await) {
                    merge(&mut outcomes[place], outcome);
                }
            }
            self.pace(permit, !found, deadline).await;
        }
        outcomes
    }

    async fn publish_within(&self, limit: Duration, message: OutboundMessage) -> Result<Stored, PublishError> {
        timeout(limit, self.publish(message)).await.unwrap_or(Err(PublishError::Unconfirmed))
    }

    /// Waits for the permit to send again. None if the error will not pass, or the deadline comes first.
    async fn resend_permit<'a>(
        &'a self,
        error: &PublishError,
        deadline: Instant,
        waiting: &mut Option<Waiting<'a>>,
    ) -> Option<SemaphorePermit<'a>> {
        if !error.may_pass() || Instant::now() >= deadline {
            return None;
        }
        waiting.get_or_insert_with(|| Waiting::begin(&self.shared.waiting, error));
        timeout_at(deadline.into(), self.shared.resends.acquire()).await.ok()?.ok()
    }

    /// Holds the permit for a while if the stream still has no leader.
    async fn pace(&self, permit: SemaphorePermit<'_>, failed: bool, deadline: Instant) {
        if failed {
            sleep(PAUSE.min(deadline.saturating_duration_since(Instant::now()))).await;
        }
        drop(permit);
    }
}

/// A publish that waits for the stream's leader. The first and the last of those that wait at once are logged.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(waiting: &'a AtomicUsize, error: &PublishError) -> Self {
        if waiting.fetch_add(1, Relaxed) == 0 {
            tracing::warn!("messages wait for the stream's leader: {error}");
        }
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.0.fetch_sub(1, Relaxed) == 1 {
            tracing::info!("no message waits for the stream's leader any more");
        }
    }
}

fn copy(message: &OutboundMessage) -> OutboundMessage {
    let OutboundMessage { subject, payload, headers } = message;
    OutboundMessage { subject: subject.clone(), payload: payload.clone(), headers: headers.clone() }
}

/// Replaces an error by what came of sending the message again.
fn merge(outcome: &mut Result<Stored, PublishError>, again: Result<Stored, PublishError>) {
    if let Err(first) = outcome {
        *outcome = again.map_err(|last| first.clone().followed_by(last));
    }
}
