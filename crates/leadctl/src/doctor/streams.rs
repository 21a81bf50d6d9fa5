//! Checks of the streams, buckets, consumer and dead letters in NATS.

use std::{collections::BTreeSet, time::Duration};

use async_nats::{
    Client,
    jetstream::{
        self,
        context::{GetStreamError, GetStreamErrorKind, RequestErrorKind},
        kv,
        response::Response,
        stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType, Stream},
    },
};
use contract::{
    ObjectId,
    streams::{
        self, IDEMPOTENCY, IDEMPOTENCY_AGE, LEAD_COMMANDS, LEAD_DEAD_LETTERS, LEAD_EVENTS, NOTIFIER_CONSUMER,
        StreamLimits,
    },
    subject,
};
use futures::{TryStreamExt, future::join_all};
use serde::Deserialize;
use service_kit::{clock, idempotency::bucket_lasts, nats::error_chain, version::ServerVersion};

use super::{
    check::{Check, lag, skew},
    replicas::{self, Replication},
};
use crate::{arguments::parse_time, clients::stream_reader::age_of};

/// How long the answer with the server's time may take.
const CLOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// A stream that is fuller than this is a failure: its reader should have purged it once it was half full.
const MAX_FULLNESS: f64 = 0.7;

/// Whether JetStream answers this user: without a majority of its servers it does not.
pub(super) async fn jetstream_answers(js: &jetstream::Context) -> Result<(), Check> {
    let check = "jetstream";
    let majority = "start the missing nats-servers: more than half of them must run and see each other";
    match js.request("INFO", b"").await {
        Ok(Response::Ok::<serde_json::Value>(_)) => Ok(()),
        Ok(Response::Err { error }) if error.code() == 503 => {
            Err(Check::failed(check, format!("the servers have no leader: {error}"), majority))
        }
        Ok(Response::Err { error }) => Err(Check::failed(check, error.to_string(), "enable JetStream for the account")),
        Err(e) if e.kind() == RequestErrorKind::NoResponders => {
            let advice = "enable JetStream in the servers and for the account; see deploy/nats";
            Err(Check::failed(check, "is not enabled for this user", advice))
        }
        Err(e) => {
            // A user without the permission gets no answer either.
            let finding = format!("no answer: the servers have no majority, or refuse this user: {}", error_chain(&e));
            Err(Check::failed(check, finding, format!("{majority}; use the NATS user leadctl")))
        }
    }
}

/// Checks all streams and buckets. `configured` are the replicas that lead-state gives new streams.
pub(super) async fn examine(
    js: &jetstream::Context,
    server: ServerVersion,
    configured: &BTreeSet<usize>,
) -> Vec<Check> {
    // The operator chooses sizes and replicas; all other settings are fixed.
    let limits = StreamLimits { max_bytes: 1 << 30, replicas: 1 };
    let expected = streams::streams(limits, ObjectId::from_bytes([0; 12])).map(|config| server.supported(config));
    let buckets = streams::buckets(limits);
    // A stream that does not answer delays no other.
    let (streams, buckets, lasts) = tokio::join!(
        join_all(expected.iter().map(|expected| examine_stream(js, expected))),
        join_all(buckets.iter().map(|expected| examine_bucket(js, expected))),
        bucket_lasts(js),
    );
    let mut checks = Vec::new();
    let mut replication = Vec::new();
    for (found, place) in streams.into_iter().chain(buckets) {
        checks.extend(found);
        replication.extend(place);
    }
    checks.extend(lasts.ok().map(room_for_keys));
    checks.extend(replicas::examine(&replication, configured));
    checks
}

async fn examine_stream(js: &jetstream::Context, expected: &Config) -> (Vec<Check>, Option<Replication>) {
    match js.get_stream(&expected.name).await {
        Ok(stream) => (check_stream(expected, &stream).await, Some(stream.cached_info().into())),
        Err(e) => {
            let advice = "restart lead-state: it creates missing streams";
            (vec![unreadable(format!("stream {}", expected.name), &e, advice)], None)
        }
    }
}

async fn examine_bucket(js: &jetstream::Context, expected: &kv::Config) -> (Vec<Check>, Option<Replication>) {
    let check = format!("bucket {}", expected.bucket);
    match js.get_stream(format!("KV_{}", expected.bucket)).await {
        Ok(stream) => (vec![check_bucket(check, expected, stream.cached_info())], Some(stream.cached_info().into())),
        Err(e) => {
            let advice = "restart lead-state: it creates missing buckets and fills them";
            (vec![unreadable(check, &e, advice)], None)
        }
    }
}

/// The check of a stream that cannot be read; the advice is for one that is missing.
fn unreadable(check: String, error: &GetStreamError, advice: &str) -> Check {
    match error.kind() {
        GetStreamErrorKind::JetStream(answer) if answer.code() == 503 => {
            replicas::without_leader(&check, &answer.to_string())
        }
        GetStreamErrorKind::Request => replicas::without_leader(&check, &error_chain(error)),
        _ => Check::failed(check, format!("cannot be read: {}", error_chain(error)), advice),
    }
}

async fn check_stream(expected: &Config, stream: &Stream) -> Vec<Check> {
    let info = stream.cached_info();
    let (bytes, max_bytes) = (info.state.bytes, info.config.max_bytes);
    let check = format!("stream {}", expected.name);
    let faults = faults(expected, &info.config);
    let mut checks = vec![if faults.is_empty() {
        Check::ok(check, fullness(bytes, max_bytes))
    } else {
        let (findings, advice): (Vec<_>, Vec<_>) = faults.into_iter().unzip();
        Check::failed(check, findings.join("; "), advice.join("; "))
    }];
    let refuses_when_full = expected.discard == DiscardPolicy::New;
    if refuses_when_full && max_bytes > 0 && bytes as f64 > MAX_FULLNESS * max_bytes as f64 {
        checks.push(Check::failed(
            format!("room in {}", expected.name),
            fullness(bytes, max_bytes),
            "its reader is behind: see its backlog, and docs/operations/runbooks.md",
        ));
    }
    match expected.name.as_str() {
        LEAD_EVENTS => checks.push(consumer(stream).await),
        LEAD_DEAD_LETTERS => checks.push(dead_letters(stream).await),
        _ => {}
    }
    checks
}

fn check_bucket(check: String, expected: &kv::Config, info: &Info) -> Check {
    let faults = bucket_faults(expected, &info.config);
    if faults.is_empty() {
        return Check::ok(check, fullness(info.state.bytes, info.config.max_bytes));
    }
    let (findings, advice): (Vec<_>, Vec<_>) = faults.into_iter().unzip();
    Check::failed(check, findings.join("; "), advice.join("; "))
}

/// Settings of a bucket that differ from the expected ones, each with advice.
fn bucket_faults(expected: &kv::Config, actual: &Config) -> Vec<(String, String)> {
    let mut faults = Vec::new();
    let edit = |flags: String| format!("nats stream edit {} {flags}", actual.name);
    if actual.max_messages_per_subject != expected.history {
        let (actual, expected) = (actual.max_messages_per_subject, expected.history);
        let finding = format!("keeps {actual} values per key instead of {expected}");
        faults.push((finding, edit(format!("--max-msgs-per-subject={expected}"))));
    }
    if actual.max_age != expected.max_age {
        let finding = format!("entries expire after {:?} instead of {:?}", actual.max_age, expected.max_age);
        faults.push((finding, edit(format!("--max-age={}s", expected.max_age.as_secs()))));
    }
    if actual.discard != DiscardPolicy::New {
        faults.push(("drops the oldest entries when it is full".into(), edit("--discard=new".into())));
    }
    if actual.storage != expected.storage {
        let finding = "is kept in memory: a restart of NATS loses it".into();
        faults.push((finding, format!("its storage cannot be changed: {}", recreate(&actual.name))));
    }
    faults
}

/// How an operator replaces a stream or bucket by a new one without losing accepted updates.
fn recreate(name: &str) -> String {
    let applied = match name {
        LEAD_COMMANDS => {
            ", wait until \"log to apply\" is empty (deleting the log loses accepted updates that are not applied)"
        }
        _ => "",
    };
    format!(
        "stop the gateways and webhook-notifiers{applied}, delete {name}, restart lead-state, which creates it, then start \
         the others; docs/operations/backup.md says which content exists only there"
    )
}

/// Whether the bucket of idempotency keys has room for the present rate.
fn room_for_keys(lasts: Duration) -> Check {
    let check = "room for idempotency keys";
    if lasts >= IDEMPOTENCY_AGE {
        return Check::ok(check, "keys expire before the bucket is full");
    }
    let hours = lasts.as_secs_f64() / 3600.0;
    let finding = format!("full in {hours:.1} hours at the present rate; then new keys are refused");
    Check::warning(
        check,
        finding,
        format!(
            "nats stream edit KV_{IDEMPOTENCY} --max-bytes=SIZE: docs/operations/nats.md says what size holds what rate"
        ),
    )
}

fn fullness(bytes: u64, max_bytes: i64) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    if max_bytes > 0 {
        format!("{:.1} of {:.0} MiB", mib(bytes as f64), mib(max_bytes as f64))
    } else {
        format!("{:.1} MiB", mib(bytes as f64))
    }
}

/// Settings that differ from the expected ones, each with advice.
fn faults(expected: &Config, actual: &Config) -> Vec<(String, String)> {
    let mut faults = Vec::new();
    let name = &expected.name;
    let mut fault = |finding: String, advice: String| faults.push((finding, advice));
    let edit = |flags: &str| format!("nats stream edit {name} {flags}");
    if actual.subjects != expected.subjects {
        let subjects = expected.subjects.join(",");
        fault(
            format!("has the subjects {} instead of {subjects}", actual.subjects.join(", ")),
            edit(&format!("--subjects='{subjects}'")),
        );
    }
    if actual.discard != expected.discard {
        match expected.discard {
            DiscardPolicy::New => {
                fault("drops the oldest messages when it is full, read or not".into(), edit("--discard=new"))
            }
            DiscardPolicy::Old => fault("refuses messages when it is full".into(), edit("--discard=old")),
        }
    }
    if actual.retention != RetentionPolicy::Limits {
        fault(
            "deletes messages that are acked or have no consumer".into(),
            format!("its retention policy cannot be changed: {}", recreate(name)),
        );
    }
    if actual.storage != StorageType::File {
        fault(
            "is kept in memory: a restart of NATS loses it".into(),
            format!("its storage cannot be changed: {}", recreate(name)),
        );
    }
    if !actual.max_age.is_zero() {
        fault(format!("deletes messages older than {:?}, read or not", actual.max_age), edit("--max-age=0"));
    }
    if actual.max_messages > 0 || actual.max_messages_per_subject > 0 {
        fault("limits the number of messages".into(), edit("--max-msgs=-1 --max-msgs-per-subject=-1"));
    }
    if actual.max_message_size > 0 {
        fault(format!("limits messages to {} bytes", actual.max_message_size), edit("--max-msg-size=-1"));
    }
    if actual.max_bytes <= 0 {
        fault("has no size limit: it can fill the disk".into(), edit("--max-bytes=1GB"));
    }
    if actual.duplicate_window < expected.duplicate_window {
        fault(
            format!("detects duplicates for {:?} only", actual.duplicate_window),
            edit(&format!("--dupe-window={}s", expected.duplicate_window.as_secs())),
        );
    }
    if actual.sealed || actual.deny_delete && actual.deny_purge {
        fault("is sealed or cannot be purged, so it fills up".into(), recreate(name));
    }
    if expected.allow_atomic_publish && !actual.allow_atomic_publish {
        let problem = "does not allow atomic batches: each message is synced separately";
        fault(problem.into(), "restart lead-state: it allows them".into());
    }
    faults
}

/// Checks the consumer of the webhook-notifiers.
async fn consumer(events: &Stream) -> Check {
    let check = "events to deliver";
    let advice = "start webhook-notifier; its log and /readyz say what it waits for";
    let consumer = match events.consumer_info(NOTIFIER_CONSUMER).await {
        Ok(consumer) => consumer,
        Err(e) => return Check::failed(check, format!("cannot read the consumer {NOTIFIER_CONSUMER}: {e}"), advice),
    };
    let waiting = consumer.num_pending + consumer.num_ack_pending as u64;
    let first = events.cached_info().state.first_sequence.max(consumer.ack_floor.stream_sequence + 1);
    let oldest = if waiting == 0 { None } else { age_of(events, first).await };
    if consumer.num_waiting == 0 && consumer.num_ack_pending == 0 {
        return Check::failed(check, format!("no webhook-notifier reads events; {waiting} waiting"), advice);
    }
    lag(check, waiting, oldest, advice)
}

/// Counts dead letters by reason, without the notes about replays in the same stream.
async fn dead_letters(stream: &Stream) -> Check {
    let check = "dead letters";
    let notes = subject::replayed(0);
    let notes = notes.trim_end_matches('0');
    let counted = async {
        let subjects = stream.info_with_subjects(subject::ALL_DEAD_LETTERS).await.map_err(|e| e.to_string())?;
        subjects.try_collect::<Vec<_>>().await.map_err(|e| e.to_string())
    };
    let subjects = match counted.await {
        Ok(subjects) => subjects,
        Err(e) => return Check::unknown(check, e),
    };
    let mut reasons: Vec<_> = subjects.into_iter().filter(|(subject, _)| !subject.starts_with(notes)).collect();
    reasons.sort();
    if reasons.is_empty() {
        return Check::ok(check, "none");
    }
    let counts: Vec<_> = reasons.iter().map(|(subject, count)| format!("{count} {subject}")).collect();
    Check::warning(check, counts.join(", "), "leadctl dead-letters list, show, replay")
}

/// Checks the server's clock, if the server reports it.
pub(super) async fn clock(client: &Client) -> Check {
    #[derive(Deserialize)]
    struct Info {
        ts: Option<String>,
    }
    let sent = clock::now();
    let request = async_nats::Request::new().timeout(Some(CLOCK_TIMEOUT));
    let answer = client.send_request(format!("$JS.API.STREAM.INFO.{LEAD_COMMANDS}"), request).await;
    let received = clock::now();
    let time = answer.ok().and_then(|answer| serde_json::from_slice::<Info>(&answer.payload).ok()?.ts);
    match time.and_then(|text| parse_time(&text).ok()) {
        Some(remote) => skew("NATS", sent, remote, received, 0.0),
        None => Check::unknown("clock of NATS", "servers before 2.10 do not report it"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_fixed_setting_is_checked() {
        let limits = StreamLimits { max_bytes: 1 << 20, replicas: 3 };
        let [commands, _, webhooks, _] = streams::streams(limits, ObjectId::from_bytes([1; 12]));
        let as_created =
            Config { max_messages: -1, max_messages_per_subject: -1, max_message_size: -1, ..commands.clone() };
        assert_eq!(faults(&commands, &as_created), []);
        let old = Config { allow_atomic_publish: false, ..as_created.clone() };
        let known = ServerVersion::parse("2.11.0").supported(commands.clone());
        assert_eq!(faults(&known, &old), [], "a server that does not know batches");
        let changed = [
            Config { allow_atomic_publish: false, ..as_created.clone() },
            Config { subjects: vec!["leads.>".into()], ..as_created.clone() },
            Config { discard: DiscardPolicy::Old, ..as_created.clone() },
            Config { retention: RetentionPolicy::WorkQueue, ..as_created.clone() },
            Config { storage: StorageType::Memory, ..as_created.clone() },
            Config { max_age: Duration::from_secs(1), ..as_created.clone() },
            Config { max_messages: 5, ..as_created.clone() },
            Config { max_messages_per_subject: 5, ..as_created.clone() },
            Config { max_message_size: 5, ..as_created.clone() },
            Config { max_bytes: -1, ..as_created.clone() },
            Config { duplicate_window: Duration::from_secs(1), ..as_created.clone() },
            Config { sealed: true, ..as_created },
        ];
        for config in changed {
            assert_eq!(faults(&commands, &config).len(), 1, "{config:?}");
        }
        let refusing = Config { discard: DiscardPolicy::New, ..webhooks.clone() };
        assert_eq!(faults(&webhooks, &refusing)[0].1, "nats stream edit WEBHOOK_EVENTS --discard=old");
    }

    #[test]
    fn every_fixed_setting_of_a_bucket_is_checked() {
        let limits = StreamLimits { max_bytes: 1 << 20, replicas: 1 };
        let [.., idempotency, _, _, _] = streams::buckets(limits);
        let as_created = Config {
            name: "KV_idempotency".into(),
            max_messages_per_subject: 1,
            max_age: IDEMPOTENCY_AGE,
            discard: DiscardPolicy::New,
            ..Config::default()
        };
        let advice = |config: Config| -> Vec<_> {
            bucket_faults(&idempotency, &config).into_iter().map(|(_, advice)| advice).collect()
        };

        assert_eq!(advice(as_created.clone()), Vec::<String>::new());
        assert_eq!(
            advice(Config { max_messages_per_subject: 5, max_age: Duration::ZERO, ..as_created.clone() }),
            [
                "nats stream edit KV_idempotency --max-msgs-per-subject=1",
                "nats stream edit KV_idempotency --max-age=86400s"
            ]
        );
        assert_eq!(
            advice(Config { discard: DiscardPolicy::Old, ..as_created.clone() }),
            ["nats stream edit KV_idempotency --discard=new"]
        );
        let [recreated] = advice(Config { storage: StorageType::Memory, ..as_created }).try_into().unwrap();
        assert!(recreated.contains("delete KV_idempotency, restart lead-state"), "{recreated}");
    }

    #[test]
    fn the_log_is_only_deleted_once_it_is_applied() {
        let advice = recreate(LEAD_COMMANDS);
        assert!(advice.contains("\"log to apply\" is empty") && !recreate(LEAD_EVENTS).contains("log to apply"));
    }
}
