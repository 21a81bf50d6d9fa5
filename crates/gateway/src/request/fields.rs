//! 1 Accept: the fields of a body or query string, each checked when it is taken.

use std::borrow::Cow;

use contract::{
    JsonObject, ObjectId,
    command::MAX_TEXT_CHARS,
    json::{self, Members},
    key::ApiKey,
};
use serde_json::value::RawValue;

use crate::error::ApiError;

/// How many ignored fields a warning names, and how much of each name, so that a warning does not repeat a whole body.
const MAX_NAMES: usize = 10;
const NAME_CHARS: usize = 64;

/// The fields that were not taken yet. JSON null counts as absent, and so does an empty string where a text or an id is
/// expected: clients of the vendor's API send both for missing values.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    /// Precedes field names in messages: `lead.` inside the lead object.
    prefix: &'static str,
    members: Members<'a>,
    /// Sentences about what is ignored.
    pub(crate) warnings: Vec<String>,
}

/// The address of a lead: an id, a reference in a process, or both.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) lead_id: Option<ObjectId>,
    pub(crate) reference_id: Option<String>,
    pub(crate) process_id: Option<ObjectId>,
}

impl<'a> Fields<'a> {
    pub(crate) fn from_json(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = json::check(body).map_err(ApiError::InvalidJson)?;
        let members = json::members(text).map_err(|_| ApiError::NotAnObject)?;
        Ok(Self { prefix: "", members, warnings: Vec::new() })
    }

    pub(crate) fn from_object(prefix: &'static str, object: &'a JsonObject) -> Self {
        Self { prefix, members: object.members(), warnings: Vec::new() }
    }

    pub(crate) fn from_query(query: &str) -> Result<Self, ApiError> {
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
        Ok(Self { prefix: "", members, warnings: Vec::new() })
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        let text: String = serde_json::from_str(raw.get()).map_err(|_| self.fault(name, "must be a string"))?;
        if text.is_empty() {
            self.warnings.push(format!("{}{name} is empty and was ignored", self.prefix));
            return Ok(None);
        }
        if text.chars().nth(MAX_TEXT_CHARS).is_some() {
            return Err(self.fault(name, &format!("must have at most {MAX_TEXT_CHARS} characters")));
        }
        Ok(Some(text))
    }

    pub(crate) fn id(&mut self, name: &str) -> Result<Option<ObjectId>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|e: contract::id::InvalidObjectId| self.fault(name, &e.to_string()))
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<JsonObject>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        JsonObject::from_raw(raw.into_owned()).map(Some).map_err(|e| self.fault(name, &e.to_string()))
    }

    pub(crate) fn whole_number(&mut self, name: &str) -> Result<Option<u32>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| self.fault(name, "must be a whole number"))
    }

    /// Takes `true` or `false` of a body; false if absent.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(false) };
        serde_json::from_str(raw.get()).map_err(|_| self.fault(name, "must be true or false"))
    }

    /// Takes the address of a lead, which must be in the key's project.
    pub(crate) fn address(&mut self, key: &ApiKey) -> Result<Address, ApiError> {
        let lead_id = self.id("leadId")?;
        let reference_id = self.text("referenceId")?;
        let project_id = self.id("projectId")?;
        let process_id = self.id("processId")?;
        if lead_id.is_none() && reference_id.is_none() {
            return Err(ApiError::MissingField("Either leadId or referenceId is required"));
        }
        if reference_id.is_some() && (project_id.is_none() || process_id.is_none()) {
            return Err(ApiError::MissingField("projectId and processId are required when using referenceId"));
        }
        if project_id.is_some_and(|project_id| project_id != key.project_id) {
            return Err(ApiError::ProjectMismatch);
        }
        Ok(Address { lead_id, reference_id, process_id })
    }

    /// Takes a field without checking it.
    pub(crate) fn take(&mut self, name: &str) -> Option<Cow<'a, RawValue>> {
        // Keeps the order of the other fields, for they may become metadata.
        self.members.shift_remove(name).filter(|raw| raw.get() != "null")
    }

    pub(crate) fn rest(&mut self) -> Members<'a> {
        std::mem::take(&mut self.members)
    }

    /// Warns about the fields that were not taken.
    pub(crate) fn ignore_rest(&mut self, why: &str) {
        let rest = self.rest();
        if rest.is_empty() {
            return;
        }
        let mut names: Vec<String> = rest
            .keys()
            .take(MAX_NAMES)
            .map(|name| format!("{}{}", self.prefix, name.chars().take(NAME_CHARS).collect::<String>()))
            .collect();
        if rest.len() > MAX_NAMES {
            names.push(format!("{} more", rest.len() - MAX_NAMES));
        }
        self.warnings.push(format!("ignored {why}: {}", names.join(", ")));
    }

    /// Refuses fields that were not taken.
    pub(crate) fn refuse_rest(&mut self) -> Result<(), ApiError> {
        match self.rest().keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::field(name.chars().take(NAME_CHARS).collect::<String>(), "is unknown")),
        }
    }

    fn fault(&self, name: &str, fault: &str) -> ApiError {
        ApiError::field(format!("{}{name}", self.prefix), fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_string_has_texts() {
        let mut fields = Fields::from_query("referenceId=A%20%22b%22+c%C3%A9&empty=&x").unwrap();
        assert_eq!(fields.text("referenceId").unwrap().as_deref(), Some("A \"b\" cé"));
        assert_eq!(fields.text("empty").unwrap(), None);
        assert_eq!(fields.text("gone").unwrap(), None);
        for (query, fault) in [("a=1&a=2", "a is given twice"), ("a=x%00", "a contains the NUL character")] {
            assert_eq!(Fields::from_query(query).unwrap_err().to_string(), fault);
        }
    }

    #[test]
    fn a_warning_names_some_of_the_ignored_fields() {
        let body = format!(
            r#"{{"{}":1,{}"z":null}}"#,
            "k".repeat(70),
            (0..11).map(|i| format!(r#""f{i}":1,"#)).collect::<String>()
        );
        let mut fields = Fields::from_json(body.as_bytes()).unwrap();
        fields.ignore_rest("because of this");
        assert_eq!(
            fields.warnings,
            [format!("ignored because of this: {}, f0, f1, f2, f3, f4, f5, f6, f7, f8, 3 more", "k".repeat(64))]
        );
    }
}
