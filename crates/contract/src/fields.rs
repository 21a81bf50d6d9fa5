//! The fields of a JSON object from a client, each checked when it is taken.

use std::borrow::Cow;

use serde_json::value::RawValue;

use crate::{
    JsonObject, ObjectId,
    command::MAX_TEXT_CHARS,
    json::{self, JsonFault, Members},
    text::trim,
    warning::Warning,
};

/// How many ignored fields a warning names, and how much of each name, so that a warning does not repeat a whole body.
const MAX_NAMES: usize = 10;
const NAME_CHARS: usize = 64;

/// The fault of an empty text where empty texts are refused.
pub(crate) const EMPTY: &str = "must not be empty; leave it out instead";

/// Why a body is refused. The text is for the client that sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It is not JSON that can be stored.
    #[error("The body cannot be accepted as JSON: {0}")]
    InvalidJson(JsonFault),
    /// It is JSON, but not an object.
    #[error("The body must be a JSON object")]
    NotAnObject,
    /// A field has a value that is not acceptable.
    #[error("{field} {fault}")]
    InvalidField {
        /// The field's name.
        field: String,
        /// The fault of the value.
        fault: String,
    },
    /// A required field is missing.
    #[error("{0}")]
    MissingField(&'static str),
    /// No lead is addressed.
    #[error("Either leadId or referenceId is required{}", .0.as_deref().unwrap_or_default())]
    AddressMissing(
        /// The known field that the client probably meant.
        Option<String>,
    ),
    /// An update without a change.
    #[error("Nothing to change: give metadata, name or targetState")]
    NothingToChange,
    /// The body names another project than the client's.
    #[error("projectId does not match authenticated project")]
    ProjectMismatch,
}

impl BodyError {
    /// A field with an unacceptable value.
    pub fn field(field: impl Into<String>, fault: impl Into<String>) -> Self {
        Self::InvalidField { field: field.into(), fault: fault.into() }
    }

    /// The stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::InvalidJson(_) => "invalid_json",
            Self::NotAnObject => "not_an_object",
            Self::InvalidField { .. } => "invalid_field",
            Self::MissingField(_) => "missing_field",
            Self::AddressMissing(_) => "address_missing",
            Self::NothingToChange => "nothing_to_change",
            Self::ProjectMismatch => "project_mismatch",
        }
    }
}

/// The known field of which `name` is another spelling: `leadId` for `lead_id`.
pub fn meant_field<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let plain = |name: &str| name.to_lowercase().replace(['_', '-', ' '], "");
    let plain_name = plain(name);
    known.into_iter().find(|known| *known != name && plain(known) == plain_name)
}

/// The fields that were not taken yet. JSON null counts as absent, and so does an empty string where a text or an id is
/// expected: clients of the vendor's API send both for missing values.
#[derive(Debug)]
pub struct Fields<'a> {
    /// Precedes field names in messages: `lead.` inside the lead object.
    prefix: &'static str,
    members: Members<'a>,
    /// Whether an empty text is refused: a filter that is ignored would select more than intended.
    refuses_empty: bool,
    /// Sentences about ignored input.
    pub warnings: Vec<String>,
}

/// The address of a lead: an id, a reference in a process, or both.
#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    /// The lead.
    pub lead_id: Option<ObjectId>,
    /// The lead's external id.
    pub reference_id: Option<String>,
    /// The process of the external id.
    pub process_id: Option<ObjectId>,
}

impl<'a> Fields<'a> {
    /// The fields of a body.
    ///
    /// # Errors
    /// The body is not JSON that can be stored, or not an object.
    pub fn from_json(body: &'a [u8]) -> Result<Self, BodyError> {
        let text = json::check(body).map_err(BodyError::InvalidJson)?;
        Ok(Self::from_members(json::members(text).map_err(|_| BodyError::NotAnObject)?))
    }

    /// The fields of an object inside a body.
    pub fn from_object(prefix: &'static str, object: &'a JsonObject) -> Self {
        Self { prefix, ..Self::from_members(object.members()) }
    }

    /// The fields of an object's members.
    pub fn from_members(members: Members<'a>) -> Self {
        Self { prefix: "", members, refuses_empty: false, warnings: Vec::new() }
    }

    /// Refuses empty texts from now on, for bodies whose texts select leads or calls.
    #[must_use]
    pub fn refusing_empty(mut self) -> Self {
        self.refuses_empty = true;
        self
    }

    /// Takes a text that is not empty.
    ///
    /// # Errors
    /// It is not a string, or too long.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, BodyError> {
        self.text_up_to(name, MAX_TEXT_CHARS)
    }

    /// Takes a text of 1 to `max_chars` characters.
    ///
    /// # Errors
    /// It is not a string, or too long.
    pub fn text_up_to(&mut self, name: &str, max_chars: usize) -> Result<Option<String>, BodyError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        self.checked(name, text, max_chars)
    }

    /// Takes a lead's external id, without invisible characters at its ends.
    ///
    /// # Errors
    /// It is not a string, or too long.
    pub fn reference_id(&mut self) -> Result<Option<String>, BodyError> {
        const NAME: &str = "referenceId";
        let Some(text) = self.string(NAME)? else { return Ok(None) };
        self.checked(NAME, trim(&text).to_owned(), MAX_TEXT_CHARS)
    }

    fn string(&mut self, name: &str) -> Result<Option<String>, BodyError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| self.fault(name, "must be a string"))
    }

    fn checked(&mut self, name: &str, text: String, max_chars: usize) -> Result<Option<String>, BodyError> {
        if text.is_empty() {
            if self.refuses_empty {
                return Err(self.fault(name, EMPTY));
            }
            self.warnings.push(Warning::EMPTY.with(&[&format_args!("{}{name}", self.prefix)]));
            return Ok(None);
        }
        if text.chars().nth(max_chars).is_some() {
            return Err(self.fault(name, &format!("must have at most {max_chars} characters")));
        }
        Ok(Some(text))
    }

    /// Takes a text, which must not be empty.
    ///
    /// # Errors
    /// It is not a string, or too long, or empty.
    pub fn text_or_refuse_empty(&mut self, name: &str) -> Result<Option<String>, BodyError> {
        let refuses_empty = std::mem::replace(&mut self.refuses_empty, true);
        let text = self.text(name);
        self.refuses_empty = refuses_empty;
        text
    }

    /// Takes an id.
    ///
    /// # Errors
    /// It is not 24 hex digits.
    pub fn id(&mut self, name: &str) -> Result<Option<ObjectId>, BodyError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|e: crate::id::InvalidObjectId| self.fault(name, &e.to_string()))
    }

    /// Takes an object.
    ///
    /// # Errors
    /// It is not an object.
    pub fn object(&mut self, name: &str) -> Result<Option<JsonObject>, BodyError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        JsonObject::from_raw(raw.into_owned()).map(Some).map_err(|e| self.fault(name, &e.to_string()))
    }

    /// Takes a whole number.
    ///
    /// # Errors
    /// It is not a whole number, or exceeds a `u32`.
    pub fn whole_number(&mut self, name: &str) -> Result<Option<u32>, BodyError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        serde_json::from_str(raw.get())
            .map(Some)
            .map_err(|_| self.fault(name, "must be a whole number, at most 4294967295"))
    }

    /// Takes a boolean; false if absent.
    ///
    /// # Errors
    /// It is not a boolean.
    pub fn flag(&mut self, name: &str) -> Result<bool, BodyError> {
        let Some(raw) = self.take(name) else { return Ok(false) };
        serde_json::from_str(raw.get()).map_err(|_| self.fault(name, "must be true or false"))
    }

    /// Takes a boolean.
    ///
    /// # Errors
    /// It is not a boolean.
    pub fn optional_flag(&mut self, name: &str) -> Result<Option<bool>, BodyError> {
        let Some(raw) = self.take(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| self.fault(name, "must be true or false"))
    }

    /// Takes a text that is not empty and may be longer than other texts.
    ///
    /// # Errors
    /// It is not a string, or too long.
    pub fn long_text(&mut self, name: &str, max_bytes: usize) -> Result<Option<String>, BodyError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        match text.len() {
            0 => Err(self.fault(name, EMPTY)),
            bytes if bytes > max_bytes => Err(self.fault(name, &format!("must have at most {max_bytes} bytes"))),
            _ => Ok(Some(text)),
        }
    }

    /// Takes the address of a call event's lead. The body may omit the project, which is the client's.
    ///
    /// # Errors
    /// No lead is addressed, or the project is another one.
    pub fn address_in(&mut self, project_id: ObjectId) -> Result<Address, BodyError> {
        let lead_id = self.id("leadId")?;
        let reference_id = self.reference_id()?;
        let process_id = self.id("processId")?;
        let given_project_id = self.id("projectId")?;
        self.require_address(lead_id, reference_id.as_deref())?;
        if reference_id.is_some() && process_id.is_none() {
            return Err(BodyError::MissingField("processId is required when using referenceId"));
        }
        if given_project_id.is_some_and(|given| given != project_id) {
            return Err(BodyError::ProjectMismatch);
        }
        Ok(Address { lead_id, reference_id, process_id })
    }

    fn require_address(&self, lead_id: Option<ObjectId>, reference_id: Option<&str>) -> Result<(), BodyError> {
        if lead_id.is_some() || reference_id.is_some() {
            return Ok(());
        }
        let meant = self.names().find_map(|name| Some((name, meant_field(name, ["leadId", "referenceId"])?)));
        let hint = meant.map(|(name, meant)| format!("; {} is written {meant}", shortened(name)));
        Err(BodyError::AddressMissing(hint))
    }

    /// Takes the address of a lead, which must be in this project. If `project_id` is none, the project is checked
    /// later.
    ///
    /// # Errors
    /// No lead is addressed, or the project is another one.
    pub fn address(&mut self, project_id: Option<ObjectId>) -> Result<Address, BodyError> {
        let lead_id = self.id("leadId")?;
        let reference_id = self.reference_id()?;
        let given_project_id = self.id("projectId")?;
        let process_id = self.id("processId")?;
        self.require_address(lead_id, reference_id.as_deref())?;
        if reference_id.is_some() && (given_project_id.is_none() || process_id.is_none()) {
            return Err(BodyError::MissingField("projectId and processId are required when using referenceId"));
        }
        if given_project_id.is_some_and(|given| project_id.is_some_and(|project_id| project_id != given)) {
            return Err(BodyError::ProjectMismatch);
        }
        Ok(Address { lead_id, reference_id, process_id })
    }

    /// Takes a field without checking it.
    pub fn take(&mut self, name: &str) -> Option<Cow<'a, RawValue>> {
        // Keeps the order of the other fields, because they may become metadata.
        self.members.shift_remove(name).filter(|raw| raw.get() != "null")
    }

    /// The names of the fields that were not taken.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(|name| &**name)
    }

    /// Takes all fields that were not taken.
    pub fn rest(&mut self) -> Members<'a> {
        std::mem::take(&mut self.members)
    }

    /// Warns about the fields that were not taken.
    pub fn ignore_rest(&mut self, warning: Warning) {
        let rest = self.rest();
        if rest.is_empty() {
            return;
        }
        let mut names: Vec<String> =
            rest.keys().take(MAX_NAMES).map(|name| format!("{}{}", self.prefix, shortened(name))).collect();
        if rest.len() > MAX_NAMES {
            names.push(Warning::MORE.with(&[&(rest.len() - MAX_NAMES)]));
        }
        self.warnings.push(warning.with(&[&names.join(", ")]));
    }

    /// Refuses fields that were not taken.
    ///
    /// # Errors
    /// A field was not taken.
    pub fn refuse_rest(&mut self) -> Result<(), BodyError> {
        match self.rest().keys().next() {
            None => Ok(()),
            Some(name) => Err(self.fault(&shortened(name), "is unknown")),
        }
    }

    fn fault(&self, name: &str, fault: &str) -> BodyError {
        BodyError::field(format!("{}{name}", self.prefix), fault)
    }
}

/// The beginning of a client's name for a field.
pub(crate) fn shortened(name: &str) -> String {
    name.chars().take(NAME_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_names_some_of_the_ignored_fields() {
        let body = format!(
            r#"{{"{}":1,{}"z":null}}"#,
            "k".repeat(70),
            (0..11).map(|i| format!(r#""f{i}":1,"#)).collect::<String>()
        );
        let mut fields = Fields::from_json(body.as_bytes()).unwrap();
        fields.ignore_rest(Warning::UNKNOWN);
        assert_eq!(
            fields.warnings,
            [format!("ignored as unknown: {}, f0, f1, f2, f3, f4, f5, f6, f7, f8, 3 more", "k".repeat(64))]
        );
    }

    #[test]
    fn a_reference_of_invisible_characters_is_an_empty_one() {
        for reference in ["", " ", "\u{200b}\t"] {
            let body = serde_json::json!({"referenceId": reference}).to_string();
            let mut fields = Fields::from_json(body.as_bytes()).unwrap();
            assert_eq!(fields.reference_id(), Ok(None));
            assert_eq!(fields.warnings.len(), 1);
            let mut fields = Fields::from_json(body.as_bytes()).unwrap().refusing_empty();
            assert_eq!(fields.reference_id(), Err(BodyError::field("referenceId", EMPTY)));
        }
        let mut fields = Fields::from_json(br#"{"referenceId":" R 1 "}"#).unwrap();
        assert_eq!(fields.reference_id(), Ok(Some("R 1".into())));
    }

    #[test]
    fn a_field_that_is_only_spelt_differently_is_recognized() {
        let known = ["leadId", "targetState"];
        for name in ["lead_id", "LEADID", "lead-id", "Lead Id"] {
            assert_eq!(meant_field(name, known), Some("leadId"), "{name}");
        }
        for name in ["leadId", "lead", "leadIds", ""] {
            assert_eq!(meant_field(name, known), None, "{name}");
        }
    }
}
