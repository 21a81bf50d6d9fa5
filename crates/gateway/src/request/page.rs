//! 1 Accept: the parameters of lists.

use contract::{
    Timestamp,
    rpc::{Cursor, DEFAULT_LIMIT, MAX_LIMIT},
};

use super::fields::Fields;
use crate::error::ApiError;

/// The longest cursor. Some contain the name of the last item, encoded.
const MAX_CURSOR_CHARS: usize = 8 * 1024;

/// Parameters that several endpoints have.
pub(crate) trait Parameters {
    /// Takes `cursor` and `limit`.
    fn page(&mut self) -> Result<(Option<Cursor>, u32), ApiError>;

    fn time(&mut self, name: &str) -> Result<Option<Timestamp>, ApiError>;

    /// Takes `true` or `false` of a query string; `false` if absent.
    fn query_flag(&mut self, name: &str) -> Result<bool, ApiError>;
}

impl Parameters for Fields<'_> {
    fn page(&mut self) -> Result<(Option<Cursor>, u32), ApiError> {
        let cursor = self.text_up_to("cursor", MAX_CURSOR_CHARS)?.map(Cursor::from_text);
        let limit = match self.text("limit")? {
            None => DEFAULT_LIMIT,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| (1..=MAX_LIMIT).contains(limit))
                .ok_or_else(|| ApiError::field("limit", format!("must be a number from 1 to {MAX_LIMIT}")))?,
        };
        Ok((cursor, limit))
    }

    fn time(&mut self, name: &str) -> Result<Option<Timestamp>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        // A plus sign that was not escaped has been decoded as a space.
        let at = text.replace(' ', "+").parse();
        at.map(Some).map_err(|e: contract::time::InvalidTimestamp| ApiError::field(name, e.to_string()))
    }

    fn query_flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.text(name)?.as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(ApiError::field(name, "must be true or false")),
        }
    }
}
