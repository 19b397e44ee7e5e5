//! The side of the process that takes part.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmpager_core::{LoadWords, MapError, PresentBits};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::shared::ReadOnlyWords;
use vmpager_sys::uffd::{Features, OpenError, Userfaultfd};

use super::protocol::{Frame, Inbox, ReceiveError, Region, send};
use super::queue::{FaultClient, FaultReader, WaitError};

/// Why a process could not take part.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nobody listens there.
    #[error("connecting to {path}: {error}; is the pager running, and has it opened a door there?")]
    Connect {
        /// Where.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The pager refused, and said why.
    #[error("the pager refused: {0}")]
    Refused(String),
    /// The pager does not answer, or not as the protocol has it.
    #[error("the pager's answer: {0}")]
    Answer(String),
    /// No userfaultfd could be had.
    #[error(transparent)]
    Userfaultfd(#[from] OpenError),
    /// The page map cannot be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Memory could not be mapped or registered.
    #[error("{what}: {error}")]
    Memory {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        error: io::Error,
    },
}

impl From<ReceiveError> for AttachError {
    fn from(error: ReceiveError) -> Self {
        Self::Answer(error.to_string())
    }
}

/// How long the pager may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A region of guest memory, mapped into this process.
#[derive(Clone, Debug)]
pub struct AttachedRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Where it is.
    pub memory: Arc<Mapping>,
}

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

/// A process's part in a memory that a pager serves.
///
/// Touching memory of its [`regions`](Self::regions) waits for pages that are
/// missing, as it does in the VMM. If the pager ends first, such a touch waits
/// until this process ends: watch [`pager`](Self::pager).
///
/// # What it must not do
///
/// `MADV_DONTNEED` of a region is taken for giving its pages back: those that
/// were missing read as zeroes from then on, in every process.
#[derive(Debug)]
pub struct Attached {
    regions: Vec<AttachedRegion>,
    map: PresentBits<MapWords>,
    faults: FaultClient,
    link: Arc<Link>,
}

/// What has the memory served: without it, missing pages would be zeroes.
#[derive(Debug)]
struct Link {
    socket: UnixStream,
    _uffd: Userfaultfd,
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.regions.iter().any(|region| Arc::strong_count(&region.memory) > 1) {
            // Somebody goes on using the memory, and is served as long as the
            // process lives.
            std::mem::forget(self.link.clone());
        }
    }
}

impl Attached {
    /// Takes part in the memory of the pager that listens at `path`: maps it,
    /// and has its faults served.
    ///
    /// # Errors
    ///
    /// If there is no pager, it refuses, or this user may have no userfaultfd.
    pub fn connect(path: &Path) -> Result<Self, AttachError> {
        let Offer { socket, mut inbox, regions, fds } = Offer::ask(path)?;
        let (map, faults) = fds.shared()?;
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE)?;
        let mut mapped = Vec::with_capacity(regions.len());
        let mut addresses = Vec::with_capacity(regions.len());
        for region in &regions {
            let memfd = usize::try_from(region.memfd).ok().and_then(|at| fds.memfds.get(at));
            let memfd = memfd.ok_or_else(|| answer("a region without a memfd"))?;
            let memory = map_region(memfd.as_fd(), region)?;
            uffd.register_missing(&GuestRange::of_mapping(&memory))
                .map_err(|error| AttachError::Memory { what: "registering guest memory", error })?;
            addresses.push(memory.hva());
            mapped.push(AttachedRegion { gpa: region.gpa, memory });
        }
        send(&socket, &Frame::View(addresses), &[uffd.as_fd()])
            .map_err(|error| answer(&error.to_string()))?;
        match receive(&socket, &mut inbox)? {
            (Frame::Serving, _) => {}
            (other, _) => return Err(unexpected(other)),
        }
        let link = Arc::new(Link { socket, _uffd: uffd });
        Ok(Self { regions: mapped, map, faults, link })
    }

    /// The memory.
    pub fn regions(&self) -> &[AttachedRegion] {
        &self.regions
    }

    /// Whether the page at a guest-physical address is in place; None where
    /// there is no memory. Asks nobody.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<Page> {
        let page = self.map.page_at(gpa)?;
        Some(look(&self.map, page))
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
        let settled = || look(&self.map, page) != Page::Missing;
        self.faults.wait(gpa >> 12, limit, settled)?;
        Ok(look(&self.map, page))
    }

    /// Readable once the pager has ended: no page will come any more.
    pub fn pager(&self) -> BorrowedFd<'_> {
        self.link.socket.as_fd()
    }
}

fn look(map: &PresentBits<MapWords>, page: u64) -> Page {
    if map.is_present(page) {
        Page::Present
    } else if map.is_poisoned(page) {
        Page::Poisoned
    } else {
        Page::Missing
    }
}

impl FaultReader {
    /// Helps the pager that listens at `path` to resolve queued faults, or
    /// takes their place. The connection tells the pager when this process
    /// dies: keep it as long as the reader.
    ///
    /// # Errors
    ///
    /// If there is no pager or it refuses.
    pub fn connect(path: &Path) -> Result<(Self, UnixStream), AttachError> {
        let Offer { socket, mut inbox, fds, .. } = Offer::ask(path)?;
        send(&socket, &Frame::Reader, &[]).map_err(|error| answer(&error.to_string()))?;
        let id = match receive(&socket, &mut inbox)? {
            (Frame::ReaderId(id), _) => id.into(),
            (other, _) => return Err(unexpected(other)),
        };
        let reader = Self::open(fds.queue, fds.bell, id)
            .map_err(|error| AttachError::Memory { what: "mapping the fault queue", error })?;
        Ok((reader, socket))
    }
}

/// What the pager offers.
struct Offer {
    socket: UnixStream,
    inbox: Inbox,
    regions: Vec<Region>,
    fds: Fds,
}

struct Fds {
    map: OwnedFd,
    queue: OwnedFd,
    bell: OwnedFd,
    memfds: Vec<OwnedFd>,
}

impl Offer {
    fn ask(path: &Path) -> Result<Self, AttachError> {
        let socket = UnixStream::connect(path)
            .map_err(|error| AttachError::Connect { path: path.into(), error })?;
        let mut inbox = Inbox::default();
        send(&socket, &Frame::Hello, &[]).map_err(|error| answer(&error.to_string()))?;
        let (regions, fds) = match receive(&socket, &mut inbox)? {
            (Frame::Memory(regions), fds) => (regions, fds),
            (other, _) => return Err(unexpected(other)),
        };
        let mut fds = fds.into_iter();
        let (Some(map), Some(queue), Some(bell)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(answer("fewer than three descriptors"));
        };
        let fds = Fds { map, queue, bell, memfds: fds.collect() };
        Ok(Self { socket, inbox, regions, fds })
    }
}

impl Fds {
    fn shared(&self) -> Result<(PresentBits<MapWords>, FaultClient), AttachError> {
        let memory = |what| move |error| AttachError::Memory { what, error };
        let words =
            ReadOnlyWords::open(self.map.as_fd()).map_err(memory("mapping the page map"))?;
        let map = PresentBits::open(MapWords(words))?;
        let queue = [&self.queue, &self.bell].map(OwnedFd::try_clone);
        let [queue, bell] = queue;
        let client = queue.and_then(|queue| FaultClient::open(queue, bell?));
        Ok((map, client.map_err(memory("mapping the fault queue"))?))
    }
}

fn map_region(memfd: BorrowedFd<'_>, region: &Region) -> Result<Arc<Mapping>, AttachError> {
    let memory = |error| AttachError::Memory { what: "mapping guest memory", error };
    let end = region.offset.checked_add(region.len);
    let len = vmpager_sys::memfd::sealed_len(memfd).map_err(memory)?;
    if end.is_none_or(|end| end > len) {
        return Err(answer("a region beyond the end of its memfd"));
    }
    let len = usize::try_from(region.len).map_err(|e| memory(io::Error::other(e)))?;
    Ok(Arc::new(Mapping::file_shared_at(memfd, region.offset, len).map_err(memory)?))
}

/// The pager's next frame.
fn receive(socket: &UnixStream, inbox: &mut Inbox) -> Result<(Frame, Vec<OwnedFd>), AttachError> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(frame) = inbox.receive(socket)? {
            return Ok(frame);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(answer("none came in time"));
        }
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(answer(&io::Error::from(error).to_string())),
        }
    }
}

fn answer(problem: &str) -> AttachError {
    AttachError::Answer(problem.into())
}

fn unexpected(frame: Frame) -> AttachError {
    match frame {
        Frame::Refused(why) => AttachError::Refused(why),
        other => answer(&format!("{other:?}, which was not asked for")),
    }
}
