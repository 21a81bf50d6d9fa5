//! 1 Accept: the typed inputs of handlers, and how they are read from a request.

use std::{str::FromStr, sync::Arc};

use axum::{
    RequestExt,
    extract::{RawPathParams, Request},
};
use bytes::Bytes;
use contract::{ObjectId, key::ApiKey, warning::Warning};
use service_kit::shares::Permit;

use crate::{app::App, auth::KeyCheck, error::ApiError, request::fields::Fields, response::HandlerResult};

pub(crate) mod body;
pub(crate) mod fields;
pub(crate) mod if_match;
pub(crate) mod page;
pub(crate) mod path;
pub(crate) mod prefer;
pub(crate) mod trace;

/// An input of a handler.
pub(crate) trait FromRequest: Sized + Send {
    /// Whether the query string is read, or left to the handler.
    const READS_QUERY: bool = false;

    /// Reads the input. A handler's inputs are read in the order of its parameters.
    fn from_request(
        request: &mut Request,
        app: &App,
        key: &ApiKey,
    ) -> impl Future<Output = Result<Self, ApiError>> + Send;
}

/// A function that handles requests. Its parameters are the state, the API key, and its [inputs](FromRequest).
pub(crate) trait Handler<Inputs>: Clone + Send + Sync + 'static {
    /// Whether one of the inputs reads the query string.
    const READS_QUERY: bool;

    fn call(&self, app: Arc<App>, key: Arc<ApiKey>, request: Request) -> impl Future<Output = HandlerResult> + Send;
}

macro_rules! handler_of {
    ($($input:ident: $Input:ident),*) => {
        impl<H, R, $($Input),*> Handler<($($Input,)*)> for H
        where
            H: Fn(Arc<App>, Arc<ApiKey>, $($Input),*) -> R + Clone + Send + Sync + 'static,
            R: Future<Output = HandlerResult> + Send,
            $($Input: FromRequest,)*
        {
            const READS_QUERY: bool = $($Input::READS_QUERY)||*;

            async fn call(&self, app: Arc<App>, key: Arc<ApiKey>, mut request: Request) -> HandlerResult {
                $(let $input = $Input::from_request(&mut request, &app, &key).await?;)*
                self(app, key, $($input),*).await
            }
        }
    };
}

handler_of!(a: A);
handler_of!(a: A, b: B);
handler_of!(a: A, b: B, c: C);

/// The whole request, for handlers that trace or stream it.
impl FromRequest for Request {
    const READS_QUERY: bool = true;

    async fn from_request(request: &mut Request, _: &App, _: &ApiKey) -> Result<Self, ApiError> {
        Ok(std::mem::take(request))
    }
}

/// A JSON body, whole and not parsed yet.
impl FromRequest for Bytes {
    async fn from_request(request: &mut Request, app: &App, _: &ApiKey) -> Result<Self, ApiError> {
        body::read(std::mem::take(request), app.max_body_bytes).await
    }
}

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

/// A type that can be parsed from a JSON body.
pub(crate) trait FromBody: Sized + Send {
    fn from_body(body: &[u8], key: &ApiKey) -> Result<Self, ApiError>;

    fn max_bytes(app: &App) -> usize {
        app.max_body_bytes
    }
}

impl<T: FromBody> FromRequest for Body<T> {
    async fn from_request(request: &mut Request, app: &App, key: &ApiKey) -> Result<Self, ApiError> {
        let body = body::read(std::mem::take(request), T::max_bytes(app)).await?;
        T::from_body(&body, key).map(Self)
    }
}

/// The parameters of a query string, and a warning about those that are unknown.
pub(crate) struct Query<T> {
    pub(crate) query: T,
    pub(crate) warnings: Vec<String>,
}

/// A type that can be parsed from a query string.
pub(crate) trait FromQuery: Sized + Send {
    fn from_query(parameters: &mut Fields<'_>, key: &ApiKey) -> Result<Self, ApiError>;
}

impl<T: FromQuery> Query<T> {
    pub(crate) fn parse(text: &str, key: &ApiKey) -> Result<Self, ApiError> {
        let mut parameters = fields::from_query(text)?;
        let query = T::from_query(&mut parameters, key)?;
        parameters.ignore_rest(Warning::UNKNOWN);
        Ok(Self { query, warnings: parameters.warnings })
    }
}

impl<T: FromQuery> FromRequest for Query<T> {
    const READS_QUERY: bool = true;

    async fn from_request(request: &mut Request, _: &App, key: &ApiKey) -> Result<Self, ApiError> {
        Self::parse(request.uri().query().unwrap_or_default(), key)
    }
}

/// The version of `If-Match`.
pub(crate) struct IfMatch(pub(crate) Option<u32>);

impl FromRequest for IfMatch {
    async fn from_request(request: &mut Request, _: &App, _: &ApiKey) -> Result<Self, ApiError> {
        if_match::expected_version(request.headers()).map(Self)
    }
}

/// The API key, to be checked again while the response is written.
impl FromRequest for KeyCheck {
    async fn from_request(request: &mut Request, _: &App, _: &ApiKey) -> Result<Self, ApiError> {
        Ok(Self::of(request.headers()))
    }
}

/// A permit for a bulk request, held until it is dropped.
pub(crate) struct BulkPermit {
    _permit: Permit<ObjectId>,
}

impl FromRequest for BulkPermit {
    async fn from_request(_: &mut Request, app: &App, key: &ApiKey) -> Result<Self, ApiError> {
        Ok(Self { _permit: app.bulk_permit(key.project_id)? })
    }
}

/// A parameter of the path.
async fn path_parameter<T: FromStr>(request: &mut Request, name: &str, fault: &str) -> Result<T, ApiError> {
    let parameters = request.extract_parts::<RawPathParams>().await.ok();
    let text = parameters.iter().flatten().find(|(parameter, _)| *parameter == name).map(|(_, text)| text);
    text.and_then(|text| text.parse().ok()).ok_or_else(|| ApiError::field(name, fault))
}
