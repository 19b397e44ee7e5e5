//! Putting things into pages, and what to do where the kernel will not.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tracing::{error, info};
use vmpager_core::{Hva, PageRun, PageSize, Priority};
use vmpager_sys::uffd::{Installed, Stop};

use super::{Flag, Lost, Served};
use crate::kill;
use crate::reads::{Reads, Waiter};

/// What is put into a run of pages.
#[derive(Clone, Copy, Debug)]
pub(super) enum Put {
    /// Bytes at an address of this process, for the kernel to read.
    Bytes(usize),
    Zeroes,
    Poison,
}

/// How far putting came.
#[derive(Debug)]
pub(super) struct PutEnd {
    /// Pages that were absent and have contents now.
    pub(super) pages: u64,
    /// What was left out from some page on, and why.
    pub(super) rest: Option<(PageRun, Stop)>,
}

/// The pause after the first EAGAIN. The thread that changes the layout needs
/// to run; a page fault costs about as much.
pub(super) const FIRST_RETRY: Duration = Duration::from_micros(20);
pub(super) const LAST_RETRY: Duration = Duration::from_millis(5);
/// The pause while the host has no memory, or refuses for a reason of its own.
const LONG_RETRY: Duration = Duration::from_millis(100);

/// Waiters whose pages are in place, but who were not woken yet.
#[derive(Debug)]
pub(super) struct Asleep {
    /// The host addresses among which they wait.
    start: u64,
    end: u64,
    waiters: u64,
}

/// A run that could not be put.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leftover {
    pub(super) rest: PageRun,
    pub(super) stop: Stop,
    /// Who waits for a page of it.
    pub(super) waiter: Option<Waiter>,
}

impl Served {
    /// Installs a claimed run, a page of which somebody waits for.
    pub(super) fn install_demanded(
        &mut self,
        run: PageRun,
        src: usize,
        waiter: Waiter,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        let end = match self.put_through_view(run, src)? {
            Some(end) => end,
            None => self.put(run, Put::Bytes(src))?,
        };
        self.count_installed(run, Some(waiter), end.pages);
        self.settle(waiter, end, reads)
    }

    /// Counts `pages` of a run as installed from the source.
    pub(super) fn count_installed(&mut self, run: PageRun, waiter: Option<Waiter>, pages: u64) {
        let (slot, _) = self.engine.slots().slot_of(run.first);
        let page = slot.page_size.bytes();
        self.took(run.count * page, waiter.map_or(0, |_| page));
        match waiter {
            Some(_) if pages > 0 => {
                self.counters.pages_demand += 1;
                self.counters.pages_neighbour += pages - 1;
            }
            _ => self.counters.pages_fill += pages,
        }
    }

    /// Somebody found a page missing that was installed: see
    /// [`FaultPlan::Confirm`](vmpager_core::FaultPlan::Confirm).
    pub(super) fn confirm(&mut self, waiter: Waiter, reads: &mut Reads) -> Result<(), Lost> {
        self.counters.confirmed += 1;
        if self.confirm_clean(waiter, reads)? {
            return Ok(());
        }
        let one = PageRun::new(waiter.page, 1);
        let (hva, len) = self.address(one);
        match self.put_once(hva, len, Put::Zeroes).stop {
            None => {
                kill::point("zero put");
                self.engine.replaced_by_zero(waiter.page);
                self.let_go(one);
                self.counters.pages_zero += 1;
                self.stalled(waiter);
                Ok(())
            }
            // Of a huge page the kernel may mean that the pool is empty: the
            // waiter then comes again at once, and must be held.
            Some(Stop::Present) if len < HUGE.bytes() || !self.woken_lately(waiter) => {
                self.stalled(waiter);
                self.wake(hva, len)
            }
            Some(stop) => self.settle(waiter, PutEnd { pages: 0, rest: Some((one, stop)) }, reads),
        }
    }

    /// Whether the page a waiter waits for was woken a moment ago; remembers
    /// that it will be now.
    fn woken_lately(&mut self, waiter: Waiter) -> bool {
        let before = self.woken.replace(waiter);
        before
            .is_some_and(|before| before.page == waiter.page && before.since.elapsed() < LONG_RETRY)
    }

    /// Puts the same thing into all pages of a run that are absent.
    pub(super) fn put(&mut self, run: PageRun, what: Put) -> Result<PutEnd, Lost> {
        let mut pages = 0;
        let mut left = run;
        // The most pages to try at once.
        let mut most = run.count;
        while left.count > 0 {
            let (slot, _) = self.engine.slots().slot_of(left.first);
            let shift = slot.page_size.shift();
            let tried = PageRun::new(left.first, left.count.min(most));
            let (hva, len) = self.address(tried);
            let skipped = (left.first - run.first) << shift;
            let what_left = match what {
                Put::Bytes(src) => Put::Bytes(src + usize::try_from(skipped).unwrap_or(usize::MAX)),
                other => other,
            };
            let result = self.put_once(hva, len, what_left);
            kill::point("put");
            let done = PageRun::new(left.first, result.bytes >> shift);
            if !matches!(what, Put::Poison) {
                self.installed(done);
            }
            pages += done.count;
            left = PageRun::new(done.end(), left.count - done.count);
            match result.stop {
                None => most = most.saturating_mul(2),
                // One of the pages is not registered, or there are two
                // mappings: the kernel installs nothing across a border.
                Some(Stop::Unmapped) if tried.count - done.count > 1 => {
                    most = (tried.count - done.count) / 2;
                }
                Some(Stop::Unmapped) => {
                    self.unmapped(PageRun::new(left.first, 1))?;
                    left = PageRun::new(left.first + 1, left.count - 1);
                }
                // Ambiguous: see `maybe_present`.
                Some(Stop::Present) if shift == HUGE.shift() && !matches!(what, Put::Poison) => {
                    return Ok(PutEnd { pages, rest: Some((left, Stop::Present)) });
                }
                Some(Stop::Present) => {
                    // Another installer won. Its wake may have come before our
                    // waiter slept: wake once more.
                    let one = PageRun::new(left.first, 1);
                    if !matches!(what, Put::Poison) {
                        self.installed(one);
                    }
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

    fn put_once(&mut self, hva: Hva, len: u64, what: Put) -> Installed {
        let (src, len) = match what {
            Put::Bytes(src) => (src, len),
            Put::Poison => return self.uffd.poison(hva.0, len),
            // The kernel's shared zero page would have to be replaced at the
            // first write, KVM does not map it ahead, and hugetlb has none.
            Put::Zeroes => {
                let zeroes = zeroes();
                (zeroes.as_ptr() as usize, len.min(zeroes.len() as u64))
            }
        };
        if self.outside.frozen {
            return self.uffd.copy_protected(hva.0, src, len);
        }
        let wake = self.asleep.is_none();
        let done = match (&self.clean, what) {
            (Some(_), Put::Zeroes) => self.uffd.map_zeroes(hva.0, len, wake),
            (Some(clean), _) if clean.holds(src) => self.uffd.map_file_pages(hva.0, len, wake),
            _ if wake => self.uffd.copy(hva.0, src, len),
            _ => self.uffd.copy_without_waking(hva.0, src, len),
        };
        let Some(asleep) = &mut self.asleep else { return done };
        asleep.start = asleep.start.min(hva.0);
        asleep.end = asleep.end.max(hva.0 + done.bytes);
        done
    }

    /// Records the stall of a waiter whose page is in place, now or when it
    /// is woken.
    pub(super) fn stalled(&mut self, waiter: Waiter) {
        match &mut self.asleep {
            Some(asleep) => asleep.waiters += 1,
            None => self.counters.stalled(waiter.since, 1),
        }
    }

    pub(super) fn installed(&mut self, run: PageRun) {
        self.engine.installed(run);
        kill::point("published");
        self.tell_installers();
        if self.is_awaited_outside() {
            self.let_go(run);
        }
    }

    pub(super) fn tell_installers(&self) {
        if let Some(shared) = &self.shared {
            shared.changed();
        }
    }

    /// From now on, waiters are left asleep until [`wake_all`](Self::wake_all).
    pub(super) fn let_sleep(&mut self) {
        self.asleep.get_or_insert(Asleep { start: u64::MAX, end: 0, waiters: 0 });
    }

    /// Wakes whom installing has left asleep since
    /// [`let_sleep`](Self::let_sleep), by one call for all: waking a thread of
    /// another CPU costs many times what its page does, waking several that
    /// share a CPU little more. Whoever waits for a page in between that is
    /// still missing faults again. All of them have waited from `since` on.
    pub(super) fn wake_all(&mut self, since: Instant) -> Result<(), Lost> {
        let Some(asleep) = self.asleep.take() else { return Ok(()) };
        if asleep.start < asleep.end {
            self.wake(Hva(asleep.start), asleep.end - asleep.start)?;
        }
        self.counters.stalled(since, asleep.waiters);
        Ok(())
    }

    /// Records the stall of a waiter whose page is in place, and puts off what
    /// could not be put.
    pub(super) fn settle(
        &mut self,
        waiter: Waiter,
        end: PutEnd,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        match end.rest {
            Some((rest, stop)) if rest.pages().contains(&waiter.page) => {
                self.put_off(Leftover { rest, stop, waiter: Some(waiter) }, reads)
            }
            Some((rest, stop)) => {
                self.stalled(waiter);
                self.put_off(Leftover { rest, stop, waiter: None }, reads)
            }
            None => {
                self.stalled(waiter);
                Ok(())
            }
        }
    }

    /// A run could not be put. It is given back and, if somebody waits for a
    /// page of it, planned again after a pause.
    pub(crate) fn put_off(&mut self, left: Leftover, reads: &mut Reads) -> Result<(), Lost> {
        let Leftover { rest, stop, waiter } = left;
        match stop {
            Stop::SourceFault => {
                // The mapping of the source could not be read: the background
                // read will tell why.
                let priority = waiter.map_or(Priority::Fill, |_| Priority::Demand);
                reads.submit(self.background(rest, priority, waiter));
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
            Stop::Present => return self.maybe_present(rest, waiter),
            Stop::Gone => return Err(Lost::PeerGone),
        }
        self.give_back(rest, waiter);
        Ok(())
    }

    fn give_back(&mut self, rest: PageRun, waiter: Option<Waiter>) {
        self.counters.retried += 1;
        self.engine.released(rest);
        self.tell_installers();
        if waiter.is_none() || rest.count > 1 {
            // More than one may have joined the read.
            self.retry.wake.push(rest);
        }
        self.retry.waiters.extend(waiter);
    }

    /// A huge page was refused with EEXIST, by which the kernel also means that
    /// the pool is empty (seen on 6.18). To take it for present would turn its
    /// next fault into zeroes. So it stays missing: a waiter is tried for once
    /// more after a pause, then woken. If the page is in place it goes on, else
    /// it faults again.
    fn maybe_present(&mut self, rest: PageRun, waiter: Option<Waiter>) -> Result<(), Lost> {
        if !std::mem::replace(&mut self.complained.no_memory, true) {
            error!(
                "a 2 MiB page cannot be installed: it is present, or the hugetlb pool is empty \
                 (raise vm.nr_hugepages); its faults are held until it can"
            );
        }
        let tried_again = waiter.is_some_and(|waiter| waiter.since.elapsed() >= LONG_RETRY);
        if tried_again {
            let (hva, len) = self.address(rest);
            self.give_back(rest, None);
            return self.wake(hva, len);
        }
        self.give_back(rest, waiter);
        self.pause(LONG_RETRY, LONG_RETRY);
        Ok(())
    }

    /// Sets when put-off pages are tried again: later each time in a row.
    pub(super) fn pause(&mut self, first: Duration, last: Duration) {
        self.retry.pause = (self.retry.pause * 2).clamp(first, last);
        self.retry.at = Some(Instant::now() + self.retry.pause);
    }

    /// The range is no longer registered or mapped: nobody can be served
    /// there, and whoever waits must look again.
    pub(super) fn unmapped(&mut self, run: PageRun) -> Result<(), Lost> {
        let (hva, len) = self.address(run);
        if !std::mem::replace(&mut self.complained.unmapped, true) {
            // As a rule because the VM is about to end.
            info!("{len:#x} bytes at {hva} are not registered (any more); left alone");
        }
        self.counters.pages_removed += self.engine.removed(hva, Hva(hva.0 + len));
        self.wake(hva, len)
    }

    pub(super) fn wake(&mut self, hva: Hva, len: u64) -> Result<(), Lost> {
        if self.is_awaited_outside() {
            let runs: Vec<_> = self.engine.slots().runs_within(hva, Hva(hva.0 + len)).collect();
            runs.into_iter().for_each(|run| self.let_go(run));
        }
        self.uffd
            .wake(hva.0, len)
            .map_err(|e| Lost::Failed(format!("waking the waiters of {hva}: {e}")))
    }

    pub(super) fn address(&self, run: PageRun) -> (Hva, u64) {
        let (hva, range) = self.engine.slots().locate(run);
        (hva, range.len)
    }

    /// Poisons a claimed run, but for the pages given back meanwhile. Pages
    /// the kernel will not poison are held.
    pub(super) fn put_poison(
        &mut self,
        run: PageRun,
        waiter: Option<Waiter>,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        let parts: Vec<PageRun> = self.engine.still_claimed(run).collect();
        for part in &parts {
            match self.poison_part(*part)? {
                None => {}
                Some((rest, Stop::Changing)) => {
                    let waiter = waiter.filter(|waiter| rest.pages().contains(&waiter.page));
                    self.put_off(Leftover { rest, stop: Stop::Changing, waiter }, reads)?;
                }
                Some((rest, stop)) => {
                    let (hva, _) = self.address(rest);
                    error!("{} page(s) at {hva} cannot be poisoned ({stop:?}): held", rest.count);
                    self.record.set(Flag::MustHold);
                }
            }
        }
        if parts != [run] {
            let (hva, len) = self.address(run);
            self.wake(hva, len)?;
        }
        Ok(())
    }

    /// Poisons pages that are all claimed. Returns what is left.
    pub(super) fn poison_part(&mut self, part: PageRun) -> Result<Option<(PageRun, Stop)>, Lost> {
        let end = self.put(part, Put::Poison)?;
        kill::point("poisoned");
        let done = end.rest.map_or(part.count, |(rest, _)| rest.first - part.first);
        let poisoned = PageRun::new(part.first, done);
        self.engine.poisoned(poisoned);
        self.poison_views(poisoned);
        self.let_go(poisoned);
        self.tell_installers();
        self.counters.pages_poisoned += end.pages;
        Ok(end.rest)
    }
}

const HUGE: PageSize = PageSize::Size2M;

/// Two MiB of zeroes for the kernel to read. Never written, they take no
/// memory of their own.
pub(crate) fn zeroes() -> &'static [u8] {
    static ZEROES: OnceLock<Vec<u8>> = OnceLock::new();
    ZEROES.get_or_init(|| vec![0; 1 << HUGE.shift()])
}
