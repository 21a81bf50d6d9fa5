//! `stack.env`: the settings for clients of this stack, and what a later start makes of them in a shell that has loaded
//! the file.

use std::{
    borrow::Cow,
    iter,
    path::{self, Path, PathBuf},
};

use service_kit::config::NatsConfig;

/// The file, in the data directory.
pub(super) const STACK_ENV: &str = "stack.env";

/// The variable with the data directory of the stack whose settings a shell has loaded.
pub(super) const STACK: &str = "LEADRELAY_STACK";

/// A server belongs to another stack.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "NATS_URL or DATABASE_URL is from {}, the settings of another stack: run `unset NATS_URL DATABASE_URL` to start with \
     private servers",
    .0.display()
)]
pub(super) struct OtherStack(PathBuf);

/// Whether the operator named the server with this URL. Otherwise the URL is that of a private server of the data
/// directory `data`, which runs only while this start runs it. `loaded` is the value of [`STACK`].
///
/// # Errors
/// It is a private server of another data directory, which may have stopped.
pub(super) fn is_given(url: &str, loaded: Option<&Path>, data: &Path) -> Result<bool, OtherStack> {
    match loaded {
        Some(stack) if is_private(url) && stack == data => Ok(false),
        Some(stack) if is_private(url) => Err(OtherStack(stack.join(STACK_ENV))),
        _ => Ok(true),
    }
}

/// Whether the URL has the form of a private server's: the password is 16 random bytes in hex.
fn is_private(url: &str) -> bool {
    let Some((_, authority)) = url.split_once("://leadrelay:") else { return false };
    let Some((password, _)) = authority.split_once("@127.0.0.1:") else { return false };
    password.len() == 32 && password.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The variables for clients of this NATS. Paths are absolute, because clients run in other directories.
pub(super) fn nats_variables(config: NatsConfig) -> Vec<(&'static str, String)> {
    let files = [
        ("NATS_CREDS", config.nats_creds),
        ("NATS_CA", config.nats_ca),
        ("NATS_CERT", config.nats_cert),
        ("NATS_KEY", config.nats_key),
    ];
    let files = files.into_iter().filter_map(|(name, file)| {
        let file = file?;
        Some((name, path::absolute(&file).unwrap_or(file).display().to_string()))
    });
    iter::once(("NATS_URL", config.nats_url)).chain(files).collect()
}

/// The content of the file: an assignment per line, for a POSIX shell.
pub(super) fn render(variables: &[(&str, String)]) -> String {
    variables.iter().map(|(name, value)| format!("{name}={}\n", quoted(value))).collect()
}

/// A value as a word of a shell. Values without special characters stay bare, for programs that are not shells.
fn quoted(value: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./:@,=?%+-".contains(c);
    if value.chars().all(is_plain) { value.into() } else { format!("'{}'", value.replace('\'', r"'\''")).into() }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_reads_every_value_unchanged_and_simple_values_are_bare() {
        let values = [
            "nats://leadrelay:5f@127.0.0.1:4222",
            "postgres://u:p%40@h/d?sslmode=verify-full&sslrootcert=ca.pem",
            "it's $HOME `id` $(id); \\ \"x\" #1 ~ *\nnext line",
            "",
        ];
        let variables: Vec<_> = ["A", "B", "C", "D"].into_iter().zip(values.map(str::to_owned)).collect();

        let file = render(&variables);

        assert!(file.starts_with("A=nats://leadrelay:5f@127.0.0.1:4222\nB='postgres://"), "{file}");
        let script = format!("{file}printf '%s\\0' \"$A\" \"$B\" \"$C\" \"$D\"");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), values.map(|value| format!("{value}\0")).concat());
    }

    #[test]
    fn clients_get_all_settings_of_nats_with_absolute_paths() {
        let config = NatsConfig {
            nats_creds: Some("user.creds".into()),
            nats_ca: Some("/ca.pem".into()),
            ..NatsConfig::at("tls://nats.example")
        };

        let variables = nats_variables(config);

        let creds = std::env::current_dir().unwrap().join("user.creds").display().to_string();
        let url = "tls://nats.example".to_owned();
        assert_eq!(variables, [("NATS_URL", url), ("NATS_CREDS", creds), ("NATS_CA", "/ca.pem".to_owned())]);
    }

    #[test]
    fn urls_of_private_servers_are_ignored_in_their_own_stack_and_refused_in_another_one() {
        let (own, other) = (Path::new("/a"), Path::new("/b"));
        let password = "0123456789abcdef0123456789abcdef";
        let private = [
            format!("nats://leadrelay:{password}@127.0.0.1:4222"),
            format!("postgres://leadrelay:{password}@127.0.0.1:5432/leadrelay"),
        ];
        for url in &private {
            assert_eq!(is_given(url, Some(own), own), Ok(false));
            assert_eq!(is_given(url, Some(other), own), Err(OtherStack("/b/stack.env".into())));
            assert_eq!(is_given(url, None, own), Ok(true));
        }
        // The operator's servers, of a stack that was started with them.
        for url in ["nats://leadrelay:secret@127.0.0.1:4222", "postgres://db.example/leads", "nats://a,nats://b"] {
            assert_eq!(is_given(url, Some(own), own), Ok(true));
            assert_eq!(is_given(url, Some(other), own), Ok(true));
        }
    }
}
