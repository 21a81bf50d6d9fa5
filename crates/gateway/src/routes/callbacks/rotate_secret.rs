//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks/{callbackId}/rotate-secret`.

use std::sync::Arc;

use contract::{
    key::ApiKey,
    process::{DEFAULT_OVERLAP_SECONDS, MAX_OVERLAP_SECONDS},
    rpc::ProcessChange,
};

use crate::{
    app::App,
    error::ApiError,
    request::{Body, FromBody, IfMatch, fields::Fields, path::CallbackPath},
    response::HandlerResult,
    routes::{callbacks::get::find, processes::change},
};

/// For how many seconds the replaced secrets still sign.
#[derive(Debug)]
pub(crate) struct Overlap(u32);

impl FromBody for Overlap {
    /// An empty body means the default. Unknown fields are refused: a misspelt overlap would silently become the
    /// default.
    fn from_body(body: &[u8], _: &ApiKey) -> Result<Self, ApiError> {
        if body.is_empty() {
            return Ok(Self(DEFAULT_OVERLAP_SECONDS));
        }
        let mut fields = Fields::from_json(body)?;
        let overlap = fields.whole_number("overlapSeconds")?.unwrap_or(DEFAULT_OVERLAP_SECONDS);
        if overlap > MAX_OVERLAP_SECONDS {
            return Err(ApiError::field("overlapSeconds", format!("must be a number from 0 to {MAX_OVERLAP_SECONDS}")));
        }
        fields.refuse_rest()?;
        Ok(Self(overlap))
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process, callback_id }: CallbackPath,
    IfMatch(expected): IfMatch,
    Body(Overlap(overlap_seconds)): Body<Overlap>,
) -> HandlerResult {
    let change = ProcessChange::RotateSecret { callback_id, overlap_seconds };
    let result = change::change(&app, &key, process.selector(), expected, change).await?;
    change::respond(result, |process| find(process, |callback| callback.callback_id == callback_id))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    use http_api::{ConfiguredCallback, RotateSecretRequest};
    crate::openapi::Operation::new("Callbacks", "rotateSecret", "Rotate a signing secret")
        .description(
            "The new secret is shown in this response, and never again. The replaced secrets sign as well until the \
             overlap ends. The body is optional.",
        )
        .optional_body::<RotateSecretRequest>()
        .changes::<ConfiguredCallback>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::key;

    #[test]
    fn an_overlap_is_bounded_and_a_day_by_default() {
        let overlap = |body: &str| {
            let parsed = Overlap::from_body(body.as_bytes(), &key());
            parsed.map(|Overlap(seconds)| seconds).map_err(|e| format!("{} {e}", e.status().as_u16()))
        };
        for usual in ["", "{}", r#"{"overlapSeconds":null}"#] {
            assert_eq!(overlap(usual), Ok(86_400), "{usual}");
        }
        assert_eq!(overlap(r#"{"overlapSeconds":0}"#), Ok(0));
        assert_eq!(overlap(r#"{"overlapSeconds":604800}"#), Ok(604_800));
        for (odd, error) in [
            (r#"{"overlapSeconds":604801}"#, "400 overlapSeconds must be a number from 0 to 604800"),
            (r#"{"overlapSeconds":-1}"#, "400 overlapSeconds must be a whole number, at most 4294967295"),
            (r#"{"overlap":1}"#, "400 overlap is unknown"),
            ("[]", "400 The body must be a JSON object"),
        ] {
            assert_eq!(overlap(odd), Err(error.into()), "{odd}");
        }
    }
}
