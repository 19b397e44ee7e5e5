//! Which 2 MiB are said to be whole: against a look at every page.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{ByteRange, Content, Engine, Hva, PageRun, PageSize, Slot, SlotSet};

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

/// What may come to a page before a piece is asked for.
#[derive(Clone, Copy, Debug)]
enum Before {
    Arrives,
    GivenBack,
    InFlight,
    Poisoned,
}

proptest! {
    /// A piece is claimed if every page of it is absent and still to come, from
    /// the source or a small hole of it; then all that are to be read are claimed.
    /// If not, nothing changes.
    #[test]
    fn pieces_are_claimed_whole_or_not_at_all(
        before in 0..600_u64,
        pages in [1..2000_u64, 1..1500_u64],
        holes in prop::collection::vec(
            (0..3000_u64, prop_oneof![1..40_u64, 400..511_u64]),
            0..6,
        ),
        steps in prop::collection::vec(
            (
                prop::sample::select(vec![
                    Before::Arrives, Before::GivenBack, Before::InFlight, Before::Poisoned,
                ]),
                0..3500_u64,
                1..200_u64,
            ),
            0..5,
        ),
        asked in prop::collection::vec(0..3500_u64, 1..6),
    ) {
        let mut engine = engine(slots(before, pages, 0));
        for (first, count) in holes {
            engine.known_zero(ByteRange::new(first * 4096, count * 4096));
        }
        for (what, at, count) in steps {
            let (hva, end) = (Hva(BASE + at * 4096), Hva(BASE + (at + count) * 4096));
            let runs: Vec<_> = engine.slots().runs_within(hva, end).collect();
            for run in runs {
                match what {
                    Before::GivenBack => _ = engine.removed(hva, end),
                    Before::Arrives => {
                        engine.map().claim_up(run.first, run.count);
                        engine.installed(run);
                    }
                    Before::InFlight => _ = engine.map().claim_up(run.first, run.count),
                    Before::Poisoned => {
                        let claimed = engine.map().claim_up(run.first, run.count);
                        engine.poisoned(PageRun::new(run.first, claimed));
                    }
                }
            }
        }
        for page in asked.into_iter().filter(|page| *page < engine.map().pages()) {
            let (slot, all) = engine.slots().slot_of(page);
            let hva = (slot.hva.0 + (page - all.first) * 4096) & !((PIECE * 4096) - 1);
            let first = engine.slots().page_at(Hva(hva)).filter(|first| all.pages().contains(first));
            let first = first.filter(|first| first + PIECE <= all.end());
            let state = |page: u64| (engine.map().content(page), engine.map().is_present(page));
            let is_hole = |page: u64| engine.map().next_holes(PageRun::new(page, 1)).is_some();
            let to_come = |page: u64| match state(page) {
                (Content::Source, false) => true,
                (Content::Zero, false) => is_hole(page),
                _ => false,
            };
            let states: Vec<_> = (0..engine.map().pages()).map(state).collect();
            let source = |page: &u64| states[usize::try_from(*page).unwrap()].0 == Content::Source;
            let expected = first.filter(|first| {
                let mut pages = *first..first + PIECE;
                pages.clone().all(to_come) && pages.any(|page| source(&page))
            });
            let claimed = engine.claim_piece(page);
            prop_assert_eq!(claimed.as_ref().map(|whole| whole.piece.first), expected);
            let read: Vec<u64> =
                claimed.iter().flat_map(|whole| &whole.reads).flat_map(PageRun::pages).collect();
            for (page, before) in (0..).zip(&states) {
                let now = if read.contains(&page) { (Content::Claimed, false) } else { *before };
                prop_assert_eq!(state(page), now, "page {}", page);
            }
            let wanted = claimed.iter().flat_map(|whole| whole.piece.pages()).filter(source);
            prop_assert_eq!(&read, &wanted.collect::<Vec<_>>());
            // The next one finds them in flight.
        }
    }
}
