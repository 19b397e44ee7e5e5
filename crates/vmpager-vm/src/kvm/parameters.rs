//! What the host leaves for the built-in guest's program, and finds afterwards.

use std::mem::offset_of;

use vmpager_sys::memory::Mapping;

use crate::layout::DEVICE_GPA;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// What a round does.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Command {
    /// Computes the checksums of `count` pages from `first`.
    Prepare = 0,
    /// Touches and verifies `count` pages in the order given.
    Work = 1,
    /// Does `count` conversions, and checks their pages and those beside them.
    Convert = 2,
}

/// How the program asks for a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Gate {
    /// By a hypercall: KVM takes them from ring 0 only, where a SYSCALL gets.
    Hypercall = 0,
    /// By a port, its arguments in the parameter block: where KVM has no such
    /// hypercalls, or emulates ring 0.
    Port = 1,
    /// By touching the pages as what they are to become.
    Touch = 2,
}

/// A vCPU's parameter block, in the device memory; see the assembly for its use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parameters {
    /// A [`Command`].
    pub(crate) command: u64,
    /// Prepare: the first page.
    pub(crate) first: u64,
    /// Number of pages.
    pub(crate) count: u64,
    /// Gpa of the page numbers to touch, u32 each.
    pub(crate) order: u64,
    /// Gpa where to put each touch's cycles, u32 each.
    pub(crate) stalls: u64,
    /// Gpa of the checksum table.
    pub(crate) sums: u64,
    /// Every how many touches one is a write; 0 for never.
    pub(crate) write_every: u64,
    /// Result: pages whose checksum was wrong.
    pub(crate) mismatches: u64,
    /// Result: the first of them.
    pub(crate) first_mismatch: u64,
    /// Convert: gpa of the conversions, 16 bytes each.
    pub(crate) ops: u64,
    /// Gpa of the tags, u32 for each page of memory, if there is private memory.
    pub(crate) tags: u64,
    /// Convert: the end of this vCPU's pages, which start at `first`.
    pub(crate) end: u64,
    /// Convert: whether contents stay.
    pub(crate) preserves: u64,
    /// Convert: a [`Gate`].
    pub(crate) gate: u64,
    /// How far above its address a shared page has another, by which it is reached;
    /// 0 if it has none.
    pub(crate) shared_at: u64,
    /// Result: what a conversion that failed returned.
    pub(crate) failed: u64,
    /// By the port: arguments and answer.
    pub(crate) call: [u64; 4],
    /// Of the program's own: cycles of the last conversion.
    pub(crate) cycles: u64,
    /// Convert: the first 64-bit word of a page that is this vCPU's to fill and check.
    pub(crate) part: u64,
    /// Convert: how many words.
    pub(crate) part_words: u64,
    /// Convert: whether a word may be zero instead, since other vCPUs convert the page.
    pub(crate) may_be_zero: u64,
}

const WORDS: usize = size_of::<Parameters>() / 8;

impl Parameters {
    fn words(&self) -> [u64; WORDS] {
        [
            self.command,
            self.first,
            self.count,
            self.order,
            self.stalls,
            self.sums,
            self.write_every,
            self.mismatches,
            self.first_mismatch,
            self.ops,
            self.tags,
            self.end,
            self.preserves,
            self.gate,
            self.shared_at,
            self.failed,
            self.call[0],
            self.call[1],
            self.call[2],
            self.call[3],
            self.cycles,
            self.part,
            self.part_words,
            self.may_be_zero,
        ]
    }

    /// Writes the block of a vCPU into the device memory.
    pub(crate) fn store(&self, device: &Mapping, vcpu: usize) {
        for (i, word) in self.words().into_iter().enumerate() {
            device.write_u64(vcpu * PAGE_BYTES + i * 8, word);
        }
    }

    /// The results in the block of a vCPU: mismatches, first of them.
    pub(crate) fn load_results(device: &Mapping, vcpu: usize) -> (u64, u64) {
        let word = |offset| device.read_u64(vcpu * PAGE_BYTES + offset);
        (word(offset_of!(Parameters, mismatches)), word(offset_of!(Parameters, first_mismatch)))
    }

    /// What a conversion that failed returned to a vCPU; 0 if none did.
    pub(crate) fn load_failure(device: &Mapping, vcpu: usize) -> u64 {
        device.read_u64(vcpu * PAGE_BYTES + offset_of!(Parameters, failed))
    }

    /// What a vCPU asks for by the port.
    pub(super) fn load_call(device: &Mapping, vcpu: usize) -> [u64; 6] {
        let at = vcpu * PAGE_BYTES + offset_of!(Parameters, call);
        let word = |i: usize| device.read_u64(at + i * 8);
        [word(0), word(1), word(2), 0, 0, 0]
    }

    /// What it is told.
    pub(super) fn store_answer(device: &Mapping, vcpu: usize, answer: u64) {
        device.write_u64(vcpu * PAGE_BYTES + offset_of!(Parameters, call) + 24, answer);
    }
}

/// Where a vCPU's parameter block is.
pub(super) fn parameters_gpa(vcpu: u64) -> u64 {
    DEVICE_GPA + vcpu * PAGE_SIZE
}
