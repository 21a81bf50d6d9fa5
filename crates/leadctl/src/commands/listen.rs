//! `leadctl listen`: delivers a project's outcomes to a program on this machine, signed as webhooks are.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use contract::{
    ObjectId, headers,
    process::{new_signing_secret, signing_key},
    secret::Secret,
};
use http_api::Outcome;
use reqwest::{Client, Url, redirect::Policy};
use serde::Serialize;
use service_kit::{clock, tls};
use tokio::time::sleep;

use crate::{
    arguments::GatewayArgs,
    clients::event_stream::{EventStream, StreamEvent},
    output::{self, escape::escaped},
};

/// How long an attempt may take: the maximum for an attempt of a callback.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// Pauses before the second and later attempts. More attempts would hide for longer that the program does not answer.
const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];

/// Deliver the outcomes of a project's updates to a URL of this machine, signed as webhooks are, until Ctrl-C.
///
/// Starts with the next outcome, and delivers one after the other. Callbacks of the project are not changed, and get
/// their own deliveries. An outcome that is not accepted after four attempts is skipped.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  leadctl listen --to http://localhost:3000/hook")]
pub(crate) struct Listen {
    /// The URL to deliver to.
    #[arg(long, value_name = "URL")]
    to: Url,
    /// The secret that signs: whsec_ and the base64 of 24 to 64 bytes. Default: a new one, which is printed.
    #[arg(long, env = "LEADRELAY_WEBHOOK_SECRET", hide_env_values = true, value_parser = parse_secret)]
    secret: Option<Secret>,
    /// Stop after this many outcomes.
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    #[command(flatten)]
    gateway: GatewayArgs,
}

/// The result of delivering an outcome.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Delivered {
    update_id: ObjectId,
    success: bool,
    attempts: usize,
    status_code: Option<u16>,
    error: Option<String>,
    milliseconds: u128,
}

fn parse_secret(text: &str) -> Result<Secret, String> {
    let secret = Secret::from(text);
    if signing_key(&secret).is_some() {
        Ok(secret)
    } else {
        Err("must be whsec_ and the base64 of 24 to 64 bytes".to_owned())
    }
}

impl Listen {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self { to, secret, limit, gateway } = self;
        let mut events = EventStream::new(gateway.client()?, None);
        let secret = secret.unwrap_or_else(|| {
            let secret = new_signing_secret(rand::random());
            output::note(format_args!("the deliveries are signed with {}", secret.expose()));
            secret
        });
        let target = Target { client: client(&to)?, url: to, secret };
        events.start().await?;
        output::note(format_args!("outcomes are delivered to {}", escaped(target.url.as_str())));
        let mut delivered = 0;
        while limit.is_none_or(|limit| delivered < limit) {
            match events.next().await? {
                StreamEvent::Gap => output::note("outcomes were missed: the gateway no longer keeps them"),
                // Like a callback that names no events, it receives only the outcomes of updates.
                StreamEvent::Event(event) if !event.outcome.action_type.is_update() => {}
                StreamEvent::Event(event) => {
                    let result = target.deliver(&event.outcome).await?;
                    output::show(gateway.json, &result, |result| output::say(line(result)))?;
                    delivered += 1;
                }
            }
        }
        Ok(())
    }
}

fn client(to: &Url) -> anyhow::Result<Client> {
    let builder = Client::builder()
        .tls_backend_preconfigured(tls::client()?)
        .user_agent(concat!("leadctl/", env!("CARGO_PKG_VERSION")))
        .redirect(Policy::none())
        .timeout(ATTEMPT_TIMEOUT);
    // A proxy cannot reach this machine's loopback addresses.
    let is_local = to.host_str().is_some_and(|host| host == "localhost" || host.starts_with("127.") || host == "[::1]");
    let builder = if is_local { builder.no_proxy() } else { builder };
    builder.build().context("cannot create the HTTP client")
}

struct Target {
    client: Client,
    url: Url,
    secret: Secret,
}

impl Target {
    /// Attempts a delivery until it is accepted, or the last attempt has failed.
    async fn deliver(&self, outcome: &Outcome) -> anyhow::Result<Delivered> {
        let body = serde_json::to_string(outcome).context("cannot write the outcome as JSON")?;
        let started = Instant::now();
        let (update_id, success) = (outcome.update_id, outcome.success);
        let mut attempts = 0;
        loop {
            attempts += 1;
            let result = self.attempt(update_id, &body).await?;
            let status_code = result.as_ref().ok().copied();
            let error = match result {
                Ok(200..=299) => None,
                Ok(status) => Some(format!("the endpoint answered {status}")),
                Err(error) => Some(error),
            };
            match RETRIES.get(attempts - 1).filter(|_| error.is_some()) {
                Some(delay) => sleep(*delay).await,
                None => {
                    let milliseconds = started.elapsed().as_millis();
                    return Ok(Delivered { update_id, success, attempts, status_code, error, milliseconds });
                }
            }
        }
    }

    /// The status of the response, or the reason why there is none.
    async fn attempt(&self, update_id: ObjectId, body: &str) -> anyhow::Result<Result<u16, String>> {
        let (id, timestamp) = (update_id.to_string(), clock::now().unix_seconds());
        let signature = webhook_notifier::signature([&self.secret], &id, timestamp, body.as_bytes())?;
        let request = self
            .client
            .post(self.url.clone())
            .header("content-type", "application/json")
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", signature)
            .header(headers::TRACEPARENT, clock::new_traceparent())
            .body(body.to_owned());
        let response = request.send().await;
        Ok(response.map(|response| response.status().as_u16()).map_err(|e| service_kit::nats::error_chain(&e)))
    }
}

fn line(delivered: &Delivered) -> String {
    let Delivered { update_id, success, attempts, status_code, error, milliseconds } = delivered;
    let event = if *success { "update.succeeded" } else { "update.failed" };
    let result = match (status_code, error) {
        (Some(status), None) => format!("{status} in {milliseconds} ms"),
        (_, error) => {
            format!("not delivered in {attempts} attempts: {}", escaped(error.as_deref().unwrap_or_default()))
        }
    };
    format!("{update_id}  {event:<16}  {result}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_signing_secret_is_accepted() {
        assert!(parse_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").is_ok());
        for invalid in ["", "whsec_", "whsec_AAAA", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"] {
            assert!(parse_secret(invalid).is_err(), "{invalid}");
        }
    }
}
