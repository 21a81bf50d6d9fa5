//! How voice platforms authenticate their call reports. Pure; the time is an argument.

use contract::{Timestamp, process::Platform, secret::Secret};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// Maximum difference between the time in a signature and ours. A larger one accepts a stolen report for longer; a
/// smaller one refuses retries of a platform, and reports while clocks differ.
const MAX_AGE_MS: i64 = 5 * 60 * 1000;

/// The credentials and the body of a report.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReportProof<'a> {
    pub(crate) signature: Option<&'a str>,
    /// The SHA-256, in hex, of the secret that was sent.
    pub(crate) secret_sha256: Option<&'a str>,
    pub(crate) body: &'a [u8],
}

/// Whether one of these secrets authenticates a report of this platform.
///
/// | platform | authentication |
/// |---|---|
/// | Vapi | the hex HMAC-SHA256 of the body, or the secret itself |
/// | Retell | `v={ms},d={hex}`: HMAC-SHA256 of the body followed by the time, which must be recent |
/// | Bland | the hex HMAC-SHA256 of the body |
pub(crate) fn is_authentic(platform: Platform, secrets: &[Secret], proof: ReportProof<'_>, now: Timestamp) -> bool {
    let ReportProof { signature, secret_sha256, body } = proof;
    match (platform, signature) {
        (Platform::Retell, Some(signature)) => is_signed_by_retell(secrets, signature, body, now),
        (Platform::Vapi | Platform::Bland, Some(signature)) => {
            let signature = signature.strip_prefix("sha256=").unwrap_or(signature);
            secrets.iter().any(|secret| is_hmac(secret, &[body], signature))
        }
        (Platform::Vapi, None) => {
            secret_sha256.is_some_and(|sent| secrets.iter().any(|secret| is_digest(secret, sent)))
        }
        (Platform::Retell | Platform::Bland, None) => false,
    }
}

fn is_signed_by_retell(secrets: &[Secret], signature: &str, body: &[u8], now: Timestamp) -> bool {
    let Some((time, digest)) = signature.strip_prefix("v=").and_then(|rest| rest.split_once(",d=")) else {
        return false;
    };
    let is_near = time.parse::<i64>().is_ok_and(|ms| now.millis().abs_diff(ms) <= MAX_AGE_MS.unsigned_abs());
    is_near && secrets.iter().any(|secret| is_hmac(secret, &[body, time.as_bytes()], digest))
}

/// Compares in constant time.
fn is_hmac(secret: &Secret, parts: &[&[u8]], hex: &str) -> bool {
    let Some(given) = from_hex(hex) else { return false };
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()) else { return false };
    parts.iter().for_each(|part| mac.update(part));
    mac.verify_slice(&given).is_ok()
}

/// Compares digests: how long that takes reveals nothing about the secret.
fn is_digest(secret: &Secret, sha256: &str) -> bool {
    from_hex(sha256).is_some_and(|given| given[..] == Sha256::digest(secret.expose())[..])
}

/// The 32 bytes of 64 hex digits.
fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BODY: &[u8] = br#"{"event":"call_ended"}"#;
    const NOW: i64 = 1_768_193_759_048;

    fn hex(bytes: impl AsRef<[u8]>) -> String {
        bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn hmac(secret: &str, parts: &[&[u8]]) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        parts.iter().for_each(|part| mac.update(part));
        hex(mac.finalize().into_bytes())
    }

    fn retell(secret: &str, ms: i64) -> String {
        format!("v={ms},d={}", hmac(secret, &[BODY, ms.to_string().as_bytes()]))
    }

    fn check(platform: Platform, signature: Option<&str>, secret_sha256: Option<&str>) -> bool {
        let secrets = ["the former secret".into(), "the new secret".into()];
        let proof = ReportProof { signature, secret_sha256, body: BODY };
        is_authentic(platform, &secrets, proof, Timestamp::from_millis(NOW))
    }

    #[test]
    fn the_published_example_of_an_hmac_is_accepted() {
        // RFC 4231, test case 2.
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert!(is_hmac(&"Jefe".into(), &[b"what do ya want ", b"for nothing?"], expected));
    }

    #[test]
    fn each_platform_authenticates_in_its_own_way() {
        for secret in ["the former secret", "the new secret"] {
            let signed = hmac(secret, &[BODY]);
            let digest = hex(Sha256::digest(secret));
            assert!(check(Platform::Vapi, Some(&signed), None));
            assert!(check(Platform::Vapi, Some(&format!("sha256={signed}")), None));
            assert!(check(Platform::Vapi, None, Some(&digest)));
            assert!(check(Platform::Bland, Some(&signed), None));
            assert!(check(Platform::Retell, Some(&retell(secret, NOW - 299_000)), None));
            assert!(!check(Platform::Retell, Some(&signed), None));
            assert!(!check(Platform::Bland, None, Some(&digest)));
        }
    }

    #[test]
    fn a_report_without_a_valid_signature_is_refused() {
        let other = hmac("another secret", &[BODY]);
        let digest = hex(Sha256::digest("another secret"));
        for platform in Platform::ALL {
            for signature in [None, Some(""), Some("v=,d="), Some("nonsense"), Some(&other), Some(&retell("x", NOW))] {
                assert!(!check(platform, signature, Some(&digest)), "{platform} {signature:?}");
            }
        }
        for late in [NOW - 301_000, NOW + 301_000, i64::MIN] {
            assert!(!check(Platform::Retell, Some(&retell("the new secret", late)), None), "{late}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_signatures_never_panic(text in "(v=)?[0-9]{0,20}(,d=)?[0-9a-fé]{0,70}") {
            for platform in Platform::ALL {
                prop_assert!(!check(platform, Some(&text), Some(&text)));
            }
        }
    }
}
