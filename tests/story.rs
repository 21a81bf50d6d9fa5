//! What became of leads, told: lists and histories page by page, over HTTP and with leadctl.

use std::process::Output;

use contract::ObjectId;
use serde_json::{Value, json};
use test_support::{Reply, binary};

use crate::stack::{Api, SOON, Stack};

/// Runs leadctl against a stack.
pub(crate) async fn leadctl(stack: &Stack, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(binary("leadctl"));
    command.env("NATS_URL", stack.nats.url());
    command.env("LEADRELAY_GATEWAY_URL", &stack.api.url).env("LEADRELAY_API_KEY", &stack.api.key);
    command.args(args).output().await.expect("leadctl")
}

/// Runs it for programs: its code, and a value a line.
pub(crate) async fn leadctl_json(stack: &Stack, args: &[&str]) -> (Option<i32>, Vec<Value>) {
    let output = leadctl(stack, &[args, &["--json"]].concat()).await;
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code(), text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect())
}

/// All of a list, so many items at a time, and how many pages that took.
pub(crate) async fn all_pages(api: &Api, path: &str, limit: usize) -> (Vec<Value>, usize) {
    let (mut items, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let (status, page) = api.get(&format!("{path}limit={limit}&cursor={cursor}")).await;
        assert_eq!(status, 200, "{page}");
        let data = page["data"].as_array().expect("a list");
        assert!(data.len() <= limit, "{page}");
        items.extend(data.iter().cloned());
        pages += 1;
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => return (items, pages),
        }
    }
}

fn ids(items: &[Value], name: &str) -> Vec<String> {
    items.iter().map(|item| item[name].as_str().expect(name).to_owned()).collect()
}

#[tokio::test]
async fn leads_and_their_histories_are_told_page_by_page() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let process_id = applied.process.process_id.expect("an id");
    let mut leads = Vec::new();
    for number in 0..7 {
        leads.push(stack.api.initiate(process_id, Some(&format!("R{number}"))).await);
    }
    // Ids of one second are in no order.
    let mut newest_first = leads.clone();
    newest_first.sort_by(|one, other| other.cmp(one));

    let (listed, pages) = all_pages(&stack.api, "/api/v1/leads?", 3).await;
    assert_eq!((ids(&listed, "_id"), pages), (newest_first.clone(), 3));
    let since = service_kit::clock::now().to_iso();
    let mut updates = Vec::new();
    for (number, state) in ["interested", "followup_2", "nowhere", "interested", "lost"].iter().enumerate() {
        let user = format!("u-{number}");
        let update = json!({"leadId": leads[2], "targetState": state, "userId": user, "metadata": {"n": number}});
        updates.push(stack.api.update(update).await);
    }
    assert_eq!(stack.api.outcome(&updates[4]).await["status"], "succeeded");

    // A filter finds what it should, wherever a page ends.
    for query in ["state=lost&", &format!("updatedSince={since}&"), &format!("processId={process_id}&state=lost&")] {
        let (found, _) = all_pages(&stack.api, &format!("/api/v1/leads?{query}"), 1).await;
        assert_eq!(ids(&found, "_id"), [leads[2].clone()], "{query}");
        assert_eq!((&found[0]["metadata"]["n"], &found[0]["version"]), (&json!(4), &json!(5)), "{query}");
    }
    let (others, _) = all_pages(&stack.api, "/api/v1/leads?state=new&", 4).await;
    assert_eq!(others.len(), 6);
    let none = format!("/api/v1/leads?processId={}&", ObjectId::from_bytes([1; 12]));
    assert_eq!(all_pages(&stack.api, &none, 5).await, (vec![], 1));

    let path = format!("/api/v1/leads/{}/updates?", leads[2]);
    let (history, pages) = all_pages(&stack.api, &path, 2).await;
    updates.reverse();
    assert_eq!((ids(&history, "updateId"), pages), (updates.clone(), 3));
    assert_eq!(history[0]["fromState"], "interested");
    assert_eq!((&history[2]["status"], &history[2]["errorCode"]), (&json!("failed"), &json!("unknown_state")));
    assert_eq!(history[4]["userId"], "u-0");

    // A cursor is good for its own list, and an unknown lead has none.
    let (_, page) = stack.api.get("/api/v1/leads?limit=1").await;
    let next = page["next"].as_str().expect("a cursor");
    for (path, status, code) in [
        (format!("{path}cursor={next}"), 400, "invalid_cursor"),
        ("/api/v1/leads?cursor=nonsense".into(), 400, "invalid_cursor"),
        ("/api/v1/leads/ffffffffffffffffffffffff/updates".into(), 404, "lead_not_found"),
    ] {
        let (got, answer) = stack.api.get(&path).await;
        assert_eq!((got, &answer["code"]), (status, &json!(code)), "{path}");
    }

    // The same from the command line.
    let project = stack.api.project_id.to_string();
    let (code, listed) = leadctl_json(&stack, &["lead", "list", "--project", &project, "--all"]).await;
    assert_eq!((code, ids(&listed, "leadId")), (Some(0), newest_first));
    let (code, told) = leadctl_json(&stack, &["lead", "history", &leads[2], "--project", &project]).await;
    assert_eq!((code, ids(&told, "updateId")), (Some(0), updates.clone()));
    let shown = leadctl(&stack, &["lead", "get", &leads[2], "--project", &project]).await;
    let shown = String::from_utf8(shown.stdout).expect("UTF-8");
    assert!(shown.contains("state       lost") && shown.contains(&updates[0]), "{shown}");
    let nobody = leadctl(&stack, &["lead", "get", "ffffffffffffffffffffffff", "--project", &project]).await;
    assert_eq!(nobody.status.code(), Some(3), "{nobody:?}");
}

#[tokio::test]
async fn an_update_is_watched_to_its_end() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,100ms")]).await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    stack.receiver.on("/crm", [Reply::status(500), Reply::status(200), Reply::status(200), Reply::status(500)]);
    for (state, code, status, delivery) in [
        ("interested", 0, "succeeded", "delivered"),
        ("nowhere", 5, "failed", "delivered"),
        ("followup_2", 6, "succeeded", "exhausted"),
    ] {
        let update = stack.api.update(json!({"leadId": lead, "targetState": state})).await;
        let (exited, told) = leadctl_json(&stack, &["update", "watch", &update]).await;
        let last = &told.last().expect("a story")["data"];
        assert_eq!((&last["status"], &last["deliveries"][0]["status"]), (&json!(status), &json!(delivery)), "{last}");
        assert_eq!(exited, Some(code), "{state}");
    }
    stack.receiver.wait_for_requests("/crm", 5, SOON).await;
    let nowhere = leadctl(&stack, &["update", "watch", "0123456789abcdef01234567"]).await;
    assert_eq!(nowhere.status.code(), Some(3), "{nowhere:?}");
}

#[tokio::test]
async fn an_update_is_sent_with_all_that_the_gateway_takes() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let send = async |stack: &Stack, args: &[&str]| {
        let (code, mut told) = leadctl_json(stack, &[&["update", "send", "--lead-id", &lead], args].concat()).await;
        (code, told.pop().unwrap_or_default())
    };

    let (code, told) = send(&stack, &["--target-state", "interested", "--dry-run"]).await;
    assert_eq!((code, &told["outcome"]["toState"]), (Some(0), &json!("interested")), "{told}");
    let (code, told) = send(&stack, &["--target-state", "nowhere", "--dry-run"]).await;
    assert_eq!((code, &told["outcome"]["errorCode"]), (Some(5), &json!("unknown_state")), "{told}");

    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), r#"{"make": "Kia", "price": 1.50}"#).expect("a file");
    let metadata = format!("@{}", file.path().display());
    let first = ["--metadata", &metadata, "--set", "make=Toyota", "--expected-version", "1", "--wait"];
    let (code, told) = send(&stack, &first).await;
    assert_eq!((code, &told["status"]), (Some(0), &json!("succeeded")), "{told}");
    let (_, found) = stack.api.get(&format!("/api/v1/leads/get?leadId={lead}")).await;
    assert_eq!(found["data"]["metadata"], json!({"source": "import", "make": "Toyota", "price": 1.50}));
    let (code, told) = send(&stack, &["--name", "Eve", "--if-match", "1", "--wait=20"]).await;
    assert_eq!((code, &told["status"]), (Some(5), &json!("failed")), "{told}");
    assert!(told["error"].as_str().is_some_and(|error| error.contains('2')), "the version is named: {told}");
    // Without --wait it is enough that it was accepted.
    let (code, told) = send(&stack, &["--name", "Eve", "--expected-state", "lost"]).await;
    assert_eq!((code, &told["status"]), (Some(0), &json!("failed")), "{told}");

    let (_, one) = send(&stack, &["--name", "Eve", "--idempotency-key", "a \"key\""]).await;
    let (code, two) = send(&stack, &["--name", "Eve", "--idempotency-key", "a \"key\""]).await;
    assert_eq!((code, &one["updateId"], &two["status"]), (Some(0), &two["updateId"], &json!("succeeded")));
    let (code, _) = send(&stack, &["--name", "Ida", "--idempotency-key", "a \"key\""]).await;
    assert_eq!(code, Some(1), "another update under the same key");
    let shown = leadctl(&stack, &["update", "get", two["updateId"].as_str().expect("an id")]).await;
    assert!(String::from_utf8_lossy(&shown.stdout).contains("succeeded"), "{shown:?}");

    stack.lead_state.terminate().await;
    let (code, told) = send(&stack, &["--name", "Ida", "--wait=1"]).await;
    assert_eq!((code, &told["status"]), (Some(7), &json!("pending")), "{told}");
    stack.gateway.terminate().await;
    assert_eq!(send(&stack, &["--name", "Ida"]).await.0, Some(4), "nobody answers");
}
