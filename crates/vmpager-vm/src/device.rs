//! The device memory: where the host leaves a run's parameters and finds its
//! results. Always present, so that a run measures guest memory only.

use std::ops::Range;
use std::sync::Arc;

use vmpager_sys::memory::Mapping;

use crate::error::VmError;
use crate::kvm::{Command, Gate, Parameters};
use crate::layout::{DEVICE_GPA, Layout};
use crate::parallel::split;
use crate::private::Op;
use crate::report::Stalls;
use crate::{PAGE_BYTES, kvm};

/// Parameter blocks (a page per vCPU), then the order, then the stalls; if there is
/// private memory, then tags, then conversions, then each vCPU's own tags of the pages
/// that all of them convert.
#[derive(Debug)]
pub(crate) struct Device {
    mapping: Arc<Mapping>,
    vcpus: usize,
    /// Bytes of the order, of the stalls, and of the tags.
    table_bytes: usize,
    sums: u64,
    /// How far above its address a shared page has another; 0 if it has none.
    shared_at: u64,
}

impl Device {
    pub(crate) fn new(layout: &Layout, converts: bool, shared_at: u64) -> Result<Self, VmError> {
        let vcpus = to_usize(layout.vcpus);
        let table_bytes = (to_usize(layout.memory_pages) * 4).next_multiple_of(PAGE_BYTES);
        let per_vcpu = if converts { OPS * OP_BYTES + RACE_PAGES * 4 } else { 0 };
        let tables = if converts { 3 } else { 2 };
        let len =
            (vcpus * (PAGE_BYTES + per_vcpu) + tables * table_bytes).next_multiple_of(PAGE_BYTES);
        let mapping = Mapping::anonymous(len)
            .map_err(|error| VmError::Memory { bytes: len as u64, error })?;
        let sums = layout.sum_of(0);
        Ok(Self { mapping: Arc::new(mapping), vcpus, table_bytes, sums, shared_at })
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// What all commands need.
    fn parameters(&self) -> Parameters {
        let (sums, shared_at) = (self.sums, self.shared_at);
        let tags = DEVICE_GPA + self.tag_at(0) as u64;
        Parameters { sums, tags, shared_at, ..Parameters::default() }
    }

    /// Asks every vCPU for the checksums of its part of the pages.
    pub(crate) fn ask_prepare(&self, pages: Range<u64>) {
        for (vcpu, part) in split(pages, self.vcpus).into_iter().enumerate() {
            let parameters = Parameters {
                command: Command::Prepare as u64,
                first: part.start,
                count: part.end - part.start,
                ..self.parameters()
            };
            parameters.store(&self.mapping, vcpu);
        }
    }

    /// Asks every vCPU to touch its part of the pages.
    pub(crate) fn ask_work(&self, pages: &[u32], write_every: u64) -> Result<(), VmError> {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.mapping.write(self.order_at(0), &bytes);
        let stalls = self.stalls_at(0)..self.stalls_at(pages.len()).next_multiple_of(PAGE_BYTES);
        self.mapping
            .populate(stalls)
            .map_err(|error| VmError::Memory { bytes: bytes.len() as u64, error })?;
        let parts = split(0..pages.len() as u64, self.vcpus);
        for (vcpu, part) in parts.into_iter().enumerate() {
            let first = to_usize(part.start);
            let parameters = Parameters {
                command: Command::Work as u64,
                count: part.end - part.start,
                order: DEVICE_GPA + self.order_at(first) as u64,
                stalls: DEVICE_GPA + self.stalls_at(first) as u64,
                write_every,
                ..self.parameters()
            };
            parameters.store(&self.mapping, vcpu);
        }
        Ok(())
    }

    /// Asks every vCPU for its conversions, in its part of the pages.
    pub(crate) fn ask_convert(&self, parts: &[(Range<u64>, Vec<Op>)], preserves: bool, gate: Gate) {
        for (vcpu, (area, ops)) in parts.iter().enumerate() {
            let parameters = self.conversions(vcpu, area, ops, gate);
            Parameters { preserves: preserves.into(), ..parameters }.store(&self.mapping, vcpu);
        }
    }

    /// Asks every vCPU for conversions of the same pages, at most [`RACE_PAGES`]. Each
    /// fills and checks a part of every page, by tags of its own.
    pub(crate) fn ask_race(
        &self,
        area: &Range<u64>,
        each: &[Vec<Op>],
        may_be_zero: bool,
        gate: Gate,
    ) {
        for (vcpu, (ops, words)) in each.iter().zip(self.race_parts()).enumerate() {
            let own_tags = DEVICE_GPA + self.own_tag_at(vcpu, 0) as u64;
            let parameters = Parameters {
                tags: own_tags - area.start * 4,
                // It cannot tell what others made of them.
                preserves: 1,
                may_be_zero: may_be_zero.into(),
                part: words.start,
                part_words: words.end - words.start,
                ..self.conversions(vcpu, area, ops, gate)
            };
            parameters.store(&self.mapping, vcpu);
        }
    }

    /// Which words of each page are whose in a race.
    pub(crate) fn race_parts(&self) -> Vec<Range<u64>> {
        split(0..WORDS, self.vcpus)
    }

    /// Leaves a vCPU's conversions for it, and says what is in common of all.
    fn conversions(&self, vcpu: usize, area: &Range<u64>, ops: &[Op], gate: Gate) -> Parameters {
        let at = self.ops_at(vcpu * OPS);
        for (op, at) in ops.iter().take(OPS).zip((at..).step_by(OP_BYTES)) {
            let words = [op.first, op.pages, op.flags, op.tag].map(u32::to_le_bytes);
            self.mapping.write(at, words.as_flattened());
        }
        Parameters {
            command: Command::Convert as u64,
            first: area.start,
            end: area.end,
            count: ops.len().min(OPS) as u64,
            ops: DEVICE_GPA + at as u64,
            gate: gate as u64,
            part_words: WORDS,
            ..self.parameters()
        }
    }

    /// What a page holds, as far as the guest has told.
    pub(crate) fn tag(&self, page: u64) -> u32 {
        let mut bytes = [0; 4];
        self.mapping.read(self.tag_at(page), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Says what a page holds.
    pub(crate) fn set_tag(&self, page: u64, tag: u32) {
        self.mapping.write(self.tag_at(page), &tag.to_le_bytes());
    }

    /// What a vCPU's part of a page holds that all of them convert, by its number there.
    pub(crate) fn own_tag(&self, vcpu: usize, number: usize) -> u32 {
        let mut bytes = [0; 4];
        self.mapping.read(self.own_tag_at(vcpu, number), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Says what it holds.
    pub(crate) fn set_own_tag(&self, vcpu: usize, number: usize, tag: u32) {
        self.mapping.write(self.own_tag_at(vcpu, number), &tag.to_le_bytes());
    }

    /// What the first conversion that failed returned, if one did.
    pub(crate) fn failed_conversion(&self) -> Option<u64> {
        (0..self.vcpus).map(|v| Parameters::load_failure(&self.mapping, v)).find(|f| *f != 0)
    }

    /// Pages with a wrong checksum, and the first of them (of the first vCPU
    /// that found one).
    pub(crate) fn mismatches(&self) -> (u64, Option<u64>) {
        let mut total = 0;
        let mut first_of_all = None;
        for vcpu in 0..self.vcpus {
            let (count, first) = Parameters::load_results(&self.mapping, vcpu);
            total += count;
            if count > 0 {
                first_of_all = first_of_all.or(Some(first));
            }
        }
        (total, first_of_all)
    }

    /// The stalls of the last run's touches.
    pub(crate) fn stalls(&self, touches: usize) -> Stalls {
        let mut bytes = vec![0; touches * 4];
        self.mapping.read(self.stalls_at(0), &mut bytes);
        Self::stalls_in(&bytes)
    }

    /// How long a vCPU's conversions took.
    pub(crate) fn conversion_stalls(&self, vcpu: usize, conversions: usize) -> Stalls {
        let mut bytes = vec![0; conversions * OP_BYTES];
        self.mapping.read(self.ops_at(vcpu * OPS), &mut bytes);
        let cycles = bytes.as_chunks::<OP_BYTES>().0.iter().flat_map(|op| op[12..].to_vec());
        Self::stalls_in(&cycles.collect::<Vec<u8>>())
    }

    /// Cycles, u32 each.
    fn stalls_in(bytes: &[u8]) -> Stalls {
        let nanoseconds_per_cycle = kvm::nanoseconds_per_cycle();
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "2^32 cycles are a few seconds, positive and far below 2^64 ns"
        )]
        let nanoseconds = |cycles: u32| (f64::from(cycles) * nanoseconds_per_cycle) as u64;
        let cycles = bytes.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c));
        Stalls::new(cycles.map(nanoseconds).collect())
    }

    fn tag_at(&self, page: u64) -> usize {
        self.stalls_at(0) + self.table_bytes + to_usize(page) * 4
    }

    fn ops_at(&self, index: usize) -> usize {
        self.stalls_at(0) + 2 * self.table_bytes + index * OP_BYTES
    }

    fn own_tag_at(&self, vcpu: usize, number: usize) -> usize {
        self.ops_at(self.vcpus * OPS) + (vcpu * RACE_PAGES + number) * 4
    }

    fn order_at(&self, index: usize) -> usize {
        self.vcpus * PAGE_BYTES + index * 4
    }

    fn stalls_at(&self, index: usize) -> usize {
        self.order_at(index) + self.table_bytes
    }
}

/// Conversions that a vCPU can be asked for at a time.
pub(crate) const OPS: usize = 4096;
const OP_BYTES: usize = 16;
/// Pages that all vCPUs can be asked to convert.
pub(crate) const RACE_PAGES: usize = 1024;
/// 64-bit words in a page.
const WORDS: u64 = PAGE_BYTES as u64 / 8;

/// Guest memory is at most 32 GiB.
pub(crate) fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("64-bit host")
}
