//! A vCPU's registers, as the guest starts and as the state file keeps them.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use serde::{Deserialize, Serialize};

use super::program;
use crate::PAGE_SIZE;
use crate::layout::{Layout, TSS_OFFSET};

/// Declares a serializable copy of a KVM structure, field by field, so that an
/// error in a state file names the register.
macro_rules! mirror {
    ($name:ident of $kvm:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name { $($field: $type),* }

        impl From<$kvm> for $name {
            fn from(kvm: $kvm) -> Self {
                Self { $($field: kvm.$field.into()),* }
            }
        }

        impl From<$name> for $kvm {
            fn from(saved: $name) -> Self {
                let mut kvm = Self::default(); // some have padding
                $(kvm.$field = saved.$field.into();)*
                kvm
            }
        }
    };
}

mirror!(Registers of kvm_regs {
    rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
    r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
    rip: u64, rflags: u64,
});

mirror!(Segment of kvm_segment {
    base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8, l: u8,
    g: u8, avl: u8, unusable: u8,
});

mirror!(Table of kvm_dtable { base: u64, limit: u16 });

mirror!(SystemRegisters of kvm_sregs {
    cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment, tr: Segment,
    ldt: Segment, gdt: Table, idt: Table,
    cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
    interrupt_bitmap: [u64; 4],
});

/// All the built-in guest has in a vCPU: it uses no FPU, no MSRs, no interrupts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    pub(crate) regs: Registers,
    pub(crate) sregs: SystemRegisters,
}

/// The flags that let ring 3 use `out`.
pub(super) const IOPL_3: u64 = 3 << 12;

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
