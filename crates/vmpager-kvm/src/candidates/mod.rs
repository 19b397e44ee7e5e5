//! Which guest pages did a stopped vCPU touch?
//!
//! On a write-only view `KVM_RUN` ends with `EFAULT` on an access to a missing
//! page and does not say which. [`CandidateFinder`] follows the access as the
//! processor does: event delivery, code, page tables, operands, descriptors.
//! The *candidates* are the pages on that way; those that are missing are to be
//! installed.
//!
//! Candidates come in the order in which the processor touches them, so the
//! first that is missing is the one that stopped it; the others would be next.
//! Where the way ends at a missing page (a page table, say),
//! [`Missing::ends_early`] tells: install, and ask again before entering.
//!
//! The rules are those of the Intel SDM, volume 3A, chapters 3 to 7, and the AMD
//! APM, volume 2, chapters 4, 5, 8 and 12. Not followed: the shadow stacks of CET
//! and user interrupts, whose addresses are in MSRs, and guests of the guest.
//!
//! No I/O, no threads, no allocation after [`CandidateFinder::new`], and an
//! amount of work that no guest can raise.

mod decode;
mod descriptor;
mod event;
mod operand;
mod registers;
mod scan;
mod transfer;
mod walk;

use iced_x86::Register;

use decode::{DecodeCache, Instruction, Lookup};
use scan::{Report, Scan};

pub use registers::{Registers, VectorRegisters, XsaveLayout};

/// The unit of candidates: the smallest page of the guest's.
pub const PAGE_BYTES: u64 = 4096;

/// The longest instruction there is.
const MAX_INSTRUCTION: usize = 15;

/// Guest memory, as far as it is there.
pub trait GuestView {
    /// Copies from guest memory. The range never crosses a 4 KiB boundary.
    ///
    /// # Errors
    ///
    /// [`Absent`]: the page must not be touched, or does not exist.
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Absent>;

    /// Whether the 4 KiB page at this address is memory that is missing.
    fn is_missing(&self, gpa: u64) -> bool;
}

/// Why guest memory was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// The page map says that the page is not there.
    Missing,
    /// No memslot has this address.
    NoMemory,
}

/// A page that a vCPU touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Guest-physical address of the 4 KiB page.
    pub page: u64,
    /// What for.
    pub cause: Cause,
    /// How.
    pub access: Access,
}

/// What a page is touched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The instruction's bytes.
    Code,
    /// A page table on the way to another page.
    PageTable,
    /// A memory operand, the stack included.
    Operand,
    /// A segment descriptor or a call gate, in the GDT or an LDT.
    Descriptor,
    /// The entry of an event in the IDT, or in real mode's vector table.
    InterruptTable,
    /// A task state segment.
    TaskState,
    /// The stack an event's frame goes to.
    EventStack,
    /// The first byte of an event's handler.
    Handler,
}

/// How a page is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// It is read.
    Read,
    /// It is written, perhaps read before.
    Write,
    /// Its bytes are executed.
    Execute,
}

/// The candidates that are missing, the likeliest first.
#[derive(Clone, Copy, Debug)]
pub struct Missing {
    pages: [Candidate; Self::MOST],
    len: usize,
    ends_early: bool,
}

impl Missing {
    /// No more than so many are returned: what a gather of 16 elements touches,
    /// each across a page boundary.
    pub const MOST: usize = 32;

    const NONE: Self = Self {
        pages: [Candidate { page: 0, cause: Cause::Code, access: Access::Read }; Self::MOST],
        len: 0,
        ends_early: false,
    };

    /// The missing pages, each once, in the order in which they are touched.
    pub fn pages(&self) -> &[Candidate] {
        self.pages.get(..self.len).unwrap_or_default()
    }

    /// Whether there may be more, once these are installed.
    pub fn ends_early(&self) -> bool {
        self.ends_early
    }

    fn push(&mut self, candidate: Candidate) {
        if self.pages().iter().any(|known| known.page == candidate.page) {
            return;
        }
        match self.pages.get_mut(self.len) {
            Some(free) => {
                *free = candidate;
                self.len += 1;
            }
            None => self.ends_early = true,
        }
    }
}

/// Finds candidates. One per vCPU: it remembers the instructions it decoded.
#[derive(Debug)]
pub struct CandidateFinder {
    cache: DecodeCache,
}

impl Default for CandidateFinder {
    fn default() -> Self {
        Self::new()
    }
}

impl CandidateFinder {
    /// A finder that remembers nothing yet.
    pub fn new() -> Self {
        Self { cache: DecodeCache::new() }
    }

    /// The candidates that are missing; none if nothing the vCPU is known to
    /// touch is.
    ///
    /// `vectors` is asked for the vector registers when they hold addresses, as
    /// for a gather: at most once, for they cost an ioctl. Without them such an
    /// instruction's operands are unknown.
    pub fn missing<V: GuestView>(
        &mut self,
        registers: &Registers<'_>,
        view: &V,
        vectors: impl FnMut() -> Option<VectorRegisters>,
    ) -> Missing {
        let mut missing = Missing::NONE;
        let ends_early = self.scan(registers, view, vectors, |candidate, is_missing| {
            // The view knows best: a page that was read is there.
            if is_missing.unwrap_or_else(|| view.is_missing(candidate.page)) {
                missing.push(candidate);
            }
        });
        missing.ends_early |= ends_early;
        missing
    }

    /// Shows every candidate, missing or not, some more than once.
    pub fn all<V: GuestView>(
        &mut self,
        registers: &Registers<'_>,
        view: &V,
        vectors: impl FnMut() -> Option<VectorRegisters>,
        mut show: impl FnMut(Candidate),
    ) {
        self.scan(registers, view, vectors, |candidate, _| show(candidate));
    }

    /// Follows the vCPU, and tells whether it lost its track at a missing page.
    fn scan<V: GuestView>(
        &mut self,
        registers: &Registers<'_>,
        view: &V,
        mut vectors: impl FnMut() -> Option<VectorRegisters>,
        report: impl Report,
    ) -> bool {
        let mut scan = Scan::new(registers, view, report);
        if let Some(event) = event::Event::of(registers.events) {
            event::deliver(&mut scan, event);
        }
        if let Some(instruction) = fetch(&mut self.cache, &mut scan) {
            operand::touch(&mut scan, instruction, &mut vectors);
            transfer::touch(&mut scan, instruction);
        }
        scan.ends_early()
    }
}

/// The instruction at rip, its bytes being the first candidates.
fn fetch<'c, V: GuestView, R: Report>(
    cache: &'c mut DecodeCache,
    scan: &mut Scan<'_, V, R>,
) -> Option<&'c Instruction> {
    let registers = scan.registers;
    let ip = registers.instruction_pointer();
    let start = registers.linear(registers.segment_base(Register::CS), ip);
    let in_page = usize::try_from(PAGE_BYTES - start % PAGE_BYTES).unwrap_or(MAX_INSTRUCTION);
    let first = in_page.min(MAX_INSTRUCTION);
    let mut bytes = [0; MAX_INSTRUCTION];
    scan.read_code(start, bytes.get_mut(..first)?)?;
    let bitness = registers.bitness();
    match cache.look_up(bitness, ip, bytes.get(..first)?) {
        Lookup::Found(slot) => cache.get(slot),
        Lookup::Invalid => None,
        Lookup::TooShort => {
            let next = registers.linear(start, first as u64);
            scan.read_code(next, bytes.get_mut(first..)?)?;
            match cache.look_up(bitness, ip, &bytes) {
                Lookup::Found(slot) => cache.get(slot),
                Lookup::Invalid | Lookup::TooShort => None,
            }
        }
    }
}

#[cfg(test)]
mod tests;
