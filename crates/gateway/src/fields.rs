//! 1 Accept: the fields of a request, taken one by one and checked as they are taken.

use std::borrow::Cow;

use contract::{
    JsonObject, ObjectId,
    command::MAX_TEXT_CHARS,
    json::{self, Members},
    key::ApiKey,
};
use serde_json::value::RawValue;

use crate::error::ApiError;

/// How many ignored fields a warning names, and how much of each name: a warning should not repeat a whole body.
const NAMED: usize = 10;
const NAME_CHARS: usize = 64;

/// The fields that were not taken yet. JSON null counts as absent, and so does an empty string where a text or an id
/// is expected: clients of the vendor's API send both for what they have not.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    /// What stands before a field's name in messages: `lead.` inside the lead object.
    prefix: &'static str,
    members: Members<'a>,
    /// What was given and is ignored, a sentence each.
    pub(crate) warnings: Vec<String>,
}

/// How a request names a lead: by id, by reference in a process, or both.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) lead_id: Option<ObjectId>,
    pub(crate) reference_id: Option<String>,
    pub(crate) process_id: Option<ObjectId>,
}

impl<'a> Fields<'a> {
    /// The fields of a body.
    pub(crate) fn from_json(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = json::check(body).map_err(ApiError::InvalidJson)?;
        let members = json::members(text).map_err(|_| ApiError::NotAnObject)?;
        Ok(Self { prefix: "", members, warnings: Vec::new() })
    }

    /// The fields of an object that is itself a field.
    pub(crate) fn from_object(prefix: &'static str, object: &'a JsonObject) -> Self {
        Self { prefix, members: object.members(), warnings: Vec::new() }
    }

    /// The parameters of a query string, as texts.
    pub(crate) fn from_query(query: &str) -> Result<Self, ApiError> {
        let mut members = Members::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if value.contains('\0') {
                return Err(ApiError::field(name, "holds the NUL character"));
            }
            let value = serde_json::value::to_raw_value(&value).map_err(|_| ApiError::Internal)?;
            if members.insert(Cow::Owned(name.clone().into_owned()), Cow::Owned(value)).is_some() {
                return Err(ApiError::field(name, "stands twice"));
            }
        }
        Ok(Self { prefix: "", members, warnings: Vec::new() })
    }

    /// Takes a text.
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

    /// Takes an id.
    pub(crate) fn id(&mut self, name: &str) -> Result<Option<ObjectId>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|e: contract::id::InvalidObjectId| self.fault(name, &e.to_string()))
    }

    /// Takes an object, as it is.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<JsonObject>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        JsonObject::from_raw(raw.into_owned()).map(Some).map_err(|e| self.fault(name, &e.to_string()))
    }

    /// Takes a whole number, as versions are.
    pub(crate) fn whole_number(&mut self, name: &str) -> Result<Option<u32>, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| self.fault(name, "must be a whole number"))
    }

    /// Takes a truth value; false where it is absent.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        let Some(raw) = self.take(name) else { return Ok(false) };
        serde_json::from_str(raw.get()).map_err(|_| self.fault(name, "must be true or false"))
    }

    /// Takes the fields that name a lead, which must be of the key's project.
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
            return Err(ApiError::OtherProject);
        }
        Ok(Address { lead_id, reference_id, process_id })
    }

    /// Takes a field unseen.
    pub(crate) fn take(&mut self, name: &str) -> Option<Cow<'a, RawValue>> {
        // Shifting keeps the order of what stays, for it may become metadata.
        self.members.shift_remove(name).filter(|raw| raw.get() != "null")
    }

    /// Takes all that is left.
    pub(crate) fn rest(&mut self) -> Members<'a> {
        std::mem::take(&mut self.members)
    }

    /// Warns of all that is left.
    pub(crate) fn ignore_rest(&mut self, why: &str) {
        let rest = self.rest();
        if rest.is_empty() {
            return;
        }
        let mut names: Vec<String> = rest
            .keys()
            .take(NAMED)
            .map(|name| format!("{}{}", self.prefix, name.chars().take(NAME_CHARS).collect::<String>()))
            .collect();
        if rest.len() > NAMED {
            names.push(format!("{} more", rest.len() - NAMED));
        }
        self.warnings.push(format!("ignored {why}: {}", names.join(", ")));
    }

    fn fault(&self, name: &str, fault: &str) -> ApiError {
        ApiError::field(format!("{}{name}", self.prefix), fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_as_texts() {
        let mut fields = Fields::from_query("referenceId=A%20%22b%22+c%C3%A9&empty=&x").unwrap();
        assert_eq!(fields.text("referenceId").unwrap().as_deref(), Some("A \"b\" cé"));
        assert_eq!(fields.text("empty").unwrap(), None);
        assert_eq!(fields.text("gone").unwrap(), None);
        for (query, fault) in [("a=1&a=2", "a stands twice"), ("a=x%00", "a holds the NUL character")] {
            assert_eq!(Fields::from_query(query).unwrap_err().to_string(), fault);
        }
    }

    #[test]
    fn a_warning_names_some_of_what_is_ignored() {
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
