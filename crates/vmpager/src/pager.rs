//! The pager inside a VMM: the memory is this process's own, and so is the
//! thread that serves it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use tracing::info;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{ByteRange, Hva, PageSize, PageSource, Slot, SlotError, SlotSet, SourceError};
use vmpager_store::profile::{Profile, Recorder};
use vmpager_sys::memory::GuestRange;
use vmpager_sys::peer::own_pidfd;
use vmpager_sys::uffd::{Features, OpenError, Userfaultfd};

use crate::attach::{Door, QueueOwner, ShareError, SharedRegion, Stock, Wares};
use crate::hot;
use crate::installer::Installer;
use crate::reads::MemoryId;
use crate::served::{ServeOptions, Served, State};
use crate::stats::{EndReason, MemoryNumbers, SessionSummary, Tally};
use crate::worker::{
    Command, Event, Sharing, WorkerConfig, WorkerError, WorkerHandle, doorbell, spawn,
};

/// Why a pager could not start.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The regions do not fit together, or not the source.
    #[error(transparent)]
    Slots(#[from] SlotError),
    /// No userfaultfd could be had.
    #[error(transparent)]
    Userfaultfd(#[from] OpenError),
    /// A region cannot be served.
    #[error(
        "registering {len:#x} bytes at {hva}: {error}; the memory must be mapped, page-aligned, \
         anonymous or hugetlb, and not registered with another userfaultfd"
    )]
    Register {
        /// Where the region is.
        hva: Hva,
        /// Its length in bytes.
        len: u64,
        /// What the kernel said.
        error: io::Error,
    },
    /// The thread that serves could not start.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// Descriptors or memory could not be had.
    #[error("starting the pager: {0}")]
    Io(#[from] io::Error),
}

/// Why a memory is not frozen, or not thawed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// What the kernel says.
    #[error("{0}")]
    Kernel(String),
    /// Nobody can be stopped any more.
    #[error("the memory is served no longer; stop the threads that write instead")]
    NotServed,
}

/// Describes the memory a [`Pager`] serves.
#[derive(Debug)]
pub struct PagerBuilder {
    source: Arc<dyn PageSource>,
    regions: Vec<(GuestRange, u64, PageSize)>,
    options: ServeOptions,
    max_polling: Duration,
}

/// Serves guest memory of this process from a source, page by page as it is
/// touched, or all of it in the background.
///
/// ```
/// use std::sync::Arc;
/// use vmpager::{GuestRange, Pager};
/// use vmpager::store::MemorySource;
/// use vmpager_sys::memory::Mapping;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // A snapshot of 16 pages, each filled with its number.
/// let snapshot: Vec<u8> = (0..16u8).flat_map(|page| [page; 4096]).collect();
/// let source = Arc::new(MemorySource::new(snapshot));
///
/// let memory = Arc::new(Mapping::anonymous(16 * 4096)?);
/// let pager = match Pager::builder(source).region(&GuestRange::of_mapping(&memory), 0).start() {
///     Err(error @ vmpager::PagerError::Userfaultfd(_)) => {
///         println!("skipped: {error}");
///         return Ok(());
///     }
///     other => other?,
/// };
/// // The page is not there until it is touched.
/// assert_eq!(memory.read_u64(7 * 4096), 0x0707_0707_0707_0707);
/// assert!(pager.stats().faults >= 1);
/// # Ok(())
/// # }
/// ```
///
/// # What it cannot see
///
/// A child that this process forks gets a copy of the memory that nobody
/// serves, and reads zeroes where pages are missing: mark the memory
/// `MADV_DONTFORK`. In shared memory (`MAP_SHARED`), a page that others give
/// back or fill is not told apart from a missing one: serve private memory.
///
/// # Dropping
///
/// Once every page is in place ([`wait_filled`](Self::wait_filled)) the pager
/// has let go of the memory and dropping it changes nothing. Dropped earlier,
/// it **poisons** what is missing: touching such a page raises SIGBUS, since
/// without a pager the kernel would show zeroes for it.
#[derive(Debug)]
pub struct Pager {
    worker: WorkerHandle,
    source: Arc<dyn PageSource>,
    events: Receiver<Event>,
    memory: MemoryId,
    /// In the order given.
    slots: Vec<Slot>,
    /// What is brought first, if there is a profile.
    replay: Option<Arc<[ByteRange]>>,
    /// Every page is in place.
    complete: AtomicBool,
    /// The end of serving, once it came.
    ended: std::sync::Mutex<Option<(EndReason, MemoryNumbers)>>,
    _doorbell: Arc<OwnedFd>,
}

impl PagerBuilder {
    /// Adds a range of guest memory in base pages, whose contents start at
    /// `source_offset` in the source.
    #[must_use]
    pub fn region(self, range: &GuestRange, source_offset: u64) -> Self {
        self.region_of(range, source_offset, PageSize::Size4K)
    }

    /// Adds a range of guest memory in pages of that size.
    #[must_use]
    pub fn region_of(mut self, range: &GuestRange, source_offset: u64, size: PageSize) -> Self {
        self.regions.push((range.clone(), source_offset, size));
        self
    }

    /// Adds all regions of a VMM's guest memory, whose contents lie in the
    /// source one after another, in guest-physical order.
    #[cfg(feature = "vm-memory")]
    #[must_use]
    pub fn guest_memory(mut self, memory: &vm_memory::GuestMemoryMmap) -> Self {
        let mut offset = 0;
        for range in GuestRange::of_guest_memory(memory) {
            let len = range.len();
            self.regions.push((range, offset, PageSize::Size4K));
            offset += len;
        }
        self
    }

    /// Whether to bring in all pages, asked for or not. Off by default: memory
    /// nobody touches then costs nothing.
    #[must_use]
    pub fn background_fill(mut self, fill: bool) -> Self {
        self.options.background_fill = fill;
        self
    }

    /// Whether to bring memory in by 2 MiB, in huge pages, with
    /// [`background_fill`](Self::background_fill); and to make huge pages of
    /// 2 MiB that are in place, once nobody has faulted for a while. Off by
    /// default: the first touch of 2 MiB takes as long as reading them.
    ///
    /// Needs private anonymous memory, aligned to 2 MiB; Linux 6.8 to move
    /// pieces in, 6.1 to make them later.
    #[must_use]
    pub fn huge_pages(mut self, huge: bool) -> Self {
        self.options.huge_pages = huge;
        self
    }

    /// What to install along with a demanded page.
    #[must_use]
    pub fn neighbours(mut self, policy: NeighbourPolicy) -> Self {
        self.options.neighbours = policy;
        self
    }

    /// Brings in what a profile of the source says before other pages, while the
    /// guest runs; pages that somebody waits for go first.
    #[must_use]
    pub fn profile(mut self, profile: &Profile) -> Self {
        self.options.replay = Some(ServeOptions::order_of(profile));
        self
    }

    /// Leaves there which pages were waited for, once serving ends.
    #[must_use]
    pub fn record(mut self, recorder: Arc<Recorder>) -> Self {
        self.options.record = Some(recorder);
        self
    }

    /// The longest time to poll for the next fault before sleeping. The
    /// default, 100 us (none on a single CPU), is spent only while faults keep
    /// coming.
    #[must_use]
    pub fn max_polling(mut self, max: Duration) -> Self {
        self.max_polling = max;
        self
    }

    /// Registers the memory and starts to serve it.
    ///
    /// Pages that are present already stay as they are.
    ///
    /// # Errors
    ///
    /// If the regions do not fit the source, this user may have no
    /// userfaultfd, or a region cannot be registered.
    pub fn start(self) -> Result<Pager, PagerError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let slots: Vec<Slot> = self
            .regions
            .iter()
            .map(|(range, source_offset, page_size)| Slot {
                hva: Hva(range.hva()),
                len: range.len(),
                source_offset: *source_offset,
                page_size: *page_size,
            })
            .collect();
        let regions = slots.clone();
        let slots = SlotSet::new(&slots, self.source.len())?;
        let state = State::new(&slots, &*self.source)?;
        let uffd = open_userfaultfd(self.options.huge_pages)?;
        let memory = MemoryId(NEXT.fetch_add(1, Ordering::Relaxed));
        let (tell, events) = crossbeam_channel::unbounded();
        let doorbell = Arc::new(doorbell()?);
        let worker = spawn(WorkerConfig {
            name: format!("vmpager-{}", memory.0),
            source: self.source.clone(),
            events: tell,
            owner: doorbell.clone(),
            max_polling: self.max_polling,
            // It serves nobody else.
            turn: usize::MAX,
        })?;
        let options = self.options;
        // All pages shall come: whoever touches one may as well have its 2 MiB.
        let moves = options.huge_pages && options.background_fill && uffd.can_move();
        for (range, _, _) in &self.regions {
            if moves && let Err(error) = range.want_huge_pages() {
                info!("no huge pages at {:#x}: {error}", range.hva());
            }
            uffd.register_missing(range).map_err(|error| PagerError::Register {
                hva: Hva(range.hva()),
                len: range.len(),
                error,
            })?;
        }
        let mut served = Served::new(memory, uffd, slots, state, &*self.source, &options)
            .of_process(rustix::process::getpid().as_raw_pid())
            .keeping(self.regions.into_iter().map(|(range, _, _)| range).collect());
        if options.huge_pages {
            served = served.making_huge_pages(own_pidfd()?);
            if moves {
                served = served.moving_pieces();
            }
        }
        worker.tell(Command::Serve(Box::new(served)));
        Ok(Pager {
            worker,
            source: self.source,
            events,
            memory,
            slots: regions,
            replay: options.replay,
            complete: AtomicBool::new(false),
            ended: Default::default(),
            _doorbell: doorbell,
        })
    }
}

impl Pager {
    /// Describes what to serve from `source`.
    pub fn builder(source: Arc<dyn PageSource>) -> PagerBuilder {
        PagerBuilder {
            source,
            regions: Vec::new(),
            options: ServeOptions::default(),
            max_polling: crate::polling::default_max(),
        }
    }

    /// A way for one thread to install pages by itself. `None` if the memory is
    /// served no longer, all of it being in place.
    ///
    /// # Errors
    ///
    /// If the source gives no reader.
    pub fn installer(&self) -> Result<Option<Installer>, SourceError> {
        let (to, shared) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Share(self.memory, to));
        let Ok(shared) = shared.recv() else { return Ok(None) };
        self.worker.tell(Command::Sharing(self.memory, Sharing::Exits));
        let reader = self.source.clone().open_reader()?;
        let teller = self.worker.teller().clone();
        Ok(Some(Installer::new(shared, reader, teller, self.memory)))
    }

    /// Opens a door at `path` where other processes may come to take part in
    /// the memory ([`Attached`](crate::Attached)): `regions` says where each of
    /// the pager's regions lies, in the order they were added. They must be
    /// shared mappings of memfds.
    ///
    /// From then on the memory stays registered, also when all of it is in
    /// place.
    ///
    /// # Errors
    ///
    /// If the regions cannot be shared, the memory is served no longer or is
    /// shared already, or the socket cannot be had.
    pub fn share(&self, path: &Path, regions: &[SharedRegion]) -> Result<Door, ShareError> {
        let (to, shared) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Share(self.memory, to));
        let gone = || ShareError::Memory("it is served no longer".into());
        let shared = shared.recv().map_err(|_| gone())?;
        let stock = Stock {
            memory: self.memory,
            worker: self.worker.teller().clone(),
            slots: &self.slots,
            source_len: self.source.len(),
            map: shared.pages.map(),
        };
        let (wares, reader, table) = Wares::new(&stock, regions, QueueOwner::new()?)?;
        let (to, done) = crossbeam_channel::bounded(1);
        let open = Sharing::Open(Box::new((reader, table)), to);
        self.worker.tell(Command::Sharing(self.memory, open));
        done.recv().map_err(|_| gone())?.map_err(ShareError::Memory)?;
        Door::open(path, wares)
    }

    /// Keeps everybody from writing to the memory, in every process: when this
    /// returns, whoever wrote has written, and whoever writes waits for
    /// [`thaw`](Self::thaw). Reading goes on, and so does bringing pages.
    ///
    /// # Errors
    ///
    /// If the kernel cannot protect this memory, or it is served no longer.
    /// Then all may write.
    pub fn freeze(&self) -> Result<(), FreezeError> {
        self.set_frozen(true)
    }

    /// Lets everybody write again.
    ///
    /// # Errors
    ///
    /// If the kernel does not lift the protection, or the memory is served no
    /// longer.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), FreezeError> {
        let (to, done) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Sharing(self.memory, Sharing::Freeze(frozen, to)));
        match done.recv() {
            Ok(done) => done.map_err(FreezeError::Kernel),
            Err(_) => Err(FreezeError::NotServed),
        }
    }

    /// The pages of the [profile](PagerBuilder::profile) that are in place by now: where
    /// they lie in this process, in bytes, and how many bytes from there on; in the order
    /// in which they are brought. Empty without a profile, or if serving failed.
    ///
    /// Such a page can be touched without a wait, unless it is given back meanwhile. A VMM
    /// may have KVM map them before the guest runs (`vmpager_kvm::ahead`).
    pub fn hot_in_place(&self) -> Vec<(Hva, u64)> {
        let Some(order) = &self.replay else { return Vec::new() };
        let (to, shared) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Share(self.memory, to));
        if let Ok(shared) = shared.recv() {
            let pages = &shared.pages;
            return hot::in_place(pages.slots(), order, |page| pages.map().is_present(page));
        }
        // Served no longer: all of it is in place, or who knows.
        match SlotSet::new(&self.slots, self.source.len()) {
            Ok(slots) if self.wait_filled(Duration::ZERO) => hot::in_place(&slots, order, |_| true),
            _ => Vec::new(),
        }
    }

    /// Starts to bring in all pages, if that was not asked for at first.
    pub fn fill(&self) {
        self.worker.tell(Command::Fill(self.memory));
    }

    /// Waits until every page is in place and the memory is no longer served (it
    /// still is if it is [shared](Self::share)). False if that took longer than
    /// `timeout`, or will not happen.
    pub fn wait_filled(&self, timeout: Duration) -> bool {
        let mut ended = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let until = Instant::now() + timeout;
        while ended.is_none() {
            // What has happened is heard first.
            let is_complete = self.complete.load(Ordering::Relaxed);
            let event = match is_complete {
                true => self.events.try_recv().map_err(|_| RecvTimeoutError::Timeout),
                false => self.events.recv_deadline(until),
            };
            match event {
                Ok(Event::Complete(_)) => self.complete.store(true, Ordering::Relaxed),
                Ok(Event::Ended { reason, numbers, held, .. }) => {
                    *ended = Some((reason, *numbers));
                    if let Some(mut held) = held
                        && !held.poison_missing()
                    {
                        // Held for ever beats zeroes.
                        std::mem::forget(held);
                    }
                }
                Ok(Event::StillAlive(_)) => {}
                Ok(Event::Stopped) | Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => return is_complete,
            }
        }
        matches!(&*ended, Some((EndReason::Filled, _)))
    }

    /// What was done so far.
    pub fn stats(&self) -> SessionSummary {
        let mut tally = Tally::new();
        let mut reason = None;
        let (to, numbers) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Report(self.memory, to));
        match numbers.recv() {
            Ok(numbers) => tally.add(&numbers),
            // Serving has ended: the numbers came with the end.
            Err(_) => {
                self.wait_filled(Duration::ZERO);
                let ended = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if let Some((why, numbers)) = &*ended {
                    tally.add(numbers);
                    reason = Some(why.clone());
                }
            }
        }
        tally.summary(self.memory.0, 0, reason)
    }
}

/// A userfaultfd that says which thread faults; and can move pages, if that is
/// wanted and the kernel can.
fn open_userfaultfd(moving: bool) -> Result<Userfaultfd, OpenError> {
    let features = Features::EVENT_REMOVE.union(Features::THREAD_ID);
    if moving && let Ok(uffd) = Userfaultfd::open(features.union(Features::MOVE)) {
        return Ok(uffd);
    }
    Userfaultfd::open(features)
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.worker.tell(Command::Stop { until: Instant::now(), poison: vec![self.memory] });
        if let Some(thread) = self.worker.thread.take() {
            let _ = thread.join();
        }
    }
}
