//! Runs every example of the documentation against a running system.
//!
//! The conventions for examples in README.md, docs/guide/ and docs/operations/:
//!
//! - A ```` ```sh ```` block whose first word is `curl` or `leadctl` is an example. The test runs it with `bash -euo
//!   pipefail`, and it must exit with 0. `curl` fails on every status of 400 and above (`--fail-with-body`).
//! - Blocks of one file run from top to bottom in one directory, each in a separate shell, on one system per file.
//! - A block that shows a rejected request is fenced as ```` ```sh refused ````. It must exit with another code than 0.
//! - A block that cannot be run here is fenced as ```` ```sh not-run ````.
//! - The environment has what `leadctl up --demo` writes to `stack.env`: `LEADRELAY_GATEWAY_URL`, `LEADRELAY_API_KEY`,
//!   `LEADRELAY_PROJECT_ID`, `LEADRELAY_PROCESS_ID`, `LEADRELAY_LEAD_ID`, `LEADRELAY_REFERENCE_ID`, `NATS_URL`,
//!   `DATABASE_URL`.
//!   Beyond that `LEADRELAY_UPDATE_ID` (a delivered update of the lead), `LEADRELAY_DELIVERY_ID` (its delivery),
//!   `LEADRELAY_CALLBACK_ID` and `LEADRELAY_RECEIVER_URL` (a URL that answers 200).
//! - The process has the states `new`, `interested`, `followup_2` and `lost` (terminal); the lead is in `new`.

use std::path::{Path, PathBuf};

use serde_json::json;
use test_support::binary;
use tokio::process::Command;

use crate::support::{Stack, TEST_TIMEOUT, process_id};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A fenced block that the test runs.
struct Example {
    line: usize,
    script: String,
    refused: bool,
}

/// The examples of a Markdown file, in order.
fn examples(markdown: &str) -> Vec<Example> {
    let mut examples = Vec::new();
    let mut lines = markdown.lines().zip(1..);
    while let Some((fence, line)) = lines.next() {
        // A block may be part of a list.
        let Some(info) = fence.trim_start().strip_prefix("```sh") else { continue };
        let indent = fence.len() - fence.trim_start().len();
        let block = lines.by_ref().take_while(|(line, _)| line.trim() != "```");
        let script: String = block.map(|(line, _)| format!("{}\n", line.get(indent..).unwrap_or_default())).collect();
        let is_example = ["curl", "leadctl"].contains(&script.split_whitespace().next().unwrap_or_default());
        match info.trim() {
            "" | "refused" if !is_example => {}
            "not-run" => {}
            "" | "refused" => examples.push(Example { line, script, refused: info.trim() == "refused" }),
            other => panic!("line {line}: a block of sh may be `refused` or `not-run`, not {other:?}"),
        }
    }
    examples
}

/// The files whose examples are run.
fn files() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let mut files = vec![root.join("README.md")];
    for directory in ["docs/guide", "docs/operations"] {
        let entries = std::fs::read_dir(root.join(directory)).expect("a directory");
        files.extend(entries.map(|entry| entry.expect("an entry").path()));
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    files
}

/// A running system, and the environment of examples on it.
async fn start() -> (Stack, Vec<(&'static str, String)>) {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let lead = stack.api.initiate(process_id(&applied), Some("AB123456789")).await;
    let update = stack.api.update(json!({"leadId": lead, "metadata": {"make": "Toyota"}})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;
    let callback = applied.process.callbacks[0].callback_id;
    let environment = vec![
        ("LEADRELAY_GATEWAY_URL", stack.api.url.clone()),
        ("LEADRELAY_API_KEY", stack.api.key.clone()),
        ("LEADRELAY_PROJECT_ID", stack.api.project_id.to_string()),
        ("LEADRELAY_PROCESS_ID", process_id(&applied).to_string()),
        ("LEADRELAY_LEAD_ID", lead),
        ("LEADRELAY_REFERENCE_ID", "AB123456789".to_owned()),
        ("LEADRELAY_DELIVERY_ID", format!("{update}-{callback}")),
        ("LEADRELAY_UPDATE_ID", update),
        ("LEADRELAY_CALLBACK_ID", callback.to_string()),
        ("LEADRELAY_RECEIVER_URL", stack.receiver.url("/example")),
        ("NATS_URL", stack.nats.url()),
        ("DATABASE_URL", stack.postgres.url()),
    ];
    (stack, environment)
}

#[tokio::test]
async fn every_example_in_the_documentation_works() {
    let mut run = 0;
    let mut failures = Vec::new();
    for file in files() {
        let examples = examples(&std::fs::read_to_string(&file).expect("a file"));
        if examples.is_empty() {
            continue;
        }
        let (_stack, environment) = start().await;
        let directory = tempfile::tempdir().expect("a directory");
        let leadctl = binary("leadctl");
        for Example { line, script, refused } in examples {
            let prelude = format!(
                "curl() {{ command curl --silent --show-error --fail-with-body --max-time 20 \"$@\"; }}\n\
                 leadctl() {{ {} \"$@\"; }}\n",
                leadctl.display()
            );
            let mut command = Command::new("bash");
            command.args(["-euo", "pipefail", "-c", &format!("{prelude}{script}")]).current_dir(directory.path());
            let output = command.envs(environment.iter().cloned()).output().await.expect("bash");
            run += 1;
            if output.status.success() == refused {
                let printed = [output.stdout, output.stderr].concat();
                let printed = String::from_utf8_lossy(&printed).into_owned();
                failures.push(format!("{}:{line}: {}\n{script}{printed}", file.display(), output.status));
            }
        }
    }
    assert!(failures.is_empty(), "{} of {run} examples fail:\n{}", failures.len(), failures.join("\n"));
    assert!(run >= 10, "only {run} examples were found");
}

#[test]
fn a_block_is_an_example_by_its_first_word_and_fence() {
    let markdown = "```sh\ncurl x\n```\n```sh\ncargo run\n```\n- a\n  ```sh refused\n  curl y \\\n    -z\n  ```\n```json\ncurl\n```\n\
                    ```sh not-run\nleadctl up\n```\n";

    let found = examples(markdown);

    let found: Vec<_> = found.iter().map(|example| (example.line, example.script.as_str(), example.refused)).collect();
    assert_eq!(found, [(1, "curl x\n", false), (8, "curl y \\\n  -z\n", true)]);
}
