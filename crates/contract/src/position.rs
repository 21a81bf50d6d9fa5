//! Positions in the command log, across all logs of an installation.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The position of a command in the command log. Later positions are greater.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct LogPosition {
    /// The epoch: one life of the command log, from 1 on. It grows when lead-state continues with another log, and when
    /// an operator recovers with a new epoch.
    pub epoch: i32,
    /// The sequence of the message in that log.
    pub sequence: u64,
    /// The index of the update in its message.
    pub index: u32,
}

impl LogPosition {
    /// A position before this one. Only entries of the message before lie between the two.
    #[must_use]
    pub const fn before(self) -> Self {
        match self.index.checked_sub(1) {
            Some(index) => Self { index, ..self },
            None => Self::message(self.epoch, self.sequence.saturating_sub(1)),
        }
    }

    /// The position of a message's first command.
    pub const fn message(epoch: i32, sequence: u64) -> Self {
        Self { epoch, sequence, index: 0 }
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.epoch, self.sequence, self.index)
    }
}

/// The position of an event or dead letter: `{generation}.{epoch}.{sequence}.{index}` in a header, e.g. `0.1.4711.0`.
/// Events of the same update in a later generation are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventPosition {
    /// How many times announcements were rewound before.
    pub generation: i32,
    /// The position of the event's command.
    pub log: LogPosition,
}

/// The text is not a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be four numbers: generation.epoch.sequence.index")]
pub struct InvalidPosition;

impl fmt::Display for EventPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.log)
    }
}

impl FromStr for EventPosition {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, InvalidPosition> {
        fn number<T: FromStr>(text: &str) -> Result<T, InvalidPosition> {
            text.parse().map_err(|_| InvalidPosition)
        }
        let mut parts = text.splitn(4, '.');
        let mut next = || parts.next().ok_or(InvalidPosition);
        let generation = number(next()?)?;
        let log = LogPosition { epoch: number(next()?)?, sequence: number(next()?)?, index: number(next()?)? };
        Ok(Self { generation, log })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_position_has_four_numbers() {
        let position = EventPosition { generation: 0, log: LogPosition::message(1, 4711) };
        assert_eq!(position.to_string(), "0.1.4711.0");
        for text in ["", "0.1.4711", "0.1.4711.", "0.1.4711.0.0", "0.1.x.0"] {
            assert_eq!(text.parse::<EventPosition>(), Err(InvalidPosition), "{text}");
        }
    }

    #[test]
    fn the_position_before_is_in_the_same_message_if_that_has_one() {
        let at = |sequence, index| LogPosition { epoch: 1, sequence, index };
        assert_eq!(at(7, 3).before(), at(7, 2));
        assert_eq!(at(7, 0).before(), at(6, 0));
        assert_eq!(at(0, 0).before(), at(0, 0));
    }

    proptest! {
        #[test]
        fn text_round_trips(generation: i32, epoch: i32, sequence: u64, index: u32) {
            let position = EventPosition { generation, log: LogPosition { epoch, sequence, index } };
            prop_assert_eq!(position.to_string().parse::<EventPosition>(), Ok(position));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".*") {
            let _ = text.parse::<EventPosition>();
        }
    }
}
