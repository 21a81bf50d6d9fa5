//! What the columns of a CSV file are, by its header.

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Column {
    /// A field that is an id.
    Id(&'static str),
    /// A field that is a text.
    Text(&'static str),
    /// `expectedVersion`.
    Version,
    /// Metadata, as a JSON object.
    Metadata,
    /// A member of the metadata, as a text.
    Member(String),
}

/// Begins the name of a column that is a member of the metadata, whatever the rest of it is.
const PREFIX: &str = "metadata.";

/// The columns under this header, or what is wrong with it.
pub(crate) fn columns(header: &[&str]) -> Result<Vec<Column>, String> {
    let columns = header.iter().map(|name| column(name)).collect::<Result<Vec<_>, _>>()?;
    for (n, column) in columns.iter().enumerate() {
        if columns[..n].contains(column) {
            return Err(format!("the column {:?} stands twice", header[n]));
        }
    }
    if !columns.iter().any(|column| matches!(column, Column::Id("leadId") | Column::Text("referenceId"))) {
        return Err("it has neither a column leadId nor referenceId; the first line names the columns".to_owned());
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
    // A field that is misspelt must not become metadata in silence.
    let plain = |name: &str| name.to_lowercase().replace(['_', '-', ' '], "");
    let meant = KNOWN.iter().map(|(known, _)| *known).chain(["metadata"]).find(|known| plain(known) == plain(name));
    match meant {
        Some(meant) => Err(format!("{name:?} must be written {meant:?}; metadata of that name is \"{PREFIX}{name}\"")),
        None if name == "dryRun" => Err("\"dryRun\" is for single updates".to_owned()),
        None => Ok(Column::Member(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_are_right_and_that_are_not() {
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
            (&["leadId", "name", "name"][..], "the column \"name\" stands twice"),
            (&["leadId", "make", "metadata.make"], "the column \"metadata.make\" stands twice"),
            (&["lead_id", "name"], "must be written \"leadId\""),
            (&["leadId", "target state"], "must be written \"targetState\""),
            (&["leadId", ""], "has no name"),
            (&["leadId", "dryRun"], "single updates"),
            (&["a", "b"], "neither a column leadId nor referenceId"),
            (&[], "neither a column leadId nor referenceId"),
        ] {
            let told = columns(header).unwrap_err();
            assert!(told.contains(fault), "{header:?}: {told}");
        }
    }
}
