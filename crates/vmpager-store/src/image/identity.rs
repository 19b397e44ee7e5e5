//! The identity of memory contents: what a layer names its parent by.
//!
//! A hash of hashes, so that pages are hashed by many threads and runs of zeroes
//! cost nothing. How the contents are packed does not enter into it: the same
//! memory has one identity raw, packed, repacked, in layers and flattened.

use std::fmt;
use std::sync::OnceLock;

/// Pages whose hashes are hashed together.
const BLOCK_PAGES: usize = 1024;

/// The blake3 hash of a page.
pub(crate) type PageHash = [u8; 32];

/// Identity of memory contents.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentId(pub(crate) [u8; 32]);

impl ContentId {
    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ContentId {
    /// In hexadecimal digits: all of them, or as many as the precision says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&blake3::Hash::from(self.0).to_hex())
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The hash of a page of zeroes.
pub(crate) fn zero_page() -> &'static PageHash {
    static HASH: OnceLock<PageHash> = OnceLock::new();
    HASH.get_or_init(|| *blake3::hash(&[0; 4096]).as_bytes())
}

/// The hash of a whole block of zero pages.
fn zero_block() -> &'static [u8; 32] {
    static HASH: OnceLock<[u8; 32]> = OnceLock::new();
    HASH.get_or_init(|| {
        let mut hasher = blake3::Hasher::new();
        for _ in 0..BLOCK_PAGES {
            hasher.update(zero_page());
        }
        *hasher.finalize().as_bytes()
    })
}

/// Takes the pages of a memory in order.
#[derive(Debug)]
pub(crate) struct ContentHasher {
    all: blake3::Hasher,
    block: blake3::Hasher,
    in_block: usize,
}

impl ContentHasher {
    pub(crate) fn new(memory_bytes: u64) -> Self {
        let mut all = blake3::Hasher::new();
        all.update(&memory_bytes.to_le_bytes());
        Self { all, block: blake3::Hasher::new(), in_block: 0 }
    }

    /// The next page's hash.
    pub(crate) fn page(&mut self, hash: &PageHash) {
        self.block.update(hash);
        self.in_block += 1;
        if self.in_block == BLOCK_PAGES {
            self.end_block();
        }
    }

    /// The next pages are zero.
    pub(crate) fn zero_pages(&mut self, mut count: u64) {
        while count > 0 {
            if self.in_block == 0 && count >= BLOCK_PAGES as u64 {
                self.all.update(zero_block());
                count -= BLOCK_PAGES as u64;
            } else {
                self.page(zero_page());
                count -= 1;
            }
        }
    }

    fn end_block(&mut self) {
        self.all.update(self.block.finalize().as_bytes());
        self.block.reset();
        self.in_block = 0;
    }

    /// The identity of the contents, all pages of which were taken.
    pub(crate) fn finish(&mut self) -> ContentId {
        if self.in_block > 0 {
            self.end_block();
        }
        ContentId(*self.all.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plainly(pages: &[[u8; 4096]]) -> ContentId {
        let mut all = (pages.len() as u64 * 4096).to_le_bytes().to_vec();
        for block in pages.chunks(BLOCK_PAGES) {
            let hashes: Vec<u8> =
                block.iter().flat_map(|page| *blake3::hash(page).as_bytes()).collect();
            all.extend(blake3::hash(&hashes).as_bytes());
        }
        ContentId(*blake3::hash(&all).as_bytes())
    }

    /// Against the definition, written down once more; zeroes by the short way
    /// and by the long one.
    #[test]
    fn the_identity_is_a_hash_of_hashes_of_hashes() {
        let mut pages = vec![[0; 4096]; 3 * BLOCK_PAGES + 5];
        pages[1].fill(7);
        pages[2500].fill(8);
        let mut hasher = ContentHasher::new(pages.len() as u64 * 4096);
        hasher.zero_pages(1);
        hasher.page(blake3::hash(&pages[1]).as_bytes());
        hasher.zero_pages(2498);
        hasher.page(blake3::hash(&pages[2500]).as_bytes());
        hasher.zero_pages(pages.len() as u64 - 2501);
        let id = hasher.finish();
        assert_eq!(id, plainly(&pages));
        assert_eq!(format!("{id:.8}").len(), 8);
        pages.swap(1, 2);
        assert_ne!(id, plainly(&pages));
    }
}
