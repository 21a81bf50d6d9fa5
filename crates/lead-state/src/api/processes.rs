//! Projects and processes. A change is in Postgres and in its bucket before it is answered.

use contract::{
    process::{Process, ProcessSpec, new_signing_secret},
    rpc::{
        ChangeProcess, CreateProject, ErrorCode, GetProcess, ListProcesses, Page, ProcessChange, ProcessChangeResult,
        ProcessSelector, Project, RpcError, clamp,
    },
    subject::NO_PROCESS,
};
use service_kit::{clock, postgres::Session};

use super::{Api, cursors, project_not_found, validate_name};
use crate::{
    config::projection::not_projected,
    core::{
        process_change::{self, Generators, PlannedChange, check_revision, plan_change, process_not_found},
        process_diff::hide_secrets,
    },
    store::{self, processes},
};

impl Api {
    pub(super) async fn create_project(self, project: CreateProject) -> Result<Project, RpcError> {
        validate_name(&project.name)?;
        let mut connection = store::acquire(&self.pool).await?;
        processes::insert_project(&mut connection, clock::new_id(), &project.name, clock::now()).await?.ok_or_else(
            || RpcError::new(ErrorCode::ProjectExists, format!("there is a project {:?} already", project.name)),
        )
    }

    /// Creates or replaces the process of this name.
    pub(super) async fn apply_process(self, spec: ProcessSpec) -> Result<ProcessChangeResult, RpcError> {
        let (project_id, process) = (spec.project_id, ProcessSelector::Named(spec.name.clone()));
        let change = ProcessChange::Put { spec, keep_callbacks: false };
        self.change_process(ChangeProcess { project_id, process, change, expected_revision: None, dry_run: false })
            .await
    }

    pub(super) async fn change_process(self, query: ChangeProcess) -> Result<ProcessChangeResult, RpcError> {
        process_change::validate(&query)?;
        let PlannedChange { mut process, changed, created, changes, warnings, mut new_secrets, .. } =
            self.store_change(&query).await?;
        if query.dry_run {
            // The generated secrets are discarded.
            new_secrets.clear();
        } else if changed {
            let projected = self.projector.project_process(process.project_id, &process.name).await;
            projected.map_err(|e| not_projected("the process", &e))?;
        }
        hide_secrets(&mut process, &new_secrets);
        Ok(ProcessChangeResult { process, changed, created, changes, warnings, new_secrets })
    }

    /// Plans a change under a lock of its project, and stores it unless it is a dry run.
    async fn store_change(&self, query: &ChangeProcess) -> Result<PlannedChange, RpcError> {
        let mut transaction = store::begin(&self.pool).await?;
        if !processes::lock_project(&mut transaction, query.project_id).await? {
            return Err(project_not_found());
        }
        let existing = match &query.process {
            ProcessSelector::New => None,
            ProcessSelector::Named(name) => processes::find_by_name(&mut *transaction, query.project_id, name).await?,
            ProcessSelector::Id(process_id) => {
                let found = processes::find_by_id(&mut *transaction, query.project_id, *process_id).await?;
                Some(found.ok_or_else(process_not_found)?)
            }
        };
        check_revision(existing.as_ref(), query.expected_revision)?;
        let existing = existing.map(|process| self.sealer.open(&process));
        let generators = Generators { new_id: clock::new_id, new_secret: || new_signing_secret(rand::random()) };
        let mut planned = plan_change(query, existing.as_ref(), clock::now(), generators)?;
        let existing_id = existing.and_then(|process| process.process_id);
        check_conditions(&mut transaction, &planned).await?;
        if planned.changed && !query.dry_run {
            if let (true, Some(process_id)) = (planned.renamed, existing_id) {
                processes::rename(&mut transaction, process_id, &planned.process.name).await?;
            }
            planned.process.revision = processes::next_revision(&mut transaction).await?;
        }
        if planned.changed {
            let config = processes::Config::new(self.sealer.seal(&planned.process));
            process_change::check_size(config.bytes())?;
            if !query.dry_run {
                processes::put(&mut transaction, &config).await?;
                store::commit(transaction).await?;
            }
        }
        Ok(planned)
    }

    pub(super) async fn get_process(self, query: GetProcess) -> Result<Process, RpcError> {
        let process = match &query.process {
            ProcessSelector::New => None,
            ProcessSelector::Named(name) => {
                let found = processes::find_by_name(&self.pool, query.project_id, name).await?;
                found.or_else(|| (name == NO_PROCESS).then(|| process_change::empty_fallback(query.project_id)))
            }
            ProcessSelector::Id(process_id) => processes::find_by_id(&self.pool, query.project_id, *process_id).await?,
        };
        let mut process = process.ok_or_else(process_not_found)?;
        hide_secrets(&mut process, &[]);
        Ok(process)
    }

    pub(super) async fn list_processes(self, query: ListProcesses) -> Result<Page<Process>, RpcError> {
        let limit = clamp(query.limit);
        let after = query.cursor.as_ref().map(cursors::parse_process).transpose()?.unwrap_or_default();
        let processes = processes::list(&self.pool, query.project_id, &after, limit).await?;
        // The page is cut before secrets are hidden, because the limit of the read counts them: a list that the read
        // cut short has a next page.
        let mut page = Page::cut(processes, limit, |process| cursors::process(&process.name), None);
        page.items.iter_mut().for_each(|process| hide_secrets(process, &[]));
        Ok(page)
    }
}

/// Checks the conditions of a change that only the database can check.
async fn check_conditions(connection: &mut Session, planned: &PlannedChange) -> Result<(), RpcError> {
    let Process { project_id, process_id, name, .. } = &planned.process;
    if planned.renamed && processes::find_by_name(&mut *connection, *project_id, name).await?.is_some() {
        return Err(RpcError::new(ErrorCode::ProcessExists, format!("there is a process {name:?} already")));
    }
    if let (Some(process_id), false) = (process_id, planned.removed_states.is_empty()) {
        let occupied = processes::occupied_states(connection, *process_id, &planned.removed_states).await?;
        if !occupied.is_empty() {
            let message = format!("states that leads are in cannot be removed: {}", occupied.join(", "));
            return Err(RpcError::new(ErrorCode::StateInUse, message));
        }
    }
    Ok(())
}
