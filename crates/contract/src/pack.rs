//! Packs: messages of the command log that hold many commands each.
//!
//! A server that syncs before it acknowledges does so once per message, so commands that wait for the log anyway share
//! a message. A command in a pack means what the same message would mean alone: it has a subject, a traceparent and a
//! payload of its own. Its [`LogPosition`](crate::position::LogPosition) is the sequence of the pack and its index in
//! it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The most commands of a pack. Every index is below this number.
pub const MAX_PACK_COMMANDS: usize = 1000;

/// The text before the first command.
const BEGIN: &[u8] = br#"{"commands":["#;
/// The text after the last command.
const END: &[u8] = b"]}";
/// The text around subject, traceparent and payload.
const AROUND: usize = r#"{"subject":"","traceparent":"","payload":},"#.len();

/// A message that holds many commands, on `leads.cmd.pack`.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CommandPack<'a> {
    /// The commands, in log order: at least one, at most 1000.
    #[serde(borrow)]
    pub commands: Vec<PackItem<'a>>,
}

/// A command of a pack.
#[derive(Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PackItem<'a> {
    /// The subject that the command would have as a message of its own.
    pub subject: String,
    /// Its W3C trace context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The command.
    #[serde(borrow)]
    #[cfg_attr(feature = "schema", schemars(with = "serde_json::Map<String, serde_json::Value>"))]
    pub payload: &'a RawValue,
}

/// A command of a pack, for its writer and its reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedCommand {
    /// The subject that the command would have as a message of its own.
    pub subject: String,
    /// Its W3C trace context.
    pub traceparent: Option<String>,
    /// The command: JSON, unchanged by the pack.
    pub payload: Bytes,
}

/// The message is not a pack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPack {
    /// It does not parse.
    #[error("not a pack of commands: {0}")]
    Unreadable(String),
    /// It has no command, or too many.
    #[error("a pack holds 1 to {MAX_PACK_COMMANDS} commands, this one {0}")]
    Size(usize),
}

/// The size of a pack that is being filled.
#[derive(Debug)]
pub struct PackBudget {
    commands: usize,
    bytes: usize,
    max_bytes: usize,
}

impl PackBudget {
    /// The budget of an empty pack of at most `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self { commands: 0, bytes: BEGIN.len() + END.len(), max_bytes }
    }

    /// Adds a command, unless it does not fit.
    pub fn try_add(&mut self, command: &PackedCommand) -> bool {
        let PackedCommand { subject, traceparent, payload } = command;
        let bytes = AROUND + subject.len() + traceparent.as_ref().map_or(0, String::len) + payload.len();
        let fits = self.commands < MAX_PACK_COMMANDS && self.bytes.saturating_add(bytes) <= self.max_bytes;
        if fits {
            self.commands += 1;
            self.bytes += bytes;
        }
        fits
    }

    /// Whether no further command fits.
    pub fn is_full(&self) -> bool {
        self.commands == MAX_PACK_COMMANDS || self.bytes + AROUND >= self.max_bytes
    }
}

/// The message that holds these commands. Their payloads must be JSON.
///
/// # Errors
/// Never: every text serializes.
pub fn write<'a>(commands: impl IntoIterator<Item = &'a PackedCommand>) -> serde_json::Result<Bytes> {
    let mut text = BEGIN.to_vec();
    for (index, PackedCommand { subject, traceparent, payload }) in commands.into_iter().enumerate() {
        text.extend_from_slice(if index == 0 { br#"{"subject":"# } else { br#",{"subject":"# });
        serde_json::to_writer(&mut text, subject)?;
        if let Some(traceparent) = traceparent {
            text.extend_from_slice(br#","traceparent":"#);
            serde_json::to_writer(&mut text, traceparent)?;
        }
        text.extend_from_slice(br#","payload":"#);
        text.extend_from_slice(payload);
        text.push(b'}');
    }
    text.extend_from_slice(END);
    Ok(text.into())
}

/// The commands of a message. Their payloads share its memory.
///
/// # Errors
/// The message is not a pack. A payload is checked to be JSON, but not to be a command.
pub fn read(message: &Bytes) -> Result<Vec<PackedCommand>, InvalidPack> {
    let pack: CommandPack<'_> =
        serde_json::from_slice(message).map_err(|e| InvalidPack::Unreadable(crate::json::redacted_error(&e)))?;
    let count = pack.commands.len();
    if count == 0 || count > MAX_PACK_COMMANDS {
        return Err(InvalidPack::Size(count));
    }
    let command = |PackItem { subject, traceparent, payload }: PackItem<'_>| PackedCommand {
        subject,
        traceparent,
        payload: message.slice_ref(payload.get().as_bytes()),
    };
    Ok(pack.commands.into_iter().map(command).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn command(subject: &str, traceparent: Option<&str>, payload: &str) -> PackedCommand {
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        PackedCommand { subject: subject.into(), traceparent: traceparent.map(str::to_owned), payload }
    }

    fn any_command() -> impl Strategy<Value = PackedCommand> {
        let number = "-?[1-9][0-9]{0,40}(\\.[0-9]{1,30})?";
        let payload = prop_oneof![
            number.prop_map(|number| format!(r#"{{ "n" : {number} }}"#)),
            ".*".prop_map(|text| json!({"text": text}).to_string()),
            Just(r#"{"a":1,"a":2,"nul":"\u0000"}"#.to_owned()),
        ];
        (".*", proptest::option::of(".*"), payload)
            .prop_map(|(subject, traceparent, payload)| command(&subject, traceparent.as_deref(), &payload))
    }

    #[test]
    fn a_pack_has_this_wire_form() {
        let commands = [
            command("leads.cmd.010101010101010101010101.update", Some("00-4b-00-01"), r#"{"leadId":"02"}"#),
            command("leads.cmd.030303030303030303030303.call.ended", None, r#"{"n":1.10}"#),
        ];
        let message = write(&commands).unwrap();
        insta::assert_snapshot!(String::from_utf8_lossy(&message), @r#"{"commands":[{"subject":"leads.cmd.010101010101010101010101.update","traceparent":"00-4b-00-01","payload":{"leadId":"02"}},{"subject":"leads.cmd.030303030303030303030303.call.ended","payload":{"n":1.10}}]}"#);
    }

    #[test]
    fn only_a_pack_of_some_commands_is_read() {
        for text in ["", "{}", "[]", "null", r#"{"commands":{}}"#, r#"{"commands":[{"payload":{}}]}"#] {
            let read = read(&Bytes::from_static(text.as_bytes()));
            assert!(matches!(read, Err(InvalidPack::Unreadable(_))), "{text}: {read:?}");
        }
        let of = |count: usize| write(&vec![command("s", None, "{}"); count]).unwrap();
        assert_eq!(read(&of(0)), Err(InvalidPack::Size(0)));
        assert_eq!(read(&of(MAX_PACK_COMMANDS)).map(|commands| commands.len()), Ok(MAX_PACK_COMMANDS));
        assert_eq!(read(&of(MAX_PACK_COMMANDS + 1)), Err(InvalidPack::Size(MAX_PACK_COMMANDS + 1)));
    }

    #[test]
    fn unknown_members_are_ignored() {
        let later = Bytes::from_static(br#"{"commands":[{"subject":"s","payload":{},"x":1}],"y":2}"#);
        assert_eq!(read(&later), Ok(vec![command("s", None, "{}")]));
    }

    #[test]
    fn a_budget_is_full_at_the_most_commands() {
        let mut budget = PackBudget::new(1 << 20);
        let small = command("s", None, "{}");
        assert_eq!((0..2000).filter(|_| budget.try_add(&small)).count(), MAX_PACK_COMMANDS);
        assert!(budget.is_full());
    }

    proptest! {
        #[test]
        fn commands_are_read_as_they_were_written(commands in prop::collection::vec(any_command(), 1..20)) {
            prop_assert_eq!(read(&write(&commands).unwrap()), Ok(commands));
        }

        #[test]
        fn a_pack_is_no_longer_than_its_budget(
            lengths in prop::collection::vec((0..60_usize, proptest::option::of(0..60_usize), 0..300_usize), 1..40),
            max_bytes in 0..4000_usize,
        ) {
            let mut budget = PackBudget::new(max_bytes);
            let commands = lengths.into_iter().map(|(subject, traceparent, payload)| {
                let traceparent = traceparent.map(|length| "0".repeat(length));
                let payload = json!("x".repeat(payload)).to_string();
                command(&"s".repeat(subject), traceparent.as_deref(), &payload)
            });
            let taken: Vec<_> = commands.take_while(|command| budget.try_add(command)).collect();
            prop_assert!(taken.is_empty() || write(&taken).unwrap().len() <= max_bytes);
        }

        #[test]
        fn arbitrary_messages_never_panic(message: Vec<u8>) {
            let _ = read(&message.into());
        }
    }
}
