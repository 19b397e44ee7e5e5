//! Profiles: there and back, united, refused, and images packed by them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use vmpager_core::ByteRange;
use vmpager_store::image::{Codec, Image, MemoryInput, PackOptions, PackReport};
use vmpager_store::profile::{Profile, ProfileError, Recorder, Touch};

const PAGES: usize = 600;

/// A directory with a raw memory of 600 pages: text, zeroes, duplicates.
struct Dir(TempDir);

fn page(n: usize, seed: usize) -> Vec<u8> {
    let text = match n {
        100..200 => return vec![0; 4096],
        500.. => format!("the same {seed}; "),
        _ => format!("page {n} of {seed}; "),
    };
    text.repeat(400).into_bytes()[..4096].to_vec()
}

fn memory(seed: usize) -> Vec<u8> {
    (0..PAGES).flat_map(|n| page(n, seed)).collect()
}

impl Dir {
    fn new() -> Self {
        let dir = Self(TempDir::new().unwrap());
        std::fs::write(dir.path("mem"), memory(1)).unwrap();
        dir
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn raw(&self) -> MemoryInput {
        MemoryInput::raw(self.path("mem")).unwrap()
    }

    fn pack(&self, name: &str, options: PackOptions) -> (Arc<Image>, PackReport) {
        let options = options.frame_bytes(16 << 10);
        let go_on = &mut |_| ControlFlow::Continue(());
        let report = options.pack(&self.raw(), &self.path(name), go_on).unwrap();
        (Image::open(self.path(name)).unwrap(), report)
    }

    fn profile(&self, touches: &[(u32, u32)]) -> Profile {
        let mut profile = Profile::new(self.raw().identity().unwrap());
        profile.add_session(&touched(touches));
        profile
    }

    /// Writes it, and reads it for the raw memory.
    fn reopened(&self, bytes: &[u8]) -> Result<Profile, ProfileError> {
        std::fs::write(self.path("profile"), bytes).unwrap();
        Profile::open_for(self.path("profile"), &self.raw())
    }
}

fn touched(touches: &[(u32, u32)]) -> Vec<Touch> {
    touches.iter().map(|(page, at_us)| Touch { page: *page, at_us: *at_us }).collect()
}

fn entries(profile: &Profile) -> Vec<(u32, u32, u32)> {
    profile.pages().iter().map(|page| (page.page, page.sessions, page.first_us)).collect()
}

#[test]
fn sessions_are_united_with_counts_and_earliest_times() {
    let dir = Dir::new();
    let recorder = Recorder::new(dir.profile(&[(7, 10), (3, 5), (7, 30), (9, 40), (600, 1)]));
    recorder.add_session(&touched(&[(9, 4), (8, 5), (3, 50)]));
    let profile = recorder.profile();
    assert_eq!(profile.sessions(), 2);
    assert_eq!(entries(&profile), [(9, 2, 4), (3, 2, 5), (8, 1, 5), (7, 1, 10)]);
    assert_eq!(dir.reopened(&profile.encode()).unwrap(), profile);
}

#[test]
fn the_order_is_that_of_time_and_within_its_parts_that_of_addresses() {
    let dir = Dir::new();
    let touches: Vec<_> = (0..300).map(|n| ((n * 7) % 300, n)).collect();
    let order = dir.profile(&touches).replay_order();
    let flat: Vec<u32> = order.iter().flat_map(Clone::clone).collect();
    let mut first: Vec<u32> = (0..64).map(|n| (n * 7) % 300).collect();
    first.sort_unstable();
    assert_eq!(flat[..64], first);
    assert!(flat[64..192].is_sorted() && flat[192..].is_sorted());
    assert!(order.len() < 260, "{} runs of 300 pages", order.len());
}

#[test]
fn a_profile_is_for_one_memory_raw_or_packed() {
    let dir = Dir::new();
    let profile = dir.profile(&[(1, 1)]);
    std::fs::write(dir.path("p"), profile.encode()).unwrap();
    let (image, _) = dir.pack("image", PackOptions::default());
    Profile::open_for(dir.path("p"), &MemoryInput::image(image.clone())).unwrap();

    // Recorded from the image, it is good for the raw memory too.
    let of_image = Profile::new(MemoryInput::image(image.clone()).identity().unwrap());
    assert_eq!(of_image.memory().content(), Some(image.content()));
    std::fs::write(dir.path("q"), of_image.encode()).unwrap();
    Profile::open_for(dir.path("q"), &dir.raw()).unwrap();
    let mut both = profile.clone();
    both.merge(&of_image).unwrap();
    assert_eq!(both.memory().content(), Some(image.content()));

    // Another image differs in one page, which no sample has.
    let mut other = memory(1);
    other[11 * 4096] ^= 1;
    std::fs::write(dir.path("mem"), &other).unwrap();
    let (other, _) = dir.pack("other", PackOptions::default());
    let error = Profile::open_for(dir.path("q"), &MemoryInput::image(other)).unwrap_err();
    assert!(matches!(error, ProfileError::OtherMemory { .. }), "{error}");
    assert!(error.to_string().contains("other"), "{error}");
    // Raw memory is told apart by its sample, and by its size.
    for contents in [memory(2), memory(1)[4096..].to_vec()] {
        std::fs::write(dir.path("mem"), contents).unwrap();
        for name in ["p", "q"] {
            let error = Profile::open_for(dir.path(name), &dir.raw()).unwrap_err();
            assert!(matches!(error, ProfileError::OtherMemory { .. }), "{error}");
        }
        let of_other = Profile::new(dir.raw().identity().unwrap());
        assert!(both.merge(&of_other).is_err());
    }
    assert_eq!(both.sessions(), 1);
}

#[test]
fn damaged_profiles_are_refused() {
    let dir = Dir::new();
    let good = dir.profile(&[(7, 10), (3, 5), (11, 5)]).encode();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Profile::decode(&bad, Path::new("p")).is_err(), "bit {bit}");
    }
    for len in 0..good.len() {
        assert!(Profile::decode(&good[..len], Path::new("p")).is_err(), "{len} bytes");
    }
    assert!(Profile::decode(&[&good[..], &[0]].concat(), Path::new("p")).is_err());

    let sealed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good[..good.len() - 4].to_vec();
        change(&mut bytes);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        Profile::decode(&bytes, Path::new("p")).map_err(|error| error.to_string())
    };
    assert!(sealed(&|_| ()).is_ok());
    type Change = (&'static str, fn(&mut Vec<u8>));
    let changes: [Change; 9] = [
        ("version 2", |bytes| bytes[8] = 2),
        ("no profile", |bytes| bytes[0] = b'x'),
        ("order", |bytes| bytes.swap(96 + 8, 96 + 24 + 8)),
        ("page 600", |bytes| bytes[96..98].copy_from_slice(&600_u16.to_le_bytes())),
        ("page 3", |bytes| bytes[96 + 24] = 3),
        ("0 of 1 sessions", |bytes| bytes[96 + 4] = 0),
        ("2 of 1 sessions", |bytes| bytes[96 + 4] = 2),
        ("entries", |bytes| bytes[28] = 4),
        ("memory has", |bytes| bytes[16..24].fill(0)),
    ];
    for (word, change) in changes {
        let error = sealed(&change).unwrap_err();
        assert!(error.contains(word), "{error:?} does not say {word:?}");
    }
    // A longer header is one with fields that came later.
    let longer = sealed(&|bytes| {
        bytes[12] = 104;
        bytes.splice(96..96, [9; 8]);
    });
    assert_eq!(longer, Profile::decode(&good, Path::new("p")).map_err(|e| e.to_string()));
    assert!(sealed(&|bytes| bytes[12] = 95).is_err());
}

/// The file of version 1 as it was written once.
#[test]
fn golden() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/two-sessions.vmprof");
    let dir = Dir::new();
    let (image, _) = dir.pack("image", PackOptions::default());
    let mut profile = Profile::new(MemoryInput::image(image).identity().unwrap());
    profile.add_session(&touched(&[(7, 10), (3, 5), (9, 70_000)]));
    profile.add_session(&touched(&[(9, 4), (8, 5)]));
    if std::env::var_os("VMPAGER_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, profile.encode()).unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), profile.encode());
    assert_eq!(Profile::open(&path).unwrap(), profile);
}

/// The pages of a profile are the first of an image, and nothing else changes.
#[test]
fn images_are_packed_hot_pages_first() {
    let dir = Dir::new();
    let (plain, before) = dir.pack("plain", PackOptions::default().codec(Codec::None));
    // Some of them zero, some the same as others.
    let hot: Vec<_> = (0..200).map(|n| ((n * 37) % 600, n)).collect();
    let profile = dir.profile(&hot);
    let options = PackOptions::default().codec(Codec::None).first(profile.replay_order());
    let (image, after) = dir.pack("hot", options);
    assert_eq!(image.content(), plain.content());
    assert_eq!(after.duplicate_pages, before.duplicate_pages);
    assert_eq!((after.stored_pages, after.zero_pages), (before.stored_pages, before.zero_pages));
    let mut bytes = vec![0; PAGES * 4096];
    image.read(ByteRange::new(0, bytes.len() as u64), &mut bytes).unwrap();
    assert_eq!(bytes, memory(1));
    assert!(image.verify(2, &mut |_| ControlFlow::Continue(())).unwrap().damage.is_empty());

    // Only the first frames hold them: without the others they can still be read.
    let distinct: std::collections::HashSet<_> =
        hot.iter().map(|(n, _)| page(*n as usize, 1)).collect();
    let frames = distinct.iter().filter(|page| page[0] != 0).count().div_ceil(4) as u64;
    let (from, to) = (16 + frames * 16384, 16 + after.stored_pages * 4096);
    assert!(to - from > 200 * 4096, "{from} to {to}");
    let file = std::fs::File::options().write(true).open(dir.path("hot")).unwrap();
    let damage = vec![0xee; usize::try_from(to - from).unwrap()];
    std::os::unix::fs::FileExt::write_all_at(&file, &damage, from).unwrap();
    let image = Image::open(dir.path("hot")).unwrap();
    let mut bytes = vec![0; 4096];
    for (number, _) in &hot {
        image.read(ByteRange::new(u64::from(*number) * 4096, 4096), &mut bytes).unwrap();
        assert_eq!(bytes, page(*number as usize, 1));
    }
    let all = (0..PAGES as u64).map(|n| image.read(ByteRange::new(n * 4096, 4096), &mut bytes));
    assert!(all.filter(Result::is_err).count() > 0, "the others are damaged");
}

prop_compose! {
    fn sessions()(
        sessions in prop::collection::vec(
            prop::collection::vec((0..40_u32, 0..30_u32), 0..30), 0..4)
    ) -> Profile {
        // Identities are made of files; one is enough.
        static MEMORY: std::sync::OnceLock<Dir> = std::sync::OnceLock::new();
        let dir = MEMORY.get_or_init(Dir::new);
        let mut profile = Profile::new(dir.raw().identity().unwrap());
        sessions.iter().for_each(|touches| profile.add_session(&touched(touches)));
        profile
    }
}

fn united(profiles: &[&Profile]) -> Profile {
    let mut all = profiles[0].clone();
    profiles[1..].iter().for_each(|other| all.merge(other).unwrap());
    all
}

proptest! {
    #[test]
    fn profiles_come_back(profile in sessions()) {
        prop_assert_eq!(Profile::decode(&profile.encode(), Path::new("p")).unwrap(), profile);
    }

    /// Against maps, and whatever the order.
    #[test]
    fn merging_is_a_union(a in sessions(), b in sessions(), c in sessions()) {
        let all = united(&[&a, &b, &c]);
        prop_assert_eq!(&all, &united(&[&c, &a, &b]));
        prop_assert_eq!(&all, &united(&[&a, &united(&[&b, &c])]));
        let mut expected: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for (page, sessions, first) in [&a, &b, &c].into_iter().flat_map(entries) {
            let entry = expected.entry(page).or_insert((0, u32::MAX));
            *entry = (entry.0 + sessions, entry.1.min(first));
        }
        let mut seen = entries(&all);
        prop_assert!(seen.is_sorted_by_key(|(page, _, first)| (*first, *page)));
        seen.sort_unstable();
        let expected: Vec<_> =
            expected.into_iter().map(|(page, (sessions, first))| (page, sessions, first)).collect();
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn all_pages_are_replayed_once(profile in sessions()) {
        let mut pages: Vec<u32> = profile.replay_order().into_iter().flatten().collect();
        pages.sort_unstable();
        let mut expected: Vec<u32> = profile.pages().iter().map(|page| page.page).collect();
        expected.sort_unstable();
        prop_assert_eq!(pages, expected);
    }

    #[test]
    fn bytes_of_any_kind_are_a_profile_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let sealed = [&b"\x89VMPPRF\n\x01\0"[..], &bytes].concat();
        let crc = crc32c::crc32c(&sealed).to_le_bytes();
        let _ = Profile::decode(&[&sealed[..], &crc].concat(), Path::new("p"));
    }
}
