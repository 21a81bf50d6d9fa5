//! 1 Accept: an update, a call event or an erasure becomes a command in the log, and its response.

use std::time::Instant;

use async_nats::Client;
use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, header::IF_MATCH},
};
use bytes::Bytes;
use contract::{
    ObjectId,
    event::{CompletionEvent, OutcomeKind},
    idempotency::IdempotencyRecord,
    key::ApiKey,
    rpc::GetUpdate,
    warning::Warning,
};
use http_api::{Outcome, UpdateAccepted};
use service_kit::clock;

use crate::{
    app::App,
    auth::KeyCheck,
    command::Command,
    command_log::LogEntry,
    error::ApiError,
    idempotency::{self, Claim, IDEMPOTENT_REPLAYED},
    outage::PendingRequest,
    outcome_waiters::OutcomeWaiter,
    request::{
        body, fields,
        prefer::{PREFERENCE_APPLIED, Wait},
        trace::RequestTrace,
    },
    response::{self, HandlerResult},
};

/// How long a response waits for the outcome, and the key that must be valid until then; none: it does not wait.
pub(crate) struct Waiting(Option<(Wait, KeyCheck)>);

impl Waiting {
    pub(crate) const NONE: Self = Self(None);

    pub(crate) fn of(headers: &HeaderMap) -> Self {
        Self(Wait::of(headers).map(|wait| (wait, KeyCheck::of(headers))))
    }
}

/// How a client wants its request to be handled, from its headers.
pub(crate) struct Preferences {
    client_key: Option<String>,
    waiting: Waiting,
}

impl Preferences {
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        Ok(Self { client_key: idempotency::key(headers)?, waiting: Waiting::of(headers) })
    }
}

/// A valid request.
pub(crate) struct Accepted {
    /// The body, which identifies a repeated request.
    pub(crate) body: Bytes,
    pub(crate) command: Command,
    /// What the body contains and is ignored.
    pub(crate) warnings: Vec<String>,
}

/// Accepts the start or end of a call.
pub(crate) async fn call(
    app: &App,
    key: &ApiKey,
    request: Request,
    kind: OutcomeKind,
    trace: &mut RequestTrace,
) -> HandlerResult {
    fields::from_query(request.uri().query().unwrap_or_default())?.refuse_rest()?;
    if request.headers().contains_key(IF_MATCH) {
        return Err(ApiError::field("If-Match", "applies to updates: a call event does not depend on the lead"));
    }
    let preferences = Preferences::of(request.headers())?;
    let body = body::read(request, app.max_body_bytes).await?;
    let (command, warnings) = Command::parse(kind, &body, key.project_id)?;
    accept(app, key, preferences, Accepted { body, command, warnings }, trace).await
}

/// Accepts the erasure of a lead.
pub(crate) async fn erase(
    app: &App,
    key: &ApiKey,
    request: Request,
    lead_id: ObjectId,
    trace: &mut RequestTrace,
) -> HandlerResult {
    fields::from_query(request.uri().query().unwrap_or_default())?.refuse_rest()?;
    if request.headers().contains_key(IF_MATCH) {
        return Err(ApiError::field("If-Match", "applies to updates: a lead is erased whatever its version"));
    }
    let preferences = Preferences::of(request.headers())?;
    // The path says all, so it identifies a repeated request.
    let (body, command) = (Bytes::from(lead_id.to_string()), Command::erase(lead_id));
    accept(app, key, preferences, Accepted { body, command, warnings: Vec::new() }, trace).await
}

/// Logs a command and responds.
pub(crate) async fn accept(
    app: &App,
    key: &ApiKey,
    preferences: Preferences,
    Accepted { body, mut command, mut warnings }: Accepted,
    trace: &mut RequestTrace,
) -> HandlerResult {
    let Preferences { client_key, waiting } = preferences;
    let broker = app.broker()?;
    let pending = PendingRequest { began: Instant::now(), bytes: body.len() };
    let mut claim = Claim { update_id: clock::new_id(), replayed: false };
    if let Some(client_key) = client_key {
        let record = record(&command, &body, claim.update_id);
        // Boxed, like everything that most requests do without: the runtime moves the handler's whole state several times.
        claim = Box::pin(app.idempotency.claim(&broker.js, key.project_id, &client_key, &record, pending)).await?;
    }
    let Claim { update_id, replayed } = claim;
    command.identify(update_id, Some(key.key_id));
    trace.span.update(update_id);
    let Logged { outcome, preference_applied, warning } =
        log(app, key.project_id, &command, claim, waiting, &trace.traceparent, pending.began).await?;
    warnings.extend(warning.map(str::to_owned));
    let message = match command.kind() {
        OutcomeKind::Update => "Lead update initiated",
        OutcomeKind::CallStarted => "Call start accepted",
        OutcomeKind::CallEnded => "Call end accepted",
        OutcomeKind::Erase => "Lead erasure accepted",
        // Not a command of clients.
        OutcomeKind::LeadCreated => "Lead creation accepted",
    };
    let accepted = UpdateAccepted { success: true, message: message.into(), update_id, warnings, outcome };
    let mut response = response::ok(&accepted)?;
    if let Some(applied) = preference_applied {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    if replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// A command that the log has.
pub(crate) struct Logged {
    /// The outcome, if the response waits for it and it came in time.
    pub(crate) outcome: Option<Outcome>,
    /// The preference that the response honors, with the outcome.
    pub(crate) preference_applied: Option<HeaderValue>,
    /// Why the response does not wait although the request prefers it.
    pub(crate) warning: Option<&'static str>,
}

/// Logs a command under the id of the claim, also if that was replayed: the first request's command may not have reached
/// the log. Waits for a leader of the log as long as a request may that began then.
pub(crate) async fn log(
    app: &App,
    project_id: ObjectId,
    command: &Command,
    claim: Claim,
    Waiting(waiting): Waiting,
    traceparent: &str,
    began: Instant,
) -> Result<Logged, ApiError> {
    let broker = app.broker()?;
    let entry = LogEntry::new(project_id, claim.update_id, command)?;
    let Some((wait, key_check)) = waiting else {
        app.command_log.append(&broker.commands, project_id, entry, traceparent, began).await?;
        return Ok(Logged { outcome: None, preference_applied: None, warning: None });
    };
    let pending = Box::pin(PendingOutcome::register(app, &broker.client, wait, project_id, claim)).await;
    app.command_log.append(&broker.commands, project_id, entry, traceparent, began).await?;
    let Some(pending) = pending else {
        return Ok(Logged { outcome: None, preference_applied: None, warning: Some(Warning::NOT_WAITED.template()) });
    };
    let outcome = Box::pin(pending.outcome(app, key_check)).await;
    let preference_applied = outcome.as_ref().and_then(|_| wait.applied());
    Ok(Logged { outcome, preference_applied, warning: None })
}

fn record(command: &Command, body: &[u8], update_id: ObjectId) -> IdempotencyRecord {
    let (version, state) = match command {
        Command::Update(update) => (update.expected_version, update.expected_state.as_deref()),
        Command::CallStarted(_) | Command::CallEnded(_) | Command::Erase(_) => (None, None),
    };
    IdempotencyRecord::new(command.kind(), body, version, state, update_id)
}

/// A response that waits for the outcome.
struct PendingOutcome<'a> {
    client: &'a Client,
    wait: Wait,
    waiter: OutcomeWaiter,
    project_id: ObjectId,
    claim: Claim,
}

impl<'a> PendingOutcome<'a> {
    /// Registers before the update is logged. None if too many requests wait: then this one does not.
    async fn register(app: &App, client: &'a Client, wait: Wait, project_id: ObjectId, claim: Claim) -> Option<Self> {
        let waiter = app.outcome_waiters.register(client, project_id, claim.update_id).await?;
        Some(Self { client, wait, waiter, project_id, claim })
    }

    /// The outcome, if it comes in time and while the key is valid.
    async fn outcome(mut self, app: &App, mut key_check: KeyCheck) -> Option<Outcome> {
        let limit = self.wait.duration();
        tokio::select! {
            _ = key_check.ended(&app.keys, &app.key_uses) => None,
            outcome = tokio::time::timeout(limit, self.announced_or_recorded()) => outcome.ok().flatten(),
        }
    }

    async fn announced_or_recorded(&mut self) -> Option<Outcome> {
        let query = GetUpdate { project_id: self.project_id, update_id: self.claim.update_id };
        let announced = async {
            let event: CompletionEvent = serde_json::from_slice(&self.waiter.event().await?).ok()?;
            Some(Outcome::from(event))
        };
        if !self.claim.replayed {
            return announced.await;
        }
        // It may have been announced before this request registered. Read once: a pending one will be announced.
        let recorded = async {
            let mut update = service_kit::rpc::request(self.client, &query).await.ok()?;
            Outcome::of(&mut update)
        };
        tokio::pin!(announced);
        tokio::select! {
            Some(outcome) = recorded => Some(outcome),
            outcome = &mut announced => outcome,
        }
    }
}
