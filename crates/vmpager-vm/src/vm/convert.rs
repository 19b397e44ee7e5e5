//! Conversions by the built-in guest, and what the host finds of them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmpager::core::convert::{Kind, Request};
use vmpager_kvm::private::{Cause, PrivateMemory};

use super::Vm;
use crate::device::{OPS, to_usize};
use crate::error::VmError;
use crate::kvm::{Builtin, Gate, pattern};
use crate::parallel::split;
use crate::private::{ConvertReport, ConvertWorkload, IS_PRIVATE, UNKNOWN};
use crate::report::Stalls;
use crate::workload::Workload;
use crate::{PAGE_BYTES, PAGE_SIZE};

pub(super) const NONE_PRIVATE: VmError = VmError::NotPrivate {
    problem: "this VM's memory cannot be private; build it with `private` set",
};

impl Vm {
    /// Which pages are private, if they can be.
    pub fn private(&self) -> Option<&Arc<PrivateMemory>> {
        self.machine.as_ref().and_then(Builtin::private)
    }

    /// Has every vCPU convert pages of its part of memory, from private to shared
    /// and back. Before each conversion it checks every byte of the pages, and of
    /// those beside them; after it, too; then it fills them. At the end the host
    /// looks at all pages it has, and at which it should not have.
    ///
    /// Contents are the guest's from then on: [`prepare`](Self::prepare) it before
    /// it is saved, or works.
    ///
    /// # Errors
    ///
    /// If memory cannot be private, the guest stops, or a conversion fails. Wrong
    /// pages are no error here: the report counts them.
    pub fn convert(&mut self, workload: &ConvertWorkload) -> Result<ConvertReport, VmError> {
        let private = self.private_for(workload)?;
        self.tag_pages(&private);
        let (mut left, mut seed) = (workload.conversions, workload.seed);
        let (mut took, mut mismatches, mut first_mismatch) = (Duration::ZERO, 0, None);
        while left > 0 {
            let conversions = left.min(OPS as u64);
            let part = ConvertWorkload { conversions, seed, ..workload.clone() };
            took += self.convert_once(&part, &private)?;
            let (wrong, first) = self.device.mismatches();
            mismatches += wrong;
            first_mismatch = first_mismatch.or(first);
            left -= conversions;
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
        let (host_pages, host_mismatches) = self.compare_tags(&private)?;
        let private_pages = private.private_ranges().iter().map(pages_of).sum();
        Ok(ConvertReport {
            conversions: workload.conversions * self.layout.vcpus,
            took,
            mismatches,
            first_mismatch,
            host_pages,
            host_mismatches,
            private_pages,
        })
    }

    /// Has all pages shared, as the VMM's own wish: of a guest_memfd nothing can be
    /// saved. What was private is zeroes then, unless contents are preserved.
    ///
    /// # Errors
    ///
    /// If memory cannot be private, or a conversion fails.
    pub fn share_all(&mut self) -> Result<(), VmError> {
        let private = self.private().ok_or(NONE_PRIVATE)?.clone();
        self.tag_pages(&private);
        for range in private.private_ranges() {
            let len = range.end - range.start;
            private.convert(&Request { gpa: range.start, len, to: Kind::Shared }, Cause::Host)?;
        }
        for page in self.layout.contents() {
            let tag = self.device.tag(page);
            if tag & IS_PRIVATE != 0 {
                self.device.set_tag(page, if private.preserves() { tag & !IS_PRIVATE } else { 0 });
            }
        }
        Ok(())
    }

    /// For benchmarks: the first vCPU does these conversions, or touches pages if
    /// there are none to do, while each of the others touches that many pages of its
    /// own that its VM has not mapped. How long the conversions took, and the touches
    /// of the others. What pages hold is not compared with anything; the guest must be
    /// [prepared](Self::prepare) afterwards if something was converted.
    ///
    /// # Errors
    ///
    /// If memory cannot be private, there are more touches than pages, the guest
    /// stops, or a conversion fails.
    pub fn time_conversions(
        &mut self,
        workload: &ConvertWorkload,
        touches: u64,
    ) -> Result<(Stalls, Stalls), VmError> {
        let private = self.private_for(workload)?;
        let areas = split(self.layout.contents(), to_usize(self.layout.vcpus));
        let mut order = Vec::new();
        for (seed, area) in (workload.seed..).zip(&areas) {
            let all = Workload { touches: Some(touches), seed, ..Workload::default() };
            order.extend(all.pages(area.clone())?);
            let bytes = area.start * PAGE_SIZE..area.end * PAGE_SIZE;
            // The memory behind it stays: it is a file's.
            let unmapped = self.memory.mapping.discard(to_usize(bytes.start)..to_usize(bytes.end));
            unmapped.map_err(|error| VmError::Memory { bytes: bytes.end - bytes.start, error })?;
        }
        self.device.ask_work(&order, 0)?;
        let conversions = to_usize(workload.conversions.min(OPS as u64));
        let (Some(machine), Some(area)) = (&mut self.machine, areas.first()) else {
            return Err(NONE_PRIVATE);
        };
        if conversions > 0 {
            let ops = workload.ops(area, 0);
            let gate = if workload.implicit { Gate::Touch } else { machine.gate() };
            self.device.ask_convert(&[(area.clone(), ops)], private.preserves(), gate);
            for page in area.clone() {
                self.device.set_tag(page, UNKNOWN | self.device.tag(page) & IS_PRIVATE);
            }
        }
        machine.run()?;
        self.check_conversions(&private)?;
        let all = self.device.stalls(order.len());
        let others = all.in_order().iter().skip(to_usize(touches)).copied().collect();
        Ok((self.device.conversion_stalls(0, conversions), Stalls::new(others)))
    }

    /// Says that pages hold what they do in another VM: the one whose snapshot this
    /// one was restored from. Else it is not known what they hold until they are
    /// converted.
    pub fn holds_as(&mut self, other: &Self) {
        for page in self.layout.contents() {
            self.device.set_tag(page, other.device.tag(page));
        }
        self.is_tagged = other.is_tagged;
    }

    fn convert_once(
        &mut self,
        workload: &ConvertWorkload,
        private: &PrivateMemory,
    ) -> Result<Duration, VmError> {
        let Some(machine) = &self.machine else { return Err(NONE_PRIVATE) };
        let areas = split(self.layout.contents(), to_usize(self.layout.vcpus));
        let parts: Vec<_> = (0..)
            .zip(areas)
            .map(|(vcpu, area)| (area.clone(), workload.ops(&area, vcpu)))
            .collect();
        let gate = if workload.implicit { Gate::Touch } else { machine.gate() };
        self.device.ask_convert(&parts, private.preserves(), gate);
        let began = Instant::now();
        self.run_conversions(private)?;
        Ok(began.elapsed())
    }

    /// Has the guest do what it was left.
    pub(super) fn run_conversions(&mut self, private: &PrivateMemory) -> Result<(), VmError> {
        let Some(machine) = &mut self.machine else { return Err(NONE_PRIVATE) };
        machine.run()?;
        self.check_conversions(private)
    }

    /// Whether the guest was told of none that it failed.
    fn check_conversions(&self, private: &PrivateMemory) -> Result<(), VmError> {
        let Some(answer) = self.device.failed_conversion() else { return Ok(()) };
        let failed = private.log().into_iter().rev().find(|c| c.outcome.failed.is_some());
        let answer = answer.cast_signed();
        Err(VmError::ConversionRefused { answer, failed: failed.map(Box::new) })
    }

    /// Memory that can be private, if the guest can ask for conversions so.
    pub(super) fn private_for(
        &self,
        workload: &ConvertWorkload,
    ) -> Result<Arc<PrivateMemory>, VmError> {
        let parts = self.memory.private.as_ref();
        if workload.implicit && parts.is_some_and(|parts| parts.shared_at() == 0) {
            return Err(VmError::NotPrivate {
                problem: "this VM's guest cannot say by an access which kind of page it means; \
                          build it with private pages by address",
            });
        }
        Ok(self.private().ok_or(NONE_PRIVATE)?.clone())
    }

    /// What pages hold is not known at first; which kind they are, is.
    pub(super) fn tag_pages(&mut self, private: &PrivateMemory) {
        self.is_prepared = false;
        self.seed = None;
        self.tag_kinds(private);
    }

    pub(super) fn tag_kinds(&mut self, private: &PrivateMemory) {
        let is_private = in_ranges(private.private_ranges());
        for page in self.layout.contents() {
            let known = if self.is_tagged { self.device.tag(page) & !IS_PRIVATE } else { UNKNOWN };
            let kind = if is_private(page) { IS_PRIVATE } else { 0 };
            self.device.set_tag(page, known | kind);
        }
        self.is_tagged = true;
    }

    /// Compares what the guest says of its pages with what the host has of them:
    /// how many pages it has, and how many are not as they should be.
    fn compare_tags(&self, private: &PrivateMemory) -> Result<(u64, u64), VmError> {
        let is_private = in_ranges(private.private_ranges());
        let bytes = self.layout.memory_bytes();
        let data = self.memory.resident().map_err(|error| VmError::Memory { bytes, error })?;
        let is_data = in_ranges(data);
        let view = self.memory.host_view();
        let (mut pages, mut wrong) = (0, 0);
        for page in self.layout.contents() {
            let tag = self.device.tag(page);
            if is_private(page) != (tag & IS_PRIVATE != 0) {
                wrong += 1;
            } else if tag & IS_PRIVATE != 0 {
                // In a guest_memfd, what it holds must be nowhere else. (A pager may have
                // put zeroes there, beside pages it brought.)
                let is_elsewhere = !private.is_in_place() && is_data(page);
                let at = to_usize(page) * PAGE_BYTES;
                let is_zero = || (at..at + PAGE_BYTES).step_by(8).all(|at| view.read_u64(at) == 0);
                let is_served = self.memory.pager().is_some();
                wrong += u64::from(is_elsewhere && !(is_served && is_zero()));
            } else if tag != UNKNOWN {
                let at = to_usize(page) * PAGE_BYTES;
                self.memory.bring(at);
                let mut found = (at..).step_by(8).map(|at| view.read_u64(at));
                let right = pattern(tag, page).all(|word| found.next() == Some(word));
                (pages, wrong) = (pages + 1, wrong + u64::from(!right));
            }
        }
        Ok((pages, wrong))
    }
}

pub(super) fn pages_of(bytes: &Range<u64>) -> u64 {
    (bytes.end - bytes.start) / PAGE_SIZE
}

/// Whether a page lies in one of these ranges of bytes, which are in order.
pub(super) fn in_ranges(ranges: Vec<Range<u64>>) -> impl Fn(u64) -> bool {
    move |page| {
        let at = page * PAGE_SIZE;
        let after = ranges.partition_point(|range| range.start <= at);
        after.checked_sub(1).and_then(|i| ranges.get(i)).is_some_and(|range| at < range.end)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use crate::{ConvertWorkload, Cpu, PrivateConfig, Vm, VmConfig, VmError};

    /// Threads call the vCPUs out of the guest all the time, in conversions and
    /// between them.
    #[test]
    fn vcpus_that_are_called_out_convert_every_page_all_the_same() {
        let private = Some(PrivateConfig::default());
        let cpu = Cpu::Kvm;
        let config =
            VmConfig { memory_bytes: 16 << 20, vcpus: 2, private, cpu, ..VmConfig::default() };
        let mut vm = match Vm::build(&config) {
            Err(VmError::NoKvm(error)) => {
                return vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            }
            vm => vm.unwrap(),
        };
        let vcpus = vm.machine.as_mut().unwrap().vcpus();
        let kicks: Vec<_> = vcpus.iter().map(|vcpu| vcpu.kick().clone()).collect();
        let (is_over, mut calls) = (AtomicBool::new(false), 0);
        let workload = ConvertWorkload { conversions: 60, ..ConvertWorkload::default() };
        thread::scope(|scope| {
            let caller = scope.spawn(|| {
                let mut calls = 0u64;
                while !is_over.load(Ordering::SeqCst) {
                    kicks.iter().for_each(|kick| kick.call());
                    calls += 1;
                    // They may do something in between.
                    thread::sleep(std::time::Duration::from_micros(200));
                }
                calls
            });
            let report = vm.convert(&workload);
            is_over.store(true, Ordering::SeqCst);
            calls = caller.join().unwrap();
            let report = report.unwrap();
            assert_eq!((report.mismatches, report.host_mismatches), (0, 0), "{report:?}");
            assert_eq!(report.conversions, 120);
        });
        let stats = vm.private().unwrap().stats();
        assert!(
            calls > 0 && (stats.explicit, stats.undone, stats.stands) == (120, 0, 0),
            "{stats:?}"
        );
    }
}
