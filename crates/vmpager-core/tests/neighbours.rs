//! What neighbours save a guest that touches much, and what they cost one
//! that touches little: an engine whose every plan is carried out at once.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicU64;

use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::prefetch::limits::{CHUNK, Look};
use vmpager_core::{ByteRange, Engine, FaultPlan, Hva, PageRun, PageSize, Slot, SlotSet};

const HVA: u64 = 0x7f00_0000_0000;
/// Pages in 2 MiB.
const REGION: u64 = 512;

/// A guest, whose pager brings neighbours in before it touches the next page.
struct Guest {
    engine: Engine<Vec<AtomicU64>>,
    faults: u64,
}

impl Guest {
    fn new(regions: u64) -> Self {
        let len = regions * REGION * 4096;
        let slot = Slot { hva: Hva(HVA), len, source_offset: 0, page_size: PageSize::Size4K };
        let slots = SlotSet::new(&[slot], len).unwrap();
        let words = (0..words_for(slots.pages())).map(|_| AtomicU64::new(0)).collect();
        Self {
            engine: Engine::new(slots, words, NeighbourPolicy::Adaptive { first_window_shift: 0 }),
            faults: 0,
        }
    }

    /// Says of `count` pages in every `of` that they are a hole of the source.
    fn with_holes(mut self, count: u64, of: u64) -> Self {
        for first in (0..self.pages()).step_by(usize::try_from(of).unwrap()) {
            self.engine.known_zero(ByteRange::new(first * 4096, count * 4096));
        }
        self
    }

    fn pages(&self) -> u64 {
        self.engine.map().pages()
    }

    /// Brings a page that nobody waits for.
    fn bring(&mut self, page: u64) {
        assert_eq!(self.engine.map().claim_up(page, 1), 1);
        self.install(PageRun::new(page, 1));
    }

    fn install(&mut self, run: PageRun) {
        let brought = run.pages().any(|page| self.engine.map().is_present(page));
        assert!(!brought, "of {run:?} some is there already");
        self.engine.installed(run);
    }

    /// Touches a page; what comes along with it is installed at once. Whether it was
    /// missing.
    fn touch_only(&mut self, page: u64) -> bool {
        if self.engine.map().is_present(page) {
            return false;
        }
        self.faults += 1;
        match self.engine.fault(Hva(HVA + page * 4096)).unwrap() {
            FaultPlan::Fetch { run, .. } | FaultPlan::Zero(run) => self.install(run),
            plan => panic!("{plan:?} of page {page}"),
        }
        true
    }

    /// The same, and all that shall have its turn.
    fn touch(&mut self, page: u64) {
        self.touch_only(page);
        while let Some(near) = self.engine.next_neighbours(64) {
            self.install(near.piece.run());
        }
    }
}

/// `0..count` in some random order.
fn shuffled(count: u64, mut seed: u64) -> Vec<u64> {
    let mut pages: Vec<u64> = (0..count).collect();
    for i in (1..pages.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(i, usize::try_from(seed >> 33).unwrap() % (i + 1));
    }
    pages
}

/// Eight faults bring in 2 MiB: windows of 1, 2, 4, ... 64, 512 pages, whatever
/// lies in place within them, and whether it comes from the source or is zero.
#[test]
fn a_guest_that_touches_all_at_random_takes_eight_faults_per_2_mib() {
    for (holes, of) in [(0, REGION), (1, 4), (20, 60), (300, REGION)] {
        let mut guest = Guest::new(20).with_holes(holes, of);
        for page in shuffled(guest.pages(), 7) {
            guest.touch(page);
        }
        assert_eq!(guest.engine.map().count_present(), guest.pages());
        assert!(guest.faults <= 20 * 8, "{} faults, {holes} holes in {of}", guest.faults);
    }
}

/// Isolated pages cost a page each.
#[test]
fn a_guest_that_touches_one_page_per_2_mib_gets_no_more() {
    let mut guest = Guest::new(200).with_holes(20, 60);
    for region in shuffled(200, 3) {
        guest.touch(region * REGION + region % 500);
    }
    assert_eq!((guest.faults, guest.engine.map().count_present()), (200, 200));
}

/// The bound: up to seven faults in 2 MiB, `n` of them bring in fewer than 2 to
/// the power of `n` pages there.
#[test]
fn memory_grows_with_the_faults_of_its_2_mib_alone() {
    let mut guest = Guest::new(50);
    let mut touches = vec![0_u32; 50];
    for page in shuffled(guest.pages(), 5).into_iter().take(150) {
        let before = guest.faults;
        guest.touch(page);
        touches[usize::try_from(page / REGION).unwrap()] += u32::from(guest.faults > before);
        for (region, faults) in (0..).zip(&touches) {
            let pages = region * REGION..(region + 1) * REGION;
            let present = pages.filter(|&p| guest.engine.map().is_present(p)).count() as u64;
            let most = if *faults < 8 { (1 << faults) - 1 } else { REGION };
            assert!(present <= most, "{present} pages after {faults} faults");
        }
    }
    assert!(touches.iter().any(|&faults| faults > 5), "{touches:?}");
}

/// Pages that lie about, brought for some other reason, cut the windows in pieces.
/// A pager that looks for faults after so many pages, and not after each piece, has as
/// few of them as where nothing lies about, and brings no page twice.
#[test]
fn windows_that_are_cut_are_complete_as_soon_as_others() {
    let faults = |scattered: usize, pieces_at_a_time: usize| {
        let mut guest = Guest::new(50);
        let others = shuffled(guest.pages(), 11).into_iter().take(scattered);
        others.for_each(|page| guest.bring(page));
        for page in shuffled(guest.pages(), 7).into_iter().take(8000) {
            if !guest.touch_only(page) {
                continue;
            }
            // Then it comes to the next page that is missing.
            let mut look = Look::of(CHUNK);
            for _ in 0..pieces_at_a_time {
                if look.left() == 0 {
                    break;
                }
                let Some(near) = guest.engine.next_neighbours(look.left()) else { break };
                look.brought(near.piece.run());
                assert!(near.piece.run().count <= CHUNK);
                guest.install(near.piece.run());
            }
        }
        guest.faults
    };
    let (one, all) = (1, usize::MAX);
    let none = faults(0, all);
    assert!(none <= faults(0, one), "{none}");
    // A wrong profile's, that was given up soon.
    assert!(faults(337, one) * 10 > none * 12, "{} faults", faults(337, one));
    assert!(faults(337, all) * 10 < none * 11, "{} faults", faults(337, all));
    assert!(faults(700, all) * 10 < none * 12, "{} faults", faults(700, all));
}

/// What the guest gave back is not brought in again for its neighbours' sake.
#[test]
fn neighbours_that_were_given_back_stay_absent() {
    let mut guest = Guest::new(1);
    guest.engine.removed(Hva(HVA + 4096), Hva(HVA + 9 * 4096));
    for page in shuffled(REGION, 9).into_iter().filter(|page| !(1..9).contains(page)) {
        guest.touch(page);
    }
    let map = guest.engine.map();
    let absent: Vec<u64> = (0..REGION).filter(|&page| !map.is_present(page)).collect();
    assert_eq!(absent, (1..9).collect::<Vec<_>>());
}
