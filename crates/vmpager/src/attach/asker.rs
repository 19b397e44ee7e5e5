//! A process that asks for pages by the fault queue and looks at the page map,
//! without a mapping or a userfaultfd of its own at the pager.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmpager_core::{Hva, LoadWords, PageInstaller, PresentBits, Resolution};
use vmpager_sys::shared::ReadOnlyWords;

use super::client::AttachError;
use super::offer::{Offer, PATIENCE, unexpected};
use super::protocol::Frame;
use super::queue::{FaultClient, WaitError};

/// What is known of a page without touching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// In place.
    Present,
    /// Touching it waits until the pager has brought it.
    Missing,
    /// It cannot be had: touching it is a SIGBUS.
    Poisoned,
}

/// The page map of another process.
#[derive(Debug)]
struct MapWords(ReadOnlyWords);

impl LoadWords for MapWords {
    fn count(&self) -> usize {
        self.0.count()
    }

    #[inline]
    fn load(&self, index: usize) -> Option<u64> {
        self.0.load(index)
    }
}

/// The pages of another process's memory: what is known of them, and the queue
/// to ask for them by.
#[derive(Debug)]
pub struct RemotePages {
    map: PresentBits<MapWords>,
    faults: FaultClient,
}

impl RemotePages {
    pub(super) fn open(offer: &Offer) -> Result<Self, AttachError> {
        let memory = |what| move |error| AttachError::Memory { what, error };
        let words =
            ReadOnlyWords::open(offer.map.as_fd()).map_err(memory("mapping the page map"))?;
        let map = PresentBits::open(MapWords(words))?;
        let queue = offer.queue.try_clone().and_then(|queue| {
            let bell = offer.bell.try_clone()?;
            FaultClient::open(queue, bell)
        });
        Ok(Self { map, faults: queue.map_err(memory("mapping the fault queue"))? })
    }

    /// Whether the page at a guest-physical address is in place; None where
    /// there is no memory. Asks nobody.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<Page> {
        let page = self.map.page_at(gpa)?;
        Some(self.look(page))
    }

    fn look(&self, page: u64) -> Page {
        if self.map.is_present(page) {
            Page::Present
        } else if self.map.is_poisoned(page) {
            Page::Poisoned
        } else {
            Page::Missing
        }
    }

    /// Has a page brought without touching it, and without waiting.
    ///
    /// # Errors
    ///
    /// If the queue is full or disabled.
    pub fn request(&self, gpa: u64) -> Result<(), WaitError> {
        self.faults.request(gpa >> 12)
    }

    /// Waits for a page without touching it: until it is in place or known to
    /// be lost, `limit` has passed or a signal handler has run.
    ///
    /// # Errors
    ///
    /// Why it is not in place, nor lost.
    pub fn wait(&self, gpa: u64, limit: Option<Duration>) -> Result<Page, WaitError> {
        let page = self.map.page_at(gpa).ok_or(WaitError::Gfn(gpa >> 12))?;
        let settled = || self.look(page) != Page::Missing;
        self.faults.wait(gpa >> 12, limit, settled)?;
        Ok(self.look(page))
    }
}

/// A process's part in a memory for whose pages it only asks: a VMM whose vCPUs
/// leave the guest on a missing page, say, while the pager has its userfaultfd
/// already.
#[derive(Debug)]
pub struct Asker {
    pages: RemotePages,
    socket: UnixStream,
}

impl Asker {
    /// Takes part in the memory of the pager that listens at `path`. For a VMM
    /// that has just handed its memory over, the door may not be open yet: it is
    /// awaited.
    ///
    /// # Errors
    ///
    /// If there is no pager for ten seconds, or it refuses.
    pub fn connect(path: &Path) -> Result<Self, AttachError> {
        let until = Instant::now() + PATIENCE;
        let mut offer = loop {
            match Offer::ask(path) {
                Err(AttachError::Connect { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break other?,
            }
        };
        let pages = RemotePages::open(&offer)?;
        match offer.accept(&Frame::Asks, &[])? {
            Frame::Serving => Ok(Self { pages, socket: offer.socket }),
            other => Err(unexpected(other)),
        }
    }

    /// What is known of its pages, and how to ask for them.
    pub fn pages(&self) -> &RemotePages {
        &self.pages
    }

    /// Readable once the pager has ended: no page will come any more.
    pub fn pager(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn has_pager(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        !matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
    }
}

/// A range of this process's memory that is guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRegion {
    /// Where it is.
    pub hva: Hva,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A thread's way to have pages installed by a pager in another process: for
/// vCPU threads whose KVM_RUN returns on a missing page.
#[derive(Clone, Debug)]
pub struct RemoteInstaller {
    asker: Arc<Asker>,
    regions: Arc<[GuestRegion]>,
}

impl RemoteInstaller {
    /// For guest memory that lies at these addresses here.
    pub fn new(asker: Arc<Asker>, regions: Arc<[GuestRegion]>) -> Self {
        Self { asker, regions }
    }

    /// Waits for a page that was asked for, until `until` at the latest. False
    /// if it has not come then.
    pub fn wait(&self, hva: Hva, until: Instant) -> bool {
        let Some(gpa) = self.gpa(hva) else { return true };
        let limit = until.saturating_duration_since(Instant::now());
        !matches!(
            self.asker.pages.wait(gpa, Some(limit)),
            Err(WaitError::TimedOut | WaitError::Interrupted)
        )
    }

    fn gpa(&self, hva: Hva) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = hva.0.checked_sub(region.hva.0)?;
            (offset < region.len).then(|| region.gpa + offset)
        })
    }
}

impl PageInstaller for RemoteInstaller {
    fn is_present(&self, hva: Hva) -> bool {
        self.gpa(hva).and_then(|gpa| self.asker.pages.page(gpa)) == Some(Page::Present)
    }

    /// Shared memory stays registered for good.
    fn is_complete(&self) -> bool {
        false
    }

    fn resolve(&mut self, hva: Hva) -> Resolution {
        let Some(gpa) = self.gpa(hva) else { return Resolution::Outside };
        match self.asker.pages.page(gpa) {
            None => Resolution::Outside,
            Some(Page::Present) => Resolution::Present,
            Some(Page::Poisoned) => Resolution::Poisoned,
            Some(Page::Missing) if !self.asker.has_pager() => Resolution::Ended,
            Some(Page::Missing) => match self.asker.pages.request(gpa) {
                // Where there is no room, the wait asks again.
                Ok(()) | Err(WaitError::Full) => Resolution::Waiting,
                Err(_) => Resolution::Ended,
            },
        }
    }
}
