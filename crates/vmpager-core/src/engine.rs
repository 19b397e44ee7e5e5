//! The engine: events in (a fault, a removal, a finished read), plans out. It
//! belongs to the one thread that reads the userfaultfd's events, which is what
//! makes trap 1 of userfaultfd harmless: between the engine's answer and the
//! install that follows no event can have been read, so either nothing changed
//! or the kernel refuses the install with EAGAIN.
//!
//! The life of a fetch:
//!
//! ```text
//!   fault / next_fill -> Fetch(run)       the run is claimed
//!       -> read; for each of still_claimed(run): install
//!             -> installed(part)          present
//!             -> released(part)           could not now: ask again
//!             -> poisoned(part)           cannot ever
//! ```

use std::sync::Arc;

use crate::addr::{ByteRange, Hva, PageRun, PageSize};
use crate::page_map::{Content, PageMap, Words};
use crate::pages::Pages;
use crate::prefetch::{FillPace, NeighbourPolicy, Neighbours};
use crate::slot::SlotSet;

/// What to do about a missing fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPlan {
    /// Read these pages and install them; they are claimed. `page` is the
    /// demanded one.
    Fetch {
        /// The demanded page.
        page: u64,
        /// The claimed run, which holds it.
        run: PageRun,
    },
    /// Install zeroes.
    Zero(PageRun),
    /// The page is being fetched: its install will wake the waiter.
    InFlight(u64),
    /// The page was installed, and yet somebody found it missing: either the
    /// message was sent just before the install, or the page was given back
    /// since. Offer a zero page: the kernel takes it only if the page is
    /// absent, and then zero is what it must read.
    Confirm(u64),
    /// The page cannot be had.
    Poisoned(u64),
}

/// The next step of the background fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillPlan {
    /// Read these pages and install them; they are claimed.
    Fetch(PageRun),
    /// Install zeroes.
    Zero(PageRun),
    /// Nothing left to claim, but reads are still in flight.
    Wait,
    /// Every page that shall have memory has it.
    Complete,
}

/// Takes the decisions for the memory one userfaultfd serves.
#[derive(Debug)]
pub struct Engine<W> {
    pages: Arc<Pages<W>>,
    neighbours: Neighbours,
    pace: FillPace,
    /// No page below this is `Source`, or a hole whose turn has not come.
    cursor: u64,
}

/// Base pages in 2 MiB.
const HUGE_PAGE: u64 = 512;

impl<W: Words> Engine<W> {
    /// An engine for these slots, with a page map in `words` (zeroed, and as
    /// many as [`page_map::words_for`](crate::page_map::words_for) says).
    pub fn new(slots: SlotSet, words: W, neighbours: NeighbourPolicy) -> Self {
        let count = slots.pages();
        Self {
            pages: Arc::new(Pages::new(slots, words)),
            neighbours: Neighbours::new(neighbours, count),
            pace: FillPace::new(),
            cursor: 0,
        }
    }

    /// The slots served.
    pub fn slots(&self) -> &SlotSet {
        self.pages.slots()
    }

    /// The page map.
    pub fn map(&self) -> &PageMap<W> {
        self.pages.map()
    }

    /// What other installers of the same memory share with this engine.
    pub fn pages(&self) -> &Arc<Pages<W>> {
        &self.pages
    }

    /// Pages whose bytes are still to come from the source.
    pub fn outstanding(&self) -> u64 {
        self.pages.outstanding()
    }

    /// Somebody waits for the page at `hva`. `None` if no slot is there.
    pub fn fault(&mut self, hva: Hva) -> Option<FaultPlan> {
        let page = self.slots().page_at(hva)?;
        self.demanded();
        Some(self.plan(page))
    }

    /// Somebody waits, here or in other memory: keep the next piece of the fill
    /// small.
    pub fn demanded(&mut self) {
        self.pace.demanded();
    }

    /// What to do now about a page somebody waits for.
    pub fn plan(&mut self, page: u64) -> FaultPlan {
        loop {
            if self.pages.map().is_present(page) {
                return FaultPlan::Confirm(page);
            }
            match self.pages.map().content(page) {
                Content::Source => {
                    let window = self.window(page);
                    let up = self.pages.map().claim_up(page, window.end() - page);
                    if up == 0 {
                        continue; // somebody else was faster: look again
                    }
                    let down = self.pages.map().claim_down(page, page - window.first);
                    return FaultPlan::Fetch { page, run: PageRun::new(page - down, down + up) };
                }
                Content::Claimed => return FaultPlan::InFlight(page),
                Content::Zero => {
                    let window = self.window(page);
                    let count = self.pages.map().alike_from(page, window.end() - page);
                    return FaultPlan::Zero(PageRun::new(page, count));
                }
                Content::Poisoned => return FaultPlan::Poisoned(page),
            }
        }
    }

    fn window(&mut self, page: u64) -> PageRun {
        let (slot, bounds) = self.pages.slots().slot_of(page);
        match slot.page_size {
            PageSize::Size4K => self.neighbours.window(page, bounds),
            PageSize::Size2M => PageRun::new(page, 1),
        }
    }

    /// How many base pages the background fill may bring in before faults are
    /// looked for again.
    pub fn fill_piece(&mut self) -> u64 {
        self.pace.next_pages()
    }

    /// The next pages to fill, `most` at most (and at least one huge page, in
    /// slots of such): claimed, if they are to be fetched.
    pub fn next_fill(&mut self, most: u64) -> FillPlan {
        let source = self.pages.map().next_source(self.cursor);
        let hole = self.pages.map().next_holes(self.cursor);
        match (source, hole) {
            (Some(page), Some(hole)) if hole.first < page => self.fill_hole(hole, most),
            (Some(page), _) => self.fill_from(page, most),
            (None, Some(hole)) => self.fill_hole(hole, most),
            (None, None) => {
                self.cursor = self.pages.map().pages();
                if self.pages.is_complete() { FillPlan::Complete } else { FillPlan::Wait }
            }
        }
    }

    fn fill_from(&mut self, first: u64, most: u64) -> FillPlan {
        let (slot, bounds) = self.pages.slots().slot_of(first);
        let most = match slot.page_size {
            // Never across 2 MiB: one slow read holds up no more.
            PageSize::Size4K => most.min(HUGE_PAGE - first % HUGE_PAGE),
            PageSize::Size2M => 1,
        };
        let count = self.pages.map().claim_up(first, most.min(bounds.end() - first));
        self.cursor = first + count;
        match count {
            0 => FillPlan::Wait, // somebody else was faster
            _ => FillPlan::Fetch(PageRun::new(first, count)),
        }
    }

    fn fill_hole(&mut self, hole: PageRun, most: u64) -> FillPlan {
        let (_, bounds) = self.pages.slots().slot_of(hole.first);
        let count = hole.count.min(most).min(bounds.end() - hole.first);
        let run = PageRun::new(hole.first, count);
        self.cursor = run.end();
        FillPlan::Zero(run)
    }

    /// The parts of a claimed run that nobody took away meanwhile: only these
    /// may be installed from the source.
    pub fn still_claimed(&self, run: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        self.pages.still_claimed(run)
    }

    /// Pages have their contents.
    pub fn installed(&mut self, run: PageRun) {
        self.pages.installed(run);
    }

    /// Claimed pages could not be installed this time; they will be asked for
    /// again.
    pub fn released(&mut self, run: PageRun) {
        self.pages.map().release(run);
        self.cursor = self.cursor.min(run.first);
    }

    /// Claimed pages cannot be had.
    pub fn poisoned(&mut self, run: PageRun) {
        self.pages.poisoned(run);
    }

    /// The pages of a range of host addresses were given back: they read as
    /// zeroes from now on.
    pub fn removed(&mut self, start: Hva, end: Hva) -> u64 {
        let mut count = 0;
        for run in self.pages.slots().runs_within(start, end) {
            self.pages.zeroed(run);
            count += run.count;
        }
        count
    }

    /// A page that [`FaultPlan::Confirm`] asked about was absent, and has a zero
    /// page now.
    pub fn replaced_by_zero(&mut self, page: u64) {
        let run = PageRun::new(page, 1);
        self.pages.zeroed(run);
        self.pages.map().publish(run);
    }

    /// A range of the source is known to be zeroes.
    ///
    /// The background fill gives memory to holes below 2 MiB: they lie among
    /// pages that are used, where an absent page costs the guest a host fault
    /// more, and keeps KVM from mapping its neighbours ahead. Larger holes are
    /// memory the guest does not use; they stay absent, which costs nothing.
    pub fn known_zero(&mut self, range: ByteRange) {
        for run in self.pages.slots().runs_of_source(range) {
            self.pages.zeroed(run);
            let (slot, _) = self.pages.slots().slot_of(run.first);
            if slot.page_size == PageSize::Size4K && run.count < HUGE_PAGE {
                self.pages.small_hole(run);
                self.cursor = self.cursor.min(run.first);
            }
        }
    }
}
