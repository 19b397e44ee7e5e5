//! The page map under loom: every interleaving, and every value the memory
//! model allows a load to return, of two or three threads on a few pages.
//!
//! Run by `cargo xtask loom`; without `--cfg loom` this file is empty.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use vmpager_core::page_map::words_for;
use vmpager_core::{Content, PageMap, PageRun};

type Map = PageMap<Box<[AtomicU64]>>;

/// The first page of the second content word.
const WORD: u64 = 32;

fn map(pages: u64) -> Arc<Map> {
    let words: Vec<_> = (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
    Arc::new(PageMap::new(words.into_boxed_slice(), pages))
}

fn one(page: u64) -> PageRun {
    PageRun::new(page, 1)
}

/// Runs each closure on a thread of its own and returns what they returned.
fn race<T: 'static, const N: usize>(map: &Arc<Map>, threads: [fn(&Map) -> T; N]) -> [T; N] {
    let handles = threads.map(|f| {
        let map = Arc::clone(map);
        thread::spawn(move || f(&map))
    });
    handles.map(|h| h.join().unwrap())
}

/// Every page of `pages` belongs to exactly one run, and is `Claimed`.
fn assert_one_owner(map: &Map, pages: std::ops::Range<u64>, owners: &[PageRun]) {
    for page in pages {
        let count = owners.iter().filter(|run| run.pages().contains(&page)).count();
        assert_eq!(count, 1, "page {page} among {owners:?}");
        assert_eq!(map.content(page), Content::Claimed, "page {page}");
    }
}

fn up(map: &Map, first: u64, max: u64) -> PageRun {
    PageRun::new(first, map.claim_up(first, max))
}

fn down(map: &Map, end: u64, max: u64) -> PageRun {
    let count = map.claim_down(end, max);
    PageRun::new(end - count, count)
}

/// I1: who sees a page present sees its bytes, whoever else published into the
/// same word in between.
#[test]
fn contents_are_visible_before_the_present_bit() {
    loom::model(|| {
        let map = map(2);
        let data = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let writers = [0, 1].map(|page: usize| {
            let (map, data) = (Arc::clone(&map), Arc::clone(&data));
            thread::spawn(move || {
                data[page].store(7, Ordering::Relaxed);
                assert_eq!(map.publish(one(page as u64)), 1);
            })
        });
        for (page, data) in [(1, &data[1]), (0, &data[0])] {
            if map.is_present(page) {
                assert_eq!(data.load(Ordering::Relaxed), 7, "page {page}");
            }
        }
        if map.count_present() == 2 {
            assert!(data.iter().all(|d| d.load(Ordering::Relaxed) == 7));
        }
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(map.count_present(), 2);
    });
}

/// I2 within a word, three claimers from both sides.
#[test]
fn overlapping_claims_have_one_owner() {
    loom::model(|| {
        let map = map(3);
        let owners = race(&map, [|m| up(m, 0, 3), |m| down(m, 3, 3), |m| up(m, 1, 1)]);
        assert_one_owner(&map, 0..3, &owners);
    });
}

/// I2 where upward and downward claims meet across two content words.
#[test]
fn claims_across_words_have_one_owner() {
    loom::model(|| {
        let map = map(WORD + 2);
        let owners = race(&map, [|m| up(m, WORD - 1, 2), |m| down(m, WORD + 1, 2)]);
        assert_one_owner(&map, WORD - 1..WORD + 1, &owners);
        assert_eq!(map.content(WORD - 2), Content::Source);
        assert_eq!(map.content(WORD + 1), Content::Source);
    });
}

/// The same with a third that takes a page away between the two words' turns.
#[test]
fn three_claimers_across_words_have_one_owner() {
    loom::model(|| {
        let map = map(WORD + 1);
        let owners =
            race(&map, [|m| up(m, WORD - 1, 2), |m| down(m, WORD + 1, 2), |m| up(m, WORD, 1)]);
        assert_one_owner(&map, WORD - 1..WORD + 1, &owners);
    });
}

/// Runs `claimer` (which may claim pages 0 and 1, and gives the claim the end
/// it likes) against `mark_zero` of page 0, with somebody looking on.
fn against_mark_zero(claimed_before: bool, claimer: fn(&Map) -> u64) {
    loom::model(move || {
        let map = map(2);
        if claimed_before {
            assert_eq!(map.claim_up(0, 2), 2);
        }
        let actor = {
            let map = Arc::clone(&map);
            thread::spawn(move || claimer(&map))
        };
        let onlooker = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                if map.content(0) == Content::Zero {
                    assert_eq!(map.content(0), Content::Zero, "zero is for ever");
                }
            })
        };
        let ended = map.mark_zero(one(0));
        assert_eq!(map.content(0), Content::Zero);
        let ended = ended + actor.join().unwrap();
        onlooker.join().unwrap();
        assert_eq!(map.content(0), Content::Zero);
        assert_eq!(map.claim_up(0, 1), 0, "nobody fetches it again");
        assert_eq!(ended, 1, "one of the two ends the wait for its bytes");
    });
}

#[test]
fn a_claim_does_not_resurrect_zero() {
    against_mark_zero(false, |map| {
        map.claim_up(0, 2);
        0
    });
    against_mark_zero(false, |map| {
        map.claim_down(2, 2);
        0
    });
}

#[test]
fn a_release_does_not_resurrect_zero() {
    against_mark_zero(true, |map| {
        map.release(PageRun::new(0, 2));
        assert_eq!(map.content(1), Content::Source);
        0
    });
}

#[test]
fn a_poison_does_not_resurrect_zero() {
    against_mark_zero(true, |map| {
        let poisoned = map.poison(PageRun::new(0, 2));
        assert_eq!(map.content(1), Content::Poisoned);
        poisoned - 1 // page 1 is nobody else's
    });
}

#[test]
fn zeroing_twice_ends_the_wait_once() {
    against_mark_zero(true, |map| map.mark_zero(one(0)));
}

/// A publish that races a removal may set the present bit late (the bit is
/// advice), but the page stays zero, and who finds it absent is never sent to
/// the source.
#[test]
fn a_publish_does_not_resurrect_zero() {
    loom::model(|| {
        let map = map(2);
        assert_eq!(map.claim_up(0, 2), 2);
        let publisher = {
            let map = Arc::clone(&map);
            thread::spawn(move || assert_eq!(map.publish(PageRun::new(0, 2)), 2))
        };
        map.mark_zero(one(0));
        assert_eq!(map.content(0), Content::Zero);
        publisher.join().unwrap();
        assert_eq!(map.content(0), Content::Zero);
        assert_eq!(map.next_source(PageRun::new(0, map.pages())), None);
        assert!(map.is_present(1));
    });
}

/// A present page that is seen to go absent is seen to be zero.
#[test]
fn who_sees_a_present_page_vanish_sees_zero() {
    loom::model(|| {
        let map = map(1);
        map.claim_up(0, 1);
        map.publish(one(0));
        let remover = {
            let map = Arc::clone(&map);
            thread::spawn(move || assert_eq!(map.mark_zero(one(0)), 0))
        };
        if !map.is_present(0) {
            assert_eq!(map.content(0), Content::Zero);
        }
        remover.join().unwrap();
        assert!(!map.is_present(0));
    });
}

/// A released page is claimed by one of those who want it, or free again:
/// never lost, never shared. What the first owner did happened before what the
/// next one does.
#[test]
fn a_released_page_is_not_lost() {
    loom::model(|| {
        let map = map(2);
        assert_eq!(map.claim_up(0, 2), 2);
        let scratch = Arc::new(AtomicU64::new(0));
        let claimers = [0, 1].map(|first| {
            let (map, scratch) = (Arc::clone(&map), Arc::clone(&scratch));
            thread::spawn(move || {
                let mine = up(&map, first, 1);
                if mine.count > 0 {
                    assert_eq!(scratch.load(Ordering::Relaxed), 7);
                }
                mine
            })
        });
        scratch.store(7, Ordering::Relaxed);
        assert_eq!(map.release(PageRun::new(0, 2)), 2);
        let late = up(&map, 0, 2);
        let mut owners = claimers.map(|c| c.join().unwrap()).to_vec();
        owners.push(late);
        // Page 1 may be left over if `late` was stopped at page 0.
        let rest = map.next_source(PageRun::new(0, map.pages()));
        if let Some(page) = rest {
            assert_eq!(page, 1);
            assert_eq!(late.count, 0);
            owners.push(up(&map, page, 1));
        }
        assert_one_owner(&map, 0..2, &owners);
    });
}

/// Owners of one page follow each other: each sees all that the one before it
/// did, even if the word looks as if nothing had happened in between.
#[test]
fn owners_follow_each_other() {
    loom::model(|| {
        let map = map(1);
        let turns = Arc::new(AtomicU64::new(0));
        let owners = [(), ()].map(|()| {
            let (map, turns) = (Arc::clone(&map), Arc::clone(&turns));
            thread::spawn(move || {
                let mine = map.claim_up(0, 1);
                if mine == 1 {
                    let before = turns.load(Ordering::Relaxed);
                    turns.store(before + 1, Ordering::Relaxed);
                    assert_eq!(map.release(one(0)), 1);
                }
                mine
            })
        });
        let expected: u64 = owners.map(|o| o.join().unwrap()).iter().sum();
        assert_eq!(turns.load(Ordering::Relaxed), expected);
        assert_eq!(map.content(0), Content::Source);
    });
}

/// Each page in a hole is counted by one of those who clear it, in each word
/// of the bitmap.
#[test]
fn a_hole_is_counted_once() {
    loom::model(|| {
        let map = map(66);
        map.mark_holes(PageRun::new(62, 4));
        let counts = race(
            &map,
            [|m| m.clear_holes(PageRun::new(62, 3)), |m| m.clear_holes(PageRun::new(63, 3))],
        );
        assert_eq!(counts.iter().sum::<u64>(), 4, "{counts:?}");
        assert_eq!(map.next_holes(PageRun::new(0, map.pages())), None);
    });
}

/// Marking and clearing leave other pages of the word alone.
#[test]
fn holes_do_not_disturb_their_neighbours() {
    loom::model(|| {
        let map = map(4);
        map.mark_holes(PageRun::new(0, 2));
        let counts = race(
            &map,
            [
                |m| m.clear_holes(one(0)),
                |m| {
                    m.mark_holes(one(3));
                    0
                },
                |m| m.clear_holes(one(1)),
            ],
        );
        assert_eq!(counts, [1, 0, 1]);
        assert_eq!(map.next_holes(PageRun::new(0, map.pages())), Some(one(3)));
    });
}

/// A hole that gets its memory while it is given back: still zero, and no hole
/// any more, which one of the two is told.
#[test]
fn a_hole_filled_and_given_back_stays_zero() {
    loom::model(|| {
        let map = map(2);
        map.mark_zero(PageRun::new(0, 2));
        map.mark_holes(PageRun::new(0, 2));
        let [filled, given_back] = race(
            &map,
            [
                |m| {
                    m.publish(PageRun::new(0, 2));
                    m.clear_holes(PageRun::new(0, 2))
                },
                |m| {
                    assert_eq!(m.mark_zero(one(0)), 0);
                    m.clear_holes(one(0))
                },
            ],
        );
        assert_eq!(filled + given_back, 2);
        assert_eq!(map.next_holes(PageRun::new(0, map.pages())), None);
        assert_eq!([map.content(0), map.content(1)], [Content::Zero; 2]);
        assert_eq!(map.next_source(PageRun::new(0, map.pages())), None);
        assert!(map.is_present(1));
    });
}
