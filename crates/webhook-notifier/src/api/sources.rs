//! Verifies the signatures of call reports for the gateway, which cannot open the secrets of sources.

use std::sync::Arc;

use async_nats::service::Service;
use base64::{Engine, prelude::BASE64_STANDARD};
use contract::rpc::{ErrorCode, Query, RpcError, VerifiedReport, VerifyReport};
use service_kit::{
    clock,
    lifecycle::Tasks,
    rpc::{internal, serve},
};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::{Callbacks, SourceLookup},
    core::report_signature::{ReportProof, is_authentic},
};

/// Answers until shutdown.
pub(crate) async fn serve_sources(
    tasks: &mut Tasks,
    service: &Service,
    callbacks: &Arc<Callbacks>,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let callbacks = callbacks.clone();
    serve(tasks, service, shutdown.clone(), move |query: VerifyReport| {
        let callbacks = callbacks.clone();
        async move { verify(&callbacks, &query).await }
    })
    .await
}

async fn verify(callbacks: &Callbacks, query: &VerifyReport) -> Result<VerifiedReport, RpcError> {
    let VerifyReport { project_id, process_id, source_id, signature, secret_sha256, body } = query;
    let invalid =
        || RpcError::new(ErrorCode::InvalidSignature, "The report is not signed with a secret of this source");
    let body = BASE64_STANDARD.decode(body).map_err(|_| invalid())?;
    let source = callbacks.source(*project_id, *process_id, *source_id).await;
    let source = match source.map_err(|e| internal(VerifyReport::SUBJECT, &e))? {
        SourceLookup::Enabled(source) => source,
        SourceLookup::Unknown => return Err(RpcError::new(ErrorCode::SourceNotFound, "Source not found")),
        SourceLookup::Locked(e) => {
            tracing::error!(%source_id, "the source's secrets cannot be opened, its reports are refused: {e}");
            let message =
                "The secrets of this source cannot be opened; retry later, or contact the operator of Leadrelay";
            return Err(RpcError::new(ErrorCode::Unavailable, message));
        }
    };
    let proof = ReportProof { signature: signature.as_deref(), secret_sha256: secret_sha256.as_deref(), body: &body };
    if is_authentic(source.platform, &source.secrets, proof, clock::now()) {
        Ok(VerifiedReport { verified: true })
    } else {
        Err(invalid())
    }
}
