//! The life of a service: a task that ends stops the process; a signal drains it.

use std::{future::Future, time::Duration};

use anyhow::{Context, anyhow};
use futures::future::BoxFuture;
use tokio::{signal::unix::SignalKind, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// How long a service may take to drain after a signal. Kubernetes' grace period must be longer. A longer deadline lets
/// slower endpoints finish, a shorter one restarts faster.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(20);

/// How long the subtasks of a task may take to drain. The rest of [`DRAIN_DEADLINE`] is for recording their results.
const SUBTASK_DRAIN_DEADLINE: Duration = DRAIN_DEADLINE.saturating_sub(Duration::from_secs(3));

/// Lets subtasks finish before the deadline, then aborts the rest.
///
/// # Errors
/// One of them panicked.
pub async fn drain(mut subtasks: JoinSet<()>) -> anyhow::Result<()> {
    let finish = async {
        while let Some(ended) = subtasks.join_next().await {
            ended.context("a task died while draining")?;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(SUBTASK_DRAIN_DEADLINE, finish).await {
        Ok(finished) => finished,
        Err(_) => {
            tracing::warn!(aborted = subtasks.len(), "not everything finished before the deadline; it will be retried");
            subtasks.shutdown().await;
            Ok(())
        }
    }
}

/// A token that is cancelled on SIGTERM or SIGINT.
pub fn shutdown_on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    // Not supervised: the task holds nothing and cannot fail.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        token.cancel();
    });
    Ok(shutdown)
}

/// Runs a task and returns its outcome with its name. The task is boxed, so that the code that runs tasks is compiled
/// once and not for each task.
async fn named(name: &'static str, task: BoxFuture<'static, anyhow::Result<()>>) -> (&'static str, anyhow::Result<()>) {
    (name, task.await)
}

/// The tasks of a service.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<(&'static str, anyhow::Result<()>)>,
    background: JoinSet<(&'static str, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Tasks {
    /// No tasks yet. Every task must run until `shutdown`, then drain and return.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { set: JoinSet::new(), background: JoinSet::new(), shutdown }
    }

    /// Starts a task.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.set.spawn(named(name, Box::pin(task)));
    }

    /// Starts a task that serves the others; it is aborted when they are done.
    pub fn spawn_background(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.background.spawn(named(name, Box::pin(task)));
    }

    /// Waits until all tasks are done. A task that ends before shutdown, fails or panics stops all of them. After
    /// shutdown they have `deadline` to drain; then they are aborted.
    ///
    /// # Errors
    /// The task that failed or ended early; or tasks that did not drain.
    pub fn run(self, deadline: Duration) -> BoxFuture<'static, anyhow::Result<()>> {
        Box::pin(self.run_until_drained(deadline))
    }

    async fn run_until_drained(mut self, deadline: Duration) -> anyhow::Result<()> {
        let mut result = Ok(());
        let cut = async {
            self.shutdown.cancelled().await;
            tokio::time::sleep(deadline).await;
        };
        tokio::pin!(cut);
        loop {
            let ended = tokio::select! {
                ended = self.set.join_next() => ended,
                Some(ended) = self.background.join_next() => Some(ended),
                () = &mut cut => {
                    self.set.shutdown().await;
                    return result.and(Err(anyhow!("not drained within {deadline:?}")));
                }
            };
            let failure = match ended {
                None => return result,
                Some(Ok((_, Ok(())))) if self.shutdown.is_cancelled() => continue,
                Some(Ok((name, Ok(())))) => anyhow!("task {name} ended before shutdown"),
                Some(Ok((name, Err(e)))) => e.context(format!("task {name} failed")),
                Some(Err(e)) => anyhow!(e).context("a task died"),
            };
            tracing::error!("{failure:#}");
            result = result.and(Err(failure));
            self.shutdown.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_task_that_ends_early_or_panics_takes_the_others_down() {
        for panics in [false, true] {
            let shutdown = CancellationToken::new();
            let mut tasks = Tasks::new(shutdown.clone());
            let token = shutdown.clone();
            tasks.spawn("steady", async move {
                token.cancelled().await;
                Ok(())
            });
            tasks.spawn("early", async move {
                assert!(!panics, "boom");
                Ok(())
            });
            let error = tasks.run(SOON).await.unwrap_err();
            assert!(shutdown.is_cancelled());
            let expected = if panics { "a task died: " } else { "task early ended" };
            assert!(format!("{error:#}").starts_with(expected), "{error:#}");
        }
    }

    #[tokio::test]
    async fn draining_is_clean_and_bounded() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        let token = shutdown.clone();
        tasks.spawn("drains", async move {
            token.cancelled().await;
            Ok(())
        });
        shutdown.cancel();
        tasks.run(SOON).await.unwrap();

        let mut tasks = Tasks::new(shutdown);
        tasks.spawn("hangs", std::future::pending());
        assert!(tasks.run(Duration::from_millis(10)).await.unwrap_err().to_string().contains("not drained"));
    }
}
