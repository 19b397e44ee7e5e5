//! A daemon with a keeper: peers come by way of it, and what another process was
//! serving is taken over.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::epoll;
use tracing::{error, info, warn};
use vmpager_sys::peer::Peer;
use vmpager_sys::uffd::Userfaultfd;

use super::clean;
use super::doors::Opening;
use super::front::Front;
use super::{
    Daemon, DaemonConfig, DaemonError, DaemonEvent, FIRST_CONNECTION, Workers, session_of,
    watch_peer,
};
use crate::attach::LeftDoor;
use crate::keeper::{Kind, Message, layout, receive, send};
use crate::kill;
use crate::metrics;
use crate::reads::MemoryId;
use crate::served::{Served, State};
use crate::worker::Command;

/// A keeper, as the process it has started sees it.
#[derive(Debug)]
pub struct KeeperLink {
    channel: OwnedFd,
    sources: Vec<OwnedFd>,
}

impl KeeperLink {
    /// Meets the keeper that started this process, at the other end of `channel`.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn meet(channel: OwnedFd) -> io::Result<Self> {
        let flags = rustix::event::PollFlags::IN;
        rustix::event::poll(&mut [rustix::event::PollFd::new(&channel, flags)], None)?;
        match receive(&channel)? {
            Some(Message { kind: Kind::Sources, fds, .. }) => Ok(Self { channel, sources: fds }),
            other => Err(io::Error::other(format!("{other:?} came, not what is to be served"))),
        }
    }

    /// What the keeper holds of what is served, in the order it was given.
    pub fn sources(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.sources)
    }

    /// The files of the clean pages, which the keeper holds after everything else.
    ///
    /// # Errors
    ///
    /// If it holds none.
    pub fn clean_pages(&mut self) -> io::Result<[OwnedFd; 2]> {
        let (map, pages) = (self.sources.pop(), self.sources.pop());
        let both = pages.zip(map).ok_or_else(|| io::Error::other("the keeper holds none"))?;
        Ok(both.into())
    }
}

impl Daemon {
    /// Starts the workers of a daemon that may be killed at any time: a keeper
    /// accepts its peers, and its successor goes on where it was.
    /// [`DaemonConfig::socket`] and [`DaemonConfig::max_connections`] are the
    /// keeper's.
    ///
    /// # Errors
    ///
    /// If the source or the system refuses what a worker needs, or the keeper is
    /// gone.
    pub fn kept(config: DaemonConfig, keeper: KeeperLink) -> Result<Self, DaemonError> {
        let workers = Workers::start(&config)?;
        // Until all there is has been taken over.
        for worker in &workers.workers {
            worker.tell(Command::Hold);
        }
        let ready = [layout(), config.source.fingerprint(), 0];
        send(&keeper.channel, Kind::Ready, ready, &[])?;
        Self::new(config, Front::Keeper { channel: keeper.channel, told_all: false }, workers)
    }

    /// Somebody comes, or the keeper has something to say. Whether it said to stop.
    pub(super) fn hear_front(&mut self, watcher: &mut dyn FnMut(DaemonEvent<'_>)) -> bool {
        loop {
            let Front::Keeper { channel, .. } = &self.front else {
                self.accept();
                return false;
            };
            let done = match receive(channel) {
                Ok(Some(message)) => self.obey(message, watcher),
                Ok(None) => {
                    self.keeper_is_gone();
                    return self.connections.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => Err(error),
            };
            match done {
                Ok(stop) if stop => return true,
                Ok(_) => {}
                Err(error) => error!("from the keeper: {error}"),
            }
        }
    }

    /// Does what the keeper says. Whether that is to stop.
    fn obey(
        &mut self,
        message: Message,
        watcher: &mut dyn FnMut(DaemonEvent<'_>),
    ) -> io::Result<bool> {
        let [peer, number, who] = message.args;
        let id = peer.saturating_add(FIRST_CONNECTION - 1);
        match message.kind {
            Kind::Peer => {
                let mut fds = message.fds.into_iter();
                let Some(socket) = fds.next() else {
                    self.front.forget(peer);
                    return Err(io::Error::other(
                        "a VM is refused: this process has no descriptor left (ulimit -n, \
                         LimitNOFILE=)",
                    ));
                };
                let [pid, uid] = [who, who >> 32].map(|half| half & 0xffff_ffff);
                let pid = i32::try_from(pid).unwrap_or(0);
                let uid = u32::try_from(uid).unwrap_or(u32::MAX);
                let who = Peer { pid, uid, pidfd: fds.next() };
                self.welcome(id, UnixStream::from(socket), who, number)?;
                kill::point("welcomed");
            }
            Kind::Memory => self.take_over(id, MemoryId(number), message.three()?, watcher),
            Kind::Door | Kind::Guest => self.find_door(id, message)?,
            Kind::Known => {
                self.go_on();
                if let Front::Keeper { told_all, .. } = &mut self.front {
                    *told_all = true;
                }
                for (id, connection) in &self.connections {
                    watch_peer(&self.epoll, *id, connection)?;
                }
                info!(sessions = self.memories.len(), "ready");
            }
            Kind::Metrics => {
                self.board.kept(peer, number);
                let listener = message.fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
                self.metrics = Some(metrics::Server::start(listener, self.board.clone())?);
            }
            Kind::Stop => return Ok(true),
            kind => return Err(io::Error::other(format!("{kind:?} is not for a worker"))),
        }
        Ok(false)
    }

    /// Another process had opened a door, or somebody had come to it.
    fn find_door(&mut self, id: u64, message: Message) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let (kind, [_, memory, number]) = (message.kind, message.args);
        let memory = MemoryId(memory);
        if kind == Kind::Door {
            connection.add_left_door(memory, LeftDoor::new(number, message.three()?));
        } else if let Some(socket) = message.fds.into_iter().next() {
            connection.add_left_guest(memory, number, socket);
        }
        Ok(())
    }

    /// Goes on serving what another process served.
    fn take_over(
        &mut self,
        id: u64,
        memory: MemoryId,
        fds: [OwnedFd; 3],
        watcher: &mut dyn FnMut(DaemonEvent<'_>),
    ) {
        let worker = self.least_busy_worker(id);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let source = &*self.config.source;
        let [uffd, map, record] = fds;
        let served: Result<Served, String> = (|| {
            let uffd = Userfaultfd::adopt(uffd).map_err(|error| error.to_string())?;
            let state = State::open(map, record, source).map_err(|error| error.to_string())?;
            let clean = clean::of_memory(state.record.clean_pages(), self.config.clean.as_ref())?;
            let served = Served::take_over(memory, uffd, state, source, &self.config.options)
                .map_err(|error| error.to_string())?;
            Ok(clean
                .into_iter()
                .fold(served, |served, (clean, id)| served.of_clean_pages(clean, id)))
        })();
        let session = session_of(id);
        let peer_pid = connection.pid();
        let served = match served {
            Ok(served) => served,
            // The keeper has its userfaultfd: whoever waits goes on waiting.
            Err(problem) => {
                error!(session, peer_pid, "this memory cannot be taken over: {problem}");
                return;
            }
        };
        let mut served = connection.adapt(served, &self.config.options);
        if served.has_failed() {
            connection.hold(Some(Box::new(served)));
            return;
        }
        let opening = self.reopen(id, &mut served, worker);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let memory_bytes = served.bytes();
        connection.add_memory(memory, memory_bytes);
        self.memories.insert(memory, (id, worker));
        let takeovers = served.takeovers();
        let by = (worker, self.workers[worker].teller());
        self.board.serving(memory, (session, peer_pid), true, by);
        info!(session, peer_pid, memory_bytes, takeovers, "taken over");
        watcher(DaemonEvent::SessionStarted { session, peer_pid, memory_bytes });
        if !self.workers[worker].tell(Command::Serve(Box::new(served))) {
            error!(session, peer_pid, "the worker thread has ended");
            return;
        }
        // The worker hears of the memory before it hears of those who had come.
        if let Some(door) = opening.and_then(Opening::open)
            && let Some(connection) = self.connections.get_mut(&id)
        {
            connection.add_door(memory, door);
        }
    }

    /// Has served what was taken over.
    fn go_on(&self) {
        for worker in &self.workers {
            worker.tell(Command::GoOn);
        }
    }

    fn keeper_is_gone(&mut self) {
        self.go_on();
        if let Some(channel) = self.front.events() {
            let _ = epoll::delete(&self.epoll, channel);
        }
        self.front = Front::Alone;
        warn!(
            sessions = self.memories.len(),
            "the keeper is gone: no VM can connect any more, and nobody would take over from this \
             process"
        );
    }
}
