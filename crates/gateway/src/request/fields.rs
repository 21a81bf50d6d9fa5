//! 1 Accept: the parameters of a query string, as the fields of a body.

use std::borrow::Cow;

use axum::extract::Request;
pub(crate) use contract::fields::Fields;
use contract::json::Members;

use crate::error::ApiError;

/// The parameters of a query string, each a text.
pub(crate) fn from_query(query: &str) -> Result<Fields<'static>, ApiError> {
    let mut members = Members::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if value.contains('\0') {
            return Err(ApiError::field(name, "contains the NUL character"));
        }
        let value = serde_json::value::to_raw_value(&value).map_err(|_| ApiError::Internal)?;
        if members.insert(Cow::Owned(name.clone().into_owned()), Cow::Owned(value)).is_some() {
            return Err(ApiError::field(name, "is given twice"));
        }
    }
    Ok(Fields::from_members(members))
}

/// Refuses a query string with parameters.
pub(crate) fn refuse_query(request: &Request) -> Result<(), ApiError> {
    Ok(from_query(request.uri().query().unwrap_or_default())?.refuse_rest()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_string_has_texts() {
        let mut fields = from_query("referenceId=A%20%22b%22+c%C3%A9&empty=&x").unwrap();
        assert_eq!(fields.text("referenceId").unwrap().as_deref(), Some("A \"b\" cé"));
        assert_eq!(fields.text("empty").unwrap(), None);
        assert_eq!(fields.text("gone").unwrap(), None);
        for (query, fault) in [("a=1&a=2", "a is given twice"), ("a=x%00", "a contains the NUL character")] {
            assert_eq!(from_query(query).unwrap_err().to_string(), fault);
        }
    }
}
