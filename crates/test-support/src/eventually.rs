//! Waiting for a condition.

use std::{fmt::Display, time::Duration};
use tokio::time::{sleep, timeout};

/// The pause between two probes. A shorter one ends a wait sooner and takes CPU time from the services under test.
const INTERVAL: Duration = Duration::from_millis(20);

/// The result of a probe: the value waited for, or why there is none yet.
pub trait Outcome {
    /// The value waited for.
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

/// Calls `probe` until it returns `true`, `Some` or `Ok`. Panics at the deadline, with the last result.
pub async fn eventually<O: Outcome>(deadline: Duration, what: &str, mut probe: impl AsyncFnMut() -> O) -> O::Value {
    let mut last = "none".to_owned();
    let probing = async {
        loop {
            match probe().await.outcome() {
                Ok(value) => break value,
                Err(result) => last = result,
            }
            sleep(INTERVAL).await;
        }
    };
    let value = timeout(deadline, probing).await;
    value.unwrap_or_else(|_| panic!("not within {deadline:?}: {what}; the last result was: {last}"))
}
