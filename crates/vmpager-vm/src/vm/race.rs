//! Conversions of the same pages by all vCPUs at once.
//!
//! Each vCPU fills and checks a part of its own of every page, and all of them
//! convert all pages. A word of a vCPU's part is what it wrote there last or, if
//! contents are not preserved, zero: never another's, nor what it wrote before.

use std::ops::Range;
use std::time::{Duration, Instant};

use vmpager_kvm::private::PrivateMemory;

use super::Vm;
use super::convert::{NONE_PRIVATE, in_ranges, pages_of};
use crate::device::{OPS, RACE_PAGES, to_usize};
use crate::error::VmError;
use crate::kvm::{Gate, pattern};
use crate::private::{ConvertReport, ConvertWorkload, IS_PRIVATE, Op, TO_PRIVATE, UNKNOWN};
use crate::{PAGE_BYTES, PAGE_SIZE};

impl Vm {
    /// As [`convert`](Self::convert), but all vCPUs convert the same 4 MiB (or all
    /// there is), whose first and last page nobody does. When they have ended, they
    /// check every byte once more, and so does the host, of private pages too where
    /// these stay in place.
    ///
    /// # Errors
    ///
    /// As for `convert`; and if memory has fewer than three pages of contents.
    pub fn race(&mut self, workload: &ConvertWorkload) -> Result<ConvertReport, VmError> {
        let private = self.private_for(workload)?;
        self.tag_pages(&private);
        let all = self.layout.contents();
        let area = all.start..all.end.min(all.start + RACE_PAGES as u64);
        let inner = area.start + 1..area.end.saturating_sub(1);
        if inner.is_empty() {
            return Err(VmError::Config {
                field: "pages of contents",
                value: all.end - all.start,
                remedy: "have three at least, one between two that are not converted",
            });
        }
        self.fill_for_race(&area, &private)?;
        let mut wrong = Wrong::default();
        let took = self.race_in(&area, &inner, workload, &private, &mut wrong)?;
        let amid = self.compare_race(&area, &private, !private.preserves());
        self.settle_race(&area, &inner, &private)?;
        wrong.add(self.device.mismatches());
        // By now all of it was filled, and nobody converts.
        let settled = self.compare_race(&area, &private, false);
        for page in inner {
            self.device.set_tag(page, UNKNOWN);
        }
        self.tag_kinds(&private);
        Ok(ConvertReport {
            conversions: workload.conversions * self.layout.vcpus,
            took,
            mismatches: wrong.pages,
            first_mismatch: wrong.first,
            host_pages: settled.0,
            host_mismatches: amid.1 + settled.1,
            private_pages: private.private_ranges().iter().map(pages_of).sum(),
        })
    }

    /// Has the first vCPU make half of the pages private and the others shared, and
    /// fill all of them.
    fn fill_for_race(&mut self, area: &Range<u64>, private: &PrivateMemory) -> Result<(), VmError> {
        let Some(machine) = &self.machine else { return Err(NONE_PRIVATE) };
        let gate = machine.gate();
        let middle = area.start.midpoint(area.end);
        let halves = vec![
            op(&(area.start..middle), TO_PRIVATE, FILLED),
            op(&(middle..area.end), 0, FILLED + 1),
        ];
        let others = (1..self.layout.vcpus).map(|_| (area.clone(), Vec::new()));
        let parts: Vec<_> = std::iter::once((area.clone(), halves)).chain(others).collect();
        self.device.ask_convert(&parts, private.preserves(), gate);
        self.run_conversions(private)?;
        for (number, page) in area.clone().enumerate() {
            for vcpu in 0..to_usize(self.layout.vcpus) {
                self.device.set_own_tag(vcpu, number, self.device.tag(page));
            }
        }
        Ok(())
    }

    fn race_in(
        &mut self,
        area: &Range<u64>,
        inner: &Range<u64>,
        workload: &ConvertWorkload,
        private: &PrivateMemory,
        wrong: &mut Wrong,
    ) -> Result<Duration, VmError> {
        let Some(machine) = &self.machine else { return Err(NONE_PRIVATE) };
        let gate = if workload.implicit { Gate::Touch } else { machine.gate() };
        let mut took = Duration::ZERO;
        let (mut left, mut seed) = (workload.conversions, workload.seed);
        while left > 0 {
            let conversions = left.min(OPS as u64);
            let part = ConvertWorkload { conversions, seed, ..workload.clone() };
            let each = (0..self.layout.vcpus).map(|vcpu| part.ops(inner, vcpu));
            let each: Vec<_> = each.collect();
            self.device.ask_race(area, &each, !private.preserves(), gate);
            let began = Instant::now();
            self.run_conversions(private)?;
            took += began.elapsed();
            wrong.add(self.device.mismatches());
            left -= conversions;
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        }
        Ok(took)
    }

    /// Has every vCPU check its part of all pages, as of the kind they have, and fill
    /// it: conversions that change nothing.
    fn settle_race(
        &mut self,
        area: &Range<u64>,
        inner: &Range<u64>,
        private: &PrivateMemory,
    ) -> Result<(), VmError> {
        let Some(machine) = &self.machine else { return Err(NONE_PRIVATE) };
        let gate = machine.gate();
        let is_private = in_ranges(private.private_ranges());
        let vcpus = to_usize(self.layout.vcpus);
        for (number, page) in area.clone().enumerate() {
            let kind = if is_private(page) { IS_PRIVATE } else { 0 };
            for vcpu in 0..vcpus {
                let known = self.device.own_tag(vcpu, number) & !IS_PRIVATE;
                self.device.set_own_tag(vcpu, number, known | kind);
            }
        }
        let pages: Vec<u64> = inner.clone().collect();
        let runs = pages.chunk_by(|a, b| is_private(*a) == is_private(*b));
        let ops: Vec<Op> = (FILLED + 2..)
            .zip(runs)
            .filter_map(|(tag, run)| {
                let (first, last) = (*run.first()?, *run.last()?);
                let flags = if is_private(first) { TO_PRIVATE } else { 0 };
                Some(op(&(first..last + 1), flags, tag))
            })
            .collect();
        self.device.ask_race(area, &vec![ops; vcpus], !private.preserves(), gate);
        self.run_conversions(private)
    }

    /// Compares what vCPUs say of their parts with what the host has of them: how many
    /// pages it has, and how many are not as they should be.
    fn compare_race(
        &self,
        area: &Range<u64>,
        private: &PrivateMemory,
        may_be_zero: bool,
    ) -> (u64, u64) {
        let is_private = in_ranges(private.private_ranges());
        let parts = self.device.race_parts();
        let (mut pages, mut wrong) = (0, 0);
        for (number, page) in area.clone().enumerate() {
            let at = to_usize(page * PAGE_SIZE);
            let view = match is_private(page) {
                true if !private.is_in_place() => continue,
                // None of the host's views has it; the vCPUs' mapping does.
                true => &self.memory.mapping,
                false => self.memory.host_view(),
            };
            self.memory.bring(at);
            let found: Vec<u64> =
                (at..at + PAGE_BYTES).step_by(8).map(|at| view.read_u64(at)).collect();
            let is_right = |(vcpu, words): (usize, &Range<u64>)| {
                let tag = self.device.own_tag(vcpu, number) & !IS_PRIVATE;
                let words = to_usize(words.start)..to_usize(words.end);
                let expected = pattern(tag, page).skip(words.start);
                let mut both = found.get(words).unwrap_or_default().iter().zip(expected);
                both.all(|(found, word)| *found == word || may_be_zero && *found == 0)
            };
            pages += 1;
            wrong += u64::from(!parts.iter().enumerate().all(is_right));
        }
        (pages, wrong)
    }
}

/// What pages are filled with by nobody's chance.
const FILLED: u32 = 1;

fn op(pages: &Range<u64>, flags: u32, tag: u32) -> Op {
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Op { first: small(pages.start), pages: small(pages.end - pages.start), flags, tag }
}

/// Pages that vCPUs found wrong.
#[derive(Default)]
struct Wrong {
    pages: u64,
    first: Option<u64>,
}

impl Wrong {
    fn add(&mut self, (pages, first): (u64, Option<u64>)) {
        self.pages += pages;
        self.first = self.first.or(first);
    }
}
