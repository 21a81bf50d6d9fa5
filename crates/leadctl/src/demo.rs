//! `leadctl up --demo`: a project with a process, two callbacks and leads, an update that succeeds and one that fails,
//! told as a person wants to read it.
//!
//! Everything that it makes is kept: the next demo finds it again by `demo.json`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use async_nats::Client;
use contract::{
    ObjectId,
    command::{CallEnded, CallStarted},
    key::{ApiKey, Scope},
    process::{ProcessSpec, new_signing_secret},
    rpc::{
        CreateKey, CreateProject, KEY_CREATE, KEY_LIST, Keys, ListKeys, PROCESS_APPLY, PROJECT_CREATE,
        ProcessChangeResult, Project, UpdateStatus,
    },
    secret::Secret,
    subject::{CommandKind, CommandSubject},
};
use secrets::api_key;
use serde::{Deserialize, Serialize};
use serde_json::json;
use service_kit::{clock, nats::jetstream, publish, rpc};
use tokio::time::{Instant, sleep};

use crate::{
    admin,
    files::DataDir,
    gateway_client::Gateway,
    output::{field, say},
    receiver::{Received, Receiver},
    story::Found,
    update::Accepted,
};

const STATE: &str = "demo.json";
/// How long an outcome may take to be known and told.
const OUTCOME: Duration = Duration::from_secs(30);
/// How long the gateway may take to hear of a new key.
const NEW_KEY: Duration = Duration::from_secs(10);
/// How long the demo's call lasts at most, should nobody be left to end it.
const CALL_SECONDS: u32 = 60;
/// The call that is in progress when the second update comes.
const CALL: &str = "demo-call";

/// The demo's callbacks: name, path and the header that each endpoint wants.
const CALLBACKS: [(&str, &str, (&str, &str)); 2] = [
    ("crm", "/crm", ("authorization", "Bearer demo-crm-token")),
    ("analytics", "/analytics", ("x-analytics-key", "demo-analytics-key")),
];
const LEADS: [(&str, &str, &str, &str); 3] = [
    ("AB123456789", "Ada Lovelace", "+14155550101", r#"{"make":"Toyota","model":"Camry","budget":21000}"#),
    ("AB123456790", "Grace Hopper", "+14155550102", r#"{"make":"Volvo","model":"EX30","budget":38000}"#),
    ("AB123456791", "Alan Turing", "+14155550103", r#"{"make":"Honda","model":"Jazz","budget":17500}"#),
];

/// What is kept from one demo to the next.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    /// By callback name. Made here, so that what arrives can be verified here.
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
    /// Where its callbacks were told to be.
    receiver_url: String,
    /// Their names.
    callbacks: BTreeMap<ObjectId, String>,
}

/// A demo that can be given.
pub(crate) struct Demo {
    pub(crate) receiver: Receiver,
    receiver_url: String,
    state: State,
}

/// A demo that was given.
pub(crate) struct Shown {
    /// What clients need, as environment variables.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// What to try next.
    pub(crate) ending: String,
}

/// A lead, as far as the demo looks at it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lead {
    #[serde(rename = "_id")]
    lead_id: ObjectId,
    current_state: String,
}

#[derive(Deserialize)]
struct FoundLead {
    data: Lead,
}

impl State {
    fn save(&self, data: &DataDir) -> anyhow::Result<()> {
        data.write_json(STATE, self)
    }
}

impl Demo {
    /// Takes up the demo of last time, or begins a new one.
    pub(crate) fn open(data: &DataDir, receiver_url: String) -> anyhow::Result<Self> {
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

    /// Where the receiver is.
    pub(crate) fn receiver_url(&self) -> &str {
        &self.receiver_url
    }

    /// Gives the demo.
    pub(crate) async fn run(&mut self, data: &DataDir, nats: &Client, gateway_url: &str) -> anyhow::Result<Shown> {
        say("\nDemo: who is there");
        self.forget_what_is_gone(nats).await?;
        let project_id = self.project(data, nats).await?;
        field("project", format_args!("Demo, {project_id}"));
        let key = self.key(data, nats, project_id).await?;
        let gateway = Gateway::new(gateway_url, &key)?;
        accepted(&gateway).await?;
        field("API key", &key);
        let process = self.process(data, nats, project_id).await?;
        field("process", format_args!("Sales, {}", process.process_id));
        for (name, path, _) in CALLBACKS {
            field("callback", format_args!("{name} → {}{path}", self.receiver_url));
        }
        let mut leads = Vec::new();
        for (reference_id, name, phone, metadata) in LEADS {
            let at = Place { gateway: &gateway, project_id, process_id: process.process_id };
            let lead = at.lead(reference_id, name, phone, metadata).await?;
            field("lead", format_args!("{reference_id}, {name}, {} ({})", lead.lead_id, lead.current_state));
            leads.push(lead);
        }
        let [first, second, ..] = leads.as_slice() else { bail!("there are no leads") };

        self.succeed(&gateway, gateway_url, first, &process).await?;
        self.fail(&gateway, nats, project_id, second, &process).await?;

        let reference_id = LEADS[0].0;
        let process_id = process.process_id;
        Ok(Shown {
            environment: vec![
                ("LEADRELAY_API_KEY", key.clone()),
                ("LEADRELAY_PROJECT_ID", project_id.to_string()),
                ("LEADRELAY_PROCESS_ID", process_id.to_string()),
                ("LEADRELAY_LEAD_ID", first.lead_id.to_string()),
                ("LEADRELAY_REFERENCE_ID", reference_id.to_owned()),
                ("LEADRELAY_RECEIVER_URL", self.receiver_url.clone()),
            ],
            ending: format!(
                "Try it yourself\n\
                 \n  # change a lead, by its external id; nobody waits for the outcome\n  \
                 curl {gateway_url}/api/v1/leads/update -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \
                 -d '{{\"referenceId\":\"{reference_id}\",\"processId\":\"{process_id}\",\"projectId\":\"{project_id}\",\
                 \"metadata\":{{\"color\":\"blue\"}}}}'\n\
                 \n  # what became of it: put the updateId of the answer at the end\n  \
                 curl -H 'Authorization: Bearer {key}' {gateway_url}/api/v1/updates/UPDATE_ID\n\
                 \n  # the lead and its history\n  \
                 curl -H 'Authorization: Bearer {key}' '{gateway_url}/api/v1/leads/get?leadId={lead_id}'\n\
                 \n  # what the callbacks were told: for programs, and as a page in a browser\n  \
                 curl {receiver_url}/received\n  {receiver_url}/",
                lead_id = first.lead_id,
                receiver_url = self.receiver_url,
            ),
        })
    }

    /// The database may be another than last time: what is not in it is made anew.
    async fn forget_what_is_gone(&mut self, nats: &Client) -> anyhow::Result<()> {
        let (Some(project_id), Some(key)) = (self.state.project_id, &self.state.key) else { return Ok(()) };
        let keys: Keys = admin::call(nats, KEY_LIST, &ListKeys { project_id }).await?;
        match keys.iter().find(|known| known.key_id == key.key_id) {
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
            match rpc::call::<_, Project>(nats, PROJECT_CREATE, &CreateProject { name }).await {
                Ok(project) => break project.project_id,
                // One of another data directory: this demo cannot know its key.
                Err(e) if e.code == "project_exists" => name = format!("Demo {}", clock::new_id()),
                Err(e) => return Err(admin::explain(e)).context("cannot create the project"),
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
            scopes: Scope::DEFAULT.into(),
            expires_at: None,
        };
        let key: ApiKey = admin::call(nats, KEY_CREATE, &query).await.context("cannot create the API key")?;
        self.state.key = Some(Key { key_id: key.key_id, secret: secret.clone() });
        self.state.save(data)?;
        Ok(secret)
    }

    /// Applied when it is new, or when the receiver has moved; else left as it is, with what was changed since.
    async fn process(&mut self, data: &DataDir, nats: &Client, project_id: ObjectId) -> anyhow::Result<Process> {
        if let Some(process) = &self.state.process
            && process.receiver_url == self.receiver_url
        {
            return Ok(process.clone());
        }
        let spec = self.spec(project_id)?;
        let ProcessChangeResult { process, .. } =
            admin::call(nats, PROCESS_APPLY, &spec).await.context("cannot apply the process")?;
        let process = Process {
            process_id: process.process_id.context("the process has no id")?,
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
        serde_json::from_value(spec).context("the demo's process is none")
    }

    async fn succeed(
        &self,
        gateway: &Gateway,
        gateway_url: &str,
        lead: &Lead,
        process: &Process,
    ) -> anyhow::Result<()> {
        say("\n1  An update that succeeds");
        let mut body = json!({"leadId": lead.lead_id, "metadata": {"budget": 20_000 + rand::random::<u16>() / 8}});
        let target = match lead.current_state.as_str() {
            "new" | "followup_2" => Some("interested"),
            "interested" => Some("followup_2"),
            // Moved on by somebody: then only its metadata changes.
            _ => None,
        };
        if let Some(target) = target {
            body["targetState"] = target.into();
        }
        say(format_args!(
            "   $ curl {gateway_url}/api/v1/leads/update -H \"Authorization: Bearer $LEADRELAY_API_KEY\" \\\n       \
             -H 'Content-Type: application/json' -d '{body}'"
        ));
        let update_id = send(gateway, &body).await?;
        self.arrivals(update_id, true).await?;
        self.story(gateway, update_id, UpdateStatus::Succeeded, process).await
    }

    async fn fail(
        &self,
        gateway: &Gateway,
        nats: &Client,
        project_id: ObjectId,
        lead: &Lead,
        process: &Process,
    ) -> anyhow::Result<()> {
        say("\n2  An update that fails: the lead is in a call");
        let js = jetstream(nats);
        let tell = async |kind, event: String| {
            let subject = CommandSubject { project_id, kind }.to_string();
            say(format_args!("   NATS {subject} {event}"));
            let message = publish::message(subject, &clock::new_id().to_string(), None, event.into());
            publish::publish(&js, message).await.context("cannot publish the call event").map(drop)
        };
        let started = CallStarted {
            lead_id: Some(lead.lead_id),
            call_id: Some(CALL.into()),
            timeout_seconds: Some(CALL_SECONDS),
            ..CallStarted::default()
        };
        tell(CommandKind::CallStarted, serde_json::to_string(&started)?).await?;
        let update_id = send(gateway, &json!({"leadId": lead.lead_id, "metadata": {"color": "red"}})).await?;
        self.arrivals(update_id, false).await?;
        let ended = CallEnded { lead_id: Some(lead.lead_id), call_id: Some(CALL.into()), ..CallEnded::default() };
        tell(CommandKind::CallEnded, serde_json::to_string(&ended)?).await?;
        self.story(gateway, update_id, UpdateStatus::Failed, process).await
    }

    /// Waits for the update's webhook on every callback, checks it and shows it.
    async fn arrivals(&self, update_id: ObjectId, success: bool) -> anyhow::Result<()> {
        let id = update_id.to_string();
        for (name, path, (header, value)) in CALLBACKS {
            let of_update = |one: &Received| one.path == path && one.headers.get("webhook-id") == Some(&id);
            let received: Arc<Received> =
                self.receiver.wait_for(OUTCOME, of_update).await.with_context(|| format!("the webhook to {path}"))?;
            ensure!(received.verified == Some(true), "the webhook to {path} is not signed with its callback's secret");
            ensure!(
                received.headers.get(header).map(String::as_str) == Some(value),
                "the webhook to {path} lacks the {header} header of its callback"
            );
            let body: serde_json::Value =
                serde_json::from_str(&received.body).with_context(|| format!("the webhook to {path} is not JSON"))?;
            ensure!(
                body["updateId"] == id && body["success"] == success,
                "the webhook to {path} says otherwise: {}",
                received.body
            );
            say(format_args!("   → {name:<10} signature verified, {header} as agreed"));
            say(format_args!("     {}", received.body));
        }
        Ok(())
    }

    /// Tells the update's whole story, once all of it is there.
    async fn story(
        &self,
        gateway: &Gateway,
        update_id: ObjectId,
        expected: UpdateStatus,
        process: &Process,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + OUTCOME;
        let path = format!("/api/v1/updates/{update_id}");
        let story = loop {
            let Found { data: story } = gateway.get(&path).await?.read()?;
            // That it was told is recorded a moment after it was told.
            if story.is_told(CALLBACKS.len()) || Instant::now() > deadline {
                break story;
            }
            sleep(Duration::from_millis(50)).await;
        };
        ensure!(story.status == expected, "the update's story is another:\n{}", story.tell(&process.callbacks));
        ensure!(story.is_told(CALLBACKS.len()), "not told in time:\n{}", story.tell(&process.callbacks));
        say(format_args!("   GET {path}"));
        for line in story.tell(&process.callbacks).lines() {
            say(format_args!("     {line}"));
        }
        Ok(())
    }
}

/// Where the leads are.
struct Place<'a> {
    gateway: &'a Gateway,
    project_id: ObjectId,
    process_id: ObjectId,
}

impl Place<'_> {
    /// Finds the lead, or initiates it.
    async fn lead(&self, reference_id: &str, name: &str, phone: &str, metadata: &str) -> anyhow::Result<Lead> {
        let Self { gateway, project_id, process_id } = self;
        let path =
            format!("/api/v1/leads/get?referenceId={reference_id}&projectId={project_id}&processId={process_id}");
        let found = gateway.get(&path).await?;
        if found.code().as_deref() != Some("lead_not_found") {
            return found.read().map(|FoundLead { data }| data);
        }
        let metadata: serde_json::Value = serde_json::from_str(metadata)?;
        let lead = json!({"projectId": project_id, "processId": process_id, "referenceId": reference_id,
                          "name": name, "phone": phone, "metadata": metadata});
        gateway.post("/api/v1/leads/initiate", &json!({"lead": lead})).await?.read()
    }
}

/// Sends an update as a client does, and shows the answer.
async fn send(gateway: &Gateway, body: &serde_json::Value) -> anyhow::Result<ObjectId> {
    let answer = gateway.post("/api/v1/leads/update", body).await?;
    let Accepted { update_id, .. } = answer.read()?;
    say(format_args!("   ← {} {}", answer.status, answer.body));
    Ok(update_id)
}

/// Waits until the gateway knows the key.
async fn accepted(gateway: &Gateway) -> anyhow::Result<()> {
    let deadline = Instant::now() + NEW_KEY;
    loop {
        let answer = gateway.get("/api/v1/leads/get").await?;
        if answer.code().as_deref() != Some("invalid_api_key") {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(answer.refusal()).context("the gateway does not take the new key");
        }
        sleep(Duration::from_millis(50)).await;
    }
}
