//! The memory behind one userfaultfd: reads its events and carries out what the
//! engine plans. Belongs to one worker thread.
//!
//! Three rules keep every answer true (the traps they avoid are numbered as in
//! the tests, `tests/traps.rs`):
//!
//! - Of a batch of messages, **removals are applied before any fault is
//!   served** (1, 3): the kernel delivers pending faults first, whatever came
//!   first. Serving a fault later than a removal that followed it is harmless,
//!   the other way round installs bytes the guest gave back.
//! - **Events are read by no one else**, and never between a plan and its
//!   install. So a removal the plan did not know of makes the kernel refuse
//!   the install with EAGAIN; then the events are read, and the page is planned
//!   anew, a little later, since the removing thread must run first.
//! - **A fault ends in an install or a wake**, never in a look at the page map
//!   (2, 4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use tracing::{error, warn};
use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{
    Engine, FaultPlan, FillPlan, Hva, PageData, PageReader, PageRun, PageSize, PageSource,
    Priority, SlotSet, SourceError,
};
use vmpager_sys::memory::GuestRange;
use vmpager_sys::shared::SharedWords;
use vmpager_sys::uffd::{Installed, Message, Messages, Stop, Userfaultfd};

use crate::reads::{MemoryId, Read, Reads};
use crate::stats::{Counters, MemoryNumbers};

/// How memory is served.
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// Bring in all pages, not only those asked for, then let go of the memory.
    pub background_fill: bool,
    /// What to install along with a demanded page.
    pub neighbours: NeighbourPolicy,
}

/// Why a memory is served no longer.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The process is gone.
    PeerGone,
    /// It cannot be served, for this reason.
    Failed(String),
}

/// What came of a step of the background fill.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// Pages were installed, or are being read.
    Some,
    /// Reads in flight must end first.
    Wait,
    /// Every page is in place.
    All,
}

/// What is put into a run of pages.
#[derive(Clone, Copy, Debug)]
enum Put {
    /// Bytes at an address of this process, for the kernel to read.
    Bytes(usize),
    Zeroes,
    Poison,
}

/// How far putting came.
#[derive(Debug)]
struct PutEnd {
    /// Pages that were absent and have contents now.
    pages: u64,
    /// What was left out from some page on, and why.
    rest: Option<(PageRun, Stop)>,
}

/// Pages to be planned again later.
#[derive(Debug, Default)]
struct Retry {
    pages: VecDeque<(u64, Instant)>,
    at: Option<Instant>,
    pause: Duration,
}

/// The pause after the first EAGAIN. The thread that changes the layout needs
/// to run; a page fault costs about as much.
const FIRST_RETRY: Duration = Duration::from_micros(20);
const LAST_RETRY: Duration = Duration::from_millis(5);
/// The pause while the host has no memory, or refuses for a reason of its own.
const LONG_RETRY: Duration = Duration::from_millis(100);

/// The memory behind one userfaultfd.
#[derive(Debug)]
pub(crate) struct Served {
    id: MemoryId,
    uffd: Userfaultfd,
    engine: Engine<SharedWords>,
    messages: Messages,
    /// Faults read and not yet served.
    faults: VecDeque<Hva>,
    retry: Retry,
    counters: Counters,
    fill: bool,
    /// Userfaultfds of forked children.
    children: Vec<OwnedFd>,
    /// This process's own memory, if that is what is served.
    kept: Vec<GuestRange>,
    /// Some page is neither in place nor poisoned for good: letting go of the
    /// memory would let it read as zeroes.
    must_hold: bool,
    complained: Complaints,
}

/// What has been said once and need not be said for every page.
#[derive(Debug, Default)]
struct Complaints {
    unmapped: bool,
    outside: bool,
    no_memory: bool,
    refused: bool,
}

impl Served {
    /// Serves `slots` of the process that `uffd` belongs to.
    ///
    /// # Errors
    ///
    /// If the page map cannot be had.
    pub(crate) fn new(
        id: MemoryId,
        uffd: Userfaultfd,
        slots: SlotSet,
        source: &dyn PageSource,
        options: &ServeOptions,
    ) -> io::Result<Self> {
        let words = SharedWords::new("vmpager-page-map", words_for(slots.pages()))?;
        let mut engine = Engine::new(slots, words, options.neighbours);
        source.visit_zero_ranges(&mut |range| engine.known_zero(range));
        Ok(Self {
            id,
            uffd,
            engine,
            messages: Messages::new(),
            faults: VecDeque::new(),
            retry: Retry::default(),
            counters: Counters::new(),
            fill: options.background_fill,
            children: Vec::new(),
            kept: Vec::new(),
            must_hold: false,
            complained: Complaints::default(),
        })
    }

    /// Keeps this process's own memory mapped while it is served.
    pub(crate) fn keeping(mut self, kept: Vec<GuestRange>) -> Self {
        self.kept = kept;
        self
    }

    pub(crate) fn id(&self) -> MemoryId {
        self.id
    }

    /// The descriptor that is readable while somebody waits.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// When put-off pages are due.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry.at
    }

    /// Whether all of it shall be brought in from the start.
    pub(crate) fn wants_fill(&self) -> bool {
        self.fill
    }

    pub(crate) fn numbers(&self) -> MemoryNumbers {
        MemoryNumbers {
            counters: self.counters.clone(),
            regions: self.engine.slots().iter().count() as u64,
            memory_bytes: self.engine.slots().bytes(),
            pages_missing: self.engine.outstanding(),
        }
    }

    /// Whether the process still has the memory.
    pub(crate) fn is_alive(&self) -> bool {
        self.engine
            .slots()
            .iter()
            .any(|slot| self.uffd.is_alive(slot.hva.0, slot.page_size.bytes()))
    }

    /// Serves the faults that are pending, and those put off that are due.
    /// Returns how many.
    pub(crate) fn serve(&mut self, reads: &mut Reads) -> Result<u64, Lost> {
        self.read_events()?;
        let mut served = 0;
        if !self.faults.is_empty() {
            let since = Instant::now();
            while let Some(hva) = self.faults.pop_front() {
                self.fault(hva, since, reads)?;
                served += 1;
            }
        }
        if self.retry.at.is_some_and(|at| at <= Instant::now()) {
            served += self.serve_retries(reads)?;
        }
        Ok(served)
    }

    fn serve_retries(&mut self, reads: &mut Reads) -> Result<u64, Lost> {
        self.retry.at = None;
        let due = self.retry.pages.len() as u64;
        for _ in 0..due {
            let Some((page, since)) = self.retry.pages.pop_front() else { break };
            let plan = self.engine.plan(page);
            self.carry_out(plan, since, reads)?;
        }
        if self.retry.pages.is_empty() {
            self.retry.pause = Duration::ZERO;
        }
        Ok(due)
    }

    /// Reads one batch: removals are applied at once, faults queued.
    fn read_events(&mut self) -> Result<(), Lost> {
        self.uffd
            .read(&mut self.messages)
            .map_err(|e| Lost::Failed(format!("reading the userfaultfd: {e}")))?;
        for message in self.messages.drain() {
            match message {
                Message::Fault { address, .. } => {
                    self.counters.faults += 1;
                    self.faults.push_back(Hva(address));
                }
                Message::Remove { start, end, .. } => {
                    self.counters.pages_removed += self.engine.removed(Hva(start), Hva(end));
                }
                Message::Remap { from, to, len } => {
                    return Err(Lost::Failed(format!(
                        "the VMM moved {len:#x} bytes of guest memory from {from:#x} to {to:#x}; \
                         memory being served must stay where it is (no mremap)"
                    )));
                }
                Message::Fork { child } => {
                    // Closing it would let the child read zeroes (trap 7).
                    self.children.push(child);
                    warn!("the VMM forked; the child's copy of the memory is held, not served");
                }
                Message::Unknown(event) => warn!(event, "unknown userfaultfd event"),
            }
        }
        Ok(())
    }

    fn fault(&mut self, hva: Hva, since: Instant, reads: &mut Reads) -> Result<(), Lost> {
        let Some(plan) = self.engine.fault(hva) else {
            if !std::mem::replace(&mut self.complained.outside, true) {
                error!(
                    "a fault at {hva} is outside every region of the handshake; its thread is held"
                );
            }
            self.must_hold = true;
            return Ok(());
        };
        self.carry_out(plan, since, reads)
    }

    fn carry_out(
        &mut self,
        plan: FaultPlan,
        since: Instant,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        match plan {
            FaultPlan::Fetch { page, run } => self.fetch(page, run, since, reads),
            FaultPlan::Zero(run) => {
                let end = self.put(run, Put::Zeroes)?;
                self.counters.pages_zero += end.pages;
                self.settle(run.first, since, end, reads)
            }
            FaultPlan::InFlight(page) => {
                self.counters.joined += 1;
                reads.promote(self.id, page, since);
                Ok(())
            }
            FaultPlan::Confirm(page) => self.confirm(page, since, reads),
            FaultPlan::Poisoned(page) => {
                let end = self.put(PageRun::new(page, 1), Put::Poison)?;
                self.settle(page, since, end, reads)
            }
        }
    }

    /// Reads a claimed run and installs it: at once if its bytes are at hand,
    /// else when they are.
    fn fetch(
        &mut self,
        page: u64,
        run: PageRun,
        since: Instant,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        let (_, range) = self.engine.slots().locate(run);
        match at_hand(&mut *reads.reader, range.len, range) {
            Ok(Some(data)) => {
                return self.install_demanded(page, run, since, address_of(data), reads);
            }
            Ok(None) if run.count > 1 => {
                // A cold neighbour must not hold up a warm page.
                let one = PageRun::new(page, 1);
                let (_, range) = self.engine.slots().locate(one);
                if let Ok(Some(data)) = at_hand(&mut *reads.reader, range.len, range) {
                    let src = address_of(data);
                    self.engine.released(PageRun::new(run.first, page - run.first));
                    self.engine.released(PageRun::new(page + 1, run.end() - page - 1));
                    return self.install_demanded(page, one, since, src, reads);
                }
            }
            Ok(None) => {}
            Err(error) => {
                let read = self.background(run, Priority::Demand, Some((page, since)));
                return self.read_failed(read, &error, reads);
            }
        }
        reads.submit(self.background(run, Priority::Demand, Some((page, since))));
        Ok(())
    }

    fn install_demanded(
        &mut self,
        page: u64,
        run: PageRun,
        since: Instant,
        src: usize,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        let end = self.put(run, Put::Bytes(src))?;
        self.count_installed(run, Some(page), end.pages);
        self.settle(page, since, end, reads)
    }

    fn count_installed(&mut self, run: PageRun, demanded: Option<u64>, pages: u64) {
        let (slot, _) = self.engine.slots().slot_of(run.first);
        self.counters.bytes_read += run.count << slot.page_size.shift();
        match demanded {
            Some(_) if pages > 0 => {
                self.counters.pages_demand += 1;
                self.counters.pages_neighbour += pages - 1;
            }
            _ => self.counters.pages_fill += pages,
        }
    }

    /// Somebody found a page missing that was installed: see
    /// [`FaultPlan::Confirm`].
    fn confirm(&mut self, page: u64, since: Instant, reads: &mut Reads) -> Result<(), Lost> {
        self.counters.confirmed += 1;
        let (hva, len) = self.address(PageRun::new(page, 1));
        let result = self.put_once(hva, len, Put::Zeroes);
        match result.stop {
            None => {
                self.engine.replaced_by_zero(page);
                self.counters.pages_zero += 1;
                Ok(())
            }
            Some(Stop::Present) => self.wake(hva, len),
            Some(stop) => {
                let end = PutEnd { pages: 0, rest: Some((PageRun::new(page, 1), stop)) };
                self.settle(page, since, end, reads)
            }
        }
    }

    /// Puts the same thing into all pages of a run that are absent.
    fn put(&mut self, run: PageRun, what: Put) -> Result<PutEnd, Lost> {
        let mut pages = 0;
        let mut left = run;
        while left.count > 0 {
            let (slot, _) = self.engine.slots().slot_of(left.first);
            let shift = slot.page_size.shift();
            let (hva, len) = self.address(left);
            let skipped = (left.first - run.first) << shift;
            let what_left = match what {
                Put::Bytes(src) => Put::Bytes(src + usize::try_from(skipped).unwrap_or(usize::MAX)),
                other => other,
            };
            let result = self.put_once(hva, len, what_left);
            let done = PageRun::new(left.first, result.bytes >> shift);
            if !matches!(what, Put::Poison) {
                self.engine.installed(done);
            }
            pages += done.count;
            left = PageRun::new(done.end(), left.count - done.count);
            match result.stop {
                None => {}
                Some(Stop::Present) => {
                    // Another installer won. Its wake may have come before our
                    // waiter slept: wake once more.
                    let one = PageRun::new(left.first, 1);
                    self.engine.installed(one);
                    let (hva, len) = self.address(one);
                    self.wake(hva, len)?;
                    left = PageRun::new(left.first + 1, left.count - 1);
                }
                Some(Stop::Gone) => return Err(Lost::PeerGone),
                Some(stop) => return Ok(PutEnd { pages, rest: Some((left, stop)) }),
            }
        }
        Ok(PutEnd { pages, rest: None })
    }

    fn put_once(&self, hva: Hva, len: u64, what: Put) -> Installed {
        match what {
            Put::Bytes(src) => self.uffd.copy(hva.0, src, len),
            Put::Poison => self.uffd.poison(hva.0, len),
            Put::Zeroes => match self.uffd.zeropage(hva.0, len) {
                // hugetlb has no zero page to share: copy one.
                Installed { bytes: 0, stop: Some(Stop::Other(_)) } if len >= HUGE.bytes() => {
                    self.uffd.copy(hva.0, zero_page_2m().as_ptr() as usize, HUGE.bytes())
                }
                result => result,
            },
        }
    }

    /// Deals with what could not be put, and records the stall of the demanded
    /// page if it was.
    fn settle(
        &mut self,
        page: u64,
        since: Instant,
        end: PutEnd,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        let Some((rest, stop)) = end.rest else {
            self.counters.stalled(since);
            return Ok(());
        };
        let demanded = rest.pages().contains(&page).then_some((page, since));
        if demanded.is_none() {
            self.counters.stalled(since);
        }
        self.put_off(rest, stop, demanded, reads)
    }

    /// A run could not be put. It is given back and, if somebody waits for a
    /// page of it, planned again after a pause.
    fn put_off(
        &mut self,
        rest: PageRun,
        stop: Stop,
        demanded: Option<(u64, Instant)>,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        match stop {
            Stop::SourceFault => {
                // The mapping of the source could not be read: the background
                // read will tell why.
                let priority = demanded.map_or(Priority::Fill, |_| Priority::Demand);
                reads.submit(self.background(rest, priority, demanded));
                return Ok(());
            }
            Stop::Unmapped => return self.unmapped(rest),
            Stop::Changing => {
                self.read_events()?;
                self.pause(FIRST_RETRY, LAST_RETRY);
            }
            Stop::NoMemory => {
                if !std::mem::replace(&mut self.complained.no_memory, true) {
                    error!(
                        "no memory to install pages into (for hugetlb: the pool is empty, raise \
                         vm.nr_hugepages); faults are held until there is"
                    );
                }
                self.pause(LONG_RETRY, LONG_RETRY);
            }
            Stop::Other(errno) => {
                if !std::mem::replace(&mut self.complained.refused, true) {
                    let (hva, len) = self.address(rest);
                    error!("installing {len:#x} bytes at {hva} was refused: {errno}; held");
                }
                self.pause(LONG_RETRY, LONG_RETRY);
            }
            Stop::Present | Stop::Gone => {}
        }
        self.counters.retried += 1;
        self.engine.released(rest);
        self.retry.pages.extend(demanded);
        Ok(())
    }

    /// Sets when put-off pages are tried again: later each time in a row.
    fn pause(&mut self, first: Duration, last: Duration) {
        self.retry.pause = (self.retry.pause * 2).clamp(first, last);
        self.retry.at = Some(Instant::now() + self.retry.pause);
    }

    /// The range is no longer registered or mapped: nobody can be served
    /// there, and whoever waits must look again.
    fn unmapped(&mut self, run: PageRun) -> Result<(), Lost> {
        let (hva, len) = self.address(run);
        if !std::mem::replace(&mut self.complained.unmapped, true) {
            warn!("{len:#x} bytes at {hva} are not registered (any more); left alone");
        }
        self.counters.pages_removed += self.engine.removed(hva, Hva(hva.0 + len));
        self.wake(hva, len)
    }

    fn wake(&self, hva: Hva, len: u64) -> Result<(), Lost> {
        self.uffd
            .wake(hva.0, len)
            .map_err(|e| Lost::Failed(format!("waking the waiters of {hva}: {e}")))
    }

    fn address(&self, run: PageRun) -> (Hva, u64) {
        let (hva, range) = self.engine.slots().locate(run);
        (hva, range.len)
    }

    fn background(
        &self,
        run: PageRun,
        priority: Priority,
        demanded: Option<(u64, Instant)>,
    ) -> Read {
        let (_, range) = self.engine.slots().locate(run);
        Read { memory: self.id, run, range, priority, demanded, failures: 0 }
    }

    /// A read in the background has ended with these bytes.
    pub(crate) fn read_done(
        &mut self,
        read: Read,
        data: PageData<'_>,
        put_off: &mut Vec<(PageRun, Stop, Option<(u64, Instant)>)>,
    ) -> Result<(), Lost> {
        let (slot, _) = self.engine.slots().slot_of(read.run.first);
        let shift = slot.page_size.shift();
        let parts: Vec<PageRun> = self.engine.still_claimed(read.run).collect();
        let src = address_of(data);
        let mut installed = 0;
        for part in &parts {
            let offset = usize::try_from((part.first - read.run.first) << shift);
            let end = self.put(*part, Put::Bytes(src + offset.unwrap_or(usize::MAX)))?;
            installed += end.pages;
            if let Some((rest, stop)) = end.rest {
                let demanded = read.demanded.filter(|(page, _)| rest.pages().contains(page));
                put_off.push((rest, stop, demanded));
            }
        }
        self.count_installed(read.run, read.demanded.map(|(page, _)| page), installed);
        if parts != [read.run] {
            // Some pages were given back meanwhile; whoever waits for them
            // asks again, and is told zero.
            let (hva, len) = self.address(read.run);
            self.wake(hva, len)?;
        }
        if let Some((_, since)) = read.demanded {
            self.counters.stalled(since);
        }
        Ok(())
    }

    /// Deals with what [`read_done`](Self::read_done) could not install.
    pub(crate) fn put_off_all(
        &mut self,
        put_off: impl IntoIterator<Item = (PageRun, Stop, Option<(u64, Instant)>)>,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        for (rest, stop, demanded) in put_off {
            self.put_off(rest, stop, demanded, reads)?;
        }
        Ok(())
    }

    /// A read failed. A single page is tried again or given up; a run is cut
    /// in two, to find the pages that can be had.
    pub(crate) fn read_failed(
        &mut self,
        read: Read,
        error: &SourceError,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        if read.run.count > 1 && !matches!(error, SourceError::Changed { .. }) {
            let half = read.run.count / 2;
            for run in [
                PageRun::new(read.run.first, half),
                PageRun::new(read.run.first + half, read.run.count - half),
            ] {
                let demanded = read.demanded.filter(|(page, _)| run.pages().contains(page));
                reads.submit(self.background(run, read.priority, demanded));
            }
            return Ok(());
        }
        if reads.try_again(read, error) {
            warn!("{error}; trying again");
            return Ok(());
        }
        let (hva, _) = self.address(read.run);
        error!("{} page(s) at {hva} cannot be had and are poisoned: {error}", read.run.count);
        self.engine.poisoned(read.run);
        self.counters.pages_poisoned += read.run.count;
        self.put_poison(read.run)
    }

    /// Poisons a run; where the kernel cannot, the run's waiters are held.
    fn put_poison(&mut self, run: PageRun) -> Result<(), Lost> {
        let end = self.put(run, Put::Poison)?;
        match end.rest {
            None => Ok(()),
            Some((rest, Stop::Changing)) => {
                self.read_events()?;
                self.pause(FIRST_RETRY, LAST_RETRY);
                let now = Instant::now();
                self.retry.pages.extend(rest.pages().map(|page| (page, now)));
                Ok(())
            }
            Some((rest, Stop::Unmapped)) => self.unmapped(rest),
            Some((rest, stop)) => {
                let (hva, _) = self.address(rest);
                error!("{} page(s) at {hva} cannot be poisoned ({stop:?}): held", rest.count);
                self.must_hold = true;
                Ok(())
            }
        }
    }

    /// One step of the background fill.
    pub(crate) fn fill_step(&mut self, reads: &mut Reads) -> Result<Filled, Lost> {
        if !reads.may_fill() {
            return Ok(Filled::Wait);
        }
        let run = match self.engine.next_fill() {
            FillPlan::Fetch(run) => run,
            FillPlan::Wait => return Ok(Filled::Wait),
            FillPlan::Complete if self.must_hold || self.retry.at.is_some() => {
                return Ok(Filled::Wait);
            }
            FillPlan::Complete => {
                self.counters.fill_took = Some(self.counters.started.elapsed());
                return Ok(Filled::All);
            }
        };
        let (_, range) = self.engine.slots().locate(run);
        match at_hand(&mut *reads.reader, range.len, range) {
            Ok(Some(data)) => {
                let src = address_of(data);
                let end = self.put(run, Put::Bytes(src))?;
                self.count_installed(run, None, end.pages);
                if let Some((rest, stop)) = end.rest {
                    self.put_off(rest, stop, None, reads)?;
                }
            }
            Ok(None) => reads.submit(self.background(run, Priority::Fill, None)),
            Err(error) => {
                let read = self.background(run, Priority::Fill, None);
                self.read_failed(read, &error, reads)?;
            }
        }
        Ok(Filled::Some)
    }

    /// Somebody else's faults were served: the next piece should be small.
    pub(crate) fn others_wait(&mut self) {
        self.engine.demanded();
    }

    /// Lets go of the memory, every page of which is in place: no fault, no
    /// event and no cost from then on.
    pub(crate) fn detach(&self) {
        for slot in self.engine.slots().iter() {
            if let Err(error) = self.uffd.unregister(slot.hva.0, slot.len) {
                // Closing the descriptor does the same, for all of it.
                warn!("unregistering {:#x} bytes at {}: {error}", slot.len, slot.hva);
            }
        }
    }

    /// Poisons every page whose bytes are still to come, so that letting go of
    /// the memory cannot show zeroes for them. False if that failed.
    pub(crate) fn poison_missing(&mut self) -> bool {
        // Reads in flight end without effect: their pages are missing too.
        self.engine.released(PageRun::new(0, self.engine.map().pages()));
        loop {
            match self.engine.next_fill() {
                FillPlan::Fetch(run) => {
                    self.engine.poisoned(run);
                    if self.put_poison(run).is_err() {
                        return false;
                    }
                }
                FillPlan::Wait | FillPlan::Complete => return !self.must_hold,
            }
        }
    }
}

const HUGE: PageSize = PageSize::Size2M;

/// Two MiB of zeroes for the kernel to read.
fn zero_page_2m() -> &'static [u8] {
    static ZEROES: [u8; 1 << HUGE.shift()] = [0; 1 << HUGE.shift()];
    &ZEROES
}

/// The bytes of a range if they are at hand, and all of them.
fn at_hand<'a>(
    reader: &'a mut dyn PageReader,
    len: u64,
    range: vmpager_core::ByteRange,
) -> Result<Option<PageData<'a>>, SourceError> {
    let data = reader.try_read(range)?;
    debug_assert!(data.is_none_or(|data| data.len() as u64 == len), "readers return whole ranges");
    Ok(data.filter(|data| data.len() as u64 == len))
}

/// Where the kernel finds the bytes. They stay put until the reader's next
/// call, which comes after the install.
fn address_of(data: PageData<'_>) -> usize {
    match data {
        PageData::Bytes(bytes) => bytes.as_ptr() as usize,
        PageData::Mapped { addr, .. } => addr,
    }
}
