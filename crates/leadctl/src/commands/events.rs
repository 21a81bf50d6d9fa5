//! `leadctl events`: prints completion events as they are announced.

use std::time::Duration;

use anyhow::{Context, bail};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use clap::Subcommand;
use contract::{ObjectId, Timestamp, event::CompletionEvent, streams::LEAD_EVENTS, subject};
use futures::StreamExt;

use crate::{
    arguments::parse_since,
    clients::admin::Admin,
    output::{self, escape::escaped},
};

/// NATS sends a heartbeat this often; without one the connection counts as lost.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Lifetime of a pull request; the server deletes the consumer after twice this time without one.
const EXPIRES: Duration = Duration::from_secs(30);

/// Events.
#[derive(Debug, Subcommand)]
pub(crate) enum Events {
    /// Print the outcomes of updates and call events as they are announced, until Ctrl-C: one line each, or with --json
    /// the event.
    #[command(after_help = "Examples:\n  leadctl events tail --project 6b04…\n  \
                      leadctl events tail --since 1h --json | jq .error")]
    Tail {
        /// Only this project. Default: all projects.
        #[arg(long)]
        project: Option<ObjectId>,
        /// Start with events since this time, or this long ago, e.g. 1h. Default: only new events.
        #[arg(long, value_name = "TIME", value_parser = parse_since)]
        since: Option<Timestamp>,
        /// Stop after this many events.
        #[arg(long, value_name = "COUNT")]
        limit: Option<u64>,
        #[command(flatten)]
        admin: Admin,
    },
}

impl Events {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self::Tail { project, since, limit, admin } = self;
        let nats = admin.connect().await?;
        let stream = service_kit::nats::jetstream(&nats).get_stream(LEAD_EVENTS).await;
        let stream = stream.context("cannot find the stream of events; lead-state creates it")?;
        let consumer = stream
            .create_consumer(pull::Config {
                deliver_policy: match since {
                    Some(since) => DeliverPolicy::ByStartTime { start_time: since.into() },
                    None => DeliverPolicy::New,
                },
                ack_policy: AckPolicy::None,
                filter_subject: project.map_or(subject::ALL_EVENTS.to_owned(), subject::events_of),
                memory_storage: true,
                num_replicas: 1,
                inactive_threshold: EXPIRES * 2,
                ..Default::default()
            })
            .await
            .context("cannot read the events")?;
        let messages = consumer.stream().expires(EXPIRES).heartbeat(HEARTBEAT).messages();
        let mut messages = messages.await.context("cannot read the events")?;
        let mut read = 0;
        while limit.is_none_or(|limit| read < limit) {
            let message =
                messages.next().await.context("the event stream ended")?.context("the event stream was interrupted")?;
            read += 1;
            let info = message.info().map_err(|e| anyhow::anyhow!("cannot read the metadata of an event: {e}"))?;
            if info.consumer_sequence != read {
                bail!(
                    "an event before sequence {} was lost on the way; use --since to read it again",
                    info.stream_sequence
                );
            }
            if admin.json {
                output::json_text(&String::from_utf8_lossy(&message.payload));
                continue;
            }
            output::say(match serde_json::from_slice::<CompletionEvent>(&message.payload) {
                Ok(event) => summary(&event),
                Err(e) => format!("{:>10}  cannot be parsed: {e}", info.stream_sequence),
            });
        }
        Ok(())
    }
}

pub(crate) fn summary(event: &CompletionEvent) -> String {
    let CompletionEvent { kind, update_id, timestamp, success, .. } = event;
    let outcome = if *success { "succeeded" } else { "failed" };
    let lead =
        event.lead_id.map(|id| id.to_string()).or(event.reference_id.as_deref().map(escaped)).unwrap_or_default();
    let result = match (&event.error, &event.from_state, &event.to_state) {
        (Some(error), ..) => escaped(error),
        (None, Some(from), Some(to)) if from != to => format!("{} → {}", escaped(from), escaped(to)),
        (None, _, Some(state)) => escaped(state),
        _ => String::new(),
    };
    let kind = kind.as_str();
    format!("{}  {update_id}  {kind:<12}  {outcome:<9}  lead {lead}  {result}", timestamp.to_iso())
}
