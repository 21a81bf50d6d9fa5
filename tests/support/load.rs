//! Updates sent in the background.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use serde_json::json;
use test_support::eventually;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Api, TEST_TIMEOUT};

/// Sends `count` updates to each lead, concurrently for all leads. Returns the ids of the updates.
pub(crate) async fn update_each(api: Api, leads: Vec<String>, count: usize) -> Vec<String> {
    let updates = leads.into_iter().map(|lead| {
        let api = api.clone();
        async move {
            let mut accepted = Vec::new();
            for number in 0..count {
                accepted.push(api.update_until_accepted(&json!({"leadId": lead, "metadata": {"n": number}})).await);
            }
            accepted
        }
    });
    futures::future::join_all(updates).await.concat()
}

/// Publishes messages (subject, headers, payload) in order, with at most `pipelined` unacknowledged messages. Without
/// that bound, acks would time out on a busy machine, because the timeout of an ack counts from its publish.
pub(crate) async fn publish_in_order(
    js: &jetstream::Context,
    pipelined: usize,
    messages: impl IntoIterator<Item = (String, HeaderMap, Bytes)>,
) {
    let mut acks = VecDeque::new();
    for (subject, headers, payload) in messages {
        acks.push_back(js.publish_with_headers(subject, headers, payload).await.expect("published"));
        if acks.len() >= pipelined {
            acks.pop_front().expect("acks are pending").await.expect("an ack");
        }
    }
    for ack in acks {
        ack.await.expect("an ack");
    }
}

/// An endless sequence of updates, to one lead after the other: few enough that a test can check each of them.
pub(crate) struct Load {
    stop: CancellationToken,
    accepted: Arc<Mutex<Vec<(String, Instant)>>>,
    task: JoinHandle<()>,
}

impl Load {
    pub(crate) fn start(api: &Api, leads: Vec<String>) -> Self {
        let (stop, accepted) = (CancellationToken::new(), Arc::<Mutex<Vec<(String, Instant)>>>::default());
        let (api, stopped, ids) = (api.clone(), stop.clone(), accepted.clone());
        let task = tokio::spawn(async move {
            for (n, lead) in leads.iter().cycle().enumerate() {
                if stopped.is_cancelled() {
                    return;
                }
                let id = api.update_until_accepted(&json!({"leadId": lead, "metadata": {"n": n}})).await;
                ids.lock().unwrap_or_else(PoisonError::into_inner).push((id, Instant::now()));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { stop, accepted, task }
    }

    /// The ids of the updates accepted so far.
    pub(crate) fn accepted(&self) -> Vec<String> {
        self.timed().into_iter().map(|(id, _)| id).collect()
    }

    /// The longest time without an accepted update.
    pub(crate) fn longest_gap(&self) -> Duration {
        longest_gap(self.timed().into_iter().map(|(_, at)| at).collect())
    }

    fn timed(&self) -> Vec<(String, Instant)> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until this many more updates are accepted.
    pub(crate) async fn wait_for_more(&self, more: usize) {
        let before = self.accepted().len();
        eventually(TEST_TIMEOUT, "more is accepted", async || {
            let accepted = self.accepted().len();
            if accepted >= before + more { Ok(()) } else { Err(accepted) }
        })
        .await;
    }

    /// Waits until this many more updates are accepted and have an outcome.
    pub(crate) async fn wait_for_more_applied(&self, api: &Api, more: usize) {
        self.wait_for_more(more).await;
        api.outcome(self.accepted().last().expect("an update")).await;
    }

    /// Ends the load, and returns the ids of all updates.
    pub(crate) async fn end(self) -> Vec<String> {
        self.stop.cancel();
        self.task.await.expect("the load");
        let accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.iter().map(|(id, _)| id.clone()).collect()
    }
}

/// The longest time between two consecutive instants, after sorting.
pub(crate) fn longest_gap(mut times: Vec<Instant>) -> Duration {
    times.sort_unstable();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}
