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
        if (recover.generation, recover.applied) != (from.generation, from.applied) {
            return Err(moved());
        }
        let halted = diagnose(&state);
        let to = match (recover.kind, &halted) {
            (RecoveryKind::Reannounce, None) => self.rewind_to(&state, recover.since).await?,
            (RecoveryKind::Replay, Some(halted)) if halted.remedy == RecoveryKind::Replay => {
                rewind_announcements(&state)
            }
            (RecoveryKind::NewEpoch, Some(_)) => new_epoch(&state),
            (kind, Some(halted)) => {
                return Err(not_applicable(format!("{kind} does not repair this: {}", halted.text)));
            }
            (kind, None) => return Err(not_applicable(format!("there is nothing to repair by {kind}"))),
        };
        if !checkpoint::replace(&mut store::acquire(&self.pool).await?, from, &to, clock::now()).await? {
            return Err(moved());
        }
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
        let first = ledger::first_since(&self.pool, since).await?.ok_or_else(nothing)?;
        let before = first.before();
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
