//! docs/ERRORS.md has one row for each error code and warning that several services share. Tests in the crates compare
//! the gateway's codes and lead-state's failure codes with the table.

use std::{collections::BTreeSet, path::Path, sync::LazyLock};

use contract::{
    rpc::{ErrorCode, Halted},
    subject::DeadLetterReason,
    warning::Warning,
};

static ERRORS: LazyLock<String> = LazyLock::new(|| {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ERRORS.md");
    std::fs::read_to_string(file).expect("docs/ERRORS.md")
});

/// The rows of the table: kind, status (which may be empty), and code or warning.
fn table() -> BTreeSet<[&'static str; 3]> {
    let row = |line: &'static str| {
        let cells: Vec<_> = line.strip_prefix("| ")?.strip_suffix(" |")?.split('|').map(str::trim).collect();
        let [kind, status, code, when, what_to_do] = cells[..] else { return None };
        let code = code.strip_prefix('`')?.strip_suffix('`')?;
        assert!(!when.is_empty() && !what_to_do.is_empty(), "{line}");
        Some([kind, status, code])
    };
    let rows: Vec<_> = ERRORS.lines().filter_map(row).collect();
    let table: BTreeSet<_> = rows.iter().copied().collect();
    assert_eq!(table.len(), rows.len(), "docs/ERRORS.md has a row twice");
    table
}

fn of_kind(kind: &str) -> BTreeSet<&'static str> {
    table().into_iter().filter(|row| row[0] == kind).map(|[_, _, code]| code).collect()
}

#[test]
fn the_table_has_exactly_the_codes_of_queries_dead_letters_and_halts() {
    let table = table();
    let mut kinds: Vec<_> = table.iter().map(|row| row[0]).collect();
    kinds.dedup();
    assert_eq!(kinds, ["HTTP", "NATS", "dead letter", "failed update", "halted", "warning"]);
    for code in ErrorCode::ALL {
        let (status, name) = (code.status().to_string(), code.as_str());
        assert!(
            ["HTTP", "NATS"].iter().any(|kind| table.contains(&[*kind, status.as_str(), name])),
            "{status} {name} has no row in docs/ERRORS.md: add one of kind HTTP if clients of the gateway may see it, else NATS"
        );
    }
    for [_, status, code] in table.iter().filter(|row| row[0] == "NATS") {
        let known = ErrorCode::ALL.iter().any(|known| known.as_str() == *code && known.status().to_string() == *status);
        assert!(known, "{status} {code} is in docs/ERRORS.md and no query answers it");
    }
    assert_eq!(of_kind("dead letter"), DeadLetterReason::ALL.map(|reason| reason.as_str()).into());
    assert_eq!(of_kind("halted"), Halted::REASONS.into());
}

#[test]
fn the_table_has_exactly_the_warnings_of_the_services() {
    assert_eq!(of_kind("warning"), Warning::ALL.iter().map(|warning| warning.template()).collect());
}
