//! Checks a file before it is sent: counts its rows and reports those that are invalid.

use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::{
    exit_status::ExitStatus,
    import::rows::{Rows, Source},
    output::{self, escape::escaped},
};

/// Invalid rows that are reported; the rest are counted.
const MAX_ERRORS: usize = 20;

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FileCheck {
    pub(crate) rows: u64,
    invalid: u64,
    by_lead_id: u64,
    by_reference_id: u64,
    /// The columns that become metadata.
    metadata: Vec<String>,
    /// Of a CSV file.
    separator: Option<String>,
    /// What is unusual about the file.
    #[serde(skip)]
    remark: Option<String>,
    errors: Vec<RowError>,
}

#[derive(Debug, Serialize)]
struct RowError {
    row: u64,
    line: u64,
    error: String,
}

impl FileCheck {
    pub(crate) fn run(source: &Source) -> anyhow::Result<Self> {
        let mut rows = Rows::open(source)?;
        let metadata = rows.metadata_columns().into_iter().map(escaped).collect();
        let separator = rows.separator().map(|separator| separator.to_string());
        let mut check = Self { metadata, separator, remark: rows.remark(), ..Self::default() };
        while let Some(row) = rows.next().with_context(|| format!("{}", source.path.display()))? {
            check.rows += 1;
            match row.body {
                Ok(_) if row.lead_id.is_some() => check.by_lead_id += 1,
                Ok(_) => check.by_reference_id += 1,
                Err(fault) => {
                    check.invalid += 1;
                    if check.errors.len() < MAX_ERRORS {
                        check.errors.push(RowError {
                            row: row.number,
                            line: row.line,
                            error: escaped(&fault.to_string()),
                        });
                    }
                }
            }
        }
        Ok(check)
    }

    pub(crate) fn show(&self, json: bool) -> anyhow::Result<ExitCode> {
        let Self { rows, invalid, by_lead_id, by_reference_id, metadata, .. } = self;
        output::show(json, self, |_| {
            output::say(format_args!(
                "{rows} rows: {by_lead_id} by leadId, {by_reference_id} by referenceId, {invalid} invalid"
            ));
            if !metadata.is_empty() {
                output::field("metadata", metadata.join(", "));
            }
            self.remarks().for_each(|remark| output::say(format_args!("  {remark}")));
        })?;
        Ok(if *invalid > 0 { ExitStatus::UpdateFailed.into() } else { ExitCode::SUCCESS })
    }

    /// The file's separator if it is unusual, and the invalid rows.
    pub(crate) fn remarks(&self) -> impl Iterator<Item = String> + '_ {
        let errors = self.errors.iter().map(|RowError { row, error, .. }| format!("row {row}: {error}"));
        let more = self.invalid.saturating_sub(self.errors.len() as u64);
        let more = (more > 0).then(|| format!("and {more} more invalid rows"));
        self.remark.iter().cloned().chain(errors).chain(more)
    }
}
