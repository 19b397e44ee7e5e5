//! Packed images: what goes in comes out, in every way out.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/memory.rs"]
mod memory;

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{PAGE, evict, fetch, pages, request, span, submit_and_wait, wait_for};
use memory::{Page, any_memory, mixed, write_sparse};
use proptest::prelude::*;
use tempfile::TempDir;
use vmpager_core::{ByteRange, PageSource, Priority};
use vmpager_store::image::{
    Codec, Image, ImageError, MemoryInput, PackOptions, PackReport, Progress,
};

/// A directory on the disk the build is on, with memory files and images in it.
struct Dir(TempDir);

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

impl Dir {
    fn new() -> Self {
        Self(TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn raw(&self, name: &str, bytes: &[u8]) -> MemoryInput {
        write_sparse(&File::create(self.path(name)).unwrap(), bytes);
        MemoryInput::raw(self.path(name)).unwrap()
    }

    fn pack(&self, name: &str, bytes: &[u8], options: &PackOptions) -> PackReport {
        let raw = self.raw("raw", bytes);
        options.clone().replace(true).pack(&raw, &self.path(name), &mut go_on).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn frames(bytes: u64) -> PackOptions {
    PackOptions::default().frame_bytes(bytes).threads(3)
}

fn read_all(image: &Image) -> Vec<u8> {
    let len = image.memory_bytes();
    let mut bytes = vec![0xaa; usize::try_from(len).unwrap()];
    image.read(ByteRange::new(0, len), &mut bytes).unwrap();
    bytes
}

/// Reads all of it by a worker's reader, some pages at a time, jumping about.
fn read_as_a_worker(image: &Arc<Image>, step: u64) -> Vec<u8> {
    let mut reader = Arc::clone(image).open_reader().unwrap();
    let count = image.memory_bytes() / PAGE;
    let steps = count.div_ceil(step);
    let mut bytes = vec![0xaa; usize::try_from(image.memory_bytes()).unwrap()];
    for n in 0..steps {
        let first = (n * 7919 % steps) * step;
        let range = pages(first, step.min(count - first));
        bytes[span(range)].copy_from_slice(&fetch(&mut *reader, range).unwrap());
    }
    // The stride may not reach all.
    for n in 0..steps {
        let range = pages(n * step, step.min(count - n * step));
        bytes[span(range)].copy_from_slice(&fetch(&mut *reader, range).unwrap());
    }
    bytes
}

#[test]
fn memory_comes_back_by_every_codec_and_frame_size() {
    let dir = Dir::new();
    let bytes = memory::memory(&mixed());
    for codec in Codec::ALL {
        for frame in [4 << 10, 16 << 10, 64 << 10, 2 << 20] {
            let report = dir.pack("image", &bytes, &frames(frame).codec(codec));
            let image = Image::open(dir.path("image")).unwrap();
            assert_eq!(image.memory_bytes(), bytes.len() as u64);
            assert_eq!(image.content(), report.content);
            assert!(read_all(&image) == bytes, "{codec}, frames of {frame}");
            for step in [1, 5, 64, 200] {
                let read = read_as_a_worker(&image, step);
                assert!(read == bytes, "{codec}, frames of {frame}, {step} pages at a time");
            }
            assert!(image.verify(2, &mut go_on).unwrap().damage.is_empty());
        }
    }
}

#[test]
fn zeroes_and_duplicates_take_no_room_and_are_counted() {
    let dir = Dir::new();
    let mut of = vec![Page::Zero; 1000];
    of[3] = Page::Noise(1);
    of[500] = Page::Noise(2);
    of[998] = Page::Noise(1);
    let report = dir.pack("image", &memory::memory(&of), &frames(65536).codec(Codec::None));
    assert_eq!(report.zero_pages, 997);
    assert_eq!((report.stored_pages, report.duplicate_pages, report.parent_pages), (2, 1, 0));
    let len = std::fs::metadata(dir.path("image")).unwrap().len();
    assert_eq!(report.image_bytes, len);
    assert!((8192..8192 + 500).contains(&len), "{len}");
    let image = Image::open(dir.path("image")).unwrap();
    let mut zero = 0;
    image.visit_zero_ranges(&mut |range| zero += range.len / PAGE);
    assert_eq!(zero, 997);
}

/// Threads end in any order; the image does not show it.
#[test]
fn the_same_memory_makes_the_same_image() {
    let dir = Dir::new();
    let bytes = memory::memory(&mixed());
    let make = |threads| {
        dir.pack("image", &bytes, &frames(16384).threads(threads));
        std::fs::read(dir.path("image")).unwrap()
    };
    let one = make(1);
    for threads in [2, 5, 8] {
        assert!(make(threads) == one, "{threads} threads");
    }
    // How it is packed does not change what it is called.
    let other = dir.pack("image", &bytes, &frames(4096).codec(Codec::Lz4));
    assert_eq!(other.content, dir.pack("image", &bytes, &frames(65536)).content);
}

/// Reading is faster than compressing by far, and has to wait.
#[test]
fn all_memory_is_packed_however_long_compressing_takes() {
    let dir = Dir::new();
    let mut bytes = common::numbered(24 << 8);
    for (n, page) in (0..).zip(bytes.chunks_mut(4096)) {
        page[..2048]
            .copy_from_slice(&memory::page(Page::Noise(u8::try_from(n % 251).unwrap()))[..2048]);
    }
    dir.pack("image", &bytes, &frames(65536).level(7).threads(1));
    assert!(read_all(&Image::open(dir.path("image")).unwrap()) == bytes);
}

#[test]
fn unpacking_restores_the_bytes_and_the_holes() {
    let dir = Dir::new();
    let mut of = vec![Page::Zero; 5000];
    of[17] = Page::Text(1);
    of[4000] = Page::Noise(1);
    let bytes = memory::memory(&of);
    dir.pack("image", &bytes, &frames(65536));
    let image = Image::open(dir.path("image")).unwrap();
    image.unpack(&dir.path("back"), false, 3, &mut go_on).unwrap();
    assert!(std::fs::read(dir.path("back")).unwrap() == bytes);
    let blocks = |name| std::fs::metadata(dir.path(name)).unwrap().blocks();
    assert_eq!(blocks("back"), blocks("raw"), "{} bytes", bytes.len());
    let again = image.unpack(&dir.path("back"), false, 1, &mut go_on);
    assert!(matches!(again, Err(ImageError::Exists { .. })));
    image.unpack(&dir.path("back"), true, 1, &mut go_on).unwrap();
    assert_eq!(dir.names(), ["back", "image", "raw"]);
}

#[test]
fn a_page_that_is_cached_is_at_hand_and_others_come_later() {
    let dir = Dir::new();
    let bytes = memory::memory(&mixed());
    dir.pack("image", &bytes, &frames(65536));
    let image = Image::open(dir.path("image")).unwrap();
    let file = File::open(dir.path("image")).unwrap();
    let mut reader = Arc::clone(&image).open_reader().unwrap();
    // In the page cache, since it was just written.
    let one = |reader: &mut dyn vmpager_core::PageReader, n| {
        reader.try_read(pages(n, 1)).unwrap().map(common::bytes_of)
    };
    let of = mixed();
    let mut data = (0..600).zip(&of).filter(|(_, page)| **page != Page::Zero).map(|(n, _)| n);
    let first = data.next().unwrap();
    if one(&mut *reader, first).is_none() {
        vmpager_testing::skipped("this file system cannot tell what is in the page cache");
        return;
    }
    evict(&file);
    assert_eq!(one(&mut *reader, first).unwrap(), bytes[span(pages(first, 1))], "decoded before");
    // Asking starts the kernel's read-ahead, which now and then is over by the time of the
    // answer.
    let others: Vec<u64> = data.collect();
    let away = others.into_iter().rev().find(|n| one(&mut *reader, *n).is_none());
    let away = away.expect("most are neither decoded nor in the page cache");
    let range = pages(away, 1);
    assert_eq!(submit_and_wait(&mut *reader, range).unwrap(), bytes[span(range)]);
    assert_eq!(one(&mut *reader, away).unwrap(), bytes[span(range)], "at hand from now on");
}

#[test]
fn reads_in_any_number_end_once_each_whatever_their_urgency() {
    let dir = Dir::new();
    let bytes = memory::memory(&mixed());
    dir.pack("image", &bytes, &frames(16384));
    let image = Image::open(dir.path("image")).unwrap();
    let mut reader = Arc::clone(&image).open_reader().unwrap();
    let priorities = [Priority::Fill, Priority::Demand, Priority::Prefetch];
    for n in 0..150_u64 {
        let priority = priorities[usize::try_from(n % 3).unwrap()];
        reader.submit(request(n, pages(n * 4, 4), priority));
    }
    reader.promote(vmpager_core::ReadId(147), Priority::Demand);
    for (id, result) in wait_for(&mut *reader, 150) {
        assert!(result.unwrap() == bytes[span(pages(id * 4, 4))], "read {id}");
    }
    let beyond = fetch(&mut *reader, pages(599, 2));
    assert!(matches!(beyond, Err(vmpager_core::SourceError::Truncated { .. })), "{beyond:?}");
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let dir = Dir::new();
    let raw = dir.raw("raw", &memory::memory(&mixed()));
    let to = dir.path("image");
    let stop = |_: Progress| ControlFlow::Break(());
    let stopped = frames(65536).pack(&raw, &to, &mut { stop });
    assert!(matches!(stopped, Err(ImageError::Interrupted)));
    for (options, name) in [
        (frames(12288), "frame size"),
        (frames(8 << 20), "frame size"),
        (frames(65536).level(99), "level"),
    ] {
        let error = options.pack(&raw, &to, &mut go_on).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    // Written to while it is packed.
    let file = File::options().write(true).open(dir.path("raw")).unwrap();
    let mut write = |_: Progress| {
        file.write_all_at(&[1], 0).unwrap();
        ControlFlow::Continue(())
    };
    let changed = frames(65536).pack(&raw, &to, &mut write);
    assert!(matches!(changed, Err(ImageError::InputChanged { .. })), "{changed:?}");
    assert_eq!(dir.names(), ["raw"]);
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing_behind() {
    let full = Path::new("/dev/full");
    let dir = Dir::new();
    // Too little room for the image: a tmpfs of 64 KiB, if this user may mount.
    let small = dir.path("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = rustix::mount::mount(
        "none",
        &small,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=64k"),
    );
    if mounted.is_err() || !full.exists() {
        vmpager_testing::skipped("this user may not mount a small file system");
        return;
    }
    let raw = dir.raw("raw", &memory::memory(&mixed()));
    let result = frames(65536).codec(Codec::None).pack(&raw, &small.join("image"), &mut go_on);
    let left = std::fs::read_dir(&small).unwrap().count();
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::empty()).unwrap();
    let error = result.unwrap_err().to_string();
    assert!(error.contains("cannot write") && error.contains("No space left"), "{error}");
    assert_eq!(left, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_memory_comes_back(
        of in any_memory(25),
        codec in prop::sample::select(&Codec::ALL[..]),
        shift in 12..22_u32,
        step in 1..70_u64,
    ) {
        let dir = Dir::new();
        let bytes = memory::memory(&of);
        let report = dir.pack("image", &bytes, &frames(1 << shift).codec(codec));
        let image = Image::open(dir.path("image")).unwrap();
        prop_assert!(read_all(&image) == bytes);
        prop_assert!(read_as_a_worker(&image, step) == bytes);
        prop_assert!(image.verify(2, &mut go_on).unwrap().damage.is_empty());
        let zero = of.iter().filter(|page| **page == Page::Zero).count() as u64;
        prop_assert_eq!(report.zero_pages, zero);
        let all = report.zero_pages + report.stored_pages + report.duplicate_pages;
        prop_assert_eq!(all, of.len() as u64);
        image.unpack(&dir.path("back"), false, 2, &mut go_on).unwrap();
        prop_assert!(std::fs::read(dir.path("back")).unwrap() == bytes);
    }
}
