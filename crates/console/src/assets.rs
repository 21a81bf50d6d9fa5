//! The style sheet and the script. Their URLs contain their hash, so that browsers may cache them forever.

use std::sync::LazyLock;

use axum::{
    Router,
    http::{
        HeaderValue,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::IntoResponse,
    routing::get,
};
use sha2::{Digest, Sha256};

/// The URL of the style sheet.
pub(crate) static STYLE: LazyLock<String> = LazyLock::new(|| path(STYLE_TEXT, "css"));
pub(crate) static SCRIPT: LazyLock<String> = LazyLock::new(|| path(SCRIPT_TEXT, "js"));

const STYLE_TEXT: &str = include_str!("../static/console.css");
const SCRIPT_TEXT: &str = include_str!("../static/console.js");

fn path(content: &str, kind: &str) -> String {
    format!("/static/{}.{kind}", &hex::encode(Sha256::digest(content))[..16])
}

pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let asset = |content: &'static str, kind: &'static str| {
        get(async move || {
            let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "public, max-age=31536000, immutable")];
            (headers.map(|(name, value)| (name, HeaderValue::from_static(value))), content).into_response()
        })
    };
    Router::new()
        .route(&STYLE, asset(STYLE_TEXT, "text/css; charset=utf-8"))
        .route(&SCRIPT, asset(SCRIPT_TEXT, "text/javascript; charset=utf-8"))
}
