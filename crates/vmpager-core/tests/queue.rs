//! The fault queue: each way in which such a queue can go wrong, by name, and
//! random operations against a slow oracle.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vmpager_core::queue::{CELLS, FaultQueue, MAX_GFN, QueueError, Request, Taken, WORDS};

type Queue = FaultQueue<Arc<[AtomicU64]>>;

fn queue() -> Queue {
    let queue = FaultQueue::new((0..WORDS).map(|_| AtomicU64::new(0)).collect::<Arc<[_]>>());
    queue.enable();
    queue
}

fn gfns(queue: &Queue, reader: u64) -> Vec<u64> {
    std::iter::from_fn(|| queue.take(reader)).map(|taken| taken.gfn).collect()
}

#[test]
fn an_empty_queue_says_so() {
    let queue = queue();
    assert_eq!(queue.take(0), None);
    assert!(!queue.has_queued());
    queue.request(1, true);
    let taken = queue.take(0).unwrap();
    assert_eq!(queue.take(0), None, "taken is not queued");
    assert!(queue.commit(&taken));
    assert_eq!(queue.take(0), None);
}

#[test]
fn faults_are_taken_in_the_order_they_came() {
    let queue = queue();
    for gfn in [5, 3, 9, MAX_GFN - 1, 0] {
        assert!(matches!(queue.request(gfn, true), Request::Queued(_)));
    }
    assert_eq!(gfns(&queue, 0), [5, 3, 9, MAX_GFN - 1, 0]);
}

#[test]
fn a_page_is_queued_once_however_many_ask() {
    let queue = queue();
    let Request::Queued(first) = queue.request(7, true) else { panic!("queued") };
    queue.request(8, true);
    assert_eq!(queue.request(7, true), Request::Merged { position: first, tell: true });
    assert_eq!(gfns(&queue, 0), [7, 8]);
    let joined = Request::Merged { position: first, tell: false };
    assert_eq!(queue.request(7, true), joined, "it is being brought: nobody needs to be told");
}

/// A reader whose copy fails, or that gives up, must not lose the fault, nor
/// put it behind those that came later.
#[test]
fn an_abandoned_delivery_keeps_its_place() {
    let queue = queue();
    let position = match queue.request(1, true) {
        Request::Queued(position) => position,
        other => panic!("{other:?}"),
    };
    queue.request(2, true);
    let taken = queue.take(3).unwrap();
    assert!(queue.abandon(&taken));
    assert!(!queue.is_over(position) && !queue.abandon(&taken) && !queue.commit(&taken));
    assert_eq!(gfns(&queue, 4), [1, 2]);
}

#[test]
fn what_a_dead_reader_had_is_taken_by_another() {
    let queue = queue();
    (0..6).for_each(|gfn| assert!(matches!(queue.request(gfn, true), Request::Queued(_))));
    let (a, b) = (queue.take(1).unwrap(), queue.take(2).unwrap());
    let c = queue.take(1).unwrap();
    assert_eq!((a.gfn, b.gfn, c.gfn), (0, 1, 2));
    assert_eq!(queue.recover(1), 2);
    assert_eq!(gfns(&queue, 3), [0, 2, 3, 4, 5], "the other reader's are its own");
    assert!(!queue.commit(&a), "no longer its own");
    assert!(queue.commit(&b));
}

#[test]
fn a_fault_is_resolved_before_it_is_read() {
    let queue = queue();
    let Request::Queued(position) = queue.request(4, true) else { panic!("queued") };
    queue.request(5, true);
    assert_eq!(queue.resolved(4), Some(position));
    assert!(queue.is_over(position), "its waiter is released");
    assert_eq!(queue.resolved(4), None);
    assert_eq!(gfns(&queue, 0), [5], "and nobody reads it");
    assert_eq!(queue.resolved(5), None, "a taken one is its reader's");
}

#[test]
fn no_entry_outlives_its_last_waiter() {
    let queue = queue();
    let Request::Queued(position) = queue.request(4, true) else { panic!("queued") };
    queue.request(4, true);
    assert!(!queue.leave(position), "another one waits");
    assert!(queue.has_queued());
    assert!(queue.leave(position));
    assert!(!queue.has_queued() && queue.take(0).is_none());
    // A waiter that never waited, or left twice, is no waiter.
    queue.request(9, false);
    let Request::Merged { position, .. } = queue.request(9, false) else { panic!("merged") };
    assert!(!queue.leave(position));
    assert_eq!(gfns(&queue, 0), [9]);
}

/// Counts that dead waiters left behind are not the next lap's.
#[test]
fn dead_waiters_are_forgotten_with_their_lap() {
    let queue = queue();
    for gfn in 0..CELLS as u64 {
        queue.request(gfn, true);
        queue.request(gfn, true); // dies
        let taken = queue.take(0).unwrap();
        assert!(queue.commit(&taken));
    }
    let Request::Queued(position) = queue.request(1, true) else { panic!("queued") };
    assert!(queue.leave(position), "it was the only one of this lap");
}

#[test]
fn a_full_queue_says_so_and_forgets_nobody() {
    let queue = queue();
    let all: Vec<u64> = (0..CELLS as u64).collect();
    all.iter().for_each(|gfn| assert!(matches!(queue.request(*gfn, true), Request::Queued(_))));
    assert_eq!(queue.request(CELLS as u64, true), Request::Full);
    assert!(matches!(queue.request(17, true), Request::Merged { .. }), "joining takes no room");
    let taken: Vec<Taken> = std::iter::from_fn(|| queue.take(0)).collect();
    assert_eq!(queue.request(CELLS as u64, true), Request::Full, "taken is not done");
    // Room is where the oldest was: a later one gives none, or order would end.
    assert!(queue.commit(&taken[1]));
    assert_eq!(queue.request(CELLS as u64, true), Request::Full);
    assert!(queue.commit(&taken[0]));
    for gfn in [CELLS as u64, CELLS as u64 + 1] {
        assert!(matches!(queue.request(gfn, true), Request::Queued(_)));
    }
    assert_eq!(queue.request(CELLS as u64 + 2, true), Request::Full);
    assert_eq!(gfns(&queue, 0), [CELLS as u64, CELLS as u64 + 1]);
}

#[test]
fn disabling_ends_every_wait_and_enabling_begins_anew() {
    let queue = queue();
    let mut positions = Vec::new();
    for gfn in 0..10 {
        let Request::Queued(position) = queue.request(gfn, true) else { panic!("queued") };
        positions.push(position);
    }
    let taken = queue.take(0).unwrap();
    let mut woken = Vec::new();
    queue.disable(|position| woken.push(position));
    assert_eq!(woken, positions, "those taken as well");
    assert!(positions.iter().all(|position| queue.is_over(*position)));
    assert_eq!(queue.request(3, true), Request::Disabled);
    assert!(!queue.commit(&taken), "a late commit ends nothing");
    queue.enable();
    assert!(matches!(queue.request(0, true), Request::Queued(_)));
    assert!(!queue.commit(&taken), "nor anything of later");
    assert_eq!(gfns(&queue, 0), [0]);
}

/// Words that make no sense, as a hostile process may write them, hang nobody.
#[test]
fn spoilt_words_hang_nobody() {
    for word in [u64::MAX, 1, 2, 1 << 8, 0xffff_ff02, 1 << 27 | 1] {
        for head in [0, u64::MAX, u64::MAX - 100] {
            let queue = queue();
            queue.storage()[4].store(head, std::sync::atomic::Ordering::Relaxed);
            for cell in &queue.storage()[8..] {
                cell.store(word, std::sync::atomic::Ordering::Relaxed);
            }
            queue.request(1, true);
            let taken = (0..2 * CELLS).filter_map(|_| queue.take(0)).count();
            assert!(taken <= 2 * CELLS);
            queue.has_queued();
            queue.resolved(1);
            queue.recover(0);
            queue.disable(|_| {});
        }
    }
}

#[test]
fn another_layout_is_refused() {
    let spoilt = |at: usize, value: u64| {
        let words = queue().storage().clone();
        words[at].store(value, std::sync::atomic::Ordering::Relaxed);
        FaultQueue::open(words).unwrap_err()
    };
    assert_eq!(spoilt(0, 5), QueueError::Magic(5));
    assert!(matches!(spoilt(1, 2), QueueError::Layout { version: 2, .. }));
    assert!(matches!(spoilt(2, 64), QueueError::Layout { cells: 64, .. }));
    assert!(FaultQueue::open(queue().storage().clone()).is_ok());
}

/// What the queue shall be, by the simplest means.
#[derive(Debug, Default)]
struct Oracle {
    /// Page, who took it, whether it is over.
    faults: VecDeque<(u64, Option<u64>, bool)>,
}

impl Oracle {
    fn trim(&mut self) {
        while self.faults.front().is_some_and(|(_, _, over)| *over) {
            self.faults.pop_front();
        }
    }

    fn live(&mut self, gfn: u64) -> Option<&mut (u64, Option<u64>, bool)> {
        self.faults.iter_mut().find(|(page, _, over)| *page == gfn && !over)
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Request(u64),
    Take(u64),
    Commit(usize),
    Abandon(usize),
    Recover(u64),
    Resolved(u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (0..400_u64).prop_map(Op::Request),
        4 => (0..3_u64).prop_map(Op::Take),
        3 => (0..8_usize).prop_map(Op::Commit),
        1 => (0..8_usize).prop_map(Op::Abandon),
        1 => (0..3_u64).prop_map(Op::Recover),
        1 => (0..400_u64).prop_map(Op::Resolved),
    ];
    proptest::collection::vec(op, 0..2000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn agrees_with_a_list(ops in ops()) {
        let queue = queue();
        let mut oracle = Oracle::default();
        let mut taken: Vec<(Taken, u64)> = Vec::new();
        for op in ops {
            oracle.trim();
            match op {
                Op::Request(gfn) => {
                    let expected = oracle.live(gfn).map(|(_, taken, _)| taken.is_none());
                    if expected.is_none() && oracle.faults.len() == CELLS {
                        prop_assert_eq!(queue.request(gfn, false), Request::Full);
                        continue;
                    }
                    match (queue.request(gfn, false), expected) {
                        (Request::Queued(_), None) => oracle.faults.push_back((gfn, None, false)),
                        (Request::Merged { tell, .. }, Some(queued)) => prop_assert_eq!(tell, queued),
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
                Op::Take(reader) => {
                    let next = oracle.faults.iter_mut().find(|f| f.1.is_none() && !f.2);
                    let got = queue.take(reader);
                    prop_assert_eq!(got.map(|t| t.gfn), next.as_ref().map(|f| f.0));
                    if let (Some(got), Some(next)) = (got, next) {
                        next.1 = Some(reader);
                        taken.push((got, reader));
                    }
                }
                Op::Commit(at) if at < taken.len() => {
                    let (it, _) = taken.swap_remove(at);
                    prop_assert!(queue.commit(&it));
                    oracle.live(it.gfn).unwrap().2 = true;
                }
                Op::Abandon(at) if at < taken.len() => {
                    let (it, _) = taken.swap_remove(at);
                    prop_assert!(queue.abandon(&it));
                    oracle.live(it.gfn).unwrap().1 = None;
                }
                Op::Commit(_) | Op::Abandon(_) => {}
                Op::Recover(reader) => {
                    let had = taken.iter().filter(|(_, r)| *r == reader).count();
                    prop_assert_eq!(queue.recover(reader), had);
                    for (it, _) in taken.extract_if(.., |(_, r)| *r == reader) {
                        oracle.live(it.gfn).unwrap().1 = None;
                    }
                }
                Op::Resolved(gfn) => {
                    let queued = oracle.live(gfn).filter(|f| f.1.is_none());
                    prop_assert_eq!(queue.resolved(gfn).is_some(), queued.is_some());
                    if let Some(it) = queued {
                        it.2 = true;
                    }
                }
            }
        }
    }
}
