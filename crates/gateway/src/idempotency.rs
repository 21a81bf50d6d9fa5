//! 1 Accept: `Idempotency-Key`: a repeated request is the same update, not a second one
//! (draft-ietf-httpapi-idempotency-key-header-07).
//!
//! Before the command is logged, a record with the `updateId` is created for the key, by compare-and-set: of concurrent
//! requests at any gateways, one creates the record, and the others read it. Each then logs the same command under the
//! same `updateId`, and JetStream (by message id) and the ledger drop the duplicates. After a crash between the two
//! writes, the next request with the key completes the first.
//!
//! While the bucket has no leader, a request tries to create its record again until its deadline. The first attempt
//! that was stored counts.
//!
//! The bucket of the records is bounded, and every project has a share of it (see [`service_kit::shares`]). A project
//! beyond its share gets no new keys; its existing keys still work.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::jetstream::{
    self, ErrorCode,
    consumer::{AckPolicy, PullConsumer, pull},
    kv::{CreateError, CreateErrorKind, Store},
};
use axum::http::{HeaderMap, HeaderName};
use contract::{
    ObjectId,
    event::OutcomeKind,
    idempotency::{IdempotencyRecord, idempotency_key},
    streams::IDEMPOTENCY,
};
use service_kit::{clock, nats::error_chain, shares};
use tokio::{
    sync::{Mutex, OnceCell, Semaphore},
    time::{sleep, timeout, timeout_at},
};

use crate::{
    admission::Admission,
    error::ApiError,
    outage::{Outage, PendingRequest},
};

pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// In a response: the key was used before, and the update is that of the first request.
pub(crate) const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Longest key, in characters.
const MAX_CHARS: usize = 255;

/// Most attempts to create and read a record. A record may exist for the creation and be missing for the read: it
/// expired in between, or a replica that is behind answered the read.
const ATTEMPTS: usize = 3;

/// The timeout of one attempt. The next attempt may reach another server: the first one may be dead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long measuring the bucket may take. Without a measurement no key is refused.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long counting the records of a project may take. Without a count no key of the project is refused.
const COUNT_TIMEOUT: Duration = Duration::from_millis(500);
/// The pause between two repetitions under one permit. Longer delays requests after an election; shorter costs more
/// requests during it.
const PAUSE: Duration = Duration::from_millis(200);
/// Most repetitions in progress at once, for all waiting requests together.
const MAX_REPETITIONS: usize = 64;

/// The key of a request: a string as in RFC 8941, 3.3.3 (`"order-7"`). Many clients leave the quotes out, so both
/// spellings are the same key.
pub(crate) fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(&IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let fault = |fault: &str| Err(ApiError::field("Idempotency-Key", fault));
    if values.next().is_some() {
        return fault("is given twice");
    }
    let Some(key) = value.to_str().ok().map(str::trim).and_then(unquote) else {
        return fault("must be a string of printable ASCII characters, preferably in double quotes");
    };
    if key.is_empty() || key.len() > MAX_CHARS {
        return fault(&format!("must have 1 to {MAX_CHARS} characters"));
    }
    Ok(Some(key))
}

/// The characters of a string, quoted or not.
fn unquote(text: &str) -> Option<String> {
    if !text.bytes().all(|b| matches!(b, b' '..=b'~')) {
        return None;
    }
    let Some(quoted) = text.strip_prefix('"') else {
        return (!text.contains(['"', '\\'])).then(|| text.to_owned());
    };
    let quoted = quoted.strip_suffix('"')?;
    let mut key = String::with_capacity(quoted.len());
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => return None,
            '\\' => key.push(chars.next().filter(|c| matches!(c, '"' | '\\'))?),
            c => key.push(c),
        }
    }
    Some(key)
}

/// The id under which a request's command is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) update_id: ObjectId,
    /// Whether an earlier request created it.
    pub(crate) replayed: bool,
}

/// How long a measurement of the bucket is used. Longer lets a project exceed its share by more, shorter costs
/// requests.
const MEASURED_FOR: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct IdempotencyStore {
    /// Empty until the first request with a key.
    store: OnceCell<Store>,
    usage: Mutex<Option<BucketUsage>>,
    /// Bounds the requests that wait for the bucket's leader.
    admission: Arc<Admission>,
    repetitions: Semaphore,
    /// Whether the bucket accepts keys.
    pub(crate) outage: Outage,
}

/// Why a key could not be claimed.
#[derive(Debug)]
enum ClaimError {
    /// The bucket has no leader, or there is no connection.
    Unavailable(String),
    Refused(ApiError),
}

impl From<ApiError> for ClaimError {
    fn from(error: ApiError) -> Self {
        Self::Refused(error)
    }
}

impl ClaimError {
    fn unavailable(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Unavailable(error_chain(error))
    }
}

/// How full the bucket is.
#[derive(Debug)]
struct BucketUsage {
    at: Instant,
    records: u64,
    bytes: u64,
    /// None: unbounded.
    max_bytes: Option<u64>,
    /// The number of records per project. Counted only while the bucket is scarce.
    projects: HashMap<ObjectId, u64>,
}

impl BucketUsage {
    /// The usage of a bucket that could not be measured: it refuses no key.
    fn unknown() -> Self {
        Self { at: Instant::now(), records: 0, bytes: 0, max_bytes: None, projects: HashMap::new() }
    }

    /// Whether shares apply. In a bucket that is at most half full, no project uses more than is free.
    fn is_scarce(&self) -> bool {
        self.max_bytes.is_some_and(|max| self.bytes > max / 2)
    }

    /// Whether a project with this number of records may have more.
    fn admits(&self, own_records: u64) -> bool {
        let Some(max_bytes) = self.max_bytes.filter(|_| self.is_scarce()) else { return true };
        let record_bytes = self.bytes / self.records.max(1);
        let free = max_bytes.saturating_sub(self.bytes);
        // Without room for another record, the bucket itself refuses.
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        free < record_bytes || shares::available(signed(free), signed(own_records.saturating_mul(record_bytes))) > 0
    }
}

impl IdempotencyStore {
    pub(crate) fn new(admission: Arc<Admission>) -> Self {
        Self {
            store: OnceCell::new(),
            usage: Mutex::default(),
            admission,
            repetitions: Semaphore::new(MAX_REPETITIONS),
            outage: Outage::new("the bucket of idempotency keys", "keys"),
        }
    }

    /// Like [`claim`](Self::claim), for a bulk request: the ids of its updates are derived from the claim's.
    pub(crate) async fn claim_bulk(
        &self,
        js: &jetstream::Context,
        project_id: ObjectId,
        kind: OutcomeKind,
        client_key: &str,
        request: PendingRequest,
    ) -> Result<Claim, ApiError> {
        let record = IdempotencyRecord::of_bulk(kind, clock::new_id());
        self.claim(js, project_id, client_key, &record, request).await
    }

    /// Reads the record of a client's key, or creates it if the project's share allows it. Waits for the bucket's
    /// leader as long as the request may wait.
    pub(crate) async fn claim(
        &self,
        js: &jetstream::Context,
        project_id: ObjectId,
        client_key: &str,
        record: &IdempotencyRecord,
        request: PendingRequest,
    ) -> Result<Claim, ApiError> {
        let key = &*idempotency_key(project_id, client_key);
        let deadline = self.outage.deadline(request.began);
        let mut claimed = self.attempt(js, project_id, key, record).await;
        if matches!(&claimed, Err(ClaimError::Unavailable(_))) && Instant::now() < deadline {
            let _waiting = self.admission.wait_in(project_id, request.bytes)?;
            while matches!(&claimed, Err(ClaimError::Unavailable(_)))
                && Instant::now() < deadline
                && let Ok(Ok(_permit)) = timeout_at(deadline.into(), self.repetitions.acquire()).await
            {
                claimed = self.attempt(js, project_id, key, record).await;
                if matches!(&claimed, Err(ClaimError::Unavailable(_))) {
                    // The permit is held during the pause, so that permits pace the repetitions of all requests
                    // together.
                    sleep(PAUSE.min(deadline.saturating_duration_since(Instant::now()))).await;
                }
            }
        }
        match claimed {
            Ok(claim) => {
                self.outage.succeeded();
                Ok(claim)
            }
            Err(ClaimError::Refused(error)) => Err(error),
            Err(ClaimError::Unavailable(why)) => {
                self.outage.failed(request.began, &why);
                Err(ApiError::IdempotencyUnavailable)
            }
        }
    }

    async fn attempt(
        &self,
        js: &jetstream::Context,
        project_id: ObjectId,
        key: &str,
        record: &IdempotencyRecord,
    ) -> Result<Claim, ClaimError> {
        let claimed = timeout(ANSWER_TIMEOUT, self.try_claim(js, project_id, key, record)).await;
        claimed.unwrap_or_else(|_| Err(ClaimError::Unavailable(format!("no answer within {ANSWER_TIMEOUT:?}"))))
    }

    async fn try_claim(
        &self,
        js: &jetstream::Context,
        project_id: ObjectId,
        key: &str,
        record: &IdempotencyRecord,
    ) -> Result<Claim, ClaimError> {
        let store = self.store.get_or_try_init(|| js.get_key_value(IDEMPOTENCY)).await;
        let store = store.map_err(|e| ClaimError::unavailable(&e))?;
        let value = serde_json::to_vec(record).map_err(|e| {
            tracing::error!("cannot serialize an idempotency record: {e}");
            ApiError::Internal
        })?;
        if let Err(refusal) = self.check_share(store, project_id).await {
            let first = store.get(key).await.map_err(|e| ClaimError::unavailable(&e))?;
            return Ok(first.map_or(Err(refusal), |first| decide(&first, record))?);
        }
        for _ in 0..ATTEMPTS {
            match store.create(key, value.clone().into()).await {
                Ok(_) => return Ok(Claim { update_id: record.update_id, replayed: false }),
                Err(e) if e.kind() == CreateErrorKind::AlreadyExists => {}
                Err(e) => return Err(refusal(&e)),
            }
            if let Some(first) = store.get(key).await.map_err(|e| ClaimError::unavailable(&e))? {
                return Ok(decide(&first, record)?);
            }
        }
        Err(ClaimError::Unavailable("a record exists and cannot be found".into()))
    }

    /// Refuses a new key to a project that has used up its share. Without a measurement it refuses no key: the bucket
    /// itself is bounded.
    async fn check_share(&self, store: &Store, project_id: ObjectId) -> Result<(), ApiError> {
        let mut usage = self.usage.lock().await;
        if usage.as_ref().is_none_or(|usage| usage.at.elapsed() > MEASURED_FOR) {
            let measured = timeout(MEASURE_TIMEOUT, measure(store)).await;
            *usage = Some(match measured {
                Ok(Ok(measured)) => measured,
                Ok(Err(e)) => {
                    tracing::warn!("cannot measure the bucket of idempotency keys: {}", error_chain(&*e));
                    BucketUsage::unknown()
                }
                Err(_) => {
                    tracing::warn!("cannot measure the bucket of idempotency keys within {MEASURE_TIMEOUT:?}");
                    BucketUsage::unknown()
                }
            });
        }
        let Some(usage) = usage.as_mut().filter(|usage| usage.is_scarce()) else { return Ok(()) };
        let own = match usage.projects.get(&project_id) {
            Some(own) => *own,
            None => {
                let counted = match timeout(COUNT_TIMEOUT, count(store, project_id)).await {
                    Ok(Ok(counted)) => counted,
                    Ok(Err(e)) => {
                        tracing::warn!("cannot count the idempotency keys of a project: {}", error_chain(&*e));
                        0
                    }
                    // All requests with a key wait for this.
                    Err(_) => {
                        tracing::warn!("cannot count the idempotency keys of a project within {COUNT_TIMEOUT:?}");
                        0
                    }
                };
                usage.projects.insert(project_id, counted);
                counted
            }
        };
        if usage.admits(own) { Ok(()) } else { Err(ApiError::IdempotencyShare(own)) }
    }
}

async fn measure(store: &Store) -> Result<BucketUsage, async_nats::Error> {
    let info = store.stream.get_info().await?;
    Ok(BucketUsage {
        at: Instant::now(),
        records: info.state.messages,
        bytes: info.state.bytes,
        max_bytes: u64::try_from(info.config.max_bytes).ok().filter(|max| *max > 0),
        projects: HashMap::new(),
    })
}

/// Counts a project's records: they are the pending messages of a new consumer. The server counts them without reading
/// them.
async fn count(store: &Store, project_id: ObjectId) -> Result<u64, async_nats::Error> {
    let config = pull::Config {
        name: Some(format!("count-{}", clock::new_id())),
        ack_policy: AckPolicy::None,
        filter_subject: format!("{}{project_id}.>", store.prefix),
        memory_storage: true,
        num_replicas: 1,
        // The server deletes the idle consumer.
        inactive_threshold: Duration::from_secs(1),
        ..Default::default()
    };
    let consumer: PullConsumer = store.stream.create_consumer(config).await?;
    Ok(consumer.cached_info().num_pending)
}

/// Compares a request with the first one under its key. The stored record may be this request's own, if the reply to
/// its creation was lost.
fn decide(first: &[u8], record: &IdempotencyRecord) -> Result<Claim, ApiError> {
    let first: IdempotencyRecord = serde_json::from_slice(first).map_err(|e| {
        tracing::error!("cannot parse an idempotency record: {e}");
        ApiError::Internal
    })?;
    if first.body != record.body {
        return Err(ApiError::IdempotencyConflict);
    }
    Ok(Claim { update_id: first.update_id, replayed: first.update_id != record.update_id })
}

fn refusal(error: &CreateError) -> ClaimError {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    let answer = causes.find_map(|cause| cause.downcast_ref::<jetstream::Error>());
    // "maximum bytes exceeded", as opposed to a store that is closed because its server stops.
    let is_full = |answer: &jetstream::Error| {
        answer.error_code() == ErrorCode::STREAM_STORE_FAILED && answer.to_string().starts_with("maximum")
    };
    if answer.is_some_and(is_full) {
        return ClaimError::Refused(ApiError::IdempotencyFull);
    }
    ClaimError::unavailable(error)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[&[u8]]) -> Result<Option<String>, String> {
        let value = |bytes: &&[u8]| (IDEMPOTENCY_KEY, HeaderValue::from_bytes(bytes).unwrap());
        let mut headers = HeaderMap::new();
        headers.extend(values.iter().map(value));
        key(&headers).map_err(|e| format!("{} {e}", e.status().as_u16()))
    }

    #[test]
    fn a_key_is_a_string_with_or_without_quotes() {
        assert_eq!(of(&[]), Ok(None));
        for (text, key) in [
            ("order-7", "order-7"),
            ("\"order-7\"", "order-7"),
            (" \"order 7\" ", "order 7"),
            (r#""a \"b\" \\""#, r#"a "b" \"#),
            ("8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        ] {
            assert_eq!(of(&[text.as_bytes()]), Ok(Some(key.into())), "{text}");
        }
        let long = "x".repeat(255);
        assert_eq!(of(&[long.as_bytes()]), Ok(Some(long.clone())));
        assert_eq!(of(&[format!("\"{long}\"").as_bytes()]), Ok(Some(long.clone())));
        for odd in ["", "\"\"", "\"", "\"a", "a\"", "a\\", r#""a\b""#, r#""a"b""#, "a\tb", "\"a\";p=1"] {
            assert!(of(&[odd.as_bytes()]).unwrap_err().starts_with("400 Idempotency-Key must"), "{odd}");
        }
        assert!(of(&["é".as_bytes()]).is_err());
        assert_eq!(
            of(&[format!("{long}x").as_bytes()]),
            Err("400 Idempotency-Key must have 1 to 255 characters".into())
        );
        assert_eq!(of(&[b"a", b"a"]), Err("400 Idempotency-Key is given twice".into()));
    }

    #[test]
    fn a_key_belongs_to_its_first_body() {
        let (mine, other) = (ObjectId::from_bytes([1; 12]), ObjectId::from_bytes([2; 12]));
        let record = IdempotencyRecord::new(OutcomeKind::Update, b"{}", None, None, mine);
        let first =
            |body, id| serde_json::to_vec(&IdempotencyRecord::new(OutcomeKind::Update, body, None, None, id)).unwrap();
        assert_eq!(decide(&first(b"{}", other), &record), Ok(Claim { update_id: other, replayed: true }));
        assert_eq!(decide(&first(b"{}", mine), &record), Ok(Claim { update_id: mine, replayed: false }));
        assert_eq!(decide(&first(b"{ }", other), &record), Err(ApiError::IdempotencyConflict));
        assert_eq!(decide(b"", &record), Err(ApiError::Internal));
    }

    #[test]
    fn a_project_beyond_its_share_gets_no_new_keys() {
        let usage = |records| BucketUsage {
            at: Instant::now(),
            records,
            bytes: records * 200,
            max_bytes: Some(200_000),
            projects: HashMap::new(),
        };
        assert!(usage(500).admits(500), "half of the bucket is free");
        assert!(!usage(501).admits(501) && usage(501).admits(100));
        assert!(!usage(900).admits(100) && usage(900).admits(99), "as much as is free");
        assert!(usage(1000).admits(100), "the bucket itself refuses");
        assert!(BucketUsage { max_bytes: None, ..usage(5000) }.admits(5000));
    }

    proptest! {
        #[test]
        fn arbitrary_headers_are_a_key_or_a_400(bytes in prop_oneof![
            any::<Vec<u8>>(),
            prop::collection::vec(prop::sample::select(br#""\ab ;=,"#.to_vec()), 0..8),
        ]) {
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return Ok(()) };
            match key(&HeaderMap::from_iter([(IDEMPOTENCY_KEY, value)])) {
                Ok(key) => prop_assert!((1..=MAX_CHARS).contains(&key.unwrap().len())),
                Err(e) => prop_assert_eq!(e.status().as_u16(), 400),
            }
        }

        #[test]
        fn quoted_keys_round_trip(text in "[ -~]{1,255}") {
            let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
            prop_assert_eq!(of(&[quoted.as_bytes()]), Ok(Some(text)));
        }
    }
}
