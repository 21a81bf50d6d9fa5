//! Checks a file before it is sent: counts its rows and reports those that are invalid.

use std::{path::Path, process::ExitCode};

use anyhow::Context;
use serde::Serialize;

use crate::{
    exit_status::ExitStatus,
    import::rows::{Format, LeadScope, Rows},
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
    errors: Vec<RowError>,
}

#[derive(Debug, Serialize)]
struct RowError {
    row: u64,
    error: String,
}

impl FileCheck {
    pub(crate) fn run(path: &Path, format: Format, scope: LeadScope) -> anyhow::Result<Self> {
        let mut rows = Rows::open(path, format, scope)?;
        let metadata = rows.metadata_columns().into_iter().map(escaped).collect();
        let mut check = Self { metadata, ..Self::default() };
        while let Some(row) = rows.next().with_context(|| format!("{}", path.display()))? {
            check.rows += 1;
            match row.body {
                Ok(_) if row.lead_id.is_some() => check.by_lead_id += 1,
                Ok(_) => check.by_reference_id += 1,
                Err(fault) => {
                    check.invalid += 1;
                    if check.errors.len() < MAX_ERRORS {
                        check.errors.push(RowError { row: row.number, error: escaped(&fault.to_string()) });
                    }
                }
            }
        }
        Ok(check)
    }

    pub(crate) fn show(&self, json: bool) -> anyhow::Result<ExitCode> {
        let Self { rows, invalid, by_lead_id, by_reference_id, metadata, errors } = self;
        output::show(json, self, |_| {
            output::say(format_args!(
                "{rows} rows: {by_lead_id} by leadId, {by_reference_id} by referenceId, {invalid} invalid"
            ));
            if !metadata.is_empty() {
                output::field("metadata", metadata.join(", "));
            }
            for RowError { row, error } in errors {
                output::field(&format!("row {row}"), error);
            }
            if let Some(more) = invalid.checked_sub(errors.len() as u64).filter(|more| *more > 0) {
                output::say(format_args!("  and {more} more"));
            }
        })?;
        Ok(if *invalid > 0 { ExitStatus::UpdateFailed.into() } else { ExitCode::SUCCESS })
    }
}
