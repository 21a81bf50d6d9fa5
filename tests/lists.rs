//! Leads and their histories are listed page by page, over HTTP and with leadctl.

use contract::{ObjectId, Timestamp, rpc::ProcessChangeResult};
use serde_json::json;

use crate::support::{Api, Stack, all_pages, assert_includes, assert_ok, assert_refused, ids, process_id};

#[tokio::test]
async fn leads_and_histories_are_listed_page_by_page() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&[]).await;
    leads_are_listed_newest_first_and_by_each_filter(&stack, &applied).await;
    the_history_of_a_lead_is_listed_newest_first(&stack, &applied).await;
    foreign_cursors_and_unknown_leads_are_refused(&stack, &applied).await;
}

#[tokio::test]
async fn leads_are_found_by_what_people_know_of_them() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&[]).await;
    let mut leads = Vec::new();
    for (name, phone, email, reference) in [
        ("Ada Lovelace", "+14155550101", "Ada@Example.com", "R-ADA"),
        ("adam", "+4915112345678", "adam@example.com", "5550101"),
        ("50% off\\_x", "+4915112345679", "off@example.com", "R-50"),
    ] {
        let lead = json!({
            "projectId": stack.api.project_id, "processId": process_id(&applied), "name": name, "phone": phone,
            "email": email, "referenceId": reference, "metadata": {},
        });
        let lead = assert_ok(stack.api.post("/api/v1/leads/initiate", &json!({"lead": lead, "init": true})).await);
        leads.push(lead["_id"].as_str().expect("an id").to_owned());
    }
    let [ada, adam, off] = leads.try_into().expect("three leads");
    let find = async |api: &Api, query: &str| {
        let (mut found, pages) = all_pages(api, &format!("/api/v1/leads?{query}&"), 1).await;
        found.sort_by_key(|lead| lead["name"].to_string());
        assert_eq!(pages, found.len().max(1), "{query}");
        ids(&found, "_id")
    };

    let cases: [(&str, &[&str]); 13] = [
        ("q=ADA", &[&ada, &adam]),
        ("q=ada%20l", &[&ada]),
        ("q=ada&state=new", &[&ada, &adam]),
        ("q=ada&state=lost", &[]),
        ("q=a", &[]),
        ("q=ADA@example.COM", &[&ada]),
        ("q=(415)%20555-0101", &[&ada]),
        ("q=5550101", &[&ada, &adam]),
        ("q=50101", &[]),
        ("q=R-ADA", &[&ada]),
        ("q=r-ada", &[]),
        ("q=50%25", &[&off]),
        (&format!("q={ada}"), &[&ada]),
    ];
    for (query, expected) in cases {
        assert_eq!(find(&stack.api, query).await, expected, "{query}");
    }
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    assert!(find(&other, "q=ada").await.is_empty());
    let listed = stack.leadctl_of_project(&["lead", "list", "--search", "555-0101"]).await.assert_ok();
    listed.assert_prints(&["Ada Lovelace"]);

    let many = "INSERT INTO lead_state.leads
            (lead_id, project_id, process_id, name, state, metadata, version, created_at, updated_at)
        SELECT decode(lpad(to_hex(n), 24, '0'), 'hex'), project_id, process_id, 'Many ' || n, state, '{}', 1, now(), now()
        FROM lead_state.leads, generate_series(1, 10001) AS n WHERE name = 'adam'";
    stack.sql(many).await;
    assert_refused(stack.api.get("/api/v1/leads?q=many").await, 400, "search_too_broad");
    let long = format!("/api/v1/leads?q={}", "x".repeat(256));
    assert_refused(stack.api.get(&long).await, 400, "invalid_field");
    assert_eq!(find(&stack.api, "q=many%20777").await.len(), 11);
}

#[tokio::test]
async fn updates_of_a_project_are_found_by_each_condition() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&[]).await;
    let lead = stack.api.initiate(process_id(&applied), Some("R")).await;
    let other_key = Api::of_project(stack.api.url.clone(), &stack.client, stack.api.project_id).await;
    let (mut updates, mut keys) = (Vec::new(), Vec::new());
    for (api, body) in [
        (&stack.api, json!({"leadId": lead, "targetState": "interested", "userId": "u-1"})),
        (&stack.api, json!({"leadId": lead, "targetState": "nowhere", "userId": "u-2"})),
        (&other_key, json!({"leadId": lead, "metadata": {"n": 1}, "userId": "u-2"})),
        (&stack.api, json!({"leadId": "ffffffffffffffffffffffff", "name": "x"})),
    ] {
        let timeline = api.update_and_wait(body).await;
        updates.push(timeline["updateId"].as_str().expect("an id").to_owned());
        keys.push(timeline["apiKeyId"].as_str().expect("an id").to_owned());
    }
    let find = async |query: &str| {
        let (found, pages) = all_pages(&stack.api, &format!("/api/v1/updates?{query}&"), 1).await;
        assert_eq!(pages, found.len().max(1), "{query}: {found:?}");
        found
    };

    let (process, key) = (process_id(&applied), keys[2].as_str());
    let cases: [(&str, &[usize]); 11] = [
        ("", &[0, 1, 2, 3]),
        ("status=succeeded", &[0, 2]),
        ("status=failed", &[1, 3]),
        ("code=unknown_state", &[1]),
        ("status=succeeded&code=unknown_state", &[]),
        (&format!("processId={process}"), &[0, 1, 2]),
        (&format!("apiKeyId={key}"), &[2]),
        ("userId=u-2", &[1, 2]),
        ("userId=u-2&status=failed", &[1]),
        ("from=2026-01-01T00:00:00Z&to=2026-01-02T00:00:00Z", &[]),
        (&format!("from={}", second_of(&updates[0]).to_iso()), &[0, 1, 2, 3]),
    ];
    for (query, expected) in cases {
        let mut expected: Vec<_> = expected.iter().map(|index| updates[*index].clone()).collect();
        // Ids of the same second have no defined order.
        expected.sort_by(|one, other| other.cmp(one));
        assert_eq!(ids(&find(query).await, "updateId"), expected, "{query}");
    }
    let refused = &find("code=unknown_state").await[0];
    let refused_as = json!({"leadId": lead, "processId": process, "referenceId": "R", "status": "failed", "fromState": "interested"});
    assert_includes(refused, refused_as);
    let before = format!("from=2026-01-01T00:00:00Z&to={}", second_of(&updates[0]).to_iso());
    assert_refused(stack.api.get(&format!("/api/v1/updates?{before}")).await, 400, "invalid_field");
    let listed = stack.leadctl_of_project(&["update", "list", "--key", key, "--json"]).await.assert_ok().json_lines();
    assert_eq!(ids(&listed, "updateId"), [updates[2].clone()]);
    let listed = stack.leadctl_of_project(&["update", "list", "--status", "failed", "--from", "1h"]).await.assert_ok();
    listed.assert_prints(&[&updates[1], &lead, "ffffffffffffffffffffffff"]);
}

/// The second in which an id was made.
fn second_of(id: &str) -> Timestamp {
    id.parse::<ObjectId>().expect("an id").timestamp()
}

#[tokio::test]
async fn a_rare_update_is_found_behind_pages_without_items() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let refused = stack.api.update(json!({"leadId": lead, "targetState": "nowhere"})).await;
    stack.api.outcome(&refused).await;
    // Their ids are newer than every other.
    stack
        .sql(
            "CREATE TEMP TABLE copied AS SELECT l.*, n FROM lead_state.lead_updates AS l, generate_series(1, 10001) AS n;
            UPDATE copied SET update_id = decode('ffffffff' || lpad(to_hex(n), 16, '0'), 'hex'), log_epoch = -1,
                log_sequence = n, success = true, error = NULL, error_code = NULL;
            ALTER TABLE copied DROP COLUMN n;
            INSERT INTO lead_state.lead_updates SELECT * FROM copied",
        )
        .await;

    let (status, first) = stack.api.get("/api/v1/updates?status=failed&limit=200").await;
    let (found, pages) = all_pages(&stack.api, "/api/v1/updates?status=failed&", 200).await;

    assert_eq!((status, &first["data"]), (200, &json!([])), "{first}");
    assert_eq!((ids(&found, "updateId"), pages), (vec![refused], 2));
}

async fn leads_are_listed_newest_first_and_by_each_filter(stack: &Stack, applied: &ProcessChangeResult) {
    let mut leads = Vec::new();
    for number in 0..7 {
        leads.push(stack.api.initiate(process_id(applied), Some(&format!("R{number}"))).await);
    }
    let since = service_kit::clock::now().to_iso();
    stack.api.update_and_wait(json!({"leadId": leads[2], "targetState": "lost", "metadata": {"n": 4}})).await;
    // Ids of the same second have no defined order.
    let mut newest_first = leads.clone();
    newest_first.sort_by(|one, other| other.cmp(one));

    let (listed, pages) = all_pages(&stack.api, "/api/v1/leads?", 3).await;

    assert_eq!((ids(&listed, "_id"), pages), (newest_first.clone(), 3));
    let of_process = format!("processId={}&state=lost&", process_id(applied));
    for query in ["state=lost&", &format!("updatedSince={since}&"), &of_process] {
        let (found, _) = all_pages(&stack.api, &format!("/api/v1/leads?{query}"), 1).await;
        assert_eq!(ids(&found, "_id"), [leads[2].clone()], "{query}");
        assert_includes(&found[0], json!({"metadata": {"n": 4}, "version": 2}));
    }
    let (others, _) = all_pages(&stack.api, "/api/v1/leads?state=new&", 4).await;
    assert_eq!(others.len(), 6);
    let unknown = format!("/api/v1/leads?processId={}&", ObjectId::from_bytes([1; 12]));
    assert_eq!(all_pages(&stack.api, &unknown, 5).await, (vec![], 1));
    let listed = stack.leadctl_of_project(&["lead", "list", "--all", "--json"]).await.assert_ok().json_lines();
    assert_eq!(ids(&listed, "leadId"), newest_first);
}

async fn the_history_of_a_lead_is_listed_newest_first(stack: &Stack, applied: &ProcessChangeResult) {
    let lead = stack.api.initiate(process_id(applied), None).await;
    let mut updates = Vec::new();
    for (number, state) in ["interested", "followup_2", "nowhere", "interested", "lost"].iter().enumerate() {
        let user = format!("u-{number}");
        updates.push(stack.api.update(json!({"leadId": lead, "targetState": state, "userId": user})).await);
    }
    stack.api.outcome(&updates[4]).await;
    updates.reverse();

    let path = format!("/api/v1/leads/{lead}/updates?");
    let (history, pages) = all_pages(&stack.api, &path, 2).await;

    assert_eq!((ids(&history, "updateId"), pages), (updates.clone(), 3));
    assert_eq!(history[0]["fromState"], "interested");
    assert_includes(&history[2], json!({"status": "failed", "errorCode": "unknown_state"}));
    assert_eq!(history[4]["userId"], "u-0");
    let listed = stack.leadctl_of_project(&["lead", "history", &lead, "--json"]).await.assert_ok().json_lines();
    assert_eq!(ids(&listed, "updateId"), updates);
    let shown = stack.leadctl_of_project(&["lead", "get", &lead]).await.assert_ok();
    shown.assert_prints(&["state       lost", &updates[0]]);
}

async fn foreign_cursors_and_unknown_leads_are_refused(stack: &Stack, applied: &ProcessChangeResult) {
    let lead = stack.api.initiate(process_id(applied), None).await;
    let (_, page) = stack.api.get("/api/v1/leads?limit=1").await;
    let cursor_of_leads = page["next"].as_str().expect("a cursor");

    for (path, status, code) in [
        (format!("/api/v1/leads/{lead}/updates?cursor={cursor_of_leads}"), 400, "invalid_cursor"),
        ("/api/v1/leads?cursor=nonsense".into(), 400, "invalid_cursor"),
        ("/api/v1/leads/ffffffffffffffffffffffff/updates".into(), 404, "lead_not_found"),
    ] {
        assert_refused(stack.api.get(&path).await, status, code);
    }
    stack.leadctl_of_project(&["lead", "get", "ffffffffffffffffffffffff"]).await.assert_code(3);
}
