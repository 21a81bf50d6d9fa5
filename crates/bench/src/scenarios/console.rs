//! The time of every page of the console, and of every list and search of the HTTP API, with many leads, updates and
//! deliveries.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use contract::{ObjectId, Timestamp};
use reqwest::{
    RequestBuilder,
    header::{CONTENT_TYPE, COOKIE, ORIGIN, SET_COOKIE},
};
use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection};
use test_support::{Service, binary, free_port, http_client};

use super::{
    Plan, progress,
    scale::{build_indexes, drop_indexes},
};
use crate::{
    latency,
    load::lead_id,
    report::{Report, Target},
    stack::{Stack, TIMEOUT, apply_process},
};

const NAME: &str = "console";
/// The leads that the stack starts with.
const FEW: u64 = 1_000;
const UPDATES_PER_LEAD: u64 = 5;
/// How many days the updates are spread over.
const DAYS: i64 = 30;
/// Requests of each page, and how many are sent before they are measured.
const REQUESTS: usize = 60;
const WARM_UP: usize = 3;
/// The pause between two pages of the console, whose visitors may open 20 a second.
const PAUSE: Duration = Duration::from_millis(60);
/// The target of a page's median, in ms.
const MOST: f64 = 100.0;

/// Lists and searches of the HTTP API. A name in braces stands for a value of the lead that the request is about.
const LISTS: &[(&str, &str)] = &[
    ("leads", "leads"),
    ("leads by id", "leads?q={lead}"),
    ("leads by reference", "leads?q={reference}"),
    ("leads by e-mail", "leads?q={email}"),
    ("leads by digits of the phone", "leads?q={digits}"),
    ("leads by name", "leads?q={name}"),
    ("leads by a name that 5 000 have", "leads?q={first}"),
    ("leads by a name, in a rare state", "leads?q={first}&state=lost"),
    ("leads of a process", "leads?processId={process}"),
    ("leads in a rare state", "leads?state=lost"),
    ("leads in a state that none is in", "leads?state=sold"),
    ("leads changed within an hour", "leads?updatedSince={hour}"),
    ("lead", "leads/get?leadId={lead}"),
    ("lead by reference", "leads/get?referenceId={reference}&projectId={project}&processId={process}"),
    ("lead's history", "leads/{lead}/updates"),
    ("updates", "updates"),
    ("updates, 30 days, 100 of them", "updates?from={month}&limit=100"),
    ("updates that failed", "updates?status=failed"),
    ("updates with a code", "updates?code=unknown_state"),
    ("updates with a code that is rare", "updates?code=lead_not_found&from={month}"),
    ("updates of a process", "updates?processId={process}"),
    ("updates of a key", "updates?apiKeyId={key}"),
    ("updates of a user", "updates?userId=agent-7&from={month}"),
    ("timeline", "updates/{update}"),
    ("deliveries", "deliveries"),
    ("deliveries delivered", "deliveries?status=delivered"),
    ("deliveries exhausted", "deliveries?status=exhausted"),
    ("deliveries pending", "deliveries?status=pending"),
    ("deliveries of a callback", "deliveries?callbackId={callback}"),
    ("deliveries of a callback, exhausted", "deliveries?callbackId={callback}&status=exhausted"),
    ("deliveries of a callback that waits", "deliveries?callbackId={waiting}"),
    ("deliveries of an update", "deliveries?updateId={update}"),
    ("deliveries of a lead", "deliveries?leadId={lead}"),
    ("deliveries of a process", "deliveries?processId={process}"),
    ("deliveries with a status code", "deliveries?statusCode=500"),
    ("deliveries with a status code that is rare", "deliveries?statusCode=418"),
    ("deliveries with an error", "deliveries?error=500"),
    ("deliveries with an error that is rare", "deliveries?error=certificate"),
    ("deliveries of 30 days", "deliveries?since={month}&until={hour}"),
    ("delivery", "deliveries/{update}-{callback}"),
    ("calls in progress", "calls"),
    ("statistics of a day", "stats"),
    ("statistics of 30 days by code", "stats?from={month}&step=day&by=code"),
    ("statistics of 30 days by callback", "stats?from={month}&step=day&by=callback"),
    ("statistics of a callback", "stats?callbackId={callback}"),
    ("statistics of a callback, 30 days", "stats?from={month}&step=day&callbackId={callback}"),
    ("keys", "keys"),
    ("processes", "processes"),
    ("callbacks", "processes/{process}/callbacks"),
    ("failures of a callback", "processes/{process}/callbacks/{callback}/failures"),
    ("failures of a callback, 30 days", "processes/{process}/callbacks/{callback}/failures?since={month}"),
];

/// Pages of the console.
const PAGES: &[(&str, &str)] = &[
    ("projects", "/"),
    ("system", "/system"),
    ("board", "/p/{project}"),
    ("leads", "/p/{project}/leads"),
    ("leads by a name that 5 000 have", "/p/{project}/leads?q={first}"),
    ("leads in a rare state", "/p/{project}/leads?state=lost"),
    ("lead", "/p/{project}/leads/{lead}"),
    ("updates", "/p/{project}/updates"),
    ("updates that failed", "/p/{project}/updates?status=failed"),
    ("updates of a key", "/p/{project}/updates?key={key}"),
    ("timeline", "/p/{project}/updates/{update}"),
    ("deliveries", "/p/{project}/deliveries"),
    ("deliveries exhausted", "/p/{project}/deliveries?status=exhausted"),
    ("deliveries of a lead", "/p/{project}/deliveries?lead={lead}"),
    ("delivery", "/p/{project}/deliveries/{update}-{callback}"),
    ("callbacks", "/p/{project}/callbacks"),
    ("callback", "/p/{project}/callbacks/{callback}"),
    ("callback that waits", "/p/{project}/callbacks/{waiting}"),
    ("processes", "/p/{project}/processes"),
    ("process", "/p/{project}/processes/{process}"),
    ("calls", "/p/{project}/calls"),
    ("keys", "/p/{project}/keys"),
    ("search by id", "/p/{project}/go?q={update}"),
];

pub(crate) async fn run(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let (leads, updates) = (plan.size.max(FEW), plan.size * UPDATES_PER_LEAD);
    progress(&format!("{NAME}: {leads} leads, {updates} updates and {updates} deliveries are being inserted"));
    let start = Instant::now();
    let mut stack = Stack::start(false, FEW).await?;
    let filled = Filled::insert(&mut stack, leads, updates).await?;
    stack.restart(|stack| &mut stack.lead_state).await;
    stack.restart(|stack| &mut stack.notifier).await;
    report.detail(NAME, json!({"leads": leads, "updates": updates, "insertSeconds": start.elapsed().as_secs_f64()}))?;

    let samples = filled.samples(&stack).await?;
    let api = |path: &str| {
        http_client().get(format!("http://{}/api/v1/{path}", stack.gateway_address)).bearer_auth(&stack.api_key)
    };
    for (what, path) in LISTS {
        measure(&format!("API: {what}"), report, &samples, Duration::ZERO, |sample| api(&fill_in(path, sample)))
            .await?;
    }
    let now = service_kit::clock::now().millis();
    for (what, days) in [("a day", 1), ("a month", DAYS)] {
        let body = json!({"start": now - days * 86_400_000, "end": now, "includeUniqueLeads": true});
        let request = |_: &Sample| {
            let url = format!("http://{}/api/v1/analytics/customer/stats", stack.gateway_address);
            http_client()
                .post(url)
                .bearer_auth(&stack.api_key)
                .header(CONTENT_TYPE, "application/json")
                .body(body.to_string())
        };
        measure(&format!("API: calls of {what} counted"), report, &samples, Duration::ZERO, request).await?;
    }
    let console = Console::start(&stack).await?;
    for (what, path) in PAGES {
        let request = |sample: &Sample| console.get(&fill_in(path, sample));
        measure(&format!("console: {what}"), report, &samples, PAUSE, request).await?;
    }
    Ok(())
}

/// Adds the median and the p99 of a page.
async fn measure(
    what: &str,
    report: &mut Report,
    samples: &[Sample],
    pause: Duration,
    request: impl Fn(&Sample) -> RequestBuilder,
) -> anyhow::Result<()> {
    let mut times = latency::histogram();
    for (number, sample) in samples.iter().cycle().take(WARM_UP + REQUESTS).enumerate() {
        tokio::time::sleep(pause).await;
        let start = Instant::now();
        let response = request(sample).send().await?;
        let status = response.status();
        let body = response.text().await?;
        if number >= WARM_UP {
            latency::record(&mut times, start.elapsed());
        }
        ensure!(status.is_success() || status.is_redirection(), "{what}: {status} {body}");
    }
    let latency = latency::Latency::from(&times);
    report.figure(NAME, what, "ms", vec![latency.p50], Target::AtMost(MOST));
    report.figure(NAME, format!("{what}, p99"), "ms", vec![latency.p99], None);
    Ok(())
}

/// A console, and a session of an operator in it.
struct Console {
    _service: Service,
    url: String,
    cookie: String,
}

impl Console {
    async fn start(stack: &Stack) -> anyhow::Result<Self> {
        let (listen, health) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let mut command = Command::new(binary("console"));
        command.env("NATS_URL", stack.nats.url()).env("CONSOLE_LISTEN", &listen).env("HEALTH_LISTEN", &health);
        command.env("LEADRELAY_GATEWAY_URL", format!("http://{}", stack.gateway_address));
        let mut service = Service::spawn("console", command);
        service.wait_for_http(&format!("http://{health}/readyz"), TIMEOUT).await;
        let url = format!("http://{listen}");
        let form = http_client().post(format!("{url}/login")).header(ORIGIN, &url);
        let token =
            console::create_login(&service_kit::nats::jetstream(&stack.client), console::LoginRole::Operator).await?;
        let form = form.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(format!("token={token}"));
        let response = form.send().await?;
        let cookie = response.headers().get(SET_COOKIE).and_then(|cookie| cookie.to_str().ok()?.split(';').next());
        let cookie = cookie
            .with_context(|| format!("the console answered the link of an operator with {}", response.status()))?;
        Ok(Self { cookie: cookie.to_owned(), _service: service, url })
    }

    fn get(&self, path: &str) -> RequestBuilder {
        http_client().get(format!("{}{path}", self.url)).header(COOKIE, &self.cookie)
    }
}

/// The values that paths name.
type Sample = Vec<(&'static str, String)>;

fn fill_in(path: &str, sample: &Sample) -> String {
    sample.iter().fold(path.to_owned(), |path, (name, value)| path.replace(&format!("{{{name}}}"), value))
}

/// What was inserted.
struct Filled {
    leads: u64,
    updates: u64,
    /// The Unix second of the first and of the last update.
    seconds: [i64; 2],
    project: Vec<u8>,
    process: Vec<u8>,
    callback: ObjectId,
    /// A callback that is switched off, whose deliveries wait; and its process.
    waiting: ObjectId,
    waiting_process: Vec<u8>,
}

impl Filled {
    async fn insert(stack: &mut Stack, leads: u64, updates: u64) -> anyhow::Result<Self> {
        let off = json!([{"name": "billing", "url": format!("http://{}/billing", stack.endpoint), "enabled": false}]);
        let support = apply_process(&stack.client, stack.project_id, "support", off).await?.process;
        let callback = sqlx::query_scalar::<_, String>(
            "SELECT config -> 'callbacks' -> 0 ->> 'callbackId' FROM lead_state.processes WHERE process_id = $1",
        );
        let callback = callback.bind(stack.process_id.as_bytes()).fetch_one(&stack.pool).await?.parse()?;
        stack.notifier.terminate().await;
        stack.lead_state.terminate().await;
        let last = i64::from(service_kit::clock::now().unix_seconds()) - 60;
        let filled = Self {
            leads,
            updates,
            seconds: [last - DAYS * 86_400, last],
            project: stack.project_id.as_bytes().into(),
            process: stack.process_id.as_bytes().into(),
            callback,
            waiting: support.callbacks[0].callback_id,
            waiting_process: support.process_id.context("the process has no id")?.as_bytes().into(),
        };
        let mut connection = stack.pool.acquire().await?;
        sqlx::raw_sql(
            "SET maintenance_work_mem = '256MB'; SET work_mem = '256MB'; SET synchronous_commit = off;
             SELECT lead_state.ensure_partitions((now() - interval '31 days')::date, now()::date);
             SELECT webhooks.ensure_partitions(now() - interval '31 days', now())",
        )
        .execute(&mut *connection)
        .await?;
        filled.insert_leads(&mut connection).await.context("cannot insert leads")?;
        progress(&format!("{NAME}: updates"));
        filled.insert_updates(&mut connection).await.context("cannot insert updates")?;
        progress(&format!("{NAME}: deliveries"));
        filled.insert_deliveries(&mut connection).await.context("cannot insert deliveries")?;
        // Its settings must not return to the pool.
        connection.close().await?;
        Ok(filled)
    }

    async fn insert_leads(&self, connection: &mut PgConnection) -> anyhow::Result<()> {
        let indexes = drop_indexes(connection, "lead_state.leads").await?;
        // Each of the 200 first names is that of 5 000 leads; a lead in a hundred is lost.
        sqlx::query(
            r#"INSERT INTO lead_state.leads
                   (lead_id, project_id, process_id, group_id, reference_id, name, phone, email, state, metadata, version,
                    created_at, updated_at)
               SELECT $1 || int8send(n), $2, $3, 'group-' || n % 20, 'crm-' || n,
                      'First' || lpad((n % 200)::text, 3, '0') || ' Last' || lpad(n::text, 8, '0'),
                      '+4915' || lpad((n * 7919 % 100000000)::text, 8, '0'), 'lead-' || n || '@example.com',
                      CASE WHEN n % 100 = 0 THEN 'lost' WHEN n % 3 = 0 THEN 'interested' ELSE 'new' END,
                      ('{"source":"import","city":"Berlin","score":' || n % 100 || '}')::json, 3,
                      to_timestamp($6), to_timestamp($6 + n * 7919 % ($7 - $6))
               FROM generate_series($4, $5) AS n"#,
        )
        .bind(&lead_id(0).as_bytes()[..4])
        .bind(&self.project)
        .bind(&self.process)
        .bind(FEW.cast_signed())
        .bind(self.leads.cast_signed() - 1)
        .bind(self.seconds[0])
        .bind(self.seconds[1])
        .execute(&mut *connection)
        .await?;
        build_indexes(connection, indexes).await?;
        // Two in a hundred leads are in a call.
        sqlx::query(
            "INSERT INTO lead_state.active_calls (lead_id, call_id, started_at, expires_at, project_id)
             SELECT $1 || int8send(n * 50), 'call-' || n, now(), now() + interval '1 day', $2
             FROM generate_series(0, $3 / 50 - 1) AS n",
        )
        .bind(&lead_id(0).as_bytes()[..4])
        .bind(&self.project)
        .bind(self.leads.cast_signed())
        .execute(&mut *connection)
        .await?;
        vacuum(connection, &["lead_state.leads", "lead_state.active_calls"]).await
    }

    /// One in ten updates fails; one in twenty is the start of a call, and one the end.
    async fn insert_updates(&self, connection: &mut PgConnection) -> anyhow::Result<()> {
        let indexes = drop_indexes(connection, "lead_state.lead_updates").await?;
        sqlx::query(
            r#"INSERT INTO lead_state.lead_updates
                   (project_id, update_id, log_epoch, log_sequence, log_index, logged_at, lead_id, process_id, kind, command,
                    success, error, error_code, from_state, to_state, version, user_id, api_key_id, warnings, data, applied_at,
                    counted, call_facts)
               SELECT $1, substring(int8send($2 + n * ($3 - $2) / $4) FROM 5) || int8send(n), 0, n, 0,
                      to_timestamp($2 + n * ($3 - $2) / $4), $5 || int8send(n * 7919 % $6), $7,
                      CASE n % 20 WHEN 0 THEN 'call.started' WHEN 1 THEN 'call.ended' ELSE 'update' END,
                      ('{"leadId":"' || encode($5 || int8send(n * 7919 % $6), 'hex') || CASE n % 20
                       WHEN 0 THEN '"}' WHEN 1 THEN '","result":{"connected":true,"summary":"asked for an offer"}}'
                       ELSE '","metadata":{"campaign":"autumn","score":1,"note":"call back on thursday"},"userId":"agent"}' END)::json,
                      n % 10 <> 5, CASE WHEN n % 10 = 5 THEN 'Lead update is not allowed' END,
                      CASE WHEN n % 10 = 5 THEN (ARRAY['call_in_progress', 'transition_not_allowed', 'unknown_state'])[1 + n / 10 % 3] END,
                      'interested', 'followup_2', 2, 'agent-' || n % 50, '\x01020304'::bytea || int8send(n % 3), '{}',
                      CASE WHEN n % 20 > 1 THEN '{"source":"import","city":"Berlin","campaign":"autumn","score":1}'::json END,
                      to_timestamp($2 + n * ($3 - $2) / $4), true,
                      CASE WHEN n % 20 = 1 THEN (ARRAY[1, 3, 27, 6])[1 + n / 20 % 4] END
               FROM generate_series(1, $4) AS n"#,
        )
        .bind(&self.project)
        .bind(self.seconds[0])
        .bind(self.seconds[1])
        .bind(self.updates.cast_signed())
        .bind(&lead_id(0).as_bytes()[..4])
        .bind(self.leads.cast_signed())
        .bind(&self.process)
        .execute(&mut *connection)
        .await?;
        build_indexes(connection, indexes).await?;
        sqlx::raw_sql(
            "INSERT INTO lead_state.update_counts (project_id, minute, process_id, kind, code, id_month, updates)
             SELECT project_id, date_trunc('minute', logged_at), process_id, kind, coalesce(error_code, ''),
                    webhooks.id_month(update_id), count(*)
             FROM lead_state.lead_updates WHERE log_epoch = 0 GROUP BY 1, 2, 3, 4, 5, 6",
        )
        .execute(&mut *connection)
        .await?;
        vacuum(connection, &["lead_state.lead_updates", "lead_state.update_counts"]).await
    }

    /// One in a hundred deliveries is exhausted after three attempts, and one waits.
    async fn insert_deliveries(&self, connection: &mut PgConnection) -> anyhow::Result<()> {
        let indexes = drop_indexes(connection, "webhooks.deliveries").await?;
        sqlx::query(
            r#"INSERT INTO webhooks.deliveries
                   (update_id, callback_id, kind, project_id, process_id, status, attempts, next_attempt_at, created_at,
                    updated_at, exhausted_announced, last_error, payload, first_started_at, first_duration_ms,
                    first_status_code, exhausted_at, first_counted)
               SELECT substring(int8send($2 + n * ($3 - $2) / $4) FROM 5) || int8send(n),
                      CASE n % 100 WHEN 1 THEN $6 ELSE $5 END, 'update', $1, CASE n % 100 WHEN 1 THEN $8 ELSE $7 END,
                      CASE n % 100 WHEN 0 THEN 'exhausted' WHEN 1 THEN 'pending' ELSE 'delivered' END,
                      CASE n % 100 WHEN 0 THEN 3 WHEN 1 THEN 0 ELSE 1 END, CASE WHEN n % 100 = 1 THEN at END, at, at,
                      n % 100 = 0, CASE WHEN n % 100 = 0 THEN 'the endpoint answered 500' END,
                      CASE WHEN n % 100 < 2 THEN '{"action_type":"update","success":true,"data":{"city":"Berlin"}}' END,
                      CASE WHEN n % 100 > 1 THEN at END, CASE WHEN n % 100 > 1 THEN (n % 200)::int END,
                      CASE WHEN n % 100 > 1 THEN 200 END, CASE WHEN n % 100 = 0 THEN ARRAY[at] END, n % 100 > 1
               FROM generate_series(1, $4) AS n, to_timestamp($2 + n * ($3 - $2) / $4) AS at"#,
        )
        .bind(&self.project)
        .bind(self.seconds[0])
        .bind(self.seconds[1])
        .bind(self.updates.cast_signed())
        .bind(self.callback.as_bytes())
        .bind(self.waiting.as_bytes())
        .bind(&self.process)
        .bind(&self.waiting_process)
        .execute(&mut *connection)
        .await?;
        build_indexes(connection, indexes).await?;
        sqlx::raw_sql(
            "INSERT INTO webhooks.attempts
                 (update_id, callback_id, kind, number, started_at, duration_ms, status_code, error, response, counted)
             SELECT update_id, callback_id, kind, number, created_at, 5, 500, 'the endpoint answered 500', 'oops', true
             FROM webhooks.deliveries, generate_series(1, 3) AS number WHERE status = 'exhausted';
             INSERT INTO webhooks.delivery_counts
             SELECT project_id, date_trunc('minute', created_at), callback_id, kind, webhooks.id_month(update_id), 0, process_id,
                    count(*) FILTER (WHERE first_duration_ms <= 100), count(*) FILTER (WHERE first_duration_ms > 100), 0, 0,
                    3 * count(*) FILTER (WHERE status = 'exhausted'), count(*) FILTER (WHERE status = 'exhausted')
             FROM webhooks.deliveries WHERE status <> 'pending' GROUP BY 1, 2, 3, 4, 5, 7",
        )
        .execute(&mut *connection)
        .await?;
        vacuum(connection, &["webhooks.deliveries", "webhooks.attempts", "webhooks.delivery_counts"]).await?;
        sqlx::query("CHECKPOINT").execute(&mut *connection).await?;
        Ok(())
    }

    /// Values of random leads with an update that was delivered.
    async fn samples(&self, stack: &Stack) -> anyhow::Result<Vec<Sample>> {
        let hours = |hours: i64| Timestamp::from_millis((self.seconds[1] - hours * 3600) * 1000).to_iso();
        let (month, hour) = (hours(DAYS * 24 - 1), hours(1));
        let mut samples = Vec::new();
        while samples.len() < REQUESTS {
            let number = rand::random_range(1..self.updates / 100) * 100 + 7;
            let second = self.seconds[0]
                + number.cast_signed() * (self.seconds[1] - self.seconds[0]) / self.updates.cast_signed();
            let lead = number * 7919 % self.leads;
            if lead < FEW {
                continue;
            }
            let second = u32::try_from(second)?.to_be_bytes();
            let update = ObjectId::try_from(&[&second[..], &number.to_be_bytes()].concat()[..])?;
            let phone = lead * 7919 % 100_000_000;
            samples.push(vec![
                ("lead", lead_id(lead).to_string()),
                ("reference", format!("crm-{lead}")),
                ("email", format!("lead-{lead}@example.com")),
                ("digits", format!("{phone:08}")),
                ("name", format!("first{:03}%20last{lead:08}", lead % 200)),
                ("first", format!("first{:03}", lead % 200)),
                ("update", update.to_string()),
                ("callback", self.callback.to_string()),
                ("waiting", self.waiting.to_string()),
                ("project", stack.project_id.to_string()),
                ("process", stack.process_id.to_string()),
                ("key", "010203040000000000000001".to_owned()),
                ("month", month.clone()),
                ("hour", hour.clone()),
            ]);
        }
        Ok(samples)
    }
}

async fn vacuum(connection: &mut PgConnection, tables: &[&str]) -> anyhow::Result<()> {
    for table in tables {
        sqlx::query(AssertSqlSafe(format!("VACUUM ANALYZE {table}"))).execute(&mut *connection).await?;
    }
    Ok(())
}
