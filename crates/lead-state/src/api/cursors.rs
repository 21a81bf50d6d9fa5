//! Cursors of the lists. A cursor names its list, so that other lists reject it.

use contract::{
    ObjectId,
    position::LogPosition,
    rpc::{Call, Cursor, RpcError},
};

use crate::store::calls::CallPosition;

const LEADS: &str = "leads";
const HISTORY: &str = "history";
const UPDATES: &str = "updates";
const CALLS: &str = "calls";
const PROCESSES: &str = "processes";
const KEYS: &str = "keys";

pub(super) fn lead(lead_id: ObjectId) -> Cursor {
    Cursor::new(LEADS, &lead_id.to_string())
}

pub(super) fn parse_lead(cursor: &Cursor) -> Result<ObjectId, RpcError> {
    cursor.place(LEADS)?.parse().map_err(|_| Cursor::invalid())
}

pub(super) fn update(update_id: ObjectId) -> Cursor {
    Cursor::new(UPDATES, &update_id.to_string())
}

pub(super) fn parse_update(cursor: &Cursor) -> Result<ObjectId, RpcError> {
    cursor.place(UPDATES)?.parse().map_err(|_| Cursor::invalid())
}

pub(super) fn call(call: &Call) -> Cursor {
    Cursor::new(CALLS, &format!("{}.{}", call.lead_id, call.call_id.as_deref().unwrap_or_default()))
}

pub(super) fn parse_call(cursor: &Cursor) -> Result<CallPosition, RpcError> {
    let text = cursor.place(CALLS)?;
    let (lead_id, call_id) = text.split_once('.').ok_or_else(Cursor::invalid)?;
    match lead_id.parse() {
        // Postgres stores no NUL.
        Ok(lead_id) if !call_id.contains('\0') => Ok(CallPosition { lead_id, call_id: call_id.to_owned() }),
        _ => Err(Cursor::invalid()),
    }
}

pub(super) fn process(name: &str) -> Cursor {
    Cursor::new(PROCESSES, name)
}

pub(super) fn parse_process(cursor: &Cursor) -> Result<String, RpcError> {
    let name = cursor.place(PROCESSES)?;
    // Postgres stores no NUL.
    if name.contains('\0') { Err(Cursor::invalid()) } else { Ok(name) }
}

pub(super) fn key(key_id: ObjectId) -> Cursor {
    Cursor::new(KEYS, &key_id.to_string())
}

pub(super) fn parse_key(cursor: &Cursor) -> Result<ObjectId, RpcError> {
    cursor.place(KEYS)?.parse().map_err(|_| Cursor::invalid())
}

pub(super) fn history(position: LogPosition) -> Cursor {
    Cursor::new(HISTORY, &position.to_string())
}

pub(super) fn parse_history(cursor: &Cursor) -> Result<LogPosition, RpcError> {
    let text = cursor.place(HISTORY)?;
    let mut parts = text.splitn(3, '.');
    let mut next = || parts.next().ok_or_else(Cursor::invalid);
    let (epoch, sequence, index) = (next()?, next()?, next()?);
    let parsed = (epoch.parse(), sequence.parse(), index.parse());
    let (Ok(epoch), Ok(sequence), Ok(index)) = parsed else { return Err(Cursor::invalid()) };
    Ok(LogPosition { epoch, sequence, index })
}

#[cfg(test)]
mod tests {
    use contract::Timestamp;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cursors_round_trip_and_fit_only_their_list(bytes: [u8; 12], epoch: i32, sequence: u64, index: u32) {
            let lead_id = ObjectId::from_bytes(bytes);
            let position = LogPosition { epoch, sequence, index };

            prop_assert_eq!(parse_lead(&lead(lead_id)), Ok(lead_id));
            prop_assert_eq!(parse_update(&update(lead_id)), Ok(lead_id));
            prop_assert_eq!(parse_history(&history(position)), Ok(position));
            let at = Timestamp::from_millis(0);
            let started = Call {
                lead_id, process_id: lead_id, reference_id: None, call_id: Some("a.b".into()), started_at: at, expires_at: at,
            };
            prop_assert_eq!(parse_call(&call(&started)), Ok(CallPosition { lead_id, call_id: "a.b".into() }));
            prop_assert!(parse_call(&lead(lead_id)).is_err());
            prop_assert!(parse_lead(&history(position)).is_err());
            prop_assert!(parse_lead(&update(lead_id)).is_err());
            prop_assert!(parse_history(&lead(lead_id)).is_err());
        }

        #[test]
        fn forged_cursors_never_panic(text in "[0-9a-f.-]{0,40}|.*") {
            let _ = (parse_lead(&Cursor::new(LEADS, &text)), parse_history(&Cursor::new(HISTORY, &text)));
            let _ = (parse_process(&Cursor::new(PROCESSES, &text)), parse_call(&Cursor::new(CALLS, &text)));
        }
    }
}
