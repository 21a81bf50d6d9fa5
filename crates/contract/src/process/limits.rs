//! The bounds of a process: one tenant's configuration must not slow down, or stop, the others'.

/// The most states.
pub const MAX_STATES: usize = 200;
/// The most transitions, counted by their targets.
pub const MAX_TRANSITIONS: usize = 5000;
/// The most callbacks.
pub const MAX_CALLBACKS: usize = 100;
/// The most sources of call reports.
pub const MAX_SOURCES: usize = 20;
/// The most signing secrets of a callback that do not retire, because each makes the signature header longer; and the
/// most secrets of a source, because each is tried.
pub const MAX_ACTIVE_SECRETS: usize = 5;
/// The most retiring signing secrets of a callback: all active ones may be replaced at once.
pub const MAX_RETIRING_SECRETS: usize = MAX_ACTIVE_SECRETS;
/// The most conditions of a callback's filter.
pub const MAX_FILTER_CONDITIONS: usize = 10;
/// The most values of a condition.
pub const MAX_FILTER_VALUES: usize = 50;
/// The most levels of a path into metadata in a condition.
pub const MAX_FILTER_PATH: usize = 8;
/// The longest name of a project, key, process, state, callback or authentication header, in characters.
pub const MAX_NAME_CHARS: usize = 255;
/// The longest URL, in bytes.
pub const MAX_URL_BYTES: usize = 2048;
/// The longest token, header value or client secret of an authentication, in bytes.
pub const MAX_AUTH_BYTES: usize = 4096;
/// The most headers that authenticate to the endpoint, in addition to the one of `auth`.
pub const MAX_AUTH_HEADERS: usize = 10;
/// The longest scope or audience of an OAuth 2.0 client, in bytes.
pub const MAX_OAUTH2_BYTES: usize = 1024;
/// The longest client certificate with its chain, and the longest private key, as PEM in bytes.
pub const MAX_CERTIFICATE_BYTES: usize = 16 * 1024;
/// The most certificates of a client's chain.
pub const MAX_CHAIN_CERTIFICATES: usize = 10;
/// The longest process as JSON, in bytes. A message of NATS has at most 1 MiB by default.
pub const MAX_PROCESS_BYTES: usize = 512 * 1024;

/// All bounds, as the docs show them.
pub const LIMITS: [(&str, usize); 17] = [
    ("states", MAX_STATES),
    ("transitions, counted by their targets", MAX_TRANSITIONS),
    ("callbacks", MAX_CALLBACKS),
    ("sources of call reports", MAX_SOURCES),
    ("signing secrets of a callback, secrets of a source", MAX_ACTIVE_SECRETS),
    ("retiring secrets of a callback", MAX_RETIRING_SECRETS),
    ("conditions of a filter", MAX_FILTER_CONDITIONS),
    ("values of a condition", MAX_FILTER_VALUES),
    ("levels of a path in a condition", MAX_FILTER_PATH),
    ("characters of a name", MAX_NAME_CHARS),
    ("bytes of a URL", MAX_URL_BYTES),
    ("`headers` of a callback", MAX_AUTH_HEADERS),
    ("bytes of a token, header value or client secret of a callback, or of a source's secret", MAX_AUTH_BYTES),
    ("bytes of a scope or audience in `auth`", MAX_OAUTH2_BYTES),
    ("bytes of a client certificate with its chain, and of its key", MAX_CERTIFICATE_BYTES),
    ("certificates in a client's chain", MAX_CHAIN_CERTIFICATES),
    ("bytes of the whole process as JSON, its secrets sealed", MAX_PROCESS_BYTES),
];

/// Adds a fault if a text cannot be a name.
pub(super) fn check_name(what: &str, name: &str, faults: &mut Vec<String>) {
    if name.trim().is_empty() || name.chars().count() > MAX_NAME_CHARS || name.chars().any(char::is_control) {
        faults.push(format!("{what} must have 1 to {MAX_NAME_CHARS} characters and no control characters"));
    }
}

#[test]
fn the_guide_lists_the_limits() {
    let guide = include_str!("../../../../docs/guide/callbacks.md");
    let rows: String = LIMITS.iter().map(|(what, max)| format!("| {what} | {max} |\n")).collect();
    assert!(guide.contains(&rows), "docs/guide/callbacks.md lacks these rows:\n{rows}");
}
