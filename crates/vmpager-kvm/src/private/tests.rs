//! Conversions by a back-end that fails on demand, from several threads.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::{io, thread};

use vmpager_sys::memfd;
use vmpager_sys::memory::Mapping;

use super::*;
use crate::exit::GpaRange;

/// Fails the steps it is told to, and sees to it that no two work on one page.
#[derive(Debug, Default)]
struct Fake {
    calls: Mutex<Vec<String>>,
    fails: Mutex<Vec<&'static str>>,
    /// A bit for each page that a step works on.
    at_work: AtomicU64,
}

impl Fake {
    fn call(&self, what: &str, range: &Range<u64>) -> io::Result<()> {
        let pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
        let mask = pages.clone().fold(0, |mask, page| mask | 1 << page);
        assert_eq!(self.at_work.fetch_or(mask, Ordering::SeqCst) & mask, 0, "{pages:?} twice");
        thread::yield_now();
        self.at_work.fetch_and(!mask, Ordering::SeqCst);
        let call = format!("{what} {pages:?}");
        let mut fails = self.fails.lock().expect("no panic");
        let failing = fails.iter().position(|name| *name == call);
        self.calls.lock().expect("no panic").push(call);
        match failing {
            Some(at) => {
                fails.remove(at);
                Err(io::Error::from_raw_os_error(12))
            }
            None => Ok(()),
        }
    }
}

impl Backend for Arc<Fake> {
    fn name(&self) -> &'static str {
        "a fake"
    }

    fn places(&self) -> Places {
        Places::Two
    }

    fn close(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.call(&format!("close to {to}"), &range)
    }

    fn discard(&self, range: Range<u64>, of: Kind) -> io::Result<()> {
        self.call(&format!("discard {of}"), &range)
    }

    fn open(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.call(&format!("open to {to}"), &range)
    }

    fn reopen(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.call(&format!("reopen to {to}"), &range)
    }
}

fn memory(intent: Intent) -> (Arc<Fake>, PrivateMemory) {
    let fake = Arc::new(Fake::default());
    // Pages 0 to 31 and 32 to 63.
    let slots = [(0, 32 * PAGE_BYTES), (32 * PAGE_BYTES, 32 * PAGE_BYTES)];
    let memory =
        PrivateMemory::new(Box::new(fake.clone()), slots, Kind::Shared, Contents::Zero, intent);
    (fake, memory.expect("slots that make sense"))
}

fn asked(pages: Range<u64>, to: Kind) -> Request {
    Request { gpa: pages.start * PAGE_BYTES, len: (pages.end - pages.start) * PAGE_BYTES, to }
}

#[test]
fn contents_that_cannot_be_preserved_are_refused_beforehand() {
    let slots = [(0, PAGE_BYTES)];
    let fake = Box::new(Arc::new(Fake::default()));
    let refused = PrivateMemory::new(fake, slots, Kind::Shared, Contents::Preserve, Intent::Access);
    let error = refused.expect_err("a fake cannot").to_string();
    assert!(error.contains("a fake cannot preserve"), "{error}");
}

/// A back-end that has two places moves nothing, and its private one cannot be filled.
#[test]
fn private_pages_that_nobody_could_fill_are_not_restored() {
    let (fake, memory) = memory(Intent::Access);
    let refused = memory.restore(0..PAGE_BYTES).expect_err("a fake cannot").to_string();
    let names_all = refused.contains("restored by a fake") && refused.contains("INIT_SHARED");
    assert!(names_all && refused.contains("keep them in place"), "{refused}");
    assert!(fake.calls.lock().expect("no panic").is_empty() && memory.private_ranges().is_empty());
}

#[test]
fn each_step_that_fails_is_told_with_what_stands() {
    let cases: [(&[&'static str], State, u64, &str); 5] = [
        (&["close to private 30..34"], State::Undone, 0, "all is as it was"),
        (&["discard shared 30..32"], State::Undone, 0, "all is as it was"),
        (&["discard shared 32..34"], State::Stands, 2, "2 pages are private now, 2 are not, 0"),
        (&["open to private 30..34"], State::Stands, 4, "4 pages are private now, 0 are not, 4"),
        (
            &["discard shared 30..32", "reopen to shared 30..34"],
            State::Stands,
            0,
            "0 pages are private now, 4 are not, 4 are open to nobody",
        ),
    ];
    for (fails, state, private, told) in cases {
        let (fake, memory) = memory(Intent::Access);
        *fake.fails.lock().expect("no panic") = fails.to_vec();
        let request = asked(30..34, Kind::Private);
        let error = memory.convert(&request, Cause::Hypercall).expect_err("it fails");
        assert!(error.to_string().contains(told), "{error}");
        let logged = memory.log();
        assert_eq!(logged.len(), 1);
        assert_eq!(logged[0].outcome.state(), state, "{error}");
        let ranges = memory.private_ranges();
        let found: u64 = ranges.iter().map(|r| (r.end - r.start) / PAGE_BYTES).sum();
        assert_eq!(found, private, "{fails:?}");
        // Whatever it was, asking again brings it to its end.
        memory.convert(&request, Cause::Hypercall).expect("nothing fails");
        assert_eq!(memory.private_ranges().len(), 2, "one for each slot");
        assert_eq!(
            memory.on_fault(30 * PAGE_BYTES, 1, Kind::Private).ok(),
            Some(AfterFault::Matches)
        );
    }
}

/// Pages with others between them, which have the kind already, are closed one after the
/// other.
#[test]
fn when_a_close_fails_what_was_closed_before_it_is_opened_again() {
    let (fake, memory) = memory(Intent::Access);
    memory.convert(&asked(10..12, Kind::Private), Cause::Hypercall).expect("nothing fails");
    fake.calls.lock().expect("no panic").clear();
    *fake.fails.lock().expect("no panic") = vec!["close to private 12..14"];
    let error = memory.convert(&asked(8..14, Kind::Private), Cause::Hypercall);
    let error = error.expect_err("it fails").to_string();
    assert!(error.contains("closing gpa 0xc000 to 0xe000") && error.contains("all is as it was"));
    let calls = fake.calls.lock().expect("no panic").clone();
    let expected = [
        "close to private 8..10",
        "close to private 12..14",
        "reopen to shared 8..10",
        "reopen to shared 12..14",
        "discard private 8..10",
        "discard private 12..14",
    ];
    assert_eq!(calls, expected);
    assert_eq!(memory.private_ranges(), vec![10 * PAGE_BYTES..12 * PAGE_BYTES]);
    let answer = memory.on_fault(8 * PAGE_BYTES, 1, Kind::Shared).ok();
    assert_eq!(answer, Some(AfterFault::Matches), "open to those who had it");
}

#[test]
fn a_guest_is_told_einval_and_nothing_changes() {
    let (fake, memory) = memory(Intent::Access);
    let einval = (-22i64).cast_unsigned();
    for args in [
        [1, 1, 16],
        [0, 0, 16],
        [0, 65, 16],
        [64 << 12, 1, 16],
        [u64::MAX - 0xfff, 1, 16],
        [0, u64::MAX, 16],
        [0, 1, 16 | 32],
        [0, 1, 3],
    ] {
        let [gpa, pages, flags] = args;
        assert_eq!(memory.hypercall(&[gpa, pages, flags, 0, 0, 0]), einval, "{args:x?}");
    }
    assert_eq!(memory.stats(), ConversionStats { refused: 8, ..ConversionStats::default() });
    assert!(fake.calls.lock().expect("no panic").is_empty() && memory.private_ranges().is_empty());
    assert_eq!(memory.hypercall(&[0, 64, 16, 0, 0, 0]), 0);
    assert_eq!(memory.stats().private_pages, 64);
}

/// An access says what the guest wants, or only what the page was.
#[test]
fn a_fault_on_the_other_kind_is_a_conversion_or_comes_too_late() {
    let (_, explicit) = memory(Intent::Attribute);
    let entered = explicit.on_fault(5 * PAGE_BYTES + 7, 1, Kind::Private);
    assert_eq!(entered.ok(), Some(AfterFault::Enter));
    assert_eq!(explicit.kind(5 * PAGE_BYTES), Some(Kind::Shared), "it stays what it was made");
    assert_eq!(explicit.stats().retried, 1);

    let (_, implicit) = memory(Intent::Access);
    let entered = implicit.on_fault(5 * PAGE_BYTES + 7, 2 * PAGE_BYTES, Kind::Private);
    assert_eq!(entered.ok(), Some(AfterFault::Enter));
    assert_eq!(implicit.private_ranges().first(), Some(&(5 * PAGE_BYTES..7 * PAGE_BYTES)));
    assert_eq!(implicit.stats().implicit, 1);
    let again = implicit.on_fault(5 * PAGE_BYTES, 1, Kind::Private);
    assert_eq!(again.ok(), Some(AfterFault::Matches));
    let outside = implicit.on_fault(64 * PAGE_BYTES, 1, Kind::Private);
    assert_eq!(outside.ok(), Some(AfterFault::Outside));
}

/// `Fake` panics if two conversions work on one page.
#[test]
fn threads_that_convert_the_same_pages_take_turns() {
    let (_, memory) = memory(Intent::Access);
    thread::scope(|scope| {
        for thread in 0..4u64 {
            let memory = &memory;
            scope.spawn(move || {
                for i in 0..500u64 {
                    let first = (i * 7 + thread * 13) % 60;
                    let to = if (i + thread) % 2 == 0 { Kind::Private } else { Kind::Shared };
                    let done = memory.convert(&asked(first..first + 4, to), Cause::Host);
                    done.expect("nothing fails");
                    let _ = memory.on_fault(first * PAGE_BYTES, 1, to).expect("nothing fails");
                }
            });
        }
    });
    let stats = memory.stats();
    assert_eq!((stats.host + stats.implicit >= 2000, stats.undone, stats.stands), (true, 0, 0));
}

/// A fake's step takes a while: whoever holds conversions sees none of them half-way.
#[test]
fn while_conversions_are_held_none_goes_on() {
    let (fake, memory) = memory(Intent::Access);
    let begun = |fake: &Fake| fake.calls.lock().expect("no panic").len();
    thread::scope(|scope| {
        for thread in 0..3u64 {
            let memory = &memory;
            scope.spawn(move || {
                for i in 0..100u64 {
                    let to = if i % 2 == 0 { Kind::Private } else { Kind::Shared };
                    let first = thread * 16;
                    memory.convert(&asked(first..first + 8, to), Cause::Host).expect("it can");
                }
            });
        }
        for _ in 0..40 {
            let held = memory.hold();
            let (calls, kinds) = (begun(&fake), memory.private_ranges());
            (0..5).for_each(|_| thread::yield_now());
            assert_eq!(fake.at_work.load(Ordering::SeqCst), 0, "a step is carried out");
            assert_eq!((begun(&fake), memory.private_ranges()), (calls, kinds));
            drop(held);
            thread::yield_now();
        }
    });
    assert_eq!(memory.stats().host, 300, "each goes on afterwards");
}

/// A back-end whose conversions end when they may.
#[derive(Debug)]
struct Paused {
    has_begun: Barrier,
    may_end: Barrier,
}

impl Backend for Arc<Paused> {
    fn name(&self) -> &'static str {
        "one that pauses"
    }

    fn places(&self) -> Places {
        Places::One
    }

    fn close(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        self.has_begun.wait();
        self.may_end.wait();
        Ok(())
    }

    fn discard(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }

    fn open(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }
}

/// As what it was or as what it becomes, an access finds the page converted when its
/// vCPU enters again; and asks for nothing itself.
#[test]
fn a_fault_amid_a_conversion_waits_for_its_end() {
    for intent in [Intent::Access, Intent::Attribute] {
        for as_ in [Kind::Private, Kind::Shared] {
            let paused = Paused { has_begun: Barrier::new(2), may_end: Barrier::new(2) };
            let paused = Arc::new(paused);
            let (backend, slots) = (Box::new(paused.clone()), [(0, 8 * PAGE_BYTES)]);
            let memory = PrivateMemory::new(backend, slots, Kind::Shared, Contents::Zero, intent)
                .expect("slots that make sense");
            thread::scope(|scope| {
                scope.spawn(|| memory.convert(&asked(2..6, Kind::Private), Cause::Host));
                paused.has_begun.wait();
                let fault = scope.spawn(|| {
                    let after = memory.on_fault(5 * PAGE_BYTES, 1, as_).ok();
                    (after, memory.kind(5 * PAGE_BYTES))
                });
                // It waits, or has come back too early.
                while memory.stats().retried == 0 && !fault.is_finished() {
                    thread::yield_now();
                }
                let elsewhere = memory.on_fault(6 * PAGE_BYTES, 1, Kind::Shared).ok();
                let is_early = fault.is_finished();
                paused.may_end.wait();
                let found = fault.join().expect("no panic");
                assert_eq!(found, (Some(AfterFault::Enter), Some(Kind::Private)), "{as_}");
                assert!(!is_early, "a fault as {as_} did not wait");
                assert_eq!(elsewhere, Some(AfterFault::Matches), "another page's");
            });
            assert_eq!((memory.stats().host, memory.stats().implicit), (1, 0));
        }
    }
}

/// A private page is in none of the host's views, and a shared one in all of them,
/// wherever memslots have it.
#[test]
fn in_place_the_host_reaches_no_private_page() {
    const PAGE: usize = 4096;
    let new_file = || memfd::sealed("guest-memory", 8 * PAGE_BYTES).expect("a memfd");
    let (file, zeroes) = (new_file(), new_file());
    let map = || Arc::new(Mapping::file_shared(file.as_fd(), 8 * PAGE).expect("a mapping"));
    let (vcpus, views) = (map(), [map(), map()]);
    // The second one's memory comes first.
    let slot = |gpa, offset| GpaRange {
        gpa: gpa * PAGE_BYTES,
        offset: offset * PAGE_BYTES,
        len: 4 * PAGE_BYTES,
    };
    let slots = [slot(16, 4), slot(20, 0)];
    // The kernel's writing to it, zeroes, is an error where a store would be a signal.
    let reached = |view: &Mapping| -> Vec<usize> {
        let is_reached = |page: &usize| {
            view.read_from_file(zeroes.as_fd(), page * PAGE..(page + 1) * PAGE).is_ok()
        };
        (0..8).filter(is_reached).collect()
    };
    for contents in [Contents::Zero, Contents::Preserve] {
        let backend = InPlace::new(vcpus.clone(), views.to_vec(), slots.to_vec());
        let ranges = slots.map(|slot| (slot.gpa, slot.len));
        let memory = PrivateMemory::new(
            Box::new(backend),
            ranges,
            Kind::Shared,
            contents,
            Intent::Attribute,
        );
        let memory = memory.expect("slots that make sense");
        let write = |word: u64| (0..8).for_each(|page| vcpus.write_u64(page * PAGE, word));
        let words = || [0, 1, 2, 3, 4, 5, 6, 7].map(|page| vcpus.read_u64(page * PAGE));
        let convert = |pages, to| memory.convert(&asked(pages, to), Cause::Host).expect("it can");
        let lost = |word| if contents == Contents::Zero { 0 } else { word };

        assert!(views.iter().all(|view| reached(view).len() == 8));
        write(7);
        convert(18..22, Kind::Private);
        assert_eq!(words(), [lost(7), lost(7), 7, 7, 7, 7, lost(7), lost(7)]);
        for view in &views {
            assert_eq!(reached(view), [2, 3, 4, 5], "{contents:?}");
        }
        write(9);
        convert(16..20, Kind::Shared);
        assert_eq!(words(), [9, 9, 9, 9, 9, 9, lost(9), lost(9)]);
        for view in &views {
            assert_eq!(reached(view), [2, 3, 4, 5, 6, 7], "{contents:?}");
        }
        write(5);
        convert(20..22, Kind::Shared);
        assert_eq!(words(), [lost(5), lost(5), 5, 5, 5, 5, 5, 5]);
    }
}
