//! The program `leadctl`.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    leadctl::main().await
}
