//! The side of the pager: a socket, and a thread that talks to those who come.
//!
//! ```text
//!   connected --Hello--> offered --View--> serving          --hang-up--> gone
//!                           |----Reader--> resolving faults --hang-up--> gone
//!                           `----Asks----> asking           --hang-up--> gone
//! ```
//!
//! Anything else is answered with a refusal that says what is wrong, and ends
//! the connection. It never touches guest memory: what it learns, it tells the
//! worker.
//!
//! Where a keeper holds what a guest came by ([`Custody`]), a successor hears all that
//! the guest has said once more, and goes the same way, without answering.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use tracing::{info, warn};
use vmpager_core::queue::MAX_READERS;
use vmpager_sys::peer::{Peer, end, look_from};

use super::custody::{Custody, Resumed};
use super::protocol::{Frame, Inbox, ReceiveError, send};
use super::queue::QueueOwner;
use super::wares::{ShareError, Wares};
use crate::daemon::listen;
use crate::keeper;
use crate::kill;
use crate::served::ViewId;
use crate::worker::{Command, Sharing, doorbell, ring, watch};

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
        Ok(Self { queue, _entrance: Entrance::open(path, Ok(wares), None)? })
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

/// What makes a door outlive this process.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) custody: Custody,
    /// In its name.
    pub(crate) number: u64,
    /// What another process left of it.
    pub(crate) resumed: Resumed,
}

impl Entrance {
    /// Opens one where memory is to be had, or where it is said why there is
    /// none; goes on with what another process left of it.
    pub(crate) fn open(
        path: &Path,
        wares: Result<Wares, String>,
        kept: Option<Kept>,
    ) -> Result<Self, ShareError> {
        let (custody, number, resumed) = match kept {
            Some(Kept { custody, number, resumed }) => (Some(custody), number, resumed),
            None => (None, 0, Resumed::default()),
        };
        let listener = resumed.listener.map_or_else(|| listen(path), Ok)?;
        let custody = custody.filter(|_| wares.is_ok());
        if let (Some(custody), Ok(wares)) = (&custody, &wares) {
            let [queue, bell] = wares.queue.descriptors();
            if let Err(error) = custody.keep(number, [listener.as_fd(), queue, bell]) {
                warn!("having a door kept: {error}; it ends with this process");
            }
        }
        kill::point("door kept");
        let stop = Arc::new(doorbell()?);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        watch(&epoll, listener.as_fd(), LISTENER)?;
        watch(&epoll, stop.as_fd(), STOP)?;
        let (guests, next) = (HashMap::new(), FIRST_GUEST);
        let keeper = Keeper { epoll, listener, wares, custody, guests, next };
        let thread = std::thread::Builder::new().name("vmpager-door".into());
        let thread = Some(thread.spawn(move || keeper.run(resumed.guests))?);
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
        // Whoever died in the middle of this has removed it.
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
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
pub(super) const PAGER: u64 = 0;

/// What a guest has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
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
    /// As what it is kept. Its answers were sent then, by another process perhaps.
    kept: Option<keeper::Guest>,
}

struct Keeper {
    epoll: OwnedFd,
    listener: UnixListener,
    /// Or why there are none.
    wares: Result<Wares, String>,
    custody: Option<Custody>,
    guests: HashMap<u64, Guest>,
    next: u64,
}

impl Keeper {
    fn run(mut self, resumed: Vec<(keeper::Guest, UnixStream)>) {
        // Before anybody new: those numbers are taken.
        for (guest, socket) in resumed {
            if let Err(problem) = self.resume(guest, socket) {
                warn!("a process that took part can no longer: {problem}");
            }
        }
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
                    STOP => return self.end(),
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
        let deadline = Some(Instant::now() + PATIENCE);
        self.listen_to(id, socket, peer.pid, deadline).map_err(|error| error.to_string())
    }

    /// Goes on with somebody who took part in this memory at another process.
    fn resume(&mut self, kept: keeper::Guest, socket: UnixStream) -> Result<(), String> {
        let id = kept.id;
        self.next = self.next.max(id.saturating_add(1));
        let listening = Peer::of(&socket)
            .and_then(|peer| self.listen_to(id, socket, peer.pid, None))
            .map_err(|error| error.to_string());
        if let Err(problem) = listening {
            self.custody.iter().for_each(|custody| custody.left(kept));
            return Err(problem);
        }
        if let Some(guest) = self.guests.get_mut(&id) {
            guest.kept = Some(kept);
        }
        self.hear(id);
        Ok(())
    }

    fn listen_to(
        &mut self,
        id: u64,
        socket: UnixStream,
        pid: i32,
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        let looks = self.custody.is_some();
        if looks {
            look_from(socket.as_fd(), 0)?;
        }
        // What was looked at stays in there: only what is new is worth telling.
        let (data, flags) = (epoll::EventData::new_u64(id), epoll::EventFlags::IN);
        epoll::add(&self.epoll, &socket, data, flags | epoll::EventFlags::ET)?;
        let (inbox, stage) = (Inbox::new(looks), Stage::Connected);
        let guest = Guest { socket, pid, inbox, stage, deadline, kept: None };
        self.guests.insert(id, guest);
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
                let known = guest.kept.map(|kept| kept.reader);
                let taken = |n: &u64| self.guests.values().any(|g| g.stage == Stage::Reading(*n));
                let free = (PAGER + 1..MAX_READERS).find(|n| !taken(n));
                let reader = known.or(free).ok_or("there are as many readers as there can be")?;
                let number = u32::try_from(reader).map_err(|error| error.to_string())?;
                (Stage::Reading(reader), Frame::ReaderId(number), Vec::new())
            }
            (stage, frame) => {
                return Err(format!("{frame:?} is no message for a connection that is {stage:?}"));
            }
        };
        if guest.kept.is_some() {
            self.moved(id, stage);
            return Ok(());
        }
        let kept = self.have_kept(id, guest, stage)?;
        // Told first: should the answer fail, the hang-up undoes it.
        let sent = send(&guest.socket, &frame, &fds);
        self.moved(id, stage);
        if let Some(guest) = self.guests.get_mut(&id).filter(|_| kept.is_some()) {
            guest.kept = kept;
            kill::point("guest answered");
        }
        sent.map_err(|error| format!("answering: {error}"))
    }

    fn moved(&mut self, id: u64, stage: Stage) {
        if let Some(guest) = self.guests.get_mut(&id) {
            guest.stage = stage;
            guest.deadline = (stage == Stage::Offered).then(|| Instant::now() + PATIENCE);
        }
    }

    /// Has a guest kept that takes part from now on, if somebody keeps.
    fn have_kept(
        &self,
        id: u64,
        guest: &Guest,
        stage: Stage,
    ) -> Result<Option<keeper::Guest>, String> {
        let reader = match stage {
            Stage::Connected | Stage::Offered => return Ok(None),
            Stage::Serving(_) | Stage::Asking => PAGER,
            Stage::Reading(reader) => reader,
        };
        let Some(custody) = &self.custody else { return Ok(None) };
        let kept = keeper::Guest { id, reader };
        match custody.keep_guest(kept, &guest.socket) {
            Ok(()) => Ok(Some(kept)),
            // Nobody would take over either.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(None),
            Err(error) => Err(format!("having it kept: {error}")),
        }
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
        // A keeper may hold it, too. It may have been closed by the other end.
        let _ = end(&guest.socket);
        if let (Some(custody), Some(kept)) = (&self.custody, guest.kept) {
            custody.left(kept);
        }
        if let Ok(wares) = &self.wares {
            wares.left(guest.stage);
        }
    }

    /// The memory is served no longer: those who took part shall know.
    fn end(self) {
        for guest in self.guests.into_values() {
            let _ = end(&guest.socket);
        }
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
