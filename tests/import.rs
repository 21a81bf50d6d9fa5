//! `leadctl import` sends updates from a file, and writes the outcome of each row to another file.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use contract::{ObjectId, streams::LEAD_EVENTS};
use serde_json::{Value, json};
use tempfile::TempDir;
use test_support::eventually;
use tokio::process::{Child, Command};

use crate::support::{LEDGER_ROWS, Stack, TEST_TIMEOUT, assert_includes, memory_kib, process_id};

/// The command that imports a file.
fn import(stack: &Stack, file: &Path, args: &[&str]) -> Command {
    let mut command = stack.leadctl_command(&["import"]);
    command.arg(file).arg("--json").args(args).kill_on_drop(true);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Imports a file, and returns the exit code and the report.
async fn imported(stack: &Stack, file: &Path, args: &[&str]) -> (Option<i32>, Value) {
    let output = import(stack, file, args).output().await.expect("leadctl");
    println!("{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", file.display()))
}

/// The state file of an import.
fn state(file: &Path) -> Value {
    let text = std::fs::read_to_string(beside(file, ".import.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Starts an import, waits until it has sent this many rows, and returns its process.
async fn import_until_sent(stack: &Stack, file: &Path, args: &[&str], rows: u64) -> Child {
    let child = import(stack, file, args).spawn().expect("leadctl");
    eventually(TEST_TIMEOUT, "the rows are sent", async || {
        let state = state(file);
        if state["sent"].as_u64() >= Some(rows) { Ok(()) } else { Err(state.to_string()) }
    })
    .await;
    child
}

/// The outcomes of a CSV file, as a map of columns per row.
fn outcomes(file: &Path) -> Vec<HashMap<String, String>> {
    let text = std::fs::read_to_string(beside(file, ".outcomes.csv")).expect("the outcomes");
    let mut lines = text.lines();
    let head: Vec<_> = lines.next().expect("a header").split(',').collect();
    // Only the last cell can be quoted.
    let row = |line: &str| {
        let cells = line.splitn(head.len(), ',').map(|cell| cell.trim_matches('"').to_owned());
        head.iter().map(|name| (*name).to_owned()).zip(cells).collect()
    };
    lines.map(row).collect()
}

/// Exit codes of leadctl.
const ERROR: i32 = 1;
const ROWS_FAILED: i32 = 5;
const PENDING: i32 = 7;

/// Writes a file of updates of seven leads that succeed, fail, are rejected or are invalid. Returns the leads, and the
/// status of each row.
async fn mixed_file(stack: &Stack, file: &Path, rows: usize) -> (Vec<String>, Vec<&'static str>) {
    let leads = stack.leads(&[], 7).await;
    let mut text = String::from("leadId,targetState,name,n,metadata.seen\n");
    let mut expected = Vec::new();
    for n in 0..rows {
        let lead = &leads[n % leads.len()];
        let (row, status) = match n {
            _ if n % 101 == 7 => (format!("nonsense,,,{n},yes"), "invalid"),
            _ if n % 97 == 5 => (format!("{lead},nowhere,,{n},yes"), "failed"),
            _ if n % 89 == 3 => (format!("{lead},,{},{n},yes", "x".repeat(1025)), "rejected"),
            _ => (format!("{lead},interested,\"Ada, {n}\",{n},yes"), "succeeded"),
        };
        text.push_str(&format!("{row}\n"));
        expected.push(status);
    }
    std::fs::write(file, text).expect("a file");
    (leads, expected)
}

/// The number of applied updates of a lead.
async fn updates_of(stack: &Stack, lead: &str) -> usize {
    stack.api.lead(lead).await["activities"].as_array().expect("a list").len()
}

#[tokio::test]
async fn invalid_rows_are_reported_by_a_dry_run_and_left_out_by_an_import() {
    let stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    let (leads, expected) = mixed_file(&stack, &file, 400).await;

    let (code, report) = imported(&stack, &file, &["--dry-run"]).await;

    let invalid = expected.iter().filter(|status| **status == "invalid").count();
    assert_eq!(code, Some(ROWS_FAILED));
    assert_includes(&report, json!({"rows": 400, "invalid": invalid, "metadata": ["n", "metadata.seen"]}));
    assert_eq!(report["errors"][0], json!({"row": 8, "line": 9, "error": "leadId: must be 24 hex digits"}));
    assert!(!beside(&file, ".import.json").exists(), "nothing is written");

    // A file of a spreadsheet program with a quote that is never closed.
    let file = dir.path().join("quotes.csv");
    let [one, other] = [&leads[0], &leads[1]];
    let text = format!("sep=;\r\nleadId;note;;\r\n{one} ;row 1\r\n;;;\r\n{other};\"row 2\r\n{one};row 3\r\n");
    std::fs::write(&file, text).expect("a file");
    let (code, report) = imported(&stack, &file, &[]).await;

    assert_eq!(code, Some(ROWS_FAILED));
    assert_includes(&report, json!({"rows": 3, "succeeded": 2, "invalid": 1}));
    let row = &outcomes(&file)[1];
    assert_eq!((row["status"].as_str(), &row["leadId"]), ("invalid", other));
    assert!(row["error"].contains("line 5") && row["error"].contains("never closed"), "{row:?}");
    assert_eq!(updates_of(&stack, other).await, 0);
    assert_includes(&stack.api.lead(one).await, json!({"metadata": {"note": "row 3"}}));
    assert_eq!(updates_of(&stack, one).await, 2);
}

#[tokio::test]
async fn a_file_is_imported_once_through_repeated_kills() {
    const ROWS: usize = 4000;
    // The rate limit slows down the rows after the first 2500, so that the import can be killed while it sends.
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "2500")]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    let (leads, expected) = mixed_file(&stack, &file, ROWS).await;
    let count = |status: &str| expected.iter().filter(|one| **one == status).count();

    // The import is killed while the third chunk is in flight, and again after this chunk was sent a second time.
    for _ in 0..2 {
        import_until_sent(&stack, &file, &["--resume"], 3000).await.kill().await.expect("killed");
    }
    assert!(state(&file)["written"]["succeeded"].as_u64().expect("a number") < 3000);
    assert_eq!(imported(&stack, &file, &[]).await, (Some(ERROR), Value::Null), "without --resume it is refused");
    let (code, report) = imported(&stack, &file, &["--resume"]).await;

    assert_eq!(code, Some(ROWS_FAILED), "{report}");
    for status in ["succeeded", "failed", "rejected", "invalid"] {
        assert_eq!(report[status], json!(count(status)), "{status}: {report}");
    }
    assert_includes(&report, json!({"rows": ROWS, "pending": 0, "unknown": 0}));
    let outcomes = outcomes(&file);
    assert_eq!(outcomes.iter().map(|row| row["status"].as_str()).collect::<Vec<_>>(), expected);
    assert!(outcomes.iter().zip(1..).all(|(row, number)| row["row"] == number.to_string()));
    let invalid = (outcomes[7]["error"].as_str(), outcomes[7]["leadId"].as_str());
    assert_eq!(invalid, ("leadId: must be 24 hex digits", "nonsense"));
    assert_eq!((outcomes[3]["code"].as_str(), outcomes[5]["code"].as_str()), ("invalid_field", "unknown_state"));
    assert!(outcomes[5]["error"].contains("nowhere"), "{:?}", outcomes[5]);
    assert_ledger_has_each_row_once(&stack, &outcomes, &leads, &expected).await;

    // When the import is resumed once more, it sends nothing.
    let (code, again) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!((code, &again["rows"]), (Some(ROWS_FAILED), &json!(ROWS)));
    assert_ledger_has_each_row_once(&stack, &outcomes, &leads, &expected).await;
}

/// Asserts that the ledger has every accepted row once, under the id in its outcome, and that each lead has the values
/// of its last row.
async fn assert_ledger_has_each_row_once(
    stack: &Stack,
    outcomes: &[HashMap<String, String>],
    leads: &[String],
    expected: &[&str],
) {
    let count = |status: &str| expected.iter().filter(|one| **one == status).count() as i64;
    stack.wait_until_applied().await;
    assert_eq!(stack.count(LEDGER_ROWS).await, count("succeeded") + count("failed"));
    let succeeded = "SELECT count(*) FROM lead_state.lead_updates WHERE success";
    assert_eq!(stack.count(succeeded).await, count("succeeded"));
    assert_eq!(stack.count("SELECT sum(version - 1)::bigint FROM lead_state.leads").await, count("succeeded"));
    for row in [0, 1500, 2500, 2999, 3998] {
        let timeline = stack.api.outcome(&outcomes[row]["updateId"]).await;
        assert_eq!(timeline["command"]["metadata"]["n"], json!(row.to_string()), "{timeline}");
        assert_eq!(timeline["status"], outcomes[row]["status"].as_str());
    }
    // The rows are applied in the order of the file.
    let last = expected.iter().rposition(|status| *status == "succeeded").expect("a row");
    let lead = stack.api.lead(&leads[last % leads.len()]).await;
    assert_includes(&lead, json!({"name": format!("Ada, {last}"), "metadata": {"n": last.to_string()}}));
}

/// Writes an NDJSON file of 30 updates by reference: 24 succeed, 3 fail, 3 are rejected. Returns the file and the
/// arguments for its project and process.
async fn ndjson_file(stack: &Stack, dir: &TempDir) -> (PathBuf, [String; 4]) {
    let process_id = process_id(&stack.process_calling(&[]).await);
    stack.api.initiate(process_id, Some("R-1")).await;
    let file = dir.path().join("leads.ndjson");
    let rows = (0..30).map(|n| match n % 10 {
        9 => json!({"referenceId": "R-1", "targetState": "nowhere"}),
        8 => json!({"leadId": ObjectId::from_bytes([1; 12]), "projectId": ObjectId::from_bytes([2; 12]), "n": n}),
        _ => json!({"referenceId": "R-1", "n": n}),
    });
    std::fs::write(&file, rows.map(|row| format!("{row}\n\n")).collect::<String>()).expect("a file");
    let project = stack.api.project_id.to_string();
    (file, ["--project-id".into(), project, "--process-id".into(), process_id.to_string()])
}

#[tokio::test]
async fn rows_without_an_outcome_in_time_are_pending() {
    let mut stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let (file, of_process) = ndjson_file(&stack, &dir).await;
    let of_process = of_process.each_ref().map(String::as_str);
    stack.lead_state.terminate().await;

    let (code, report) = imported(&stack, &file, &[&of_process[..], &["--wait", "1s"]].concat()).await;

    assert_eq!(code, Some(ROWS_FAILED));
    assert_includes(&report, json!({"pending": 27, "rejected": 3}));
}

#[tokio::test]
async fn outcomes_whose_events_were_missed_are_queried() {
    let mut stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let (file, of_process) = ndjson_file(&stack, &dir).await;
    let of_process = of_process.each_ref().map(String::as_str);
    stack.lead_state.terminate().await;
    import_until_sent(&stack, &file, &of_process, 30).await.kill().await.expect("killed");
    stack.lead_state.restart().await;
    stack.wait_until_ready().await;
    stack.wait_until_applied().await;
    let events = stack.js().get_stream(LEAD_EVENTS).await.expect("the events");
    events.purge().await.expect("no events");

    let (code, report) = imported(&stack, &file, &[&of_process[..], &["--resume"]].concat()).await;

    assert_eq!(code, Some(ROWS_FAILED), "{report}");
    assert_includes(&report, json!({"succeeded": 24, "failed": 3, "rejected": 3}));
    assert_eq!(stack.count(LEDGER_ROWS).await, 27);
    let text = std::fs::read_to_string(beside(&file, ".outcomes.ndjson")).expect("the outcomes");
    let last: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    let expected = json!({"row": 30, "status": "failed", "referenceId": "R-1", "code": "unknown_state"});
    assert_includes(&last, expected);
}

/// Writes a file of updates of a new lead, of which every hundredth fails.
async fn file(stack: &Stack, directory: &Path, rows: usize) -> PathBuf {
    let lead = stack.lead(&[]).await;
    let state = |n| if n % 100 == 99 { "nowhere" } else { "interested" };
    let text: String = (0..rows).map(|n| format!("{lead},{},{n}\n", state(n))).collect();
    let file = directory.join("leads.csv");
    std::fs::write(&file, format!("leadId,targetState,n\n{text}")).expect("a file");
    file
}

/// Asserts that every row has its outcome, and that the ledger has the id of each row once.
async fn assert_every_row_has_its_outcome(stack: &Stack, file: &Path, rows: usize) {
    let outcomes = outcomes(file);
    assert_eq!(outcomes.len(), rows);
    for (n, row) in outcomes.iter().enumerate() {
        let expected = if n % 100 == 99 { ("failed", "unknown_state") } else { ("succeeded", "") };
        assert_eq!((row["status"].as_str(), row["code"].as_str()), expected, "{row:?}");
        assert_eq!(row["row"], (n + 1).to_string());
    }
    let mut ids: Vec<_> = outcomes.iter().map(|row| row["updateId"].clone()).collect();
    ids.sort_unstable();
    stack.wait_until_applied().await;
    let applied: Vec<String> =
        sqlx::query_scalar("SELECT encode(update_id, 'hex') FROM lead_state.lead_updates ORDER BY update_id")
            .fetch_all(&stack.pool)
            .await
            .expect("the ledger");
    assert_eq!(ids, applied);
}

#[tokio::test]
async fn an_interrupted_import_resumes_and_sends_no_row_twice() {
    const ROWS: usize = 3000;
    // The rate limit slows down the rows after the first 1500, so that the import can be interrupted while it sends.
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "1500")]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = file(&stack, dir.path(), ROWS).await;
    let child = import_until_sent(&stack, &file, &[], 2000).await;

    let pid = child.id().expect("a pid").to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().await.expect("kill").success());
    let output = tokio::time::timeout(TEST_TIMEOUT, child.wait_with_output()).await.expect("in time").expect("leadctl");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{printed}");
    assert!(printed.contains("--resume to continue"), "{printed}");
    assert!(outcomes(&file).len() < ROWS);

    let (code, report) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!(code, Some(ROWS_FAILED));
    assert_includes(&report, json!({"succeeded": 2970, "failed": 30}));
    assert_every_row_has_its_outcome(&stack, &file, ROWS).await;
}

#[tokio::test]
async fn an_import_without_waiting_gets_its_outcomes_when_it_is_resumed() {
    const ROWS: usize = 1100;
    let stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = file(&stack, dir.path(), ROWS).await;

    let (code, report) = imported(&stack, &file, &["--wait", "0s"]).await;
    assert_eq!((code, &report["pending"]), (Some(PENDING), &json!(ROWS)), "{report}");
    let pending = outcomes(&file);
    assert!(pending.iter().all(|row| row["status"] == "pending" && row["updateId"].len() == 24));
    // When the import is resumed without waiting, the outcomes do not change.
    let (code, report) = imported(&stack, &file, &["--resume", "--wait", "0s"]).await;
    assert_eq!((code, &report["pending"]), (Some(PENDING), &json!(ROWS)), "{report}");
    assert_eq!(outcomes(&file), pending);
    // All events have been published when the import is resumed with waiting.
    stack.wait_until_applied().await;
    let (code, report) = imported(&stack, &file, &["--resume"]).await;

    assert_eq!(code, Some(ROWS_FAILED));
    assert_includes(&report, json!({"rows": ROWS, "succeeded": 1089, "failed": 11}));
    assert_every_row_has_its_outcome(&stack, &file, ROWS).await;
    assert!(outcomes(&file).iter().zip(&pending).all(|(row, before)| row["updateId"] == before["updateId"]));
}

#[tokio::test]
async fn an_import_retries_while_the_gateway_is_away_and_stops_when_it_is_refused() {
    let mut stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    std::fs::write(&file, format!("leadId,n\n{lead},1\n{lead},2\n")).expect("a file");

    let mut stranger = import(&stack, &file, &[]);
    let refused = stranger.env("LEADRELAY_API_KEY", "lr_invalid").output().await.expect("leadctl");
    assert_eq!(refused.status.code(), Some(ERROR), "{refused:?}");

    stack.gateway.terminate().await;
    let child = import(&stack, &file, &["--resume"]).spawn().expect("leadctl");
    stack.gateway.restart().await;
    let output = tokio::time::timeout(TEST_TIMEOUT * 2, child.wait_with_output()).await.expect("in time");
    assert_eq!(output.expect("leadctl").status.code(), Some(0));

    // The same file is imported again with `--again`, or after the files of the first import were removed.
    let refused = import(&stack, &file, &[]).output().await.expect("leadctl");
    let printed = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(ERROR), "{printed}");
    assert!(printed.contains("complete: 2 succeeded") && printed.contains("--again"), "{printed}");
    let (code, report) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!((code, &report["succeeded"]), (Some(0), &json!(2)), "nothing is sent");
    for updates in [4, 6] {
        let (code, report) = imported(&stack, &file, if updates == 4 { &["--again"] } else { &[] }).await;
        assert_eq!((code, &report["succeeded"]), (Some(0), &json!(2)), "{report}");
        assert_eq!(updates_of(&stack, &lead).await, updates);
        for suffix in [".outcomes.csv", ".import.json"] {
            std::fs::remove_file(beside(&file, suffix)).expect("removed");
        }
    }

    std::fs::write(&file, format!("lead_id,n\n{lead},1\n")).expect("a file");
    let output = import(&stack, &file, &["--dry-run"]).output().await.expect("leadctl");
    assert_eq!(output.status.code(), Some(ERROR));
    assert!(String::from_utf8_lossy(&output.stderr).contains("must be written \"leadId\""), "{output:?}");
}

/// `just import`: measures the time and memory that leadctl takes.
#[tokio::test]
#[ignore = "takes minutes: just import"]
async fn a_hundred_thousand_rows_in_bounded_memory() {
    let rows: usize = std::env::var("IMPORT_ROWS").map_or(100_000, |text| text.parse().expect("a number"));
    let stack = Stack::start().await;
    let leads = stack.leads(&[], 1000).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    let mut text = String::from("leadId,targetState,disposition,make,model,note\n");
    for n in 0..rows {
        let state = if n % 100 == 99 { "nowhere" } else { "interested" };
        let lead = &leads[n % leads.len()];
        text.push_str(&format!("{lead},{state},callback,Toyota,Camry,\"row {n}, {}\"\n", "x".repeat(100)));
    }
    std::fs::write(&file, &text).expect("a file");
    let begun = Instant::now();
    let child = import(&stack, &file, &[]).spawn().expect("leadctl");
    let pid = child.id().expect("a pid");
    let mut peak = 0;
    let mut ended = std::pin::pin!(child.wait_with_output());
    let output = loop {
        tokio::select! {
            output = &mut ended => break output.expect("leadctl"),
            // The kernel discards the peak when the process ends.
            () = tokio::time::sleep(Duration::from_millis(20)) => {
                peak = peak.max(memory_kib(pid, "VmHWM").unwrap_or_default());
            }
        }
    };
    let took = begun.elapsed();
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    println!(
        "{rows} rows, {} MiB: {:.1} s, {:.0} a second, {:.1} MiB at most in leadctl: {report}",
        text.len() >> 20,
        took.as_secs_f64(),
        rows as f64 / took.as_secs_f64(),
        peak as f64 / 1024.0
    );
    assert_eq!(output.status.code(), Some(ROWS_FAILED), "{report}");
    assert_eq!((&report["succeeded"], &report["failed"]), (&json!(rows - rows / 100), &json!(rows / 100)), "{report}");
    assert_eq!(outcomes(&file).len(), rows);
    assert_eq!(stack.count(LEDGER_ROWS).await, rows as i64);
    assert!(peak < 64 * 1024, "{peak} KiB");
}
