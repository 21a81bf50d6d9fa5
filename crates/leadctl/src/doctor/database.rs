//! Checks of Postgres.

use std::{collections::BTreeSet, time::Duration};

use async_nats::jetstream;
use contract::{Timestamp, streams::LEAD_COMMANDS};
use service_kit::{clock, postgres::Pool};
use sqlx::Row;
use time::OffsetDateTime;

use super::check::{Check, State, lag, skew};
use crate::clients::{postgres, stream_reader::age_of};

/// A delivery that is later than this is a warning: longer than the longest pause of a circuit breaker.
const LATE: Duration = Duration::from_secs(10 * 60);
/// lead-state deletes expired calls after a day.
const CALL_RETENTION: Duration = Duration::from_secs(25 * 60 * 60);
/// A change is projected before it is answered. A longer grace period hides a failing projection for longer.
const PROJECTION_GRACE: Duration = Duration::from_secs(5);
/// A healthy standby confirms a commit within milliseconds.
const MAX_REPLICATION_WAIT: Duration = Duration::from_secs(3);
/// Ids listed in a finding.
const MAX_LISTED: i64 = 10;

/// Checks the database, and with JetStream also its lag behind the log.
pub(super) async fn examine(url: &str, js: Option<&jetstream::Context>) -> Vec<Check> {
    let connect = async {
        let pool = postgres::pool(url)?;
        // Reports at once what the pool would wait for.
        drop(postgres::connect(&pool).await?);
        anyhow::Ok(pool)
    };
    let pool = match connect.await {
        Ok(pool) => pool,
        Err(e) => {
            let advice =
                "start Postgres, or correct --database-url; after a failover its address must lead to the new primary";
            return vec![Check::failed("postgres", format!("{e:#}"), advice)];
        }
    };
    let replication = match replication(&pool).await {
        Ok(check) => check,
        Err(e) => Check::unknown("replication", format!("{e:#}")),
    };
    let mut checks = match versions(&pool).await {
        Ok(checks) => checks,
        Err(e) => {
            return vec![Check::failed("postgres", format!("{e:#}"), "grant the user read access to both schemas")];
        }
    };
    let lacks_schema = checks.iter().any(|check| check.check.starts_with("schema") && check.state == State::Failed);
    if !lacks_schema {
        match state(&pool, js).await {
            Ok(more) => checks.extend(more.into_iter().map(|check| explain(check, &replication))),
            Err(e) => {
                checks.push(Check::failed("postgres", format!("{e:#}"), "grant the user read access to both schemas"))
            }
        }
    }
    checks.push(replication);
    checks
}

/// Commits that wait for a standby make backlogs grow, even if everything else works.
fn explain(check: Check, replication: &Check) -> Check {
    match (check.state, replication.state) {
        (State::Warning | State::Failed, State::Failed) => Check {
            advice: Some("repair the replication of Postgres first, see the check replication".into()),
            ..check
        },
        _ => check,
    }
}

/// Whether commits wait for a synchronous standby, and whether there is one.
async fn replication(pool: &Pool) -> anyhow::Result<Check> {
    // Postgres hides what the sessions of other roles wait for, unless the role may read all statistics.
    let (waiting, longest, hidden, names, standbys): (i64, f64, bool, String, i64) = sqlx::query_as(
        "SELECT count(*) FILTER (WHERE wait_event = 'SyncRep'),
                coalesce(max(extract(epoch FROM clock_timestamp() - state_change))
                             FILTER (WHERE wait_event = 'SyncRep'), 0)::float8,
                NOT pg_has_role('pg_read_all_stats', 'USAGE')
                    AND coalesce(bool_or(datname = current_database() AND NOT pg_has_role(usesysid, 'USAGE')), false),
                current_setting('synchronous_standby_names'), (SELECT count(*) FROM pg_stat_replication)
         FROM pg_stat_activity",
    )
    .fetch_one(pool)
    .await?;
    Ok(judge_replication(waiting, longest, hidden, &names, standbys))
}

/// Judges the replication. `hidden`: there are sessions of which this user cannot see whether they wait.
fn judge_replication(waiting: i64, longest: f64, hidden: bool, names: &str, standbys: i64) -> Check {
    let check = "replication";
    let connected = match standbys {
        0 => "no standby is connected".to_owned(),
        1 => "1 standby is connected".to_owned(),
        _ => format!("{standbys} standbys are connected"),
    };
    let advice = format!(
        "start the standby that synchronous_standby_names = '{names}' requires and look at its log; to go on without it, \
         accepting that a failure of the primary loses updates: ALTER SYSTEM SET synchronous_standby_names = '' and SELECT \
         pg_reload_conf() on the primary. Restarting services does not help"
    );
    if waiting > 0 && longest > MAX_REPLICATION_WAIT.as_secs_f64() {
        let finding =
            format!("{waiting} commits wait for a synchronous standby, the oldest for {longest:.0} s; {connected}");
        Check::failed(check, finding, advice)
    } else if standbys == 0 && !names.is_empty() {
        Check::failed(check, format!("{connected}, so that the next commit waits for one"), advice)
    } else if names.is_empty() {
        Check::ok(check, format!("{connected}, none of them synchronous"))
    } else if hidden {
        let finding = format!("{connected}; this user cannot see whether commits wait: GRANT pg_read_all_stats to it");
        Check::unknown(check, finding)
    } else {
        Check::ok(check, format!("{connected}, synchronous_standby_names = '{names}'"))
    }
}

async fn versions(pool: &Pool) -> anyhow::Result<Vec<Check>> {
    let sent = clock::now();
    let row = sqlx::query(
        "SELECT clock_timestamp(), current_setting('server_version'), current_setting('server_version_num')::int",
    )
    .fetch_one(pool)
    .await?;
    let received = clock::now();
    let (remote, version, number): (OffsetDateTime, String, i32) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let mut checks = vec![
        if number >= 140_000 {
            Check::ok("postgres version", version)
        } else {
            Check::failed("postgres version", version, "upgrade Postgres to 14 or later")
        },
        skew("Postgres", sent, remote.into(), received, 0.0),
    ];
    let lacking = [
        ("schema lead_state", lead_state::lacking_migrations(pool).await?),
        ("schema webhooks", webhook_notifier::lacking_migrations(pool).await?),
    ];
    for (schema, lacking) in lacking {
        checks.push(if lacking.is_empty() {
            Check::ok(schema, "up to date")
        } else {
            Check::failed(schema, format!("lacks migrations {lacking:?}"), "leadctl migrate")
        });
    }
    Ok(checks)
}

async fn state(pool: &Pool, js: Option<&jetstream::Context>) -> anyhow::Result<Vec<Check>> {
    let mut checks = vec![leader(pool).await?];
    if let Some(js) = js {
        checks.extend(behind(pool, js).await?);
    }
    checks.push(partitions(pool, clock::now()).await?);
    checks.push(projection(pool).await?);
    checks.push(callbacks(pool).await?);
    checks.push(parked_events(pool).await?);
    checks.push(late(pool).await?);
    checks.push(calls(pool).await?);
    checks.push(queued_updates(pool).await?);
    Ok(checks)
}

async fn leader(pool: &Pool) -> anyhow::Result<Check> {
    let leaders: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lead-state leader' AND datname = current_database()
         AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)",
    )
    .fetch_one(pool)
    .await?;
    Ok(match leaders {
        0 => Check::failed(
            "leader",
            "no replica of lead-state leads; updates wait in the log",
            "start lead-state; its log says why it does not lead",
        ),
        _ => Check::ok("leader", "present"),
    })
}

/// The backlogs of applying and announcing.
async fn behind(pool: &Pool, js: &jetstream::Context) -> anyhow::Result<Vec<Check>> {
    let checkpoint: Option<(i64, i64, i32, i32)> = sqlx::query_as(
        "SELECT last_sequence, announced_sequence, epoch, announced_epoch FROM lead_state.checkpoints WHERE stream = $1",
    )
    .bind(LEAD_COMMANDS)
    .fetch_optional(pool)
    .await?;
    let Some((applied, announced, epoch, announced_epoch)) = checkpoint else {
        return Ok(vec![Check::failed("log", "never read", "start lead-state")]);
    };
    let applied = u64::try_from(applied).unwrap_or_default();
    let mut checks = Vec::new();
    // If the log cannot be read, the check of the streams reports it.
    if let Ok(log) = js.get_stream(LEAD_COMMANDS).await {
        let state = &log.cached_info().state;
        let waiting = state.last_sequence.saturating_sub(applied);
        let first = state.first_sequence.max(applied + 1);
        let oldest = if waiting == 0 { None } else { age_of(&log, first).await };
        checks.push(lag(
            "log to apply",
            waiting,
            oldest,
            "see lead-state's log: it does not apply updates, or not fast enough",
        ));
    }
    let from = if announced_epoch < epoch { (announced_epoch, announced) } else { (epoch, announced) };
    let oldest: Option<(OffsetDateTime, i64)> = sqlx::query_as(
        "SELECT min(applied_at), count(*) FROM (
             SELECT applied_at FROM lead_state.lead_updates WHERE (log_epoch, log_sequence) > ($1, $2)
             ORDER BY log_epoch, log_sequence LIMIT 100000) AS waiting HAVING count(*) > 0",
    )
    .bind(from.0)
    .bind(from.1)
    .fetch_optional(pool)
    .await?;
    let (since, waiting) = match oldest {
        Some((at, count)) => {
            let millis = clock::now().millis() - Timestamp::from(at).millis();
            (
                Some(Duration::from_millis(u64::try_from(millis).unwrap_or_default())),
                u64::try_from(count).unwrap_or_default(),
            )
        }
        None => (None, 0),
    };
    checks.push(lag("updates to announce", waiting, since, "see lead-state's log: it cannot publish to LEAD_EVENTS"));
    Ok(checks)
}

/// The months that must have partitions: this one and the next.
fn due(now: Timestamp) -> [String; 2] {
    let now = OffsetDateTime::from(now);
    let (year, month) = (now.year(), u8::from(now.month()));
    let next = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
    [(year, month), next].map(|(year, month)| format!("{year:04}_{month:02}"))
}

async fn partitions(pool: &Pool, now: Timestamp) -> anyhow::Result<Check> {
    let there: BTreeSet<String> = sqlx::query_scalar(
        "SELECT child.relname::text FROM pg_inherits JOIN pg_class AS child ON child.oid = inhrelid
         JOIN pg_namespace AS n ON n.oid = child.relnamespace WHERE n.nspname IN ('lead_state', 'webhooks')",
    )
    .fetch_all(pool)
    .await?
    .into_iter()
    .collect();
    let tables = ["lead_updates", "deliveries", "attempts"];
    let missing: Vec<String> = due(now)
        .iter()
        .flat_map(|month| tables.map(|table| format!("{table}_{month}")))
        .filter(|name| !there.contains(name))
        .collect();
    Ok(if missing.is_empty() {
        Check::ok("partitions", "present for this month and the next")
    } else {
        Check::failed(
            "partitions",
            format!("{} missing; rows go to the default partition", missing.join(", ")),
            "lead-state creates those of lead_updates within seconds, webhook-notifier the others within the hour or at a \
             restart; their logs have the reason if they cannot",
        )
    })
}

/// Names the stored configuration that is not in the buckets, where the services read it.
async fn projection(pool: &Pool) -> anyhow::Result<Check> {
    let waiting: Vec<(String, i64)> = sqlx::query_as(
        "SELECT entry, count(*) OVER () FROM (
             SELECT 'the API key ' || encode(key_id, 'hex') AS entry, revision FROM lead_state.api_keys
             WHERE projected_revision < revision
             UNION ALL
             SELECT format('the process \"%s\" of project %s (%s bytes)', name, encode(project_id, 'hex'),
                           octet_length(config::text)), revision
             FROM lead_state.processes WHERE projected_revision < revision AND changed_at < $1) AS waiting
         ORDER BY revision LIMIT $2",
    )
    .bind(OffsetDateTime::from(clock::now().minus(PROJECTION_GRACE)))
    .bind(MAX_LISTED)
    .fetch_all(pool)
    .await?;
    let Some((_, all)) = waiting.first() else { return Ok(Check::ok("projection", "all configuration is in effect")) };
    let named: Vec<_> = waiting.iter().map(|(entry, _)| entry.as_str()).collect();
    Ok(Check::failed(
        "projection",
        format!("{all} stored and not in effect: {}", named.join(", ")),
        "the leader tries again every 10 s; its log says why it cannot: cannot project …",
    ))
}

/// Counts the events whose process cannot be read.
async fn parked_events(pool: &Pool) -> anyhow::Result<Check> {
    let parked: Vec<(String, i64, String)> = sqlx::query_as(
        "SELECT format('%s of process %s of project %s', count(*), coalesce(nullif(encode(process_id, 'hex'), ''), '_'),
                       encode(project_id, 'hex')), count(*), min(reason)
         FROM (SELECT project_id, process_id, reason FROM webhooks.parked_events LIMIT 100000) AS events
         GROUP BY project_id, process_id ORDER BY 2 DESC LIMIT $1",
    )
    .bind(MAX_LISTED)
    .fetch_all(pool)
    .await?;
    let Some((_, _, reason)) = parked.first() else { return Ok(Check::ok("parked events", "none")) };
    let named: Vec<_> = parked.iter().map(|(events, ..)| events.as_str()).collect();
    Ok(Check::failed(
        "parked events",
        format!("{}: {reason}", named.join(", ")),
        "restart the leader of lead-state: it writes every entry of the bucket processes again; the events are then \
         delivered within seconds",
    ))
}

async fn callbacks(pool: &Pool) -> anyhow::Result<Check> {
    let disabled: Vec<(String, String, i64)> = sqlx::query_as(
        "SELECT encode(callback_id, 'hex'), reason, count(*) OVER () FROM webhooks.callback_health
         WHERE enabled_at IS NULL ORDER BY disabled_at LIMIT $1",
    )
    .bind(MAX_LISTED)
    .fetch_all(pool)
    .await?;
    let Some((_, _, all)) = disabled.first() else {
        let paused: i64 = sqlx::query_scalar("SELECT count(*) FROM webhooks.paused_callbacks").fetch_one(pool).await?;
        return Ok(Check::ok("callbacks", format!("none disabled, {paused} paused")));
    };
    let named: Vec<_> = disabled.iter().map(|(callback_id, reason, _)| format!("{callback_id} ({reason})")).collect();
    Ok(Check::warning(
        "callbacks",
        format!("{all} disabled: {}", named.join(", ")),
        "repair the endpoint, then run leadctl callback enable CALLBACK_ID",
    ))
}

async fn late(pool: &Pool) -> anyhow::Result<Check> {
    let late: Vec<(String, i64)> = sqlx::query_as(
        "SELECT encode(d.callback_id, 'hex'), count(*) FROM (
             SELECT callback_id FROM webhooks.deliveries
             WHERE status = 'pending' AND next_attempt_at < $1
               AND callback_id NOT IN (
                   SELECT callback_id FROM webhooks.callback_health WHERE enabled_at IS NULL
                   UNION ALL SELECT callback_id FROM webhooks.paused_callbacks
                   UNION ALL SELECT decode(c->>'callbackId', 'hex')
                   FROM lead_state.processes AS p, json_array_elements(p.config->'callbacks') AS c
                   WHERE c->>'enabled' = 'false')
             LIMIT 100000) AS d GROUP BY 1 ORDER BY 2 DESC LIMIT $2",
    )
    .bind(OffsetDateTime::from(clock::now().minus(LATE)))
    .bind(MAX_LISTED)
    .fetch_all(pool)
    .await?;
    if late.is_empty() {
        return Ok(Check::ok("deliveries", "none late"));
    }
    let named: Vec<_> = late.iter().map(|(callback_id, count)| format!("{count} to {callback_id}")).collect();
    Ok(Check::warning(
        "deliveries",
        format!("more than {} minutes late: {}", LATE.as_secs() / 60, named.join(", ")),
        "their endpoints do not answer or are too slow for their load; repair them, or start more webhook-notifiers",
    ))
}

async fn calls(pool: &Pool) -> anyhow::Result<Check> {
    let kept: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM lead_state.active_calls c WHERE expires_at < $1
             AND NOT EXISTS (SELECT FROM lead_state.queued_updates h WHERE h.lead_id = c.lead_id)",
    )
    .bind(OffsetDateTime::from(clock::now().minus(CALL_RETENTION)))
    .fetch_one(pool)
    .await?;
    Ok(match kept {
        0 => Check::ok("calls", "no expired call is left over"),
        _ => Check::warning(
            "calls",
            format!("{kept} expired more than a day ago and were not deleted"),
            "lead-state's housekeeping does not run; see its log",
        ),
    })
}

async fn queued_updates(pool: &Pool) -> anyhow::Result<Check> {
    let leads: i64 = sqlx::query_scalar(
        "SELECT count(DISTINCT h.lead_id) FROM lead_state.queued_updates h
         WHERE NOT EXISTS (SELECT FROM lead_state.active_calls c WHERE c.lead_id = h.lead_id AND c.expires_at > $1)",
    )
    .bind(OffsetDateTime::from(clock::now().minus(LATE)))
    .fetch_one(pool)
    .await?;
    Ok(match leads {
        0 => Check::ok("queued updates", "none outlives its call"),
        _ => Check::warning(
            "queued updates",
            format!(
                "of {leads} leads are still queued, although their calls expired more than {} minutes ago",
                LATE.as_secs() / 60
            ),
            "the log is full or lead-state is behind: see the checks of the log above, and lead-state's log",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replication_is_unknown_if_waiting_commits_may_be_hidden() {
        let state = |waiting, longest, hidden, names, standbys| {
            judge_replication(waiting, longest, hidden, names, standbys).state
        };

        assert_eq!(state(0, 0.0, false, "standby", 1), State::Ok);
        assert_eq!(state(0, 0.0, true, "standby", 1), State::Unknown);
        assert_eq!(state(0, 0.0, true, "", 0), State::Ok, "no commit waits for a standby");
        assert_eq!(state(1, 3.5, true, "standby", 1), State::Failed);
        assert_eq!(state(0, 0.0, true, "standby", 0), State::Failed);
    }

    #[test]
    fn december_is_followed_by_january_of_the_next_year() {
        let due = |text| due(crate::arguments::parse_time(text).unwrap());
        assert_eq!(due("2026-01-31T23:59:59Z"), ["2026_01", "2026_02"]);
        assert_eq!(due("2026-12-01T00:00:00Z"), ["2026_12", "2027_01"]);
    }
}
