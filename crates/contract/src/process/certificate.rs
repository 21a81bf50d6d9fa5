//! The certificate that a callback's client presents to its endpoint (mutual TLS).

use std::sync::Arc;

use rustls::{
    Error, InconsistentKeys,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize};
use time::{Date, Month, OffsetDateTime, Time};

use super::{MAX_CERTIFICATE_BYTES, MAX_CHAIN_CERTIFICATES};
use crate::{Timestamp, secret::Secret};

/// A client certificate and its private key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
#[serde(rename_all = "camelCase")]
pub struct ClientCertificate {
    /// The certificate in PEM, followed by the certificates that lead to an authority the endpoint trusts. It is
    /// public.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_CERTIFICATE_BYTES)))]
    pub certificate: String,
    /// The private key in PEM (PKCS #8, PKCS #1 or SEC 1, not encrypted). Empty where secrets are not shown; leave it
    /// empty in a specification to keep the current one.
    #[serde(default, skip_serializing_if = "Secret::is_empty")]
    pub key: Secret,
}

impl ClientCertificate {
    /// The chain and the key for TLS.
    ///
    /// # Errors
    /// The certificate or the key cannot be used. The error text does not quote them.
    pub fn certified_key(&self) -> Result<Arc<CertifiedKey>, String> {
        let key = PrivateKeyDer::from_pem_slice(self.key.expose().as_bytes())
            .map_err(|_| "key is not an unencrypted private key in PEM (PKCS #8, PKCS #1 or SEC 1)")?;
        let certified = CertifiedKey::from_der(self.chain()?, key, &ring::default_provider());
        certified.map(Arc::new).map_err(|e| match e {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => "key is not the certificate's".into(),
            Error::InvalidCertificate(_) => NO_CERTIFICATE.into(),
            _ => "key is of a kind or size that is not supported: use ECDSA P-256 or P-384, Ed25519, or RSA with at least \
                  2048 bits"
                .into(),
        })
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.certificate.as_bytes()).collect();
        let chain = chain.map_err(|_| NO_CERTIFICATE)?;
        match chain.len() {
            0 => Err(NO_CERTIFICATE.into()),
            1..=MAX_CHAIN_CERTIFICATES => Ok(chain),
            count => Err(format!("certificate: {count} are given, and at most {MAX_CHAIN_CERTIFICATES} are allowed")),
        }
    }

    /// When the certificate expires.
    pub fn expires_at(&self) -> Option<Timestamp> {
        let end = not_after(self.chain().ok()?.first()?)?;
        Some(Timestamp::from_millis(end.unix_timestamp() * 1000))
    }

    /// The faults of certificate and key, one sentence each. Without a key, only the certificate is checked.
    pub(super) fn faults(&self, url: &str) -> Vec<String> {
        let mut faults = Vec::new();
        let size = |member: &str, bytes: usize| {
            (bytes > MAX_CERTIFICATE_BYTES)
                .then(|| format!("{member} has {bytes} bytes, and at most {MAX_CERTIFICATE_BYTES} are allowed"))
        };
        faults.extend(size("certificate", self.certificate.len()));
        faults.extend(size("key", self.key.expose().len()));
        if self.key.is_sealed() {
            faults.push(
                "key must be in clear; this one is sealed and opens only in the callback it was copied from".into(),
            );
        }
        // The key would be stored in clear, and shown.
        if self.certificate.contains("PRIVATE KEY") {
            faults.push("certificate contains a private key: move it to key".into());
        }
        if faults.is_empty() {
            match self.expires_at() {
                None => faults.push(self.chain().err().unwrap_or_else(|| NO_CERTIFICATE.into())),
                Some(_) if self.key.is_empty() => {}
                Some(_) => faults.extend(self.certified_key().err()),
            }
        }
        if !url.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://")) {
            faults.push("a certificate is presented over TLS only: url must be https".into());
        }
        faults.into_iter().map(|fault| format!("clientCertificate: {fault}")).collect()
    }
}

const NO_CERTIFICATE: &str = "certificate is not a chain of X.509 certificates in PEM";

/// The end of a certificate's validity (RFC 5280, section 4.1).
fn not_after(certificate: &[u8]) -> Option<OffsetDateTime> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let certificate = value_of(certificate, SEQUENCE)?;
    let mut fields = value_of(certificate, SEQUENCE)?;
    if fields.first() == Some(&VERSION) {
        fields = read(fields)?.rest;
    }
    // The serial number, the algorithm of the signature, the issuer.
    for _ in 0..3 {
        fields = read(fields)?.rest;
    }
    let validity = value_of(fields, SEQUENCE)?;
    let end = read(read(validity)?.rest)?;
    parse_time(end.tag, std::str::from_utf8(end.value).ok()?)
}

/// The first element of DER, and the rest.
struct Element<'a> {
    tag: u8,
    value: &'a [u8],
    rest: &'a [u8],
}

fn read(der: &[u8]) -> Option<Element<'_>> {
    let (&[tag, short], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match short {
        0..=0x7f => (usize::from(short), rest),
        0x81..=0x84 => {
            let (length, rest) = rest.split_at_checked(usize::from(short & 0x7f))?;
            (length.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(length)?;
    Some(Element { tag, value, rest })
}

/// The value of the first element, if it has this tag.
fn value_of(der: &[u8], tag: u8) -> Option<&[u8]> {
    read(der).filter(|element| element.tag == tag).map(|element| element.value)
}

/// A `UTCTime` (`YYMMDDHHMMSSZ`) or `GeneralizedTime` (`YYYYMMDDHHMMSSZ`).
fn parse_time(tag: u8, text: &str) -> Option<OffsetDateTime> {
    let digits = text.strip_suffix('Z').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?;
    let number = |from: usize, to: usize| digits.get(from..to)?.parse::<u16>().ok();
    let (year, at) = match (tag, digits.len()) {
        (0x17, 12) => (number(0, 2).map(|year| if year < 50 { 2000 + year } else { 1900 + year })?, 2),
        (0x18, 14) => (number(0, 4)?, 4),
        _ => return None,
    };
    let part = |index: usize| u8::try_from(number(at + 2 * index, at + 2 * index + 2)?).ok();
    let date = Date::from_calendar_date(year.into(), Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    Some(date.with_time(Time::from_hms(part(2)?, part(3)?, part(4)?).ok()?).assume_utc())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, Issuer, KeyPair, date_time_ymd};

    use super::*;

    fn certificate(not_after: (i32, u8, u8)) -> ClientCertificate {
        let mut params = CertificateParams::new(["client".to_owned()]).unwrap();
        params.not_after = date_time_ymd(not_after.0, not_after.1, not_after.2);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        ClientCertificate { certificate, key: key.serialize_pem().into() }
    }

    #[test]
    fn the_expiry_of_a_certificate_is_read() {
        // The first year is written as UTCTime, the second as GeneralizedTime.
        for (year, seconds) in [(2030, 1_893_456_000), (2060, 2_840_140_800)] {
            let expires_at = certificate((year, 1, 1)).expires_at();
            assert_eq!(expires_at, Some(Timestamp::from_millis(seconds * 1000)), "{year}");
        }
    }

    #[test]
    fn a_certificate_needs_its_key_a_chain_and_https() {
        let url = "https://crm.example";
        let valid = certificate((2030, 1, 1));
        let (certificate, key) = (valid.certificate.clone(), valid.key.clone());
        assert_eq!(valid.faults(url), Vec::<String>::new());
        assert_eq!(valid.faults("HTTPS://crm.example"), Vec::<String>::new());
        let with =
            |certificate: &str, key: &str| ClientCertificate { certificate: certificate.into(), key: key.into() };
        assert_eq!(with(&certificate, "").faults(url), Vec::<String>::new(), "the current key is kept");
        let other = KeyPair::generate().unwrap().serialize_pem();
        let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        let no_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (certificate, key, url, expected) in [
            (certificate.as_str(), other.as_str(), url, "key is not the certificate's"),
            (&certificate, encrypted, url, "key is not an unencrypted private key in PEM (PKCS #8, PKCS #1 or SEC 1)"),
            (
                &format!("{certificate}{}", key.expose()),
                key.expose(),
                url,
                "certificate contains a private key: move it to key",
            ),
            ("x", key.expose(), url, NO_CERTIFICATE),
            ("", key.expose(), url, NO_CERTIFICATE),
            (no_der, key.expose(), url, NO_CERTIFICATE),
            (&certificate.repeat(11), key.expose(), url, "certificate: 11 are given, and at most 10 are allowed"),
            (
                &"x".repeat(MAX_CERTIFICATE_BYTES + 1),
                key.expose(),
                url,
                "certificate has 16385 bytes, and at most 16384 are allowed",
            ),
            (
                &certificate,
                "sealed:v1:00000000:AA",
                url,
                "key must be in clear; this one is sealed and opens only in the callback it was copied from",
            ),
            (
                &certificate,
                key.expose(),
                "http://crm.example",
                "a certificate is presented over TLS only: url must be https",
            ),
        ] {
            assert_eq!(with(certificate, key).faults(url), [format!("clientCertificate: {expected}")]);
        }
        assert!(!format!("{valid:?}").contains("PRIVATE"));
    }

    #[test]
    fn a_chain_may_have_intermediate_certificates() {
        let issuer_key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["ca".to_owned()]).unwrap();
        let ca = params.self_signed(&issuer_key).unwrap().pem();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(["client".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &Issuer::new(params, issuer_key)).unwrap().pem();
        let chain = ClientCertificate { certificate: leaf + &ca, key: key.serialize_pem().into() };
        assert_eq!(chain.certified_key().unwrap().cert.len(), 2);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_certificates_never_panic(bytes: Vec<u8>, text in "[0-9]{10,14}Z?", at in 0_usize..300, byte: u8) {
            let _ = not_after(&bytes);
            let _ = (parse_time(0x17, &text), parse_time(0x18, &text));
            let mut changed = certificate((2030, 1, 1)).chain().unwrap()[0].to_vec();
            let at = at % changed.len();
            changed[at] = byte;
            let _ = not_after(&changed);
        }
    }
}
