//! Streams of faults: how soon they are found, and what they bring.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicU64;

use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{Engine, FaultPlan, Hva, PageSize, Slot, SlotSet};

const HVA: u64 = 0x7f00_0000_0000;
const PAGES: u64 = 16_384;

/// A guest, whose pager brings what is near before it touches the next page.
struct Guest {
    engine: Engine<Vec<AtomicU64>>,
    faults: u64,
}

impl Guest {
    fn new(policy: NeighbourPolicy) -> Self {
        let len = PAGES * 4096;
        let slot = Slot { hva: Hva(HVA), len, source_offset: 0, page_size: PageSize::Size4K };
        let slots = SlotSet::new(&[slot], len).unwrap();
        let words = (0..words_for(PAGES)).map(|_| AtomicU64::new(0)).collect();
        Self { engine: Engine::new(slots, words, policy), faults: 0 }
    }

    /// Faults where the page is missing, and has nothing brought but with it.
    fn fault(&mut self, page: u64) {
        if self.engine.map().is_present(page) {
            return;
        }
        self.faults += 1;
        match self.engine.fault(Hva(HVA + page * 4096)).unwrap() {
            FaultPlan::Fetch { run, .. } => self.engine.installed(run),
            plan => panic!("{plan:?} of page {page}"),
        }
    }

    fn touch(&mut self, page: u64) {
        self.fault(page);
        self.bring_ahead();
    }

    fn bring_ahead(&mut self) -> u64 {
        let mut brought = 0;
        while let Some(near) = self.engine.next_neighbours(64) {
            self.engine.installed(near.piece.run());
            brought += near.piece.run().count;
        }
        brought
    }

    fn touch_all(&mut self, pages: impl IntoIterator<Item = u64>) -> (u64, u64) {
        let mut touched = 0;
        for page in pages {
            self.touch(page);
            touched += 1;
        }
        (self.faults, self.engine.map().count_present() - touched)
    }
}

fn strides() -> Guest {
    Guest::new(NeighbourPolicy::Strides)
}

/// Three faults, then one for 9, 17, 33, ... 257 pages.
#[test]
fn a_sequential_stream_takes_a_fault_for_a_mebibyte() {
    let most = 3 + 5 + PAGES / 257 + 1;
    let (faults, unused) = strides().touch_all(0..PAGES);
    assert!(faults <= most && unused == 0, "forward: {faults} faults");
    let (faults, unused) = strides().touch_all((0..PAGES).rev());
    assert!(faults <= most && unused == 0, "backward: {faults} faults");
}

/// Only pages on the way are brought, 32 at most that are not touched.
#[test]
fn other_steps_bring_the_pages_on_their_way_alone() {
    for step in [2, 3, 7, 64, 511, 512] {
        let count = PAGES / step / 2;
        for backward in [false, true] {
            let place = |nth| if backward { PAGES - 1 - nth * step } else { nth * step };
            let (faults, unused) = strides().touch_all((0..count).map(place));
            assert!(faults <= 4 + 2 + count / 33 + 1, "step {step}: {faults} of {count}");
            assert!(unused <= 32, "step {step}: {unused} pages that nobody touched");
        }
    }
    let (faults, _) = strides().touch_all((0..PAGES).step_by(513));
    assert_eq!(faults, PAGES.div_ceil(513), "further apart than 2 MiB, there are no streams");
}

/// Six threads go through memory of their own, forward, backward, and by steps.
#[test]
fn streams_may_be_interleaved() {
    let (mut guest, part) = (strides(), PAGES / 6);
    let mut touched = 0;
    for nth in 0..700 {
        for (stream, step) in [1, 1, 1, 3, 1, 3].into_iter().enumerate() {
            let start = stream as u64 * part;
            let place = if stream % 2 == 0 { nth * step } else { part - 1 - nth * step };
            guest.touch(start + place);
            touched += 1;
        }
    }
    let unused = guest.engine.map().count_present() - touched;
    assert!(guest.faults < 6 * 35, "{} faults", guest.faults);
    assert!(unused < 6 * 256, "{unused} pages that nobody touched");
}

/// Chance makes no streams worth the name, nor does a stream that ends.
#[test]
fn touches_at_random_bring_little_else() {
    let mut guest = strides();
    let mut seed = 11_u64;
    let mut touched = std::collections::BTreeSet::new();
    for _ in 0..3000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        touched.insert((seed >> 33) % PAGES);
        guest.touch((seed >> 33) % PAGES);
    }
    let unused = guest.engine.map().count_present() - touched.len() as u64;
    assert!(unused < 60, "{unused} pages beside {}", touched.len());
}

/// A fault that is on no stream's way: nothing more comes of what is ahead, and
/// the stream begins anew with half as much.
#[test]
fn a_fault_elsewhere_takes_back_what_is_ahead() {
    let mut guest = strides();
    for nth in 0..6 {
        guest.fault(nth * 9);
    }
    guest.fault(10_000);
    assert_eq!(guest.bring_ahead(), 0);
    guest.fault(6 * 9);
    assert_eq!(guest.bring_ahead(), 16, "32 pages would be the next");
}

/// A second thread that waits for a page is no other stream.
#[test]
fn two_threads_at_one_page_are_one_stream() {
    let mut guest = strides();
    for page in 0..3 {
        guest.fault(page);
    }
    let present = guest.engine.map().count_present();
    guest.engine.fault(Hva(HVA + 2 * 4096)).unwrap();
    guest.touch(present);
    assert_eq!(guest.engine.map().count_present(), present + 17, "twice as far");
}

/// Beside streams, what is near comes as ever, and streams need no 2 MiB to learn.
#[test]
fn mixed_does_as_well_as_either() {
    let (faults, _) = Guest::new(NeighbourPolicy::Mixed).touch_all(0..PAGES);
    assert!(faults <= 3 + 5 + PAGES / 257 + 1, "{faults} faults of a sequential guest");
    let mut pages: Vec<u64> = (0..PAGES).collect();
    let mut seed = 3_u64;
    for i in (1..pages.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(i, usize::try_from(seed >> 33).unwrap() % (i + 1));
    }
    let (faults, _) = Guest::new(NeighbourPolicy::Mixed).touch_all(pages);
    assert!(faults <= PAGES / 512 * 9, "{faults} faults of one that touches at random");
}
