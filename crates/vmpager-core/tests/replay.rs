//! What a profile brings, and when it is given up.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::{NeighbourPolicy, Replay};
use vmpager_core::{ByteRange, Engine, FaultPlan, Hva, PageRun, PageSize, Piece, Slot, SlotSet};

const HVA: u64 = 0x7f00_0000_0000;
const PAGES: u64 = 4096;

fn engine_of(slots: &[Slot]) -> Engine<Vec<AtomicU64>> {
    let slots = SlotSet::new(slots, 1 << 40).unwrap();
    let words = (0..words_for(slots.pages())).map(|_| AtomicU64::new(0)).collect();
    Engine::new(slots, words, NeighbourPolicy::Off)
}

fn slot(hva: u64, pages: u64, first_page: u64, page_size: PageSize) -> Slot {
    let len = pages * page_size.bytes();
    Slot { hva: Hva(hva), len, source_offset: first_page * 4096, page_size }
}

fn engine() -> Engine<Vec<AtomicU64>> {
    engine_of(&[slot(HVA, PAGES, 0, PageSize::Size4K)])
}

fn bytes(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * 4096, count * 4096)
}

/// What is left of the replay, each piece of it installed.
fn replayed(engine: &mut Engine<Vec<AtomicU64>>) -> Vec<Piece> {
    let pieces = std::iter::from_fn(|| {
        let piece = engine.next_replayed(1000)?;
        engine.installed(piece.run());
        Some(piece)
    });
    pieces.collect()
}

fn fault(engine: &mut Engine<Vec<AtomicU64>>, page: u64) -> FaultPlan {
    engine.fault(Hva(HVA + page * 4096)).unwrap()
}

#[test]
fn pages_come_in_the_profiles_order_and_once() {
    let mut engine = engine();
    engine.replay(&[bytes(100, 20), bytes(7, 1), bytes(110, 30), bytes(0, 2)]);
    fault(&mut engine, 105);
    let runs: Vec<_> = replayed(&mut engine).iter().map(Piece::run).collect();
    let run = PageRun::new;
    assert_eq!(runs, [run(100, 5), run(106, 14), run(7, 1), run(120, 20), run(0, 2)]);
    assert!(engine.replaying().unwrap().is_done());
    assert_eq!(engine.replay_counts().late, 1, "the profile has page 105");
}

#[test]
fn pieces_are_no_larger_than_asked_for() {
    let mut engine = engine();
    engine.replay(&[bytes(0, 100)]);
    let sizes: Vec<u64> =
        std::iter::from_fn(|| engine.next_replayed(30)).map(|piece| piece.run().count).collect();
    assert_eq!(sizes, [30, 30, 30, 10]);
}

/// A guest that will touch a page of a large hole is better off if it is there;
/// other pages of the hole stay absent.
#[test]
fn zero_pages_of_a_profile_get_memory() {
    let mut engine = engine();
    engine.known_zero(bytes(1000, 2000));
    engine.replay(&[bytes(998, 4), bytes(2500, 3)]);
    let run = PageRun::new;
    let pieces = replayed(&mut engine);
    assert_eq!(
        pieces,
        [Piece::Fetch(run(998, 2)), Piece::Zero(run(1000, 2)), Piece::Zero(run(2500, 3))]
    );
    assert_eq!(engine.map().count_present(), 7);
    // Small holes get memory anyhow, and count once.
    let mut engine = engine_of(&[slot(HVA, 8, 0, PageSize::Size4K)]);
    engine.known_zero(bytes(2, 2));
    engine.replay(&[bytes(0, 8)]);
    assert_eq!(replayed(&mut engine).len(), 3);
    assert_eq!(engine.next_fill(100), vmpager_core::FillPlan::Complete);
}

/// The guest gave pages back before their turn: they are zero for ever.
#[test]
fn what_was_given_back_is_not_brought() {
    let mut engine = engine();
    engine.replay(&[bytes(0, 10)]);
    engine.removed(Hva(HVA + 4 * 4096), Hva(HVA + 6 * 4096));
    let runs: Vec<_> = replayed(&mut engine).iter().map(Piece::run).collect();
    assert_eq!(runs, [PageRun::new(0, 4), PageRun::new(6, 4)]);
}

/// Who goes on where another was killed brings what is left, and gives no memory to
/// what the guest gave back meanwhile.
#[test]
fn a_replay_goes_on_after_a_takeover() {
    let slots = || SlotSet::new(&[slot(HVA, PAGES, 0, PageSize::Size4K)], 1 << 40).unwrap();
    let words: Arc<[AtomicU64]> = (0..words_for(PAGES)).map(|_| AtomicU64::new(0)).collect();
    let mut killed = Engine::new(slots(), words.clone(), NeighbourPolicy::Off);
    killed.known_zero(bytes(1000, 2000));
    let order = [bytes(0, 10), bytes(998, 4), bytes(20, 10)];
    killed.replay(&order);
    let Some(Piece::Fetch(run)) = killed.next_replayed(4) else { panic!("four pages") };
    killed.installed(run);
    // Claimed by then, and in place nowhere.
    killed.next_replayed(2);
    killed.removed(Hva(HVA + 2 * 4096), Hva(HVA + 3 * 4096));
    killed.removed(Hva(HVA + 22 * 4096), Hva(HVA + 24 * 4096));
    drop(killed);
    let (slots, all) = (slots(), 0..words.len());
    let mut next =
        Engine::take_over(slots, words, std::slice::from_ref(&all), NeighbourPolicy::Off).unwrap();
    next.replay_rest(&order);
    let run = PageRun::new;
    let mut left = Vec::new();
    while let Some(piece) = next.next_replayed(1000) {
        next.installed(piece.run());
        left.push(piece);
    }
    let (fetched, zero) = (Piece::Fetch, Piece::Zero);
    let runs = [run(4, 6), run(998, 2), run(20, 2), run(24, 6)].map(fetched);
    assert_eq!(left, [runs[0], runs[1], zero(run(1000, 2)), runs[2], runs[3]]);
    assert_eq!(next.map().count_present(), 3 + 6 + 4 + 2 + 6);
}

/// Base pages of the profile name the huge page they are in; what lies outside of
/// the slots is nobody's.
#[test]
fn slots_have_their_own_pages() {
    let huge = slot(HVA, 4, 512, PageSize::Size2M);
    let base = slot(HVA + (1 << 30), 100, 10_000, PageSize::Size4K);
    let mut engine = engine_of(&[huge, base]);
    engine.replay(&[bytes(1030, 2), bytes(1500, 80), bytes(9_990, 20), bytes(50, 5)]);
    let runs: Vec<_> = replayed(&mut engine).iter().map(Piece::run).collect();
    assert_eq!(runs, [PageRun::new(1, 1), PageRun::new(2, 1), PageRun::new(4, 10)]);
}

#[test]
fn a_wrong_profile_is_given_up_after_some_faults() {
    let mut engine = engine();
    engine.replay(&[bytes(2000, 2000)]);
    let mut brought = 0;
    for page in 0..100 {
        fault(&mut engine, page);
        let piece = engine.replay_piece();
        brought += engine.next_replayed(piece).map_or(0, |piece| piece.run().count);
    }
    // Sixteen pages a fault at first, then an eighth of what has come so far.
    assert!(brought > 0 && brought <= 2 * 16 * u64::from(Replay::PATIENCE), "{brought} pages");
    assert_eq!(engine.replay_counts().missed, 100);
    assert!(!engine.replaying().unwrap().is_done());
}

/// Pages of half of memory, in an order that is not the guest's: hitting some of
/// them now and then is chance.
#[test]
fn a_dense_profile_is_given_up_by_a_guest_with_another_order() {
    const PAGES: u64 = 65_536;
    let mut engine = engine_of(&[slot(HVA, PAGES, 0, PageSize::Size4K)]);
    let shuffled = |seed: u64| {
        let mut pages: Vec<u64> = (0..PAGES).collect();
        pages.sort_by_key(|page| {
            (page ^ seed << 20)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
                .wrapping_mul(seed)
        });
        pages
    };
    let known: Vec<_> = shuffled(7)[..32_768].iter().map(|page| bytes(*page, 1)).collect();
    engine.replay(&known);
    let mut brought = 0;
    for page in shuffled(1_000_003) {
        if !engine.map().is_present(page) {
            let FaultPlan::Fetch { run, .. } = fault(&mut engine, page) else { continue };
            engine.installed(run);
        }
        if let Some(piece) = engine.next_replayed(4) {
            brought += piece.run().count;
            engine.installed(piece.run());
        }
    }
    let counts = engine.replay_counts();
    assert!(counts.late > 10_000, "chance hits many: {counts:?}");
    assert!(!engine.replaying().unwrap().is_done() && brought < PAGES / 32, "{brought} pages");
}

/// Half of what the guest touches is in the profile: whenever the replay has been
/// given up, the guest soon waits for a page of it.
#[test]
fn a_profile_that_knows_a_half_is_not_given_up_for_good() {
    let mut engine = engine();
    engine.replay(&[bytes(2000, 2000)]);
    let (mut late, mut missed) = (0, 0);
    for nth in 0..2000 {
        for page in [nth, 2000 + nth] {
            if !engine.map().is_present(page) {
                let before = engine.replay_counts();
                let FaultPlan::Fetch { run, .. } = fault(&mut engine, page) else { continue };
                engine.installed(run);
                let after = engine.replay_counts();
                late += after.late - before.late;
                missed += after.missed - before.missed;
            }
            let piece = engine.replay_piece();
            if let Some(piece) = engine.next_replayed(piece) {
                engine.installed(piece.run());
            }
        }
    }
    assert_eq!(missed, 2000);
    assert!(late < 500, "{late} pages of the profile came too late");
    assert!(engine.replaying().unwrap().is_done());
}

#[test]
fn pieces_grow_and_collapse_when_somebody_waits() {
    let mut engine = engine();
    engine.replay(&[bytes(0, 4000)]);
    let sizes = |engine: &mut Engine<_>| (0..6).map(|_| engine.replay_piece()).collect::<Vec<_>>();
    assert_eq!(sizes(&mut engine), [16, 32, 64, 128, 256, 512]);
    engine.demanded();
    // The largest power of two in an eighth of 1008 pages, then of 4016.
    assert_eq!(sizes(&mut engine), [64, 128, 256, 512, 1024, 1024]);
    fault(&mut engine, 10);
    assert_eq!(engine.replay_piece(), 256);
}

/// What the profile lacks makes pieces short at once, so that no fault waits for long; what
/// it has makes them long again.
#[test]
fn pieces_are_short_while_the_profile_is_not_trusted() {
    let mut engine = engine();
    engine.replay(&[bytes(0, 2000)]);
    while engine.replay_piece() < 1024 {}
    let trusted = |engine: &Engine<_>| engine.replaying().unwrap().is_trusted();
    fault(&mut engine, 3000);
    assert_eq!((engine.replay_piece(), trusted(&engine)), (4, false));
    assert_eq!(engine.replay_piece(), 4, "nor longer when nobody faults");
    fault(&mut engine, 10);
    assert_eq!((engine.replay_piece(), trusted(&engine)), (64, true), "its turn was near");
}

/// A profile of most of memory has most pages of any guest: that it has those of this one
/// does not make up for what it lacks.
#[test]
fn chance_does_not_make_for_trust() {
    let mut engine = engine();
    let known: Vec<_> =
        (0..PAGES).filter(|page| page % 10 > 0).map(|page| bytes(page, 1)).collect();
    engine.replay(&known);
    let mut last = 0;
    for nth in 0..200 {
        // A tenth of them lacking, none near.
        fault(&mut engine, PAGES / 2 + nth);
        last = engine.replay_piece();
    }
    assert_eq!(last, 4);
}
