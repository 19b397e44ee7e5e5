//! Huge pages made of memory that is in place.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use common::daemon::Running;
use common::peer::PeerPlan;
use common::{HUGE, Holds, PAGE, assert_is_source, eventually, faulty, numbered, page, range};
use vmpager::core::ByteRange;
use vmpager::{EndReason, NeighbourPolicy, Pager};
use vmpager_store::MemorySource;
use vmpager_store::faulty::Times;
use vmpager_sys::memory::Mapping;
use vmpager_sys::uffd::{Features, Userfaultfd};

const PIECE: usize = HUGE / PAGE;

/// Whether the kernel has transparent huge pages, and a free one for a test.
fn have_huge_pages() -> bool {
    let memory = Mapping::for_pager(HUGE).unwrap();
    memory.populate(0..HUGE).unwrap();
    let pidfd = vmpager_sys::peer::own_pidfd().unwrap();
    let made = vmpager_sys::collapse::collapse(pidfd.as_fd(), memory.hva(), HUGE as u64);
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
        .neighbours(NeighbourPolicy::Off)
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

/// Who does not ask for it gets none; and memory into which the kernel moves no
/// pages is filled all the same.
#[test]
fn where_none_can_be_moved_memory_is_filled_all_the_same() {
    begin!();
    let memfd = vmpager_sys::memfd::sealed("memory", 2 * HUGE as u64).unwrap();
    for (huge, memory) in [
        (false, Mapping::for_pager(2 * HUGE)),
        (true, Mapping::file_shared(memfd.as_fd(), 2 * HUGE)),
    ] {
        let memory = Arc::new(memory.unwrap());
        let pager = Pager::builder(numbered(2 * PIECE))
            .region(&range(&memory), 0)
            .background_fill(true)
            .huge_pages(huge)
            .start()
            .unwrap();
        assert!(pager.wait_filled(Duration::from_secs(20)));
        let stats = pager.stats();
        assert_eq!(stats.pages_moved, 0, "{stats:?}");
        assert_eq!(stats.bytes_read, 2 * HUGE as u64, "{stats:?}");
        assert!(huge || stats.pages_huge == 0, "{stats:?}");
        assert_is_source(&memory, 0);
    }
}

/// Pieces that are to be filled are moved in whole, demanded or not, small holes
/// of the source included. The tail of the memory, a piece that was written to
/// before and one in a large hole are not; one of which a page is given back may
/// be or not.
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
    if vmpager_sys::probe::host().thp.anonymous.as_deref() == Some("never") {
        // Pieces are prepared in small ones then, and not all can be moved.
        vmpager_testing::skipped("this kernel is set to use no huge pages");
        return;
    }
    const PAGES: usize = 7 * PIECE + 3;
    let hole =
        |first: usize, count: usize| ByteRange::new((first * PAGE) as u64, (count * PAGE) as u64);
    let holes =
        vec![hole(0, 1), hole(PIECE + 10, 3), hole(2 * PIECE - 1, 2), hole(6 * PIECE, PIECE)];
    let source = MemorySource::numbered(PAGES as u64).with_zero_ranges(holes.clone());
    let memory = Arc::new(Mapping::for_pager(PAGES * PAGE).unwrap());
    // There before the pager is: this page, and not all of a huge one, which the
    // kernel brings at once where it is set to use them always.
    memory.write_u64(3 * HUGE, 7);
    memory.discard(3 * HUGE + PAGE..4 * HUGE).unwrap();
    let pager = Pager::builder(Arc::new(source))
        .region(&range(&memory), 0)
        .background_fill(true)
        .huge_pages(true)
        .start()
        .unwrap();
    memory.discard(4 * HUGE + 5 * PAGE..4 * HUGE + 6 * PAGE).unwrap();
    // Demanded, perhaps, before it is filled.
    assert_eq!(page(&memory, 6 * HUGE - PAGE), Holds::Source(6 * HUGE - PAGE));
    assert!(pager.wait_filled(Duration::from_secs(20)));

    let is_hole = |at: usize| {
        let byte = (at * PAGE) as u64;
        holes.iter().any(|hole| (hole.start..hole.end()).contains(&byte))
    };
    for at in 0..PAGES {
        let expected = match at {
            _ if at == 3 * PIECE => continue,
            _ if at == 4 * PIECE + 5 || is_hole(at) => Holds::Zero,
            _ => Holds::Source(at * PAGE),
        };
        assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
    }
    assert_eq!(memory.read_u64(3 * HUGE), 7);
    let stats = pager.stats();
    let whole = stats.pages_moved / PIECE as u64;
    assert!((4..=5).contains(&whole), "{stats:?}");
    assert_eq!(stats.pages_moved % PIECE as u64, 0, "{stats:?}");
    // Moved or copied, whole pieces lie in huge pages in the end.
    assert!((5..=6).contains(&(stats.pages_huge / PIECE as u64)), "{stats:?}");
}

/// A source that fails, and bytes that are not at hand, come the ordinary way.
#[test]
fn what_cannot_be_moved_is_copied() {
    begin!();
    if !have_huge_pages() {
        return;
    }
    let source = faulty(3 * PIECE);
    source.never_at_hand();
    source.fail(ByteRange::new((HUGE + 9 * PAGE) as u64, PAGE as u64), Times::Always);
    let memory = Arc::new(Mapping::for_pager(3 * HUGE).unwrap());
    let pager = Pager::builder(source.clone())
        .region(&range(&memory), 0)
        .background_fill(true)
        .huge_pages(true)
        .start()
        .unwrap();
    for at in (0..3 * PIECE).filter(|at| *at != PIECE + 9).rev() {
        assert_eq!(page(&memory, at * PAGE), Holds::Source(at * PAGE), "page {at}");
    }
    eventually("the page that cannot be had is poisoned", || pager.stats().pages_poisoned == 1);
    let stats = pager.stats();
    assert_eq!((stats.pages_moved, stats.pages_missing), (0, 0), "{stats:?}");
}
