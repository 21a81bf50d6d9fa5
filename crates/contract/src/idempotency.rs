//! The gateway's record of a request with an `Idempotency-Key`: an entry of the bucket
//! [`IDEMPOTENCY`](crate::streams::IDEMPOTENCY).

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ObjectId;

/// The first request with a key. It is written before the command is published, so its update may be missing in the log; a
/// repeated request then publishes the command under the same `updateId`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct IdempotencyRecord {
    /// The SHA-256 of the request's body and `If-Match`, in hex; `bulk` for a bulk request.
    pub body_sha256: String,
    /// The update of the request.
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

    /// The record of a bulk request, whose body is not read yet: the ids of its lines follow from this id. No digest of
    /// another request is equal to it.
    pub fn of_bulk(update_id: ObjectId) -> Self {
        Self { body_sha256: "bulk".into(), update_id }
    }
}

/// The key of a request's record: `{projectId}.{SHA-256 of the client's key in hex}`. Clients' keys may contain characters
/// that bucket keys may not, and projects may choose the same keys.
pub fn idempotency_key(project_id: ObjectId, client_key: &str) -> String {
    format!("{project_id}.{}", hex::encode(Sha256::digest(client_key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_this_wire_form() {
        let record = IdempotencyRecord::new(b"{}", None, ObjectId::from_bytes([1; 12]));
        insta::assert_snapshot!(serde_json::to_string(&record).unwrap(), @r#"{"bodySha256":"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","updateId":"010101010101010101010101"}"#);
        let expecting = |version| IdempotencyRecord::new(b"{}", version, record.update_id).body_sha256;
        assert_ne!(expecting(Some(1)), expecting(None));
        assert_ne!(expecting(Some(1)), expecting(Some(2)));
        insta::assert_snapshot!(idempotency_key(ObjectId::from_bytes([2; 12]), "order 7"), @"020202020202020202020202.0fc89f8ae19394b48debd6353bb9ad3393f3bc791931519f19d176a7e5513ebc");
    }
}
