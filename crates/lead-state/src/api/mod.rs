//! The queries that lead-state answers over NATS. Every instance answers, not only the leader.

use std::sync::Arc;

use async_nats::{Client, jetstream, service::Service};
use contract::{
    process::MAX_NAME_CHARS,
    rpc::{ErrorCode, GetLag, Lag, RpcError},
    streams::STREAM_REPLICAS,
};
use service_kit::{
    lifecycle::Tasks,
    postgres::Pool,
    retention::Retention,
    rpc::{internal, serve, service},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{projection::Projector, sealer::Sealer},
    lag::LastLag,
    recovery::api::RecoveryApi,
    store::StoreError,
};

mod cursors;
mod dry_run;
mod keys;
mod leads;
mod processes;
mod updates;

#[derive(Debug, Clone)]
pub(crate) struct Api {
    pub(crate) pool: Pool,
    pub(crate) js: jetstream::Context,
    pub(crate) projector: Arc<Projector>,
    pub(crate) sealer: Arc<Sealer>,
    pub(crate) ledger_retention: Retention,
    /// The replicas of new streams.
    pub(crate) stream_replicas: u8,
    pub(crate) lag: LastLag,
}

impl Api {
    /// Registers the micro service, and answers its queries until shutdown. The subscriptions end when the returned
    /// service is dropped, so the caller keeps it until its tasks have ended.
    pub(crate) async fn serve(
        self,
        client: &Client,
        tasks: &mut Tasks,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Service> {
        let settings = [(STREAM_REPLICAS, self.stream_replicas.to_string())];
        let service = service(client, "lead-state", "Leads, updates and configuration", settings).await?;
        let (sealer, recovery) = (self.sealer.clone(), RecoveryApi { pool: self.pool.clone(), js: self.js.clone() });
        macro_rules! serve {
            ($($api:ident: $($handler:path),*;)*) => {$($({
                let api = $api.clone();
                serve(tasks, &service, shutdown.clone(), move |query| $handler(api.clone(), query)).await?;
            })*)*};
        }
        let api = self;
        serve! {
            api: Self::get_lead, Self::initiate_lead, Self::list_leads, Self::get_lead_history, Self::list_calls;
            api: Self::get_update, Self::dry_run_update, Self::list_updates, Self::get_outcomes;
            api: Self::get_events, Self::find_updates, Self::count_updates, Self::count_activities;
            api: Self::create_project, Self::apply_process, Self::change_process;
            api: Self::get_process, Self::list_processes;
            api: Self::create_key, Self::revoke_key, Self::list_keys, Self::get_lag;
            sealer: Sealer::rotate;
            recovery: RecoveryApi::get, RecoveryApi::recover;
        }
        Ok(service)
    }

    async fn get_lag(self, _: GetLag) -> Result<Lag, RpcError> {
        Ok(self.lag.get())
    }
}

impl From<StoreError> for RpcError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Unavailable(_) => {
                tracing::warn!("{error}");
                Self::new(ErrorCode::Unavailable, "the database is unavailable; try again")
            }
            _ => internal("a query failed", &error),
        }
    }
}

fn lead_not_found() -> RpcError {
    RpcError::new(ErrorCode::LeadNotFound, "Lead not found")
}

fn project_not_found() -> RpcError {
    RpcError::new(ErrorCode::ProjectNotFound, "Project not found")
}

/// Rejects an invalid name of a project or key.
fn validate_name(name: &str) -> Result<(), RpcError> {
    if name.trim().is_empty() || name.chars().nth(MAX_NAME_CHARS).is_some() || name.chars().any(char::is_control) {
        let message = format!("name must have 1 to {MAX_NAME_CHARS} characters and no control characters");
        return Err(RpcError::new(ErrorCode::InvalidName, message));
    }
    Ok(())
}
