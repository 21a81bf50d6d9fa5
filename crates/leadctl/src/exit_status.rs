//! Exit codes for scripts. [`TABLE`] is printed by `leadctl --help`; docs/operations/leadctl.md has the same table.

use std::process::ExitCode;

use contract::rpc::RpcError;
use service_kit::postgres::error::is_unavailable;

pub(crate) const TABLE: &str = "\
Exit codes:
  0    success
  1    failure; standard error has the reason
  2    invalid command line; audit: the audit could not run
  3    not found
  4    unavailable, or too many requests; retry later
  5    update send, update watch: the update failed, or would fail; import: a row did not succeed, or is invalid
  6    update watch: a delivery is exhausted and will not be retried
  7    update send, update watch, import: an outcome is still pending after the timeout
  8    doctor: at least one check failed
  9    doctor: no check failed, but at least one warning
  130  import: stopped by Ctrl-C; continue with --resume";

/// A result that is neither success nor an error of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    UpdateFailed = 5,
    DeliveryExhausted = 6,
    TimedOut = 7,
    CheckFailed = 8,
    CheckWarning = 9,
    Interrupted = 130,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// The exit code of an error.
pub(crate) fn error_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<RpcError>().map(|error| error.status) {
        Some(404) => 3,
        Some(429 | 503) => 4,
        // The gateway or Postgres was not reached, or the connection broke.
        None if error.is::<reqwest::Error>() => 4,
        None if error.downcast_ref::<sqlx::Error>().is_some_and(is_unavailable) => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_found_and_unavailable_have_their_own_codes() {
        let error = |status| crate::clients::admin::explain(RpcError::received(status, "c", "m"));
        assert_eq!([400, 404, 409, 429, 503].map(|status| error_code(&error(status))), [1, 3, 1, 4, 4]);
        assert_eq!(error_code(&anyhow::anyhow!("x")), 1);
        let refused = sqlx::Error::Io(std::io::ErrorKind::ConnectionRefused.into());
        assert_eq!(error_code(&anyhow::Error::from(refused).context("cannot connect to Postgres")), 4);
    }

    #[test]
    fn the_documentation_has_the_same_codes() {
        let documented = include_str!("../../../docs/operations/leadctl.md");
        for line in TABLE.lines().skip(1) {
            let (code, meaning) = line.trim().split_once(' ').unwrap();
            let row = format!("| {code} | {} |", meaning.trim());
            assert!(documented.contains(&row), "{row}");
        }
    }
}
