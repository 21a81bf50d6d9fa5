//! Exit codes for scripts. [`TABLE`] is printed by `leadctl --help`; docs/operations/leadctl.md has the same table.

use std::{io, process::ExitCode};

use contract::rpc::RpcError;
use service_kit::postgres;

pub(crate) const TABLE: &str = "\
Exit codes:
  0    success
  1    failure; standard error has the reason
  2    invalid command line; audit: the audit could not run
  3    not found
  4    unavailable, or too many requests; retry later
  5    update send and watch, call start and end, lead erase: it failed, or would; import: a row did not succeed
  6    update watch: a delivery is exhausted and will not be retried
  7    update send and watch, call start and end, lead erase, import: an outcome or delivery is pending at the timeout
  8    doctor: at least one check failed
  9    doctor: no check failed, but at least one warning
  130  import: stopped by Ctrl-C; continue with --resume
  141  the reader of standard output has ended";

/// A result that is neither success nor an error of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    UpdateFailed = 5,
    DeliveryExhausted = 6,
    TimedOut = 7,
    CheckFailed = 8,
    CheckWarning = 9,
    Interrupted = 130,
    /// As if SIGPIPE had ended the program: a pipeline cannot take it for a success.
    OutputClosed = 141,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// The exit code of an error.
pub(crate) fn error_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<RpcError>() {
        Some(RpcError { status: 404, .. }) => 3,
        _ if is_unavailable(error) => 4,
        _ => 1,
    }
}

/// Whether the same command may succeed later: a service was not reached, the connection broke, or it was refused for
/// now.
pub(crate) fn is_unavailable(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<RpcError>() {
        Some(error) => matches!(error.status, 429 | 503),
        // An invalid URL stays invalid.
        None if error.downcast_ref::<reqwest::Error>().is_some_and(|error| !error.is_builder()) => true,
        None => error.downcast_ref::<sqlx::Error>().is_some_and(postgres::error::is_unavailable),
    }
}

/// The exit code when standard output cannot be written.
pub(crate) fn output_error_code(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::BrokenPipe => ExitStatus::OutputClosed as u8,
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
        let client = reqwest::Client::builder().tls_backend_preconfigured(service_kit::tls::client().unwrap());
        let invalid = client.build().unwrap().get("no URL").build().unwrap_err();
        assert_eq!(error_code(&anyhow::Error::from(invalid).context("the gateway does not answer")), 1);
    }

    #[test]
    fn a_closed_pipe_has_its_own_code() {
        assert_eq!(output_error_code(&io::ErrorKind::BrokenPipe.into()), 141);
        assert_eq!(output_error_code(&io::ErrorKind::StorageFull.into()), 1);
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
