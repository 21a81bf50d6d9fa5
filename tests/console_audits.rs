//! The verdict of the last audit: `leadctl audit` records it, and the console and `leadctl doctor` show it.

use contract::{Timestamp, audit::AuditRecord};
use service_kit::{
    audits::{audits_of, record_audit},
    clock,
};

use crate::{
    console::{Console, Project, project},
    nats_permissions::stack_on,
    support::{Api, Stack},
};

impl Console {
    /// The part of the board about the last audit.
    async fn audit_on_board(&self, project: &Project, cookie: &str) -> String {
        let board = self.get(&format!("/p/{}", project.api.project_id), cookie).await.text;
        let (_, rest) = board.split_once("<dt>Last audit</dt><dd>").expect("the fact");
        rest.split("</dd>").next().expect("a value").to_owned()
    }
}

#[tokio::test]
async fn the_last_audit_is_shown_only_to_sessions_of_its_scope() {
    let stack = stack_on(None).await;
    let project = project(&stack).await;
    let console = Console::start(&stack).await;
    let project_id = project.api.project_id.to_string();
    let operator = console.sign_in_as_operator(&stack).await;
    let of_key = console.sign_in_with(&project.api).await;
    let other = Api::create(project.api.url.clone(), &stack.client, "other").await;
    let of_other = Project { api: other, lead_id: String::new(), update_id: String::new(), pages: vec![] };
    let other_key = console.sign_in_with(&of_other.api).await;
    let check = async || {
        let checks = stack.leadctl(&["doctor", "--json"]).await.json()["checks"].as_array().expect("checks").clone();
        let check = checks.into_iter().find(|check| check["check"] == "last audit").expect("the check");
        (check["state"].as_str().expect("a state").to_owned(), check["finding"].as_str().expect("a finding").to_owned())
    };

    let never = console.audit_on_board(&project, &operator).await;
    assert_eq!(never, "never: run <code>leadctl audit</code>");
    assert_eq!(check().await.0, "unknown");
    let system = console.get("/system", &operator).await.text;
    assert!(!system.contains("cannot be read"), "no audit, and no dead letter: {system}");
    let unable = ["audit", "--database-url", "postgres://127.0.0.1:1/none"];
    assert_eq!(stack.leadctl(&unable).await.code, 2);
    assert_eq!(console.audit_on_board(&project, &operator).await, never, "an audit that could not run");

    stack.wait_for_clean_audit().await;
    let clean = console.audit_on_board(&project, &operator).await;
    assert!(clean.contains("</span> clean</span>, 1 updates checked of all projects"), "{clean}");
    let system = console.get("/system", &operator).await.text;
    assert!(system.contains("</span> clean</span></td><td>all projects</td><td class=\"number\">1</td>"), "{system}");
    let (state, finding) = check().await;
    assert!(state == "ok" && finding.ends_with("clean, 1 updates checked"), "{state} {finding}");
    // The verdict of all projects would show how much other projects send.
    let hidden = console.audit_on_board(&project, &of_key).await;
    assert_eq!(hidden, format!("never: run <code>leadctl audit --project {project_id}</code>"));

    stack.sql("UPDATE lead_state.leads SET version = version + 1").await;
    assert_eq!(stack.leadctl(&["audit", "--project", &project_id]).await.code, 1);
    let violated = console.audit_on_board(&project, &operator).await;
    assert!(
        violated.contains("1 violation</span>") && violated.contains("Most frequent violation: lead_differs: "),
        "{violated}"
    );
    assert!(violated.contains("</span> clean</span>"), "that of all projects is still the last of them: {violated}");
    let system = console.get("/system", &operator).await.text;
    assert!(system.contains("badge bad") && system.contains("lead_differs: "), "{system}");
    let shown = console.audit_on_board(&project, &of_key).await;
    assert!(shown.contains("1 violation</span>, 1 updates checked") && !shown.contains("lead_differs"), "{shown}");
    let foreign = console.audit_on_board(&of_other, &other_key).await;
    assert!(foreign.starts_with("never"), "{foreign}");
    let (state, finding) = check().await;
    assert!(state == "failed" && finding.contains("1 violation, only of project"), "{state} {finding}");

    // A clean audit of a range replaces neither the audit of all updates nor the violations of another range.
    stack.leadctl(&["audit", "--since", "1h"]).await.assert_code(1);
    let before = stack.leadctl(&["audit", "--to", "2026-01-01T00:00:00Z"]).await.assert_ok();
    assert!(before.stderr.contains("this verdict was not recorded"), "{before:?}");
    let violated = console.audit_on_board(&project, &operator).await;
    assert_eq!(violated.matches("1 violation</span>").count(), 2, "{violated}");
    assert_eq!(check().await.0, "failed");
    stack.sql("UPDATE lead_state.leads SET version = version - 1").await;
    stack.wait_for_clean_audit().await;
    let clean = console.audit_on_board(&project, &operator).await;
    assert!(clean.contains("</span> clean</span>") && !clean.contains("violation"), "{clean}");
    assert_eq!(check().await.0, "ok");
    assert!(!console.service.log().contains("NATS refuses"), "{}", console.service.log());
}

#[tokio::test]
async fn a_verdict_that_cannot_be_recorded_is_reported() {
    let stack = Stack::start().await;
    stack.js().delete_stream("KV_audits").await.expect("the bucket");

    let run = stack.leadctl(&["audit"]).await;

    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stdout.contains("CLEAN: all") && run.stderr.contains("this verdict could not be recorded"), "{run:?}");
}

#[tokio::test]
async fn an_audit_that_ends_at_the_same_moment_hides_no_violation() {
    let stack = Stack::start().await;
    let js = stack.js();
    for began in 0..20 {
        let at = Timestamp::from_millis;
        let violated = AuditRecord {
            project_id: Some(clock::new_id()),
            from: Some(at(0)),
            to: None,
            began_at: at(began),
            ended_at: at(began + 1),
            updates: 1,
            unchecked: 0,
            violations: 1,
            worst: None,
        };
        let clean = AuditRecord { violations: 0, ..violated.clone() };

        let (first, second) = tokio::join!(record_audit(&js, &clean), record_audit(&js, &violated));
        first.and(second).expect("recorded");

        let project_id = violated.project_id.expect("a project");
        assert_eq!(audits_of(&js, project_id, false).await.expect("audits"), [violated]);
    }
}
