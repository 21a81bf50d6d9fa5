//! The circuit breaker of a callback: a pure state machine. Time and randomness are arguments.
//!
//! A closed breaker admits every attempt. After [`THRESHOLD`] consecutive failures it opens and admits none for a
//! while. Then it admits one attempt, the probe: its success closes the breaker, its failure opens it for longer.
//! Waiting for an open breaker does not count as an attempt of the delivery.

use std::time::Duration;

use tokio::time::Instant;

use crate::core::outcome::EndpointHealth;

/// Consecutive failures that open the breaker. A higher threshold sends more requests to a dead endpoint; a lower one
/// opens the breaker after a hiccup.
pub(crate) const THRESHOLD: u32 = 5;
/// Maximum length of the first opening. A longer one spares the endpoint; a shorter one detects sooner that it is back.
const FIRST_OPEN: Duration = Duration::from_secs(1);
/// Maximum length of any opening: an endpoint that is back is detected within this time.
const LONGEST_OPEN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Any number of attempts.
    All,
    /// One attempt, the probe.
    Probe,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Breaker {
    Closed {
        consecutive_failures: u32,
    },
    /// Half open from `until` on.
    Open {
        until: Instant,
        consecutive_openings: u32,
    },
    /// The probe is in flight.
    Probing {
        consecutive_openings: u32,
    },
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { consecutive_failures: 0 }
    }
}

impl Breaker {
    pub(crate) fn admission(self, now: Instant) -> Admission {
        match self {
            Self::Closed { .. } => Admission::All,
            Self::Open { until, .. } if until <= now => Admission::Probe,
            Self::Open { .. } | Self::Probing { .. } => Admission::None,
        }
    }

    /// Open or half open.
    pub(crate) fn is_open(self) -> bool {
        !matches!(self, Self::Closed { .. })
    }

    /// The breaker once the probe is in flight.
    pub(crate) fn probing(self) -> Self {
        match self {
            Self::Open { consecutive_openings, .. } => Self::Probing { consecutive_openings },
            other => other,
        }
    }

    /// The breaker after a probe that sent no request: another probe may start.
    pub(crate) fn probe_abandoned(self, now: Instant) -> Self {
        match self {
            Self::Probing { consecutive_openings } => Self::Open { until: now, consecutive_openings },
            other => other,
        }
    }

    /// The breaker after an attempt; `random` is from 0 to 1.
    pub(crate) fn after(self, health: EndpointHealth, is_probe: bool, now: Instant, random: f64) -> Self {
        match (health, self) {
            // Also an attempt that started before the breaker opened: the endpoint responds.
            (EndpointHealth::Responding, _) => Self::default(),
            (EndpointHealth::Failing, Self::Closed { consecutive_failures })
                if consecutive_failures + 1 < THRESHOLD =>
            {
                Self::Closed { consecutive_failures: consecutive_failures + 1 }
            }
            (EndpointHealth::Failing, Self::Closed { .. }) => {
                Self::Open { until: now + open_for(1, random), consecutive_openings: 1 }
            }
            (EndpointHealth::Failing, Self::Probing { consecutive_openings }) if is_probe => {
                let consecutive_openings = consecutive_openings.saturating_add(1);
                Self::Open { until: now + open_for(consecutive_openings, random), consecutive_openings }
            }
            // The failure of an attempt that started before the breaker opened says nothing new.
            (EndpointHealth::Failing, other) => other,
        }
    }
}

/// How long an opening lasts: twice as long each time. Up to half of it is random, so that replicas do not probe
/// together.
fn open_for(consecutive_openings: u32, random: f64) -> Duration {
    let longest = FIRST_OPEN.saturating_mul(1 << (consecutive_openings.max(1) - 1).min(16)).min(LONGEST_OPEN);
    longest.mul_f64(1.0 - 0.5 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A breaker that has just opened.
    fn open(now: Instant) -> Breaker {
        let failed = |breaker: Breaker| breaker.after(EndpointHealth::Failing, false, now, 0.0);
        (0..THRESHOLD).fold(Breaker::default(), |breaker, _| failed(breaker))
    }

    #[test]
    fn a_breaker_opens_is_probed_and_closes() {
        let now = Instant::now();
        let breaker = open(now);
        assert_eq!(breaker, Breaker::Open { until: now + FIRST_OPEN, consecutive_openings: 1 });
        assert_eq!(breaker.admission(now), Admission::None);
        let later = now + FIRST_OPEN;
        assert_eq!(breaker.admission(later), Admission::Probe);
        let probing = breaker.probing();
        assert_eq!(probing.admission(later), Admission::None, "a single probe");
        assert_eq!(probing.probe_abandoned(later).admission(later), Admission::Probe);
        let longer = probing.after(EndpointHealth::Failing, true, later, 0.0);
        assert_eq!(longer, Breaker::Open { until: later + FIRST_OPEN * 2, consecutive_openings: 2 });
        assert_eq!(probing.after(EndpointHealth::Responding, true, later, 0.0), Breaker::default());
    }

    #[test]
    fn attempts_from_before_the_opening_can_only_close_it() {
        let now = Instant::now();
        let breaker = open(now);
        assert_eq!(breaker.after(EndpointHealth::Failing, false, now, 0.0), breaker);
        assert_eq!(breaker.probing().after(EndpointHealth::Failing, false, now, 0.0), breaker.probing());
        assert_eq!(breaker.after(EndpointHealth::Responding, false, now, 0.0), Breaker::default());
    }

    proptest! {
        #[test]
        fn openings_grow_up_to_a_bound(openings in 1_u32.., first in 0.0..=1.0_f64, second in 0.0..=1.0_f64) {
            let open = open_for(openings, first);
            prop_assert!(open >= FIRST_OPEN / 2 && open <= LONGEST_OPEN);
            let next = open_for(openings.saturating_add(1), second);
            prop_assert!(next >= open || next >= LONGEST_OPEN / 2);
        }

        /// In any order of events: at most one probe is in flight, an open breaker is half open within its bound, a
        /// response closes it, and it never opens before THRESHOLD failures.
        #[test]
        fn the_invariants_hold_in_any_order(steps in prop::collection::vec((0_u8..4, 0_u64..40_000, 0.0..=1.0_f64), 0..200)) {
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
                        breaker = breaker.after(EndpointHealth::Failing, probe, now, random);
                        prop_assert!(failures >= THRESHOLD || !breaker.is_open());
                        if let (Breaker::Probing { consecutive_openings }, true) = (before, probe) {
                            let longer = matches!(breaker, Breaker::Open { consecutive_openings: next, .. } if next == consecutive_openings + 1);
                            prop_assert!(longer);
                        }
                    }
                    _ => {
                        breaker = breaker.after(EndpointHealth::Responding, false, now, random);
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
