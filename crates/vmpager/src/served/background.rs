//! What goes on while nobody is being answered: finished and failed reads, the
//! background fill, letting go of the memory.

use std::time::{Duration, Instant};

use tracing::{error, warn};
use vmpager_core::prefetch::limits::{CHUNK, COLD_PIECE, LONG, Look};
use vmpager_core::prefetch::{Prefetch, Replay};
use vmpager_core::{FillPlan, Nearby, PageData, PageRun, PageSize, Piece, Priority, SourceError};
use vmpager_sys::uffd::Stop;

use super::install::{FIRST_RETRY, LAST_RETRY, Put, PutEnd};
use super::{Flag, Leftover, Lost, Served, at_hand};
use crate::kill;
use crate::reads::{Read, Reads, Waiter};

/// How long missing pages are tried to be poisoned while the layout of the
/// memory keeps changing: without getting any further, and in all. On a machine
/// with much to do, the threads that change it need their time.
const POISON_LIMIT: Duration = Duration::from_secs(2);
const POISON_LIMIT_IN_ALL: Duration = Duration::from_secs(20);

/// How long something goes on that gets further now and then.
#[derive(Debug)]
struct Patience {
    started: Instant,
    moved: Instant,
    left: u64,
}

impl Patience {
    /// With so much left to do.
    fn new(left: u64) -> Self {
        let now = Instant::now();
        Self { started: now, moved: now, left }
    }

    /// Whether to try again, with so much left now.
    fn lasts(&mut self, left: u64) -> bool {
        if left < self.left {
            (self.left, self.moved) = (left, Instant::now());
        }
        self.moved.elapsed() < POISON_LIMIT && self.started.elapsed() < POISON_LIMIT_IN_ALL
    }
}

/// How many base pages the fill installs between two looks at the clock: some
/// 100 to 250 us' worth. A page takes 1 us, but ten and more on a virtualised
/// host whose own memory is not backed yet.
#[derive(Debug)]
pub(super) struct Chunk {
    pages: u64,
}

impl Chunk {
    const MOST: u64 = CHUNK;
    const LEAST: u64 = 4;

    pub(super) fn new() -> Self {
        Self { pages: Self::MOST }
    }

    /// A chunk took so long.
    fn took(&mut self, time: Duration) {
        if time > Duration::from_micros(250) {
            self.pages = (self.pages / 2).max(Self::LEAST);
        } else if time < Duration::from_micros(100) {
            self.pages = (self.pages * 2).min(Self::MOST);
        }
    }

    /// In pages of a slot, the size of whose pages is `1 << shift` bytes.
    pub(super) fn pages_of(&self, shift: u32) -> u64 {
        (self.pages >> (shift - PageSize::Size4K.shift())).max(1)
    }
}

/// What came of a step of the background fill.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// Pages were installed, or are being read.
    Some,
    /// Reads in flight must end first.
    Wait,
    /// Every page is in place.
    All,
    /// A profile was replayed, and more is not asked for.
    Enough,
    /// Every page is in place, but the memory stays registered: other processes may come,
    /// or it is made of clean pages.
    Kept,
}

impl Served {
    /// A read of a claimed run.
    pub(super) fn background(
        &self,
        run: PageRun,
        priority: Priority,
        waiter: Option<Waiter>,
    ) -> Read {
        let (_, range) = self.engine.slots().locate(run);
        Read {
            memory: self.id,
            run,
            range,
            priority,
            waiter,
            nearby: false,
            failures: 0,
            here_only: false,
        }
    }

    /// A read in the background has ended with these bytes.
    pub(crate) fn read_done(
        &mut self,
        read: Read,
        data: PageData<'_>,
        left_over: &mut Vec<Leftover>,
    ) -> Result<(), Lost> {
        let (slot, _) = self.engine.slots().slot_of(read.run.first);
        let shift = slot.page_size.shift();
        let parts: Vec<PageRun> = self.engine.still_claimed(read.run).collect();
        let src = data.address();
        let mut installed = 0;
        for part in &parts {
            let offset = usize::try_from((part.first - read.run.first) << shift);
            let end = self.put(*part, Put::Bytes(src + offset.unwrap_or(usize::MAX)))?;
            installed += end.pages;
            if let Some((rest, stop)) = end.rest {
                let waiter = read.waiter_within(rest);
                left_over.push(Leftover { rest, stop, waiter });
            }
        }
        if read.waiter.is_none() && read.priority == Priority::Prefetch {
            self.took(read.range.len, 0);
            let counter = match read.nearby {
                true => &mut self.counters.pages_neighbour,
                false => &mut self.counters.pages_profile,
            };
            *counter += installed;
        } else {
            self.count_installed(read.run, read.waiter, installed);
        }
        if parts != [read.run] {
            // Some pages were given back meanwhile; whoever waits for them
            // asks again, and is told zero.
            let (hva, len) = self.address(read.run);
            self.wake(hva, len)?;
        }
        if let Some(waiter) = read.waiter {
            self.stalled(waiter);
        }
        Ok(())
    }

    /// A read failed. A single page is tried again or given up; a run is cut
    /// in two, to find the pages that can be had: without asking again for those that were
    /// waited for as long as anybody wants to.
    pub(crate) fn read_failed(
        &mut self,
        read: Read,
        error: &SourceError,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        if read.run.count > 1 && !matches!(error, SourceError::Changed { .. }) {
            let half = read.run.count / 2;
            let here_only = read.here_only || matches!(error, SourceError::GaveUp { .. });
            for run in [
                PageRun::new(read.run.first, half),
                PageRun::new(read.run.first + half, read.run.count - half),
            ] {
                let half = self.background(run, read.priority, read.waiter_within(run));
                reads.submit(Read { nearby: read.nearby, here_only, ..half });
            }
            return Ok(());
        }
        if reads.try_again(read, error) {
            warn!("{error}; trying again");
            return Ok(());
        }
        let (hva, _) = self.address(read.run);
        error!("{} page(s) at {hva} cannot be had and are poisoned: {error}", read.run.count);
        self.put_poison(read.run, read.waiter, reads)
    }

    /// Brings in some of the pages near those that somebody waited for. Those
    /// that are not at hand are read if a stream of faults leads to them, else they
    /// are not worth it, and left. False if there are none.
    ///
    /// How many is a matter of pages, not of runs: what is in place already cuts the
    /// windows in pieces, and a run at a time they would be complete so much later.
    pub(crate) fn bring_neighbours(&mut self, reads: &mut Reads) -> Result<bool, Lost> {
        let started = Instant::now();
        let mut look = Look::of(self.chunk.pages_of(PageSize::Size4K.shift()));
        while look.left() > 0
            && self.retry.at.is_none()
            && self.may_take(started)
            && let Some(Nearby { piece, expected }) = self.engine.next_neighbours(look.left())
        {
            look.brought(piece.run());
            match piece {
                Piece::Zero(run) => self.fill_zeroes(run, reads)?,
                Piece::Fetch(run) => self.fetch_neighbours(run, expected, reads)?,
            }
        }
        if look.is_empty() {
            return Ok(false);
        }
        self.chunk.took(started.elapsed());
        Ok(true)
    }

    /// Installs claimed neighbours.
    fn fetch_neighbours(
        &mut self,
        run: PageRun,
        expected: bool,
        reads: &mut Reads,
    ) -> Result<(), Lost> {
        let (_, range) = self.engine.slots().locate(run);
        let read = expected && reads.may_prefetch();
        match at_hand(&mut *reads.reader, range) {
            Ok(Some(data)) => {
                let end = self.put(run, Put::Bytes(data.address()))?;
                self.took(range.len, 0);
                self.counters.pages_neighbour += end.pages;
                self.put_off_rest(end, reads)
            }
            Ok(None) if read => {
                let read = self.background(run, Priority::Prefetch, None);
                reads.submit(Read { nearby: true, ..read });
                Ok(())
            }
            Ok(None) => {
                self.engine.released(run);
                Ok(())
            }
            Err(error) => {
                let read = self.background(run, Priority::Prefetch, None);
                self.read_failed(read, &error, reads)
            }
        }
    }

    /// Whether pieces come that a vCPU would wait for that has no CPU to itself: not while
    /// a profile has been given up, or is not trusted.
    pub(crate) fn brings_much(&self) -> bool {
        match self.engine.replaying().filter(|replay| replay.next().is_some()) {
            Some(replay) => replay.is_trusted(),
            None => self.fill,
        }
    }

    /// One piece of the replay of a profile, or of the background fill. A profile that is
    /// not trusted has its turn only while the worker is `idle`.
    pub(crate) fn fill(&mut self, idle: bool, reads: &mut Reads) -> Result<Filled, Lost> {
        if self.is_replaying() {
            if !idle && !self.engine.replaying().is_some_and(Replay::is_trusted) {
                return Ok(Filled::Wait);
            }
            let some = self.replay(reads)?;
            return Ok(if some { Filled::Some } else { Filled::Wait });
        }
        if !self.fill {
            return Ok(if self.has_profile() { Filled::Wait } else { Filled::Enough });
        }
        if !self.may_fill(reads) {
            return Ok(Filled::Wait);
        }
        if self.moves_pieces()
            && let Some(whole) = self.engine.next_fill_piece()
        {
            let pages = self.bring_piece(&whole, reads);
            self.counters.pages_fill += pages;
            if pages > 0 {
                return Ok(Filled::Some);
            }
        }
        // In base pages, also where the memory is made of huge ones.
        let piece = self.engine.fill_piece();
        let until = Instant::now() + LONG;
        let mut done = 0;
        while done < piece && self.may_fill(reads) && (done == 0 || Instant::now() < until) {
            let run = match self.engine.next_fill(piece - done) {
                FillPlan::Bring(Piece::Fetch(run)) => self.fill_fetch(run, until, reads)?,
                FillPlan::Bring(Piece::Zero(run)) => {
                    self.fill_zeroes(run, reads)?;
                    run
                }
                FillPlan::Complete if !self.record.has(Flag::MustHold) && done == 0 => {
                    let took = self.counters.started.elapsed();
                    self.counters.fill_took.get_or_insert(took);
                    return match (self.huge_at(), self.outside.is_open()) {
                        (Some(_), _) => Ok(Filled::Wait),
                        (None, true) => Ok(Filled::Kept),
                        (None, false) if self.clean.is_some() => Ok(Filled::Kept),
                        (None, false) => self.detach(),
                    };
                }
                FillPlan::Wait | FillPlan::Complete => break,
            };
            done += self.address(run).1 >> PageSize::Size4K.shift();
        }
        Ok(if done > 0 { Filled::Some } else { Filled::Wait })
    }

    /// Whether the fill need not wait for reads in flight, a pause, or bandwidth.
    fn may_fill(&mut self, reads: &Reads) -> bool {
        reads.may_fill() && self.retry.at.is_none() && self.may_take(Instant::now())
    }

    /// Fills a claimed run, or the first part of it. Returns which.
    fn fill_fetch(
        &mut self,
        run: PageRun,
        until: Instant,
        reads: &mut Reads,
    ) -> Result<PageRun, Lost> {
        let (_, range) = self.engine.slots().locate(run);
        match at_hand(&mut *reads.reader, range) {
            Ok(Some(data)) => {
                let src = data.address();
                self.fill_from(run, src, until, reads)
            }
            Ok(None) => {
                let run = self.shorten(run, run.first, COLD_PIECE);
                reads.submit(self.background(run, Priority::Fill, None));
                Ok(run)
            }
            Err(error) => {
                let read = self.background(run, Priority::Fill, None);
                self.read_failed(read, &error, reads)?;
                Ok(run)
            }
        }
    }

    /// Fills a claimed run, whose bytes are at `src`, until it is time to look
    /// for faults. Returns the part that was filled.
    fn fill_from(
        &mut self,
        run: PageRun,
        src: usize,
        until: Instant,
        reads: &mut Reads,
    ) -> Result<PageRun, Lost> {
        let (slot, _) = self.engine.slots().slot_of(run.first);
        let shift = slot.page_size.shift();
        let mut now = Instant::now();
        let mut done = 0;
        while done < run.count && (done == 0 || now < until) {
            let pages = self.chunk.pages_of(shift).min(run.count - done);
            let part = PageRun::new(run.first + done, pages);
            let offset = usize::try_from(done << shift).unwrap_or(usize::MAX);
            let end = self.put(part, Put::Bytes(src + offset))?;
            self.count_installed(part, None, end.pages);
            done += pages;
            if end.rest.is_some() {
                // Putting off reads events: pages of the rest may have been
                // given back, and are no longer this run's to fill.
                self.put_off_rest(end, reads)?;
                break;
            }
            let after = Instant::now();
            self.chunk.took(after - now);
            now = after;
        }
        self.engine.released(PageRun::new(run.first + done, run.count - done));
        Ok(PageRun::new(run.first, done))
    }

    /// Gives memory to pages of a hole.
    pub(super) fn fill_zeroes(&mut self, run: PageRun, reads: &mut Reads) -> Result<(), Lost> {
        let end = self.put(run, Put::Zeroes)?;
        self.counters.pages_zero += end.pages;
        self.put_off_rest(end, reads)
    }

    pub(super) fn put_off_rest(&mut self, end: PutEnd, reads: &mut Reads) -> Result<(), Lost> {
        match end.rest {
            Some((rest, stop)) => self.put_off(Leftover { rest, stop, waiter: None }, reads),
            None => Ok(()),
        }
    }

    /// Somebody else's faults were served: the next piece should be small.
    pub(crate) fn others_wait(&mut self) {
        self.engine.demanded();
    }

    /// Lets go of the memory, every page of which is in place: no fault, no
    /// event and no cost from then on.
    fn detach(&mut self) -> Result<Filled, Lost> {
        if !std::mem::replace(&mut self.detached, true) {
            for slot in self.engine.slots().iter() {
                kill::point("detaching");
                if let Err(error) = self.uffd.unregister(slot.hva.0, slot.len) {
                    // Closing the descriptor does the same, for all of it.
                    warn!("unregistering {:#x} bytes at {}: {error}", slot.len, slot.hva);
                }
            }
            // The kernel wakes waiters before it takes the registration away, and
            // who faults in between sleeps on (seen on 6.18).
            self.wake_everybody();
        }
        // Whoever gave memory back just before waits for its event to be read, or is
        // about to tell: closing this descriptor would not help, since others hold
        // the userfaultfd too, the VMM itself for one.
        self.read_events()?;
        let changing =
            self.engine.slots().iter().any(|slot| self.uffd.is_changing(slot.hva.0, slot.len));
        if changing {
            self.pause(FIRST_RETRY, LAST_RETRY);
            return Ok(Filled::Wait);
        }
        Ok(Filled::All)
    }

    /// Poisons every page whose bytes are still to come, so that letting go of
    /// the memory cannot show zeroes for them. False if that failed.
    pub(crate) fn poison_missing(&mut self) -> bool {
        // Reads in flight end without effect: their pages are missing too.
        self.engine.released(PageRun::new(0, self.engine.map().pages()));
        let mut patience = Patience::new(self.engine.outstanding());
        loop {
            let run = match self.engine.next_fill(u64::MAX) {
                FillPlan::Bring(Piece::Fetch(run)) => run,
                FillPlan::Bring(Piece::Zero(_)) => continue,
                FillPlan::Wait | FillPlan::Complete => {
                    return self.put_zeroes_for_good() && !self.record.has(Flag::MustHold);
                }
            };
            match self.poison_part(run) {
                Ok(None) => {}
                Ok(Some((rest, Stop::Changing))) if patience.lasts(self.engine.outstanding()) => {
                    self.engine.released(rest);
                    if self.read_events().is_err() {
                        return false;
                    }
                    // For the thread that removes pages to get on.
                    std::thread::sleep(FIRST_RETRY);
                }
                Ok(Some(_)) | Err(Lost::Failed(_)) => return false,
                Err(Lost::PeerGone) => return true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with much to do is no reason to hold memory for ever.
    #[test]
    fn patience_lasts_while_something_moves() {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        let lasts = |started, moved, left| {
            let (started, moved) = (ago(started).expect("up"), ago(moved).expect("up"));
            Patience { started, moved, left: 10 }.lasts(left)
        };
        assert!(lasts(5, 1, 10) && lasts(5, 3, 9));
        assert!(!lasts(5, 3, 10), "nothing moved for long");
        assert!(!lasts(21, 1, 9), "nor shall it last for ever");
    }

    #[test]
    fn chunks_take_their_size_from_the_time_they_take() {
        let mut chunk = Chunk::new();
        let sizes = |chunk: &mut Chunk, us_per_page: u64| {
            let mut seen = Vec::new();
            for _ in 0..6 {
                seen.push(chunk.pages_of(12));
                chunk.took(Duration::from_micros(us_per_page * chunk.pages));
            }
            seen
        };
        assert_eq!(sizes(&mut chunk, 1), [64; 6], "never more");
        assert_eq!(sizes(&mut chunk, 10), [64, 32, 16, 16, 16, 16]);
        assert_eq!(sizes(&mut chunk, 1000), [16, 8, 4, 4, 4, 4], "never less");
        assert_eq!(sizes(&mut chunk, 1), [4, 8, 16, 32, 64, 64], "and back");
        assert_eq!(chunk.pages_of(21), 1, "a huge page is a chunk");
    }
}
