//! A stopped vCPU with any registers, code and memory: no panic, bounded work,
//! a bounded answer that agrees with itself, and an end to asking again.
//!
//! The input is registers first, in the order of `Input::take`, then memory: a
//! page of it for each guest page, moved a little from one to the next.
#![no_main]

use std::cell::Cell;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events};
use libfuzzer_sys::fuzz_target;
use vmpager_kvm::candidates::{
    Absent, Candidate, CandidateFinder, GuestView, Missing, PAGE_BYTES, Registers, VectorRegisters,
    XsaveLayout,
};

/// No instruction may cost more reads: 32 pages of a gather with 5 page tables
/// each, an event, descriptors.
const MOST_READS: u32 = 500;

/// Where an identity mapping by page tables of 1 GiB pages is, if asked for.
const IDENTITY: u64 = 1 << 45;

const LAYOUT: XsaveLayout =
    XsaveLayout { ymm_high: 576, masks: 1088, zmm_high: 1152, zmm_16_to_31: 1664 };

struct Memory<'a> {
    content: &'a [u8],
    /// One bit for each 64th page.
    missing: u64,
    none: u64,
    reads: Cell<u32>,
}

fn class_of(gpa: u64) -> u64 {
    1 << (gpa / PAGE_BYTES % 64)
}

impl GuestView for Memory<'_> {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Absent> {
        self.reads.set(self.reads.get() + 1);
        assert!(gpa % PAGE_BYTES + bytes.len() as u64 <= PAGE_BYTES, "across pages");
        if self.none & class_of(gpa) != 0 {
            return Err(Absent::NoMemory);
        }
        if self.is_missing(gpa) {
            return Err(Absent::Missing);
        }
        if gpa / 0x2000 == IDENTITY / 0x2000 && bytes.len() == 8 {
            let entry = match gpa & 0x1000 {
                0 => IDENTITY + 0x1001,
                _ => (gpa & 0xff8) << 27 | 0x81,
            };
            bytes.copy_from_slice(&entry.to_le_bytes());
            return Ok(());
        }
        let start = (gpa / PAGE_BYTES).wrapping_mul(37).wrapping_add(gpa % PAGE_BYTES);
        for (at, byte) in (start..).zip(bytes) {
            *byte = self.content[(at % self.content.len() as u64) as usize];
        }
        Ok(())
    }

    fn is_missing(&self, gpa: u64) -> bool {
        self.missing & class_of(gpa) & !self.none != 0
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    /// The next 8 bytes, zeroes after the end.
    fn take(&mut self) -> u64 {
        let (head, rest) = self.0.split_at(self.0.len().min(8));
        self.0 = rest;
        let mut bytes = [0; 8];
        bytes[..head.len()].copy_from_slice(head);
        u64::from_le_bytes(bytes)
    }

    fn segment(&mut self) -> kvm_segment {
        let (base, [s0, s1, type_, flags, l0, l1, l2, l3]) =
            (self.take(), self.take().to_le_bytes());
        kvm_segment {
            base,
            limit: u32::from_le_bytes([l0, l1, l2, l3]),
            selector: u16::from_le_bytes([s0, s1]),
            type_,
            dpl: flags & 3,
            db: flags >> 2 & 1,
            l: flags >> 3 & 1,
            unusable: flags >> 4 & 1,
            ..Default::default()
        }
    }

    fn regs(&mut self) -> kvm_regs {
        let mut regs = kvm_regs::default();
        for register in [
            &mut regs.rip,
            &mut regs.rflags,
            &mut regs.rax,
            &mut regs.rbx,
            &mut regs.rcx,
            &mut regs.rdx,
            &mut regs.rsi,
            &mut regs.rdi,
            &mut regs.rsp,
            &mut regs.rbp,
            &mut regs.r8,
            &mut regs.r15,
        ] {
            *register = self.take();
        }
        regs
    }

    fn sregs(&mut self) -> kvm_sregs {
        let mut sregs = kvm_sregs::default();
        let s = &mut sregs;
        for register in [&mut s.cr0, &mut s.cr3, &mut s.cr4, &mut s.efer] {
            *register = self.take();
        }
        if s.cr3 & 1 != 0 {
            (s.cr0, s.cr3, s.cr4, s.efer) = (1 << 31 | 1, IDENTITY, 1 << 5, 1 << 10);
        }
        for segment in [
            &mut s.cs, &mut s.ss, &mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.tr, &mut s.ldt,
        ] {
            *segment = self.segment();
        }
        for table in [&mut s.gdt, &mut s.idt] {
            table.base = self.take();
            table.limit = (self.take() & 0xffff) as u16;
        }
        sregs
    }

    fn events(&mut self) -> kvm_vcpu_events {
        let [injected, vector, has_error_code, ..] = self.take().to_le_bytes();
        let mut events = kvm_vcpu_events::default();
        events.exception.injected = injected & 1;
        events.exception.pending = injected >> 1 & 1;
        events.interrupt.injected = injected >> 2 & 1;
        events.nmi.injected = injected >> 3 & 1;
        events.nmi.pending = injected >> 4 & 1;
        (events.exception.nr, events.interrupt.nr) = (vector, vector);
        events.exception.has_error_code = has_error_code & 1;
        events
    }
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let (regs, sregs, events) = (input.regs(), input.sregs(), input.events());
    let xsave_bytes = input.take() as u32;
    let (missing, none) = (input.take(), input.take());
    if input.0.is_empty() {
        return;
    }
    let content = input.0;
    let mut memory = Memory { content, missing, none, reads: Cell::new(0) };
    let registers = Registers { regs: &regs, sregs: &sregs, events: &events, xsave_bytes };
    let area: Vec<u8> = content.iter().copied().cycle().take(2688).collect();
    let vectors = || Some(VectorRegisters::from_xsave(&area, &LAYOUT));
    let mut finder = CandidateFinder::new();
    // Each answer makes at least one class of pages present: 64 at most.
    for round in 0.. {
        assert!(round <= 64, "there is always more missing");
        memory.reads.set(0);
        let answer = finder.missing(&registers, &memory, vectors);
        assert!(memory.reads.get() <= MOST_READS, "{} reads", memory.reads.get());
        let mut all = Vec::new();
        // A finder that remembers nothing says the same.
        CandidateFinder::new().all(&registers, &memory, vectors, |c| all.push(c));
        check(&answer, &all, &memory);
        if answer.pages().is_empty() {
            assert!(!answer.ends_early());
            break;
        }
        for candidate in answer.pages() {
            memory.missing &= !class_of(candidate.page);
        }
    }
});

/// The missing ones are those of all that are, each page once, in order.
fn check(answer: &Missing, all: &[Candidate], memory: &Memory<'_>) {
    let mut expected: Vec<Candidate> = Vec::new();
    for candidate in all {
        assert_eq!(candidate.page % PAGE_BYTES, 0);
        let known = expected.iter().any(|known| known.page == candidate.page);
        if memory.is_missing(candidate.page) && !known {
            expected.push(*candidate);
        }
    }
    if expected.len() > Missing::MOST {
        assert!(answer.ends_early());
        expected.truncate(Missing::MOST);
    }
    assert_eq!(answer.pages(), expected);
}
