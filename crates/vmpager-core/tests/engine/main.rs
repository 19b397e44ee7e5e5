//! The engine as a state machine: random faults, removals, fills and reads
//! that finish, fail or are given up, in any order, against a slow model of
//! the kernel, the guest and the source ([`world`]).
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod script;
mod world;

use proptest::prelude::*;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{ByteRange, FillPlan, Hva, PageRun, PageSize, Piece, Slot};

use script::{layout, policy, step};
use world::{Outcome, World};

const HVA: u64 = 0x7f00_0000_0000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    /// Each step checks the engine's answer and all of its state against the
    /// model; at the end everything outstanding is let run out.
    #[test]
    fn agrees_with_the_world(
        (slots, holes) in layout(),
        policy in policy(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(&slots, &holes, policy);
        world.check();
        for step in &steps {
            world.apply(step);
            world.check();
        }
        world.run_out();
    }
}

fn slot(hva: u64, pages: u64, source_offset: u64) -> Slot {
    Slot { hva: Hva(hva), len: pages * 4096, source_offset, page_size: PageSize::Size4K }
}

/// A removal that overtakes the read: the read's bytes are not installed, and
/// the waiter gets its zeroes.
#[test]
fn a_page_removed_in_flight_reads_zero() {
    let mut world = World::new(&[slot(HVA, 4, 0)], &[], NeighbourPolicy::Off);
    world.touch(1);
    world.deliver_faults();
    world.begin_remove(1, 2);
    world.deliver_event();
    world.let_go();
    world.end_read(0, Outcome::Install);
    world.check();
    world.run_out();
}

/// Userfaultfd's first trap: an install between the madvise and the read of
/// its event is refused; the pages are asked for again, as zeroes.
#[test]
fn an_install_before_the_event_is_read_is_retried() {
    let mut world = World::new(&[slot(HVA, 4, 0)], &[], NeighbourPolicy::Off);
    world.touch(1);
    world.deliver_faults();
    world.begin_remove(0, 2);
    world.end_read(0, Outcome::Install);
    world.check();
    world.deliver_event();
    world.let_go();
    world.run_out();
}

/// The second: a copy lands between the event and the zap it announced, and
/// the present bit is stale.
#[test]
fn an_install_before_the_zap_is_confirmed() {
    let mut world = World::new(&[slot(HVA, 4, 0)], &[], NeighbourPolicy::Off);
    world.begin_remove(1, 2);
    world.deliver_event();
    world.let_go();
    world.touch(1);
    world.deliver_faults();
    world.zap();
    world.touch(1);
    world.deliver_faults();
    world.check();
    world.run_out();
}

/// A page that went away without an event (a VMM that negotiated none) is
/// found out when it is asked about, and is zero from then on.
#[test]
fn a_page_lost_silently_becomes_zero() {
    let mut world = World::new(&[slot(HVA, 4, 0)], &[], NeighbourPolicy::Off);
    world.touch(1);
    world.deliver_faults();
    world.end_read(0, Outcome::Install);
    world.lose(1);
    world.touch(1);
    world.deliver_faults();
    world.check();
    world.run_out();
}

/// A run may be installed in parts: what is done is not asked for again.
#[test]
fn installed_parts_are_no_longer_claimed() {
    let mut world = World::new(&[slot(HVA, 16, 0)], &[], NeighbourPolicy::Off);
    let FillPlan::Bring(Piece::Fetch(run)) = world.fill(16) else { panic!("pages are left") };
    let engine = &mut world.engine;
    engine.installed(PageRun::new(3, 4));
    engine.poisoned(PageRun::new(9, 1));
    engine.released(PageRun::new(15, 1));
    let rest: Vec<_> = engine.still_claimed(run).collect();
    assert_eq!(rest, [PageRun::new(0, 3), PageRun::new(7, 2), PageRun::new(10, 5)]);
    assert_eq!(engine.outstanding(), 16 - 4 - 1);
}

#[test]
fn an_address_outside_every_slot_has_no_plan() {
    let slots = [slot(HVA, 4, 0), slot(HVA + 5 * 4096, 4, 4 * 4096)];
    let mut world = World::new(&slots, &[], NeighbourPolicy::Adaptive { first_window_shift: 0 });
    for hva in [0, HVA - 1, HVA + 4 * 4096, HVA + 9 * 4096, u64::MAX] {
        assert_eq!(world.engine.fault(Hva(hva)), None, "{hva:#x}");
    }
    world.check();
}

/// Nobody faults: the fill alone brings everything, in growing pieces that
/// end with their 2 MiB.
#[test]
fn the_fill_completes_alone() {
    let mut world =
        World::new(&[slot(HVA, 700, 0)], &[], NeighbourPolicy::Adaptive { first_window_shift: 0 });
    let mut pieces = Vec::new();
    loop {
        let piece = world.engine.fill_piece();
        match world.fill(piece) {
            FillPlan::Bring(Piece::Fetch(run)) => pieces.push(run.count),
            FillPlan::Wait => world.end_read(0, Outcome::Install),
            FillPlan::Complete => break,
            FillPlan::Bring(Piece::Zero(run)) => panic!("{run:?} is no hole"),
        }
        world.check();
    }
    assert_eq!(pieces, [16, 32, 64, 128, 256, 16, 188]);
}

fn source_pages(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * 4096, count * 4096)
}

/// Fills the world to the end, whose every read ends well; the runs of zeroes.
fn zeroes_of(world: &mut World) -> Vec<PageRun> {
    let mut zeroes = Vec::new();
    loop {
        match world.fill(u64::MAX) {
            FillPlan::Bring(Piece::Zero(run)) => zeroes.push(run),
            FillPlan::Bring(Piece::Fetch(_)) => world.end_read(0, Outcome::Install),
            FillPlan::Wait => panic!("nothing is under way"),
            FillPlan::Complete => return zeroes,
        }
        world.check();
    }
}

/// The fill gives memory to holes below 2 MiB, in their turn, and to no other.
#[test]
fn small_holes_get_memory() {
    let holes = [source_pages(3, 2), source_pages(100, 511), source_pages(700, 512)];
    let slots = [slot(HVA, 1500, 0)];
    let mut world = World::new(&slots, &holes, NeighbourPolicy::Off);
    assert_eq!(world.fill(16), FillPlan::Bring(Piece::Fetch(PageRun::new(0, 3))));
    assert_eq!(world.fill(1), FillPlan::Bring(Piece::Zero(PageRun::new(3, 1))));
    assert_eq!(world.fill(16), FillPlan::Bring(Piece::Zero(PageRun::new(4, 1))));
    assert_eq!(world.fill(16), FillPlan::Bring(Piece::Fetch(PageRun::new(5, 16))));
    world.end_read(0, Outcome::Install);
    world.end_read(0, Outcome::Install);
    let zeroes: u64 = zeroes_of(&mut world).iter().map(|run| run.count).sum();
    assert_eq!(zeroes, 511);
    assert_eq!(world.engine.map().count_present(), 1500 - 512);
}

/// A hole is as large as its part of a slot; huge pages are never in one.
#[test]
fn holes_are_small_or_large_per_slot() {
    let huge = Slot { page_size: PageSize::Size2M, ..slot(HVA, 512, 0) };
    let slots =
        [huge, slot(HVA + (1 << 30), 600, 512 * 4096), slot(HVA + (2 << 30), 300, 1112 * 4096)];
    let mut world = World::new(&slots, &[source_pages(0, 1012)], NeighbourPolicy::Off);
    let zeroes: Vec<u64> = zeroes_of(&mut world).iter().flat_map(PageRun::pages).collect();
    assert_eq!(zeroes, (1..501).collect::<Vec<_>>());
    let mut world = World::new(&slots, &[source_pages(512, 900)], NeighbourPolicy::Off);
    let zeroes: Vec<u64> = zeroes_of(&mut world).iter().flat_map(PageRun::pages).collect();
    assert_eq!(zeroes, (601..901).collect::<Vec<_>>(), "600 pages of the other are large");
}

/// Who got memory, or was given back, is owed none.
#[test]
fn a_hole_is_filled_once() {
    let holes = [source_pages(0, 8)];
    let mut world = World::new(&[slot(HVA, 8, 0)], &holes, NeighbourPolicy::Off);
    world.touch(1);
    world.deliver_faults();
    world.begin_remove(3, 4);
    world.deliver_event();
    world.let_go();
    world.zap();
    world.engine.replaced_by_zero(5);
    let zeroes: Vec<u64> = {
        let engine = &mut world.engine;
        let mut pages = Vec::new();
        while let FillPlan::Bring(Piece::Zero(run)) = engine.next_fill(64) {
            pages.extend(run.pages());
            engine.installed(run);
        }
        pages
    };
    assert_eq!(zeroes, [0, 2, 4, 6, 7]);
    assert_eq!(world.engine.next_fill(64), FillPlan::Complete);
}

/// The fill is not complete while zeroes are on their way, and asks again for
/// those that could not be installed.
#[test]
fn holes_on_their_way_are_waited_for() {
    let holes = [source_pages(0, 8)];
    let mut world = World::new(&[slot(HVA, 8, 0)], &holes, NeighbourPolicy::Off);
    let engine = &mut world.engine;
    assert_eq!(engine.outstanding(), 0);
    assert_eq!(engine.next_fill(64), FillPlan::Bring(Piece::Zero(PageRun::new(0, 8))));
    assert_eq!(engine.next_fill(64), FillPlan::Wait);
    engine.installed(PageRun::new(0, 5));
    engine.released(PageRun::new(5, 3));
    assert_eq!(engine.next_fill(64), FillPlan::Bring(Piece::Zero(PageRun::new(5, 3))));
    assert_eq!(engine.next_fill(64), FillPlan::Wait);
    engine.installed(PageRun::new(5, 3));
    assert_eq!(engine.next_fill(64), FillPlan::Complete);
}

/// A hole that is heard of when the fill has gone past it, and twice.
#[test]
fn a_hole_may_be_known_late() {
    let mut world = World::new(&[slot(HVA, 64, 0)], &[], NeighbourPolicy::Off);
    world.fill(32);
    world.known_zero(source_pages(8, 8));
    world.known_zero(source_pages(12, 8));
    world.check();
    assert_eq!(world.fill(64), FillPlan::Bring(Piece::Zero(PageRun::new(8, 12))));
    world.end_read(0, Outcome::Install);
    world.run_out();
}
