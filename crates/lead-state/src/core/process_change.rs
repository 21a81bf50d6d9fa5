//! What a change makes of a process: decided without effects. `api::admin` reads, stores and projects.

use std::time::Duration;

use contract::{
    ObjectId, Timestamp,
    process::{
        Callback, CallbackAuth, CallbackSpec, MAX_OVERLAP_SECONDS, MAX_RETIRING_SECRETS, Process, ProcessSpec,
        RetiringSecret, Rules,
    },
    rpc::{ChangeProcess, ProcessChange, ProcessSelector, RpcError},
    secret::Secret,
    subject::NO_PROCESS,
};
use serde_json::Value;
use url::Url;

/// A process as a change made it. Its secrets are in clear, save those that could not be opened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) process: Process,
    /// The callbacks for which a secret was made, which nobody has seen yet.
    pub(crate) new_secrets: Vec<ObjectId>,
}

/// What there is before a change.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Known<'a> {
    Process(&'a Process),
    /// No process that is named so.
    Nothing(&'a ProcessSelector),
}

pub(crate) fn no_process() -> RpcError {
    RpcError::new(404, "process_not_found", "Process not found")
}

fn no_callback() -> RpcError {
    RpcError::new(404, "callback_not_found", "Callback not found")
}

/// A project's fallback callbacks before there are any.
pub(crate) fn fallback(project_id: ObjectId) -> Process {
    let name = NO_PROCESS.to_owned();
    Process { project_id, process_id: None, revision: 0, name, rules: no_rules(), callbacks: Vec::new() }
}

/// Those of a process of which nothing was said.
fn no_rules() -> Rules {
    #[allow(clippy::expect_used, reason = "every rule has a default")]
    serde_json::from_str("{}").expect("the default rules")
}

/// Refuses what is wrong whatever there is.
pub(crate) fn check(query: &ChangeProcess) -> Result<(), RpcError> {
    let faults = match &query.change {
        ProcessChange::Put { spec, .. } if spec.project_id != query.project_id => {
            vec!["projectId: another project".to_owned()]
        }
        ProcessChange::Put { spec, .. } => spec.faults(),
        ProcessChange::AddCallback { callback } | ProcessChange::PutCallback { callback, .. } => callback.faults(),
        ProcessChange::RotateSecret { overlap_seconds, .. } if *overlap_seconds > MAX_OVERLAP_SECONDS => {
            let message = format!("overlapSeconds must be a number from 0 to {MAX_OVERLAP_SECONDS}");
            return Err(RpcError::new(400, "invalid_field", message));
        }
        ProcessChange::RemoveCallback { .. } | ProcessChange::RotateSecret { .. } => Vec::new(),
    };
    if faults.is_empty() { Ok(()) } else { Err(invalid(&faults.join("; "))) }
}

fn invalid(message: &str) -> RpcError {
    RpcError::new(400, "invalid_process", message)
}

/// Refuses a change of a process that is not as whoever changes it saw it.
pub(crate) fn check_revision(existing: Option<&Process>, expected: Option<i64>) -> Result<(), RpcError> {
    let revision = existing.map_or(0, |process| process.revision);
    match expected {
        Some(expected) if expected != revision => {
            let message = format!("The process is at version {revision}, not {expected}: get it and change that");
            Err(RpcError::new(412, "version_mismatch", message))
        }
        _ => Ok(()),
    }
}

/// What a change makes of what there is. Secrets are in clear, save those that could not be opened: to keep one of them
/// through a change of its callback is refused.
pub(crate) fn change(
    known: Known<'_>,
    project_id: ObjectId,
    change: &ProcessChange,
    now: Timestamp,
    mut new_id: impl FnMut() -> ObjectId,
    mut new_secret: impl FnMut() -> Secret,
) -> Result<Made, RpcError> {
    let existing = match known {
        Known::Process(process) => Some(process),
        Known::Nothing(_) => None,
    };
    if let ProcessChange::Put { spec, keep_callbacks } = change {
        return put(spec, *keep_callbacks, existing, &mut new_id, &mut new_secret);
    }
    let mut process = match known {
        Known::Process(process) => process.clone(),
        Known::Nothing(ProcessSelector::Named(name)) if name == NO_PROCESS => fallback(project_id),
        Known::Nothing(_) => return Err(no_process()),
    };
    let place = |process: &Process, callback_id: ObjectId| {
        process.callbacks.iter().position(|callback| callback.callback_id == callback_id).ok_or_else(no_callback)
    };
    let mut new_secrets = Vec::new();
    match change {
        ProcessChange::Put { .. } => {}
        ProcessChange::AddCallback { callback } => {
            if callback.callback_id.is_some() {
                return Err(invalid("callbackId: a new callback is given its id"));
            }
            check_free(&process, &callback.name, None)?;
            let made = self::callback(callback, None, &mut new_id, &mut new_secret, &mut new_secrets)?;
            process.callbacks.push(made);
        }
        ProcessChange::PutCallback { callback_id, callback } => {
            let at = place(&process, *callback_id)?;
            if callback.callback_id.is_some_and(|given| given != *callback_id) {
                return Err(invalid("callbackId: it is another one"));
            }
            check_free(&process, &callback.name, Some(*callback_id))?;
            let before = process.callbacks[at].clone();
            process.callbacks[at] =
                self::callback(callback, Some(&before), &mut new_id, &mut new_secret, &mut new_secrets)?;
        }
        ProcessChange::RemoveCallback { callback_id } => {
            let at = place(&process, *callback_id)?;
            process.callbacks.remove(at);
        }
        ProcessChange::RotateSecret { callback_id, overlap_seconds } => {
            let at = place(&process, *callback_id)?;
            rotate(&mut process.callbacks[at], *overlap_seconds, now, new_secret())?;
            new_secrets.push(*callback_id);
        }
    }
    Ok(Made { process, new_secrets })
}

fn check_free(process: &Process, name: &str, of: Option<ObjectId>) -> Result<(), RpcError> {
    if process.callbacks.iter().any(|callback| callback.name == name && Some(callback.callback_id) != of) {
        return Err(RpcError::new(409, "callback_exists", format!("the process has a callback {name:?} already")));
    }
    Ok(())
}

/// Gives a callback a new signing secret. What it had so far signs until the overlap is over at the latest.
fn rotate(callback: &mut Callback, overlap_seconds: u32, now: Timestamp, new: Secret) -> Result<(), RpcError> {
    if callback.secrets.iter().any(Secret::is_sealed) {
        return Err(locked(callback));
    }
    let until = now.plus(Duration::from_secs(overlap_seconds.into()));
    let present = std::mem::replace(&mut callback.secrets, vec![new]);
    let present = present.into_iter().map(|secret| RetiringSecret { secret, until });
    let before = std::mem::take(&mut callback.retiring_secrets).into_iter();
    let before = before.map(|retiring| RetiringSecret { until: retiring.until.min(until), ..retiring });
    let retiring: Vec<_> = present.chain(before).filter(|retiring| now < retiring.until).collect();
    if retiring.len() > MAX_RETIRING_SECRETS {
        let message = format!(
            "{MAX_RETIRING_SECRETS} secrets of the callback are valid beside its present one already: wait, or let go of \
             all of them with overlapSeconds 0"
        );
        return Err(RpcError::new(409, "too_many_secrets", message));
    }
    callback.retiring_secrets = retiring;
    Ok(())
}

/// Leaves out secrets whose time is over.
pub(crate) fn forget_retired(process: &mut Process, now: Timestamp) {
    for callback in &mut process.callbacks {
        callback.retiring_secrets.retain(|retiring| now < retiring.until);
    }
}

/// What a spec makes of what is there. A callback keeps its id and its secrets: it is found by its id, or else by its name.
fn put(
    spec: &ProcessSpec,
    keep_callbacks: bool,
    existing: Option<&Process>,
    new_id: &mut impl FnMut() -> ObjectId,
    new_secret: &mut impl FnMut() -> Secret,
) -> Result<Made, RpcError> {
    if existing.is_some_and(|process| process.process_id.is_none() != spec.is_fallback()) {
        return Err(invalid("name: \"_\" stands for the project's fallback callbacks, and for nothing else"));
    }
    let there = existing.map(|process| process.callbacks.as_slice()).unwrap_or_default();
    let mut new_secrets = Vec::new();
    let callbacks = if keep_callbacks {
        there.to_vec()
    } else {
        let mut callbacks = Vec::with_capacity(spec.callbacks.len());
        for callback in &spec.callbacks {
            let known = match callback.callback_id {
                Some(id) => Some(there.iter().find(|known| known.callback_id == id).ok_or_else(no_callback)?),
                None => there.iter().find(|known| known.name == callback.name),
            };
            callbacks.push(self::callback(callback, known, new_id, new_secret, &mut new_secrets)?);
        }
        callbacks
    };
    let mut ids: Vec<_> = callbacks.iter().map(|callback| callback.callback_id).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|two| two[0] == two[1]) {
        return Err(invalid("callbacks: two of them are the same one, by its id and by its name"));
    }
    let process = Process {
        project_id: spec.project_id,
        process_id: match existing {
            Some(process) => process.process_id,
            None if spec.is_fallback() => None,
            None => Some(new_id()),
        },
        revision: existing.map_or(0, |process| process.revision),
        name: spec.name.clone(),
        rules: spec.rules(),
        callbacks,
    };
    Ok(Made { process, new_secrets })
}

/// What a spec makes of a callback that is known, or of none.
fn callback(
    spec: &CallbackSpec,
    known: Option<&Callback>,
    new_id: &mut impl FnMut() -> ObjectId,
    new_secret: &mut impl FnMut() -> Secret,
    new_secrets: &mut Vec<ObjectId>,
) -> Result<Callback, RpcError> {
    let callback_id = known.map_or_else(new_id, |known| known.callback_id);
    let kept = |known: &Callback| (known.secrets.clone(), known.retiring_secrets.clone());
    let (secrets, retiring_secrets) = match (&spec.secrets, known) {
        (None, Some(known)) if known.secrets.iter().any(Secret::is_sealed) => return Err(locked(known)),
        (None, Some(known)) => kept(known),
        (Some(secrets), Some(known)) if *secrets == known.secrets => kept(known),
        (Some(secrets), _) => (secrets.clone(), Vec::new()),
        (None, None) => {
            new_secrets.push(callback_id);
            (vec![new_secret()], Vec::new())
        }
    };
    Ok(Callback {
        callback_id,
        name: spec.name.clone(),
        // One that was shown without its password, and is sent back as it was shown, stays.
        url: match known {
            Some(known) if shown_url(&known.url) == spec.url => known.url.clone(),
            _ => spec.url.clone(),
        },
        auth: auth(spec, known)?,
        secrets,
        retiring_secrets,
        events: spec.events.clone(),
        enabled: spec.enabled,
        timeout_seconds: spec.timeout_seconds,
        max_in_flight: spec.max_in_flight,
        max_per_second: spec.max_per_second,
        ordering: spec.ordering,
    })
}

/// How a callback authenticates. A secret that is left out stays as it is where it is sent to the same place in the same
/// way: else whoever may change the URL could have it sent to himself.
fn auth(spec: &CallbackSpec, known: Option<&Callback>) -> Result<Option<CallbackAuth>, RpcError> {
    let Some(auth) = spec.auth.as_ref().filter(|auth| auth.secret().is_empty()) else { return Ok(spec.auth.clone()) };
    let known = known.filter(|known| is_same_place(&known.url, &spec.url));
    match known.and_then(|known| known.auth.as_ref()).filter(|known| known.is_like(auth)) {
        Some(kept) if kept.secret().is_sealed() => {
            let message = format!("the secret in auth of callback {:?} cannot be opened: give it again", spec.name);
            Err(RpcError::new(409, "secrets_locked", message))
        }
        Some(kept) => Ok(Some(kept.clone())),
        None => Err(invalid(&format!(
            "callback {:?}: auth: its secret is missing; it can be left out only where one is there already, and is sent to \
             the same scheme, host and port in the same way",
            spec.name
        ))),
    }
}

fn is_same_place(one: &str, other: &str) -> bool {
    matches!((Url::parse(one), Url::parse(other)), (Ok(one), Ok(other)) if one.origin() == other.origin())
}

fn locked(callback: &Callback) -> RpcError {
    let keys = callback.secrets.iter().filter_map(Secret::key_id).map(|key_id| key_id.to_string());
    let message = format!(
        "the signing secrets of callback {:?} cannot be opened (sealed with {}): start lead-state with that key among \
         SECRETS_KEYS_OLD, or give the callback new ones",
        callback.name,
        keys.collect::<Vec<_>>().join(", "),
    );
    RpcError::new(409, "secrets_locked", message)
}

/// What is different now, a line each. Secrets are compared, not shown.
pub(crate) fn changes(before: &Process, now: &Process) -> Vec<String> {
    let mut changes = Vec::new();
    changes.extend(differs("name", &Value::from(before.name.as_str()), &Value::from(now.name.as_str())));
    for state in now.rules.states.iter().filter(|state| before.rules.state(&state.name).is_none()) {
        changes.push(format!("state {} added", state.name));
    }
    for state in &before.rules.states {
        match now.rules.state(&state.name) {
            None => changes.push(format!("state {} removed", state.name)),
            Some(same) if same != state => changes.push(format!("state {} changed", state.name)),
            Some(_) => {}
        }
    }
    changes.extend(members_that_differ(&before.rules, &now.rules, &["states"]));
    for callback in &now.callbacks {
        let known = before.callbacks.iter().find(|known| known.callback_id == callback.callback_id);
        let Some(known) = known else {
            changes.push(format!("callback {} added", callback.name));
            continue;
        };
        // Secrets first: what is told of the rest has none in it.
        let secrets = [
            ("auth", known.auth == callback.auth),
            ("secrets", known.secrets == callback.secrets),
            ("retiringSecrets", known.retiring_secrets == callback.retiring_secrets),
        ];
        let secrets = secrets.into_iter().filter(|(_, same)| !same).map(|(what, _)| format!("{what} changed"));
        let [shown, shown_now] = [known, callback].map(|callback| {
            let mut shown = callback.clone();
            hide(&mut shown);
            Callback { auth: None, secrets: Vec::new(), retiring_secrets: Vec::new(), ..shown }
        });
        let differences = members_that_differ(&shown, &shown_now, &[]).into_iter().chain(secrets).collect::<Vec<_>>();
        if !differences.is_empty() {
            changes.push(format!("callback {}: {}", callback.name, differences.join("; ")));
        } else if known != callback {
            changes.push(format!("callback {}: url changed", callback.name));
        }
    }
    for gone in &before.callbacks {
        if !now.callbacks.iter().any(|callback| callback.callback_id == gone.callback_id) {
            changes.push(format!("callback {} removed", gone.name));
        }
    }
    if changes.is_empty() && before != now {
        changes.push("order changed".into());
    }
    changes
}

/// Which members of two things of a kind are different: whatever members such a thing has.
fn members_that_differ(before: &impl serde::Serialize, now: &impl serde::Serialize, but: &[&str]) -> Vec<String> {
    let members = |thing: Result<Value, _>| match thing {
        Ok(Value::Object(members)) => members,
        _ => serde_json::Map::new(),
    };
    let (before, now) = (members(serde_json::to_value(before)), members(serde_json::to_value(now)));
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    let names = now.keys().chain(gone).filter(|name| !but.contains(&name.as_str()));
    let of = |members: &serde_json::Map<String, Value>, name: &str| members.get(name).cloned().unwrap_or_default();
    names.filter_map(|name| differs(name, &of(&before, name), &of(&now, name))).collect()
}

/// What is different, with both values where they are short.
fn differs(what: &str, before: &Value, now: &Value) -> Option<String> {
    let short = |value: &Value| match value {
        Value::Null => Some("none".to_owned()),
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(_) | Value::Object(_) => None,
    };
    (before != now).then(|| match (short(before), short(now)) {
        (Some(before), Some(now)) => format!("{what} {before} → {now}"),
        _ => format!("{what} changed"),
    })
}

/// Leaves only the secrets that nobody has seen yet.
pub(crate) fn hide_secrets(process: &mut Process, shown: &[ObjectId]) {
    for callback in &mut process.callbacks {
        let secrets = callback.secrets.clone();
        hide(callback);
        if shown.contains(&callback.callback_id) {
            callback.secrets = secrets;
        }
    }
}

/// Leaves no secrets. A URL may hold one, too: its password.
fn hide(callback: &mut Callback) {
    callback.secrets.clear();
    callback.retiring_secrets.iter_mut().for_each(|retiring| retiring.secret = Secret::default());
    if let Some(auth) = &mut callback.auth {
        *auth.secret_mut() = Secret::default();
    }
    callback.url = shown_url(&callback.url);
}

/// A URL without the password that it may hold.
fn shown_url(url: &str) -> String {
    if let Ok(mut parsed) = Url::parse(url)
        && parsed.password().is_some()
        && parsed.set_password(Some("***")).is_ok()
    {
        return parsed.into();
    }
    url.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([0xaa; 12]);

    fn id(byte: u8) -> ObjectId {
        ObjectId::from_bytes([byte; 12])
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1000)
    }

    fn process_spec(text: &str) -> ProcessSpec {
        serde_json::from_str(text).unwrap()
    }

    fn callback_spec(text: &str) -> CallbackSpec {
        serde_json::from_str(text).unwrap()
    }

    /// What a change makes at this second; new ids count from 1, new secrets are `made`.
    fn make(existing: Option<&Process>, change: &ProcessChange, second: i64) -> Result<Made, RpcError> {
        let mut next = existing.map_or(0, |process| process.callbacks.len() as u8 + 1);
        let new_id = || {
            next += 1;
            id(next)
        };
        let known = existing.map_or(Known::Nothing(&ProcessSelector::New), Known::Process);
        super::change(known, PROJECT, change, at(second), new_id, || format!("made at {second}").as_str().into())
    }

    fn put(text: &str) -> ProcessChange {
        ProcessChange::Put { spec: process_spec(text), keep_callbacks: false }
    }

    /// A process with the callbacks `a` (5) and `b` (6).
    fn process() -> Process {
        serde_json::from_str(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":1,"name":"p",
                "states":[{"name":"new"},{"name":"old"}],
                "callbacks":[{"callbackId":"050505050505050505050505","name":"a","url":"https://a.example/x",
                              "auth":{"type":"bearer","token":"t"},"secrets":["s"]},
                             {"callbackId":"060606060606060606060606","name":"b","url":"http://u:pass-word@b.example","secrets":["s"]}]}"#,
        )
        .unwrap()
    }

    fn refused(made: Result<Made, RpcError>) -> (u16, String) {
        let e = made.unwrap_err();
        (e.status, e.code)
    }

    #[test]
    fn applying_again_keeps_ids_and_secrets() {
        let first = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","states":[{"name":"new"}],
                "callbacks":[{"name":"a","url":"http://a"},{"name":"b","url":"http://b"}]}"#);
        let Made { process, new_secrets } = make(None, &first, 1).unwrap();
        assert_eq!(new_secrets.len(), 2);
        assert!(process.process_id.is_some());
        let again = make(Some(&process), &first, 2).unwrap();
        assert_eq!((again.process, again.new_secrets), (process.clone(), vec![]));

        let second = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","states":[{"name":"new"}],
                "callbacks":[{"name":"b","url":"http://b2"},{"name":"c","url":"http://c"}]}"#);
        let Made { process: mut changed, new_secrets } = make(Some(&process), &second, 3).unwrap();
        assert_eq!(changed.callbacks[0].callback_id, process.callbacks[1].callback_id);
        assert_eq!(changed.callbacks[0].secrets, [Secret::from("made at 1")]);
        assert_eq!(new_secrets, [changed.callbacks[1].callback_id]);
        hide_secrets(&mut changed, &new_secrets);
        assert!(changed.callbacks[0].secrets.is_empty());
        assert_eq!(changed.callbacks[1].secrets, [Secret::from("made at 3")]);
    }

    #[test]
    fn a_callback_is_found_by_its_id_before_its_name() {
        let spec = |callbacks: &str| {
            put(&format!(
                r#"{{"projectId":"{PROJECT}","name":"p","states":[{{"name":"new"}},{{"name":"old"}}],"callbacks":[{callbacks}]}}"#
            ))
        };
        let renamed = spec(r#"{"callbackId":"050505050505050505050505","name":"z","url":"https://a.example/y"}"#);
        let made = make(Some(&process()), &renamed, 1).unwrap();
        assert_eq!(
            (made.process.callbacks[0].callback_id, &made.process.callbacks[0].secrets),
            (id(5), &vec!["s".into()])
        );
        let nowhere = spec(r#"{"callbackId":"777777777777777777777777","name":"z","url":"https://a.example"}"#);
        assert_eq!(refused(make(Some(&process()), &nowhere, 1)), (404, "callback_not_found".into()));
        let same = spec(
            r#"{"callbackId":"060606060606060606060606","name":"z","url":"https://a.example"},{"name":"b","url":"https://b.example"}"#,
        );
        assert_eq!(refused(make(Some(&process()), &same, 1)), (400, "invalid_process".into()));
        let keep = ProcessChange::Put {
            spec: process_spec(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"q","states":[{"name":"new"}]}"#),
            keep_callbacks: true,
        };
        let made = make(Some(&process()), &keep, 1).unwrap().process;
        assert_eq!((made.callbacks, made.name.as_str()), (process().callbacks, "q"));
        let fallback = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"_"}"#);
        assert_eq!(refused(make(Some(&process()), &fallback, 1)), (400, "invalid_process".into()));
    }

    #[test]
    fn callbacks_come_change_and_go() {
        let before = process();
        let add = |text| ProcessChange::AddCallback { callback: callback_spec(text) };
        let made = make(Some(&before), &add(r#"{"name":"c","url":"https://c.example"}"#), 1).unwrap();
        assert_eq!(
            (made.process.callbacks.len(), &made.new_secrets),
            (3, &vec![made.process.callbacks[2].callback_id])
        );
        let taken = add(r#"{"name":"a","url":"https://c.example"}"#);
        assert_eq!(refused(make(Some(&before), &taken, 1)), (409, "callback_exists".into()));
        assert_eq!(refused(make(None, &taken, 1)), (404, "process_not_found".into()));
        let put = |text| ProcessChange::PutCallback { callback_id: id(5), callback: callback_spec(text) };
        let made = make(Some(&before), &put(r#"{"name":"a","url":"https://a.example","enabled":false}"#), 1).unwrap();
        assert_eq!(
            (made.process.callbacks[0].auth.as_ref(), &made.process.callbacks[0].secrets[0]),
            (None, &"s".into())
        );
        assert_eq!(made.process.callbacks[1], before.callbacks[1]);
        let shown = callback_spec(r#"{"name":"b","url":"http://u:***@b.example/"}"#);
        let shown = ProcessChange::PutCallback { callback_id: id(6), callback: shown };
        assert_eq!(make(Some(&before), &shown, 1).unwrap().process, before);
        let taken = put(r#"{"name":"b","url":"https://a.example"}"#);
        assert_eq!(refused(make(Some(&before), &taken, 1)), (409, "callback_exists".into()));
        let gone = make(Some(&before), &ProcessChange::RemoveCallback { callback_id: id(6) }, 1).unwrap().process;
        assert_eq!(gone.callbacks, before.callbacks[..1]);
        let nowhere = ProcessChange::RemoveCallback { callback_id: id(9) };
        assert_eq!(refused(make(Some(&before), &nowhere, 1)), (404, "callback_not_found".into()));
        // The fallback callbacks are there before there are any.
        let which = ProcessSelector::Named("_".into());
        let change = add(r#"{"name":"f","url":"https://f.example"}"#);
        let made = super::change(Known::Nothing(&which), PROJECT, &change, at(1), || id(1), || "s".into()).unwrap();
        assert_eq!((made.process.process_id, made.process.rules.call_timeout_seconds), (None, 7200));
    }

    #[test]
    fn what_authenticates_stays_only_where_it_is_sent_to_the_same_place() {
        let put = |url: &str, auth: &str| {
            let text = format!(r#"{{"name":"a","url":"{url}","auth":{auth}}}"#);
            let change = ProcessChange::PutCallback { callback_id: id(5), callback: callback_spec(&text) };
            make(Some(&process()), &change, 1)
                .map(|made| made.process.callbacks[0].auth.clone().unwrap().secret().clone())
        };
        let bearer = r#"{"type":"bearer"}"#;
        assert_eq!(put("https://a.example/elsewhere", bearer).unwrap().expose(), "t");
        assert_eq!(put("https://c.example", r#"{"type":"bearer","token":"n"}"#).unwrap().expose(), "n");
        for (url, auth) in [
            ("https://c.example/x", bearer),
            ("http://a.example/x", bearer),
            ("https://a.example:8443/x", bearer),
            ("https://a.example/x", r#"{"type":"header","name":"X-Key"}"#),
        ] {
            let e = put(url, auth).unwrap_err();
            assert!(e.status == 400 && e.message.contains("its secret is missing"), "{url} {auth}: {e}");
        }
    }

    #[test]
    fn a_secret_that_is_replaced_signs_until_the_overlap_is_over() {
        let rotate = |process: &Process, overlap_seconds, second| {
            make(Some(process), &ProcessChange::RotateSecret { callback_id: id(5), overlap_seconds }, second)
        };
        let signing = |process: &Process, second| {
            process.callbacks[0]
                .signing_secrets(at(second))
                .map(|secret| secret.expose().to_owned())
                .collect::<Vec<_>>()
        };
        let Made { process: first, new_secrets } = rotate(&process(), 100, 1000).unwrap();
        assert_eq!(new_secrets, [id(5)]);
        assert_eq!(signing(&first, 1099), ["made at 1000", "s"]);
        assert_eq!(signing(&first, 1100), ["made at 1000"]);
        // A shorter overlap holds for all that came before, a longer one brings nothing back.
        let second = rotate(&first, 50, 1010).unwrap().process;
        assert_eq!(signing(&second, 1059), ["made at 1010", "made at 1000", "s"]);
        assert_eq!(signing(&second, 1060), ["made at 1010"]);
        let third = rotate(&second, 500, 1070).unwrap().process;
        assert_eq!(signing(&third, 1070), ["made at 1070", "made at 1010"]);
        let at_once = rotate(&third, 0, 1080).unwrap().process;
        assert_eq!(signing(&at_once, 1080), ["made at 1080"]);
        let mut process = process();
        for second in 0..4 {
            process = rotate(&process, 100, second).unwrap().process;
        }
        assert_eq!(refused(rotate(&process, 100, 5)), (409, "too_many_secrets".into()));
        assert_eq!(signing(&rotate(&process, 0, 5).unwrap().process, 5), ["made at 5"]);
        let mut later = rotate(&process, 100, 99).err().map(|_| process.clone()).unwrap_or(process.clone());
        forget_retired(&mut later, at(101));
        assert_eq!(later.callbacks[0].retiring_secrets.len(), 2);
        assert!(
            make(Some(&process), &ProcessChange::RotateSecret { callback_id: id(9), overlap_seconds: 0 }, 1).is_err()
        );
    }

    #[test]
    fn secrets_that_cannot_be_opened_are_not_kept_but_can_be_replaced() {
        let mut process = process();
        process.callbacks[0].secrets = vec!["sealed:v1:d3efba69:AAAA".into()];
        let put = |text| ProcessChange::PutCallback { callback_id: id(5), callback: callback_spec(text) };
        let refused = make(Some(&process), &put(r#"{"name":"a","url":"http://a"}"#), 1).unwrap_err();
        assert_eq!((refused.status, refused.code.as_str()), (409, "secrets_locked"));
        assert!(refused.message.contains("d3efba69") && !refused.message.contains("AAAA"), "{refused}");
        let rotate = ProcessChange::RotateSecret { callback_id: id(5), overlap_seconds: 5 };
        assert_eq!(make(Some(&process), &rotate, 1).unwrap_err().code, "secrets_locked");
        let made = make(Some(&process), &put(r#"{"name":"a","url":"http://a","secrets":["s3"]}"#), 1).unwrap();
        assert_eq!(made.process.callbacks[0].secrets, [Secret::from("s3")]);
        // Others change all the same.
        let made = make(Some(&process), &ProcessChange::RemoveCallback { callback_id: id(6) }, 1).unwrap().process;
        assert_eq!(made.callbacks, process.callbacks[..1]);
    }

    #[test]
    fn changes_are_named_and_secrets_are_not_shown() {
        let before = process();
        let now = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"q","callTimeoutSeconds":5,"transitions":{},
                "states":[{"name":"new","kind":"initial"},{"name":"lost"}],
                "callbacks":[{"name":"a","url":"http://u:hidden@a2","secrets":["hidden"],"maxPerSecond":9,
                              "auth":{"type":"bearer","token":"hidden"}},
                             {"name":"c","url":"http://c"}]}"#);
        let now = make(Some(&before), &now, 1).unwrap().process;
        assert_eq!(
            changes(&before, &now),
            [
                "name p → q",
                "state lost added",
                "state new changed",
                "state old removed",
                "callTimeoutSeconds 7200 → 5",
                "transitions changed",
                "callback a: maxPerSecond none → 9; url https://a.example/x → http://u:***@a2/; auth changed; secrets changed",
                "callback c added",
                "callback b removed",
            ]
        );
        assert_eq!(changes(&before, &before), Vec::<String>::new());
        let mut turned = before.clone();
        turned.callbacks.reverse();
        assert_eq!(changes(&before, &turned), ["order changed"]);
        turned.callbacks[0].url = "http://u:other@b.example".into();
        assert_eq!(changes(&before, &turned), ["callback b: url changed"]);
        hide_secrets(&mut turned, &[]);
        let shown = serde_json::to_string(&turned).unwrap();
        assert!(
            !shown.contains("other") && !shown.contains("token") && shown.contains("http://u:***@b.example/"),
            "{shown}"
        );
    }

    #[test]
    fn who_saw_another_version_changes_nothing() {
        let process = process();
        assert!(check_revision(Some(&process), None).is_ok());
        assert!(check_revision(Some(&process), Some(1)).is_ok());
        assert!(check_revision(None, Some(0)).is_ok());
        for (existing, expected) in [(Some(&process), 0), (Some(&process), 2), (None, 1)] {
            assert_eq!(check_revision(existing, Some(expected)).unwrap_err().status, 412);
        }
    }
}
