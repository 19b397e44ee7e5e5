//! What a keeper keeps: descriptors, and numbers that say whose they are. It knows
//! nothing of what is in them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmpager_sys::peer::Peer;

use super::message::{Kind, Message, send};

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
    memories: BTreeMap<u64, [OwnedFd; 3]>,
}

/// All peers, by number.
#[derive(Debug, Default)]
pub(super) struct Table {
    peers: BTreeMap<u64, Kept>,
    next: u64,
}

/// Something a worker, or another keeper, has to be told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    Peer(u64),
    Memory(u64, u64),
}

impl Table {
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
        self.peers.values().map(|kept| 2 + 3 * kept.memories.len().max(1)).sum()
    }

    /// A process has connected.
    pub(super) fn welcome(&mut self, socket: UnixStream, peer: Peer) -> io::Result<Entry> {
        socket.set_nonblocking(true)?;
        let Peer { pid, uid, pidfd } = peer;
        let who = u64::from(uid) << 32 | u64::from(pid.cast_unsigned());
        let (socket, memories) = (socket.into(), BTreeMap::new());
        let kept = Kept { socket, who, pidfd, memories_so_far: 0, memories };
        self.next += 1;
        self.peers.insert(self.next, kept);
        Ok(Entry::Peer(self.next))
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
                let (pidfd, memories) = (fds.next(), BTreeMap::new());
                let kept = Kept { socket, who, pidfd, memories_so_far: number, memories };
                self.peers.insert(peer, kept);
                self.next = self.next.max(peer);
            }
            Kind::Keep | Kind::Memory => {
                let is_new = message.kind == Kind::Keep;
                let fds = message.memory()?;
                let kept = self.peers.get_mut(&peer).ok_or_else(|| {
                    io::Error::other(format!("it has a memory of peer {peer}, whom nobody knows"))
                })?;
                kept.memories_so_far += u64::from(is_new);
                kept.memories.insert(number, fds);
            }
            Kind::Drop => {
                if let Some(kept) = self.peers.get_mut(&peer) {
                    kept.memories.remove(&number);
                }
            }
            Kind::Forget => drop(self.peers.remove(&peer)),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(())
    }

    /// All there is.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.peers.iter().flat_map(|(peer, kept)| {
            let memories = kept.memories.keys().map(|memory| Entry::Memory(*peer, *memory));
            std::iter::once(Entry::Peer(*peer)).chain(memories)
        })
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
                let fds = self.peers.get(&peer).and_then(|kept| kept.memories.get(&memory));
                let Some(fds) = fds else { return Ok(()) };
                send(to, Kind::Memory, [peer, memory, 0], &fds.each_ref().map(AsFd::as_fd))
            }
        }
    }
}
