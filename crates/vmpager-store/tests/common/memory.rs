//! Memory to be packed, of pages of all kinds.
#![allow(dead_code, reason = "each test binary uses a part")]

use proptest::prelude::*;

use super::PAGE;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    Zero,
    /// Nothing that shrinks, other for every number.
    Noise(u8),
    /// Something that shrinks, other for every number.
    Text(u8),
}

pub(crate) fn page(of: Page) -> Vec<u8> {
    let mut page = Vec::new();
    match of {
        Page::Zero => {}
        Page::Noise(seed) => {
            let mut state = u64::from(seed) + 1;
            while page.len() < 4096 {
                // xorshift64.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                page.extend(state.to_le_bytes());
            }
        }
        Page::Text(seed) => {
            for word in 0..256_u32 {
                page.extend(format!("{seed:03} word {word:6}\n").as_bytes());
            }
        }
    }
    page.resize(4096, 0);
    page
}

pub(crate) fn memory(pages: &[Page]) -> Vec<u8> {
    pages.iter().flat_map(|of| page(*of)).collect()
}

pub(crate) fn any_page() -> impl Strategy<Value = Page> {
    prop_oneof![
        2 => Just(Page::Zero),
        1 => (0..40_u8).prop_map(Page::Noise),
        2 => (0..40_u8).prop_map(Page::Text),
    ]
}

/// Memory with runs of zeroes, of distinct and of like pages.
pub(crate) fn any_memory(most: usize) -> impl Strategy<Value = Vec<Page>> {
    let run = (any_page(), 1..20_usize, any::<bool>()).prop_map(|(first, count, alike)| {
        let nth = |n: usize| {
            let n = if alike { 0 } else { u8::try_from(n).unwrap() };
            match first {
                Page::Zero => Page::Zero,
                Page::Noise(seed) => Page::Noise(seed + n),
                Page::Text(seed) => Page::Text(seed + n),
            }
        };
        (0..count).map(nth).collect::<Vec<_>>()
    });
    prop::collection::vec(run, 1..most).prop_map(|runs| runs.concat())
}

/// Some hundred pages of all kinds, always the same.
pub(crate) fn mixed() -> Vec<Page> {
    (0..600_u64)
        .map(|n| match n.wrapping_mul(n) / 7 % 5 {
            0 | 3 => Page::Zero,
            1 => Page::Noise(u8::try_from(n % 90).unwrap()),
            _ => Page::Text(u8::try_from(n / 3 % 120).unwrap()),
        })
        .collect()
}

/// Writes memory to a file, with holes where it is zero.
pub(crate) fn write_sparse(file: &std::fs::File, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    file.set_len(bytes.len() as u64).unwrap();
    for (at, page) in (0..).step_by(4096).zip(bytes.chunks(4096)) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, at).unwrap();
        }
    }
    assert_eq!(bytes.len() as u64 % PAGE, 0);
}
