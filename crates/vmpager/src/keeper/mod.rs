//! The keeper: a process that holds what a daemon must not lose, and does next to
//! nothing else.
//!
//! The daemon's work is done by another process, the *worker*. Whatever it needs to
//! serve a VM, the keeper has a descriptor of, too: the socket the VMM connected by,
//! its pidfd, each memory's userfaultfd, page map and record. So when the worker is
//! killed, or crashes, no userfaultfd is closed, nobody reads zeroes, and a new
//! worker goes on; faults wait meanwhile.
//!
//! ```text
//!                 accept                    messages
//!   VMM --------> keeper <-------------------------------> worker --> VMM's memory
//!                   holds descriptors                        serves
//!                   starts workers                           parses what VMMs send
//! ```
//!
//! The keeper parses nothing a VMM sent. It does not even receive it: workers *look*
//! at what is in the sockets and leave it there, handshake and userfaultfd alike, so
//! that the next worker finds it, too ([`look_with_fds`](vmpager_sys::peer::look_with_fds)).
//! A worker tells the keeper to keep a memory before it reads or installs anything
//! there. Killed before that, it leaves a handshake that nobody has seen yet; killed
//! after, a memory to be taken over.
//!
//! If the keeper itself is killed, its worker goes on serving the VMs it has and
//! takes no new ones; nobody is left to take over from it. Unless a service manager
//! holds copies of what the keeper holds (`manager`): then the next keeper has them.

mod config;
mod gate;
mod handover;
mod manager;
mod message;
mod process;
mod shown;
mod table;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{error, info, warn};

pub use self::config::{KeeperConfig, KeeperEnd, KeeperError};
use self::gate::Gate;
use self::handover::{Control, Predecessor, give};
use self::manager::{Left, Manager};
use self::message::look;
pub(crate) use self::message::{Guest, Kind, Message, receive, send};
use self::process::{Tell, Worker};
use self::shown::Shown;
use self::table::Table;

/// The layouts that a worker reads and writes: of page maps, and of records.
pub(crate) fn layout() -> u64 {
    vmpager_core::page_map::VERSION << 32 | crate::served::RECORD_VERSION
}

/// A keeper.
#[derive(Debug)]
pub struct Keeper {
    config: KeeperConfig,
    gate: Gate,
    table: Table,
    worker: Option<Worker>,
    /// When to start the next worker, and the pause before the one after it.
    start_at: Instant,
    pause: Duration,
    stop: (UnixStream, UnixStream),
    leave: (UnixStream, UnixStream),
    stopping: bool,
    control: Option<Control>,
    /// The layout and the fingerprint of what the worker serves.
    served: Option<[u64; 2]>,
    shown: Shown,
}

impl Keeper {
    /// A keeper that has yet to run.
    ///
    /// # Errors
    ///
    /// If this process has no descriptor left.
    pub fn new(config: KeeperConfig) -> io::Result<Self> {
        let (stop, leave) = (UnixStream::pair()?, UnixStream::pair()?);
        for socket in [&stop.0, &leave.0] {
            socket.set_nonblocking(true)?;
        }
        Ok(Self {
            pause: Duration::ZERO,
            gate: Gate::new(config.access.clone(), config.max_connections),
            shown: Shown::new(config.metrics.clone()),
            config,
            table: Table::new(Manager::of_this_process()),
            worker: None,
            start_at: Instant::now(),
            stop,
            leave,
            stopping: false,
            control: None,
            served: None,
        })
    }

    /// A socket on which any byte makes [`run`](Self::run) stop: the worker is told
    /// to end, and is waited for.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn stopper(&self) -> io::Result<UnixStream> {
        self.stop.1.try_clone()
    }

    /// A socket on which any byte makes [`run`](Self::run) leave all to the service
    /// manager, which gives it to the next keeper: a restart, that VMs wait for.
    /// Without a service manager nothing happens.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn leaver(&self) -> io::Result<UnixStream> {
        self.leave.1.try_clone()
    }

    /// Keeps, and starts workers, until one ends by itself, or the first one cannot
    /// start. Returns how that ended.
    ///
    /// # Errors
    ///
    /// If the socket cannot be had, or the keeper's own system calls fail.
    pub fn run(mut self) -> Result<KeeperEnd, KeeperError> {
        self.inherit()?;
        self.shown.open(self.config.replace)?;
        if self.config.replace {
            self.replace()?;
        }
        loop {
            if self.worker.is_none() && self.start_at <= Instant::now() {
                self.start_worker()?;
            }
            let seen = self.wait()?;
            if seen.leave && self.leave()? {
                return Ok(KeeperEnd::Left);
            }
            if seen.stop && !std::mem::replace(&mut self.stopping, true) {
                let _ = io::Read::read(&mut &self.stop.0, &mut [0; 8]);
                self.table.manager.stopping();
                self.start_at = Instant::now();
                if let Some(worker) = &mut self.worker {
                    worker.tell.push_back(Tell::Stop);
                }
            }
            if seen.peer {
                self.accept();
            }
            if seen.heard {
                self.hear_worker()?;
            }
            if let Some(worker) = &mut self.worker {
                worker.tell(&self.table, &self.shown);
            }
            if seen.ended
                && let Some(status) = self.worker_ended()?
            {
                self.end();
                return Ok(KeeperEnd::Worker(status));
            }
            if seen.asked && self.hand_over()? {
                return Ok(KeeperEnd::Replaced);
            }
        }
    }

    fn start_worker(&mut self) -> Result<(), KeeperError> {
        let sources: Vec<_> = self.config.sources.iter().map(|(_, fd)| fd.as_fd()).collect();
        let worker = Worker::start(&mut self.config.worker, &sources)?;
        let manager = &mut self.table.manager;
        for (name, fd) in [("w", &worker.pidfd), ("c", &worker.channel)] {
            manager.remove(name);
            manager.store(name, fd);
        }
        self.worker = Some(worker);
        Ok(())
    }

    /// Kills the worker, and hears what it has said: it has left what it was doing for
    /// the next one to find.
    fn end_worker(&mut self) -> Result<(), KeeperError> {
        if let Some(worker) = &mut self.worker {
            let _ = worker.child.kill();
            worker.child.wait()?;
        }
        self.hear_worker()?;
        self.worker = None;
        Ok(())
    }

    /// Goes on with what an earlier keeper has left to the service manager.
    fn inherit(&mut self) -> Result<(), KeeperError> {
        let left = Left::sort(std::mem::take(&mut self.config.inherited));
        self.table.manager.has_all = true;
        for (peer, left) in left.peers {
            self.table.restore(peer, left)?;
        }
        self.table.manager.has_all = false;
        // Two must not serve the same memory.
        left.worker.map_or(Ok(()), |worker| manager::end(&worker))?;
        if let Some(channel) = &left.channel {
            hear(channel, &mut self.table)?;
        }
        let mut sources = left.sources;
        for (path, fd) in &mut self.config.sources {
            let name = manager::source_name(path);
            // The VMs there are were served from the file that had this name then.
            let held = sources.remove(&name).filter(|_| self.table.peers() > 0);
            let manager = &mut self.table.manager;
            manager.remove(&name);
            *fd = held.unwrap_or(fd.try_clone()?);
            manager.store(&name, &*fd);
        }
        sources.keys().for_each(|name| self.table.manager.remove(name));
        let Some((listener, is_lent)) = left.listener else { return Ok(()) };
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        match is_lent {
            true => self.gate.borrow(listener),
            false => self.gate.adopt(listener, &self.config.socket),
        }
        info!(peers = self.table.peers(), "the service manager has given a socket");
        Ok(())
    }

    /// Leaves all to the service manager. Whether there is one.
    fn leave(&mut self) -> Result<bool, KeeperError> {
        let _ = io::Read::read(&mut &self.leave.0, &mut [0; 8]);
        if !self.table.manager.is_there() {
            warn!("told to leave all to a service manager, and there is none; going on");
            return Ok(false);
        }
        self.table.manager.stopping();
        self.end_worker()?;
        self.control.iter().for_each(Control::close);
        self.shown.close();
        info!(peers = self.table.peers(), "left to the service manager");
        Ok(true)
    }

    /// Takes over from another keeper: a worker is ready before that lets go.
    fn replace(&mut self) -> Result<(), KeeperError> {
        let socket = self.config.socket.clone();
        let problem = |problem: String| KeeperError::Replace { socket: socket.clone(), problem };
        let mut predecessor = Predecessor::ask(&socket).map_err(|error| {
            problem(format!("{error}; is a daemon of this user running there?"))
        })?;
        self.take_clean_pages(std::mem::take(&mut predecessor.clean)).map_err(problem)?;
        self.start_worker()?;
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let ready = handover::await_message(&worker.channel);
        let taken = match ready {
            Ok(Message { kind: Kind::Ready, args: [layout, fingerprint, _], .. }) => {
                judge(predecessor.served, [layout, fingerprint]).map_err(problem).and_then(|()| {
                    let listener = predecessor.take(&mut self.table);
                    // Whoever comes next shall find this keeper.
                    let taken = listener.and_then(|(listener, metrics)| {
                        self.shown.take(metrics);
                        let control = Control::open(&socket)?;
                        predecessor.confirm().map(|()| (listener, control))
                    });
                    taken.map_err(|error| problem(format!("taking over: {error}")))
                })
            }
            other => Err(problem(format!("the worker process is not ready: {other:?}"))),
        };
        let (listener, control) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                let _ = worker.child.kill();
                let _ = worker.child.wait();
                return Err(error);
            }
        };
        worker.is_ready(&self.table);
        self.served = Some(predecessor.served);
        self.gate.adopt(UnixListener::from(listener), &socket);
        self.control = Some(control);
        worker.tell(&self.table, &self.shown);
        info!(peers = self.table.peers(), "replaced the daemon");
        Ok(())
    }

    /// Goes on with another keeper's clean pages.
    fn take_clean_pages(&mut self, clean: Vec<OwnedFd>) -> Result<(), String> {
        if !clean.is_empty() && self.config.clean_pages().count() != clean.len() {
            return Err("its VMs share clean pages; nothing was taken. Give --share-clean".into());
        }
        for ((path, fd), theirs) in self.config.clean_pages_mut().zip(clean) {
            *fd = theirs;
            let (name, manager) = (manager::source_name(path), &mut self.table.manager);
            manager.remove(&name);
            manager.store(&name, &*fd);
        }
        Ok(())
    }

    /// Another keeper asks for all there is. Whether it has that now.
    fn hand_over(&mut self) -> Result<bool, KeeperError> {
        let (Some(control), Some(served)) = (&self.control, self.served) else { return Ok(false) };
        let clean: Vec<_> = self.config.clean_pages().map(|(_, fd)| fd.as_fd()).collect();
        let asking = match control.answer(served, &clean) {
            Ok(asking) => asking,
            Err(error) => {
                warn!("asked to hand over: {error}; going on");
                return Ok(false);
            }
        };
        self.end_worker()?;
        let Some(listener) = self.gate.listener() else { return Ok(false) };
        match give(&self.table, listener, self.shown.socket(), &asking) {
            Ok(()) => {
                info!("another daemon has taken over");
                Ok(true)
            }
            Err(error) => {
                error!("handing over: {error}; going on");
                self.start_at = Instant::now();
                self.control = Some(Control::open(&self.config.socket)?);
                Ok(false)
            }
        }
    }

    /// Waits until something happens, or is due.
    fn wait(&mut self) -> io::Result<Seen> {
        let now = Instant::now();
        let (again_at, ping_at) = (self.gate.again_at(), self.table.manager.ping(now));
        let listener = self.gate.waits(&self.table, now).filter(|_| !self.stopping);
        let mut fds = vec![
            PollFd::new(&self.stop.0, PollFlags::IN),
            PollFd::new(&self.leave.0, PollFlags::IN),
        ];
        if let Some(worker) = &self.worker {
            let waits = worker.ready && !worker.tell.is_empty();
            let out = if waits { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::new(&worker.channel, PollFlags::IN | out));
            fds.push(PollFd::new(&worker.pidfd, PollFlags::IN));
        }
        fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let accepts = listener.is_some();
        let control = self.control.as_ref().filter(|_| !self.stopping);
        fds.extend(control.map(|control| PollFd::new(control.listener(), PollFlags::IN)));
        let start = self.worker.is_none().then_some(self.start_at);
        let due = start.into_iter().chain(again_at).chain(ping_at).min();
        let timeout = due.map(|at| at.saturating_duration_since(now));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut seen = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = || seen.next().unwrap_or(false);
        let (stop, leave) = (next(), next());
        let (heard, ended) = if self.worker.is_some() { (next(), next()) } else { (false, false) };
        let peer = accepts && next();
        Ok(Seen { stop, leave, heard, ended, peer, asked: next() })
    }

    fn accept(&mut self) {
        let entry = self.gate.accept(&mut self.table);
        // One that is not ready will be told of all.
        if let Some(worker) = self.worker.as_mut().filter(|worker| worker.ready) {
            worker.tell.extend(entry.map(Tell::Entry));
        }
    }

    /// Does what the worker says.
    fn hear_worker(&mut self) -> Result<(), KeeperError> {
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let ready = match hear(&worker.channel, &mut self.table) {
            Ok(ready) => ready,
            Err(error) => {
                error!("hearing the worker process: {error}; it is started again");
                let _ = worker.child.kill();
                return Ok(());
            }
        };
        let Some(served) = ready else { return Ok(()) };
        worker.is_ready(&self.table);
        if self.stopping {
            worker.tell.push_back(Tell::Stop);
        }
        self.shown.served();
        self.served = Some(served);
        self.open()
    }

    /// VMs may connect from now on, and another keeper may ask to take over.
    fn open(&mut self) -> Result<(), KeeperError> {
        let socket = &self.config.socket;
        match self.gate.listener() {
            None => {
                self.control = Some(self.gate.open(socket)?);
                if let Some(listener) = self.gate.listener() {
                    self.table.manager.store("l", listener);
                }
            }
            Some(_) if self.control.is_none() => match Control::open(socket) {
                Ok(control) => self.control = Some(control),
                Err(error) => warn!("--replace will not find this daemon: {error}"),
            },
            Some(_) => {}
        }
        self.table.manager.ready();
        Ok(())
    }

    /// The worker has ended: returns how, if that is the end.
    fn worker_ended(&mut self) -> Result<Option<ExitStatus>, KeeperError> {
        // What it said before it died.
        self.hear_worker()?;
        let Some(mut worker) = self.worker.take() else { return Ok(None) };
        let status = worker.child.wait()?;
        // It says itself that it cannot, before anybody relies on it or for the last
        // time.
        let gave_up = status.code().is_some() && !worker.ready;
        let needed = self.served.is_some() || self.table.peers() > 0;
        let hopeless = gave_up && (self.stopping || !needed);
        if status.success() || hopeless {
            return Ok(Some(status));
        }
        self.shown.unserved();
        self.pause = match worker.ready && worker.since.elapsed() >= self.config.settled {
            true => Duration::ZERO,
            false => (self.pause * 2).clamp(self.config.first_pause, self.config.max_pause),
        };
        self.start_at = Instant::now() + self.pause;
        error!(
            peers = self.table.peers(),
            pause_ms = self.pause.as_millis(),
            "the worker process ended ({status}); starting another one"
        );
        Ok(None)
    }

    fn end(&self) {
        if self.table.has_memories() {
            warn!("some VMs were not let go of");
        }
        self.gate.close(&self.config.socket);
        self.control.iter().for_each(Control::close);
        self.shown.close();
        info!("the keeper has ended");
    }
}

/// Does what a worker has said. What it serves, if it said that it is ready.
fn hear(channel: &OwnedFd, table: &mut Table) -> io::Result<Option<[u64; 2]>> {
    let mut ready = None;
    loop {
        // A message goes only when it has been dealt with: if this process dies, the
        // next keeper finds it.
        match look(channel) {
            Ok(Some(Message { kind: Kind::Ready, args: [layout, fingerprint, _], .. })) => {
                ready = Some([layout, fingerprint]);
            }
            Ok(Some(message)) => {
                if let Err(error) = table.apply(message) {
                    error!("the worker process makes no sense: {error}");
                }
            }
            // Its end is seen by the pidfd.
            Ok(None) => return Ok(ready),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ready),
            Err(error) if error.raw_os_error() == Some(NO_DESCRIPTOR) => {
                error!("a memory is lost if the worker dies: {error} (ulimit -n, LimitNOFILE=)");
            }
            Err(error) => return Err(error),
        }
        receive(channel)?;
    }
}

/// EMFILE.
const NO_DESCRIPTOR: i32 = rustix::io::Errno::MFILE.raw_os_error();

/// Whether a worker can go on with what another one serves, both by their layouts
/// and fingerprints.
fn judge([layout, source]: [u64; 2], [ours, our_source]: [u64; 2]) -> Result<(), String> {
    if layout != ours {
        return Err(format!(
            "its page maps and records are of version {layout:#x}, this program's of {ours:#x}; \
             nothing was taken. Let its VMs end first"
        ));
    }
    if source != our_source {
        return Err("it serves another source; nothing was taken. Give the same --memory or \
                    --image"
            .into());
    }
    Ok(())
}

/// What has happened.
#[derive(Debug)]
struct Seen {
    stop: bool,
    leave: bool,
    /// The worker has said something.
    heard: bool,
    /// It has ended.
    ended: bool,
    /// Somebody connects.
    peer: bool,
    /// Another keeper asks for all there is.
    asked: bool,
}
