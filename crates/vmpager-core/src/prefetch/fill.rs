//! All pages, one after the other.

use super::{Pace, Prefetch};
use crate::addr::PageRun;

/// Brings in every page, in the order of the page map.
#[derive(Debug)]
pub struct Fill {
    /// Every page below this one has had its turn.
    at: u64,
    pages: u64,
    pace: Pace,
}

impl Fill {
    /// Of a page map of so many pages.
    pub fn new(pages: u64) -> Self {
        Self { at: 0, pages, pace: Pace::new() }
    }

    /// The pages from this one on shall have their turn once more.
    pub fn again_from(&mut self, page: u64) {
        self.at = self.at.min(page);
    }

    /// How many base pages to bring in before faults are looked for again.
    pub fn piece(&mut self) -> u64 {
        self.pace.next_pages()
    }
}

impl Prefetch for Fill {
    fn interrupted(&mut self) {
        self.pace.demanded();
    }

    fn next(&self) -> Option<PageRun> {
        (self.at < self.pages).then(|| PageRun::new(self.at, self.pages - self.at))
    }

    fn took(&mut self, until: u64) {
        self.at = until.clamp(self.at, self.pages);
    }
}
