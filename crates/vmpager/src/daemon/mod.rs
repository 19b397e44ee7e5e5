//! The pager beside VMMs: listens on a unix socket where VMMs hand over their
//! memory, and serves every one of them from one source.
//!
//! One control thread (this module) accepts, parses handshakes and watches for
//! the end of peers; it never touches guest memory. Workers (`worker`) do
//! nothing else. A peer can therefore keep the control thread busy, but not
//! slow down anybody's faults.

mod access;
mod clean;
mod connection;
mod doors;
mod front;
mod kept;
mod listener;
mod log;
mod workers;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use rustix::event::{Timespec, epoll};
use tracing::{error, info, warn};
use vmpager_core::PageSource;
use vmpager_sys::peer::Peer;

pub use self::access::Access;
use self::connection::{Arrival, Connection, Refused};
use self::front::Front;
pub use self::kept::KeeperLink;
pub use self::listener::listen;
pub(crate) use self::listener::{beside, listen_with, permit, unlisten};
use self::workers::Workers;
use crate::clean::CleanPages;
use crate::kill;
use crate::metrics::{self, Board};
use crate::reads::MemoryId;
use crate::served::{ServeOptions, Served};
use crate::stats::SessionSummary;
use crate::worker::{Command, Event, WorkerError, WorkerHandle, unring, watch};

/// What a daemon serves, and how.
#[derive(Debug)]
pub struct DaemonConfig {
    /// Where VMMs connect.
    pub socket: PathBuf,
    /// Which of them may.
    pub access: Access,
    /// Where page contents come from.
    pub source: Arc<dyn PageSource>,
    /// How memory is served.
    pub options: ServeOptions,
    /// Threads that serve.
    pub workers: usize,
    /// Accept VMs whose regions leave part of the source uncovered.
    pub partial: bool,
    /// Stop when the first session has ended.
    pub once: bool,
    /// How long a peer may take to send its handshake.
    pub handshake_timeout: Duration,
    /// How long a stop waits for what is in flight.
    pub stop_timeout: Duration,
    /// The most peers connected at a time.
    pub max_connections: usize,
    /// The most VMs served at a time; others are refused.
    pub max_sessions: usize,
    /// The most memory one VM may hand over, in bytes.
    pub max_memory: u64,
    /// The most faults of one VM served in a row while others have some, too.
    pub faults_per_turn: usize,
    /// The directory where each VM gets a door for other processes to take part
    /// in its memory ([`Attached`](crate::Attached)): `PID.sock`, by its VMM's
    /// process id.
    pub attach: Option<PathBuf>,
    /// Pages that VMs share as long as they do not write to them, for those who ask.
    pub clean: Option<Arc<CleanPages>>,
}

impl DaemonConfig {
    /// The defaults for a socket and a source.
    pub fn new(socket: impl Into<PathBuf>, source: Arc<dyn PageSource>) -> Self {
        Self {
            socket: socket.into(),
            access: Access::default(),
            source,
            options: ServeOptions::default(),
            workers: std::thread::available_parallelism().map_or(1, |n| n.get().min(4)),
            partial: false,
            once: false,
            handshake_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(5),
            max_connections: 4096,
            max_sessions: usize::MAX,
            max_memory: u64::MAX,
            faults_per_turn: 16,
            attach: None,
            clean: None,
        }
    }
}

/// Why a daemon could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The socket cannot be had.
    #[error("socket {path}: {problem}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A worker could not start.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A system call that should not fail did.
    #[error("the daemon's event loop: {0}")]
    Io(#[from] io::Error),
}

/// What happens in a daemon, for whoever watches it.
#[derive(Debug)]
pub enum DaemonEvent<'a> {
    /// A VM handed over its memory.
    SessionStarted {
        /// The session's number.
        session: u64,
        /// The peer's process id.
        peer_pid: i32,
        /// Bytes of memory handed over.
        memory_bytes: u64,
    },
    /// A session has ended.
    SessionEnded(&'a SessionSummary),
}

/// A daemon that listens.
#[derive(Debug)]
pub struct Daemon {
    config: DaemonConfig,
    front: Front,
    epoll: OwnedFd,
    bell: Arc<OwnedFd>,
    events: Receiver<Event>,
    workers: Vec<WorkerHandle>,
    connections: HashMap<u64, Connection>,
    /// Which connection and worker a memory belongs to.
    memories: HashMap<MemoryId, (u64, usize)>,
    next_connection: u64,
    /// When to look again at memories whose peer may be gone.
    probe_at: Option<Instant>,
    /// When to accept again, after that failed for want of descriptors.
    accept_at: Option<Instant>,
    /// What is shown of the sessions, and by whom, if it is.
    board: Arc<Board>,
    metrics: Option<metrics::Server>,
    stop: (UnixStream, UnixStream),
    ended_sessions: u64,
    shutting_down: bool,
}

/// epoll tokens of what is no connection. A connection has two: `2 * id` for
/// its socket, `2 * id + 1` for its peer's pidfd; ids start at 8.
const FRONT: u64 = 0;
const WORKERS: u64 = 1;
const STOP: u64 = 2;
const FIRST_CONNECTION: u64 = 8;

/// How often memory is looked at whose peer's socket and pidfd say it is gone.
const PROBE: Duration = Duration::from_secs(1);
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

impl Daemon {
    /// Binds the socket and starts the workers. VMMs may connect from now on.
    ///
    /// Nothing outlives this process: [`kept`](Self::kept) is for daemons that may be
    /// killed.
    ///
    /// # Errors
    ///
    /// If the socket's path is taken or cannot be made, or the source or the
    /// system refuses what a worker needs.
    pub fn bind(config: DaemonConfig) -> Result<Self, DaemonError> {
        let workers = Workers::start(&config)?;
        let front = Front::Listener(listen_with(&config.socket, &config.access, || Ok(()))?.0);
        Self::new(config, front, workers)
    }

    fn new(config: DaemonConfig, front: Front, workers: Workers) -> Result<Self, DaemonError> {
        let Workers { bell, events, workers } = workers;
        let stop = UnixStream::pair()?;
        stop.0.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        if let Some(fd) = front.events() {
            watch(&epoll, fd, FRONT)?;
        }
        watch(&epoll, bell.as_fd(), WORKERS)?;
        watch(&epoll, stop.0.as_fd(), STOP)?;
        let board = Arc::new(Board::new(metrics::Keeping {
            source: config.source.name().to_string(),
            fills: config.options.background_fill,
            stats: workers.iter().map(|worker| worker.stats.clone()).collect(),
        }));
        Ok(Self {
            config,
            front,
            epoll,
            bell,
            events,
            workers,
            connections: HashMap::new(),
            memories: HashMap::new(),
            next_connection: FIRST_CONNECTION,
            probe_at: None,
            accept_at: None,
            board,
            metrics: None,
            stop,
            ended_sessions: 0,
            shutting_down: false,
        })
    }

    /// A socket on which any byte makes [`run`](Self::run) stop: write to it
    /// from a signal handler or another thread.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn stopper(&self) -> io::Result<UnixStream> {
        self.stop.1.try_clone()
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    ///
    /// If the event loop itself fails; the sessions' troubles are logged and
    /// told to `watcher`.
    pub fn run(mut self, watcher: &mut dyn FnMut(DaemonEvent<'_>)) -> Result<(), DaemonError> {
        let mut ready = Vec::with_capacity(64);
        loop {
            ready.clear();
            let timeout = self.timeout();
            let timeout = timeout.map(|t| Timespec::try_from(t).unwrap_or_default());
            let space = rustix::buffer::spare_capacity(&mut ready);
            match epoll::wait(&self.epoll, space, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let mut stop = false;
            for event in &ready {
                match event.data.u64() {
                    FRONT => stop |= self.hear_front(watcher),
                    WORKERS => stop |= self.hear_workers(watcher),
                    STOP => stop = true,
                    token if token % 2 == 0 => self.hear_peer(token / 2, watcher),
                    token => self.peer_exited(token / 2),
                }
            }
            self.keep_time();
            stop |= matches!(self.front, Front::Alone) && self.connections.is_empty();
            if stop {
                self.shut_down(watcher);
                return Ok(());
            }
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let deadlines = self.connections.values().filter_map(Connection::deadline);
        let next = deadlines.chain(self.probe_at).chain(self.accept_at).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn keep_time(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, c)| c.deadline().is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            let problem = self.connections.get_mut(&id).map(Connection::late);
            self.refuse(id, &problem.unwrap_or_default().into());
        }
        if self.probe_at.is_some_and(|at| at <= now) {
            self.probe_at = None;
            let gone = self.connections.iter().filter(|(_, c)| c.peer_seems_gone());
            for id in gone.map(|(id, _)| *id).collect::<Vec<_>>() {
                self.peer_exited(id);
            }
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
            if let Some(front) = self.front.events()
                && let Err(error) = watch(&self.epoll, front, FRONT)
            {
                error!("watching the socket: {error}");
            }
        }
    }

    fn accept(&mut self) {
        let Front::Listener(listener) = &self.front else { return };
        while self.connections.len() < self.config.max_connections {
            match listener.accept() {
                Ok((socket, _)) => {
                    if let Err(error) = self.meet(socket) {
                        warn!("a peer was turned away: {error}");
                    }
                    return;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    error!("accepting a connection: {error}; trying again shortly");
                    break;
                }
            }
        }
        // No room: leave peers in the backlog instead of being told of them
        // over and over.
        let _ = epoll::delete(&self.epoll, listener);
        self.accept_at = Some(Instant::now() + ACCEPT_PAUSE);
    }

    /// A peer has come, which another process knew `known` messages of.
    fn welcome(&mut self, id: u64, socket: UnixStream, peer: Peer, known: u64) -> io::Result<()> {
        let connection = Connection::new(socket, peer, known, self.config.handshake_timeout)?;
        if self.front.has_told_all() {
            watch_peer(&self.epoll, id, &connection)?;
        }
        self.connections.insert(id, connection);
        Ok(())
    }

    /// Something arrived from a peer, or it hung up.
    fn hear_peer(&mut self, id: u64, watcher: &mut dyn FnMut(DaemonEvent<'_>)) {
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            match connection.receive() {
                Ok(Arrival::Nothing) => return,
                Ok(Arrival::Part | Arrival::Known(_)) => {
                    let clean = self.config.clean.as_ref();
                    let answered = connection.asks().map(|peer| clean::answer(peer, clean));
                    if let Some(Err(problem)) = answered {
                        self.refuse(id, &problem.into());
                        return;
                    }
                }
                Ok(Arrival::HangUp) => {
                    self.peer_hung_up(id);
                    return;
                }
                Ok(Arrival::Memory(memory)) => {
                    if let Err(refused) = self.admit(id, memory, watcher) {
                        self.refuse(id, &refused);
                        return;
                    }
                }
                Err(problem) => {
                    self.refuse(id, &problem.to_string().into());
                    return;
                }
            }
        }
    }

    /// Takes on the memory of a handshake.
    fn admit(
        &mut self,
        id: u64,
        offer: connection::Offer,
        watcher: &mut dyn FnMut(DaemonEvent<'_>),
    ) -> Result<(), Refused> {
        let source = &*self.config.source;
        let worker = self.least_busy_worker(id);
        let sessions = self.connections.values().filter(|it| !it.memories().is_empty()).count();
        let limits = connection::Admission {
            full: sessions >= self.config.max_sessions,
            sessions,
            max_memory: self.config.max_memory,
        };
        let connection::Offer { handshake, uffd, memfds } = offer;
        let door = self.next_door(id);
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        kill::point("offered");
        let uffd = connection.admit(&handshake.slots, uffd, &limits)?;
        let (uffd, slots, state) =
            connection.check(&handshake.slots, uffd, source, self.config.partial)?;
        let memory = connection.next_memory(id);
        let memory_bytes = slots.bytes();
        let served = Served::new(memory, uffd, slots, state, source, &self.config.options);
        let served = connection.adapt(served, &self.config.options);
        let mut served = match clean::adapt(served, &handshake, self.config.clean.as_ref()) {
            Ok(served) => served,
            Err((served, problem)) => {
                connection.hold(Some(served));
                return Err(problem.into());
            }
        };
        if let Err(error) = self.front.keep(session_of(id), &served) {
            connection.hold(Some(Box::new(served)));
            return Err(format!("having it kept: {error}").into());
        }
        kill::point("kept");
        let to = self.workers[worker].teller();
        let opening =
            door.map(|at| doors::prepare(at, &mut served, to, &handshake, memfds, source.len()));
        self.memories.insert(memory, (id, worker));
        connection.add_new_memory(memory, memory_bytes);
        let session = session_of(id);
        let peer_pid = connection.pid();
        let by = (worker, self.workers[worker].teller());
        self.board.serving(memory, (session, peer_pid), false, by);
        info!(session, peer_pid, memory_bytes, "serving");
        watcher(DaemonEvent::SessionStarted { session, peer_pid, memory_bytes });
        if !self.workers[worker].tell(Command::Serve(Box::new(served))) {
            return Err("the worker thread has ended".to_owned().into());
        }
        // The worker hears of the memory before it hears of those who come.
        if let Some(door) = opening.and_then(doors::Opening::open) {
            connection.add_door(memory, door);
        }
        Ok(())
    }

    /// All memories of a connection go to one worker.
    fn least_busy_worker(&self, id: u64) -> usize {
        let mut load = vec![0usize; self.workers.len()];
        for (connection, worker) in self.memories.values() {
            if *connection == id {
                return *worker;
            }
            load[*worker] += 1;
        }
        (0..load.len()).min_by_key(|&i| load[i]).unwrap_or(0)
    }

    fn hear_workers(&mut self, watcher: &mut dyn FnMut(DaemonEvent<'_>)) -> bool {
        unring(&self.bell);
        let mut stop = false;
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::Ended { memory, reason, numbers, held } => {
                    let Some((id, _)) = self.memories.remove(&memory) else { continue };
                    let Some(connection) = self.connections.get_mut(&id) else { continue };
                    kill::point("ended");
                    // First, for a successor hears of the door no more after that.
                    connection.close_door(memory);
                    if held.is_none() {
                        self.front.let_go(session_of(id), memory);
                    }
                    connection.hold(held);
                    self.board.ended(memory, &numbers);
                    let Some(reason) = connection.memory_ended(memory, reason, &numbers) else {
                        continue;
                    };
                    let summary = connection.summary(session_of(id), reason);
                    self.ended_sessions += 1;
                    summary.reason.iter().for_each(|reason| self.board.session_ended(reason));
                    log::session_ended(&summary);
                    watcher(DaemonEvent::SessionEnded(&summary));
                    stop |= self.config.once;
                    self.forget_if_done(id);
                }
                Event::Complete(memory) => {
                    let session =
                        self.memories.get(&memory).map(|(id, _)| id - FIRST_CONNECTION + 1);
                    info!(session, "all memory is in place; it stays shared");
                }
                Event::StillAlive(memory) => {
                    if let Some((id, _)) = self.memories.get(&memory)
                        && let Some(connection) = self.connections.get_mut(id)
                    {
                        connection.set_seems_gone();
                        self.probe_at.get_or_insert(Instant::now() + PROBE);
                    }
                }
                Event::Stopped if self.shutting_down => {}
                Event::Stopped => error!("a worker thread has ended"),
            }
        }
        stop
    }

    /// Firecracker up to 1.11 hangs up right after the handshake; later ones
    /// when they exit.
    fn peer_hung_up(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let Some(problem) = connection.hang_up() {
            warn!(peer_pid = connection.pid(), "a peer hung up: {problem}");
        }
        if connection.pidfd().is_none() {
            self.peer_exited(id);
        }
        self.forget_if_done(id);
    }

    fn peer_exited(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let Some(pidfd) = connection.take_pidfd() {
            let _ = epoll::delete(&self.epoll, &pidfd);
        }
        connection.let_go_of_refused();
        for memory in connection.memories() {
            if let Some((_, worker)) = self.memories.get(memory) {
                self.workers[*worker].tell(Command::PeerExited(*memory));
            }
        }
        self.forget_if_done(id);
    }

    /// A peer did something that cannot be served. Its descriptors stay open
    /// until it exits: closing the last one would let its VM read zeroes.
    fn refuse(&mut self, id: u64, refused: &Refused) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        error!(peer_pid = connection.pid(), "refused: {}", refused.problem);
        self.board.refused(refused.why);
        connection.say_refused(&refused.problem);
        connection.refuse();
        self.forget_if_done(id);
    }

    fn forget_if_done(&mut self, id: u64) {
        if self.connections.get(&id).is_some_and(Connection::is_done) {
            self.connections.remove(&id);
            self.front.forget(session_of(id));
        }
    }

    fn shut_down(mut self, watcher: &mut dyn FnMut(DaemonEvent<'_>)) {
        self.shutting_down = true;
        let until = Instant::now() + self.config.stop_timeout;
        for (index, worker) in self.workers.iter().enumerate() {
            // Whoever keeps no copy of the userfaultfd would read zeroes.
            let poison = self.memories.iter().filter(|(_, (id, worker))| {
                *worker == index
                    && self.connections.get(id).is_some_and(|c| !c.peer_holds_userfaultfd())
            });
            let poison = poison.map(|(memory, _)| *memory).collect();
            worker.tell(Command::Stop { until, poison });
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take()
                && thread.join().is_err()
            {
                error!("a worker thread panicked");
            }
        }
        self.hear_workers(watcher);
        if let Front::Listener(_) = &self.front {
            unlisten(&self.config.socket);
        }
        info!(sessions = self.ended_sessions, "stopped");
    }
}

/// The number of a connection's session, from 1; a keeper's number of its peer.
fn session_of(connection: u64) -> u64 {
    connection - FIRST_CONNECTION + 1
}

/// Looks at what a peer says, and at its end.
fn watch_peer(epoll: &OwnedFd, id: u64, connection: &Connection) -> io::Result<()> {
    if let Some(socket) = connection.socket() {
        // What was looked at stays in there: only what is new is worth telling.
        let (data, flags) = (epoll::EventData::new_u64(2 * id), epoll::EventFlags::IN);
        epoll::add(epoll, socket, data, flags | epoll::EventFlags::ET)?;
    }
    match connection.pidfd() {
        Some(pidfd) => watch(epoll, pidfd, 2 * id + 1),
        None => Ok(()),
    }
}
