//! `leadctl callback`.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use contract::{
    ObjectId, Timestamp,
    json::redacted_error,
    process::{CallbackSpec, EventKind, MAX_OVERLAP_SECONDS},
    rpc::{
        CALLBACK_ENABLE, CALLBACK_LIST, CALLBACK_TEST, CallbackState, CallbackStatus, ChangeProcess, EnableCallback,
        EnableResult, ListCallbacks, PROCESS_CHANGE, ProcessChange, ProcessChangeResult, ProcessSelector, TEST_TIMEOUT,
        TestCallback, TestResult,
    },
};
use serde_json::{Value, json};
use service_kit::rpc;

use crate::{
    admin::{self, Admin},
    output,
    printable::line,
    process::{find_callback, show_secrets, warn_of_urls, which, which_of},
};

/// Callbacks.
#[derive(Debug, Subcommand)]
pub(crate) enum Callback {
    /// List a project's callbacks and how they fare.
    #[command(after_help = "Example:\n  leadctl callback list --project 6b04…")]
    List {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// Give a process one more callback. Its signing secret is printed, once.
    #[command(after_help = "Example:\n  leadctl callback add --project 6b04… --process Sales --name crm \\\n    \
                            --url https://crm.example.com/leads --event update.failed")]
    Add {
        /// The project.
        #[arg(long)]
        project: ObjectId,
        /// The process, by its id or name; _ are the project's fallback callbacks.
        #[arg(long, value_parser = which)]
        process: ProcessSelector,
        #[command(flatten)]
        callback: New,
        #[command(flatten)]
        admin: Admin,
    },
    /// Take a callback away. What was not delivered to it yet will not be.
    #[command(after_help = "Example:\n  leadctl callback remove 6b0426971c73026dafa27e40 --project 6b04…")]
    Remove {
        /// The callback.
        callback_id: ObjectId,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// Give a callback a new signing secret and print it, once. Webhooks are signed with both while the overlap lasts.
    #[command(after_help = "Examples:\n  leadctl callback rotate-secret 6b0426971c73026dafa27e40 --project 6b04…\n  \
                            leadctl callback rotate-secret 6b0426971c73026dafa27e40 --project 6b04… --overlap 0s    it got out")]
    RotateSecret {
        /// The callback.
        callback_id: ObjectId,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        /// How long the secrets so far stay valid, at most 7days; with 0s they are let go of at once.
        #[arg(long, default_value = "1day", value_name = "DURATION")]
        overlap: humantime::Duration,
        #[command(flatten)]
        admin: Admin,
    },
    /// Send a callback a signed ping, and say how that went. It is no delivery, and no failure of the callback.
    #[command(after_help = "Example:\n  leadctl callback test 6b0426971c73026dafa27e40 --project 6b04…")]
    Test {
        /// The callback.
        callback_id: ObjectId,
        /// The project.
        #[arg(long)]
        project: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
    /// Enable a callback again after its failures disabled it. What is waiting for it goes out within seconds.
    #[command(after_help = "Example:\n  leadctl callback enable 6b0426971c73026dafa27e40")]
    Enable {
        /// The callback.
        callback_id: ObjectId,
        #[command(flatten)]
        admin: Admin,
    },
}

/// What a new callback is to be.
#[derive(Debug, Args)]
pub(crate) struct New {
    /// Its name, unique in the process.
    #[arg(long)]
    name: String,
    /// Where to POST.
    #[arg(long)]
    url: String,
    /// A token that authenticates to the endpoint. Other users of this machine see arguments; the environment they do not.
    #[arg(long, env = "CALLBACK_BEARER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    bearer_token: Option<String>,
    /// Or a header that does, as in "X-Api-Key: value".
    #[arg(
        long,
        env = "CALLBACK_AUTH_HEADER",
        hide_env_values = true,
        value_name = "HEADER",
        conflicts_with = "bearer_token"
    )]
    auth_header: Option<String>,
    /// Tell it only of these outcomes, update.succeeded or update.failed; may be given several times. All by default.
    #[arg(long = "event", value_parser = event)]
    events: Vec<EventKind>,
    /// Tell it nothing until that is changed.
    #[arg(long)]
    off: bool,
    /// How long an attempt may take, in seconds.
    #[arg(long)]
    timeout_seconds: Option<u32>,
    /// How many attempts may run at once.
    #[arg(long)]
    max_in_flight: Option<u32>,
    /// How many attempts may begin in a second.
    #[arg(long)]
    max_per_second: Option<u32>,
    /// Deliver a lead's updates one after the other.
    #[arg(long)]
    ordered: bool,
}

fn event(text: &str) -> Result<EventKind, String> {
    serde_json::from_value(text.into()).map_err(|_| "must be update.succeeded or update.failed".to_owned())
}

impl New {
    fn spec(&self) -> anyhow::Result<CallbackSpec> {
        let auth = match (&self.bearer_token, &self.auth_header) {
            (Some(token), _) => json!({"type": "bearer", "token": token}),
            (None, Some(header)) => {
                let (name, value) = header.split_once(':').context("--auth-header must be a name, a colon, a value")?;
                json!({"type": "header", "name": name.trim(), "value": value.trim()})
            }
            (None, None) => Value::Null,
        };
        let mut members = json!({
            "name": self.name, "url": self.url, "auth": auth, "enabled": !self.off,
            "timeoutSeconds": self.timeout_seconds, "maxInFlight": self.max_in_flight,
            "maxPerSecond": self.max_per_second, "ordering": self.ordered.then_some("lead"),
        });
        if !self.events.is_empty() {
            members["events"] = json!(self.events);
        }
        // What is not said is what is usual.
        if let Some(members) = members.as_object_mut() {
            members.retain(|_, value| !value.is_null());
        }
        let spec: CallbackSpec =
            serde_json::from_value(members).map_err(|e| anyhow!("this is no callback: {}", redacted_error(&e)))?;
        let faults = spec.faults();
        if !faults.is_empty() {
            bail!("{}", faults.join("\n  "));
        }
        Ok(spec)
    }
}

impl Callback {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { project, admin } => {
                let query = ListCallbacks { project_id: project };
                let callbacks: Vec<CallbackStatus> = admin.call(CALLBACK_LIST, &query).await?;
                if admin.json {
                    return output::json(&callbacks);
                }
                if callbacks.is_empty() {
                    output::say("no callbacks");
                }
                let rows = callbacks.iter().map(row).collect::<Vec<_>>();
                if !rows.is_empty() {
                    output::say(output::table(Some(["CALLBACK", "STATE", "PROCESS", "NAME", "WHY"]), &rows));
                }
            }
            Self::Add { project, process, callback, admin } => {
                let callback = callback.spec()?;
                let nats = admin.connect().await?;
                warn_of_urls(&nats, std::slice::from_ref(&callback)).await;
                let query = ChangeProcess {
                    project_id: project,
                    process,
                    change: ProcessChange::AddCallback { callback },
                    expected_revision: None,
                    dry_run: false,
                };
                let applied: ProcessChangeResult = admin::call(&nats, PROCESS_CHANGE, &query).await?;
                show(&applied, admin.json)?;
            }
            Self::Remove { callback_id, project, admin } => {
                let change = ProcessChange::RemoveCallback { callback_id };
                show(&change_of(&admin, project, callback_id, change).await?, admin.json)?;
            }
            Self::RotateSecret { callback_id, project, overlap, admin } => {
                let overlap: Duration = overlap.into();
                let overlap_seconds = u32::try_from(overlap.as_secs()).unwrap_or(u32::MAX);
                if overlap_seconds > MAX_OVERLAP_SECONDS {
                    bail!("--overlap must be at most 7days");
                }
                let change = ProcessChange::RotateSecret { callback_id, overlap_seconds };
                show(&change_of(&admin, project, callback_id, change).await?, admin.json)?;
            }
            Self::Test { callback_id, project, admin } => {
                let nats = admin.connect().await?;
                let (process, callback) = find_callback(&nats, project, callback_id).await?;
                let query = TestCallback { project_id: project, process_id: process.process_id, callback_id };
                let tested = rpc::call_within(&nats, CALLBACK_TEST, &query, TEST_TIMEOUT).await;
                let tested: TestResult = tested.map_err(admin::explain)?;
                if admin.json {
                    output::json(&tested)?;
                } else {
                    show_test(&callback.name, &tested);
                }
                if tested.error.is_some() {
                    bail!("the callback did not take the ping");
                }
            }
            Self::Enable { callback_id, admin } => {
                let enabled: EnableResult = admin.call(CALLBACK_ENABLE, &EnableCallback { callback_id }).await?;
                if admin.json {
                    return output::json(&enabled);
                }
                let was = if enabled.was_disabled { "enabled again" } else { "was not disabled; nothing to do" };
                output::say(format_args!("callback {callback_id}: {was}"));
            }
        }
        Ok(())
    }
}

/// Changes the process that has a callback, as it was found.
async fn change_of(
    admin: &Admin,
    project_id: ObjectId,
    callback_id: ObjectId,
    change: ProcessChange,
) -> anyhow::Result<ProcessChangeResult> {
    let nats = admin.connect().await?;
    let (process, _) = find_callback(&nats, project_id, callback_id).await?;
    let query =
        ChangeProcess { project_id, process: which_of(&process), change, expected_revision: None, dry_run: false };
    admin::call(&nats, PROCESS_CHANGE, &query).await
}

/// Shows what changed, and secrets that nobody has seen yet.
fn show(applied: &ProcessChangeResult, json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(applied);
    }
    output::say(format_args!("process {:?} changed, at version {}", applied.process.name, applied.process.revision));
    for change in &applied.changes {
        output::field("change", line(change));
    }
    for callback in applied.process.callbacks.iter().filter(|one| applied.new_secrets.contains(&one.callback_id)) {
        output::field("callback", format_args!("{} {}", callback.callback_id, line(&callback.name)));
        show_secrets(callback);
        if let Some(until) = callback.retiring_secrets.iter().map(|retiring| retiring.until).max() {
            output::field("", format_args!("those before it stay valid until {}", until.to_iso()));
        }
        output::say("Keep the signing secret now: it is not shown again.");
    }
    Ok(())
}

fn show_test(name: &str, tested: &TestResult) {
    let answered = tested.status_code.map_or_else(|| "no answer".to_owned(), |code| code.to_string());
    output::say(format_args!("callback {}: {answered} after {} ms", line(name), tested.duration_ms));
    output::field("webhook-id", tested.webhook_id);
    if let Some(error) = &tested.error {
        output::field("error", line(error));
    }
    if let Some(response) = &tested.response {
        output::field("response", line(response));
    }
}

fn row(callback: &CallbackStatus) -> [String; 5] {
    let state = match callback.state {
        CallbackState::Healthy => "healthy",
        CallbackState::Failing => "failing",
        CallbackState::Disabled => "disabled",
        CallbackState::Off => "off",
    };
    let why = match (&callback.reason, callback.failing_since.map(Timestamp::to_iso)) {
        (Some(reason), _) => line(reason),
        (None, Some(since)) => format!("since {since}"),
        (None, None) => String::new(),
    };
    [callback.callback_id.to_string(), state.to_owned(), line(&callback.process), line(&callback.name), why]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_callback_is_what_was_said_and_else_what_is_usual() {
        let new = New {
            name: "crm".into(),
            url: "https://crm.example".into(),
            bearer_token: None,
            auth_header: Some("X-Key: a:b".into()),
            events: vec![event("update.failed").unwrap()],
            off: true,
            timeout_seconds: None,
            max_in_flight: None,
            max_per_second: Some(5),
            ordered: true,
        };
        let expected = json!({"name": "crm", "url": "https://crm.example", "events": ["update.failed"],
            "auth": {"type": "header", "name": "X-Key", "value": "a:b"}, "enabled": false, "maxPerSecond": 5,
            "ordering": "lead"});
        assert_eq!(new.spec().unwrap(), serde_json::from_value(expected).unwrap());
        let wrong = New { url: "crm.example".into(), ..new };
        assert!(wrong.spec().unwrap_err().to_string().contains("not an http or https URL"));
        assert!(event("update.lost").is_err());
    }
}
