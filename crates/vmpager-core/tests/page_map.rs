//! The page map against a plain vector, by random operations at page counts
//! around word boundaries.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use vmpager_core::page_map::words_for;
use vmpager_core::{Content, PageMap, PageRun};

const HEADER_WORDS: usize = 512;
/// Words beyond the map, to see that they are left alone.
const SLACK_WORDS: usize = 3;
const SLACK: u64 = 0xdead_beef_dead_beef;

fn map(pages: u64) -> PageMap<Vec<AtomicU64>> {
    let mut words: Vec<_> = (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
    words.extend((0..SLACK_WORDS).map(|_| AtomicU64::new(SLACK)));
    PageMap::new(words, pages)
}

/// What is known of every page, the slow way.
#[derive(Debug)]
struct Oracle {
    /// Present, and content.
    pages: Vec<(bool, Content)>,
    holes: Vec<bool>,
}

fn bounds(run: PageRun) -> std::ops::Range<usize> {
    usize::try_from(run.first).unwrap()..usize::try_from(run.end()).unwrap()
}

impl Oracle {
    fn new(pages: u64) -> Self {
        let pages = usize::try_from(pages).unwrap();
        Self { pages: vec![(false, Content::Source); pages], holes: vec![false; pages] }
    }

    fn run(&mut self, run: PageRun) -> &mut [(bool, Content)] {
        &mut self.pages[bounds(run)]
    }

    fn get(&self, page: u64) -> (bool, Content) {
        self.pages[usize::try_from(page).unwrap()]
    }

    fn is_free(&self, page: u64) -> bool {
        self.get(page) == (false, Content::Source)
    }

    /// Claims the pages in order, up to the first that is not free.
    fn claim(&mut self, pages: impl Iterator<Item = u64>) -> u64 {
        let mut count = 0;
        for page in pages {
            if !self.is_free(page) {
                break;
            }
            self.run(PageRun::new(page, 1))[0].1 = Content::Claimed;
            count += 1;
        }
        count
    }

    fn retract(&mut self, run: PageRun, to: Content) -> u64 {
        let mut count = 0;
        for page in self.run(run) {
            if *page == (false, Content::Claimed) {
                page.1 = to;
                count += 1;
            }
        }
        count
    }

    fn publish(&mut self, run: PageRun) -> u64 {
        let mut count = 0;
        for page in self.run(run) {
            count += u64::from(!page.0);
            page.0 = true;
        }
        count
    }

    fn mark_zero(&mut self, run: PageRun) -> u64 {
        let mut count = 0;
        for page in self.run(run) {
            let due = matches!(page, (false, Content::Source | Content::Claimed));
            count += u64::from(due);
            *page = (false, Content::Zero);
        }
        count
    }

    fn next_source(&self, within: PageRun) -> Option<u64> {
        within.pages().find(|&p| self.is_free(p))
    }

    fn mark_holes(&mut self, run: PageRun) {
        self.holes[bounds(run)].fill(true);
    }

    fn clear_holes(&mut self, run: PageRun) -> u64 {
        let mut count = 0;
        for hole in &mut self.holes[bounds(run)] {
            count += u64::from(std::mem::take(hole));
        }
        count
    }

    /// Ends where the hole does, or the word, or the run.
    fn next_holes(&self, within: PageRun) -> Option<PageRun> {
        let hole = |&p: &u64| self.holes[usize::try_from(p).unwrap()];
        let first = within.pages().find(hole)?;
        let end = within.end().min((first / 64 + 1) * 64);
        Some(PageRun::new(first, (first..end).take_while(hole).count() as u64))
    }

    fn alike_from(&self, first: u64, max: u64) -> u64 {
        let end = first.saturating_add(max).min(self.pages.len() as u64);
        (first..end).take_while(|&p| self.get(p) == self.get(first)).count() as u64
    }
}

#[derive(Clone, Debug)]
enum Op {
    ClaimUp(u64, u64),
    ClaimDown(u64, u64),
    Release(PageRun),
    Poison(PageRun),
    Publish(PageRun),
    MarkZero(PageRun),
    NextSource(PageRun),
    AlikeFrom(u64, u64),
    MarkHoles(PageRun),
    ClearHoles(PageRun),
    NextHoles(PageRun),
}

fn page_counts() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200])
}

/// A page index in `0..=limit`, often next to a word boundary.
fn position(limit: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        0..=limit,
        (0..=limit / 32, 0..3_u64)
            .prop_map(move |(word, d)| (word * 32 + d).saturating_sub(1).min(limit)),
        Just(0),
        Just(limit),
    ]
}

fn run(pages: u64) -> impl Strategy<Value = PageRun> {
    (position(pages), position(pages))
        .prop_map(|(a, b)| PageRun::new(a.min(b), a.max(b) - a.min(b)))
}

/// How many pages to ask for: short, all, or far too many.
fn max(pages: u64) -> impl Strategy<Value = u64> {
    prop_oneof![position(pages), Just(u64::MAX)]
}

fn op(pages: u64) -> impl Strategy<Value = Op> {
    let page = move || 0..pages;
    prop_oneof![
        4 => (position(pages), max(pages)).prop_map(|(p, n)| Op::ClaimUp(p, n)),
        4 => (position(pages), max(pages)).prop_map(|(p, n)| Op::ClaimDown(p, n)),
        3 => run(pages).prop_map(Op::Release),
        1 => run(pages).prop_map(Op::Poison),
        2 => run(pages).prop_map(Op::Publish),
        1 => run(pages).prop_map(Op::MarkZero),
        2 => run(pages).prop_map(Op::NextSource),
        2 => (page(), max(pages)).prop_map(|(p, n)| Op::AlikeFrom(p, n.max(1))),
        2 => run(pages).prop_map(Op::MarkHoles),
        1 => run(pages).prop_map(Op::ClearHoles),
        2 => run(pages).prop_map(Op::NextHoles),
    ]
}

fn scenario() -> impl Strategy<Value = (u64, Vec<Op>)> {
    page_counts().prop_flat_map(|pages| (Just(pages), prop::collection::vec(op(pages), 1..60)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn agrees_with_a_vector((pages, ops) in scenario()) {
        let map = map(pages);
        let mut oracle = Oracle::new(pages);
        for op in ops {
            match op {
                Op::ClaimUp(first, max) => {
                    let end = first.saturating_add(max).min(pages);
                    prop_assert_eq!(map.claim_up(first, max), oracle.claim(first..end), "{:?}", op);
                }
                Op::ClaimDown(end, max) => {
                    let floor = end.saturating_sub(max);
                    let expected = oracle.claim((floor..end).rev());
                    prop_assert_eq!(map.claim_down(end, max), expected, "{:?}", op);
                }
                Op::Release(run) => {
                    let expected = oracle.retract(run, Content::Source);
                    prop_assert_eq!(map.release(run), expected, "{:?}", op);
                }
                Op::Poison(run) => {
                    let expected = oracle.retract(run, Content::Poisoned);
                    prop_assert_eq!(map.poison(run), expected, "{:?}", op);
                }
                Op::Publish(run) => {
                    prop_assert_eq!(map.publish(run), oracle.publish(run), "{:?}", op);
                }
                Op::MarkZero(run) => {
                    prop_assert_eq!(map.mark_zero(run), oracle.mark_zero(run), "{:?}", op);
                }
                Op::NextSource(run) => {
                    prop_assert_eq!(map.next_source(run), oracle.next_source(run), "{:?}", op);
                }
                Op::AlikeFrom(first, max) => {
                    let expected = oracle.alike_from(first, max);
                    prop_assert_eq!(map.alike_from(first, max), expected, "{:?}", op);
                }
                Op::MarkHoles(run) => {
                    map.mark_holes(run);
                    oracle.mark_holes(run);
                }
                Op::ClearHoles(run) => {
                    prop_assert_eq!(map.clear_holes(run), oracle.clear_holes(run), "{:?}", op);
                }
                Op::NextHoles(run) => {
                    prop_assert_eq!(map.next_holes(run), oracle.next_holes(run), "{:?}", op);
                }
            }
            for page in 0..pages {
                let seen = (map.is_present(page), map.content(page));
                prop_assert_eq!(seen, oracle.get(page), "page {} after {:?}", page, &op);
            }
            let present = oracle.pages.iter().filter(|(present, _)| *present).count();
            prop_assert_eq!(map.count_present(), present as u64);
            check_layout(&map, &oracle)?;
        }
    }
}

/// Reads the words as the module's table describes them: what another process
/// would do.
fn check_layout(map: &PageMap<Vec<AtomicU64>>, oracle: &Oracle) -> Result<(), TestCaseError> {
    let words: Vec<u64> = map.storage().iter().map(|w| w.load(Ordering::Acquire)).collect();
    let pages = oracle.pages.len();
    let magic = u64::from_le_bytes(*b"VMPGMAP\0");
    prop_assert_eq!(&words[..4], &[magic, 2, pages as u64, 512]);
    prop_assert!(words[4..HEADER_WORDS].iter().all(|word| *word == 0), "reserved, and no slots");
    let (absent, rest) = words[HEADER_WORDS..].split_at(pages.div_ceil(64));
    let (content, rest) = rest.split_at(pages.div_ceil(32));
    let (holes, slack) = rest.split_at(pages.div_ceil(64));
    for p in 0..absent.len() * 64 {
        let expected = oracle.pages.get(p).is_some_and(|(present, _)| !present);
        prop_assert_eq!(absent[p / 64] >> (p % 64) & 1 == 1, expected, "absent bit {}", p);
        let expected = oracle.holes.get(p) == Some(&true);
        prop_assert_eq!(holes[p / 64] >> (p % 64) & 1 == 1, expected, "hole bit {}", p);
    }
    for p in 0..content.len() * 32 {
        let expected = match oracle.pages.get(p).map(|(_, content)| content) {
            None | Some(Content::Source) => 0,
            Some(Content::Claimed) => 1,
            Some(Content::Zero) => 2,
            Some(Content::Poisoned) => 3,
        };
        prop_assert_eq!(content[p / 32] >> (p % 32 * 2) & 3, expected, "content of {}", p);
    }
    prop_assert_eq!(slack, &[SLACK; SLACK_WORDS]);
    Ok(())
}

#[test]
#[should_panic(expected = "too few words for 33 pages")]
fn too_few_words_are_refused() {
    let words: Vec<_> = (0..words_for(33) - 1).map(|_| AtomicU64::new(0)).collect();
    PageMap::new(words, 33);
}

#[test]
fn an_empty_map_is_harmless() {
    let map = map(0);
    assert_eq!(map.claim_up(0, 5), 0);
    assert_eq!(map.claim_down(0, 5), 0);
    assert_eq!(map.next_source(PageRun::new(0, 0)), None);
    assert_eq!(map.next_holes(PageRun::new(0, 0)), None);
    assert_eq!(map.clear_holes(PageRun::new(0, 0)), 0);
    assert_eq!(map.count_present(), 0);
    assert_eq!(map.mark_zero(PageRun::new(0, 0)), 0);
}

/// A successor has what was claimed fetched again, and everything else as it was.
#[test]
fn a_successor_takes_back_claims_and_nothing_else() {
    let words: Vec<_> = (0..words_for(200)).map(|_| AtomicU64::new(0)).collect();
    let words: std::sync::Arc<[AtomicU64]> = words.into();
    let map = PageMap::new(words.clone(), 200);
    assert_eq!((map.claim_up(0, 10), map.publish(PageRun::new(0, 5))), (10, 5));
    map.mark_zero(PageRun::new(60, 8));
    map.mark_holes(PageRun::new(64, 3));
    assert_eq!((map.claim_up(150, 4), map.poison(PageRun::new(151, 1))), (4, 1));
    let all = 0..words.len();
    let (next, left) = PageMap::take_over(words.clone(), 200, std::slice::from_ref(&all)).unwrap();
    assert_eq!((left.outstanding, left.holes), (200 - 5 - 8 - 1, 3));
    let contents = |pages: std::ops::Range<u64>| -> Vec<_> {
        pages.map(|page| (next.content(page), next.is_present(page))).collect()
    };
    assert_eq!(contents(0..5), [(Content::Claimed, true); 5]);
    assert_eq!(contents(5..10), [(Content::Source, false); 5]);
    assert_eq!(contents(60..68), [(Content::Zero, false); 8]);
    let poisoned = (Content::Poisoned, false);
    assert_eq!(contents(150..152), [(Content::Source, false), poisoned]);

    // Words that nobody has written are known without a look.
    let written = all.clone().filter(|at| words[*at].load(Ordering::Relaxed) != 0);
    let written: Vec<_> = written.map(|at| at..at + 1).collect();
    assert!(written.len() < words.len(), "some are zero");
    assert_eq!(PageMap::take_over(words.clone(), 200, &written).unwrap().1, left);

    assert!(
        PageMap::take_over(words.clone(), 201, std::slice::from_ref(&all)).is_err(),
        "of other pages"
    );
    words[1].store(1, Ordering::Relaxed);
    let error = PageMap::take_over(words, 200, &[all]).unwrap_err().to_string();
    assert!(error.contains("version 1"), "{error}");
}
