//! 1 Accept: reading a request's body, bounded in length and time.

use std::{io, time::Duration};

use async_compression::tokio::bufread::{GzipDecoder, ZlibDecoder};
use axum::{
    body::Body,
    extract::Request,
    http::{
        HeaderMap,
        header::{CONTENT_ENCODING, CONTENT_TYPE},
    },
};
use bytes::Bytes;
use futures::TryStreamExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::error::ApiError;

/// How long a body may take to arrive. Longer bodies would be cut off when the gateway stops (see the server's
/// `REQUEST_DRAIN`); shorter refuses honest clients on slow links.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a JSON body whole.
pub(crate) async fn read(request: Request, max_bytes: usize) -> Result<Bytes, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::UnsupportedMediaType);
    }
    // A body whose Content-Length is too long is not read at all.
    if http_body::Body::size_hint(request.body()).lower() > max_bytes as u64 {
        return Err(ApiError::BodyTooLarge(max_bytes));
    }
    let body = Limited::<Body>::new(decoded(request)?, max_bytes).collect();
    match tokio::time::timeout(TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge(max_bytes)),
        Ok(Err(e)) => Err(ApiError::UnreadableBody(e.to_string())),
        Err(_) => Err(ApiError::BodyTimeout(TIMEOUT.as_secs())),
    }
}

/// The body of a request, decoded as it arrives. Only a few kilobytes are decoded at a time, so the reader's limit
/// bounds the memory.
pub(crate) fn decoded(request: Request) -> Result<Body, ApiError> {
    let encodings = request.headers().get_all(CONTENT_ENCODING).iter();
    let encodings: Vec<_> = encodings.map(|value| value.to_str().unwrap_or_default().trim().to_lowercase()).collect();
    let body = request.into_body();
    let encoding = match encodings.as_slice() {
        [] => return Ok(body),
        [encoding] => encoding.as_str(),
        _ => return Err(ApiError::UnsupportedEncoding),
    };
    let encoded = StreamReader::new(TryStreamExt::map_err(body.into_data_stream(), io::Error::other));
    match encoding {
        "gzip" | "x-gzip" => {
            let mut decoder = GzipDecoder::new(encoded);
            // Several gzip files in a row are one valid body (RFC 1952, section 2.2).
            decoder.multiple_members(true);
            Ok(Body::from_stream(ReaderStream::new(decoder)))
        }
        "deflate" => Ok(Body::from_stream(ReaderStream::new(ZlibDecoder::new(encoded)))),
        "identity" => Ok(Body::from_stream(ReaderStream::new(encoded))),
        _ => Err(ApiError::UnsupportedEncoding),
    }
}

/// Whether the content type is JSON or absent, or the default of `curl -d`.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(essence) = media_type(headers) else { return true };
    ["application/json", "application/x-www-form-urlencoded"].contains(&essence.as_str())
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// Whether the content type is JSON, a JSON text per line, or absent.
pub(crate) fn is_json_or_lines(headers: &HeaderMap) -> bool {
    // None of them is registered, but all are in use.
    let lines = ["application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"];
    is_json(headers) || media_type(headers).is_some_and(|essence| lines.contains(&essence.as_str()))
}

/// The content type without its parameters, if there is one.
fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(CONTENT_TYPE)?;
    Some(value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_type_is_json_or_absent() {
        let is_json = |value: &str| is_json(&HeaderMap::from_iter([(CONTENT_TYPE, value.parse().unwrap())]));
        for json in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/merge-patch+json",
            "application/x-www-form-urlencoded",
        ] {
            assert!(is_json(json), "{json}");
        }
        for other in ["", "text/plain", "multipart/form-data", "application/jsonx", "text/x+json"] {
            assert!(!is_json(other), "{other}");
        }
        assert!(super::is_json(&HeaderMap::new()));
        let lines = HeaderMap::from_iter([(CONTENT_TYPE, "application/x-ndjson; charset=utf-8".parse().unwrap())]);
        assert!(is_json_or_lines(&lines) && !super::is_json(&lines));
        assert!(!is_json_or_lines(&HeaderMap::from_iter([(CONTENT_TYPE, "text/csv".parse().unwrap())])));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_arrive_times_out() {
        let never = Body::from_stream(futures::stream::pending::<Result<Bytes, std::io::Error>>());
        assert_eq!(read(Request::new(never), 10).await, Err(ApiError::BodyTimeout(10)));
    }

    async fn encoded(encoding: &str, body: Vec<u8>, max_bytes: usize) -> Result<Bytes, ApiError> {
        let request = Request::builder().header(CONTENT_ENCODING, encoding).body(Body::from(body));
        read(request.unwrap(), max_bytes).await
    }

    #[tokio::test]
    async fn the_decoded_bytes_of_a_body_count() {
        use async_compression::tokio::bufread::{GzipEncoder, ZlibEncoder};
        use tokio::io::AsyncReadExt;

        const MAX: usize = 100_000;
        for bytes in [MAX, MAX + 1] {
            let (text, mut gzip, mut deflate) = (vec![b' '; bytes], Vec::new(), Vec::new());
            GzipEncoder::new(text.as_slice()).read_to_end(&mut gzip).await.unwrap();
            ZlibEncoder::new(text.as_slice()).read_to_end(&mut deflate).await.unwrap();
            for (encoding, body) in [("gzip", &gzip), ("X-GZIP", &gzip), ("deflate", &deflate), ("identity", &text)] {
                let expected = if bytes > MAX { Err(ApiError::BodyTooLarge(MAX)) } else { Ok(text.clone().into()) };
                assert_eq!(encoded(encoding, body.clone(), MAX).await, expected, "{encoding}");
            }
            let members = [gzip.as_slice(), &gzip].concat();
            let expected = if bytes > MAX { Err(ApiError::BodyTooLarge(2 * MAX)) } else { Ok(text.repeat(2).into()) };
            assert_eq!(encoded("gzip", members, 2 * MAX).await, expected, "an appended file");
            let cut = encoded("gzip", gzip[..gzip.len() - 9].to_vec(), MAX).await;
            assert!(matches!(cut, Err(ApiError::UnreadableBody(_) | ApiError::BodyTooLarge(_))), "{cut:?}");
        }
        assert!(matches!(encoded("gzip", b"{}".to_vec(), MAX).await, Err(ApiError::UnreadableBody(_))));
        for encoding in ["br", "gzip, gzip", ""] {
            assert_eq!(encoded(encoding, Vec::new(), MAX).await, Err(ApiError::UnsupportedEncoding), "{encoding}");
        }
    }

    #[tokio::test]
    async fn a_body_may_be_as_long_as_the_limit() {
        let stream = |text: &'static str| {
            Body::from_stream(futures::stream::iter(
                text.as_bytes().chunks(2).map(|chunk| Ok::<_, std::io::Error>(Bytes::from_static(chunk))),
            ))
        };
        assert_eq!(read(Request::new(stream("123456")), 6).await.unwrap(), "123456");
        assert_eq!(read(Request::new(stream("1234567")), 6).await, Err(ApiError::BodyTooLarge(6)));
        assert_eq!(read(Request::new(Body::from("1234567")), 6).await, Err(ApiError::BodyTooLarge(6)));
    }
}
