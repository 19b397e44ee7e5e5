//! The side of the pager: a socket, and a thread that talks to those who come.
//!
//! ```text
//!   connected --Hello--> offered --View--> serving          --hang-up--> gone
//!                           |----Reader--> resolving faults --hang-up--> gone
//! ```
//!
//! Anything else is answered with a refusal that says what is wrong, and ends
//! the connection. It never touches guest memory: what it learns, it tells the
//! worker.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use tracing::{debug, info, warn};
use vmpager_core::queue::MAX_READERS;
use vmpager_core::{MapSlot, PageMap, Slot, SlotSet};
use vmpager_sys::memfd::{is_mapped_at, read_only};
use vmpager_sys::peer::{Peer, is_userfaultfd};
use vmpager_sys::shared::SharedWords;
use vmpager_sys::uffd::Userfaultfd;

use super::protocol::{
    Frame, Inbox, MAX_MEMFDS, MAX_REGIONS, ReceiveError, Region, send, view_slots,
};
use super::queue::{FaultReader, QueueOwner};
use crate::daemon::{DaemonError, listen};
use crate::reads::MemoryId;
use crate::served::{View, ViewId};
use crate::worker::{Command, Sharing, Teller, doorbell, ring, watch};

/// Where a region of a pager's memory lies, for those who shall map it too.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// The memfd, sealed against shrinking, of which the region is a shared
    /// mapping.
    pub memfd: Arc<OwnedFd>,
    /// Where the region starts in it, in bytes.
    pub offset: u64,
}

/// Why a memory could not be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Not as many regions as the pager has.
    #[error("{given} regions are described; the pager has {served}")]
    Regions {
        /// How many were described.
        given: usize,
        /// How many there are.
        served: usize,
    },
    /// Too much for the protocol.
    #[error("{what}: {count}, but the most that can be shared is {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// A region cannot be shared.
    #[error("region {index}: {problem}")]
    Region {
        /// Its place in the order given.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The memory is served no longer, or shared already.
    #[error("the memory cannot be shared: {0}")]
    Memory(String),
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] DaemonError),
    /// Descriptors or memory could not be had.
    #[error("sharing the memory: {0}")]
    Io(#[from] io::Error),
}

/// What is shared, as a door hands it out.
#[derive(Debug)]
pub(crate) struct Wares {
    queue: Arc<QueueOwner>,
    memory: MemoryId,
    worker: Teller,
    slots: Vec<Slot>,
    source_len: u64,
    regions: Vec<Region>,
    memfds: Vec<Arc<OwnedFd>>,
    map: OwnedFd,
}

/// The memory to be shared, as its pager knows it.
#[derive(Debug)]
pub(crate) struct Stock<'a> {
    pub(crate) memory: MemoryId,
    pub(crate) worker: Teller,
    /// In the order of the regions.
    pub(crate) slots: &'a [Slot],
    pub(crate) source_len: u64,
    pub(crate) map: &'a PageMap<SharedWords>,
}

impl Wares {
    /// What is to be handed out of a memory whose regions lie there; and the
    /// worker's end of its fault queue.
    pub(crate) fn new(
        stock: &Stock<'_>,
        shared: &[SharedRegion],
    ) -> Result<(Self, FaultReader, Vec<MapSlot>), ShareError> {
        let (regions, memfds) = describe(stock.slots, shared)?;
        let table = table(&regions);
        stock.map.describe(&table);
        let queue = Arc::new(QueueOwner::new()?);
        let reader = queue.reader(PAGER)?;
        let wares = Self {
            queue,
            memory: stock.memory,
            worker: stock.worker.clone(),
            slots: stock.slots.to_vec(),
            source_len: stock.source_len,
            regions,
            memfds,
            map: read_only(stock.map.storage().memfd())?,
        };
        Ok((wares, reader, table))
    }
}

/// The regions as the protocol has them, and their distinct memfds.
fn describe(
    slots: &[Slot],
    shared: &[SharedRegion],
) -> Result<(Vec<Region>, Vec<Arc<OwnedFd>>), ShareError> {
    if slots.len() != shared.len() {
        return Err(ShareError::Regions { given: shared.len(), served: slots.len() });
    }
    if slots.len() > MAX_REGIONS {
        let (what, count) = ("regions", slots.len());
        return Err(ShareError::TooMany { what, count, most: MAX_REGIONS });
    }
    let mut memfds: Vec<Arc<OwnedFd>> = Vec::new();
    let mut regions = Vec::new();
    for (index, (slot, region)) in slots.iter().zip(shared).enumerate() {
        let wrong = |problem: String| ShareError::Region { index, problem };
        let len = vmpager_sys::memfd::sealed_len(region.memfd.as_fd());
        let len = len.map_err(|error| wrong(error.to_string()))?;
        if region.offset.checked_add(slot.len).is_none_or(|end| end > len) {
            return Err(wrong(format!(
                "offset {:#x} plus size {:#x} is beyond its memfd, which has {len:#x} bytes",
                region.offset, slot.len
            )));
        }
        for (field, value) in [("gpa", region.gpa), ("offset", region.offset)] {
            if value % slot.page_size.bytes() != 0 {
                return Err(wrong(format!("{field} {value:#x} is not aligned to its pages")));
            }
        }
        if slot.page_size.bytes() != 4096 {
            return Err(wrong("huge pages of hugetlb cannot be shared; use 4 KiB pages".into()));
        }
        let same = |fd: &Arc<OwnedFd>| vmpager_sys::memfd::is_same(fd, &region.memfd);
        let known = memfds.iter().position(|fd| same(fd).unwrap_or(false));
        let at = known.unwrap_or(memfds.len());
        if at == memfds.len() {
            memfds.push(region.memfd.clone());
        }
        let memfd = u32::try_from(at).unwrap_or(u32::MAX);
        let (gpa, offset, page_size) = (region.gpa, region.offset, slot.page_size.bytes());
        regions.push(Region { gpa, len: slot.len, memfd, offset, page_size });
    }
    match memfds.len() {
        0..=MAX_MEMFDS => Ok((regions, memfds)),
        count => Err(ShareError::TooMany { what: "memfds", count, most: MAX_MEMFDS }),
    }
}

/// The regions as the page map's slot table has them.
fn table(regions: &[Region]) -> Vec<MapSlot> {
    let mut first_page = 0;
    let slot = |region: &Region| {
        let pages = region.len / region.page_size;
        let slot = MapSlot { gpa: region.gpa, first_page, pages, page_size: region.page_size };
        first_page += pages;
        slot
    };
    regions.iter().map(slot).collect()
}

/// A socket where other processes come to take part in a pager's memory
/// ([`Attached`](super::Attached)). Closed when dropped: who has come stays.
#[derive(Debug)]
pub struct Door {
    queue: Arc<QueueOwner>,
    _entrance: Entrance,
}

impl Door {
    pub(crate) fn open(path: &Path, wares: Wares) -> Result<Self, ShareError> {
        let queue = wares.queue.clone();
        Ok(Self { queue, _entrance: Entrance::open(path, Ok(wares))? })
    }

    /// The fault queue of the memory.
    pub fn queue(&self) -> &QueueOwner {
        &self.queue
    }
}

/// The socket itself, and the thread that listens there. Closed when dropped.
#[derive(Debug)]
pub(crate) struct Entrance {
    path: PathBuf,
    stop: Arc<OwnedFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Entrance {
    /// Opens one where memory is to be had, or where it is said why there is
    /// none.
    pub(crate) fn open(path: &Path, wares: Result<Wares, String>) -> Result<Self, ShareError> {
        let listener = listen(path)?;
        let stop = Arc::new(doorbell()?);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        watch(&epoll, listener.as_fd(), LISTENER)?;
        watch(&epoll, stop.as_fd(), STOP)?;
        let (guests, next) = (HashMap::new(), FIRST_GUEST);
        let keeper = Keeper { epoll, listener, wares, guests, next };
        let thread = std::thread::Builder::new().name("vmpager-door".into());
        let thread = Some(thread.spawn(move || keeper.run())?);
        Ok(Self { path: path.into(), stop, thread })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        ring(&self.stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!("removing {}: {error}", self.path.display());
        }
    }
}

const LISTENER: u64 = 0;
const STOP: u64 = 1;
const FIRST_GUEST: u64 = 2;

/// How long a guest may take from one step to the next.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most guests at a time.
const MAX_GUESTS: usize = 256;
/// The pager's own number among the readers of the queue.
const PAGER: u64 = 0;

/// What a guest has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connected,
    Offered,
    Serving(ViewId),
    Asking,
    Reading(u64),
}

#[derive(Debug)]
struct Guest {
    socket: UnixStream,
    pid: i32,
    inbox: Inbox,
    stage: Stage,
    deadline: Option<Instant>,
}

struct Keeper {
    epoll: OwnedFd,
    listener: UnixListener,
    /// Or why there are none.
    wares: Result<Wares, String>,
    guests: HashMap<u64, Guest>,
    next: u64,
}

impl Keeper {
    fn run(mut self) {
        let mut ready = Vec::with_capacity(16);
        loop {
            ready.clear();
            let deadline = self.guests.values().filter_map(|guest| guest.deadline).min();
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec::try_from(left).unwrap_or_default());
            let space = rustix::buffer::spare_capacity(&mut ready);
            match epoll::wait(&self.epoll, space, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    warn!("waiting at the door: {error}; it is closed");
                    return;
                }
            }
            for event in &ready {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    STOP => return,
                    id => self.hear(id),
                }
            }
            let now = Instant::now();
            let late = self.guests.iter().filter(|(_, g)| g.deadline.is_some_and(|at| at <= now));
            for id in late.map(|(id, _)| *id).collect::<Vec<_>>() {
                self.refuse(id, &format!("nothing came within {PATIENCE:?}"));
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    if let Err(problem) = self.welcome(socket) {
                        warn!("a process was turned away: {problem}");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!("accepting a connection: {error}");
                    // Most likely no descriptor is left: do not spin on it.
                    std::thread::sleep(Duration::from_millis(50));
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, socket: UnixStream) -> Result<(), String> {
        let peer = Peer::of(&socket).map_err(|error| error.to_string())?;
        let problem = if self.guests.len() >= MAX_GUESTS {
            Some(format!("{MAX_GUESTS} processes take part already"))
        } else {
            not_trusted(peer.uid, rustix::process::geteuid().as_raw())
        };
        if let Some(problem) = problem {
            // Whether it hears or not, that is the end of it.
            let _ = send(&socket, &Frame::Refused(problem.clone()), &[]);
            return Err(problem);
        }
        let id = self.next;
        self.next += 1;
        watch(&self.epoll, socket.as_fd(), id).map_err(|error| error.to_string())?;
        let deadline = Some(Instant::now() + PATIENCE);
        let (inbox, stage) = (Inbox::default(), Stage::Connected);
        self.guests.insert(id, Guest { socket, pid: peer.pid, inbox, stage, deadline });
        Ok(())
    }

    fn hear(&mut self, id: u64) {
        loop {
            let Some(guest) = self.guests.get_mut(&id) else { return };
            match guest.inbox.receive(&guest.socket) {
                Ok(None) => return,
                Ok(Some((frame, fds))) => {
                    if let Err(problem) = self.answer(id, frame, fds) {
                        return self.refuse(id, &problem);
                    }
                }
                Err(ReceiveError::Frame(error)) => return self.refuse(id, &error.to_string()),
                Err(_) => return self.gone(id),
            }
        }
    }

    /// Does what a frame asks for, and answers it.
    fn answer(&mut self, id: u64, frame: Frame, fds: Vec<OwnedFd>) -> Result<(), String> {
        let Some(guest) = self.guests.get(&id) else { return Ok(()) };
        let wares = self.wares.as_ref().map_err(String::clone)?;
        let (stage, frame, fds) = match (guest.stage, frame) {
            (Stage::Connected, Frame::Hello) => {
                let [queue, bell] = wares.queue.descriptors();
                let memfds = wares.memfds.iter().map(|fd| fd.as_fd());
                let fds = [wares.map.as_fd(), queue, bell].into_iter().chain(memfds);
                let fds: Vec<BorrowedFd<'_>> = fds.collect();
                (Stage::Offered, Frame::Memory(wares.regions.clone()), fds)
            }
            (Stage::Offered, Frame::View(addresses)) => {
                let view = ViewId(id);
                wares.add_view(view, guest.pid, &addresses, fds)?;
                info!(pid = guest.pid, "a process takes part");
                (Stage::Serving(view), Frame::Serving, Vec::new())
            }
            (Stage::Offered, Frame::Asks) => {
                info!(pid = guest.pid, "a process asks by the fault queue");
                wares.worker.tell(Command::Sharing(wares.memory, Sharing::Exits));
                (Stage::Asking, Frame::Serving, Vec::new())
            }
            (Stage::Offered, Frame::Reader) => {
                let taken = |n: &u64| self.guests.values().any(|g| g.stage == Stage::Reading(*n));
                let free = (PAGER + 1..MAX_READERS).find(|n| !taken(n));
                let reader = free.ok_or("there are as many readers as there can be")?;
                let number = u32::try_from(reader).map_err(|error| error.to_string())?;
                (Stage::Reading(reader), Frame::ReaderId(number), Vec::new())
            }
            (stage, frame) => {
                return Err(format!("{frame:?} is no message for a connection that is {stage:?}"));
            }
        };
        // Told first: should the answer fail, the hang-up undoes it.
        let sent = send(&guest.socket, &frame, &fds);
        if let Some(guest) = self.guests.get_mut(&id) {
            guest.stage = stage;
            guest.deadline = (stage == Stage::Offered).then(|| Instant::now() + PATIENCE);
        }
        sent.map_err(|error| format!("answering: {error}"))
    }

    fn refuse(&mut self, id: u64, problem: &str) {
        if let Some(guest) = self.guests.get(&id) {
            warn!(pid = guest.pid, "refused: {problem}");
            let _ = send(&guest.socket, &Frame::Refused(problem.into()), &[]);
        }
        self.gone(id);
    }

    /// A guest has hung up, most likely because it has ended.
    fn gone(&mut self, id: u64) {
        let Some(guest) = self.guests.remove(&id) else { return };
        if let Ok(wares) = &self.wares {
            wares.left(guest.stage);
        }
    }
}

impl Wares {
    fn add_view(
        &self,
        id: ViewId,
        pid: i32,
        addresses: &[u64],
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let slots = view_slots(&self.slots, addresses).ok_or_else(|| {
            format!("{} addresses for {} regions", addresses.len(), self.slots.len())
        })?;
        let slots = SlotSet::new(&slots, self.source_len).map_err(|error| error.to_string())?;
        let [uffd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
            format!("{} descriptors came; one userfaultfd is expected", fds.len())
        })?;
        if !is_userfaultfd(uffd.as_fd()) {
            return Err("the descriptor is no userfaultfd".into());
        }
        let uffd = Userfaultfd::adopt(uffd).map_err(|error| error.to_string())?;
        let is_seen = self.see(pid, addresses)?;
        let view = Box::new(View::new(id, uffd, slots, is_seen)?);
        let (to, done) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Sharing(self.memory, Sharing::AddView(view, to)));
        done.recv().unwrap_or_else(|_| Err("the pager has ended".into()))
    }

    /// Looks whether a process maps the memory at these addresses, and refuses it
    /// if not: it would never find there what is installed. False if its mappings
    /// are not for this user to see. What it maps later is up to it, as all else
    /// is that it does to this memory.
    fn see(&self, pid: i32, addresses: &[u64]) -> Result<bool, String> {
        for (region, hva) in self.regions.iter().zip(addresses) {
            let memfd = usize::try_from(region.memfd).ok().and_then(|at| self.memfds.get(at));
            let Some(memfd) = memfd else { return Ok(false) };
            match is_mapped_at(memfd.as_fd(), region.offset, pid, *hva, region.len) {
                Ok(true) => {}
                Ok(false) => {
                    return Err(format!(
                        "process {pid} has no shared mapping of the region of gpa {:#x} at \
                         {hva:#x}: map its memfd there, MAP_SHARED, before asking",
                        region.gpa
                    ));
                }
                Err(error) => {
                    debug!(pid, "its mappings cannot be seen: {error}");
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// A process that took part is gone.
    fn left(&self, stage: Stage) {
        let reader = match stage {
            Stage::Serving(view) => {
                self.worker.tell(Command::Sharing(self.memory, Sharing::RemoveView(view)));
                None
            }
            Stage::Reading(reader) => Some(reader),
            Stage::Connected | Stage::Offered | Stage::Asking => None,
        };
        self.queue.recover(reader);
    }
}

/// Whoever takes part reads and writes the guest's memory: the pager's own user
/// may, and root.
fn not_trusted(uid: u32, own: u32) -> Option<String> {
    (uid != own && uid != 0)
        .then(|| format!("user {uid} may not take part in the memory of user {own}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_users_may_not_take_part() {
        assert!(not_trusted(1000, 1000).is_none() && not_trusted(0, 1000).is_none());
        let why = not_trusted(1001, 1000).expect("refused");
        assert!(why.contains("1001") && why.contains("1000"), "{why}");
    }
}
