//! The pager inside a VMM: every byte right, however the memory is served.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::{
    Holds, PAGE, assert_is_source, child, eventually, faulty, mapping, numbered, page,
    page_by_kernel, range,
};
use vmpager::core::{ByteRange, PageSize};
use vmpager::{EndReason, NeighbourPolicy, Pager, PagerError};
use vmpager_store::{MemorySource, RawFile};
use vmpager_sys::memory::Mapping;

const LIMIT: Duration = Duration::from_secs(20);

fn window(first_window_shift: u8) -> NeighbourPolicy {
    NeighbourPolicy::Adaptive { first_window_shift }
}

#[test]
fn every_byte_is_right_on_demand_with_fill_and_with_neighbours() {
    begin!();
    for policy in [NeighbourPolicy::Off, window(0), window(4), window(9)] {
        for fill in [false, true] {
            // Not a power of two, so that windows meet the slot's end.
            let pages = 2049;
            let memory = mapping(pages);
            let pager = Pager::builder(numbered(pages))
                .region(&range(&memory), 0)
                .neighbours(policy)
                .background_fill(fill)
                .start()
                .unwrap();
            assert_is_source(&memory, 0);
            if fill {
                assert!(pager.wait_filled(LIMIT), "{policy:?}");
            }
            let stats = pager.stats();
            let installed = stats.pages_demand + stats.pages_neighbour + stats.pages_fill;
            assert_eq!(installed, pages as u64, "{policy:?} fill {fill}: {stats:?}");
            assert_eq!(stats.pages_missing, 0, "{stats:?}");
            assert_eq!(stats.bytes_read, (pages * PAGE) as u64, "{stats:?}");
            if policy == NeighbourPolicy::Off {
                assert_eq!(stats.pages_neighbour, 0);
            }
            assert_is_source(&memory, 0);
        }
    }
}

#[test]
fn a_page_is_fetched_when_touched_and_not_before() {
    begin!();
    let (memory, source) = (mapping(64), faulty(64));
    let pager = Pager::builder(source.clone())
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()
        .unwrap();
    assert_eq!(source.all_fetches(), vec![0; 64]);
    assert_eq!(page(&memory, 17 * PAGE), Holds::Source(17 * PAGE));
    let mut expected = vec![0; 64];
    expected[17] = 1;
    assert_eq!(source.all_fetches(), expected);
    let stats = pager.stats();
    assert_eq!((stats.faults, stats.pages_demand, stats.pages_missing), (1, 1, 63));
    assert!(stats.stall_max_us > 0.0, "{stats:?}");
}

/// The window of a fault is brought in as a whole: before and behind what is
/// in place already, and holes of the file too.
#[test]
fn neighbours_come_from_the_whole_window() {
    begin!();
    let hole = ByteRange::new(5 << 12, 2 << 12);
    let source = Arc::new(MemorySource::numbered(512).with_zero_ranges(vec![hole]));
    let memory = mapping(512);
    let pager =
        Pager::builder(source).region(&range(&memory), 0).neighbours(window(0)).start().unwrap();
    // Windows of 1, 2, 4, ... pages, aligned; each brings what comes with it.
    for (touched, pages) in [(0, 1), (2, 3), (8, 7), (16, 15), (32, 31), (1, 48)] {
        memory.read_u64(touched * PAGE);
        eventually("the window", || {
            let stats = pager.stats();
            stats.pages_demand + stats.pages_neighbour + stats.pages_zero == pages
        });
    }
    for offset in (0..48 * PAGE).step_by(PAGE) {
        let hole = (5 * PAGE..7 * PAGE).contains(&offset);
        let expected = if hole { Holds::Zero } else { Holds::Source(offset) };
        assert_eq!(page(&memory, offset), expected, "{offset:#x}");
    }
    let stats = pager.stats();
    assert_eq!((stats.faults, stats.pages_zero), (6, 2), "{stats:?}");
}

#[test]
fn regions_in_any_order_of_addresses_and_offsets_are_told_apart() {
    begin!();
    // Several mappings, sorted by address, given in another order, their
    // contents in a third; neighbouring ones may be adjacent in memory.
    let mut memory: Vec<Arc<Mapping>> = [33, 1, 512, 70, 7].map(mapping).into();
    memory.sort_by_key(|m| m.hva());
    memory.swap(0, 3);
    memory.swap(1, 4);
    let mut offset = 3 * PAGE;
    let offsets: Vec<usize> = [2, 0, 4, 1, 3]
        .map(|i: usize| {
            let here = (i, offset);
            offset += memory[i].len() + PAGE;
            here
        })
        .into_iter()
        .fold(vec![0; 5], |mut offsets, (i, offset)| {
            offsets[i] = offset;
            offsets
        });
    for fill in [false, true] {
        let memory: Vec<Arc<Mapping>> = memory.iter().map(|m| mapping(m.len() / PAGE)).collect();
        let mut builder = Pager::builder(numbered(offset / PAGE)).background_fill(fill);
        for (memory, offset) in memory.iter().zip(&offsets) {
            builder = builder.region(&range(memory), *offset as u64);
        }
        let pager = builder.neighbours(window(5)).start().unwrap();
        for (memory, offset) in memory.iter().zip(&offsets) {
            assert_is_source(memory, *offset);
        }
        assert!(!fill || pager.wait_filled(LIMIT));
        assert_eq!(pager.stats().regions, 5);
    }
}

#[test]
fn memory_files_are_served_holes_included() {
    begin!();
    use std::os::unix::fs::FileExt;
    let file = tempfile::Builder::new().tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (pages, hole) = (1024, 256..512);
    let bytes = numbered(pages);
    let bytes = bytes.bytes();
    file.as_file().write_all_at(&bytes[..hole.start * PAGE], 0).unwrap();
    let after = hole.end * PAGE;
    file.as_file().write_all_at(&bytes[after..], after as u64).unwrap();
    for fill in [false, true] {
        let memory = mapping(pages);
        let source = RawFile::open(file.path()).unwrap();
        let pager = Pager::builder(source)
            .region(&range(&memory), 0)
            .background_fill(fill)
            .start()
            .unwrap();
        for at in (0..pages).rev() {
            let expected = if hole.contains(&at) { Holds::Zero } else { Holds::Source(at * PAGE) };
            assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
        }
        assert!(!fill || pager.wait_filled(LIMIT));
        let stats = pager.stats();
        let read = ((pages - hole.len()) * PAGE) as u64;
        assert_eq!(stats.bytes_read, read, "holes are not read: {stats:?}");
    }
}

#[test]
fn known_holes_cost_no_read_and_no_fill() {
    begin!();
    let zeroes = vec![ByteRange::new(0, 8 * 4096), ByteRange::new(100 * 4096, 28 * 4096)];
    let source = MemorySource::numbered(128).with_zero_ranges(zeroes);
    let memory = mapping(128);
    let pager = Pager::builder(Arc::new(source))
        .region(&range(&memory), 0)
        .background_fill(true)
        .start()
        .unwrap();
    assert!(pager.wait_filled(LIMIT));
    let stats = pager.stats();
    assert_eq!(stats.bytes_read, 92 * 4096, "{stats:?}");
    for at in 0..128 {
        let hole = !(8..100).contains(&at);
        let expected = if hole { Holds::Zero } else { Holds::Source(at * PAGE) };
        assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
    }
}

#[test]
fn pages_written_before_the_start_stay() {
    begin!();
    for fill in [false, true] {
        let memory = mapping(600);
        for at in (0..600).step_by(7) {
            memory.write(at * PAGE, &[0xab; PAGE]);
        }
        let pager = Pager::builder(numbered(600))
            .region(&range(&memory), 0)
            .background_fill(fill)
            .start()
            .unwrap();
        assert!(!fill || pager.wait_filled(LIMIT));
        for at in 0..600 {
            let expected = match at % 7 {
                0 => Holds::Word(0xabab_abab_abab_abab),
                _ => Holds::Source(at * PAGE),
            };
            assert_eq!(page(&memory, at * PAGE), expected, "page {at}");
        }
    }
}

#[test]
fn pages_written_while_served_keep_what_was_written() {
    begin!();
    let memory = mapping(2048);
    let pager = Pager::builder(numbered(2048))
        .region(&range(&memory), 0)
        .background_fill(true)
        .start()
        .unwrap();
    // One word each: the rest of the page has to come from the source.
    for at in (0..2048).step_by(3) {
        memory.write_u64(at * PAGE + 8, 0xfeed);
    }
    assert!(pager.wait_filled(LIMIT));
    for at in 0..2048 {
        let offset = at * PAGE;
        let expected = if at % 3 == 0 { 0xfeed } else { offset as u64 + 9 };
        assert_eq!(memory.read_u64(offset + 8), expected, "page {at}");
        memory.write_u64(offset + 8, offset as u64 + 9);
        assert_eq!(page(&memory, offset), Holds::Source(offset), "page {at}");
    }
}

#[test]
fn once_filled_the_memory_is_let_go_of() {
    begin!();
    let memory = mapping(4096);
    let pager = Pager::builder(numbered(4096)).region(&range(&memory), 0).start().unwrap();
    assert!(!pager.wait_filled(Duration::from_millis(20)), "nobody asked for the fill yet");
    pager.fill();
    assert!(pager.wait_filled(LIMIT));
    assert!(pager.wait_filled(Duration::ZERO), "and it stays filled");
    let stats = pager.stats();
    assert_eq!(stats.reason, Some(EndReason::Filled));
    assert_eq!(stats.pages_fill, 4096);
    assert!(stats.fill_ms.is_some(), "{stats:?}");
    assert!(!is_registered(&memory), "still registered");
    // Given back now, the pages are plain memory: nobody is told.
    memory.discard(0..64 * PAGE).unwrap();
    for at in 0..64 {
        assert_eq!(page(&memory, at * PAGE), Holds::Zero, "page {at}");
    }
    assert_eq!(pager.stats().faults, stats.faults);
    assert_eq!(pager.stats().pages_removed, 0);
    drop(pager);
    for at in 64..4096 {
        assert_eq!(page(&memory, at * PAGE), Holds::Source(at * PAGE), "page {at}");
    }
}

/// Whether the mapping is registered with a userfaultfd for missing pages.
fn is_registered(memory: &Mapping) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut here = false;
    for line in smaps.lines() {
        let first = line.split_once('-').and_then(|(start, rest)| {
            let end = rest.split(' ').next()?;
            Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
        });
        if let Some(range) = first {
            here = range.contains(&memory.hva());
        } else if here && line.starts_with("VmFlags:") {
            return line.split(' ').any(|flag| flag == "um");
        }
    }
    panic!("{memory:?} is not in smaps");
}

#[test]
fn dropped_early_the_pager_leaves_poison_and_never_zeroes() {
    begin!();
    let name = this_test!();
    let memory = mapping(700);
    let zeroes = vec![ByteRange::new(600 * 4096, 100 * 4096)];
    let source = MemorySource::numbered(700).with_zero_ranges(zeroes);
    let pager = Pager::builder(Arc::new(source))
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()
        .unwrap();
    assert!(is_registered(&memory));
    assert_eq!(page(&memory, 5 * PAGE), Holds::Source(5 * PAGE));
    memory.write_u64(6 * PAGE, 1);
    memory.discard(9 * PAGE..11 * PAGE).unwrap();
    if child::task().is_some() {
        drop(pager);
        child::say("dropped");
        child::say(&format!("{:?}", page(&memory, 300 * PAGE)));
        return;
    }
    drop(pager);
    assert!(!is_registered(&memory));
    for at in 0..700 {
        let offset = at * PAGE;
        match at {
            5 => assert_eq!(page(&memory, offset), Holds::Source(offset)),
            6 => assert_eq!(memory.read_u64(offset + 8), offset as u64 + 9),
            // Known to be zero, and therefore no loss.
            9 | 10 | 600.. => assert_eq!(page(&memory, offset), Holds::Zero, "page {at}"),
            _ => assert!(page_by_kernel(&memory, offset).is_err(), "page {at}"),
        }
    }
    let mut toucher = child::spawn(name, "touch");
    assert_eq!(toucher.hear(), "dropped");
    assert_eq!(toucher.hear_within(LIMIT), None, "reading a missing page returned");
    assert_eq!(toucher.wait().signal(), Some(rustix::process::Signal::BUS.as_raw()));
}

#[test]
fn dropping_the_pager_ends_the_wait_of_those_who_wait() {
    begin!();
    let (memory, source) = (mapping(64), faulty(64));
    source.hold(ByteRange::new(0, 1 << 20));
    let pager = Pager::builder(source.clone()).region(&range(&memory), 0).start().unwrap();
    std::thread::scope(|scope| {
        let waiters: Vec<_> = [3, 3, 40]
            .map(|at| {
                let memory = &memory;
                // By the kernel: a thread would get SIGBUS.
                scope.spawn(move || page_by_kernel(memory, at * PAGE))
            })
            .into();
        eventually("reads are held", || source.held() == 2);
        drop(pager);
        for waiter in waiters {
            let result = waiter.join().unwrap();
            assert!(result.is_err(), "nobody may see {result:?}");
        }
    });
}

#[test]
fn many_threads_on_the_same_pages_cost_one_fetch_each() {
    begin!();
    for cold in [false, true] {
        let (memory, source) = (mapping(256), faulty(256));
        if cold {
            source.delay(ByteRange::new(0, 1 << 30), Duration::from_millis(1));
        }
        let pager = Pager::builder(source.clone()).region(&range(&memory), 0).start().unwrap();
        let start = Barrier::new(32);
        std::thread::scope(|scope| {
            for thread in 0..32 {
                let (memory, start) = (&memory, &start);
                scope.spawn(move || {
                    start.wait();
                    for i in 0..256 {
                        // All of them in step, half from the other end.
                        let at = if thread % 2 == 0 { i } else { 255 - i };
                        assert_eq!(page(memory, at * PAGE), Holds::Source(at * PAGE));
                    }
                });
            }
        });
        assert_eq!(source.all_fetches(), vec![1; 256], "cold: {cold}");
        assert_eq!(pager.stats().pages_missing, 0);
    }
}

/// Each thread waits for pages of its own, so that nobody else's fault wakes
/// it.
#[test]
fn threads_that_fault_at_once_are_all_woken() {
    begin!();
    let (threads, each) = (32, 32);
    let memory = mapping(threads * each);
    let pager = Pager::builder(numbered(threads * each))
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()
        .unwrap();
    let step = Barrier::new(threads);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (memory, step) = (&memory, &step);
            scope.spawn(move || {
                for i in 0..each {
                    step.wait();
                    // Far apart, so that the pages in between are others'.
                    let at = (i * threads + thread) * PAGE;
                    assert_eq!(page(memory, at), Holds::Source(at));
                }
            });
        }
    });
    let stats = pager.stats();
    assert_eq!((stats.pages_missing, stats.pages_demand), (0, (threads * each) as u64));
}

#[test]
fn the_kernel_waits_for_pages_as_threads_do() {
    begin!();
    let memory = mapping(32);
    let _pager = Pager::builder(numbered(32)).region(&range(&memory), 0).start().unwrap();
    for at in 0..32 {
        assert_eq!(page_by_kernel(&memory, at * PAGE).unwrap(), Holds::Source(at * PAGE));
    }
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    begin!();
    let memory = mapping(4);
    let half = mapping(2);
    let refused = |builder: vmpager::pager::PagerBuilder| match builder.start() {
        Err(error) => error.to_string(),
        Ok(_) => panic!("started"),
    };
    let source = || numbered(4);
    let none = refused(Pager::builder(source()));
    assert!(none.contains("no memory regions"), "{none}");
    let beyond = refused(Pager::builder(source()).region(&range(&memory), 4096));
    assert!(beyond.contains("region 0") && beyond.contains("0x4000"), "{beyond}");
    let builder = Pager::builder(source()).region(&range(&half), 0).region(&range(&half), 8192);
    let twice = refused(builder);
    assert!(twice.contains("overlap in host addresses"), "{twice}");
    let huge = Pager::builder(source()).region_of(&range(&memory), 0, PageSize::Size2M);
    let huge = refused(huge);
    assert!(huge.contains("not a multiple of its page size"), "{huge}");

    // Memory that another pager serves already.
    let first = Pager::builder(source()).region(&range(&memory), 0).start().unwrap();
    let again = Pager::builder(source()).region(&range(&memory), 0).start();
    assert!(matches!(again, Err(PagerError::Register { .. })), "{again:?}");
    let again = again.unwrap_err().to_string();
    assert!(again.contains("0x4000 bytes") && again.contains("another userfaultfd"), "{again}");
    assert_is_source(&memory, 0);
    drop(first);
}

#[test]
fn a_start_that_fails_leaves_nothing_behind() {
    begin!();
    child::alone(this_test!(), || {
        let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
        let attempt = || {
            let memory = mapping(4);
            let first = Pager::builder(numbered(4)).region(&range(&memory), 0).start().unwrap();
            let again = Pager::builder(numbered(4)).region(&range(&memory), 0).start();
            assert!(again.is_err());
            drop(again);
            drop(first);
        };
        attempt();
        let before = (count("task"), count("fd"));
        for _ in 0..20 {
            attempt();
        }
        eventually("threads and descriptors are given back", || {
            (count("task"), count("fd")) == before
        });
    });
}

#[test]
fn statistics_are_told_while_a_fault_waits() {
    begin!();
    let (memory, source) = (mapping(64), faulty(64));
    source.hold(ByteRange::new(0, 1 << 20));
    let pager = Pager::builder(source.clone()).region(&range(&memory), 0).start().unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| page(&memory, 0));
        eventually("the read is held", || source.held() == 1);
        let since = Instant::now();
        assert_eq!(pager.stats().faults, 1);
        assert!(since.elapsed() < Duration::from_secs(1));
        source.release();
        assert_eq!(reader.join().unwrap(), Holds::Source(0));
    });
}
