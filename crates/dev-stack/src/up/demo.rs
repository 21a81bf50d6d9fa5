//! `leadctl up --demo`: creates a project with a process, two callbacks and leads, then sends an update that succeeds
//! and one that fails, and prints what happens.
//!
//! The next demo uses the same project; `demo.json` holds its ids.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use async_nats::Client;
use bytes::Bytes;
use contract::{
    ObjectId,
    command::{CallEnded, CallStarted},
    key::Scope,
    process::{ProcessSpec, new_signing_secret},
    rpc::{CreateKey, CreateProject, DeliveryStatus, ListKeys, ProcessChangeResult, RpcError, UpdateStatus},
    secret::Secret,
    subject::{CommandKind, CommandSubject},
};
use http_api::{DataResponse, InitiateResponse, Lead, TimelineResponse, UpdateAccepted, UpdateTimeline};
use secrets::api_key;
use serde::{Deserialize, Serialize};
use serde_json::json;
use service_kit::{
    clock,
    nats::{jetstream, retry_backoff},
    publish::{self, PublishError},
    rpc,
};
use tokio::time::{Instant, sleep};

use crate::up::{
    client::GatewayClient,
    data_dir::DataDir,
    output::{field, say},
    receiver::{ReceivedRequest, Receiver},
};

const STATE: &str = "demo.json";
/// How long an update may take until its webhooks are delivered.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the gateway may take to accept a new key.
const NEW_KEY_TIMEOUT: Duration = Duration::from_secs(10);
/// When the demo's call expires, if the demo is stopped before it ends the call.
const CALL_SECONDS: u32 = 60;
/// The call in progress during the second update.
const CALL: &str = "demo-call";

/// Callbacks: name, path and the header that each endpoint requires.
const CALLBACKS: [(&str, &str, (&str, &str)); 2] = [
    ("crm", "/crm", ("authorization", "Bearer demo-crm-token")),
    ("analytics", "/analytics", ("x-analytics-key", "demo-analytics-key")),
];
const LEADS: [(&str, &str, &str, &str); 3] = [
    ("AB123456789", "Ada Lovelace", "+14155550101", r#"{"make":"Toyota","model":"Camry","budget":21000}"#),
    ("AB123456790", "Grace Hopper", "+14155550102", r#"{"make":"Volvo","model":"EX30","budget":38000}"#),
    ("AB123456791", "Alan Turing", "+14155550103", r#"{"make":"Honda","model":"Jazz","budget":17500}"#),
];

/// Saved in `demo.json` for the next demo.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    /// By callback name. Generated here, so that the receiver can verify signatures.
    signing_secrets: BTreeMap<String, Secret>,
    project_id: Option<ObjectId>,
    key: Option<Key>,
    process: Option<Process>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Key {
    key_id: ObjectId,
    secret: String,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Process {
    process_id: ObjectId,
    /// The receiver that its callbacks point to.
    receiver_url: String,
    /// The names of its callbacks by id.
    callbacks: BTreeMap<ObjectId, String>,
}

pub(super) struct Demo {
    pub(super) receiver: Receiver,
    receiver_url: String,
    state: State,
}

/// The demo's project, and how to use it.
struct DemoProject {
    id: ObjectId,
    key: String,
    gateway: GatewayClient,
    gateway_url: String,
    process: Process,
    /// The leads of the two updates.
    first: Lead,
    second: Lead,
}

/// How the operator continues after the demo.
pub(super) struct NextSteps {
    /// Environment variables for clients.
    pub(super) environment: Vec<(&'static str, String)>,
    /// Commands to try next.
    pub(super) ending: String,
}

/// Prints an update's timeline for people, with the names of its callbacks.
pub type RenderTimeline = fn(&UpdateTimeline, &BTreeMap<ObjectId, String>) -> String;

impl State {
    fn save(&self, data: &DataDir) -> anyhow::Result<()> {
        data.write_json(STATE, self)
    }
}

fn is_delivered(timeline: &UpdateTimeline) -> bool {
    timeline.deliveries.as_ref().is_some_and(|deliveries| {
        deliveries.len() >= CALLBACKS.len() && deliveries.iter().all(|one| one.status == DeliveryStatus::Delivered)
    })
}

impl Demo {
    /// Opens the demo of the previous start, or creates a new one.
    pub(super) fn open(data: &DataDir, receiver_url: String) -> anyhow::Result<Self> {
        let state = match data.read_json(STATE)? {
            Some(state) => state,
            None => {
                let secret = |(name, ..): &(&str, _, _)| ((*name).to_owned(), new_signing_secret(rand::random()));
                let signing_secrets = CALLBACKS.iter().map(secret).collect();
                State { signing_secrets, project_id: None, key: None, process: None }
            }
        };
        let secrets = CALLBACKS
            .iter()
            .filter_map(|(name, path, _)| Some(((*path).to_owned(), state.signing_secrets.get(*name)?.clone())));
        Ok(Self { receiver: Receiver::new(secrets.collect()), receiver_url, state })
    }

    pub(super) fn receiver_url(&self) -> &str {
        &self.receiver_url
    }

    /// Creates what is missing, sends the two updates and prints what happens. A failure is printed, too, and does not
    /// stop the stack: the operator may have changed the project since the previous demo.
    pub(super) async fn run(
        &mut self,
        data: &DataDir,
        nats: &Client,
        gateway_url: &str,
        render: RenderTimeline,
    ) -> Option<NextSteps> {
        say("\nDemo");
        let project = self.set_up(data, nats, gateway_url).await;
        let shown = match &project {
            Ok(project) => self.send_updates(nats, project, render).await,
            Err(_) => Ok(()),
        };
        if let Some(e) = project.as_ref().err().or(shown.as_ref().err()) {
            say(format_args!(
                "\nThe demo could not be shown: {e:#}\nEverything else runs. If you changed the demo project, undo the \
                 change; or stop, remove {} and start again, which creates another demo project.",
                data.join(STATE).display()
            ));
        }
        project.ok().map(|project| self.next_steps(project))
    }

    async fn set_up(&mut self, data: &DataDir, nats: &Client, gateway_url: &str) -> anyhow::Result<DemoProject> {
        self.forget_missing(nats).await?;
        let id = self.project(data, nats).await?;
        field("project", format_args!("Demo, {id}"));
        let key = self.key(data, nats, id).await?;
        let gateway = GatewayClient::new(gateway_url, &key);
        wait_for_key(&gateway).await?;
        field("API key", &key);
        let process = self.process(data, nats, id).await?;
        field("process", format_args!("Sales, {}", process.process_id));
        for (name, path, _) in CALLBACKS {
            field("callback", format_args!("{name} → {}{path}", self.receiver_url));
        }
        let mut leads = Vec::new();
        for (reference_id, name, phone, metadata) in LEADS {
            let at = LeadScope { gateway: &gateway, project_id: id, process_id: process.process_id };
            let lead = at.get_or_initiate(reference_id, name, phone, metadata).await?;
            field("lead", format_args!("{reference_id}, {name}, {} ({})", lead.id, lead.current_state));
            leads.push(lead);
        }
        let mut leads = leads.into_iter();
        let (Some(first), Some(second)) = (leads.next(), leads.next()) else { bail!("the demo needs two leads") };
        Ok(DemoProject { id, key, gateway, gateway_url: gateway_url.to_owned(), process, first, second })
    }

    async fn send_updates(&self, nats: &Client, project: &DemoProject, render: RenderTimeline) -> anyhow::Result<()> {
        self.succeed(project, render).await?;
        self.fail(nats, project, render).await
    }

    fn next_steps(&self, project: DemoProject) -> NextSteps {
        let DemoProject { id, key, gateway_url, process, first, .. } = project;
        let (process_id, reference_id) = (process.process_id, LEADS[0].0);
        NextSteps {
            ending: format!(
                "Try it yourself\n\
                 \n  # update a lead by its reference id\n  \
                 curl {gateway_url}/api/v1/leads/update -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \
                 -d '{{\"referenceId\":\"{reference_id}\",\"processId\":\"{process_id}\",\"projectId\":\"{id}\",\
                 \"metadata\":{{\"color\":\"blue\"}}}}'\n\
                 \n  # get the outcome and the deliveries: replace UPDATE_ID by the updateId of the answer\n  \
                 curl -H 'Authorization: Bearer {key}' {gateway_url}/api/v1/updates/UPDATE_ID\n\
                 \n  # get the lead\n  \
                 curl -H 'Authorization: Bearer {key}' '{gateway_url}/api/v1/leads/get?leadId={lead_id}'\n\
                 \n  # the webhooks that were delivered: as JSON, and as a page for a browser\n  \
                 curl {receiver_url}/received\n  {receiver_url}/",
                lead_id = first.id,
                receiver_url = self.receiver_url,
            ),
            environment: vec![
                ("LEADRELAY_API_KEY", key),
                ("LEADRELAY_PROJECT_ID", id.to_string()),
                ("LEADRELAY_PROCESS_ID", process_id.to_string()),
                ("LEADRELAY_LEAD_ID", first.id.to_string()),
                ("LEADRELAY_REFERENCE_ID", reference_id.to_owned()),
                ("LEADRELAY_RECEIVER_URL", self.receiver_url.clone()),
            ],
        }
    }

    /// Forgets saved ids that are not in this database: it may have been replaced since the previous start.
    async fn forget_missing(&mut self, nats: &Client) -> anyhow::Result<()> {
        let (Some(project_id), Some(key)) = (self.state.project_id, &self.state.key) else { return Ok(()) };
        let keys = rpc::request(nats, &ListKeys::one(project_id, key.key_id)).await?;
        match keys.items.first() {
            Some(known) if known.is_valid(clock::now()) => {}
            Some(_) => self.state.key = None,
            None => (self.state.project_id, self.state.key, self.state.process) = (None, None, None),
        }
        Ok(())
    }

    async fn project(&mut self, data: &DataDir, nats: &Client) -> anyhow::Result<ObjectId> {
        if let Some(project_id) = self.state.project_id {
            return Ok(project_id);
        }
        let mut name = "Demo".to_owned();
        let project_id = loop {
            match rpc::request(nats, &CreateProject { name }).await.map_err(RpcError::from) {
                Ok(project) => break project.project_id,
                // A demo project of another data directory; its API key is unknown here.
                Err(e) if e.code == "project_exists" => name = format!("Demo {}", clock::new_id()),
                Err(e) => return Err(e).context("cannot create the project"),
            }
        };
        self.state.project_id = Some(project_id);
        self.state.save(data)?;
        Ok(project_id)
    }

    async fn key(&mut self, data: &DataDir, nats: &Client, project_id: ObjectId) -> anyhow::Result<String> {
        if let Some(key) = &self.state.key {
            return Ok(key.secret.clone());
        }
        let secret = api_key::generate(rand::random());
        let query = CreateKey {
            project_id,
            name: "demo".into(),
            sha256: api_key::hash(&secret),
            scopes: Scope::DEFAULT.into_iter().chain([Scope::CallsWrite]).collect(),
            expires_at: None,
        };
        let key = rpc::request(nats, &query).await.context("cannot create the API key")?;
        self.state.key = Some(Key { key_id: key.key_id, secret: secret.clone() });
        self.state.save(data)?;
        Ok(secret)
    }

    /// Applies the process if it is new or the receiver has another URL. Otherwise the process keeps later changes.
    async fn process(&mut self, data: &DataDir, nats: &Client, project_id: ObjectId) -> anyhow::Result<Process> {
        if let Some(process) = &self.state.process
            && process.receiver_url == self.receiver_url
        {
            return Ok(process.clone());
        }
        let spec = self.spec(project_id)?;
        let ProcessChangeResult { process, .. } =
            rpc::request(nats, &spec).await.context("cannot apply the process")?;
        let process = Process {
            process_id: process.process_id.context("lead-state returned a process without id")?,
            receiver_url: self.receiver_url.clone(),
            callbacks: process.callbacks.into_iter().map(|callback| (callback.callback_id, callback.name)).collect(),
        };
        self.state.process = Some(process.clone());
        self.state.save(data)?;
        Ok(process)
    }

    fn spec(&self, project_id: ObjectId) -> anyhow::Result<ProcessSpec> {
        let callbacks = CALLBACKS.map(|(name, path, (header, value))| {
            let auth = match value.strip_prefix("Bearer ") {
                Some(token) => json!({"type": "bearer", "token": token}),
                None => json!({"type": "header", "name": header, "value": value}),
            };
            let secret = self.state.signing_secrets.get(name);
            json!({"name": name, "url": format!("{}{path}", self.receiver_url), "auth": auth,
                   "secrets": secret.map(|secret| [secret])})
        });
        let spec = json!({
            "projectId": project_id,
            "name": "Sales",
            "states": [
                {"name": "new", "kind": "initial"},
                {"name": "interested"},
                {"name": "followup_2"},
                {"name": "won", "kind": "terminal"},
                {"name": "lost", "kind": "terminal"},
            ],
            "transitions": {
                "new": ["interested", "lost"],
                "interested": ["followup_2", "won", "lost"],
                "followup_2": ["interested", "won", "lost"],
            },
            "callbacks": callbacks,
        });
        serde_json::from_value(spec).context("the demo's process specification is invalid")
    }

    async fn succeed(&self, project: &DemoProject, render: RenderTimeline) -> anyhow::Result<()> {
        let DemoProject { gateway_url, first: lead, .. } = project;
        say("\n1  An update that succeeds");
        let mut body = json!({"leadId": lead.id, "metadata": {"budget": 20_000 + rand::random::<u16>() / 8}});
        let target = match lead.current_state.as_str() {
            "new" | "followup_2" => Some("interested"),
            "interested" => Some("followup_2"),
            // The lead was changed by hand since: update the metadata only.
            _ => None,
        };
        if let Some(target) = target {
            body["targetState"] = target.into();
        }
        say(format_args!(
            "   $ curl {gateway_url}/api/v1/leads/update -H \"Authorization: Bearer $LEADRELAY_API_KEY\" \\\n       \
             -H 'Content-Type: application/json' -d '{body}'"
        ));
        let update_id = send(&project.gateway, &body).await?;
        self.show_webhooks(update_id, true).await?;
        show_timeline(project, update_id, UpdateStatus::Succeeded, render).await
    }

    async fn fail(&self, nats: &Client, project: &DemoProject, render: RenderTimeline) -> anyhow::Result<()> {
        let lead = &project.second;
        say("\n2  An update that fails: a call with the lead is in progress");
        let js = jetstream(nats);
        let publish_event = async |kind, event: String| {
            let subject = CommandSubject { project_id: project.id, kind }.intake();
            say(format_args!("   NATS {subject} {event}"));
            let (id, event) = (clock::new_id().to_string(), Bytes::from(event));
            // The gateway answers producers of a new project after a second.
            for delay in retry_backoff().take(10) {
                let message = publish::message(subject.clone(), &id, None, event.clone());
                match publish::publish(&js, message).await {
                    Err(PublishError::NoResponder) => tokio::time::sleep(delay).await,
                    published => return published.context("cannot publish the call event").map(drop),
                }
            }
            bail!("no gateway takes call events")
        };
        let started = CallStarted {
            lead_id: Some(lead.id),
            call_id: Some(CALL.into()),
            timeout_seconds: Some(CALL_SECONDS),
            ..CallStarted::default()
        };
        publish_event(CommandKind::CallStarted, serde_json::to_string(&started)?).await?;
        let update_id = send(&project.gateway, &json!({"leadId": lead.id, "metadata": {"color": "red"}})).await?;
        self.show_webhooks(update_id, false).await?;
        let ended = CallEnded { lead_id: Some(lead.id), call_id: Some(CALL.into()), ..CallEnded::default() };
        publish_event(CommandKind::CallEnded, serde_json::to_string(&ended)?).await?;
        show_timeline(project, update_id, UpdateStatus::Failed, render).await
    }

    /// Waits for the update's webhook on every callback, checks it and prints it.
    async fn show_webhooks(&self, update_id: ObjectId, success: bool) -> anyhow::Result<()> {
        let id = update_id.to_string();
        for (name, path, (header, value)) in CALLBACKS {
            let of_update =
                |request: &ReceivedRequest| request.path == path && request.headers.get("webhook-id") == Some(&id);
            let received: Arc<ReceivedRequest> = self
                .receiver
                .wait_for(OUTCOME_TIMEOUT, of_update)
                .await
                .with_context(|| format!("no webhook arrived at {path}"))?;
            ensure!(received.verified == Some(true), "the webhook to {path} is not signed with its callback's secret");
            ensure!(
                received.headers.get(header).map(String::as_str) == Some(value),
                "the webhook to {path} lacks the {header} header of its callback"
            );
            let body: serde_json::Value =
                serde_json::from_str(&received.body).with_context(|| format!("the webhook to {path} is not JSON"))?;
            ensure!(
                body["updateId"] == id && body["success"] == success,
                "unexpected outcome in the webhook to {path}: {}",
                received.body
            );
            say(format_args!("   → {name:<10} signature verified, header {header} correct"));
            say(format_args!("     {}", received.body));
        }
        Ok(())
    }
}

/// Waits until the deliveries are recorded, then prints the update's timeline.
async fn show_timeline(
    project: &DemoProject,
    update_id: ObjectId,
    expected: UpdateStatus,
    render: RenderTimeline,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + OUTCOME_TIMEOUT;
    let path = format!("/api/v1/updates/{update_id}");
    // A delivery is recorded a moment after the endpoint has answered.
    let (timeline, text) = loop {
        let TimelineResponse { data, .. } = project.gateway.get(&path).await?.json()?;
        if is_delivered(&data) || Instant::now() > deadline {
            let text = render(&data, &project.process.callbacks);
            break (data, text);
        }
        sleep(Duration::from_millis(50)).await;
    };
    ensure!(timeline.status == expected, "unexpected outcome:\n{text}");
    ensure!(is_delivered(&timeline), "not delivered within {OUTCOME_TIMEOUT:?}:\n{text}");
    say(format_args!("   GET {path}"));
    for line in text.lines() {
        say(format_args!("     {line}"));
    }
    Ok(())
}

struct LeadScope<'a> {
    gateway: &'a GatewayClient,
    project_id: ObjectId,
    process_id: ObjectId,
}

impl LeadScope<'_> {
    /// Returns the lead, or initiates it.
    async fn get_or_initiate(
        &self,
        reference_id: &str,
        name: &str,
        phone: &str,
        metadata: &str,
    ) -> anyhow::Result<Lead> {
        let Self { gateway, project_id, process_id } = self;
        let path =
            format!("/api/v1/leads/get?referenceId={reference_id}&projectId={project_id}&processId={process_id}");
        let found = gateway.get(&path).await?;
        if !found.has_code("lead_not_found") {
            return found.json().map(|DataResponse { data, .. }| data);
        }
        let metadata: serde_json::Value = serde_json::from_str(metadata)?;
        let lead = json!({"projectId": project_id, "processId": process_id, "referenceId": reference_id,
                          "name": name, "phone": phone, "metadata": metadata});
        gateway
            .post("/api/v1/leads/initiate", &json!({"lead": lead}))
            .await?
            .json()
            .map(|InitiateResponse { lead, .. }| lead)
    }
}

/// Sends an update over HTTP and prints the answer.
async fn send(gateway: &GatewayClient, body: &serde_json::Value) -> anyhow::Result<ObjectId> {
    let answer = gateway.post("/api/v1/leads/update", body).await?;
    let UpdateAccepted { update_id, .. } = answer.json()?;
    say(format_args!("   ← {} {}", answer.status, answer.body));
    Ok(update_id)
}

/// Waits until the gateway accepts the key.
async fn wait_for_key(gateway: &GatewayClient) -> anyhow::Result<()> {
    let deadline = Instant::now() + NEW_KEY_TIMEOUT;
    loop {
        let answer = gateway.get("/api/v1/leads/get").await?;
        if !answer.has_code("invalid_api_key") {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(answer.error()).context("the gateway does not accept the new key");
        }
        sleep(Duration::from_millis(50)).await;
    }
}
