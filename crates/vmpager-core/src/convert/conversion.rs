//! One conversion, step by step.

use std::ops::Range;

use super::{Contents, Kind, Runs};

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
    parts: Parts,
    /// How many of the pieces have changed.
    changed: usize,
    phase: Phase,
    /// Which of the phase's runs is next.
    at: usize,
    /// The pages of the step that is next, and how many of the phase's runs they are.
    next: Option<(Range<u64>, usize)>,
    failed: Option<Step>,
    pub(super) opened: Runs,
    closed: Runs,
    stale: Runs,
}

/// What a conversion is made of, in order, cut at slots.
#[derive(Debug)]
pub(super) struct Parts {
    /// Pages that change.
    pub(super) pieces: Runs,
    /// Pages that have the kind, but are open to nobody.
    pub(super) repairs: Runs,
    /// Those of the pages that change for which there may be something in memory
    /// of the kind they are to have.
    pub(super) stale: Runs,
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
            phase: if parts.stale.is_empty() { Phase::Close } else { Phase::Clear },
            parts,
            changed: 0,
            at: 0,
            next: None,
            failed: None,
            opened: Runs::default(),
            closed: Runs::default(),
            stale: Runs::default(),
        }
    }

    /// What to do now; `None` if it is over. The same again until it is
    /// [answered](Self::answer).
    pub fn next_step(&mut self) -> Option<Step> {
        while self.next.is_none() {
            self.next = self.next_run();
            if self.next.is_none() {
                self.begin_next_phase()?;
            }
        }
        let (pages, _) = self.next.as_ref()?;
        self.step(pages.clone())
    }

    /// Whether the step was done.
    pub fn answer(&mut self, is_done: bool) {
        let Some((pages, runs)) = self.next.take() else { return };
        self.at += runs;
        if is_done {
            match self.phase {
                Phase::Discard => self.changed += 1,
                Phase::Open | Phase::Repair | Phase::Reopen => self.opened.push(pages),
                _ => {}
            }
            return;
        }
        if self.failed.is_none() {
            self.failed = self.step(pages.clone());
        }
        match self.phase {
            // Nothing has changed so far.
            Phase::Clear => self.enter(Phase::Over),
            // Some of it may be closed: all go back.
            Phase::Close => self.enter(Phase::Reopen),
            // Those before it have lost their contents, and go on.
            Phase::Discard => self.enter(Phase::Open),
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

    /// The step of this phase for these pages.
    fn step(&self, pages: Range<u64>) -> Option<Step> {
        let to = self.to;
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

    /// The pages of the phase's next step, and how many of its runs they are.
    fn next_run(&self) -> Option<(Range<u64>, usize)> {
        let Parts { pieces, repairs, stale } = &self.parts;
        let (changed, unchanged) = pieces.split_at(self.changed);
        match self.phase {
            Phase::Clear => one(stale, self.at),
            Phase::Close => joined(pieces, self.at),
            Phase::Discard => one(pieces, self.at),
            Phase::Open => joined(changed, self.at),
            Phase::Repair => joined(repairs, self.at),
            Phase::Reopen => joined(unchanged, self.at),
            Phase::Withdraw if !self.in_place => one(unchanged, self.at),
            Phase::Withdraw | Phase::Over => None,
        }
    }

    fn begin_next_phase(&mut self) -> Option<()> {
        let next = match self.phase {
            Phase::Clear => Phase::Close,
            Phase::Close if self.contents == Contents::Preserve => {
                self.changed = self.parts.pieces.len();
                Phase::Open
            }
            Phase::Close => Phase::Discard,
            Phase::Discard => Phase::Open,
            // As a rule.
            Phase::Open if self.failed.is_none() && self.parts.repairs.is_empty() => Phase::Over,
            Phase::Open => Phase::Repair,
            Phase::Repair => Phase::Reopen,
            Phase::Reopen => Phase::Withdraw,
            Phase::Withdraw | Phase::Over => Phase::Over,
        };
        self.enter(next);
        (next != Phase::Over).then_some(())
    }

    fn enter(&mut self, phase: Phase) {
        (self.phase, self.at) = (phase, 0);
    }

    /// What came of it, once it is over.
    pub(super) fn outcome(self) -> Outcome {
        let (changed, unchanged) = self.parts.pieces.split_at(self.changed);
        Outcome {
            to: self.to,
            converted: all_joined(changed),
            unconverted: all_joined(unchanged),
            closed: self.closed,
            stale: self.stale,
            failed: self.failed,
        }
    }
}

/// The run of that number.
fn one(runs: &[Range<u64>], at: usize) -> Option<(Range<u64>, usize)> {
    runs.get(at).map(|run| (run.clone(), 1))
}

/// The same with those after it that touch, made one, and how many these are.
fn joined(runs: &[Range<u64>], at: usize) -> Option<(Range<u64>, usize)> {
    let (first, others) = runs.get(at..)?.split_first()?;
    let (mut joined, mut count) = (first.clone(), 1);
    for run in others {
        if run.start != joined.end {
            break;
        }
        (joined.end, count) = (run.end, count + 1);
    }
    Some((joined, count))
}

fn all_joined(runs: &[Range<u64>]) -> Runs {
    let (mut all, mut at) = (Runs::default(), 0);
    while let Some((run, count)) = joined(runs, at) {
        all.push(run);
        at += count;
    }
    all
}

/// What came of a conversion. Ranges are those of page numbers, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The kind asked for.
    pub to: Kind,
    /// Pages that have it now and had not before.
    pub converted: Runs,
    /// Pages that should have it and do not: they have the other kind, and what
    /// they held. (Of those whose discarding [failed](Self::failed) some may be
    /// zeroes.)
    pub unconverted: Runs,
    /// Pages that could be opened to nobody. The next conversion that
    /// includes them tries again, whatever it asks for.
    pub closed: Runs,
    /// Unconverted pages for which something may be left in memory of the kind
    /// asked for. It is discarded before they are converted again.
    pub stale: Runs,
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
