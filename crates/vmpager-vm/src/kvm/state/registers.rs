//! The registers that are read and written as one structure each.

use kvm_bindings::{kvm_xcr, kvm_xcrs};
use serde::{Deserialize, Serialize};

use super::mirror::mirror;

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

mirror!(DebugRegisters of kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64 });

/// An extended control register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct ExtendedControl {
    pub(crate) xcr: u32,
    pub(crate) value: u64,
}

/// Those a vCPU has: none without XSAVE.
pub(super) fn extended_controls(kvm: &kvm_xcrs) -> Vec<ExtendedControl> {
    let count = usize::try_from(kvm.nr_xcrs).unwrap_or(usize::MAX);
    let xcrs = kvm.xcrs.iter().take(count);
    xcrs.map(|xcr| ExtendedControl { xcr: xcr.xcr, value: xcr.value }).collect()
}

/// For KVM; `None` if there are more than it has room for.
pub(super) fn kvm_extended_controls(saved: &[ExtendedControl]) -> Option<kvm_xcrs> {
    let mut kvm = kvm_xcrs { nr_xcrs: u32::try_from(saved.len()).ok()?, ..Default::default() };
    for (xcr, saved) in kvm.xcrs.get_mut(..saved.len())?.iter_mut().zip(saved) {
        *xcr = kvm_xcr { xcr: saved.xcr, value: saved.value, ..Default::default() };
    }
    Some(kvm)
}
