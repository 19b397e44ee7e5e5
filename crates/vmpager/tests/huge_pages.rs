//! Huge pages made of memory that is in place.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use common::daemon::Running;
use common::peer::PeerPlan;
use common::{HUGE, Holds, PAGE, assert_is_source, eventually, numbered, page, range};
use vmpager::{EndReason, Pager};
use vmpager_sys::memory::Mapping;
use vmpager_sys::uffd::{Features, Userfaultfd};

const PIECE: usize = HUGE / PAGE;

/// Whether the kernel has transparent huge pages, and a free one for a test.
fn have_huge_pages() -> bool {
    let memory = Mapping::for_pager(HUGE).unwrap();
    memory.populate(0..HUGE).unwrap();
    let pidfd = vmpager_sys::peer::own_pidfd().unwrap();
    let made = vmpager_sys::collapse::collapse(
        std::os::fd::AsFd::as_fd(&pidfd),
        memory.hva(),
        HUGE as u64,
    );
    if let Err(error) = made {
        vmpager_testing::skipped(&format!("no transparent huge pages: {error}"));
    }
    made.is_ok()
}

/// KiB of a process's anonymous memory that lie in huge pages.
fn huge_kib(pid: i32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let kib = smaps.lines().filter_map(|line| line.strip_prefix("AnonHugePages:"));
    kib.map(|kib| kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
}

/// Whole pieces become huge pages of the process that has the memory, the
/// tails of its regions do not, and the session ends as it would.
#[test]
fn filled_memory_of_another_process_comes_to_lie_in_huge_pages() {
    begin!();
    if !have_huge_pages() {
        return;
    }
    let pages = [3 * PIECE + 7, PIECE + 1];
    let daemon = Running::start(numbered(pages.iter().sum()), |config| {
        config.options.background_fill = true;
        config.options.huge_pages = true;
    });
    let mut peer = PeerPlan::new(&daemon.socket, &pages).spawn(this_test!());
    daemon.expect_started();
    let summary = daemon.expect_ended();
    assert_eq!(summary.reason, Some(EndReason::Filled));
    assert_eq!(summary.pages_huge, 4 * PIECE as u64, "{summary:?}");
    assert_eq!(huge_kib(peer.child.pid()), 4 * 2048);
    for (region, count) in pages.into_iter().enumerate() {
        (0..count).for_each(|page| peer.expect_source(region, page));
    }
    assert!(daemon.stop().is_empty());
}

/// On demand, a piece becomes one huge page once its last page has arrived; a
/// page of it that is given back reads zero, the others stay what they are.
#[test]
fn memory_on_demand_comes_to_lie_in_huge_pages_where_it_is_whole() {
    begin!();
    if !have_huge_pages() {
        return;
    }
    let memory = Arc::new(Mapping::for_pager(3 * HUGE).unwrap());
    let pager = Pager::builder(numbered(3 * PIECE))
        .region(&range(&memory), 0)
        .huge_pages(true)
        .start()
        .unwrap();
    let made = |pages: usize| pager.stats().pages_huge == pages as u64;

    // Of the last piece three pages only.
    for at in (0..2 * PIECE).chain([2 * PIECE, 2 * PIECE + 200, 3 * PIECE - 1]) {
        assert_eq!(page(&memory, at * PAGE), Holds::Source(at * PAGE));
    }
    eventually("two huge pages", || made(2 * PIECE));
    assert!(pager.stats().pages_missing > 400, "{:?}", pager.stats());

    memory.discard(HUGE + 9 * PAGE..HUGE + 11 * PAGE).unwrap();
    memory.write_u64(5 * PAGE, 77);
    for at in 1..3 * PIECE {
        let expected = match at {
            5 => continue,
            _ if (PIECE + 9..PIECE + 11).contains(&at) => Holds::Zero,
            _ => Holds::Source(at * PAGE),
        };
        assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
    }
    assert_eq!(memory.read_u64(5 * PAGE), 77);
    // The last piece, and the second one again.
    eventually("two more", || made(4 * PIECE));
    assert_eq!(memory.read_u64(5 * PAGE), 77);
    assert_eq!(page(&memory, HUGE + 9 * PAGE), Holds::Zero);
}

/// Who does not ask for it gets none; and memory that may have no huge pages
/// is filled all the same.
#[test]
fn where_there_shall_be_none_there_are_none() {
    begin!();
    for (huge, memory) in [
        (false, Mapping::for_pager(2 * HUGE).unwrap()),
        (true, Mapping::anonymous(2 * HUGE).unwrap()),
    ] {
        let memory = Arc::new(memory);
        let pager = Pager::builder(numbered(2 * PIECE))
            .region(&range(&memory), 0)
            .background_fill(true)
            .huge_pages(huge)
            .start()
            .unwrap();
        assert!(pager.wait_filled(Duration::from_secs(20)));
        assert_eq!(pager.stats().pages_huge, 0);
        assert_is_source(&memory, 0);
    }
}

/// Pieces that are to be filled are moved in whole, demanded or not. The tail of
/// the memory and a piece that was written to before are copied; so may be one of
/// which a page is given back.
#[test]
fn pieces_of_this_process_are_moved_in_whole() {
    begin!();
    if !have_huge_pages() {
        return;
    }
    if !Userfaultfd::open(Features::MOVE).is_ok_and(|uffd| uffd.can_move()) {
        vmpager_testing::skipped("this kernel cannot move pages");
        return;
    }
    const PAGES: usize = 6 * PIECE + 3;
    let memory = Arc::new(Mapping::for_pager(PAGES * PAGE).unwrap());
    // There before the pager is.
    memory.write_u64(3 * HUGE, 7);
    let pager = Pager::builder(numbered(PAGES))
        .region(&range(&memory), 0)
        .background_fill(true)
        .huge_pages(true)
        .start()
        .unwrap();
    memory.discard(4 * HUGE + 5 * PAGE..4 * HUGE + 6 * PAGE).unwrap();
    // Demanded, perhaps, before it is filled.
    assert_eq!(page(&memory, 6 * HUGE - PAGE), Holds::Source(6 * HUGE - PAGE));
    assert!(pager.wait_filled(Duration::from_secs(20)));

    for at in 0..PAGES {
        let expected = match at {
            _ if at == 3 * PIECE => continue,
            _ if at == 4 * PIECE + 5 => Holds::Zero,
            _ => Holds::Source(at * PAGE),
        };
        assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
    }
    assert_eq!(memory.read_u64(3 * HUGE), 7);
    let stats = pager.stats();
    assert_eq!(stats.pages_moved % PIECE as u64, 0, "{stats:?}");
    let whole = stats.pages_moved / PIECE as u64;
    assert!((4..=5).contains(&whole), "{stats:?}");
    // All whole pieces lie in huge pages in the end, however they came.
    assert!((5..=6).contains(&(stats.pages_huge / PIECE as u64)), "{stats:?}");
    assert_eq!(huge_kib(i32::try_from(std::process::id()).unwrap()) % 2048, 0);
}
