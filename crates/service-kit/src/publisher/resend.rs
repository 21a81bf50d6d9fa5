//! Publishes until the stream has a leader, or a deadline has passed.
//!
//! The servers of a replicated stream take 4 to 9 s to elect another leader after its server died. Until then JetStream
//! does not answer, or answers that there is no stream. Messages that were sent meanwhile are sent again under the same
//! message ids, so the stream stores each once.

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

/// The pause between two resends of one permit. A longer pause delays messages after an election; a shorter one costs
/// more while it lasts.
const PAUSE: Duration = Duration::from_millis(200);

impl Publisher {
    /// Like [`publish`](Self::publish); while the stream cannot acknowledge, sends the message again until the
    /// deadline. `message` makes the same message each time.
    ///
    /// # Errors
    /// [`PublishError::Unconfirmed`] if one of the messages that were sent may be stored.
    pub async fn publish_until(
        &self,
        message: impl Fn() -> OutboundMessage,
        deadline: Instant,
    ) -> Result<Stored, PublishError> {
        let mut outcome = self.publish_within(RESEND_AFTER, message()).await;
        let mut waiting = None;
        while let Err(error) = &outcome
            && let Some(permit) = self.resend_permit(error, deadline, &mut waiting).await
        {
            let again = self.publish_within(RESEND_AFTER, message()).await;
            outcome = outcome.or_else(|first| again.map_err(|last| first.followed_by(last)));
            self.pace(permit, outcome.is_err(), deadline).await;
        }
        outcome
    }

    /// Like [`publish_each`](Self::publish_each) of `count` messages; while the stream cannot acknowledge, sends the
    /// messages after the last stored one again, in order, until the deadline. `message` makes the same message for an
    /// index each time.
    pub async fn publish_each_until(
        &self,
        count: usize,
        message: impl Fn(usize) -> OutboundMessage,
        deadline: Instant,
    ) -> Vec<Result<Stored, PublishError>> {
        let mut outcomes = self.publish_each((0..count).map(&message).collect()).await;
        let mut waiting = None;
        loop {
            let again = resendable(&outcomes);
            let Some((&first, rest)) = again.split_first() else { return outcomes };
            let Err(error) = &outcomes[first] else { return outcomes };
            let Some(permit) = self.resend_permit(error, deadline, &mut waiting).await else { return outcomes };
            // One message probes for a leader; the others follow once there is one.
            let probed = self.publish_within(RESEND_AFTER, message(first)).await;
            let found = probed.is_ok();
            merge(&mut outcomes[first], probed);
            if found {
                let published = self.publish_each(rest.iter().map(|place| message(*place)).collect()).await;
                for (place, outcome) in rest.iter().zip(published) {
                    merge(&mut outcomes[*place], outcome);
                }
            }
            self.pace(permit, !found, deadline).await;
        }
    }

    async fn publish_within(&self, limit: Duration, message: OutboundMessage) -> Result<Stored, PublishError> {
        timeout(limit, self.publish(message)).await.unwrap_or_else(|_| {
            self.shared.metrics.acks.observe(limit.as_secs_f64());
            Err(PublishError::Unconfirmed)
        })
    }

    /// Waits for a permit to send again. None if the error is permanent, or the deadline comes first.
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

/// A publish that waits for the stream's leader. Logs when the first one begins to wait and when the last one ends.
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

/// The indexes of the messages that may be sent again. A message that failed before a stored one may not: it would be
/// stored after messages that follow it.
fn resendable(outcomes: &[Result<Stored, PublishError>]) -> Vec<usize> {
    let behind = outcomes.iter().rposition(Result::is_ok).map_or(0, |last| last + 1);
    let may_pass = |place: &usize| outcomes[*place].as_ref().is_err_and(PublishError::may_pass);
    (behind..outcomes.len()).filter(may_pass).collect()
}

/// Replaces an error by the outcome of sending the message again.
fn merge(outcome: &mut Result<Stored, PublishError>, again: Result<Stored, PublishError>) {
    if let Err(first) = outcome {
        *outcome = again.map_err(|last| first.clone().followed_by(last));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_message_is_sent_again_behind_one_that_follows_it() {
        let stored = || Ok(Stored { sequence: 1, is_duplicate: false });
        let lost = || Err(PublishError::NoResponder);
        let unknown = || Err(PublishError::Unconfirmed);
        let refused = || Err(PublishError::TooLarge);

        assert_eq!(resendable(&[stored(), lost(), refused(), unknown()]), [1, 3]);
        assert_eq!(resendable(&[lost(), unknown(), stored(), lost()]), [3]);
        assert_eq!(resendable(&[lost(), stored()]), [0; 0]);
        assert_eq!(resendable(&[lost(), lost()]), [0, 1]);
    }
}
