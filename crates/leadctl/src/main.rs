//! The program `leadctl`.

use std::process::ExitCode;

use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    match leadctl::run(leadctl::Cli::parse()).await {
        Ok(code) => code,
        Err(e) => {
            eprintln!("leadctl: {e:#}");
            leadctl::error_code(&e).into()
        }
    }
}
