//! 5 Apply: the next step after an attempt at a batch failed. Pure.

use service_kit::publish::PublishError;

use super::planner::PlanError;
use crate::store::StoreError;

/// Why an attempt at a batch failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(transparent)]
    Write(#[from] StoreError),
    #[error("cannot publish a dead letter: {0}")]
    DeadLetter(#[from] PublishError),
    #[error("the batch exceeds the memory limit of a batch")]
    TooLarge,
    #[error("a process was reconfigured after the batch was decided")]
    RulesChanged,
}

impl From<PlanError> for ApplyError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Store(e) => Self::Write(e),
            PlanError::TooLarge => Self::TooLarge,
        }
    }
}

/// How the failed attempt was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attempt {
    pub(crate) entries: usize,
    /// The ledger was searched for duplicates.
    pub(crate) checked_duplicates: bool,
    /// The only entry was a dead letter because the database refused it.
    pub(crate) dead_lettered: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// Try the batch again at once: the cause of the failure is gone.
    Retry,
    /// Try the batch again after a pause: a server is unavailable.
    RetryLater,
    /// Search the ledger for duplicates, then try the batch again.
    CheckDuplicates,
    /// Try each half by itself.
    Split,
    /// Make the only entry a dead letter.
    DeadLetter,
    /// End the term.
    Stop,
}

pub(crate) fn next_step(error: &ApplyError, attempt: Attempt) -> NextStep {
    match error {
        ApplyError::DeadLetter(_) | ApplyError::Write(StoreError::Unavailable(_)) => NextStep::RetryLater,
        ApplyError::TooLarge | ApplyError::Write(StoreError::InvalidValue(_)) if attempt.entries > 1 => NextStep::Split,
        // A single entry has no memory limit. The changed rules were read when the write failed.
        ApplyError::TooLarge | ApplyError::RulesChanged => NextStep::Retry,
        // One entry that the database cannot store must not delay all later ones.
        ApplyError::Write(StoreError::InvalidValue(_)) if !attempt.dead_lettered => NextStep::DeadLetter,
        // Only the leader writes the ledger, so one search finds every duplicate.
        ApplyError::Write(StoreError::Duplicate) if !attempt.checked_duplicates => NextStep::CheckDuplicates,
        ApplyError::Write(_) => NextStep::Stop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Attempt = Attempt { entries: 1, checked_duplicates: false, dead_lettered: false };
    const MANY: Attempt = Attempt { entries: 8, ..FIRST };

    fn store(error: impl Fn(sqlx::Error) -> StoreError) -> ApplyError {
        ApplyError::Write(error(sqlx::Error::RowNotFound))
    }

    #[test]
    fn unavailable_servers_are_retried_indefinitely() {
        for attempt in [FIRST, MANY, Attempt { checked_duplicates: true, dead_lettered: true, ..FIRST }] {
            assert_eq!(next_step(&store(StoreError::Unavailable), attempt), NextStep::RetryLater);
            assert_eq!(next_step(&PublishError::TooLarge.into(), attempt), NextStep::RetryLater);
        }
    }

    #[test]
    fn a_refused_batch_is_split_until_the_refused_entry_is_alone_and_becomes_a_dead_letter() {
        assert_eq!(next_step(&store(StoreError::InvalidValue), MANY), NextStep::Split);
        assert_eq!(next_step(&store(StoreError::InvalidValue), FIRST), NextStep::DeadLetter);
        assert_eq!(
            next_step(&store(StoreError::InvalidValue), Attempt { dead_lettered: true, ..FIRST }),
            NextStep::Stop
        );
    }

    #[test]
    fn a_batch_that_is_too_large_is_split() {
        assert_eq!(next_step(&ApplyError::TooLarge, MANY), NextStep::Split);
        assert_eq!(next_step(&ApplyError::TooLarge, FIRST), NextStep::Retry);
    }

    #[test]
    fn duplicates_are_searched_once() {
        let duplicate = ApplyError::Write(StoreError::Duplicate);
        assert_eq!(next_step(&duplicate, MANY), NextStep::CheckDuplicates);
        assert_eq!(next_step(&duplicate, Attempt { checked_duplicates: true, ..MANY }), NextStep::Stop);
    }

    #[test]
    fn changed_rules_are_retried_and_a_moved_checkpoint_ends_the_term() {
        assert_eq!(next_step(&ApplyError::RulesChanged, MANY), NextStep::Retry);
        assert_eq!(next_step(&ApplyError::Write(StoreError::Fenced), MANY), NextStep::Stop);
        assert_eq!(next_step(&store(StoreError::Refused), MANY), NextStep::Stop);
        let inconsistent = StoreError::Inconsistent("x".into());
        assert_eq!(next_step(&ApplyError::Write(inconsistent), MANY), NextStep::Stop);
    }
}
