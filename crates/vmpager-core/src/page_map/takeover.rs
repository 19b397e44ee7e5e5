//! Going on with a map that a process which has ended left in memory of a file.
//!
//! That file has holes: most VMs touch little of their memory. To look at a hole
//! through a mapping is to fill it, and many maps are taken over while VMs wait. So
//! what was never written is not looked at.

use std::ops::Range;

use super::{EVEN, PageMap, Words, fields, spread, to_index, words_for};
use crate::addr::PageRun;
use crate::present::{MapError, read_header};
use crate::sync::Ordering;

/// What is still to be done in a map that was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Pages whose bytes are still to come from the source.
    pub outstanding: u64,
    /// Pages in small holes of the source that have no memory yet.
    pub holes: u64,
}

impl<W: Words> PageMap<W> {
    /// Takes over the map of `pages` pages that a process which has ended left in
    /// these words. What it had claimed is to be fetched again.
    ///
    /// `written` are the words that may be other than zero, in any order, each once;
    /// the header and the absent bitmap are read in any case.
    ///
    /// # Errors
    ///
    /// If it has another layout, or is of other pages.
    pub fn take_over(
        words: W,
        pages: u64,
        written: &[Range<usize>],
    ) -> Result<(Self, Unfinished), MapError> {
        let noted = read_header(&words)?;
        let len = words.words().len();
        if noted != pages || len < words_for(pages) {
            return Err(MapError::Field { field: "number of pages", value: noted, words: len });
        }
        let map = Self::over(words, pages);
        let content = within(written, map.content..map.holes);
        let settled: u64 = content.map(|at| map.take_back((at - map.content) as u64)).sum();
        let holes = within(written, map.holes..map.holes + to_index(pages.div_ceil(64)));
        let holes =
            holes.map(|at| u64::from(map.words.words()[at].load(Ordering::Acquire).count_ones()));
        let unfinished = Unfinished { outstanding: pages - settled, holes: holes.sum() };
        Ok((map, unfinished))
    }

    /// Takes back the claims in a content word. Returns how many of its pages need
    /// nothing of the source any more.
    fn take_back(&self, word: u64) -> u64 {
        let seen = self.content_word(word).load(Ordering::Acquire);
        // All of them are `Source`, and so absent.
        if seen == 0 {
            return 0;
        }
        let run = PageRun::new(word * 32, (self.pages - word * 32).min(32));
        let present = spread(self.present_bits(word / 2) >> (32 * (word % 2)));
        if seen & !(seen >> 1) & EVEN & !present != 0 {
            self.release(run);
        }
        u64::from(((seen >> 1 | present) & fields(0, run.count)).count_ones())
    }
}

/// The words of `part` that are in one of these ranges.
fn within(ranges: &[Range<usize>], part: Range<usize>) -> impl Iterator<Item = usize> + '_ {
    ranges.iter().flat_map(move |range| range.start.max(part.start)..range.end.min(part.end))
}
