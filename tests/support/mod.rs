//! Code that the tests share.

mod api;
mod audit;
mod certificates;
mod fixtures;
pub(crate) mod history;
mod leadctl;
mod load;
pub(crate) mod model;
mod name_server;
mod stack;
mod wait;

/// The text of the operations guide, all its files.
pub(crate) fn operations_guide() -> String {
    let directory = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations")).expect("the guide");
    directory.map(|entry| std::fs::read_to_string(entry.expect("an entry").path()).expect("a file")).collect()
}

pub(crate) use self::{
    api::{Api, UPDATE, all_pages, assert_includes, assert_ok, assert_refused, create_key, ids, send},
    audit::assert_exactly_once,
    certificates::{Ca, Identity, written},
    fixtures::{
        CALL_IN_PROGRESS, Tenant, assert_main_job, assert_webhook_fields, by_update, memory_kib, numbers, secret,
        signature_count, verifies, verify,
    },
    leadctl::{LeadctlRun, letter_number},
    load::{Load, longest_gap, publish_in_order, update_each},
    name_server::NameServer,
    stack::{SECRETS_KEY, Stack, call, cluster_url, process_id, service, service_of},
    wait::{
        BLOCKED, DELIVERED, LEDGER_ROWS, TEST_TIMEOUT, health_page, wait_for_failure, wait_for_unready,
        wait_until_applied,
    },
};
