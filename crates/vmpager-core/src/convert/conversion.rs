//! One conversion, step by step.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Contents, Kind};

/// What a back-end does next. Ranges are those of page numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Who has pages of the other kind can reach these no more. They are
    /// contiguous, perhaps across slots. If it fails, some may be closed.
    Close {
        /// The pages.
        pages: Range<u64>,
        /// The kind they are to have.
        to: Kind,
    },
    /// What pages of that kind hold here is gone. They lie in one slot. If it
    /// fails, it may be gone or not.
    Discard {
        /// The pages.
        pages: Range<u64>,
        /// The kind of the memory that is emptied.
        of: Kind,
    },
    /// Who has pages of this kind can reach these, which were closed for it. They
    /// are contiguous, perhaps across slots.
    Open {
        /// The pages.
        pages: Range<u64>,
        /// The kind.
        to: Kind,
    },
    /// The same for pages that may be closed, open, or open to others: the way
    /// back.
    Reopen {
        /// The pages.
        pages: Range<u64>,
        /// The kind.
        to: Kind,
    },
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Memory that an earlier failure left behind where the pages go.
    Clear,
    Close,
    Discard,
    Open,
    /// What an earlier failure left open to nobody.
    Repair,
    /// Back to where they were.
    Reopen,
    /// What came into the memory they do not go to.
    Withdraw,
    Over,
}

/// A conversion that was begun, and must be finished.
#[derive(Debug)]
pub struct Conversion {
    pub(super) pages: Range<u64>,
    pub(super) to: Kind,
    contents: Contents,
    in_place: bool,
    /// Pages that change, cut at slots.
    pieces: Vec<Range<u64>>,
    /// Pages that have the kind, but were open to nobody.
    repairs: Vec<Range<u64>>,
    /// How many of the pieces have changed.
    changed: usize,
    phase: Phase,
    /// What is left of the phase.
    left: VecDeque<Range<u64>>,
    failed: Option<Step>,
    pub(super) opened: Vec<Range<u64>>,
    closed: Vec<Range<u64>>,
    stale: Vec<Range<u64>>,
}

/// What a conversion is made of, in order, cut at slots.
#[derive(Debug)]
pub(super) struct Parts {
    /// Pages that change.
    pub(super) pieces: Vec<Range<u64>>,
    /// Pages that have the kind, but are open to nobody.
    pub(super) repairs: Vec<Range<u64>>,
    /// Those of the pages that change for which there may be something in memory
    /// of the kind they are to have.
    pub(super) stale: Vec<Range<u64>>,
}

impl Conversion {
    pub(super) fn new(
        pages: Range<u64>,
        to: Kind,
        contents: Contents,
        in_place: bool,
        parts: Parts,
    ) -> Self {
        Self {
            pages,
            to,
            contents,
            in_place,
            pieces: parts.pieces,
            repairs: parts.repairs,
            changed: 0,
            phase: Phase::Clear,
            left: parts.stale.into(),
            failed: None,
            opened: Vec::new(),
            closed: Vec::new(),
            stale: Vec::new(),
        }
    }

    /// What to do now; `None` if it is over. The same again until it is
    /// [answered](Self::answer).
    pub fn next_step(&mut self) -> Option<Step> {
        while self.left.is_empty() {
            self.begin_next_phase()?;
        }
        let (pages, to) = (self.left.front()?.clone(), self.to);
        match self.phase {
            Phase::Clear | Phase::Withdraw => Some(Step::Discard { pages, of: to }),
            Phase::Close => Some(Step::Close { pages, to }),
            Phase::Discard => Some(Step::Discard { pages, of: to.other() }),
            Phase::Open => Some(Step::Open { pages, to }),
            Phase::Repair => Some(Step::Reopen { pages, to }),
            Phase::Reopen => Some(Step::Reopen { pages, to: to.other() }),
            Phase::Over => None,
        }
    }

    /// Whether the step was done.
    pub fn answer(&mut self, is_done: bool) {
        let Some(step) = self.next_step() else { return };
        let Some(pages) = self.left.pop_front() else { return };
        if is_done {
            match self.phase {
                Phase::Discard => self.changed += 1,
                Phase::Open | Phase::Repair | Phase::Reopen => self.opened.push(pages),
                _ => {}
            }
            return;
        }
        self.failed.get_or_insert(step);
        match self.phase {
            // Nothing has changed so far.
            Phase::Clear => self.enter(Phase::Over),
            // Some of it may be closed: all go back.
            Phase::Close => self.enter(Phase::Reopen),
            // Those before it have lost their contents, and go on.
            Phase::Discard => self.left.clear(),
            Phase::Open | Phase::Repair => self.closed.push(pages),
            Phase::Reopen => {
                // Where to close is to open to the others, they may come back.
                if !self.in_place {
                    self.stale.push(pages.clone());
                }
                self.closed.push(pages);
            }
            Phase::Withdraw => self.stale.push(pages),
            Phase::Over => {}
        }
    }

    fn begin_next_phase(&mut self) -> Option<()> {
        let next = match self.phase {
            Phase::Clear => Phase::Close,
            Phase::Close => Phase::Discard,
            Phase::Discard => Phase::Open,
            Phase::Open => Phase::Repair,
            Phase::Repair => Phase::Reopen,
            Phase::Reopen => Phase::Withdraw,
            Phase::Withdraw | Phase::Over => Phase::Over,
        };
        self.enter(next);
        (next != Phase::Over).then_some(())
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        let (changed, unchanged) = self.pieces.split_at(self.changed);
        self.left = match phase {
            Phase::Clear | Phase::Over => VecDeque::new(),
            Phase::Close => joined(&self.pieces).into(),
            Phase::Discard if self.contents == Contents::Preserve => {
                self.changed = self.pieces.len();
                VecDeque::new()
            }
            Phase::Discard => self.pieces.clone().into(),
            Phase::Open => joined(changed).into(),
            Phase::Repair => joined(&self.repairs).into(),
            Phase::Reopen => joined(unchanged).into(),
            Phase::Withdraw if self.in_place => VecDeque::new(),
            Phase::Withdraw => unchanged.to_vec().into(),
        };
    }

    /// What came of it, once it is over.
    pub(super) fn outcome(self) -> Outcome {
        let (changed, unchanged) = self.pieces.split_at(self.changed);
        Outcome {
            to: self.to,
            converted: joined(changed),
            unconverted: joined(unchanged),
            closed: self.closed,
            stale: self.stale,
            failed: self.failed,
        }
    }
}

/// Ranges in order, those that touch made one.
fn joined(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range.clone()),
        }
    }
    joined
}

/// What came of a conversion. Ranges are those of page numbers, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The kind asked for.
    pub to: Kind,
    /// Pages that have it now and had not before.
    pub converted: Vec<Range<u64>>,
    /// Pages that should have it and do not: they have the other kind, and what
    /// they held. (Of those whose discarding [failed](Self::failed) some may be
    /// zeroes.)
    pub unconverted: Vec<Range<u64>>,
    /// Pages that could be opened to nobody. The next conversion that
    /// includes them tries again, whatever it asks for.
    pub closed: Vec<Range<u64>>,
    /// Unconverted pages for which something may be left in memory of the kind
    /// asked for. It is discarded before they are converted again.
    pub stale: Vec<Range<u64>>,
    /// The first step that failed.
    pub failed: Option<Step>,
}

/// An outcome in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Every page has the kind asked for.
    Done,
    /// A step failed, and all is as it was.
    Undone,
    /// A step failed, and some of it stands.
    Stands,
}

impl Outcome {
    /// In a word.
    pub fn state(&self) -> State {
        if self.failed.is_none() {
            State::Done
        } else if self.converted.is_empty() && self.closed.is_empty() && self.stale.is_empty() {
            State::Undone
        } else {
            State::Stands
        }
    }
}
