//! Memory served from packed images: every byte right, whatever the codec, the
//! layers and the failures; never a byte of a damaged frame.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{HUGE, Holds, PAGE, huge_pool, mapping, page, page_by_kernel, range};
use tempfile::TempDir;
use vmpager::core::{ByteRange, PageSize, PageSource};
use vmpager::{NeighbourPolicy, Pager};
use vmpager_store::FaultySource;
use vmpager_store::faulty::Times;
use vmpager_store::image::{Codec, Image, MemoryInput, PackOptions, Progress};
use vmpager_store::remote::RemoteOptions;
use vmpager_sys::memory::Mapping;
use vmpager_testing::http::{Fault, Request, Server};

const LIMIT: Duration = Duration::from_secs(20);
/// Five huge pages.
const PAGES: usize = 5 * HUGE / PAGE;

/// What a page holds: numbers of its own, zeroes, or the same as others.
fn expected(page: usize) -> Holds {
    match page % 9 {
        3 | 4 => Holds::Zero,
        7 => Holds::Word(1000 + page as u64 % 5),
        _ if (600..900).contains(&page) => Holds::Zero,
        _ => Holds::Source(page * PAGE),
    }
}

fn bytes_of(page: Holds) -> Vec<u8> {
    let word = |n: usize| match page {
        Holds::Source(from) => (from + n * 8) as u64 + 1,
        Holds::Word(word) => word,
        _ => 0,
    };
    (0..PAGE / 8).flat_map(|n| word(n).to_le_bytes()).collect()
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn raw(&self, expected: impl Fn(usize) -> Holds) -> MemoryInput {
        let path = self.0.path().join("raw");
        let bytes: Vec<u8> = (0..PAGES).flat_map(|page| bytes_of(expected(page))).collect();
        std::fs::write(&path, bytes).unwrap();
        MemoryInput::raw(path).unwrap()
    }

    fn make(&self, codec: Codec) -> PathBuf {
        let path = self.0.path().join(codec.name());
        PackOptions::default().codec(codec).pack(&self.raw(expected), &path, &mut go_on).unwrap();
        path
    }

    /// A layer over an image, with other contents.
    fn layer(&self, base: &Path, name: &str, expected: impl Fn(usize) -> Holds) -> PathBuf {
        let path = self.0.path().join(name);
        let base = Image::open(base).unwrap();
        let options = PackOptions::default().frame_bytes(16384);
        options.diff(&base, &self.raw(expected), &path, &mut go_on).unwrap();
        path
    }
}

fn start(source: Arc<dyn PageSource>, memory: &Arc<Mapping>, fill: bool) -> Pager {
    Pager::builder(source).region(&range(memory), 0).background_fill(fill).start().unwrap()
}

/// Touches every page in an order that jumps about.
fn assert_pages(memory: &Mapping, expected: impl Fn(usize) -> Holds) {
    for i in 0..PAGES {
        let at = i * 421 % PAGES;
        assert_eq!(page(memory, at * PAGE), expected(at), "page {at}");
    }
}

#[test]
fn every_byte_is_right_whatever_the_codec_on_demand_and_with_fill() {
    begin!();
    let images = Images::new();
    for codec in Codec::ALL {
        let image = Image::open(images.make(codec)).unwrap();
        for policy in [NeighbourPolicy::Off, NeighbourPolicy::default()] {
            for fill in [false, true] {
                let memory = mapping(PAGES);
                let pager = Pager::builder(image.clone())
                    .region(&range(&memory), 0)
                    .neighbours(policy)
                    .background_fill(fill)
                    .start()
                    .unwrap();
                assert_pages(&memory, expected);
                assert!(!fill || pager.wait_filled(LIMIT), "{codec}");
                let stats = pager.stats();
                assert_eq!(stats.pages_missing, 0, "{codec}, {policy:?}: {stats:?}");
                assert_eq!(stats.pages_poisoned, 0);
                assert_pages(&memory, expected);
            }
        }
    }
}

#[test]
fn many_threads_and_the_fill_at_once_see_right_bytes_through_layers() {
    begin!();
    let images = Images::new();
    let first = |page| if page % 13 == 0 { Holds::Word(77) } else { expected(page) };
    let second = |page| if page % 17 == 0 { Holds::Zero } else { first(page) };
    let base = images.make(Codec::Lz4);
    let middle = images.layer(&base, "middle", first);
    let top = Image::open(images.layer(&middle, "top", second)).unwrap();
    let memory = mapping(PAGES);
    let pager = start(top, &memory, true);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for i in 0..PAGES {
                    let at = (i * 421 + thread * 300) % PAGES;
                    assert_eq!(page(memory, at * PAGE), second(at), "page {at}");
                }
            });
        }
    });
    assert!(pager.wait_filled(LIMIT));
}

#[test]
fn pages_of_a_damaged_frame_are_poisoned_and_all_others_right() {
    begin!();
    let images = Images::new();
    for codec in Codec::ALL {
        let path = images.make(codec);
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let image = Image::open(&path).unwrap();
        let undamaged = image.verify(2, &mut go_on).unwrap();
        assert!(undamaged.damage.is_empty());
        // Somewhere in the middle of the frames.
        let mut byte = [0];
        let at = undamaged.file_bytes / 3;
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        // Opened anew: frames decoded before the damage would still be right.
        let image = Image::open(&path).unwrap();
        let damage = image.verify(2, &mut go_on).unwrap().damage;
        assert_eq!(damage.len(), 1, "{codec}");
        let lost = |page: usize| {
            let at = (page * PAGE) as u64;
            damage[0].memory.iter().any(|range| range.contains(&at))
        };
        let count = (0..PAGES).filter(|page| lost(*page)).count();
        assert!((16..PAGES / 3).contains(&count), "{codec}: {count}");
        for fill in [false, true] {
            let memory = mapping(PAGES);
            let pager = start(image.clone(), &memory, fill);
            for i in 0..PAGES {
                let at = i * 421 % PAGES;
                match page_by_kernel(&memory, at * PAGE) {
                    Ok(holds) => assert_eq!((holds, lost(at)), (expected(at), false), "page {at}"),
                    Err(error) => assert!(lost(at), "{codec}, page {at}: {error}"),
                }
            }
            assert!(!fill || pager.wait_filled(LIMIT));
            let poisoned = pager.stats().pages_poisoned;
            assert_eq!(poisoned, count as u64, "{codec}, fill {fill}");
        }
    }
}

/// Each page fails twice before it can be had, in turn at hand and later.
#[test]
fn reads_that_fail_for_a_while_cost_time_and_no_byte() {
    begin!();
    let images = Images::new();
    let image = Image::open(images.make(Codec::Zstd)).unwrap();
    for never_at_hand in [false, true] {
        let source = FaultySource::wrap(image.clone());
        for page in (0..PAGES).step_by(97) {
            let range = ByteRange::new((page * PAGE) as u64, PAGE as u64);
            source.fail(range, Times::Often(2));
        }
        if never_at_hand {
            source.never_at_hand();
        }
        let memory = mapping(PAGES);
        let pager = start(source, &memory, true);
        assert_pages(&memory, expected);
        assert!(pager.wait_filled(LIMIT));
        assert_eq!(pager.stats().pages_poisoned, 0);
    }
}

#[test]
fn huge_pages_are_served_whole() {
    begin!();
    let Some(_pool) = huge_pool(5) else { return };
    let images = Images::new();
    let image = Image::open(images.make(Codec::Lz4)).unwrap();
    for fill in [false, true] {
        let memory = Arc::new(Mapping::hugetlb_2m(5 * HUGE).unwrap());
        let pager = Pager::builder(image.clone())
            .region_of(&range(&memory), 0, PageSize::Size2M)
            .background_fill(fill)
            .start()
            .unwrap();
        assert_pages(&memory, expected);
        assert!(!fill || pager.wait_filled(LIMIT));
        assert_eq!(pager.stats().pages_missing, 0);
    }
}

/// Many VMs restore at once from one image: each frame is decoded once, by whoever
/// needs it first, and all others wait for that or find it.
#[test]
fn fifty_vms_of_one_image_cost_one_decode() {
    begin!();
    let images = Images::new();
    // Frames that are read whole, and some that are not.
    let expected = |page| match page {
        700..900 => expected(page),
        _ => Holds::Source(page * PAGE),
    };
    let path = images.0.path().join("image");
    PackOptions::default()
        .codec(Codec::Lz4)
        .pack(&images.raw(expected), &path, &mut go_on)
        .unwrap();
    let image = Image::options().cache_bytes(PAGES * PAGE).for_many(true).open(path).unwrap();
    let stored = image.inspect(1).distinct_pages * PAGE as u64;
    for fill in [true, false] {
        let memories: Vec<_> = (0..25).map(|_| mapping(PAGES)).collect();
        let pagers: Vec<_> =
            memories.iter().map(|memory| start(image.clone(), memory, fill)).collect();
        for (number, memory) in memories.iter().enumerate() {
            for page_number in (number..PAGES).step_by(10) {
                assert_eq!(page(memory, page_number * PAGE), expected(page_number));
            }
        }
        for pager in &pagers {
            assert!(!fill || pager.wait_filled(LIMIT));
        }
        assert_pages(&memories[7], expected);
    }
    assert_eq!(image.decoded_bytes(), stored, "of so many distinct ones");
}

/// What goes wrong with a request, half of the time.
fn now_and_then(request: &Request) -> Option<Fault> {
    match (request.number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) % 10 {
        0 => Some(Fault::Cut(3000)),
        1 => Some(Fault::Reset(20_000)),
        2 => Some(Fault::Close),
        3 => Some(Fault::Status(503, None)),
        4 => Some(Fault::IgnoreRange),
        _ => None,
    }
}

/// A VM's memory comes from a server that fails in all ways now and then, and from the
/// cache of what was fetched before, by threads that touch it in an order that jumps,
/// and by the fill.
#[test]
fn every_byte_is_right_that_comes_from_a_server_that_fails() {
    begin!();
    let images = Images::new();
    let server = Server::new();
    let first = |page| if page % 13 == 0 { Holds::Word(77) } else { expected(page) };
    let base = images.make(Codec::Lz4);
    let layer = images.layer(&base, "layer", first);
    for path in [&base, &layer] {
        let name = path.file_name().unwrap().to_str().unwrap();
        server.put(name, std::fs::read(path).unwrap(), Some("\"1\""));
    }
    for fill in [false, true, true] {
        let remote = RemoteOptions::default().cache(images.0.path().join("cache"), 1 << 30);
        server.script(|_| None);
        let image = Image::options().remote(remote).open(server.url("layer")).unwrap();
        server.script(now_and_then);
        let memory = mapping(PAGES);
        let pager = start(image, &memory, fill);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| assert_pages(&memory, first));
            }
        });
        assert!(!fill || pager.wait_filled(LIMIT));
        assert_eq!(pager.stats().pages_poisoned, 0);
        assert_pages(&memory, first);
    }
}

/// Pages that a server does not send are waited for, or poisoned: never made up.
#[test]
fn pages_that_a_server_refuses_are_poisoned_and_no_others() {
    begin!();
    let images = Images::new();
    let (server, path) = (Server::new(), images.make(Codec::None));
    let bytes = std::fs::read(&path).unwrap();
    let far = bytes.len() as u64 / 2;
    server.put("image", bytes, Some("\"1\""));
    server.script(move |request| {
        let beyond = request.range.as_ref().is_some_and(|range| range.end > far);
        (request.number >= 2 && beyond).then_some(Fault::Status(403, None))
    });
    let remote = RemoteOptions::default().patience(Duration::from_secs(3));
    let image = Image::options().remote(remote).open(server.url("image")).unwrap();
    let memory = mapping(PAGES);
    let pager = start(image, &memory, false);
    // The first half of the pages is in the first half of the image.
    for at in (0..PAGES / 3).step_by(7) {
        assert_eq!(page(&memory, at * PAGE), expected(at), "page {at}");
    }
    let last = (0..PAGES).rev().find(|at| matches!(expected(*at), Holds::Source(_))).unwrap();
    assert!(page_by_kernel(&memory, last * PAGE).is_err(), "a page that is refused");
    assert!(pager.stats().pages_poisoned > 0);
}

/// Patience is for the whole wait: a server that says nothing is not asked again for what
/// was waited for, in smaller parts or once more, and its requests, which would go on for
/// much longer, are not waited for either.
#[test]
fn a_page_is_waited_for_as_long_as_patience_says_and_asked_for_once() {
    begin!();
    let images = Images::new();
    let (server, path) = (Server::new(), images.make(Codec::None));
    server.put("image", std::fs::read(&path).unwrap(), None);
    server.script(|request| (request.number >= 2).then_some(Fault::Silence(10 * LIMIT)));
    let remote = RemoteOptions::default().patience(Duration::from_millis(500));
    let image = Image::options().remote(remote).open(server.url("image")).unwrap();
    let memory = mapping(PAGES);
    let pager = start(image, &memory, false);
    for at in [0, PAGES / 3] {
        assert!(page_by_kernel(&memory, at * PAGE).is_err(), "page {at} was never sent");
    }
    assert!(pager.stats().pages_poisoned > 0);
    let asked = server.requests();
    let mut starts: Vec<u64> =
        asked.iter().skip(2).filter_map(|it| it.range.as_ref().map(|range| range.start)).collect();
    let all = starts.len();
    starts.sort_unstable();
    starts.dedup();
    assert_eq!(starts.len(), all, "asked for again: {asked:?}");
    // Other pages are asked for as ever.
    server.script(|_| None);
    let last = PAGES - 10;
    assert_eq!(page(&memory, last * PAGE), expected(last));
}
