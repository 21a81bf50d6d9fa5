//! Waiting for what comes about by itself.

use std::{fmt::Display, time::Duration};
use tokio::time::{sleep, timeout};

/// How often the question is asked again. Shorter ends a wait sooner and burns what the services under test need.
const INTERVAL: Duration = Duration::from_millis(20);

/// The answer of a probe: what was waited for, or why not yet.
pub trait Outcome {
    /// What is waited for.
    type Value;

    /// The value, or why there is none yet.
    fn outcome(self) -> Result<Self::Value, String>;
}

impl Outcome for bool {
    type Value = ();

    fn outcome(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("false".to_owned()) }
    }
}

impl<T> Outcome for Option<T> {
    type Value = T;

    fn outcome(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".to_owned())
    }
}

impl<T, E: Display> Outcome for Result<T, E> {
    type Value = T;

    fn outcome(self) -> Result<T, String> {
        self.map_err(|error| error.to_string())
    }
}

/// Asks `probe` again and again until it answers `true`, `Some` or `Ok`.
///
/// # Panics
/// When that has not come about by `deadline`: with `what` was waited for, and the last answer.
pub async fn eventually<O: Outcome>(deadline: Duration, what: &str, mut probe: impl AsyncFnMut() -> O) -> O::Value {
    let mut last = "no answer".to_owned();
    let asking = async {
        loop {
            match probe().await.outcome() {
                Ok(value) => break value,
                Err(answer) => last = answer,
            }
            sleep(INTERVAL).await;
        }
    };
    let value = timeout(deadline, asking).await;
    value.unwrap_or_else(|_| panic!("not within {deadline:?}: {what}; the last answer was: {last}"))
}
