//! Parses the body of an update, for every way in: `POST /api/v1/leads/update`, a line of a bulk request, a row of an
//! import, a producer's message on `leads.cmd.{projectId}.update`.
//!
//! A client may use any names in a body: fields that the vendor's API does not have become metadata. Leadrelay's own
//! options of an update are therefore outside of the body:
//!
//! | | `POST /api/v1/leads/update` | line of a bulk request, column of an import | message |
//! |---|---|---|---|
//! | the version that the lead must have | `If-Match` | `$expectedVersion` | `Leadrelay-Expected-Version` |
//! | the state that the lead must be in | `?expectedState=` | `$expectedState` | `Leadrelay-Expected-State` |
//! | a preview | `?dryRun=true` | | |
//! | the update's id | | | `Leadrelay-Update-Id` |

use crate::{
    JsonObject, ObjectId,
    command::{MAX_TEXT_CHARS, UpdateCommand},
    fields::{Address, BodyError, EMPTY, Fields, shortened},
    warning::Warning,
};

/// The version that a lead must have, in a line of a bulk request and in a column of an import.
pub const EXPECTED_VERSION: &str = "$expectedVersion";
/// The state that a lead must be in, in a line of a bulk request and in a column of an import.
pub const EXPECTED_STATE: &str = "$expectedState";
/// The first character of the names that are reserved in lines and columns.
pub const RESERVED: char = '$';

/// A parsed body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateBody {
    /// The update, without the ids of the update and of the API key. It has expectations only if a line gives them.
    pub command: UpdateCommand,
    /// Warnings about ignored fields, in sentences.
    pub warnings: Vec<String>,
}

impl UpdateBody {
    /// Parses a body from a client of this project. If `project_id` is none, the project is checked later.
    ///
    /// # Errors
    /// The body is not an update of a lead of this project.
    pub fn parse(body: &[u8], project_id: Option<ObjectId>) -> Result<Self, BodyError> {
        Self::from_fields(Fields::from_json(body)?, project_id)
    }

    /// Parses a line of many updates, where names that begin with `$` are reserved.
    ///
    /// # Errors
    /// The line is not an update of a lead of this project, or has an unknown reserved name.
    pub fn parse_line(line: &[u8], project_id: Option<ObjectId>) -> Result<Self, BodyError> {
        let mut fields = Fields::from_json(line)?;
        let version = fields.whole_number(EXPECTED_VERSION)?;
        // An empty expectation is an error: ignoring it would apply an update that should have been conditional.
        let state = fields.text_or_refuse_empty(EXPECTED_STATE)?;
        if let Some(name) = fields.names().find(|name| name.starts_with(RESERVED)) {
            return Err(reserved(name));
        }
        let mut update = Self::from_fields(fields, project_id)?;
        update.command.expected_version = version;
        update.command.expected_state = state;
        Ok(update)
    }

    fn from_fields(mut fields: Fields<'_>, project_id: Option<ObjectId>) -> Result<Self, BodyError> {
        let Address { lead_id, reference_id, process_id } = fields.address(project_id)?;
        let name = fields.text("name")?;
        let target_state = fields.text("targetState")?;
        let disposition = fields.text("disposition")?;
        let user_id = fields.text("userId")?;
        let metadata = match fields.object("metadata")? {
            Some(metadata) => {
                fields.ignore_rest(Warning::BESIDE_METADATA);
                metadata
            }
            None => JsonObject::from_members(&fields.rest()),
        };
        let metadata = Some(metadata).filter(|metadata| !metadata.is_empty());
        // A disposition and a user id describe a change; without one they change nothing.
        if metadata.is_none() && name.is_none() && target_state.is_none() {
            return Err(BodyError::NothingToChange);
        }
        if disposition.is_some() && target_state.is_none() {
            fields.warnings.push(Warning::DISPOSITION_WITHOUT_STATE.with(&[]));
        }
        let command = UpdateCommand {
            lead_id,
            reference_id,
            process_id,
            metadata,
            name,
            target_state,
            disposition,
            user_id,
            ..UpdateCommand::default()
        };
        Ok(Self { command, warnings: fields.warnings })
    }
}

/// The error for a reserved name that has no meaning in a line or column.
pub fn reserved(name: &str) -> BodyError {
    let fault = if name == "$dryRun" {
        "is not available for many updates: preview one with POST /api/v1/leads/update?dryRun=true"
    } else {
        "is reserved: names that begin with $ are reserved here; put metadata of that name into metadata"
    };
    BodyError::field(shortened(name), fault)
}

/// Parses the version that a lead must have, from a header or a cell of this name.
///
/// # Errors
/// The text is not a version.
pub fn parse_expected_version(name: &str, text: &str) -> Result<u32, BodyError> {
    let digits = Some(text.trim()).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| BodyError::field(name, "must be a version: a whole number"))
}

/// Parses the state that a lead must be in, from a header or a parameter of this name.
///
/// # Errors
/// The text is empty, or no state has such a name.
pub fn parse_expected_state(name: &str, text: &str) -> Result<String, BodyError> {
    match text {
        "" => Err(BodyError::field(name, EMPTY)),
        _ if text.contains('\0') => Err(BodyError::field(name, "contains the NUL character")),
        _ if text.chars().nth(MAX_TEXT_CHARS).is_some() => {
            Err(BodyError::field(name, format!("must have at most {MAX_TEXT_CHARS} characters")))
        }
        _ => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::json::{self, Members};

    const LEAD: &str = "696102a4b8c1d2e3f4a5b6c7";
    const PROJECT: ObjectId = ObjectId::from_bytes([0x11; 12]);

    fn parse(body: &[u8]) -> Result<UpdateBody, BodyError> {
        UpdateBody::parse(body, Some(PROJECT))
    }

    /// Inputs with the commands or errors that they become.
    fn parsed(inputs: &[&str]) -> String {
        parsed_by(UpdateBody::parse, inputs)
    }

    fn parsed_by(parse: impl Fn(&[u8], Option<ObjectId>) -> Result<UpdateBody, BodyError>, inputs: &[&str]) -> String {
        let one = |input: &&str| {
            // Inputs have names in place of ids.
            let body = input.replace("LEAD", LEAD).replace("OURS", &PROJECT.to_string()).replace("THEIRS", LEAD);
            match parse(body.as_bytes(), Some(PROJECT)) {
                Ok(UpdateBody { command, warnings }) => {
                    let command = serde_json::to_string(&command).unwrap().replace(LEAD, "LEAD");
                    let warnings = warnings.iter().map(|warning| format!("\n    warning: {warning}"));
                    format!("{input}\n    {command}{}", warnings.collect::<String>())
                }
                Err(e) => format!("{input}\n    {}: {e}", e.code()),
            }
        };
        inputs.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_lead_is_addressed_by_id_or_by_reference_in_a_process() {
        insta::assert_snapshot!(parsed(&[
            r#"{"name":"Ada"}"#,
            r#"{"leadId":null,"referenceId":"","name":"Ada"}"#,
            r#"{"lead_id":"LEAD","target_state":"interested"}"#,
            r#"{"Reference-Id":"R"}"#,
            r#"{"leadId":"LEAD","name":"Ada"}"#,
            r#"{"leadId":"LEAD","projectId":"OURS","name":"Ada"}"#,
            r#"{"leadId":"LEAD","projectId":"THEIRS","name":"Ada"}"#,
            r#"{"referenceId":"R","name":"Ada"}"#,
            r#"{"referenceId":"R","projectId":"OURS","name":"Ada"}"#,
            r#"{"referenceId":"R","processId":"LEAD","name":"Ada"}"#,
            r#"{"referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}"#,
            r#"{"referenceId":"R","projectId":"THEIRS","processId":"LEAD","name":"Ada"}"#,
            r#"{"leadId":"LEAD","referenceId":"R","name":"Ada"}"#,
            r#"{"leadId":"LEAD","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}"#,
            r#"{"leadId":"","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}"#,
        ]), @r#"
        {"name":"Ada"}
            address_missing: Either leadId or referenceId is required
        {"leadId":null,"referenceId":"","name":"Ada"}
            address_missing: Either leadId or referenceId is required
        {"lead_id":"LEAD","target_state":"interested"}
            address_missing: Either leadId or referenceId is required; lead_id is written leadId
        {"Reference-Id":"R"}
            address_missing: Either leadId or referenceId is required; Reference-Id is written referenceId
        {"leadId":"LEAD","name":"Ada"}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","projectId":"OURS","name":"Ada"}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","projectId":"THEIRS","name":"Ada"}
            project_mismatch: projectId does not match authenticated project
        {"referenceId":"R","name":"Ada"}
            missing_field: projectId and processId are required when using referenceId
        {"referenceId":"R","projectId":"OURS","name":"Ada"}
            missing_field: projectId and processId are required when using referenceId
        {"referenceId":"R","processId":"LEAD","name":"Ada"}
            missing_field: projectId and processId are required when using referenceId
        {"referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}
            {"referenceId":"R","processId":"LEAD","name":"Ada"}
        {"referenceId":"R","projectId":"THEIRS","processId":"LEAD","name":"Ada"}
            project_mismatch: projectId does not match authenticated project
        {"leadId":"LEAD","referenceId":"R","name":"Ada"}
            missing_field: projectId and processId are required when using referenceId
        {"leadId":"LEAD","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}
            {"leadId":"LEAD","referenceId":"R","processId":"LEAD","name":"Ada"}
        {"leadId":"","referenceId":"R","projectId":"OURS","processId":"LEAD","name":"Ada"}
            {"referenceId":"R","processId":"LEAD","name":"Ada"}
            warning: leadId is empty and was ignored
        "#);
    }

    #[test]
    fn fields_of_the_wrong_type_are_refused() {
        let long = format!(r#"{{"leadId":"LEAD","name":"{}"}}"#, "é".repeat(1025));
        assert!(parsed(&[&long]).ends_with("invalid_field: name must have at most 1024 characters"));
        assert!(!parsed(&[&long.replacen('é', "", 1)]).contains("invalid_field"));
        insta::assert_snapshot!(parsed(&[
            r#"{"leadId":"696102a4b8","name":"Ada"}"#,
            r#"{"leadId":"696102A4B8C1D2E3F4A5B6C7","name":"Ada"}"#,
            r#"{"leadId":7,"name":"Ada"}"#,
            r#"{"leadId":"LEAD","projectId":"p","name":"Ada"}"#,
            r#"{"leadId":"LEAD","processId":"p","name":"Ada"}"#,
            r#"{"referenceId":12,"name":"Ada"}"#,
            r#"{"leadId":"LEAD","name":["Ada"]}"#,
            r#"{"leadId":"LEAD","name":"","targetState":"","disposition":"","userId":"","make":"Toyota"}"#,
            r#"{"leadId":"LEAD","targetState":true}"#,
            r#"{"leadId":"LEAD","targetState":"lost","disposition":1}"#,
            r#"{"leadId":"LEAD","targetState":"lost","userId":1}"#,
            r#"{"leadId":"LEAD","name":null,"targetState":"lost","disposition":"price","userId":"u-1"}"#,
            r#"{"leadId":"LEAD","name":"Ada","disposition":"price"}"#,
        ]), @r#"
        {"leadId":"696102a4b8","name":"Ada"}
            invalid_field: leadId must be 24 hex digits
        {"leadId":"696102A4B8C1D2E3F4A5B6C7","name":"Ada"}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":7,"name":"Ada"}
            invalid_field: leadId must be a string
        {"leadId":"LEAD","projectId":"p","name":"Ada"}
            invalid_field: projectId must be 24 hex digits
        {"leadId":"LEAD","processId":"p","name":"Ada"}
            invalid_field: processId must be 24 hex digits
        {"referenceId":12,"name":"Ada"}
            invalid_field: referenceId must be a string
        {"leadId":"LEAD","name":["Ada"]}
            invalid_field: name must be a string
        {"leadId":"LEAD","name":"","targetState":"","disposition":"","userId":"","make":"Toyota"}
            {"leadId":"LEAD","metadata":{"make":"Toyota"}}
            warning: name is empty and was ignored
            warning: targetState is empty and was ignored
            warning: disposition is empty and was ignored
            warning: userId is empty and was ignored
        {"leadId":"LEAD","targetState":true}
            invalid_field: targetState must be a string
        {"leadId":"LEAD","targetState":"lost","disposition":1}
            invalid_field: disposition must be a string
        {"leadId":"LEAD","targetState":"lost","userId":1}
            invalid_field: userId must be a string
        {"leadId":"LEAD","name":null,"targetState":"lost","disposition":"price","userId":"u-1"}
            {"leadId":"LEAD","targetState":"lost","disposition":"price","userId":"u-1"}
        {"leadId":"LEAD","name":"Ada","disposition":"price"}
            {"leadId":"LEAD","name":"Ada","disposition":"price"}
            warning: disposition is ignored without targetState
        "#);
    }

    #[test]
    fn unknown_fields_are_metadata_unless_metadata_is_given() {
        insta::assert_snapshot!(parsed(&[
            r#"{"leadId":"LEAD","metadata":{"n": 1.50,"a":[1, 2]}}"#,
            r#"{"leadId":"LEAD","metadata":{"a":1},"make":"Toyota","year":2024}"#,
            r#"{"leadId":"LEAD","metadata":{},"make":"Toyota"}"#,
            r#"{"leadId":"LEAD","metadata":[]}"#,
            r#"{"leadId":"LEAD","metadata":"{}"}"#,
            r#"{"z":123456789012345678901234567890,"leadId":"LEAD","a":{"x": null},"metadata":null,"m":null,"name":"Ada","b":1e2}"#,
            r#"{"leadId":"LEAD","make":"Toyota","model":"Camry"}"#,
        ]), @r#"
        {"leadId":"LEAD","metadata":{"n": 1.50,"a":[1, 2]}}
            {"leadId":"LEAD","metadata":{"n": 1.50,"a":[1, 2]}}
        {"leadId":"LEAD","metadata":{"a":1},"make":"Toyota","year":2024}
            {"leadId":"LEAD","metadata":{"a":1}}
            warning: ignored because metadata is given: make, year
        {"leadId":"LEAD","metadata":{},"make":"Toyota"}
            nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","metadata":[]}
            invalid_field: metadata must be a JSON object
        {"leadId":"LEAD","metadata":"{}"}
            invalid_field: metadata must be a JSON object
        {"z":123456789012345678901234567890,"leadId":"LEAD","a":{"x": null},"metadata":null,"m":null,"name":"Ada","b":1e2}
            {"leadId":"LEAD","metadata":{"z":123456789012345678901234567890,"a":{"x": null},"m":null,"b":1e2},"name":"Ada"}
        {"leadId":"LEAD","make":"Toyota","model":"Camry"}
            {"leadId":"LEAD","metadata":{"make":"Toyota","model":"Camry"}}
        "#);
    }

    #[test]
    fn an_update_without_a_change_is_refused() {
        insta::assert_snapshot!(parsed(&[
            r#"{"leadId":"LEAD"}"#,
            r#"{"leadId":"LEAD","metadata":{ }}"#,
            r#"{"leadId":"LEAD","name":null,"targetState":null,"metadata":null}"#,
            r#"{"leadId":"LEAD","disposition":"price","userId":"u-1"}"#,
        ]), @r#"
        {"leadId":"LEAD"}
            nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","metadata":{ }}
            nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","name":null,"targetState":null,"metadata":null}
            nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","disposition":"price","userId":"u-1"}
            nothing_to_change: Nothing to change: give metadata, name or targetState
        "#);
    }

    #[test]
    fn only_strict_json_objects_are_accepted() {
        insta::assert_snapshot!(parsed(&[
            "",
            "null",
            "[]",
            r#""text""#,
            r#"{"leadId":"LEAD","name":"Ada""#,
            r#"{"leadId":"LEAD","name":"Ada"} {}"#,
            r#"{"leadId":"LEAD","name":"Ada","name":"Bob"}"#,
            r#"{"leadId":"LEAD","note":"a\u0000b"}"#,
            r#"{"leadId":"LEAD","note":"\ud800"}"#,
            r#"{"leadId":"LEAD","n":1e999}"#,
            r#"{"leadId":"LEAD","n":NaN}"#,
        ]), @r#"
            invalid_json: The body cannot be accepted as JSON: EOF while parsing a value at line 1 column 0
        null
            not_an_object: The body must be a JSON object
        []
            not_an_object: The body must be a JSON object
        "text"
            not_an_object: The body must be a JSON object
        {"leadId":"LEAD","name":"Ada"
            invalid_json: The body cannot be accepted as JSON: EOF while parsing an object at line 1 column 49
        {"leadId":"LEAD","name":"Ada"} {}
            invalid_json: The body cannot be accepted as JSON: trailing characters at line 1 column 52
        {"leadId":"LEAD","name":"Ada","name":"Bob"}
            invalid_json: The body cannot be accepted as JSON: the key "name" occurs twice in one object at line 1 column 63
        {"leadId":"LEAD","note":"a\u0000b"}
            invalid_json: The body cannot be accepted as JSON: a string holds the NUL character \u0000, which cannot be stored at line 1 column 54
        {"leadId":"LEAD","note":"\ud800"}
            invalid_json: The body cannot be accepted as JSON: note contains half a surrogate pair at line 1 column 52
        {"leadId":"LEAD","n":1e999}
            invalid_json: The body cannot be accepted as JSON: number out of range at line 1 column 46
        {"leadId":"LEAD","n":NaN}
            invalid_json: The body cannot be accepted as JSON: expected value at line 1 column 42
        "#);
        let deep = format!(r#"{{"leadId":"{LEAD}","deep":{}{}}}"#, "[".repeat(64), "]".repeat(64));
        assert!(parse(deep.as_bytes()).unwrap_err().to_string().contains("nested deeper than 64"));
        let deepest = format!(r#"{{"leadId":"{LEAD}","deep":{}{}}}"#, "[".repeat(63), "]".repeat(63));
        let command = serde_json::to_string(&parse(deepest.as_bytes()).unwrap().command).unwrap();
        assert!(json::check(command.as_bytes()).is_err(), "the field is metadata, one level deeper");
        assert!(json::check_command(command.as_bytes()).is_ok());
        assert!(parse(b"{\"a\":\"\xff\"}").unwrap_err().to_string().contains("not valid UTF-8"));
    }

    #[test]
    fn the_names_of_controls_are_metadata_in_a_body_and_reserved_in_a_line() {
        let bodies = [
            r#"{"leadId":"LEAD","name":"Ada","expectedVersion":"1","expectedState":"new","dryRun":true}"#,
            r#"{"leadId":"LEAD","$expectedVersion":4,"$other":1}"#,
        ];
        insta::assert_snapshot!(parsed(&bodies), @r#"
        {"leadId":"LEAD","name":"Ada","expectedVersion":"1","expectedState":"new","dryRun":true}
            {"leadId":"LEAD","metadata":{"expectedVersion":"1","expectedState":"new","dryRun":true},"name":"Ada"}
        {"leadId":"LEAD","$expectedVersion":4,"$other":1}
            {"leadId":"LEAD","metadata":{"$expectedVersion":4,"$other":1}}
        "#);
        let lines = [
            bodies[0],
            r#"{"leadId":"LEAD","name":"Ada","$expectedVersion":4,"$expectedState":"new"}"#,
            r#"{"leadId":"LEAD","name":"Ada","$expectedVersion":null,"$expectedState":null}"#,
            r#"{"leadId":"LEAD","$expectedVersion":4}"#,
            r#"{"leadId":"LEAD","name":"Ada","$expectedVersion":"4"}"#,
            r#"{"leadId":"LEAD","name":"Ada","$expectedVersion":-1}"#,
            r#"{"leadId":"LEAD","name":"Ada","$expectedVersion":4.0}"#,
            r#"{"leadId":"LEAD","name":"Ada","$expectedState":["new"]}"#,
            r#"{"leadId":"LEAD","name":"Ada","$expectedState":""}"#,
            r#"{"leadId":"LEAD","name":"Ada","$dryRun":true}"#,
            r#"{"leadId":"LEAD","name":"Ada","$set":{}}"#,
            r#"{"leadId":"LEAD","metadata":{"$set":1},"$":null}"#,
            r#"{"leadId":"LEAD","metadata":{"$set":1}}"#,
        ];
        insta::assert_snapshot!(parsed_by(UpdateBody::parse_line, &lines), @r#"
        {"leadId":"LEAD","name":"Ada","expectedVersion":"1","expectedState":"new","dryRun":true}
            {"leadId":"LEAD","metadata":{"expectedVersion":"1","expectedState":"new","dryRun":true},"name":"Ada"}
        {"leadId":"LEAD","name":"Ada","$expectedVersion":4,"$expectedState":"new"}
            {"leadId":"LEAD","name":"Ada","expectedVersion":4,"expectedState":"new"}
        {"leadId":"LEAD","name":"Ada","$expectedVersion":null,"$expectedState":null}
            {"leadId":"LEAD","name":"Ada"}
        {"leadId":"LEAD","$expectedVersion":4}
            nothing_to_change: Nothing to change: give metadata, name or targetState
        {"leadId":"LEAD","name":"Ada","$expectedVersion":"4"}
            invalid_field: $expectedVersion must be a whole number, at most 4294967295
        {"leadId":"LEAD","name":"Ada","$expectedVersion":-1}
            invalid_field: $expectedVersion must be a whole number, at most 4294967295
        {"leadId":"LEAD","name":"Ada","$expectedVersion":4.0}
            invalid_field: $expectedVersion must be a whole number, at most 4294967295
        {"leadId":"LEAD","name":"Ada","$expectedState":["new"]}
            invalid_field: $expectedState must be a string
        {"leadId":"LEAD","name":"Ada","$expectedState":""}
            invalid_field: $expectedState must not be empty; leave it out instead
        {"leadId":"LEAD","name":"Ada","$dryRun":true}
            invalid_field: $dryRun is not available for many updates: preview one with POST /api/v1/leads/update?dryRun=true
        {"leadId":"LEAD","name":"Ada","$set":{}}
            invalid_field: $set is reserved: names that begin with $ are reserved here; put metadata of that name into metadata
        {"leadId":"LEAD","metadata":{"$set":1},"$":null}
            invalid_field: $ is reserved: names that begin with $ are reserved here; put metadata of that name into metadata
        {"leadId":"LEAD","metadata":{"$set":1}}
            {"leadId":"LEAD","metadata":{"$set":1}}
        "#);
    }

    #[test]
    fn expectations_are_read_from_texts() {
        let version = |text| parse_expected_version("If", text).map_err(|e| e.to_string());
        assert_eq!((version("4"), version(" 4294967295 ")), (Ok(4), Ok(u32::MAX)));
        for odd in ["", " ", "x", "+4", "-1", "4.0", "4294967296"] {
            assert_eq!(version(odd), Err("If must be a version: a whole number".into()), "{odd}");
        }
        let state = |text: &str| parse_expected_state("If", text).map_err(|e| e.to_string());
        let longest = "é".repeat(MAX_TEXT_CHARS);
        assert_eq!((state("new"), state(&longest)), (Ok("new".into()), Ok(longest.clone())));
        for odd in ["", "a\0", &format!("{longest}x")] {
            assert!(state(odd).unwrap_err().starts_with("If "), "{odd}");
        }
    }

    /// Any JSON, as text, numbers of any length included.
    fn any_json() -> impl Strategy<Value = String> {
        let text = || any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap());
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("true".to_owned()),
            r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?",
            text(),
        ];
        leaf.prop_recursive(4, 64, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(|items| format!("[{}]", items.join(", "))),
                prop::collection::vec((text(), inner), 0..8).prop_map(|members| object(&members)),
            ]
        })
    }

    /// A body with some fields of the API, and others.
    fn any_body() -> impl Strategy<Value = String> {
        let name = prop_oneof![
            prop::sample::select(vec![
                "referenceId",
                "projectId",
                "processId",
                "metadata",
                "name",
                "targetState",
                "disposition",
                "userId",
            ])
            .prop_map(str::to_owned),
            "[a-z]{1,3}",
        ];
        prop::collection::vec((name.prop_map(|name| format!("{name:?}")), any_json()), 0..8).prop_map(|mut members| {
            members.push((r#""leadId""#.into(), format!("{LEAD:?}")));
            object(&members)
        })
    }

    fn object(members: &[(String, String)]) -> String {
        let mut seen = HashSet::new();
        let members = members.iter().filter(|(name, _)| seen.insert(name));
        format!("{{{}}}", members.map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join(","))
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>) {
            let _ = parse(&body);
        }

        #[test]
        fn arbitrary_json_never_panics(body in any_json()) {
            let _ = parse(body.as_bytes());
        }

        #[test]
        fn accepted_values_are_unchanged_to_the_byte(body in any_body()) {
            let Ok(UpdateBody { command, .. }) = parse(body.as_bytes()) else { return Ok(()) };
            let text = serde_json::to_string(&command).unwrap();
            prop_assert_eq!(json::check(text.as_bytes()), Ok(text.as_str()));
            prop_assert_eq!(serde_json::from_str::<UpdateCommand>(&text).unwrap(), command.clone());
            // Each value in the metadata is, to the byte, the one that the client wrote.
            let given: Members = serde_json::from_str(&body).unwrap();
            let given = match given.get("metadata").filter(|raw| raw.get() != "null") {
                Some(metadata) => serde_json::from_str::<Members>(metadata.get()).unwrap(),
                None => given,
            };
            for (name, value) in command.metadata.iter().flat_map(JsonObject::members) {
                prop_assert_eq!(value.get(), given[&name].get());
            }
        }
    }
}
