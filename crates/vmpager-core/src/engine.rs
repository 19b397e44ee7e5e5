//! The engine: events in (a fault, a removal, a finished read), plans out. It
//! belongs to the one thread that reads the userfaultfd's events, which is what
//! makes trap 1 of userfaultfd harmless: between the engine's answer and the
//! install that follows no event can have been read, so either nothing changed
//! or the kernel refuses the install with EAGAIN.
//!
//! The life of a fetch:
//!
//! ```text
//!   fault / next_neighbours / next_replayed / next_fill -> Fetch(run), claimed
//!       -> read; for each of still_claimed(run): install
//!             -> installed(part)          present
//!             -> released(part)           could not now: ask again
//!             -> poisoned(part)           cannot ever
//! ```

use std::ops::Range;
use std::sync::Arc;

use crate::addr::{ByteRange, Hva, PageRun, PageSize};
use crate::huge::{HugePieces, piece_at};
use crate::page_map::{Content, PageMap, Words};
use crate::pages::Pages;
use crate::prefetch::{Fill, NeighbourPolicy, Neighbours, Prefetch, Replay, ReplayCounts};
use crate::present::MapError;
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

/// Pages to bring in though nobody waits for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Read these pages and install them; they are claimed.
    Fetch(PageRun),
    /// Install zeroes.
    Zero(PageRun),
}

impl Piece {
    /// The pages.
    pub fn run(&self) -> PageRun {
        match self {
            Self::Fetch(run) | Self::Zero(run) => *run,
        }
    }
}

/// Pages to bring in for the sake of some that somebody waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nearby {
    /// The pages.
    pub piece: Piece,
    /// Whether they are worth a read of their own, if they are not at hand.
    pub expected: bool,
}

/// The next step of the background fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillPlan {
    /// Bring these in.
    Bring(Piece),
    /// Nothing left to claim, but reads are still in flight.
    Wait,
    /// Every page that shall have memory has it.
    Complete,
}

/// 2 MiB to bring in whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholePiece {
    /// All its pages, which are absent.
    pub piece: PageRun,
    /// Those to be read, which are claimed. The others are zeroes.
    pub reads: Vec<PageRun>,
}

/// Takes the decisions for the memory one userfaultfd serves.
#[derive(Debug)]
pub struct Engine<W> {
    pages: Arc<Pages<W>>,
    neighbours: Neighbours,
    /// What a profile says is needed, if there is one.
    replay: Option<Replay>,
    fill: Fill,
    /// Where pages arrived, if huge pages are to be made of them.
    huge: Option<HugePieces>,
}

/// Base pages in 2 MiB.
const HUGE_PAGE: u64 = 512;

impl<W: Words> Engine<W> {
    /// An engine for these slots, with a page map in `words` (zeroed, and as
    /// many as [`page_map::words_for`](crate::page_map::words_for) says).
    pub fn new(slots: SlotSet, words: W, neighbours: NeighbourPolicy) -> Self {
        Self::over(Pages::new(slots, words), neighbours)
    }

    /// An engine that goes on where another one was interrupted, in a process
    /// that has ended, with the page map it left in `words`. Of these the `written`
    /// ones may be other than zero; others are not looked at.
    ///
    /// # Errors
    ///
    /// If that is no page map of these slots that this version reads.
    pub fn take_over(
        slots: SlotSet,
        words: W,
        written: &[Range<usize>],
        neighbours: NeighbourPolicy,
    ) -> Result<Self, MapError> {
        Ok(Self::over(Pages::take_over(slots, words, written)?, neighbours))
    }

    fn over(pages: Pages<W>, neighbours: NeighbourPolicy) -> Self {
        let count = pages.slots().pages();
        Self {
            pages: Arc::new(pages),
            neighbours: Neighbours::new(neighbours, count),
            replay: None,
            fill: Fill::new(count),
            huge: None,
        }
    }

    /// From now on, [`next_whole_piece`](Self::next_whole_piece) tells of 2 MiB
    /// that have become whole.
    pub fn watch_for_whole_pieces(&mut self) {
        self.huge.get_or_insert_with(|| HugePieces::new(self.pages.map().pages()));
    }

    /// The next 2 MiB, as the host's page tables cut them, all pages of which
    /// are in place.
    pub fn next_whole_piece(&mut self) -> Option<PageRun> {
        self.huge.as_mut()?.next_whole(self.pages.map())
    }

    /// The 2 MiB around a page, if all of them may be brought in at once: none is
    /// present, in flight, given back or poisoned, and some are to be read.
    pub fn claim_piece(&self, page: u64) -> Option<WholePiece> {
        let map = self.pages.map();
        let (piece, _) = piece_at(self.pages.slots(), page);
        let piece = piece?;
        let mut reads = Vec::new();
        let mut at = piece.first;
        while at < piece.end() {
            let claimed = map.claim_up(at, piece.end() - at);
            if claimed > 0 {
                reads.push(PageRun::new(at, claimed));
                at += claimed;
            } else if !map.is_present(at) && map.next_holes(PageRun::new(at, 1)).is_some() {
                at += 1;
            } else {
                reads.iter().for_each(|run| {
                    map.release(*run);
                });
                return None;
            }
        }
        (!reads.is_empty()).then_some(WholePiece { piece, reads })
    }

    /// The same of the next 2 MiB that the background fill comes to.
    pub fn next_fill_piece(&self) -> Option<WholePiece> {
        let next = self.pages.map().next_source(self.fill.next()?)?;
        self.claim_piece(next)
    }

    /// Whether pages arrived that [`next_whole_piece`](Self::next_whole_piece)
    /// has not looked at.
    pub fn may_have_whole_pieces(&self) -> bool {
        self.huge.as_ref().is_some_and(|huge| !huge.is_empty())
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
        let (slot, bounds) = self.pages.slots().slot_of(page);
        if slot.page_size == PageSize::Size4K {
            self.neighbours.faulted(page, bounds);
        }
        if let Some(replay) = &mut self.replay {
            replay.faulted(page, bounds);
        }
        self.demanded();
        Some(self.plan(page))
    }

    /// Somebody waits, here or in other memory: keep the next piece of the fill
    /// and of the replay small.
    pub fn demanded(&mut self) {
        self.fill.interrupted();
        if let Some(replay) = &mut self.replay {
            replay.interrupted();
        }
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
                    let run = PageRun::new(page - down, down + up);
                    self.bring_later(page, window, run);
                    return FaultPlan::Fetch { page, run };
                }
                Content::Claimed => return FaultPlan::InFlight(page),
                Content::Zero => {
                    let window = self.window(page);
                    let count = self.pages.map().alike_from(page, window.end() - page);
                    let run = PageRun::new(page, count);
                    self.bring_later(page, window, run);
                    return FaultPlan::Zero(run);
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

    /// Remembers the window around a page, of which `run` is brought in at once:
    /// that ends at the first page that is in place, or of another kind.
    fn bring_later(&mut self, page: u64, window: PageRun, run: PageRun) {
        if window != run {
            self.neighbours.put_off(page, window);
        }
    }

    /// The next pages near those that somebody waited for, `most` at most.
    pub fn next_neighbours(&mut self, most: u64) -> Option<Nearby> {
        next_of(&self.pages, &mut self.neighbours, most)
    }

    /// Brings in these ranges of the source before others, in this order: what a
    /// profile says the guest will touch. Zero pages among them get memory.
    pub fn replay(&mut self, order: &[ByteRange]) {
        let runs = self.runs_of(order);
        for run in &runs {
            if let Some(zero) = self.pages.give_zeroes(*run) {
                self.fill.again_from(zero);
            }
        }
        self.replay = Some(Replay::new(runs, self.pages.map().pages()));
    }

    /// The same, of an engine that goes on where another one was interrupted: what is in
    /// place is not brought again, and the page map says which zero pages were to get
    /// memory. Others that are absent may have been given back.
    pub fn replay_rest(&mut self, order: &[ByteRange]) {
        let runs = self.runs_of(order);
        self.replay = Some(Replay::new(runs, self.pages.map().pages()));
    }

    fn runs_of(&self, order: &[ByteRange]) -> Vec<PageRun> {
        let slots = self.pages.slots();
        order.iter().flat_map(|range| slots.runs_meeting_source(*range)).collect()
    }

    /// The replay of a profile, if there is one.
    pub fn replaying(&self) -> Option<&Replay> {
        self.replay.as_ref()
    }

    /// How many base pages the replay may bring in before faults are looked for
    /// again.
    pub fn replay_piece(&mut self) -> u64 {
        self.replay.as_mut().map_or(0, Replay::piece)
    }

    /// The next pages of the profile, `most` at most (and at least one huge page,
    /// in slots of such).
    pub fn next_replayed(&mut self, most: u64) -> Option<Piece> {
        next_of(&self.pages, self.replay.as_mut()?, most).map(|nearby| nearby.piece)
    }

    /// How well the profile fits so far.
    pub fn replay_counts(&self) -> ReplayCounts {
        self.replay.as_ref().map_or_else(ReplayCounts::default, Replay::counts)
    }

    /// How many base pages the background fill may bring in before faults are
    /// looked for again.
    pub fn fill_piece(&mut self) -> u64 {
        self.fill.piece()
    }

    /// The next pages to fill, `most` at most (and at least one huge page, in
    /// slots of such).
    pub fn next_fill(&mut self, most: u64) -> FillPlan {
        match next_of(&self.pages, &mut self.fill, most) {
            Some(next) => FillPlan::Bring(next.piece),
            None if self.pages.is_complete() => FillPlan::Complete,
            None => FillPlan::Wait,
        }
    }

    /// The parts of a claimed run that nobody took away meanwhile: only these
    /// may be installed from the source.
    pub fn still_claimed(&self, run: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        self.pages.still_claimed(run)
    }

    /// Pages have their contents.
    pub fn installed(&mut self, run: PageRun) {
        self.pages.installed(run);
        if let Some(huge) = &mut self.huge {
            huge.arrived(self.pages.slots(), run);
        }
    }

    /// Claimed pages could not be installed this time; they will be asked for
    /// again.
    pub fn released(&mut self, run: PageRun) {
        self.pages.map().release(run);
        self.fill.again_from(run.first);
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
                self.fill.again_from(run.first);
            }
        }
    }
}

/// The next pages that this policy names and that nobody brings in, `most` at
/// most.
fn next_of<W: Words>(pages: &Pages<W>, policy: &mut impl Prefetch, most: u64) -> Option<Nearby> {
    while let Some(run) = policy.next() {
        let expected = policy.is_expected();
        let piece = next_piece(pages, run, most);
        policy.took(piece.map_or(run.end(), |piece| piece.run().end()));
        if let Some(piece) = piece {
            return Some(Nearby { piece, expected });
        }
    }
    None
}

/// The first pages of a run that shall have memory and that nobody brings in:
/// claimed, if they are to be fetched.
fn next_piece<W: Words>(pages: &Pages<W>, within: PageRun, most: u64) -> Option<Piece> {
    let map = pages.map();
    loop {
        let source = map.next_source(within);
        let hole = map.next_holes(within);
        let first = source.into_iter().chain(hole.map(|run| run.first)).min()?;
        let (slot, bounds) = pages.slots().slot_of(first);
        let most = match slot.page_size {
            // Never across 2 MiB: one slow read holds up no more.
            PageSize::Size4K => most.min(HUGE_PAGE - first % HUGE_PAGE),
            PageSize::Size2M => 1,
        };
        let most = most.min(bounds.end().min(within.end()) - first);
        if let Some(hole) = hole.filter(|hole| hole.first == first) {
            return Some(Piece::Zero(PageRun::new(first, hole.count.min(most))));
        }
        let count = map.claim_up(first, most);
        // None, if somebody else was faster: look again.
        if count > 0 {
            return Some(Piece::Fetch(PageRun::new(first, count)));
        }
    }
}
