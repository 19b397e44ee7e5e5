//! What the engine should have decided, and should know.

use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{Content, FillPlan, PageRun, PageSize};

use super::{Memory, Page, World, at};
use crate::world::Outcome;

impl World {
    /// Where the neighbours of a fault may lie; counts the fault.
    pub(super) fn window(&mut self, page: u64) -> PageRun {
        let p = self.pages[at(page)];
        if p.size == PageSize::Size2M || self.policy == NeighbourPolicy::Off {
            return PageRun::new(page, 1);
        }
        let shift = &mut self.windows[at(page / 512)];
        let size = 1 << *shift;
        // From 64 pages on, the next is all of the region.
        *shift = if *shift < 6 { *shift + 1 } else { 9 };
        let first = (page / size * size).max(p.slot.first);
        let end = ((page / size + 1) * size).min(p.slot.end());
        PageRun::new(first, end - first)
    }

    /// A fetch takes the free pages around the demanded one, all those in the
    /// window that touch it.
    pub(super) fn check_neighbours(&mut self, page: u64, run: PageRun) {
        let window = self.window(page);
        let free = |&i: &u64| {
            let p = &self.pages[at(i)];
            !p.present && p.content == Content::Source
        };
        let down = (window.first..page).rev().take_while(free).count() as u64;
        let up = (page..window.end()).take_while(free).count() as u64;
        assert_eq!(run, PageRun::new(page - down, down + up), "page {page} in {window:?}");
        self.owe(window, run);
    }

    /// The rest of a window comes later.
    pub(super) fn owe(&mut self, window: PageRun, run: PageRun) {
        if window != run {
            self.owed.push_back(window);
            let old = self.owed.len().saturating_sub(32);
            self.owed.drain(..old);
        }
    }

    pub(super) fn outstanding(&self) -> u64 {
        let due = |p: &&Page| !p.present && matches!(p.content, Content::Source | Content::Claimed);
        self.pages.iter().filter(due).count() as u64
    }

    /// Compares all the engine knows with what it ought to know.
    pub(crate) fn check(&self) {
        let map = self.engine.map();
        assert_eq!(self.engine.outstanding(), self.outstanding());
        for (i, p) in (0..).zip(&self.pages) {
            assert_eq!((map.is_present(i), map.content(i)), (p.present, p.content), "page {i}");
        }
        let holes = (0..).zip(&self.pages).filter(|(_, p)| p.hole).map(|(i, _)| i);
        assert_eq!(self.map_holes(), holes.collect::<Vec<u64>>());
        for page in &self.waiting {
            let heard = self.messages.contains(page)
                || self.postponed.contains(page)
                || self.reads.iter().any(|run| run.pages().contains(page));
            assert!(heard, "nobody will wake who waits for page {page}");
        }
    }

    fn map_holes(&self) -> Vec<u64> {
        let (map, mut pages, mut from) = (self.engine.map(), Vec::new(), 0);
        while let Some(run) = map.next_holes(PageRun::new(from, map.pages() - from)) {
            pages.extend(run.pages());
            from = run.end();
        }
        pages
    }

    /// Lets everything come to rest, and checks that nobody waits and nothing
    /// is missing.
    pub(crate) fn run_out(&mut self) {
        for _ in 0..10 * self.pages.len() + 1000 {
            self.deliver_event();
            self.let_go();
            self.zap();
            self.deliver_faults();
            if !self.reads.is_empty() {
                self.end_read(0, Outcome::Install);
            }
            let filled = self.fill(16) == FillPlan::Complete;
            self.check();
            if filled && self.is_quiet() {
                return self.check_at_rest();
            }
        }
        panic!("no end: {:?} wait, {:?} in flight", self.waiting, self.reads);
    }

    /// Nothing is under way. (The fill may be complete before that: a read
    /// whose pages were all given back is still in flight then.)
    fn is_quiet(&self) -> bool {
        let removals = self.unread.len() + self.stopped.len() + self.zapping.len();
        let faults = self.waiting.len() + self.messages.len() + self.postponed.len();
        removals + faults + self.reads.len() == 0
    }

    fn check_at_rest(&mut self) {
        for page in 0..self.pages.len() as u64 {
            let p = self.pages[at(page)];
            let sound = match p.content {
                Content::Claimed => p.present && p.memory != Memory::Absent || p.must_be_zero,
                // A large hole stays absent; who has memory keeps it.
                Content::Zero => {
                    p.must_be_zero && !p.hole && (p.memory == Memory::Zero) >= p.present
                        || p.given_back
                }
                Content::Poisoned => true,
                Content::Source => false,
            };
            assert!(sound, "page {page}: {p:?}");
            self.touch(page);
        }
    }
}
