//! The place of a command among all that were ever logged: which log, and where in it.

use std::{fmt, str::FromStr};

/// The place of a command: `{generation}.{epoch}.{sequence}` in a header, e.g. `0.1.4711`. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// How often an operator had recovered before.
    pub generation: i32,
    /// Which of the logs there have been; 1 is the first.
    pub epoch: i32,
    /// The sequence in that log.
    pub sequence: u64,
}

/// The text is no position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be three numbers: generation.epoch.sequence")]
pub struct InvalidPosition;

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.generation, self.epoch, self.sequence)
    }
}

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, InvalidPosition> {
        let mut parts = text.splitn(3, '.');
        let mut next = || parts.next().ok_or(InvalidPosition);
        let number = |text: &str| text.parse().map_err(|_| InvalidPosition);
        let (generation, epoch) = (number(next()?)?, number(next()?)?);
        Ok(Self { generation, epoch, sequence: next()?.parse().map_err(|_| InvalidPosition)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_round_trips(generation: i32, epoch: i32, sequence: u64) {
            let position = Position { generation, epoch, sequence };
            prop_assert_eq!(position.to_string().parse::<Position>(), Ok(position));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".*") {
            let _ = text.parse::<Position>();
        }
    }
}
