//! The ways in which userfaultfd misleads a pager, one test each.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::source::short_source;
use common::{
    Holds, PAGE, assert_is_source, child, eventually, faulty, mapping, numbered, page,
    page_by_kernel, range,
};
use vmpager::core::{ByteRange, PageSource};
use vmpager::{NeighbourPolicy, Pager};
use vmpager_store::faulty::Times;
use vmpager_sys::memory::Mapping;

const LIMIT: Duration = Duration::from_secs(30);

fn pages(first: usize, count: usize) -> ByteRange {
    ByteRange::new((first * PAGE) as u64, (count * PAGE) as u64)
}

fn serve(memory: &Arc<Mapping>, source: &Arc<impl PageSource + 'static>, fill: bool) -> Pager {
    serve_with(memory, source, fill, NeighbourPolicy::default())
}

fn serve_with(
    memory: &Arc<Mapping>,
    source: &Arc<impl PageSource + 'static>,
    fill: bool,
    neighbours: NeighbourPolicy,
) -> Pager {
    Pager::builder(source.clone())
        .region(&range(memory), 0)
        .background_fill(fill)
        .neighbours(neighbours)
        .start()
        .unwrap()
}

#[test]
fn trap_3_a_removed_page_reads_zero_from_then_on() {
    begin!();
    let memory = mapping(1024);
    let source = faulty(1024);
    // Keeps the fill from ending.
    source.hold(pages(1023, 1));
    let pager = serve_with(&memory, &source, false, NeighbourPolicy::Off);
    // Some never seen, some read, some written.
    for at in 0..8 {
        assert_eq!(page(&memory, at * PAGE), Holds::Source(at * PAGE));
    }
    memory.write_u64(9 * PAGE, 7);
    memory.discard(0..512 * PAGE).unwrap();
    for at in (0..512).step_by(2) {
        assert_eq!(page(&memory, at * PAGE), Holds::Zero, "page {at}");
    }
    pager.fill();
    eventually("the fill has come to its end", || {
        source.all_fetches()[512..].iter().all(|&fetches| fetches >= 1)
    });
    for at in 0..1023 {
        let expected = if at < 512 { Holds::Zero } else { Holds::Source(at * PAGE) };
        assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
    }
    // Given back once more, in place or not.
    memory.write(3 * PAGE, &[1; PAGE]);
    memory.discard(0..600 * PAGE).unwrap();
    for at in 0..1023 {
        let expected = if at < 600 { Holds::Zero } else { Holds::Source(at * PAGE) };
        assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
    }
    assert_eq!(pager.stats().pages_removed, 512 + 600);
    let fetches: Vec<u32> = source.all_fetches()[8..512].to_vec();
    assert_eq!(fetches.iter().sum::<u32>(), 1, "only the one written: {fetches:?}");
    source.release();
    assert!(pager.wait_filled(LIMIT));
}

#[test]
fn trap_3_a_page_removed_while_it_is_read_reads_zero() {
    begin!();
    for second_reader in [false, true] {
        for fails in [false, true] {
            let (memory, source) = (mapping(64), faulty(64));
            source.hold(pages(8, 8));
            let window = NeighbourPolicy::Adaptive { first_window_shift: 3 };
            let pager = serve_with(&memory, &source, false, window);
            std::thread::scope(|scope| {
                let [gone, kept] = [10, 11].map(|at| {
                    scope.spawn({
                        let memory = &memory;
                        move || page_by_kernel(memory, at * PAGE)
                    })
                });
                eventually("both wait", || source.held() == 1 && pager.stats().faults == 2);
                memory.discard(9 * PAGE..11 * PAGE).unwrap();
                if second_reader {
                    // The answer is known: no need to wait for the source.
                    assert_eq!(page(&memory, 10 * PAGE), Holds::Zero);
                }
                assert!(!kept.is_finished());
                if fails {
                    source.fail(pages(8, 8), Times::Always);
                }
                source.release();
                assert_eq!(gone.join().unwrap().unwrap(), Holds::Zero);
                match kept.join().unwrap() {
                    Ok(holds) => assert_eq!((holds, fails), (Holds::Source(11 * PAGE), false)),
                    Err(_) => assert!(fails),
                }
            });
            assert_eq!(page(&memory, 9 * PAGE), Holds::Zero);
            assert_eq!(page(&memory, 10 * PAGE), Holds::Zero);
            assert_eq!(page(&memory, 16 * PAGE), Holds::Source(16 * PAGE));
        }
    }
}

#[test]
fn trap_4_a_page_installed_by_somebody_else_wakes_its_waiter() {
    begin!();
    let source = faulty(64);
    source.hold(pages(5, 1));
    let daemon = common::daemon::Running::start(source.clone(), |_| {});
    let memory = common::peer::Memory::new(&[64], PAGE);
    let socket = daemon.connect();
    memory.hand_over(&socket, common::peer::Dialect::V1_12);
    let region = &memory.regions[0].0;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| memory.page(0, 5));
        eventually("the read is held", || source.held() == 1);
        copy_without_waking(&memory.uffd, region.hva() + 5 * PAGE as u64, &[0x77; PAGE]);
        std::thread::sleep(Duration::from_millis(30));
        assert!(!reader.is_finished(), "the test is to show that only a wake ends the wait");
        source.release();
        assert_eq!(reader.join().unwrap(), Holds::Word(0x7777_7777_7777_7777));
    });
    memory.assert_is_source_but(0, 5);
    daemon.stop();
}

/// Installs a page and leaves its waiters asleep.
fn copy_without_waking(uffd: &impl AsRawFd, to: u64, page: &[u8; PAGE]) {
    const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
    const DONTWAKE: u64 = 1;
    let mut args = [to, page.as_ptr() as u64, PAGE as u64, DONTWAKE, 0];
    // SAFETY: UFFDIO_COPY reads and writes five words.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, args.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn trap_6_a_range_split_into_several_mappings_is_served_whole() {
    begin!();
    for fill in [false, true] {
        let memory = mapping(2048);
        let source = numbered(2048);
        let window = NeighbourPolicy::Adaptive { first_window_shift: 9 };
        // No pages, but other attributes: the kernel installs nothing across
        // the borders.
        for first in [1, 100, 511, 1023, 1030] {
            split_off(&memory, first);
        }
        let pager = serve_with(&memory, &source, fill, window);
        assert_is_source(&memory, 0);
        assert!(!fill || pager.wait_filled(LIMIT));
        assert_eq!(pager.stats().pages_removed, 0);
        assert_is_source(&memory, 0);
    }
}

/// Makes a page a mapping of its own.
fn split_off(memory: &Mapping, page: usize) {
    let at = memory.hva() + (page * PAGE) as u64;
    // SAFETY: the advice only concerns core dumps.
    let result = unsafe { libc::madvise(at as *mut libc::c_void, PAGE, libc::MADV_DONTDUMP) };
    assert_eq!(result, 0);
}

#[test]
fn trap_6_where_part_of_the_memory_is_unmapped_the_rest_is_served() {
    begin!();
    for fill in [false, true] {
        let memory = mapping(1024);
        let source = faulty(1024);
        if fill {
            source.hold(pages(0, 1024));
        }
        let window = NeighbourPolicy::Adaptive { first_window_shift: 9 };
        let pager = serve_with(&memory, &source, fill, window);
        let at = memory.hva() + 700 * PAGE as u64;
        // SAFETY: nobody uses these pages any more.
        let result = unsafe { libc::munmap(at as *mut libc::c_void, 20 * PAGE) };
        assert_eq!(result, 0);
        source.release();
        for at in (0..1024).filter(|at| !(700..720).contains(at)) {
            assert_eq!(page(&memory, at * PAGE), Holds::Source(at * PAGE), "page {at}");
        }
        assert!(!fill || pager.wait_filled(LIMIT));
    }
}

#[test]
fn trap_7_poison_outlives_the_pager_and_the_fill() {
    begin!();
    let (memory, source) = (mapping(64), faulty(64));
    source.fail(pages(20, 1), Times::Always);
    let pager = serve(&memory, &source, true);
    assert!(pager.wait_filled(LIMIT));
    assert_eq!(pager.stats().pages_poisoned, 1);
    drop(pager);
    for at in 0..64 {
        match page_by_kernel(&memory, at * PAGE) {
            Ok(holds) => assert_eq!(holds, Holds::Source(at * PAGE), "page {at}"),
            Err(_) => assert_eq!(at, 20),
        }
    }
}

#[test]
fn trap_7_dropped_amid_removals_the_pager_leaves_no_zeroes_behind() {
    begin!();
    let started = Instant::now();
    // Some 50 ms a round where every CPU has much to do.
    for round in (0..300).take_while(|_| started.elapsed() < Duration::from_secs(15)) {
        let memory = mapping(512);
        let source = faulty(512);
        let pager = serve_with(&memory, &source, false, NeighbourPolicy::Off);
        std::thread::scope(|scope| {
            for half in [0, 1] {
                let memory = &memory;
                // Gives back every other page of its half.
                scope.spawn(move || {
                    for at in (half * 256..(half + 1) * 256).step_by(2) {
                        memory.discard(at * PAGE..(at + 1) * PAGE).unwrap();
                    }
                });
            }
            std::thread::sleep(Duration::from_micros(round * 10));
            drop(pager);
        });
        for at in (1..512).step_by(2) {
            let seen = page_by_kernel(&memory, at * PAGE);
            assert!(seen.is_err(), "round {round} page {at}: {seen:?}");
        }
    }
}

#[test]
fn trap_7_a_killed_handler_freezes_its_peer_and_shows_no_zeroes() {
    begin!();
    let name = this_test!();
    if common::daemon::run_if_daemon() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("pager.sock");
    let mut daemon = common::daemon::spawn(name, &socket, 256);
    let mut peer = common::peer::PeerPlan::new(&socket, &[256]).spawn(name);
    peer.expect_source(0, 3);
    daemon.kill();
    daemon.wait();
    peer.start_reading(0, 200);
    assert!(peer.is_stuck_for(Duration::from_millis(500)), "it saw something");
}

#[test]
fn trap_13_what_cannot_be_read_raises_sigbus_and_never_reads_zero() {
    begin!();
    let name = this_test!();
    let (memory, source) = (mapping(512), faulty(512));
    source.fail(pages(100, 2), Times::Always);
    let window = NeighbourPolicy::Adaptive { first_window_shift: 9 };
    let pager = serve_with(&memory, &source, false, window);
    if child::task().is_some() {
        child::say(&format!("{:?}", page(&memory, 99 * PAGE)));
        child::say(&format!("{:?}", page(&memory, 100 * PAGE)));
        return;
    }
    for at in 0..512 {
        match page_by_kernel(&memory, at * PAGE) {
            Ok(holds) => assert_eq!(holds, Holds::Source(at * PAGE), "page {at}"),
            Err(_) => assert!((100..102).contains(&at), "page {at}"),
        }
    }
    assert_eq!(pager.stats().pages_poisoned, 2);
    // Still so, even if the source has recovered.
    source.heal();
    assert!(page_by_kernel(&memory, 101 * PAGE).is_err());
    // Given back, it is the guest's own: zero.
    memory.discard(101 * PAGE..102 * PAGE).unwrap();
    assert_eq!(page(&memory, 101 * PAGE), Holds::Zero);

    let mut toucher = child::spawn(name, "touch");
    assert_eq!(toucher.hear(), format!("{:?}", Holds::Source(99 * PAGE)));
    assert_eq!(toucher.hear_within(LIMIT), None, "reading a lost page returned");
    assert_eq!(toucher.wait().signal(), Some(rustix::process::Signal::BUS.as_raw()));
}

#[test]
fn trap_13_a_short_read_poisons_and_never_zeroes() {
    begin!();
    let memory = mapping(16);
    let pager = serve(&memory, &short_source(16, 5), false);
    for at in 0..16 {
        match page_by_kernel(&memory, at * PAGE) {
            Ok(holds) => assert_eq!(holds, Holds::Source(at * PAGE), "page {at}"),
            Err(_) => assert_eq!(at, 5),
        }
    }
    assert_eq!(pager.stats().pages_poisoned, 1);
}

#[test]
fn trap_13_an_error_that_passes_costs_time_and_nothing_else() {
    begin!();
    for at_hand in [true, false] {
        for fill in [true, false] {
            let (memory, source) = (mapping(512), faulty(512));
            if !at_hand {
                source.never_at_hand();
            }
            for at in [0, 7, 8, 511] {
                source.fail(pages(at, 1), Times::Often(2));
            }
            let pager = serve(&memory, &source, fill);
            assert_is_source(&memory, 0);
            assert!(!fill || pager.wait_filled(LIMIT));
            assert_eq!(pager.stats().pages_poisoned, 0);
        }
    }
}

#[test]
fn a_cold_page_never_holds_up_a_warm_one() {
    begin!();
    for fill in [false, true] {
        let (memory, source) = (mapping(2048), faulty(2048));
        // Among warm pages, so that most windows hold a cold one.
        for at in (64..2048).step_by(64) {
            source.hold(pages(at, 1));
        }
        let pager = serve(&memory, &source, fill);
        std::thread::scope(|scope| {
            let memory = &memory;
            let cold: Vec<_> = (64..2048)
                .step_by(64)
                .map(|at| scope.spawn(move || (at, page(memory, at * PAGE))))
                .collect();
            eventually("the cold ones wait", || pager.stats().faults >= cold.len() as u64);
            let since = Instant::now();
            for at in (0..2048).filter(|at| at % 64 != 0) {
                assert_eq!(page(memory, at * PAGE), Holds::Source(at * PAGE), "page {at}");
            }
            let took = since.elapsed();
            assert!(cold.iter().all(|cold| !cold.is_finished()));
            assert!(took < Duration::from_secs(5), "{took:?}");
            source.release();
            for cold in cold {
                let (at, holds) = cold.join().unwrap();
                assert_eq!(holds, Holds::Source(at * PAGE), "page {at}");
            }
        });
        assert!(!fill || pager.wait_filled(LIMIT));
    }
}
