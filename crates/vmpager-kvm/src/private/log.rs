//! What conversions there were.

use std::collections::VecDeque;
use std::time::Duration;

use vmpager_core::convert::{Kind, Outcome, Request, State};

/// So many conversions are kept, the latest.
const KEPT: usize = 1024;

/// Who asked for a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The guest, by a hypercall or a device.
    Hypercall,
    /// A guest's access to a page of the other kind.
    Fault,
    /// The VMM.
    Host,
}

/// A conversion that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// How many there were before.
    pub number: u64,
    /// Who asked.
    pub cause: Cause,
    /// For what.
    pub request: Request,
    /// What came of it.
    pub outcome: Outcome,
    /// From the request on, waiting for others included.
    pub took: Duration,
}

/// What conversions there were, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConversionStats {
    /// Conversions that guests asked for.
    pub explicit: u64,
    /// Conversions for accesses to pages of the other kind.
    pub implicit: u64,
    /// Conversions the VMM asked for.
    pub host: u64,
    /// Of all these, those of pages that had the kind already.
    pub nothing: u64,
    /// Pages that became private.
    pub private_pages: u64,
    /// Pages that became shared.
    pub shared_pages: u64,
    /// Conversions that failed and left all as it was.
    pub undone: u64,
    /// Conversions that failed and left something changed.
    pub stands: u64,
    /// Requests that made no sense.
    pub refused: u64,
    /// Times a conversion waited for another.
    pub waited: u64,
    /// Faults that were tried again, since their page was being converted or just
    /// had been.
    pub retried: u64,
}

#[derive(Debug)]
pub(super) struct Log {
    stats: ConversionStats,
    begun: u64,
    latest: VecDeque<Logged>,
}

impl Log {
    /// Of no conversion so far, with room for all that is kept.
    pub(super) fn new() -> Self {
        let stats = ConversionStats::default();
        Self { stats, begun: 0, latest: VecDeque::with_capacity(KEPT) }
    }

    pub(super) fn add(&mut self, cause: Cause, request: Request, outcome: Outcome, took: Duration) {
        self.count(cause);
        match outcome.to {
            Kind::Private => self.stats.private_pages += outcome.converted.pages(),
            Kind::Shared => self.stats.shared_pages += outcome.converted.pages(),
        }
        match outcome.state() {
            State::Done => {}
            State::Undone => self.stats.undone += 1,
            State::Stands => self.stats.stands += 1,
        }
        if self.latest.len() == KEPT {
            self.latest.pop_front();
        }
        let number = self.begun;
        self.latest.push_back(Logged { number, cause, request, outcome, took });
        self.begun += 1;
    }

    fn count(&mut self, cause: Cause) {
        match cause {
            Cause::Hypercall => self.stats.explicit += 1,
            Cause::Fault => self.stats.implicit += 1,
            Cause::Host => self.stats.host += 1,
        }
    }

    pub(super) fn nothing(&mut self, cause: Cause) {
        self.count(cause);
        self.stats.nothing += 1;
    }

    pub(super) fn refused(&mut self) {
        self.stats.refused += 1;
    }

    pub(super) fn waited(&mut self) {
        self.stats.waited += 1;
    }

    pub(super) fn retried(&mut self) {
        self.stats.retried += 1;
    }

    pub(super) fn stats(&self) -> ConversionStats {
        self.stats
    }

    pub(super) fn latest(&self) -> Vec<Logged> {
        self.latest.iter().cloned().collect()
    }
}
