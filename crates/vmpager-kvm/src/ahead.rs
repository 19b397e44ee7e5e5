//! Pages that are in place, mapped into the guest's second stage of paging before it
//! touches them (`KVM_PRE_FAULT_MEMORY`, `Documentation/virt/kvm/api.rst`): their first
//! touch is then no stage-2 fault, which costs some microseconds each, more on a host
//! that is a VM itself.
//!
//! A VMM does so between a restore and the first entry, for what a profile says the guest
//! will touch and what is there already. One vCPU suffices: all of a VM share their
//! stage-2 page tables, as long as they are in the same mode (system management is
//! another).
//!
//! Only pages that are **in place** may be given. KVM would wait for one that is missing
//! until somebody brings it; for one that is poisoned the process gets a SIGBUS; and one
//! that carries `KVM_MEMORY_ATTRIBUTE_PRIVATE` is refused, its private side not being
//! there. In a write-only view (see [`exit`](crate::exit)) pages that are in place are
//! mapped as elsewhere.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::{VcpuFd, VmFd};
use vmpager_sys::pre_fault::pre_fault;

use crate::candidates::PAGE_BYTES;

/// The most bytes asked for by one call: the time is looked at after each.
const PIECE: u64 = 64 * PAGE_BYTES;

/// A call that is interrupted, or came while memslots were changed, is tried again so
/// often for one page.
const TRIES: u32 = 16;

/// What mapping ahead came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedAhead {
    /// Pages of 4 KiB that are mapped: so many stage-2 faults at most are saved, fewer
    /// where host memory lies in huge pages, of which one fault maps all.
    pub pages: u64,
    /// Pages that KVM did not map. The guest faults on them as ever.
    pub refused: u64,
    /// Pages for which there was no time.
    pub left: u64,
    /// How long it took.
    pub took: Duration,
}

/// Whether this VM's KVM can map pages ahead (`KVM_CAP_PRE_FAULT_MEMORY`): Linux 6.11
/// with nested paging.
pub fn is_offered(vm: &VmFd) -> bool {
    vm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0
}

/// Has KVM map these ranges of guest-physical addresses, in bytes, in this order, for as
/// long as `most` (a call for 64 pages that has begun is ended). Only whole pages in them
/// count, and all must be in place: see the module. The vCPU must not be in `KVM_RUN`.
///
/// Nothing of it can fail for good: what is not mapped is counted, and costs the guest the
/// fault that it would have cost anyway.
pub fn map_ahead(
    vcpu: &VcpuFd,
    ranges: impl IntoIterator<Item = Range<u64>>,
    most: Duration,
) -> MappedAhead {
    let since = Instant::now();
    let mut mapped = walk(
        ranges,
        |part| pre_fault(vcpu, part.start, part.end - part.start),
        || since.elapsed() < most,
    );
    mapped.took = since.elapsed();
    mapped
}

/// What comes after an error.
enum After {
    /// The same once more.
    Again,
    /// The page after.
    Next,
    /// Nothing: it would be the same everywhere.
    End,
}

impl After {
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Self::Again,
            // Of this page: no memory there, no memslot, memory that is broken.
            Some(libc::EFAULT | libc::ENOENT | libc::EHWPOISON) => Self::Next,
            _ => Self::End,
        }
    }
}

/// Goes through the ranges. `map` maps a part, and says how many bytes of it are mapped.
fn walk(
    ranges: impl IntoIterator<Item = Range<u64>>,
    mut map: impl FnMut(Range<u64>) -> io::Result<u64>,
    mut has_time: impl FnMut() -> bool,
) -> MappedAhead {
    let mut done = MappedAhead::default();
    let (mut ended, mut late) = (false, false);
    for range in ranges {
        let end = range.end / PAGE_BYTES * PAGE_BYTES;
        let Some(mut at) = range.start.checked_next_multiple_of(PAGE_BYTES) else { continue };
        let mut tries = 0;
        while at < end {
            late = late || !has_time();
            if ended || late {
                let rest = if ended { &mut done.refused } else { &mut done.left };
                *rest += (end - at) / PAGE_BYTES;
                break;
            }
            let part = at..at + (end - at).min(PIECE);
            let came = map(part.clone()).map(|bytes| bytes.min(part.end - at) / PAGE_BYTES);
            match came.map_err(|error| After::of(&error)) {
                Ok(pages) if pages > 0 => {
                    done.pages += pages;
                    at += pages * PAGE_BYTES;
                    tries = 0;
                }
                Ok(_) | Err(After::Again) if tries < TRIES => tries += 1,
                Err(After::End) => ended = true,
                Ok(_) | Err(After::Again | After::Next) => {
                    done.refused += 1;
                    at += PAGE_BYTES;
                    tries = 0;
                }
            }
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const P: u64 = PAGE_BYTES;

    /// A KVM that maps at most so many pages by a call, and refuses some.
    struct Fake {
        most: u64,
        /// Errors by page; each is told so often.
        errors: Vec<(u64, i32, u32)>,
        mapped: BTreeSet<u64>,
        calls: Vec<Range<u64>>,
    }

    impl Fake {
        fn new(most: u64, errors: &[(u64, i32, u32)]) -> Self {
            Self { most, errors: errors.to_vec(), mapped: BTreeSet::new(), calls: Vec::new() }
        }

        /// As the kernel does: an error counts only if nothing was mapped before it.
        fn map(&mut self, part: Range<u64>) -> io::Result<u64> {
            assert!(part.start < part.end && part.start.is_multiple_of(P), "{part:?}");
            assert!(part.end.is_multiple_of(P) && part.end - part.start <= PIECE, "{part:?}");
            self.calls.push(part.clone());
            let mut bytes = 0;
            for page in (part.start / P..part.end / P).take(usize::try_from(self.most).unwrap()) {
                let error = self.errors.iter_mut().find(|(at, _, n)| *at == page && *n > 0);
                if let Some((_, errno, times)) = error {
                    if bytes > 0 {
                        break;
                    }
                    *times -= 1;
                    return Err(io::Error::from_raw_os_error(*errno));
                }
                self.mapped.insert(page);
                bytes += P;
            }
            Ok(bytes)
        }

        fn walk(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> MappedAhead {
            walk(ranges, |part| self.map(part), || true)
        }
    }

    /// The first pages.
    fn first(pages: u64) -> impl Iterator<Item = Range<u64>> {
        std::iter::once(0..pages * P)
    }

    fn counts(done: MappedAhead) -> (u64, u64, u64) {
        (done.pages, done.refused, done.left)
    }

    #[test]
    fn all_pages_are_mapped_once_however_short_the_calls_are() {
        let ranges = [0..200 * P, 300 * P..301 * P, 250 * P..260 * P];
        for most in [1, 3, 64, 1000] {
            let mut fake = Fake::new(most, &[]);
            assert_eq!(counts(fake.walk(ranges.clone())), (211, 0, 0), "{most}");
            let all: BTreeSet<u64> = (0..200).chain(250..260).chain(300..301).collect();
            assert_eq!(fake.mapped, all);
        }
        // In the order given.
        let mut fake = Fake::new(1000, &[]);
        fake.walk(ranges.clone());
        let starts: Vec<u64> = fake.calls.iter().map(|call| call.start / P).collect();
        assert_eq!(starts, [0, 64, 128, 192, 300, 250]);
    }

    #[test]
    fn only_whole_pages_count() {
        let mut fake = Fake::new(64, &[]);
        let odd = [1..P, P + 1..4 * P - 1, 7 * P..7 * P, u64::MAX - 1..u64::MAX];
        let backwards = std::iter::once(Range { start: 9 * P, end: 8 * P });
        let done = fake.walk(odd.into_iter().chain(backwards));
        assert_eq!((counts(done), fake.mapped), ((1, 0, 0), BTreeSet::from([2])));
    }

    #[test]
    fn interruptions_are_tried_again_and_not_for_ever() {
        for errno in [libc::EINTR, libc::EAGAIN] {
            let mut fake = Fake::new(64, &[(0, errno, 3), (5, errno, TRIES), (70, errno, 1)]);
            assert_eq!(counts(fake.walk(first(100))), (100, 0, 0));
            let mut fake = Fake::new(64, &[(5, errno, u32::MAX)]);
            assert_eq!(counts(fake.walk(first(100))), (99, 1, 0));
            assert!(fake.calls.len() < 30, "{} calls", fake.calls.len());
        }
        // So are calls that do nothing, and do not say why.
        let mut calls = 0;
        let nothing = |_: Range<u64>| {
            calls += 1;
            Ok(0)
        };
        assert_eq!(counts(walk(first(2), nothing, || true)), (0, 2, 0));
        assert_eq!(calls, 2 * (TRIES + 1));
    }

    #[test]
    fn pages_that_cannot_be_had_are_left_out() {
        for errno in [libc::EFAULT, libc::ENOENT, libc::EHWPOISON] {
            let bad = [0, 1, 63, 64, 99].map(|page| (page, errno, u32::MAX));
            let mut fake = Fake::new(64, &bad);
            assert_eq!(counts(fake.walk(first(100))), (95, 5, 0));
        }
    }

    #[test]
    fn a_kvm_that_cannot_is_asked_once() {
        for errno in [libc::EOPNOTSUPP, libc::ENOTTY, libc::EINVAL, libc::ENOMEM, libc::EIO] {
            let mut fake = Fake::new(64, &[(0, errno, u32::MAX)]);
            let done = fake.walk([0..100 * P, 200 * P..300 * P]);
            assert_eq!((counts(done), fake.calls.len()), ((0, 200, 0), 1), "{errno}");
        }
        // What was mapped before stays counted.
        let mut fake = Fake::new(64, &[(64, libc::ENOMEM, u32::MAX)]);
        assert_eq!(counts(fake.walk(first(100))), (64, 36, 0));
    }

    #[test]
    fn time_is_looked_at_before_each_call() {
        for calls in 0..4 {
            let (mut fake, mut looks) = (Fake::new(64, &[]), 0);
            let in_time = || {
                looks += 1;
                looks <= calls
            };
            let ranges = [0..100 * P, 200 * P..300 * P];
            let done = walk(ranges.clone(), |part| fake.map(part), in_time);
            assert_eq!(fake.calls.len(), calls);
            assert_eq!((done.pages + done.left, done.refused), (200, 0));
            assert_eq!(done.pages, [0, 64, 100, 164][calls]);
        }
    }

    /// More than a call gave is never believed.
    #[test]
    fn an_answer_beyond_what_was_asked_is_cut() {
        let done = walk(first(10), |_| Ok(u64::MAX), || true);
        assert_eq!(counts(done), (10, 0, 0));
    }
}
