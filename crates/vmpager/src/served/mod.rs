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

mod background;
mod clean;
mod huge;
mod install;
mod limits;
mod origin;
mod outside;
mod record;
mod replay;
mod takeover;
mod turn;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, warn};
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::prefetch::limits::COLD_WINDOW;
use vmpager_core::{
    ByteRange, Engine, FaultPlan, Hva, PageData, PageMap, PageReader, PageRun, PageSource,
    Priority, SlotSet, SourceError,
};
use vmpager_store::profile::{Profile, Recorder};
use vmpager_sys::memory::GuestRange;
use vmpager_sys::shared::SharedWords;
use vmpager_sys::uffd::{Features, Message, Messages, Userfaultfd};

pub(crate) use self::background::Filled;
use self::install::{Asleep, Put};
pub(crate) use self::install::{Leftover, zeroes};
use self::limits::Bandwidth;
pub use self::limits::SessionLimits;
use self::origin::{Origin, Threads};
use self::outside::Outside;
pub(crate) use self::outside::{View, ViewId};
use self::record::{Flag, Record};
pub(crate) use self::record::{RecordError, State, VERSION as RECORD_VERSION};
pub(crate) use self::turn::Turn;
use crate::arrival::Arrival;
use crate::clean::CleanPages;
use crate::kill;
use crate::reads::{MemoryId, Reads, Waiter};
use crate::shared::{Serving, Shared};
use crate::stats::{Counters, MemoryNumbers};

/// How memory is served.
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// Bring in all pages, not only those asked for, then let go of the memory.
    pub background_fill: bool,
    /// Make huge pages of 2 MiB of base pages that are in place.
    pub huge_pages: bool,
    /// What to install along with a demanded page.
    pub neighbours: NeighbourPolicy,
    /// Ranges of the source to bring in before others, in this order: what a
    /// profile says the guest will touch.
    pub replay: Option<Arc<[ByteRange]>>,
    /// Where to leave which pages were touched: those that somebody waited for.
    pub record: Option<Arc<Recorder>>,
    /// What each memory may take of what all share.
    pub limits: SessionLimits,
}

impl ServeOptions {
    /// What to replay of a profile of the source.
    pub fn order_of(profile: &Profile) -> Arc<[ByteRange]> {
        Self::ranges_of(profile.replay_order()).into()
    }

    /// The bytes of these pages.
    pub fn ranges_of(pages: Vec<std::ops::Range<u32>>) -> Vec<ByteRange> {
        let bytes = |run: std::ops::Range<u32>| {
            let (start, end) = (u64::from(run.start) * 4096, u64::from(run.end) * 4096);
            ByteRange::new(start, end - start)
        };
        pages.into_iter().map(bytes).collect()
    }
}

/// Why a memory is served no longer.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The process is gone.
    PeerGone,
    /// It cannot be served, for this reason.
    Failed(String),
}

/// Pages to be planned again later.
#[derive(Debug, Default)]
struct Retry {
    waiters: VecDeque<Waiter>,
    /// Pages given back that others may wait for too: woken, they ask again.
    wake: Vec<PageRun>,
    at: Option<Instant>,
    pause: Duration,
}

/// A fault that was read and has to wait for its turn.
#[derive(Clone, Copy, Debug)]
struct Pending {
    hva: Hva,
    /// Whose view it came by, if by one.
    view: Option<ViewId>,
    /// When it can have come at the earliest.
    since: Instant,
}

/// The memory behind one userfaultfd.
#[derive(Debug)]
pub(crate) struct Served {
    id: MemoryId,
    uffd: Arc<Userfaultfd>,
    engine: Engine<SharedWords>,
    record: Record,
    /// Lies in the record.
    messages: Messages,
    /// Faults read and not yet served.
    faults: VecDeque<Pending>,
    /// Who waits until a read of this memory has ended: no more may be in flight.
    unread: VecDeque<Waiter>,
    limits: SessionLimits,
    bandwidth: Option<Bandwidth>,
    retry: Retry,
    counters: Counters,
    fill: bool,
    ahead: replay::Ahead,
    recording: Option<replay::Recording>,
    /// All of it is in place and registered no more.
    detached: bool,
    /// How much the fill installs at a time.
    chunk: background::Chunk,
    /// Userfaultfds of forked children.
    children: Vec<OwnedFd>,
    /// This process's own memory, if that is what is served.
    kept: Vec<GuestRange>,
    complained: Complaints,
    /// The huge page that was last woken instead of installed.
    woken: Option<Waiter>,
    /// Who is to be woken together with others.
    asleep: Option<Asleep>,
    /// What others who install pages know, if there are any.
    shared: Option<Arc<Shared>>,
    arrival: Arrival,
    /// Other processes.
    outside: Outside,
    /// Who has huge pages made, if they are.
    huge: Option<huge::Huge>,
    /// What it is a private mapping of, if it is.
    clean: Option<Arc<CleanPages>>,
    /// The threads whose faults come by the userfaultfd, if it names them.
    threads: Option<Threads>,
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
    /// Serves `slots` of the process that `uffd` belongs to; what a successor
    /// must know of them lies in `state`.
    pub(crate) fn new(
        id: MemoryId,
        uffd: Userfaultfd,
        slots: SlotSet,
        state: State,
        source: &dyn PageSource,
        options: &ServeOptions,
    ) -> Self {
        let mut engine = Engine::new(slots, state.map, options.neighbours);
        source.visit_zero_ranges(&mut |range| engine.known_zero(range));
        if let Some(order) = &options.replay {
            engine.replay(order);
        }
        Self::over(id, uffd, engine, state.record, options)
    }

    fn over(
        id: MemoryId,
        uffd: Userfaultfd,
        engine: Engine<SharedWords>,
        record: Record,
        options: &ServeOptions,
    ) -> Self {
        Self {
            id,
            uffd: Arc::new(uffd),
            engine,
            messages: record.messages(),
            record,
            faults: VecDeque::new(),
            unread: VecDeque::new(),
            limits: options.limits,
            bandwidth: options.limits.bandwidth.map(|rate| Bandwidth::new(rate, Instant::now())),
            retry: Retry::default(),
            counters: Counters::new(),
            fill: options.background_fill,
            ahead: replay::Ahead::new(),
            recording: options.record.as_ref().map(replay::Recording::new),
            detached: false,
            chunk: background::Chunk::new(),
            children: Vec::new(),
            kept: Vec::new(),
            complained: Complaints::default(),
            woken: None,
            asleep: None,
            shared: None,
            arrival: Arrival::new(),
            outside: Outside::default(),
            huge: None,
            clean: None,
            threads: None,
        }
    }

    /// Counts the faults of that process by the threads that take them, if its
    /// userfaultfd names these.
    pub(crate) fn of_process(mut self, pid: i32) -> Self {
        let names = self.uffd.features().contains(Features::THREAD_ID);
        self.threads = names.then(|| Threads::of(pid));
        self
    }

    /// Keeps this process's own memory mapped while it is served.
    pub(crate) fn keeping(mut self, kept: Vec<GuestRange>) -> Self {
        self.kept = kept;
        self
    }

    pub(crate) fn id(&self) -> MemoryId {
        self.id
    }

    /// Where it is known which pages are present.
    pub(crate) fn map(&self) -> &PageMap<SharedWords> {
        self.engine.map()
    }

    /// How many processes took this memory over.
    pub(crate) fn takeovers(&self) -> u64 {
        self.record.takeovers()
    }

    /// How much memory it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.engine.slots().bytes()
    }

    /// The descriptor that is readable while somebody waits.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Whether a read would stop the worker: the peer shares the descriptor's
    /// flags, and may have cleared O_NONBLOCK.
    pub(crate) fn is_blocking(&self) -> bool {
        let flags = rustix::fs::fcntl_getfl(&self.uffd);
        flags.is_ok_and(|flags| !flags.contains(rustix::fs::OFlags::NONBLOCK))
    }

    /// When put-off pages are due.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry.at
    }

    /// Whether there is something to be brought in from the start.
    pub(crate) fn wants_fill(&self) -> bool {
        self.fill || self.has_profile()
    }

    /// All of it shall be brought in from now on.
    pub(crate) fn want_fill(&mut self) {
        self.fill = true;
    }

    pub(crate) fn numbers(&self) -> MemoryNumbers {
        let mut counters = self.counters.clone();
        if let Some(shared) = &self.shared {
            counters.brought_by_installers(shared.brought());
        }
        let slots = self.engine.slots();
        MemoryNumbers {
            counters,
            profile: self.engine.replay_counts(),
            regions: slots.iter().count() as u64,
            memory_bytes: slots.bytes(),
            pages_missing: self.engine.outstanding(),
            page_bytes: slots.bytes() / slots.pages().max(1),
        }
    }

    /// Nobody waited at this time, or the worker would have been told.
    pub(crate) fn nobody_waited_at(&mut self, at: Instant) {
        self.arrival.nobody_at(at);
    }

    /// Whether the process still has the memory.
    pub(crate) fn is_alive(&self) -> bool {
        self.engine
            .slots()
            .iter()
            .any(|slot| self.uffd.is_alive(slot.hva.0, slot.page_size.bytes()))
    }

    /// Whether any was due.
    fn serve_retries(&mut self, reads: &mut Reads) -> Result<bool, Lost> {
        self.retry.at = None;
        for run in std::mem::take(&mut self.retry.wake) {
            let (hva, len) = self.address(run);
            self.wake(hva, len)?;
        }
        let due = self.retry.waiters.len();
        for _ in 0..due {
            let Some(waiter) = self.retry.waiters.pop_front() else { break };
            let plan = self.engine.plan(waiter.page);
            self.carry_out(plan, waiter.since, reads)?;
        }
        if self.retry.waiters.is_empty() && self.retry.at.is_none() {
            self.retry.pause = Duration::ZERO;
        }
        Ok(due > 0)
    }

    /// Lets others install pages too.
    pub(crate) fn share(&mut self) -> Arc<Shared> {
        let shared = self.shared.get_or_insert_with(|| {
            Arc::new(Shared::new(self.engine.pages().clone(), self.uffd.clone()))
        });
        shared.clone()
    }

    /// Tells others who install pages that this memory is served no longer.
    pub(crate) fn stop_sharing(&mut self) {
        self.end_sharing(Serving::Ended);
    }

    /// The same, and why.
    pub(crate) fn end_sharing(&mut self, how: Serving) {
        if let Some(shared) = self.shared.take() {
            shared.end(how);
            self.counters.brought_by_installers(shared.brought());
        }
    }

    /// Brings a page that another installer has claimed and cannot bring.
    pub(crate) fn bring(&mut self, run: PageRun, reads: &mut Reads) -> Result<(), Lost> {
        self.engine.released(run);
        self.engine.demanded();
        let since = Instant::now();
        for page in run.pages() {
            self.counters.faults += 1;
            self.counters.faults_vcpu += 1;
            let plan = self.engine.plan(page);
            self.carry_out(plan, since, reads)?;
        }
        Ok(())
    }

    /// Reads one batch: removals are applied at once, faults queued. Returns when it
    /// looked.
    fn read_events(&mut self) -> Result<Instant, Lost> {
        let shared = self.shared.clone();
        let _gate = shared.as_ref().map(|shared| shared.applying());
        let now = Instant::now();
        self.arrival.look(now);
        let since = self.arrival.since();
        self.uffd
            .read(&mut self.messages)
            .map_err(|e| Lost::Failed(format!("reading the userfaultfd: {e}")))?;
        if self.messages.len() == Messages::BATCH {
            self.arrival.left_some();
        }
        kill::point("read");
        let mut protected = Vec::new();
        for message in self.messages.drain() {
            match message {
                Message::Fault { address, flags, .. } if flags & Message::PROTECTED != 0 => {
                    protected.push(Hva(address));
                }
                Message::Fault { address, thread, .. } => {
                    self.counters.faults += 1;
                    self.faults.push_back(Pending { hva: Hva(address), view: None, since });
                    let exits = self.outside.exits;
                    match self.threads.as_mut().map(|threads| threads.origin(thread, exits)) {
                        Some(Origin::Vcpu) => self.counters.faults_vcpu += 1,
                        Some(Origin::Vmm) => self.counters.faults_vmm += 1,
                        Some(Origin::Kernel) => self.counters.faults_kernel += 1,
                        None => {}
                    }
                }
                Message::Remove { start, end, .. } => {
                    self.counters.pages_removed += self.engine.removed(Hva(start), Hva(end));
                    kill::point("removed");
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
        kill::point("applied");
        self.messages.clear();
        kill::point("cleared");
        protected.into_iter().for_each(|hva| self.let_write(hva));
        self.read_outside()?;
        Ok(now)
    }

    fn fault(&mut self, hva: Hva, since: Instant, reads: &mut Reads) -> Result<(), Lost> {
        let page = self.engine.slots().page_at(hva);
        if page.is_some_and(|page| self.fault_by_piece(page, since, reads)) {
            self.engine.demanded();
            return Ok(());
        }
        let Some(plan) = self.engine.fault(hva) else {
            if !std::mem::replace(&mut self.complained.outside, true) {
                error!(
                    "a fault at {hva} is outside every region of the handshake; its thread is held"
                );
            }
            // Letting go of the memory would let it read zeroes.
            self.record.set(Flag::MustHold);
            return Ok(());
        };
        self.carry_out(plan, since, reads)
    }

    /// Brings in the whole piece around a page somebody waits for, if pieces are
    /// moved, this one can be, and its bytes are at hand. Whether it did.
    fn fault_by_piece(&mut self, page: u64, since: Instant, reads: &mut Reads) -> bool {
        let moves = self.moves_pieces();
        let Some(whole) = moves.then(|| self.engine.claim_piece(page)).flatten() else {
            return false;
        };
        let pages = self.bring_piece(&whole, reads);
        if page >= whole.piece.first + pages {
            return false;
        }
        self.counters.pages_demand += 1;
        self.counters.pages_neighbour += pages - 1;
        self.stalled(Waiter { page, since });
        true
    }

    fn carry_out(
        &mut self,
        plan: FaultPlan,
        since: Instant,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        kill::point("planned");
        if self.recording.is_some() {
            self.record(plan, since);
        }
        match plan {
            FaultPlan::Fetch { page, run } => self.fetch(run, Waiter { page, since }, reads),
            FaultPlan::Zero(run) => {
                let end = self.put(run, Put::Zeroes)?;
                self.counters.pages_zero += end.pages;
                self.settle(Waiter { page: run.first, since }, end, reads)
            }
            FaultPlan::InFlight(page) => self.join(Waiter { page, since }, reads),
            FaultPlan::Confirm(page) => self.confirm(Waiter { page, since }, reads),
            FaultPlan::Poisoned(page) => {
                let end = self.put(PageRun::new(page, 1), Put::Poison)?;
                self.let_go(PageRun::new(page, 1));
                self.settle(Waiter { page, since }, end, reads)
            }
        }
    }

    /// Waits for a read in flight, unless the page itself is at hand: a cold
    /// page must not hold up the warm ones that are read along with it.
    fn join(&mut self, waiter: Waiter, reads: &mut Reads) -> Result<(), Lost> {
        self.counters.joined += 1;
        if !reads.covers(self.id, waiter.page) {
            // An installer beside us is at it: its install wakes the waiter.
            self.await_installers();
            return Ok(());
        }
        let one = PageRun::new(waiter.page, 1);
        let (_, range) = self.engine.slots().locate(one);
        if let Ok(Some(data)) = at_hand(&mut *reads.reader, range) {
            let end = self.put(one, Put::Bytes(data.address()))?;
            if end.rest.is_none() {
                self.count_installed(one, Some(waiter), end.pages);
                self.stalled(waiter);
                return Ok(());
            }
            // The claim belongs to the read: it will install the page.
        }
        reads.promote(self.id, waiter);
        Ok(())
    }

    /// Reads a claimed run and installs it: at once if its bytes are at hand,
    /// else when they are.
    fn fetch(&mut self, run: PageRun, waiter: Waiter, reads: &mut Reads) -> Result<(), Lost> {
        let run = self.shorten_to_bytes(run, waiter.page, reads.reader.at_hand_bytes());
        // Neighbours are taken along, not asked for.
        let most = if self.may_take(Instant::now()) { run.count } else { 1 };
        let run = if most < run.count { self.shorten(run, waiter.page, most) } else { run };
        let (_, range) = self.engine.slots().locate(run);
        match at_hand(&mut *reads.reader, range) {
            Ok(Some(data)) => {
                let src = data.address();
                return self.install_demanded(run, src, waiter, reads);
            }
            Ok(None) if run.count > 1 => {
                // A cold neighbour must not hold up a warm page.
                let one = PageRun::new(waiter.page, 1);
                let (_, range) = self.engine.slots().locate(one);
                if let Ok(Some(data)) = at_hand(&mut *reads.reader, range) {
                    let src = data.address();
                    self.engine.released(PageRun::new(run.first, one.first - run.first));
                    self.engine.released(PageRun::new(one.end(), run.end() - one.end()));
                    return self.install_demanded(one, src, waiter, reads);
                }
            }
            Ok(None) => {}
            Err(error) => {
                let read = self.background(run, Priority::Demand, Some(waiter));
                return self.read_failed(read, &error, reads);
            }
        }
        let run = self.shorten(run, waiter.page, COLD_WINDOW);
        if reads.demands_of(self.id) >= self.limits.reads {
            self.engine.released(run);
            self.tell_installers();
            self.unread.push_back(waiter);
            return Ok(());
        }
        reads.submit(self.background(run, Priority::Demand, Some(waiter)));
        kill::point("submitted");
        Ok(())
    }

    /// Keeps of a claimed run only the pages around one, aligned to `most`, a
    /// power of two; the others are given back.
    fn shorten(&mut self, run: PageRun, page: u64, most: u64) -> PageRun {
        let first = run.first.max(page & !(most - 1));
        let end = run.end().min((page | (most - 1)) + 1);
        self.engine.released(PageRun::new(run.first, first - run.first));
        self.engine.released(PageRun::new(end, run.end() - end));
        PageRun::new(first, end - first)
    }

    /// The same, of at most so many bytes, but a page at least.
    fn shorten_to_bytes(&mut self, run: PageRun, page: u64, bytes: u64) -> PageRun {
        let (slot, _) = self.engine.slots().slot_of(page);
        match (bytes >> slot.page_size.shift()).max(1) {
            most if most < run.count => self.shorten(run, page, most),
            _ => run,
        }
    }
}

/// The bytes of a range, if all of them are at hand.
fn at_hand(
    reader: &mut dyn PageReader,
    range: ByteRange,
) -> Result<Option<PageData<'_>>, SourceError> {
    let data = reader.try_read(range)?;
    let whole = |data: &PageData<'_>| data.len() as u64 == range.len;
    debug_assert!(data.as_ref().is_none_or(whole), "readers return whole ranges");
    Ok(data.filter(whole))
}
