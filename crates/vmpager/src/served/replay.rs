//! Profiles: bringing in what one says is needed, and recording what it would have
//! to say.

use std::sync::Arc;
use std::time::Instant;

use vmpager_core::prefetch::Prefetch;
use vmpager_core::prefetch::limits::LONG;
use vmpager_core::{ByteRange, FaultPlan, PageRun, PageSize, Piece, Priority};
use vmpager_store::profile::{Recorder, Touch};

use super::install::Put;
use super::{Lost, Served, at_hand};
use crate::reads::Reads;

/// Bytes a source is told of when the replay first finds something that is not at
/// hand; twice as many each further time, so that a profile that is wrong does not
/// cause much to be read.
const FIRST_AHEAD: u64 = 1 << 20;
/// The most bytes it is told of at a time.
const MOST_AHEAD: u64 = 16 << 20;
/// And the most ranges: a call each, where they are far from each other.
const MOST_RANGES: usize = 512;

/// How far a source was told what the replay will need.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Runs of the replay it was told of and that are still to come.
    runs: usize,
    bytes: u64,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { runs: 0, bytes: FIRST_AHEAD }
    }
}

impl Served {
    /// Whether a profile is being replayed: its turn is before the fill.
    pub(super) fn is_replaying(&self) -> bool {
        self.engine.replaying().is_some_and(|replay| replay.next().is_some())
    }

    /// Whether there is a profile that has not been replayed to its end.
    pub(super) fn has_profile(&self) -> bool {
        self.engine.replaying().is_some_and(|replay| !replay.is_done())
    }

    /// One piece of the replay. Whether pages were installed, or are being read.
    pub(super) fn replay(&mut self, reads: &mut Reads) -> Result<bool, Lost> {
        let piece = self.engine.replay_piece();
        let until = Instant::now() + LONG;
        let mut done = 0;
        while done < piece && self.may_replay(reads) && (done == 0 || Instant::now() < until) {
            let most = self.chunk.pages_of(PageSize::Size4K.shift()).min(piece - done);
            let before = self.runs_to_come();
            let Some(piece) = self.engine.next_replayed(most) else { break };
            let run = piece.run();
            self.ahead.runs = self.ahead.runs.saturating_sub(before - self.runs_to_come());
            match piece {
                Piece::Fetch(run) => self.replay_fetch(run, reads)?,
                Piece::Zero(run) => self.fill_zeroes(run, reads)?,
            }
            done += self.address(run).1 >> PageSize::Size4K.shift();
        }
        if !self.has_profile() {
            self.counters.profile_took.get_or_insert(self.counters.started.elapsed());
        }
        Ok(done > 0)
    }

    fn may_replay(&mut self, reads: &Reads) -> bool {
        reads.may_prefetch() && self.retry.at.is_none() && self.may_take(Instant::now())
    }

    fn runs_to_come(&self) -> usize {
        self.engine.replaying().map_or(0, |replay| replay.ahead().len())
    }

    /// Installs a claimed run of the profile, or has it read.
    fn replay_fetch(&mut self, run: PageRun, reads: &mut Reads) -> Result<(), Lost> {
        let (_, range) = self.engine.slots().locate(run);
        match at_hand(&mut *reads.reader, range) {
            Ok(Some(data)) => {
                let end = self.put(run, Put::Bytes(data.address()))?;
                self.took(range.len, 0);
                self.counters.pages_profile += end.pages;
                self.put_off_rest(end, reads)
            }
            Ok(None) => {
                self.tell_ahead(reads);
                reads.submit(self.background(run, Priority::Prefetch, None));
                Ok(())
            }
            Err(error) => {
                let read = self.background(run, Priority::Prefetch, None);
                self.read_failed(read, &error, reads)
            }
        }
    }

    /// Tells the source what comes after a run that is not at hand, unless it was
    /// told.
    fn tell_ahead(&mut self, reads: &mut Reads) {
        if self.ahead.runs > 0 {
            return;
        }
        let Some(replay) = self.engine.replaying() else { return };
        let mut bytes = 0;
        let next = replay.ahead().iter().map(|run| self.engine.slots().locate(*run).1);
        let next: Vec<ByteRange> = next
            .take(MOST_RANGES)
            .take_while(|range| {
                bytes += range.len;
                bytes <= self.ahead.bytes
            })
            .collect();
        self.ahead = Ahead { runs: next.len(), bytes: (self.ahead.bytes * 2).min(MOST_AHEAD) };
        reads.reader.will_need(&next);
    }

    /// Leaves what was recorded to whoever collects it.
    pub(crate) fn end_recording(&mut self) {
        if let Some(recording) = self.recording.take() {
            recording.recorder.add_session(&recording.touches);
        }
    }

    pub(super) fn record(&mut self, plan: FaultPlan, since: Instant) {
        let page = match plan {
            FaultPlan::Fetch { page, .. }
            | FaultPlan::InFlight(page)
            | FaultPlan::Confirm(page) => page,
            FaultPlan::Zero(run) => run.first,
            FaultPlan::Poisoned(_) => return,
        };
        let (_, range) = self.engine.slots().locate(PageRun::new(page, 1));
        let at = since.saturating_duration_since(self.counters.started);
        if let Some(recording) = &mut self.recording {
            recording.touched(range, u32::try_from(at.as_micros()).unwrap_or(u32::MAX));
        }
    }
}

/// What a session records: a bit for each page of the source, and eight bytes for
/// each that was touched.
#[derive(Debug)]
pub(super) struct Recording {
    recorder: Arc<Recorder>,
    seen: Vec<u64>,
    touches: Vec<Touch>,
}

impl Recording {
    pub(super) fn new(recorder: &Arc<Recorder>) -> Self {
        Self { recorder: Arc::clone(recorder), seen: Vec::new(), touches: Vec::new() }
    }

    /// All base pages of a range were touched.
    fn touched(&mut self, range: ByteRange, at_us: u32) {
        for page in range.start / 4096..range.end().div_ceil(4096) {
            let word = usize::try_from(page / 64).unwrap_or(usize::MAX);
            if self.seen.len() <= word {
                self.seen.resize(word + 1, 0);
            }
            if self.seen[word] >> (page % 64) & 1 == 0
                && let Ok(number) = u32::try_from(page)
            {
                self.seen[word] |= 1 << (page % 64);
                self.touches.push(Touch { page: number, at_us });
            }
        }
    }
}
