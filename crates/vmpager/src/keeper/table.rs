//! What a keeper keeps: descriptors, and numbers that say whose they are. It knows
//! nothing of what is in them. A service manager, if there is one, has a copy of each.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmpager_sys::peer::Peer;

use super::manager::{LeftPeer, Manager, name};
use super::message::{Kind, Message, send};

/// The kinds of a memory's descriptors in names, in their order.
const PARTS: [char; 3] = ['u', 'm', 'r'];

/// A process that has connected.
#[derive(Debug)]
struct Kept {
    /// What it sent stays in there, descriptors included: workers only look at it.
    socket: OwnedFd,
    /// Its process id and, in the upper half, its user id.
    who: u64,
    pidfd: Option<OwnedFd>,
    /// How many memories were ever kept for it.
    memories_so_far: u64,
    memories: BTreeMap<u64, Memory>,
    /// Of its memories: where other processes come to take part. No service manager has
    /// these.
    doors: BTreeMap<u64, Door>,
    /// The name that the record of its latest memory is still kept under, if that has
    /// ended.
    ended: Option<String>,
    /// The name of its socket.
    name: String,
}

/// A memory of a peer.
#[derive(Debug)]
struct Memory {
    /// Its userfaultfd, page map and record.
    fds: [OwnedFd; 3],
    names: [String; 3],
}

/// Where other processes come to take part in a memory, and who has.
#[derive(Debug)]
struct Door {
    /// In its name.
    number: u64,
    fds: [OwnedFd; 3],
    /// The sockets they came by.
    guests: BTreeMap<u64, OwnedFd>,
}

impl Kept {
    /// So many its worker needs as well, with the userfaultfds of guests.
    fn descriptors(&self) -> usize {
        let doors = self.doors.values().map(|door| 3 + 2 * door.guests.len());
        2 + 3 * self.memories.len().max(1) + doors.sum::<usize>()
    }
}

/// All peers, by number.
#[derive(Debug)]
pub(super) struct Table {
    peers: BTreeMap<u64, Kept>,
    next: u64,
    pub(super) manager: Manager,
}

/// Something a worker, or another keeper, has to be told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    Peer(u64),
    Memory(u64, u64),
    Door(u64, u64),
    Guest(u64, u64, u64),
}

impl Table {
    pub(super) fn new(manager: Manager) -> Self {
        Self { peers: BTreeMap::new(), next: 0, manager }
    }

    pub(super) fn peers(&self) -> usize {
        self.peers.len()
    }

    pub(super) fn has_memories(&self) -> bool {
        self.peers.values().any(|kept| !kept.memories.is_empty())
    }

    /// How many connections a process has; those of other pid namespaces, which have
    /// no number here, have none.
    pub(super) fn connections_of(&self, pid: i32) -> usize {
        let pid = u64::from(pid.cast_unsigned());
        let theirs = self.peers.values().filter(|kept| kept.who & 0xffff_ffff == pid);
        if pid == 0 { 0 } else { theirs.count() }
    }

    /// Descriptors of all peers, and of one memory for each that has none yet: so many
    /// a worker needs as well.
    pub(super) fn descriptors(&self) -> usize {
        self.peers.values().map(Kept::descriptors).sum()
    }

    /// A process has connected.
    pub(super) fn welcome(&mut self, socket: UnixStream, peer: Peer) -> io::Result<Entry> {
        socket.set_nonblocking(true)?;
        let Peer { pid, uid, pidfd } = peer;
        let who = u64::from(uid) << 32 | u64::from(pid.cast_unsigned());
        self.next += 1;
        self.insert(self.next, socket.into(), pidfd, who, 0);
        Ok(Entry::Peer(self.next))
    }

    fn insert(&mut self, peer: u64, socket: OwnedFd, pidfd: Option<OwnedFd>, who: u64, had: u64) {
        let name_of_it = name('p', &[peer, who, had]);
        if let Some(pidfd) = &pidfd {
            self.manager.store(&name('i', &[peer]), pidfd);
        }
        self.manager.store(&name_of_it, &socket);
        let (memories, doors, ended) = (BTreeMap::new(), BTreeMap::new(), None);
        let (memories_so_far, name) = (had, name_of_it);
        let kept = Kept { socket, who, pidfd, memories_so_far, memories, doors, ended, name };
        self.peers.insert(peer, kept);
        self.next = self.next.max(peer);
    }

    /// Does what a worker, or a keeper that hands over, says.
    pub(super) fn apply(&mut self, message: Message) -> io::Result<()> {
        let [peer, number, who] = message.args;
        match message.kind {
            Kind::Peer => {
                let mut fds = message.fds.into_iter();
                let Some(socket) = fds.next() else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                self.insert(peer, socket, fds.next(), who, number);
            }
            Kind::Keep | Kind::Memory => {
                let is_new = message.kind == Kind::Keep;
                self.keep(peer, number, message.three()?, is_new)?;
            }
            Kind::Drop => self.let_go(peer, number),
            Kind::Forget => self.forget(peer),
            Kind::Door | Kind::Guest | Kind::Left | Kind::Shut => self.apply_to_door(message)?,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(())
    }

    fn keep(&mut self, peer: u64, memory: u64, fds: [OwnedFd; 3], is_new: bool) -> io::Result<()> {
        let kept = self.peers.get_mut(&peer).ok_or_else(|| {
            io::Error::other(format!("it has a memory of peer {peer}, whom nobody knows"))
        })?;
        // One that was kept when the keeper died may be told of again.
        kept.memories_so_far += u64::from(is_new && !kept.memories.contains_key(&memory));
        let names = PARTS.map(|kind| name(kind, &[peer, memory, kept.memories_so_far]));
        for (name, fd) in names.iter().zip(&fds) {
            self.manager.store(name, fd);
        }
        if let Some(earlier) = kept.ended.take() {
            self.manager.remove(&earlier);
        }
        kept.memories.insert(memory, Memory { fds, names });
        Ok(())
    }

    fn let_go(&mut self, peer: u64, memory: u64) {
        let Some(kept) = self.peers.get_mut(&peer) else { return };
        kept.doors.remove(&memory);
        let Some(Memory { names: [uffd, map, record], .. }) = kept.memories.remove(&memory) else {
            return;
        };
        self.manager.remove(&uffd);
        self.manager.remove(&map);
        // What says how many memories there have been outlives them.
        if let Some(earlier) = kept.ended.replace(record) {
            self.manager.remove(&earlier);
        }
    }

    fn forget(&mut self, peer: u64) {
        let Some(kept) = self.peers.remove(&peer) else { return };
        let memories = kept.memories.into_values().flat_map(|memory| memory.names);
        memories.chain(kept.ended).for_each(|name| self.manager.remove(&name));
        self.manager.remove(&name('i', &[peer]));
        self.manager.remove(&kept.name);
    }

    /// Goes on with what an earlier keeper left of a peer. What is there in part was
    /// being kept, or let go of, when it died.
    pub(super) fn restore(&mut self, peer: u64, left: LeftPeer) -> io::Result<()> {
        let Some(socket) = left.socket else { return Ok(()) };
        self.insert(peer, socket, left.pidfd, left.who, left.had);
        for (memory, (so_far, fds)) in left.memories {
            match fds {
                [Some(uffd), Some(map), Some(record)] => {
                    if let Some(kept) = self.peers.get_mut(&peer) {
                        kept.memories_so_far = so_far;
                    }
                    self.keep(peer, memory, [uffd, map, record], false)?;
                }
                [None, _, Some(_)] => {
                    if let Some(kept) = self.peers.get_mut(&peer) {
                        kept.ended = Some(name('r', &[peer, memory, so_far]));
                    }
                }
                _ => {}
            }
        }
        if let Some(kept) = self.peers.get_mut(&peer) {
            kept.memories_so_far = left.so_far;
        }
        Ok(())
    }

    /// Whoever tells of guests does not wait for what is told of their memory, which
    /// may have ended: then there is nothing to be kept.
    fn apply_to_door(&mut self, message: Message) -> io::Result<()> {
        let [peer, memory, number] = message.args;
        let Some(kept) = self.peers.get_mut(&peer) else { return Ok(()) };
        match message.kind {
            Kind::Door => {
                let guests = kept.doors.remove(&memory).map(|door| door.guests);
                let (guests, fds) = (guests.unwrap_or_default(), message.three()?);
                kept.doors.insert(memory, Door { number, fds, guests });
            }
            Kind::Shut => drop(kept.doors.remove(&memory)),
            _ => {
                let Some(door) = kept.doors.get_mut(&memory) else { return Ok(()) };
                match message.fds.into_iter().next() {
                    Some(socket) => drop(door.guests.insert(number, socket)),
                    None => drop(door.guests.remove(&number)),
                }
            }
        }
        Ok(())
    }

    /// All there is: of a memory, first what its door was.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.peers.iter().flat_map(|(peer, kept)| {
            let doors = kept.doors.iter().flat_map(|(memory, door)| {
                let guests = door.guests.keys().map(|guest| Entry::Guest(*peer, *memory, *guest));
                std::iter::once(Entry::Door(*peer, *memory)).chain(guests)
            });
            let memories = kept.memories.keys().map(|memory| Entry::Memory(*peer, *memory));
            std::iter::once(Entry::Peer(*peer)).chain(doors).chain(memories)
        })
    }

    fn door(&self, peer: u64, memory: u64) -> Option<&Door> {
        self.peers.get(&peer)?.doors.get(&memory)
    }

    /// Tells somebody of an entry, if it is still there.
    pub(super) fn tell(&self, entry: Entry, to: impl AsFd) -> io::Result<()> {
        match entry {
            Entry::Peer(peer) => {
                let Some(kept) = self.peers.get(&peer) else { return Ok(()) };
                let mut fds = vec![kept.socket.as_fd()];
                fds.extend(kept.pidfd.as_ref().map(AsFd::as_fd));
                send(to, Kind::Peer, [peer, kept.memories_so_far, kept.who], &fds)
            }
            Entry::Memory(peer, memory) => {
                let kept = self.peers.get(&peer).and_then(|kept| kept.memories.get(&memory));
                let Some(Memory { fds, .. }) = kept else { return Ok(()) };
                send(to, Kind::Memory, [peer, memory, 0], &fds.each_ref().map(AsFd::as_fd))
            }
            Entry::Door(peer, memory) => {
                let Some(Door { number, fds, .. }) = self.door(peer, memory) else { return Ok(()) };
                send(to, Kind::Door, [peer, memory, *number], &fds.each_ref().map(AsFd::as_fd))
            }
            Entry::Guest(peer, memory, guest) => {
                let socket = self.door(peer, memory).and_then(|door| door.guests.get(&guest));
                let Some(socket) = socket else { return Ok(()) };
                send(to, Kind::Guest, [peer, memory, guest], &[socket.as_fd()])
            }
        }
    }
}
