//! 7 Deliver, 8 Retry: the circuit breaker of a callback. A pure state machine; time and chance are arguments.
//!
//! Closed, every attempt may be made. After [`THRESHOLD`] failures in a row it opens, and nothing is asked of the endpoint
//! for a while. Then one attempt may be made, the probe: its success closes the breaker, its failure opens it for longer.
//! A delivery that waits for an open breaker is charged no attempt.

use std::time::Duration;

use tokio::time::Instant;

/// So many failures in a row open the breaker. More asks a dead endpoint more often, fewer gives up on one that hiccups.
pub(crate) const THRESHOLD: u32 = 5;
/// The longest that the breaker is open the first time. Longer spares the endpoint, shorter notices sooner that it is back.
const FIRST_OPEN: Duration = Duration::from_secs(1);
/// The longest that it is ever open: so much later, at most, an endpoint that is back is noticed.
const LONGEST_OPEN: Duration = Duration::from_secs(30);

/// What an attempt says of its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    /// It answers. That it may refuse this one delivery says nothing of the others.
    Alive,
    /// It does not answer, or says that it cannot take anything now.
    Failing,
}

impl Sign {
    /// What an answer's status says; none when there was no answer.
    pub(crate) fn of(status: Option<u16>) -> Self {
        match status {
            None | Some(429 | 500..) => Self::Failing,
            Some(_) => Self::Alive,
        }
    }
}

/// Whether attempts may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// As many as there are slots for.
    All,
    /// One, which is the probe.
    Probe,
    /// None.
    None,
}

/// A callback's circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Breaker {
    /// Attempts may be made.
    Closed {
        /// How many failed in a row.
        failures: u32,
    },
    /// Until then none may be made; after it, the probe.
    Open {
        /// When it is half open.
        until: Instant,
        /// How often it opened in a row.
        trips: u32,
    },
    /// The probe is under way.
    Probing {
        /// How often it opened in a row.
        trips: u32,
    },
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

impl Breaker {
    /// Whether attempts may be made.
    pub(crate) fn admission(self, now: Instant) -> Admission {
        match self {
            Self::Closed { .. } => Admission::All,
            Self::Open { until, .. } if until <= now => Admission::Probe,
            Self::Open { .. } | Self::Probing { .. } => Admission::None,
        }
    }

    /// Whether it is not closed.
    pub(crate) fn is_open(self) -> bool {
        !matches!(self, Self::Closed { .. })
    }

    /// The breaker when the probe begins.
    pub(crate) fn probing(self) -> Self {
        match self {
            Self::Open { trips, .. } => Self::Probing { trips },
            other => other,
        }
    }

    /// The breaker when the probe came to nothing: another may be made.
    pub(crate) fn probe_abandoned(self, now: Instant) -> Self {
        match self {
            Self::Probing { trips } => Self::Open { until: now, trips },
            other => other,
        }
    }

    /// The breaker after an attempt. `probe`: it was the probe; `random` is from 0 to 1.
    pub(crate) fn after(self, sign: Sign, probe: bool, now: Instant, random: f64) -> Self {
        match (sign, self) {
            // Also of one that began before the breaker opened: an endpoint that answers is there.
            (Sign::Alive, _) => Self::default(),
            (Sign::Failing, Self::Closed { failures }) if failures + 1 < THRESHOLD => {
                Self::Closed { failures: failures + 1 }
            }
            (Sign::Failing, Self::Closed { .. }) => Self::Open { until: now + open_for(1, random), trips: 1 },
            (Sign::Failing, Self::Probing { trips }) if probe => {
                let trips = trips.saturating_add(1);
                Self::Open { until: now + open_for(trips, random), trips }
            }
            // Attempts that began before it opened tell nothing new.
            (Sign::Failing, other) => other,
        }
    }
}

/// How long the breaker is open: doubling, and up to half of it left to chance, so that replicas do not probe together.
fn open_for(trips: u32, random: f64) -> Duration {
    let longest = FIRST_OPEN.saturating_mul(1 << (trips.max(1) - 1).min(16)).min(LONGEST_OPEN);
    longest.mul_f64(1.0 - 0.5 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A breaker that has just opened.
    fn open(now: Instant) -> Breaker {
        let failed = |breaker: Breaker| breaker.after(Sign::Failing, false, now, 0.0);
        (0..THRESHOLD).fold(Breaker::default(), |breaker, _| failed(breaker))
    }

    #[test]
    fn what_an_answer_says_of_its_endpoint() {
        for status in [None, Some(429), Some(500), Some(503), Some(599)] {
            assert_eq!(Sign::of(status), Sign::Failing, "{status:?}");
        }
        for status in [200, 204, 301, 400, 401, 404, 410, 422] {
            assert_eq!(Sign::of(Some(status)), Sign::Alive, "{status}");
        }
    }

    #[test]
    fn it_opens_is_probed_and_closes() {
        let now = Instant::now();
        let breaker = open(now);
        assert_eq!(breaker, Breaker::Open { until: now + FIRST_OPEN, trips: 1 });
        assert_eq!(breaker.admission(now), Admission::None);
        let later = now + FIRST_OPEN;
        assert_eq!(breaker.admission(later), Admission::Probe);
        let probing = breaker.probing();
        assert_eq!(probing.admission(later), Admission::None, "a single probe");
        assert_eq!(probing.probe_abandoned(later).admission(later), Admission::Probe);
        let longer = probing.after(Sign::Failing, true, later, 0.0);
        assert_eq!(longer, Breaker::Open { until: later + FIRST_OPEN * 2, trips: 2 });
        assert_eq!(probing.after(Sign::Alive, true, later, 0.0), Breaker::default());
    }

    #[test]
    fn what_began_before_it_opened_can_only_close_it() {
        let now = Instant::now();
        let breaker = open(now);
        assert_eq!(breaker.after(Sign::Failing, false, now, 0.0), breaker);
        assert_eq!(breaker.probing().after(Sign::Failing, false, now, 0.0), breaker.probing());
        assert_eq!(breaker.after(Sign::Alive, false, now, 0.0), Breaker::default());
    }

    proptest! {
        #[test]
        fn an_open_time_grows_and_is_bounded(trips in 1_u32.., first in 0.0..=1.0_f64, second in 0.0..=1.0_f64) {
            let open = open_for(trips, first);
            prop_assert!(open >= FIRST_OPEN / 2 && open <= LONGEST_OPEN);
            // Whatever chance adds, until it is as long as it gets.
            let next = open_for(trips.saturating_add(1), second);
            prop_assert!(next >= open || next >= LONGEST_OPEN / 2);
        }

        /// Whatever happens in whatever order: at most one probe is under way, an open breaker is half open again within
        /// its bound, one that is alive is closed, and it never opens before enough failures in a row.
        #[test]
        fn it_holds_in_any_order(steps in prop::collection::vec((0_u8..4, 0_u64..40_000, 0.0..=1.0_f64), 0..200)) {
            let mut now = Instant::now();
            let (mut breaker, mut probes, mut failures) = (Breaker::default(), 0, 0);
            for (step, pause, random) in steps {
                now += Duration::from_millis(pause);
                match step {
                    0 => {
                        if breaker.admission(now) == Admission::Probe {
                            breaker = breaker.probing();
                            probes += 1;
                            prop_assert_eq!(breaker.admission(now), Admission::None);
                        }
                    }
                    1 | 2 => {
                        let probe = step == 2 && probes == 1;
                        probes -= u32::from(probe);
                        failures += 1;
                        let before = breaker;
                        breaker = breaker.after(Sign::Failing, probe, now, random);
                        prop_assert!(failures >= THRESHOLD || !breaker.is_open());
                        if let (Breaker::Probing { trips }, true) = (before, probe) {
                            let longer = matches!(breaker, Breaker::Open { trips: next, .. } if next == trips + 1);
                            prop_assert!(longer);
                        }
                    }
                    _ => {
                        breaker = breaker.after(Sign::Alive, false, now, random);
                        (probes, failures) = (0, 0);
                        prop_assert_eq!(breaker.admission(now), Admission::All);
                    }
                }
                prop_assert!(probes <= 1);
                let probing = matches!(breaker, Breaker::Probing { .. });
                prop_assert_eq!(probes == 1, probing);
                if let Breaker::Open { .. } = breaker {
                    prop_assert_eq!(breaker.admission(now + LONGEST_OPEN), Admission::Probe);
                }
            }
        }
    }
}
