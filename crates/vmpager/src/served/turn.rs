//! A memory's turn: some of its faults are served, then the next memory has one.

use std::time::Instant;

use super::{Lost, Pending, Served};
use crate::reads::Reads;

/// From so many faults at once on, their waiters are woken together: they
/// come from more threads than there are CPUs idle, likely.
const MANY: usize = 4;

/// The most faults whose waiters are woken together: the first one waits for
/// the pages of the others.
const WAKE_TOGETHER: usize = 16;

/// What a turn came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// Faults were served.
    pub(crate) any: bool,
    /// Others wait for the next turn.
    pub(crate) more: bool,
}

impl Served {
    /// Serves up to `most` of the faults that are pending, and those put off that are
    /// due.
    pub(crate) fn serve(&mut self, reads: &mut Reads, most: usize) -> Result<Turn, Lost> {
        let now = self.read_events()?;
        let mut any = false;
        // First: what has to wait now sets when it is tried again.
        if self.retry.at.is_some_and(|at| at <= now) {
            any |= self.serve_retries(reads)?;
        }
        if !self.faults.is_empty() && self.may_take_demanded(now) {
            self.serve_faults(most, now, reads)?;
            any = true;
        }
        Ok(Turn { any, more: any && !self.faults.is_empty() })
    }

    fn serve_faults(&mut self, most: usize, now: Instant, reads: &mut Reads) -> Result<(), Lost> {
        self.not_quiet(now);
        let mut left = most.min(self.faults.len());
        // With reads in flight, their waiters would be woken along, in vain.
        let together = left >= MANY && reads.is_idle();
        while left > 0 && self.may_take_demanded(now) {
            // The first has waited longest, for other memories' turns perhaps.
            let since = self.faults.front().map_or(now, |fault| fault.since);
            if together {
                self.let_sleep();
            }
            let some = left.min(WAKE_TOGETHER);
            let result = self.serve_some(some, reads);
            // Also of pages installed before one that failed.
            self.wake_all(since)?;
            result?;
            left -= some;
        }
        Ok(())
    }

    /// Serves so many of the faults read.
    fn serve_some(&mut self, some: usize, reads: &mut Reads) -> Result<(), Lost> {
        for _ in 0..some {
            let Some(Pending { hva, view, since }) = self.faults.pop_front() else { break };
            self.outside.serving = view;
            let served = self.fault(hva, since, reads);
            self.outside.serving = None;
            served?;
        }
        Ok(())
    }
}
