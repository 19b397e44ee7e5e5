//! Having parts of a file fetched before they are read.

use std::fs::File;

use rustix::fs::{Advice, fadvise};
use vmpager_core::ByteRange;

/// What lies between two ranges is fetched with them, if it is no more: to skip it
/// would cost as much.
const GAP: u64 = 64 << 10;

/// Asks the kernel to fetch ranges of a file into the page cache, in as few reads
/// as makes sense. It is only advice: whoever reads them finds out what is wrong.
pub(crate) fn fetch(file: &File, ranges: impl Iterator<Item = ByteRange>) {
    for span in spans(ranges) {
        let _ = fadvise(file, span.start, std::num::NonZeroU64::new(span.len), Advice::WillNeed);
    }
}

/// Ranges, those that are near each other as one.
fn spans(ranges: impl Iterator<Item = ByteRange>) -> Vec<ByteRange> {
    let mut spans: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match spans.last_mut() {
            Some(last) if range.start >= last.start && range.start <= last.end() + GAP => {
                last.len = last.len.max(range.end() - last.start);
            }
            _ => spans.push(range),
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_near_each_other_are_fetched_together() {
        let range = |start: u64, end: u64| ByteRange::new(start, end - start);
        let ranges = [(0, 10), (10, 20), (5, 8), (20 + GAP, 30 + GAP), (200_000, 200_001), (7, 9)];
        let seen = spans(ranges.iter().map(|(start, end)| range(*start, *end)));
        assert_eq!(seen, [range(0, 30 + GAP), range(200_000, 200_001), range(7, 9)]);
    }
}
