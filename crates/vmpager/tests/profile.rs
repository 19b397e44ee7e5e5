//! Profiles recorded and replayed: what a guest touched comes before it asks,
//! demand goes first, a wrong profile is given up, and every byte is right.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Holds, PAGE, eventually, mapping, page, range};
use vmpager::core::ByteRange;
use vmpager::store::RawFile;
use vmpager::store::image::MemoryInput;
use vmpager::store::profile::{Profile, Recorder, Touch};
use vmpager::{NeighbourPolicy, Pager, SessionSummary};
use vmpager_store::FaultySource;
use vmpager_store::faulty::Times;
use vmpager_sys::memory::Mapping;

const PAGES: usize = 4096;
const HOLE: std::ops::Range<usize> = 1000..3000;

fn expected(page: usize) -> Holds {
    if HOLE.contains(&page) { Holds::Zero } else { Holds::Source(page * PAGE) }
}

/// A raw memory with a large hole.
struct Raw(tempfile::NamedTempFile);

impl Raw {
    fn new() -> Self {
        use std::os::unix::fs::FileExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((PAGES * PAGE) as u64).unwrap();
        for page in (0..PAGES).filter(|page| !HOLE.contains(page)) {
            let bytes: Vec<u8> = (0..PAGE / 8)
                .flat_map(|word| ((page * PAGE + word * 8) as u64 + 1).to_le_bytes())
                .collect();
            file.as_file().write_all_at(&bytes, (page * PAGE) as u64).unwrap();
        }
        Self(file)
    }

    fn open(&self) -> Arc<RawFile> {
        RawFile::open(self.0.path()).unwrap()
    }

    fn empty_profile(&self) -> Profile {
        Profile::new(MemoryInput::raw(self.0.path()).unwrap().identity().unwrap())
    }

    fn profile(&self, pages: impl Iterator<Item = usize>) -> Profile {
        let mut profile = self.empty_profile();
        let touch = |(at_us, page)| Touch { page: u32::try_from(page).unwrap(), at_us };
        profile.add_session(&(0..).zip(pages).map(touch).collect::<Vec<_>>());
        profile
    }
}

fn touch(memory: &Mapping, pages: impl Iterator<Item = usize>) {
    pages.for_each(|at| assert_eq!(page(memory, at * PAGE), expected(at), "page {at}"));
}

/// What the guest does: some pages all over the memory, of the hole too.
fn work() -> impl Iterator<Item = usize> {
    (0..700).map(|n| n * 1301 % PAGES)
}

fn replayed(pager: &Pager) -> SessionSummary {
    eventually("the profile to be replayed", || pager.stats().profile_ms.is_some());
    pager.stats()
}

#[test]
fn what_is_recorded_and_replayed_is_not_waited_for() {
    begin!();
    let raw = Raw::new();
    let recorder = Arc::new(Recorder::new(raw.empty_profile()));
    let memory = mapping(PAGES);
    let pager = Pager::builder(raw.open())
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .record(recorder.clone())
        .start()
        .unwrap();
    touch(&memory, work());
    touch(&memory, work());
    drop(pager);
    let profile = recorder.profile();
    let recorded: Vec<u32> = profile.pages().iter().map(|page| page.page).collect();
    let mut sorted: Vec<usize> = recorded.iter().map(|page| *page as usize).collect();
    sorted.sort_unstable();
    let mut all: Vec<usize> = work().collect();
    all.sort_unstable();
    assert_eq!(sorted, all, "each page once");
    assert_eq!(recorded[..5].len(), 5);
    assert!(profile.pages()[699].first_us > profile.pages()[0].first_us);

    let memory = mapping(PAGES);
    let again = Arc::new(Recorder::new(raw.empty_profile()));
    let pager = Pager::builder(raw.open())
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .profile(&profile)
        .record(again.clone())
        .start()
        .unwrap();
    let stats = replayed(&pager);
    let zero = work().filter(|page| HOLE.contains(page)).count() as u64;
    assert_eq!((stats.pages_profile, stats.pages_zero), (700 - zero, zero));
    touch(&memory, work());
    assert_eq!(pager.stats().faults, 0);
    // What it missed is counted, and can be merged back.
    touch(&memory, [5, 3900].into_iter());
    let stats = pager.stats();
    assert_eq!((stats.faults, stats.profile_missed, stats.profile_late), (2, 2, 0));
    drop(pager);
    let missed = again.profile();
    assert_eq!(missed.pages().iter().map(|page| page.page).collect::<Vec<_>>(), [5, 3900]);
    let mut learnt = profile.clone();
    learnt.merge(&missed).unwrap();
    assert_eq!((learnt.pages().len(), learnt.sessions()), (702, 2));
}

/// Page numbers of what is told to be in place, in that order.
fn hot(pager: &Pager, memory: &Mapping) -> Vec<usize> {
    let page = |hva: u64| usize::try_from(hva - memory.hva()).unwrap() / PAGE;
    let parts = pager.hot_in_place().into_iter();
    parts.flat_map(|(hva, len)| page(hva.0)..page(hva.0 + len)).collect()
}

/// Those of the profile that are there, and no other, whatever else is there.
#[test]
fn hot_pages_are_told_once_they_are_in_place() {
    begin!();
    let raw = Raw::new();
    let profile = raw.profile(work());
    let order: Vec<usize> =
        profile.replay_order().into_iter().flatten().map(|page| page as usize).collect();
    let start = |source, fill| {
        let memory = mapping(PAGES);
        let pager = Pager::builder(source).region(&range(&memory), 0).profile(&profile);
        let pager = pager.neighbours(NeighbourPolicy::Off).background_fill(fill);
        (pager.start().unwrap(), memory)
    };
    // None of it is read so far.
    let source = FaultySource::wrap(raw.open());
    source.hold(ByteRange::new(0, (PAGES * PAGE) as u64));
    let (pager, memory) = start(source.clone(), false);
    eventually("the replay to wait for its reads", || source.held() > 0);
    let early = hot(&pager, &memory);
    assert!(early.iter().all(|page| HOLE.contains(page)), "{early:?}");
    source.release();
    eventually("the hot pages", || hot(&pager, &memory).len() == order.len());
    assert_eq!(hot(&pager, &memory), order);
    touch(&memory, 0..900);
    assert_eq!(hot(&pager, &memory), order, "other pages are in place, too");
    // Served no longer, since all of it is in place.
    let (pager, memory) = start(FaultySource::wrap(raw.open()), true);
    assert!(pager.wait_filled(Duration::from_secs(20)));
    assert_eq!(hot(&pager, &memory), order);
    // Without a profile nothing is hot.
    let memory = mapping(PAGES);
    let pager = Pager::builder(raw.open()).region(&range(&memory), 0).start().unwrap();
    touch(&memory, 0..100);
    assert_eq!(hot(&pager, &memory), [0; 0]);
}

#[test]
fn a_guest_that_races_the_replay_and_the_fill_sees_right_bytes() {
    begin!();
    let raw = Raw::new();
    let profile = raw.profile(work());
    for fill in [false, true] {
        for cold in [false, true] {
            let source = FaultySource::wrap(raw.open());
            if cold {
                source.never_at_hand();
            }
            let memory = mapping(PAGES);
            let pager = Pager::builder(source)
                .region(&range(&memory), 0)
                .profile(&profile)
                .background_fill(fill)
                .start()
                .unwrap();
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let memory = &memory;
                    scope.spawn(move || touch(memory, work().skip(thread * 100)));
                    scope.spawn(move || touch(memory, (0..PAGES).step_by(7 + thread)));
                }
            });
            assert!(!fill || pager.wait_filled(Duration::from_secs(20)));
            touch(&memory, 0..PAGES);
            assert_eq!(pager.stats().pages_missing, 0);
        }
    }
}

/// The pages the profile names are held back: those that the guest asks for come
/// all the same.
#[test]
fn demand_goes_before_a_replay_whose_reads_do_not_come() {
    begin!();
    let raw = Raw::new();
    let source = FaultySource::wrap(raw.open());
    source.hold(ByteRange::new(3000 * PAGE as u64, 1000 * PAGE as u64));
    let memory = mapping(PAGES);
    let pager = Pager::builder(source.clone())
        .region(&range(&memory), 0)
        .profile(&raw.profile(3000..4000))
        .start()
        .unwrap();
    eventually("the replay to wait for its reads", || source.held() > 0);
    touch(&memory, 0..900);
    assert_eq!(pager.stats().pages_profile, 0);
    source.release();
    touch(&memory, 0..PAGES);
}

#[test]
fn a_wrong_profile_is_given_up() {
    begin!();
    let raw = Raw::new();
    let memory = mapping(PAGES);
    let source = FaultySource::wrap(raw.open());
    // So that the replay cannot be through before the guest begins.
    source.delay(ByteRange::new(3000 * PAGE as u64, 1000 * PAGE as u64), Duration::from_millis(20));
    let pager = Pager::builder(source)
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .profile(&raw.profile((3000..4000).step_by(2)))
        .start()
        .unwrap();
    touch(&memory, 0..900);
    let stats = pager.stats();
    assert!(stats.profile_missed >= 800, "{stats:?}");
    std::thread::sleep(Duration::from_millis(200));
    let stats = pager.stats();
    assert!(stats.pages_profile < 300, "{} pages brought in vain", stats.pages_profile);
    assert_eq!(stats.profile_ms, None);
}

/// EIO while replaying: pages that fail once come later, those that never come are
/// poisoned, all others are right.
#[test]
fn reads_of_a_replay_that_fail_are_tried_again_or_poisoned() {
    begin!();
    let raw = Raw::new();
    let source = FaultySource::wrap(raw.open());
    let lost = 3100..3104;
    let bytes = |pages: std::ops::Range<usize>| {
        ByteRange::new((pages.start * PAGE) as u64, (pages.len() * PAGE) as u64)
    };
    source.never_at_hand();
    source.fail(bytes(3000..3050), Times::Often(9)).fail(bytes(lost.clone()), Times::Always);
    let memory = mapping(PAGES);
    let pager = Pager::builder(source)
        .region(&range(&memory), 0)
        .profile(&raw.profile(2900..3300))
        .start()
        .unwrap();
    replayed(&pager);
    eventually("its reads to end", || pager.stats().pages_poisoned == lost.len() as u64);
    for at in 0..PAGES {
        match common::page_by_kernel(&memory, at * PAGE) {
            Ok(holds) => assert_eq!((holds, lost.contains(&at)), (expected(at), false), "{at}"),
            Err(_) => assert!(lost.contains(&at), "page {at}"),
        }
    }
}
