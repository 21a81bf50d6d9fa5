//! Secrets from files: each variable that holds a secret may be given as `NAME_FILE`, the path of a file with the
//! value, as container platforms mount secrets.

use std::{collections::BTreeMap, ffi::OsString};

use anyhow::{Context, bail};
use clap::{
    Arg, Command, Parser,
    builder::{Resettable, ValueParser},
};

/// Parses this process's arguments and environment, with secrets from files. Invalid arguments end the process.
///
/// # Errors
/// A file cannot be read, or a secret is given both as a value and as a file.
pub fn parse<C: Parser>() -> anyhow::Result<C> {
    let secrets = read_secrets(&C::command(), &|name| std::env::var_os(name))?;
    let mut matches = with_secrets(C::command(), &secrets).get_matches();
    if !secrets.is_empty() {
        with_file_variables(C::command(), &secrets).get_matches();
    }
    C::from_arg_matches_mut(&mut matches).or_else(|e| e.format(&mut C::command()).exit())
}

/// Reads the files of a command's secrets, by variable. A secret is an argument whose value `--help` hides.
fn read_secrets(
    command: &Command,
    env: &impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut secrets = BTreeMap::new();
    for name in command.get_arguments().filter(|arg| arg.is_hide_env_values_set()).filter_map(|arg| arg.get_env()) {
        let name = name.to_string_lossy();
        let variable = format!("{name}_FILE");
        let Some(path) = env(&variable).filter(|path| !path.is_empty()) else { continue };
        if env(&name).is_some() {
            bail!("{name} and {variable} are both set: remove one of them");
        }
        let secret = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read the file of {variable}, {}", path.display()))?;
        secrets.insert(name.into_owned(), secret.trim_end_matches(['\r', '\n']).to_owned());
    }
    for command in command.get_subcommands() {
        secrets.extend(read_secrets(command, env)?);
    }
    Ok(secrets)
}

/// Makes the secrets the defaults of their arguments. clap does not count a default as given, so a secret is not
/// required, and no argument requires another one: [`with_file_variables`] checks that.
fn with_secrets(command: Command, secrets: &BTreeMap<String, String>) -> Command {
    if secrets.is_empty() {
        return command;
    }
    let command = command.mut_args(|arg| {
        let secret = variable(&arg).and_then(|name| secrets.get(&name));
        let arg = arg.requires(Resettable::Reset);
        match secret {
            Some(secret) => {
                // clap requires default values that live as long as the process.
                let secret: &'static str = secret.clone().leak();
                let arg = arg.required(false).required_unless_present(Resettable::Reset);
                arg.default_value(secret).hide_default_value(true)
            }
            None => arg,
        }
    });
    command.mut_subcommands(|command| with_secrets(command, secrets))
}

/// Reads the secrets' arguments from `NAME_FILE` instead of `NAME`, so that clap counts them as given when it checks
/// which arguments require or exclude each other. Only the result of the check is of use.
fn with_file_variables(command: Command, secrets: &BTreeMap<String, String>) -> Command {
    let command = command.mut_args(|arg| match variable(&arg).filter(|name| secrets.contains_key(name)) {
        Some(name) => {
            let name: &'static str = format!("{name}_FILE").leak();
            arg.env(name).value_parser(ValueParser::os_string())
        }
        None => arg,
    });
    command.mut_subcommands(|command| with_file_variables(command, secrets))
}

fn variable(arg: &Arg) -> Option<String> {
    arg.get_env().map(|name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Subcommand};

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[arg(long, env = "URL_7", hide_env_values = true)]
        url: String,
        #[arg(long, env = "KEYS_7", hide_env_values = true, value_delimiter = ',')]
        keys: Vec<String>,
        #[arg(long, env = "PLAIN_7")]
        plain: Option<String>,
        #[command(subcommand)]
        sub: Sub,
    }

    #[derive(Debug, Subcommand)]
    enum Sub {
        Send {
            #[arg(long, env = "TOKEN_7", hide_env_values = true, required_unless_present = "dry_run")]
            token: Option<String>,
            #[arg(long)]
            dry_run: bool,
            #[arg(long, requires = "token")]
            label: Option<String>,
        },
    }

    #[test]
    fn secrets_are_read_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.into_os_string()
        };
        let (url, keys, token) = (file("url", "postgres://u:p@h/d\n"), file("keys", "a,b\r\n"), file("token", " t "));
        let parse = |variables: &[(&str, &OsString)], args: &[&str]| -> anyhow::Result<String> {
            let env = |name: &str| variables.iter().find(|(set, _)| *set == name).map(|(_, value)| (*value).clone());
            let command = with_secrets(Cli::command(), &read_secrets(&Cli::command(), &env)?);
            let help = command.clone().render_long_help().to_string();
            assert!(!help.contains("u:p"), "{help}");
            let matches = command.try_get_matches_from([&["x"], args].concat())?;
            let Cli { url, keys, plain, sub: Sub::Send { token, .. } } = Cli::from_arg_matches(&matches)?;
            Ok(format!("{url} {keys:?} {plain:?} {token:?}"))
        };
        let files = [("URL_7_FILE", &url), ("KEYS_7_FILE", &keys), ("TOKEN_7_FILE", &token), ("PLAIN_7_FILE", &url)];
        assert_eq!(parse(&files, &["send"]).unwrap(), r#"postgres://u:p@h/d ["a", "b"] None Some(" t ")"#);
        assert_eq!(parse(&files, &["send", "--label", "l"]).unwrap(), parse(&files, &["send"]).unwrap());
        assert_eq!(
            parse(&files, &["--url", "x", "--keys", "c", "send", "--token", "y"]).unwrap(),
            r#"x ["c"] None Some("y")"#
        );
        for (variables, fault) in [
            (&[("URL_7_FILE", &url), ("URL_7", &url)][..], "URL_7 and URL_7_FILE are both set"),
            (&[("TOKEN_7_FILE", &OsString::from("/nowhere"))], "cannot read the file of TOKEN_7_FILE, /nowhere"),
            (&[("URL_7_FILE", &OsString::new())], "--url"),
            (&[("URL_7_FILE", &url)], "--token"),
        ] {
            let error = format!("{:#}", parse(variables, &["send"]).unwrap_err());
            assert!(error.contains(fault), "{error}");
        }
    }
}
