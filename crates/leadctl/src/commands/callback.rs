//! `leadctl callback`: configures, tests and enables callbacks.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand};
use contract::{
    ObjectId, Timestamp,
    json::redacted_error,
    process::{CallbackSpec, EventKind, MAX_OVERLAP_SECONDS},
    rpc::{
        BackfillCallback, CallbackStatus, ChangeProcess, EnableCallback, EnableResult, ListCallbacks, PauseCallback,
        PauseResult, ProcessChange, ProcessChangeResult, ProcessSelector, TestCallback, TestResult,
    },
};
use serde_json::{Value, json};

use crate::{
    arguments::InProject,
    clients::admin::{self, Admin},
    commands::callback_failures::Failures,
    commands::deliveries::{RecoverSummary, RecoveryOptions},
    commands::process::{find_callback, parse_selector, selector_of, show_secrets, warn_of_urls},
    output::{self, escape::escaped},
};

/// Callbacks.
#[derive(Debug, Subcommand)]
pub(crate) enum Callback {
    /// List a project's callbacks and their state.
    #[command(after_help = "Example:\n  leadctl callback list --project 6b04…")]
    List {
        #[command(flatten)]
        scope: InProject,
    },
    /// Add a callback to a process. Its signing secret is printed, once.
    #[command(after_help = "Example:\n  leadctl callback add --project 6b04… --process Sales --name crm \\\n    \
                            --url https://crm.example.com/leads --event update.failed")]
    Add {
        /// The process, by id or name; _ for the project's fallback callbacks.
        #[arg(long, value_parser = parse_selector)]
        process: ProcessSelector,
        #[command(flatten)]
        callback: Box<NewCallback>,
        #[command(flatten)]
        scope: InProject,
    },
    /// Remove a callback. Its pending deliveries end as exhausted.
    #[command(after_help = "Example:\n  leadctl callback remove 6b0426971c73026dafa27e40 --project 6b04…")]
    Remove(CallbackInProject),
    /// Generate a new signing secret for a callback and print it, once. During the overlap, webhooks are signed with
    /// both.
    #[command(after_help = "Examples:\n  leadctl callback rotate-secret 6b0426971c73026dafa27e40 --project 6b04…\n  \
                            leadctl callback rotate-secret 6b0426971c73026dafa27e40 --project 6b04… \\\n    \
                            --overlap 0s    after a leak")]
    RotateSecret {
        /// The callback.
        callback_id: ObjectId,
        /// How long the previous secrets stay valid, at most 7days; 0s removes them at once.
        #[arg(long, default_value = "1day", value_name = "DURATION")]
        overlap: humantime::Duration,
        #[command(flatten)]
        scope: InProject,
    },
    /// Send a signed ping to a callback and show the answer. A ping is not recorded and does not count as a failure.
    #[command(after_help = "Example:\n  leadctl callback test 6b0426971c73026dafa27e40 --project 6b04…")]
    Test(CallbackInProject),
    /// Show why the deliveries of a callback fail: the status and error of their last attempts, with a sample of each.
    Failures(Failures),
    /// Pause a callback: its deliveries are recorded and wait until it is resumed.
    #[command(after_help = "Example:\n  leadctl callback pause 6b0426971c73026dafa27e40")]
    Pause(AnyCallback),
    /// Resume a paused callback: the deliveries that waited are sent, the oldest first.
    #[command(after_help = "Example:\n  leadctl callback resume 6b0426971c73026dafa27e40")]
    Resume(AnyCallback),
    /// Make the deliveries that a callback would have got of past events, at a limited rate. None is made twice.
    #[command(after_help = "Example:\n  leadctl callback backfill 6b0426971c73026dafa27e40 --project 6b04… \\\n    \
                      --since 30d --dry-run")]
    Backfill {
        /// The callback.
        callback_id: ObjectId,
        #[command(flatten)]
        pages: RecoveryOptions,
        #[command(flatten)]
        scope: InProject,
    },
    /// Enable a callback that was disabled after failures. Its pending deliveries are sent within seconds.
    #[command(after_help = "Example:\n  leadctl callback enable 6b0426971c73026dafa27e40")]
    Enable(AnyCallback),
}

#[derive(Debug, Args)]
pub(crate) struct CallbackInProject {
    /// The callback.
    callback_id: ObjectId,
    #[command(flatten)]
    scope: InProject,
}

#[derive(Debug, Args)]
pub(crate) struct AnyCallback {
    /// The callback.
    callback_id: ObjectId,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, Args)]
pub(crate) struct NewCallback {
    /// A name, unique in the process.
    #[arg(long)]
    name: String,
    /// The URL to POST to.
    #[arg(long)]
    url: String,
    /// A bearer token for the endpoint. Prefer the environment variable: other users of this machine can see arguments.
    #[arg(long, env = "CALLBACK_BEARER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    bearer_token: Option<String>,
    /// A header for the endpoint, as in "X-Api-Key: value"; can be repeated, the variable with a line for each.
    #[arg(
        long = "auth-header",
        env = "CALLBACK_AUTH_HEADER",
        hide_env_values = true,
        value_name = "HEADER",
        value_delimiter = '\n'
    )]
    auth_headers: Vec<String>,
    #[command(flatten)]
    oauth2: Oauth2Options,
    /// Present this client certificate to the endpoint: a PEM file with its chain.
    #[arg(long, value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// The PEM file of the certificate's private key.
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// Send this event, e.g. update.failed or lead.state_changed; can be repeated. Default: update.succeeded and
    /// update.failed.
    #[arg(long = "event")]
    events: Vec<EventKind>,
    /// Create the callback switched off: its deliveries are recorded and wait.
    #[arg(long)]
    off: bool,
    /// Timeout of an attempt, in seconds.
    #[arg(long)]
    timeout_seconds: Option<u32>,
    /// Maximum number of concurrent attempts.
    #[arg(long)]
    max_in_flight: Option<u32>,
    /// Maximum number of attempts per second.
    #[arg(long)]
    max_per_second: Option<u32>,
    /// Deliver each lead's updates in order, one at a time.
    #[arg(long)]
    ordered: bool,
}

/// An OAuth 2.0 client whose access tokens are sent to the endpoint.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Oauth2Options {
    /// Send access tokens from this token endpoint of an OAuth 2.0 server (client credentials).
    #[arg(long, value_name = "URL", requires = "client_id", conflicts_with = "bearer_token")]
    token_url: Option<String>,
    /// The client's id.
    #[arg(long, requires = "token_url")]
    client_id: Option<String>,
    /// The client's secret. Prefer the environment variable.
    #[arg(long, env = "CALLBACK_CLIENT_SECRET", hide_env_values = true, value_name = "SECRET")]
    client_secret: Option<String>,
    /// The scopes to request, separated by spaces.
    #[arg(long, requires = "token_url")]
    scope: Option<String>,
    /// The audience to request.
    #[arg(long, requires = "token_url")]
    audience: Option<String>,
    /// Send id and secret in the body of the token request, not with HTTP Basic.
    #[arg(long, requires = "token_url")]
    client_secret_post: bool,
}

impl Oauth2Options {
    fn auth(&self) -> anyhow::Result<Option<Value>> {
        let Some(token_url) = &self.token_url else { return Ok(None) };
        let secret = self.client_secret.as_ref().context("--token-url needs the secret: set CALLBACK_CLIENT_SECRET")?;
        let mut auth = json!({"type": "oauth2", "tokenUrl": token_url, "clientId": self.client_id,
            "clientSecret": secret, "scope": self.scope, "audience": self.audience});
        if self.client_secret_post {
            auth["clientAuthentication"] = json!("client_secret_post");
        }
        Ok(Some(auth))
    }
}

impl NewCallback {
    fn spec(&self) -> anyhow::Result<CallbackSpec> {
        let header = |header: &String| {
            let (name, value) = header.split_once(':').context("--auth-header must be NAME: VALUE")?;
            anyhow::Ok((name.trim().to_owned(), value.trim().to_owned()))
        };
        let headers = self.auth_headers.iter().map(header).collect::<anyhow::Result<Vec<_>>>()?;
        let bearer = self.bearer_token.as_ref().map(|token| json!({"type": "bearer", "token": token}));
        let (auth, headers) = match (self.oauth2.auth()?.or(bearer), headers.as_slice()) {
            (None, [(name, value)]) => (Some(json!({"type": "header", "name": name, "value": value})), [].as_slice()),
            (auth, headers) => (auth, headers),
        };
        let headers: Vec<_> = headers.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
        let read =
            |file: &Path| std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()));
        let certificate = match (&self.client_cert, &self.client_key) {
            (Some(certificate), Some(key)) => Some(json!({"certificate": read(certificate)?, "key": read(key)?})),
            _ => None,
        };
        let mut members = json!({
            "name": self.name, "url": self.url, "auth": auth, "headers": headers, "enabled": !self.off,
            "clientCertificate": certificate,
            "timeoutSeconds": self.timeout_seconds, "maxInFlight": self.max_in_flight,
            "maxPerSecond": self.max_per_second, "ordering": self.ordered.then_some("lead"),
        });
        if !self.events.is_empty() {
            members["events"] = json!(self.events);
        }
        // Absent members get their defaults.
        if let Some(members) = members.as_object_mut() {
            members.retain(|_, value| !value.is_null());
        }
        let spec: CallbackSpec =
            serde_json::from_value(members).map_err(|e| anyhow!("invalid callback: {}", redacted_error(&e)))?;
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
            Self::List { scope: InProject { project_id, admin } } => {
                let head = ["CALLBACK", "STATE", "PROCESS", "NAME", "PENDING", "REASON"];
                let show = |callbacks: &Vec<CallbackStatus>| output::list("no callbacks", head, callbacks, row);
                admin.show(&ListCallbacks { project_id, details: true }, show).await
            }
            Self::Add { process, callback, scope: InProject { project_id, admin } } => {
                let callback = callback.spec()?;
                let client = admin.connect().await?;
                warn_of_urls(&client, project_id, std::slice::from_ref(&callback)).await;
                let change = ProcessChange::AddCallback { callback };
                let query = ChangeProcess { project_id, process, change, expected_revision: None, dry_run: false };
                output::show(admin.json, &admin::request(&client, &query).await?, show)
            }
            Self::Remove(CallbackInProject { callback_id, scope }) => {
                change_callback(&scope, callback_id, ProcessChange::RemoveCallback { callback_id }).await
            }
            Self::RotateSecret { callback_id, overlap, scope } => {
                let overlap: Duration = overlap.into();
                let overlap_seconds = u32::try_from(overlap.as_secs()).unwrap_or(u32::MAX);
                if overlap_seconds > MAX_OVERLAP_SECONDS {
                    bail!("--overlap must be at most 7days");
                }
                let change = ProcessChange::RotateSecret { callback_id, overlap_seconds };
                change_callback(&scope, callback_id, change).await
            }
            Self::Test(CallbackInProject { callback_id, scope: InProject { project_id, admin } }) => {
                let client = admin.connect().await?;
                let (process, callback) = find_callback(&client, project_id, callback_id).await?;
                let query = TestCallback { project_id, process_id: process.process_id, callback_id };
                let result = admin::request(&client, &query).await?;
                output::show(admin.json, &result, |result| show_test(&callback.name, result))?;
                if result.error.is_some() {
                    bail!("the callback did not accept the ping");
                }
                Ok(())
            }
            Self::Backfill { callback_id, pages, scope: InProject { project_id, admin } } => {
                let client = admin.connect().await?;
                let (process, _) = find_callback(&client, project_id, callback_id).await?;
                let RecoveryOptions { since, per_second, dry_run } = pages;
                let process_id = process.process_id;
                let query = |cursor| BackfillCallback {
                    project_id,
                    process_id,
                    callback_id,
                    since,
                    per_second,
                    dry_run,
                    cursor,
                };
                let say = |summary: &RecoverSummary| summary.say("deliveries", "made");
                pages.run(&client, query, |summary| output::show(admin.json, summary, say)).await
            }
            Self::Failures(failures) => failures.run().await,
            Self::Pause(callback) => set_paused(&callback, true).await,
            Self::Resume(callback) => set_paused(&callback, false).await,
            Self::Enable(AnyCallback { callback_id, admin }) => {
                let show = |result: &EnableResult| {
                    let text = if result.was_disabled { "enabled" } else { "was not disabled; nothing to do" };
                    output::say(format_args!("callback {callback_id}: {text}"));
                };
                admin.show(&EnableCallback { callback_id }, show).await
            }
        }
    }
}

/// Pauses or resumes a callback, and shows the result.
async fn set_paused(AnyCallback { callback_id, admin }: &AnyCallback, paused: bool) -> anyhow::Result<()> {
    let show = |result: &PauseResult| {
        let text = match (paused, result.was_paused) {
            (true, false) => "paused",
            (true, true) => "was paused already; nothing to do",
            (false, true) => "resumed",
            (false, false) => "was not paused; nothing to do",
        };
        output::say(format_args!("callback {callback_id}: {text}"));
    };
    admin.show(&PauseCallback { callback_id: *callback_id, paused }, show).await
}

/// Changes the process of a callback, and shows the result.
async fn change_callback(scope: &InProject, callback_id: ObjectId, change: ProcessChange) -> anyhow::Result<()> {
    let InProject { project_id, admin } = scope;
    let client = admin.connect().await?;
    let (process, _) = find_callback(&client, *project_id, callback_id).await?;
    let process = selector_of(&process);
    let query = ChangeProcess { project_id: *project_id, process, change, expected_revision: None, dry_run: false };
    output::show(admin.json, &admin::request(&client, &query).await?, show)
}

/// Shows a change, and new signing secrets.
fn show(result: &ProcessChangeResult) {
    output::say(format_args!("process {:?} changed to version {}", result.process.name, result.process.revision));
    for change in &result.changes {
        output::field("change", escaped(change));
    }
    for warning in &result.warnings {
        output::field("warning", escaped(warning));
    }
    for callback in result.process.callbacks.iter().filter(|one| result.new_secrets.contains(&one.callback_id)) {
        output::field("callback", format_args!("{} {}", callback.callback_id, escaped(&callback.name)));
        show_secrets(callback);
        if let Some(until) = callback.retiring_secrets.iter().map(|retiring| retiring.until).max() {
            output::field("", format_args!("previous secrets stay valid until {}", until.to_iso()));
        }
        output::say("Save the signing secret now: it cannot be shown again.");
    }
}

pub(crate) fn show_test(name: &str, result: &TestResult) {
    let answer = result.status_code.map_or_else(|| "no answer".to_owned(), |code| code.to_string());
    output::say(format_args!("callback {}: {answer} after {} ms", escaped(name), result.duration_ms));
    output::field("webhook-id", result.webhook_id);
    if let Some(error) = &result.error {
        output::field("error", escaped(error));
    }
    if let Some(response) = &result.response {
        output::field("response", escaped(response));
    }
}

pub(crate) fn row(callback: &CallbackStatus) -> [String; 6] {
    let why = match (&callback.reason, callback.failing_since.map(Timestamp::to_iso)) {
        (Some(reason), _) => escaped(reason),
        (None, Some(since)) => format!("since {since}"),
        (None, None) => String::new(),
    };
    let pending = callback.details.as_ref().map(|details| details.pending.to_string()).unwrap_or_default();
    let (process, name) = (escaped(&callback.process), escaped(&callback.name));
    [callback.callback_id.to_string(), callback.state.to_string(), process, name, pending, why]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_are_not_given_get_their_defaults() {
        let new = NewCallback {
            name: "crm".into(),
            url: "https://crm.example".into(),
            bearer_token: None,
            auth_headers: vec!["X-Key: a:b".into()],
            oauth2: Oauth2Options::default(),
            client_cert: None,
            client_key: None,
            events: vec![EventKind::Failed],
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
        let both = NewCallback {
            auth_headers: vec!["X-Key: a".into(), "X-Other: b".into()],
            oauth2: Oauth2Options {
                token_url: Some("https://id.example/token".into()),
                client_id: Some("c".into()),
                client_secret: Some("s".into()),
                client_secret_post: true,
                ..Oauth2Options::default()
            },
            ..new
        };
        let shown = serde_json::to_value(both.spec().unwrap()).unwrap();
        assert_eq!(
            (&shown["auth"], &shown["headers"]),
            (
                &json!({"type": "oauth2", "tokenUrl": "https://id.example/token", "clientId": "c", "clientSecret": "s",
                        "clientAuthentication": "client_secret_post"}),
                &json!([{"name": "X-Key", "value": "a"}, {"name": "X-Other", "value": "b"}]),
            )
        );
        let wrong = NewCallback { url: "crm.example".into(), ..both };
        assert!(wrong.spec().unwrap_err().to_string().contains("not an http or https URL"));
        assert!("update.lost".parse::<EventKind>().is_err());
    }
}
