//! 1 Accept: `POST /api/v1/processes/{processId}/callbacks/{callbackId}/backfill`.

use std::sync::Arc;

use contract::{
    Timestamp,
    key::ApiKey,
    rpc::{BackfillCallback, Cursor},
};
use http_api::{DataResponse, RecoverResult};

use crate::{
    app::App,
    error::ApiError,
    request::{
        Body, FromBody,
        fields::Fields,
        page::Parameters,
        path::{CallbackPath, ProcessPath},
    },
    response::{self, HandlerResult},
    routes::deliveries::recover::per_second,
};

/// The events to deliver, and the rate.
#[derive(Debug)]
pub(crate) struct Backfill {
    since: Timestamp,
    per_second: u32,
    dry_run: bool,
    cursor: Option<Cursor>,
}

impl FromBody for Backfill {
    /// Unknown fields are refused: ignoring a misspelt field could deliver more than intended.
    fn from_body(body: &[u8], _: &ApiKey) -> Result<Self, ApiError> {
        let mut fields = Fields::from_json(body)?.refusing_empty();
        let backfill = Self {
            since: fields.time("since")?.ok_or_else(|| ApiError::missing("since is required"))?,
            per_second: per_second(&mut fields)?,
            dry_run: fields.flag("dryRun")?,
            cursor: fields.text("cursor")?.map(Cursor::from_text),
        };
        fields.refuse_rest()?;
        Ok(backfill)
    }
}

pub(crate) async fn handle(
    app: Arc<App>,
    key: Arc<ApiKey>,
    CallbackPath { process: ProcessPath(process_id), callback_id }: CallbackPath,
    Body(Backfill { since, per_second, dry_run, cursor }): Body<Backfill>,
) -> HandlerResult {
    let project_id = key.project_id;
    let query = BackfillCallback { project_id, process_id, callback_id, since, per_second, dry_run, cursor };
    let made = app.request(&query).await?;
    response::ok(&DataResponse::new(RecoverResult::new(made, dry_run)))
}

#[cfg(test)]
pub(crate) fn operation() -> crate::openapi::Operation {
    crate::openapi::Operation::new("Callbacks", "backfillCallback", "Deliver past events to a callback")
        .description(
            "Makes the deliveries that the callback would have received since then with its current configuration, and does not have yet. \
             The oldest become due first, `perSecond` of them a second. Repeating the request makes none twice.",
        )
        .body::<http_api::BackfillRequest>()
        .returns::<DataResponse<RecoverResult>>()
        .errors(&[404])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::tests::key;

    #[test]
    fn bodies_are_parsed_strictly() {
        let parse = |body: &str| {
            let parsed = Backfill::from_body(body.as_bytes(), &key());
            parsed.map(|backfill| (backfill.per_second, backfill.dry_run)).map_err(|e| e.to_string())
        };
        assert_eq!(parse(r#"{"since":"2026-01-12T04:55:59Z"}"#), Ok((10, false)));
        assert_eq!(parse(r#"{"since":"2026-01-12T04:55:59Z","perSecond":1000,"dryRun":true}"#), Ok((1000, true)));
        for (odd, error) in [
            ("{}", "since is required"),
            (r#"{"since":"2026-01-12T04:55:59Z","perSecond":1001}"#, "perSecond must be a number from 1 to 1000"),
            (r#"{"since":"2026-01-12T04:55:59Z","dryrun":true}"#, "dryrun is unknown"),
        ] {
            assert_eq!(parse(odd), Err(error.into()), "{odd}");
        }
    }
}
