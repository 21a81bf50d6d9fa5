//! Configuration: applies a change to a process. Pure; `api::processes` reads, stores and projects.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use contract::{
    ObjectId, Timestamp,
    process::{
        Callback, CallbackSpec, MAX_CALLBACKS, MAX_OVERLAP_SECONDS, MAX_PROCESS_BYTES, MAX_RETIRING_SECRETS, Process,
        ProcessSpec, RetiringSecret, Rules,
    },
    rpc::{ChangeProcess, ErrorCode, ProcessChange, ProcessSelector, RpcError},
    secret::Secret,
    subject::NO_PROCESS,
    text::join_faults,
};

use super::{
    callback_auth::{auth_from_spec, certificate_from_spec, certificate_warnings, headers_from_spec},
    process_diff::describe_changes,
    source_change::{add_source, put_source, put_sources, remove_source},
};

/// A change that is ready to be stored, under two conditions that only the database can check.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PlannedChange {
    /// The process after the change. Its secrets are in clear, except those that could not be opened.
    pub(crate) process: Process,
    pub(crate) changed: bool,
    pub(crate) created: bool,
    /// The differences, one line each; none for a new process.
    pub(crate) changes: Vec<String>,
    pub(crate) warnings: Vec<String>,
    /// The callbacks for which a secret was generated.
    pub(crate) new_secrets: Vec<ObjectId>,
    /// The process has a new name. Condition: no other process has it.
    pub(crate) renamed: bool,
    /// Condition: no lead is in one of these states.
    pub(crate) removed_states: Vec<String>,
}

/// Generators of new ids and secrets.
pub(crate) struct Generators<I, S> {
    pub(crate) new_id: I,
    pub(crate) new_secret: S,
}

pub(crate) fn process_not_found() -> RpcError {
    RpcError::new(ErrorCode::ProcessNotFound, "Process not found")
}

fn callback_not_found() -> RpcError {
    RpcError::new(ErrorCode::CallbackNotFound, "Callback not found")
}

fn invalid(message: &str) -> RpcError {
    RpcError::new(ErrorCode::InvalidProcess, message)
}

/// The fallback process of a project that has none.
pub(crate) fn empty_fallback(project_id: ObjectId) -> Process {
    let (name, rules) = (NO_PROCESS.to_owned(), Rules::default());
    Process { project_id, process_id: None, revision: 0, name, rules, callbacks: Vec::new(), sources: Vec::new() }
}

/// Rejects a change that is invalid for every process.
pub(crate) fn validate(query: &ChangeProcess) -> Result<(), RpcError> {
    let faults = match &query.change {
        ProcessChange::Put { spec, .. } if spec.project_id != query.project_id => {
            vec!["projectId: does not match the project of the request".to_owned()]
        }
        ProcessChange::Put { spec, .. } => spec.faults(),
        ProcessChange::AddCallback { callback } | ProcessChange::PutCallback { callback, .. } => callback.faults(),
        ProcessChange::RotateSecret { overlap_seconds, .. } if *overlap_seconds > MAX_OVERLAP_SECONDS => {
            let message = format!("overlapSeconds must be a number from 0 to {MAX_OVERLAP_SECONDS}");
            return Err(RpcError::new(ErrorCode::InvalidField, message));
        }
        ProcessChange::AddSource { source } | ProcessChange::PutSource { source, .. } => source.faults(),
        ProcessChange::RemoveCallback { .. }
        | ProcessChange::RotateSecret { .. }
        | ProcessChange::RemoveSource { .. } => Vec::new(),
    };
    if faults.is_empty() { Ok(()) } else { Err(invalid(&join_faults(&faults))) }
}

/// Rejects a change that was made to another revision than the stored one.
pub(crate) fn check_revision(existing: Option<&Process>, expected: Option<i64>) -> Result<(), RpcError> {
    let revision = existing.map_or(0, |process| process.revision);
    match expected {
        Some(expected) if expected != revision => {
            let message = format!(
                "The process is at version {revision}, not {expected}: get the current version and repeat the change on it"
            );
            Err(RpcError::new(ErrorCode::VersionMismatch, message))
        }
        _ => Ok(()),
    }
}

/// Plans a change of the stored process `existing`, if there is one. Its secrets are in clear, except those that could
/// not be opened. A change that writes a callback and would keep such a secret is rejected.
pub(crate) fn plan_change(
    query: &ChangeProcess,
    existing: Option<&Process>,
    now: Timestamp,
    mut generators: Generators<impl FnMut() -> ObjectId, impl FnMut() -> Secret>,
) -> Result<PlannedChange, RpcError> {
    let mut new_secrets = Vec::new();
    let mut process = match &query.change {
        ProcessChange::Put { spec, keep_callbacks } => {
            put_process(spec, *keep_callbacks, existing, &mut generators, &mut new_secrets)?
        }
        change => {
            let process = match (existing, &query.process) {
                (Some(process), _) => process.clone(),
                (None, ProcessSelector::Named(name)) if name == NO_PROCESS => empty_fallback(query.project_id),
                (None, _) => return Err(process_not_found()),
            };
            change_member(process, change, now, &mut generators, &mut new_secrets)?
        }
    };
    let changed = existing != Some(&process);
    let changes = existing.map(|existing| describe_changes(existing, &process)).unwrap_or_default();
    let removed = |existing: &Process| {
        let kept: HashSet<_> = process.rules.states.iter().map(|state| &state.name).collect();
        let states = existing.rules.states.iter().map(|state| &state.name);
        states.filter(|name| !kept.contains(name)).cloned().collect()
    };
    let removed_states = existing.map(removed).unwrap_or_default();
    if changed {
        drop_expired_secrets(&mut process, now);
    }
    Ok(PlannedChange {
        changed,
        created: existing.is_none(),
        changes,
        warnings: certificate_warnings(&process, now),
        new_secrets,
        renamed: existing.is_none_or(|existing| existing.name != process.name),
        removed_states,
        process,
    })
}

/// Changes one callback or source of a process.
fn change_member(
    mut process: Process,
    change: &ProcessChange,
    now: Timestamp,
    generators: &mut Generators<impl FnMut() -> ObjectId, impl FnMut() -> Secret>,
    new_secrets: &mut Vec<ObjectId>,
) -> Result<Process, RpcError> {
    let index_of = |process: &Process, callback_id: ObjectId| {
        let index = process.callbacks.iter().position(|callback| callback.callback_id == callback_id);
        index.ok_or_else(callback_not_found)
    };
    match change {
        ProcessChange::Put { .. } => {}
        ProcessChange::AddCallback { callback } => {
            if callback.callback_id.is_some() {
                return Err(invalid("callbackId: must be absent; a new callback is given its id"));
            }
            if process.callbacks.len() >= MAX_CALLBACKS {
                let message =
                    format!("callbacks: the process has {MAX_CALLBACKS}, and no more are allowed: remove one");
                return Err(invalid(&message));
            }
            check_name_is_free(&process, &callback.name, None)?;
            let added = callback_from_spec(callback, None, generators, new_secrets)?;
            process.callbacks.push(added);
        }
        ProcessChange::PutCallback { callback_id, callback } => {
            let index = index_of(&process, *callback_id)?;
            if callback.callback_id.is_some_and(|given| given != *callback_id) {
                return Err(invalid("callbackId: differs from the callback that is replaced"));
            }
            check_name_is_free(&process, &callback.name, Some(*callback_id))?;
            let before = &process.callbacks[index];
            process.callbacks[index] = callback_from_spec(callback, Some(before), generators, new_secrets)?;
        }
        ProcessChange::RemoveCallback { callback_id } => {
            let index = index_of(&process, *callback_id)?;
            process.callbacks.remove(index);
        }
        ProcessChange::RotateSecret { callback_id, overlap_seconds } => {
            let index = index_of(&process, *callback_id)?;
            rotate_secret(&mut process.callbacks[index], *overlap_seconds, now, (generators.new_secret)())?;
            new_secrets.push(*callback_id);
        }
        ProcessChange::AddSource { source } => add_source(&mut process, source, &mut generators.new_id)?,
        ProcessChange::PutSource { source_id, source } => put_source(&mut process, *source_id, source)?,
        ProcessChange::RemoveSource { source_id } => remove_source(&mut process, *source_id)?,
    }
    Ok(process)
}

/// Rejects a process whose stored form is too large.
pub(crate) fn check_size(stored_bytes: usize) -> Result<(), RpcError> {
    if stored_bytes <= MAX_PROCESS_BYTES {
        return Ok(());
    }
    Err(invalid(&format!(
        "the process has {stored_bytes} bytes as JSON, and at most {MAX_PROCESS_BYTES} are allowed: shorten names, URLs, \
         auth, headers and secrets, or remove transitions, callbacks or sources"
    )))
}

fn check_name_is_free(process: &Process, name: &str, except: Option<ObjectId>) -> Result<(), RpcError> {
    if process.callbacks.iter().any(|callback| callback.name == name && Some(callback.callback_id) != except) {
        return Err(RpcError::new(ErrorCode::CallbackExists, format!("the process has a callback {name:?} already")));
    }
    Ok(())
}

/// Gives a callback a new signing secret. Its earlier secrets sign until the overlap ends, at the latest.
fn rotate_secret(callback: &mut Callback, overlap_seconds: u32, now: Timestamp, new: Secret) -> Result<(), RpcError> {
    if callback.secrets.iter().any(Secret::is_sealed) {
        return Err(locked_secrets(callback));
    }
    let until = now.plus(Duration::from_secs(overlap_seconds.into()));
    let present = std::mem::replace(&mut callback.secrets, vec![new]);
    let present = present.into_iter().map(|secret| RetiringSecret { secret, until });
    let before = std::mem::take(&mut callback.retiring_secrets).into_iter();
    let before = before.map(|retiring| RetiringSecret { until: retiring.until.min(until), ..retiring });
    let retiring: Vec<_> = present.chain(before).filter(|retiring| now < retiring.until).collect();
    if retiring.len() > MAX_RETIRING_SECRETS {
        let message = format!(
            "{MAX_RETIRING_SECRETS} earlier secrets of the callback are still valid: wait until one expires, or end \
             all of them with overlapSeconds 0"
        );
        return Err(RpcError::new(ErrorCode::TooManySecrets, message));
    }
    callback.retiring_secrets = retiring;
    Ok(())
}

fn drop_expired_secrets(process: &mut Process, now: Timestamp) {
    for callback in &mut process.callbacks {
        callback.retiring_secrets.retain(|retiring| now < retiring.until);
    }
}

/// Replaces a process by a spec. A callback, found by its id or else by its name, keeps its id and its secrets.
fn put_process(
    spec: &ProcessSpec,
    keep_callbacks: bool,
    existing: Option<&Process>,
    generators: &mut Generators<impl FnMut() -> ObjectId, impl FnMut() -> Secret>,
    new_secrets: &mut Vec<ObjectId>,
) -> Result<Process, RpcError> {
    if existing.is_some_and(|process| process.process_id.is_none() != spec.is_fallback()) {
        return Err(invalid("name: \"_\" is reserved for the project's fallback callbacks"));
    }
    let stored = existing.map(|process| process.callbacks.as_slice()).unwrap_or_default();
    let callbacks = if keep_callbacks {
        stored.to_vec()
    } else {
        let by_id: HashMap<_, _> = stored.iter().map(|before| (before.callback_id, before)).collect();
        let by_name: HashMap<_, _> = stored.iter().map(|before| (before.name.as_str(), before)).collect();
        let mut callbacks = Vec::with_capacity(spec.callbacks.len());
        for callback in &spec.callbacks {
            let before = match callback.callback_id {
                Some(id) => Some(*by_id.get(&id).ok_or_else(callback_not_found)?),
                None => by_name.get(callback.name.as_str()).copied(),
            };
            callbacks.push(callback_from_spec(callback, before, generators, new_secrets)?);
        }
        callbacks
    };
    let mut ids: Vec<_> = callbacks.iter().map(|callback| callback.callback_id).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(invalid("callbacks: two entries refer to the same callback, one by id and one by name"));
    }
    let stored = existing.map(|process| process.sources.as_slice()).unwrap_or_default();
    let sources = match &spec.sources {
        Some(specs) => put_sources(specs, stored, &mut generators.new_id)?,
        None => stored.to_vec(),
    };
    Ok(Process {
        project_id: spec.project_id,
        process_id: match existing {
            Some(process) => process.process_id,
            None if spec.is_fallback() => None,
            None => Some((generators.new_id)()),
        },
        revision: existing.map_or(0, |process| process.revision),
        name: spec.name.clone(),
        rules: spec.rules(),
        callbacks,
        sources,
    })
}

/// Builds a callback from a spec and the stored callback that it replaces.
fn callback_from_spec(
    spec: &CallbackSpec,
    before: Option<&Callback>,
    generators: &mut Generators<impl FnMut() -> ObjectId, impl FnMut() -> Secret>,
    new_secrets: &mut Vec<ObjectId>,
) -> Result<Callback, RpcError> {
    let callback_id = before.map_or_else(&mut generators.new_id, |before| before.callback_id);
    let kept = |before: &Callback| (before.secrets.clone(), before.retiring_secrets.clone());
    let (secrets, retiring_secrets) = match (&spec.secrets, before) {
        (None, Some(before)) if before.secrets.iter().any(Secret::is_sealed) => return Err(locked_secrets(before)),
        (None, Some(before)) => kept(before),
        (Some(secrets), Some(before)) if *secrets == before.secrets => kept(before),
        (Some(secrets), _) => (secrets.clone(), Vec::new()),
        (None, None) => {
            new_secrets.push(callback_id);
            (vec![(generators.new_secret)()], Vec::new())
        }
    };
    Ok(Callback {
        callback_id,
        name: spec.name.clone(),
        url: spec.url.clone(),
        auth: auth_from_spec(spec, before)?,
        headers: headers_from_spec(spec, before)?,
        client_certificate: certificate_from_spec(spec, before)?,
        secrets,
        retiring_secrets,
        events: spec.events.clone(),
        filter: spec.filter.clone(),
        enabled: spec.enabled,
        timeout_seconds: spec.timeout_seconds,
        max_in_flight: spec.max_in_flight,
        max_per_second: spec.max_per_second,
        ordering: spec.ordering,
    })
}

fn locked_secrets(callback: &Callback) -> RpcError {
    let keys = callback.secrets.iter().filter_map(Secret::key_id).map(|key_id| key_id.to_string());
    let message = format!(
        "the signing secrets of callback {:?} cannot be opened (sealed with {}): start lead-state with that key in \
         SECRETS_KEYS_OLD, or send new secrets for the callback",
        callback.name,
        keys.collect::<Vec<_>>().join(", "),
    );
    RpcError::new(ErrorCode::SecretsLocked, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::process_diff::hide_secrets;

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

    /// Plans a change at this second. New ids are counted up, and new secrets are named after the second.
    fn plan(existing: Option<&Process>, change: &ProcessChange, second: i64) -> Result<PlannedChange, RpcError> {
        let selector = existing.map_or(ProcessSelector::New, |process| ProcessSelector::Named(process.name.clone()));
        plan_for(selector, existing, change, second)
    }

    fn plan_for(
        process: ProcessSelector,
        existing: Option<&Process>,
        change: &ProcessChange,
        second: i64,
    ) -> Result<PlannedChange, RpcError> {
        let mut next = existing.map_or(0, |process| process.callbacks.len() as u8 + 1);
        let new_id = || {
            next += 1;
            id(next)
        };
        let new_secret = || format!("made at {second}").as_str().into();
        let change = change.clone();
        let query = ChangeProcess { project_id: PROJECT, process, change, expected_revision: None, dry_run: false };
        plan_change(&query, existing, at(second), Generators { new_id, new_secret })
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
                             {"callbackId":"060606060606060606060606","name":"b","url":"http://b.example","secrets":["s"]}]}"#,
        )
        .unwrap()
    }

    fn refused(made: Result<PlannedChange, RpcError>) -> (u16, String) {
        let e = made.unwrap_err();
        (e.status, e.code)
    }

    #[test]
    fn putting_a_spec_again_keeps_ids_and_secrets() {
        let first = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","states":[{"name":"new"}],
                "callbacks":[{"name":"a","url":"http://a"},{"name":"b","url":"http://b"}]}"#);
        let PlannedChange { process, new_secrets, .. } = plan(None, &first, 1).unwrap();
        assert_eq!(new_secrets.len(), 2);
        assert!(process.process_id.is_some());
        let again = plan(Some(&process), &first, 2).unwrap();
        assert_eq!((again.process, again.new_secrets), (process.clone(), vec![]));

        let second = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","states":[{"name":"new"}],
                "callbacks":[{"name":"b","url":"http://b2"},{"name":"c","url":"http://c"}]}"#);
        let PlannedChange { process: mut changed, new_secrets, .. } = plan(Some(&process), &second, 3).unwrap();
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
        let made = plan(Some(&process()), &renamed, 1).unwrap();
        assert_eq!(
            (made.process.callbacks[0].callback_id, &made.process.callbacks[0].secrets),
            (id(5), &vec!["s".into()])
        );
        let nowhere = spec(r#"{"callbackId":"777777777777777777777777","name":"z","url":"https://a.example"}"#);
        assert_eq!(refused(plan(Some(&process()), &nowhere, 1)), (404, "callback_not_found".into()));
        let same = spec(
            r#"{"callbackId":"060606060606060606060606","name":"z","url":"https://a.example"},{"name":"b","url":"https://b.example"}"#,
        );
        assert_eq!(refused(plan(Some(&process()), &same, 1)), (400, "invalid_process".into()));
        let keep = ProcessChange::Put {
            spec: process_spec(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"q","states":[{"name":"new"}]}"#),
            keep_callbacks: true,
        };
        let made = plan(Some(&process()), &keep, 1).unwrap().process;
        assert_eq!((made.callbacks, made.name.as_str()), (process().callbacks, "q"));
        let fallback = put(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"_"}"#);
        assert_eq!(refused(plan(Some(&process()), &fallback, 1)), (400, "invalid_process".into()));
    }

    #[test]
    fn callbacks_are_added_replaced_and_removed() {
        let before = process();
        let add = |text| ProcessChange::AddCallback { callback: callback_spec(text) };
        let made = plan(Some(&before), &add(r#"{"name":"c","url":"https://c.example"}"#), 1).unwrap();
        assert_eq!(
            (made.process.callbacks.len(), &made.new_secrets),
            (3, &vec![made.process.callbacks[2].callback_id])
        );
        let taken = add(r#"{"name":"a","url":"https://c.example"}"#);
        assert_eq!(refused(plan(Some(&before), &taken, 1)), (409, "callback_exists".into()));
        assert_eq!(refused(plan(None, &taken, 1)), (404, "process_not_found".into()));
        let put = |text| ProcessChange::PutCallback { callback_id: id(5), callback: callback_spec(text) };
        let made = plan(Some(&before), &put(r#"{"name":"a","url":"https://a.example","enabled":false}"#), 1).unwrap();
        assert_eq!(
            (made.process.callbacks[0].auth.as_ref(), &made.process.callbacks[0].secrets[0]),
            (None, &"s".into())
        );
        assert_eq!(made.process.callbacks[1], before.callbacks[1]);
        let taken = put(r#"{"name":"b","url":"https://a.example"}"#);
        assert_eq!(refused(plan(Some(&before), &taken, 1)), (409, "callback_exists".into()));
        let gone = plan(Some(&before), &ProcessChange::RemoveCallback { callback_id: id(6) }, 1).unwrap().process;
        assert_eq!(gone.callbacks, before.callbacks[..1]);
        let nowhere = ProcessChange::RemoveCallback { callback_id: id(9) };
        assert_eq!(refused(plan(Some(&before), &nowhere, 1)), (404, "callback_not_found".into()));
        // The fallback process exists before it is stored.
        let fallback = ProcessSelector::Named("_".into());
        let change = add(r#"{"name":"f","url":"https://f.example"}"#);
        let made = plan_for(fallback, None, &change, 1).unwrap();
        assert_eq!((made.process.process_id, made.process.rules.call_timeout_seconds), (None, 7200));
    }

    #[test]
    fn a_change_beyond_a_bound_is_rejected() {
        let mut full = process();
        full.callbacks = (0..MAX_CALLBACKS as u8)
            .map(|n| Callback { callback_id: id(n), name: n.to_string(), ..full.callbacks[0].clone() })
            .collect();
        let add = ProcessChange::AddCallback { callback: callback_spec(r#"{"name":"c","url":"https://c.example"}"#) };
        let error = plan(Some(&full), &add, 1).unwrap_err();
        assert_eq!((error.status, error.code.as_str()), (400, "invalid_process"));
        assert_eq!(error.message, "callbacks: the process has 100, and no more are allowed: remove one");
        full.callbacks.pop();
        assert!(plan(Some(&full), &add, 1).is_ok());

        assert_eq!(check_size(MAX_PROCESS_BYTES), Ok(()));
        let error = check_size(MAX_PROCESS_BYTES + 1).unwrap_err();
        assert!(error.message.starts_with("the process has 524289 bytes as JSON, and at most 524288"), "{error}");
    }

    #[test]
    fn an_absent_auth_secret_is_kept_only_for_the_same_origin() {
        let put = |url: &str, auth: &str| {
            let text = format!(r#"{{"name":"a","url":"{url}","auth":{auth}}}"#);
            let change = ProcessChange::PutCallback { callback_id: id(5), callback: callback_spec(&text) };
            plan(Some(&process()), &change, 1)
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
    fn a_rotated_secret_signs_until_the_overlap_ends() {
        let rotate = |process: &Process, overlap_seconds, second| {
            plan(Some(process), &ProcessChange::RotateSecret { callback_id: id(5), overlap_seconds }, second)
        };
        let signing = |process: &Process, second| {
            process.callbacks[0]
                .signing_secrets(at(second))
                .map(|secret| secret.expose().to_owned())
                .collect::<Vec<_>>()
        };
        let PlannedChange { process: first, new_secrets, .. } = rotate(&process(), 100, 1000).unwrap();
        assert_eq!(new_secrets, [id(5)]);
        assert_eq!(signing(&first, 1099), ["made at 1000", "s"]);
        assert_eq!(signing(&first, 1100), ["made at 1000"]);
        // A shorter overlap applies to all earlier secrets; a longer one does not extend them.
        let second = rotate(&first, 50, 1010).unwrap().process;
        assert_eq!(signing(&second, 1059), ["made at 1010", "made at 1000", "s"]);
        assert_eq!(signing(&second, 1060), ["made at 1010"]);
        let third = rotate(&second, 500, 1070).unwrap().process;
        assert_eq!(signing(&third, 1070), ["made at 1070", "made at 1010"]);
        let at_once = rotate(&third, 0, 1080).unwrap().process;
        assert_eq!(signing(&at_once, 1080), ["made at 1080"]);
        let mut process = process();
        for second in 0..5 {
            process = rotate(&process, 100, second).unwrap().process;
        }
        assert_eq!(refused(rotate(&process, 100, 5)), (409, "too_many_secrets".into()));
        assert_eq!(signing(&rotate(&process, 0, 5).unwrap().process, 5), ["made at 5"]);
        drop_expired_secrets(&mut process, at(101));
        assert_eq!(process.callbacks[0].retiring_secrets.len(), 3);
        process.callbacks[0] =
            Callback { secrets: vec!["s".into(); 5], retiring_secrets: vec![], ..process.callbacks[0].clone() };
        assert_eq!(
            signing(&rotate(&process, 100, 200).unwrap().process, 200).len(),
            6,
            "all active secrets may retire at once"
        );
        assert!(
            plan(Some(&process), &ProcessChange::RotateSecret { callback_id: id(9), overlap_seconds: 0 }, 1).is_err()
        );
    }

    #[test]
    fn secrets_that_cannot_be_opened_are_replaced_but_not_kept() {
        let mut process = process();
        process.callbacks[0].secrets = vec!["sealed:v1:d3efba69:AAAA".into()];
        let put = |text| ProcessChange::PutCallback { callback_id: id(5), callback: callback_spec(text) };
        let refused = plan(Some(&process), &put(r#"{"name":"a","url":"http://a"}"#), 1).unwrap_err();
        assert_eq!((refused.status, refused.code.as_str()), (409, "secrets_locked"));
        assert!(refused.message.contains("d3efba69") && !refused.message.contains("AAAA"), "{refused}");
        let rotate = ProcessChange::RotateSecret { callback_id: id(5), overlap_seconds: 5 };
        assert_eq!(plan(Some(&process), &rotate, 1).unwrap_err().code, "secrets_locked");
        let made = plan(Some(&process), &put(r#"{"name":"a","url":"http://a","secrets":["s3"]}"#), 1).unwrap();
        assert_eq!(made.process.callbacks[0].secrets, [Secret::from("s3")]);
        // Other callbacks can change.
        let made = plan(Some(&process), &ProcessChange::RemoveCallback { callback_id: id(6) }, 1).unwrap().process;
        assert_eq!(made.callbacks, process.callbacks[..1]);
    }

    #[test]
    fn a_change_of_another_revision_is_rejected() {
        let process = process();
        assert!(check_revision(Some(&process), None).is_ok());
        assert!(check_revision(Some(&process), Some(1)).is_ok());
        assert!(check_revision(None, Some(0)).is_ok());
        for (existing, expected) in [(Some(&process), 0), (Some(&process), 2), (None, 1)] {
            assert_eq!(check_revision(existing, Some(expected)).unwrap_err().status, 412);
        }
    }
}
