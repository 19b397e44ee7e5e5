//! Slots: contiguous ranges of guest memory with one mapping, one page size
//! and one source range each, and the set of them that a userfaultfd serves.

use std::ops::Range;

use crate::addr::{ByteRange, Hva, PageRun, PageSize};

/// A contiguous range of guest memory as one process maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Where it starts in the process whose faults are served.
    pub hva: Hva,
    /// Its length in bytes.
    pub len: u64,
    /// Where its contents start in the source, in bytes.
    pub source_offset: u64,
    /// The page size of the mapping.
    pub page_size: PageSize,
}

impl Slot {
    /// Its number of pages.
    pub fn pages(&self) -> u64 {
        self.len >> self.page_size.shift()
    }
}

/// Why a list of slots cannot be served. Names the slot by its position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// No slot at all.
    #[error("there are no memory regions")]
    NoSlots,
    /// A slot has no pages.
    #[error("region {index}: its size is 0")]
    Empty {
        /// Which slot.
        index: usize,
    },
    /// An address, length or offset is not a multiple of the page size.
    #[error("region {index}: {field} {value:#x} is not a multiple of its page size {page_size:#x}")]
    Misaligned {
        /// Which slot.
        index: usize,
        /// Which of its fields.
        field: &'static str,
        /// The value given.
        value: u64,
        /// The slot's page size in bytes.
        page_size: u64,
    },
    /// Address plus length, or offset plus length, does not fit in 64 bits.
    #[error("region {index}: {field} {value:#x} plus size {len:#x} overflows")]
    Overflow {
        /// Which slot.
        index: usize,
        /// Which of its fields.
        field: &'static str,
        /// The value given.
        value: u64,
        /// The slot's length.
        len: u64,
    },
    /// Two slots share host addresses or source bytes.
    #[error("regions {first} and {second} overlap in {what}")]
    Overlap {
        /// The one at the lower address.
        first: usize,
        /// The other.
        second: usize,
        /// In which space they overlap.
        what: &'static str,
    },
    /// A slot reaches beyond the end of the source.
    #[error(
        "region {index}: offset {offset:#x} plus size {len:#x} is beyond the source, which has {source_len:#x} bytes"
    )]
    BeyondSource {
        /// Which slot.
        index: usize,
        /// Its offset in the source.
        offset: u64,
        /// Its length.
        len: u64,
        /// The source's length.
        source_len: u64,
    },
}

/// The slots one userfaultfd serves, sorted by host address. Page indices run
/// through all of them without gaps, in the order the slots were given.
#[derive(Clone, Debug)]
pub struct SlotSet {
    /// Sorted by hva; the second field is the index of the slot's first page.
    by_hva: Vec<(Slot, u64)>,
    /// Positions in `by_hva`, sorted by first page.
    by_page: Vec<usize>,
    pages: u64,
}

impl SlotSet {
    /// Checks the slots against each other and against the source's length.
    ///
    /// # Errors
    ///
    /// The first thing found wrong with them.
    pub fn new(slots: &[Slot], source_len: u64) -> Result<Self, SlotError> {
        if slots.is_empty() {
            return Err(SlotError::NoSlots);
        }
        for (index, slot) in slots.iter().enumerate() {
            check_slot(index, slot, source_len)?;
        }
        check_disjoint(slots, |s| s.hva.0, "host addresses")?;
        check_disjoint(slots, |s| s.source_offset, "the source")?;

        let mut by_hva = Vec::with_capacity(slots.len());
        let mut pages = 0;
        for slot in slots {
            by_hva.push((*slot, pages));
            pages += slot.pages();
        }
        by_hva.sort_by_key(|(slot, _)| slot.hva);
        let mut by_page: Vec<usize> = (0..by_hva.len()).collect();
        by_page.sort_by_key(|&i| by_hva[i].1);
        Ok(Self { by_hva, by_page, pages })
    }

    /// Number of pages in all slots.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes in all slots.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|slot| slot.len).sum()
    }

    /// The slots, by ascending host address.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.by_hva.iter().map(|(slot, _)| slot)
    }

    /// The page that holds a host address.
    pub fn page_at(&self, hva: Hva) -> Option<u64> {
        let after = self.by_hva.partition_point(|(slot, _)| slot.hva <= hva);
        let (slot, first) = self.by_hva.get(after.checked_sub(1)?)?;
        let offset = hva.0 - slot.hva.0;
        (offset < slot.len).then(|| first + (offset >> slot.page_size.shift()))
    }

    /// The slot of a page, and the run of all its pages.
    ///
    /// # Panics
    ///
    /// If the page index is not below [`pages`](Self::pages): indices come
    /// from this set.
    pub fn slot_of(&self, page: u64) -> (&Slot, PageRun) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let after = self.by_page.partition_point(|&i| self.by_hva[i].1 <= page);
        let (slot, first) = &self.by_hva[self.by_page[after - 1]];
        (slot, PageRun::new(*first, slot.pages()))
    }

    /// Where a run within one slot lies: host address of its first byte, and
    /// its bytes in the source.
    pub fn locate(&self, run: PageRun) -> (Hva, ByteRange) {
        let (slot, all) = self.slot_of(run.first);
        debug_assert!(run.end() <= all.end(), "{run:?} crosses out of {all:?}");
        let shift = slot.page_size.shift();
        let offset = (run.first - all.first) << shift;
        (Hva(slot.hva.0 + offset), ByteRange::new(slot.source_offset + offset, run.count << shift))
    }

    /// The runs of pages **wholly** inside a range of host addresses, one per
    /// slot it touches. (A kernel event never covers part of a page.)
    pub fn runs_within(&self, start: Hva, end: Hva) -> impl Iterator<Item = PageRun> + '_ {
        self.by_hva.iter().filter_map(move |(slot, first)| {
            whole_pages(slot, *first, part(slot.hva.0, slot.len, start.0..end.0)?)
        })
    }

    /// The runs of pages whose contents lie **wholly** inside a range of the
    /// source.
    pub fn runs_of_source(&self, range: ByteRange) -> impl Iterator<Item = PageRun> + '_ {
        self.by_hva.iter().filter_map(move |(slot, first)| {
            let part = part(slot.source_offset, slot.len, range.start..range.end())?;
            whole_pages(slot, *first, part)
        })
    }

    /// The runs of pages some of whose contents lie inside a range of the source.
    pub fn runs_meeting_source(&self, range: ByteRange) -> impl Iterator<Item = PageRun> + '_ {
        self.by_hva.iter().filter_map(move |(slot, first)| {
            let part = part(slot.source_offset, slot.len, range.start..range.end())?;
            let shift = slot.page_size.shift();
            let (from, to) = (part.start >> shift, part.end.div_ceil(1 << shift));
            Some(PageRun::new(first + from, to - from))
        })
    }
}

/// What of a range lies in the `len` bytes from `start` on, counted from there.
fn part(start: u64, len: u64, range: Range<u64>) -> Option<Range<u64>> {
    let (from, to) = (range.start.max(start), range.end.min(start + len));
    (from < to).then(|| from - start..to - start)
}

/// The pages that lie wholly in a part of a slot whose first page is `first`.
fn whole_pages(slot: &Slot, first: u64, part: Range<u64>) -> Option<PageRun> {
    let shift = slot.page_size.shift();
    let (from, to) = (part.start.div_ceil(1 << shift), part.end >> shift);
    (from < to).then(|| PageRun::new(first + from, to - from))
}

fn check_slot(index: usize, slot: &Slot, source_len: u64) -> Result<(), SlotError> {
    let page_size = slot.page_size.bytes();
    if slot.len == 0 {
        return Err(SlotError::Empty { index });
    }
    for (field, value) in
        [("address", slot.hva.0), ("size", slot.len), ("offset", slot.source_offset)]
    {
        // The source only has to be addressable in 4 KiB units: huge pages
        // are read from wherever the VMM put them.
        let unit = if field == "offset" { 4096 } else { page_size };
        if value % unit != 0 {
            return Err(SlotError::Misaligned { index, field, value, page_size: unit });
        }
    }
    for (field, value) in [("address", slot.hva.0), ("offset", slot.source_offset)] {
        if value.checked_add(slot.len).is_none() {
            return Err(SlotError::Overflow { index, field, value, len: slot.len });
        }
    }
    if slot.source_offset + slot.len > source_len {
        return Err(SlotError::BeyondSource {
            index,
            offset: slot.source_offset,
            len: slot.len,
            source_len,
        });
    }
    Ok(())
}

fn check_disjoint(
    slots: &[Slot],
    start: impl Fn(&Slot) -> u64,
    what: &'static str,
) -> Result<(), SlotError> {
    let mut order: Vec<usize> = (0..slots.len()).collect();
    order.sort_by_key(|&i| start(&slots[i]));
    for pair in order.windows(2) {
        let (first, second) = (pair[0], pair[1]);
        if start(&slots[first]) + slots[first].len > start(&slots[second]) {
            return Err(SlotError::Overlap { first, second, what });
        }
    }
    Ok(())
}
