//! The open streams of live pages: how many there are, and the last snapshot of each page.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use contract::Timestamp;
use tokio::{sync::Semaphore, time::Instant};

/// Most streams of one process. More cost memory and queries; a page without a stream says that it is not live.
const MAX_STREAMS: usize = 256;
/// Most streams of one visitor (all keys and portal links of a project, or one session of an operator). More would
/// leave too few for others.
const MAX_STREAMS_PER_VISITOR: usize = MAX_STREAMS / 2;
/// Most streams of one session. Browsers open six connections to a server: more streams would leave none for pages.
const MAX_STREAMS_PER_SESSION: usize = 4;
/// Most pages that are rendered for streams at the same time. More delay the pages that people open.
const MAX_RENDERS: usize = 4;

/// The open streams.
#[derive(Debug)]
pub(crate) struct Live {
    open: Mutex<Open>,
    pub(crate) renders: Semaphore,
}

impl Default for Live {
    fn default() -> Self {
        Self { open: Mutex::default(), renders: Semaphore::new(MAX_RENDERS) }
    }
}

#[derive(Debug, Default)]
struct Open {
    streams: usize,
    /// The number of streams by session, and by visitor.
    holders: HashMap<String, usize>,
    pages: HashMap<PageKey, (usize, Arc<SharedPage>)>,
}

/// Identifies the content of a page: the identity of the visitor's role, and the path with its query.
pub(crate) type PageKey = (String, String);

/// The last snapshot of a page. The stream that renders holds the lock during its queries; the other streams wait for
/// its result.
type SharedPage = tokio::sync::Mutex<Option<Snapshot>>;

/// A page as it was rendered last.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) fragments: Arc<[Fragment]>,
    pub(crate) at: Timestamp,
    /// When the next one is due.
    pub(crate) due: Instant,
    /// Whether the page has its final content.
    pub(crate) is_final: bool,
}

/// A part of a page that is sent when it changed.
#[derive(Debug)]
pub(crate) struct Fragment {
    pub(crate) html: String,
    pub(crate) hash: u64,
}

impl Fragment {
    pub(crate) fn new(html: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        html.hash(&mut hasher);
        Self { html: html.to_owned(), hash: hasher.finish() }
    }
}

/// The place of one stream among [`MAX_STREAMS`].
#[derive(Debug)]
pub(crate) struct Place {
    live: Arc<Live>,
    holders: [String; 2],
    key: PageKey,
    pub(crate) page: Arc<SharedPage>,
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a stream of a page. None if the session or the visitor has too many streams open, or if all places
    /// are taken.
    pub(crate) fn place(self: &Arc<Self>, holders: [String; 2], key: PageKey) -> Option<Place> {
        let mut open = self.lock();
        let held = |holder: &str| open.holders.get(holder).copied().unwrap_or_default();
        let is_full = held(&holders[0]) >= MAX_STREAMS_PER_SESSION || held(&holders[1]) >= MAX_STREAMS_PER_VISITOR;
        if open.streams >= MAX_STREAMS || is_full {
            return None;
        }
        open.streams += 1;
        for holder in &holders {
            *open.holders.entry(holder.clone()).or_default() += 1;
        }
        let (streams, page) = open.pages.entry(key.clone()).or_default();
        *streams += 1;
        Some(Place { live: self.clone(), holders, key, page: page.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.live.lock();
        open.streams -= 1;
        for holder in &self.holders {
            if let Some(streams) = open.holders.get_mut(holder) {
                *streams -= 1;
            }
        }
        if let Some((streams, _)) = open.pages.get_mut(&self.key) {
            *streams -= 1;
        }
        open.holders.retain(|_, streams| *streams > 0);
        open.pages.retain(|_, (streams, _)| *streams > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_bounded_and_leave_nothing_behind() {
        let live = Arc::new(Live::default());
        let open = |project: usize, session: usize| {
            let holders = [format!("session {session} of {project}"), format!("project {project}")];
            live.place(holders, (format!("key of {project}"), "/p/1?status=failed".into()))
        };

        let mut places: Vec<_> = (0..MAX_STREAMS_PER_SESSION).map(|_| open(1, 0).expect("a place")).collect();
        assert!(open(1, 0).is_none() && open(1, 1).is_some());
        for project in [1, 2] {
            let held = places.len();
            let left = project * MAX_STREAMS_PER_VISITOR - held;
            places.extend((0..left).map(|token| open(project, 2 + token).expect("a place")));
            assert!(open(project, 1).is_none(), "a project has half of them");
        }
        assert!(open(3, 0).is_none());
        drop(places);

        let open = live.lock();
        assert_eq!((open.streams, open.holders.len(), open.pages.len()), (0, 0, 0));
    }
}
