//! The guest's work done by host threads, where there is no KVM: same order,
//! same checks, through the mapping the guest would have.

use std::ops::Range;
use std::thread::Builder;
use std::time::{Duration, Instant};

use vmpager_sys::memory::Mapping;

use crate::PAGE_BYTES;
use crate::checksum::checksum;
use crate::device::to_usize;
use crate::error::VmError;
use crate::layout::Layout;
use crate::parallel::split;
use crate::report::{RunReport, Stalls};

/// Computes the checksum table, as the guest does in its prepare round.
pub(crate) fn prepare(memory: &Mapping, layout: &Layout, pages: Range<u64>) {
    std::thread::scope(|scope| {
        for part in split(pages, to_usize(layout.vcpus)) {
            scope.spawn(move || {
                for page in part {
                    let sum = checksum_at(memory, page);
                    memory.write_u64(to_usize(layout.sum_of(page)), sum);
                }
            });
        }
    });
}

/// The checksum of a page as it is in memory.
pub(crate) fn checksum_at(memory: &Mapping, page: u64) -> u64 {
    let mut bytes = [0; PAGE_BYTES];
    memory.read(to_usize(page) * PAGE_BYTES, &mut bytes);
    checksum(&bytes)
}

/// A thread to be a vCPU, with a name by which pagers tell it from others.
pub(crate) fn vcpu_thread(vcpu: u64) -> Builder {
    Builder::new().name(format!("vcpu-{vcpu}"))
}

/// What one thread saw.
struct Round {
    started: Instant,
    done: Instant,
    stalls: Vec<u64>,
    mismatches: u64,
    first_mismatch: Option<u64>,
}

/// Touches and verifies the pages, one thread per vCPU.
///
/// # Errors
///
/// [`VmError::Thread`] if this system refuses one; the others finish first.
pub(crate) fn work(
    memory: &Mapping,
    layout: &Layout,
    pages: &[u32],
    write_every: u64,
    since: Instant,
) -> Result<RunReport, VmError> {
    let rounds: Vec<Round> = std::thread::scope(|scope| {
        let threads = split(0..pages.len() as u64, to_usize(layout.vcpus))
            .into_iter()
            .map(|part| &pages[to_usize(part.start)..to_usize(part.end)])
            .zip(0..)
            .map(|(part, vcpu)| {
                let round = move || round(memory, layout, part, write_every);
                vcpu_thread(vcpu).spawn_scoped(scope, round).map_err(VmError::Thread)
            });
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        Ok::<_, VmError>(
            threads.into_iter().map(|t| t.join().expect("no panic in a round")).collect(),
        )
    })?;
    let started = rounds.iter().map(|r| r.started).min().unwrap_or(since);
    let done = rounds.iter().map(|r| r.done).max().unwrap_or(since);
    Ok(RunReport {
        first_instruction: started.saturating_duration_since(since),
        workload: done.saturating_duration_since(started),
        pages: pages.len() as u64,
        mismatches: rounds.iter().map(|r| r.mismatches).sum(),
        first_mismatch: rounds.iter().find_map(|r| r.first_mismatch),
        stalls: Stalls::new(rounds.into_iter().flat_map(|r| r.stalls).collect()),
    })
}

fn round(memory: &Mapping, layout: &Layout, pages: &[u32], write_every: u64) -> Round {
    let started = Instant::now();
    let mut stalls = Vec::with_capacity(pages.len());
    let (mut mismatches, mut first_mismatch) = (0, None);
    for (i, page) in (1..).zip(pages) {
        let page = u64::from(*page);
        let is_write = write_every != 0 && u64::is_multiple_of(i, write_every);
        stalls.push(nanoseconds(touch(memory, to_usize(page) * PAGE_BYTES, is_write)));
        let expected = memory.read_u64(to_usize(layout.sum_of(page)));
        if checksum_at(memory, page) != expected {
            mismatches += 1;
            first_mismatch = first_mismatch.or(Some(page));
        }
    }
    Round { started, done: Instant::now(), stalls, mismatches, first_mismatch }
}

fn touch(memory: &Mapping, offset: usize, is_write: bool) -> Duration {
    let before = Instant::now();
    let word = memory.read_u64(offset);
    if is_write {
        memory.write_u64(offset, word);
    }
    before.elapsed()
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
