//! `leadctl listen` delivers outcomes to a program without a callback: signed, in order, with the bodies of webhooks.

use std::process::Stdio;

use serde_json::{Value, json};
use test_support::Reply;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
    time::timeout,
};

use crate::support::{LeadctlRun, Stack, TEST_TIMEOUT, verify};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// Starts a command and waits until it follows outcomes. Also returns the lines that it printed before.
async fn start(mut command: Command) -> (Child, Lines<BufReader<ChildStderr>>, Vec<String>) {
    let child = command.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("leadctl");
    let mut remarks = BufReader::new(child.stderr.take().expect("stderr")).lines();
    let mut before = Vec::new();
    loop {
        let line = timeout(TEST_TIMEOUT, remarks.next_line()).await.expect("in time").expect("a line").expect("more");
        if line.contains("outcomes are delivered to") {
            return (child, remarks, before);
        }
        before.push(line);
    }
}

/// The lines that a command prints until it ends by itself.
async fn printed(child: Child) -> Vec<Value> {
    let output = timeout(TEST_TIMEOUT, child.wait_with_output()).await.expect("in time").expect("output");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test]
async fn outcomes_are_delivered_as_webhooks_have_them_signed_and_repeated_until_accepted() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    stack.receiver.on("/local", [Reply::status(500), Reply::status(200)]);
    let url = stack.receiver.url("/local");
    let command = stack.leadctl_command(&["listen", "--to", &url, "--secret", SECRET, "--limit", "2", "--json"]);
    let (child, _remarks, _) = start(command).await;

    stack.publish_call("started", &json!({"leadId": lead})).await;
    let failed = stack.api.update(json!({"leadId": lead, "targetState": "interested"})).await;
    stack.publish_call("ended", &json!({"leadId": lead})).await;
    let succeeded = stack.api.update(json!({"leadId": lead, "metadata": {"n": 1}})).await;

    let delivered = printed(child).await;
    let expected = [(failed.as_str(), false, 2), (succeeded.as_str(), true, 1)];
    for (delivered, (update_id, success, attempts)) in delivered.iter().zip(expected) {
        let fields = (&delivered["updateId"], &delivered["success"], &delivered["attempts"], &delivered["statusCode"]);
        assert_eq!(fields, (&json!(update_id), &json!(success), &json!(attempts), &json!(200)), "{delivered}");
    }
    let local = stack.receiver.requests_to("/local");
    let crm = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    assert_eq!(local.len(), 3);
    for request in &local {
        verify(request, SECRET);
        let same = |webhook: &&test_support::Request| webhook.header("webhook-id") == request.header("webhook-id");
        let webhook = crm.iter().find(same).expect("the same webhook");
        assert_eq!(request.body, webhook.body);
    }
}

#[tokio::test]
async fn a_secret_is_made_and_printed_and_a_wrong_one_is_refused() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let url = stack.receiver.url("/local");
    let (child, _remarks, before) =
        start(stack.leadctl_command(&["listen", "--to", &url, "--limit", "1", "--json"])).await;

    stack.api.update_and_wait(json!({"leadId": lead, "name": "Ada"})).await;

    printed(child).await;
    let secret = before.iter().find_map(|line| line.split_once("signed with ")).expect("a secret").1;
    verify(&stack.receiver.requests_to("/local")[0], secret);
    let wrong = LeadctlRun::of(stack.leadctl_command(&["listen", "--to", &url, "--secret", "nonsense"])).await;
    wrong.assert_fails("whsec_");
}

#[tokio::test]
async fn a_gateway_that_is_away_is_named_and_waited_for() {
    let mut stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let url = stack.receiver.url("/local");
    let (child, mut remarks, _) =
        start(stack.leadctl_command(&["listen", "--to", &url, "--limit", "1", "--json"])).await;

    stack.gateway.kill9().await;
    let remark = timeout(TEST_TIMEOUT, remarks.next_line()).await.expect("in time").expect("a line").expect("more");
    assert!(remark.contains("waiting for events of the gateway"), "{remark}");
    stack.gateway.restart().await;
    stack.api.update_until_accepted(&json!({"leadId": lead, "name": "Ada"})).await;

    assert_eq!(printed(child).await.len(), 1);
}
