//! How many pages a visitor may open: reading them costs the services as much as reading over the HTTP API, which has a rate
//! per key.

use std::{num::NonZeroU32, time::Duration};

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

/// How many pages a visitor may open at once, and how long it takes until all may be opened again. People do not reach it;
/// more would let one tenant's script delay the updates of others.
const PAGES: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);
const WINDOW: Duration = Duration::from_secs(5);
/// Above so many visitors, those who have not opened a page for a while are forgotten.
const REMEMBERED: usize = 1024;

/// The rates of all visitors: of each session of an operator, of the API keys of a project, and of its portal links.
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
}

/// The answer to a visitor beyond the rate. Not a page, which would cost more than the refusal saves.
pub(crate) fn refusal() -> Response {
    let text = "Too many pages were opened within a few seconds. Wait a moment, then reload the page.";
    (StatusCode::TOO_MANY_REQUESTS, text).into_response()
}
