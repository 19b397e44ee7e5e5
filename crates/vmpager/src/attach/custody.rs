//! What of a door outlives the process that opened it: its socket, the fault queue,
//! and the sockets of those who take part, all held by the
//! [keeper](crate::keeper) too. Whoever takes over goes on with them, so that nobody
//! has to come again: those who wait for pages could not.
//!
//! What a guest says stays in its socket, userfaultfd included, and is looked at: the
//! successor finds it there. A guest is kept *before* it is answered. A process killed
//! between the two leaves one that waits for its answer, and gives up in time; the
//! other way round it would leave one that believes itself served, and is not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tracing::debug;

use super::queue::QueueOwner;
use crate::keeper::{Guest, Kind, send};
use crate::reads::MemoryId;

/// Who holds the descriptors of one memory's door for whoever takes over.
#[derive(Debug)]
pub(crate) struct Custody {
    keeper: OwnedFd,
    peer: u64,
    memory: MemoryId,
}

impl Custody {
    /// By the keeper at the other end of `keeper`, for a memory of that peer.
    pub(crate) fn new(keeper: OwnedFd, peer: u64, memory: MemoryId) -> Self {
        Self { keeper, peer, memory }
    }

    fn tell(&self, kind: Kind, word: u64, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(&self.keeper, kind, [self.peer, self.memory.0, word], fds)
    }

    /// Has a door kept, by the number in its name.
    pub(super) fn keep(&self, number: u64, fds: [BorrowedFd<'_>; 3]) -> io::Result<()> {
        self.tell(Kind::Door, number, &fds)
    }

    /// Has somebody kept who takes part.
    pub(super) fn keep_guest(&self, guest: Guest, socket: &UnixStream) -> io::Result<()> {
        self.tell(Kind::Guest, guest.word(), &[socket.as_fd()])
    }

    /// Somebody takes part no longer.
    pub(super) fn left(&self, guest: Guest) {
        self.say(Kind::Left, guest.word());
    }

    /// There is no door any more.
    pub(crate) fn shut(&self) {
        self.say(Kind::Shut, 0);
    }

    /// Without a keeper nobody takes over: there is nothing to be said.
    fn say(&self, kind: Kind, word: u64) {
        if let Err(error) = self.tell(kind, word, &[]) {
            debug!("telling the keeper: {error}");
        }
    }
}

/// What another process left of a door.
#[derive(Debug)]
pub(crate) struct LeftDoor {
    pub(crate) number: u64,
    listener: UnixListener,
    queue: OwnedFd,
    bell: OwnedFd,
    guests: Vec<(Guest, UnixStream)>,
}

impl LeftDoor {
    pub(crate) fn new(number: u64, [listener, queue, bell]: [OwnedFd; 3]) -> Self {
        Self { number, listener: listener.into(), queue, bell, guests: Vec::new() }
    }

    pub(crate) fn add(&mut self, guest: u64, socket: OwnedFd) {
        self.guests.push((Guest::of(guest), socket.into()));
    }

    /// The directory its socket is in.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let address = self.listener.local_addr().ok()?;
        Some(address.as_pathname()?.parent()?.into())
    }

    /// The queue, with what the pager that died had taken queued again; who listens
    /// there goes on if it is the socket of `path`; and who has come.
    pub(crate) fn take_up(self, path: &Path) -> io::Result<(QueueOwner, Resumed)> {
        let is_there = self.directory().as_deref() == path.parent();
        let queue = QueueOwner::take_over(self.queue, self.bell)?;
        Ok((
            queue,
            Resumed { listener: Some(self.listener).filter(|_| is_there), guests: self.guests },
        ))
    }
}

/// What a door goes on with.
#[derive(Debug, Default)]
pub(crate) struct Resumed {
    pub(super) listener: Option<UnixListener>,
    pub(super) guests: Vec<(Guest, UnixStream)>,
}
