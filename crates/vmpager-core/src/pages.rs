//! What all who install pages of the same memory share: its slots, its page
//! map, and how much is left to do.
//!
//! Claims and present bits are set by whoever is first. Removals are not:
//! between an installer's look at its claim ([`Pages::still_claimed`]) and its
//! install no removal may be *applied* (`Pages::zeroed`), or bytes of the
//! source would come back to life (I3). An engine alone is one thread; several
//! installers need a gate, shared by those who install, held alone by who
//! reads events and applies them.

use std::ops::Range;

use crate::addr::{PageRun, PageSize};
use crate::page_map::{Content, PageMap, Words};
use crate::present::MapError;
use crate::slot::SlotSet;
use crate::sync::{AtomicU64, Ordering};

/// The pages of one memory.
#[derive(Debug)]
pub struct Pages<W> {
    slots: SlotSet,
    map: PageMap<W>,
    /// Pages whose bytes are still to come from the source: `Source`, or
    /// claimed and absent.
    outstanding: AtomicU64,
    /// Pages in small holes of the source that have no memory yet.
    holes: AtomicU64,
}

impl<W: Words> Pages<W> {
    /// All pages of these slots, to come from the source; the page map lies in
    /// `words`.
    pub(crate) fn new(slots: SlotSet, words: W) -> Self {
        let pages = slots.pages();
        let (outstanding, holes) = (AtomicU64::new(pages), AtomicU64::new(0));
        Self { map: PageMap::new(words, pages), slots, outstanding, holes }
    }

    /// The pages of these slots, as a process that has ended left them in
    /// `words`, of which the `written` ones may be other than zero.
    pub(crate) fn take_over(
        slots: SlotSet,
        words: W,
        written: &[Range<usize>],
    ) -> Result<Self, MapError> {
        let (map, left) = PageMap::take_over(words, slots.pages(), written)?;
        let (outstanding, holes) = (AtomicU64::new(left.outstanding), AtomicU64::new(left.holes));
        Ok(Self { map, slots, outstanding, holes })
    }

    /// The slots.
    pub fn slots(&self) -> &SlotSet {
        &self.slots
    }

    /// The page map.
    pub fn map(&self) -> &PageMap<W> {
        &self.map
    }

    /// Pages whose bytes are still to come from the source.
    pub fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Acquire)
    }

    /// Whether every page that shall have memory has it.
    pub(crate) fn is_complete(&self) -> bool {
        self.outstanding() == 0 && self.holes.load(Ordering::Acquire) == 0
    }

    /// The parts of a claimed run that nobody took away meanwhile: only these
    /// may be installed from the source.
    pub fn still_claimed(&self, run: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let mut page = run.first;
        std::iter::from_fn(move || {
            while page < run.end() {
                let alike = self.map.alike_from(page, run.end() - page);
                let part = PageRun::new(page, alike);
                page += alike;
                let claimed = self.map.content(part.first) == Content::Claimed;
                if claimed && !self.map.is_present(part.first) {
                    return Some(part);
                }
            }
            None
        })
    }

    /// Pages have their contents.
    pub fn installed(&self, run: PageRun) {
        let mut page = run.first;
        while page < run.end() {
            let alike = self.map.alike_from(page, run.end() - page);
            let part = PageRun::new(page, alike);
            let from_source = self.map.content(page) == Content::Claimed;
            let new = self.map.publish(part);
            if from_source {
                self.outstanding.fetch_sub(new, Ordering::AcqRel);
            } else {
                self.holes.fetch_sub(self.map.clear_holes(part), Ordering::AcqRel);
            }
            page += alike;
        }
    }

    /// Claimed pages cannot be had.
    pub(crate) fn poisoned(&self, run: PageRun) {
        self.outstanding.fetch_sub(self.map.poison(run), Ordering::AcqRel);
    }

    /// The run's pages read as zeroes from now on.
    pub(crate) fn zeroed(&self, run: PageRun) {
        self.outstanding.fetch_sub(self.map.mark_zero(run), Ordering::AcqRel);
        self.holes.fetch_sub(self.map.clear_holes(run), Ordering::AcqRel);
    }

    /// These zero pages shall have memory: they lie in a small hole of the source,
    /// or are known to be used. To be said before others install.
    pub(crate) fn small_hole(&self, run: PageRun) {
        let known = self.map.clear_holes(run);
        self.map.mark_holes(run);
        self.holes.fetch_add(run.count - known, Ordering::AcqRel);
    }

    /// The zero pages of a run of base pages that are absent shall have memory.
    /// Returns the first of them.
    pub(crate) fn give_zeroes(&self, run: PageRun) -> Option<u64> {
        let (slot, _) = self.slots.slot_of(run.first);
        if slot.page_size != PageSize::Size4K {
            return None;
        }
        let (mut first, mut page) = (None, run.first);
        while page < run.end() {
            let part = PageRun::new(page, self.map.alike_from(page, run.end() - page));
            if self.map.content(page) == Content::Zero && !self.map.is_present(page) {
                self.small_hole(part);
                first.get_or_insert(page);
            }
            page = part.end();
        }
        first
    }
}
