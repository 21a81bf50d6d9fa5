//! Queries over NATS: micro services that answer them, and the call that asks. See [`contract::rpc`].

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::anyhow;
use async_nats::{
    Client, RequestErrorKind,
    connection::State,
    service::{NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, Service, ServiceExt, error},
};
use bytes::Bytes;
use contract::{json::mismatch, rpc::RpcError};
use futures::{StreamExt, stream::FuturesUnordered};
use serde::{Serialize, de::DeserializeOwned};
use tokio_util::sync::CancellationToken;

use crate::lifecycle::Tasks;

/// How long a query may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a query that can be repeated waits for one instance before it is put to another as well.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Most queries of one kind that are answered at once; more wait in the client's buffer.
const CONCURRENCY: usize = 32;

/// Registers a micro service; its instances share the queries.
pub async fn service(client: &Client, name: &str, description: &str) -> anyhow::Result<Service> {
    client
        .service_builder()
        .description(description)
        .start(name, env!("CARGO_PKG_VERSION"))
        .await
        .map_err(|e| anyhow!("cannot register the micro service {name}: {e}"))
}

/// Answers the queries on a subject, as a task, until shutdown.
pub async fn endpoint<Q, R, F>(
    tasks: &mut Tasks,
    service: &Service,
    subject: &'static str,
    shutdown: CancellationToken,
    handler: impl Fn(Q) -> F + Send + Sync + 'static,
) -> anyhow::Result<()>
where
    Q: DeserializeOwned + Send + 'static,
    R: Serialize + Send + 'static,
    F: Future<Output = Result<R, RpcError>> + Send + 'static,
{
    let mut endpoint = service
        .endpoint_builder()
        // Endpoint names may hold no dots.
        .name(subject.replace('.', "_"))
        .add(subject)
        .await
        .map_err(|e| anyhow!("cannot serve {subject}: {e}"))?;
    let handler = Arc::new(handler);
    tasks.spawn(subject, async move {
        let mut requests = 0_usize;
        let stopped = shutdown.clone();
        let answers = futures::stream::poll_fn(|cx| endpoint.poll_next_unpin(cx))
            .take_until(shutdown.cancelled_owned())
            .inspect(|_| requests += 1)
            .for_each_concurrent(CONCURRENCY, |request| {
                let handler = handler.clone();
                async move {
                    let reply = match serde_json::from_slice(&request.message.payload) {
                        Ok(query) => handler(query).await,
                        Err(e) => Err(RpcError::new(
                            400,
                            "invalid_query",
                            format!("the query cannot be read: {}", mismatch(&e)),
                        )),
                    };
                    let reply = reply.and_then(|reply| {
                        serde_json::to_vec(&reply).map(Bytes::from).map_err(|e| internal(subject, &e))
                    });
                    let reply = reply.map_err(|e| error::Error {
                        status: format!("{}: {}", e.code, e.message.replace(['\r', '\n'], " ")),
                        code: e.status.into(),
                    });
                    if let Err(e) = request.respond(reply).await {
                        tracing::warn!("cannot answer {subject}: {e}");
                    }
                }
            });
        answers.await;
        tracing::debug!(requests, "{subject} stopped");
        if stopped.is_cancelled() { Ok(()) } else { Err(anyhow!("the subscription to {subject} ended")) }
    });
    Ok(())
}

/// An error that is our fault: its cause is logged, not told.
pub fn internal(what: &str, cause: &(dyn std::error::Error + 'static)) -> RpcError {
    tracing::error!("{what}: {}", crate::nats::chain(cause));
    RpcError::new(500, "internal", "internal error; the service's log says more")
}

/// Asks for something that changes nothing. Asked anew every [`ASK_AGAIN`] until somebody answers: an instance that
/// hangs swallows what is sent to it until NATS drops it.
///
/// # Errors
/// What the service answered; 503 `unavailable` when nobody answers.
pub async fn query<Q: Serialize, R: DeserializeOwned>(
    client: &Client,
    subject: &str,
    query: &Q,
) -> Result<R, RpcError> {
    let mut asked = FuturesUnordered::from_iter([call(client, subject, query)]);
    loop {
        tokio::select! {
            Some(answer) = asked.next() => return answer,
            () = tokio::time::sleep(ASK_AGAIN) => asked.push(call(client, subject, query)),
        }
    }
}

/// Asks once, for something that may change something.
///
/// # Errors
/// What the service answered; 503 `unavailable` when nobody answers.
pub async fn call<Q: Serialize, R: DeserializeOwned>(client: &Client, subject: &str, query: &Q) -> Result<R, RpcError> {
    call_within(client, subject, query, TIMEOUT).await
}

/// Asks once, for something that may take this long.
///
/// # Errors
/// What the service answered; 503 `unavailable` when nobody answers.
pub async fn call_within<Q: Serialize, R: DeserializeOwned>(
    client: &Client,
    subject: &str,
    query: &Q,
    patience: Duration,
) -> Result<R, RpcError> {
    // The client would keep the query until it is connected again, and its caller waiting.
    if client.connection_state() != State::Connected {
        return Err(RpcError::new(503, "unavailable", format!("cannot ask {subject}: NATS is not connected")));
    }
    let payload = serde_json::to_vec(query).map_err(|e| internal(subject, &e))?;
    // The client's own patience is for what it does itself; it must not end before ours.
    let request = async_nats::Request::new().payload(payload.into()).timeout(Some(patience + TIMEOUT));
    let request = client.send_request(subject.to_owned(), request);
    let reply = match tokio::time::timeout(patience, request).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(e)) if e.kind() == RequestErrorKind::NoResponders => {
            return Err(RpcError::new(503, "unavailable", format!("no service answers {subject}")));
        }
        Ok(Err(e)) => return Err(RpcError::new(503, "unavailable", format!("cannot ask {subject}: {e}"))),
        Err(_) => return Err(RpcError::new(503, "unavailable", format!("{subject} did not answer in time"))),
    };
    let header = |name| reply.headers.as_ref().and_then(|headers| headers.get(name)).map(|value| value.as_str());
    if let Some(error) = header(NATS_SERVICE_ERROR) {
        let (code, message) = error.split_once(": ").unwrap_or(("internal", error));
        let status = header(NATS_SERVICE_ERROR_CODE).and_then(|status| status.parse().ok()).unwrap_or(500);
        return Err(RpcError::new(status, code, message));
    }
    serde_json::from_slice(&reply.payload).map_err(|e| internal(subject, &e))
}
