//! A vCPU's registers as the built-in guest starts.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::parameters::parameters_gpa;
use super::refused;
use crate::PAGE_SIZE;
use crate::error::VmError;
use crate::layout::{Layout, TSS_OFFSET};

/// The flags that let ring 3 use `out`.
pub(super) const IOPL_3: u64 = 3 << 12;

/// The flag that lets interrupts in. None comes: nothing is set up to send any.
pub(super) const INTERRUPTS: u64 = 1 << 9;

const EFER: u64 = 0xd00; // NXE LMA LME
const SYSCALL_ENABLE: u64 = 1;

/// Has SYSCALL go to that address, in ring 0, and SYSRET back to ring 3 with the
/// segments the guest has there.
pub(super) fn set_gate(vcpu: &VcpuFd, address: u64) -> Result<(), VmError> {
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const SYSCALL_MASK: u32 = 0xc000_0084;
    let msrs = [(STAR, 0x20 << 48 | 0x08 << 32), (LSTAR, address), (SYSCALL_MASK, 0)];
    let msrs = msrs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&msrs).expect("fewer than KVM takes");
    vcpu.set_msrs(&msrs).map_err(refused("set MSRs"))?;
    let mut sregs = vcpu.get_sregs().map_err(refused("read system registers"))?;
    sregs.efer |= SYSCALL_ENABLE;
    vcpu.set_sregs(&sregs).map_err(refused("set system registers"))
}

/// General registers at the guest's first instruction.
pub(super) fn initial_regs(layout: &Layout, vcpu: u64) -> kvm_regs {
    kvm_regs {
        rip: layout.code * PAGE_SIZE,
        rsp: layout.stack_top(vcpu),
        // Where the program looks for its parameters.
        r15: parameters_gpa(vcpu),
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
    sregs.efer = EFER;
    sregs
}
