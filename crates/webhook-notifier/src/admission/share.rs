//! How much of the pool an endpoint may take: pure functions.
//!
//! A project holds at most as much as is still free, and an endpoint at most as much as its project could still take:
//! the rule of [`service_kit::shares`], applied twice.

use service_kit::shares::available;

/// How many attempts an endpoint that answered nothing lately may have in flight. A larger window lets endpoints that
/// hang take more of the pool, a smaller one slows down the start of every endpoint.
pub(crate) const INITIAL_WINDOW: u32 = 4;
/// How far each recent answer opens the window. Must exceed 1, otherwise the window does not grow while attempts end.
const WINDOW_PER_ANSWER: u32 = 2;

/// How many attempts an endpoint may have in flight, by its configured maximum and the answers of the last second.
pub(crate) fn window(max_in_flight: u32, recent_answers: usize) -> u32 {
    let answers = u32::try_from(recent_answers).unwrap_or(u32::MAX);
    max_in_flight.min(INITIAL_WINDOW.saturating_add(answers.saturating_mul(WINDOW_PER_ANSWER)))
}

/// The part of a window that first attempts may use. While deliveries of the endpoint are due in Postgres, a quarter is
/// reserved for them; otherwise new events could keep them waiting forever.
pub(crate) fn first_attempt_window(window: u32, has_due_retries: bool) -> u32 {
    if has_due_retries { window - window.div_ceil(4) } else { window }
}

/// The units and attempts in use. Bodies are counted in units of the pool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// Units that nothing holds. Negative while claimed bodies turned out larger than expected.
    pub(crate) free_units: i64,
    pub(crate) project_units: i64,
    pub(crate) endpoint_units: i64,
    pub(crate) window: u32,
    pub(crate) in_flight: u32,
}

/// How much more an endpoint may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) attempts: u32,
    pub(crate) units: i64,
}

impl Share {
    pub(crate) fn of(usage: &Usage) -> Self {
        let for_project = available(usage.free_units, usage.project_units);
        let for_endpoint = available(for_project, usage.endpoint_units);
        Self {
            attempts: usage.window.saturating_sub(usage.in_flight),
            units: for_endpoint.min(usage.free_units.max(0)),
        }
    }

    /// Whether one attempt with a body of `units` units fits.
    pub(crate) fn fits(self, units: i64) -> bool {
        self.attempts > 0 && units <= self.units
    }
}

/// How many more units each project may take, given the units that it has: together at most the free units. Earlier
/// projects get more.
pub(crate) fn project_shares(free_units: i64, project_units: impl IntoIterator<Item = i64>) -> Vec<i64> {
    let mut free = free_units.max(0);
    let share = |units| {
        let share = available(free, units).min(free);
        free -= share;
        share
    };
    project_units.into_iter().map(share).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn units(free_units: i64, project_units: i64, endpoint_units: i64) -> i64 {
        Share::of(&Usage { free_units, project_units, endpoint_units, window: 64, in_flight: 0 }).units
    }

    #[test]
    fn each_endpoint_gets_half_of_its_projects_remaining_share() {
        assert_eq!(units(512, 0, 0), 128);
        assert_eq!(units(384, 128, 128), 0, "the endpoint holds its half");
        assert_eq!(units(384, 128, 0), 64, "another endpoint of the project");
        assert_eq!(units(256, 256, 0), 0, "the project holds as much as is free");
        assert_eq!(units(256, 0, 0), 64, "another project");
        assert_eq!(units(1, 0, 0), 1, "the last unit");
        assert_eq!(units(-3, 0, 0), 0);
    }

    #[test]
    fn projects_share_what_is_free_in_their_order() {
        assert_eq!(project_shares(512, [0, 0, 0]), [256, 128, 64]);
        assert_eq!(project_shares(256, [256, 0]), [0, 128], "a project that holds its share gets none");
        assert_eq!(project_shares(1, [0, 0]), [1, 0]);
        assert_eq!(project_shares(-3, [0]), [0]);
    }

    #[test]
    fn a_window_opens_with_answers_up_to_the_configured_maximum() {
        assert_eq!(window(64, 0), INITIAL_WINDOW);
        assert_eq!(window(64, 1), 6);
        assert_eq!(window(64, usize::MAX), 64);
        assert_eq!(window(2, 0), 2);
    }

    #[test]
    fn due_retries_keep_a_quarter_of_the_window() {
        assert_eq!(first_attempt_window(8, false), 8);
        assert_eq!(first_attempt_window(8, true), 6);
        assert_eq!(first_attempt_window(1, true), 0);
    }

    #[test]
    fn attempts_in_flight_use_up_the_window() {
        let usage = |in_flight| Usage { free_units: 100, project_units: 0, endpoint_units: 0, window: 4, in_flight };
        assert_eq!(Share::of(&usage(1)).attempts, 3);
        assert!(!Share::of(&usage(4)).fits(1));
        assert!(!Share::of(&usage(9)).fits(1), "the window shrank below what is in flight");
    }

    proptest! {
        #[test]
        fn projects_together_take_at_most_what_is_free(
            free in -100_i64..2000, projects in prop::collection::vec(0_i64..600, 0..50),
        ) {
            let shares = project_shares(free, projects);
            prop_assert!(shares.iter().all(|share| *share >= 0));
            prop_assert!(shares.iter().sum::<i64>() <= free.max(0));
        }

        #[test]
        fn a_share_never_exceeds_what_is_free(free in 0_i64..2000, project in 0_i64..2000, part in 0.0..=1.0_f64) {
            let share = units(free, project, (project as f64 * part) as i64);
            prop_assert!(share >= 0 && share <= free);
            if share > 0 {
                // One unit of rounding per halving.
                prop_assert!(project + share <= free - share + 2);
            }
            if project == 0 && free > 0 {
                prop_assert!(share > 0, "a project without attempts gets something");
            }
        }
    }
}
