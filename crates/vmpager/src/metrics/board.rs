//! What is known of a daemon's sessions: noted by the control thread, completed by
//! what workers say when they are asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::buckets::{SourceCounts, SourceStats};
use super::page::{FillState, SessionNow, SessionsPage};
use crate::reads::MemoryId;
use crate::stats::{EndReason, MemoryNumbers, Tally};
use crate::worker::{Command, Teller};

/// How long a worker thread may take to say one memory's numbers. One that takes
/// longer is not asked for others; what it said last stands in.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long all of them may take together.
const PATIENCE_IN_ALL: Duration = Duration::from_secs(2);

/// What a daemon serves, as far as it matters here.
#[derive(Debug)]
pub(crate) struct Keeping {
    pub(crate) source: String,
    /// All memory of every session is brought in.
    pub(crate) fills: bool,
    /// Of each worker thread.
    pub(crate) stats: Vec<Arc<SourceStats>>,
}

/// What is known of a daemon's sessions.
#[derive(Debug)]
pub(crate) struct Board {
    of: Keeping,
    begun: (Instant, SystemTime),
    takeovers: AtomicU64,
    unserved_nanos: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    live: BTreeMap<u64, Live>,
    ended: Tally,
    events: Events,
}

/// A memory that is served.
#[derive(Debug)]
struct Live {
    session: u64,
    peer_pid: i32,
    taken_over: bool,
    worker: usize,
    ask: Teller,
    /// What was last heard.
    numbers: Option<Box<MemoryNumbers>>,
}

/// How often things happened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Events {
    pub(super) started: u64,
    pub(super) taken_over: u64,
    /// Sessions that ended: filled, their peer exited, stopped, failed.
    pub(super) ended: [u64; 4],
    /// Peers that were refused, by [`Refusal`].
    pub(super) refused: [u64; 3],
}

/// Why a peer is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Its handshake is of no use, or has not come.
    Handshake,
    /// As many VMs are served as may be.
    Sessions,
    /// It has more memory than a VM may have.
    Memory,
}

/// Everything, at about one time.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) begun: SystemTime,
    uptime: Duration,
    pub(super) takeovers: u64,
    pub(super) unserved: Duration,
    pub(super) events: Events,
    /// Of all memories that were ever served.
    pub(super) all: Tally,
    /// Of those that are served now.
    pub(super) live: Tally,
    pub(super) workers: u64,
    pub(super) source: SourceCounts,
    source_name: String,
    pub(super) sessions: Vec<SessionNow>,
}

impl Board {
    pub(crate) fn new(of: Keeping) -> Self {
        Self {
            of,
            begun: (Instant::now(), SystemTime::now()),
            takeovers: AtomicU64::new(0),
            unserved_nanos: AtomicU64::new(0),
            state: Mutex::new(State {
                live: BTreeMap::new(),
                ended: Tally::new(),
                events: Events::default(),
            }),
        }
    }

    /// What the keeper has counted: worker processes that were replaced, and for how
    /// many nanoseconds there was none that served.
    pub(crate) fn kept(&self, takeovers: u64, unserved_nanos: u64) {
        self.takeovers.store(takeovers, Ordering::Relaxed);
        self.unserved_nanos.store(unserved_nanos, Ordering::Relaxed);
    }

    /// A memory of a session is served from now on, by this worker thread.
    pub(crate) fn serving(
        &self,
        memory: MemoryId,
        (session, peer_pid): (u64, i32),
        taken_over: bool,
        (worker, ask): (usize, &Teller),
    ) {
        let mut state = self.state();
        if !state.live.values().any(|live| live.session == session) {
            state.events.started += 1;
            state.events.taken_over += u64::from(taken_over);
        }
        let (ask, numbers) = (ask.clone(), None);
        let live = Live { session, peer_pid, taken_over, worker, ask, numbers };
        state.live.insert(memory.0, live);
    }

    /// A memory is served no longer.
    pub(crate) fn ended(&self, memory: MemoryId, numbers: &MemoryNumbers) {
        let mut state = self.state();
        if state.live.remove(&memory.0).is_some() {
            state.ended.add(numbers);
        }
    }

    /// A session has ended, with its last memory.
    pub(crate) fn session_ended(&self, reason: &EndReason) {
        let [filled, exited, stopped, failed] = &mut self.state().events.ended;
        *match reason {
            EndReason::Filled => filled,
            EndReason::PeerExited => exited,
            EndReason::Stopped => stopped,
            EndReason::Failed(_) => failed,
        } += 1;
    }

    /// A peer was turned away.
    pub(crate) fn refused(&self, why: Refusal) {
        self.state().events.refused[why as usize] += 1;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the workers, then says what there is. Counters never fall from one
    /// snapshot to the next: what has just ended, and is not noted yet, stands with
    /// what it said last.
    pub(super) fn look(&self) -> Snapshot {
        let asked: Vec<_> = {
            let state = self.state();
            state.live.iter().map(|(id, live)| (*id, live.worker, live.ask.clone())).collect()
        };
        let until = Instant::now() + PATIENCE_IN_ALL;
        let mut slow = BTreeSet::new();
        for (id, worker, ask) in asked {
            if slow.contains(&worker) || Instant::now() >= until {
                continue;
            }
            let (to, answer) = crossbeam_channel::bounded(1);
            ask.tell(Command::Report(MemoryId(id), to));
            match answer.recv_timeout(PATIENCE) {
                Ok(numbers) => {
                    if let Some(live) = self.state().live.get_mut(&id) {
                        live.numbers = Some(Box::new(numbers));
                    }
                }
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => drop(slow.insert(worker)),
                // It has just ended: the control thread is about to hear.
                Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {}
            }
        }
        self.snapshot()
    }

    fn snapshot(&self) -> Snapshot {
        let mut source = SourceCounts::default();
        self.of.stats.iter().for_each(|stats| stats.add_to(&mut source));
        let state = self.state();
        let (mut all, mut live) = (state.ended.clone(), Tally::new());
        let mut sessions: BTreeMap<u64, (&Live, Tally)> = BTreeMap::new();
        for memory in state.live.values() {
            let (_, tally) =
                sessions.entry(memory.session).or_insert_with(|| (memory, Tally::new()));
            if let Some(numbers) = memory.numbers.as_deref() {
                for tally in [&mut all, &mut live, tally] {
                    tally.add(numbers);
                }
            }
        }
        let session =
            |(session, (live, tally)): (u64, (&Live, Tally))| self.now(session, live, &tally);
        Snapshot {
            begun: self.begun.1,
            uptime: self.begun.0.elapsed(),
            takeovers: self.takeovers.load(Ordering::Relaxed),
            unserved: Duration::from_nanos(self.unserved_nanos.load(Ordering::Relaxed)),
            events: state.events,
            all,
            live,
            workers: self.of.stats.len() as u64,
            source,
            source_name: self.of.source.clone(),
            sessions: sessions.into_iter().map(session).collect(),
        }
    }

    fn now(&self, session: u64, live: &Live, tally: &Tally) -> SessionNow {
        let summary = tally.summary(session, live.peer_pid, None);
        let fill = match (self.of.fills, summary.fill_ms) {
            (_, Some(_)) => FillState::Filled,
            (true, None) => FillState::Filling,
            (false, None) => FillState::Off,
        };
        SessionNow {
            resident_bytes: tally.resident_bytes(),
            installed_bytes: tally.installed_bytes().iter().sum(),
            fill,
            taken_over: live.taken_over,
            summary,
        }
    }
}

impl Snapshot {
    pub(super) fn page(&self) -> SessionsPage {
        SessionsPage {
            version: env!("CARGO_PKG_VERSION").into(),
            source: self.source_name.clone(),
            workers: self.workers,
            uptime_ms: u64::try_from(self.uptime.as_millis()).unwrap_or(u64::MAX),
            takeovers: self.takeovers,
            sessions_started: self.events.started,
            sessions_ended: self.events.ended.iter().sum(),
            refused: self.events.refused.iter().sum(),
            sessions: self.sessions.clone(),
        }
    }
}
