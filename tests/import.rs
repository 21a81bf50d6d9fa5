//! `leadctl import`: updates from a file, with what became of each row written beside it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use contract::ObjectId;
use serde_json::{Value, json};
use test_support::{binary, eventually};
use tokio::process::{Child, Command};

use crate::{
    guard::memory,
    stack::{SOON, Stack},
};

/// An import of a file, as a process.
fn import(stack: &Stack, file: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary("leadctl"));
    command.env("LEADRELAY_GATEWAY_URL", &stack.api.url).env("LEADRELAY_API_KEY", &stack.api.key);
    command.arg("import").arg(file).arg("--json").args(args).kill_on_drop(true);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs one to its end; its code, and what it says.
async fn imported(stack: &Stack, file: &Path, args: &[&str]) -> (Option<i32>, Value) {
    let output = import(stack, file, args).output().await.expect("leadctl");
    println!("{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", file.display()))
}

/// How far an import is, as it noted.
fn state(file: &Path) -> Value {
    let text = std::fs::read_to_string(beside(file, ".import.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

async fn kill(mut child: Child) {
    child.kill().await.expect("killed");
}

/// The outcomes of a CSV file: a map by column per row.
fn outcomes(file: &Path) -> Vec<HashMap<String, String>> {
    let text = std::fs::read_to_string(beside(file, ".outcomes.csv")).expect("the outcomes");
    let mut lines = text.lines();
    let head: Vec<_> = lines.next().expect("a header").split(',').collect();
    // What is quoted is only ever the last cell.
    let row = |line: &str| {
        let cells = line.splitn(head.len(), ',').map(|cell| cell.trim_matches('"').to_owned());
        head.iter().map(|name| (*name).to_owned()).zip(cells).collect()
    };
    lines.map(row).collect()
}

#[tokio::test]
async fn a_file_is_imported_once_though_it_is_killed_in_between() {
    const ROWS: usize = 4000;
    // All but the first 2500 are slowed down, so that there is an in-between.
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "2500")]).await;
    let process_id = stack.process(json!([])).await.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for _ in 0..7 {
        leads.push(stack.api.initiate(process_id, None).await);
    }
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    let mut text = String::from("leadId,targetState,name,n,metadata.seen\n");
    let mut expected = Vec::new();
    for n in 0..ROWS {
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
    std::fs::write(&file, text).expect("a file");
    let count = |status: &str| expected.iter().filter(|one| **one == status).count();

    let (code, told) = imported(&stack, &file, &["--dry-run"]).await;
    assert_eq!((code, &told["rows"], &told["invalid"]), (Some(5), &json!(ROWS), &json!(count("invalid"))), "{told}");
    assert_eq!(told["metadata"], json!(["n", "metadata.seen"]));
    assert_eq!(told["errors"][0], json!({"row": 8, "error": "leadId: must be 24 hex digits"}));
    assert!(!beside(&file, ".import.json").exists(), "nothing is written");

    // Killed while the third chunk is under way, and once more when it was sent again.
    for _ in 0..2 {
        let child = import(&stack, &file, &["--resume"]).spawn().expect("leadctl");
        eventually(SOON, "the third chunk is sent", async || {
            let state = state(&file);
            let sent = state["sent"].as_u64().unwrap_or_default();
            if sent >= 3000 { Ok(()) } else { Err(state.to_string()) }
        })
        .await;
        kill(child).await;
    }
    assert!(state(&file)["written"]["succeeded"].as_u64().expect("a number") < 3000);
    let (code, told) = imported(&stack, &file, &[]).await;
    assert_eq!((code, told), (Some(1), Value::Null), "it is said that it was begun");
    let (code, told) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!(code, Some(5), "{told}");
    for status in ["succeeded", "failed", "rejected", "invalid"] {
        assert_eq!(told[status], json!(count(status)), "{status}: {told}");
    }
    assert_eq!((&told["rows"], &told["pending"], &told["unknown"]), (&json!(ROWS), &json!(0), &json!(0)));

    let outcomes = outcomes(&file);
    let statuses: Vec<_> = outcomes.iter().map(|row| row["status"].as_str()).collect();
    assert_eq!(statuses, expected);
    assert!(outcomes.iter().zip(1..).all(|(row, number)| row["row"] == number.to_string()));
    assert_eq!(
        (outcomes[7]["error"].as_str(), outcomes[7]["leadId"].as_str()),
        ("leadId: must be 24 hex digits", "nonsense")
    );
    assert_eq!(outcomes[3]["code"], "invalid_field");
    assert!(outcomes[5]["error"].contains("nowhere"), "{:?}", outcomes[5]);
    assert_eq!(outcomes[5]["code"], "unknown_state");

    // The ledger has each of them once, under the id that its row says.
    let accepted = (count("succeeded") + count("failed")) as i64;
    stack.wait_until_applied().await;
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, accepted);
    assert_eq!(
        stack.count("SELECT count(*) FROM lead_state.lead_updates WHERE success").await,
        count("succeeded") as i64
    );
    assert_eq!(stack.count("SELECT sum(version - 1)::bigint FROM lead_state.leads").await, count("succeeded") as i64);
    for row in [0, 1500, 2500, 2999, 3998] {
        let (_, story) = stack.api.get(&format!("/api/v1/updates/{}", outcomes[row]["updateId"])).await;
        assert_eq!(story["data"]["command"]["metadata"]["n"], json!(row.to_string()), "{story}");
        assert_eq!(story["data"]["status"], outcomes[row]["status"].as_str());
    }
    // In the file's order: the last one that succeeded is what its lead is.
    let last = (0..ROWS).rev().find(|n| expected[*n] == "succeeded").expect("one");
    let (_, lead) = stack.api.get(&format!("/api/v1/leads/get?leadId={}", leads[last % leads.len()])).await;
    assert_eq!(lead["data"]["metadata"]["n"], json!(last.to_string()));
    assert_eq!(lead["data"]["name"], json!(format!("Ada, {last}")));

    // Once more is none.
    let (code, again) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!((code, &again["rows"]), (Some(5), &json!(ROWS)));
    assert_eq!(stack.wait_until_applied().await, stack.wait_until_applied().await);
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, accepted);
}

#[tokio::test]
async fn outcomes_that_were_missed_are_asked_for() {
    let mut stack = Stack::start().await;
    let process_id = stack.process(json!([])).await.process.process_id.expect("an id");
    stack.api.initiate(process_id, Some("R-1")).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.ndjson");
    let rows = (0..30).map(|n| match n % 10 {
        9 => json!({"referenceId": "R-1", "targetState": "nowhere"}),
        8 => json!({"referenceId": 7}),
        _ => json!({"referenceId": "R-1", "n": n}),
    });
    std::fs::write(&file, rows.map(|row| format!("{row}\n\n")).collect::<String>()).expect("a file");
    let (project, process) = (stack.api.project_id.to_string(), process_id.to_string());
    let place = ["--project-id", &project, "--process-id", &process];

    // Nobody decides them: what is not known in time is pending.
    stack.lead_state.terminate().await;
    let other = dir.path().join("other.ndjson");
    std::fs::copy(&file, &other).expect("a copy");
    let (code, told) = imported(&stack, &other, &[&place[..], &["--wait", "1s"]].concat()).await;
    assert_eq!((code, &told["pending"], &told["rejected"]), (Some(5), &json!(27), &json!(3)), "{told}");

    // The same content is the same import, wherever it is; this one waits, and is killed.
    let child = import(&stack, &file, &place).spawn().expect("leadctl");
    eventually(SOON, "all are sent", async || state(&file)["sent"] == json!(30)).await;
    kill(child).await;
    stack.lead_state.restart().await;
    stack.lead_state.wait_for_http(&stack.lead_state_ready.clone(), SOON).await;
    stack.wait_until_applied().await;
    let js = service_kit::nats::jetstream(&stack.client);
    let events = js.get_stream(contract::streams::LEAD_EVENTS).await.expect("the events");
    events.purge().await.expect("no events");
    let (code, told) = imported(&stack, &file, &[&place[..], &["--resume"]].concat()).await;
    assert_eq!(code, Some(5), "{told}");
    assert_eq!((&told["succeeded"], &told["failed"], &told["rejected"]), (&json!(24), &json!(3), &json!(3)), "{told}");
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 27);
    let text = std::fs::read_to_string(beside(&file, ".outcomes.ndjson")).expect("the outcomes");
    let last: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    assert_eq!((&last["row"], &last["status"], &last["referenceId"]), (&json!(30), &json!("failed"), &json!("R-1")));
    assert_eq!(last["code"], "unknown_state");
}

/// A file with so many updates of a new lead, every hundredth of which fails.
async fn file(stack: &Stack, directory: &Path, rows: usize) -> PathBuf {
    let process_id = stack.process(json!([])).await.process.process_id.expect("an id");
    let lead = stack.api.initiate(process_id, None).await;
    let state = |n| if n % 100 == 99 { "nowhere" } else { "interested" };
    let text: String = (0..rows).map(|n| format!("{lead},{},{n}\n", state(n))).collect();
    let file = directory.join("leads.csv");
    std::fs::write(&file, format!("leadId,targetState,n\n{text}")).expect("a file");
    file
}

/// Every row has its outcome, under the id by which the ledger has it, once.
async fn all_have_their_outcomes(stack: &Stack, file: &Path, rows: usize) {
    let outcomes = outcomes(file);
    assert_eq!(outcomes.len(), rows);
    for (n, row) in outcomes.iter().enumerate() {
        let (status, code) = if n % 100 == 99 { ("failed", "unknown_state") } else { ("succeeded", "") };
        let told = (row["row"].clone(), row["status"].as_str(), row["code"].as_str());
        assert_eq!(told, ((n + 1).to_string(), status, code), "{row:?}");
    }
    let mut told: Vec<_> = outcomes.iter().map(|row| row["updateId"].clone()).collect();
    stack.wait_until_applied().await;
    let applied: Vec<Vec<u8>> = sqlx::query_scalar("SELECT update_id FROM lead_state.lead_updates ORDER BY update_id")
        .fetch_all(&stack.pool)
        .await
        .expect("the ledger");
    let applied: Vec<_> =
        applied.iter().map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>()).collect();
    told.sort_unstable();
    assert_eq!(told, applied);
}

#[tokio::test]
async fn an_import_that_is_interrupted_goes_on_and_sends_no_row_twice() {
    const ROWS: usize = 3000;
    // The first 1500 at once; the others are slowed down.
    let stack = Stack::start_with(&[("GATEWAY_UPDATE_RATE", "1500")]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = file(&stack, dir.path(), ROWS).await;
    let child = import(&stack, &file, &[]).spawn().expect("leadctl");
    eventually(SOON, "the second chunk is sent", async || {
        let state = state(&file);
        if state["sent"].as_u64() >= Some(2000) { Ok(()) } else { Err(state.to_string()) }
    })
    .await;
    let pid = child.id().expect("a pid").to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().await.expect("kill").success());
    let output = tokio::time::timeout(SOON, child.wait_with_output()).await.expect("in time").expect("leadctl");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("--resume to continue"), "{said}");
    assert!(outcomes(&file).len() < ROWS);

    let (code, told) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!((code, &told["succeeded"], &told["failed"]), (Some(5), &json!(2970), &json!(30)), "{told}");
    all_have_their_outcomes(&stack, &file, ROWS).await;
}

#[tokio::test]
async fn outcomes_that_were_not_waited_for_are_there_once_it_is_resumed() {
    const ROWS: usize = 1100;
    let stack = Stack::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = file(&stack, dir.path(), ROWS).await;
    let (code, told) = imported(&stack, &file, &["--wait", "0s"]).await;
    assert_eq!((code, &told["pending"]), (Some(7), &json!(ROWS)), "{told}");
    let pending = outcomes(&file);
    assert!(pending.iter().all(|row| row["status"] == "pending" && row["updateId"].len() == 24));
    // Once more without waiting changes nothing.
    let (code, told) = imported(&stack, &file, &["--resume", "--wait", "0s"]).await;
    assert_eq!((code, &told["pending"]), (Some(7), &json!(ROWS)), "{told}");
    assert_eq!(outcomes(&file), pending);
    // They are told before anybody listens.
    stack.wait_until_applied().await;
    let (code, told) = imported(&stack, &file, &["--resume"]).await;
    assert_eq!((code, &told["succeeded"], &told["failed"]), (Some(5), &json!(1089), &json!(11)), "{told}");
    assert_eq!(told["rows"], json!(ROWS));
    all_have_their_outcomes(&stack, &file, ROWS).await;
    assert!(outcomes(&file).iter().zip(&pending).all(|(row, before)| row["updateId"] == before["updateId"]));
}

#[tokio::test]
async fn an_import_waits_for_a_gateway_that_is_away_and_stops_where_it_may_not() {
    let mut stack = Stack::start().await;
    let process_id = stack.process(json!([])).await.process.process_id.expect("an id");
    let lead = stack.api.initiate(process_id, None).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    std::fs::write(&file, format!("leadId,n\n{lead},1\n{lead},2\n")).expect("a file");
    let mut stranger = import(&stack, &file, &[]);
    let refused = stranger.env("LEADRELAY_API_KEY", "lr_nobody").output().await.expect("leadctl");
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    stack.gateway.terminate().await;
    let child = import(&stack, &file, &["--resume"]).spawn().expect("leadctl");
    stack.gateway.restart().await;
    let output = tokio::time::timeout(SOON * 2, child.wait_with_output()).await.expect("in time").expect("leadctl");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // Its header makes no sense: nothing is sent.
    std::fs::write(&file, format!("lead_id,n\n{lead},1\n")).expect("a file");
    let output = import(&stack, &file, &["--dry-run"]).output().await.expect("leadctl");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("must be written \"leadId\""), "{output:?}");
}

/// `just import`: so many rows, with the memory and time that leadctl takes.
#[tokio::test]
#[ignore = "takes minutes: just import"]
async fn a_hundred_thousand_rows_in_bounded_memory() {
    let rows: usize = std::env::var("IMPORT_ROWS").map_or(100_000, |text| text.parse().expect("a number"));
    let stack = Stack::start().await;
    let process_id: ObjectId = stack.process(json!([])).await.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for _ in 0..1000 {
        leads.push(stack.api.initiate(process_id, None).await);
    }
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("leads.csv");
    let mut text = String::from("leadId,targetState,disposition,make,model,note\n");
    for n in 0..rows {
        // A hundredth fails.
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
            // The highest so far; it is gone when the process is.
            () = tokio::time::sleep(Duration::from_millis(20)) => {
                if std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| text.contains("VmHWM")) {
                    peak = peak.max(memory(pid, "VmHWM"));
                }
            }
        }
    };
    let took = begun.elapsed();
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    println!(
        "{rows} rows, {} MiB: {:.1} s, {:.0} a second, {:.1} MiB at most in leadctl: {told}",
        text.len() >> 20,
        took.as_secs_f64(),
        rows as f64 / took.as_secs_f64(),
        peak as f64 / 1024.0
    );
    assert_eq!(output.status.code(), Some(5), "{told}");
    assert_eq!((&told["succeeded"], &told["failed"]), (&json!(rows - rows / 100), &json!(rows / 100)), "{told}");
    assert_eq!(outcomes(&file).len(), rows);
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, rows as i64);
    assert!(peak < 64 * 1024, "{peak} KiB");
}
