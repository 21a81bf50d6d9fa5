//! 2 Log: what the doctor sees of NATS.

use std::time::Duration;

use async_nats::{
    Client,
    jetstream::{
        self,
        stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, Stream},
    },
};
use contract::{
    ObjectId, Timestamp,
    streams::{self, LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, NOTIFIER_CONSUMER, StreamLimits},
    subject,
};
use futures::TryStreamExt;
use serde::Deserialize;
use service_kit::{clock, version::ServerVersion};

use super::{Check, State, lag, skew};

/// From where on a stream is too full. From half on its reader makes room.
const FULL: f64 = 0.7;

/// Looks at streams, buckets, the consumer and the dead letters.
pub(super) async fn examine(js: &jetstream::Context, server: ServerVersion) -> Vec<Check> {
    let mut checks = Vec::new();
    // Sizes and copies are the operator's to choose; the rest is not.
    let limits = StreamLimits { max_bytes: 1 << 30, replicas: 1 };
    let mut replicas = Vec::new();
    for expected in streams::streams(limits, ObjectId::from_bytes([0; 12])).map(|config| server.supported(config)) {
        let what = format!("stream {}", expected.name);
        let stream = match js.get_stream(&expected.name).await {
            Ok(stream) => stream,
            Err(e) => {
                checks.push(Check::wrong(
                    what,
                    format!("cannot be seen: {e}"),
                    "restart lead-state: it makes streams that are not there",
                ));
                continue;
            }
        };
        let info = stream.cached_info();
        replicas.push(info.config.num_replicas);
        let faults = faults(&expected, &info.config);
        if faults.is_empty() {
            checks.push(Check::ok(what, fullness(info.state.bytes, info.config.max_bytes)));
        } else {
            let (found, mend): (Vec<_>, Vec<_>) = faults.into_iter().unzip();
            checks.push(Check::wrong(what, found.join("; "), mend.join("; ")));
        }
        let refuses = expected.discard == DiscardPolicy::New;
        if refuses && info.config.max_bytes > 0 && info.state.bytes as f64 > FULL * info.config.max_bytes as f64 {
            checks.push(Check::wrong(
                format!("room in {}", expected.name),
                fullness(info.state.bytes, info.config.max_bytes),
                "whoever reads it is behind: see the lag, and docs/operations/nats.md, Full streams",
            ));
        }
        if expected.name == LEAD_EVENTS {
            checks.push(consumer(&stream).await);
        }
        if expected.name == LEAD_DEAD_LETTERS {
            checks.push(dead_letters(&stream).await);
        }
    }
    for expected in streams::buckets(limits) {
        let what = format!("bucket {}", expected.bucket);
        let name = format!("KV_{}", expected.bucket);
        match js.get_stream(&name).await {
            Ok(stream) => {
                let is = &stream.cached_info().config;
                let mut faults = Vec::new();
                if is.max_messages_per_subject != expected.history {
                    faults.push(format!(
                        "keeps {} values of a key, not {}",
                        is.max_messages_per_subject, expected.history
                    ));
                }
                if is.max_age != expected.max_age {
                    faults.push(format!("its entries go after {:?}, not {:?}", is.max_age, expected.max_age));
                }
                checks.push(if faults.is_empty() {
                    Check::ok(what, fullness(stream.cached_info().state.bytes, is.max_bytes))
                } else {
                    let age = expected.max_age.as_secs();
                    Check::wrong(
                        what,
                        faults.join("; "),
                        format!("nats stream edit {name} --max-msgs-per-subject={} --max-age={age}s", expected.history),
                    )
                });
            }
            Err(e) => checks.push(Check::wrong(
                what,
                format!("cannot be seen: {e}"),
                "restart lead-state: it makes buckets that are not there, and fills them",
            )),
        }
    }
    if replicas.windows(2).any(|pair| pair[0] != pair[1]) {
        checks.push(Check::warning(
            "copies of the streams",
            format!("differ: {replicas:?}"),
            "nats stream edit STREAM --replicas=3",
        ));
    }
    checks
}

fn fullness(bytes: u64, max_bytes: i64) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    if max_bytes > 0 {
        format!("{:.1} of {:.0} MiB", mib(bytes as f64), mib(max_bytes as f64))
    } else {
        format!("{:.1} MiB", mib(bytes as f64))
    }
}

/// What is not as it must be, each with what mends it.
fn faults(expected: &Config, is: &Config) -> Vec<(String, String)> {
    let mut faults = Vec::new();
    let name = &expected.name;
    let mut fault = |found: String, mend: String| faults.push((found, mend));
    let edit = |flags: &str| format!("nats stream edit {name} {flags}");
    if is.subjects != expected.subjects {
        let subjects = expected.subjects.join(",");
        fault(format!("takes {}, not {subjects}", is.subjects.join(", ")), edit(&format!("--subjects='{subjects}'")));
    }
    if is.discard != expected.discard {
        match expected.discard {
            DiscardPolicy::New => {
                fault("drops the oldest when it is full: what was not read is lost".into(), edit("--discard=new"))
            }
            DiscardPolicy::Old => fault("refuses when it is full".into(), edit("--discard=old")),
        }
    }
    if is.retention != RetentionPolicy::Limits {
        fault(
            "forgets what was acked or is of interest to nobody".into(),
            format!("its retention cannot be changed: make {name} anew"),
        );
    }
    if is.storage != StorageType::File {
        fault(
            "is in memory: a restart of NATS loses it".into(),
            format!("its storage cannot be changed: make {name} anew"),
        );
    }
    if !is.max_age.is_zero() {
        fault(format!("forgets what is older than {:?}, read or not", is.max_age), edit("--max-age=0"));
    }
    if is.max_messages > 0 || is.max_messages_per_subject > 0 {
        fault("holds only so many messages".into(), edit("--max-msgs=-1 --max-msgs-per-subject=-1"));
    }
    if is.max_message_size > 0 {
        fault(format!("takes only messages of up to {} bytes", is.max_message_size), edit("--max-msg-size=-1"));
    }
    if is.max_bytes <= 0 {
        fault("has no bound: it fills the disk".into(), edit("--max-bytes=1GB"));
    }
    if is.duplicate_window < expected.duplicate_window {
        fault(
            format!("knows a repeated message for {:?} only", is.duplicate_window),
            edit(&format!("--dupe-window={}s", expected.duplicate_window.as_secs())),
        );
    }
    if is.sealed || is.deny_delete && is.deny_purge {
        fault("is sealed or cannot be purged: no room is ever made".into(), format!("make {name} anew"));
    }
    for (expected, is, what) in [
        (expected.allow_atomic_publish, is.allow_atomic_publish, "atomic batches: each message is synced by itself"),
        (expected.allow_batch_publish, is.allow_batch_publish, "fast-ingest batches: each message is acked by itself"),
    ] {
        if expected && !is {
            fault(format!("does not allow {what}"), "restart lead-state: it allows them".into());
        }
    }
    faults
}

/// The consumer that the webhook-notifiers share.
async fn consumer(events: &Stream) -> Check {
    let what = "events to deliver";
    let mend = "start webhook-notifier; its log and /readyz say what it waits for";
    let consumer = match events.consumer_info(NOTIFIER_CONSUMER).await {
        Ok(consumer) => consumer,
        Err(e) => return Check::wrong(what, format!("the consumer {NOTIFIER_CONSUMER} cannot be seen: {e}"), mend),
    };
    let waiting = consumer.num_pending + consumer.num_ack_pending as u64;
    let first = events.cached_info().state.first_sequence.max(consumer.ack_floor.stream_sequence + 1);
    let oldest = if waiting == 0 { None } else { stored_since(events, first).await };
    if consumer.num_waiting == 0 && consumer.num_ack_pending == 0 {
        return Check::wrong(what, format!("no webhook-notifier asks for events; {waiting} wait"), mend);
    }
    lag(what, waiting, oldest, mend)
}

/// How long ago a message was stored; none if it is not there.
pub(super) async fn stored_since(stream: &Stream, sequence: u64) -> Option<Duration> {
    let stored: Timestamp = stream.get_raw_message(sequence).await.ok()?.time.into();
    Some(Duration::from_millis(u64::try_from(clock::now().millis() - stored.millis()).unwrap_or_default()))
}

/// Dead letters, by reason. The notes about those that were sent again stand beside them.
async fn dead_letters(stream: &Stream) -> Check {
    let what = "dead letters";
    let notes = subject::replayed(0);
    let notes = notes.trim_end_matches('0');
    let counted = async {
        let subjects = stream.info_with_subjects(subject::ALL_DEAD_LETTERS).await.map_err(|e| e.to_string())?;
        subjects.try_collect::<Vec<_>>().await.map_err(|e| e.to_string())
    };
    let subjects = match counted.await {
        Ok(subjects) => subjects,
        Err(e) => return Check { what: what.into(), state: State::Unknown, found: e, mend: None },
    };
    let mut reasons: Vec<_> = subjects.into_iter().filter(|(subject, _)| !subject.starts_with(notes)).collect();
    reasons.sort();
    if reasons.is_empty() {
        return Check::ok(what, "none");
    }
    let counts: Vec<_> = reasons.iter().map(|(subject, count)| format!("{count} {subject}")).collect();
    Check::warning(what, counts.join(", "), "leadctl dead-letters list, show, replay")
}

/// The server's clock, of servers that tell it.
pub(super) async fn clock(client: &Client) -> Check {
    #[derive(Deserialize)]
    struct Told {
        ts: Option<String>,
    }
    let asked = clock::now();
    let answer = client.request(format!("$JS.API.STREAM.INFO.{LEAD_COMMANDS}"), "".into()).await;
    let answered = clock::now();
    let told = answer.ok().and_then(|answer| serde_json::from_slice::<Told>(&answer.payload).ok()?.ts);
    match told.and_then(|text| crate::audit::time(&text).ok()) {
        Some(said) => skew("NATS", asked, said, answered, 0.0),
        None => Check {
            what: "clock of NATS".into(),
            state: State::Unknown,
            found: "servers before 2.10 do not tell it".into(),
            mend: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_that_matters_is_looked_at() {
        let limits = StreamLimits { max_bytes: 1 << 20, replicas: 3 };
        let [commands, _, webhooks, _] = streams::streams(limits, ObjectId::from_bytes([1; 12]));
        let as_made =
            Config { max_messages: -1, max_messages_per_subject: -1, max_message_size: -1, ..commands.clone() };
        assert_eq!(faults(&commands, &as_made), []);
        let old = Config { allow_atomic_publish: false, allow_batch_publish: false, ..as_made.clone() };
        let known = ServerVersion::parse("2.11.0").supported(commands.clone());
        assert_eq!(faults(&known, &old), [], "a server that does not know batches");
        let changed = [
            Config { allow_atomic_publish: false, ..as_made.clone() },
            Config { allow_batch_publish: false, ..as_made.clone() },
            Config { subjects: vec!["leads.>".into()], ..as_made.clone() },
            Config { discard: DiscardPolicy::Old, ..as_made.clone() },
            Config { retention: RetentionPolicy::WorkQueue, ..as_made.clone() },
            Config { storage: StorageType::Memory, ..as_made.clone() },
            Config { max_age: Duration::from_secs(1), ..as_made.clone() },
            Config { max_messages: 5, ..as_made.clone() },
            Config { max_messages_per_subject: 5, ..as_made.clone() },
            Config { max_message_size: 5, ..as_made.clone() },
            Config { max_bytes: -1, ..as_made.clone() },
            Config { duplicate_window: Duration::from_secs(1), ..as_made.clone() },
            Config { sealed: true, ..as_made },
        ];
        for config in changed {
            assert_eq!(faults(&commands, &config).len(), 1, "{config:?}");
        }
        let refusing = Config { discard: DiscardPolicy::New, ..webhooks.clone() };
        assert_eq!(faults(&webhooks, &refusing)[0].1, "nats stream edit WEBHOOK_EVENTS --discard=old");
    }
}
