//! Administration: projects, processes, API keys. Every change is in Postgres, then in its bucket, before the answer.

use std::sync::Arc;

use contract::{
    ObjectId,
    key::ApiKey,
    process::{Callback, CallbackAuth, Process, ProcessSpec, new_signing_secret},
    rpc::{Applied, CreateKey, CreateProject, Keys, ListKeys, Project, RevokeKey, RpcError},
    sealed::Secret,
};
use service_kit::clock;
use sqlx::PgPool;

use crate::{
    projection::Projector,
    secrets::Sealer,
    store::{
        StoreError,
        config::{self, KeyInsert},
    },
};

/// Administers.
#[derive(Debug, Clone)]
pub(crate) struct Admin {
    pub(crate) pool: PgPool,
    pub(crate) projector: Arc<Projector>,
    pub(crate) sealer: Arc<Sealer>,
}

fn no_project() -> RpcError {
    RpcError::new(404, "project_not_found", "Project not found")
}

pub(crate) fn not_projected(what: &str, error: &anyhow::Error) -> RpcError {
    tracing::error!("cannot project: {error:#}");
    let message = format!(
        "{what} is stored, but not in effect yet: NATS is not available; it will be within seconds of its return"
    );
    RpcError::new(503, "not_projected", message)
}

fn check_name(name: &str) -> Result<(), RpcError> {
    if name.trim().is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
        return Err(RpcError::new(400, "invalid_name", "name must have 1 to 255 bytes and no control characters"));
    }
    Ok(())
}

impl Admin {
    pub(crate) async fn create_project(self, project: CreateProject) -> Result<Project, RpcError> {
        check_name(&project.name)?;
        config::insert_project(&self.pool, clock::new_id(), &project.name, clock::now()).await?.ok_or_else(|| {
            RpcError::new(409, "project_exists", format!("there is a project {:?} already", project.name))
        })
    }

    pub(crate) async fn apply_process(self, spec: ProcessSpec) -> Result<Applied, RpcError> {
        let faults = spec.faults();
        if !faults.is_empty() {
            return Err(RpcError::new(400, "invalid_process", faults.join("; ")));
        }
        let mut applied = self.store_process(&spec).await?;
        let process = &mut applied.process;
        if applied.changed {
            let projected = self.projector.process(process.project_id, &process.name).await;
            projected.map_err(|e| not_projected("the process", &e))?;
        }
        hide_secrets(process, &applied.new_secrets);
        Ok(applied)
    }

    /// Stores what a spec makes of a process; its secrets are in clear in what is returned.
    async fn store_process(&self, spec: &ProcessSpec) -> Result<Applied, RpcError> {
        let mut transaction = self.pool.begin().await.map_err(StoreError::from)?;
        if !config::lock_project(&mut transaction, spec.project_id).await? {
            return Err(no_project());
        }
        let existing = config::process(&mut transaction, spec.project_id, &spec.name).await?;
        let existing = existing.map(|process| self.sealer.open(&process));
        let secret = || new_signing_secret(rand::random());
        let (mut process, new_secrets) = resolve(spec, existing.as_ref(), clock::new_id, secret)?;
        let Some(existing) = existing else {
            process.revision = self.put_process(transaction, &process).await?;
            return Ok(Applied { process, changed: true, changes: Vec::new(), new_secrets });
        };
        let changes = changes(&existing, &process);
        if existing == process {
            return Ok(Applied { process, changed: false, changes, new_secrets });
        }
        if let Some(process_id) = existing.process_id {
            let states = existing.rules.states.iter().map(|state| &state.name);
            let gone: Vec<_> = states.filter(|name| process.rules.state(name).is_none()).cloned().collect();
            let occupied = config::occupied_states(&mut transaction, process_id, &gone).await?;
            if !occupied.is_empty() {
                let message = format!("states that leads are in cannot be removed: {}", occupied.join(", "));
                return Err(RpcError::new(409, "state_in_use", message));
            }
        }
        process.revision = self.put_process(transaction, &process).await?;
        Ok(Applied { process, changed: true, changes, new_secrets })
    }

    /// Seals and stores a process; its new revision.
    async fn put_process(
        &self,
        mut transaction: sqlx::Transaction<'_, sqlx::Postgres>,
        process: &Process,
    ) -> Result<i64, StoreError> {
        let revision = config::next_revision(&mut transaction).await?;
        config::put_process(&mut transaction, &Process { revision, ..self.sealer.seal(process) }).await?;
        transaction.commit().await?;
        Ok(revision)
    }

    pub(crate) async fn create_key(self, key: CreateKey) -> Result<ApiKey, RpcError> {
        check_name(&key.name)?;
        if key.sha256.len() != 64 || !key.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(RpcError::new(400, "invalid_hash", "sha256 must be 64 lower-case hex digits"));
        }
        if key.scopes.is_empty() {
            return Err(RpcError::new(400, "no_scopes", "a key needs at least one scope"));
        }
        let CreateKey { project_id, name, sha256, scopes, expires_at } = key;
        let created_at = clock::now();
        let key =
            ApiKey { key_id: clock::new_id(), project_id, name, scopes, created_at, expires_at, revoked_at: None };
        match config::insert_key(&self.pool, &key, &sha256).await? {
            KeyInsert::Inserted => {}
            KeyInsert::NoProject => return Err(no_project()),
            KeyInsert::Exists => {
                return Err(RpcError::new(409, "key_exists", "there is a key with this sha256 already"));
            }
        }
        self.projector.key(&sha256).await.map_err(|e| not_projected("the key", &e))?;
        Ok(key)
    }

    pub(crate) async fn revoke_key(self, revoke: RevokeKey) -> Result<ApiKey, RpcError> {
        let no_key = || RpcError::new(404, "key_not_found", "API key not found");
        let sha256 = config::revoke_key(&self.pool, revoke.key_id, clock::now()).await?.ok_or_else(no_key)?;
        self.projector.key(&sha256).await.map_err(|e| not_projected("the revocation", &e))?;
        let (key, _) = config::key(&self.pool, &sha256).await?.ok_or_else(no_key)?;
        Ok(key)
    }

    pub(crate) async fn list_keys(self, list: ListKeys) -> Result<Keys, RpcError> {
        Ok(config::keys(&self.pool, list.project_id).await?)
    }
}

/// What a spec makes of what is there: ids and secrets stay with the names that they belong to. Also the callbacks that
/// got a new secret. Secrets are in clear, save those that could not be opened: to keep one of them is refused.
fn resolve(
    spec: &ProcessSpec,
    existing: Option<&Process>,
    mut new_id: impl FnMut() -> ObjectId,
    mut new_secret: impl FnMut() -> Secret,
) -> Result<(Process, Vec<ObjectId>), RpcError> {
    let mut new_secrets = Vec::new();
    let callbacks = spec.callbacks.iter().map(|callback| {
        let known = existing.and_then(|process| process.callbacks.iter().find(|known| known.name == callback.name));
        let callback_id = known.map_or_else(&mut new_id, |known| known.callback_id);
        let secrets = match (&callback.secrets, known) {
            (Some(secrets), _) => secrets.clone(),
            (None, Some(known)) if known.secrets.iter().any(Secret::is_sealed) => return Err(locked(known)),
            (None, Some(known)) => known.secrets.clone(),
            (None, None) => {
                new_secrets.push(callback_id);
                vec![new_secret()]
            }
        };
        Ok(Callback {
            callback_id,
            name: callback.name.clone(),
            url: callback.url.clone(),
            auth: callback.auth.clone(),
            secrets,
            events: callback.events.clone(),
            enabled: callback.enabled,
            timeout_seconds: callback.timeout_seconds,
            max_in_flight: callback.max_in_flight,
            max_per_second: callback.max_per_second,
        })
    });
    let callbacks = callbacks.collect::<Result<_, _>>()?;
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
    Ok((process, new_secrets))
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

/// What is different now, a line each. Secrets and tokens are compared, not shown.
fn changes(before: &Process, now: &Process) -> Vec<String> {
    let mut changes = Vec::new();
    let rules = &now.rules;
    for state in rules.states.iter().filter(|state| before.rules.state(&state.name).is_none()) {
        changes.push(format!("state {} added", state.name));
    }
    for state in &before.rules.states {
        match rules.state(&state.name) {
            None => changes.push(format!("state {} removed", state.name)),
            Some(same) if same != state => changes.push(format!("state {} changed", state.name)),
            Some(_) => {}
        }
    }
    let mut compare = |what: &str, same: bool| {
        if !same {
            changes.push(format!("{what} changed"));
        }
    };
    compare("transitions", rules.transitions == before.rules.transitions);
    compare("metadataMerge", rules.metadata_merge == before.rules.metadata_merge);
    compare("allowLeavingTerminal", rules.allow_leaving_terminal == before.rules.allow_leaving_terminal);
    compare("callTimeoutSeconds", rules.call_timeout_seconds == before.rules.call_timeout_seconds);
    compare("duringCall", rules.during_call == before.rules.during_call);
    for callback in &now.callbacks {
        let Some(known) = before.callbacks.iter().find(|known| known.name == callback.name) else {
            changes.push(format!("callback {} added", callback.name));
            continue;
        };
        let fields = [
            ("url", callback.url == known.url),
            ("auth", callback.auth == known.auth),
            ("secrets", callback.secrets == known.secrets),
            ("events", callback.events == known.events),
            ("enabled", callback.enabled == known.enabled),
            ("timeoutSeconds", callback.timeout_seconds == known.timeout_seconds),
            ("maxInFlight", callback.max_in_flight == known.max_in_flight),
            ("maxPerSecond", callback.max_per_second == known.max_per_second),
        ];
        let differ = fields.iter().filter(|(_, same)| !same).map(|(field, _)| *field).collect::<Vec<_>>();
        if !differ.is_empty() {
            changes.push(format!("callback {}: {} changed", callback.name, differ.join(", ")));
        }
    }
    for gone in &before.callbacks {
        if !now.callbacks.iter().any(|callback| callback.name == gone.name) {
            changes.push(format!("callback {} removed", gone.name));
        }
    }
    changes
}
/// Leaves only the secrets that nobody has seen yet.
fn hide_secrets(process: &mut Process, shown: &[ObjectId]) {
    for callback in &mut process.callbacks {
        if !shown.contains(&callback.callback_id) {
            callback.secrets.clear();
        }
        match &mut callback.auth {
            Some(CallbackAuth::Bearer { token }) => *token = "***".into(),
            Some(CallbackAuth::Header { value, .. }) => *value = "***".into(),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ProcessSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn applying_again_keeps_ids_and_secrets() {
        let mut next = 0;
        let mut new_id = || {
            next += 1;
            ObjectId::from_bytes([next; 12])
        };
        let first = spec(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","states":[{"name":"new"}],
                "callbacks":[{"name":"a","url":"http://a"},{"name":"b","url":"http://b"}]}"#,
        );
        let (process, shown) = resolve(&first, None, &mut new_id, || "s1".into()).unwrap();
        assert_eq!(shown.len(), 2);
        assert!(process.process_id.is_some());
        let (again, shown) = resolve(&first, Some(&process), &mut new_id, || "s2".into()).unwrap();
        assert_eq!((again, shown), (process.clone(), vec![]));

        let second = spec(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","states":[{"name":"new"}],
                "callbacks":[{"name":"b","url":"http://b2"},{"name":"c","url":"http://c"}]}"#,
        );
        let (mut changed, shown) = resolve(&second, Some(&process), &mut new_id, || "s3".into()).unwrap();
        assert_eq!(changed.callbacks[0].callback_id, process.callbacks[1].callback_id);
        assert_eq!(changed.callbacks[0].secrets, [Secret::from("s1")]);
        assert_eq!(shown, [changed.callbacks[1].callback_id]);
        hide_secrets(&mut changed, &shown);
        assert!(changed.callbacks[0].secrets.is_empty());
        assert_eq!(changed.callbacks[1].secrets, [Secret::from("s3")]);
    }

    #[test]
    fn secrets_that_cannot_be_opened_are_not_kept_but_can_be_replaced() {
        let mut spec =
            spec(r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"_","callbacks":[{"name":"a","url":"http://a"}]}"#);
        let id = || ObjectId::from_bytes([7; 12]);
        let (mut process, _) = resolve(&spec, None, id, || "s1".into()).unwrap();
        process.callbacks[0].secrets = vec!["sealed:v1:d3efba69:AAAA".into()];
        let refused = resolve(&spec, Some(&process), id, || "s2".into()).unwrap_err();
        assert_eq!((refused.status, refused.code.as_str()), (409, "secrets_locked"));
        assert!(refused.message.contains("d3efba69") && !refused.message.contains("AAAA"), "{refused}");
        spec.callbacks[0].secrets = Some(vec!["s3".into()]);
        let (process, _) = resolve(&spec, Some(&process), id, || "s2".into()).unwrap();
        assert_eq!(process.callbacks[0].secrets, [Secret::from("s3")]);
    }

    #[test]
    fn changes_are_named_and_secrets_are_not_shown() {
        let before: Process = serde_json::from_str(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","processId":"bbbbbbbbbbbbbbbbbbbbbbbb","revision":1,"name":"p",
                "states":[{"name":"new"},{"name":"old"}],
                "callbacks":[{"callbackId":"cccccccccccccccccccccccc","name":"a","url":"http://a","secrets":["s"]},
                             {"callbackId":"dddddddddddddddddddddddd","name":"b","url":"http://b","secrets":["s"]}]}"#,
        )
        .unwrap();
        let now = spec(
            r#"{"projectId":"aaaaaaaaaaaaaaaaaaaaaaaa","name":"p","callTimeoutSeconds":5,
                "states":[{"name":"new","kind":"initial"},{"name":"lost"}],
                "callbacks":[{"name":"a","url":"http://a2","secrets":["hidden"],"auth":{"type":"bearer","token":"hidden"}},
                             {"name":"c","url":"http://c"}]}"#,
        );
        let (now, _) = resolve(&now, Some(&before), || ObjectId::from_bytes([7; 12]), || "hidden".into()).unwrap();
        assert_eq!(
            changes(&before, &now),
            [
                "state lost added",
                "state new changed",
                "state old removed",
                "callTimeoutSeconds changed",
                "callback a: url, auth, secrets changed",
                "callback c added",
                "callback b removed",
            ]
        );
    }
}
