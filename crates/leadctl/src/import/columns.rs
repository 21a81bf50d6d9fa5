//! The meaning of the columns of a CSV file, by its header.

use contract::{
    fields::meant_field,
    text::{is_invisible, name_char, trim},
    update_body::{EXPECTED_STATE, EXPECTED_VERSION, RESERVED, reserved},
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Column {
    Id(&'static str),
    Text(&'static str),
    /// [`EXPECTED_VERSION`].
    Version,
    /// A JSON object to merge into the metadata.
    Metadata,
    /// A text member of the metadata.
    Member(String),
}

/// Prefix of columns that are metadata members even if the rest is the name of a field.
const PREFIX: &str = "metadata.";

/// Parses a header.
pub(crate) fn columns(header: &[&str]) -> Result<Vec<Column>, String> {
    let invisible = header.iter().zip(1..).find_map(|(name, n)| Some((n, name.chars().find(|c| is_invisible(*c))?)));
    if let Some((n, c)) = invisible {
        return Err(format!("{}, column {n}: remove this character, which cannot be seen", name_char(c)));
    }
    let columns = header.iter().map(|name| column(name)).collect::<Result<Vec<_>, _>>()?;
    for (n, column) in columns.iter().enumerate() {
        if columns[..n].contains(column) {
            return Err(format!("the column {:?} occurs twice", header[n]));
        }
    }
    if !columns.iter().any(|column| matches!(column, Column::Id("leadId") | Column::Text("referenceId"))) {
        return Err("the first line must name the columns, and one of them must be leadId or referenceId".to_owned());
    }
    Ok(columns)
}

/// Whether a header names the address of a lead, even misspelled: then it was split with the right separator.
pub(crate) fn names_address(header: &[Vec<u8>]) -> bool {
    let name = |cell: &[u8]| plain(trim(&String::from_utf8_lossy(cell)));
    header.iter().any(|cell| ["leadid", "referenceid"].contains(&name(cell).as_str()))
}

/// A name without the differences in case and separators.
fn plain(name: &str) -> String {
    name.to_lowercase().replace(['_', '-', ' '], "")
}

fn column(name: &str) -> Result<Column, String> {
    const KNOWN: [(&str, Column); 10] = [
        ("leadId", Column::Id("leadId")),
        ("referenceId", Column::Text("referenceId")),
        ("projectId", Column::Id("projectId")),
        ("processId", Column::Id("processId")),
        ("name", Column::Text("name")),
        ("targetState", Column::Text("targetState")),
        ("disposition", Column::Text("disposition")),
        ("userId", Column::Text("userId")),
        (EXPECTED_STATE, Column::Text(EXPECTED_STATE)),
        (EXPECTED_VERSION, Column::Version),
    ];
    if let Some((_, column)) = KNOWN.iter().find(|(known, _)| *known == name) {
        return Ok(column.clone());
    }
    if name == "metadata" {
        return Ok(Column::Metadata);
    }
    if let Some(key) = name.strip_prefix(PREFIX)
        && !key.is_empty()
    {
        return Ok(Column::Member(key.to_owned()));
    }
    if name.is_empty() || name == PREFIX {
        return Err("a column has no name".to_owned());
    }
    // A misspelled field must not become metadata silently.
    match meant_field(name, KNOWN.iter().map(|(known, _)| *known).chain(["metadata"])) {
        Some(meant) => {
            Err(format!("{name:?} must be written {meant:?}; for metadata of that name use \"{PREFIX}{name}\""))
        }
        None if name.starts_with(RESERVED) => {
            Err(format!("{}; for metadata of that name use \"{PREFIX}{name}\"", reserved(name)))
        }
        None => Ok(Column::Member(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_parsed_and_errors_name_the_column() {
        let member = |name: &str| Column::Member(name.to_owned());
        assert_eq!(
            columns(&[
                "referenceId",
                "make",
                "metadata.name",
                "metadata",
                "processId",
                "$expectedVersion",
                "$expectedState",
                "expectedVersion",
                "dryRun",
                "metadata.$set",
            ]),
            Ok(vec![
                Column::Text("referenceId"),
                member("make"),
                member("name"),
                Column::Metadata,
                Column::Id("processId"),
                Column::Version,
                Column::Text("$expectedState"),
                member("expectedVersion"),
                member("dryRun"),
                member("$set"),
            ])
        );
        for (header, fault) in [
            (&["leadId", "name", "name"][..], "the column \"name\" occurs twice"),
            (&["leadId", "make", "metadata.make"], "the column \"metadata.make\" occurs twice"),
            (&["lead_id", "name"], "must be written \"leadId\""),
            (&["leadId", "target state"], "must be written \"targetState\""),
            (&["leadId", ""], "has no name"),
            (&["leadId", "$expected_version"], "must be written \"$expectedVersion\""),
            (&["leadId", "$dryRun"], "$dryRun is not available for many updates"),
            (&["leadId", "$set"], "$set is reserved"),
            (&["a", "b"], "must be leadId or referenceId"),
            (&["leadId", "na\u{200b}me"], "U+200B ZERO WIDTH SPACE, column 2"),
            (&[], "must be leadId or referenceId"),
        ] {
            let error = columns(header).unwrap_err();
            assert!(error.contains(fault), "{header:?}: {error}");
        }
    }
}
