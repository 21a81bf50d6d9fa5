//! The gateway's record of a request with an `Idempotency-Key`: an entry of the bucket
//! [`IDEMPOTENCY`](crate::streams::IDEMPOTENCY).

use std::time::Duration;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{ObjectId, event::OutcomeKind, streams::IDEMPOTENCY_AGE};

/// The first request with a key. It is written before the command is published, so its update may be missing in the
/// log; a repeated request then publishes the command under the same `updateId`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct IdempotencyRecord {
    /// The digest of the request's body and expectations: the first 16 bytes of their SHA-256, in base64url; `bulk` for
    /// a bulk request of updates, `bulk call.started` and `bulk call.ended` for one of call events.
    pub body: String,
    /// The update of the request.
    pub update_id: ObjectId,
}

impl IdempotencyRecord {
    /// The record of a request of this kind with this body and these expectations.
    pub fn new(
        kind: OutcomeKind,
        body: &[u8],
        expected_version: Option<u32>,
        expected_state: Option<&str>,
        update_id: ObjectId,
    ) -> Self {
        let mut digest = Sha256::new();
        digest.update(body);
        // No JSON text ends like this, so no other request has the same digest.
        if !kind.is_update() {
            digest.update(format!("\nkind: {kind}"));
        }
        if let Some(version) = expected_version {
            digest.update(format!("\nIf-Match: {version}"));
        }
        if let Some(state) = expected_state {
            digest.update(format!("\nexpectedState: {state}"));
        }
        Self { body: short(digest), update_id }
    }

    /// The record of a bulk request, whose body is not read yet. The ids of its lines are derived from `update_id`. Its
    /// `body` differs from every digest.
    pub fn of_bulk(kind: OutcomeKind, update_id: ObjectId) -> Self {
        let body = if kind.is_update() { "bulk".into() } else { format!("bulk {kind}") };
        Self { body, update_id }
    }
}

/// The key of a request's record: `{projectId}.{digest of the client's key}`. The client's key is hashed, because it
/// may contain characters that bucket keys may not. The project is included, because projects may choose the same keys.
pub fn idempotency_key(project_id: ObjectId, client_key: &str) -> String {
    format!("{project_id}.{}", short(Sha256::new_with_prefix(client_key)))
}

/// The first 16 bytes of a digest, in base64url. The digest is short, because there are many records. 128 bits suffice,
/// because only requests of one project are compared.
fn short(digest: Sha256) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(&digest.finalize()[..16])
}

/// How long until the bucket is full, if records keep arriving at this rate. At most [`IDEMPOTENCY_AGE`], which means
/// never: the oldest records expire first.
pub fn lasts(bytes: u64, max_bytes: u64, bytes_per_second: f64) -> Duration {
    let at_once = bytes_per_second * IDEMPOTENCY_AGE.as_secs_f64();
    if at_once <= max_bytes as f64 {
        return IDEMPOTENCY_AGE;
    }
    let seconds = max_bytes.saturating_sub(bytes) as f64 / bytes_per_second;
    Duration::from_secs_f64(seconds.min(IDEMPOTENCY_AGE.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_this_wire_form() {
        let record = IdempotencyRecord::new(OutcomeKind::Update, b"{}", None, None, ObjectId::from_bytes([1; 12]));
        insta::assert_snapshot!(serde_json::to_string(&record).unwrap(), @r#"{"body":"RBNvo1WzZ4oRRq0W9-hkng","updateId":"010101010101010101010101"}"#);
        let of = |kind, version, state| IdempotencyRecord::new(kind, b"{}", version, state, record.update_id).body;
        let digests = [
            of(OutcomeKind::Update, None, None),
            of(OutcomeKind::Update, Some(1), None),
            of(OutcomeKind::Update, Some(2), None),
            of(OutcomeKind::Update, None, Some("1")),
            of(OutcomeKind::Update, Some(1), Some("1")),
            of(OutcomeKind::CallStarted, None, None),
            of(OutcomeKind::CallEnded, None, None),
        ];
        assert_eq!(digests.iter().collect::<std::collections::HashSet<_>>().len(), digests.len());
        insta::assert_snapshot!(idempotency_key(ObjectId::from_bytes([2; 12]), "order 7"), @"020202020202020202020202.D8ifiuGTlLSN69Y1O7mtMw");
    }

    #[test]
    fn a_bucket_lasts_until_it_is_full_or_its_records_expire() {
        const MIB: u64 = 1 << 20;
        let hours = |bytes, max_bytes, per_second: f64| lasts(bytes, max_bytes, per_second).as_secs() / 3600;
        assert_eq!(hours(0, 256 * MIB, 0.0), 24);
        // 14 keys of 220 bytes a second fit, 28 do not.
        assert_eq!(hours(200 * MIB, 256 * MIB, 14.0 * 220.0), 24);
        assert_eq!(hours(0, 256 * MIB, 28.0 * 220.0), 12);
        assert_eq!(hours(255 * MIB, 256 * MIB, 28.0 * 220.0), 0);
        assert_eq!(hours(300 * MIB, 256 * MIB, 28.0 * 220.0), 0);
    }
}
