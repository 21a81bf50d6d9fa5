//! 7 Deliver: webhooks delivered and recorded in a second, from a full stream of events to one fast callback.

use std::time::Instant;

use anyhow::ensure;
use async_nats::{HeaderMap, jetstream::message::OutboundMessage};
use contract::{ObjectId, event::CompletionEvent, headers, streams::LEAD_EVENTS, subject};
use serde_json::json;
use service_kit::publisher::Publisher;

use super::{Memory, Plan, floor};
use crate::{
    load::{any_lead, body, lead_id},
    report::{Report, Target, ratios},
    stack::Stack,
};

pub(crate) const NAME: &str = "deliver";
pub(crate) const FLOOR: &str = "floor: a client that signs, posts and records nothing";
pub(crate) const RATIO: &str = "delivered, ratio to the floor";
/// Events a second to have in the stream, so that it does not run empty.
const AT_MOST: u64 = 60_000;
const DELIVERED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'delivered'";
/// What did not go straight off its event.
const SPILLED: &str = "SELECT count(*) FROM webhooks.deliveries WHERE updated_at > created_at OR status = 'pending'";

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let mut stack = Stack::start(false, 1000).await?;
    stack.lead_state.terminate().await;
    stack.gateway.terminate().await;
    let (mut ours, mut floors, mut memory) = (vec![], vec![], Memory::default());
    for _ in plan.runs(NAME) {
        let seconds = plan.lasting.as_secs();
        floors.push(floor(&["client", &stack.endpoint.to_string(), &seconds.to_string()].map(str::to_owned)).await?);

        stack.notifier.terminate().await;
        let js = service_kit::nats::jetstream(&stack.client);
        js.get_stream(LEAD_EVENTS).await?.purge().await?;
        fill_events(&stack, seconds * AT_MOST).await?;
        stack.restart(|stack| &mut stack.notifier).await;
        let meter = stack.meter();
        let (before, begun) = (stack.count(DELIVERED).await?, Instant::now());
        tokio::time::sleep(plan.lasting).await;
        let (after, took) = (stack.count(DELIVERED).await?, begun.elapsed().as_secs_f64());
        let (taken, _) = meter.stop();
        let recorded = (after - before) as f64;
        ensure!(after - before < (seconds * AT_MOST) as i64, "the stream ran empty");
        report.detail(
            NAME,
            json!({"recorded": recorded, "spilled": stack.count(SPILLED).await?, "seconds": took, "taken": taken}),
        )?;
        ours.push(recorded / took);
        memory.note(&taken);
        stack.driver.reset().await?;
    }
    let ratios = ratios(&ours, &floors);
    report.figure(NAME, FLOOR, "/s", floors, None);
    report.figure(NAME, "delivered and recorded", "/s", ours, None);
    report.figure(NAME, RATIO, "x", ratios, Target::AtLeast(0.4));
    memory.tell(NAME, report);
    Ok(())
}

/// Puts events into their stream, as lead-state does.
pub(crate) async fn fill_events(stack: &Stack, count: u64) -> anyhow::Result<()> {
    let js = service_kit::nats::jetstream(&stack.client);
    let events = (0..count).map(|number| {
        let now = service_kit::clock::now();
        let update_id = ObjectId::new(now, rand::random());
        let lead = any_lead(stack.leads);
        let command: serde_json::Value = serde_json::from_str(&body(lead, number)).unwrap_or_default();
        let event = CompletionEvent {
            update_id,
            project_id: stack.project_id,
            process_id: Some(stack.process_id),
            lead_id: Some(lead_id(lead)),
            reference_id: Some(format!("crm-{lead}")),
            success: true,
            error: None,
            error_code: None,
            from_state: Some("interested".into()),
            to_state: Some("followup_2".into()),
            version: Some(2),
            user_id: Some("agent-0042".into()),
            warnings: Vec::new(),
            timestamp: now,
            data: contract::JsonObject::from_text(command["metadata"].to_string()).ok(),
        };
        let mut map = HeaderMap::new();
        map.insert(headers::MESSAGE_ID, update_id.to_string());
        map.insert(headers::POSITION, format!("0.1.{}.0", number + 1));
        OutboundMessage {
            subject: subject::event(stack.project_id, Some(stack.process_id), true).into(),
            headers: Some(map),
            payload: serde_json::to_vec(&event).unwrap_or_default().into(),
        }
    });
    Publisher::new(js).publish_all(events).await?;
    Ok(())
}
