//! Images at servers that do wrong: every byte right, or an error that says why.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/memory.rs"]
mod memory;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{PAGE, fetch, pages, request, span, submit_and_wait, wait_for};
use memory::{Page, mixed, write_sparse};
use tempfile::TempDir;
use vmpager_core::{PageReader, PageSource, Priority, SourceError};
use vmpager_store::image::{Codec, Image, MemoryInput, PackOptions, Progress};
use vmpager_store::remote::{RemoteNumbers, RemoteOptions};
use vmpager_testing::http::{Fault, Request, Server};

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A server with images, and the directory they were made in.
struct World {
    dir: TempDir,
    server: Server,
    memory: Vec<u8>,
}

/// Pages of a frame of the images here: many frames of little.
const FRAME: u64 = 4 * PAGE;

impl World {
    /// With `image` at the server: mixed memory.
    fn new() -> Self {
        Self::of(&mixed())
    }

    fn of(pages: &[Page]) -> Self {
        Self::with_memory(memory::memory(pages))
    }

    fn with_memory(memory: Vec<u8>) -> Self {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let world = Self { dir, server: Server::new(), memory };
        let bytes = world.pack("image", &world.memory);
        world.server.put("image", bytes, Some("\"1\""));
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn raw(&self, bytes: &[u8]) -> MemoryInput {
        write_sparse(&std::fs::File::create(self.path("raw")).unwrap(), bytes);
        MemoryInput::raw(self.path("raw")).unwrap()
    }

    /// The bytes of an image of this memory.
    fn pack(&self, name: &str, bytes: &[u8]) -> Vec<u8> {
        let options = PackOptions::default().frame_bytes(FRAME).codec(Codec::Lz4);
        options.replace(true).pack(&self.raw(bytes), &self.path(name), &mut go_on).unwrap();
        std::fs::read(self.path(name)).unwrap()
    }

    fn url(&self) -> String {
        self.server.url("image")
    }

    fn open(&self) -> Arc<Image> {
        Image::options().remote(quick()).open(self.url()).unwrap()
    }

    fn refusal(&self) -> String {
        Image::options().remote(quick()).open(self.url()).unwrap_err().to_string()
    }
}

/// Options of somebody who does not wait for long.
fn quick() -> RemoteOptions {
    RemoteOptions::default().timeout(Duration::from_secs(2)).patience(Duration::from_secs(20))
}

/// A read of a frame, not of the index.
fn is_frames(request: &Request) -> bool {
    // Opening takes two.
    request.number >= 2
}

fn reader(image: &Arc<Image>) -> Box<dyn PageReader> {
    Arc::clone(image).open_reader().unwrap()
}

/// Reads all of it as a worker would, in runs of several lengths.
fn read_all(image: &Arc<Image>, memory: &[u8]) {
    let mut reader = reader(image);
    let all = memory.len() as u64 / PAGE;
    let (mut first, mut step) = (0, 1);
    while first < all {
        let range = pages(first, step.min(all - first));
        assert_eq!(fetch(&mut *reader, range).unwrap(), memory[span(range)], "{range}");
        first += step;
        step = step % 37 + 3;
    }
}

fn numbers(image: &Arc<Image>) -> RemoteNumbers {
    image.remote_numbers().unwrap()
}

#[test]
fn every_byte_comes_whatever_goes_wrong_now_and_then() {
    let faults: [(&str, Fault); 11] = [
        ("busy", Fault::Status(503, Some(("Retry-After", "0".into())))),
        ("failing", Fault::Status(500, None)),
        ("too many", Fault::Status(429, None)),
        ("cut at once", Fault::Cut(0)),
        ("cut", Fault::Cut(3000)),
        ("reset", Fault::Reset(2000)),
        ("closed", Fault::Close),
        ("flipped", Fault::Flip(1234)),
        ("short", Fault::Header("Content-Length", "7".into())),
        ("elsewhere", Fault::Header("Content-Range", "bytes 0-15/999999".into())),
        ("no part", Fault::IgnoreRange),
    ];
    std::thread::scope(|scope| {
        for (name, fault) in faults {
            scope.spawn(move || every_byte_comes_in_spite_of(name, fault));
        }
    });
}

fn every_byte_comes_in_spite_of(name: &'static str, fault: Fault) {
    let world = World::new();
    let image = world.open();
    // Bits are not flipped often enough to take a frame for damaged. With no period,
    // which tries could fall in step with.
    let often = move |number: u64| {
        let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        if name == "flipped" { number % 5 == 2 } else { mixed.is_multiple_of(2) }
    };
    let fails = move |request: &Request| is_frames(request) && often(request.number);
    world.server.script(move |request| fails(request).then(|| fault.clone()));
    read_all(&image, &world.memory);
    let numbers = numbers(&image);
    assert!(numbers.failures > 0 || name == "flipped", "{name}: {numbers:?}");
}

#[test]
fn silent_servers_are_asked_anew() {
    let world = World::new();
    let options = quick().timeout(Duration::from_millis(200));
    let image = Image::options().remote(options).open(world.url()).unwrap();
    let long = Duration::from_secs(30);
    world.server.script(move |request| match request.number % 4 {
        _ if !is_frames(request) => None,
        0 => Some(Fault::Silence(long)),
        1 => Some(Fault::Stall(5000, long)),
        _ => None,
    });
    let mut reader = reader(&image);
    for first in [0, 200, 400] {
        let range = pages(first, 40);
        assert_eq!(fetch(&mut *reader, range).unwrap(), world.memory[span(range)]);
    }
    assert!(numbers(&image).failures > 0);
}

#[test]
fn an_open_costs_two_requests_and_neighbours_come_with_one() {
    let world = World::of(&(0..200).map(Page::Text).collect::<Vec<_>>());
    let image = world.open();
    assert_eq!(world.server.requests().len(), 2);
    // 25 frames that follow each other.
    let range = pages(0, 100);
    let mut reader = reader(&image);
    assert_eq!(submit_and_wait(&mut *reader, range).unwrap(), world.memory[span(range)]);
    assert_eq!(world.server.requests().len(), 3);
    assert_eq!(numbers(&image).frames_fetched, 25);
    // Others that are told of ahead are there when they are asked for.
    reader.will_need(&[pages(100, 40), pages(160, 40)]);
    let until = Instant::now() + Duration::from_secs(20);
    while numbers(&image).frames_fetched < 45 {
        assert!(Instant::now() < until, "{:?}", numbers(&image));
        std::thread::yield_now();
    }
    let asked = world.server.requests().len();
    for first in [100, 160] {
        let range = pages(first, 40);
        assert_eq!(submit_and_wait(&mut *reader, range).unwrap(), world.memory[span(range)]);
    }
    assert_eq!(world.server.requests().len(), asked, "what was staged is not asked for again");
}

/// While the fill has all it may have under way, and each answer takes its time, a
/// demand is asked for before any further piece of the fill.
#[test]
fn demands_go_before_the_fill() {
    // 16 MiB of distinct pages.
    let mut memory = Vec::new();
    for n in 0..4096_u16 {
        let mut page = memory::page(Page::Noise((n % 250).to_le_bytes()[0]));
        page[..2].copy_from_slice(&n.to_le_bytes());
        memory.extend(page);
    }
    let world = World::with_memory(memory);
    let held = Arc::new(AtomicBool::new(true));
    let image = world.open();
    let hold = Arc::clone(&held);
    world.server.script(move |_| {
        while hold.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    });
    // Pieces too far from each other to come together, more than there are threads.
    let piece = |n: u64, nth: u64| pages(n * 1000 + nth * 200, 1);
    let fill = |n| {
        let mut reader = reader(&image);
        (0..4).for_each(|nth| reader.submit(request(nth, piece(n, nth), Priority::Fill)));
        reader
    };
    let readers: Vec<_> = (0..4).map(fill).collect();
    let until = Instant::now() + Duration::from_secs(20);
    let wait_for_requests = |count: usize, what: &str| {
        while world.server.requests().len() < count {
            assert!(Instant::now() < until, "{what}");
            std::thread::yield_now();
        }
    };
    wait_for_requests(6, "two to open it, and four for the fill");
    let mut urgent = reader(&image);
    urgent.submit(request(9, pages(4090, 1), Priority::Demand));
    wait_for_requests(7, "a demand waits for the fill");
    let asked = world.server.requests().pop().unwrap().range.unwrap();
    assert!(asked.start > 15 << 20, "what the demand is for, not {asked:?}");
    held.store(false, Ordering::Relaxed);
    let (_, bytes) = wait_for(&mut *urgent, 1).remove(0);
    assert_eq!(bytes.unwrap(), world.memory[span(pages(4090, 1))]);
    for (n, mut reader) in readers.into_iter().enumerate() {
        for (nth, bytes) in wait_for(&mut *reader, 4) {
            let range = piece(n as u64, nth);
            assert!(bytes.unwrap() == world.memory[span(range)], "{range}");
        }
    }
}

#[test]
fn what_cannot_be_opened_says_why() {
    let world = World::new();
    let cases: [(Fault, &str); 9] = [
        (Fault::IgnoreRange, "ignores ranges"),
        (Fault::Status(401, None), "signed"),
        (Fault::Status(403, None), "signed"),
        (Fault::Status(404, None), "no such object"),
        (Fault::Status(416, None), "no packed image"),
        (Fault::Status(418, None), "418"),
        (Fault::Header("Content-Range", String::new()), "Content-Range"),
        (Fault::Header("Content-Length", "15".into()), "Content-Length"),
        (Fault::Header("Content-Encoding", "gzip".into()), "encoded"),
    ];
    for (fault, says) in cases {
        world.server.script(move |_| Some(fault.clone()));
        let error = world.refusal();
        assert!(error.contains(says) && error.contains(&world.url()), "{says}: {error}");
    }
    let away = world.url();
    world.server.script(move |_| Some(Fault::Status(302, Some(("Location", away.clone())))));
    assert!(world.refusal().contains("redirects more than"), "{}", world.refusal());

    world.server.script(|_| None);
    world.server.put("image", vec![7; 10], None);
    assert!(world.refusal().contains("10 bytes"), "{}", world.refusal());
    world.server.put("image", vec![7; 100_000], None);
    assert!(world.refusal().contains("no packed image"), "{}", world.refusal());

    let patience = quick().patience(Duration::from_millis(200));
    let nobody = { Server::new().url("image") };
    let error = Image::options().remote(patience).open(&nobody).unwrap_err().to_string();
    assert!(error.contains("refused") && error.contains(&nobody), "{error}");
}

#[test]
fn redirects_are_followed() {
    let world = World::new();
    let there = world.url();
    world.server.script(move |request| {
        let header = Some(("Location", there.clone()));
        (request.path == "/moved").then_some(Fault::Status(302, header))
    });
    let image = Image::options().remote(quick()).open(world.server.url("moved")).unwrap();
    read_all(&image, &world.memory);
}

#[test]
fn an_object_put_there_again_is_the_same_and_another_one_is_not() {
    for conditions in [true, false] {
        let world = World::new();
        let image = world.open();
        let mut reader = reader(&image);
        let check = |reader: &mut dyn PageReader, first: u64| {
            let range = pages(first, 30);
            submit_and_wait(reader, range).map(|bytes| assert_eq!(bytes, world.memory[span(range)]))
        };
        check(&mut *reader, 0).unwrap();
        if !conditions {
            world.server.script(|_| Some(Fault::Unconditional));
        }
        world.server.put("image", std::fs::read(world.path("image")).unwrap(), Some("\"2\""));
        check(&mut *reader, 100).unwrap();
        check(&mut *reader, 150).unwrap();
        // Of the same length, and with other contents.
        let other: Vec<u8> = world.memory.iter().map(|byte| byte ^ 1).collect();
        let mut other = world.pack("other", &other);
        other.resize(std::fs::metadata(world.path("image")).unwrap().len().try_into().unwrap(), 0);
        world.server.put("image", other, Some("\"3\""));
        let error = check(&mut *reader, 300).unwrap_err();
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
        // What was put there again after that is what it was.
        world.server.put("image", std::fs::read(world.path("image")).unwrap(), Some("\"1\""));
        // (A request from before may still say what it has seen, to all who wait then.)
        let until = Instant::now() + Duration::from_secs(20);
        while let Err(error) = check(&mut *reader, 400) {
            assert!(Instant::now() < until, "{error}");
        }
    }
}

#[test]
fn without_any_tag_other_bytes_are_found_by_their_checksums() {
    let world = World::new();
    let bytes = std::fs::read(world.path("image")).unwrap();
    world.server.put("image", bytes.clone(), None);
    let image = world.open();
    let mut damaged = bytes;
    for byte in &mut damaged[16..20_000] {
        *byte ^= 4;
    }
    world.server.put("image", damaged, None);
    let mut reader = reader(&image);
    let error = submit_and_wait(&mut *reader, pages(0, 20)).unwrap_err();
    assert!(matches!(error, SourceError::Damaged { .. }), "{error}");
    let rest = pages(400, 100);
    assert_eq!(submit_and_wait(&mut *reader, rest).unwrap(), world.memory[span(rest)]);
}

#[test]
fn a_server_that_is_away_is_waited_for_and_then_given_up() {
    let world = World::new();
    let options = quick().patience(Duration::from_millis(300));
    let image = Image::options().remote(options).open(world.url()).unwrap();
    let patient = world.open();
    let (port, bytes) = (world.server.port(), std::fs::read(world.path("image")).unwrap());
    drop(world.server);
    let mut impatient = reader(&image);
    let error = submit_and_wait(&mut *impatient, pages(0, 20)).unwrap_err();
    assert!(
        matches!(error, SourceError::GaveUp { .. })
            && error.to_string().contains("see whether the server"),
        "{error}"
    );

    let mut waiting = reader(&patient);
    waiting.submit(request(1, pages(0, 20), Priority::Demand));
    std::thread::sleep(Duration::from_millis(100));
    let server = Server::at(port);
    server.put("image", bytes, Some("\"1\""));
    let (_, came) = wait_for(&mut *waiting, 1).remove(0);
    assert_eq!(came.unwrap(), world.memory[span(pages(0, 20))]);
}

#[test]
fn layers_may_be_at_servers_or_not() {
    let world = World::new();
    let base = Image::open(world.path("image")).unwrap();
    let mut memory = world.memory.clone();
    for page in (0..memory.len()).step_by(7 * 4096) {
        memory[page + 5] ^= 0x55;
    }
    let layer = world.path("layer");
    PackOptions::default().diff(&base, &world.raw(&memory), &layer, &mut go_on).unwrap();
    world.server.put("layer", std::fs::read(&layer).unwrap(), None);
    let url = world.server.url("layer");
    // Beside it at the server, given by URL, given by name; a layer in a file over one
    // at a server.
    let options = || Image::options().remote(quick());
    read_all(&options().open(&url).unwrap(), &memory);
    read_all(&options().parent(world.path("image")).open(&url).unwrap(), &memory);
    std::fs::rename(world.path("image"), world.path("away")).unwrap();
    read_all(&options().parent(world.url()).open(&layer).unwrap(), &memory);
    world.server.script(|request| (request.path == "/image").then_some(Fault::Status(404, None)));
    let error = options().open(&url).unwrap_err().to_string();
    assert!(error.contains("--parent"), "{error}");
}

#[test]
fn images_at_servers_are_verified_and_unpacked() {
    let world = World::new();
    world.server.script(|request| (request.number % 5 == 3).then_some(Fault::Reset(9000)));
    let image = world.open();
    let report = image.verify(3, &mut go_on).unwrap();
    assert!(report.damage.is_empty(), "{:?}", report.damage);
    image.unpack(&world.path("out"), false, 3, &mut go_on).unwrap();
    assert!(std::fs::read(world.path("out")).unwrap() == world.memory);

    let mut bytes = std::fs::read(world.path("image")).unwrap();
    bytes[5000] ^= 1;
    world.server.put("image", bytes, None);
    let report = world.open().verify(2, &mut go_on).unwrap();
    assert_eq!(report.damage.len(), 1, "{:?}", report.damage);
    assert!(report.damage[0].bytes.contains(&5000));
}

/// Many readers of one image, with everything going wrong by chance.
#[test]
fn a_storm_of_readers_and_faults_gets_every_byte() {
    let world = World::new();
    let image = world.open();
    let chance = AtomicU64::new(12_345);
    world.server.script(move |request| {
        if !is_frames(request) {
            return None;
        }
        let drawn = chance.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        let drawn = (drawn ^ (drawn >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 33;
        let bytes = usize::try_from(drawn >> 8 & 0xffff).unwrap();
        match drawn % 16 {
            0 => Some(Fault::Cut(bytes)),
            1 => Some(Fault::Reset(bytes)),
            // Not of a frame that is asked for alone, because it was damaged.
            2 if request.range.as_ref().is_some_and(|range| range.end - range.start > 30_000) => {
                Some(Fault::Flip(bytes))
            }
            3 => Some(Fault::Close),
            4 => Some(Fault::Status(503, None)),
            5 => Some(Fault::IgnoreRange),
            _ => None,
        }
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| read_all(&image, &world.memory));
        }
    });
}
