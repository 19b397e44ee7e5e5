//! Pages installed by the thread that misses them, without a handoff: for
//! vCPU threads whose KVM_RUN returns on a missing page instead of waiting in
//! the kernel.

use std::sync::Arc;
use std::time::Instant;

use vmpager_core::{
    ByteRange, Content, Hva, PageData, PageInstaller, PageReader, PageRun, PageSize, Resolution,
    WatchedInstaller, Watcher,
};
use vmpager_sys::uffd::Stop;

use crate::reads::MemoryId;
use crate::shared::{Serving, Shared};
use crate::worker::{Command, Sharing, Teller};

/// One thread's way to install pages of a [`Pager`](crate::Pager)'s memory by
/// itself.
///
/// A page whose bytes are at hand is read and installed by the calling thread;
/// any other is handed to the pager's worker. However many threads ask for a
/// page, it is fetched once (I2).
#[derive(Debug)]
pub struct Installer {
    shared: Arc<Shared>,
    reader: Box<dyn PageReader>,
    worker: Teller,
    memory: MemoryId,
}

impl Installer {
    pub(crate) fn new(
        shared: Arc<Shared>,
        reader: Box<dyn PageReader>,
        worker: Teller,
        memory: MemoryId,
    ) -> Self {
        Self { shared, reader, worker, memory }
    }

    /// Waits for a page that is being fetched, until `until` at the latest.
    /// False if it is still being fetched then.
    pub fn wait(&self, hva: Hva, until: Instant) -> bool {
        match self.shared.pages.slots().page_at(hva) {
            Some(page) => self.shared.wait(page, until),
            None => true,
        }
    }

    fn bring(&mut self, hva: Hva) -> Resolution {
        match self.shared.serving() {
            Serving::Yes => {}
            Serving::Filled => return Resolution::Filled,
            Serving::Ended => return Resolution::Ended,
        }
        let pages = self.shared.pages.clone();
        let Some(page) = pages.slots().page_at(hva) else { return Resolution::Outside };
        loop {
            if pages.map().is_present(page) {
                return Resolution::Present;
            }
            match pages.map().content(page) {
                Content::Source if pages.map().claim_up(page, 1) == 1 => return self.fetch(page),
                // Somebody else was faster: look again.
                Content::Source => {}
                Content::Claimed => return Resolution::Waiting,
                Content::Zero => return self.zero(page),
                Content::Poisoned => return Resolution::Poisoned,
            }
        }
    }

    /// Installs a page this thread has claimed, or leaves it to the worker.
    fn fetch(&mut self, page: u64) -> Resolution {
        let run = PageRun::new(page, 1);
        let (hva, range) = self.shared.pages.slots().locate(run);
        let whole = |data: &PageData<'_>| data.len() as u64 == range.len;
        match self.reader.try_read(range).map(|data| data.filter(whole)) {
            Ok(Some(data)) => {
                let src = data.address();
                self.install(run, hva, range, src)
            }
            // An error is met again, told and dealt with by the worker.
            Ok(None) | Err(_) => self.hand_over(run),
        }
    }

    fn install(&self, run: PageRun, hva: Hva, range: ByteRange, src: usize) -> Resolution {
        {
            let _gate = self.shared.installing();
            // Else it was given back meanwhile.
            if !self.shared.is_frozen() && self.shared.pages.still_claimed(run).next() == Some(run)
            {
                match self.shared.uffd.copy(hva.0, src, range.len).stop {
                    None => {
                        self.shared.count_brought(Some(range.len));
                        return self.installed(run, Resolution::Installed);
                    }
                    Some(Stop::Present) if is_base(range) => {
                        return self.found_present(run, hva, range);
                    }
                    Some(_) => {}
                }
            }
        }
        self.hand_over(run)
    }

    /// Says that a page is in place, within the gate.
    fn installed(&self, run: PageRun, what: Resolution) -> Resolution {
        let pages = &self.shared.pages;
        pages.installed(run);
        self.shared.changed();
        if self.shared.is_awaited() {
            self.worker.tell(Command::Sharing(self.memory, Sharing::Look));
        } else if pages.outstanding() == 0 {
            // A worker that fills waits for just this.
            self.worker.nudge();
        }
        what
    }

    /// Somebody else installed it. Their wake may have come before a thread
    /// slept: wake once more (trap 4).
    fn found_present(&self, run: PageRun, hva: Hva, range: ByteRange) -> Resolution {
        // Fails only where nobody can wait either: the range is gone.
        let _ = self.shared.uffd.wake(hva.0, range.len);
        self.installed(run, Resolution::Present)
    }

    /// Installs zeroes where the memory holds nothing else.
    fn zero(&self, page: u64) -> Resolution {
        let run = PageRun::new(page, 1);
        let (hva, range) = self.shared.pages.slots().locate(run);
        let zeroes = crate::served::zeroes();
        {
            let _gate = self.shared.installing();
            if self.shared.is_frozen() {
                return self.hand_over(run);
            }
            match self.shared.uffd.copy(hva.0, zeroes.as_ptr() as usize, range.len).stop {
                None => {
                    self.shared.count_brought(None);
                    return self.installed(run, Resolution::Installed);
                }
                Some(Stop::Present) if is_base(range) => {
                    return self.found_present(run, hva, range);
                }
                Some(_) => {}
            }
        }
        self.hand_over(run)
    }

    /// Lets the worker bring a page, which knows what to do about whatever is
    /// in the way.
    fn hand_over(&self, run: PageRun) -> Resolution {
        match self.worker.tell(Command::Bring(self.memory, run)) {
            true => Resolution::Waiting,
            false => Resolution::Ended,
        }
    }
}

impl PageInstaller for Installer {
    fn is_present(&self, hva: Hva) -> bool {
        let pages = &self.shared.pages;
        match pages.slots().page_at(hva) {
            Some(page) => pages.map().is_present(page) || self.is_complete(),
            None => false,
        }
    }

    fn is_complete(&self) -> bool {
        self.shared.serving() == Serving::Filled
    }

    fn resolve(&mut self, hva: Hva) -> Resolution {
        self.bring(hva)
    }
}

impl WatchedInstaller for Installer {
    fn is_settled(&self, hva: Hva) -> bool {
        self.shared.is_settled_at(hva)
    }

    fn watch(&self, watcher: Arc<dyn Watcher>) {
        self.shared.watch(watcher);
    }
}

/// For huge pages, "present" is ambiguous: the pool may be empty.
fn is_base(range: ByteRange) -> bool {
    range.len == PageSize::Size4K.bytes()
}
