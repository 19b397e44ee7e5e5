//! The reads a worker has in flight, and those that wait to be tried again.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmpager_core::prefetch::limits::{FILL_DEPTH, PREFETCH_DEPTH};
use vmpager_core::{ByteRange, PageReader, PageRun, Priority, ReadId, ReadRequest, SourceError};

use crate::metrics::SourceStats;

/// Names a memory within its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MemoryId(pub(crate) u64);

/// Somebody who waits for a page: a vCPU or thread whose fault was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiter {
    pub(crate) page: u64,
    /// When the fault can have come at the earliest.
    pub(crate) since: Instant,
}

/// A read in flight, and what it is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    pub(crate) memory: MemoryId,
    /// The claimed pages.
    pub(crate) run: PageRun,
    /// Their bytes in the source.
    pub(crate) range: ByteRange,
    pub(crate) priority: Priority,
    /// Who waits for a page of it, if anybody does yet.
    pub(crate) waiter: Option<Waiter>,
    /// Whether it is for what lies near a page that somebody waited for.
    pub(crate) nearby: bool,
    /// How often it has failed.
    pub(crate) failures: u32,
    /// It was waited for long enough: what is not here is not to be had.
    pub(crate) here_only: bool,
}

impl Read {
    fn is_for(&self, memory: MemoryId, page: u64) -> bool {
        self.memory == memory && self.run.pages().contains(&page)
    }

    /// Its waiter, if that waits for a page of `run`.
    pub(crate) fn waiter_within(&self, run: PageRun) -> Option<Waiter> {
        self.waiter.filter(|waiter| run.pages().contains(&waiter.page))
    }
}

/// How often a read that may succeed later is tried before its page is given
/// up.
const TRIES: u32 = 4;
/// The pause before the second try; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// A worker's reader and the reads it has given to it.
#[derive(Debug)]
pub(crate) struct Reads {
    pub(crate) reader: Box<dyn PageReader>,
    in_flight: HashMap<ReadId, (Instant, Read)>,
    paused: Vec<(Instant, Read)>,
    next: u64,
    fills: usize,
    prefetches: usize,
    /// Reads that somebody waited for when they were submitted, by memory.
    demands: HashMap<MemoryId, usize>,
    stats: Arc<SourceStats>,
}

impl Reads {
    /// Counts what becomes of its reads in `stats`.
    pub(crate) fn new(reader: Box<dyn PageReader>, stats: Arc<SourceStats>) -> Self {
        let (in_flight, paused, demands) = (HashMap::new(), Vec::new(), HashMap::new());
        Self { reader, in_flight, paused, next: 0, fills: 0, prefetches: 0, demands, stats }
    }

    /// Starts a read in the background.
    pub(crate) fn submit(&mut self, read: Read) {
        let id = ReadId(self.next);
        self.next += 1;
        match read.priority {
            Priority::Fill => self.fills += 1,
            Priority::Prefetch => self.prefetches += 1,
            Priority::Demand => *self.demands.entry(read.memory).or_default() += 1,
        }
        self.in_flight.insert(id, (Instant::now(), read));
        let Read { range, priority, here_only, .. } = read;
        self.reader.submit(ReadRequest { id, range, priority, here_only });
    }

    /// Whether the background fill may submit one more.
    pub(crate) fn may_fill(&self) -> bool {
        self.fills < FILL_DEPTH
    }

    /// Whether the replay of a profile, or what is ahead of faults, may submit one
    /// more.
    pub(crate) fn may_prefetch(&self) -> bool {
        self.fills + self.prefetches < PREFETCH_DEPTH
    }

    /// How many reads are in flight because somebody waited for them.
    pub(crate) fn demands_of(&self, memory: MemoryId) -> usize {
        self.demands.get(&memory).copied().unwrap_or(0)
    }

    /// Whether nothing is in flight or waits to be tried again.
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.paused.is_empty()
    }

    /// Whether a read of this page is in flight, or will be again.
    pub(crate) fn covers(&self, memory: MemoryId, page: u64) -> bool {
        let paused = self.paused.iter().map(|(_, read)| read);
        let in_flight = self.in_flight.values().map(|(_, read)| read);
        in_flight.chain(paused).any(|read| read.is_for(memory, page))
    }

    /// Somebody waits for a page that is in flight: move its read forward.
    pub(crate) fn promote(&mut self, memory: MemoryId, waiter: Waiter) {
        let is_for = |read: &Read| read.is_for(memory, waiter.page);
        if let Some((id, (_, read))) = self.in_flight.iter_mut().find(|(_, (_, read))| is_for(read))
        {
            read.waiter.get_or_insert(waiter);
            self.reader.promote(*id, Priority::Demand);
        } else if let Some((_, read)) = self.paused.iter_mut().find(|(_, read)| is_for(read)) {
            read.waiter.get_or_insert(waiter);
            read.priority = Priority::Demand;
        }
    }

    /// A read failed: whether it will be tried again, and if so when.
    pub(crate) fn try_again(&mut self, read: Read, error: &SourceError) -> bool {
        let failures = read.failures + 1;
        if !error.is_transient() || failures >= TRIES {
            return false;
        }
        let at = Instant::now() + FIRST_PAUSE * 2u32.pow(failures - 1);
        self.paused.push((at, Read { failures, ..read }));
        true
    }

    /// Submits the reads whose pause is over. Returns when the next one is.
    pub(crate) fn resume(&mut self) -> Option<Instant> {
        if self.paused.is_empty() {
            return None;
        }
        let now = Instant::now();
        let due: Vec<Read> =
            self.paused.extract_if(.., |(at, _)| *at <= now).map(|(_, read)| read).collect();
        for read in due {
            self.submit(read);
        }
        self.paused.iter().map(|(at, _)| *at).min()
    }

    /// Hands over what has finished. `done` may keep what it wants to submit
    /// next, but cannot submit from within.
    pub(crate) fn complete(
        &mut self,
        mut done: impl FnMut(Read, Result<vmpager_core::PageData<'_>, SourceError>),
    ) {
        let Self { reader, in_flight, fills, prefetches, demands, stats, .. } = self;
        reader.complete(&mut |id, result| {
            let Some((since, read)) = in_flight.remove(&id) else { return };
            stats.ended(read.priority, since.elapsed(), result.is_err());
            match read.priority {
                Priority::Fill => *fills -= 1,
                Priority::Prefetch => *prefetches -= 1,
                Priority::Demand => {
                    if let Entry::Occupied(mut demands) = demands.entry(read.memory) {
                        *demands.get_mut() -= 1;
                        if *demands.get() == 0 {
                            demands.remove();
                        }
                    }
                }
            }
            done(read, result);
        });
    }
}
