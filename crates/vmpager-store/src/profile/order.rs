//! The order in which the pages of a profile are brought in, and stored.

use std::collections::HashSet;
use std::ops::Range;

/// Pages of the part that comes first. Each further part is twice as large, up to
/// [`MAX_WAVE`].
const FIRST_WAVE: usize = 64;
/// Pages of the largest part: 16 MiB. Larger ones would bring pages long before they
/// are needed.
const MAX_WAVE: usize = 4096;

/// Pages of a block, aligned in memory: 256 KiB.
const BLOCK: u32 = 64;
/// A block is dense if a profile has so many of its pages.
const DENSE: usize = BLOCK as usize / 2;
/// Gaps of so many pages in a dense block are brought too: that costs no more than to
/// begin another run, and less than a fault, should this guest want the page.
const SMALL_GAP: u32 = 4;
/// Dense blocks come at once from the part of this size on. What comes before is
/// needed at once, and page by page.
const WHOLE_BLOCKS: usize = 512;

/// The order in which to bring in pages that were first touched in this order; none
/// may be there twice.
///
/// In the large it is that of the touches. Within parts of some hundreds or thousands
/// of pages it is that of addresses, so that neighbours come together; and the first
/// touch of a block of which most pages are wanted sooner or later brings them all, and
/// what lies between where that is little. A run of pages costs little more than a page, and
/// a guest that touches its memory at random has no runs in the order of time.
pub fn replay_order(touched: &[u32]) -> Vec<Range<u32>> {
    let mut by_address = touched.to_vec();
    by_address.sort_unstable();
    let block_of = |page: u32| {
        let start = page - page % BLOCK;
        let first = by_address.partition_point(|other| *other < start);
        let count = by_address[first..].partition_point(|other| other - start < BLOCK);
        &by_address[first..first + count]
    };
    let mut order = Vec::new();
    // Pages and blocks that have had their turn.
    let (mut alone, mut whole) = (HashSet::new(), HashSet::new());
    let (mut rest, mut wave) = (touched, FIRST_WAVE);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(wave.min(rest.len()));
        let mut pages = Vec::with_capacity(now.len());
        for &page in now {
            if whole.contains(&(page / BLOCK)) {
                continue;
            }
            let block = if wave < WHOLE_BLOCKS { &[] } else { block_of(page) };
            if block.len() < DENSE {
                alone.insert(page);
                pages.push(page);
            } else {
                whole.insert(page / BLOCK);
                let mut next = block[0];
                for &page in block {
                    let from = if page - next <= SMALL_GAP { next } else { page };
                    pages.extend((from..=page).filter(|page| !alone.contains(page)));
                    next = page + 1;
                }
            }
        }
        pages.sort_unstable();
        push_runs(&mut order, &pages);
        (rest, wave) = (later, (wave * 2).min(MAX_WAVE));
    }
    order
}

/// Adds pages in the order of addresses, those that are neighbours as one run.
fn push_runs(order: &mut Vec<Range<u32>>, pages: &[u32]) {
    let start = order.len();
    for &page in pages {
        match order.get_mut(start..).and_then(<[_]>::last_mut) {
            Some(run) if run.end == page => run.end = page + 1,
            _ => order.push(page..page + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that touches 24,576 of 25,600 pages at random: one touch after the
    /// other at first, then in runs that no order of time would have.
    #[test]
    fn random_touches_of_most_pages_come_in_long_runs() {
        let touched: Vec<u32> = (0..24_576).map(|n| (n * 7919) % 25_600).collect();
        let order = replay_order(&touched);
        let mut pages: Vec<u32> = order.iter().flat_map(Clone::clone).collect();
        let mut first = touched[..448].to_vec();
        first.sort_unstable();
        let mut begun = pages[..448].to_vec();
        begun.sort_unstable();
        assert_eq!(begun, first);
        // Each of the first cuts a run in two.
        assert!(order.len() < 1500, "{} runs", order.len());
        pages.sort_unstable();
        let count = pages.len();
        pages.dedup();
        assert_eq!(pages.len(), count, "each once");
        let all: HashSet<u32> = pages.into_iter().collect();
        assert!(touched.iter().all(|page| all.contains(page)));
    }

    /// A half of each block is wanted: what lies between comes with it where that is
    /// little, and only there.
    #[test]
    fn small_gaps_are_brought_and_large_ones_kept() {
        for gap in [4, 5] {
            // Blocks of `gap` pages with such gaps between, at random.
            let pages = (0..8192).map(|n| n * 2731 % 8192);
            let touched: Vec<u32> = pages.map(|n| n / gap * gap * 2 + n % gap).collect();
            let mut pages: Vec<u32> = replay_order(&touched).into_iter().flatten().collect();
            pages.sort_unstable();
            pages.dedup();
            assert!(touched.iter().all(|page| pages.binary_search(page).is_ok()));
            let more = pages.len() - touched.len();
            // The first pages come alone.
            assert!(if gap == 4 { more > 5000 } else { more == 0 }, "{more} between");
        }
    }

    /// Few pages of a block are no reason to wait for them.
    #[test]
    fn pages_far_apart_keep_the_order_of_their_touches() {
        let touched: Vec<u32> = (0..9000).map(|n| (n * 7919) % 9001 * 10).collect();
        let order = replay_order(&touched);
        let last: Vec<u32> = order[448 + 512..].iter().flat_map(Clone::clone).collect();
        let wave: HashSet<u32> = touched[448 + 512..][..1024].iter().copied().collect();
        assert!(last[..1024].iter().all(|page| wave.contains(page)));
    }
}
