//! 1 Accept: what the API is, for programs and people: its OpenAPI document, and a page that shows it. No key is asked for.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::{
        HeaderName, HeaderValue,
        header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
    },
    response::{IntoResponse, Response},
    routing::{MethodFilter, on},
};

use crate::server::{App, finish};

/// A document that the gateway serves as it is.
#[derive(Debug, Clone, Copy)]
pub struct Document {
    /// The path.
    pub path: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    headers: &'static [(&'static str, &'static str)],
}

/// The page may run its own script, draw as that likes, and ask this gateway; nothing else, and nobody may frame it. The script
/// looks for words in a worker, which it makes of a blob.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data:; \
    connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// All documents. The router is made from this list.
pub const DOCUMENTS: [Document; 3] = [
    Document {
        path: "/api/v1/openapi.json",
        content_type: "application/json",
        content: include_bytes!("../../../../proto-schemas/openapi.json"),
        // Tools that run in browsers may read it from anywhere: it is no secret.
        headers: &[("access-control-allow-origin", "*"), ("cache-control", "no-cache")],
    },
    Document {
        path: "/api/v1/docs",
        content_type: "text/html; charset=utf-8",
        content: include_bytes!("../../docs-page/index.html"),
        headers: &[
            ("content-security-policy", PAGE_POLICY),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
        ],
    },
    Document {
        path: "/api/v1/docs/redoc-2.5.4.js",
        content_type: "text/javascript; charset=utf-8",
        // As it is kept: what a browser does not take compressed is not in use any more.
        content: include_bytes!("../../docs-page/redoc-2.5.4.js.gz"),
        headers: &[("content-encoding", "gzip"), ("cache-control", "public, max-age=31536000, immutable")],
    },
];

/// The documents, in a router.
pub(crate) fn routes() -> Router<Arc<App>> {
    let serve = |document: Document| {
        async move |State(app): State<Arc<App>>, request: Request| {
            finish(&app, request, async |_| Ok(document.answer())).await
        }
    };
    DOCUMENTS
        .into_iter()
        .fold(Router::new(), |router, document| router.route(document.path, on(MethodFilter::GET, serve(document))))
}

impl Document {
    fn answer(self) -> Response {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What the page refers to is served; a new version of its script is forgotten nowhere.
    #[test]
    fn the_page_finds_its_parts() {
        let page = include_str!("../../docs-page/index.html");
        let parts = page.split(['"', '\'']).filter(|part| part.ends_with(".js") || part.ends_with(".json"));
        let parts: Vec<_> = parts.map(|part| format!("/api/v1/{part}")).collect();
        assert_eq!(parts.len(), 3, "{parts:?}");
        for part in parts {
            assert!(DOCUMENTS.iter().any(|document| document.path == part), "{part}");
        }
        assert!(!page.contains("//"), "the page names another host");
    }
}
