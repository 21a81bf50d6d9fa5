//! Queries over NATS: [`request`] sends them, [`serve`] answers them as a micro service. See [`contract::rpc`].

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::anyhow;
use async_nats::{
    Client, RequestErrorKind,
    connection::State,
    service::{NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, Request, Service, ServiceExt, endpoint::Endpoint, error},
};
use bytes::Bytes;
use contract::{
    ObjectId,
    json::redacted_error,
    rpc::{DEFAULT_TIMEOUT, ErrorCode, Query, RpcError},
};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use serde::{
    Deserialize, Serialize,
    de::{self, DeserializeOwned},
};
use tokio_util::sync::CancellationToken;

use crate::{
    lifecycle::Tasks,
    shares::{Pool, ShareUsed},
};

/// How long a repeatable query waits before it is sent to another instance as well. A shorter wait multiplies the load
/// when the services are slow; a longer one keeps clients waiting for an instance that hangs.
const REPEAT_AFTER: Duration = Duration::from_secs(1);
/// How many queries of one kind an instance answers at once, with a share per project. With more, each waits longer for
/// a connection to Postgres; fewer leave Postgres idle.
const ANSWERED: usize = 16;
/// How many queries may wait to be answered or be answered at once, with a share per project; further ones are refused.
/// A longer queue bridges bursts, but keeps queries whose callers have given up.
const ADMITTED: usize = 256;

/// Registers a micro service; its instances share the queries. Operators can read the `settings` of each instance.
pub async fn service(
    client: &Client,
    name: &str,
    description: &str,
    settings: impl IntoIterator<Item = (&'static str, String)>,
) -> anyhow::Result<Service> {
    client
        .service_builder()
        .description(description)
        .metadata(settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
        .start(name, env!("CARGO_PKG_VERSION"))
        .await
        .map_err(|e| anyhow!("cannot register the micro service {name}: {e}"))
}

/// The holder of a share of the queries: a project, or `None` for the operator.
type Holder = Option<ObjectId>;

/// The project that a query is about; `None` for the operator's queries.
fn holder(payload: &[u8]) -> Holder {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Project {
        project_id: ObjectId,
    }
    serde_json::from_slice(payload).ok().map(|Project { project_id }| project_id)
}

fn too_many_queries(error: ShareUsed) -> RpcError {
    let text = format!("Too many requests at once: {error}; send fewer at once");
    match error.held {
        0 => RpcError::new(ErrorCode::ServiceBusy, text),
        _ => RpcError::new(ErrorCode::TooManyQueries, text),
    }
}

/// Answers the queries of one kind, as a task, until shutdown.
///
/// # Errors
/// The endpoint cannot be registered.
pub fn serve<'a, Q: Query, F>(
    tasks: &'a mut Tasks,
    service: &'a Service,
    shutdown: CancellationToken,
    handler: impl Fn(Q) -> F + Send + Sync + 'static,
) -> BoxFuture<'a, anyhow::Result<()>>
where
    F: Future<Output = Result<Q::Reply, RpcError>> + Send + 'static,
{
    let answer = move |payload: &[u8]| -> Answer {
        let reply = read(payload).map(&handler);
        Box::pin(async move { written(Q::SUBJECT, Q::reply_to_json(&reply?.await?)) })
    };
    Box::pin(serve_subject(tasks, service, shutdown, Q::SUBJECT, Arc::new(answer)))
}

/// The error of a query whose answer cannot be sent.
const UNSENT: &str = "the answer cannot be sent: it may be larger than the max_payload of NATS";

/// The reply to a query.
type Answer = BoxFuture<'static, Result<Bytes, RpcError>>;
/// Answers a query from its bytes.
type Handler = Arc<dyn Fn(&[u8]) -> Answer + Send + Sync>;

/// [`serve`] without the types of a query, so that it is compiled once and not for each query.
async fn serve_subject(
    tasks: &mut Tasks,
    service: &Service,
    shutdown: CancellationToken,
    subject: &'static str,
    answer: Handler,
) -> anyhow::Result<()> {
    let endpoint = service
        .endpoint_builder()
        // Names of endpoints may not contain dots.
        .name(subject.replace('.', "_"))
        .add(subject)
        .await
        .map_err(|e| anyhow!("cannot serve {subject}: {e}"))?;
    let (admitted, answered) = (Pool::new(ADMITTED), Pool::new(ANSWERED));
    tasks.spawn(subject, async move {
        let mut requests = 0_usize;
        let stopped = shutdown.clone();
        let answers = futures::stream::unfold((endpoint, shutdown), next_request)
            .inspect(|_| requests += 1)
            // Bounded by `admitted`.
            .for_each_concurrent(None, |request| {
                let (answer, answered) = (answer.clone(), answered.clone());
                let holder = holder(&request.message.payload);
                let admitted = admitted.try_acquire(holder);
                async move {
                    let reply = async {
                        let _admitted = admitted.map_err(too_many_queries)?;
                        let _answered = answered.acquire(holder).await;
                        answer(&request.message.payload).await
                    };
                    let reply = reply.await.map_err(|e| error::Error {
                        status: format!("{}: {}", e.code, e.message.replace(['\r', '\n'], " ")),
                        code: e.status.into(),
                    });
                    if let Err(e) = request.respond(reply).await {
                        tracing::warn!("cannot answer {subject}: {e}");
                        // Too large for NATS, probably. Without an answer, the query would be sent again and again.
                        let status = format!("{}: {UNSENT}", ErrorCode::Internal.as_str());
                        let _ = request.respond(Err(error::Error { status, code: 500 })).await;
                    }
                }
            });
        answers.await;
        tracing::debug!(requests, "{subject} stopped");
        if stopped.is_cancelled() { Ok(()) } else { Err(anyhow!("the subscription to {subject} ended")) }
    });
    Ok(())
}

/// The next query. On shutdown it unsubscribes, so that other instances get the next ones, and returns those that have
/// arrived.
async fn next_request(
    (mut endpoint, shutdown): (Endpoint, CancellationToken),
) -> Option<(Request, (Endpoint, CancellationToken))> {
    let request = tokio::select! {
        biased;
        () = shutdown.cancelled() => {
            // It fails if the client has ended; then no more queries arrive either.
            let _ = endpoint.stop().await;
            endpoint.next().await
        }
        request = endpoint.next() => request,
    };
    request.map(|request| (request, (endpoint, shutdown)))
}

/// Reads a query. serde would also read a struct from an array.
fn read<Q: Query>(payload: &[u8]) -> Result<Q, RpcError> {
    let is_object = payload.trim_ascii_start().starts_with(b"{");
    let query = if is_object { Q::from_json(payload) } else { Err(de::Error::custom("not a JSON object")) };
    query.map_err(|e| {
        RpcError::new(ErrorCode::InvalidQuery, format!("the query cannot be read: {}", redacted_error(&e)))
    })
}

/// The JSON of a query or a reply.
fn written(subject: &str, json: serde_json::Result<Vec<u8>>) -> Result<Bytes, RpcError> {
    json.map(Bytes::from).map_err(|e| internal(subject, &e))
}

/// An error of our own: the cause goes to the log, not to the client.
pub fn internal(what: &str, cause: &(dyn std::error::Error + 'static)) -> RpcError {
    tracing::error!("{what}: {}", crate::nats::error_chain(cause));
    RpcError::new(ErrorCode::Internal, "internal error; see the service's log")
}

/// The error of a reply that cannot be read. It may contain a secret.
fn unreadable(subject: &str, cause: &serde_json::Error) -> RpcError {
    tracing::error!("the reply to {subject} cannot be read: {}", redacted_error(cause));
    RpcError::new(ErrorCode::Internal, "internal error; see the service's log")
}

/// Why a query has no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The query was not sent.
    #[error("{subject} was not sent: NATS is not connected")]
    NotConnected {
        /// The query's subject.
        subject: String,
    },
    /// No instance of the service runs, or this user may not reach it.
    #[error("no service answers {subject}")]
    NoResponder {
        /// The query's subject.
        subject: String,
    },
    /// The service may still carry it out.
    #[error("{subject} was not answered within {} s", timeout.as_secs())]
    TimedOut {
        /// The query's subject.
        subject: String,
        /// How long the reply was awaited.
        timeout: Duration,
    },
    /// The client could not send the query, or lost the connection while it waited.
    #[error("{subject} failed: {reason}")]
    Failed {
        /// The query's subject.
        subject: String,
        /// The error of the NATS client.
        reason: String,
    },
    /// The service answered with an error.
    #[error(transparent)]
    Answered(#[from] RpcError),
}

impl From<RequestError> for RpcError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Answered(error) => error,
            error => Self::new(ErrorCode::Unavailable, error.to_string()),
        }
    }
}

/// Sends a query and waits for the reply. A repeatable query is sent to one more instance every [`REPEAT_AFTER`] until
/// one answers: an instance that hangs swallows requests until NATS drops its connection.
///
/// # Errors
/// No instance answered in time, or one answered with an error.
pub async fn request<Q: Query>(client: &Client, query: &Q) -> Result<Q::Reply, RequestError> {
    let payload = written(Q::SUBJECT, query.to_json())?;
    let reply = match Q::REPEATABLE {
        true => send_repeatedly(client, Q::SUBJECT, payload, Q::TIMEOUT).await?,
        false => send(client, Q::SUBJECT, payload, Q::TIMEOUT).await?,
    };
    Q::reply_from_json(&reply).map_err(|e| unreadable(Q::SUBJECT, &e).into())
}

/// Sends a request to a subject that is known at run time only. [`request`] is for everything else.
///
/// # Errors
/// No instance answered in time, or one answered with an error.
pub async fn exchange<Q: Serialize, R: DeserializeOwned>(
    client: &Client,
    subject: &str,
    query: &Q,
    timeout: Duration,
) -> Result<R, RequestError> {
    let reply = send(client, subject, written(subject, serde_json::to_vec(query))?, timeout).await?;
    serde_json::from_slice(&reply).map_err(|e| unreadable(subject, &e).into())
}

type Sent<'a> = BoxFuture<'a, Result<Bytes, RequestError>>;

fn send_repeatedly<'a>(client: &'a Client, subject: &'a str, payload: Bytes, timeout: Duration) -> Sent<'a> {
    Box::pin(async move {
        let send = || send(client, subject, payload.clone(), timeout);
        let mut sent = FuturesUnordered::from_iter([send()]);
        loop {
            tokio::select! {
                Some(answer) = sent.next() => match answer {
                    // An earlier one may still be answered, for example by an instance that stops.
                    Err(RequestError::NoResponder { .. }) if !sent.is_empty() => {}
                    answer => return answer,
                },
                () = tokio::time::sleep(REPEAT_AFTER) => sent.push(send()),
            }
        }
    })
}

/// Sends a request once and waits for the reply.
fn send<'a>(client: &'a Client, subject: &'a str, payload: Bytes, timeout: Duration) -> Sent<'a> {
    let subject = || subject.to_owned();
    Box::pin(async move {
        // The client would hold the query, and its caller, until it is connected again.
        if client.connection_state() != State::Connected {
            return Err(RequestError::NotConnected { subject: subject() });
        }
        // The client's own timeout must not end before ours.
        let request = async_nats::Request::new().payload(payload).timeout(Some(timeout + DEFAULT_TIMEOUT));
        let reply = match tokio::time::timeout(timeout, client.send_request(subject(), request)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(e)) if e.kind() == RequestErrorKind::NoResponders => {
                return Err(RequestError::NoResponder { subject: subject() });
            }
            Ok(Err(e)) => return Err(RequestError::Failed { subject: subject(), reason: e.to_string() }),
            Err(_) => return Err(RequestError::TimedOut { subject: subject(), timeout }),
        };
        let header = |name| reply.headers.as_ref().and_then(|headers| headers.get(name)).map(|value| value.as_str());
        if let Some(error) = header(NATS_SERVICE_ERROR) {
            let (code, message) = error.split_once(": ").unwrap_or(("internal", error));
            let status = header(NATS_SERVICE_ERROR_CODE).and_then(|status| status.parse().ok()).unwrap_or(500);
            return Err(RpcError::received(status, code, message).into());
        }
        Ok(reply.payload)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_count_for_their_project() {
        let project_id = ObjectId::from_bytes([1; 12]);
        let query = format!("{{\"projectId\": \"{project_id}\", \"leadId\": 7}}");
        assert_eq!(holder(query.as_bytes()), Some(project_id));
        for other in ["{}", "", "{\"projectId\": null}", "{\"project_id\": 1}"] {
            assert_eq!(holder(other.as_bytes()), None, "{other}");
        }
        assert_eq!(too_many_queries(ShareUsed { held: 128, total: 256 }).status, 429);
        assert_eq!(too_many_queries(ShareUsed { held: 0, total: 256 }).status, 503);
    }
}
