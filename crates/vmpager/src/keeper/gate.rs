//! What VMMs connect to, and which of them come in.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tracing::{error, warn};
use vmpager_sys::peer::{Peer, end};

use super::handover::Control;
use super::table::{Entry, Table};
use crate::daemon::{Access, DaemonError, listen_with, permit, unlisten};
use crate::refusal;

/// After a failure that may pass (no descriptor left).
const PAUSE: Duration = Duration::from_millis(100);
/// What part of all connections one process may have: a quarter.
const SHARE: usize = 4;
/// Descriptors that are none of a VM's: sources, sockets, the worker's.
const OWN_DESCRIPTORS: usize = 64;
/// Refusals that are told of, of each second's.
const TOLD: u32 = 10;

/// Where VMMs connect.
#[derive(Debug)]
pub(super) struct Gate {
    listener: Option<UnixListener>,
    /// It is a service manager's, which made it and will remove it.
    is_lent: bool,
    access: Access,
    max_connections: usize,
    max_descriptors: usize,
    /// When to accept again, after that failed.
    again_at: Option<Instant>,
    /// That there is no room has been told.
    full: bool,
    refusals: Refusals,
}

impl Gate {
    pub(super) fn new(access: Access, max_connections: usize) -> Self {
        let most = getrlimit(Resource::Nofile).current.and_then(|most| most.try_into().ok());
        let max_descriptors = most.unwrap_or(usize::MAX);
        let refusals = Refusals { since: Instant::now(), told: 0, untold: 0 };
        Self {
            listener: None,
            is_lent: false,
            access,
            max_connections,
            max_descriptors,
            again_at: None,
            full: false,
            refusals,
        }
    }

    pub(super) fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    /// Begins to listen. Whoever sees the socket may ask to take over at once.
    pub(super) fn open(&mut self, socket: &Path) -> Result<Control, DaemonError> {
        let (listener, control) = listen_with(socket, &self.access, || Control::open(socket))?;
        self.listener = Some(listener);
        Ok(control)
    }

    /// Listens to what a service manager lends.
    pub(super) fn borrow(&mut self, listener: UnixListener) {
        (self.listener, self.is_lent) = (Some(listener), true);
    }

    /// Listens no longer.
    pub(super) fn close(&self, socket: &Path) {
        if self.listener.is_some() && !self.is_lent {
            unlisten(socket);
        }
    }

    /// Goes on with what another keeper listened to.
    pub(super) fn adopt(&mut self, listener: UnixListener, socket: &Path) {
        self.listener = Some(listener);
        if let Err(problem) = permit(socket, &self.access) {
            warn!("{}: {problem}", socket.display());
        }
    }

    /// The socket, if somebody may come in.
    pub(super) fn waits(&mut self, table: &Table, now: Instant) -> Option<&UnixListener> {
        self.again_at = self.again_at.filter(|at| *at > now);
        let (peers, descriptors) = (table.peers(), table.descriptors() + OWN_DESCRIPTORS);
        let full = peers >= self.max_connections
            || descriptors > self.max_descriptors
            || !table.manager.has_room();
        if full && !self.full {
            warn!(
                peers,
                descriptors,
                "no room for more connections: they wait until one ends (ulimit -n, LimitNOFILE=)"
            );
        }
        self.full = full;
        self.listener.as_ref().filter(|_| !full && self.again_at.is_none())
    }

    /// When to look again whether somebody may come in.
    pub(super) fn again_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// Lets in who has come, if anybody has, and may.
    pub(super) fn accept(&mut self, table: &mut Table) -> Option<Entry> {
        let welcomed = match self.listener.as_ref()?.accept() {
            Ok((socket, _)) => self.judge(socket, table),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => Err(error),
        };
        welcomed.unwrap_or_else(|error| {
            warn!("accepting a connection: {error}; trying again shortly");
            self.again_at = Some(Instant::now() + PAUSE);
            None
        })
    }

    fn judge(&mut self, socket: UnixStream, table: &mut Table) -> io::Result<Option<Entry>> {
        let peer = Peer::of(&socket)?;
        let most = self.max_connections.div_ceil(SHARE);
        let admitted = match table.connections_of(peer.pid) >= most {
            true => Err(format!("it has {most} connections, as many as one process may have")),
            false => self.access.admit(&socket, &peer),
        };
        match admitted {
            Ok(()) => table.welcome(socket, peer).map(Some),
            Err(problem) => {
                self.refusals.tell(&peer, &problem);
                refusal::tell(&socket, &problem);
                // It may be gone.
                let _ = end(&socket);
                Ok(None)
            }
        }
    }
}

/// Tells of peers that were refused, as far as a log should.
#[derive(Debug)]
struct Refusals {
    since: Instant,
    told: u32,
    untold: u64,
}

impl Refusals {
    fn tell(&mut self, peer: &Peer, problem: &str) {
        if self.since.elapsed() >= Duration::from_secs(1) {
            (self.since, self.told) = (Instant::now(), 0);
        }
        if self.told == TOLD {
            self.untold += 1;
            return;
        }
        self.told += 1;
        let untold = std::mem::take(&mut self.untold);
        error!(peer_pid = peer.pid, peer_uid = peer.uid, untold, "refused: {problem}");
    }
}
