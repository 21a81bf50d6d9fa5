//! `leadctl` as a program: what its output and its arguments do to its exit code.

use std::{fs::File, io::pipe, process::Stdio};

use test_support::binary;
use tokio::process::Command;

use crate::support::LeadctlRun;

/// Exit codes of leadctl.
const ERROR: i32 = 1;
const INVALID: i32 = 2;
const UNAVAILABLE: i32 = 4;
const OUTPUT_CLOSED: i32 = 141;

/// Runs a command that prints several lines, with this standard output.
async fn print_to(output: impl Into<Stdio>) -> LeadctlRun {
    let mut command = Command::new(binary("leadctl"));
    command.args(["completions", "bash"]).stdout(output).stderr(Stdio::piped());
    let output = command.spawn().expect("leadctl").wait_with_output().await.expect("an end");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    LeadctlRun { code: output.status.code().expect("a code"), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[tokio::test]
async fn output_that_cannot_be_written_is_no_success() {
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    print_to(full).await.assert_code(ERROR).assert_prints(&["cannot write to standard output"]);

    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let run = print_to(writer).await.assert_code(OUTPUT_CLOSED);
    assert_eq!(run.stderr, "", "a reader that has seen enough is usual");
}

#[tokio::test]
async fn an_argument_that_requires_a_secret_accepts_one_from_a_file() {
    const ID: &str = "6b0426971c73026dafa27e40";
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "secret\n").expect("a file");
    let with_file = |variable: &str| {
        let mut command = Command::new(binary("leadctl"));
        command.args(["console", "portal-link", "--project", ID, "--process", ID, "--may-act"]);
        command.args(["--nats-url", "nats://127.0.0.1:1"]).env(variable, file.path());
        LeadctlRun::of(command)
    };

    let (with_key, without_key) = tokio::join!(with_file("LEADRELAY_API_KEY_FILE"), with_file("NATS_PASSWORD_FILE"));

    with_key.assert_code(UNAVAILABLE).assert_prints(&["cannot connect to NATS"]);
    without_key.assert_code(INVALID).assert_prints(&["--api-key"]);
}

#[tokio::test]
async fn an_invalid_url_of_the_gateway_is_no_reason_to_retry() {
    for arguments in [&["update", "get", "6b0426971c73026dafa27e40"][..], &["listen", "--to", "http://127.0.0.1:1"]] {
        let mut command = Command::new(binary("leadctl"));
        command.args(arguments).args(["--gateway-url", "no URL", "--api-key", "key"]);
        LeadctlRun::of(command).await.assert_code(ERROR);
    }
}
