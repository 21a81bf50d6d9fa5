//! API keys: every gateway rejects a key soon after it is revoked or expires, and stored hashes are unique.

use std::time::{Duration, Instant};

use contract::{
    Timestamp,
    key::{ApiKey, Scope},
    rpc::{CreateKey, ListKeys, RevokeKey, RpcError},
    streams::KEY_USES,
};
use secrets::api_key;
use serde_json::{Value, json};
use test_support::eventually;
use tokio::time::{sleep, timeout};

use crate::support::{Api, Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, create_key};

/// The path of a lead that does not exist: 404 with a valid key.
const PROBE: &str = "/api/v1/leads/get?leadId=ffffffffffffffffffffffff";

/// Creates a key, waits until both gateways accept it, and returns a client of each gateway with the key.
async fn new_key(stack: &Stack, other: &Api, expires_at: Option<Timestamp>) -> ([Api; 2], ApiKey) {
    let secret = api_key::generate(rand::random());
    let create = create_key(stack.api.project_id, "brief", &secret);
    let key = stack.call(&CreateKey { expires_at, ..create }).await;
    let both = [&stack.api, other].map(|api| Api { key: secret.clone(), ..api.clone() });
    for api in &both {
        eventually(TEST_TIMEOUT, "the gateway accepts the key", async || api.get(PROBE).await.0 == 404).await;
    }
    (both, key)
}

/// Waits until a gateway rejects a key, and returns the response.
async fn wait_until_refused(api: &Api) -> Value {
    loop {
        let (status, answer) = api.get(PROBE).await;
        match status {
            401 => return answer,
            404 => sleep(Duration::from_millis(5)).await,
            _ => panic!("{status} {answer}"),
        }
    }
}

async fn wait_until_both_refuse([one, other]: &[Api; 2], why: &str) {
    let both = async { tokio::join!(wait_until_refused(one), wait_until_refused(other)) };
    let (one, other) = timeout(TEST_TIMEOUT, both).await.expect("refused");
    for answer in [one, other] {
        assert!(answer["error"].as_str().is_some_and(|text| text.contains(why)), "{answer}");
    }
}

#[tokio::test]
async fn a_revoked_key_is_refused_by_every_gateway() {
    let stack = Stack::start().await;
    let (_gateway, other) = stack.second_gateway(&[]).await;
    let (both, key) = new_key(&stack, &other, None).await;

    let begun = Instant::now();
    stack.call(&RevokeKey { key_id: key.key_id, project_id: None }).await;
    wait_until_both_refuse(&both, "was revoked").await;

    println!("revoked at two gateways within {:?}", begun.elapsed());
}

#[tokio::test]
async fn the_keys_of_a_project_are_listed_and_revoked_over_http() {
    let stack = Stack::start().await;
    let other_project = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let (_gateway, other) = stack.second_gateway(&[]).await;
    let (both, key) = new_key(&stack, &other, None).await;

    let listed = assert_ok(stack.api.get("/api/v1/keys").await);
    let foreign = stack.call(&ListKeys::of_project(other_project.project_id)).await.items[0].key_id;
    let of_other = stack.api.post(&format!("/api/v1/keys/{foreign}/revoke"), &json!({})).await;
    let revoke = format!("/api/v1/keys/{}/revoke", key.key_id);
    let revoked = assert_ok(stack.api.post(&revoke, &json!({})).await);

    let expected =
        json!({"keyId": key.key_id, "name": "brief", "scopes": Scope::ALL, "expiresAt": null, "revokedAt": null});
    let keys = listed["data"].as_array().expect("keys");
    assert_includes(keys.iter().find(|listed| listed["keyId"] == json!(key.key_id)).expect("the key"), expected);
    assert!(!listed.to_string().contains(&api_key::hash(&both[0].key)), "{listed}");
    assert_refused(of_other, 404, "key_not_found");
    assert!(revoked["data"]["revokedAt"].is_string(), "{revoked}");
    wait_until_both_refuse(&both, "was revoked").await;
    assert_eq!(other_project.get(PROBE).await.0, 404, "the key of the other project is valid");
    // A second revocation does not change the time of the first.
    assert_eq!(assert_ok(stack.api.post(&revoke, &json!({})).await), revoked);
}

#[tokio::test]
async fn the_last_use_of_a_key_is_shown_and_no_earlier_one_replaces_it() {
    let stack = Stack::start().await;
    let (mut gateway, other) = stack.second_gateway(&[]).await;
    let ([_, by_other], key) = new_key(&stack, &other, None).await;
    let unused = stack.call(&create_key(stack.api.project_id, "unused", "unused")).await.key_id;
    let last_use = async |key_id| {
        let listed = assert_ok(stack.api.get("/api/v1/keys").await)["data"].clone();
        let listed = listed.as_array().expect("keys").iter().find(|listed| listed["keyId"] == json!(key_id)).cloned();
        listed.expect("the key")["lastUsedAt"].clone()
    };

    let shown = eventually(TEST_TIMEOUT, "the use is shown", async || match last_use(key.key_id).await {
        Value::String(at) => Ok(at),
        none => Err(none.to_string()),
    })
    .await;
    let age = service_kit::clock::now().millis() - shown.parse::<Timestamp>().expect("a time").millis();
    assert!((0..300_000).contains(&age) && shown.ends_with(":00.000Z"), "{shown}");
    assert_eq!(last_use(unused).await, Value::Null);
    let table = stack.leadctl(&["key", "list", "--project", &stack.api.project_id.to_string()]).await.assert_ok();
    assert!(table.stdout.contains(&shown[..16]) && table.stdout.contains("never"), "{}", table.stdout);

    // Another gateway has written a later use. This one writes when it stops.
    let later = Timestamp::from_millis(shown.parse::<Timestamp>().expect("a time").millis() + 3_600_000);
    let bucket = stack.js().get_key_value(KEY_USES).await.expect("the bucket");
    bucket.put(key.key_id.to_string(), later.millis().to_string().into()).await.expect("a write");
    bucket.put(unused.to_string(), "0".into()).await.expect("a write");
    let unused_by_other = Api { key: "unused".into(), ..by_other.clone() };
    eventually(TEST_TIMEOUT, "the key is accepted", async || unused_by_other.get(PROBE).await.0 == 404).await;
    assert_eq!(by_other.get(PROBE).await.0, 404);
    gateway.terminate().await;

    assert_eq!(last_use(key.key_id).await, json!(later.to_iso()));
    assert_ne!(last_use(unused).await, json!("1970-01-01T00:00:00.000Z"), "an earlier use is replaced");
}

#[tokio::test]
async fn an_expired_key_is_refused_by_every_gateway() {
    let stack = Stack::start().await;
    let (_gateway, other) = stack.second_gateway(&[]).await;
    let end = service_kit::clock::now().millis() + 2_000;
    let (both, _) = new_key(&stack, &other, Some(Timestamp::from_millis(end))).await;

    wait_until_both_refuse(&both, "has expired").await;

    let late = service_kit::clock::now().millis() - end;
    println!("expired at two gateways within {late} ms");
    assert!(late >= 0, "a key was refused {} ms before its end", -late);
}

#[tokio::test]
async fn a_key_with_the_hash_of_another_is_a_conflict() {
    let stack = Stack::start().await;
    let create = create_key(stack.api.project_id, "twin", &stack.api.key);

    let answer = service_kit::rpc::request(&stack.client, &create).await.map_err(RpcError::from);

    let refused = answer.expect_err("a conflict");
    assert_eq!((refused.status, refused.code.as_str()), (409, "key_exists"), "{refused}");
}

#[tokio::test]
async fn the_keys_of_a_project_are_listed_page_by_page() {
    let stack = Stack::start().await;
    let project_id = stack.api.project_id;
    let mut expected = vec!["test".to_owned()];
    for number in 0..4 {
        let name = format!("key-{number}");
        stack.call(&create_key(project_id, &name, &name)).await;
        expected.push(name);
    }

    let (mut names, mut pages, mut query) = (Vec::new(), 0, "?limit=2".to_owned());
    loop {
        let page = assert_ok(stack.api.get(&format!("/api/v1/keys{query}")).await);
        let keys = page["data"].as_array().expect("keys");
        assert!(keys.len() <= 2, "{page}");
        names.extend(keys.iter().map(|key| key["name"].as_str().expect("a name").to_owned()));
        pages += 1;
        let Some(next) = page["next"].as_str() else { break };
        query = format!("?limit=2&cursor={next}");
    }
    let listed = async |extra: &[&str]| {
        let run = stack.leadctl_of_project(&[&["key", "list", "--json"], extra].concat()).await.assert_ok();
        run.json_lines().iter().map(|key| key["name"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
    };

    assert_eq!(pages, 3);
    assert_eq!(listed(&["--limit", "2"]).await, names[..2]);
    assert_eq!(listed(&["--all"]).await, names);
    // Ids of the same second have no defined order.
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
    let cursor = contract::rpc::Cursor::new("leads", &project_id.to_string());
    let refused = stack.api.get(&format!("/api/v1/keys?cursor={}", cursor.as_str())).await;
    assert_refused(refused, 400, "invalid_cursor");
}
