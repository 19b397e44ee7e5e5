//! Asynchronous page faults from userspace: while one task of the guest waits for
//! a page, the guest runs another. For unmodified guests, on stock kernels.
//!
//! KVM has a device for that (`Documentation/virt/kvm/x86/msr.rst`), which serves
//! only faults that the kernel itself resolves: with [exits](crate::exit) on
//! missing pages none of them comes there. So userspace plays the device. The
//! decisions are in [`vmpager_core::apf`]; here they are carried out:
//!
//! - The device's MSRs are filtered from KVM and end in userspace
//!   (`KVM_X86_SET_MSR_FILTER`), so that KVM's own device stays off.
//! - *Not present*: the flags word in guest memory, then a page fault with the
//!   token in CR2 (`KVM_SET_VCPU_EVENTS`, with a payload). The vCPU is stopped at
//!   the instruction that missed the page, and all is checked in that moment: Linux
//!   panics if it is told at any other.
//! - *Ready*: the token's word in guest memory, then the guest's vector, as an MSI.
//!   The vCPU's own thread does that too, called out of the guest by whoever
//!   brought the page; everything of the device is done by one thread.
//!
//! A fault that the guest cannot be told of, or was told of already, *parks* the
//! vCPU: it waits in KVM as if halted, so that interrupts are taken meanwhile, which
//! may well let the guest run something else. With interrupts off it just waits.
//!
//! INIT, which turns the device off, does not end in userspace. KVM forgets its own
//! copy of the vector then: one is put there when the device is turned on, where no
//! guest can see it, and whether it is still there is looked at before anything is
//! told.

mod call;
mod local;
mod vcpu;

use kvm_bindings::{KVM_CAP_EXCEPTION_PAYLOAD, kvm_enable_cap};
use kvm_ioctls::{
    Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd,
};
use vmpager_core::apf::{Counts, Register, TokenError};

pub use call::Caller;
pub use vcpu::{AsyncFaults, Told};
pub use vmpager_core::apf::{Always, Features, LongerThan, Never, Policy, Refusal};

use crate::exit::ExitError;

/// The leaf of CPUID whose EAX has KVM's features for its guests.
pub const CPUID_FEATURES: u32 = 0x4000_0001;

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ApfError {
    /// KVM refused something.
    #[error("KVM refused to {what}: {error}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
    /// This KVM has not what the device needs.
    #[error(
        "this KVM has no {lacks}, which asynchronous page faults need; use Linux 5.10 or later, or \
         do without them"
    )]
    Unavailable {
        /// What is missing.
        lacks: &'static str,
    },
    /// A value that the guest cannot have written.
    #[error(
        "MSR {index:#x} cannot have the value {value:#x} on this vCPU; restore with the CPUID and \
         the memory it was saved with"
    )]
    Msr {
        /// The register.
        index: u32,
        /// The value.
        value: u64,
    },
    /// A fault could not be delivered.
    #[error(transparent)]
    Exit(#[from] ExitError),
    /// An error in vmpager.
    #[error("{0}; please report it")]
    Token(#[from] TokenError),
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ApfError {
    move |error| ApfError::Kvm { what, error: error.into() }
}

/// What the device has done on one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApfStats {
    /// Tokens, and faults the guest was not told of, by cause.
    pub counts: Counts,
    /// Times the vCPU was parked.
    pub parked: u64,
    /// Times an INIT was found to have turned the device off.
    pub inits: u64,
}

impl ApfStats {
    /// Faults on pages that were not at hand.
    pub fn waits(&self) -> u64 {
        self.counts.injected + self.counts.refused.iter().sum::<u64>()
    }
}

impl std::ops::Add for ApfStats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            counts: self.counts + other.counts,
            parked: self.parked + other.parked,
            inits: self.inits + other.inits,
        }
    }
}

/// Lets pending exceptions have payloads. Part of what `KVM_GET_VCPU_EVENTS` saves
/// from then on, so a VM that loads such state needs it as well.
///
/// # Errors
///
/// If KVM has that and refuses it.
pub fn allow_payloads(vm: &VmFd) -> Result<(), ApfError> {
    if vm.check_extension_raw(KVM_CAP_EXCEPTION_PAYLOAD.into()) == 0 {
        return Ok(());
    }
    let cap =
        kvm_enable_cap { cap: KVM_CAP_EXCEPTION_PAYLOAD, args: [1, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).map_err(refused("let exceptions have payloads"))
}

/// Keeps the device's MSRs from KVM, in a VM whose vCPUs have not run.
///
/// # Errors
///
/// [`ApfError::Unavailable`], or if KVM refuses.
pub fn take_registers(vm: &VmFd) -> Result<(), ApfError> {
    if vm.check_extension_raw(KVM_CAP_EXCEPTION_PAYLOAD.into()) == 0 {
        return Err(ApfError::Unavailable { lacks: "KVM_CAP_EXCEPTION_PAYLOAD" });
    }
    for (cap, lacks) in [
        (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
        (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    ] {
        if !vm.check_extension(cap) {
            return Err(ApfError::Unavailable { lacks });
        }
    }
    let cap = kvm_enable_cap {
        cap: Cap::X86UserSpaceMsr as u32,
        args: [MsrExitReason::Filter.bits().into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(refused("have filtered MSRs end in userspace"))?;
    let base = *Register::INDICES.start();
    let msr_count = Register::INDICES.end() - base + 1;
    // A bit that is set lets KVM have the register. It reads whole words.
    let allowed = (0..msr_count).filter(|at| Register::of(base + at).is_none());
    let bitmap = allowed.fold(0_u64, |bitmap, at| bitmap | 1 << at).to_le_bytes();
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count,
        bitmap: &bitmap,
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range]).map_err(refused("filter MSRs"))
}
