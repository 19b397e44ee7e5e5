//! The sources for tests: they must be right before they test others.

#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use vmpager_core::{PageReader, PageSource, Priority, SourceError};
use vmpager_store::faulty::{ALL, FaultySource, Times};
use vmpager_store::{Backend, MemorySource, RawFile};

fn faulty(pages: u64) -> (Arc<FaultySource>, Box<dyn PageReader>) {
    let source = FaultySource::wrap(Arc::new(MemorySource::numbered(pages)));
    let reader = Arc::clone(&source).open_reader().unwrap();
    (source, reader)
}

#[test]
fn memory_is_at_hand_and_answers_submissions_too() {
    let source = MemorySource::numbered(8).named("m").with_zero_ranges(vec![pages(2, 1)]);
    assert_eq!((&*source.name(), source.len(), source.is_empty()), ("m", 8 * PAGE, false));
    let source = Arc::new(source);
    let mut zero = Vec::new();
    source.visit_zero_ranges(&mut |range| zero.push(range));
    assert_eq!(zero, [pages(2, 1)]);
    let mut reader = Arc::clone(&source).open_reader().unwrap();
    let mut expected = numbered(8);
    expected[2 * 4096..3 * 4096].fill(0);
    assert!(fetch(&mut *reader, pages(0, 8)).unwrap() == expected);
    assert!(submit_and_wait(&mut *reader, pages(1, 7)).unwrap() == expected[4096..]);
    assert!(!is_ready(&*reader, Duration::ZERO));
    assert!(matches!(reader.try_read(pages(7, 2)), Err(SourceError::Truncated { .. })));
    assert_eq!(MemorySource::new(vec![1; 5000]).bytes()[4998..5002], [1, 1, 0, 0]);
}

#[test]
fn fetches_are_counted_by_page() {
    let (source, mut reader) = faulty(16);
    fetch(&mut *reader, pages(0, 4)).unwrap();
    fetch(&mut *reader, pages(3, 2)).unwrap();
    submit_and_wait(&mut *reader, pages(3, 1)).unwrap();
    assert_eq!(source.all_fetches()[..6], [1, 1, 1, 3, 1, 0]);
    assert_eq!((source.fetches(3), source.fetches(99)), (3, 0));
    source.never_at_hand();
    assert!(reader.try_read(pages(8, 1)).unwrap().is_none());
    assert_eq!(source.fetches(8), 0, "not fetched until it is submitted");
    fetch(&mut *reader, pages(8, 1)).unwrap();
    assert_eq!(source.fetches(8), 1);
}

#[test]
fn failures_end_after_their_count() {
    let (source, mut reader) = faulty(16);
    source.fail(pages(4, 4), Times::Often(2)).fail(pages(9, 1), Times::Always);
    assert!(fetch(&mut *reader, pages(0, 4)).is_ok(), "beside it");
    assert!(reader.try_read(pages(7, 1)).unwrap_err().is_transient());
    assert!(submit_and_wait(&mut *reader, pages(0, 16)).is_err());
    assert!(fetch(&mut *reader, pages(4, 4)).unwrap() == numbered(16)[4 * 4096..8 * 4096]);
    for _ in 0..5 {
        let error = submit_and_wait(&mut *reader, pages(9, 1)).unwrap_err();
        assert!(error.to_string().contains("0x9000..0xa000 of memory"), "{error}");
    }
    source.heal();
    assert!(submit_and_wait(&mut *reader, pages(9, 1)).is_ok());
}

#[test]
fn delays_pass_and_the_descriptor_tells() {
    let (source, mut reader) = faulty(16);
    source
        .delay(pages(2, 1), Duration::from_millis(60))
        .delay(pages(4, 1), Duration::from_millis(20));
    assert!(reader.try_read(pages(0, 3)).unwrap().is_none(), "not at hand");
    let started = Instant::now();
    for (id, page) in [(2, 2), (4, 4), (6, 6)] {
        reader.submit(request(id, pages(page, 1), Priority::Demand));
    }
    let results = wait_for(&mut *reader, 3);
    assert_eq!(results.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [6, 4, 2]);
    assert!(started.elapsed() >= Duration::from_millis(60), "{:?}", started.elapsed());
    assert!(!is_ready(&*reader, Duration::from_millis(1)), "the timer is spent");
}

#[test]
fn held_reads_wait_for_their_release() {
    for backend in [Backend::Auto, Backend::Threads] {
        let file = memory_file(64);
        let raw = RawFile::options().backend(backend).open(file.path()).unwrap();
        let source = FaultySource::wrap(raw);
        let mut reader = Arc::clone(&source).open_reader().unwrap();
        source.hold(pages(8, 8));
        reader.submit(request(1, pages(0, 16), Priority::Fill));
        reader.submit(request(2, pages(0, 8), Priority::Fill));
        reader.promote(vmpager_core::ReadId(1), Priority::Demand);
        assert_eq!(wait_for(&mut *reader, 1)[0].0, 2);
        assert!(!is_ready(&*reader, Duration::from_millis(20)));
        assert_eq!(source.held(), 1);
        std::thread::scope(|scope| {
            scope.spawn(|| source.release());
            let (id, result) = wait_for(&mut *reader, 1).remove(0);
            assert!(id == 1 && result.unwrap() == numbered(64)[..16 * 4096]);
        });
        assert_eq!(source.held(), 0);
        source.hold(ALL);
        reader.submit(request(3, pages(0, 1), Priority::Fill));
        assert_eq!(source.held(), 1);
        drop(reader);
        assert_eq!(source.held(), 0, "gone with its reader");
    }
}
