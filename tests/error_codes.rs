//! docs/ERRORS.md has one row for each error code and warning of the services, and no other.

use std::{collections::BTreeSet, path::Path, sync::LazyLock};

/// The source files of the services, without their tests: path and text.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, sources: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
                let code = code.split("#[cfg(test)]\npub(crate) mod tests").next().unwrap_or_default();
                sources.push((path.display().to_string(), code.to_owned()));
            }
        }
    }
    let mut sources = Vec::new();
    for name in ["contract", "service-kit", "gateway", "lead-state", "webhook-notifier"] {
        walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates").join(name).join("src"), &mut sources);
    }
    sources
}

static ERRORS: LazyLock<String> = LazyLock::new(|| {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ERRORS.md");
    std::fs::read_to_string(file).expect("docs/ERRORS.md")
});

/// The rows of the table in docs/ERRORS.md: kind, status where it has one, and code or warning.
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

/// The codes of a kind.
fn of_kind(kind: &str) -> BTreeSet<String> {
    table().into_iter().filter(|row| row[0] == kind).map(|[_, _, code]| code.to_owned()).collect()
}

/// All texts between `before` and the next `end`.
fn behind<'a>(text: &'a str, before: &str, end: char) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| Some(rest.split_once(end)?.0)).collect()
}

/// The text of one source file.
fn source(sources: &[(String, String)], file: &str) -> String {
    let found = sources.iter().find(|(path, _)| path.ends_with(file));
    found.unwrap_or_else(|| panic!("no {file}")).1.clone()
}

#[test]
fn the_table_has_exactly_the_codes_of_the_services() {
    let sources = sources();
    let table = table();
    let mut kinds: Vec<_> = table.iter().map(|row| row[0]).collect();
    kinds.dedup();
    assert_eq!(kinds, ["HTTP", "NATS", "dead letter", "failed update", "halted", "warning"]);

    // Refusals, over HTTP and over NATS. The gateway's own tests check its own refusals.
    let mut count = 0;
    for (file, text) in &sources {
        for arguments in behind(text, "RpcError::new(", ')') {
            let mut parts = arguments.split(',').map(str::trim);
            let (Some(status), Some(code)) = (parts.next(), parts.next()) else { continue };
            let Some(code) = code.strip_prefix('"').and_then(|code| code.strip_suffix('"')) else { continue };
            let documented = ["HTTP", "NATS"].iter().any(|kind| table.contains(&[kind, status, code]));
            assert!(
                documented,
                "{file}: {status} {code} has no row in docs/ERRORS.md: add one of kind HTTP if clients of the gateway may see it, else NATS"
            );
            count += 1;
        }
    }
    assert!(count > 40, "only {count} were found: this test must be adapted to the sources");
    let all: String = sources.iter().map(|(_, text)| text.as_str()).collect();
    for [_, status, code] in table.iter().filter(|row| matches!(row[0], "HTTP" | "NATS")) {
        assert!(status.parse::<u16>().is_ok(), "{code} has no status");
        assert!(all.contains(&format!("\"{code}\"")), "{code} is in docs/ERRORS.md and not in the code");
    }

    let decide = source(&sources, "lead-state/src/core/decide.rs");
    let refusals = decide.split("pub const fn code(").nth(1).and_then(|rest| rest.split("\n    }\n").next());
    let refusals = behind(refusals.expect("the codes of refusals"), "=> \"", '"');
    assert_eq!(of_kind("failed update"), refusals.into_iter().map(str::to_owned).collect());
    let reasons = contract::subject::DeadLetterReason::ALL.map(|reason| reason.as_str().to_owned());
    assert_eq!(of_kind("dead letter"), reasons.into());
    let recovery = source(&sources, "lead-state/src/recovery/diagnose.rs");
    let reasons = behind(&recovery, "return halted(\"", '"');
    assert_eq!(of_kind("halted"), reasons.into_iter().map(str::to_owned).collect());
}

#[test]
fn the_table_has_exactly_the_warnings_of_the_services() {
    // A placeholder stands for a value.
    let plain = |literal: &str| {
        let mut parts = literal.split('{');
        let mut text = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            text.push('…');
            text.push_str(part.split_once('}').map_or("", |(_, rest)| rest));
        }
        text.replace("……", "…")
    };
    let documented = of_kind("warning");
    let sources = sources();
    let mut given = BTreeSet::new();
    for (file, text) in &sources {
        // Line breaks do not matter.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ").replace("( ", "(");
        let reasons = behind(&text, "ignore_rest(\"", '"').into_iter().map(|why| format!("ignored {why}: …"));
        let mut warnings: Vec<_> = reasons.collect();
        for call in ["warnings.push(\"", "warnings.push(format!(\""] {
            warnings.extend(behind(&text, call, '"').into_iter().map(plain));
        }
        // `ignore_rest` itself, without a reason.
        for warning in warnings.into_iter().filter(|warning| warning != "ignored …: …") {
            assert!(documented.contains(&warning), "{file}: docs/ERRORS.md has no row of the warning `{warning}`");
            given.insert(warning);
        }
    }
    assert!(given.len() > 8, "only {given:?} were found: this test must be adapted to the sources");
    // Warnings that are composed elsewhere are found by their longest part.
    for warning in documented.difference(&given) {
        let parts = warning.trim_start_matches("ignored ").split('…').map(|part| part.trim_matches([' ', ':']));
        let part = parts.max_by_key(|part| part.len()).unwrap_or_default();
        assert!(
            sources.iter().any(|(_, text)| text.contains(part)),
            "{warning} is in docs/ERRORS.md and not in the code"
        );
    }
}
