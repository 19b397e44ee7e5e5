//! Where peers come from: a socket of this process, or a keeper that accepts them,
//! and holds on to all that must outlive this process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use tracing::error;

use crate::attach::Custody;
use crate::keeper::{Kind, send};
use crate::reads::MemoryId;
use crate::served::Served;

/// Where peers come from.
#[derive(Debug)]
pub(super) enum Front {
    /// A socket of ours.
    Listener(UnixListener),
    /// A keeper, at the other end of `channel`.
    Keeper {
        channel: OwnedFd,
        /// It has told of all peers and memories there were when it began.
        told_all: bool,
    },
    /// A keeper that is no more: nobody comes, nothing is kept.
    Alone,
}

impl Front {
    /// What is readable when somebody comes.
    pub(super) fn events(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listener(listener) => Some(listener.as_fd()),
            Self::Keeper { channel, .. } => Some(channel.as_fd()),
            Self::Alone => None,
        }
    }

    /// Whether it is known which memories each peer has: before, nothing that a peer
    /// said can be understood.
    pub(super) fn has_told_all(&self) -> bool {
        !matches!(self, Self::Keeper { told_all: false, .. })
    }

    /// Has a memory kept that is about to be served.
    ///
    /// # Errors
    ///
    /// If that cannot be; then it must not be served.
    pub(super) fn keep(&self, peer: u64, served: &Served) -> io::Result<()> {
        match self {
            Self::Keeper { channel, .. } => {
                send(channel, Kind::Keep, [peer, served.id().0, 0], &served.descriptors())
            }
            Self::Listener(_) | Self::Alone => Ok(()),
        }
    }

    /// Who would hold the door of a memory, too.
    pub(super) fn custody(&self, peer: u64, memory: MemoryId) -> Option<Custody> {
        let Self::Keeper { channel, .. } = self else { return None };
        match channel.try_clone() {
            Ok(channel) => Some(Custody::new(channel, peer, memory)),
            Err(error) => {
                error!("a door will end with this process: {error}");
                None
            }
        }
    }

    /// A memory need not be kept any more.
    pub(super) fn let_go(&self, peer: u64, memory: MemoryId) {
        self.tell(Kind::Drop, [peer, memory.0, 0]);
    }

    /// A peer will not be heard of again.
    pub(super) fn forget(&self, peer: u64) {
        self.tell(Kind::Forget, [peer, 0, 0]);
    }

    fn tell(&self, kind: Kind, args: [u64; 3]) {
        if let Self::Keeper { channel, .. } = self
            && let Err(error) = send(channel, kind, args, &[])
        {
            error!("telling the keeper: {error}");
        }
    }
}
