//! Prints lists that services return page by page.

use clap::Args;
use contract::rpc::{Cursor, MAX_LIMIT, Page, Query};
use serde::Serialize;

use crate::{
    clients::admin::{self, Admin},
    output,
};

#[derive(Debug, Args)]
pub(crate) struct Paging {
    /// Maximum number of rows.
    #[arg(long, default_value_t = 50, conflicts_with = "all")]
    limit: u32,
    /// List all rows.
    #[arg(long)]
    all: bool,
}

impl Paging {
    /// Fetches and prints page by page: a table, or with --json one object per line.
    pub(crate) async fn print<T: Serialize, Q: Query<Reply = Page<T>>, const N: usize>(
        &self,
        admin: &Admin,
        none: &str,
        head: [&str; N],
        query: impl Fn(Option<Cursor>, u32) -> Q,
        row: impl Fn(&T) -> [String; N],
    ) -> anyhow::Result<()> {
        let client = admin.connect().await?;
        let mut left = if self.all { u64::MAX } else { self.limit.into() };
        let (mut cursor, mut printed) = (None, false);
        while left > 0 {
            let limit = u32::try_from(left).unwrap_or(MAX_LIMIT).min(MAX_LIMIT);
            let Page { mut items, next } = admin::request(&client, &query(cursor, limit)).await?;
            items.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= items.len() as u64;
            if admin.json {
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
        if !printed && !admin.json {
            output::say(none);
        }
        if left == 0 && cursor.is_some() {
            output::note("more rows exist; use --limit or --all");
        }
        Ok(())
    }
}
