//! Runs of pages.

use std::ops::{Deref, Range};

use smallvec::SmallVec;

/// Ranges of page numbers, in order. One, as conversions mostly have, takes no memory from
/// the allocator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs(SmallVec<[Range<u64>; 1]>);

impl Runs {
    /// How many pages there are in all of them.
    pub fn pages(&self) -> u64 {
        self.iter().map(|run| run.end - run.start).sum()
    }

    /// One more, behind all others.
    pub(super) fn push(&mut self, run: Range<u64>) {
        self.0.push(run);
    }
}

impl Deref for Runs {
    type Target = [Range<u64>];

    fn deref(&self) -> &[Range<u64>] {
        &self.0
    }
}

impl<const N: usize> PartialEq<[Range<u64>; N]> for Runs {
    fn eq(&self, others: &[Range<u64>; N]) -> bool {
        **self == others[..]
    }
}
