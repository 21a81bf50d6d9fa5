//! 3 Read in order: the state of a dead letter that an operator sent again.
//!
//! Notes record the state in the same stream, under [`replayed`](crate::subject::replayed), before and after the letter
//! is sent. The last note of a letter counts.

use std::{fmt, str::FromStr};

use serde::Serialize;

/// The state of a replay: the header [`REPLAY`](crate::headers::REPLAY) of a note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Replay {
    /// `begun`: about to be sent. Without a later note, the letter may or may not be in the log.
    Begun,
    /// `sent 4711`: in the command log.
    Sent {
        /// Its sequence in the log.
        sequence: u64,
    },
    /// `not_sent`: refused, and not in the log.
    NotSent,
}

/// The text is not the state of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be begun, not_sent, or sent and a sequence")]
pub struct InvalidReplay;

impl fmt::Display for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begun => f.write_str("begun"),
            Self::Sent { sequence } => write!(f, "sent {sequence}"),
            Self::NotSent => f.write_str("not_sent"),
        }
    }
}

impl FromStr for Replay {
    type Err = InvalidReplay;

    fn from_str(text: &str) -> Result<Self, InvalidReplay> {
        match text.split_once(' ') {
            None if text == "begun" => Ok(Self::Begun),
            None if text == "not_sent" => Ok(Self::NotSent),
            Some(("sent", sequence)) => {
                sequence.parse().map(|sequence| Self::Sent { sequence }).map_err(|_| InvalidReplay)
            }
            _ => Err(InvalidReplay),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_round_trips(sequence: u64) {
            for replay in [Replay::Begun, Replay::Sent { sequence }, Replay::NotSent] {
                prop_assert_eq!(replay.to_string().parse(), Ok(replay));
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(sent |begun|not_sent)?.*") {
            let _ = text.parse::<Replay>();
        }
    }
}
