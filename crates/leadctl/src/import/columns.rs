//! The meaning of the columns of a CSV file, by its header.

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Column {
    /// An id field.
    Id(&'static str),
    /// A text field.
    Text(&'static str),
    /// `expectedVersion`.
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
        ("expectedState", Column::Text("expectedState")),
        ("expectedVersion", Column::Version),
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
    // A misspelt field must not become metadata silently.
    let plain = |name: &str| name.to_lowercase().replace(['_', '-', ' '], "");
    let meant = KNOWN.iter().map(|(known, _)| *known).chain(["metadata"]).find(|known| plain(known) == plain(name));
    match meant {
        Some(meant) => {
            Err(format!("{name:?} must be written {meant:?}; for metadata of that name use \"{PREFIX}{name}\""))
        }
        None if name == "dryRun" => {
            Err("\"dryRun\" is not available in imports; use leadctl update send --dry-run".to_owned())
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
            columns(&["referenceId", "make", "metadata.name", "metadata", "processId"]),
            Ok(vec![
                Column::Text("referenceId"),
                member("make"),
                member("name"),
                Column::Metadata,
                Column::Id("processId")
            ])
        );
        for (header, fault) in [
            (&["leadId", "name", "name"][..], "the column \"name\" occurs twice"),
            (&["leadId", "make", "metadata.make"], "the column \"metadata.make\" occurs twice"),
            (&["lead_id", "name"], "must be written \"leadId\""),
            (&["leadId", "target state"], "must be written \"targetState\""),
            (&["leadId", ""], "has no name"),
            (&["leadId", "dryRun"], "not available in imports"),
            (&["a", "b"], "must be leadId or referenceId"),
            (&[], "must be leadId or referenceId"),
        ] {
            let error = columns(header).unwrap_err();
            assert!(error.contains(fault), "{header:?}: {error}");
        }
    }
}
