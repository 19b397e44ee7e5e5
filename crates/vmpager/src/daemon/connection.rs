//! One peer: its socket, what has arrived of its handshake, its process, and
//! the session made of the memories it handed over.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tracing::warn;
use vmpager_core::{PageSource, Slot, SlotSet};
use vmpager_sys::peer::{
    Peer, end, fd_kind, has_exited, holds_userfaultfd, is_userfaultfd, look_from, look_with_fds,
};
use vmpager_sys::uffd::Userfaultfd;

use crate::attach::{Entrance, LeftDoor};
use crate::handshake::{Handshake, HandshakeError, Inbox, Said};
use crate::metrics::Refusal;
use crate::reads::MemoryId;
use crate::refusal;
use crate::served::{ServeOptions, Served, State};
use crate::stats::{EndReason, MemoryNumbers, SessionSummary, Tally};

/// The most descriptors one peer may make this process hold.
const MAX_HELD: usize = 64;

/// What a handshake offers to be served: regions and their userfaultfd.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) handshake: Handshake,
    pub(super) uffd: OwnedFd,
    /// The memfds of the handshake.
    pub(super) memfds: Vec<OwnedFd>,
}

/// What one more memory has to come up to.
#[derive(Debug)]
pub(super) struct Admission {
    /// No further VM may come.
    pub(super) full: bool,
    /// How many there are.
    pub(super) sessions: usize,
    /// The most memory of one VM.
    pub(super) max_memory: u64,
}

/// Why a memory is not served.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) why: Refusal,
    /// What is wrong, and what to do.
    pub(super) problem: String,
}

impl From<String> for Refused {
    fn from(problem: String) -> Self {
        Self { why: Refusal::Handshake, problem }
    }
}

/// What came of listening to a peer once.
#[derive(Debug)]
pub(super) enum Arrival {
    /// Nothing is there at the moment.
    Nothing,
    /// Something, but no whole handshake.
    Part,
    /// A whole handshake.
    Memory(Offer),
    /// One that another process has dealt with.
    Known(Offer),
    /// The peer closed its end.
    HangUp,
}

/// Why a peer is listened to no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(
        "it sent more than {MAX_HELD} descriptors on one connection; one userfaultfd per handshake \
         is served"
    )]
    TooManyDescriptors,
    #[error("it asked for clean pages twice on one connection")]
    AsksTwice,
    #[error("receiving the handshake: {0}")]
    Io(#[from] io::Error),
}

#[derive(Debug)]
pub(super) struct Connection {
    socket: Option<UnixStream>,
    peer: Peer,
    /// Whole messages at the start of what it sent that another process has dealt
    /// with: their memories were taken over from it, or have ended.
    known: u64,
    /// How many memories it ever handed over.
    memories_so_far: u64,
    inbox: Inbox,
    /// Descriptors that came and whose message is not whole yet.
    fds: Vec<OwnedFd>,
    /// A whole message whose descriptors have not come yet.
    handshake: Option<Handshake>,
    /// It asks for clean pages, and has not been answered.
    asks: bool,
    /// It has asked, and was answered.
    answered: bool,
    /// Userfaultfds that are not served, kept so that nobody reads zeroes.
    refused: Vec<OwnedFd>,
    /// Memories that can be served no longer, kept for the same reason.
    failed: Vec<Served>,
    timeout: Duration,
    deadline: Option<Instant>,
    memories: Vec<MemoryId>,
    /// Where other processes may come to have a memory, too.
    doors: Vec<(MemoryId, Entrance)>,
    /// What another process left of such doors.
    left_doors: HashMap<MemoryId, LeftDoor>,
    /// Whether it ever handed over memory.
    had_session: bool,
    /// Bytes of memory it has handed over and that may be served yet.
    handed_over: u64,
    /// It sent descriptors that this process had no room for: they are in its socket.
    left_there: bool,
    /// Its pidfd says it exited, yet its memory was still there.
    seems_gone: bool,
    /// What was counted of memories of its session that have ended.
    tally: Option<Tally>,
}

impl Connection {
    /// A peer that has `timeout` to send its handshake, after `known` messages that
    /// another process has dealt with.
    pub(super) fn new(
        socket: UnixStream,
        peer: Peer,
        known: u64,
        timeout: Duration,
    ) -> io::Result<Self> {
        // What a peer sends is looked at and left in the socket, for whoever has to
        // take over. (Which bounds how much it can send: the kernel takes no more
        // than the socket holds.)
        look_from(socket.as_fd(), 0)?;
        Ok(Self {
            socket: Some(socket),
            peer,
            known,
            memories_so_far: known,
            inbox: Inbox::default(),
            fds: Vec::new(),
            handshake: None,
            asks: false,
            answered: false,
            refused: Vec::new(),
            failed: Vec::new(),
            timeout,
            deadline: Some(Instant::now() + timeout),
            memories: Vec::new(),
            doors: Vec::new(),
            left_doors: HashMap::new(),
            had_session: known > 0,
            handed_over: 0,
            left_there: false,
            seems_gone: false,
            tally: None,
        })
    }

    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.peer.pidfd.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn take_pidfd(&mut self) -> Option<OwnedFd> {
        self.seems_gone = true;
        self.peer.pidfd.take()
    }

    pub(super) fn pid(&self) -> i32 {
        self.peer.pid
    }

    /// By when a handshake must be whole.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub(super) fn memories(&self) -> &[MemoryId] {
        &self.memories
    }

    pub(super) fn set_seems_gone(&mut self) {
        self.seems_gone = true;
    }

    pub(super) fn peer_seems_gone(&self) -> bool {
        self.seems_gone && !self.memories.is_empty()
    }

    /// Whether the peer would freeze rather than read zeroes if this process
    /// closed its userfaultfds.
    pub(super) fn peer_holds_userfaultfd(&self) -> bool {
        // Whoever has its number by now is not asked.
        let lives = self.pidfd().map_or(!self.seems_gone, |pidfd| !has_exited(pidfd));
        lives && holds_userfaultfd(self.peer.pid)
    }

    /// Reads once. Descriptors belong to the message whose first byte they
    /// came with: the kernel ends a read after a piece that has some.
    pub(super) fn receive(&mut self) -> Result<Arrival, ReceiveError> {
        let Some(socket) = &self.socket else { return Ok(Arrival::Nothing) };
        let mut bytes = [0; 16 * 1024];
        let count = match look_with_fds(socket, &mut bytes, &mut self.fds) {
            Ok(0) => return Ok(Arrival::HangUp),
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Arrival::Nothing),
            // The peer died with bytes of ours unread: as good as hanging up.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Arrival::HangUp),
            Err(error) => {
                self.left_there = true;
                return Err(error.into());
            }
        };
        if self.fds.len() + self.refused.len() + self.memories.len() > MAX_HELD {
            return Err(ReceiveError::TooManyDescriptors);
        }
        self.inbox.push(&bytes[..count])?;
        while self.handshake.is_none() {
            match self.inbox.next_message()? {
                None => break,
                Some(Said::Handshake(handshake)) => self.handshake = Some(handshake),
                Some(Said::AsksForCleanPages) if self.asks || self.answered => {
                    return Err(ReceiveError::AsksTwice);
                }
                Some(Said::AsksForCleanPages) => self.asks = true,
            }
        }
        if let Some(handshake) = self.handshake.take_if(|it| it.descriptors() <= self.fds.len()) {
            let mut fds = std::mem::take(&mut self.fds).into_iter();
            let Some(uffd) = fds.next() else { return Ok(Arrival::Part) };
            let memfds = fds.by_ref().take(handshake.descriptors() - 1).collect();
            for extra in fds {
                let kind = fd_kind(extra.as_fd());
                warn!(peer_pid = self.peer.pid, kind, "a further descriptor is not used");
                self.refused.extend(Some(extra).filter(|fd| is_userfaultfd(fd.as_fd())));
            }
            let more = self.inbox.is_partial();
            self.deadline = more.then(|| Instant::now() + self.timeout);
            let offer = Offer { handshake, uffd, memfds };
            // Who hands memory over was answered, if by another process.
            self.answered |= std::mem::take(&mut self.asks);
            if let Some(left) = self.known.checked_sub(1) {
                self.known = left;
                return Ok(Arrival::Known(offer));
            }
            return Ok(Arrival::Memory(offer));
        }
        if self.deadline.is_none() {
            self.deadline = Some(Instant::now() + self.timeout);
        }
        Ok(Arrival::Part)
    }

    /// Who is to be given the clean pages, if it asks for them: once.
    pub(super) fn asks(&mut self) -> Option<BorrowedFd<'_>> {
        if !std::mem::take(&mut self.asks) {
            return None;
        }
        self.answered = true;
        self.socket()
    }

    /// Whether one more memory of it is taken. If not, its descriptor is kept open.
    pub(super) fn admit(
        &mut self,
        slots: &[Slot],
        uffd: OwnedFd,
        limits: &Admission,
    ) -> Result<OwnedFd, Refused> {
        let bytes = slots.iter().fold(self.handed_over, |sum, slot| sum.saturating_add(slot.len));
        let (why, problem) = if limits.full && self.memories.is_empty() {
            let problem = format!(
                "{} VMs are served, and no more are admitted (--max-sessions); end one of them, \
                 or ask another pager",
                limits.sessions
            );
            (Refusal::Sessions, problem)
        } else if bytes > limits.max_memory {
            let problem = format!(
                "it has {bytes:#x} bytes of memory, and a VM may have {:#x} (--max-memory)",
                limits.max_memory
            );
            (Refusal::Memory, problem)
        } else {
            return Ok(uffd);
        };
        self.refused.push(uffd);
        Err(Refused { why, problem })
    }

    /// Checks an offer. On failure its descriptor is kept open.
    pub(super) fn check(
        &mut self,
        slots: &[Slot],
        uffd: OwnedFd,
        source: &dyn PageSource,
        partial: bool,
    ) -> Result<(Userfaultfd, SlotSet, State), String> {
        match plan(slots, source, partial || self.had_session) {
            Ok((slots, state)) => {
                let uffd = Userfaultfd::adopt(uffd).map_err(|error| error.to_string())?;
                Ok((uffd, slots, state))
            }
            Err(problem) => {
                self.refused.push(uffd);
                Err(problem)
            }
        }
    }

    /// Has a memory served as one of this peer.
    pub(super) fn adapt(&self, served: Served, options: &ServeOptions) -> Served {
        let served = served.of_process(self.peer.pid);
        match self.pidfd().filter(|_| options.huge_pages).map(|fd| fd.try_clone_to_owned()) {
            Some(Ok(process)) => served.making_huge_pages(process),
            Some(Err(error)) => {
                warn!("no huge pages: {error}");
                served
            }
            None => served,
        }
    }

    /// The name of the next memory that the connection of this id hands over: the
    /// same one for whoever takes over.
    pub(super) fn next_memory(&self, id: u64) -> MemoryId {
        MemoryId((id << 16) + self.memories_so_far)
    }

    /// What the connection of this id handed over as that memory, which was taken over:
    /// its memfds, too. Memories are asked for in their order, before anything else is
    /// heard of the peer.
    pub(super) fn handed_over(
        &mut self,
        id: u64,
        memory: MemoryId,
    ) -> Option<(Handshake, Vec<OwnedFd>)> {
        while self.known > 0 {
            let number = self.memories_so_far - self.known;
            match self.receive() {
                Ok(Arrival::Known(offer)) if memory.0 == (id << 16) + number => {
                    return Some((offer.handshake, offer.memfds));
                }
                Ok(Arrival::Known(_) | Arrival::Part) => {}
                // Heard of once more when it is listened to.
                Ok(Arrival::Nothing | Arrival::HangUp | Arrival::Memory(_)) | Err(_) => break,
            }
        }
        None
    }

    /// A memory of it is served that nobody has served before.
    pub(super) fn add_new_memory(&mut self, memory: MemoryId, bytes: u64) {
        self.memories_so_far += 1;
        self.add_memory(memory, bytes);
    }

    pub(super) fn add_memory(&mut self, memory: MemoryId, bytes: u64) {
        if self.memories.is_empty() {
            self.tally = None;
            self.handed_over = 0;
        }
        self.memories.push(memory);
        self.handed_over += bytes;
        self.had_session = true;
    }

    /// Keeps the door to a memory of this peer's open as long as that is served.
    pub(super) fn add_door(&mut self, memory: MemoryId, door: Entrance) {
        self.doors.push((memory, door));
    }

    /// The doors to its memories.
    pub(super) fn doors(&self) -> impl Iterator<Item = &Entrance> {
        self.doors.iter().map(|(_, door)| door)
    }

    /// Closes the door to a memory that is served no longer: those who took part learn of
    /// the end by the door's.
    pub(super) fn close_door(&mut self, memory: MemoryId) {
        self.doors.retain(|(of, _)| *of != memory);
    }

    /// Another process had opened a door to a memory.
    pub(super) fn add_left_door(&mut self, memory: MemoryId, left: LeftDoor) {
        self.left_doors.insert(memory, left);
    }

    /// Somebody had come to such a door.
    pub(super) fn add_left_guest(&mut self, memory: MemoryId, guest: u64, socket: OwnedFd) {
        if let Some(left) = self.left_doors.get_mut(&memory) {
            left.add(guest, socket);
        }
    }

    pub(super) fn take_left_door(&mut self, memory: MemoryId) -> Option<LeftDoor> {
        self.left_doors.remove(&memory)
    }

    /// Adds up a memory that is served no longer. If it was the last one, the
    /// session has ended for the reason returned.
    pub(super) fn memory_ended(
        &mut self,
        memory: MemoryId,
        reason: EndReason,
        numbers: &MemoryNumbers,
    ) -> Option<EndReason> {
        self.memories.retain(|other| *other != memory);
        self.tally.get_or_insert_with(Tally::new).add(numbers);
        self.memories.is_empty().then_some(reason)
    }

    pub(super) fn summary(&mut self, session: u64, reason: EndReason) -> SessionSummary {
        let tally = self.tally.get_or_insert_with(Tally::new);
        tally.summary(session, self.peer.pid, Some(reason))
    }

    /// Time is up for a handshake: says what is missing.
    pub(super) fn late(&mut self) -> String {
        let whole = match &self.handshake {
            None => self.inbox.next_message().map(|said| said.is_some()),
            Some(_) => Ok(true),
        };
        match whole {
            Ok(true) => HandshakeError::NoDescriptor.to_string(),
            Ok(false) => format!("no complete handshake within {:?}; closed", self.timeout),
            Err(error) => error.to_string(),
        }
    }

    /// The peer closed its end. Says what is wrong with that, if something is.
    pub(super) fn hang_up(&mut self) -> Option<String> {
        let problem = if self.handshake.is_some() {
            Some(HandshakeError::NoDescriptor.to_string())
        } else if self.inbox.is_partial() {
            Some("before its handshake was complete".into())
        } else {
            (!self.had_session).then(|| "without a handshake".into())
        };
        // It may still listen.
        problem.iter().for_each(|problem| self.say_refused(problem));
        self.refuse();
        problem
    }

    /// Tells the peer why.
    pub(super) fn say_refused(&self, problem: &str) {
        if let Some(socket) = &self.socket {
            refusal::tell(socket, problem);
        }
    }

    /// Listens no longer; holds on to what would otherwise turn into zeroes.
    pub(super) fn refuse(&mut self) {
        self.deadline = None;
        self.refused.append(&mut self.fds);
        self.refused.retain(|fd| is_userfaultfd(fd.as_fd()));
        let Some(socket) = self.socket.take() else { return };
        // A keeper may hold it open, and what is in it, for whoever takes over. It may
        // have been closed by the peer.
        let _ = match self.is_done() {
            true => end(&socket),
            false => socket.shutdown(std::net::Shutdown::Both),
        };
    }

    /// Keeps a memory that can be served no longer.
    pub(super) fn hold(&mut self, failed: Option<Box<Served>>) {
        self.failed.extend(failed.map(|failed| *failed));
    }

    /// The peer has exited: nobody can read zeroes any more.
    pub(super) fn let_go_of_refused(&mut self) {
        self.refused.clear();
        self.failed.clear();
        self.left_there = false;
    }

    /// Whether nothing more can come of this connection.
    pub(super) fn is_done(&self) -> bool {
        let holds = !self.refused.is_empty() || !self.failed.is_empty() || self.left_there;
        let waits_for_exit = holds && self.peer.pidfd.is_some();
        self.socket.is_none() && self.memories.is_empty() && !waits_for_exit
    }
}

/// The slots of an offer and memory for their page map, if the source can
/// serve them.
fn plan(
    slots: &[Slot],
    source: &dyn PageSource,
    partial: bool,
) -> Result<(SlotSet, State), String> {
    let slots = SlotSet::new(slots, source.len()).map_err(|error| error.to_string())?;
    if slots.bytes() < source.len() && !partial {
        return Err(format!(
            "the regions' sizes add up to {:#x} bytes but {} has {:#x}: is it another VM's \
             memory? (to serve part of a file, allow partial coverage)",
            slots.bytes(),
            source.name(),
            source.len()
        ));
    }
    let state =
        State::new(&slots, source).map_err(|error| format!("making the page map: {error}"))?;
    Ok((slots, state))
}
