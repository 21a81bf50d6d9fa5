//! The outcomes of updates, from the gateway's events and timelines.

use contract::{ObjectId, rpc::UpdateStatus};
use http_api::{Event, TimelineResponse};

use crate::{
    clients::gateway::{GatewayClient, GatewayResponse},
    exit_status::is_unavailable,
    import::send::{Patience, RETRY_DELAY},
};

/// Longer error texts are cut.
const MAX_ERROR_CHARS: usize = 500;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) update_id: ObjectId,
    pub(crate) lead_id: Option<ObjectId>,
    /// The error text; none if the update succeeded.
    pub(crate) error: Option<String>,
    pub(crate) code: Option<String>,
}

impl From<Event> for Outcome {
    fn from(Event { outcome, error_code }: Event) -> Self {
        let error = (!outcome.success).then(|| shorten(&outcome));
        Self { update_id: outcome.update_id, lead_id: outcome.lead_id, error, code: error_code }
    }
}

fn shorten(outcome: &http_api::Outcome) -> String {
    outcome.error.as_deref().unwrap_or_default().chars().take(MAX_ERROR_CHARS).collect()
}

/// Requests the outcome of an update, for a while if the gateway is unavailable; none while the update is pending.
pub(crate) async fn request_outcome(gateway: &GatewayClient, update_id: ObjectId) -> anyhow::Result<Option<Outcome>> {
    let mut patience = Patience::default();
    loop {
        let (after, error) = match gateway.get(&format!("/api/v1/updates/{update_id}")).await {
            Ok(answer) if answer.may_pass() => (answer.retry_after, answer.error()),
            Ok(answer) => return outcome_of(update_id, &answer),
            Err(error) if is_unavailable(&error) => (None, error),
            Err(error) => return Err(error),
        };
        patience.pause(after.unwrap_or(RETRY_DELAY), error, 0).await?;
    }
}

fn outcome_of(update_id: ObjectId, answer: &GatewayResponse) -> anyhow::Result<Option<Outcome>> {
    let TimelineResponse { data, .. } = answer.json()?;
    let error = match data.status {
        UpdateStatus::Pending => return Ok(None),
        UpdateStatus::Succeeded => None,
        UpdateStatus::Failed => Some(data.outcome.as_ref().map(shorten).unwrap_or_default()),
    };
    Ok(Some(Outcome { update_id, lead_id: None, error, code: data.error_code }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_parsed_from_events() {
        let event = r#"{"action_type":"update","updateId":"010101010101010101010101","success":false,"error":"no","leadId":null,"timestamp":1,"data":null,"errorCode":"c"}"#;
        let parsed = |text: &str| Outcome::from(serde_json::from_str::<Event>(text).unwrap());
        let failed = Outcome {
            update_id: ObjectId::from_bytes([1; 12]),
            lead_id: None,
            error: Some("no".into()),
            code: Some("c".into()),
        };
        assert_eq!(parsed(event), failed);
        let succeeded = event.replace("false", "true").replace("\"c\"", "null");
        assert_eq!(parsed(&succeeded), Outcome { error: None, code: None, ..failed });
    }
}
