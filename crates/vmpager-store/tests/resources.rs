//! What raw memory files hold on to: mapped memory, threads, reads in flight.
//! These tests look at the whole process, so they run one after the other.

#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod common;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::*;
use vmpager_core::{PageReader, PageSource, Priority};
use vmpager_store::{Backend, RawFile};

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 512;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of files in this process's page tables.
fn file_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn read_threads() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.trim() == "vmpager-read")
        .count()
}

fn wait_for_threads(count: usize) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while read_threads() != count {
        assert!(Instant::now() < deadline, "{} threads, not {count}", read_threads());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Most file memory mapped while a 64 MiB file is read through, in chunks and
/// then page by page.
fn peak_of_reading_through(reader: &mut dyn PageReader) -> u64 {
    let before = file_rss();
    let mut peak = before;
    for chunk in 0..64 * MIB / PAGE / CHUNK {
        let data = reader.try_read(pages(chunk * CHUNK, CHUNK)).unwrap();
        bytes_of(data.expect("the file has just been written"));
        peak = peak.max(file_rss());
    }
    for page in (0..64 * MIB / PAGE).step_by(16) {
        bytes_of(reader.try_read(pages(page, 1)).unwrap().expect("at hand"));
        if page % 256 == 0 {
            peak = peak.max(file_rss());
        }
    }
    peak.max(file_rss()) - before
}

#[test]
fn mapped_memory_stays_within_its_bound() {
    let _alone = alone();
    let file = memory_file(64 * MIB / PAGE);
    // Whatever the test itself maps for the first time counts too.
    let slack = MIB / 2;
    let bounded = RawFile::options().max_mapped(6 * MIB).open(file.path()).unwrap();
    let mut reader = Arc::clone(&bounded).open_reader().unwrap();
    let peak = peak_of_reading_through(&mut *reader);
    assert!(peak <= 6 * MIB + slack, "{peak} bytes mapped");
    drop(reader);

    // Several readers share the bound: some do without the mapping.
    let before = file_rss();
    let mut readers: Vec<_> = (0..6).map(|_| Arc::clone(&bounded).open_reader().unwrap()).collect();
    let mut lent = 0;
    for (at, reader) in readers.iter_mut().enumerate() {
        if let Some(data) = reader.try_read(pages(at as u64 * CHUNK, CHUNK)).unwrap() {
            bytes_of(data);
            lent += 1;
        }
    }
    assert!((1..=3).contains(&lent), "{lent} chunks of 2 MiB lent");
    assert!(file_rss() - before <= 6 * MIB + slack);
    drop(readers);
    assert!(file_rss() <= before + slack, "nothing stays mapped");
    let mut reader = bounded.open_reader().unwrap();
    let data = reader.try_read(pages(0, CHUNK)).unwrap();
    assert!(data.is_some(), "those who were refused reserve nothing");
    drop(reader);

    let mut reader = RawFile::open(file.path()).unwrap().open_reader().unwrap();
    let peak = peak_of_reading_through(&mut *reader);
    assert!(peak >= 60 * MIB, "without a bound all stays mapped: {peak}");
}

#[test]
fn dropping_readers_with_reads_in_flight() {
    let _alone = alone();
    let file = memory_file(4096);
    for backend in BACKENDS {
        for round in 0..20_u64 {
            let source = RawFile::options().backend(backend).open(file.path()).unwrap();
            let Ok(mut reader) = source.open_reader() else {
                vmpager_testing::skipped("no io_uring");
                break;
            };
            evict(file.as_file());
            for id in 0..60 {
                let count = if id % 10 == 0 { 512 } else { 1 + round };
                reader.submit(request(id, pages(id * 50, count), Priority::Fill));
            }
            if round % 2 == 0 {
                reader.complete(&mut |_, result| assert!(result.is_ok()));
            }
            let started = Instant::now();
            drop(reader);
            assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        }
    }
}

#[test]
fn threads_end_with_the_last_reader_and_source() {
    let _alone = alone();
    let file = memory_file(64);
    let source = RawFile::options().backend(Backend::Threads).open(file.path()).unwrap();
    let mut readers: Vec<_> = (0..3).map(|_| Arc::clone(&source).open_reader().unwrap()).collect();
    for reader in &mut readers {
        submit_and_wait(&mut **reader, pages(0, 8)).unwrap();
    }
    // Four, shared by all readers; another test's may still be ending.
    wait_for_threads(4);
    drop(source);
    submit_and_wait(&mut *readers[0], pages(9, 8)).unwrap();
    drop(readers);
    wait_for_threads(0);
}
