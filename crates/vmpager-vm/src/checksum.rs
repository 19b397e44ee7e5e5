//! The checksum of a page, computed alike by the host and by the guest.
//!
//! Four lanes, each `h = rotl((h ^ word) * MULTIPLIER, ROTATION)`. Every step
//! is a bijection of its word, so pages that differ in a single word never
//! have the same checksum.

use crate::PAGE_BYTES;

pub(crate) const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
pub(crate) const ROTATION: u32 = 29;
pub(crate) const SEEDS: [u64; 4] =
    [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89];

/// The checksum of a page's bytes.
pub fn checksum(page: &[u8; PAGE_BYTES]) -> u64 {
    let [mut a, mut b, mut c, mut d] = SEEDS;
    for words in page.as_chunks::<8>().0.as_chunks::<4>().0 {
        a = step(a, u64::from_le_bytes(words[0]));
        b = step(b, u64::from_le_bytes(words[1]));
        c = step(c, u64::from_le_bytes(words[2]));
        d = step(d, u64::from_le_bytes(words[3]));
    }
    let sum = step(step(step(a, b), c), d);
    sum ^ (sum >> 32)
}

const fn step(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(MULTIPLIER).rotate_left(ROTATION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_byte_and_any_swapped_words_change_it() {
        let mut page = [0; PAGE_BYTES];
        let zero = checksum(&page);
        assert_ne!(zero, 0);
        for at in 0..PAGE_BYTES {
            page[at] ^= 0x80;
            assert_ne!(checksum(&page), zero, "byte {at}");
            page[at] ^= 0x80;
        }
        page[0] = 1;
        let first = checksum(&page);
        page.swap(0, 32);
        assert_ne!(checksum(&page), first, "same lane, other place");
    }
}
