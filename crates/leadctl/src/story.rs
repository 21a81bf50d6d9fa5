//! An update's story, as the gateway tells it and as a person wants to read it.

use std::{collections::BTreeMap, fmt::Write};

use contract::{
    ObjectId,
    rpc::{DeliveryStatus, UpdateStatus},
};
use serde::Deserialize;
use serde_json::value::RawValue;

/// The answer of `GET /api/v1/updates/{updateId}`.
#[derive(Deserialize)]
pub(crate) struct Found {
    pub(crate) data: Story,
}

/// What became of an update.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Story {
    pub(crate) update_id: ObjectId,
    pub(crate) status: UpdateStatus,
    command: Option<Box<RawValue>>,
    outcome: Option<Outcome>,
    pub(crate) error_code: Option<String>,
    #[serde(default)]
    warnings: Vec<String>,
    from_state: Option<String>,
    to_state: Option<String>,
    version: Option<i64>,
    user_id: Option<String>,
    api_key_id: Option<ObjectId>,
    queued_until: Option<String>,
    logged_at: Option<String>,
    applied_at: Option<String>,
    deliveries: Option<Vec<Delivery>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    error: Option<String>,
    lead_id: Option<ObjectId>,
    reference_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Delivery {
    callback_id: ObjectId,
    status: DeliveryStatus,
    next_attempt_at: Option<String>,
    attempts: Vec<Attempt>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attempt {
    number: u32,
    started_at: String,
    duration_ms: u32,
    status_code: Option<u16>,
    error: Option<String>,
    response: Option<String>,
}

/// Whether the callbacks know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// There are no deliveries: no callbacks, or not yet.
    None,
    /// Something is still to come, or not known.
    Waiting,
    /// All of them do.
    All,
    /// One of them does not, and will not.
    GivenUp,
}

impl Story {
    /// Why it failed.
    pub(crate) fn error(&self) -> Option<&str> {
        self.outcome.as_ref()?.error.as_deref()
    }

    /// Whether the callbacks know.
    pub(crate) fn told(&self) -> Told {
        let Some(deliveries) = &self.deliveries else { return Told::Waiting };
        let any = |status| deliveries.iter().any(|one| one.status == status);
        match () {
            () if deliveries.is_empty() => Told::None,
            () if any(DeliveryStatus::Pending) => Told::Waiting,
            () if any(DeliveryStatus::Exhausted) => Told::GivenUp,
            () => Told::All,
        }
    }

    /// Whether every callback was told.
    pub(crate) fn is_told(&self, callbacks: usize) -> bool {
        self.deliveries.as_ref().is_some_and(|deliveries| {
            deliveries.len() >= callbacks && deliveries.iter().all(|one| one.status == DeliveryStatus::Delivered)
        })
    }

    /// The story, a line each; callbacks by their names where those are known.
    pub(crate) fn tell(&self, names: &BTreeMap<ObjectId, String>) -> String {
        let mut text = format!("update {} {}", self.update_id, status(self.status));
        let mut line = |name: &str, value: &str| {
            let _ = write!(text, "\n  {name:<12}{value}");
        };
        if let Some(outcome) = &self.outcome {
            if let Some(error) = &outcome.error {
                let code = self.error_code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
                line("error", &format!("{error}{code}"));
            }
            let names = [outcome.lead_id.map(|id| id.to_string()), outcome.reference_id.clone()];
            line("lead", &names.into_iter().flatten().collect::<Vec<_>>().join(", "));
        }
        match (&self.from_state, &self.to_state) {
            (Some(from), Some(to)) if from != to => line("state", &format!("{from} → {to}")),
            (Some(state), _) => line("state", &format!("{state} (stays)")),
            _ => {}
        }
        if let Some(version) = self.version {
            line("version", &version.to_string());
        }
        if let Some(command) = &self.command {
            line("asked", command.get());
        }
        if let Some(user) = &self.user_id {
            line("by", user);
        }
        if let Some(key) = &self.api_key_id {
            line("API key", &key.to_string());
        }
        for (name, at) in [("logged", &self.logged_at), ("applied", &self.applied_at)] {
            if let Some(at) = at {
                line(name, at);
            }
        }
        if let Some(until) = &self.queued_until {
            line("held", &format!("until the call ends, or expires at {until}"));
        }
        for warning in &self.warnings {
            line("warning", warning);
        }
        match &self.deliveries {
            None => line("callbacks", "webhook-notifier does not answer"),
            Some(deliveries) => {
                for delivery in deliveries {
                    let name = names.get(&delivery.callback_id).cloned();
                    let name = name.unwrap_or_else(|| delivery.callback_id.to_string());
                    line("callback", &format!("{name}: {}", delivery.standing()));
                    for attempt in &delivery.attempts {
                        line("", &attempt.tell());
                    }
                }
            }
        }
        text
    }
}

impl Delivery {
    fn standing(&self) -> String {
        match (self.status, &self.next_attempt_at) {
            (DeliveryStatus::Delivered, _) => "delivered".to_owned(),
            (DeliveryStatus::Exhausted, _) => "given up".to_owned(),
            (DeliveryStatus::Pending, Some(at)) => format!("waiting, next attempt at {at}"),
            (DeliveryStatus::Pending, None) => "waiting".to_owned(),
        }
    }
}

impl Attempt {
    fn tell(&self) -> String {
        let Self { number, started_at, duration_ms, .. } = self;
        let what = match (self.status_code, &self.error) {
            (_, Some(error)) => error.clone(),
            (Some(status), None) => status.to_string(),
            (None, None) => "no answer".to_owned(),
        };
        let response = self.response.as_deref().filter(|body| !body.is_empty());
        let response = response.map(|body| format!(": {body:?}")).unwrap_or_default();
        format!("attempt {number} at {started_at}, {duration_ms} ms: {what}{response}")
    }
}

/// In a word.
pub(crate) fn status(status: UpdateStatus) -> &'static str {
    match status {
        UpdateStatus::Pending => "pending",
        UpdateStatus::Succeeded => "succeeded",
        UpdateStatus::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_update_with_a_retry() {
        let found: Found = serde_json::from_str(
            r#"{"success":true,"data":{"updateId":"6b0426971c73026dafa27e40","status":"failed",
                "command":{"targetState":"lost"},"outcome":{"action_type":"update","success":false,"error":"No",
                "leadId":"696102a4b8c1d2e3f4a5b6c7","referenceId":"R"},"errorCode":"no","warnings":["w"],
                "fromState":"new","toState":"new","version":2,"userId":"u","apiKeyId":null,"loggedAt":"T1",
                "appliedAt":"T2","deliveries":[{"callbackId":"696102a4b8c1d2e3f4a5b604","status":"pending",
                "nextAttemptAt":"T4","attempts":[{"number":1,"startedAt":"T3","durationMs":12,"statusCode":500,
                "error":"the endpoint answered 500","response":"oh"}]}]}}"#,
        )
        .unwrap();
        let expected = "update 6b0426971c73026dafa27e40 failed\n  error       No (no)\n  lead        \
                        696102a4b8c1d2e3f4a5b6c7, R\n  state       new (stays)\n  version     2\n  asked       \
                        {\"targetState\":\"lost\"}\n  by          u\n  logged      T1\n  applied     T2\n  \
                        warning     w\n  callback    696102a4b8c1d2e3f4a5b604: waiting, next attempt at T4\n              \
                        attempt 1 at T3, 12 ms: the endpoint answered 500: \"oh\"";
        assert_eq!(found.data.tell(&BTreeMap::new()), expected);
        assert!(!found.data.is_told(1));
        assert_eq!(found.data.told(), Told::Waiting);
    }
}
