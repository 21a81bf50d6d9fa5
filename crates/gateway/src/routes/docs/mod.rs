//! 1 Accept: the OpenAPI document and a page that shows it. They need no API key.

use std::sync::Arc;

use axum::{
    Router,
    http::{
        HeaderName, HeaderValue,
        header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
    },
    response::{IntoResponse, Response},
};

use crate::{app::App, router};

/// A static document.
#[derive(Debug, Clone, Copy)]
pub struct Document {
    /// The path.
    pub path: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    headers: &'static [(&'static str, &'static str)],
}

/// The page may run its own script, apply the script's styles, and send requests to this gateway. Nothing else is
/// allowed, and no site may frame the page. The script creates a worker for its search from a blob.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data:; \
    connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// All documents.
pub const DOCUMENTS: [Document; 3] = [
    Document {
        path: "/api/v1/openapi.json",
        content_type: "application/json",
        content: include_bytes!("../../../../../proto-schemas/openapi.json"),
        // Public, so that tools in browsers may read it from any origin.
        headers: &[("access-control-allow-origin", "*"), ("cache-control", "no-cache")],
    },
    Document {
        path: "/api/v1/docs",
        content_type: "text/html; charset=utf-8",
        content: include_bytes!("../../../docs-page/index.html"),
        headers: &[
            ("content-security-policy", PAGE_POLICY),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
        ],
    },
    Document {
        path: "/api/v1/docs/redoc-2.5.4.js",
        content_type: "text/javascript; charset=utf-8",
        // Served compressed only: every browser in use accepts gzip.
        content: include_bytes!("../../../docs-page/redoc-2.5.4.js.gz"),
        headers: &[("content-encoding", "gzip"), ("cache-control", "public, max-age=31536000, immutable")],
    },
];

pub(crate) fn routes() -> Router<Arc<App>> {
    DOCUMENTS.into_iter().fold(Router::new(), |router, document| {
        router.route(document.path, router::document(move || document.respond()))
    })
}

impl Document {
    fn respond(self) -> Response {
        let mut response = self.content.into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.extend(
            self.headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))),
        );
        response
    }
}

/// The operations of the documents: path, content type, operation id and summary.
#[cfg(test)]
pub(crate) const OPERATIONS: [(&str, &str, &str, &str); 3] = [
    ("/api/v1/openapi.json", "application/json", "openapi", "Read this document"),
    ("/api/v1/docs", "text/html", "docs", "Read this document as a page"),
    ("/api/v1/docs/redoc-2.5.4.js", "text/javascript", "docsScript", "Read the page's script"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_refers_only_to_documents_that_are_served() {
        let page = include_str!("../../../docs-page/index.html");
        let parts = page.split(['"', '\'']).filter(|part| part.ends_with(".js") || part.ends_with(".json"));
        let parts: Vec<_> = parts.map(|part| format!("/api/v1/{part}")).collect();
        assert_eq!(parts.len(), 3, "{parts:?}");
        for part in parts {
            assert!(DOCUMENTS.iter().any(|document| document.path == part), "{part}");
        }
        assert!(!page.contains("//"), "the page names another host");
    }
}
