//! leadctl as a process.

use contract::rpc::RecoveryStatus;
use serde_json::Value;
use test_support::{binary, eventually};
use tokio::process::Command;

use super::{Stack, TEST_TIMEOUT};

/// How a run of leadctl ended, and what it printed.
#[derive(Debug)]
pub(crate) struct LeadctlRun {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl LeadctlRun {
    /// Runs a command to its end.
    pub(crate) async fn of(mut command: Command) -> Self {
        let output = command.kill_on_drop(true).output().await.expect("leadctl");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        let code = output.status.code().unwrap_or_else(|| panic!("{}", output.status));
        Self { code, stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Both outputs.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// The output of `--json`, one value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The output of `--json`, one value per line.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {self:?}"))).collect()
    }

    #[track_caller]
    pub(crate) fn assert_code(self, expected: i32) -> Self {
        assert_eq!(self.code, expected, "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn assert_ok(self) -> Self {
        self.assert_code(0)
    }

    /// Asserts that the command failed with this message.
    #[track_caller]
    pub(crate) fn assert_fails(self, why: &str) -> Self {
        assert!(self.code != 0 && self.text().contains(why), "expected {why:?}: {self:?}");
        self
    }

    /// Asserts that the command printed all of these texts.
    #[track_caller]
    pub(crate) fn assert_prints(self, texts: &[&str]) -> Self {
        let printed = self.text();
        for text in texts {
            assert!(printed.contains(text), "{text:?} is not in {printed}");
        }
        self
    }
}

impl Stack {
    /// A command of leadctl whose environment refers to this stack.
    pub(crate) fn leadctl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary("leadctl"));
        command.env("NATS_URL", self.nats_url()).env("DATABASE_URL", &self.database_url);
        command.env("LEADRELAY_GATEWAY_URL", &self.api.url).env("LEADRELAY_API_KEY", &self.api.key);
        command.args(args);
        command
    }

    pub(crate) async fn leadctl(&self, args: &[&str]) -> LeadctlRun {
        LeadctlRun::of(self.leadctl_command(args)).await
    }

    /// Runs leadctl for this stack's project.
    pub(crate) async fn leadctl_of_project(&self, args: &[&str]) -> LeadctlRun {
        self.leadctl(&[args, &["--project", &self.api.project_id.to_string()]].concat()).await
    }

    /// Runs `leadctl dead-letters`, which must succeed, and returns its JSON.
    pub(crate) async fn dead_letters_json(&self, args: &[&str]) -> Value {
        self.leadctl(&[&["dead-letters"], args, &["--json"]].concat()).await.assert_ok().json()
    }

    /// Waits until leadctl lists this many dead letters, and returns them, the newest first.
    pub(crate) async fn wait_for_letters(&self, count: usize) -> Vec<Value> {
        eventually(TEST_TIMEOUT, "the dead letters", async || {
            let listed = self.dead_letters_json(&["list", "--limit", "1000"]).await;
            let letters = listed["letters"].as_array().expect("letters").clone();
            if letters.len() == count { Ok(letters) } else { Err(format!("{letters:?}")) }
        })
        .await
    }

    /// Waits until lead-state is halted for this reason.
    pub(crate) async fn wait_for_halt(&self, reason: &str) -> RecoveryStatus {
        eventually(TEST_TIMEOUT, reason, async || {
            let run = self.leadctl(&["recover", "--json"]).await;
            let recovery: RecoveryStatus = serde_json::from_str(&run.stdout).map_err(|_| run.text())?;
            match &recovery.halted {
                Some(halted) if halted.reason == reason => Ok(recovery),
                _ => Err(run.text()),
            }
        })
        .await
    }
}

/// The number of a dead letter that leadctl listed.
pub(crate) fn letter_number(letter: &Value) -> String {
    letter["number"].to_string()
}
