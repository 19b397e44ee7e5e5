//! The engine as a state machine: random faults, removals, fills and reads
//! that finish, fail or are given up, in any order, against a slow model of
//! the kernel, the guest and the source ([`world`]).
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod script;
mod world;

use proptest::prelude::*;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{FillPlan, Hva, PageRun, PageSize, Slot};

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
    let FillPlan::Fetch(run) = world.fill() else { panic!("pages are left") };
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
    let mut world = World::new(&slots, &[], NeighbourPolicy::default());
    for hva in [0, HVA - 1, HVA + 4 * 4096, HVA + 9 * 4096, u64::MAX] {
        assert_eq!(world.engine.fault(Hva(hva)), None, "{hva:#x}");
    }
    world.check();
}

/// Nobody faults: the fill alone brings everything, in growing pieces.
#[test]
fn the_fill_completes_alone() {
    let mut world = World::new(&[slot(HVA, 700, 0)], &[], NeighbourPolicy::default());
    let mut pieces = Vec::new();
    loop {
        match world.fill() {
            FillPlan::Fetch(run) => pieces.push(run.count),
            FillPlan::Wait => world.end_read(0, Outcome::Install),
            FillPlan::Complete => break,
        }
        world.check();
    }
    let (last, grown) = pieces.split_last().unwrap();
    assert!(grown.is_sorted() && grown.first() < grown.last(), "{pieces:?}");
    assert_eq!(grown.iter().sum::<u64>() + last, 700);
}
