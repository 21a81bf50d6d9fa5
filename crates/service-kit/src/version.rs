//! The features of a NATS server, by its version.

use async_nats::jetstream::stream::Config;

/// The version of a NATS server: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerVersion(Option<(u32, u32, u32)>);

impl ServerVersion {
    /// Reads a version such as `2.10.3`, or `2.12.0-dev` between releases. A version that cannot be read counts as an
    /// old one.
    pub fn parse(version: &str) -> Self {
        let mut parts = version.trim().trim_start_matches('v').split(['.', '-', '+']);
        let mut number = || parts.next()?.parse().ok();
        Self((|| Some((number()?, number()?, number().unwrap_or(0))))())
    }

    /// Whether streams may allow atomic batches (NATS ADR-50). A server before 2.12 may reject the setting.
    fn supports_atomic_batches(self) -> bool {
        self >= Self(Some((2, 12, 0)))
    }

    /// The settings of a stream that this server supports.
    pub fn supported(self, config: Config) -> Config {
        Config { allow_atomic_publish: config.allow_atomic_publish && self.supports_atomic_batches(), ..config }
    }

    /// Whether an atomic batch is synced as a whole. Before 2.15 each of its messages is synced, and batches gain
    /// nothing.
    pub fn syncs_batches_as_one(self) -> bool {
        self >= Self(Some((2, 15, 0)))
    }

    /// The limitations of a server of this version, for an operator. A feature may also be switched off: only the
    /// system account can see how often JetStream syncs.
    pub fn limitations(self) -> Vec<&'static str> {
        let mut limitations = Vec::new();
        if self.0.is_none() {
            limitations.push("its version is unknown, so it is treated as an old one");
        }
        if self < Self(Some((2, 10, 0))) {
            limitations.push(
                "JetStream acknowledges before it syncs: an accepted update survives the crash of any process, but not a \
                 power cut (2.10 and later survive it with sync_interval: always)",
            );
        } else if !self.syncs_batches_as_one() {
            limitations.push(
                "with sync_interval: always every message is synced by itself: few updates a second (2.15 and later sync a \
                 batch as a whole)",
            );
        }
        if self < Self(Some((2, 10, 5))) {
            limitations.push(
                "a nearly full stream may drop its oldest entry instead of refusing a new one: entries that are not applied \
                 are then lost, and lead-state halts (2.10.5 and later refuse)",
            );
        }
        if !self.is_safe_for_producers() {
            limitations.push(
                "it has published faults by which a user of one account harms another (2.12.12, 2.14.3 and later are without \
                 them): no producers of others should have access",
            );
        }
        limitations
    }

    /// Whether the server has fixes for the faults that let a user leave its account or exceed its permissions;
    /// docs/operations/nats.md names them.
    fn is_safe_for_producers(self) -> bool {
        self >= Self(Some((2, 14, 3))) || (Self(Some((2, 12, 12))) <= self && self < Self(Some((2, 13, 0))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn older_versions_have_limitations() {
        let limitations = |version| ServerVersion::parse(version).limitations();
        let unknown = ["", "dev", "v", "2", "2.x", "-1.2", "99999999999.0.0", "two.ten"];
        assert!(
            unknown
                .iter()
                .all(|version| limitations(version).len() == 4 && limitations(version)[1].contains("power cut"))
        );
        let acks_early = ["2.9.10", "v2.9.25", "1.4.1", "2.9.10-RC.1", "2.2"];
        assert!(
            acks_early
                .iter()
                .all(|version| limitations(version).len() == 3 && limitations(version)[0].contains("power cut"))
        );
        let drops = ["2.10.0", "2.10.0-beta.1", "v2.10", "2.10.4"];
        assert!(
            drops
                .iter()
                .all(|version| limitations(version).len() == 3 && limitations(version)[1].contains("nearly full"))
        );
        let syncs_singly = ["2.10.5", " v2.11.3\n", "2.11.0+build.7", "v2.12", "2.14.2"];
        assert!(
            syncs_singly
                .iter()
                .all(|version| limitations(version).len() == 2 && limitations(version)[0].contains("itself"))
        );
        for version in ["2.12.12", "2.14.3", "2.14.9"] {
            assert_eq!(limitations(version).len(), 1, "{version}");
        }
        for version in ["2.15.0", "2.15.1", "v2.16.0-preview.2", "2.100.0", "3.0"] {
            assert!(limitations(version).is_empty(), "{version}");
        }
    }

    #[test]
    fn batches_exist_from_2_12_and_help_from_2_15() {
        for (version, knows, pays) in [
            ("", false, false),
            ("2.9.10", false, false),
            ("2.11.9", false, false),
            ("v2.12", true, false),
            ("2.14.0-RC.2", true, false),
            ("2.15.1", true, true),
        ] {
            let parsed = ServerVersion::parse(version);
            let can = (parsed.supports_atomic_batches(), parsed.syncs_batches_as_one());
            assert_eq!(can, (knows, pays), "{version}");
        }
    }
    proptest! {
        #[test]
        fn arbitrary_versions_never_panic_and_later_ones_have_no_more_limitations(text in ".*", major: u32, minor: u32, patch: u32) {
            let _ = ServerVersion::parse(&text).limitations();
            let parsed = ServerVersion::parse(&format!("v{major}.{minor}.{patch}{text}"));
            let later = ServerVersion::parse(&format!("{}.0.0", major.saturating_add(1)));
            prop_assert!(later.limitations().len() <= parsed.limitations().len());
        }
    }
}
