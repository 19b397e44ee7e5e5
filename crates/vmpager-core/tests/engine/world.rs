//! The world around an engine, page by page and slowly: the kernel's memory
//! and its queues, the guest's threads, the reads in flight, and what the
//! engine ought to know of every page.
//!
//! The kernel is the one of section "traps" of the design: page faults may be
//! read before older events; while an event is unread, or read but its thread
//! has not run again, installs fail with EAGAIN; the zap comes after that.

mod checks;
mod fill;

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::AtomicU64;

use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::{NeighbourPolicy, Pace};
use vmpager_core::{ByteRange, Content, Engine, FaultPlan, Hva, PageRun, PageSize, Slot, SlotSet};

use crate::script::Step;

/// How a read ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    /// All bytes came.
    Install,
    /// All came, but the copy stops short after that many pages.
    InstallSome(u64),
    /// The source cannot have them.
    Fail,
    /// The reader gave up; somebody must ask again.
    Abandon,
}

/// What the guest finds at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Absent,
    /// The page's own bytes from the source.
    Source,
    Zero,
    Poison,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    hva: u64,
    /// Where its bytes start in the source.
    source_offset: u64,
    size: PageSize,
    slot: PageRun,
    memory: Memory,
    /// What the engine should think of it.
    content: Content,
    present: bool,
    /// The guest gave it back, or the source has a hole: source bytes are
    /// wrong for ever.
    must_be_zero: bool,
    /// The guest gave it back: it may be absent.
    given_back: bool,
    /// It lies in a small hole, and the fill owes it memory.
    hole: bool,
}

/// A madvise under way, as addresses.
#[derive(Clone, Copy, Debug)]
struct Removal {
    start: u64,
    end: u64,
}

pub(crate) struct World {
    pub(crate) engine: Engine<Box<[AtomicU64]>>,
    policy: NeighbourPolicy,
    pages: Vec<Page>,
    /// Pages somebody is stopped on.
    waiting: BTreeSet<u64>,
    /// Page-fault messages nobody has read.
    messages: BTreeSet<u64>,
    /// Faults that could not be answered yet (EAGAIN).
    postponed: BTreeSet<u64>,
    unread: VecDeque<Removal>,
    /// Event read, thread not run since.
    stopped: VecDeque<Removal>,
    /// Thread runs, pages not yet taken.
    zapping: VecDeque<Removal>,
    reads: Vec<PageRun>,
    /// What is left of the windows around pages somebody waited for, the last
    /// 32 of them.
    owed: VecDeque<PageRun>,
    /// log2 of the next window of each 512 pages.
    windows: Vec<u8>,
    /// Tested by itself; here it says how large the next piece is.
    pace: Pace,
}

fn at(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl World {
    pub(crate) fn new(slots: &[Slot], holes: &[ByteRange], policy: NeighbourPolicy) -> Self {
        let source_len = slots.iter().map(|s| s.source_offset + s.len).max().unwrap();
        let set = SlotSet::new(slots, source_len).unwrap();
        let words: Vec<_> = (0..words_for(set.pages())).map(|_| AtomicU64::new(0)).collect();
        let engine = Engine::new(set, words.into_boxed_slice(), policy);
        let mut pages = Vec::new();
        for slot in slots {
            let all = PageRun::new(pages.len() as u64, slot.pages());
            for i in 0..all.count {
                let len = slot.page_size.bytes();
                pages.push(Page {
                    hva: slot.hva.0 + i * len,
                    source_offset: slot.source_offset + i * len,
                    size: slot.page_size,
                    slot: all,
                    memory: Memory::Absent,
                    content: Content::Source,
                    present: false,
                    must_be_zero: false,
                    given_back: false,
                    hole: false,
                });
            }
        }
        let first_window = match policy {
            NeighbourPolicy::Adaptive { first_window_shift } => first_window_shift.min(9),
            _ => 0,
        };
        let mut world = Self {
            engine,
            policy,
            windows: vec![first_window; pages.len().div_ceil(512)],
            pages,
            waiting: BTreeSet::new(),
            messages: BTreeSet::new(),
            postponed: BTreeSet::new(),
            unread: VecDeque::new(),
            stopped: VecDeque::new(),
            zapping: VecDeque::new(),
            reads: Vec::new(),
            owed: VecDeque::new(),
            pace: Pace::new(),
        };
        for &hole in holes {
            world.known_zero(hole);
        }
        world
    }

    pub(crate) fn apply(&mut self, step: &Step) {
        match step {
            Step::Touch(page) => self.touch(page.index(self.pages.len()) as u64),
            Step::Sweep(page, count) => {
                let first = page.index(self.pages.len()) as u64;
                for page in first..(first + count).min(self.pages.len() as u64) {
                    self.touch(page);
                }
            }
            Step::DeliverFaults => self.deliver_faults(),
            Step::BeginRemove(page, count) => {
                let first = page.index(self.pages.len()) as u64;
                self.begin_remove(first, first + count);
            }
            Step::DeliverEvent => self.deliver_event(),
            Step::LetGo => self.let_go(),
            Step::Zap => self.zap(),
            Step::Fill => self.fill_piece(),
            Step::FillSome(most) => _ = self.fill(*most),
            Step::Neighbours(most) => self.neighbours(*most),
            Step::EndRead(read, outcome) if !self.reads.is_empty() => {
                self.end_read(read.index(self.reads.len()), *outcome);
            }
            Step::EndRead(..) => (),
        }
    }

    // The guest.

    pub(crate) fn touch(&mut self, page: u64) {
        let p = &self.pages[at(page)];
        match p.memory {
            Memory::Absent => {
                self.waiting.insert(page);
                self.messages.insert(page);
            }
            Memory::Source => assert!(
                !p.must_be_zero || self.removal_pending(p.hva),
                "page {page} reads bytes that were given back"
            ),
            Memory::Zero => assert!(p.must_be_zero, "page {page} reads zeroes for its bytes"),
            Memory::Poison => (),
        }
    }

    /// Until the zap, whatever was there may still be read.
    fn removal_pending(&self, hva: u64) -> bool {
        self.stopped.iter().chain(&self.zapping).any(|r| (r.start..r.end).contains(&hva))
    }

    pub(crate) fn begin_remove(&mut self, first: u64, end: u64) {
        let last = &self.pages[at((end - 1).min(self.pages.len() as u64 - 1))];
        let (a, b) = (self.pages[at(first)].hva, last.hva);
        // Slots lie in any order: the range may run the other way.
        let last = if a <= b { last } else { &self.pages[at(first)] };
        let end = last.hva + last.size.bytes();
        self.unread.push_back(Removal { start: a.min(b), end });
    }

    pub(crate) fn let_go(&mut self) {
        self.zapping.extend(self.stopped.pop_front());
    }

    pub(crate) fn zap(&mut self) {
        let Some(removal) = self.zapping.pop_front() else { return };
        for page in &mut self.pages {
            if (removal.start..removal.end).contains(&page.hva) {
                page.memory = Memory::Absent;
            }
        }
    }

    /// The page goes away and nobody is told.
    pub(crate) fn lose(&mut self, page: u64) {
        self.pages[at(page)].memory = Memory::Absent;
    }

    // The kernel.

    fn refuses_installs(&self) -> bool {
        !self.unread.is_empty() || !self.stopped.is_empty()
    }

    /// Installs one page; `false` is EAGAIN. EEXIST is as good as done, and
    /// either way the waiters are woken.
    fn install(&mut self, page: u64, memory: Memory) -> bool {
        if self.refuses_installs() {
            return false;
        }
        let p = &mut self.pages[at(page)];
        if p.memory == Memory::Absent {
            assert!(
                memory != Memory::Source || !p.must_be_zero,
                "page {page}: source bytes after its removal"
            );
            p.memory = memory;
        }
        self.wake(PageRun::new(page, 1));
        true
    }

    /// Those stopped on these pages try again, and fault again if it is in
    /// vain.
    fn wake(&mut self, run: PageRun) {
        for page in run.pages() {
            if self.waiting.remove(&page) {
                self.messages.remove(&page);
                self.touch(page);
            }
        }
    }

    // The pager, as a driver of the engine must be.

    pub(crate) fn deliver_faults(&mut self) {
        for page in std::mem::take(&mut self.messages) {
            let p = self.pages[at(page)];
            let offset = page % p.size.bytes(); // any byte of the page will do
            let plan = self.engine.fault(Hva(p.hva + offset)).expect("a slot is there");
            self.pace.demanded();
            self.carry_out(page, plan);
        }
        self.retry_postponed();
    }

    fn retry_postponed(&mut self) {
        for page in std::mem::take(&mut self.postponed) {
            let plan = self.engine.plan(page);
            self.carry_out(page, plan);
        }
    }

    fn carry_out(&mut self, page: u64, plan: FaultPlan) {
        let p = self.pages[at(page)];
        let before = (p.present, p.content);
        match plan {
            FaultPlan::Fetch { page: demanded, run } => {
                assert_eq!((demanded, before), (page, (false, Content::Source)));
                self.check_neighbours(page, run);
                self.claim(run);
            }
            FaultPlan::Zero(run) => {
                assert_eq!((run.first, before), (page, (false, Content::Zero)));
                let window = self.window(page);
                self.owe(window, run);
                assert!(run.count > 0 && run.end() <= window.end(), "{run:?} leaves {window:?}");
                for page in run.pages() {
                    let p = &self.pages[at(page)];
                    assert_eq!((p.present, p.content), before, "page {page} of {run:?}");
                }
                self.zero(run);
            }
            FaultPlan::InFlight(asked) => {
                assert_eq!((asked, before), (page, (false, Content::Claimed)));
                assert!(self.reads.iter().any(|run| run.pages().contains(&page)));
            }
            FaultPlan::Confirm(asked) => {
                assert_eq!((asked, before.0), (page, true));
                self.confirm(page);
            }
            FaultPlan::Poisoned(asked) => {
                assert_eq!((asked, before), (page, (false, Content::Poisoned)));
                if !self.install(page, Memory::Poison) {
                    self.postponed.insert(page);
                }
            }
        }
    }

    fn zero(&mut self, run: PageRun) {
        for page in run.pages() {
            if !self.install(page, Memory::Zero) {
                self.postponed.insert(run.first);
                return;
            }
            self.engine.installed(PageRun::new(page, 1));
            self.has_memory(page);
        }
    }

    /// What the engine was just told.
    fn has_memory(&mut self, page: u64) {
        let p = &mut self.pages[at(page)];
        (p.present, p.hole) = (true, false);
    }

    fn confirm(&mut self, page: u64) {
        if self.refuses_installs() {
            self.postponed.insert(page);
            return;
        }
        let p = &mut self.pages[at(page)];
        if p.memory == Memory::Absent {
            // The kernel has spoken: the page was given back.
            (p.must_be_zero, p.given_back, p.content) = (true, true, Content::Zero);
            self.engine.replaced_by_zero(page);
        }
        assert!(self.install(page, Memory::Zero));
    }

    pub(crate) fn deliver_event(&mut self) {
        let Some(removal) = self.unread.pop_front() else { return };
        let mut count = 0;
        for page in &mut self.pages {
            if (removal.start..removal.end).contains(&page.hva) {
                (page.must_be_zero, page.given_back, page.hole) = (true, true, false);
                (page.present, page.content) = (false, Content::Zero);
                count += 1;
            }
        }
        let told = self.engine.removed(Hva(removal.start), Hva(removal.end));
        assert_eq!(told, count, "{removal:x?}");
        self.stopped.push_back(removal);
    }

    fn claim(&mut self, run: PageRun) {
        assert!(run.count > 0);
        for page in run.pages() {
            let twice = self.reads.iter().find(|read| read.pages().contains(&page));
            let p = &mut self.pages[at(page)];
            // A page given back may be in a read that began before, but is
            // not claimed anew; so none is ever in two.
            assert_eq!(twice, None, "page {page} of {run:?} is being fetched already");
            assert_eq!((p.present, p.content), (false, Content::Source), "page {page}");
            assert!(!p.must_be_zero, "page {page} is fetched after its removal");
            p.content = Content::Claimed;
        }
        let bounds = self.pages[at(run.first)].slot;
        assert!(run.end() <= bounds.end(), "{run:?} crosses out of {bounds:?}");
        self.reads.push(run);
    }

    pub(crate) fn end_read(&mut self, index: usize, outcome: Outcome) {
        let read = self.reads.swap_remove(index);
        let parts: Vec<PageRun> = self.engine.still_claimed(read).collect();
        let mine: Vec<u64> = parts.iter().flat_map(PageRun::pages).collect();
        let expected = read.pages().filter(|&page| {
            let p = &self.pages[at(page)];
            p.content == Content::Claimed && !p.present
        });
        assert_eq!(mine, expected.collect::<Vec<_>>(), "of {read:?}");
        for part in parts {
            match outcome {
                Outcome::Install => self.install_part(part, part.count),
                Outcome::InstallSome(count) => self.install_part(part, count.min(part.count)),
                Outcome::Abandon => self.release(part),
                Outcome::Fail => {
                    self.engine.poisoned(part);
                    for page in part.pages() {
                        self.pages[at(page)].content = Content::Poisoned;
                    }
                }
            }
        }
        // Whoever waited for a page that did not come must ask again: nobody
        // else will tell.
        self.wake(read);
    }

    fn install_part(&mut self, part: PageRun, count: u64) {
        let done = part.pages().take(at(count)).take_while(|&p| self.install(p, Memory::Source));
        let done = done.count() as u64;
        let (done, rest) =
            (PageRun::new(part.first, done), PageRun::new(part.first + done, part.count - done));
        self.engine.installed(done);
        for page in done.pages() {
            self.has_memory(page);
        }
        if rest.count > 0 {
            self.release(rest);
        }
    }

    fn release(&mut self, part: PageRun) {
        self.engine.released(part);
        for page in part.pages() {
            self.pages[at(page)].content = Content::Source;
        }
    }
}
