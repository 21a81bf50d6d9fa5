//! Snapshots of pages.

use std::sync::Arc;

use contract::{
    JsonObject, ObjectId, Timestamp,
    event::OutcomeKind,
    event_kind::DeliveryKind,
    process::{AuthHeader, Callback, CallbackAuth, FilterCondition, Ordering, Process, Rules, State, StateKind},
    replay::Replay,
    rpc::{
        Attempt, Call, CallbackDetails, CallbackFailures, CallbackState, CallbackStatus, Cursor, Delivery,
        DeliveryCounts, DeliveryId, DeliveryStatus, FailureGroup, FoundUpdate, HistoryEntry, Lag, Lead, ListedDelivery,
        Page, ParkedUpdate, Update, UpdateCounts, UpdateDeliveries, UpdateStatus,
    },
};
use http_api::{DateTime, DryRunOutcome, DryRunResponse, TestResult};
use maud::Markup;

use super::{
    actions, board, callbacks, calls, dead_letters, deliveries, keys, leads, login, processes, projects,
    statistics::Covered, updates,
};
use crate::{
    dead_letters::{Letter, Newest},
    fault::Fault,
    session::tests::{PROJECT, key},
};

const fn id(byte: u8) -> ObjectId {
    ObjectId::from_bytes([byte; 12])
}

const LEAD: ObjectId = id(0x22);
const PROCESS: ObjectId = id(0x33);
const UPDATE: ObjectId = id(0x44);
const CALLBACK: ObjectId = id(0x55);

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_768_193_759_048 + millis)
}

fn object(text: &str) -> JsonObject {
    JsonObject::from_text(text.into()).unwrap()
}

/// The HTML with a line per element.
fn lines(html: &Markup) -> String {
    html.0.replace("><", ">\n<")
}

fn page<T>(items: Vec<T>, next: Option<&str>) -> Page<T> {
    Page { items, next: next.map(|place| Cursor::new("list", place)) }
}

fn absent<T>() -> Result<T, Fault> {
    Err(Fault::Unavailable("webhook-notifier does not run. Reload the page to try again.".into()))
}

fn lead() -> Lead {
    Lead {
        lead_id: LEAD,
        project_id: PROJECT,
        process_id: PROCESS,
        reference_id: Some("R-1".into()),
        name: Some("Ada <script>".into()),
        phone: Some("+4915112345678".into()),
        email: Some("ada@example.com".into()),
        state: "new".into(),
        disposition: None,
        metadata: object(r#"{"budget":123456789012345678901234567890}"#),
        version: 3,
        created_at: at(0),
        updated_at: at(60_000),
        activities: vec![],
    }
}

fn process() -> Process {
    let state = |name: &str, kind| State { name: name.into(), kind, takes_disposition: None };
    Process {
        project_id: PROJECT,
        process_id: Some(PROCESS),
        revision: 7,
        name: "sales".into(),
        rules: Rules {
            states: vec![state("new", StateKind::Initial), state("lost", StateKind::Terminal)],
            transitions: Some([("new".to_owned(), ["lost".to_owned()].into())].into()),
            ..Rules::default()
        },
        callbacks: vec![Callback {
            callback_id: CALLBACK,
            name: "crm".into(),
            url: "https://crm.example/hook".into(),
            auth: Some(CallbackAuth::Header { name: "x-key".into(), value: "".into() }),
            client_certificate: None,
            headers: vec![AuthHeader { name: "x-subscription".into(), value: "".into() }],
            secrets: vec![],
            retiring_secrets: vec![],
            events: None,
            filter: vec![FilterCondition {
                field: "metadata.source".into(),
                equals: None,
                one_of: Some(vec!["web".into(), "app".into()]),
                exists: None,
            }],
            enabled: true,
            timeout_seconds: 15,
            max_in_flight: 64,
            max_per_second: Some(50),
            ordering: Ordering::Lead,
        }],
        sources: vec![],
    }
}

fn callback(state: CallbackState) -> CallbackStatus {
    CallbackStatus {
        callback_id: CALLBACK,
        name: "crm".into(),
        process_id: Some(PROCESS),
        process: "sales".into(),
        state,
        failing_since: (state == CallbackState::Disabled).then(|| at(0)),
        reason: (state == CallbackState::Disabled).then(|| "nothing but failures for 5 days".into()),
        details: (state == CallbackState::Disabled).then(|| CallbackDetails {
            disabled_since: Some(at(1000)),
            pending: 1000,
            oldest_pending_at: Some(at(0)),
            last_error: Some("the endpoint answered 503".into()),
        }),
    }
}

fn listed(status: DeliveryStatus) -> ListedDelivery {
    ListedDelivery {
        id: DeliveryId { update_id: UPDATE, callback_id: CALLBACK, kind: DeliveryKind::Update },
        process_id: Some(PROCESS),
        status,
        attempts: 2,
        next_attempt_at: (status == DeliveryStatus::Pending).then(|| at(5000)),
        created_at: at(0),
        updated_at: at(1000),
        status_code: Some(503),
        error: Some("the endpoint answered 503".into()),
    }
}

fn call() -> Call {
    Call {
        lead_id: LEAD,
        process_id: PROCESS,
        reference_id: Some("R-1".into()),
        call_id: Some("call 7&".into()),
        started_at: at(0),
        expires_at: at(3_600_000),
    }
}

fn delivery() -> Delivery {
    let attempt = |number, duration_ms, status_code: Option<u16>, error: Option<&str>| Attempt {
        number,
        started_at: at(i64::from(number) * 1000),
        duration_ms,
        status_code,
        error: error.map(str::to_owned),
        response: error.map(|_| "<h1>Service unavailable</h1>".to_owned()),
    };
    Delivery {
        update_id: UPDATE,
        callback_id: CALLBACK,
        kind: DeliveryKind::Update,
        status: DeliveryStatus::Delivered,
        next_attempt_at: None,
        attempts: vec![attempt(1, 40, Some(503), Some("the endpoint answered 503")), attempt(2, 10, Some(200), None)],
    }
}

fn update() -> Update {
    Update {
        status: UpdateStatus::Failed,
        command: Some(object(r#"{"leadId":"222222222222222222222222","metadata":{"color":"blue"}}"#)),
        log_sequence: Some(9),
        logged_at: Some(at(0)),
        lead_id: Some(LEAD),
        process_id: Some(PROCESS),
        error: Some("Lead update is not allowed while a call is in progress for this lead".into()),
        error_code: Some("call_in_progress".into()),
        from_state: Some("new".into()),
        to_state: Some("new".into()),
        version: Some(3),
        user_id: Some("u-1".into()),
        api_key_id: Some(id(0xaa)),
        warnings: vec!["the disposition was ignored".into()],
        applied_at: Some(at(54)),
        data: Some(object("{}")),
        ..Update::pending(UPDATE)
    }
}

fn names() -> std::collections::BTreeMap<ObjectId, String> {
    [(CALLBACK, "crm".to_owned())].into()
}

fn shown(callbacks: &std::collections::BTreeMap<ObjectId, String>, may_act: bool) -> deliveries::Shown<'_> {
    deliveries::Shown { project: PROJECT, callbacks, may_act }
}

#[test]
fn the_timeline_of_an_update() {
    let deliveries = Ok(UpdateDeliveries { deliveries: vec![delivery()], ..UpdateDeliveries::default() });
    insta::assert_snapshot!(lines(&updates::render(PROJECT, &update(), &deliveries, &names())));
}

#[test]
fn an_update_is_shown_while_the_deliveries_cannot_be_read() {
    let html = updates::render(PROJECT, &update(), &absent(), &names()).0;
    assert!(html.contains("webhook-notifier does not run.") && html.contains("failed: call_in_progress"), "{html}");
}

#[test]
fn a_waiting_update_shows_its_reason() {
    let queued = Update { queued_until: Some(at(7000)), ..Update::pending(UPDATE) };
    let parked = ParkedUpdate { since: at(0), reason: "the process cannot be read".into() };
    let deliveries = Ok(UpdateDeliveries { parked: Some(parked), ..UpdateDeliveries::default() });
    let html = updates::render(PROJECT, &queued, &deliveries, &names()).0;
    assert!(html.contains("Queued</b> until the call ends, at the latest"), "{html}");
    assert!(html.contains("Not decided yet") && html.contains("the process cannot be read"), "{html}");
}

fn entry() -> HistoryEntry {
    HistoryEntry {
        kind: OutcomeKind::Update,
        update_id: UPDATE,
        success: true,
        error: None,
        error_code: None,
        from_state: Some("new".into()),
        to_state: Some("lost".into()),
        disposition: Some("too expensive".into()),
        version: Some(3),
        user_id: None,
        api_key_id: None,
        warnings: vec![],
        epoch: 1,
        log_sequence: 9,
        log_index: 0,
        logged_at: at(0),
        applied_at: at(54),
    }
}

#[test]
fn lists_of_updates() {
    let refused = HistoryEntry {
        success: false,
        error: Some("<b> is not a state".into()),
        error_code: Some("unknown_state".into()),
        ..entry()
    };
    let found = |lead_id, entry| FoundUpdate { lead_id, process_id: None, reference_id: Some("R-1".into()), entry };
    let filters = updates::Filters {
        status: Some("failed".into()),
        code: Some("a&b".into()),
        key: Some(id(0xaa)),
        from: Some(at(0)),
        ..updates::Filters::default()
    };
    let list = page(vec![found(Some(LEAD), entry()), found(None, refused)], Some("7"));
    insta::assert_snapshot!(lines(&updates::render_list(PROJECT, &list, &filters, "curl")));

    let none = updates::render_list(PROJECT, &page(vec![], None), &updates::Filters::default(), "curl …/update").0;
    assert!(none.contains("No update was decided in the last 24 hours.") && none.contains("curl …/update"), "{none}");
    let unmet = updates::render_list(PROJECT, &page(vec![], None), &filters, "curl").0;
    assert!(unmet.contains("No update meets these conditions."), "{unmet}");
}

#[test]
fn a_lead() {
    let around = leads::Around {
        process: Ok(process()),
        calls: Ok(page(vec![call()], None)),
        history: Ok(page(vec![entry()], Some("9"))),
        deliveries: Ok(page(vec![listed(DeliveryStatus::Pending)], None)),
        callbacks: names(),
    };
    insta::assert_snapshot!(lines(&leads::render(PROJECT, &lead(), &around, true, at(90_000))));
}

#[test]
fn lists_of_leads() {
    let filters = leads::Filters { state: Some("new".into()), search: Some("ada".into()), process: Some(PROCESS) };
    let list = leads::render_list(PROJECT, &page(vec![lead()], Some("7")), &filters, "curl");
    insta::assert_snapshot!(lines(&list));

    let none = leads::render_list(PROJECT, &page(vec![], None), &leads::Filters::default(), "curl …/initiate").0;
    assert!(none.contains("This command creates the first one:") && none.contains("curl …/initiate"), "{none}");
    let unmet = leads::render_list(PROJECT, &page(vec![], None), &filters, "curl").0;
    assert!(unmet.contains("No lead meets these conditions."), "{unmet}");
}

#[test]
fn a_list_of_deliveries() {
    let filters = deliveries::Filters {
        status: Some(DeliveryStatus::Pending),
        callback: Some(CALLBACK),
        lead: Some(LEAD),
        code: Some(503),
        error: Some("\"a&b\"".into()),
        until: Some(at(0)),
        ..deliveries::Filters::default()
    };
    let list = page(vec![listed(DeliveryStatus::Pending)], Some("7"));
    insta::assert_snapshot!(lines(&deliveries::render_list(&shown(&names(), true), &list, &filters, "curl")));
}

#[test]
fn a_delivery_with_its_attempts() {
    insta::assert_snapshot!(lines(&deliveries::render(&shown(&names(), true), &delivery())));
}

#[test]
fn a_callback() {
    let group = |status_code: Option<u16>, error: &str, pending, exhausted| FailureGroup {
        status_code,
        error: Some(error.into()),
        pending,
        exhausted,
        last_at: at(3000),
        sample: listed(DeliveryStatus::Exhausted).id,
        response: status_code.map(|_| "<h1>Service unavailable</h1>".into()),
    };
    let counts = |hour: i64, failed, exhausted| DeliveryCounts {
        at: at(hour * 3_600_000),
        group: None,
        delivered: 90,
        within_100ms: 80,
        within_1s: 89,
        within_10s: 90,
        failed,
        exhausted,
    };
    let failures = CallbackFailures {
        groups: vec![group(Some(503), "the endpoint answered 503", 41, 3), group(None, "timed out & closed", 0, 1)],
        complete: false,
    };
    let around = callbacks::Around {
        covered: Covered::new(None, at(0)).unwrap(),
        counts: Ok(vec![counts(-1, 0, 0), counts(0, 20, 4)]),
        failures: Ok(failures),
        process: Ok(process()),
        pending: Ok(page(vec![], None)),
        exhausted: Ok(page(vec![listed(DeliveryStatus::Exhausted)], Some("7"))),
    };
    let html = callbacks::render(PROJECT, &callback(CallbackState::Disabled), &around, true, at(90_000_000));
    insta::assert_snapshot!(lines(&html));
}

#[test]
fn api_keys() {
    let mut expired = key();
    expired.expires_at = Some(at(0));
    let mut revoked = key();
    (revoked.name, revoked.revoked_at) = ("<b>".into(), Some(at(5)));
    insta::assert_snapshot!(lines(&keys::render(
        PROJECT,
        &page(vec![key(), expired, revoked], Some("7")),
        true,
        at(0)
    )));
}

#[test]
fn a_process() {
    insta::assert_snapshot!(lines(&processes::render(PROJECT, &process(), true)));
}

#[test]
fn a_board_shows_what_needs_attention_and_what_cannot_be_read() {
    let hour = |hour: i64| UpdateCounts { at: at(hour * 3_600_000), group: None, succeeded: 118, failed: 0 };
    let code = |at, code: &str, failed| UpdateCounts { group: Some(code.into()), succeeded: 0, failed, ..hour(at) };
    let board = board::Board {
        covered: Covered::new(None, at(0)).unwrap(),
        sees_all: true,
        lag: Ok(Lag {
            measured_at: Some(at(0)),
            unapplied_since: Some(at(-1500)),
            unapplied_messages: Some(12),
            unannounced_since: None,
        }),
        audits: Ok(vec![]),
        update_counts: Ok(vec![
            hour(-1),
            code(-1, "unknown_state", 2),
            hour(0),
            code(0, "call_in_progress", 2),
            code(0, "invalid_metadata", 1),
        ]),
        delivery_counts: absent(),
        callbacks: Ok(vec![callback(CallbackState::Healthy), callback(CallbackState::Disabled)]),
        exhausted: Ok(page(vec![listed(DeliveryStatus::Exhausted)], None)),
        pending: absent(),
        leads: Ok(page(vec![lead()], None)),
        processes: Ok(page(vec![], None)),
    };
    insta::assert_snapshot!(lines(&board::render(PROJECT, &board, at(0))));
}

#[test]
fn the_list_of_projects() {
    let mut other = key();
    other.name = "billing".into();
    insta::assert_snapshot!(lines(&projects::render(&[Arc::new(key()), Arc::new(other)])));
    assert!(projects::render(&[]).0.contains("leadctl project create"));
}

#[test]
fn the_login() {
    insta::assert_snapshot!(lines(&login::render(None, Some("/p/1"), None, None)));
    let link = login::render(Some("lrc_00"), None, None, Some(&Fault::Refused("used".into()))).0;
    assert!(link.contains(r#"name="token" value="lrc_00""#) && link.contains("used") && !link.contains("api_key"));
    assert!(link.contains("Sign in as operator"), "{link}");
    let viewer = login::render(Some("lrv_00"), None, None, None).0;
    assert!(viewer.contains("Sign in as viewer") && !viewer.contains("operator"), "{viewer}");
    let with_key = login::render(None, Some("/p/1"), Some("f0"), Some(&Fault::Refused("unknown".into()))).0;
    assert!(with_key.contains(r#"name="form_token" value="f0""#), "{with_key}");
}

#[test]
fn an_action_shows_its_consequence_and_asks_for_a_key_that_allows_it() {
    let confirmation = |allowed: &Result<(), Fault>| {
        let confirmation = actions::Confirmation {
            path: "/p/1/test".into(),
            consequence: maud::html! { p { "One ping is sent." } },
            fields: maud::html! {},
            button: "Send a test".into(),
        };
        [Some("/p/1/test?call=7"), None].map(|next| lines(&actions::render(&confirmation, "f0", allowed, next)))
    };
    let [allowed, _] = confirmation(&Ok(()));
    let [refused, without_keys] = confirmation(&Err(Fault::Refused("This action needs an API key.".into())));
    insta::assert_snapshot!(format!("{allowed}\n\n{refused}"));
    assert!(!without_keys.contains("<form"), "{without_keys}");
}

#[test]
fn the_result_of_a_test() {
    let result = TestResult {
        webhook_id: UPDATE,
        delivered: false,
        started_at: DateTime(at(0)),
        duration_ms: 12,
        status_code: Some(500),
        error: Some("the endpoint answered 500".into()),
        response: Some("<b>".into()),
    };
    insta::assert_snapshot!(lines(&actions::callbacks::render_test(&result)));
}

#[test]
fn the_results_of_a_redelivery() {
    let id = |byte| DeliveryId { update_id: id(byte), callback_id: CALLBACK, kind: DeliveryKind::Update };
    let results = [(id(1), Ok(())), (id(2), Err(Fault::Invalid("It is pending (delivery_pending)".into())))];
    insta::assert_snapshot!(lines(&actions::deliveries::render_results(PROJECT, &results)));
}

#[test]
fn the_preview_of_an_update_and_what_it_needs() {
    let outcome = |success| DryRunOutcome {
        success,
        error: (!success).then(|| "State lost is not allowed from new".into()),
        error_code: (!success).then(|| "transition_not_allowed".into()),
        lead_id: Some(LEAD),
        reference_id: None,
        from_state: Some("new".into()),
        to_state: Some(if success { "lost" } else { "new" }.into()),
        version: Some(4),
        data: success.then(|| object(r#"{"budget":1}"#)),
    };
    let lead = lead();
    let html = |preview, allowed| {
        let page = actions::leads::UpdatePage {
            lead: &lead,
            states: Some(vec!["new".into(), "lost".into()]),
            entered: actions::leads::Entered {
                state: Some("lost".into()),
                metadata: Some(r#"{"budget":1}"#.into()),
                ..actions::leads::Entered::default()
            },
            preview,
            form_token: "f0",
            idempotency_key: "i0".into(),
            allowed,
        };
        lines(&page.render())
    };
    let preview = |success| DryRunResponse {
        success: true,
        message: "".into(),
        dry_run: true,
        outcome: outcome(success),
        warnings: vec!["the disposition was ignored".into()],
    };

    insta::assert_snapshot!(html(Some(Ok(preview(true))), Ok(())));
    let failing = html(Some(Ok(preview(false))), Ok(()));
    assert!(
        failing.contains("would fail: transition_not_allowed") && !failing.contains("Send the update"),
        "{failing}"
    );
    let invalid = html(Some(Err(Fault::Invalid("Metadata must be a JSON object".into()))), Ok(()));
    assert!(invalid.contains("Metadata must be") && invalid.contains(r#"value="preview""#), "{invalid}");
    let refused = html(None, Err(Fault::Refused("This action needs an API key.".into())));
    assert!(refused.contains("Use this key") && !refused.contains(r#"value="preview""#), "{refused}");
}

#[test]
fn calls_in_progress() {
    insta::assert_snapshot!(lines(&calls::render_list(
        PROJECT,
        &page(vec![call()], Some("7")),
        true,
        at(90_000),
        "curl"
    )));
    let none = calls::render_list(PROJECT, &page(vec![], None), true, at(0), "curl …/started").0;
    assert!(none.contains("No call is in progress.") && none.contains("curl …/started"), "{none}");
}

#[test]
fn a_dead_letter() {
    let letter = Letter {
        number: 17,
        reason: "invalid_json".into(),
        error: "EOF while parsing".into(),
        subject: "leads.cmd.111111111111111111111111.update".into(),
        dead_since: at(0),
        truncated_from: Some(9000),
        replay: None,
    };
    let body = vec![b'<'; 5000];

    let html = lines(&dead_letters::render(&letter, &body, true));

    assert!(html.contains("The first 4096 of 5000 bytes."), "{html}");
    insta::assert_snapshot!(html.replace(&"&lt;".repeat(4096), "BODY"));
    let replayed = Letter { replay: Some((9, Replay::Sent { sequence: 8 })), ..letter };
    assert!(dead_letters::render(&replayed, b"{", true).0.contains("replayed as entry 8"));
    let fresh = Letter { replay: None, ..replayed };
    let offers_replay = |body: &[u8]| dead_letters::render(&fresh, body, true).0.contains("/replay\"");
    assert!(offers_replay(b"{") && !offers_replay(b"{\xff"), "a form would change the second body");
}

#[test]
fn a_list_of_dead_letters_is_empty_only_if_there_are_none() {
    let none = |may_have_more| dead_letters::rows(&Newest { letters: vec![], may_have_more }).0;

    assert_eq!(none(false), "<p>None.</p>");
    assert!(none(true).contains("leadctl dead-letters list") && !none(true).contains("None."), "{}", none(true));
}

#[test]
fn a_delivery_of_another_event_is_linked_by_its_own_id() {
    let delivery = Delivery { kind: DeliveryKind::StateChanged, ..delivery() };
    let own = format!("/deliveries/{UPDATE}-{CALLBACK}-lead.state_changed");

    let page = deliveries::render(&shown(&names(), true), &delivery).0;
    let deliveries = Ok(UpdateDeliveries { deliveries: vec![delivery], ..UpdateDeliveries::default() });
    let timeline = updates::render(PROJECT, &update(), &deliveries, &names()).0;

    assert!(page.contains(&format!("{own}/redeliver")) && page.contains("<dd>lead.state_changed</dd>"), "{page}");
    assert!(timeline.contains(&own) && timeline.contains("crm: lead.state_changed"), "{timeline}");
}
