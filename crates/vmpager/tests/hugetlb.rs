//! Memory in 2 MiB pages. Needs some in the machine's pool (vm.nr_hugepages).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{
    HUGE, Holds, PAGE, assert_is_source, child, cpu_time_over, free_huge_pages, huge_pool,
    numbered, page, page_by_kernel, range,
};
use vmpager::Pager;
use vmpager::core::{ByteRange, PageSize};
use vmpager_store::MemorySource;
use vmpager_sys::memory::Mapping;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn hugetlb_memory_is_served_in_whole_pages() {
    begin!();
    let Some(_pool) = huge_pool(12) else { return };
    let pages = 6 * HUGE / PAGE;
    let zeroes = vec![ByteRange::new((2 * HUGE) as u64, HUGE as u64)];
    let source = Arc::new(MemorySource::numbered(pages as u64).with_zero_ranges(zeroes));
    for fill in [false, true] {
        let memory = [Mapping::hugetlb_2m(4 * HUGE), Mapping::hugetlb_2m(2 * HUGE)];
        let memory = memory.map(|m| Arc::new(m.unwrap()));
        let pager = Pager::builder(source.clone())
            .region_of(&range(&memory[0]), 0, PageSize::Size2M)
            .region_of(&range(&memory[1]), (4 * HUGE) as u64, PageSize::Size2M)
            .background_fill(fill)
            .start()
            .unwrap();
        for at in (0..pages).rev() {
            let offset = at * PAGE;
            let expected = match offset / HUGE {
                2 => Holds::Zero,
                _ => Holds::Source(offset),
            };
            let (memory, local) = match offset.checked_sub(4 * HUGE) {
                Some(local) => (&memory[1], local),
                None => (&memory[0], offset),
            };
            assert_eq!(page(memory, local), expected, "page {at}");
        }
        assert!(!fill || pager.wait_filled(LIMIT));
        if !fill {
            let stats = pager.stats();
            assert_eq!((stats.pages_demand, stats.pages_zero), (5, 1), "{stats:?}");
            memory[0].discard(HUGE..2 * HUGE).unwrap();
            assert_eq!(page(&memory[0], HUGE + 5 * PAGE), Holds::Zero);
        }
    }
}

#[test]
fn hugetlb_memory_dropped_early_is_poisoned() {
    begin!();
    let Some(_pool) = huge_pool(4) else { return };
    let memory = Arc::new(Mapping::hugetlb_2m(3 * HUGE).unwrap());
    let pager = Pager::builder(numbered(3 * HUGE / PAGE))
        .region_of(&range(&memory), 0, PageSize::Size2M)
        .start()
        .unwrap();
    assert_eq!(page(&memory, HUGE), Holds::Source(HUGE));
    drop(pager);
    assert_eq!(page(&memory, HUGE), Holds::Source(HUGE));
    for offset in [0, 2 * HUGE] {
        let seen = page_by_kernel(&memory, offset);
        assert!(seen.is_err(), "{seen:?}");
    }
}

#[test]
fn with_an_empty_hugetlb_pool_a_fault_waits_until_a_page_is_free() {
    begin!();
    child::alone(this_test!(), || {
        let Some(_pool) = huge_pool(2) else { return };
        for fill in [false, true] {
            serve_from_an_empty_pool(fill);
        }
    });
}

fn serve_from_an_empty_pool(fill: bool) {
    let memory = Arc::new(Mapping::hugetlb_2m(2 * HUGE).unwrap());
    // Takes all that is free.
    let all = Mapping::hugetlb_2m(free_huge_pages() * HUGE).unwrap();
    all.populate(0..all.len()).unwrap();
    assert_eq!(free_huge_pages(), 0);
    let pager = Pager::builder(numbered(2 * HUGE / PAGE))
        .region_of(&range(&memory), 0, PageSize::Size2M)
        .background_fill(fill)
        .start()
        .unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| page(&memory, 3 * PAGE));
        let used = cpu_time_over(Duration::from_millis(400));
        assert!(!reader.is_finished(), "the fault is held");
        assert!(used <= Duration::from_millis(20), "held at the price of {used:?} in 400 ms");
        drop(all);
        assert_eq!(reader.join().unwrap(), Holds::Source(3 * PAGE));
    });
    assert!(pager.stats().retries > 0);
    assert!(!fill || pager.wait_filled(LIMIT));
    assert_is_source(&memory, 0);
}
