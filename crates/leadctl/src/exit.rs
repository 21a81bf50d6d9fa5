//! What leadctl exits with, for scripts.
//!
//! | code | |
//! |---|---|
//! | 0 | done |
//! | 1 | not done; standard error says why |
//! | 2 | the command line is wrong |
//! | 3 | there is no such thing |
//! | 4 | whoever knows the answer cannot be asked; it may go well later |
//! | 5 | `update watch`: the update failed |
//! | 6 | `update watch`: a callback was not told, and will not be |
//! | 7 | `update watch`: time ran out |
//! | 8 | `doctor`: something is wrong |
//! | 9 | `doctor`: nothing is wrong, but something should be looked at |

use std::process::ExitCode;

use contract::rpc::RpcError;

/// What an `update watch` came to, where it did not go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watched {
    Failed,
    NotTold,
    TimedOut,
}

impl From<Watched> for ExitCode {
    fn from(watched: Watched) -> Self {
        Self::from(match watched {
            Watched::Failed => 5,
            Watched::NotTold => 6,
            Watched::TimedOut => 7,
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
}
