//! What leadctl exits with, for scripts. [`TABLE`] is its own help, and docs/operations/leadctl.md's.

use std::process::ExitCode;

use contract::rpc::RpcError;

/// The codes, as `leadctl --help` shows them.
pub(crate) const TABLE: &str = "\
Exit codes:
  0    done
  1    not done; standard error says why
  2    the command line is wrong; audit: it could not look
  3    there is no such thing
  4    whoever knows the answer cannot be asked; it may go well later
  5    update send, update watch: the update failed, or would; import: a row did not succeed, or is invalid
  6    update watch: a callback was not told, and will not be
  7    update send, update watch, import: an outcome did not come in time
  8    doctor: something is wrong
  9    doctor: nothing is wrong, but something should be looked at
  130  import: Ctrl-C stopped it; --resume goes on";

/// What updates came to, where that was waited for and it did not go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Came {
    Failed,
    NotTold,
    TimedOut,
    Interrupted,
}

impl From<Came> for ExitCode {
    fn from(came: Came) -> Self {
        Self::from(match came {
            Came::Failed => 5,
            Came::NotTold => 6,
            Came::TimedOut => 7,
            Came::Interrupted => 130,
        })
    }
}

/// What `doctor` came to, where not all is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Examined {
    Wrong,
    Doubtful,
}

impl From<Examined> for ExitCode {
    fn from(examined: Examined) -> Self {
        Self::from(match examined {
            Examined::Wrong => 8,
            Examined::Doubtful => 9,
        })
    }
}

/// The code of an error.
pub fn code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<RpcError>().map(|refused| refused.status) {
        Some(404) => 3,
        Some(503) => 4,
        // The gateway was not reached, or broke off.
        None if error.is::<reqwest::Error>() => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_errors_exit_with() {
        let refused = |status| crate::admin::explain(RpcError::new(status, "c", "m"));
        assert_eq!([400, 404, 409, 503].map(|status| code(&refused(status))), [1, 3, 1, 4]);
        assert_eq!(code(&anyhow::anyhow!("x")), 1);
    }

    #[test]
    fn the_documentation_has_the_same_codes() {
        let documented = include_str!("../../../docs/operations/leadctl.md");
        for line in TABLE.lines().skip(1) {
            let (code, what) = line.trim().split_once(' ').unwrap();
            let row = format!("| {code} | {} |", what.trim());
            assert!(documented.contains(&row), "{row}");
        }
    }
}
