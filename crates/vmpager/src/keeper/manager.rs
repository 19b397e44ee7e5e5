//! What a service manager (systemd) does for a keeper. It learns when VMs may connect
//! (`READY=1`) and, by the watchdog, that the keeper lives. And it keeps a copy of each
//! descriptor (`FDSTORE=1`), to give them to the next keeper, however this one ended.
//!
//! All that a keeper knows beside descriptors is in their names, numbers in hexadecimal:
//!
//! | name | descriptor |
//! |---|---|
//! | `l` | what VMMs connect to, unless that is the manager's own |
//! | `p.PEER.WHO.SOFAR` | the socket of a peer, and how many memories it had when it came |
//! | `i.PEER` | its pidfd |
//! | `u.PEER.MEMORY.SOFAR`, `m.`, `r.` | a memory's userfaultfd, page map, record, and how many the peer had then |
//! | `w`, `c` | the worker's pidfd, and this end of the channel to it |
//! | `s.NAME` | a file that is served, by a hash of its name |
//!
//! A record that is there without the others is what is left of a memory that ended:
//! its handshake is still in the peer's socket, and must be skipped.
//!
//! systemd looks for hang-ups of what it keeps, and closes what has one; `FDPOLL=0` has
//! it not do so, as a socket whose peer has closed its end is still of use.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use sd_notify::NotifyState;
use tracing::error;

/// Names that are kept, in bytes: the next keeper is given all in one variable of its
/// environment, which Linux allows 128 KiB.
const MAX_NAMES: usize = 120 << 10;
/// So many are left for the memories of those who have connected.
const SPARE_NAMES: usize = 24 << 10;

/// The service manager, if there is one.
#[derive(Debug, Default)]
pub(super) struct Manager {
    is_there: bool,
    names: usize,
    /// What is stored now it has given itself.
    pub(super) has_all: bool,
    ready: bool,
    /// How often it wants to hear from the keeper, and when it does so next.
    watchdog: Option<(Duration, Instant)>,
}

impl Manager {
    /// The one that `NOTIFY_SOCKET` names.
    pub(super) fn of_this_process() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|every| (every / 2, Instant::now()));
        let is_there = std::env::var_os("NOTIFY_SOCKET").is_some();
        Self { is_there, watchdog, ..Self::default() }
    }

    pub(super) fn is_there(&self) -> bool {
        self.is_there
    }

    /// Whether it has room for what one more peer takes.
    pub(super) fn has_room(&self) -> bool {
        self.names + SPARE_NAMES < MAX_NAMES
    }

    fn tell(&self, states: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) {
        if let Err(error) = sd_notify::notify_with_fds(states, fds) {
            error!("telling the service manager: {error}");
        }
    }

    /// Has a descriptor kept.
    pub(super) fn store(&mut self, name: &str, fd: impl AsFd) {
        if !self.is_there {
            return;
        }
        if self.names + name.len() >= MAX_NAMES {
            error!("the service manager has no room for {name}: it is lost if the keeper dies");
            return;
        }
        self.names += name.len() + 1;
        if self.has_all {
            return;
        }
        let unwatched = NotifyState::Custom("FDPOLL=0");
        let states = [NotifyState::FdStore, NotifyState::FdName(name), unwatched];
        self.tell(&states, &[fd.as_fd()]);
    }

    /// Has all descriptors of a name kept no longer.
    pub(super) fn remove(&mut self, name: &str) {
        if self.is_there {
            self.names = self.names.saturating_sub(name.len() + 1);
            self.tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)], &[]);
        }
    }

    /// VMs may connect.
    pub(super) fn ready(&mut self) {
        if self.is_there && !std::mem::replace(&mut self.ready, true) {
            self.tell(&[NotifyState::Ready], &[]);
        }
    }

    /// The keeper is about to end.
    pub(super) fn stopping(&self) {
        if self.is_there {
            self.tell(&[NotifyState::Stopping], &[]);
        }
    }

    /// Says that the keeper lives, if it is time. Returns when it is next.
    pub(super) fn ping(&mut self, now: Instant) -> Option<Instant> {
        let (every, at) = self.watchdog?;
        if at <= now {
            self.watchdog = Some((every, now + every));
            self.tell(&[NotifyState::Watchdog], &[]);
        }
        self.watchdog.map(|(_, at)| at)
    }
}

/// Ends a worker of an earlier keeper, and waits for that.
pub(super) fn end(worker: &OwnedFd) -> io::Result<()> {
    // It may have ended.
    let _ = pidfd_send_signal(worker, Signal::KILL);
    let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
    match poll(&mut [PollFd::new(worker, PollFlags::IN)], Some(&patience))? {
        0 => Err(io::Error::other("the worker of an earlier keeper does not end")),
        _ => Ok(()),
    }
}

/// The name of what belongs to a peer.
pub(super) fn name(kind: char, numbers: &[u64]) -> String {
    let mut name = String::from(kind);
    numbers.iter().for_each(|number| name.push_str(&format!(".{number:x}")));
    name
}

/// The name of a file that is served.
pub(super) fn source_name(path: &Path) -> String {
    // FNV-1a, for the name to be the same in all versions.
    let hash =
        path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    name('s', &[hash])
}

/// What an earlier keeper has left, and what the manager itself gives.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// What VMMs connect to, and whether it is the manager's own.
    pub(super) listener: Option<(OwnedFd, bool)>,
    pub(super) worker: Option<OwnedFd>,
    pub(super) channel: Option<OwnedFd>,
    pub(super) sources: BTreeMap<String, OwnedFd>,
    pub(super) peers: BTreeMap<u64, LeftPeer>,
}

/// What was left of a peer.
#[derive(Debug, Default)]
pub(super) struct LeftPeer {
    pub(super) socket: Option<OwnedFd>,
    pub(super) who: u64,
    /// How many memories it had when it came, and has had by now.
    pub(super) had: u64,
    pub(super) so_far: u64,
    pub(super) pidfd: Option<OwnedFd>,
    /// By memory: how many there had been, and userfaultfd, page map, record.
    pub(super) memories: BTreeMap<u64, (u64, [Option<OwnedFd>; 3])>,
}

impl Left {
    /// Sorts what a manager gave.
    pub(super) fn sort(given: Vec<(OwnedFd, String)>) -> Self {
        let mut left = Self::default();
        for (fd, name) in given {
            let mut parts = name.split('.');
            let kind = parts.next().unwrap_or_default();
            let numbers: Option<Vec<u64>> =
                parts.map(|part| u64::from_str_radix(part, 16).ok()).collect();
            match (kind, numbers.as_deref()) {
                ("l", Some([])) => left.listener = Some((fd, false)),
                ("w", Some([])) => left.worker = Some(fd),
                ("c", Some([])) => left.channel = Some(fd),
                ("s", Some([_])) => drop(left.sources.insert(name, fd)),
                ("p", Some([peer, who, so_far])) => {
                    let left = left.peers.entry(*peer).or_default();
                    (left.socket, left.who, left.had) = (Some(fd), *who, *so_far);
                    left.so_far = left.so_far.max(*so_far);
                }
                ("i", Some([peer])) => left.peers.entry(*peer).or_default().pidfd = Some(fd),
                ("u" | "m" | "r", Some([peer, memory, so_far])) => {
                    let left = left.peers.entry(*peer).or_default();
                    left.so_far = left.so_far.max(*so_far);
                    let (_, fds) =
                        left.memories.entry(*memory).or_insert((*so_far, [None, None, None]));
                    let [uffd, map, record] = fds;
                    *match kind {
                        "u" => uffd,
                        "m" => map,
                        _ => record,
                    } = Some(fd);
                }
                _ if rustix::net::sockopt::socket_acceptconn(&fd) == Ok(true) => {
                    left.listener = Some((fd, true));
                }
                _ => {
                    error!("the service manager gave {name:?}, of which this program knows no use")
                }
            }
        }
        left
    }
}
