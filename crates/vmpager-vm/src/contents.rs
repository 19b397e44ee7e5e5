//! What the guest's memory holds: generated from a seed, page by page, in runs
//! such as real guests have (long stretches of zeroes, of logs, of kernel
//! structures, of compressed or encrypted data, of pages that occur twice).
//!
//! A page that is neither zero nor repeated contains its own number, so that a
//! neighbour's page is never taken for it.

use std::ops::Range;

use crate::PAGE_BYTES;

/// Run boundaries are found from the start of a block, so that any page can be
/// generated without its predecessors.
const BLOCK_PAGES: u64 = 1024;
const RUN_PAGES: Range<u64> = 16..257;
/// How many different pages the repeated ones are copies of.
const TEMPLATES: u64 = 512;

/// A kind of page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// All zeroes: about a third of the guest.
    Zero,
    /// Lines of text, as in logs and the page cache.
    Text,
    /// Small structures with pointers, counters and padding, as in heaps.
    Records,
    /// Incompressible.
    Random,
    /// One of a few hundred pages that occur many times.
    Repeated,
}

/// Generates the memory of one guest.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    seed: u64,
}

impl Contents {
    /// The contents that belong to a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// What kind of page this is.
    pub fn kind(&self, page: u64) -> Kind {
        self.run_of(page).kind
    }

    /// Writes a page's bytes.
    pub fn fill(&self, page: u64, into: &mut [u8; PAGE_BYTES]) {
        let run = self.run_of(page);
        match run.kind {
            Kind::Zero => into.fill(0),
            Kind::Text => fill_text(&mut self.rng(1, page), "page", page, into),
            Kind::Records => fill_records(&mut self.rng(2, page), page, into),
            Kind::Random => fill_random(&mut self.rng(3, page), page, into),
            Kind::Repeated => {
                let template = (run.key % TEMPLATES + page - run.first) % TEMPLATES;
                if template.is_multiple_of(2) {
                    fill_text(&mut self.rng(4, template), "template", template, into);
                } else {
                    fill_records(&mut self.rng(4, template), u64::MAX - template, into);
                }
            }
        }
    }

    fn rng(&self, stream: u64, id: u64) -> Rng {
        let mut rng = Rng(self.seed ^ (stream << 56));
        Rng(rng.next() ^ id)
    }

    fn run_of(&self, page: u64) -> Run {
        let block = page / BLOCK_PAGES * BLOCK_PAGES;
        let mut rng = self.rng(5, block);
        let mut first = block;
        loop {
            let mut end = first + RUN_PAGES.start + rng.below(RUN_PAGES.end - RUN_PAGES.start);
            let kind = pick_kind(&mut rng);
            let key = rng.next();
            if end + RUN_PAGES.start > block + BLOCK_PAGES {
                end = block + BLOCK_PAGES;
            }
            if page < end {
                return Run { kind, key, first };
            }
            first = end;
        }
    }
}

/// Pages of one kind next to each other.
struct Run {
    kind: Kind,
    key: u64,
    first: u64,
}

fn pick_kind(rng: &mut Rng) -> Kind {
    match rng.below(32) {
        0..11 => Kind::Zero,
        11..17 => Kind::Text,
        17..23 => Kind::Records,
        23..27 => Kind::Random,
        _ => Kind::Repeated,
    }
}

const WORDS: [&str; 32] = [
    "kernel: ", "memory ", "page ", "alloc", "ated ", "from ", "node ", "zone", "request ",
    "served ", "in ", "ms ", "status=", "ok ", "error ", "timeout ", "GET ", "POST ", "/api/v1/",
    "users", "/health", "connect", "ion ", "closed ", "worker ", "queue ", "flush", "ed ", "disk ",
    "cache ", "hit ", "miss ",
];

fn fill_text(rng: &mut Rng, what: &str, id: u64, into: &mut [u8; PAGE_BYTES]) {
    let mut text = String::with_capacity(PAGE_BYTES + 64);
    text.push_str(&format!("-- {what} {id} --\n"));
    while text.len() < PAGE_BYTES {
        // One draw yields a line: eight words of five bits, and a number.
        let bits = rng.next();
        text.push_str(&format!("[{:>9}] ", bits >> 44));
        for i in 0..8 {
            text.push_str(WORDS[low_bits(bits >> (i * 5))]);
        }
        text.push('\n');
    }
    into.copy_from_slice(&text.as_bytes()[..PAGE_BYTES]);
}

fn low_bits(bits: u64) -> usize {
    usize::from(bits.to_le_bytes()[0] & 31)
}

/// Records of 64 bytes: an id, two pointers into one region, counters, flags.
fn fill_records(rng: &mut Rng, id: u64, into: &mut [u8; PAGE_BYTES]) {
    let region = 0xffff_8880_0000_0000 | (rng.next() & 0xff_fff0_0000);
    for (i, record) in (0..).zip(into.as_chunks_mut::<64>().0) {
        let bits = rng.next();
        let words = [
            id,
            i | (bits & 0xff) << 32,
            region | (bits & 0xffff0),
            region | (bits >> 20 & 0xffff0),
            bits >> 40 & 0xffff,
            0,
            1,
            0,
        ];
        for (word, value) in record.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *word = value.to_le_bytes();
        }
    }
}

fn fill_random(rng: &mut Rng, id: u64, into: &mut [u8; PAGE_BYTES]) {
    let words = into.as_chunks_mut::<8>().0;
    for word in words.iter_mut() {
        *word = rng.next().to_le_bytes();
    }
    words[0] = id.to_le_bytes();
}

/// SplitMix64: one addition and a mix, every seed as good as any other.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; its bias is far below what any use here sees.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let scaled = u128::from(self.next()) * u128::from(bound);
        u64::try_from(scaled >> 64).expect("the upper half of 128 bits")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    #[test]
    fn kinds_come_in_runs_and_in_the_intended_shares() {
        let contents = Contents::new(7);
        let pages = 1 << 17;
        let mut share: HashMap<Kind, u64> = HashMap::new();
        let mut changes = 0;
        for page in 0..pages {
            *share.entry(contents.kind(page)).or_default() += 1;
            changes += u64::from(page > 0 && contents.kind(page) != contents.kind(page - 1));
        }
        let percent = |kind| share[&kind] * 100 / pages;
        assert!((28..40).contains(&percent(Kind::Zero)), "{share:?}");
        for kind in [Kind::Text, Kind::Records, Kind::Random, Kind::Repeated] {
            assert!((8..26).contains(&percent(kind)), "{share:?}");
        }
        assert!((60..300).contains(&(pages / changes)), "mean run {}", pages / changes);
    }

    #[test]
    fn only_zero_and_repeated_pages_are_equal_to_others() {
        let contents = Contents::new(42);
        let mut seen = HashSet::new();
        let mut repeats = 0;
        let mut page_bytes = [0; PAGE_BYTES];
        for page in 0..8192 {
            contents.fill(page, &mut page_bytes);
            let kind = contents.kind(page);
            assert_eq!(page_bytes.iter().all(|b| *b == 0), kind == Kind::Zero, "page {page}");
            let new = seen.insert(page_bytes);
            if kind == Kind::Repeated {
                repeats += u64::from(!new);
            } else {
                assert!(new || kind == Kind::Zero, "page {page} ({kind:?}) occurs twice");
            }
        }
        assert!(repeats > 100, "{repeats} repeated pages");
    }

    #[test]
    fn the_seed_decides() {
        let (mut a, mut b) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let page = (0..).find(|p| Contents::new(1).kind(*p) == Kind::Random).unwrap();
        Contents::new(1).fill(page, &mut a);
        Contents::new(1).fill(page, &mut b);
        assert_eq!(a, b);
        Contents::new(2).fill(page, &mut b);
        assert_ne!(a, b);
    }
}
