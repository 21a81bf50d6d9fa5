//! The signature of a webhook, as in Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

use base64::{Engine, prelude::BASE64_STANDARD};
use contract::{process::signing_key, secret::Secret};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// There is no signing secret, or one is not `whsec_` and the base64 of 24 to 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the callback has no valid signing secret")]
pub struct BadSecret;

/// The value of `webhook-signature`: one signature per secret, so that rotations can overlap. `timestamp` is in Unix
/// seconds. Without a secret, or with an invalid one, it is an error, so that nothing is sent unsigned.
pub fn signature<'a>(
    secrets: impl IntoIterator<Item = &'a Secret>,
    id: &str,
    timestamp: u32,
    body: &[u8],
) -> Result<String, BadSecret> {
    let signatures = secrets.into_iter().map(|secret| {
        let key = signing_key(secret).ok_or(BadSecret)?;
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).map_err(|_| BadSecret)?;
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(body);
        Ok(format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes())))
    });
    let signatures = signatures.collect::<Result<Vec<_>, _>>()?;
    if signatures.is_empty() { Err(BadSecret) } else { Ok(signatures.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: (&str, &str, u32, &str, &str) = (
        "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
        "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
        1_649_367_553,
        r#"{"email":"test@example.com","username":"test_user"}"#,
        "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
    );
    const TWO: (&str, &str, u32, &str, &str) = (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1_614_265_330,
        r#"{"test": 2432232314}"#,
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    );

    #[test]
    fn signatures_match_the_published_vectors() {
        for (secret, id, timestamp, body, expected) in [ONE, TWO] {
            assert_eq!(signature(&[secret.into()], id, timestamp, body.as_bytes()).unwrap(), expected);
        }
    }

    #[test]
    fn every_secret_signs_during_a_rotation() {
        let (secret, id, timestamp, body, expected) = ONE;
        let both = signature(&[TWO.0.into(), secret.into()], id, timestamp, body.as_bytes()).unwrap();
        let signatures = both.split(' ').collect::<Vec<_>>();
        assert_eq!(signatures.len(), 2);
        assert_eq!(signatures[1], expected);
    }

    #[test]
    fn a_missing_or_invalid_secret_is_an_error() {
        for secrets in [vec![], vec!["whsec_AAAA".into()], vec![ONE.0.into(), "nonsense".into()]] {
            assert_eq!(signature(&secrets, "id", 1, b"{}"), Err(BadSecret), "{secrets:?}");
        }
    }
}
