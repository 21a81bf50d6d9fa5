//! 1 Accept: what all lists have in common: how a page is asked for, and how it is answered.

use axum::{
    RequestExt,
    extract::{RawPathParams, Request},
    http::StatusCode,
};
use contract::{
    Timestamp,
    rpc::{Cursor, DEFAULT_LIMIT, MAX_LIMIT, Page},
};
use serde::Serialize;

use crate::{error::ApiError, fields::Fields, routes::json};

/// A page as it is answered.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PageOf{T}"))]
pub(crate) struct Listed<'a, T> {
    success: bool,
    data: Vec<T>,
    /// The `cursor` of the next page; null at the end.
    next: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
}

impl<'a, T: Serialize> Listed<'a, T> {
    /// A page, each item as `view` shows it.
    pub(crate) fn new<I>(page: &'a Page<I>, view: impl Fn(&'a I) -> T, warnings: &'a [String]) -> Self {
        let next = page.next.as_ref().map(Cursor::as_str);
        Self { success: true, data: page.items.iter().map(view).collect(), next, warnings }
    }

    /// The whole answer.
    pub(crate) fn answer(&self) -> axum::response::Response {
        json(StatusCode::OK, self)
    }
}

/// Takes `cursor` and `limit`.
pub(crate) fn page(fields: &mut Fields<'_>) -> Result<(Option<Cursor>, u32), ApiError> {
    let cursor = fields.text("cursor")?.map(Cursor::from_text);
    let limit = match fields.text("limit")? {
        None => DEFAULT_LIMIT,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=MAX_LIMIT).contains(limit))
            .ok_or_else(|| ApiError::field("limit", format!("must be a number from 1 to {MAX_LIMIT}")))?,
    };
    Ok((cursor, limit))
}

/// Takes a time.
pub(crate) fn time(fields: &mut Fields<'_>, name: &str) -> Result<Option<Timestamp>, ApiError> {
    let Some(text) = fields.text(name)? else { return Ok(None) };
    // A plus sign that was not escaped is a space by now.
    let at = text.replace(' ', "+").parse();
    at.map(Some).map_err(|e: contract::time::InvalidTimestamp| ApiError::field(name, e.to_string()))
}

/// Takes `true` or `false`; `false` where it is not given.
pub(crate) fn flag(fields: &mut Fields<'_>, name: &str) -> Result<bool, ApiError> {
    match fields.text(name)?.as_deref() {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(ApiError::field(name, "must be true or false")),
    }
}

/// A parameter of a request's path.
pub(crate) async fn path<T: std::str::FromStr>(request: &mut Request, name: &str, fault: &str) -> Result<T, ApiError> {
    let parameters = request.extract_parts::<RawPathParams>().await.ok();
    let text = parameters.iter().flatten().find(|(of, _)| *of == name).map(|(_, text)| text);
    text.and_then(|text| text.parse().ok()).ok_or_else(|| ApiError::field(name, fault))
}
