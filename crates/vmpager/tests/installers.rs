//! Threads that install pages by themselves, beside the worker: each page is
//! fetched once, what cannot be had at once is waited for, and a page given
//! back never gets its old bytes again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Holds, PAGE, Random, assert_is_source, faulty, mapping, numbered, page, range};
use vmpager::core::{ByteRange, Hva};
use vmpager::{Installer, NeighbourPolicy, PageInstaller, Pager, Resolution};
use vmpager_store::faulty::Times;
use vmpager_sys::memory::Mapping;

const PAGES: usize = 1024;

fn hva(memory: &Mapping, page: usize) -> Hva {
    Hva(memory.hva() + (page * PAGE) as u64)
}

/// Asks until the page is in place.
fn bring(installer: &mut Installer, at: Hva) -> Resolution {
    loop {
        match installer.resolve(at) {
            Resolution::Waiting => {
                assert!(installer.wait(at, Instant::now() + Duration::from_secs(30)), "{at}");
            }
            other => return other,
        }
    }
}

#[test]
fn pages_at_hand_are_installed_by_who_asks() {
    begin!();
    let (memory, source) = (mapping(PAGES), faulty(PAGES));
    let pager = Pager::builder(source.clone()).region(&range(&memory), 0).start().unwrap();
    let mut installer = pager.installer().unwrap().unwrap();
    for at in 0..PAGES {
        assert!(!installer.is_present(hva(&memory, at)));
        assert_eq!(installer.resolve(hva(&memory, at)), Resolution::Installed);
        assert_eq!(installer.resolve(hva(&memory, at)), Resolution::Present);
    }
    assert_is_source(&memory, 0);
    let stats = pager.stats();
    assert_eq!((stats.faults, stats.pages_missing), (0, 0), "no handoff");
    assert_eq!(source.all_fetches(), vec![1; PAGES]);
    let outside = Hva(memory.hva() + (PAGES * PAGE) as u64);
    assert_eq!(installer.resolve(outside), Resolution::Outside);
}

#[test]
fn installers_faulting_threads_and_the_fill_fetch_each_page_once() {
    begin!();
    for cold in [false, true] {
        let (memory, source) = (mapping(PAGES), faulty(PAGES));
        if cold {
            source.delay(ByteRange::new(0, 1 << 30), Duration::from_micros(200));
        }
        let pager = Pager::builder(source.clone()).region(&range(&memory), 0).start().unwrap();
        let start = Barrier::new(7);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let mut installer = pager.installer().unwrap().unwrap();
                let (memory, start) = (&memory, &start);
                scope.spawn(move || {
                    start.wait();
                    for i in 0..PAGES {
                        let at = if thread % 2 == 0 { i } else { PAGES - 1 - i };
                        let end = bring(&mut installer, hva(memory, at));
                        let fine = [Resolution::Installed, Resolution::Present, Resolution::Filled];
                        assert!(fine.contains(&end), "{end:?}");
                        assert_eq!(page(memory, at * PAGE), Holds::Source(at * PAGE));
                    }
                });
            }
            for seed in 0..2 {
                let (memory, start) = (&memory, &start);
                scope.spawn(move || {
                    start.wait();
                    let mut random = Random::new(seed + 1);
                    for _ in 0..PAGES {
                        let at = random.below(PAGES) * PAGE;
                        assert_eq!(page(memory, at), Holds::Source(at));
                    }
                });
            }
            start.wait();
            pager.fill();
        });
        assert!(pager.wait_filled(Duration::from_secs(30)), "the last page may come from any");
        assert_eq!(source.all_fetches(), vec![1; PAGES], "cold: {cold}");
    }
}

#[test]
fn a_fill_ends_when_an_installer_brings_the_last_page() {
    begin!();
    let (memory, source) = (mapping(2), faulty(2));
    let pager = Pager::builder(source.clone())
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()
        .unwrap();
    let mut installer = pager.installer().unwrap().unwrap();
    assert_eq!(installer.resolve(hva(&memory, 0)), Resolution::Installed);
    assert_eq!(installer.resolve(hva(&memory, 1)), Resolution::Installed);
    pager.fill();
    assert!(pager.wait_filled(Duration::from_secs(10)));
    assert_eq!(installer.resolve(hva(&memory, 0)), Resolution::Filled);
}

#[test]
fn a_page_that_is_not_at_hand_is_waited_for() {
    begin!();
    let (memory, source) = (mapping(4), faulty(4));
    source.hold(ByteRange::new(PAGE as u64, PAGE as u64));
    let pager = Pager::builder(source.clone())
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()
        .unwrap();
    let mut installer = pager.installer().unwrap().unwrap();
    let cold = hva(&memory, 1);
    assert_eq!(installer.resolve(cold), Resolution::Waiting);
    // It may be told to look again while the worker takes the page over.
    let waits = (0..100).any(|_| {
        let in_vain = !installer.wait(cold, Instant::now() + Duration::from_millis(50));
        assert_eq!(installer.resolve(cold), Resolution::Waiting);
        in_vain
    });
    assert!(waits, "who waits looks again and again");
    // Others are not held up.
    assert_eq!(installer.resolve(hva(&memory, 2)), Resolution::Installed);
    assert_eq!(installer.resolve(cold), Resolution::Waiting);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            source.release();
        });
        let end = bring(&mut installer, cold);
        assert!([Resolution::Present, Resolution::Installed].contains(&end), "{end:?}");
    });
    assert_eq!(page(&memory, PAGE), Holds::Source(PAGE));
    assert_eq!(source.fetches(1), 1);
}

#[test]
fn a_page_that_cannot_be_had_is_said_to_be_poisoned() {
    begin!();
    let (memory, source) = (mapping(4), faulty(4));
    source.fail(ByteRange::new(PAGE as u64, PAGE as u64), Times::Always);
    let pager = Pager::builder(source).region(&range(&memory), 0).start().unwrap();
    let mut installer = pager.installer().unwrap().unwrap();
    assert_eq!(bring(&mut installer, hva(&memory, 1)), Resolution::Poisoned);
    assert_eq!(bring(&mut installer, hva(&memory, 0)), Resolution::Installed);
}

#[test]
fn after_the_pager_has_ended_nobody_waits() {
    begin!();
    let (memory, source) = (mapping(4), faulty(4));
    source.hold(ByteRange::new(0, PAGE as u64));
    let pager = Pager::builder(source).region(&range(&memory), 0).start().unwrap();
    let mut installer = pager.installer().unwrap().unwrap();
    let held = hva(&memory, 0);
    assert_eq!(installer.resolve(held), Resolution::Waiting);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(pager);
        });
        assert_eq!(bring(&mut installer, held), Resolution::Ended);
    });
}

/// Owners give pages back and look at them, while installers ask for the same
/// pages all the time: after its removal a page is zero (trap 3).
#[test]
fn no_installer_brings_back_what_was_removed() {
    begin!();
    const OWNERS: usize = 3;
    const ROUNDS: usize = 24;
    let stop = AtomicBool::new(false);
    let (removals, installs) = (AtomicU64::new(0), AtomicU64::new(0));
    for round in 0..ROUNDS {
        let (memory, source) = (mapping(PAGES), numbered(PAGES));
        let pager = Pager::builder(source).region(&range(&memory), 0).start().unwrap();
        stop.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| {
            for seed in 0..2 {
                let mut installer = pager.installer().unwrap().unwrap();
                let (memory, stop, installs) = (&memory, &stop, &installs);
                scope.spawn(move || {
                    let mut random = Random::new((round * 2 + seed) as u64);
                    while !stop.load(Ordering::Relaxed) {
                        let end = installer.resolve(hva(memory, random.below(PAGES)));
                        installs
                            .fetch_add(u64::from(end == Resolution::Installed), Ordering::Relaxed);
                    }
                });
            }
            let owners: Vec<_> = (0..OWNERS)
                .map(|owner| {
                    let (memory, removals) = (&memory, &removals);
                    scope.spawn(move || {
                        for at in (owner..PAGES).step_by(OWNERS) {
                            memory.discard(at * PAGE..(at + 1) * PAGE).unwrap();
                            removals.fetch_add(1, Ordering::Relaxed);
                            assert_eq!(page(memory, at * PAGE), Holds::Zero, "page {at}");
                        }
                    })
                })
                .collect();
            let ended: Vec<_> = owners.into_iter().map(|owner| owner.join()).collect();
            stop.store(true, Ordering::Relaxed);
            for end in ended {
                end.unwrap();
            }
        });
    }
    println!("{removals:?} removals, {installs:?} installs");
    assert!(installs.into_inner() > 1000, "the installers took part");
}
