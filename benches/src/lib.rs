//! What the benchmarks run on: a guest in long mode, as a Linux one stops, with
//! 4-level page tables, a kernel's tables and instructions of its programs.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events};
use vmpager_kvm::candidates::{Absent, GuestView, PAGE_BYTES, Registers};

/// Where programs' code begins.
pub const CODE: u64 = 0x5555_5540_0000;
/// Where instructions find their operands.
pub const DATA: u64 = 0x7ffd_1000_0000;
/// The stack pointer.
pub const STACK: u64 = 0x7ffd_8000_0800;
/// Pages of code.
pub const CODE_PAGES: u64 = 64;

const TABLES: u64 = 0xffff_fe00_0000_1000;
const MEMORY_PAGES: usize = 1024;

/// Instructions of programs, each with a memory operand at rbx, rsi, rdi or rsp.
pub const INSTRUCTIONS: [(&str, &[u8]); 8] = [
    ("mov rax,[rbx]", b"\x48\x8b\x03"),
    ("mov [rbx+0x18],rax", b"\x48\x89\x43\x18"),
    ("movzx eax,word [rbx+rcx*2]", b"\x0f\xb7\x04\x4b"),
    ("vmovdqu ymm0,[rsi]", b"\xc5\xfe\x6f\x06"),
    ("push rbp", b"\x55"),
    ("call [rbx+0x20]", b"\xff\x53\x20"),
    ("rep movsb", b"\xf3\xa4"),
    ("lock cmpxchg [rbx],edx", b"\xf0\x0f\xb1\x13"),
];

/// Guest memory with a bitmap of what is present, as a page map has it.
#[derive(Debug)]
pub struct Memory {
    bytes: Vec<u8>,
    present: Vec<AtomicU64>,
    next: u64,
}

impl GuestView for Memory {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Absent> {
        let start = usize::try_from(gpa).map_err(|_| Absent::NoMemory)?;
        let end = start.checked_add(bytes.len()).ok_or(Absent::NoMemory)?;
        let from = self.bytes.get(start..end).ok_or(Absent::NoMemory)?;
        if self.is_missing(gpa) {
            return Err(Absent::Missing);
        }
        bytes.copy_from_slice(from);
        Ok(())
    }

    fn is_missing(&self, gpa: u64) -> bool {
        let page = gpa / PAGE_BYTES;
        let word = usize::try_from(page / 64).ok().and_then(|word| self.present.get(word));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 0)
    }
}

impl Memory {
    fn put(&mut self, gpa: u64, from: &[u8]) {
        let start = usize::try_from(gpa).expect("memory of a few MiB");
        self.bytes[start..start + from.len()].copy_from_slice(from);
    }

    fn entry(&self, gpa: u64) -> u64 {
        let mut entry = [0; 8];
        self.read(gpa, &mut entry).expect("tables are in memory, and nothing is missing yet");
        u64::from_le_bytes(entry)
    }

    fn new_page(&mut self) -> u64 {
        self.next += PAGE_BYTES;
        self.next
    }
}

/// A stopped vCPU and its memory.
#[derive(Debug)]
pub struct Guest {
    /// All of it is present at first.
    pub memory: Memory,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// No event at first.
    pub events: kvm_vcpu_events,
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// A guest in ring 3 at [`CODE`].
    pub fn new() -> Self {
        let pages = MEMORY_PAGES;
        let memory = Memory {
            bytes: vec![0; pages << 12],
            present: (0..pages / 64).map(|_| AtomicU64::new(u64::MAX)).collect(),
            next: PAGE_BYTES,
        };
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK,
            rbx: DATA,
            rsi: DATA,
            rdi: DATA + 0x100,
            rcx: 0x40,
            rflags: 2,
            ..Default::default()
        };
        let data = kvm_segment { dpl: 3, db: 1, type_: 3, ..Default::default() };
        let mut sregs = kvm_sregs {
            cs: kvm_segment { l: 1, db: 0, type_: 11, ..data },
            ss: data,
            tr: kvm_segment { base: TABLES + 0x3000, limit: 0x67, ..Default::default() },
            cr0: 1 << 31 | 1,
            cr3: PAGE_BYTES,
            cr4: 1 << 5,
            efer: 0xd00,
            ..Default::default()
        };
        (sregs.idt.base, sregs.idt.limit) = (TABLES, 0xfff);
        (sregs.gdt.base, sregs.gdt.limit) = (TABLES + 0x1000, 0x7f);
        let mut guest = Self { memory, regs, sregs, events: kvm_vcpu_events::default() };
        for page in 0..CODE_PAGES {
            guest.map(CODE + page * PAGE_BYTES);
        }
        for page in [DATA, DATA + 0x1000, STACK, STACK - 0x1000] {
            guest.map(page);
        }
        guest.put_kernel_tables();
        guest
    }

    fn put_kernel_tables(&mut self) {
        let handler = TABLES + 0x1_0000;
        for page in 0..6 {
            self.map(TABLES + page * PAGE_BYTES);
        }
        self.map(handler);
        let h = handler.to_le_bytes();
        let gate = [h[0], h[1], 0x10, 0, 0, 0x8e, h[2], h[3], h[4], h[5], h[6], h[7], 0, 0, 0, 0];
        self.put(TABLES + 14 * 16, &gate);
        self.put(TABLES + 0x1010, &[0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0]);
        self.put(TABLES + 0x3004, &(TABLES + 0x5000).to_le_bytes());
    }

    /// Maps a page, and says where; the tables on the way, too.
    pub fn map(&mut self, linear: u64) -> u64 {
        let mut table = self.sregs.cr3;
        for level in (0..4).rev() {
            let slot = table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
            let mut entry = self.memory.entry(slot);
            if entry & 1 == 0 {
                entry = self.memory.new_page() | 0x67;
                self.memory.put(slot, &entry.to_le_bytes());
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        table
    }

    /// The page table with a page's entry in it.
    pub fn table_of(&self, linear: u64) -> u64 {
        [3, 2, 1].into_iter().fold(self.sregs.cr3, |table, level| {
            let slot = table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
            self.memory.entry(slot) & 0x000f_ffff_ffff_f000
        })
    }

    /// Puts bytes into mapped memory, on one page.
    pub fn put(&mut self, linear: u64, bytes: &[u8]) {
        let gpa = self.map(linear);
        self.memory.put(gpa + linear % PAGE_BYTES, bytes);
    }

    /// Makes a page missing.
    pub fn take_away(&self, gpa: u64) {
        let page = gpa / PAGE_BYTES;
        let word = usize::try_from(page / 64).ok().and_then(|word| self.memory.present.get(word));
        word.expect("a page of memory").fetch_and(!(1 << (page % 64)), Ordering::Release);
    }

    /// What a finder is asked with.
    pub fn registers(&self) -> Registers<'_> {
        Registers { regs: &self.regs, sregs: &self.sregs, events: &self.events, xsave_bytes: 2696 }
    }
}
