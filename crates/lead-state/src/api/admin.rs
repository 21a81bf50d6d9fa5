//! Administration: projects, processes, API keys. Every change is in Postgres, then in its bucket, before the answer. What
//! a change makes of a process is decided in [`process_change`].

use std::sync::Arc;

use contract::{
    key::ApiKey,
    process::{Process, ProcessSpec, new_signing_secret},
    rpc::{
        ChangeProcess, CreateKey, CreateProject, Cursor, GetProcess, Keys, ListKeys, ListProcesses, Page,
        ProcessChange, ProcessChangeResult, ProcessSelector, Project, RevokeKey, RpcError, clamp,
    },
    subject::NO_PROCESS,
};
use service_kit::clock;
use sqlx::PgPool;

use crate::{
    config::{projection::Projector, secrets::Sealer},
    core::process_change::{self, Known, hide_secrets},
    store::{
        StoreError,
        config::{self, KeyInsert},
    },
};

/// What cursors say which list they are of.
const PROCESSES: &str = "processes";

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

    /// Makes the process of this name what a spec says.
    pub(crate) async fn apply_process(self, spec: ProcessSpec) -> Result<ProcessChangeResult, RpcError> {
        let (project_id, process) = (spec.project_id, ProcessSelector::Named(spec.name.clone()));
        let change = ProcessChange::Put { spec, keep_callbacks: false };
        self.change_process(ChangeProcess { project_id, process, change, expected_revision: None, dry_run: false })
            .await
    }

    pub(crate) async fn change_process(self, query: ChangeProcess) -> Result<ProcessChangeResult, RpcError> {
        process_change::check(&query)?;
        let mut applied = self.store_change(&query).await?;
        if query.dry_run {
            // Nobody will ever have what was made for it.
            applied.new_secrets.clear();
        } else if applied.changed {
            let process = &applied.process;
            let projected = self.projector.process(process.project_id, &process.name).await;
            projected.map_err(|e| not_projected("the process", &e))?;
        }
        hide_secrets(&mut applied.process, &applied.new_secrets);
        Ok(applied)
    }

    /// Stores what a change makes of a process; its secrets are in clear in what is returned.
    async fn store_change(&self, query: &ChangeProcess) -> Result<ProcessChangeResult, RpcError> {
        let mut transaction = self.pool.begin().await.map_err(StoreError::from)?;
        if !config::lock_project(&mut transaction, query.project_id).await? {
            return Err(no_project());
        }
        let existing = match &query.process {
            ProcessSelector::New => None,
            ProcessSelector::Named(name) => config::process(&mut transaction, query.project_id, name).await?,
            ProcessSelector::Id(process_id) => {
                let found = config::process_of_id(&mut *transaction, query.project_id, *process_id).await?;
                Some(found.ok_or_else(process_change::no_process)?)
            }
        };
        process_change::check_revision(existing.as_ref(), query.expected_revision)?;
        let existing = existing.map(|process| self.sealer.open(&process));
        let known = existing.as_ref().map_or(Known::Nothing(&query.process), Known::Process);
        let secret = || new_signing_secret(rand::random());
        let mut made =
            process_change::change(known, query.project_id, &query.change, clock::now(), clock::new_id, secret)?;
        let (changed, created) = (existing.as_ref() != Some(&made.process), existing.is_none());
        let changes =
            existing.as_ref().map(|existing| process_change::changes(existing, &made.process)).unwrap_or_default();
        let renamed = existing.as_ref().is_none_or(|existing| existing.name != made.process.name);
        if renamed && config::process(&mut transaction, query.project_id, &made.process.name).await?.is_some() {
            let message = format!("there is a process {:?} already", made.process.name);
            return Err(RpcError::new(409, "process_exists", message));
        }
        if let Some(Process { process_id: Some(process_id), rules, .. }) = &existing {
            let states = rules.states.iter().map(|state| &state.name);
            let gone: Vec<_> = states.filter(|name| made.process.rules.state(name).is_none()).cloned().collect();
            let occupied = config::occupied_states(&mut transaction, *process_id, &gone).await?;
            if !occupied.is_empty() {
                let message = format!("states that leads are in cannot be removed: {}", occupied.join(", "));
                return Err(RpcError::new(409, "state_in_use", message));
            }
        }
        if changed && !query.dry_run {
            process_change::forget_retired(&mut made.process, clock::now());
            if let (true, Some(Process { process_id: Some(process_id), .. })) = (renamed, &existing) {
                config::rename_process(&mut transaction, *process_id, &made.process.name).await?;
            }
            made.process.revision = self.put_process(transaction, &made.process).await?;
        }
        let process_change::Made { process, new_secrets } = made;
        Ok(ProcessChangeResult { process, changed, created, changes, new_secrets })
    }

    pub(crate) async fn get_process(self, query: GetProcess) -> Result<Process, RpcError> {
        let process = match &query.process {
            ProcessSelector::New => None,
            ProcessSelector::Named(name) => {
                let found = config::current_process(&self.pool, query.project_id, name).await?;
                found.or_else(|| (name == NO_PROCESS).then(|| process_change::fallback(query.project_id)))
            }
            ProcessSelector::Id(process_id) => config::process_of_id(&self.pool, query.project_id, *process_id).await?,
        };
        let mut process = process.ok_or_else(process_change::no_process)?;
        hide_secrets(&mut process, &[]);
        Ok(process)
    }

    pub(crate) async fn list_processes(self, query: ListProcesses) -> Result<Page<Process>, RpcError> {
        let limit = clamp(query.limit);
        let after = query.cursor.map(|cursor| cursor.place(PROCESSES)).transpose()?;
        // What Postgres cannot hold is no place in it.
        let after = after.unwrap_or_default();
        if after.contains('\0') {
            return Err(Cursor::invalid());
        }
        let mut processes = config::processes(&self.pool, query.project_id, &after, limit).await?;
        processes.iter_mut().for_each(|process| hide_secrets(process, &[]));
        Ok(Page::cut(processes, limit, |process| Cursor::new(PROCESSES, &process.name), None))
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
