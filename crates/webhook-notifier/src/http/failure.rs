//! The error texts of failed attempts in the delivery log: the cause, and what to do about it.

use std::{error::Error, io};

use http::{HeaderValue, StatusCode, Uri, header::HeaderMap, header::LOCATION};
use hyper_util::client::legacy;
use rustls::{AlertDescription, CertificateError, Error as TlsError, pki_types::UnixTime};
use service_kit::nats::error_chain;
use time::OffsetDateTime;
use url::Url;

use super::{dns::LookupError, guard::Refused, request::RequestError};

/// How much of a text from the endpoint is shown: the target of a redirect, the names in a certificate.
const MAX_SHOWN: usize = 200;

/// Why a request has no response.
pub(crate) fn request_error(error: &legacy::Error) -> RequestError {
    for cause in causes(error) {
        if let Some(refused) = cause.downcast_ref::<Refused>() {
            return RequestError::Refused(refused.clone());
        }
        if let Some(lookup) = cause.downcast_ref::<LookupError>() {
            return RequestError::NoResponse(lookup.to_string());
        }
        if let Some(explained) = cause.downcast_ref::<TlsError>().and_then(tls_error) {
            return RequestError::NoResponse(explained);
        }
        let timed_out = cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::TimedOut);
        if timed_out && error.is_connect() {
            return RequestError::NoResponse("the endpoint did not accept a connection in time".into());
        }
    }
    RequestError::NoResponse(error_chain(error))
}

/// An error and its causes. An `io::Error` skips the error that it wraps in `source`, so it is unwrapped here.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let inner = |error: &'a (dyn Error + 'static)| match error.downcast_ref::<io::Error>() {
        Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
        None => error.source(),
    };
    std::iter::successors(Some(error), move |error| inner(*error))
}

/// The text of a TLS error; `None` if the text of rustls is good enough.
fn tls_error(error: &TlsError) -> Option<String> {
    Some(match error {
        TlsError::InvalidCertificate(cause) => format!("the endpoint's certificate {}", certificate_error(cause)?),
        TlsError::NoCertificatesPresented => "the endpoint presented no certificate".into(),
        TlsError::InvalidMessage(_) => {
            "the endpoint does not speak TLS on this port: check the port, or whether the URL should begin with http://"
                .into()
        }
        TlsError::PeerIncompatible(_) => {
            "the endpoint supports neither TLS 1.3 nor TLS 1.2 with a current cipher".into()
        }
        TlsError::AlertReceived(AlertDescription::CertificateRequired) => {
            "the endpoint requires a client certificate: set clientCertificate".into()
        }
        TlsError::AlertReceived(
            alert @ (AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA),
        ) => format!("the endpoint rejected the client certificate with the alert {alert:?}"),
        TlsError::AlertReceived(AlertDescription::UnrecognisedName) => {
            "the endpoint does not serve the URL's host name over TLS".into()
        }
        TlsError::AlertReceived(alert) => format!("the endpoint ended the TLS handshake with the alert {alert:?}"),
        _ => return None,
    })
}

/// Completes "the endpoint's certificate …".
fn certificate_error(error: &CertificateError) -> Option<String> {
    const RENEW: &str = "renew it";
    Some(match error {
        CertificateError::Expired => format!("has expired: {RENEW}"),
        CertificateError::ExpiredContext { not_after, .. } => format!("expired on {}: {RENEW}", date(*not_after)?),
        CertificateError::NotValidYet => "is not valid yet: check the endpoint's clock and certificate".into(),
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("is not valid before {}: check the endpoint's clock and certificate", date(*not_before)?)
        }
        CertificateError::Revoked => format!("was revoked: {RENEW}"),
        CertificateError::UnknownIssuer => "is from an unknown authority, or the chain to a known one is incomplete: \
             install the chain of a publicly trusted authority, or have the operator trust the private one"
            .into(),
        CertificateError::NotValidForName => "is for another host name than the URL's".into(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names = presented.iter().map(|name| certificate_name(name)).collect::<Vec<_>>().join(", ");
            format!(
                "is not for {} but for {}: use a name of the certificate in the URL",
                expected.to_str(),
                shown(&names)
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for servers: install one with the purpose serverAuth".into()
        }
        // rustls-webpki's error for a CA's certificate that a server presents as its own. `openssl req -x509` makes
        // one.
        CertificateError::Other(other) if other.to_string() == "CaUsedAsEndEntity" => {
            "is a self-signed certificate: install one of a publicly trusted authority".into()
        }
        _ => return None,
    })
}

/// `DnsName("crm.example")` without the type.
fn certificate_name(name: &str) -> &str {
    name.split_once('"').and_then(|(_, rest)| rest.split_once('"')).map_or(name, |(name, _)| name)
}

fn date(time: UnixTime) -> Option<String> {
    Some(OffsetDateTime::from_unix_timestamp(time.as_secs().try_into().ok()?).ok()?.date().to_string())
}

/// The text of a response whose status is not 2xx.
pub(crate) fn rejection(status: StatusCode, headers: &HeaderMap, callback: &Uri) -> String {
    let answered = format!("the endpoint answered {status}");
    if !status.is_redirection() || status == StatusCode::NOT_MODIFIED {
        return answered;
    }
    match headers.get(LOCATION).and_then(|location| redirect_target(location, callback)) {
        Some(target) => format!("{answered}: redirects are not followed, and this one points to {target}"),
        None => format!("{answered}: redirects are not followed"),
    }
}

/// The target of a redirect, without parts that may be secret: user, password, query, and the path of the callback's
/// own URL.
fn redirect_target(location: &HeaderValue, callback: &Uri) -> Option<String> {
    let base = Url::parse(&callback.to_string()).ok()?;
    let mut target = base.join(&String::from_utf8_lossy(location.as_bytes())).ok()?;
    if !target.has_host() {
        return None;
    }
    // Fails only for URLs without a host.
    let _ = (target.set_username(""), target.set_password(None));
    target.set_query(None);
    target.set_fragment(None);
    let own_path = base.path().trim_end_matches('/');
    if own_path.is_empty() || !target.path().contains(own_path) {
        return Some(shown(target.as_str()));
    }
    let (origin, path) = (target.origin().ascii_serialization(), target.path().replace(own_path, "…"));
    Some(format!("{} (… is the path of the callback's URL)", shown(&format!("{origin}/{path}"))))
}

/// The start of a text from the endpoint, without control characters.
fn shown(text: &str) -> String {
    let mut shown = text.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect::<String>();
    if text.chars().count() > MAX_SHOWN {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use rustls::{InvalidMessage, OtherError, PeerIncompatible, pki_types::ServerName};

    use super::*;

    #[test]
    fn a_redirect_names_its_target_without_secrets() {
        let rejection = |status: u16, location: &[u8]| {
            let headers = HeaderMap::from_iter([(LOCATION, HeaderValue::from_bytes(location).unwrap())]);
            let callback = "https://crm.example/hook/T-1?key=k-1".parse().unwrap();
            rejection(StatusCode::from_u16(status).unwrap(), &headers, &callback)
        };
        let long = format!("https://crm.example/{}", "x".repeat(8000));
        for (location, target) in [
            ("http://127.0.0.1:1/", "http://127.0.0.1:1/"),
            ("/login?next=/hook/T-1", "https://crm.example/login"),
            ("https://user:password@www.crm.example/a?key=k-1#b", "https://www.crm.example/a"),
            (
                "https://www.crm.example/hook/T-1/?key=k-1",
                "https://www.crm.example/…/ (… is the path of the callback's URL)",
            ),
            ("caf\u{e9}\u{202e}", "https://crm.example/hook/caf%C3%A9%E2%80%AE"),
            (long.as_str(), &format!("{}…", &long[..MAX_SHOWN])),
        ] {
            let expected = format!(
                "the endpoint answered 301 Moved Permanently: redirects are not followed, and this one points to {target}"
            );
            assert_eq!(rejection(301, location.as_bytes()), expected);
        }
        let unnamed = "the endpoint answered 302 Found: redirects are not followed";
        for location in ["mailto:ops@crm.example", "https://[", "data:,x"] {
            assert_eq!(rejection(302, location.as_bytes()), unnamed, "{location}");
        }
        assert_eq!(rejection(401, b"/login"), "the endpoint answered 401 Unauthorized");
        assert_eq!(rejection(304, b""), "the endpoint answered 304 Not Modified");
    }

    #[test]
    fn tls_errors_say_what_to_do() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let name = CertificateError::NotValidForNameContext {
            expected: ServerName::try_from("crm.example").unwrap(),
            presented: vec![r#"DnsName("a.example")"#.into(), r#"DnsName("b.example")"#.into()],
        };
        let expired = CertificateError::ExpiredContext { time: at(1_768_193_760), not_after: at(1_768_089_600) };
        let early = CertificateError::NotValidYetContext { time: at(0), not_before: at(1_768_089_600) };
        for (error, expected) in [
            (TlsError::InvalidCertificate(CertificateError::UnknownIssuer), "is from an unknown authority"),
            (TlsError::InvalidCertificate(name), "is not for crm.example but for a.example, b.example: use"),
            (TlsError::InvalidCertificate(expired), "certificate expired on 2026-01-11: renew it"),
            (TlsError::InvalidCertificate(early), "is not valid before 2026-01-11"),
            (TlsError::InvalidCertificate(CertificateError::Revoked), "was revoked"),
            (TlsError::InvalidCertificate(CertificateError::InvalidPurpose), "is not for servers"),
            (TlsError::InvalidMessage(InvalidMessage::InvalidContentType), "does not speak TLS on this port"),
            (TlsError::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13), "neither TLS 1.3 nor"),
            (TlsError::AlertReceived(AlertDescription::CertificateRequired), "requires a client certificate"),
            (
                TlsError::AlertReceived(AlertDescription::UnknownCA),
                "rejected the client certificate with the alert UnknownCA",
            ),
            (TlsError::AlertReceived(AlertDescription::UnrecognisedName), "does not serve the URL's host name"),
            (TlsError::AlertReceived(AlertDescription::HandshakeFailure), "with the alert HandshakeFailure"),
        ] {
            let explained = tls_error(&error).unwrap_or_default();
            assert!(explained.starts_with("the endpoint") && explained.contains(expected), "{error:?}: {explained}");
        }
        let other = OtherError(Arc::new(io::Error::other("UnsupportedCertVersion")));
        assert_eq!(tls_error(&TlsError::InvalidCertificate(CertificateError::Other(other))), None);
    }
}
