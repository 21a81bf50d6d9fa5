//! The program `leadctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    leadctl::main()
}
