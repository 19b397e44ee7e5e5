//! The thread that serves: it reads the faults of its memories, installs what
//! is at hand, hands the rest to its reader, installs what that finishes, and
//! fills in the background while nobody waits.
//!
//! Workers share nothing, so that serving a fault takes no lock and no handoff.
//! A memory belongs to one worker for life.

mod background;
mod sharing;
mod turns;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use tracing::error;
use vmpager_core::{PageRun, PageSource, SourceError};

pub(crate) use self::sharing::Sharing;
use self::turns::Hot;
use crate::arrival::Asked;
use crate::metrics::SourceStats;
use crate::placement::Placement;
use crate::polling::Polling;
use crate::reads::{MemoryId, Reads};
use crate::served::{Lost, Served};
use crate::shared::Shared;
use crate::stats::{EndReason, MemoryNumbers};

/// What a worker is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve nobody from now on, but do whatever else is said: others are being taken
    /// over, who wait longest as it is, and would have to share the CPUs.
    Hold,
    /// Serve again.
    GoOn,
    /// Serve this memory.
    Serve(Box<Served>),
    /// The process it belongs to has exited, as far as its pidfd tells.
    PeerExited(MemoryId),
    /// Say what a memory's numbers are.
    Report(MemoryId, Sender<MemoryNumbers>),
    /// Fill this memory, though it was not asked for at first.
    Fill(MemoryId),
    /// Let others install pages of this memory too.
    Share(MemoryId, Sender<Arc<Shared>>),
    /// Something that concerns other processes.
    Sharing(MemoryId, Sharing),
    /// Bring pages that another installer has claimed and cannot bring.
    Bring(MemoryId, PageRun),
    /// Finish what is in flight, then end; take `until` at most. `poison` says
    /// which memories nobody would go on holding.
    Stop { until: Instant, poison: Vec<MemoryId> },
}

/// What a worker tells.
#[derive(Debug)]
pub(crate) enum Event {
    /// A memory is served no longer. If serving failed, it is `held`: closing
    /// its userfaultfd would let what is missing read as zeroes.
    Ended {
        memory: MemoryId,
        reason: EndReason,
        numbers: Box<MemoryNumbers>,
        held: Option<Box<Served>>,
    },
    /// All of a memory is in place. It goes on being served, for others who may
    /// come to have it.
    Complete(MemoryId),
    /// A memory that was said to be gone is still there.
    StillAlive(MemoryId),
    /// The worker has ended.
    Stopped,
}

/// A way to tell a worker something.
#[derive(Clone, Debug)]
pub(crate) struct Teller {
    commands: Sender<Command>,
    doorbell: Arc<OwnedFd>,
}

impl Teller {
    /// Tells the worker something. False if it has ended.
    pub(crate) fn tell(&self, command: Command) -> bool {
        let told = self.commands.send(command).is_ok();
        self.nudge();
        told
    }

    /// Has the worker look at what there is to do.
    pub(crate) fn nudge(&self) {
        ring(&self.doorbell);
    }
}

/// A worker thread, as its owner sees it.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    teller: Teller,
    /// What its reads of the source come to.
    pub(crate) stats: Arc<SourceStats>,
    pub(crate) thread: Option<std::thread::JoinHandle<()>>,
}

impl WorkerHandle {
    /// Tells the worker something. False if it has ended.
    pub(crate) fn tell(&self, command: Command) -> bool {
        self.teller.tell(command)
    }

    /// A way for others to do so.
    pub(crate) fn teller(&self) -> &Teller {
        &self.teller
    }
}

impl Drop for WorkerHandle {
    /// Ends a worker that nobody has stopped: one whose owner failed to start.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.tell(Command::Stop { until: Instant::now(), poison: Vec::new() });
            let _ = thread.join();
        }
    }
}

/// Makes an eventfd readable. It cannot fail but by overflow, which is as
/// good.
pub(crate) fn ring(doorbell: &OwnedFd) {
    let _ = rustix::io::write(doorbell, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable.
pub(crate) fn unring(doorbell: &OwnedFd) {
    let _ = rustix::io::read(doorbell, &mut [0u8; 8]);
}

/// An eventfd to wait on.
pub(crate) fn doorbell() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes `epoll` report when `fd` is readable.
pub(crate) fn watch(epoll: &OwnedFd, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
    let data = epoll::EventData::new_u64(token);
    Ok(epoll::add(epoll, fd, data, epoll::EventFlags::IN)?)
}

/// What starting a worker needs.
#[derive(Debug)]
pub(crate) struct WorkerConfig {
    pub(crate) name: String,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) events: Sender<Event>,
    /// Rung after each event.
    pub(crate) owner: Arc<OwnedFd>,
    /// The longest time to poll before sleeping.
    pub(crate) max_polling: Duration,
    /// The most faults of one memory served in a row while others have some, too.
    pub(crate) turn: usize,
}

/// Why a worker could not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The source gave no reader.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A descriptor or the thread could not be had.
    #[error("starting a worker thread: {0}")]
    Io(#[from] io::Error),
}

/// epoll tokens of what is no memory; memories use their ids.
const DOORBELL: u64 = u64::MAX;
const READER: u64 = u64::MAX - 1;

/// Looks between two looks at everything else, while polling memories that
/// fault.
const LOOKS: u32 = 16;

/// Pauses shorter than this are not slept through.
const SHORT: Duration = Duration::from_micros(300);

/// Starts a worker.
pub(crate) fn spawn(config: WorkerConfig) -> Result<WorkerHandle, WorkerError> {
    let reader = config.source.open_reader()?;
    let bell = Arc::new(doorbell()?);
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
    watch(&epoll, bell.as_fd(), DOORBELL)?;
    if let Some(fd) = reader.ready_fd() {
        watch(&epoll, fd, READER)?;
    }
    let (commands, inbox) = crossbeam_channel::unbounded();
    let stats = Arc::new(SourceStats::default());
    let worker = Worker {
        epoll,
        bell: bell.clone(),
        inbox,
        events: config.events,
        owner: config.owner,
        memories: HashMap::new(),
        hot: Hot::new(config.turn),
        retrying: Vec::new(),
        making_huge: Vec::new(),
        reads: Reads::new(reader, stats.clone()),
        polling: Polling::new(config.max_polling),
        stopping: None,
        filling: Vec::new(),
        placement: Placement::new(),
        fill_turn: 0,
        demanded: false,
        asked: Asked::new(),
        held: false,
    };
    let thread = std::thread::Builder::new().name(config.name).spawn(move || {
        let _guard = AbortOnPanic;
        worker.run();
    })?;
    let teller = Teller { commands, doorbell: bell };
    Ok(WorkerHandle { teller, stats, thread: Some(thread) })
}

/// Unwinding a worker would close its userfaultfds, and memory still missing
/// would read as zeroes. No guest may see that: the process ends instead.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

struct Worker {
    epoll: OwnedFd,
    bell: Arc<OwnedFd>,
    inbox: Receiver<Command>,
    events: Sender<Event>,
    owner: Arc<OwnedFd>,
    memories: HashMap<MemoryId, Served>,
    /// Memories that have faults, or had some a moment ago.
    hot: Hot,
    /// Memories with something to be tried again later, and maybe some without.
    retrying: Vec<MemoryId>,
    /// Memories of which huge pages are made.
    making_huge: Vec<MemoryId>,
    reads: Reads,
    polling: Polling,
    stopping: Option<(Instant, Vec<MemoryId>)>,
    /// Memories to be filled, and whose turn it is.
    filling: Vec<MemoryId>,
    fill_turn: usize,
    placement: Placement,
    /// Faults were served since the last step of the fill.
    demanded: bool,
    /// Who waits.
    asked: Asked,
    /// It does as it is told and serves nobody.
    held: bool,
}

/// Why the worker's loop may go on without sleeping.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Served,
    Filled,
    None,
}

impl Worker {
    fn run(mut self) {
        let mut looks = 0;
        let mut ready = Vec::with_capacity(64);
        loop {
            let mut work = self.serve_hot();
            let mut due = self.reads.resume();
            // A piece after every batch of faults: where they never pause, the
            // fill would never end, and they end only with it.
            if self.fill(work == Work::None) {
                work = Work::Filled;
            }
            looks += 1;
            let timeout = match work {
                // Faults keep coming: the others are looked at now and then.
                Work::Served if looks < LOOKS && !self.hot.is_crowded() => continue,
                Work::None if looks < LOOKS && self.keep_looking() => {
                    std::hint::spin_loop();
                    continue;
                }
                Work::Served | Work::Filled => Some(Duration::ZERO),
                Work::None if self.keep_looking() || self.make_huge() => Some(Duration::ZERO),
                Work::None => {
                    self.hot.clear();
                    due = due.into_iter().chain(self.next_due()).min();
                    match due.map(|at| at.saturating_duration_since(Instant::now())) {
                        Some(pause) if pause < SHORT => {
                            // epoll would sleep for a whole millisecond.
                            std::thread::yield_now();
                            Some(Duration::ZERO)
                        }
                        pause => pause,
                    }
                }
            };
            looks = 0;
            if let Err(error) = self.wait(timeout, &mut ready) {
                error!("waiting for faults: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
            if self.may_stop() {
                return self.stop();
            }
        }
    }

    /// Learns what happened elsewhere.
    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<epoll::Event>) -> io::Result<()> {
        let sleeping = timeout != Some(Duration::ZERO);
        let timeout = timeout.map(|t| Timespec::try_from(t).unwrap_or_default());
        ready.clear();
        let from = Instant::now();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(ready), timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            other => other?,
        };
        let now = Instant::now();
        if sleeping && !ready.is_empty() {
            self.polling.woken(now);
        }
        let earliest = self.asked.answered(from, now, ready.len() < ready.capacity());
        for event in ready.iter() {
            match event.data.u64() {
                DOORBELL => {
                    unring(&self.bell);
                    self.obey();
                }
                READER => self.complete_reads(),
                id => {
                    let failing = { event.flags }.contains(epoll::EventFlags::ERR);
                    self.look_at(MemoryId(id), failing, earliest);
                }
            }
        }
        self.find_due();
        Ok(())
    }

    /// A memory has something to say.
    fn look_at(&mut self, id: MemoryId, failing: bool, earliest: Instant) {
        if let Some(memory) = self.memories.get_mut(&id) {
            memory.nobody_waited_at(earliest);
        }
        if failing && self.memories.get(&id).is_some_and(Served::is_blocking) {
            let why = "the VMM made its userfaultfd blocking; O_NONBLOCK must stay set";
            self.lose(id, Lost::Failed(why.into()));
        } else {
            self.hot.add(id);
        }
        if failing {
            self.unwatch_blocking_views(id);
        }
    }

    fn obey(&mut self) {
        loop {
            match self.next_command() {
                Ok(Command::Hold) => self.held = true,
                Ok(Command::GoOn) => self.held = false,
                Ok(Command::Serve(memory)) => self.take_in(*memory),
                Ok(Command::PeerExited(id)) => {
                    let Some(memory) = self.memories.get(&id) else { continue };
                    if memory.is_alive() {
                        self.tell(Event::StillAlive(id));
                    } else {
                        self.lose(id, Lost::PeerGone);
                    }
                }
                Ok(Command::Report(id, to)) => {
                    if let Some(memory) = self.memories.get(&id) {
                        let _ = to.send(memory.numbers());
                    }
                }
                Ok(Command::Fill(id)) => {
                    let Some(memory) = self.memories.get_mut(&id) else { continue };
                    memory.want_fill();
                    if !self.filling.contains(&id) {
                        self.filling.push(id);
                    }
                }
                Ok(Command::Share(id, to)) => {
                    if let Some(memory) = self.memories.get_mut(&id) {
                        let _ = to.send(memory.share());
                    }
                }
                Ok(Command::Sharing(id, what)) => self.share(id, what),
                Ok(Command::Bring(id, run)) => {
                    let Some(memory) = self.memories.get_mut(&id) else { continue };
                    if let Err(lost) = memory.bring(run, &mut self.reads) {
                        self.lose(id, lost);
                    }
                    self.note_retry(id);
                }
                Ok(Command::Stop { until, poison }) => {
                    self.filling.clear();
                    self.held = false;
                    self.stopping = Some((until, poison));
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stopping.get_or_insert((Instant::now(), Vec::new()));
                    return;
                }
            }
        }
    }

    /// What it is told next, if anything. While it is held, it waits for that.
    fn next_command(&self) -> Result<Command, TryRecvError> {
        match self.held {
            true => self.inbox.recv().map_err(|_| TryRecvError::Disconnected),
            false => self.inbox.try_recv(),
        }
    }

    fn take_in(&mut self, memory: Served) {
        let id = memory.id();
        let watched = std::iter::once(memory.events())
            .chain(memory.outside_events())
            .try_for_each(|fd| watch(&self.epoll, fd, id.0));
        if let Err(error) = watched {
            let numbers = Box::new(memory.numbers());
            let reason = EndReason::Failed(format!("watching the userfaultfd: {error}"));
            let held = Some(Box::new(memory));
            self.tell(Event::Ended { memory: id, reason, numbers, held });
            return;
        }
        if memory.wants_fill() {
            self.filling.push(id);
        }
        if memory.makes_huge() {
            self.making_huge.push(id);
        }
        self.memories.insert(id, memory);
        self.hot.add(id);
    }

    fn lose(&mut self, id: MemoryId, lost: Lost) {
        if let Some(mut memory) = self.forget(id) {
            memory.stop_sharing();
            let numbers = Box::new(memory.numbers());
            let (reason, held) = match lost {
                Lost::PeerGone => (EndReason::PeerExited, None),
                Lost::Failed(why) => {
                    memory.fail();
                    (EndReason::Failed(why), Some(Box::new(memory)))
                }
            };
            self.tell(Event::Ended { memory: id, reason, numbers, held });
        }
    }

    /// Takes a memory out. Its reads in flight end without effect.
    fn forget(&mut self, id: MemoryId) -> Option<Served> {
        let mut memory = self.memories.remove(&id)?;
        memory.end_recording();
        self.hot.remove(id);
        self.making_huge.retain(|making| *making != id);
        self.filling.retain(|filling| *filling != id);
        self.unwatch(memory.events());
        memory.outside_events().for_each(|fd| self.unwatch(fd));
        Some(memory)
    }

    fn tell(&self, event: Event) {
        if self.events.send(event).is_ok() {
            ring(&self.owner);
        }
    }

    fn may_stop(&self) -> bool {
        self.stopping.as_ref().is_some_and(|(until, _)| {
            let idle =
                self.reads.is_idle() && self.memories.values().all(|m| m.retry_at().is_none());
            idle || *until <= Instant::now()
        })
    }

    fn stop(mut self) {
        let poison = self.stopping.take().map_or_else(Vec::new, |(_, poison)| poison);
        let ids: Vec<MemoryId> = self.memories.keys().copied().collect();
        for id in ids {
            let Some(mut memory) = self.forget(id) else { continue };
            memory.stop_sharing();
            let numbers = Box::new(memory.numbers());
            let reason = EndReason::Stopped;
            if poison.contains(&id) && !memory.poison_missing() {
                // Held for ever beats zeroes: the descriptor must stay open.
                error!("missing pages cannot be poisoned; their waiters are held");
                std::mem::forget(memory);
            }
            self.tell(Event::Ended { memory: id, reason, numbers, held: None });
        }
        self.tell(Event::Stopped);
    }
}
