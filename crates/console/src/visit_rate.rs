//! Limits how many pages a visitor may open: pages cost the services as much as requests to the HTTP API, which have a
//! rate limit per key.

use std::{num::NonZeroU32, time::Duration};

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use crate::fault::Fault;

/// How many pages a visitor may open in a burst, and how long it takes until the next full burst. People do not reach
/// the limit; a higher one would let one tenant's script delay the updates of others.
const PAGES: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);
const WINDOW: Duration = Duration::from_secs(5);
/// How many entries of a bucket cost as much as a page.
const ENTRIES_PER_PAGE: usize = 10;
/// Above this number of visitors, those who have not opened a page for a while are forgotten.
const REMEMBERED: usize = 1024;

/// The rates of all visitors: of each session of an operator or viewer, of the API keys of a project, and of its portal
/// links.
#[derive(Debug)]
pub(crate) struct VisitRate(DefaultKeyedRateLimiter<String>);

impl Default for VisitRate {
    fn default() -> Self {
        let period = WINDOW / PAGES.get();
        let quota = Quota::with_period(period).unwrap_or(Quota::per_second(PAGES)).allow_burst(PAGES);
        Self(RateLimiter::keyed(quota))
    }
}

impl VisitRate {
    /// Whether this visitor may open a page now.
    pub(crate) fn admits(&self, visitor: &String) -> bool {
        if self.0.len() > REMEMBERED {
            self.0.retain_recent();
        }
        self.0.check_key(visitor).is_ok()
    }

    /// Whether a page of this visitor may read this many entries of a bucket. Each entry takes a request, so the
    /// entries count as further pages.
    pub(crate) fn admits_entries(&self, visitor: &String, entries: usize) -> bool {
        let pages = NonZeroU32::new(u32::try_from(entries / ENTRIES_PER_PAGE).unwrap_or(u32::MAX));
        pages.is_none_or(|pages| matches!(self.0.check_key_n(visitor, pages), Ok(Ok(()))))
    }
}

const TOO_MANY: &str = "Too many pages were opened within a few seconds. Wait a moment, then reload the page.";

/// The fault of a panel beyond the rate.
pub(crate) fn fault() -> Fault {
    Fault::TooMany(TOO_MANY.into())
}

/// The response to a visitor beyond the rate. It is not a page, because rendering one would cost more than the refusal
/// saves.
pub(crate) fn refusal() -> Response {
    (StatusCode::TOO_MANY_REQUESTS, TOO_MANY).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_a_bucket_count_as_pages() {
        let (rate, visitor, other) = (VisitRate::default(), "project 1".to_owned(), "project 2".to_owned());
        let most = PAGES.get() as usize * ENTRIES_PER_PAGE;

        assert!(rate.admits_entries(&visitor, ENTRIES_PER_PAGE - 1) && rate.admits_entries(&visitor, most / 2));
        assert!(!rate.admits_entries(&visitor, most) && !rate.admits_entries(&visitor, usize::MAX));
        assert!(rate.admits_entries(&visitor, most / 2));
        assert!(!rate.admits(&visitor) && rate.admits(&other));
    }
}
