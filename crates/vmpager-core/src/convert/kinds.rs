//! The kind of every page.

use std::ops::Range;

use super::conversion::Parts;
use super::{Contents, Conversion, Kind, Outcome, PAGE_BYTES, Refusal, Request, Runs};

/// Where the memory of the two kinds is, which decides what a conversion takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Places {
    /// Each kind has memory of its own, and nothing is moved between them
    /// (guest_memfd beside ordinary memory).
    Two,
    /// Pages stay where they are; only who can reach them changes.
    One,
}

/// The memslots whose pages can be converted, in order of their addresses.
#[derive(Clone, Debug)]
pub struct Slots {
    /// Page numbers.
    slots: Vec<Range<u64>>,
}

/// Why memslots cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// One is no whole pages, empty, or beyond the last address.
    #[error(transparent)]
    Range(#[from] Refusal),
    /// Two have the same address.
    #[error("two memslots have gpa {gpa:#x}; use each address once")]
    Overlap {
        /// The first address they share.
        gpa: u64,
    },
}

impl Slots {
    /// Slots of these guest-physical addresses and bytes, in any order.
    ///
    /// # Errors
    ///
    /// [`SlotError`] if they are no whole pages or overlap.
    pub fn new(slots: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, SlotError> {
        let pages = |(gpa, len)| Request { gpa, len, to: Kind::Private }.pages();
        let mut slots = slots.into_iter().map(pages).collect::<Result<Vec<_>, _>>()?;
        slots.sort_unstable_by_key(|slot| slot.start);
        let overlap = slots.iter().zip(slots.iter().skip(1)).find(|(a, b)| a.end > b.start);
        match overlap {
            Some((_, b)) => Err(SlotError::Overlap { gpa: b.start * PAGE_BYTES }),
            None => Ok(Self { slots }),
        }
    }

    fn count(&self) -> u64 {
        self.slots.iter().map(|slot| slot.end - slot.start).sum()
    }

    /// How many pages of slots are before this one, if that is in one.
    fn index(&self, page: u64) -> Option<u64> {
        let mut before = 0;
        for slot in &self.slots {
            if slot.contains(&page) {
                return Some(before + (page - slot.start));
            }
            before += slot.end - slot.start;
        }
        None
    }

    /// Whether all of these pages are in slots, with no gap.
    fn contain(&self, pages: &Range<u64>) -> bool {
        let mut at = pages.start;
        for slot in &self.slots {
            if slot.contains(&at) {
                at = slot.end;
            }
            if at >= pages.end {
                return true;
            }
        }
        false
    }

    /// The range, cut where slots end.
    fn cut(&self, pages: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let within = |slot: &Range<u64>| pages.start.max(slot.start)..pages.end.min(slot.end);
        self.slots.iter().map(within).filter(|piece| !piece.is_empty())
    }
}

/// What begins when a conversion is asked for.
#[allow(clippy::large_enum_variant, reason = "a box would be an allocation for each conversion")]
#[derive(Debug)]
pub enum Begin {
    /// All of its pages have that kind: it is over.
    Nothing,
    /// Some of its pages are being converted: ask again when that is over.
    Busy,
    /// It begins, and must be [finished](Kinds::finish).
    Start(Conversion),
}

/// What a vCPU's fault comes from, which accessed a page as one of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// No page that can be converted.
    Outside,
    /// It is being converted: enter the guest again.
    Busy,
    /// It is of that kind. If it is not missing either, enter the guest again.
    Matches,
    /// It is of the other kind.
    Mismatch,
    /// No conversion could open it: nobody can have it.
    Closed,
}

/// The kind of every page, and which are being converted.
#[derive(Debug)]
pub struct Kinds {
    slots: Slots,
    places: Places,
    private: Bits,
    /// Pages that nobody can reach.
    closed: Bits,
    /// Pages for which there may be something in memory of the other kind.
    stale: Bits,
    busy: Vec<Range<u64>>,
}

impl Kinds {
    /// All pages of one kind.
    pub fn new(slots: Slots, places: Places, kind: Kind) -> Self {
        let count = slots.count();
        let mut private = Bits::new(count);
        if kind == Kind::Private {
            private.set(0..count, true);
        }
        let (closed, stale) = (Bits::new(count), Bits::new(count));
        Self { slots, places, private, closed, stale, busy: Vec::new() }
    }

    /// Whether contents can be kept.
    pub fn can(&self, contents: Contents) -> bool {
        contents == Contents::Zero || self.places == Places::One
    }

    /// A page's kind; `None` if it cannot be converted.
    pub fn kind(&self, page: u64) -> Option<Kind> {
        let index = self.slots.index(page)?;
        Some(if self.private.get(index) { Kind::Private } else { Kind::Shared })
    }

    /// Whether nobody can reach a page.
    pub fn is_closed(&self, page: u64) -> bool {
        self.slots.index(page).is_some_and(|index| self.closed.get(index))
    }

    /// The runs of private pages, by number, cut where slots end.
    pub fn private_runs(&self) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        for slot in &self.slots.slots {
            self.find(slot, |word| self.private.word(word), |run| runs.push(run));
        }
        runs
    }

    /// Begins a conversion. `Preserve` is for kinds that [can](Self::can).
    ///
    /// # Errors
    ///
    /// [`Refusal`], and nothing has changed.
    pub fn begin(&mut self, request: &Request, contents: Contents) -> Result<Begin, Refusal> {
        let pages = request.pages()?;
        if !self.slots.contain(&pages) {
            return Err(Refusal::Outside { gpa: request.gpa, len: request.len });
        }
        if self.is_busy(&pages) {
            return Ok(Begin::Busy);
        }
        let wanted = if request.to == Kind::Private { u64::MAX } else { 0 };
        // Bits of the pages that change.
        let differ = |word| self.private.word(word) ^ wanted;
        let parts = Parts {
            pieces: self.runs(&pages, differ),
            repairs: match self.closed.is_empty() {
                true => Runs::default(),
                false => self.runs(&pages, |word| !differ(word) & self.closed.word(word)),
            },
            stale: match self.stale.is_empty() {
                true => Runs::default(),
                false => self.runs(&pages, |word| differ(word) & self.stale.word(word)),
            },
        };
        if parts.pieces.is_empty() && parts.repairs.is_empty() {
            return Ok(Begin::Nothing);
        }
        self.busy.push(pages.clone());
        let in_place = self.places == Places::One;
        Ok(Begin::Start(Conversion::new(pages, request.to, contents, in_place, parts)))
    }

    /// Ends a conversion that is over.
    pub fn finish(&mut self, conversion: Conversion) -> Outcome {
        if let Some(at) = self.busy.iter().position(|busy| *busy == conversion.pages) {
            self.busy.swap_remove(at);
        }
        for run in conversion.opened.iter() {
            self.closed.set(self.indices(run), false);
        }
        let outcome = conversion.outcome();
        for run in outcome.converted.iter() {
            let run = self.indices(run);
            self.private.set(run.clone(), outcome.to == Kind::Private);
            self.stale.set(run, false);
        }
        for run in outcome.stale.iter() {
            self.stale.set(self.indices(run), true);
        }
        for run in outcome.closed.iter() {
            self.closed.set(self.indices(run), true);
        }
        outcome
    }

    /// What a vCPU's fault comes from, which accessed this page as one of that
    /// kind.
    pub fn on_fault(&self, page: u64, accessed_as: Kind) -> FaultAnswer {
        let Some(kind) = self.kind(page) else { return FaultAnswer::Outside };
        if self.is_busy(&(page..page + 1)) {
            FaultAnswer::Busy
        } else if self.is_closed(page) {
            FaultAnswer::Closed
        } else if kind == accessed_as {
            FaultAnswer::Matches
        } else {
            FaultAnswer::Mismatch
        }
    }

    /// Whether some conversion goes on.
    pub fn is_converting(&self) -> bool {
        !self.busy.is_empty()
    }

    fn is_busy(&self, pages: &Range<u64>) -> bool {
        self.busy.iter().any(|busy| busy.start < pages.end && pages.start < busy.end)
    }

    fn indices(&self, pages: &Range<u64>) -> Range<u64> {
        let first = self.slots.index(pages.start).unwrap_or(0);
        first..first + (pages.end - pages.start)
    }

    /// The longest runs of pages whose bits are set in the words that `word` gives, by
    /// number; cut where slots end.
    fn runs(&self, pages: &Range<u64>, word: impl Fn(usize) -> u64) -> Runs {
        let mut runs = Runs::default();
        for piece in self.slots.cut(pages) {
            self.find(&piece, &word, |run| runs.push(run));
        }
        runs
    }

    /// The same, one by one, of pages in one slot.
    fn find(
        &self,
        pages: &Range<u64>,
        word: impl Fn(usize) -> u64,
        mut found: impl FnMut(Range<u64>),
    ) {
        let indices = self.indices(pages);
        let page = |index: u64| pages.start + (index - indices.start);
        let mut at = indices.start;
        while let Some(start) = first_set(at..indices.end, &word) {
            at = first_set(start..indices.end, |number| !word(number)).unwrap_or(indices.end);
            found(page(start)..page(at));
        }
    }
}

/// The first of these indices whose bit is set in the words that `word` gives.
fn first_set(indices: Range<u64>, word: impl Fn(usize) -> u64) -> Option<u64> {
    let mut at = indices.start;
    while at < indices.end {
        let (number, bit) = place(at);
        let bits = word(number) & !(bit - 1);
        // The next word's first, if none is.
        at = at / WORD * WORD + u64::from(bits.trailing_zeros());
        if bits != 0 {
            return (at < indices.end).then_some(at);
        }
    }
    None
}

/// Bits in a word.
const WORD: u64 = 64;

/// A bit for each page.
#[derive(Debug)]
struct Bits {
    words: Vec<u64>,
    /// How many bits are set.
    count: u64,
}

impl Bits {
    /// Room for so many, none of which is set.
    fn new(room: u64) -> Self {
        let words = usize::try_from(room.div_ceil(WORD)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], count: 0 }
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn get(&self, index: u64) -> bool {
        let (word, bit) = place(index);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Bits of a word by its number; none beyond the last.
    fn word(&self, number: usize) -> u64 {
        self.words.get(number).copied().unwrap_or(0)
    }

    fn set(&mut self, indices: Range<u64>, to: bool) {
        if !to && self.is_empty() {
            return;
        }
        let mut at = indices.start;
        while at < indices.end {
            let (number, bit) = place(at);
            let end = indices.end.min((at | (WORD - 1)) + 1);
            let mask = !(bit - 1) & (u64::MAX >> (WORD - 1 - (end - 1) % WORD));
            if let Some(word) = self.words.get_mut(number) {
                self.count -= u64::from(word.count_ones());
                *word = if to { *word | mask } else { *word & !mask };
                self.count += u64::from(word.count_ones());
            }
            at = end;
        }
    }
}

fn place(index: u64) -> (usize, u64) {
    (usize::try_from(index / WORD).unwrap_or(usize::MAX), 1 << (index % WORD))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Word by word or bit by bit is the same.
        #[test]
        fn runs_are_those_of_the_bits_set(
            ranges in prop::collection::vec((0..200u64, 0..200u64, any::<bool>()), 0..8),
            (first, count, offset) in (0..200u64, 0..200u64, 0..300u64),
        ) {
            let mut kinds = {
                let slot = (offset * PAGE_BYTES, 200 * PAGE_BYTES);
                Kinds::new(Slots::new([slot]).unwrap(), Places::One, Kind::Shared)
            };
            let mut bits = [false; 200];
            for (start, end, to) in ranges {
                kinds.private.set(start..end, to);
                bits.iter_mut().zip(0..).filter(|(_, i)| (start..end).contains(i)).for_each(|b| *b.0 = to);
            }
            let pages = offset + first..offset + (first + count).min(200);
            let is_set = |page: &u64| bits[usize::try_from(page - offset).unwrap()];
            let runs = kinds.runs(&pages, |word| kinds.private.word(word));
            let count = bits.iter().filter(|bit| **bit).count() as u64;
            prop_assert_eq!((kinds.private.count, kinds.private.is_empty()), (count, count == 0));
            let expected: Vec<u64> = pages.filter(is_set).collect();
            prop_assert_eq!(runs.iter().cloned().flatten().collect::<Vec<_>>(), expected);
            let touching = runs.iter().zip(runs.iter().skip(1)).any(|(a, b)| a.end >= b.start);
            prop_assert!(!touching && runs.iter().all(|run| !run.is_empty()), "{:?}", runs);
            let same = (0..).zip(bits).all(|(index, bit)| kinds.private.get(index) == bit);
            prop_assert!(same);
        }
    }
}
