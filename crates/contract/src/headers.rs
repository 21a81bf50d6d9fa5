//! Message headers.

/// JetStream's deduplication id. Commands and events carry their `updateId`.
pub const MESSAGE_ID: &str = "Nats-Msg-Id";
/// On a message of an atomic batch (NATS ADR-50): the batch's id. Stored with the message.
pub const BATCH_ID: &str = "Nats-Batch-Id";
/// On a message of an atomic batch: its number in the batch, from 1 on.
pub const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
/// On the last message of an atomic batch: `1`.
pub const BATCH_COMMIT: &str = "Nats-Batch-Commit";
/// On a producer's update: the update's id, 24 hex digits. An id that occurs twice in a project is applied and
/// announced once.
pub const UPDATE_ID: &str = "Leadrelay-Update-Id";
/// On a producer's update: the version that the lead must have.
pub const EXPECTED_VERSION: &str = "Leadrelay-Expected-Version";
/// On a producer's update: the state that the lead must be in.
pub const EXPECTED_STATE: &str = "Leadrelay-Expected-State";
/// W3C trace context (<https://www.w3.org/TR/trace-context/>), from the client through every message to the webhook.
pub const TRACEPARENT: &str = "traceparent";
/// On a dead letter: the error, in one sentence.
pub const DEAD_LETTER_ERROR: &str = "Leadrelay-Error";
/// On a dead letter: the subject it was published on.
pub const ORIGIN_SUBJECT: &str = "Leadrelay-Origin-Subject";
/// On a completion event and on a dead letter of the command log: the
/// [`EventPosition`](crate::position::EventPosition) of its command.
pub const POSITION: &str = "Leadrelay-Position";
/// On a dead letter: its sequence in the stream that it was read from.
pub const ORIGIN_SEQUENCE: &str = "Leadrelay-Origin-Sequence";
/// On a dead letter: when the command log stored it, ISO 8601.
pub const ORIGIN_TIME: &str = "Leadrelay-Origin-Time";
/// On a dead letter whose body was truncated to the server's `max_payload`: the full length in bytes.
pub const TRUNCATED_FROM: &str = "Leadrelay-Truncated-From";
/// On a replayed dead letter, and on the dead letter that results if it fails again: the sequence of the first dead
/// letter.
pub const REPLAY_OF: &str = "Leadrelay-Replay-Of";
/// On a note about a dead letter: its [`Replay`](crate::replay::Replay).
pub const REPLAY: &str = "Leadrelay-Replay";
/// JetStream stores the message only if this is the sequence of the stream's last message; 0 if it never had any.
pub const EXPECTED_LAST_SEQUENCE: &str = "Nats-Expected-Last-Sequence";
/// JetStream stores the message only if this is the sequence of the last message on its subject; 0 if there is none.
pub const EXPECTED_LAST_SUBJECT_SEQUENCE: &str = "Nats-Expected-Last-Subject-Sequence";
