//! The present bits of a page map, as a process sees them that did not make
//! it: read-only, without a lock, without asking anybody.

use crate::page_map::{
    HEADER_WORDS, LoadWords, MAGIC, MAX_SLOTS, MapSlot, SLOT_WORDS, TABLE, VERSION,
};

/// Why words are no page map that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// They do not begin as a page map does.
    #[error("the page map begins with {0:#018x}, not with \"VMPGMAP\"")]
    Magic(u64),
    /// Another version of the layout.
    #[error("the page map has version {0}; this program reads version {VERSION}")]
    Version(u64),
    /// The header does not fit the words.
    #[error("the page map's {field} is {value}, which does not fit its {words} words")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it says.
        value: u64,
        /// How many words there are.
        words: usize,
    },
    /// A slot of the table is not part of the map.
    #[error("slot {index} of the page map, {slot:?}, is not part of its {pages} pages")]
    Slot {
        /// Its place in the table.
        index: usize,
        /// What the table says.
        slot: MapSlot,
        /// How many pages the map has.
        pages: u64,
    },
}

/// Which pages are present, read from the map that the pager keeps.
#[derive(Debug)]
pub struct PresentBits<W> {
    words: W,
    pages: u64,
    slots: Vec<MapSlot>,
}

impl<W: LoadWords> PresentBits<W> {
    /// Reads the header of a page map.
    ///
    /// # Errors
    ///
    /// If it is of another version, or does not fit the words.
    pub fn open(words: W) -> Result<Self, MapError> {
        let pages = read_header(&words)?;
        let len = words.count();
        let word = |i: usize| words.load(i).unwrap_or(0);
        let count = word(4);
        let room = len.saturating_sub(HEADER_WORDS) as u64;
        fits("number of pages", pages, pages.div_ceil(64) <= room, len)?;
        fits("number of slots", count, count <= MAX_SLOTS as u64, len)?;
        let slots =
            (TABLE..HEADER_WORDS).step_by(SLOT_WORDS).take(usize::try_from(count).unwrap_or(0));
        let slots = slots.map(|at| MapSlot {
            gpa: word(at),
            first_page: word(at + 1),
            pages: word(at + 2),
            page_size: word(at + 3),
        });
        let slots: Vec<MapSlot> = slots.collect();
        for (index, slot) in slots.iter().enumerate() {
            check(slot, pages).ok_or(MapError::Slot { index, slot: *slot, pages })?;
        }
        Ok(Self { words, pages, slots })
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The slots, in the order of their pages.
    pub fn slots(&self) -> &[MapSlot] {
        &self.slots
    }

    /// The page that holds a guest-physical address.
    #[inline]
    pub fn page_at(&self, gpa: u64) -> Option<u64> {
        self.slots.iter().find_map(|slot| {
            // By a shift: to divide takes as long as all the rest.
            let offset = gpa.checked_sub(slot.gpa)? >> slot.page_size.trailing_zeros();
            (offset < slot.pages).then(|| slot.first_page + offset)
        })
    }

    /// Whether a page's contents are in place and visible to the caller (I1).
    /// A page beyond the last is not.
    ///
    /// The answer may be out of date: a page that was given back a moment ago
    /// can be absent again. Touching it is right all the same (it waits for the
    /// page to be brought); what the answer tells is whether to expect a wait.
    #[inline]
    pub fn is_present(&self, page: u64) -> bool {
        // `pages` was checked against the number of words.
        let Ok(at) = usize::try_from(page / 64) else { return false };
        match self.words.load(HEADER_WORDS + at) {
            Some(word) => page < self.pages && word >> (page % 64) & 1 == 0,
            None => false,
        }
    }

    /// Whether a page cannot be had: touching it is a SIGBUS.
    pub fn is_poisoned(&self, page: u64) -> bool {
        let content = HEADER_WORDS as u64 + self.pages.div_ceil(64);
        match usize::try_from(content + page / 32).ok().and_then(|at| self.words.load(at)) {
            Some(word) => page < self.pages && word >> (page % 32 * 2) & 0b11 == 0b11,
            None => false,
        }
    }
}

/// Reads what every layout begins with. Returns the number of pages.
pub(crate) fn read_header<W: LoadWords>(words: &W) -> Result<u64, MapError> {
    let word = |i: usize| words.load(i).unwrap_or(0);
    if word(0) != MAGIC {
        return Err(MapError::Magic(word(0)));
    }
    if word(1) != VERSION {
        return Err(MapError::Version(word(1)));
    }
    fits("start of the bitmap", word(3), word(3) == HEADER_WORDS as u64, words.count())?;
    Ok(word(2))
}

fn fits(field: &'static str, value: u64, ok: bool, words: usize) -> Result<(), MapError> {
    if ok { Ok(()) } else { Err(MapError::Field { field, value, words }) }
}

fn check(slot: &MapSlot, pages: u64) -> Option<()> {
    let end = slot.first_page.checked_add(slot.pages)?;
    slot.gpa.checked_add(slot.pages.checked_mul(slot.page_size)?)?;
    (end <= pages && slot.page_size.is_power_of_two() && slot.page_size >= 4096).then_some(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::addr::PageRun;
    use crate::page_map::{PageMap, words_for};

    const SLOTS: [MapSlot; 2] = [
        MapSlot { gpa: 0, first_page: 0, pages: 70, page_size: 4096 },
        MapSlot { gpa: 1 << 32, first_page: 70, pages: 30, page_size: 4096 },
    ];

    fn words(pages: u64) -> Arc<[AtomicU64]> {
        (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn what_the_map_publishes_the_reader_sees() {
        let words = words(100);
        let map = PageMap::new(words.clone(), 100);
        map.describe(&SLOTS);
        let bits = PresentBits::open(words).expect("a map");
        assert_eq!((bits.pages(), bits.slots()), (100, &SLOTS[..]));
        assert!((0..200).all(|page| !bits.is_present(page)), "absent at first, and beyond the end");
        for run in [PageRun::new(3, 1), PageRun::new(60, 10)] {
            assert_eq!(map.publish(run), run.count);
        }
        let present: Vec<u64> = (0..200).filter(|page| bits.is_present(*page)).collect();
        assert_eq!(present, [vec![3], (60..70).collect()].concat());
        map.mark_zero(PageRun::new(62, 2));
        assert!(!bits.is_present(62) && !bits.is_present(63) && bits.is_present(64));
        assert_eq!((map.claim_up(40, 1), map.poison(PageRun::new(40, 1))), (1, 1));
        assert_eq!((0..200).find(|page| bits.is_poisoned(*page)), Some(40));
    }

    #[test]
    fn addresses_are_guest_physical() {
        let words = words(100);
        PageMap::new(words.clone(), 100).describe(&SLOTS);
        let bits = PresentBits::open(words).expect("a map");
        assert_eq!(bits.page_at(0), Some(0));
        assert_eq!(bits.page_at(70 * 4096 - 1), Some(69));
        assert_eq!(bits.page_at(70 * 4096), None);
        assert_eq!(bits.page_at((1 << 32) + 4096), Some(71));
        assert_eq!(bits.page_at(u64::MAX), None);
    }

    /// That a set bit is an absent page, from the slot's first page on, in
    /// words of its own: the form KVM was proposed to take.
    #[test]
    fn the_bitmap_is_one_bit_a_page_and_set_where_absent() {
        let words = words(100);
        let map = PageMap::new(words.clone(), 100);
        map.publish(PageRun::new(65, 2));
        let bitmap = |i: usize| words[HEADER_WORDS + i].load(Ordering::Acquire);
        assert_eq!(bitmap(0), u64::MAX);
        assert_eq!(bitmap(1), (1 << 36) - 1 - 0b110, "and no bit beyond the last page");
        assert_eq!(HEADER_WORDS * 8, 4096, "the bitmap starts a page");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let spoiled = |at: usize, value: u64| {
            let words = words(100);
            PageMap::new(words.clone(), 100).describe(&SLOTS);
            words[at].store(value, Ordering::Release);
            PresentBits::open(words).expect_err("spoiled")
        };
        assert_eq!(spoiled(0, 1), MapError::Magic(1));
        assert_eq!(spoiled(1, 1), MapError::Version(1));
        assert!(matches!(spoiled(2, u64::MAX), MapError::Field { field: "number of pages", .. }));
        assert!(matches!(spoiled(3, 8), MapError::Field { field: "start of the bitmap", .. }));
        assert!(matches!(spoiled(4, 127), MapError::Field { field: "number of slots", .. }));
        for (at, value) in [(9, u64::MAX), (10, 101), (11, 0), (11, 4095), (8, u64::MAX)] {
            assert!(matches!(spoiled(at, value), MapError::Slot { index: 0, .. }), "{at}");
        }
        let short: Arc<[AtomicU64]> = [AtomicU64::new(MAGIC)].into();
        assert_eq!(PresentBits::open(short).expect_err("short"), MapError::Version(0));
    }
}
