//! Answers the queries about recovery.

use async_nats::jetstream;
use contract::{
    Timestamp,
    rpc::{ErrorCode, GetRecovery, Recover, RecoveryKind, RecoveryStatus, RpcError},
};
use service_kit::{clock, postgres::Pool};

use super::{
    diagnose::{diagnose, new_epoch, rewind_announcements},
    state::RecoveryState,
};
use crate::store::{
    self,
    checkpoint::{self, Checkpoint},
    ledger,
};

#[derive(Debug, Clone)]
pub(crate) struct RecoveryApi {
    pub(crate) pool: Pool,
    pub(crate) js: jetstream::Context,
}

impl RecoveryApi {
    async fn observe(&self) -> Result<RecoveryState, RpcError> {
        RecoveryState::observe(&self.pool, &self.js).await.map_err(|e| {
            RpcError::new(ErrorCode::Unavailable, format!("cannot read the state of log and events: {e:#}"))
        })
    }

    pub(crate) async fn get(self, _: GetRecovery) -> Result<RecoveryStatus, RpcError> {
        Ok(status(&self.observe().await?))
    }

    pub(crate) async fn recover(self, recover: Recover) -> Result<RecoveryStatus, RpcError> {
        let state = self.observe().await?;
        let from = &state.checkpoint;
        let halted = diagnose(&state);
        // Reannouncing may happen while the leader applies updates: then only its generation and epoch stay the same.
        let is_running = recover.kind == RecoveryKind::Reannounce && halted.is_none();
        let is_same = match is_running {
            true => recover.applied.epoch == from.applied.epoch,
            false => recover.applied == from.applied,
        };
        if recover.generation != from.generation || !is_same {
            return Err(moved());
        }
        let to = match (recover.kind, &halted) {
            (RecoveryKind::Reannounce, None) => self.rewind_to(&state, recover.since).await?,
            (RecoveryKind::Replay, Some(halted)) if halted.remedy == RecoveryKind::Replay => {
                rewind_announcements(&state)
            }
            (RecoveryKind::NewEpoch, Some(_)) => new_epoch(&state),
            (kind, Some(halted)) => {
                return Err(not_applicable(format!("{kind} does not repair this: {}", halted.text)));
            }
            (kind, None) => return Err(not_applicable(format!("there is nothing for {kind} to repair"))),
        };
        let mut connection = store::acquire(&self.pool).await?;
        let is_replaced = match is_running {
            true => checkpoint::rewind(&mut connection, from, &to, clock::now()).await?,
            false => checkpoint::replace(&mut connection, from, &to, clock::now()).await?,
        };
        if !is_replaced {
            return Err(moved());
        }
        drop(connection);
        tracing::warn!(
            kind = %recover.kind,
            halted = halted.as_ref().map_or("running", |halted| halted.reason.as_ref()),
            from = %from.applied,
            generation = to.generation,
            applied = %to.applied,
            announced = %to.announced,
            "recovering at an operator's request"
        );
        Ok(status(&self.observe().await?))
    }

    /// The checkpoint with its announcements rewound to before `since`.
    async fn rewind_to(&self, state: &RecoveryState, since: Option<Timestamp>) -> Result<Checkpoint, RpcError> {
        let since = since.ok_or_else(|| RpcError::new(ErrorCode::MissingField, "since is required"))?;
        let nothing = || not_applicable(format!("no update was applied since {}", since.to_iso()));
        let applied = state.checkpoint.applied;
        let before = ledger::position_before(&self.pool, since, applied).await?.ok_or_else(nothing)?;
        let rewound = rewind_announcements(state);
        Ok(Checkpoint {
            announced: before.min(state.checkpoint.announced),
            delivered: before.min(rewound.delivered),
            ..rewound
        })
    }
}

fn moved() -> RpcError {
    RpcError::new(ErrorCode::MovedOn, "the checkpoint has moved since; read the state again")
}

fn not_applicable(why: String) -> RpcError {
    RpcError::new(ErrorCode::NotApplicable, why)
}

fn status(state: &RecoveryState) -> RecoveryStatus {
    let Checkpoint { generation, applied, announced, delivered, .. } = state.checkpoint;
    let halted = diagnose(state);
    RecoveryStatus {
        generation,
        applied,
        announced,
        delivered,
        log_first: state.log_first,
        log_last: state.log_last,
        halted,
    }
}
