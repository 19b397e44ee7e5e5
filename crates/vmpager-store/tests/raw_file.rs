//! Raw memory files against what is in them, and against what goes wrong.

#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use proptest::prelude::*;
use vmpager_core::{ByteRange, PageData, PageReader, PageSource, Priority, SourceError};
use vmpager_store::{Backend, OpenError, RawFile, RawFileOptions};

/// A reader of the file, or `None` with a note if this host lacks io_uring.
fn reader(options: RawFileOptions, path: &Path) -> Option<Box<dyn PageReader>> {
    match options.open(path).unwrap().open_reader() {
        Ok(reader) => Some(reader),
        Err(error) => {
            vmpager_testing::skipped(&format!("no io_uring ({error})"));
            None
        }
    }
}

/// Every combination of who reads and how much may be mapped.
fn all_options() -> impl Iterator<Item = RawFileOptions> {
    BACKENDS.into_iter().flat_map(|backend| {
        let options = RawFile::options().backend(backend);
        [options.clone(), options.clone().max_mapped(0), options.max_mapped(6 << 20)]
    })
}

#[test]
fn every_page_warm_and_cold() {
    let file = memory_file(1024);
    let expected = numbered(1024);
    for options in all_options() {
        let Some(mut reader) = reader(options.clone(), file.path()) else { continue };
        for cold in [true, false] {
            for count in [1, 16, 512] {
                if cold {
                    evict(file.as_file());
                }
                for first in 0..1024 / count {
                    let range = pages(first * count, count);
                    let bytes = fetch(&mut *reader, range).unwrap();
                    assert!(bytes == expected[span(range)], "{options:?} {range}");
                }
            }
        }
    }
}

#[test]
fn background_reads_of_any_length() {
    let file = memory_file(2048);
    let expected = numbered(2048);
    for options in all_options() {
        let options = options.max_buffered(1 << 20);
        let Some(mut reader) = reader(options, file.path()) else { continue };
        evict(file.as_file());
        let ranges = [pages(0, 1), pages(7, 3), pages(16, 100), pages(0, 2048), pages(2047, 1)];
        for (id, range) in ranges.iter().enumerate() {
            reader.submit(request(id as u64, *range, Priority::Fill));
        }
        for (id, result) in wait_for(&mut *reader, ranges.len()) {
            let range = ranges[index(id)];
            assert!(result.unwrap() == expected[span(range)], "{range}");
        }
    }
}

#[test]
fn what_is_at_hand_depends_on_the_page_cache() {
    let file = memory_file(1024);
    let unlimited = RawFile::open(file.path()).unwrap();
    let bounded = RawFile::options().max_mapped(6 << 20).open(file.path()).unwrap();
    let mut unlimited = unlimited.open_reader().unwrap();
    let mut bounded = bounded.open_reader().unwrap();
    let at_hand = |reader: &mut dyn PageReader, count| {
        reader
            .try_read(pages(0, count))
            .unwrap()
            .map(|data| matches!(data, PageData::Mapped { .. }))
    };
    assert_eq!(at_hand(&mut *unlimited, 1), Some(true));
    assert_eq!(at_hand(&mut *bounded, 1), Some(false), "copied");
    assert_eq!(at_hand(&mut *unlimited, 512), Some(true));
    assert_eq!(at_hand(&mut *bounded, 512), Some(true));

    // Asking starts the kernel's read-ahead, which now and then is over by the time of the
    // answer; so each file is asked for once, and not all of them need be away.
    for count in [512, 1] {
        for limit in [u64::MAX, 6 << 20] {
            let is_away = |_| {
                let file = memory_file(1024);
                let source = RawFile::options().max_mapped(limit).open(file.path()).unwrap();
                let mut reader = source.open_reader().unwrap();
                evict(file.as_file());
                at_hand(&mut *reader, count).is_none()
            };
            assert!((0..20).any(is_away), "{count} pages, {limit} bytes mapped at most");
        }
    }
}

#[test]
fn files_in_memory_are_always_at_hand() {
    let Ok(mut file) = tempfile::NamedTempFile::new_in("/dev/shm") else {
        vmpager_testing::skipped("no /dev/shm");
        return;
    };
    std::io::Write::write_all(&mut file, &numbered(64)).unwrap();
    for options in [RawFile::options(), RawFile::options().max_mapped(0)] {
        let mut reader = options.open(file.path()).unwrap().open_reader().unwrap();
        let data = reader.try_read(pages(3, 16)).unwrap().expect("at hand");
        assert!(bytes_of(data) == numbered(64)[3 * 4096..19 * 4096]);
    }
}

#[test]
fn holes_are_found_once_and_read_as_zeroes() {
    let file = temp_file();
    file.as_file().set_len(256 * PAGE).unwrap();
    for (page, count) in [(0, 4), (100, 3), (128, 64)] {
        file.as_file().write_all_at(&vec![7; count * 4096], page * PAGE).unwrap();
    }
    file.as_file().sync_all().unwrap();
    let source = RawFile::open(file.path()).unwrap();
    let mut holes = Vec::new();
    source.visit_zero_ranges(&mut |range| holes.push(range));
    if holes.is_empty() {
        vmpager_testing::skipped("this file system does not report holes");
        return;
    }
    assert_eq!(holes, [pages(4, 96), pages(103, 25), pages(192, 64)]);
    let mut reader = source.open_reader().unwrap();
    assert_eq!(
        fetch(&mut *reader, pages(99, 2)).unwrap()[4090..4102],
        [0, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7]
    );
}

#[test]
fn a_file_that_shrinks_is_truncated() {
    for options in all_options() {
        let file = memory_file(256);
        let Some(mut reader) = reader(options.clone(), file.path()) else { continue };
        fetch(&mut *reader, pages(128, 64)).unwrap();
        file.as_file().set_len(100 * PAGE + 9).unwrap();
        std::thread::sleep(Duration::from_millis(25));
        for range in [pages(128, 64), pages(100, 1), pages(90, 20), pages(255, 1)] {
            let at_hand = reader.try_read(range).map(|data| data.map(bytes_of));
            let background = submit_and_wait(&mut *reader, range);
            for error in [at_hand.unwrap_err(), background.unwrap_err()] {
                let SourceError::Truncated { len, .. } = error else { panic!("{error}") };
                assert_eq!(len, 100 * PAGE + 9);
                assert!(!error.is_transient());
            }
        }
        let inside = submit_and_wait(&mut *reader, pages(0, 1)).unwrap_err();
        assert!(matches!(inside, SourceError::Changed { .. }), "{inside}");
    }
}

#[test]
fn a_file_that_is_written_to_is_refused() {
    for options in all_options() {
        let file = memory_file(256);
        let Some(mut reader) = reader(options, file.path()) else { continue };
        fetch(&mut *reader, pages(0, 64)).unwrap();
        std::thread::sleep(Duration::from_millis(15));
        file.as_file().write_all_at(b"!", 77).unwrap();
        let background = submit_and_wait(&mut *reader, pages(128, 1)).unwrap_err();
        std::thread::sleep(Duration::from_millis(25));
        for range in [pages(0, 1), pages(0, 16), pages(128, 64)] {
            let error = reader.try_read(range).unwrap_err();
            assert!(matches!(error, SourceError::Changed { .. }), "{error}");
        }
        assert!(matches!(background, SourceError::Changed { .. }), "{background}");
    }
}

#[test]
fn ranges_beyond_the_end_are_errors() {
    let file = memory_file(4);
    for options in all_options() {
        let Some(mut reader) = reader(options, file.path()) else { continue };
        assert!(reader.try_read(pages(3, 2)).is_err());
        assert!(submit_and_wait(&mut *reader, pages(3, 2)).is_err());
        assert!(submit_and_wait(&mut *reader, pages(9, 1)).is_err());
    }
}

#[test]
fn unsuitable_files_are_refused_with_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    File::create(path("empty")).unwrap();
    std::fs::write(path("odd"), [0; 4097]).unwrap();
    let pipe = path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    for (path, words) in [
        (path("missing"), "No such file"),
        (path(""), "is a directory"),
        (path("empty"), "is empty"),
        (path("odd"), "has 4097 bytes, which is not a multiple of 4096"),
        (pipe, "is a pipe"),
        ("/dev/null".into(), "is a character device"),
    ] {
        let error = RawFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

/// Runs on a thread that has given up its privileges, or not at all.
fn as_nobody(run: impl FnOnce() + Send) {
    if !rustix::process::geteuid().is_root() {
        vmpager_testing::skipped("only root can become somebody else");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            run();
        });
        thread.join().unwrap();
    });
}

#[test]
fn an_unreadable_file_says_so() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o000)).unwrap();
    as_nobody(|| {
        let error = RawFile::open(file.path()).unwrap_err();
        assert!(matches!(&error, OpenError::Open { .. }), "{error}");
        assert!(error.to_string().contains("Permission denied"), "{error}");
    });
}

/// mincore(2) would answer that everything is resident.
#[test]
fn a_reader_who_is_not_told_of_residency_does_not_map() {
    let file = memory_file(64);
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(file.path(), copy.path()).unwrap();
    copy.as_file().set_permissions(std::fs::Permissions::from_mode(0o444)).unwrap();
    copy.as_file().sync_all().unwrap();
    as_nobody(|| {
        let mut reader = RawFile::open(copy.path()).unwrap().open_reader().unwrap();
        let data = reader.try_read(pages(0, 16)).unwrap().expect("at hand");
        assert!(matches!(data, PageData::Bytes(_)));
        assert!(bytes_of(data) == numbered(64)[..16 * 4096]);
        evict(copy.as_file());
        assert!(reader.try_read(pages(32, 16)).unwrap().is_none(), "not at hand");
    });
}

#[test]
fn demands_and_promoted_reads_overtake_fill() {
    const FILL: u64 = 200;
    let file = memory_file(1024);
    for backend in BACKENDS {
        let options = RawFile::options().backend(backend);
        let Some(mut reader) = reader(options, file.path()) else { continue };
        for id in 0..FILL {
            reader.submit(request(id, pages(id * 4, 4), Priority::Fill));
        }
        reader.promote(vmpager_core::ReadId(FILL - 1), Priority::Prefetch);
        reader.promote(vmpager_core::ReadId(5000), Priority::Demand);
        reader.submit(request(FILL, pages(1000, 1), Priority::Demand));
        let results = wait_for(&mut *reader, 201);
        let place = |id| results.iter().position(|(other, _)| *other == id).unwrap();
        assert!(place(FILL) < 40, "demand: {}", place(FILL));
        assert!(place(FILL - 1) < 70, "promoted: {}", place(FILL - 1));
        assert!(place(FILL - 2) > 150, "fill: {}", place(FILL - 2));
        for (id, result) in results {
            let first = if id == FILL { 1000 } else { id * 4 };
            assert_eq!(result.unwrap()[..8], (first * PAGE + 1).to_le_bytes());
        }
    }
}

#[test]
fn the_descriptor_is_readable_until_reads_are_taken() {
    let file = memory_file(16);
    for backend in BACKENDS {
        let options = RawFile::options().backend(backend);
        let Some(mut reader) = reader(options, file.path()) else { continue };
        assert!(!is_ready(&*reader, Duration::ZERO));
        reader.submit(request(1, pages(0, 4), Priority::Demand));
        for _ in 0..3 {
            assert!(is_ready(&*reader, Duration::from_secs(5)));
        }
        wait_for(&mut *reader, 1);
        std::thread::sleep(Duration::from_millis(10));
        reader.complete(&mut |id, _| panic!("{id:?} ends twice"));
        assert!(!is_ready(&*reader, Duration::from_millis(5)));
    }
}

#[test]
fn many_readers_at_a_time() {
    let file = memory_file(2048);
    let expected = &numbered(2048);
    for options in all_options() {
        let source = options.open(file.path()).unwrap();
        evict(file.as_file());
        std::thread::scope(|scope| {
            for worker in 0..4_u64 {
                let source = Arc::clone(&source);
                scope.spawn(move || {
                    let Ok(mut reader) = source.open_reader() else { return };
                    for step in 0..128_u64 {
                        let range = pages((step * 37 + worker * 512) % 1984, 1 + step % 64);
                        let bytes = fetch(&mut *reader, range).unwrap();
                        assert!(bytes == expected[span(range)], "{range}");
                    }
                });
            }
        });
    }
}

#[derive(Clone, Debug)]
enum Op {
    Fetch(ByteRange),
    Submit(ByteRange, Priority),
    Promote(usize),
    Evict,
    Complete,
}

fn op() -> impl Strategy<Value = Op> {
    let range =
        (0..512_u64, 1..600_u64).prop_map(|(first, count)| pages(first, count.min(512 - first)));
    let priority = prop::sample::select(vec![Priority::Fill, Priority::Prefetch, Priority::Demand]);
    prop_oneof![
        6 => range.clone().prop_map(Op::Fetch),
        6 => (range, priority).prop_map(|(range, priority)| Op::Submit(range, priority)),
        1 => (0..20_usize).prop_map(Op::Promote),
        1 => Just(Op::Evict),
        2 => Just(Op::Complete),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_mix_of_reads_equals_pread(
        ops in prop::collection::vec(op(), 1..40),
        mapped in prop::option::of(0..8_u64 << 20),
        buffered in 0..3_usize << 20,
        threads in any::<bool>(),
    ) {
        let file = memory_file(512);
        let backend = if threads { Backend::Threads } else { Backend::Auto };
        let mut options = RawFile::options().backend(backend).max_buffered(buffered);
        if let Some(bytes) = mapped {
            options = options.max_mapped(bytes);
        }
        let mut reader = options.open(file.path()).unwrap().open_reader().unwrap();
        let mut submitted: Vec<ByteRange> = Vec::new();
        let mut ended = 0;
        let expected = |range: ByteRange| {
            let mut bytes = vec![0; index(range.len)];
            file.as_file().read_exact_at(&mut bytes, range.start).unwrap();
            bytes
        };
        for op in ops {
            match op {
                Op::Fetch(range) => if let Some(data) = reader.try_read(range).unwrap() {
                    prop_assert!(bytes_of(data) == expected(range), "{range}");
                },
                Op::Submit(range, priority) => {
                    reader.submit(request(submitted.len() as u64, range, priority));
                    submitted.push(range);
                }
                Op::Promote(id) => reader.promote(vmpager_core::ReadId(id as u64), Priority::Demand),
                Op::Evict => evict(file.as_file()),
                Op::Complete => reader.complete(&mut |id, result| {
                    ended += 1;
                    let range = submitted[index(id.0)];
                    assert!(bytes_of(result.unwrap()) == expected(range), "{range}");
                }),
            }
        }
        for (id, result) in wait_for(&mut *reader, submitted.len() - ended) {
            let range = submitted[index(id)];
            prop_assert!(result.unwrap() == expected(range), "{range}");
        }
    }
}
