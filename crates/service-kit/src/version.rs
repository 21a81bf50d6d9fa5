//! What NATS can promise depends on the server's version.

use async_nats::jetstream::stream::Config;

/// The version of a NATS server: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerVersion(Option<(u32, u32, u32)>);

impl ServerVersion {
    /// Reads a version as servers tell it, such as `2.10.3`, or `2.12.0-dev` between releases; what cannot be read is
    /// a server that can do nothing special.
    pub fn parse(version: &str) -> Self {
        let mut parts = version.trim().trim_start_matches('v').split(['.', '-', '+']);
        let mut number = || parts.next()?.parse().ok();
        Self((|| Some((number()?, number()?, number().unwrap_or(0))))())
    }

    /// Whether streams may allow atomic batches (NATS ADR-50). A server before 2.12 may refuse to hear of it.
    fn knows_atomic_batches(self) -> bool {
        self >= Self(Some((2, 12, 0)))
    }

    /// Whether streams may allow fast-ingest batches (of the same ADR).
    pub fn knows_fast_ingest(self) -> bool {
        self >= Self(Some((2, 14, 0)))
    }

    /// What this server knows of a stream's settings.
    pub fn known_of(self, config: Config) -> Config {
        Config {
            allow_atomic_publish: config.allow_atomic_publish && self.knows_atomic_batches(),
            allow_batch_publish: config.allow_batch_publish && self.knows_fast_ingest(),
            ..config
        }
    }

    /// Whether an atomic batch is synced as one. Before 2.15 each of its messages is, and batches gain nothing.
    pub fn syncs_batches_as_one(self) -> bool {
        self >= Self(Some((2, 15, 0)))
    }

    /// What a server of this version cannot give, in words for an operator. What it could give may still be switched
    /// off: JetStream tells nobody outside the system account how often it syncs.
    pub fn cannot(self) -> Vec<&'static str> {
        let mut lacks = Vec::new();
        if self.0.is_none() {
            lacks.push("its version is not known, so it is taken for an old one");
        }
        if self < Self(Some((2, 10, 0))) {
            lacks.push(
                "JetStream acks before it syncs: an accepted update survives the crash of any process, but not a power \
                 cut (2.10 and later can: sync_interval: always)",
            );
        } else if !self.syncs_batches_as_one() {
            lacks.push(
                "with sync before ack every message is synced by itself: few updates a second (2.15 and later sync a \
                 batch as one)",
            );
        }
        if self < Self(Some((2, 10, 5))) {
            lacks.push(
                "a stream that is all but full may drop its oldest entry instead of refusing a new one: what is not applied \
                 then is lost, and lead-state halts (2.10.5 and later refuse)",
            );
        }
        lacks
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_version_cannot_give() {
        let cannot = |version| ServerVersion::parse(version).cannot();
        let unknown = ["", "dev", "v", "2", "2.x", "-1.2", "99999999999.0.0", "two.ten"];
        assert!(unknown.iter().all(|version| cannot(version).len() == 3 && cannot(version)[1].contains("power cut")));
        let acks_early = ["2.9.10", "v2.9.25", "1.4.1", "2.9.10-RC.1", "2.2"];
        assert!(
            acks_early.iter().all(|version| cannot(version).len() == 2 && cannot(version)[0].contains("power cut"))
        );
        let drops = ["2.10.0", "2.10.0-beta.1", "v2.10", "2.10.4"];
        assert!(drops.iter().all(|version| cannot(version).len() == 2 && cannot(version)[1].contains("all but full")));
        let syncs_singly = ["2.10.5", " v2.11.3\n", "2.11.0+build.7", "v2.12", "2.14.2"];
        assert!(syncs_singly.iter().all(|version| cannot(version).len() == 1 && cannot(version)[0].contains("itself")));
        for all in ["2.15.0", "2.15.1", "v2.16.0-preview.2", "2.100.0", "3.0"] {
            assert!(cannot(all).is_empty(), "{all}");
        }
    }

    #[test]
    fn batches_come_with_2_12_and_pay_from_2_15_on() {
        for (version, knows, ingests, pays) in [
            ("", false, false, false),
            ("2.9.10", false, false, false),
            ("2.11.9", false, false, false),
            ("v2.12", true, false, false),
            ("2.14.0-RC.2", true, true, false),
            ("2.15.1", true, true, true),
        ] {
            let parsed = ServerVersion::parse(version);
            let can = (parsed.knows_atomic_batches(), parsed.knows_fast_ingest(), parsed.syncs_batches_as_one());
            assert_eq!(can, (knows, ingests, pays), "{version}");
        }
    }
    proptest! {
        #[test]
        fn arbitrary_versions_never_panic_and_a_later_one_can_as_much(text in ".*", major: u32, minor: u32, patch: u32) {
            let _ = ServerVersion::parse(&text).cannot();
            let parsed = ServerVersion::parse(&format!("v{major}.{minor}.{patch}{text}"));
            let later = ServerVersion::parse(&format!("{}.0.0", major.saturating_add(1)));
            prop_assert!(later.cannot().len() <= parsed.cannot().len());
        }
    }
}
