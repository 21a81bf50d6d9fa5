//! An update's timeline as text: request, outcome, deliveries and attempts.

use std::{collections::BTreeMap, fmt::Write};

use contract::{ObjectId, event::OutcomeKind, rpc::DeliveryStatus};
use http_api::{Attempt, Delivery, UpdateTimeline};
use service_kit::escape::escaped_line;

/// Progress of an update's deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeliveryProgress {
    /// At least one is pending or not recorded yet, the event is parked, or this is not known.
    Pending,
    /// All are delivered, or there is none.
    Delivered,
    /// At least one is exhausted.
    Exhausted,
}

impl DeliveryProgress {
    pub(crate) fn of(timeline: &UpdateTimeline) -> Self {
        let Some(deliveries) = &timeline.deliveries else { return Self::Pending };
        let any = |status| deliveries.iter().any(|delivery| delivery.status == status);
        match () {
            // Without a count, a delivery may be missing among those that are recorded.
            () if timeline.parked.is_some() || timeline.unrecorded != Some(0) => Self::Pending,
            () if any(DeliveryStatus::Pending) => Self::Pending,
            () if any(DeliveryStatus::Exhausted) => Self::Exhausted,
            () => Self::Delivered,
        }
    }
}

/// Renders a timeline, one fact per line. Callbacks without a name in `names` are shown by id.
pub(crate) fn render(timeline: &UpdateTimeline, names: &BTreeMap<ObjectId, String>) -> String {
    let kind = timeline.outcome.as_ref().map_or(OutcomeKind::Update, |outcome| outcome.action_type);
    let mut text = format!("{kind} {} {}", timeline.update_id, timeline.status);
    let mut line = |name: &str, value: &str| {
        let _ = write!(text, "\n  {name:<12}{}", escaped_line(value));
    };
    if let Some(outcome) = &timeline.outcome {
        if let Some(error) = &outcome.error {
            let code = timeline.error_code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
            line("error", &format!("{error}{code}"));
        }
        let ids = [outcome.lead_id.map(|id| id.to_string()), outcome.reference_id.clone()];
        line("lead", &ids.into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
    match (&timeline.from_state, &timeline.to_state) {
        (Some(from), Some(to)) if from != to => line("state", &format!("{from} → {to}")),
        (Some(state), _) => line("state", &format!("{state} (unchanged)")),
        _ => {}
    }
    let fields = [
        ("version", timeline.version.map(|version| version.to_string())),
        ("request", timeline.command.as_ref().map(|command| command.get().to_owned())),
        ("user", timeline.user_id.clone()),
        ("API key", timeline.api_key_id.map(|id| id.to_string())),
        ("logged", timeline.logged_at.map(|at| at.to_string())),
        ("applied", timeline.applied_at.map(|at| at.to_string())),
        ("queued", timeline.queued_until.map(|at| format!("until the call ends, or expires at {at}"))),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            line(name, &value);
        }
    }
    for warning in &timeline.warnings {
        line("warning", warning);
    }
    if let Some(parked) = &timeline.parked {
        line("parked", &format!("since {}: {}", parked.since, parked.reason));
    }
    let Some(deliveries) = &timeline.deliveries else {
        line("deliveries", "unknown: webhook-notifier does not answer");
        return text;
    };
    for delivery in deliveries {
        let name = names.get(&delivery.callback_id).cloned();
        let name = name.unwrap_or_else(|| delivery.callback_id.to_string());
        let kind = if delivery.kind.is_update() { String::new() } else { format!(" {}", delivery.kind) };
        line("callback", &format!("{name}{kind}: {}", delivery_status(delivery)));
        for attempt in &delivery.attempts {
            line("", &attempt_line(attempt));
        }
    }
    if let Some(count @ 1..) = timeline.unrecorded {
        line("deliveries", &format!("{count} not recorded yet: the first attempts have not ended"));
    }
    text
}

fn delivery_status(delivery: &Delivery) -> String {
    match (delivery.status, delivery.next_attempt_at) {
        (DeliveryStatus::Delivered, _) => "delivered".to_owned(),
        (DeliveryStatus::Exhausted, _) => "exhausted".to_owned(),
        (DeliveryStatus::Pending, Some(at)) => format!("pending, next attempt at {at}"),
        (DeliveryStatus::Pending, None) => "pending".to_owned(),
    }
}

fn attempt_line(attempt: &Attempt) -> String {
    let Attempt { number, started_at, duration_ms, status_code, error, response } = attempt;
    let result = match (status_code, error) {
        (_, Some(error)) => error.clone(),
        (Some(status), None) => status.to_string(),
        (None, None) => "no answer".to_owned(),
    };
    let response = response.as_deref().filter(|body| !body.is_empty());
    let response = response.map(|body| format!(": {body:?}")).unwrap_or_default();
    format!("attempt {number} at {started_at}, {duration_ms} ms: {result}{response}")
}

#[cfg(test)]
mod tests {
    use http_api::TimelineResponse;

    use super::*;

    #[test]
    fn a_failed_update_is_rendered_with_its_attempts() {
        let response: TimelineResponse = serde_json::from_str(
            r#"{"success":true,"data":{"updateId":"6b0426971c73026dafa27e40","status":"failed",
                "command":{"targetState":"lost"},"outcome":{"action_type":"update","updateId":"6b0426971c73026dafa27e40",
                "success":false,"error":"No","leadId":"696102a4b8c1d2e3f4a5b6c7","referenceId":"R","timestamp":5,
                "data":null},"errorCode":"no","warnings":["w"],"fromState":"new","toState":"new","version":2,
                "userId":"u","apiKeyId":null,"loggedAt":"2026-01-12T09:00:00.000Z","appliedAt":"2026-01-12T09:00:01.000Z",
                "deliveries":[{"callbackId":"696102a4b8c1d2e3f4a5b604","status":"pending",
                "nextAttemptAt":"2026-01-12T09:00:09.000Z","attempts":[{"number":1,"startedAt":"2026-01-12T09:00:02.000Z",
                "durationMs":12,"statusCode":500,"error":"the endpoint answered 500","response":"oh"}]}],
                "parked":{"since":"2026-01-12T09:00:02.000Z","reason":"cannot read the process"}}}"#,
        )
        .unwrap();
        insta::assert_snapshot!(render(&response.data, &BTreeMap::new()), @r#"
        update 6b0426971c73026dafa27e40 failed
          error       No (no)
          lead        696102a4b8c1d2e3f4a5b6c7, R
          state       new (unchanged)
          version     2
          request     {"targetState":"lost"}
          user        u
          logged      2026-01-12T09:00:00.000Z
          applied     2026-01-12T09:00:01.000Z
          warning     w
          parked      since 2026-01-12T09:00:02.000Z: cannot read the process
          callback    696102a4b8c1d2e3f4a5b604: pending, next attempt at 2026-01-12T09:00:09.000Z
                      attempt 1 at 2026-01-12T09:00:02.000Z, 12 ms: the endpoint answered 500: "oh"
        "#);
        assert_eq!(DeliveryProgress::of(&response.data), DeliveryProgress::Pending);
    }

    #[test]
    fn a_delivery_that_is_not_recorded_is_pending() {
        let progress = |deliveries: &str| {
            let timeline = format!(
                r#"{{"updateId":"6b0426971c73026dafa27e40","status":"succeeded","command":null,"outcome":null,
                    "errorCode":null,"warnings":[],"fromState":null,"toState":null,"version":null,"userId":null,
                    "apiKeyId":null,"loggedAt":null,"appliedAt":null,{deliveries}}}"#
            );
            DeliveryProgress::of(&serde_json::from_str(&timeline).unwrap())
        };
        let delivered = r#"[{"callbackId":"696102a4b8c1d2e3f4a5b604","status":"delivered","attempts":[]}]"#;
        let exhausted = delivered.replace("delivered", "exhausted");

        assert_eq!(progress(r#""deliveries":[],"unrecorded":0"#), DeliveryProgress::Delivered);
        assert_eq!(progress(&format!(r#""deliveries":{delivered},"unrecorded":0"#)), DeliveryProgress::Delivered);
        assert_eq!(progress(&format!(r#""deliveries":{exhausted},"unrecorded":0"#)), DeliveryProgress::Exhausted);
        for pending in [
            format!(r#""deliveries":{delivered},"unrecorded":1"#),
            format!(r#""deliveries":{delivered}"#),
            r#""deliveries":[],"unrecorded":1"#.to_owned(),
            r#""deliveries":[]"#.to_owned(),
            r#""deliveries":null"#.to_owned(),
        ] {
            assert_eq!(progress(&pending), DeliveryProgress::Pending, "{pending}");
        }
    }
}
