//! What the gateway remembers of a request that carried an `Idempotency-Key`: an entry of the bucket
//! [`IDEMPOTENCY`](crate::streams::IDEMPOTENCY).

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ObjectId;

/// The first request under a key. It is written before the command is logged, so it may name an update that is not in
/// the log (yet): whoever repeats the request logs the command under the same `updateId`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct IdempotencyRecord {
    /// The SHA-256 of the request's body, in hex; where it has an `If-Match`, of that, too. `bulk` of a bulk request.
    pub body_sha256: String,
    /// The update that the request became.
    pub update_id: ObjectId,
}

impl IdempotencyRecord {
    /// The record of a request with this body that expects the lead at this version.
    pub fn new(body: &[u8], if_match: Option<u32>, update_id: ObjectId) -> Self {
        let mut digest = Sha256::new();
        digest.update(body);
        if let Some(version) = if_match {
            // No JSON text ends like this, so no other request has the same digest.
            digest.update(format!("\nIf-Match: {version}"));
        }
        Self { body_sha256: hex::encode(digest.finalize()), update_id }
    }

    /// The record of a bulk request, whose body is not known yet when it is made: what its lines' ids follow from. No
    /// other request has a digest like it.
    pub fn of_bulk(update_id: ObjectId) -> Self {
        Self { body_sha256: "bulk".into(), update_id }
    }
}

/// Where the record of a project's request is: `{projectId}.{SHA-256 of the client's key in hex}`. Clients' keys hold
/// characters that keys of buckets may not, and projects may choose the same ones.
pub fn idempotency_key(project_id: ObjectId, client_key: &str) -> String {
    format!("{project_id}.{}", hex::encode(Sha256::digest(client_key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_on_the_wire() {
        let record = IdempotencyRecord::new(b"{}", None, ObjectId::from_bytes([1; 12]));
        insta::assert_snapshot!(serde_json::to_string(&record).unwrap(), @r#"{"bodySha256":"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","updateId":"010101010101010101010101"}"#);
        let expecting = |version| IdempotencyRecord::new(b"{}", version, record.update_id).body_sha256;
        assert_ne!(expecting(Some(1)), expecting(None));
        assert_ne!(expecting(Some(1)), expecting(Some(2)));
        insta::assert_snapshot!(idempotency_key(ObjectId::from_bytes([2; 12]), "order 7"), @"020202020202020202020202.0fc89f8ae19394b48debd6353bb9ad3393f3bc791931519f19d176a7e5513ebc");
    }
}
