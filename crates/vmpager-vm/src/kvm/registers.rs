//! A vCPU's registers as the built-in guest starts.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::program;
use crate::PAGE_SIZE;
use crate::layout::{Layout, TSS_OFFSET};

/// The flags that let ring 3 use `out`.
pub(super) const IOPL_3: u64 = 3 << 12;

/// The flag that lets interrupts in. None comes: nothing is set up to send any.
pub(super) const INTERRUPTS: u64 = 1 << 9;

/// General registers at the guest's first instruction.
pub(super) fn initial_regs(layout: &Layout, vcpu: u64) -> kvm_regs {
    kvm_regs {
        rip: layout.code * PAGE_SIZE,
        rsp: layout.stack_top(vcpu),
        // Where the program looks for its parameters.
        r15: program::parameters_gpa(vcpu),
        // Reserved bit 1; interrupts off.
        rflags: IOPL_3 | 2,
        ..Default::default()
    }
}

/// System registers for 64-bit mode at CPL 3, from those of a vCPU just made.
///
/// Ring 3 from the first instruction on: some nested hosts emulate ring 0
/// instruction by instruction, while ring 3 runs natively everywhere.
pub(super) fn initial_sregs(layout: &Layout, mut sregs: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x28 | 3,
        type_: 3, // read, write, accessed
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x30 | 3, type_: 11, db: 0, l: 1, ..data };
    sregs.ss = data;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    let descriptors = layout.gdt * PAGE_SIZE;
    sregs.tr = kvm_segment {
        base: descriptors + TSS_OFFSET,
        limit: 0x67,
        selector: 0x40,
        type_: 11, // busy 64-bit task state segment
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { type_: 2, unusable: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: descriptors, limit: 0x4f, ..Default::default() };
    // No handler: an exception is a shutdown, reported with its rip.
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = 0x8005_0033; // PG AM WP NE ET MP PE
    sregs.cr3 = layout.page_table_root();
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0xd00; // NXE LMA LME
    sregs
}
