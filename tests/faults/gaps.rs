//! Gaps: the longest times without acceptance, application and delivery.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::PgPool;
use tokio_util::task::AbortOnDropHandle;

/// The interval at which the checkpoint is read from the database.
const POLL: Duration = Duration::from_millis(50);

/// The longest gaps during a fault.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Gaps {
    pub(crate) acceptance: Duration,
    pub(crate) application: Duration,
    pub(crate) delivery: Duration,
}

impl Gaps {
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            acceptance: self.acceptance.max(other.acceptance),
            application: self.application.max(other.application),
            delivery: self.delivery.max(other.delivery),
        }
    }
}

/// Prints the gaps as three cells of a table.
impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [acceptance, application, delivery] =
            [self.acceptance, self.application, self.delivery].map(|gap| gap.as_secs_f64());
        write!(f, "{acceptance:.1} s | {application:.1} s | {delivery:.1} s")
    }
}

/// The longest time between two occurrences.
#[derive(Debug)]
pub(crate) struct Gap(Mutex<(Instant, Duration)>);

impl Default for Gap {
    fn default() -> Self {
        Self(Mutex::new((Instant::now(), Duration::ZERO)))
    }
}

impl Gap {
    pub(crate) fn record(&self) {
        let mut state = self.lock();
        let (last, longest) = *state;
        *state = (Instant::now(), longest.max(last.elapsed()));
    }

    /// The longest gap since the last call.
    pub(crate) fn take(&self) -> Duration {
        let mut state = self.lock();
        let (last, longest) = *state;
        *state = (Instant::now(), Duration::ZERO);
        longest.max(last.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, (Instant, Duration)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Measures the gaps between movements of the checkpoint.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) gap: Arc<Gap>,
    _task: AbortOnDropHandle<()>,
}

impl Watch {
    pub(crate) fn applied(pool: PgPool) -> Self {
        let gap = Arc::<Gap>::default();
        let observed = gap.clone();
        let watch = async move {
            let mut last = 0;
            loop {
                let applied = sqlx::query_scalar::<_, i64>("SELECT last_sequence FROM lead_state.checkpoints");
                // Postgres may be unavailable.
                if let Ok(applied) = applied.fetch_one(&pool).await
                    && applied != last
                {
                    last = applied;
                    observed.record();
                }
                tokio::time::sleep(POLL).await;
            }
        };
        Self { gap, _task: AbortOnDropHandle::new(tokio::spawn(watch)) }
    }
}
