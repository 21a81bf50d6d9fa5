//! Failover of replicated servers, as in production.

mod nats;
mod patroni;
mod postgres;

use std::time::Duration;

use contract::ObjectId;
use sqlx::PgPool;

use crate::support::{DELIVERED, Load, Stack, TEST_TIMEOUT, assert_exactly_once, longest_gap};

/// The number of leads: several, so that a batch has updates of several leads.
const LEADS: usize = 4;

/// Starts updates in the background, and waits until some of them are applied and delivered.
async fn load(stack: &Stack) -> Load {
    let load = Load::start(&stack.api, stack.leads(&["crm"], LEADS).await);
    load.wait_for_more_applied(&stack.api, 20).await;
    stack.receiver.wait_for_requests("/crm", 20, TEST_TIMEOUT).await;
    load
}

/// Waits until further updates of the load are applied and delivered.
async fn wait_for_progress(stack: &Stack, load: &Load) {
    load.wait_for_more_applied(&stack.api, 10).await;
    let delivered = stack.receiver.requests().len();
    stack.receiver.wait_for_requests("/crm", delivered + 10, TEST_TIMEOUT).await;
}

/// Stops and starts one service after the other, without waiting until they are ready.
async fn restart_services(stack: &mut Stack, load: &Load) {
    for service in [&mut stack.lead_state, &mut stack.notifier, &mut stack.gateway] {
        service.restart().await;
    }
    load.wait_for_more(5).await;
}

/// Ends the load, checks that nothing was lost, and prints the gaps.
async fn check(stack: &mut Stack, load: Load, fault: &str) {
    let accepting = load.longest_gap();
    let accepted = load.end().await;
    stack.wait_until_ready().await;
    stack.wait_for_clean_audit().await;
    stack.wait_for_count(DELIVERED, accepted.len() as i64).await;
    let requests = stack.receiver.requests();
    assert_exactly_once(&stack.pool, stack.api.project_id, &accepted, &requests).await;
    let applying = longest_application_gap(&stack.pool, stack.api.project_id).await;
    let delivering = longest_gap(requests.iter().map(|request| request.received_at).collect());
    println!("gaps: {fault}: accepting {accepting:.1?}, applying {applying:.1?}, delivering {delivering:.1?}");
}

async fn longest_application_gap(pool: &PgPool, project: ObjectId) -> Duration {
    let sql = "SELECT coalesce(max(extract(epoch FROM gap)), 0)::float8
               FROM (SELECT applied_at - lag(applied_at) OVER (ORDER BY applied_at) AS gap
                     FROM lead_state.lead_updates WHERE project_id = $1) AS g";
    let seconds = sqlx::query_scalar(sql).bind(project.as_bytes()).fetch_one(pool).await.expect(sql);
    Duration::from_secs_f64(seconds)
}
