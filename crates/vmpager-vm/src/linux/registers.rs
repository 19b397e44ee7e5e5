//! How the boot vCPU enters the kernel: in 64-bit mode, with flat segments and
//! the first 4 GiB mapped one to one.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryBackend;

use super::error::BootError;
use super::write;
use super::zero_page::ZERO_PAGE_GPA;
use crate::PAGE_SIZE;

const GDT_GPA: u64 = 0x500;
const STACK_GPA: u64 = 0x8ff0;
const PAGE_TABLES_GPA: u64 = 0x9000;

/// Selectors of the boot protocol: `__BOOT_CS`, `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// The descriptors they select: flat, 64-bit code; flat, writable data.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Page tables: present and writable; and a page of 2 MiB.
const TABLE: u64 = 0b11;
const HUGE_PAGE: u64 = TABLE | 1 << 7;
const ENTRIES: u64 = 512;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const GIB_MAPPED: u64 = 4;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// MSRs that firmware sets on every vCPU and Linux expects set, as (index,
/// value): `IA32_MTRR_DEF_TYPE` (on, write-back, no ranges: or Linux takes all
/// memory for uncached and does without PAT) and `IA32_MISC_ENABLE` (fast
/// string operations).
pub(crate) const INITIAL_MSRS: [(u32, u64); 2] = [(0x2ff, 1 << 11 | 6), (0x1a0, 1)];

/// How the boot vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    rip: u64,
}

impl Entry {
    pub(super) fn new(rip: u64) -> Self {
        Self { rip }
    }

    /// The boot vCPU's general registers.
    pub(crate) fn regs(&self) -> kvm_regs {
        kvm_regs {
            rip: self.rip,
            rsi: ZERO_PAGE_GPA,
            rsp: STACK_GPA,
            rflags: 2, // reserved; interrupts off
            ..kvm_regs::default()
        }
    }

    /// The boot vCPU's system registers, from those it has after reset.
    pub(crate) fn sregs(&self, reset: kvm_sregs) -> kvm_sregs {
        let data = kvm_segment {
            limit: u32::MAX,
            selector: DATA,
            type_: 3, // read, write, accessed
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let code = kvm_segment { selector: CODE, type_: 11, db: 0, l: 1, ..data };
        let limit = u16::try_from(size_of_val(&GDT) - 1).expect("four descriptors");
        kvm_sregs {
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            gdt: kvm_dtable { base: GDT_GPA, limit, ..kvm_dtable::default() },
            cr0: reset.cr0 | CR0_PE | CR0_PG,
            cr3: PAGE_TABLES_GPA,
            cr4: reset.cr4 | CR4_PAE,
            efer: reset.efer | EFER_LME | EFER_LMA,
            ..reset
        }
    }
}

/// Writes the GDT and the page tables: one page of the fourth level, one of the
/// third, then one of the second for each GiB.
pub(super) fn write_tables<M: GuestMemoryBackend>(memory: &M) -> Result<(), BootError> {
    write(memory, "the GDT", GDT_GPA, &le_bytes(GDT))?;
    let third = PAGE_TABLES_GPA + PAGE_SIZE;
    let second = third + PAGE_SIZE;
    let root = le_bytes([third | TABLE]);
    write(memory, "page tables", PAGE_TABLES_GPA, &root)?;
    let gibs = le_bytes((0..GIB_MAPPED).map(|gib| (second + gib * PAGE_SIZE) | TABLE));
    write(memory, "page tables", third, &gibs)?;
    let pages = (0..GIB_MAPPED * ENTRIES).map(|page| (page * HUGE_PAGE_BYTES) | HUGE_PAGE);
    write(memory, "page tables", second, &le_bytes(pages))
}

fn le_bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}
