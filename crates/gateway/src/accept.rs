//! 1 Accept: logs an update, a call event or an erasure as a command, and responds.

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

/// How long a response waits for the outcome, and the API key that must stay valid meanwhile. None does not wait.
pub(crate) struct Waiting(Option<(Wait, KeyCheck)>);

impl Waiting {
    pub(crate) const NONE: Self = Self(None);

    pub(crate) fn of(headers: &HeaderMap) -> Self {
        Self(Wait::of(headers).map(|wait| (wait, KeyCheck::of(headers))))
    }
}

/// The `Idempotency-Key` and `Prefer` headers of a request.
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
    /// A repeated `Idempotency-Key` must come with the same body.
    pub(crate) body: Bytes,
    pub(crate) command: Command,
    /// Warnings about ignored fields of the body.
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
    fields::refuse_query(&request)?;
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
    fields::refuse_query(&request)?;
    if request.headers().contains_key(IF_MATCH) {
        return Err(ApiError::field(
            "If-Match",
            "applies to updates: an erasure does not depend on the lead's version",
        ));
    }
    let preferences = Preferences::of(request.headers())?;
    // The request has no body. The lead's id takes its place when an `Idempotency-Key` is repeated.
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
        // Boxed, like everything that most requests do without: the runtime moves the handler's whole state several
        // times.
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
        // Clients cannot send this command.
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

/// A logged command.
pub(crate) struct Logged {
    /// The outcome, if the response waited for it and it arrived in time.
    pub(crate) outcome: Option<Outcome>,
    /// The header `Preference-Applied`, set together with the outcome.
    pub(crate) preference_applied: Option<HeaderValue>,
    /// Why the response does not wait although the request prefers it.
    pub(crate) warning: Option<&'static str>,
}

/// Logs a command under the id of the claim. A replayed claim is logged as well: the first request's command may not
/// have reached the log. While the log has no leader, waits until the deadline of a request that began at `began`.
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
    /// Registers before the update is logged, so that its event is not missed. None if the response cannot wait, for
    /// example because too many do.
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
        // The event may have been announced before this request registered, so the update is read as well. One read is
        // enough: the event of a pending update is still to come.
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
