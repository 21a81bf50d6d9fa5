//! Lists that come in pages: as many pages as it takes, printed as they come.

use clap::Args;
use contract::{
    Timestamp,
    rpc::{Cursor, MAX_LIMIT, Page},
};
use serde::Serialize;
use service_kit::clock;

use crate::output;

/// How much of a list is wanted.
#[derive(Debug, Args)]
pub(crate) struct Paging {
    /// How many are listed at most.
    #[arg(long, default_value_t = 50, conflicts_with = "all")]
    limit: u32,
    /// All, however many there are.
    #[arg(long)]
    all: bool,
}

impl Paging {
    /// Asks page by page, and prints each: a table for people, one JSON object a line for programs.
    pub(crate) async fn print<T: Serialize, const N: usize>(
        &self,
        json: bool,
        none: &str,
        head: [&str; N],
        ask: impl AsyncFn(Option<Cursor>, u32) -> anyhow::Result<Page<T>>,
        row: impl Fn(&T) -> [String; N],
    ) -> anyhow::Result<()> {
        let mut left = if self.all { u64::MAX } else { self.limit.into() };
        let (mut cursor, mut printed) = (None, false);
        while left > 0 {
            let limit = u32::try_from(left).unwrap_or(MAX_LIMIT).min(MAX_LIMIT);
            let Page { mut items, next } = ask(cursor, limit).await?;
            items.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= items.len() as u64;
            if json {
                items.iter().try_for_each(output::json)?;
            } else if !items.is_empty() {
                let rows = items.iter().map(&row).collect::<Vec<_>>();
                output::say(output::table((!printed).then_some(head), &rows));
            }
            printed |= !items.is_empty();
            cursor = next;
            if cursor.is_none() {
                break;
            }
        }
        if !printed && !json {
            output::say(none);
        }
        if left == 0 && cursor.is_some() {
            // Beside the list, not in it.
            eprintln!("leadctl: there are more; --limit or --all shows them");
        }
        Ok(())
    }
}

/// A time, or how long ago.
pub(crate) fn since(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(clock::now().minus(ago));
    }
    text.parse().map_err(|_| "must be a time such as 2026-01-12T04:55:59Z, or how long ago, such as 1d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_or_how_long_ago() {
        assert_eq!(since("2026-01-12T04:55:59Z"), Ok(Timestamp::from_millis(1_768_193_759_000)));
        let then = since("1h").unwrap();
        let ago = clock::now().millis() - then.millis();
        assert!((3_600_000..3_660_000).contains(&ago), "{ago}");
        assert!(since("yesterday").is_err());
    }
}
