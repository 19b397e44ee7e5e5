//! Which 2 MiB of memory to make huge pages of.
//!
//! A guest pays for its first touch of every page that the host maps
//! separately; memory in huge pages costs it one fault for 2 MiB. Pages arrive
//! one by one, so [`HugePieces`] notes where some did, and hands out the
//! pieces that have become whole.

use std::collections::VecDeque;

use crate::addr::{PageRun, PageSize};
use crate::page_map::{PageMap, Words};
use crate::slot::SlotSet;

/// Base pages in a piece.
const PIECE: u64 = PageSize::Size2M.bytes() / PageSize::Size4K.bytes();

/// Pieces of 2 MiB of host addresses in which pages arrived.
#[derive(Debug, Default)]
pub struct HugePieces {
    /// One bit for each multiple of [`PIECE`] in the page map: whether the
    /// piece that starts in these pages is in `next`. Two cannot, since they do
    /// not overlap.
    noted: Vec<u64>,
    /// First pages.
    next: VecDeque<u64>,
}

impl HugePieces {
    /// For memory of that many pages. Costs a bit for each piece, and eight
    /// bytes while it waits for being looked at.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(PIECE * 64));
        Self { noted: vec![0; words.expect("a bit a piece fits")], next: VecDeque::new() }
    }

    /// Pages of one slot have arrived.
    pub fn arrived(&mut self, slots: &SlotSet, run: PageRun) {
        let mut page = run.first;
        while page < run.end() {
            let (piece, after) = piece_at(slots, page);
            if let Some(piece) = piece {
                self.note(piece.first);
            }
            page = after;
        }
    }

    fn note(&mut self, first: u64) {
        let (word, bit) = place(first);
        if let Some(word) = self.noted.get_mut(word)
            && *word & bit == 0
        {
            *word |= bit;
            self.next.push_back(first);
        }
    }

    /// Whether there is any to look at.
    pub fn is_empty(&self) -> bool {
        self.next.is_empty()
    }

    /// The next piece all of whose pages are present. Pieces that lack some are
    /// forgotten until a page of theirs arrives.
    pub fn next_whole<W: Words>(&mut self, map: &PageMap<W>) -> Option<PageRun> {
        while let Some(first) = self.next.pop_front() {
            let (word, bit) = place(first);
            self.noted[word] &= !bit;
            let piece = PageRun::new(first, PIECE);
            if map.are_present(piece) {
                return Some(piece);
            }
        }
        None
    }
}

/// The word and bit of `noted` for the piece that starts at a page.
fn place(first: u64) -> (usize, u64) {
    let index = first / PIECE;
    (usize::try_from(index / 64).unwrap_or(usize::MAX), 1 << (index % 64))
}

/// The piece that a page lies in, if it lies in a whole one; and the first page
/// after it, or after the part of the slot that is in none.
pub(crate) fn piece_at(slots: &SlotSet, page: u64) -> (Option<PageRun>, u64) {
    let (slot, all) = slots.slot_of(page);
    if slot.page_size != PageSize::Size4K {
        return (None, all.end());
    }
    let start = slot.hva.0.next_multiple_of(PageSize::Size2M.bytes()) - slot.hva.0;
    let start = all.first + (start >> PageSize::Size4K.shift());
    if page < start {
        return (None, start);
    }
    let first = page - (page - start) % PIECE;
    let end = first + PIECE;
    ((end <= all.end()).then(|| PageRun::new(first, PIECE)), end)
}
