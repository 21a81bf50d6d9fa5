//! Webhooks delivered and recorded per second, from a full stream of events to one fast callback.

use std::time::Instant;

use anyhow::ensure;
use async_nats::{HeaderMap, jetstream::message::OutboundMessage};
use contract::{
    ObjectId,
    event::{CompletionEvent, OutcomeKind},
    headers::{MESSAGE_ID, POSITION},
    streams::LEAD_EVENTS,
    subject,
};
use serde_json::json;
use service_kit::publisher::Publisher;

use super::{MemoryUsage, Plan, run_floor};
use crate::{
    load::{lead_id, random_lead, update_body},
    report::{Report, Target},
    stack::Stack,
};

pub(crate) const NAME: &str = "deliver";
pub(crate) const FLOOR: &str = "floor: a client that signs, posts and records nothing";
pub(crate) const RATIO: &str = "delivered, ratio to the floor";
/// Events in the stream per second of a run; more than the notifier delivers.
const MAX_RATE: u64 = 60_000;
pub(super) const DELIVERED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'";
/// Deliveries that took the retry path instead of being sent directly.
const DEFERRED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE updated_at > created_at OR status = 'pending'";

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 1000).await?;
    stack.lead_state.terminate().await;
    stack.gateway.terminate().await;
    let (mut ours, mut floors, mut memory) = (vec![], vec![], MemoryUsage::default());
    for _ in plan.runs(NAME) {
        let seconds = plan.duration.as_secs();
        floors.push(run_floor(&["client", &stack.endpoint.to_string(), &seconds.to_string()]).await?);

        stack.notifier.terminate().await;
        let js = service_kit::nats::jetstream(&stack.client);
        js.get_stream(LEAD_EVENTS).await?.purge().await?;
        fill_events(&stack, seconds * MAX_RATE).await?;
        stack.restart(|stack| &mut stack.notifier).await;
        let meter = stack.meter();
        let (before, start) = (stack.count(DELIVERED).await?, Instant::now());
        tokio::time::sleep(plan.duration).await;
        let (after, elapsed) = (stack.count(DELIVERED).await?, start.elapsed().as_secs_f64());
        let (usage, _) = meter.stop();
        let recorded = (after - before) as f64;
        ensure!(
            after - before < (seconds * MAX_RATE) as i64,
            "the notifier delivered all events before the end of the run; raise MAX_RATE"
        );
        report.detail(
            NAME,
            json!({"recorded": recorded, "deferred": stack.count(DEFERRED).await?, "seconds": elapsed, "usage": usage}),
        )?;
        ours.push(recorded / elapsed);
        memory.add(&usage);
        stack.driver.reset().await?;
    }
    let ours = ("delivered and recorded", ours);
    report.comparison(NAME, "/s", (FLOOR, floors), ours, (RATIO, Target::AtLeast(0.4)));
    memory.report(NAME, report);
    Ok(())
}

/// Publishes events, as lead-state does.
async fn fill_events(stack: &Stack, count: u64) -> anyhow::Result<()> {
    let js = service_kit::nats::jetstream(&stack.client);
    let events = (0..count).map(|number| {
        let now = service_kit::clock::now();
        let update_id = ObjectId::new(now, rand::random());
        let lead = random_lead(stack.leads);
        let command: serde_json::Value = serde_json::from_str(&update_body(lead, number)).unwrap_or_default();
        let event = CompletionEvent {
            process_id: Some(stack.process_id),
            lead_id: Some(lead_id(lead)),
            reference_id: Some(format!("crm-{lead}")),
            from_state: Some("interested".into()),
            to_state: Some("followup_2".into()),
            version: Some(2),
            user_id: Some("agent-0042".into()),
            data: contract::JsonObject::from_text(command["metadata"].to_string()).ok(),
            ..CompletionEvent::new(OutcomeKind::Update, stack.project_id, update_id, now)
        };
        let mut headers = HeaderMap::new();
        headers.insert(MESSAGE_ID, update_id.to_string());
        headers.insert(POSITION, format!("0.1.{}.0", number + 1));
        OutboundMessage {
            subject: subject::event(stack.project_id, Some(stack.process_id), event.kind, true).into(),
            headers: Some(headers),
            payload: serde_json::to_vec(&event).unwrap_or_default().into(),
        }
    });
    Publisher::new(js).publish_all(events).await?;
    Ok(())
}
