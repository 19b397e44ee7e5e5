//! Pages that tell what they ought to be: every word follows from the page's
//! kind, its number and its generation. The guest checks them as it runs, the
//! host finds the unchanging ones in a memory file.

use std::fmt;

const WORDS: usize = 512;

/// Bytes of a page.
pub(crate) const PAGE: usize = 8 * WORDS;

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Written once.
    Still,
    /// Written over and over, its generation one higher each time.
    Moving,
}

impl Kind {
    /// The first word of such a page; in no other memory by chance.
    fn magic(self) -> u64 {
        match self {
            Self::Still => 0x9b1e_64c8_5f07_a3d1,
            Self::Moving => 0xc4d7_20ea_1b8f_6935,
        }
    }
}

/// A page, aligned as one: it fills a page of guest-physical memory.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page([u64; WORDS]);

/// How a page differs from what it ought to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    kind: Kind,
    number: u64,
    generation: u64,
    /// Words that differ.
    words: usize,
    /// The first of them: its number, what it is and what it ought to be.
    first: (usize, u64, u64),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, number, generation, words, first: (at, is, ought) } = self;
        write!(
            f,
            "{kind:?} page {number} of generation {generation}: {words} words differ, the first \
             at byte {}: {is:#018x}, not {ought:#018x}",
            at * 8
        )
    }
}

/// The word at `at`, but for the first.
fn word(number: u64, generation: u64, at: u64) -> u64 {
    match at {
        1 => number,
        2 => generation,
        _ => mix(mix(number ^ generation.rotate_left(32)).wrapping_add(at)),
    }
}

/// A number that depends on each bit of another (the finalizer of SplitMix64).
pub(crate) fn mix(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Page {
    /// Pages of zeroes, to be written where they are: a page that is moved
    /// leaves a copy of itself in memory, which the host would find.
    pub(crate) fn zeroes(count: usize) -> Vec<Self> {
        vec![Self([0; WORDS]); count]
    }

    pub(crate) fn write(&mut self, kind: Kind, number: u64, generation: u64) {
        for (at, to) in (0..).zip(&mut self.0) {
            *to = if at == 0 { kind.magic() } else { word(number, generation, at) };
        }
    }

    pub(crate) fn check(&self, kind: Kind, number: u64, generation: u64) -> Result<(), Difference> {
        check(self.0.iter().copied(), kind, number, generation)
    }
}

fn check(
    words: impl Iterator<Item = u64>,
    kind: Kind,
    number: u64,
    generation: u64,
) -> Result<(), Difference> {
    let ought = |at: u64| if at == 0 { kind.magic() } else { word(number, generation, at) };
    let mut differing =
        words.zip(0..).filter(|&(is, at)| is != ought(at)).map(|(is, at)| (is, at, ought(at)));
    let Some((is, at, ought)) = differing.next() else { return Ok(()) };
    let words = 1 + differing.count();
    let at = usize::try_from(at).unwrap_or(WORDS);
    Err(Difference { kind, number, generation, words, first: (at, is, ought) })
}

/// The number of the still page that these bytes of a memory file are, if they
/// are one.
///
/// # Errors
///
/// If they are one that has changed.
pub(crate) fn still_page(bytes: &[u8]) -> Result<Option<u64>, Difference> {
    let mut words = bytes.chunks_exact(8).map(|bytes| {
        let bytes = bytes.try_into().unwrap_or_default();
        u64::from_le_bytes(bytes)
    });
    if words.next() != Some(Kind::Still.magic()) {
        return Ok(None);
    }
    let Some(number) = words.next() else { return Ok(None) };
    let all = [Kind::Still.magic(), number].into_iter().chain(words);
    check(all, Kind::Still, number, 0).map(|()| Some(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(page: &Page) -> Vec<u8> {
        page.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn a_page_is_what_it_was_written_as_and_nothing_else() {
        let mut pages = Page::zeroes(1);
        pages[0].write(Kind::Moving, 7, 3);
        pages[0].check(Kind::Moving, 7, 3).expect("as written");
        for (kind, number, generation) in
            [(Kind::Still, 7, 3), (Kind::Moving, 8, 3), (Kind::Moving, 7, 2)]
        {
            pages[0].check(kind, number, generation).expect_err("another page");
        }
        assert_eq!(still_page(&bytes(&pages[0])), Ok(None));
    }

    #[test]
    fn a_broken_byte_is_found_wherever_it_is() {
        let mut pages = Page::zeroes(1);
        pages[0].write(Kind::Still, 5, 0);
        let good = bytes(&pages[0]);
        assert_eq!(good.len(), PAGE);
        assert_eq!(still_page(&good), Ok(Some(5)));
        for at in 16..PAGE {
            let mut broken = good.clone();
            broken[at] ^= 0x10;
            let difference = still_page(&broken).expect_err("a broken byte");
            assert_eq!((difference.words, difference.first.0), (1, at / 8));
        }
        assert_eq!(still_page(&[0; PAGE]), Ok(None));
    }
}
