//! The page map: what is known of every page, in atomic words that may lie in
//! memory shared between processes.
//!
//! ```text
//!            claim                publish
//!   Source ---------> Claimed --------------> Claimed + present
//!     ^                | | \
//!     +----- release --+ |  +-- poison ----> Poisoned
//!                        |
//!   any state ----- mark_zero -----> Zero  -- publish --> Zero + present
//! ```
//!
//! Three facts are kept per page, four bits in all:
//!
//! - the **present bit**: the page's contents are in place. Set with release
//!   ordering after the install, read with acquire (I1). It is advice to those
//!   who read it: a removal that the pager has not heard of yet may have taken
//!   the page away, so a fault is never answered on its strength alone.
//! - the **content**, two bits: where the page's bytes come from. `Zero` is
//!   for ever: once a page was given back it never reads as source bytes
//!   again, whichever thread, or successor of a crashed process, looks (I3).
//!
//! - the **hole bit**: the page is zero because it lies in a small hole of the
//!   source, and the background fill shall give it memory all the same (see
//!   [`Engine::known_zero`](crate::Engine::known_zero)). Cleared once it has
//!   some, or was given back.
//!
//! A claim is what makes fetching single-flight (I2): of all who want a page,
//! the one whose compare-and-swap turns `Source` into `Claimed` fetches it.
//!
//! # Layout, in 64-bit words
//!
//! | words | what |
//! |---|---|
//! | 0 | magic, `b"VMPGMAP\0"` little-endian |
//! | 1 | version of this layout: 2 |
//! | 2 | number of pages, n |
//! | 3 | word at which the absent bitmap starts: 512, a page of its own |
//! | 4 | number of slots in the table, which follows once the map is shared |
//! | 5..8 | zero, reserved |
//! | 8..512 | four words a slot: gpa, first page, number of pages, page size in bytes |
//! | 512.. | **absent** bitmap: bit `p % 64` of word `p / 64`, ceil(n / 64) words |
//! | then | content, 2 bits a page: bits `2 * (p % 32)` of word `p / 32`, ceil(n / 32) words |
//! | then | hole bitmap, as the absent bitmap, ceil(n / 64) words |
//!
//! The present bits are stored inverted: a set bit is an absent page. That is
//! what KVM's proposed userfault bitmap wants, one bit a page from a memslot's
//! first one on, in words of its own: a slot whose first page is a multiple of
//! 64 can be handed over as it lies. What other processes may rely on is in
//! `docs/sharing.md`.

mod takeover;

use std::ops::Deref;

pub use self::takeover::Unfinished;
use crate::addr::PageRun;
use crate::sync::{AtomicU64, Ordering};

/// Words before the bitmap: 4 KiB, so that the bitmap can be mapped by itself.
/// The model checker keeps a history of each, and has no slot table.
pub(crate) const HEADER_WORDS: usize = if cfg!(loom) { 8 } else { 512 };
/// Words before the slot table.
pub(crate) const TABLE: usize = 8;
/// Words a slot takes in the table.
pub(crate) const SLOT_WORDS: usize = 4;
/// The most slots the table holds.
pub const MAX_SLOTS: usize = (HEADER_WORDS - TABLE) / SLOT_WORDS;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"VMPGMAP\0");
/// The version of the layout.
pub const VERSION: u64 = 2;
/// Bit 0 of every two-bit field.
const EVEN: u64 = 0x5555_5555_5555_5555;

/// Memory for a page map: a boxed slice, a vector, or shared memory.
pub trait Words {
    /// The words, the same ones at every call.
    fn words(&self) -> &[AtomicU64];
}

impl<T: Deref<Target = [AtomicU64]>> Words for T {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// Words that can be read, and perhaps no more than that.
pub trait LoadWords {
    /// How many there are.
    fn count(&self) -> usize;

    /// What a word holds, with acquire ordering. None beyond the last.
    fn load(&self, index: usize) -> Option<u64>;
}

impl<W: Words> LoadWords for W {
    fn count(&self) -> usize {
        self.words().len()
    }

    #[inline]
    fn load(&self, index: usize) -> Option<u64> {
        self.words().get(index).map(|word| word.load(Ordering::Acquire))
    }
}

/// Where a page's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// From the source; nobody has asked for them yet.
    Source,
    /// From the source; somebody is fetching them or (if present) has.
    Claimed,
    /// Zeroes: a hole in the source, or given back by the guest.
    Zero,
    /// The source says they cannot be had.
    Poisoned,
}

impl Content {
    const fn bits(self) -> u64 {
        match self {
            Self::Source => 0b00,
            Self::Claimed => 0b01,
            Self::Zero => 0b10,
            Self::Poisoned => 0b11,
        }
    }

    const fn from_bits(bits: u64) -> Self {
        match bits & 0b11 {
            0b00 => Self::Source,
            0b01 => Self::Claimed,
            0b10 => Self::Zero,
            _ => Self::Poisoned,
        }
    }
}

/// A slot as the table of a shared map describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSlot {
    /// The guest-physical address of its first byte.
    pub gpa: u64,
    /// The page index of its first page.
    pub first_page: u64,
    /// Its number of pages.
    pub pages: u64,
    /// Their size in bytes.
    pub page_size: u64,
}

/// The state of every page. See the [module](self) for states and layout.
#[derive(Debug)]
pub struct PageMap<W> {
    words: W,
    pages: u64,
    /// Index of the first content word.
    content: usize,
    /// Index of the first word of the hole bitmap.
    holes: usize,
}

/// How many words a map of that many pages needs, header included.
pub fn words_for(pages: u64) -> usize {
    let words = 2 * pages.div_ceil(64) + pages.div_ceil(32);
    HEADER_WORDS + usize::try_from(words).expect("a page map fits the address space")
}

impl<W: Words> PageMap<W> {
    /// Makes a map of `pages` pages, all `Source`, in zeroed words.
    ///
    /// # Panics
    ///
    /// If there are fewer words than [`words_for`] says.
    pub fn new(words: W, pages: u64) -> Self {
        assert!(words.words().len() >= words_for(pages), "too few words for {pages} pages");
        for (i, value) in [MAGIC, VERSION, pages, HEADER_WORDS as u64].into_iter().enumerate() {
            words.words()[i].store(value, Ordering::Relaxed);
        }
        let map = Self::over(words, pages);
        for (word, mask) in present_masks(PageRun::new(0, pages)) {
            map.absent_word(word).store(mask, Ordering::Relaxed);
        }
        map
    }

    fn over(words: W, pages: u64) -> Self {
        let content = HEADER_WORDS + to_index(pages.div_ceil(64));
        let holes = content + to_index(pages.div_ceil(32));
        Self { words, pages, content, holes }
    }

    /// Writes the slot table, for processes the map is shared with. To be done
    /// before they get it.
    ///
    /// # Panics
    ///
    /// If there are more than [`MAX_SLOTS`].
    pub fn describe(&self, slots: &[MapSlot]) {
        assert!(slots.len() <= MAX_SLOTS, "{} slots, {MAX_SLOTS} fit", slots.len());
        for (i, slot) in slots.iter().enumerate() {
            let fields = [slot.gpa, slot.first_page, slot.pages, slot.page_size];
            for (j, field) in fields.into_iter().enumerate() {
                self.words.words()[TABLE + i * SLOT_WORDS + j].store(field, Ordering::Relaxed);
            }
        }
        self.words.words()[4].store(slots.len() as u64, Ordering::Release);
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The memory the map lies in.
    pub fn storage(&self) -> &W {
        &self.words
    }

    /// Whether a page's contents are in place and visible to the caller.
    pub fn is_present(&self, page: u64) -> bool {
        debug_assert!(page < self.pages);
        self.present_bits(page / 64) >> (page % 64) & 1 == 1
    }

    /// Whether all pages of a run are.
    pub fn are_present(&self, run: PageRun) -> bool {
        present_masks(run)
            .all(|(word, mask)| self.absent_word(word).load(Ordering::Acquire) & mask == 0)
    }

    /// Where a page's bytes come from.
    pub fn content(&self, page: u64) -> Content {
        debug_assert!(page < self.pages);
        Content::from_bits(self.content_word(page / 32).load(Ordering::Acquire) >> (page % 32 * 2))
    }

    /// Number of pages present.
    pub fn count_present(&self) -> u64 {
        (0..self.pages.div_ceil(64))
            .map(|w| 64 - u64::from(self.absent_word(w).load(Ordering::Acquire).count_ones()))
            .sum::<u64>()
            // Beyond the last page no bit is set.
            - (self.pages.next_multiple_of(64) - self.pages)
    }

    /// Claims as many pages as possible from `first` upwards, `max` at most:
    /// those that are `Source` and absent, up to the first that is not.
    /// Returns how many; they are the caller's to fetch, and to publish,
    /// release or poison.
    pub fn claim_up(&self, first: u64, max: u64) -> u64 {
        let end = first.saturating_add(max).min(self.pages);
        let mut page = first;
        while page < end {
            let offset = page % 32;
            let here = (32 - offset).min(end - page);
            let claimed = self.claim_in_word(page / 32, |free| {
                let taken = !(free >> (2 * offset)) & EVEN;
                let run = u64::from(taken.trailing_zeros() / 2).min(here);
                fields(offset, run)
            });
            page += claimed;
            if claimed < here {
                break;
            }
        }
        page - first
    }

    /// Claims as many pages as possible below `end`, downwards, `max` at most.
    /// Returns how many.
    pub fn claim_down(&self, end: u64, max: u64) -> u64 {
        let floor = end.saturating_sub(max);
        let mut page = end;
        while page > floor {
            let last = page - 1;
            let offset = last % 32;
            let here = (offset + 1).min(page - floor);
            let claimed = self.claim_in_word(last / 32, |free| {
                let taken = !(free << (62 - 2 * offset)) & EVEN;
                // Only even bits can be set: a taken field at the top has one
                // leading zero, and no taken field at all leaves 64.
                let run = u64::from(taken.leading_zeros() / 2).min(here);
                fields(offset + 1 - run, run)
            });
            page -= claimed;
            if claimed < here {
                break;
            }
        }
        end - page
    }

    /// Claims, within one content word, the fields that `choose` picks from
    /// the free ones (bit 0 of each field). Returns how many.
    fn claim_in_word(&self, word: u64, choose: impl Fn(u64) -> u64) -> u64 {
        let content = self.content_word(word);
        let mut seen = content.load(Ordering::Acquire);
        loop {
            let present = self.present_bits(word / 2);
            let present = spread(present >> (32 * (word % 2)));
            let free = !(seen | seen >> 1 | present) & EVEN;
            let mask = choose(free);
            if mask == 0 {
                return 0;
            }
            match content.compare_exchange_weak(
                seen,
                seen | mask,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return u64::from(mask.count_ones()),
                Err(now) => seen = now,
            }
        }
    }

    /// Gives claims back: the pages are `Source` again. Pages that are no
    /// longer merely claimed (present, or zeroed meanwhile) stay as they are.
    /// Returns how many were given back.
    pub fn release(&self, run: PageRun) -> u64 {
        self.retract(run, Content::Source)
    }

    /// Says of claimed pages that they cannot be had. Returns how many.
    pub fn poison(&self, run: PageRun) -> u64 {
        self.retract(run, Content::Poisoned)
    }

    fn retract(&self, run: PageRun, to: Content) -> u64 {
        let mut count = 0;
        for (word, mask) in content_masks(run) {
            let present = self.present_bits(word / 2);
            let absent = !spread(present >> (32 * (word % 2)));
            let content = self.content_word(word);
            let mut seen = content.load(Ordering::Acquire);
            loop {
                let claimed = seen & !(seen >> 1) & EVEN & mask & absent;
                if claimed == 0 {
                    break;
                }
                let new = seen & !(claimed * 0b11) | (claimed * to.bits());
                match content.compare_exchange_weak(seen, new, Ordering::AcqRel, Ordering::Acquire)
                {
                    Ok(_) => {
                        count += u64::from(claimed.count_ones());
                        break;
                    }
                    Err(now) => seen = now,
                }
            }
        }
        count
    }

    /// Says that pages' contents are in place. Returns how many of them were
    /// not known to be.
    pub fn publish(&self, run: PageRun) -> u64 {
        present_masks(run)
            .map(|(word, mask)| {
                let before = self.absent_word(word).fetch_and(!mask, Ordering::AcqRel);
                u64::from((mask & before).count_ones())
            })
            .sum()
    }

    /// Says that pages hold zeroes from now on and are absent: a hole in the
    /// source, or a range given back. Returns how many of them were neither
    /// present nor zero nor poisoned before.
    pub fn mark_zero(&self, run: PageRun) -> u64 {
        let mut count = 0;
        // Content first: who sees the page absent must not see `Source`.
        for (word, mask) in content_masks(run) {
            let content = self.content_word(word);
            let zeroed = |seen: u64| seen & !(mask * 0b11) | (mask * Content::Zero.bits());
            let mut seen = content.load(Ordering::Acquire);
            while let Err(now) = content.compare_exchange_weak(
                seen,
                zeroed(seen),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                seen = now;
            }
            let present = spread(self.present_bits(word / 2) >> (32 * (word % 2)));
            count += u64::from((!(seen >> 1) & EVEN & mask & !present).count_ones());
        }
        for (word, mask) in present_masks(run) {
            self.absent_word(word).fetch_or(mask, Ordering::AcqRel);
        }
        count
    }

    /// The first absent page of a run whose bytes are still to be fetched by
    /// somebody (`Source`).
    pub fn next_source(&self, within: PageRun) -> Option<u64> {
        let mut page = within.first;
        while page < within.end() {
            let word = page / 32;
            let seen = self.content_word(word).load(Ordering::Acquire);
            let present = self.present_bits(word / 2);
            let taken = seen | seen >> 1 | spread(present >> (32 * (word % 2)));
            let free = (!taken & EVEN) >> (2 * (page % 32));
            if free != 0 {
                let found = page + u64::from(free.trailing_zeros() / 2);
                return (found < within.end()).then_some(found);
            }
            page = (word + 1) * 32;
        }
        None
    }

    /// Says that zero pages lie in a small hole of the source.
    pub fn mark_holes(&self, run: PageRun) {
        for (word, mask) in present_masks(run) {
            self.hole_word(word).fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Says of pages that they need no memory for being in a hole. Returns how
    /// many were said to.
    pub fn clear_holes(&self, run: PageRun) -> u64 {
        present_masks(run)
            .map(|(word, mask)| {
                let before = self.hole_word(word).fetch_and(!mask, Ordering::AcqRel);
                u64::from((mask & before).count_ones())
            })
            .sum()
    }

    /// The first pages of a run that lie in a hole, within one word of the map.
    pub fn next_holes(&self, within: PageRun) -> Option<PageRun> {
        let mut page = within.first;
        while page < within.end() {
            let left = self.hole_word(page / 64).load(Ordering::Acquire) >> (page % 64);
            if left != 0 {
                let skip = left.trailing_zeros();
                let first = page + u64::from(skip);
                let count = u64::from((left >> skip).trailing_ones());
                let inside = within.end().checked_sub(first).filter(|pages| *pages > 0)?;
                return Some(PageRun::new(first, count.min(inside)));
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// How many pages from `first` on, `max` at most, have the same content
    /// and presence as it.
    pub fn alike_from(&self, first: u64, max: u64) -> u64 {
        let like = (self.content(first), self.is_present(first));
        let end = first.saturating_add(max).min(self.pages);
        let others = first + 1..end;
        1 + others.take_while(|&p| (self.content(p), self.is_present(p)) == like).count() as u64
    }

    /// Which pages of a word are present; those beyond the last one seem so.
    fn present_bits(&self, word: u64) -> u64 {
        !self.absent_word(word).load(Ordering::Acquire)
    }

    fn absent_word(&self, word: u64) -> &AtomicU64 {
        &self.words.words()[HEADER_WORDS + to_index(word)]
    }

    fn hole_word(&self, word: u64) -> &AtomicU64 {
        &self.words.words()[self.holes + to_index(word)]
    }

    fn content_word(&self, word: u64) -> &AtomicU64 {
        &self.words.words()[self.content + to_index(word)]
    }
}

fn to_index(word: u64) -> usize {
    usize::try_from(word).expect("a page map fits the address space")
}

/// Bit 0 of `count` two-bit fields from field `offset` on.
fn fields(offset: u64, count: u64) -> u64 {
    match count {
        0 => 0,
        _ => (EVEN >> (64 - 2 * count)) << (2 * offset),
    }
}

/// The low 32 bits, each moved to bit 0 of a two-bit field.
fn spread(bits: u64) -> u64 {
    let mut x = bits & 0xffff_ffff;
    x = (x | x << 16) & 0x0000_ffff_0000_ffff;
    x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
    x = (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    x = (x | x << 2) & 0x3333_3333_3333_3333;
    (x | x << 1) & EVEN
}

/// The present words a run touches, each with the mask of its pages.
fn present_masks(run: PageRun) -> impl Iterator<Item = (u64, u64)> {
    pieces(run, 64).map(|(word, offset, count)| (word, u64::MAX >> (64 - count) << offset))
}

/// The content words a run touches, each with bit 0 of its pages' fields.
fn content_masks(run: PageRun) -> impl Iterator<Item = (u64, u64)> {
    pieces(run, 32).map(|(word, offset, count)| (word, fields(offset, count)))
}

/// Cuts a run at multiples of `per_word`: (word, offset in it, pages in it).
fn pieces(run: PageRun, per_word: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut page = run.first;
    std::iter::from_fn(move || {
        let count = (per_word - page % per_word).min(run.end().checked_sub(page)?);
        if count == 0 {
            return None;
        }
        let piece = (page / per_word, page % per_word, count);
        page += count;
        Some(piece)
    })
}
