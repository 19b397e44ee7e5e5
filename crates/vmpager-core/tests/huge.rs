//! Which 2 MiB are said to be whole: against a look at every page.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{Engine, Hva, PageSize, Slot, SlotSet};

const BASE: u64 = 0x7f00_0000_0000;
const PIECE: u64 = 512;

/// Two slots; the first begins some pages behind a multiple of 2 MiB, the
/// second follows it with or without a gap.
fn slots(before: u64, pages: [u64; 2], gap: u64) -> SlotSet {
    let first = Slot {
        hva: Hva(BASE + before * 4096),
        len: pages[0] * 4096,
        source_offset: 0,
        page_size: PageSize::Size4K,
    };
    let second = Slot {
        hva: Hva(first.hva.0 + first.len + gap * 4096),
        len: pages[1] * 4096,
        source_offset: first.len,
        page_size: PageSize::Size4K,
    };
    SlotSet::new(&[first, second], first.len + second.len).unwrap()
}

fn engine(slots: SlotSet) -> Engine<Vec<AtomicU64>> {
    let words = (0..words_for(slots.pages())).map(|_| AtomicU64::new(0)).collect();
    let mut engine = Engine::new(slots, words, NeighbourPolicy::Off);
    engine.watch_for_whole_pieces();
    engine
}

fn arrive(engine: &mut Engine<Vec<AtomicU64>>, hva: u64, pages: u64) {
    let runs: Vec<_> = engine.slots().runs_within(Hva(hva), Hva(hva + pages * 4096)).collect();
    for run in runs {
        engine.map().claim_up(run.first, run.count);
        engine.installed(run);
    }
}

/// The addresses of the pieces that are whole, the slow way.
fn whole(engine: &Engine<Vec<AtomicU64>>) -> BTreeSet<u64> {
    let end = BASE + 20 * PIECE * 4096;
    let starts = (BASE..end).step_by(usize::try_from(PIECE * 4096).unwrap());
    let is_there = |hva: u64| {
        let page = engine.slots().page_at(Hva(hva));
        page.is_some_and(|page| engine.map().is_present(page))
    };
    let one_slot = |start: u64| {
        let last = start + (PIECE - 1) * 4096;
        let slot =
            |hva| engine.slots().page_at(Hva(hva)).map(|p| engine.slots().slot_of(p).1.first);
        slot(start).is_some() && slot(start) == slot(last)
    };
    starts.filter(|s| one_slot(*s) && (0..PIECE).all(|i| is_there(s + i * 4096))).collect()
}

fn told(engine: &mut Engine<Vec<AtomicU64>>) -> Vec<u64> {
    let pieces = std::iter::from_fn(|| engine.next_whole_piece());
    let pieces: Vec<_> = pieces.collect();
    assert!(pieces.iter().all(|piece| piece.count == PIECE));
    pieces.iter().map(|piece| engine.slots().locate(*piece).0.0).collect()
}

proptest! {
    /// What is whole is told once, when its last page has arrived; nothing else
    /// is; what is given back and comes again is told again.
    #[test]
    fn what_is_whole_is_told(
        before in 0..600_u64,
        pages in [1..2000_u64, 1..1500_u64],
        gap in prop_oneof![Just(0), 1..600_u64],
        steps in prop::collection::vec((any::<bool>(), 0..4500_u64, 1..900_u64), 1..40),
    ) {
        let mut engine = engine(slots(before, pages, gap));
        let mut known = BTreeSet::new();
        for (removed, at, count) in steps {
            let (hva, end) = (BASE + at * 4096, BASE + (at + count) * 4096);
            if removed {
                engine.removed(Hva(hva), Hva(end));
                let now = whole(&engine);
                known.retain(|piece| now.contains(piece));
            } else {
                arrive(&mut engine, hva, count);
            }
            let touched = |piece: &u64| *piece < end && piece + PIECE * 4096 > hva;
            for piece in told(&mut engine) {
                prop_assert!(whole(&engine).contains(&piece), "{piece:#x} is not whole");
                prop_assert!(touched(&piece), "{piece:#x} was told before");
                known.insert(piece);
            }
            prop_assert_eq!(&known, &whole(&engine));
            prop_assert!(!engine.may_have_whole_pieces());
        }
    }
}

#[test]
fn memory_of_larger_pages_has_no_pieces() {
    let slot = Slot { hva: Hva(BASE), len: 4 << 21, source_offset: 0, page_size: PageSize::Size2M };
    let mut engine = engine(SlotSet::new(&[slot], 4 << 21).unwrap());
    arrive(&mut engine, BASE, 4 * PIECE);
    assert_eq!(engine.map().count_present(), 4);
    assert_eq!(told(&mut engine), []);
}

#[test]
fn nobody_who_did_not_ask_is_told() {
    let slots = slots(0, [1024, 1], 0);
    let words = (0..words_for(slots.pages())).map(|_| AtomicU64::new(0)).collect();
    let mut engine: Engine<Vec<AtomicU64>> = Engine::new(slots, words, NeighbourPolicy::Off);
    arrive(&mut engine, BASE, 1024);
    assert_eq!(told(&mut engine), []);
}
