//! The cache of images at servers: what is in it is not fetched again, and what is
//! wrong in it is no page of anybody's.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/memory.rs"]
mod memory;

use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PAGE, fetch, pages, span};
use memory::{Page, write_sparse};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;
use vmpager_core::PageSource;
use vmpager_store::image::{Codec, Image, MemoryInput, PackOptions};
use vmpager_store::remote::{RemoteNumbers, RemoteOptions};
use vmpager_testing::http::Server;

/// A server with images of memory that does not shrink, and a directory for caches.
struct World {
    dir: TempDir,
    server: Server,
}

const PAGES: u64 = 512;

impl World {
    fn new() -> Self {
        Self { dir: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), server: Server::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image of 2 MiB at the server, in frames of 16 KiB. Returns its memory.
    fn put(&self, name: &str, seed: u8) -> Vec<u8> {
        let page = |n: u64| {
            let mut page = memory::page(Page::Noise(u8::try_from(n % 250).unwrap()));
            page[0] = u8::try_from(n / 250).unwrap();
            page[1] = seed;
            page
        };
        let memory: Vec<u8> = (0..PAGES).flat_map(page).collect();
        write_sparse(&std::fs::File::create(self.path("raw")).unwrap(), &memory);
        let raw = MemoryInput::raw(self.path("raw")).unwrap();
        let options = PackOptions::default().frame_bytes(4 * PAGE).codec(Codec::None).replace(true);
        let go_on = &mut |_| ControlFlow::Continue(());
        options.pack(&raw, &self.path("packed"), go_on).unwrap();
        self.server.put(name, std::fs::read(self.path("packed")).unwrap(), Some("\"1\""));
        memory
    }

    fn open(&self, name: &str, cache_bytes: u64) -> Arc<Image> {
        self.open_in(name, &self.path("cache"), cache_bytes)
    }

    fn open_in(&self, name: &str, cache: &Path, bytes: u64) -> Arc<Image> {
        let remote = RemoteOptions::default().cache(cache, bytes);
        Image::options().remote(remote).open(self.server.url(name)).unwrap()
    }

    fn cache_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("cache")).unwrap();
        let files = entries.map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some()).collect()
    }

    /// Waits until no image that was dropped is in use any more by its threads, which end
    /// by themselves.
    fn wait_until_unused(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        for path in self.cache_files() {
            let file = std::fs::File::open(path).unwrap();
            while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                assert!(Instant::now() < until, "somebody uses it");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn cache_bytes(&self) -> u64 {
        let files = self.cache_files();
        files.iter().map(|path| std::fs::metadata(path).unwrap().blocks() * 512).sum()
    }
}

/// All of it, by a worker's way.
fn read_all(image: &Arc<Image>, memory: &[u8]) {
    let mut reader = Arc::clone(image).open_reader().unwrap();
    for first in (0..PAGES).step_by(16) {
        let range = pages(first, 16);
        assert!(fetch(&mut *reader, range).unwrap() == memory[span(range)], "{range}");
    }
}

fn numbers(image: &Arc<Image>) -> RemoteNumbers {
    image.remote_numbers().unwrap()
}

/// Reads all, and waits until the cache has what it takes.
fn fill(image: &Arc<Image>, memory: &[u8]) -> RemoteNumbers {
    read_all(image, memory);
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let seen = numbers(image);
        if seen.frames_stored + seen.frames_not_stored >= seen.frames_fetched {
            return seen;
        }
        assert!(Instant::now() < until, "{seen:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const FRAMES: u64 = PAGES / 4;
const PLENTY: u64 = 64 << 20;

#[test]
fn what_is_cached_is_not_fetched_again() {
    let world = World::new();
    let memory = world.put("image", 0);
    let first = fill(&world.open("image", PLENTY), &memory);
    assert_eq!((first.frames_fetched, first.frames_stored), (FRAMES, FRAMES), "{first:?}");

    let asked = world.server.requests().len();
    let again = world.open("image", PLENTY);
    read_all(&again, &memory);
    let seen = numbers(&again);
    assert_eq!((seen.frames_fetched, seen.frames_cached), (0, FRAMES), "{seen:?}");
    assert_eq!(world.server.requests().len() - asked, 2, "the index, and nothing else");
    // The same image at another place is the same image.
    world.put("copy", 0);
    let copy = world.open("copy", PLENTY);
    read_all(&copy, &memory);
    assert_eq!(numbers(&copy).frames_fetched, 0);
    // One that differs in one byte a page is not.
    let other = world.put("other", 1);
    let image = world.open("other", PLENTY);
    read_all(&image, &other);
    assert_eq!(numbers(&image).frames_cached, 0);
}

#[test]
fn what_is_wrong_in_the_cache_is_fetched_again() {
    let world = World::new();
    let memory = world.put("image", 0);
    fill(&world.open("image", PLENTY), &memory);
    let path = world.cache_files().remove(0);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    // A flipped bit in every other frame, zeroes of a crash in some, and the rest cut off.
    for frame in (0..FRAMES).step_by(2) {
        let at = 16 + frame * 4 * PAGE + 77;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 8], at).unwrap();
    }
    file.write_all_at(&[0; 4096], len / 3).unwrap();
    file.set_len(len / 2).unwrap();
    let image = world.open("image", PLENTY);
    let seen = fill(&image, &memory);
    assert!(seen.frames_cached > FRAMES / 8 && seen.frames_cached < FRAMES / 4, "{seen:?}");
    assert_eq!(seen.frames_cached + seen.frames_fetched, FRAMES);
    drop(image);
    let mended = world.open("image", PLENTY);
    read_all(&mended, &memory);
    assert_eq!(numbers(&mended).frames_fetched, 0);
}

#[test]
fn the_limit_holds_and_images_that_nobody_uses_go_first() {
    let world = World::new();
    let limit = 5 << 20;
    let mut memories = Vec::new();
    for n in 0..4 {
        let name = format!("image{n}");
        memories.push(world.put(&name, n));
        fill(&world.open(&name, limit), &memories[usize::from(n)]);
        assert!(world.cache_bytes() <= limit, "{}", world.cache_bytes());
        world.wait_until_unused();
    }
    assert_eq!(world.cache_files().len(), 2, "2 MiB each");
    for (n, cached) in [(3, FRAMES), (2, FRAMES), (0, 0)] {
        let image = world.open(&format!("image{n}"), limit);
        read_all(&image, &memories[n]);
        assert_eq!(numbers(&image).frames_cached, cached, "image {n}");
        drop(image);
        world.wait_until_unused();
    }
}

#[test]
fn an_image_larger_than_the_cache_keeps_its_beginning() {
    let world = World::new();
    let memory = world.put("image", 0);
    let limit = 1 << 20;
    let first = fill(&world.open("image", limit), &memory);
    assert!(first.frames_stored > FRAMES / 4 && first.frames_not_stored > FRAMES / 4, "{first:?}");
    assert!(world.cache_bytes() <= limit);
    let again = world.open("image", limit);
    // (All of its writes are done: it has a limit of its own.)
    assert_eq!(fill(&again, &memory).frames_cached, first.frames_stored);
    drop(again);
    // A lower limit holds from the start.
    let less = world.open("image", limit / 2);
    assert!(world.cache_bytes() <= limit / 2, "{}", world.cache_bytes());
    read_all(&less, &memory);
    assert!(numbers(&less).frames_cached > FRAMES / 16);
}

#[test]
fn two_images_in_use_come_to_share_the_cache() {
    let world = World::new();
    let (one, two) = (world.put("one", 1), world.put("two", 2));
    let limit = 2 << 20;
    let first = world.open("one", limit);
    fill(&first, &one);
    let second = world.open("two", limit);
    fill(&second, &two);
    assert!(world.cache_bytes() <= limit);
    // Both stay in use.
    for (name, memory) in [("one", &one), ("two", &two)] {
        let image = world.open(name, limit);
        read_all(&image, memory);
        let seen = numbers(&image);
        assert!(seen.frames_cached > FRAMES / 4, "{name}: {seen:?}");
    }
    drop((first, second));
}

#[test]
fn several_readers_share_a_directory_and_write_at_the_same_time() {
    let world = World::new();
    let memories: Vec<_> = (0..3).map(|n| world.put(&format!("image{n}"), n)).collect();
    std::thread::scope(|scope| {
        for round in 0..6 {
            let (world, memory) = (&world, &memories[round % 3]);
            scope.spawn(move || {
                // As large as two of the three.
                let image = world.open(&format!("image{}", round % 3), 4 << 20);
                read_all(&image, memory);
                read_all(&image, memory);
            });
        }
    });
    for (n, memory) in memories.iter().enumerate() {
        read_all(&world.open(&format!("image{n}"), 4 << 20), memory);
    }
    assert!(world.cache_bytes() <= 4 << 20);
}

#[test]
fn a_full_disk_costs_nothing_but_the_cache() {
    let world = World::new();
    let small = world.path("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = rustix::mount::mount(
        "none",
        &small,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=1m"),
    );
    if let Err(error) = mounted {
        vmpager_testing::skipped(&format!("no small file system can be mounted ({error})"));
        return;
    }
    let memory = world.put("image", 0);
    let image = world.open_in("image", &small, PLENTY);
    let seen = fill(&image, &memory);
    assert!(seen.frames_not_stored > 0, "{seen:?}");
    drop(image);
    let again = world.open_in("image", &small, PLENTY);
    read_all(&again, &memory);
    assert!(numbers(&again).frames_cached > 0, "{:?}", numbers(&again));
    drop(again);
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_cache_that_cannot_be_is_refused() {
    let world = World::new();
    world.put("image", 0);
    std::fs::write(world.path("file"), "x").unwrap();
    let remote = RemoteOptions::default().cache(world.path("file"), PLENTY);
    let refused = Image::options().remote(remote).open(world.server.url("image"));
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("cannot keep a cache in") && error.contains("file"), "{error}");
}
